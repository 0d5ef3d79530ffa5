"""Which layers to quantize: what each one costs, and the fastest choice within a budget.

1. Scan the sensitivity, and time the layers of two engines: all in INT8, and all in float.
2. If the former loses too much accuracy on val images, leave layers in float, those first that take
   away the most noise for the time they lose, until fake quantization is within the budget. Put
   those back that it does not need.
3. Leave those in float, too, that alone were slower in INT8.
4. Time the engines of 2 and 3 as a whole. Take the fastest whose own accuracy is within the budget,
   if it is 2 % faster than float. An engine may compute something else than it should: if neither
   is within the budget, leave twice as many layers in float, and so on.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import dataset
from utils import compare, records
from utils.backends.network import Network, predict
from utils.checkpoint import Checkpoint
from utils.compare import Comparison
from utils.engine_layers import held
from utils.errors import UserError
from utils.manifest import ENGINES, FLOAT, INT8, graph_file
from utils.networks import batches_of, build_quantized, restore
from utils.quantization.export import export_onnx
from utils.quantization.sensitivity import (
    ALL,
    Progress,
    one_image,
    right_images,
    scan,
    switched,
)
from utils.records import Candidate, Choice, Record, Scan, text_table
from utils.schema import parse
from utils.specs import Quantization

SCAN_IMAGES = 500
"""Of the val part."""

SCAN_BATCH = 32
"""Of these, the results of all layers are in memory at a time, twice."""

SCAN_FILE = "sensitivity.json"
"""In the export's folder: how far a scan has come."""

MIN_SPEED_UP = 1.02
"""Of INT8 over float, or it is not worth having."""

MOST_CHANCE = 1.0
"""Points of accuracy: of few images chance makes more, but then a broken engine could pass."""

ROUNDING = 1e-6
"""Of a difference of two accuracies, in points."""

NO_TIME = 1e-3
"""Of an engine's time: what a layer in float loses at least, and where its times are not known."""


@dataclass
class Tuner:
    """A checkpoint's INT8 network, calibrated, and the val images that judge it.

    Args:
        checkpoint_digest: tells its file from any other.
        comparison: says the precision, the back end and the batch size.
        folder: of the export, locked; scans go on with what is found there.

    Raises:
        UserError: as `restore`.
    """

    checkpoint: Checkpoint
    checkpoint_digest: str
    data: dataset.ImageData
    quantization: Quantization
    comparison: Comparison
    folder: Path

    def __post_init__(self) -> None:
        # the network that is named, else the best one
        named = [name for name in INT8 if name in self.comparison.precisions]
        default = "INT8-QAT" if self.checkpoint.quantization else "INT8-PTC"
        self.precision = named[-1] if named else default
        found = restore(self.checkpoint, self.data, self.quantization, [self.precision])
        self.quantization, networks = found
        self.float_model, self.model = networks["FP32"], networks[self.precision]
        _, self.val = self.data.split(self.checkpoint.data.split_seed)

    @property
    def floats(self) -> Sequence[str]:
        """The float precisions that INT8 must beat: those that are named, or both."""
        return [name for name in FLOAT if name in self.comparison.precisions] or FLOAT

    def scan(self) -> Scan:
        """The sensitivity of each layer and block, on the first val images."""
        first = [array[:SCAN_IMAGES] for array in self.val]
        batches = batches_of(*first, self.checkpoint.data, SCAN_BATCH)
        # what a scan depends on
        key = {
            "checkpoint": self.checkpoint_digest,
            "data": self.data.digest(),
            "quantization": json.dumps(asdict(self.quantization)),
            "precision": self.precision,
            "batches": f"{SCAN_IMAGES} by {SCAN_BATCH}",
        }
        path = self.folder / SCAN_FILE
        progress = read_progress(path, key)
        with switched(self.model) as network:
            return scan(network, batches, self.precision, progress, partial(records.write, path))

    def record(self, found: Scan, flags: dict[str, str]) -> Record:
        """A record of a scan, without rows."""
        return Record(
            model=self.checkpoint.network.name,
            stem=self.checkpoint.network.stem,
            dataset=self.checkpoint.data.dataset,
            seed=self.checkpoint.recipe["seed"],
            flags=flags,
            commit=records.commit(),
            environment=records.environment(["pytorch"]),
            rows=[],
            quantization=self.quantization,
            sensitivity=found,
        )

    def choose(self, found: Scan, max_drop: float) -> Choice:
        """What to skip for the fastest engine within the budget; `*` if that is float's.

        The checkpoint is a float one.

        Args:
            max_drop: what val accuracy may lose, in points.

        Raises:
            UserError: the back end cannot be had.
        """
        val = batches_of(*self.val, self.checkpoint.data)
        images = compare.random_images(self.checkpoint.data, self.comparison.batch_sizes[0])
        with tempfile.TemporaryDirectory() as draft, switched(self.model) as network:
            names = list(network.layers)
            # the export has some of these graphs again, and so has another run: built once
            built = self.folder / ENGINES
            backend = compare.choose_backend(Path(draft), self.comparison, engines=built)

            def right(skip: Sequence[str]) -> np.ndarray:
                return right_images(network, val, set(names) - set(skip))

            float_right = right(names)

            def keeps(skip: Sequence[str]) -> bool:
                hits = right(skip)
                return accuracy_pct(hits) >= least_pct(hits, float_right, max_drop)

            def engines(skip: Sequence[str]) -> dict[str, Network]:
                precisions = self._draft(Path(draft), skip)
                return {precision: backend(precision) for precision in precisions}

            def measured(skip: list[str], networks: dict[str, Network]) -> list[Candidate]:
                candidates = []
                for precision, engine in networks.items():
                    latency_ms = float(np.median(engine.latencies_ms(images)))
                    predicted = predict(engine, self.val[0], engine.evaluation_batch, "val images")
                    hits = predicted == self.val[1]
                    least = least_pct(hits, float_right, max_drop)
                    pct = accuracy_pct(hits)
                    candidates.append(Candidate(precision, skip, latency_ms, pct, least))
                return candidates

            return search(found, names, engines, measured, keeps)

    def _draft(self, folder: Path, skip: Sequence[str]) -> Sequence[str]:
        """Export the network without `skip` in INT8; the precisions that it can then run in."""
        info = self.checkpoint.data
        if skip == [ALL]:
            # that in FP16 is written beside it
            graph, model = graph_file("FP32"), self.float_model
            precisions = self.floats
        else:
            graph, precisions = graph_file("INT8-PTC"), ["INT8-PTC"]
            skip = [*self.quantization.skip_layers, *skip]
            quantization = replace(self.quantization, skip_layers=skip)
            state = self.model.state_dict()
            model = build_quantized(self.checkpoint.network, quantization, info.size, state)
            # all but the ranges of what is skipped
            model.load_state_dict(state, strict=False)
        export_onnx(model, folder / graph, info.size, info.mean, info.std)
        return precisions


