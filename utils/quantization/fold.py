"""Fold for export: from the training form to the inference form, BatchNorm folded, ranges frozen.

In evaluation mode BatchNorm is a multiplication and an addition for each channel, and a convolution
is linear in its weight. With m the running mean and v the running variance,

    BN(conv(x)) = gamma * (W x + b - m) / sqrt(v + eps) + beta
                = (f * W) x + f * (b - m) + beta,        f = gamma / sqrt(v + eps)

is a convolution again. Its weight has one range for each output channel, which takes up |f|, so
every INT8 code stays what training made it: see `layers.quantized.freeze_weight`.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn

from layers.quantized import (
    QUANTIZED_FORM,
    PointwiseLinear,
    QuantConv2d,
    QuantLinear,
    freeze_weight,
)
from layers.quantizers import FrozenQuantizer, Quantizer, per_channel


class _Tracer(fx.Tracer):
    """Sees each layer, float or quantized, as one node."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, tuple(QUANTIZED_FORM)) or super().is_leaf_module(module, name)


def conv_bn_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of every convolution and BatchNorm that can be folded into it.

    The BatchNorm is the only reader of the convolution's output, each is called once, and nobody
    else reads their parameters.
    """
    modules = dict(model.named_modules())
    nodes = list(_Tracer().trace(model).nodes)
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    # "conv.weight" is read directly: `conv` serves another purpose too
    read_directly = {node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    pairs = []
    for node in nodes:
        source = next(iter(node.all_input_nodes), None)
        if source is None or source.op != "call_module" or node.op != "call_module":
            continue
        conv, bn = modules[source.target], modules[node.target]
        if type(conv) not in (nn.Conv2d, QuantConv2d) or not isinstance(bn, nn.BatchNorm2d):
            continue
        names = (source.target, node.target)
        only_reader = len(source.users) == 1
        called_once = all(calls[name] == 1 for name in names)
        has_statistics = bn.running_var is not None
        if only_reader and called_once and has_statistics and read_directly.isdisjoint(names):
            pairs.append(names)
    return pairs


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Make `conv` compute what `bn(conv(x))` computes in evaluation mode, in place."""
    # f = gamma / sqrt(v + eps), (C,)
    factor = torch.rsqrt(bn.running_var + bn.eps)
    if bn.affine:
        factor = factor * bn.weight
    # f * (b - m) + beta, (C,)
    centred = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
    beta = bn.bias if bn.affine else 0
    conv.bias = nn.Parameter(centred * factor + beta, requires_grad=False)
    # f * W, (C, in, kernel height, kernel width)
    if isinstance(conv, QuantConv2d):
        freeze_weight(conv, factor)
    else:
        weight = conv.weight * per_channel(factor, conv.weight)
        conv.weight = nn.Parameter(weight, requires_grad=False)


def to_inference(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU in its inference form.

    `model`, float or quantized, stays as it is. Its quantizers must be calibrated.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    # BatchNorm into convolutions, whose quantized weights are frozen by that
    for conv_name, bn_name in conv_bn_pairs(model):
        fold_batch_norm(model.get_submodule(conv_name), model.get_submodule(bn_name))
        model.set_submodule(bn_name, nn.Identity())
    # the weights of all other quantized layers
    for module in list(model.modules()):
        if isinstance(getattr(module, "weight_quantizer", None), Quantizer):
            freeze_weight(module)
    # the ranges of activations
    for name, module in list(model.named_modules()):
        if isinstance(module, Quantizer):
            model.set_submodule(name, FrozenQuantizer(module.scale))
    # matrix products, which TensorRT 8.6 computes in INT8 only as convolutions
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, PointwiseLinear.from_linear(module))
    return model
