"""Quantized layers: float layers whose operands pass through a quantizer first.

They subclass the float layers and keep their parameter names, so a float checkpoint loads by name.
With `Quantizer` inside they are the training form; `utils.quantization.fold` puts `FrozenQuantizer`
there and has the inference form.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.add import Add
from layers.mul import Mul
from layers.quantizers import FrozenQuantizer, Quantizer, per_channel

FACTOR_FLOOR = 1e-12
"""A factor of 0 would make a scale of 0, which no engine accepts."""


class QuantizedLayer(nn.Module):
    """What the quantized layers share: how they are made of float ones."""

    @classmethod
    def from_float(cls, layer: nn.Module) -> nn.Module:
        """A copy of `layer` in this form: its geometry, its very parameters, and quantizers."""
        # deepcopy takes what is in its memo as copied already: optimizers keep their parameters
        shared = {id(parameter): parameter for parameter in layer.parameters()}
        quant = copy.deepcopy(layer, shared)
        quant.__class__ = cls
        quant.input_quantizer = Quantizer()
        if hasattr(quant, "weight"):
            quant.weight_quantizer = Quantizer(channels=len(quant.weight))
        return quant


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution of an INT8 input (one range), INT8 weight (one range for each output channel)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantLinear(QuantizedLayer, nn.Linear):
    """Product of an INT8 input (one range), INT8 weight (one range for each output feature)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


class QuantAdd(QuantizedLayer, Add):
    """`x + INT8(other)`.

    Only the second operand is quantized: `x` comes straight from a convolution, into whose INT8
    kernel TensorRT fuses this addition. Rounding `x` first would cost a pass over memory, and
    accuracy.
    """

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x, self.input_quantizer(other))


class QuantMul(QuantizedLayer, Mul):
    """`INT8(factor) * INT8(x)`.

    In squeeze and excitation the pool reads the same INT8 feature map. The factors are few, but
    TensorRT multiplies in INT8 only what is INT8 on both sides: with float factors it copies the
    feature map to FP16 first.
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


@torch.no_grad()
def freeze_weight(layer: nn.Module, factor: Tensor | None = None) -> None:
    """Multiply the weight of a quantized layer by `factor` and freeze its range, in place.

    The scales s take up the factors f, so that the INT8 codes q stay what training made them:

        f * (s * q) = (|f| * s) * (sign(f) * q)

    A negative factor flips the sign of its channel's codes, which run from -127 to 127 and so stay
    in their limits. The weight is stored on its grid, where rounding it again changes nothing.

    Args:
        factor: (C,) one for each output channel, 1 by default.
    """
    scale = layer.weight_quantizer.scale  # (C,)
    values = layer.weight_quantizer(layer.weight)
    codes = (values / per_channel(scale, values)).round()
    if factor is not None:
        scale = scale * factor.abs().clamp_min(FACTOR_FLOOR)
        codes = torch.where(per_channel(factor, codes) < 0, -codes, codes)
    layer.weight = nn.Parameter(codes * per_channel(scale, codes), requires_grad=False)
    layer.weight_quantizer = FrozenQuantizer(scale)


class PointwiseLinear(QuantConv2d):
    """Inference form of `QuantLinear`: (N, in) -> (N, out) as a 1x1 convolution.

    TensorRT 8.6 has INT8 kernels for convolutions, but dequantizes the operands of a product.
    """

    @classmethod
    def from_linear(cls, linear: QuantLinear) -> PointwiseLinear:
        """Takes over parameters and quantizers of `linear`."""
        conv = cls(linear.in_features, linear.out_features, 1)
        # (out, in) -> (out, in, 1, 1)
        conv.weight = nn.Parameter(linear.weight[:, :, None, None], requires_grad=False)
        conv.bias = linear.bias
        conv.input_quantizer = linear.input_quantizer
        conv.weight_quantizer = linear.weight_quantizer
        return conv

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None, None]  # (N, in) -> (N, in, 1, 1)
        return super().forward(x).flatten(1)  # (N, out, 1, 1) -> (N, out)
