"""Quantized layers: float layers whose operands pass through a quantizer first.

They subclass the float layers and keep their parameter names, so a float checkpoint loads by name. With `Quantizer` inside
they are the training form; `utils.quantization.fold` puts `FrozenQuantizer` there and has the inference form.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from layers.add import Add
from layers.mul import Mul
from layers.quantizers import Quantizer


class QuantizedLayer(nn.Module):
    """What the quantized layers share: how they are made of float ones."""

    @classmethod
    def from_float(cls, layer: nn.Module) -> nn.Module:
        """A copy of `layer` in this form: its parameters (shared, not copied), its whole geometry, and quantizers."""
        quant = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
        quant.__class__ = cls
        quant.input_quantizer = Quantizer()
        if hasattr(quant, "weight"):
            quant.weight_quantizer = Quantizer(len(quant.weight))
        return quant


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution of an INT8 input (one range) with an INT8 weight (one range for each output channel)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(
            self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias
        )


class QuantLinear(QuantizedLayer, nn.Linear):
    """Matrix product of an INT8 input (one range) with an INT8 weight (one range for each output feature)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantAdd(QuantizedLayer, Add):
    """`x + INT8(other)`.

    Only the second operand is quantized: `x` comes straight from a convolution, into whose INT8 kernel TensorRT fuses this
    addition; rounding `x` first would cost a pass over memory and accuracy.
    """

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x, self.input_quantizer(other))


class QuantMul(QuantizedLayer, Mul):
    """`INT8(factor) * INT8(x)`.

    In squeeze and excitation the pool reads the same INT8 feature map. The factors are few, but TensorRT multiplies in INT8
    only what is INT8 on both sides: with float factors it copies the feature map to FP16 first.
    """

    @classmethod
    def from_float(cls, layer: nn.Module) -> nn.Module:
        quant = super().from_float(layer)
        quant.factor_quantizer = Quantizer()
        return quant

    def forward(self, factor: Tensor, x: Tensor) -> Tensor:
        return super().forward(self.factor_quantizer(factor), self.input_quantizer(x))


class QuantAdaptiveAvgPool2d(QuantizedLayer, nn.AdaptiveAvgPool2d):
    """Average pool of an INT8 input: the last feature map leaves its convolution as INT8."""

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
