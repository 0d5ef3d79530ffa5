"""Flags and a checkpoint to one frozen recipe: defaults filled in, contradictions refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import models
from utils.checkpoint import Checkpoint, has_ranges
from utils.compare import COMPARISON_REFUSALS, Comparison
from utils.errors import UserError
from utils.flags import (
    QUANTIZATION,
    Flags,
    Refusal,
    agreed,
    agreed_data_dir,
    agreed_images,
    agreed_network,
    agreed_normalization,
    agreed_quantization,
    given,
    refuse,
    require_named,
)
from utils.manifest import PRECISIONS
from utils.networks import require_known
from utils.schema import parse, parse_fields
from utils.specs import MAX_SEED, Quantization, is_foreign

BATCH_SIZE = {"cuda": 512, "cpu": 128}
LABEL_SMOOTHING = 0.1
SAM_RHO = 0.005
SAM, FROZEN_BATCH_NORM = "SAM", "frozen BatchNorm"


@dataclass(frozen=True)
class Defaults:
    """How one kind of training runs unless flags say otherwise.

    Args:
        optimizer, cpu_optimizer: on a GPU and on a CPU.
        peak_lr: of each optimizer that may be used, at batch size 128; proportional to that.
        last_third: what is different in the last third of the epochs: "SAM" (with Muon alone),
            "frozen BatchNorm", or "".
    """

    num_epochs: int
    optimizer: str
    cpu_optimizer: str
    peak_lr: Mapping[str, float]
    last_third: str = ""

    def __post_init__(self) -> None:
        if self.last_third not in ("", SAM, FROZEN_BATCH_NORM):
            raise ValueError(f"there is no last third {self.last_third!r}")


@dataclass(frozen=True)
class Recipe:
    """A training, entirely. What is also a flag has the flag's name.

    Args:
        kind: its row in the table of defaults.
        lr: the peak learning rate.
        lrdt: epochs between two divisions of `lr` by 10; None: warm-up, then a line to 0.
        sam_rho: of SAM in the last third of the epochs; 0: no SAM.
        freeze_batch_norm: whether BatchNorm's statistics stay in the last third.
        img_size: height and width that a folder's images are resized to; other data sets have
            their own.
        mean, std: of each channel, in units of the full range (0..1); None: those of the images.
        new_classifier: whether all but the last layer of `load_ckpt` is loaded.
        keep: of how many last epochs the checkpoints stay, besides the best one.
        compile: whether torch.compile is used; None: where the run is long enough.
        quantization: what QAT quantizes and `--test_trt` calibrates; None where neither is.
        comparison: what `--test_trt` builds afterwards; None for nothing.
    """

    kind: str
    model: str
    stem: str
    num_epochs: int
    batch_size: int
    optimizer: str
    lr: float
    lrdt: int | None = None
    label_smoothing: float = LABEL_SMOOTHING
    sam_rho: float = 0.0
    freeze_batch_norm: bool = False
    compile: bool | None = None
    seed: int = 0
    keep: int = 1
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    img_size: int | list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    pretrain: bool = False
    load_ckpt: Path | None = None
    partial_ckpt: bool = False
    new_classifier: bool = False
    quantization: Quantization | None = None
    comparison: Comparison | None = None

    @property
    def quantize(self) -> bool:
        return self.kind == "QAT"

    def flags(self) -> dict[str, Any]:
        """Its fields as plain values by the names of flags: a checkpoint stores them."""
        content = asdict(self)
        quantization = content.pop("quantization") or {}
        comparison = content.pop("comparison") or {}
        content |= {"quantize": self.quantize, "test_trt": bool(comparison)}
        content |= quantization | comparison
        for name, value in content.items():
            if isinstance(value, Path):
                content[name] = str(value.resolve())
        return content


def make_recipe(kind: str, defaults: Defaults, device_type: str, /, **chosen: Any) -> Recipe:
    """The recipe of one kind. What is `chosen`, and not None, stands in place of its default.

    Args:
        device_type: "cuda" or "cpu".
        chosen: fields of `Recipe`, `model` and `stem` among them.

    Raises:
        UserError: an optimizer that is not for this kind of training.
    """
    values = {name: value for name, value in chosen.items() if value is not None}
    values["kind"] = kind
    values.setdefault("num_epochs", defaults.num_epochs)
    batch_size = values.setdefault("batch_size", BATCH_SIZE[device_type])
    default = defaults.optimizer if device_type == "cuda" else defaults.cpu_optimizer
    optimizer = values.setdefault("optimizer", default)
    if optimizer not in defaults.peak_lr:
        raise UserError(
            f"--optimizer {optimizer} sets the length of every kernel, so it trains from scratch "
            f"only: use {' or '.join(defaults.peak_lr)}"
        )
    values.setdefault("lr", defaults.peak_lr[optimizer] * batch_size / 128)
    # Muon's runs end with SAM. With SGD it cost accuracy on digits, and in QAT, where the
    # statistics are frozen, nothing cancels the perturbation
    sam = defaults.last_third == SAM and optimizer == "muon"
    values.setdefault("sam_rho", SAM_RHO if sam else 0.0)
    values.setdefault("freeze_batch_norm", defaults.last_third == FROZEN_BATCH_NORM)
    return parse(Recipe, values, "the recipe")


RESUME_REFUSALS: tuple[Refusal, ...] = (
    (
        lambda flags: flags.resume and flags.load_ckpt,
        "--resume and --load_ckpt both name a checkpoint to start from: drop one",
    ),
    (
        lambda flags: (
            flags.resume and (flags.pretrain or flags.partial_ckpt or flags.new_classifier)
        ),
        "--resume goes on with a run as it began: drop --pretrain, --partial_ckpt and "
        "--new_classifier",
    ),
    (
        lambda flags: (flags.mean is None) != (flags.std is None),
        "--mean and --std belong together: name both",
    ),
    (
        lambda flags: flags.normalization and flags.mean,
        "--normalization and --mean both say how images are normalised: drop one",
    ),
    (
        lambda flags: flags.resume and given(flags, ("output_dir", "exp_name")),
        "{0}: a resumed run stays in its folder; drop it",
    ),
)
"""What train.py's command line may not say, before a resumed run's own flags fill it."""

REFUSALS: tuple[Refusal, ...] = (
    (
        lambda flags: flags.quantize and not (flags.load_ckpt or flags.resume or flags.list_layers),
        "--quantize starts from a trained network: name it with --load_ckpt",
    ),
    (
        lambda flags: flags.partial_ckpt and not flags.quantize,
        "--partial_ckpt: this run trains in float; add --quantize, or drop it",
    ),
    (
        lambda flags: flags.new_classifier and (flags.quantize or not flags.load_ckpt),
        "--new_classifier: in float training, from the network that --load_ckpt names",
    ),
    (
        lambda flags: (
            not (flags.quantize or flags.test_trt or flags.list_layers)
            and given(flags, QUANTIZATION)
        ),
        "{0}: this run trains in float; add --quantize, or drop it",
    ),
    (
        lambda flags: not flags.test_trt and _engine_flags(flags),
        "{0}: nothing is exported here; add --test_trt, or drop it",
    ),
    (
        lambda flags: not flags.quantize and "INT8-QAT" in (flags.precisions or ()),
        "--INT8QAT: this run trains in float; fine-tune its checkpoint with --quantize, and "
        "build that engine then",
    ),
    (
        lambda flags: flags.pretrain and flags.load_ckpt and not flags.resume,
        "--pretrain and --load_ckpt both name weights to start from: drop one",
    ),
    (
        lambda flags: flags.pretrain and _not_torchvisions(flags.model),
        "--pretrain: torchvision has no weights for {0}; name a file with --load_ckpt, and add "
        "--new_classifier if it is of other classes",
    ),
    *COMPARISON_REFUSALS,
)
"""What train.py's flags may not say, checked in this order."""

