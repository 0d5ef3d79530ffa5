#!/usr/bin/env python3
"""How fast does this project train, float and QAT, beside the loop that people write first? Seconds for an epoch.

    python benchmarks/train_speed.py --m resnet18 --stem imagenet cifar --record results/train_speed.json

Both recipes train the same network on the same train images (the held-out part is left out), in one process, on one device.

reference: torchvision's network, FP32 eager, NCHW (cuDNN multiplies in TF32, torch's default; the row says so), batch 128, SGD
with momentum; a DataLoader with 4 persistent workers and pinned memory over PIL images, random crop and mirror;
`loss.item()` after each batch. QAT: the layers of pytorch-quantization in their place, as its `quant_modules` puts them,
calibrated by the maximum. They leave the residual additions in float, so they quantize less than ours.

ours: train.py with --compile. On a GPU: bf16, channels-last, torch.compile, the step as one CUDA graph, batch 512,
images on the device, augmented there (crop and mirror as in the reference, and a blank square); Muon for float and SGD for
QAT. It drops an epoch's last, incomplete batch, so compare images/s. Both parts of a run are timed, and their medians
weighted by their lengths: two thirds, and the last third, which with Muon has SAM, two passes for each batch, and in QAT
frozen BatchNorm statistics. On a CPU: FP32 eager, batch 128, SGD.

Not timed: loading the data, calibration, evaluation, checkpoints. The warm-up epochs are timed, but apart: what they took
beyond the median is `compile_s`, which has torch.compile, cuDNN's tuning, the graph, CUDA's and the workers' start in it.
TFLOP/s are the float network's convolutions and matrix products, forward and backward, 2 for each multiply-add; SAM's second
pass, the optimizer's products and all fake quantization count as nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytorch_quantization import quant_modules
from pytorch_quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
import layers.quantizers  # noqa: F401  keeps pytorch-quantization from logging each step
import models
import train
from dataset.batches import Batches
from utils import records
from utils.errors import UserError, run

WORKERS, CALIBRATION_BATCHES = 4, 8
LEARNING_RATE = {"float": 0.1, "qat": 0.001}  # the reference's
MODES = ("float", "qat")
PEAK_TFLOPS = {
    "*H100*HBM3": {"bf16": 989, "tf32": 495, "fp32": 67},
    "*H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "*A100*": {"bf16": 312, "tf32": 156, "fp32": 19.5},
}
"""GPU's name -> NVIDIA's dense peak by arithmetic."""

State = dict[str, Tensor]


Epoch = Callable[[int, tqdm], float]
"""Trains the epoch of that number under a bar; returns its mean loss."""


@dataclass
class Training:
    """A network ready to train, in one part or several: each its share of a run's epochs, and what begins it."""

    model: nn.Module
    parts: list[tuple[float, Callable[[], Epoch]]]
    images: int
    batch_size: int
    arithmetic: str


@dataclass
class Row:
    """One recipe in one mode. `arithmetic` is what convolutions multiply in, `peak_tflops` the chip's for it if known."""

    recipe: str
    mode: str
    model: str
    stem: str
    batch_size: int
    arithmetic: str
    images: int  # in an epoch
    epoch_s: float  # mean over the parts of a run of the medians of `epochs_s`
    images_s: float
    tflops: float
    peak_tflops: float | None
    compile_s: float  # of all warm-up epochs together, beyond the medians
    warm_up_s: list[list[float]]  # of each part of a run
    epochs_s: list[list[float]]
    loss: float  # mean of the last epoch; ours has label smoothing in it


class Images(Dataset):
    """PIL images from arrays, as torchvision's CIFAR10 serves them. Forked workers run it: it must not touch CUDA."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Image.Image], Tensor]
    ):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def reference_network(name: str, stem: str, num_classes: int, quantized: bool) -> nn.Module:
    """The network of torchvision; quantized, built of pytorch-quantization's layers, which then need calibration."""
    if quantized:
        quant_modules.initialize()  # until deactivated, torch.nn.Conv2d and others are the library's
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        if stem == "cifar":
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    finally:
        quant_modules.deactivate()
    return model


@torch.no_grad()
def calibrate_by_maximum(
    model: nn.Module, images: Dataset, batch_size: int, device: torch.device
) -> None:
    """Set the ranges of pytorch-quantization's layers from the first batches."""
    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    model.eval()
    for batch, _ in itertools.islice(DataLoader(images, batch_size), CALIBRATION_BATCHES):
        model(batch.to(device))
    for quantizer in quantizers:
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()


