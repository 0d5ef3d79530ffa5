"""Flags and a checkpoint to one frozen recipe: defaults filled in, contradictions refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import models
from utils import flags
from utils.checkpoint import Checkpoint, has_ranges
from utils.compare import Comparison, comparison_refusals
from utils.errors import UserError
from utils.flags import Flags, Refusal
from utils.manifest import PRECISIONS
from utils.networks import require_known
from utils.schema import parse_fields
from utils.specs import MAX_SEED, Quantization, is_foreign

BATCH_SIZE = {"cuda": 512, "cpu": 128}
SAM_RHO = 0.005


@dataclass(frozen=True)
class Defaults:
    """How one kind of training runs unless flags say otherwise.

    Args:
        optimizer, cpu_optimizer: on a GPU and on a CPU.
        peak_lr: of each optimizer that may be used, at batch size 128; proportional to that.
        freeze_batch_norm: whether BatchNorm's statistics stay those that it starts with.
    """

    num_epochs: int
    optimizer: str
    cpu_optimizer: str
    peak_lr: Mapping[str, float]
    freeze_batch_norm: bool = False

    def lr(self, optimizer: str, batch_size: int) -> float:
        """The peak learning rate at that batch size."""
        return self.peak_lr[optimizer] * batch_size / 128


@dataclass(frozen=True)
class Recipe:
    """A training, entirely. What is also a flag has the flag's name.

    Args:
        kind: its row in the table of defaults.
        lr: the peak learning rate.
        lrdt: epochs between two divisions of `lr` by 10; None: warm-up, then a line to 0.
        sam_rho: of SAM in the last third of the epochs; 0: no SAM.
        freeze_batch_norm: whether BatchNorm's statistics stay those that it starts with.
        img_size: height and width that a folder's images are resized to; other data sets have
            their own.
        mean, std: of each channel, in units of the full range (0..1); None: those of the images.
        new_classifier: whether all but the last layer of `load_ckpt` is loaded.
        keep: of how many last epochs the checkpoints stay, besides the best one.
        sync_batchnorm: several ranks share BatchNorm's statistics.
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
    label_smoothing: float = 0.1
    sam_rho: float = 0.0
    freeze_batch_norm: bool = False
    sync_batchnorm: bool = False
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
        content |= {"quantize": self.quantize, "test_trt": self.comparison is not None}
        for name in ("quantization", "comparison"):
            content |= content.pop(name) or {}
        for name, value in content.items():
            if isinstance(value, Path):
                content[name] = str(value.resolve())
        return content


def make_recipe(kind: str, defaults: Defaults, device_type: str, /, **given: Any) -> Recipe:
    """The recipe of one kind. What is `given`, and not None, stands in place of its default.

    Args:
        device_type: "cuda" or "cpu".
        given: fields of `Recipe`, `model` and `stem` among them.

    Raises:
        UserError: an optimizer that is not for this kind of training.
    """
    values = {name: value for name, value in given.items() if value is not None}
    values["kind"] = kind
    values.setdefault("num_epochs", defaults.num_epochs)
    batch_size = values.setdefault("batch_size", BATCH_SIZE[device_type])
    default = defaults.optimizer if device_type == "cuda" else defaults.cpu_optimizer
    optimizer = values.setdefault("optimizer", default)
    if optimizer not in defaults.peak_lr:
        others = " or ".join(defaults.peak_lr)
        raise UserError(f"--optimizer {optimizer} trains from scratch only: use {others}")
    values.setdefault("lr", defaults.lr(optimizer, batch_size))
    # Muon's runs end with SAM, for which late is enough (Zhou et al., 2024, arXiv:2410.10373). With
    # SGD it cost accuracy on digits
    values.setdefault("sam_rho", SAM_RHO if optimizer == "muon" else 0.0)
    values.setdefault("freeze_batch_norm", defaults.freeze_batch_norm)
    return Recipe(**values)


def given_refusals(args: Flags) -> Iterator[str]:
    """What the command line may not say, before a resumed run's own flags fill it."""
    starts = ("load_ckpt", "pretrain", "partial_ckpt", "new_classifier")
    found = flags.given(args, (*starts, "output_dir", "exp_name", "list_layers"))
    if args.resume and found:
        yield f"{found}: --resume goes on with a run as it began, in its folder; drop it"
    if (args.mean is None) != (args.std is None):
        yield "--mean and --std belong together: name both"
    if args.normalization and args.mean:
        yield "--normalization and --mean both say how images are normalised: drop one"


