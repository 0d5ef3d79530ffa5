"""Layers of a network beside what engines run: who computes which, in what time. No torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from utils.manifest import layer_of
from utils.records import Engine, Layer
from utils.specs import LayerFacts

LARGEST_CLIPPED_PCT, LEAST_USED_PCT, SLOWER = 1.0, 25.0, 1.05
"""Beyond these a layer is odd; the last is INT8's time over that of the fastest float engine."""

VALUE_BYTES = {"INT8": 1, "UINT8": 1, "FP16": 2, "BF16": 2, "FP32": 4}
COPIES = ("Reformat", "Reorder", "Transpose", "Shuffle")
"""Kinds of engine layers that move values and compute nothing."""
GENERATION = re.compile(r"sm_?\d+|turing|ampere|hopper|avx512(_core)?(_vnni)?|avx2(_vnni)?|amx")
"""What a kernel's name says of the hardware that it was written for."""


@dataclass
class Spent:
    """What an engine does for one layer of the network.

    Args:
        main: the engine layer that computes it; None: there is none but copies.
        ms: of that and of the copies for it; None: not known.
        tops, gb_s: multiply-adds, counted twice, and values moved, in 10^12 and 10^9 a second.
        fused: other layers of the network that the engine layer holds.
    """

    main: Layer
    ms: float | None
    tops: float | None
    gb_s: float | None
    fused: list[str]

    @property
    def generation(self) -> str:
        found = GENERATION.search(self.main.tactic.lower())
        return found[0] if found else "-"


@dataclass
class LayerRow:
    """A layer of the network on the page.

    Args:
        spent: by its INT8 engine; None: nothing, or another layer's engine layer holds it.
        fused_into: that layer.
        floats: what each float engine does for it.
    """

    facts: LayerFacts
    spent: Spent | None
    fused_into: str
    floats: list[Spent | None]
    odd: list[str] = field(default_factory=list)


def float_engines(engines: Sequence[Engine]) -> list[Engine]:
    return [engine for engine in engines if engine.precision in ("FP32", "FP16")]


def layer_rows(
    layers: Sequence[LayerFacts], engines: Sequence[Engine], precision: str
) -> list[LayerRow]:
    """Every layer of the network, with what the engines spend on it and what is odd."""
    found = {engine.precision: spent_by(engine, layers) for engine in engines}
    missed: set[str] = set()
    for engine in engines:
        if engine.precision == precision:
            # a layer without a node has its own name there
            missed |= {*map(layer_of, engine.missed), *engine.missed}
    spent = found.get(precision, {})
    fused_into = {part: name for name, at in spent.items() for part in at.fused}

    rows = []
    for facts in layers:
        floats = [found[engine.precision].get(facts.name) for engine in float_engines(engines)]
        own, host = spent.get(facts.name), fused_into.get(facts.name, "")
        row = LayerRow(facts, own, host, floats)
        row.odd = odd_things(row, facts.name in missed)
        rows.append(row)
    return rows


def odd_things(row: LayerRow, missed: bool) -> list[str]:
    """What a user should look at."""
    odd = []
    if missed:
        odd.append("meant for INT8, but not run in it")
    # an addition may be fused here into one convolution and there into another
    spent = row.spent
    times_ms = [at.ms for at in row.floats if spent and at and at.ms and at.fused == spent.fused]
    if row.facts.int8 and times_ms and spent.ms:
        ratio = spent.ms / min(times_ms)
        if ratio > SLOWER:
            odd.append(f"{ratio:.2f} × the time of the float engine")
    for use in row.facts.ranges:
        if use.clipped_pct > LARGEST_CLIPPED_PCT:
            odd.append(f"{use.operand}: {use.clipped_pct:.1f} % beyond the range")
        if use.used_pct < LEAST_USED_PCT:
            odd.append(f"{use.operand}: {use.used_pct:.0f} % of the codes used")
    return odd


def spent_by(engine: Engine, layers: Sequence[LayerFacts]) -> dict[str, Spent]:
    """Layer of the network -> what an engine spends on it.

    An engine layer that holds several is counted to the one with the most multiply-adds.
    """
    known = {facts.name: facts for facts in layers}
    at: dict[str, list[tuple[Layer, list[LayerFacts]]]] = defaultdict(list)
    for layer in engine.layers:
        if parts := held(layer, known):
            at[max(parts, key=lambda part: part.macs).name].append((layer, parts))

    spent = {}
    for name, pairs in at.items():
        times_ms = [layer.ms for layer, _ in pairs if layer.ms is not None]
        ms = sum(times_ms) if times_ms else None
        main, parts = max(pairs, key=lambda pair: (pair[0].kind not in COPIES, pair[0].ms or 0))
        fused = [part.name for part in parts if part.name != name]
        rates = _rates(engine.batch_size, main, parts)
        spent[name] = Spent(main, ms, *rates, fused)
    return spent


def held(layer: Layer, known: Mapping[str, LayerFacts]) -> list[LayerFacts]:
    """The layers of the network that an engine layer computes or, if none, prepares."""
    computed, prepared = {}, {}
    for node in re.findall(r"/[^\s\],]+", layer.name):
        name = layer_of(node)
        if name in known:
            computed[name] = known[name]
        # a quantizer's node: its layer's name is above its own
        above = name.rpartition(".")[0]
        if above in known:
            prepared[above] = known[above]
    return list((computed or prepared).values())


def _rates(
    batch_size: int, layer: Layer, parts: Sequence[LayerFacts]
) -> tuple[float | None, float | None]:
    """10^12 operations and 10^9 bytes a second of an engine layer; None: not known."""
    if not layer.ms or layer.kind in COPIES:
        return None, None
    seconds = layer.ms / 1000
    tops = 2 * batch_size * sum(part.macs for part in parts) / seconds / 1e12
    size = VALUE_BYTES.get(layer.precision)
    if size is None:
        return tops or None, None
    # what one part writes and the next reads never leaves the kernel
    inside = sum(part.writes for part in parts) - parts[-1].writes
    moved = sum(part.reads for part in parts) - inside + parts[-1].writes
    weights = sum(part.parameters for part in parts)
    return tops or None, size * (batch_size * max(moved, 0) + weights) / seconds / 1e9
