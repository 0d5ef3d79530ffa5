"""The residual addition as a module, so that it can be selected for quantization like a layer."""

from __future__ import annotations

from torch import Tensor, nn


class Add(nn.Module):
    """`x + other`, two tensors of one shape.

    Quantized, it rounds `other` and is fused into the convolution that computes `x`.
    """

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other
