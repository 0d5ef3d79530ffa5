"""Flags that train.py and infer.py share, and how they agree with a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

from utils.errors import UserError

T = TypeVar("T")


CALIBRATORS = ("sqnr", "entropy", "percentile", "mse", "max")
"""How activation ranges are found; the first is the default (`benchmarks/calibrators.py` compares them)."""
PRECISIONS = {"FP32": "--FP32", "FP16": "--FP16", "INT8-PTC": "--INT8PTC", "INT8-QAT": "--INT8QAT"}
"""What a back end can be asked to run -> the flag that asks for it."""

QUANTIZATION = ("quant_layers", "skip_layers", "calibrator", "calib_images")
"""What says how to quantize."""


def add_shared(parser: argparse.ArgumentParser, datasets: tuple[str, ...]) -> None:
    """Model, data and quantization flags. What a checkpoint knows has no default here: `agreed` decides."""
    add = parser.add_argument
    add(
        "--m",
        "--model",
        dest="model",
        help="network, such as resnet18 (a checkpoint knows its own)",
    )
    add(
        "--stem",
        choices=("auto", "imagenet", "cifar"),
        default="auto",
        help="first layers: ImageNet's 7x7 stride 2 + pool, or CIFAR's 3x3; auto: imagenet with --pretrain, else cifar",
    )
    add("--dataset", choices=datasets, help="default: the checkpoint's, else cifar10")
    add(
        "--data_dir",
        type=Path,
        default=Path("data"),
        help="where the images are (default: %(default)s)",
    )
    add(
        "--img_size",
        type=int,
        help="width that images of --dataset folder are resized to (default: 32)",
    )
    add("--load_ckpt", type=Path, help="checkpoint to start from")
    add(
        "--quantize",
        action="store_true",
        help="quantize the selected layers (infer.py: whatever the checkpoint holds)",
    )
    add(
        "--quant_layers",
        nargs="+",
        metavar="GLOB",
        help="layers to quantize, by name (default: '*')",
    )
    add("--skip_layers", nargs="+", metavar="GLOB", help="layers to leave in float (default: none)")
    add(
        "--calibrator",
        choices=CALIBRATORS,
        help=f"how activation ranges are found (default: {CALIBRATORS[0]})",
    )
    add(
        "--calib_images",
        type=int,
        metavar="N",
        help="train images to calibrate with (default: 1024)",
    )
    add(
        "--FP32",
        action="store_true",
        help="FP32 by the back end too, not only by PyTorch (none of the four: every precision)",
    )
    add("--FP16", action="store_true", help="FP16")
    add("--INT8PTC", action="store_true", help="INT8 by calibration alone")
    add("--INT8QAT", action="store_true", help="INT8 from a quantization-aware checkpoint")
    add(
        "--ptc_mode",
        choices=("explicit", "implicit"),
        default="explicit",
        help="implicit: also TensorRT's own calibration",
    )
    add(
        "--backend",
        choices=("auto", "tensorrt", "onnxruntime"),
        default="auto",
        help="what runs the exported networks; auto: TensorRT if it is there, else ONNX Runtime",
    )


def named_precisions(args: argparse.Namespace) -> list[str]:
    """Those of `PRECISIONS` whose flags are given."""
    return [
        precision
        for precision, flag in PRECISIONS.items()
        if getattr(args, flag.removeprefix("--"))
    ]


def handed_on(args: argparse.Namespace) -> list[str]:
    """The flags that train.py hands to infer.py, as words of a command line."""
    words = [PRECISIONS[precision] for precision in named_precisions(args)]
    for name in ("data_dir", "backend", "ptc_mode", *QUANTIZATION):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def agreed(flag: str, given: T | None, known: T | None, default: T | None = None) -> T:
    """What the command line gives, else what the checkpoint knows, else the default.

    Raises:
        UserError: the command line contradicts the checkpoint, or nobody knows.
    """
    if given is not None and known is not None and given != known:
        raise UserError(
            f"{flag} {given} contradicts the checkpoint, which says {known}; drop the flag or change the file"
        )
    for value in (given, known, default):
        if value is not None:
            return value
    raise UserError(f"{flag} is needed here")


def agreed_network(
    args: argparse.Namespace, name: str | None, stem: str | None, default: str | None = None
) -> tuple[str, str]:
    """Name and stem of the network, as `agreed` with what the checkpoint knows; --stem auto gives none."""
    given = None if args.stem == "auto" else args.stem
    return agreed("--m", args.model, name), agreed("--stem", given, stem, default)
