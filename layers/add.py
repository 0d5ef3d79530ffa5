"""The residual addition as a module, so that it can be selected for quantization like a layer."""

from __future__ import annotations

from torch import Tensor, nn


class Add(nn.Module):
    """`x + other`, two tensors of one shape.

    Attributes:
        rounds: the operands that are rounded when it is quantized, 0 for `x` and 1 for `other`. An
            operand that comes out of a convolution which is to add is not among them.
    """

    rounds: tuple[int, ...] = (1,)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other
