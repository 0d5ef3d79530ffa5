"""The per-layer wrapper: swap selected modules of a float network for their quantized forms."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layers.quantized import QuantAdd, QuantizedLayer, quantized_form
from utils.errors import UserError
from utils.quantization.modularize import modularize_or_say
from utils.quantization.watch import (
    is_quantizable,
    run_on,
    tensors_in,
    watch,
)


def quantizable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every layer that is quantized or could be, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_quantizable(module)}


def select(
    names: Sequence[str], quant_layers: Sequence[str], skip_layers: Sequence[str]
) -> list[str]:
    """The names that match a glob pattern of `quant_layers` and none of `skip_layers`.

    `*` crosses dots.

    Raises:
        UserError: a pattern that matches no name; it lists the nearest ones.
    """
    selected = _matching(quant_layers, names) - _matching(skip_layers, names)
    return [name for name in names if name in selected]


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found = set()
    # one pattern is one, not its letters
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            hint = f"near it: {', '.join(_near(pattern, names))}"
            raise UserError(f"layer pattern {pattern!r} matches no quantizable layer; {hint}")
        found.update(fitting)
    return found


def _near(pattern: str, names: Sequence[str]) -> Sequence[str]:
    """Up to four names, or patterns for whole parts of the model, spelt like `pattern`."""
    # layer1.0.conv1 is in the parts layer1.* and layer1.0.*
    parts = set()
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            parts.add(f"{name}.*")
    near = difflib.get_close_matches(pattern, [*sorted(parts), *names], n=4, cutoff=0.4)
    return near or names[:4]


def quantize_modules(
    model: nn.Module,
    example: Tensor,
    quant_layers: Sequence[str] = ("*",),
    skip_layers: Sequence[str] = (),
) -> list[str]:
    """Make the selected layers of `model` quantized ones, in place.

    Functional additions and the like become layers first (`utils.quantization.modularize`). The
    parameters stay the same objects under the same names. The new forms only add ranges, which
    `calibrate` or a quantized checkpoint must fill before the model is used. Another network that
    holds one of these layers has the quantized one, too: for a float copy, such as a teacher, call
    `copy.deepcopy(model)` first.

    Args:
        example: a few normalised images (B, C, H, W): one run shows what the model computes.
        quant_layers, skip_layers: glob patterns of names, such as "layer1.*"; `layer_table` lists
            the names.

    Returns:
        The names of the selected layers, in the model's order.

    Raises:
        UserError: a pattern matches nothing, no layer is left, the model is itself a layer, or the
            example is no such tensor.
    """
    is_float = isinstance(example, Tensor) and example.is_floating_point()
    if not is_float or example.ndim != 4 or len(example) == 0:
        raise UserError("the example must be normalised images: a float tensor (B, C, H, W)")
    if is_quantizable(model):
        raise UserError("the model is a single layer: put it into an nn.Sequential")
    modularize_or_say(model, example)
    return swap_layers(model, example, quant_layers, skip_layers)


def swap_layers(
    model: nn.Module, example: Tensor, quant_layers: Sequence[str], skip_layers: Sequence[str]
) -> list[str]:
    """As `quantize_modules`, of a model whose functional operations are modules already."""
    watched = watch(model, example)
    called = {operation.name for operation in watched.operations}
    layers = {}
    for name, layer in quantizable_modules(model).items():
        # a function would read the weight as it is, and the exported one rounded
        read = getattr(layer, "weight", None) in watched.parameters_read
        if name in called and not read:
            layers[name] = layer
    if not layers:
        mend = "where weights are computed, as by weight_norm, call remove_parametrizations first"
        raise UserError(f"no layer of this network has a quantized form; {mend}")
    selected = select(list(layers), quant_layers, skip_layers)
    if not selected:
        raise UserError("--quant_layers and --skip_layers leave no layer to quantize")
    keep_needed_inplace(model, example, [layers[name] for name in selected])
    device = next(model.parameters(), example).device
    for name in selected:
        layer = layers[name]
        if not isinstance(layer, QuantizedLayer):
            quantized_form(layer).convert(layer)
            # the layer is there already, its ranges are new
            at = layer.weight.device if hasattr(layer, "weight") else device
            for quantizer in layer.children():
                quantizer.to(at)
    # its fused kernel would read the weights, and call none of its layers
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
    return selected


def keep_needed_inplace(model: nn.Module, example: Tensor, layers: Sequence[nn.Module]) -> None:
    """Let only those of `layers` go on to work in place whose input is read again after them.

    What rounds its input has made a copy, and would have to write its result back for nobody.
    """
    in_place = [layer for layer in layers if getattr(layer, "inplace", False)]
    if not in_place:
        return
    wanted = tensors_in(run_on(model, example))

    def unchanged() -> bool:
        return all(map(torch.equal, tensors_in(run_on(model, example)), wanted))

    for layer in in_place:
        layer.inplace = False
    # nearly always that is all
    if unchanged():
        return
    for layer in in_place:
        layer.inplace = True
    # one by one: those stay without which something changes
    for layer in in_place:
        layer.inplace = False
        if not unchanged():
            layer.inplace = True


def follow_ranges(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let each addition of `model` round the operands that `state` has ranges for, in place.

    A checkpoint keeps its choice where today's rule has another.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantAdd):
            stored = [f"{name}.{quantizer}._amax" in state for quantizer in QuantAdd.QUANTIZERS]
            if any(stored):
                module.round_instead(tuple(operand for operand in (0, 1) if stored[operand]))
