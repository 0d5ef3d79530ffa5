"""Quantized layers: float layers whose operands pass through a quantizer first.

They subclass the float layers and keep their parameter names, so a float checkpoint loads by name. With `Quantizer` inside
they are the training form; `layers.fold` puts `FrozenQuantizer` there and has the inference form.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from layers.add import Add
from layers.mul import Mul
from layers.quantizers import Quantizer


class QuantConv2d(nn.Conv2d):
    """Convolution of an INT8 input (one range) with an INT8 weight (one range for each output channel)."""

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> QuantConv2d:
        """Take over the parameters of `conv` (shared, not copied) and its whole geometry."""
        quant = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        )
        quant.weight, quant.bias = conv.weight, conv.bias
        quant.input_quantizer, quant.weight_quantizer = Quantizer(), Quantizer(conv.out_channels)
        return quant

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """Matrix product of an INT8 input (one range) with an INT8 weight (one range for each output feature)."""

    @classmethod
    def from_float(cls, linear: nn.Linear) -> QuantLinear:
        """Take over the parameters of `linear` (shared, not copied)."""
        quant = cls(linear.in_features, linear.out_features, linear.bias is not None)
        quant.weight, quant.bias = linear.weight, linear.bias
        quant.input_quantizer, quant.weight_quantizer = Quantizer(), Quantizer(linear.out_features)
        return quant

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantAdd(Add):
    """`x + INT8(other)`.

    Only the second operand is quantized: `x` comes straight from a convolution, into whose INT8 kernel TensorRT fuses this
    addition; rounding `x` first would cost a pass over memory and accuracy.
    """

    @classmethod
    def from_float(cls, _: Add) -> QuantAdd:
        quant = cls()
        quant.input_quantizer = Quantizer()
        return quant

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x, self.input_quantizer(other))


class QuantMul(Mul):
    """`scale * INT8(x)`.

    The feature map is what costs memory traffic, and in squeeze and excitation the pool reads the same INT8 tensor. The
    factors are one number for each channel: rounding them would save nothing.
    """

    @classmethod
    def from_float(cls, _: Mul) -> QuantMul:
        quant = cls()
        quant.input_quantizer = Quantizer()
        return quant

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return super().forward(scale, self.input_quantizer(x))


class QuantAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """Average pool of an INT8 input: the last feature map leaves its convolution as INT8."""

    @classmethod
    def from_float(cls, pool: nn.AdaptiveAvgPool2d) -> QuantAdaptiveAvgPool2d:
        quant = cls(pool.output_size)
        quant.input_quantizer = Quantizer()
        return quant

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.input_quantizer(x))


QUANTIZED_FORM = {
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    Add: QuantAdd,
    Mul: QuantMul,
    nn.AdaptiveAvgPool2d: QuantAdaptiveAvgPool2d,
}
"""Which quantized layer replaces which float layer."""