def reference(
    data: dataset.ImageData, mode: str, stem: str, state: State | None, args: argparse.Namespace
) -> Training:
    """The loop that people write first, starting from `state` if there is one."""
    torch.backends.cudnn.benchmark = False  # torch's default; `ours` changes it
    device, on_gpu = args.device, args.device.type == "cuda"
    chosen, _ = data.split(0)
    crop = transforms.RandomCrop(data.train_images.shape[1], padding=4)
    normalise = transforms.Normalize(*dataset.channel_stats(data.train_images))
    transform = transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
    )
    images = Images(*chosen, transform)
    loader = DataLoader(
        images,
        args.reference_batch_size,
        shuffle=True,
        num_workers=WORKERS,
        pin_memory=on_gpu,
        persistent_workers=True,
    )
    model = reference_network(args.model, stem, len(data.classes), mode == "qat")
    if state:
        model.load_state_dict(state)
    model.to(device)
    if mode == "qat":
        calibrate_by_maximum(model, images, args.reference_batch_size, device)
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE[mode], momentum=0.9, weight_decay=5e-4
    )

    def epoch(_: int, bar: tqdm) -> float:
        model.train()
        loss_sum = 0.0
        for batch, labels in loader:
            batch, labels = (
                batch.to(device, non_blocking=True),
                labels.to(device, non_blocking=True),
            )
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            bar.update(len(labels))
        return loss_sum / len(images)

    arithmetic = "tf32" if on_gpu and torch.backends.cudnn.allow_tf32 else "fp32"
    return Training(
        model, [(1.0, lambda: epoch)], len(images), args.reference_batch_size, arithmetic
    )


def ours(
    data: dataset.ImageData, mode: str, stem: str, state: State | None, args: argparse.Namespace
) -> Training:
    """The training of train.py with its defaults, wired as there, starting from `state` if there is one."""
    torch.backends.cudnn.benchmark = True
    on_gpu, epochs = args.device.type == "cuda", args.warm_up + args.epochs
    torch._inductor.config.force_disable_caches = (
        on_gpu  # or an earlier run's compilation would be this one's
    )
    argv = ["--m", args.model, "--stem", stem, "--dataset", data.name, "--num_epochs", str(epochs)]
    argv += ["--batch_size", str(args.batch_size)] if args.batch_size is not None else []
    argv += (
        ["--optimizer", "sgd" if mode == "qat" else args.optimizer]
        if mode == "qat" or args.optimizer
        else []
    )
    flags, _ = train.parse_flags(argv)
    if (
        mode == "qat"
    ):  # what parse_flags makes of --quantize with a float checkpoint, of which there is no file here
        flags.quantize, flags.partial_ckpt, flags.lr = True, True, flags.lr * train.FINE_TUNE
    config = train.make_config(flags, {}, data)
    info = config["data"]
    chosen, _ = data.split(info["split_seed"])
    arrays = *chosen, info["mean"], info["std"], flags.batch_size, args.device
    with contextlib.redirect_stdout(io.StringIO()):  # the audit
        model = train.make_model(flags, {"state": state} if state else {}, config, Batches(*arrays))
    batches = Batches(*arrays, augment=True, natural=data.natural)
    optimizer = train.make_optimizer(model, flags.optimizer)
    rate = train.make_schedule(flags.lr, epochs, None)

    def begin(last: bool) -> Epoch:
        train.set_mode(model, flags, last)
        step = train.make_step(model, optimizer, flags, last, on_gpu and not args.no_compile)
        return lambda epoch, bar: train.train_epoch(step, batches, rate, epoch, bar)[0]

    parts = [(1 - train.LAST_PART, lambda: begin(False)), (train.LAST_PART, lambda: begin(True))]
    return Training(
        model,
        parts,
        len(batches) * batches.batch_size,
        batches.batch_size,
        "bf16" if on_gpu else "fp32",
    )


RECIPES = {"reference": reference, "ours": ours}


def flops_per_image(name: str, stem: str, num_classes: int, shape: tuple[int, ...]) -> float:
    """FLOP of training the float network on one image (H, W, 3): products of the forward and the backward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # computes shapes only
        logits = models.build(name, num_classes, stem)(torch.empty(2, 3, *shape[:2]))
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    return counter.get_total_flops() / 2


def timed_epochs(
    epoch: Epoch, images: int, count: int, title: str, device: torch.device
) -> tuple[list[float], float]:
    """Seconds of each epoch, and the last one's mean loss."""
    seconds = []
    options = {
        "unit": "img",
        "unit_scale": True,
        "dynamic_ncols": True,
        "mininterval": 0.5,
        "leave": False,
    }
    with tqdm(total=images * count, desc=title, disable=None, **options) as bar:
        for index in range(count):
            synchronize(device)
            started = time.perf_counter()
            loss = epoch(index, bar)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
            bar.write(f"{title}, epoch {index + 1}/{count}: {seconds[-1]:.3f} s, loss {loss:.3f}")
            sys.stdout.flush()
    return seconds, loss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    recipe: str,
    mode: str,
    stem: str,
    state: State | None,
    data: dataset.ImageData,
    args: argparse.Namespace,
) -> tuple[Row, State]:
    """Time one recipe; also the trained weights, from which QAT starts."""
    torch.manual_seed(0)
    training = RECIPES[recipe](data, mode, stem, state, args)
    count, title = args.warm_up + args.epochs, f"{recipe} {mode}, {args.model} ({stem} stem)"
    warm_up_s, epochs_s, epoch_s, compile_s = [], [], 0.0, 0.0
    for share, begin in training.parts:
        seconds, loss = timed_epochs(begin(), training.images, count, title, args.device)
        warm_up_s.append(seconds[: args.warm_up])
        epochs_s.append(seconds[args.warm_up :])
        median_s = statistics.median(epochs_s[-1])
        epoch_s += share * median_s
        compile_s += sum(warm_up_s[-1]) - args.warm_up * median_s
    flops = flops_per_image(args.model, stem, len(data.classes), data.train_images.shape[1:])
    gpu = torch.cuda.get_device_name() if args.device.type == "cuda" else ""
    row = Row(
        recipe=recipe,
        mode=mode,
        model=args.model,
        stem=stem,
        batch_size=training.batch_size,
        arithmetic=training.arithmetic,
        images=training.images,
        epoch_s=epoch_s,
        images_s=training.images / epoch_s,
        tflops=flops * training.images / epoch_s / 1e12,
        peak_tflops=next(
            (
                peak[training.arithmetic]
                for glob, peak in PEAK_TFLOPS.items()
                if fnmatchcase(gpu, glob)
            ),
            None,
        ),
        compile_s=compile_s,
        warm_up_s=warm_up_s,
        epochs_s=epochs_s,
        loss=loss,
    )
    return row, {key: value.cpu() for key, value in training.model.state_dict().items()}