def start_refusals(args: Flags) -> Iterator[str]:
    if args.quantize and not (args.load_ckpt or args.resume or args.list_layers):
        yield "--quantize starts from a trained network: name it with --load_ckpt"
    if args.partial_ckpt and not args.quantize:
        yield "--partial_ckpt: this run trains in float; add --quantize, or drop it"
    if args.new_classifier and (args.quantize or not args.load_ckpt):
        yield "--new_classifier: in float training, from the network that --load_ckpt names"
    if args.pretrain and args.load_ckpt and not args.resume:
        yield "--pretrain and --load_ckpt both name weights to start from: drop one"
    name = args.model or ""
    if args.pretrain and is_foreign(name) and not name.startswith("torchvision/"):
        yield f"--pretrain: torchvision has no weights for {name}; name a file with --load_ckpt"


def engine_refusals(args: Flags) -> Iterator[str]:
    quantizes = args.quantize or args.test_trt or args.list_layers
    if not quantizes and (found := flags.given(args, flags.QUANTIZATION)):
        yield f"{found}: this run trains in float; add --quantize, or drop it"
    precisions = args.precisions or ()
    engines = [f"--{PRECISIONS[name].flag}" for name in precisions]
    if args.backend != "auto":
        engines.append("--backend")
    if args.ptc_mode != "explicit":
        engines.append("--ptc_mode")
    if engines and not args.test_trt:
        yield f"{', '.join(engines)}: nothing is exported here; add --test_trt, or drop it"
    if not args.quantize and "INT8-QAT" in precisions:
        yield "--INT8QAT: this run trains in float; add --quantize, or drop it"


REFUSALS: tuple[Refusal, ...] = (start_refusals, engine_refusals, comparison_refusals)
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
    # the checkpoint says these itself, and the command line may have to
    for name in ("model", "data_dir"):
        values.pop(name, None)
    return values


def resolve(
    args: Flags, checkpoint: Checkpoint | None, defaults: Mapping[str, Defaults], device_type: str
) -> Recipe:
    """The recipe that train.py's flags mean.

    Args:
        checkpoint: what the run starts from or resumes, if anything. A resumed run's own recipe
            is the default of its flags already.
        defaults: of each kind of training.

    Raises:
        UserError: the flags contradict each other or the checkpoint, or a value cannot be.
    """
    flags.refuse(REFUSALS, args)
    known = checkpoint or Checkpoint({})
    _refuse_start(args, known)
    kind = _kind(args)

    # what a checkpoint decides too
    has_weights = args.pretrain and args.model not in models.STEMLESS
    stem = "imagenet" if has_weights else "cifar"
    model, stem = flags.agreed_network(args, known.network, stem)
    require_known(model, stem)
    flags.require_named(model, args.model)
    other_images = args.new_classifier and not args.resume
    dataset, img_size = flags.agreed_images(args, known.data, other_images)
    mean, std = flags.agreed_normalization(args, known.data)
    data_dir = flags.agreed_data_dir(args, (known.recipe or {}).get("data_dir"))
    quantization = None
    if args.quantize or args.test_trt or args.list_layers:
        quantization = flags.agreed_quantization(args, known.quantization)

    # everything else is as the flags say, or a default
    given = {field.name: getattr(args, field.name, None) for field in fields(Recipe)}
    given |= {"model": model, "stem": stem, "dataset": dataset, "img_size": img_size}
    given |= {"mean": mean, "std": std, "data_dir": data_dir, "quantization": quantization}
    given["comparison"] = Comparison.of(args) if args.test_trt else None
    # before a default is computed of them
    _check_limits(given, args.quantize)
    return make_recipe(kind, defaults[kind], device_type, **given)


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
    lr = recipe.lr
    if lr == defaults.lr(recipe.optimizer, recipe.batch_size):
        lr = defaults.lr(recipe.optimizer, images)
    return replace(recipe, batch_size=images, lr=lr)


def _kind(args: Flags) -> str:
    """Which row of the table of defaults."""
    if args.quantize:
        return "QAT"
    if args.pretrain or args.new_classifier:
        return "pretrained"
    return "fine-tuning" if args.load_ckpt else "scratch"


def _refuse_start(args: Flags, checkpoint: Checkpoint) -> None:
    """Raises UserError where the flags ask of the checkpoint what it cannot be."""
    quantized = checkpoint.quantization is not None
    if args.resume:
        if args.quantize != quantized:
            raise UserError("--resume: QAT starts with --load_ckpt, --quantize and --partial_ckpt")
        # the optimizer's state is of no use to another
        flags.agreed("--optimizer", args.optimizer, checkpoint.recipe.get("optimizer"))
    if not has_ranges(checkpoint.state):
        return
    what = f"--load_ckpt {args.load_ckpt} is a quantized network"
    if not args.quantize:
        raise UserError(f"{what}, and this run trains in float: add --quantize")
    if not quantized:
        raise UserError(f"{what} without its settings: load train.py's checkpoint itself")


def _check_limits(values: Mapping[str, Any], quantize: bool) -> None:
    for name, (low, high) in LIMITS.items():
        if name == "num_epochs" and quantize:
            low = 0  # calibrates only
        value = values[name]
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {str(value)[:20]}: at least {low}, at most {high:g}")
