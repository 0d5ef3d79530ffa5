"""The per-layer wrapper: swap selected modules of a float network for their quantized forms."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from layers.quantized import QUANTIZED_FORM
from layers.quantizers import Quantizer
from utils.errors import UserError
from utils.records import text_table


def quantizable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every layer that is quantized or could be, in the model's order."""
    kinds = (*QUANTIZED_FORM, *QUANTIZED_FORM.values())
    return {name: module for name, module in model.named_modules() if type(module) in kinds}


def is_quantized(module: nn.Module) -> bool:
    return type(module) in QUANTIZED_FORM.values()


def select(
    names: Sequence[str], quant_layers: Sequence[str], skip_layers: Sequence[str]
) -> list[str]:
    """The names that match a glob pattern of `quant_layers` and none of `skip_layers`.

    `*` crosses dots.

    Raises:
        UserError: a pattern that matches no name; it lists the nearest ones.
    """

    def matching(patterns: Sequence[str]) -> set[str]:
        found = set()
        # one pattern is one, not its letters
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            fitting = [name for name in names if fnmatchcase(name, pattern)]
            if not fitting:
                near = _near(pattern, names)
                raise UserError(
                    f"layer pattern {pattern!r} matches no quantizable layer; near it: {near}"
                )
            found.update(fitting)
        return found

    selected = matching(quant_layers) - matching(skip_layers)
    return [name for name in names if name in selected]


def _near(pattern: str, names: Sequence[str]) -> str:
    """Up to four names, or patterns for whole parts of the model, spelt like `pattern`."""
    # layer1.0.conv1 is in the parts layer1.* and layer1.0.*
    parts = set()
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            parts.add(f"{name}.*")
    near = difflib.get_close_matches(pattern, [*sorted(parts), *names], n=4, cutoff=0.4)
    return ", ".join(near or names[:4])


def quantize_modules(
    model: nn.Module, quant_layers: Sequence[str] = ("*",), skip_layers: Sequence[str] = ()
) -> list[str]:
    """Replace the selected modules of `model` in place by their training forms.

    The parameters stay the same objects under the same names. The new forms only add ranges, which
    `calibrate` or a quantized checkpoint must fill before the model is used.

    Args:
        quant_layers, skip_layers: glob patterns of names, such as "layer1.*"; `layer_table` lists
            the names.

    Returns:
        The names of the selected layers, in the model's order.

    Raises:
        UserError: a pattern matches nothing, or no layer is left.
    """
    layers = quantizable_modules(model)
    selected = select(list(layers), quant_layers, skip_layers)
    if not selected:
        raise UserError("--quant_layers and --skip_layers leave no layer to quantize")
    for name in selected:
        layer = layers[name]
        if not is_quantized(layer):
            model.set_submodule(name, QUANTIZED_FORM[type(layer)].from_float(layer))
    return selected


def layer_table(model: nn.Module) -> str:
    """A table of every quantizable layer: quantized or not, bits, granularity and ranges."""
    rows = [("layer", "type", "bits", "input range", "weight or factor range")]
    quantized = 0
    for name, module in quantizable_modules(model).items():
        kind = type(module).__name__
        if not is_quantized(module):
            rows.append((name, kind, "float", "-", "-"))
            continue
        quantized += 1
        # every quantized layer has one or two
        quantizers = [child for child in module.children() if isinstance(child, Quantizer)]
        ranges = [_range(quantizer) for quantizer in quantizers]
        first, second = (*ranges, "-")[:2]
        rows.append((name, kind, str(module.input_quantizer.num_bits), first, second))
    table = text_table(rows, names=len(rows[0]))
    return f"{table}\n{quantized} of {len(rows) - 1} quantizable layers are quantized"


def _range(quantizer: Quantizer) -> str:
    amax = quantizer.amax
    if not quantizer.calibrated:
        return "not calibrated"
    if amax.ndim == 0:
        return f"{amax:.4g} per tensor"
    return f"{amax.min():.3g}..{amax.max():.3g} per channel ({len(amax)})"
