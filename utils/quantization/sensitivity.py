"""How much the rounding of each layer changes what a network computes.

Layers are switched between INT8 and float in one calibrated network. For each layer and each block
the network runs twice: with only that in INT8, and with all but that.

Before the first layer that is switched, a run computes what the network all in float, or all in
INT8, has computed. So the results of those two runs' layers are kept and reused up to there. They
are kept for one batch: it goes through all runs before the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from layers.quantized import QuantizedLayer
from layers.quantizers import Quantizer
from utils.device import full_precision
from utils.metrics import decibels
from utils.quantization.calibrate import require_calibrated
from utils.quantization.watch import evaluating, tensors_in
from utils.records import Scan, Sensitivity, text_table

Calls = list[tuple[str, Tensor]]
"""Name and result of each call of a quantized layer, in order."""

ALL = "*"
"""The part that is the whole network: only it is INT8, all but it is float."""


@dataclass
class Progress:
    """What is measured so far, to go on from there.

    Args:
        key: what it is of; it is worth nothing for anything else.
        batches: how many went through all runs.
        signal: sum of the squared logits in float.
        sums: part of the network -> squared error of the logits and number of right classes, with
            only that in INT8, and the two with all but that.
    """

    key: dict[str, str]
    batches: int = 0
    signal: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)


class Switched:
    """A calibrated network whose quantized layers can each run in INT8 or in float.

    It is for evaluation, inside of `switched`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        modules = model.named_modules()
        self.layers = {name: layer for name, layer in modules if isinstance(layer, QuantizedLayer)}
        self._known: Iterator[tuple[str, Tensor]] = iter(())
        self._kept: Calls | None = None
        for name, layer in self.layers.items():
            layer.forward = self._looked_up(name, layer)

    def __call__(
        self,
        images: Tensor,
        int8: Collection[str],
        known: Sequence[tuple[str, Tensor]] = (),
        keep: Calls | None = None,
    ) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W).

        Args:
            int8: names of the layers that run in INT8.
            known: the first calls of another run, up to which nothing differs.
            keep: where this run's calls are appended to.
        """
        for name, layer in self.layers.items():
            _switch(layer, name in int8)
        self._known, self._kept = iter(known), keep
        # a copy: the first layer may work in place, and all runs are given the same images
        return self.model(images.clone())

    def _looked_up(self, name: str, layer: nn.Module) -> Callable[..., Tensor]:
        """The `forward` of a layer, which takes a call's result from those that are known."""
        compute = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            known = next(self._known, None)
            if known is not None:
                # a copy, as what follows may work in place
                result = known[1].clone()
                if not getattr(layer, "inplace", False):
                    return result
                [x] = tensors_in((args, kwargs))
                return x.copy_(result)
            result = compute(*args, **kwargs)
            if self._kept is not None:
                self._kept.append((name, result.clone()))
            return result

        return forward


def _switch(layer: nn.Module, int8: bool) -> None:
    for module in layer.children():
        if isinstance(module, Quantizer):
            if int8:
                module.enable_quant()
            else:
                module.disable_quant()


@contextmanager
def switched(model: nn.Module) -> Iterator[Switched]:
    """Context manager: the layers of `model` are switched at will; then it is all in INT8 again."""
    require_calibrated(model)
    network = Switched(model)
    try:
        with evaluating(model), full_precision():
            yield network
    finally:
        for layer in network.layers.values():
            del layer.forward
            _switch(layer, int8=True)


def before(calls: Calls, changed: Collection[str]) -> Calls:
    """The calls before the first of a layer that is `changed`."""
    return list(takewhile(lambda call: call[0] not in changed, calls))


