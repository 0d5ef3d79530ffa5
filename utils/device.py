"""Which device torch uses here, and how exactly it multiplies there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


def default_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_format(device: torch.device, model: nn.Module) -> torch.memory_format:
    """How weights and images lie in memory: cuDNN's fast kernels want the channels last."""
    # of weights (O, I, D, H, W) torch cannot put them there
    has_3d = any(p.ndim == 5 for p in model.parameters())
    wanted = device.type == "cuda" and not has_3d
    return torch.channels_last if wanted else torch.preserve_format


def full_precision() -> AbstractContextManager[None]:
    """Context manager: float32 convolutions on a GPU multiply in float32.

    By default they round their operands to TF32's 11 bits, which moves values across the ties of
    the next quantizer: a fake quantized network would no longer predict what its INT8 engine does.
    """
    return _cudnn("allow_tf32", False)


def tuned_convolutions() -> AbstractContextManager[None]:
    """Context manager: cuDNN times several kernels for each new convolution, and keeps the best.

    That takes seconds for a network, so it is for what runs thousands of times.
    """
    return _cudnn("benchmark", True)


@contextmanager
def _cudnn(switch: str, value: bool) -> Iterator[None]:
    """Context manager: one of cuDNN's switches has this value."""
    before = getattr(torch.backends.cudnn, switch)
    setattr(torch.backends.cudnn, switch, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, switch, before)