def accuracy_pct(right: np.ndarray) -> float:
    """Accuracy in percent, of which images (N,) bool are classified rightly."""
    return 100 * float(right.mean())


def least_pct(right: np.ndarray, float_right: np.ndarray, max_drop: float) -> float:
    """The accuracy that a network must have: FP32's, less `max_drop` points, less what is chance.

    Rounding makes some wrong images right and some right ones wrong. Of d such images as many go
    one way as the other if rounding costs nothing, give or take sqrt(d): the standard deviation of
    a sum of d times +1 or -1. A loss of sqrt(d) images or less shows nothing.

    Args:
        right: images (N,) bool that the network classifies rightly.
        float_right: those that FP32 does.
    """
    changed = int((right != float_right).sum())
    chance = min(MOST_CHANCE, 100 * changed**0.5 / len(right))
    return max(0.0, accuracy_pct(float_right) - max_drop - chance - ROUNDING)


def search(
    found: Scan,
    names: Sequence[str],
    engines: Callable[[Sequence[str]], dict[str, Network]],
    measured: Callable[[list[str], dict[str, Network]], list[Candidate]],
    keeps: Callable[[Sequence[str]], bool],
) -> Choice:
    """What `Tuner.choose` returns.

    Args:
        names: of all layers that may be quantized.
        engines: with the layers that it is given in float, by precision; of `*` those in float.
        measured: time and accuracy of these engines, which have the layers it is given in float.
        keeps: whether fake quantization, with the layers that it is given in float, is within the
            budget.
    """
    # the two ends
    floats = engines([ALL])
    tried = measured([ALL], floats)
    # in FP16 a network's values may be too large
    fastest = fastest_within(tried, tried[0])
    all_int8 = engines([])
    [int8_engine] = all_int8.values()
    lost = lost_ms(names, floats[fastest.precision], int8_engine)
    order = by_gain(found, lost, NO_TIME * fastest.latency_ms)

    def attempt(layers: Sequence[str]) -> bool:
        """Try an engine with these layers in float, once; whether it is within the budget."""
        skip = [name for name in names if name in layers]
        # where all is float, there is no engine of INT8
        if len(skip) == len(names):
            return False
        for candidate in tried:
            if candidate.skip_layers == skip:
                return candidate.within
        tried.extend(measured(skip, engines(skip) if skip else all_int8))
        return tried[-1].within

    # none in float or, if that is not within the budget, as few as fake quantization says
    needed: list[str] = []
    if not attempt(needed):
        needed = fewest(order, keeps)
    within = attempt(needed)
    # and those that are slower in INT8
    within |= attempt([*needed, *(name for name in names if lost[name] < 0)])
    # engines may compute something else: more in float
    order = sorted(order, key=lambda name: name not in needed)
    count = len(needed)
    while not within and (count := max(1, 2 * count)) < len(names):
        within = attempt(order[:count])

    best = fastest_within(tried, fastest)
    if best.latency_ms * MIN_SPEED_UP > fastest.latency_ms:
        best = fastest
    return Choice(best.skip_layers, tried)


