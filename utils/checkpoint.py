"""Checkpoints: one file that rebuilds the model without flags and continues training exactly."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError, and_more, mendable
from utils.files import atomic_path
from utils.schema import parse
from utils.specs import MAX_SEED, DataSpec, NetworkSpec, Quantization
from utils.weights import State, is_safetensors, read_safetensors, unwrapped, without_prefix

FORMAT = 3
RANGE_SUFFIX = "_quantizer._amax"
DTYPES = (
    (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    (torch.bool,),
)
"""A tensor of a file may be of another type than the network's of the same row."""


@dataclass
class Checkpoint:
    """What train.py writes after each epoch. A bare state dict is one with `state` alone.

    Args:
        state: the model's parameters, BatchNorm statistics and, if it is quantized, ranges.
        quantization: None for a float network.
        ptq_state: what QAT started from, the float weights with calibrated ranges.
        recipe: fields of the `utils.recipe.Recipe` it is trained by.
        optimizer: the optimizer's own state dict.
        epoch: how many are completed.
        best_val_loss: what an epoch's loss on the val part must not exceed to be the best: the
            lowest so far; in QAT's `ckpt_0` 1.1 times its own.
        history: losses and accuracies of each epoch.
    """

    state: State
    network: NetworkSpec | None = None
    data: DataSpec | None = None
    quantization: Quantization | None = None
    ptq_state: State | None = None
    recipe: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    epoch: int = 0
    best_val_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.network and self.data and self.network.num_classes != len(self.data.classes):
            raise ValueError(f"{self.network.num_classes} classes, {len(self.data.classes)} names")
        if not 0 <= self.epoch <= 10**6 or self.best_val_loss < 0:
            raise ValueError("epoch or best_val_loss cannot be")
        if not all("val_loss" in epoch for epoch in self.history):
            raise ValueError("an epoch of history lacks 'val_loss'")
        if self.recipe is not None:
            # what an export reads of it; `utils.recipe` knows the rest
            seed, data_dir = self.recipe.get("seed"), self.recipe.get("data_dir")
            if type(seed) is not int or not 0 <= seed <= MAX_SEED:
                raise ValueError("recipe has no seed")
            if not isinstance(data_dir, str | None):
                raise ValueError("data_dir of recipe is no path")

    @property
    def whole(self) -> bool:
        """Whether it says how to rebuild its network: a bare state dict does not."""
        return self.network is not None and self.data is not None and self.recipe is not None


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a killed process or a full disk leaves what was there before.

    Raises:
        OSError: the file cannot be written.
    """
    # not asdict, which would copy every tensor
    content = {"format": FORMAT, **vars(checkpoint)}
    for name in ("network", "data", "quantization"):
        if content[name] is not None:
            content[name] = asdict(content[name])
    with atomic_path(path) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own, raised over that of a failed write
            raise error.__context__ or error from None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of `save`, or a state dict, onto the CPU; runs no code from the file.

    The state dict may be another program's: as `utils.weights` reads it.

    Raises:
        UserError: missing, truncated, or something else.
    """
    _require_file(path)
    if is_safetensors(path):
        return Checkpoint(read_safetensors(path))
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile  # torch does not look at its own checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises anything on bytes of another kind
        # it cannot be read now: nothing is said of the file
        if mendable(error):
            raise
        what = "is truncated, damaged or not a checkpoint; use an earlier one"
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            what = "holds Python objects besides tensors, which could run code; use another file"
        raise UserError(f"{path} {what}, or save model.state_dict() with torch.save") from None

    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and 1 <= found < FORMAT:
        raise UserError(f"{path} is of an earlier version of this project: train again")
    if isinstance(found, int) and found == FORMAT:
        checkpoint = parse(Checkpoint, content, str(path))
        if checkpoint.quantization and checkpoint.ptq_state is None:
            raise UserError(f"{path} lacks 'ptq_state', what QAT started from")
        return checkpoint
    return Checkpoint(unwrapped(content, path))


def _require_file(path: Path) -> None:
    """Raises UserError where there is none, with the names of those beside it."""
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    there = sorted(p.name for p in folder.glob("ckpt_*") if p.is_file())
    hint = f"; {folder} holds {', '.join(there)}" if there else ""
    raise UserError(f"no checkpoint at {path}{hint}")


def load_whole(path: Path) -> Checkpoint:
    """As `load`, but raises UserError for a bare state dict."""
    checkpoint = load(path)
    if not checkpoint.whole:
        raise UserError(f"{path} is a bare state dict: name a checkpoint that train.py wrote")
    return checkpoint


def by_epoch(folder: Path) -> dict[int, Path]:
    """Each `ckpt_<epoch>` of a folder."""
    found = {}
    for path in folder.glob("ckpt_*"):
        epoch = path.name.removeprefix("ckpt_")
        if epoch.isdecimal():
            found[int(epoch)] = path
    return found


def latest(path: Path) -> Path:
    """`path` itself if it is a file, else the `ckpt_<epoch>` of the highest epoch in that folder.

    Raises:
        UserError: the folder holds none, or there is no file.
    """
    if not path.is_dir():
        _require_file(path)
        return path
    there = by_epoch(path)
    if not there:
        raise UserError(f"{path} holds no ckpt_<epoch> to resume from")
    return there[max(there)]


def has_ranges(state: State) -> bool:
    """Whether a state is a quantized model's."""
    return any(key.endswith(RANGE_SUFFIX) for key in state)


def without_ranges(state: State) -> State:
    """The float model's part of a state."""
    return {key: value for key, value in state.items() if not key.endswith(RANGE_SUFFIX)}


