"""From the training form to the inference form: BatchNorm folded, ranges frozen."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn

from layers.quantized import QUANTIZED_FORM, QuantConv2d, QuantLinear
from layers.quantizers import FrozenQuantizer, Quantizer

FACTOR_FLOOR = 1e-12  # a BatchNorm factor of 0 would make a scale of 0, which no engine accepts


class _Tracer(fx.Tracer):
    """Sees each layer, float or quantized, as one node."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, tuple(QUANTIZED_FORM)) or super().is_leaf_module(module, name)


def conv_bn_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of every convolution and the BatchNorm that is the only reader of its output, where each is called once."""
    modules = dict(model.named_modules())
    nodes = list(_Tracer().trace(model).nodes)
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    read = {
        node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"
    }  # their parameters serve others too
    pairs = []
    for bn in nodes:
        source = next(iter(bn.all_input_nodes), None)
        if (
            bn.op != "call_module"
            or source is None
            or source.op != "call_module"
            or len(source.users) > 1
        ):
            continue
        conv_type, norm = type(modules[source.target]), modules[bn.target]
        if (
            conv_type not in (nn.Conv2d, QuantConv2d)
            or not isinstance(norm, nn.BatchNorm2d)
            or norm.running_var is None
        ):
            continue
        if calls[source.target] == calls[bn.target] == 1 and read.isdisjoint(
            (source.target, bn.target)
        ):
            pairs.append((source.target, bn.target))
    return pairs


@torch.no_grad()
def freeze_weight(layer: nn.Module, factor: Tensor | None = None) -> None:
    """Put `factor` (one for each output channel, default 1) into a quantized layer's weight and freeze its range.

    The range is multiplied by |factor|, so every INT8 code stays what training made it, but for its sign where the factor
    is negative. The weight is stored on its INT8 grid, where rounding it again changes nothing.
    """
    scale = layer.weight_quantizer.scale
    channels = (-1, *[1] * (layer.weight.ndim - 1))  # (C,) -> (C, 1, 1, 1) or (C, 1)
    codes = (layer.weight_quantizer(layer.weight) / scale.reshape(channels)).round()
    if factor is not None:
        scale = scale * factor.abs().clamp_min(FACTOR_FLOOR)
        codes = torch.where(factor.reshape(channels) < 0, -codes, codes)
    layer.weight = nn.Parameter(codes * scale.reshape(channels), requires_grad=False)
    layer.weight_quantizer = FrozenQuantizer(scale)


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Make `conv` compute what `bn(conv(x))` computes in evaluation mode."""
    factor = torch.rsqrt(bn.running_var + bn.eps)
    if bn.affine:
        factor = factor * bn.weight
    bias = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
    conv.bias = nn.Parameter(bias * factor + (bn.bias if bn.affine else 0), requires_grad=False)
    if hasattr(conv, "weight_quantizer"):
        freeze_weight(conv, factor)
    else:
        conv.weight = nn.Parameter(conv.weight * factor.reshape(-1, 1, 1, 1), requires_grad=False)


class PointwiseLinear(QuantConv2d):
    """Inference form of `QuantLinear`: (N, in) -> (N, out) as a 1x1 convolution.

    TensorRT 8.6 has INT8 kernels for convolutions, but dequantizes the operands of a matrix product.
    """

    @classmethod
    def from_linear(cls, linear: QuantLinear) -> PointwiseLinear:
        """Take over parameters and quantizers of `linear`; the weight (out, in) becomes (out, in, 1, 1)."""
        conv = cls(linear.in_features, linear.out_features, 1)
        conv.weight, conv.bias = (
            nn.Parameter(linear.weight[:, :, None, None], requires_grad=False),
            linear.bias,
        )
        conv.input_quantizer, conv.weight_quantizer = (
            linear.input_quantizer,
            linear.weight_quantizer,
        )
        return conv

    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x[:, :, None, None]).flatten(1)
        )  # (N, in) -> (N, in, 1, 1) -> (N, out)


def to_inference(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU in its inference form; `model`, float or quantized, stays as it is."""
    model = copy.deepcopy(model).cpu().float().eval()
    for conv_name, bn_name in conv_bn_pairs(model):
        fold_batch_norm(model.get_submodule(conv_name), model.get_submodule(bn_name))
        model.set_submodule(bn_name, nn.Identity())
    for module in list(model.modules()):
        if isinstance(getattr(module, "weight_quantizer", None), Quantizer):
            freeze_weight(module)
    for name, module in list(model.named_modules()):
        if isinstance(module, Quantizer):
            model.set_submodule(name, FrozenQuantizer(module.scale))
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, PointwiseLinear.from_linear(module))
    return model