def free() -> None:
    """Let go of the last network, its compiled code and its loader, whose threads must not call CUDA while a graph records."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: Sequence[Row]) -> str:
    """The rows, and how their speeds compare, as text."""
    cells = [
        [
            "recipe",
            "mode",
            "stem",
            "batch",
            "epoch s",
            "images/s",
            "TFLOP/s",
            "chip's dense peak",
            "compile s",
        ]
    ]
    for row in rows:
        peak = f"{row.peak_tflops or '-'} ({row.arithmetic})"
        times = (
            f"{row.epoch_s:.3f}",
            f"{row.images_s:,.0f}",
            f"{row.tflops:.2f}",
            peak,
            f"{row.compile_s:.1f}",
        )
        cells.append([row.recipe, row.mode, row.stem, str(row.batch_size), *times])
    lines = [records.text_table(cells, names=3)]
    for stem in dict.fromkeys(row.stem for row in rows):
        speed = {(row.recipe, row.mode): row.images_s for row in rows if row.stem == stem}
        pairs = [
            (f"{mode}, reference / ours", ("reference", mode), ("ours", mode)) for mode in MODES
        ]
        pairs += [
            (f"{recipe}, QAT / float", (recipe, "qat"), (recipe, "float")) for recipe in RECIPES
        ]
        for what, slow, fast in pairs:
            if slow in speed and fast in speed:
                lines.append(
                    f"{stem} stem, time per image, {what}: {speed[fast] / speed[slow]:.2f}"
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--m",
        "--model",
        dest="model",
        choices=("resnet18", "resnet34", "resnet50"),
        default="resnet18",
    )
    add("--stem", nargs="+", choices=("imagenet", "cifar"), default=["imagenet", "cifar"])
    add(
        "--modes",
        nargs="+",
        choices=MODES,
        default=MODES,
        help="qat starts from float's weights if both run",
    )
    add("--recipes", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES))
    add("--batch_size", type=int, help="of ours (default: train.py's, 512 on a GPU)")
    add(
        "--optimizer",
        choices=tuple(train.LEARNING_RATE),
        help="of ours in float (default: train.py's, muon on a GPU)",
    )
    add("--reference_batch_size", type=int, default=128, help="default: %(default)s")
    add("--epochs", type=int, default=3, help="timed ones (default: %(default)s)")
    add("--warm_up", type=int, default=1, help="epochs before them (default: %(default)s)")
    add("--dataset", choices=tuple(dataset.LOADERS), default="cifar10")
    add("--data_dir", type=Path, default=Path("data"))
    add("--no_compile", action="store_true", help="no torch.compile in ours")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="written after each row, so that an early end loses little",
    )
    args = parser.parse_args(argv)
    if min(args.epochs, args.warm_up, args.reference_batch_size) < 1:
        raise UserError("--epochs, --warm_up and --reference_batch_size: at least 1")
    data = dataset.load(args.dataset, args.data_dir)
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "kind": "train_speed",
        "environment": records.environment(),
        "commit": records.commit(),
        "flags": settings,
    }
    rows: list[Row] = []
    recipes = [
        recipe for recipe in RECIPES if recipe in args.recipes
    ]  # references first: they fork, ours starts threads
    for recipe, stem in itertools.product(recipes, args.stem):
        state = None
        for mode in (mode for mode in MODES if mode in args.modes):
            row, state = measure(recipe, mode, stem, state, data, args)
            free()
            rows.append(row)
            if args.record:
                records.write(args.record, {**record, "rows": [asdict(row) for row in rows]})
    print(table(rows))


if __name__ == "__main__":
    run(main)
