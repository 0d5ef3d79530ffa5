"""The scaling of a feature map as a module, so that it can be selected for quantization."""

from __future__ import annotations

from torch import Tensor, nn


class Mul(nn.Module):
    """`factor * x`: one factor for each channel (N, C, 1, 1), and a feature map (N, C, H, W)."""

    def forward(self, factor: Tensor, x: Tensor) -> Tensor:
        return factor * x
