"""What a quantized network's layers compute, and how they use their INT8 codes."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from layers.quantized import QuantizedLayer
from layers.quantizers import CODE_MAX, Quantizer, per_channel
from utils.quantization.watch import Operation, is_quantizable, run_on, watch
from utils.specs import CodeUse, LayerFacts

LOWEST, HIGHEST = -CODE_MAX - 2, CODE_MAX + 1
"""Codes that there would be beyond the range: they stand for all that is."""
PARTS = 16

PART_IMAGES = 32
"""Run at a time: the codes of large images take memory."""


def layer_facts(model: nn.Module, images: Tensor) -> list[LayerFacts]:
    """The layers that multiply and add, or that can be quantized, in the order of their calls.

    Args:
        model: calibrated, in its training form.
        images: (B, C, H, W), normalised, whose codes are counted.
    """
    counts = count_codes(model, images)
    calls = defaultdict(list)
    example = images[:2]
    for operation in watch(model, example).operations:
        module = operation.module
        if module is not None and (operation.macs or is_quantizable(module)):
            calls[operation.name].append(operation)
    return [_facts(name, called, len(example), counts) for name, called in calls.items()]


def _facts(
    name: str, calls: list[Operation], images: int, counts: dict[nn.Module, Tensor]
) -> LayerFacts:
    """A layer, from its calls with that many images."""
    module = calls[0].module
    ranges = []
    for child_name, child in module.named_children():
        if child in counts:
            operand = child_name.removesuffix("_quantizer")
            ranges.append(_code_use(operand, child, counts[child]))
    shapes = [shape for call in calls for shape in call.shapes]
    weight = getattr(module, "weight", None)
    return LayerFacts(
        name=name,
        kind=type(module).__name__.removeprefix("Quant"),
        int8=isinstance(module, QuantizedLayer),
        macs=sum(call.macs for call in calls),
        reads=sum(map(math.prod, shapes)) // images,
        writes=sum(math.prod(call.shape) for call in calls) // images,
        parameters=0 if weight is None else weight.numel(),
        ranges=ranges,
    )


def count_codes(model: nn.Module, images: Tensor) -> dict[nn.Module, Tensor]:
    """Quantizer -> how many values it gives each code `LOWEST`..`HIGHEST`, (258,) int64."""
    counts: dict[nn.Module, Tensor] = {}

    def count(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not isinstance(quantizer, Quantizer):
            return
        # a weight is the same for all images
        if quantizer.is_weight and quantizer in counts:
            return
        x = args[0].detach().float()
        scale = quantizer.scale
        if scale.ndim:
            scale = per_channel(scale, x, quantizer.axis)
        # a network that diverged has no numbers
        codes = (x / scale).round().nan_to_num(0).clamp(LOWEST, HIGHEST).to(torch.int16)
        found = torch.bincount((codes - LOWEST).flatten(), minlength=HIGHEST - LOWEST + 1)
        counts[quantizer] = counts.get(quantizer, 0) + found.cpu()

    with nn.modules.module.register_module_forward_pre_hook(count):
        for part in images.split(PART_IMAGES):
            run_on(model, part)
    return counts


def _code_use(operand: str, quantizer: Quantizer, counts: Tensor) -> CodeUse:
    """What `counts` of `count_codes` say in short."""
    total = int(counts.sum())
    found = torch.arange(LOWEST, HIGHEST + 1)
    given = found.clamp(quantizer.code_min, CODE_MAX)
    clipped = int(counts[found != given].sum())
    # -128..127; what is beyond the range gets its last code
    codes = torch.zeros(256, dtype=torch.int64).index_add_(0, given + 128, counts)

    # without negative values half of the codes cannot be used, and no more than there are values
    possible = codes[1:] if codes[:128].any() else codes[128:]
    most = min(len(possible), total)
    parts = codes.reshape(PARTS, -1).sum(1) / total
    return CodeUse(
        operand=operand,
        smallest=quantizer.amax.min().item(),
        largest=quantizer.amax.max().item(),
        clipped_pct=100 * clipped / total,
        used_pct=100 * int((possible > 0).sum()) / most,
        histogram=[round(share, 5) for share in parts.tolist()],
    )