def fastest_within(tried: Sequence[Candidate], default: Candidate) -> Candidate:
    """The fastest of those that are within the budget; `default` if none is."""
    within = [candidate for candidate in tried if candidate.within]
    return min(within, key=lambda candidate: candidate.latency_ms, default=default)


def choice_table(choice: Choice, val_images: int) -> str:
    """The engines that were tried, and which one it is."""
    cells = [["tried", "ms", "val accuracy %", "at least"]]
    in_float = ["layers in float"]
    for candidate in choice.candidates:
        pct, least = f"{candidate.val_accuracy_pct:.2f}", f"{candidate.least_pct:.2f}"
        cells.append([candidate.precision, f"{candidate.latency_ms:.3f}", pct, least])
        skipped = "all" if candidate.skip_layers == [ALL] else " ".join(candidate.skip_layers)
        in_float.append(skipped or "none")
    lines = text_table(cells, names=1).splitlines()
    table = [f"{line}  {layers}" for line, layers in zip(lines, in_float, strict=True)]

    chosen = "the fastest that keeps its val accuracy"
    if choice.skip_layers == [ALL]:
        chosen = "all in float: no INT8 engine that keeps its val accuracy is 2 % faster"
    return "\n".join([*table, one_image(val_images), f"--auto_quant: {chosen}"])


def fewest(order: Sequence[str], keeps: Callable[[Sequence[str]], bool]) -> list[str]:
    """As few layers, the first of `order`, as keep the accuracy when they are in float."""
    if keeps([]):
        return []
    # by halves; with all layers in float nothing is lost
    count = bisect_left(range(len(order)), True, key=lambda count: keeps(order[:count]))
    first = list(order[:count])
    # of these, not all may matter
    needed = first
    for name in first:
        others = [other for other in needed if other != name]
        if keeps(others):
            needed = others
    return needed


def lost_ms(names: Sequence[str], float_engine: Network, int8_engine: Network) -> dict[str, float]:
    """Milliseconds that each layer loses in float; 0 where an engine does not tell its time."""
    float_times = layer_times(float_engine, names)
    int8_times = layer_times(int8_engine, names)
    lost = dict.fromkeys(names, 0.0)
    for name in float_times.keys() & int8_times.keys():
        lost[name] = float_times[name] - int8_times[name]
    return lost


def layer_times(engine: Network, names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of each of the layers `names` that the engine tells a time of.

    The time of several that are one in the engine is divided among them.
    """
    times: dict[str, float] = {}
    for layer, layer_ms in zip(engine.layers, engine.layer_times_ms(), strict=True):
        if layer_ms is None:
            continue
        computed, prepared = held(layer, names)
        owners = {*computed, *prepared}
        for name in owners:
            times[name] = times.get(name, 0) + layer_ms / len(owners)
    return times


def by_gain(found: Scan, lost: dict[str, float], least_ms: float) -> list[str]:
    """Layers, those first that, left in float, take the most noise away for the time they lose.

    Args:
        lost: as `lost_ms` says; it counts as at least `least_ms`.
    """
    left = {}
    for part in found.parts:
        # noise that is left without this part in INT8, as share of the signal
        sqnr_db = part.without_sqnr_db
        left[part.layers] = 0.0 if sqnr_db is None else 10 ** (-sqnr_db / 10)
    worst = max(left.values())
    gain = {name: (worst - left[name]) / max(ms, least_ms) for name, ms in lost.items()}
    return sorted(gain, key=gain.__getitem__, reverse=True)


def read_progress(path: Path, key: dict[str, str]) -> Progress:
    """What a file says of a scan; nothing if it is damaged or of another one."""
    try:
        progress = parse(Progress, json.loads(path.read_text()), str(path))
    except (OSError, ValueError, UserError):
        return Progress(key)
    return progress if progress.key == key else Progress(key)