def load_weights(
    model: nn.Module, state: State, allow_missing_ranges: bool = False, new_classifier: bool = False
) -> str:
    """Load `state` so that every float weight lands exactly once; returns a line that says so.

    A prefix that another program gave to the names is taken off (`utils.weights`).

    Args:
        allow_missing_ranges: `state` may be a float model's; ranges are still to be calibrated.
        new_classifier: the last layer stays as it is; `state` may be of other classes.

    Raises:
        UserError: tensors that are missing, unexpected, of another shape or type, not finite, or
            ranges that are not above 0, variances below it, listed. `model` is unchanged then.
    """
    own = model.state_dict()
    state, taken_off = without_prefix(state, without_ranges(own))
    state = _with_shared(model, state)
    fresh = classifier_keys(model, state) if new_classifier else set()
    state = {key: value for key, value in state.items() if key not in fresh}
    ranges = {key for key in own if key.endswith(RANGE_SUFFIX)}
    problems = _problems(own.keys() - fresh, own, state)
    uncalibrated = problems["missing"] & ranges
    if allow_missing_ranges:
        problems["missing"] -= ranges
    if any(problems.values()):
        hint = _hint(model, state, problems)
        faults = "; ".join(filter(None, [_listed(problems), taken_off]))
        raise UserError(f"the checkpoint does not fit the model{hint}: {faults}")
    # with the versions of modules, which a file does not keep
    own.update(state)
    model.load_state_dict(own)

    loaded_ranges = len(ranges) - len(uncalibrated)
    line = (
        f"{len(state) - loaded_ranges} float tensors and {loaded_ranges} ranges loaded, each "
        f"exactly once; 0 unexpected, 0 missing, {len(uncalibrated)} ranges left to calibrate"
    )
    if taken_off:
        line += f"; {taken_off}"
    return f"{line}; fresh: {', '.join(sorted(fresh))}" if fresh else line


def _with_shared(model: nn.Module, state: State) -> State:
    """`state` with every name of a tensor that has several: safetensors keep one of them."""
    own = model.state_dict(keep_vars=True)
    there = {id(own[key]): state[key] for key in own.keys() & state.keys()}
    shared = {key: there[id(tensor)] for key, tensor in own.items() if id(tensor) in there}
    return shared | state


def _problems(expected: set[str], own: State, state: State) -> defaultdict[str, set[str]]:
    """What is wrong with `state` -> the names of which.

    Args:
        expected: what should be there of the model's `own` tensors.
    """
    # files older than BatchNorm's counters, such as torchvision's, lack them; nothing reads them
    missing = {key for key in expected - state.keys() if not key.endswith(".num_batches_tracked")}
    problems = defaultdict(set, {"missing": missing, "unexpected": state.keys() - expected})
    for key in expected & state.keys():
        if what := _fault(key, state[key], own[key]):
            problems[what].add(key)
    return problems


def _fault(key: str, value: Tensor, own: Tensor) -> str:
    """What is wrong with a tensor that is to replace the model's own; "" if nothing is."""
    if own.shape != value.shape:
        return "of another shape"
    same_kind = any(own.dtype in kind and value.dtype in kind for kind in DTYPES)
    if not same_kind or value.layout != torch.strided or value.is_meta:
        return "of another type"
    # as the model will hold it: a float64 may be too large for that
    value = value.to(own.dtype)
    infinite = ~value.isfinite()
    # an attention mask has the same -inf in every network that is built
    if infinite.any() and not torch.equal(value[infinite], own.to(value.device)[infinite]):
        return "not finite"
    # a scale is a range / 127, and must not become 0 either
    if key.endswith(RANGE_SUFFIX) and not (value / 127 >= torch.finfo(value.dtype).tiny).all():
        return "not above 0"
    if key.endswith(".running_var") and not (value >= 0).all():
        return "below 0"
    return ""


def _hint(model: nn.Module, state: State, problems: defaultdict[str, set[str]]) -> str:
    """What may be the reason of the problems, and what to do."""
    missing, shapes = problems["missing"], problems["of another shape"]
    if missing and all(key.endswith(RANGE_SUFFIX) for key in missing):
        return " (a float checkpoint for a quantized model: add --partial_ckpt)"
    if any(key.endswith(RANGE_SUFFIX) for key in problems["unexpected"]):
        return " (a quantized checkpoint for a float model or other --quant_layers)"
    if problems["not finite"]:
        return " (a training that diverged or a damaged file: use another checkpoint)"
    if shapes and shapes <= classifier_keys(model, state):
        mend = "add --new_classifier"
        if has_ranges(model.state_dict()):
            mend = "train in float with --new_classifier first"
        return f" (it is of other classes: {mend})"
    return ""


def classifier_keys(model: nn.Module, state: State) -> set[str]:
    """Names of the last layer's tensors, and of those of auxiliary heads.

    The last layer is the last Linear or Conv2d of which only the number of outputs differs from
    that in `state`, or the last of all if there is none. Heads differ as it does.
    """
    kinds = nn.Linear, nn.Conv2d
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    # layer -> outputs here and there
    outputs = {}
    for name, layer in layers.items():
        here, there = layer.weight.shape, state.get(f"{name}.weight", layer.weight).shape
        if here != there and here[1:] == there[1:]:
            outputs[name] = (here[0], there[0])

    heads = list(layers)[-1:]
    if outputs:
        last = list(outputs.values())[-1]
        heads = [name for name, pair in outputs.items() if pair == last]
    prefixes = tuple(f"{name}." for name in heads)
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def _listed(problems: dict[str, set[str]]) -> str:
    """How many keys have which problem, and the first five of each."""
    texts = []
    for what, keys in problems.items():
        if keys:
            texts.append(f"{len(keys)} {what}: {and_more(sorted(keys), 5)}")
    return "; ".join(texts)
