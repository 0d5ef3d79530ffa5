"""An average pool whose windows differ in size, in operations that ONNX has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MatrixAvgPool2d(nn.Module):
    """`nn.AdaptiveAvgPool2d` for one size of input, as two matrix products.

    Output row i averages the input rows floor(i * H / h) to ceil((i + 1) * H / h) - 1, and columns
    likewise: (h, H) times (N, C, H, W) times (W, w).

    Args:
        size: (H, W) of the input.
        out: (h, w) of the output.
    """

    def __init__(self, size: Sequence[int], out: Sequence[int]):
        super().__init__()
        self.register_buffer("rows", _averages(size[0], out[0]))
        self.register_buffer("columns", _averages(size[1], out[1]).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns


def _averages(size: int, out: int) -> Tensor:
    """(out, size): each row has equal shares in its window."""
    return F.adaptive_avg_pool1d(torch.eye(size), out).T
