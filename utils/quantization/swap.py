"""The per-layer wrapper: swap selected modules of a float network for their quantized forms, and say what was swapped."""

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
    """Name -> module for every layer that is quantized or has a quantized form, in the model's order."""
    kinds = (*QUANTIZED_FORM, *QUANTIZED_FORM.values())
    return {name: module for name, module in model.named_modules() if type(module) in kinds}


def is_quantized(module: nn.Module) -> bool:
    return type(module) in QUANTIZED_FORM.values()


def select(
    names: Sequence[str], quant_layers: Sequence[str], skip_layers: Sequence[str]
) -> list[str]:
    """The names that match a glob pattern of `quant_layers` and none of `skip_layers`; `*` crosses dots.

    Raises:
        UserError: a pattern that matches no name; it lists the nearest ones.
    """
    for pattern in (*quant_layers, *skip_layers):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"layer pattern {pattern!r} matches no quantizable layer; near it: {_near(pattern, names)}"
            )

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [
        name for name in names if matches(name, quant_layers) and not matches(name, skip_layers)
    ]


def _near(pattern: str, names: Sequence[str]) -> str:
    """Up to four names, or patterns for whole parts of the model, spelt like `pattern`."""
    parts = {
        ".".join(name.split(".")[:depth]) + ".*"
        for name in names
        for depth in range(1, name.count(".") + 1)
    }
    near = difflib.get_close_matches(pattern, [*sorted(parts), *names], n=4, cutoff=0.4)
    return ", ".join(near or names[:4])


def quantize_modules(
    model: nn.Module, quant_layers: Sequence[str] = ("*",), skip_layers: Sequence[str] = ()
) -> list[str]:
    """Replace the selected modules of `model` in place by their training forms; returns their names.

    The parameters stay the same objects under the same names; the new forms only add ranges, which `utils.quantization.calibrate` or
    a quantized checkpoint must fill before the model is used.

    Raises:
        UserError: a pattern that matches nothing, or no layer is left.
    """
    layers = quantizable_modules(model)
    selected = select(list(layers), quant_layers, skip_layers)
    if not selected:
        raise UserError("--quant_layers and --skip_layers leave no layer to quantize")
    for name in (name for name in selected if not is_quantized(layers[name])):
        model.set_submodule(name, QUANTIZED_FORM[type(layers[name])].from_float(layers[name]))
    return selected


def audit(model: nn.Module) -> str:
    """A table of every quantizable layer: quantized or not, bits, granularity and calibrated ranges."""
    rows = [("layer", "type", "bits", "input range", "weight or factor range")]
    for name, module in quantizable_modules(model).items():
        kind = type(module).__name__
        if not is_quantized(module):
            rows.append((name, kind, "float", "-", "-"))
            continue
        ranges = [
            *(_range(child) for child in module.children() if isinstance(child, Quantizer)),
            "-",
        ][:2]  # one or two
        rows.append((name, kind, str(module.input_quantizer.num_bits), *ranges))
    quantized = sum(row[2] != "float" for row in rows[1:])
    return f"{text_table(rows, names=len(rows[0]))}\n{quantized} of {len(rows) - 1} quantizable layers are quantized"


def _range(quantizer: Quantizer) -> str:
    amax = quantizer.amax
    if not quantizer.calibrated:
        return "not calibrated"
    if amax.ndim == 0:
        return f"{amax:.4g} per tensor"
    return f"{amax.min():.3g}..{amax.max():.3g} per channel ({len(amax)})"
