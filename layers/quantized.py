"""Quantized layers: float layers whose operands pass through a quantizer first.

They subclass the float layers and keep their parameter names, so a float checkpoint loads by name.
Where a float layer is given its input by keyword, as torch calls it, they take it, too.
With `Quantizer` inside they are the training form; `utils.quantization.fold` puts `FrozenQuantizer`
there and has the inference form.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

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

    QUANTIZERS = ("input_quantizer",)
    """What rounds each operand of `forward`."""

    weight_axis = 0
    """Where the weight, if there is one, has its output channels."""

    @classmethod
    def convert(cls, layer: nn.Module) -> nn.Module:
        """Make a float layer one of this form, in place: its parameters stay, quantizers come.

        Whatever else holds the layer, such as a list, a hook or another network, holds the
        quantized one then. A subclass's layer keeps all of its own methods but `forward`.
        """
        own = type(layer)
        layer.__class__ = cls if issubclass(cls, own) else _of_both(cls, own)
        layer.add_quantizers()
        return layer

    def add_quantizers(self) -> None:
        """Give the layer a quantizer for each operand that it rounds."""
        for operand, name in enumerate(self.QUANTIZERS):
            if self.quantizer_of(operand):
                self.add_module(name, Quantizer())
        if hasattr(self, "weight"):
            channels = self.weight.shape[self.weight_axis]
            self.weight_quantizer = Quantizer(channels, self.weight_axis)

    def quantizer_of(self, operand: int) -> str:
        """Name of the quantizer of what `forward` takes at that place; "" if it is not rounded."""
        return self.QUANTIZERS[operand]


def pickled_by(make: Callable[..., nn.Module], *args: Any) -> Callable[[nn.Module, int], Any]:
    """`__reduce_ex__` of a class that was made while running, which pickle does not find.

    Args:
        make: makes a module of this class, without its attributes, of `args`.
    """

    def reduce(module: nn.Module, protocol: int) -> Any:
        state = getattr(module, "__getstate__", lambda: vars(module))
        return make, args, state()

    return reduce


@cache
def _of_both(form: type[QuantizedLayer], own: type[nn.Module]) -> type[QuantizedLayer]:
    """A class of a quantized form's name that has the methods of a layer's own class, too."""
    reduce = pickled_by(_empty, form, own)
    return type(
        form.__name__, (form, own), {"__reduce_ex__": reduce, "__module__": form.__module__}
    )


def _empty(form: type[QuantizedLayer], own: type[nn.Module]) -> nn.Module:
    """A layer of `_of_both` without its attributes, which pickle adds."""
    both = _of_both(form, own)
    return both.__new__(both)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution of an INT8 input (one range), INT8 weight (one range for each output channel)."""

    def forward(self, input: Tensor) -> Tensor:
        rounded, weight = self.input_quantizer(input), self.weight_quantizer(self.weight)
        # not a subclass's own, which may take another weight than this
        return nn.Conv2d._conv_forward(self, rounded, weight, self.bias)


class QuantConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """Transposed convolution, rounded as `QuantConv2d` is.

    Its weight is (in, out / groups, height, width): groups share the ranges of their channels.
    """

    weight_axis = 1

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.input_quantizer(input)
        weight = self.weight_quantizer(self.weight)
        padding = nn.ConvTranspose2d._output_padding(
            self, x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            x, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )


class QuantLinear(QuantizedLayer, nn.Linear):
    """Product of an INT8 input (one range), INT8 weight (one range for each output feature)."""

    def forward(self, input: Tensor) -> Tensor:
        rounded = self.input_quantizer(input)
        return F.linear(rounded, self.weight_quantizer(self.weight), self.bias)


class QuantAdd(QuantizedLayer, Add):
    """`x + other`, of which the operands that `rounds` names are INT8.

    The other one comes straight from a convolution, into whose INT8 kernel TensorRT fuses this
    addition. Rounding it first would cost a pass over memory, and accuracy.
    """

    QUANTIZERS = ("x_quantizer", "other_quantizer")

    def quantizer_of(self, operand: int) -> str:
        return self.QUANTIZERS[operand] if operand in self.rounds else ""

    def round_instead(self, operands: tuple[int, ...]) -> None:
        """Round these operands, with ranges that are still to be set."""
        for operand in self.rounds:
            delattr(self, self.QUANTIZERS[operand])
        self.rounds = operands
        self.add_quantizers()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if 0 in self.rounds:
            x = self.x_quantizer(x)
        if 1 in self.rounds:
            other = self.other_quantizer(other)
        return x + other


class QuantMul(QuantizedLayer, Mul):
    """`INT8(factor) * INT8(x)`.

    In squeeze and excitation the pool reads the same INT8 feature map. The factors are few, but
    TensorRT multiplies in INT8 only what is INT8 on both sides: with float factors it copies the
    feature map to FP16 first.
    """

    QUANTIZERS = ("factor_quantizer", "input_quantizer")

    def forward(self, factor: Tensor, x: Tensor) -> Tensor:
        return self.factor_quantizer(factor) * self.input_quantizer(x)


class OfQuantizedInput(QuantizedLayer):
    """What a float layer computes, of an INT8 input."""

    def forward(self, input: Tensor) -> Tensor:
        if not getattr(self, "inplace", False):
            return super().forward(self.input_quantizer(input))
        # who reads `input` after this expects the result there; the gradient needs what was there
        return input.copy_(super().forward(self.input_quantizer(input.clone())))


