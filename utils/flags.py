"""The flags that train.py and infer.py share, and how contradictions are refused. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import UserError
from utils.files import user_path
from utils.manifest import PRECISIONS
from utils.specs import (
    CALIBRATORS,
    OWN_STEM,
    STEMS,
    DataSpec,
    NetworkSpec,
    Quantization,
    height_width,
    is_foreign,
    runs_code,
)

T = TypeVar("T")
Flags = argparse.Namespace

BACKENDS = ("auto", "tensorrt", "openvino", "onnxruntime")
PTC_MODES = ("explicit", "implicit")

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and std of each channel that torchvision's networks are trained with."""

QUANTIZATION = tuple(field.name for field in fields(Quantization))
"""The flags that say how to quantize."""

Refusal = Callable[[Flags], Iterator[str]]
"""Looks for contradictions of one topic in the flags, and says each in a line."""


def make_parser(description: str, datasets: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the shared flags, in groups.

    What a checkpoint knows has no default here: `agreed` decides.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("network").add_argument
    names = (
        "such as resnet18, or torchvision/NAME, timm/NAME, package.module:callable, which is "
        "called with num_classes= (a checkpoint knows its own)"
    )
    add("--m", "--model", dest="model", help=names)
    stems = (
        "first layers of a built-in network: ImageNet's 7x7 or CIFAR's 3x3 (auto: imagenet with "
        "--pretrain, else cifar)"
    )
    add("--stem", choices=("auto", *STEMS), default="auto", help=stems)
    add("--load_ckpt", type=user_path, metavar="FILE", help="checkpoint to start from")

    add = parser.add_argument_group("images").add_argument
    add("--dataset", choices=datasets, help="default: the checkpoint's, else cifar10")
    where = "where they are (default: where the checkpoint's are, else data)"
    add("--data_dir", type=user_path, help=where)
    size = "height and width to resize images of --dataset folder to, or one number (default: 32)"
    add("--img_size", type=int, nargs="+", metavar="PIXELS", help=size)

    default = Quantization()
    add = parser.add_argument_group("quantization").add_argument
    quantize = "quantize the selected layers (infer.py: INT8 must be among the engines)"
    add("--quantize", action="store_true", help=quantize)
    add("--quant_layers", nargs="+", metavar="GLOB", help="layers to quantize (default: '*')")
    add("--skip_layers", nargs="+", metavar="GLOB", help="layers to leave in float (default: none)")
    ranges = f"how activation ranges are found (default: {default.calibrator})"
    add("--calibrator", choices=CALIBRATORS, help=ranges)
    images = f"train images to calibrate with (default: {default.calib_images})"
    add("--calib_images", type=int, metavar="N", help=images)

    add = parser.add_argument_group("engines (none named: all)").add_argument
    for name, precision in PRECISIONS.items():
        flag = {"action": "append_const", "const": name, "dest": "precisions"}
        add(f"--{precision.flag}", help=precision.help, **flag)
    implicit = "implicit: also an engine by TensorRT's own calibration"
    add("--ptc_mode", choices=PTC_MODES, default=PTC_MODES[0], help=implicit)
    runs = "what runs the exported networks (auto: the first of these that can)"
    add("--backend", choices=BACKENDS, default=BACKENDS[0], help=runs)
    return parser


def given(flags: Flags, names: Sequence[str]) -> str:
    """Those of the flags `names` that have a value or are set, as the user writes them."""
    # 0 is a value, and equals False
    values = {name: getattr(flags, name, None) for name in names}
    there = [name for name, value in values.items() if value is not None and value is not False]
    return ", ".join(f"--{name}" for name in there)


def refuse(refusals: Sequence[Refusal], flags: Flags) -> None:
    """Raises UserError with the line of the first contradiction that the flags have."""
    for refusal in refusals:
        for line in refusal(flags):
            raise UserError(line)


def agreed(flag: str, value: T | None, known: T | None, default: T | None = None) -> T:
    """What the command line gives, else what the checkpoint knows, else the default.

    Raises:
        UserError: the command line contradicts the checkpoint, or nobody knows.
    """
    if value is not None and known is not None and value != known:
        said = f"{flag} {_words(value)} contradicts the checkpoint, which says {_words(known)}"
        raise UserError(f"{said}; drop the flag or name another file")
    for choice in (value, known, default):
        if choice is not None:
            return choice
    raise UserError(f"{flag} is needed here")


def _words(value: Any) -> str:
    """A flag's value as the user writes it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)


def agreed_network(
    flags: Flags, known: NetworkSpec | None, default_stem: str | None = None
) -> tuple[str, str]:
    """Name and stem of the network, as `agreed` with what a checkpoint knows."""
    name = agreed("--m", flags.model, known and known.name)
    stem = None if flags.stem == "auto" else flags.stem
    if is_foreign(name):
        default_stem = OWN_STEM
    return name, agreed("--stem", stem, known and known.stem, default_stem)


def require_named(name: str, named: str | None) -> None:
    """Raises UserError if building a checkpoint's network would run code that nobody asked for.

    Args:
        name: of the network, as the checkpoint says.
        named: by the user.
    """
    if runs_code(name) and name != named:
        why = f"the checkpoint's network is made by {name}, and importing that runs its code"
        raise UserError(f"{why}: if you trust it, add --m {name}")


def agreed_images(
    flags: Flags, known: DataSpec | None, other_images: bool = False
) -> tuple[str, list[int] | None]:
    """Name of the data set, height and width of a folder's images, as `agreed` with a checkpoint.

    Args:
        other_images: what the checkpoint knows is only a default.
    """
    decided = None if other_images else known
    default = known.dataset if known else "cifar10"
    dataset = agreed("--dataset", flags.dataset, decided and decided.dataset, default)
    size = None if flags.img_size is None else height_width(flags.img_size)
    if size and len(size) > 2:
        raise UserError(f"--img_size {_words(size)}: height and width, or one number")
    if dataset == "folder":
        default = known.img_size if known else [32, 32]
        return dataset, agreed("--img_size", size, decided and decided.img_size, default)
    if size not in (None, [32, 32]):
        what = f"the images of {dataset} are 32 pixels wide"
        raise UserError(f"--img_size {_words(flags.img_size)}: {what}; drop the flag")
    return dataset, None


def agreed_normalization(
    flags: Flags, known: DataSpec | None
) -> tuple[list[float] | None, list[float] | None]:
    """Mean and std of each channel, as `agreed` with a checkpoint; None: those of the images."""
    mean, std = IMAGENET if flags.normalization else (flags.mean, flags.std)
    if mean is None:
        return (known.mean, known.std) if known else (None, None)
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise UserError("--mean and --std are in units of the full range, 0 to 1: bytes / 255")
    mean = agreed("--mean", mean, known and known.mean)
    return mean, agreed("--std", std, known and known.std)


def agreed_data_dir(flags: Flags, known: str | None) -> Path:
    """Where the images are: as the flag says, else where a checkpoint's were if that is there."""
    if flags.data_dir is None and known and Path(known).is_dir():
        return Path(known)
    return flags.data_dir or Path("data")


def agreed_quantization(flags: Flags, known: Quantization | None) -> Quantization:
    """What to quantize and how to calibrate, as `agreed` with what a quantized checkpoint knows.

    Raises:
        UserError: a contradiction, or no image to calibrate with.
    """
    values = {}
    for name, default in vars(Quantization()).items():
        value = getattr(flags, name)
        values[name] = agreed(f"--{name}", value, getattr(known, name, None), default)
    try:
        return Quantization(**values)
    except ValueError as error:  # its own check; the line begins with the field
        raise UserError(f"--{error}") from None
