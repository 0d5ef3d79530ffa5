"""The learning rate as a function of the epochs done so far."""

from __future__ import annotations

from collections.abc import Callable

WARM_UP = 0.05  # of all epochs


def make_schedule(lr: float, num_epochs: int, lrdt: int | None) -> Callable[[float], float]:
    """Learning rate after so many epochs, a fraction included.

    With `lrdt`, a tenth every `lrdt` epochs. Otherwise it goes up for a twentieth of the run and
    then down to 0, both in a line.

    Args:
        lr: the peak.
    """

    def decayed(epochs: float) -> float:
        return lr * 0.1 ** (int(epochs) // lrdt)

    def triangular(epochs: float) -> float:
        progress = epochs / num_epochs
        rising = 0.01 + 0.99 * progress / WARM_UP
        falling = (1 - progress) / (1 - WARM_UP)
        return lr * min(rising, falling)

    return decayed if lrdt else triangular