class QuantAdaptiveAvgPool2d(OfQuantizedInput, nn.AdaptiveAvgPool2d):
    """Average pool of an INT8 input: the last feature map leaves its convolution as INT8."""


class QuantAvgPool2d(OfQuantizedInput, nn.AvgPool2d):
    """Average pool of windows of an INT8 input."""


class QuantHardswish(OfQuantizedInput, nn.Hardswish):
    """Hardswish of an INT8 input.

    TensorRT fuses it into no INT8 convolution. If its input is not rounded, the convolution before
    it must write FP16, for which many have no INT8 kernel.
    """


class QuantLeakyReLU(OfQuantizedInput, nn.LeakyReLU):
    """Leaky ReLU of an INT8 input, for the reason of `QuantHardswish`."""


QUANTIZED_FORM = {
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
    Add: QuantAdd,
    Mul: QuantMul,
    nn.AdaptiveAvgPool2d: QuantAdaptiveAvgPool2d,
    nn.AvgPool2d: QuantAvgPool2d,
    nn.Hardswish: QuantHardswish,
    nn.LeakyReLU: QuantLeakyReLU,
}
"""Which quantized layer a float layer becomes."""


def quantized_form(layer: nn.Module | None) -> type[QuantizedLayer] | None:
    """What a float layer becomes: of a subclass too, if it computes what its base computes."""
    if isinstance(layer, QuantizedLayer):
        return None
    for base, form in QUANTIZED_FORM.items():
        if isinstance(layer, base):
            return form if _computes_as(layer, base) else None
    return None


def _computes_as(layer: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a layer's own `forward` does what that of `base` does.

    Where it is another function, as timm's that only looks for TorchScript, both are tried.
    """
    # a weight that is computed of others, such as weight normalisation's, cannot be replaced
    if hasattr(base, "reset_parameters") and layer._parameters.get("weight") is None:
        return False
    # a function that was put in its place
    if "forward" in vars(layer):
        return False
    cls = type(layer)
    own = cls.forward, getattr(cls, "_conv_forward", None)
    if own == (base.forward, getattr(base, "_conv_forward", None)):
        return True
    if "weight" not in layer._parameters or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    # a factor that is 1 at first, or a sum that is 0, as LoRA's
    if not {*layer._parameters, *layer._buffers, *layer._modules} <= {"weight", "bias"}:
        return False
    # an odd size, which no padding fits by chance
    shape = (2, layer.in_features) if base is nn.Linear else (2, layer.in_channels, 23, 23)
    x = torch.linspace(-1, 1, math.prod(shape), device=layer.weight.device).reshape(shape)
    try:
        # a copy with a weight that no limit of its size holds for, and no mask
        probe = copy.copy(layer)
        weight = torch.linspace(-30, 30, layer.weight.numel()).reshape(layer.weight.shape)
        weight = nn.Parameter(weight.to(layer.weight))
        probe._parameters = {**layer._parameters, "weight": weight}
        # a dropout inside draws random numbers, and only in training
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for probe.training in (True, False):
                # the base first, as the other may write into the weight
                wanted = base.forward(probe, x)
                if not torch.equal(cls.forward(probe, x), wanted):
                    return False
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


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
    axis = layer.weight_axis
    codes = (values / per_channel(scale, values, axis)).round()
    if factor is not None:
        scale = scale * factor.abs().clamp_min(FACTOR_FLOOR)
        codes = torch.where(per_channel(factor, codes, axis) < 0, -codes, codes)
    layer.weight = nn.Parameter(codes * per_channel(scale, codes, axis), requires_grad=False)
    layer.weight_quantizer = FrozenQuantizer(scale, axis)


class PointwiseLinear(QuantConv2d):
    """Inference form of `QuantLinear`: (N, ..., in) -> (N, ..., out) as a 1x1 convolution.

    TensorRT 8.6 has INT8 kernels for convolutions, but dequantizes the operands of a product.
    """

    @classmethod
    def from_linear(cls, linear: QuantLinear) -> PointwiseLinear:
        """Takes over parameters and quantizers of `linear`."""
        # on no device: a weight that is made would draw random numbers
        conv = cls(linear.in_features, linear.out_features, 1, device="meta")
        # (out, in) -> (out, in, 1, 1)
        conv.weight = nn.Parameter(linear.weight[:, :, None, None], requires_grad=False)
        conv.bias = linear.bias
        conv.input_quantizer = linear.input_quantizer
        conv.weight_quantizer = linear.weight_quantizer
        return conv

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if x.ndim == 2:
            x = x[:, :, None, None]  # (N, in) -> (N, in, 1, 1)
            return super().forward(x).flatten(1)  # (N, out, 1, 1) -> (N, out)
        between = x.shape[1:-1]
        if len(between) != 2:
            x = x.flatten(1, -2).unsqueeze(1)  # (N, ..., in) -> (N, 1, values, in)
        x = x.permute(0, 3, 1, 2)  # -> (N, in, H, W)
        x = super().forward(x).permute(0, 2, 3, 1)
        # sizes of `input`: a graph would keep those that the exporter finds for `unflatten`
        return x if len(between) == 2 else x.reshape(*input.shape[:-1], self.out_channels)
