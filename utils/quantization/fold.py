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
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from layers.pool import MatrixAvgPool2d, needs_matrices
from layers.quantized import (
    PointwiseLinear,
    QuantAvgPool2d,
    QuantizedLayer,
    QuantLinear,
    freeze_weight,
)
from layers.quantizers import FrozenQuantizer, Quantizer, per_channel
from utils.errors import UserError, first_line, mendable
from utils.quantization.watch import (
    Operation,
    Watch,
    is_plain,
    tensors_in,
    turn_into,
    watch,
)


def conv_bn_pairs(watched: Watch) -> list[tuple[str, str]]:
    """Names of every layer with a weight and BatchNorm that can be folded into it.

    The BatchNorm is the only reader of the layer's output, each is called once and has no hooks,
    and no function reads their parameters directly.
    """
    calls = Counter(op.name for op in watched.operations if op.module is not None)
    pairs = []
    for op in watched.operations:
        source = op.reads[0] if op.reads else None
        if source is None or not _is_foldable(op.module) or not _takes_factors(source):
            continue
        only_reader = len(source.readers) == 1
        plain = is_plain(source.module) and is_plain(op.module)
        called_once = calls[source.name] == calls[op.name] == 1
        parameters = [*source.module.parameters(), *op.module.parameters()]
        read_directly = not watched.parameters_read.isdisjoint(parameters)
        if only_reader and plain and called_once and not read_directly:
            pairs.append((source.name, op.name))
    return pairs


def _takes_factors(operation: Operation) -> bool:
    """Whether this layer's weight can take up a factor for each output channel."""
    module = operation.module
    if isinstance(module, nn.ConvTranspose2d):
        return module.groups == 1
    if isinstance(module, nn.Linear):
        return len(operation.shape) == 2
    return isinstance(module, nn.Conv2d)


def _is_foldable(module: nn.Module | None) -> bool:
    """Whether a layer is BatchNorm with statistics and then, at most, its own children in turn.

    Subclasses, such as timm's with an activation, are tried: on two values of each channel.
    """
    if not isinstance(module, _BatchNorm) or module.running_var is None:
        return False
    if type(module).forward is _BatchNorm.forward or type(module) is nn.SyncBatchNorm:
        return True
    shape = (2, module.num_features, *[1] * (2 if isinstance(module, nn.BatchNorm2d) else 0))
    x = torch.linspace(-3, 3, 2 * module.num_features).reshape(shape).to(module.running_var)
    statistics = (module.running_mean, module.running_var, module.weight, module.bias)
    plain = F.batch_norm(x, *statistics, training=False, eps=module.eps)
    return torch.equal(module(x), _after(module)(plain))


def _after(bn: nn.Module) -> nn.Module:
    """What a BatchNorm does when its arithmetic is done."""
    children = OrderedDict(bn.named_children())
    return nn.Sequential(children) if children else nn.Identity()


@torch.no_grad()
def fold_batch_norm(conv: nn.Module, bn: _BatchNorm) -> None:
    """Make `conv` compute what `bn(conv(x))` computes in evaluation mode, in place.

    Args:
        conv: a convolution, a transposed one or a Linear.
    """
    # f = gamma / sqrt(v + eps), (C,)
    factor = torch.rsqrt(bn.running_var + bn.eps)
    if bn.affine:
        factor = factor * bn.weight
    # f * (b - m) + beta, (C,)
    centred = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
    beta = bn.bias if bn.affine else 0
    conv.bias = nn.Parameter(centred * factor + beta, requires_grad=False)
    # f * W, which has C on axis 0, or on 1 if it is transposed
    if isinstance(conv, QuantizedLayer):
        freeze_weight(conv, factor)
    else:
        axis = 1 if isinstance(conv, nn.ConvTranspose2d) else 0
        weight = conv.weight * per_channel(factor, conv.weight, axis)
        conv.weight = nn.Parameter(weight, requires_grad=False)


def keep_computed(layer: nn.Module) -> None:
    """Replace weights that are computed of others, as by spectral normalisation, by their values.

    torch's own removal changes the layer's class, which a copied layer shares.
    """
    values = {name: getattr(layer, name) for name in layer.parametrizations}
    layer.__class__ = type(layer).__base__
    del layer.parametrizations
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value.detach(), requires_grad=False))