def parts_of(names: Sequence[str]) -> dict[str, list[str]]:
    """All layers, each block of several and each layer: name or pattern -> names of its layers.

    Of blocks with the same layers it is the outermost.
    """
    blocks = {ALL: list(names)}
    for name in names:
        words = name.split(".")
        for count in range(1, len(words)):
            blocks.setdefault(f"{'.'.join(words[:count])}.*", []).append(name)
    parts: dict[str, list[str]] = {}
    for pattern, members in blocks.items():
        if len(members) > 1 and members not in parts.values():
            parts[pattern] = members
    return parts | {name: [name] for name in names}


def right_images(
    network: Switched, batches: Sequence[tuple[Tensor, Tensor]], int8: Collection[str]
) -> np.ndarray:
    """Which images (N,) bool are classified rightly with the layers `int8` in INT8.

    Args:
        batches: normalised images (B, C, H, W) and labels (B,), served again for each call.
    """
    right = [network(images, int8).argmax(1) == labels for images, labels in batches]
    return torch.cat(right).cpu().numpy()


def scan(
    network: Switched,
    batches: Sequence[tuple[Tensor, Tensor]],
    precision: str,
    progress: Progress,
    save: Callable[[Progress], None],
) -> Scan:
    """How sensitive the network is to the rounding of each layer and block.

    Args:
        batches: normalised images (B, C, H, W) and labels (B,).
        precision: the network's name in the result.
        progress: what is known already; it is gone on with, in place.
        save: called with it after each batch.
    """
    for images, labels in islice(batches, progress.batches, None):
        what = f"sensitivity, batch {progress.batches + 1} of {len(batches)}"
        _add_batch(network, images, labels, progress, what)
        progress.batches += 1
        save(progress)
    count = sum(len(labels) for _, labels in batches)
    return _result(progress, precision, count)


def _add_batch(
    network: Switched, images: Tensor, labels: Tensor, progress: Progress, what: str
) -> None:
    """Let a batch go through all runs, and add what that measures to `progress`.

    Args:
        what: label of the progress bar.
    """
    in_float: Calls = []
    in_int8: Calls = []
    logits = network(images, (), keep=in_float).double()
    network(images, network.layers, keep=in_int8)
    progress.signal += float(logits.square().sum())
    parts = parts_of(list(network.layers))
    for part, members in tqdm(parts.items(), what, unit="part", leave=False):
        others = network.layers.keys() - set(members)
        only = network(images, members, before(in_float, members))
        without = network(images, others, before(in_int8, members))
        sums = progress.sums.get(part, [0.0] * 4)
        found = [*_sums(only, logits, labels), *_sums(without, logits, labels)]
        progress.sums[part] = [a + b for a, b in zip(sums, found, strict=True)]


def _sums(logits: Tensor, reference: Tensor, labels: Tensor) -> tuple[float, float]:
    """Squared error, and number of right classes."""
    error = (logits.double() - reference).square().sum()
    return float(error), float((logits.argmax(1) == labels).sum())


def _result(progress: Progress, precision: str, images: int) -> Scan:
    def sqnr_db(noise: float) -> float | None:
        found = decibels(progress.signal, noise)
        return found if math.isfinite(found) else None

    rows = []
    for part, (noise, right, noise_without, right_without) in progress.sums.items():
        only = sqnr_db(noise), 100 * right / images
        without = sqnr_db(noise_without), 100 * right_without / images
        rows.append(Sensitivity(part, *only, *without))
    # most noise first
    rows.sort(key=lambda row: math.inf if row.only_sqnr_db is None else row.only_sqnr_db)
    return Scan(precision, images, rows)


def scan_table(scan: Scan) -> str:
    """A scan as a table, the layers that cost the most first."""
    lines = [["in INT8", "only these: dB", "accuracy %", "all but these: dB", "accuracy %"]]
    for row in scan.parts:
        layers, *values = vars(row).values()
        lines.append([layers, *("-" if value is None else f"{value:.2f}" for value in values)])
    return f"{text_table(lines, names=1)}\n{one_image(scan.images)}"


def one_image(images: int) -> str:
    """How finely accuracies of so many val images can differ."""
    return f"of {images} val images: one is {100 / images:.2f} points"
