"""Layers of a network beside what engines run: who computes which, in what time. No torch.

`layer_rows` is for the page of a run, layer of the network by layer; `audit_lines` lists an
engine's own layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from utils.manifest import FLOAT, layer_of
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
        main: the engine layer that computes it; a copy where there is nothing else.
        ms: of that and of the copies for it; None: not known.
        tops, gb_s, generation: of the former alone, as `rates` and `generation` find them.
        fused: other layers of the network that the engine layer holds.
    """

    main: Layer
    ms: float | None
    tops: float | None
    gb_s: float | None
    generation: str
    fused: list[str]


@dataclass
class LayerRow:
    """A layer of the network on the page.

    Args:
        spent: by its INT8 engine; None: nothing, or another layer's engine layer holds it.
        fused_into: that layer.
        floats: what each float engine does for it.
        odd: what a user should look at.
    """

    facts: LayerFacts
    spent: Spent | None
    fused_into: str
    floats: list[Spent | None]
    odd: list[str]


def float_engines(engines: Sequence[Engine]) -> list[Engine]:
    return [engine for engine in engines if engine.precision in FLOAT]


def layer_rows(
    layers: Sequence[LayerFacts], engines: Sequence[Engine], precision: str
) -> list[LayerRow]:
    """Every layer of the network, with what the engines spend on it and what is odd."""
    found = {engine.precision: spent_by(engine, layers) for engine in engines}
    spent = found.get(precision, {})
    fused_into = {part: name for name, at in spent.items() for part in at.fused}
    missed = set()
    for engine in engines:
        if engine.precision == precision:
            # a layer without a node has its own name there
            missed |= {*engine.missed, *map(layer_of, engine.missed)}

    rows = []
    for facts in layers:
        own, host = spent.get(facts.name), fused_into.get(facts.name, "")
        floats = [found[engine.precision].get(facts.name) for engine in float_engines(engines)]
        odd = odd_things(facts, own, floats, facts.name in missed)
        rows.append(LayerRow(facts, own, host, floats, odd))
    return rows


def odd_things(
    facts: LayerFacts, spent: Spent | None, floats: Sequence[Spent | None], missed: bool
) -> list[str]:
    """What a user should look at."""
    odd = ["meant for INT8, but not run in it"] if missed else []
    # an addition may be fused here into one convolution and there into another: what does no less
    times_ms = []
    for at in floats:
        if spent and at and at.ms and set(at.fused) >= set(spent.fused):
            times_ms.append(at.ms)
    if facts.int8 and times_ms and spent.ms and spent.ms > SLOWER * min(times_ms):
        odd.append(f"{spent.ms / min(times_ms):.2f} × the time of the float engine")
    for use in facts.ranges:
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
        computed, prepared = held(layer, known)
        if names := computed or prepared:
            largest = max(names, key=lambda name: known[name].macs)
            at[largest].append((layer, [known[name] for name in computed]))

    spent = {}
    for name, pairs in at.items():
        times_ms = [layer.ms for layer, _ in pairs if layer.ms is not None]
        ms = sum(times_ms) if times_ms else None
        main, parts = max(pairs, key=lambda pair: (pair[0].kind not in COPIES, pair[0].ms or 0))
        fused = [part.name for part in parts if part.name != name]
        per_s = rates(engine.batch_size, main, parts)
        spent[name] = Spent(main, ms, *per_s, generation(main), fused)
    return spent


def held(layer: Layer, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Which layers of the network an engine layer computes, and which it prepares."""
    modules = [layer_of(node) for node in re.findall(r"/[^\s\],]+", layer.name)]
    # a quantizer's node: its layer's name is above its own
    above = [module.rpartition(".")[0] for module in modules]
    computed = dict.fromkeys(name for name in modules if name in names)
    prepared = dict.fromkeys(name for name in above if name in names)
    return list(computed), list(prepared)


def rates(
    batch_size: int, layer: Layer, parts: Sequence[LayerFacts]
) -> tuple[float | None, float | None]:
    """10^12 operations and 10^9 bytes a second of an engine layer; None: not known.

    A multiply-add is two operations. Values are moved once, in the engine layer's precision.

    Args:
        parts: what it computes.
    """
    if not layer.ms or not parts or layer.kind in COPIES:
        return None, None
    seconds = layer.ms / 1000
    tops = 2 * batch_size * sum(part.macs for part in parts) / seconds / 1e12
    # what one part writes and the next reads never leaves the kernel
    inside = sum(part.writes for part in parts[:-1])
    moved = max(0, sum(part.reads for part in parts) - inside + parts[-1].writes)
    values = batch_size * moved + sum(part.parameters for part in parts)
    size = VALUE_BYTES.get(layer.precision)
    gb_s = None if size is None else size * values / seconds / 1e9
    return tops or None, gb_s


def generation(layer: Layer) -> str:
    """The hardware that an engine layer's kernel was written for, as far as its name tells."""
    found = GENERATION.search(layer.tactic.lower())
    return found[0] if found else "-"


def audit_lines(engine: Engine, layers: Sequence[LayerFacts]) -> Iterator[str]:
    """A table of the engine's layers, each timed alone.

    Args:
        layers: of the network; without them no rate is known.
    """
    known = {facts.name: facts for facts in layers}
    yield f"{'ms':>8} {'TFLOP/s':>8} {'GB/s':>7}  {'kernel of':16} type  {'kind':24} name  kernel"
    for layer in engine.layers:
        computed, _ = held(layer, known)
        tops, gb_s = rates(engine.batch_size, layer, [known[name] for name in computed])
        cells = []
        for value, width, digits in ((layer.ms, 8, 4), (tops, 8, 2), (gb_s, 7, 1)):
            cells.append(f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}")
        yield f"{' '.join(cells)}  {generation(layer):16} {layer}"