def to_inference(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `model` on the CPU in its inference form.

    `model`, float or quantized, stays as it is. Its quantizers must be calibrated.

    Args:
        example: images (B, C, H, W) of the size that the copy is for.

    Raises:
        UserError: the copy fails on images of this size, the network branches on values, an average
            pool reads feature maps of several sizes, a hook computes a quantized layer's weight, or
            a BatchNorm has no running statistics.
    """
    model = _copied(model).cpu().float().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            mend = "which a graph needs: track_running_stats=True"
            raise UserError(f"{name} has no running statistics, {mend}")
        if isinstance(module, (nn.Linear, _ConvNd)) and parametrize.is_parametrized(module):
            keep_computed(module)
        if hasattr(module, "weight_quantizer") and "weight" not in module._parameters:
            mend = "call prune.remove, remove_weight_norm or the like first"
            raise UserError(f"a hook computes {name}.weight in each run: {mend}")
    try:
        watched = watch(model, example)
    except RuntimeError as error:  # torch's own
        if mendable(error):
            raise
        height, width = example.shape[2:]
        raise UserError(
            f"a copy of the network fails on images of {height}x{width} ({first_line(error)}): "
            "give the size that it is for; a hook that uses the network must be its method"
        ) from None
    if reads := watched.value_reads:
        raise UserError(
            f"the network looks at computed values at {reads[0]}, where an exported graph would "
            "always go the one way: compute both and choose by torch.where"
        )
    # BatchNorm into convolutions, whose quantized weights are frozen by that
    for conv_name, bn_name in conv_bn_pairs(watched):
        bn = model.get_submodule(bn_name)
        fold_batch_norm(model.get_submodule(conv_name), bn)
        turn_into(bn, _after(bn))
    for module in list(model.modules()):
        _freeze(module)
    _make_pools_exportable(watched)
    return model


def _copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing; what the model kept of a run with gradients has none in it."""
    held = tensors_in([list(vars(module).values()) for module in model.modules()])
    computed = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    # deepcopy takes what is in its memo as copied already, and refuses tensors with gradients
    return copy.deepcopy(model, computed)


def _freeze(module: nn.Module) -> None:
    """Put a layer, or a quantizer, into its inference form, in place."""
    # the weights that no BatchNorm was folded into
    if isinstance(getattr(module, "weight_quantizer", None), Quantizer):
        freeze_weight(module)
    # the ranges of activations
    if isinstance(module, Quantizer) and not module.is_weight:
        turn_into(module, FrozenQuantizer(module.scale))
    # matrix products, which TensorRT 8.6 computes in INT8 only as convolutions
    if isinstance(module, QuantLinear) and is_plain(module):
        turn_into(module, PointwiseLinear.from_linear(module))
    # ONNX Runtime takes no "same" beside a dilation: write it in pixels; where its two sides
    # differ, let torch pad before the convolution, as it does in every mode but "zeros"
    if isinstance(module, nn.Conv2d) and module.padding == "same":
        module.padding = same_padding(module)
        if module.padding == "same" and max(module.dilation) > 1:
            module.padding_mode = "constant"


def _make_pools_exportable(watched: Watch) -> None:
    """Replace the average pools that the exporter would write as something else, in place.

    Raises:
        UserError: one of them reads feature maps of several sizes.
    """
    for operation in watched.operations:
        pool = operation.module
        # hooks belong to this very pool
        is_pool = isinstance(pool, (nn.AdaptiveAvgPool2d, nn.AvgPool2d))
        if not is_pool or not is_plain(pool):
            continue
        size, out = operation.shapes[0][2:], operation.shape[2:]
        sizes = {other.shapes[0][2:] for other in watched.operations if other.module is pool}
        if len(sizes) == 1:
            turn_into(pool, exportable_pool(pool, size, out))
        elif needs_matrices(pool, size, out):
            mend = "give each size a pool of its own"
            raise UserError(f"{operation.name} pools feature maps of several sizes: {mend}")


def exportable_pool(
    pool: nn.AdaptiveAvgPool2d | nn.AvgPool2d, size: Sequence[int], out: Sequence[int]
) -> nn.Module:
    """What an average pool of one size of input is exported as: `pool`, or what replaces it.

    Args:
        pool: may be changed.
        size, out: height and width of what it reads and makes.
    """
    if needs_matrices(pool, size, out):
        return nn.Sequential(*pool.children(), MatrixAvgPool2d(pool, size, out))
    if isinstance(pool, nn.AvgPool2d):
        if pool.ceil_mode:
            pool.count_include_pad = False  # there is none
        return pool
    if tuple(out) == (1, 1):
        pool.output_size = 1  # a side may be None, for as many as there are
        return pool
    # the exporter may not know the size any more
    kind = QuantAvgPool2d if isinstance(pool, QuantizedLayer) else nn.AvgPool2d
    regular = kind((size[0] // out[0], size[1] // out[1]))
    for name, quantizer in pool.named_children():
        regular.add_module(name, quantizer)
    return regular


def same_padding(conv: nn.Conv2d) -> tuple[int, ...] | str:
    """The padding "same" in pixels; the word itself if it is not as wide on both sides."""
    widths = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(width % 2 for width in widths):
        return "same"
    return tuple(width // 2 for width in widths)
