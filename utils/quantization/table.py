"""What of a network is quantized, and what is not and why, as a table."""

from __future__ import annotations

from torch import Tensor, nn

from layers import Add
from layers.pool import needs_matrices
from layers.quantized import QuantizedLayer
from layers.quantizers import Quantizer
from utils.errors import and_more
from utils.quantization.modularize import ADDING, is_candidate
from utils.quantization.watch import Operation, Watch, is_quantizable, watch
from utils.records import text_table

CONCATENATIONS = ("cat", "concat", "concatenate")
REMOVE = "remove_weight_norm, remove_spectral_norm or remove_parametrizations"


def layer_table(model: nn.Module, example: Tensor) -> str:
    """Every operation with a weight or of feature maps: its form, its ranges, or why it is float.

    The last lines say how much of the multiply-adds is INT8, and what stays in float.

    Args:
        example: a few normalised images (B, C, H, W): one run shows what the model computes.
    """
    operations = []
    watched = watch(model, example)
    for operation in watched.operations:
        worth_a_row = is_quantizable(operation.module) or is_candidate(operation)
        if operation.macs or worth_a_row or operation.function in CONCATENATIONS:
            operations.append(operation)
    total = sum(operation.macs for operation in operations) or 1

    rows = [("layer", "type", "multiply-adds", "form", "ranges: operands in their order; weight")]
    for operation in operations:
        share = f"{100 * operation.macs / total:.1f} %" if operation.macs else "-"
        name = operation.name or "(the network itself)"
        kind = operation.function or type(operation.module).__name__
        rows.append((name, kind, share, *_form(operation, watched, model)))
    called = {operation.name for operation in operations}
    for name, module in model.named_modules():
        if is_quantizable(module) and name not in called:
            rows.append((name, "-", "-", "float", "not called as a module in evaluation"))
    return f"{text_table(rows, names=len(rows[0]))}\n{_summary(operations, total)}"


def _form(operation: Operation, watched: Watch, model: nn.Module) -> tuple[str, str]:
    """The form of an operation, and its ranges or why it has none."""
    module = operation.module
    if _runs_in_int8(operation):
        quantizers = [child for child in module.children() if isinstance(child, Quantizer)]
        return "INT8", "; ".join(map(_range, quantizers))
    if isinstance(module, QuantizedLayer):
        if not _rounds(module):
            return "float", "a quantizer is switched off: switch it on to export"
        return "float", "rounded, but exported as products of matrices"
    if operation.function in CONCATENATIONS:
        return "-", "rounded as what reads it says"
    owner = model.get_submodule(operation.name)
    if isinstance(owner, (nn.Conv2d, nn.Linear)) and "weight" not in owner._parameters:
        return "float", f"its weight is computed: {REMOVE} first"
    if module is None:
        return "float", f"functional, at {operation.where}"
    if getattr(module, "weight", None) in watched.parameters_read:
        return "float", "a function reads its weight, too"
    if is_quantizable(module):
        return "float", "not selected"
    return "float", "no quantized form"


def _runs_in_int8(operation: Operation) -> bool:
    """Whether it is a quantized layer that engines have a kernel for."""
    if not isinstance(operation.module, QuantizedLayer) or not _rounds(operation.module):
        return False
    return not needs_matrices(operation.module, operation.shapes[0][2:], operation.shape[2:])


def _rounds(layer: nn.Module) -> bool:
    return all(child.switched_on for child in layer.children() if isinstance(child, Quantizer))


def _summary(operations: list[Operation], total: int) -> str:
    """As in `INT8: 98.7 % of the multiply-adds, 16 of 16 additions; float: conv1, fc`."""
    quantized = [op for op in operations if _runs_in_int8(op)]
    macs = sum(op.macs for op in quantized)
    additions = []
    for operation in operations:
        if isinstance(operation.module, Add) or operation.function.strip("_") in ADDING:
            additions.append(operation)
    added = [op for op in additions if op in quantized]
    text = f"INT8: {100 * macs / total:.1f} % of the multiply-adds"
    if additions:
        text += f", {len(added)} of {len(additions)} additions"
    others = [op for op in operations if op not in quantized]
    floats = [op for op in others if op.function not in CONCATENATIONS]
    # a layer may be called several times
    rest = list(dict.fromkeys(f"{op.name}.{op.function}".strip(".") for op in floats))
    if not rest:
        return f"{text}; float: nothing of these"
    return f"{text}; float: {and_more(rest, 8)}"


def _range(quantizer: Quantizer) -> str:
    amax = quantizer.amax
    if not quantizer.calibrated:
        return "not calibrated"
    if amax.ndim == 0:
        return f"{amax:.4g} per tensor"
    return f"{amax.min():.3g}..{amax.max():.3g} per channel ({len(amax)})"
