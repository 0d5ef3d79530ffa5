"""How equal two results are. The functions take NumPy arrays and torch tensors alike."""

from __future__ import annotations

import math
from typing import Any


def percent_equal(a: Any, b: Any) -> float:
    """Share of the elements of `a` (N,) that equal those of `b` (N,), in percent.

    With labels for `b` this is accuracy, with another network's predictions it is agreement.
    """
    return 100 * float((a == b).sum()) / len(a)


def sqnr_db(exact: Any, rounded: Any) -> float:
    """Signal-to-quantization-noise ratio of `rounded` in decibels; infinite if nothing differs."""
    signal = float((exact**2).sum())
    noise = float(((rounded - exact) ** 2).sum())
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """Ratio of two sums of squares in decibels; infinite without noise."""
    if noise == 0:
        return math.inf
    ratio = signal / noise
    # 0 where the noise is infinite, too
    return 10 * math.log10(ratio) if ratio else -math.inf
