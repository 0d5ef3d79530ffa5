"""The way of raw images into a network: bytes in, normalised channels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError


class Normalize(nn.Module):
    """(N, H, W, C) uint8 -> (N, C, H, W): (pixel / 255 - mean) / std of each channel.

    Args:
        mean, std: of each channel, in units of the full range (0..1).
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        # (pixel / 255 - mean) / std = pixel * (1 / (255 std)) + (-mean / std)
        scale = [1 / (255 * s) for s in std]
        offset = [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # TensorRT takes bytes only if a cast is the first to read them
        x = images.to(self.scale.dtype)
        x = x.permute(0, 3, 1, 2)  # NHWC -> NCHW
        x = x * self.scale + self.offset
        # cuDNN wants them as bytes lie in memory, a `view` in the network as NCHW has it
        return x if x.is_cuda else x.clone(memory_format=torch.contiguous_format)


class FromImages(nn.Module):
    """`model` behind `Normalize`: (N, H, W, C) uint8 -> `model`'s logits of (N, C, H, W).

    Args:
        mean, std: of each channel, in units of the full range (0..1).
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(self.normalize(images)))


def logits_of(result: Any) -> Tensor:
    """A network's logits: its result, the first of several, or what it calls so.

    Other results are those of auxiliary heads, or features.

    Raises:
        UserError: nothing tells which result it is.
    """
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) and ("logits" in result or len(result) == 1):
        return result["logits"] if "logits" in result else next(iter(result.values()))
    if isinstance(result, Sequence) and result and isinstance(result[0], Tensor):
        return result[0]
    names = f" of {', '.join(map(str, result))}" if isinstance(result, Mapping) else ""
    what = f"the network returns a {type(result).__name__}{names}"
    raise UserError(f"{what}: return the logits alone, first, or under 'logits'")