LIMITS = {
    "num_epochs": (1, 10**6),
    "batch_size": (2, 10**6),
    "lr": (0, 1e38),  # what float32 holds
    "lrdt": (1, 10**6),
    "keep": (1, 10**6),
    "label_smoothing": (0, 1),
    "sam_rho": (0, 1),
    "seed": (0, MAX_SEED),
}
"""Field of a recipe -> its lowest and highest value."""


def _engine_flags(flags: Flags) -> str:
    """Those flags that only matter for engines, as the user writes them."""
    words = [f"--{PRECISIONS[name].flag}" for name in flags.precisions or ()]
    if flags.backend != "auto":
        words.append("--backend")
    if flags.ptc_mode != "explicit":
        words.append("--ptc_mode")
    return ", ".join(words)


def _not_torchvisions(name: str | None) -> str:
    """The name of a network if it comes from elsewhere than from here or torchvision."""
    if name and is_foreign(name) and not name.startswith("torchvision/"):
        return name
    return ""


def stored_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run's checkpoint says of its flags: the defaults of a resumed run's.

    Raises:
        UserError: a value of another type.
    """
    # None is no choice, and what is no field any more is left out
    stored = {name: value for name, value in checkpoint.recipe.items() if value is not None}
    values = {name: stored.get(name) is True for name in ("quantize", "test_trt")}
    for cls in (Comparison, Quantization, Recipe):
        values |= parse_fields(cls, stored, "the checkpoint's recipe")
    # the checkpoint says it itself, and the command line may have to
    values.pop("model", None)
    return values


def resolve(
    flags: Flags,
    checkpoint: Checkpoint | None,
    defaults: Mapping[str, Defaults],
    device_type: str,
) -> Recipe:
    """The recipe that train.py's flags mean.

    Args:
        checkpoint: what the run starts from or resumes, if anything. A resumed run's own recipe
            is the default of its flags already.
        defaults: of each kind of training.

    Raises:
        UserError: the flags contradict each other or the checkpoint, or a value cannot be.
    """
    refuse(REFUSALS, flags)
    _refuse_start(flags, checkpoint)
    kind = _kind(flags)

    # what a checkpoint decides too
    network = checkpoint.network if checkpoint else None
    has_weights = flags.pretrain and flags.model not in models.STEMLESS
    model, stem = agreed_network(flags, network, "imagenet" if has_weights else "cifar")
    require_known(model, stem)
    require_named(model, flags.model)
    known = checkpoint.data if checkpoint else None
    other_images = flags.new_classifier and not flags.resume
    dataset, img_size = agreed_images(flags, known, other_images)
    mean, std = agreed_normalization(flags, known)
    quantization = None
    if flags.quantize or flags.test_trt or flags.list_layers:
        decided = checkpoint.quantization if checkpoint else None
        quantization = agreed_quantization(flags, decided)

    known_data_dir = None
    if checkpoint and checkpoint.recipe:
        known_data_dir = checkpoint.recipe.get("data_dir")

    # everything else is as the flags say, or a default
    chosen = {}
    for name in (field.name for field in fields(Recipe)):
        chosen[name] = getattr(flags, name, None)
    chosen |= {"model": model, "stem": stem, "dataset": dataset, "img_size": img_size}
    chosen |= {"mean": mean, "std": std}
    chosen |= {"quantization": quantization, "comparison": None}
    chosen["data_dir"] = agreed_data_dir(flags, known_data_dir)
    if flags.test_trt:
        chosen["comparison"] = Comparison.of(flags)
    # before a default is computed of them
    _check_limits(chosen, flags.quantize)
    recipe = make_recipe(kind, defaults[kind], device_type, **chosen)
    if recipe.compile and device_type != "cuda":
        raise UserError("--compile is for a GPU, and there is none here: use --no_compile")
    return recipe


def fit_to_images(recipe: Recipe, defaults: Defaults, images: int) -> Recipe:
    """The recipe for a train part of so many images: no batch and no calibration is larger.

    A learning rate that follows the batch size by default goes on doing so.

    Args:
        images: how many the ranks can share.
    """
    quantization = recipe.quantization
    if quantization and quantization.calib_images > images:
        recipe = replace(recipe, quantization=replace(quantization, calib_images=images))
    if recipe.batch_size <= images:
        return recipe
    default_lr = defaults.peak_lr[recipe.optimizer] * recipe.batch_size / 128
    lr = recipe.lr * images / recipe.batch_size if recipe.lr == default_lr else recipe.lr
    return replace(recipe, batch_size=images, lr=lr)


def _kind(flags: Flags) -> str:
    """Which row of the table of defaults."""
    if flags.quantize:
        return "QAT"
    if flags.pretrain or flags.new_classifier:
        return "pretrained"
    return "fine-tuning" if flags.load_ckpt else "scratch"


def _refuse_start(flags: Flags, checkpoint: Checkpoint | None) -> None:
    """Raises UserError where the flags ask of the checkpoint what it cannot be."""
    if checkpoint is None:
        return
    if flags.resume:
        if flags.quantize != (checkpoint.quantization is not None):
            raise UserError(
                "--resume goes on with a run as it was; QAT starts with --load_ckpt, --quantize "
                "and --partial_ckpt"
            )
        # the optimizer's state is of no use to another
        agreed("--optimizer", flags.optimizer, checkpoint.recipe.get("optimizer"))
    if not flags.quantize and has_ranges(checkpoint.state):
        raise UserError(
            f"--load_ckpt {flags.load_ckpt} is a quantized network, and this run trains in float: "
            "add --quantize, or load a float checkpoint"
        )
    if flags.quantize and checkpoint.quantization is None and has_ranges(checkpoint.state):
        raise UserError(
            f"--load_ckpt {flags.load_ckpt}: ranges, but not what they are of; load train.py's "
            "checkpoint itself"
        )


def _check_limits(values: Mapping[str, Any], quantize: bool) -> None:
    for name, (low, high) in LIMITS.items():
        if name == "num_epochs" and quantize:
            low = 0  # calibrates only
        value = values[name]
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {_short(value)}: at least {low}, at most {high:g}")


def _short(value: float) -> str:
    """A number as the user wrote it, unless that is very long."""
    text = str(value)
    return text if len(text) < 20 else f"{text[:16]}..."
