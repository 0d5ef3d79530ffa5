"""Average pools in operations that ONNX has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from layers.quantized import QuantAvgPool2d, QuantizedLayer


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


def exportable_pool(
    pool: nn.AdaptiveAvgPool2d | nn.AvgPool2d, size: Sequence[int], out: Sequence[int]
) -> nn.Module:
    """What an average pool of one size of input is exported as: `pool`, or what replaces it.

    Args:
        pool: may be changed.
        size, out: height and width of what it reads and makes.
    """
    if needs_matrices(pool, size, out):
        quantizers = pool.children()
        rows = _shares(pool, 0, size[0], out[0])
        columns = _shares(pool, 1, size[1], out[1])
        return nn.Sequential(*quantizers, MatrixAvgPool2d(rows, columns))
    if isinstance(pool, nn.AvgPool2d):
        if pool.ceil_mode:
            pool.count_include_pad = False  # there is none
        return pool
    if tuple(out) == (1, 1):
        pool.output_size = 1  # a side may be None, for as many as there are
        return pool
    # the exporter may not know the size any more
    kind = QuantAvgPool2d if isinstance(pool, QuantizedLayer) else nn.AvgPool2d
    regular = kind((size[0] // out[0], size[1] // out[1]))
    for name, quantizer in pool.named_children():
        regular.add_module(name, quantizer)
    return regular


class MatrixAvgPool2d(nn.Module):
    """An average pool as two matrix products: (h, H) times (N, C, H, W) times (W, w).

    Args:
        rows, columns: (h, H) and (w, W), what each row and each column of the output takes of
            those of the input.
    """

    def __init__(self, rows: Tensor, columns: Tensor):
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns


def _shares(pool: nn.AdaptiveAvgPool2d | nn.AvgPool2d, axis: int, size: int, out: int) -> Tensor:
    """(out, size): what a pool's windows along one axis take, its divisor along the second."""
    one_for_each = torch.eye(size)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return F.adaptive_avg_pool1d(one_for_each, out).T
    kernel, stride, padding = (
        _pair(value)[axis] for value in (pool.kernel_size, pool.stride, pool.padding)
    )
    divisor = pool.divisor_override and (1, pool.divisor_override)[axis]
    shares = F.avg_pool2d(
        one_for_each[None],
        (kernel, 1),
        (stride, 1),
        (padding, 0),
        pool.ceil_mode,
        pool.count_include_pad,
        divisor,
    )
    return shares[0]
