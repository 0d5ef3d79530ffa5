"""Whether this GPU can run the fused kernels of `layers`, and the switch that lets them run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.errors import first_line

_fusing = False


@functools.cache
def usable() -> bool:
    """Whether Triton compiles here: it needs a C compiler, Python's headers, and an Ampere GPU.

    Where it does not, a line says so, and torch's own kernels train.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        from layers import fused_optimizer

        one = torch.ones(1, 1, 1, 1, device="cuda")
        out = torch.empty(1, 1, dtype=torch.bfloat16, device="cuda")
        fused_optimizer.nesterov_momentum(one, one.clone(), 0.9, out)
    except Exception as error:  # of Triton, of the C compiler, or of loading what that made
        reason = first_line(error)
        print(f"training takes longer without Triton ({reason}): install gcc and python3-dev")
        return False
    return True


@contextmanager
def fusing() -> Iterator[None]:
    """Context manager: modules that `utils.training.fuse.fuse` changed run fused."""
    global _fusing
    _fusing = True
    try:
        yield
    finally:
        _fusing = False


def are_fusing() -> bool:
    return _fusing
