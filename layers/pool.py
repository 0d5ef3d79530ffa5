"""Average pools in operations that ONNX has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair


def needs_matrices(layer: nn.Module, size: Sequence[int], out: Sequence[int]) -> bool:
    """Whether a layer is an average pool that is not exported as one.

    ONNX has no operator for windows that differ in size. torch's exporter leaves a divisor out, and
    counts too much where windows reach beyond the padding.

    Args:
        size, out: height and width of what it reads and makes.
    """
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return size[0] % out[0] != 0 or size[1] % out[1] != 0
    if isinstance(layer, nn.AvgPool2d):
        beyond_padding = layer.ceil_mode and any(_pair(layer.padding))
        return layer.divisor_override is not None or beyond_padding
    return False


class MatrixAvgPool2d(nn.Module):
    """An average pool as two matrix products: (h, H) times (N, C, H, W) times (W, w).

    Args:
        pool: what it computes.
        size, out: (H, W) and (h, w).
    """

    def __init__(
        self, pool: nn.AdaptiveAvgPool2d | nn.AvgPool2d, size: Sequence[int], out: Sequence[int]
    ):
        super().__init__()
        self.register_buffer("rows", _shares(pool, 0, size[0], out[0]))
        self.register_buffer("columns", _shares(pool, 1, size[1], out[1]).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns


def _shares(pool: nn.AdaptiveAvgPool2d | nn.AvgPool2d, axis: int, size: int, out: int) -> Tensor:
    """(out, size): what a pool's windows along one axis take, its divisor along the second."""
    one_for_each = torch.eye(size)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return F.adaptive_avg_pool1d(one_for_each, out).T
    # torch's own pool, along this axis alone
    kernel = (_pair(pool.kernel_size)[axis], 1)
    stride = (_pair(pool.stride)[axis], 1)
    padding = (_pair(pool.padding)[axis], 0)
    divisor = None
    if pool.divisor_override is not None:
        divisor = pool.divisor_override if axis == 1 else 1
    counting = (pool.ceil_mode, pool.count_include_pad, divisor)
    return F.avg_pool2d(one_for_each[None], kernel, stride, padding, *counting)[0]
