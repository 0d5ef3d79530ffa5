#!/usr/bin/env python3
"""How fast does this project train, beside the loop that people write first? Seconds an epoch.

    python benchmarks/train_speed.py --stem imagenet cifar --record results/train_speed.json
    torchrun --nproc_per_node=2 benchmarks/train_speed.py --recipes ours --record two_gpus.json

Both recipes train the same network on the same train images, without the val part, in one process
on one device.

reference: torchvision's network in FP32, eager, NCHW, with batch size 128 and SGD with momentum.
cuDNN multiplies in TF32, which is torch's default; the row says so. A DataLoader with 4 persistent
workers and pinned memory serves PIL images, cropped at random and mirrored. `loss.item()` follows
each batch. QAT puts the layers of pytorch-quantization in their place, as its `quant_modules` does,
and calibrates by the maximum. They leave the residual additions in float: less is quantized than in
ours.

ours: train.py. On a GPU: bf16, channels-last, fused kernels, the step as one CUDA graph, batch size
512. Images lie on the device and are augmented there: crop and mirror as in the
reference, and a blank square. Muon trains in float, SGD in QAT. An epoch's last, incomplete batch
is dropped, so compare images/s. Both parts of a run are timed, and their medians weighted by their
lengths: two thirds, and the last third. With Muon that has SAM, two passes for each batch. In QAT
BatchNorm's statistics are frozen. On a CPU: FP32, eager, batch size 128, SGD.

Not timed: loading the data, calibration, evaluation, checkpoints. The warm-up epochs are timed, but
apart. What they took beyond the median is `compile_s`: the kernels, cuDNN's tuning, the graph, and
the start of CUDA and of the workers. TFLOP/s are the float network's convolutions and matrix
products, forward and backward, 2 for each multiply-add. SAM's second pass, the optimizer's products
and all fake quantization count as nothing.
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
from benchmarks import tables
from utils import networks, records
from utils.checkpoint import Checkpoint, State
from utils.device import default_device
from utils.errors import UserError, run
from utils.recipe import Recipe, fit_to_images, make_recipe
from utils.specs import STEMS, Quantization
from utils.training import ranks
from utils.training.optimizers import make_optimizer
from utils.training.ranks import Ranks
from utils.training.schedule import make_schedule

WORKERS = 4
CALIBRATION_BATCHES = 8
REFERENCE_LR = {"float": 0.1, "qat": 0.001}
MODES = ("float", "qat")
KINDS = {"float": "scratch", "qat": "QAT"}
"""Mode -> the kind of training that it is in train.py."""

PEAK_TFLOPS = {
    "*H100*HBM3": {"bf16": 989, "tf32": 495, "fp32": 67},
    "*H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "*A100*": {"bf16": 312, "tf32": 156, "fp32": 19.5},
}
"""GPU's name -> NVIDIA's dense peak by arithmetic."""

Epoch = Callable[[int, tqdm], float]
"""Trains the epoch of that number under a bar; returns its mean loss."""


@dataclass
class Training:
    """A network ready to train.

    Args:
        parts: of a run: the share of its epochs that each is, and what begins it.
        images: in an epoch.
    """

    model: nn.Module
    parts: list[tuple[float, Callable[[], Epoch]]]
    images: int
    batch_size: int
    arithmetic: str


@dataclass
class Row:
    """One recipe in one mode.

    Args:
        arithmetic: what convolutions multiply in.
        images: in an epoch.
        epoch_s: mean over the parts of a run of the medians of `epochs_s`.
        peak_tflops: the chip's dense peak in that arithmetic, if it is known.
        compile_s: of all warm-up epochs together, beyond the medians.
        warm_up_s, epochs_s: of each part of a run.
        loss: mean of the last epoch; ours has label smoothing in it.
        gpus: how many train together, each on its part of `batch_size`.
    """

    recipe: str
    mode: str
    model: str
    stem: str
    batch_size: int
    arithmetic: str
    images: int
    epoch_s: float
    images_s: float
    tflops: float
    peak_tflops: float | None
    compile_s: float
    warm_up_s: list[list[float]]
    epochs_s: list[list[float]]
    loss: float
    gpus: int = 1


# The reference


class Images(Dataset):
    """PIL images from arrays, as torchvision's CIFAR10 serves them.

    Forked workers run it: it must not touch CUDA.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Image.Image], Tensor]
    ):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def augmented_images(data: dataset.ImageData) -> Images:
    """The train part, cropped at random and mirrored."""
    train_part, _ = data.split(0)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(data.train_images.shape[1], padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*dataset.channel_stats(data.train_images)),
        ]
    )
    return Images(*train_part, transform)


def reference_network(name: str, stem: str, num_classes: int, quantized: bool) -> nn.Module:
    """The network of torchvision; quantized, of pytorch-quantization's layers, not calibrated."""
    if quantized:
        # until deactivated, torch.nn.Conv2d and others are the library's
        quant_modules.initialize()
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        if stem == "cifar":
            model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            model.maxpool = nn.Identity()
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
    data: dataset.ImageData,
    mode: str,
    stem: str,
    state: State | None,
    args: argparse.Namespace,
    here: Ranks,
) -> Training:
    """The loop that people write first, starting from `state` if there is one."""
    device = here.device
    on_gpu = device.type == "cuda"
    batch_size = args.reference_batch_size

    images = augmented_images(data)
    loader = DataLoader(
        images,
        batch_size,
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
        calibrate_by_maximum(model, images, batch_size, device)
    epoch = reference_epoch(model, loader, REFERENCE_LR[mode], device)
    arithmetic = "tf32" if on_gpu and torch.backends.cudnn.allow_tf32 else "fp32"
    return Training(model, [(1.0, lambda: epoch)], len(images), batch_size, arithmetic)


def reference_epoch(model: nn.Module, loader: DataLoader, lr: float, device: torch.device) -> Epoch:
    """The loop itself."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)

    def epoch(_: int, bar: tqdm) -> float:
        model.train()
        loss_sum = 0.0
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            bar.update(len(labels))
        return loss_sum / len(loader.dataset)

    return epoch


# Ours


def our_recipe(mode: str, stem: str, data_name: str, args: argparse.Namespace) -> Recipe:
    """What train.py would do by default, but in so few epochs."""
    kind = KINDS[mode]
    return make_recipe(
        kind,
        train.DEFAULTS[kind],
        default_device().type,
        model=args.model,
        stem=stem,
        dataset=data_name,
        num_epochs=args.warm_up + args.epochs,
        batch_size=args.batch_size,
        optimizer=args.optimizer if mode == "float" else None,
        quantization=Quantization() if mode == "qat" else None,
        partial_ckpt=mode == "qat",
    )


def ours(
    data: dataset.ImageData,
    mode: str,
    stem: str,
    state: State | None,
    args: argparse.Namespace,
    here: Ranks,
) -> Training:
    """The training of train.py, wired as there.

    It starts from `state` if there is one, else from a network that is not trained.
    """
    on_gpu = here.device.type == "cuda"

    # the images, plain to calibrate with and augmented to train on
    recipe = our_recipe(mode, stem, data.name, args)
    info = train.describe_data(recipe, None, data)
    train_part, _ = data.split(info.split_seed)
    recipe = fit_to_images(recipe, train.DEFAULTS[recipe.kind], len(train_part[0]))
    base = train.describe(recipe, None, info)
    plain, batches = train.train_batches(recipe, info, train_part, data.mirror_and_cutout, here)

    # the network; QAT always starts from another
    if mode == "qat" and not state:
        state = networks.build_float(base.network, info.size).state_dict()
    start = Checkpoint(state) if state else None
    # what is printed of its layers and weights is of no interest here
    with contextlib.redirect_stdout(io.StringIO()):
        model = train.make_model(recipe, start, base, plain)
    optimizer = make_optimizer(model, recipe.optimizer)
    schedule = make_schedule(recipe.lr, recipe.num_epochs, recipe.lrdt)

    opened = contextlib.ExitStack()

    def begin(last: bool) -> Epoch:
        train.set_mode(model, recipe)
        opened.close()  # the step of the part before
        step = train.make_step(model, optimizer, recipe, last)
        opened.enter_context(contextlib.closing(step))
        return lambda epoch, bar: train.train_epoch(step, batches, schedule, epoch, bar)[0]

    parts = [(1 - train.LAST_PART, lambda: begin(False)), (train.LAST_PART, lambda: begin(True))]
    images = len(batches) * batches.batch_size
    return Training(model, parts, images, batches.batch_size, "bf16" if on_gpu else "fp32")


RECIPES = {"reference": reference, "ours": ours}


# Time


def flops_per_image(name: str, stem: str, num_classes: int, shape: tuple[int, ...]) -> float:
    """FLOP of training the float network on one image (H, W, 3), forward and backward."""
    # on this device only shapes are computed
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = models.build(name, num_classes, stem)(torch.empty(2, 3, *shape[:2]))
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    return counter.get_total_flops() / 2


def peak_tflops(arithmetic: str) -> float | None:
    """This GPU's dense peak, if it is known."""
    if not torch.cuda.is_available():
        return None
    for pattern, peak in PEAK_TFLOPS.items():
        if fnmatchcase(torch.cuda.get_device_name(), pattern):
            return peak[arithmetic]
    return None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed_epochs(epoch: Epoch, images: int, count: int, title: str) -> tuple[list[float], float]:
    """Seconds of each epoch, and the last one's mean loss."""
    seconds = []
    with tqdm(
        total=images * count,
        desc=title,
        disable=None,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        leave=False,
    ) as bar:
        for index in range(count):
            synchronize()
            started = time.perf_counter()
            loss = epoch(index, bar)
            synchronize()
            seconds.append(time.perf_counter() - started)
            bar.write(f"{title}, epoch {index + 1}/{count}: {seconds[-1]:.3f} s, loss {loss:.3f}")
            sys.stdout.flush()
    return seconds, loss


def measure(
    recipe: str,
    mode: str,
    stem: str,
    state: State | None,
    data: dataset.ImageData,
    args: argparse.Namespace,
    here: Ranks,
) -> tuple[Row, State]:
    """Time one recipe; also the trained weights, from which QAT starts."""
    torch.manual_seed(0)
    training = RECIPES[recipe](data, mode, stem, state, args, here)
    count = args.warm_up + args.epochs
    title = f"{recipe} {mode}, {args.model} ({stem} stem)"

    # each part of a run counts by its share of the epochs
    warm_up_s, epochs_s = [], []
    epoch_s = 0.0
    compile_s = 0.0
    for share, begin in training.parts:
        seconds, loss = timed_epochs(begin(), training.images, count, title)
        warm_up_s.append(seconds[: args.warm_up])
        epochs_s.append(seconds[args.warm_up :])
        median_s = statistics.median(epochs_s[-1])
        epoch_s += share * median_s
        compile_s += sum(warm_up_s[-1]) - args.warm_up * median_s

    flops = flops_per_image(args.model, stem, len(data.classes), data.train_images.shape[1:])
    images_s = training.images / epoch_s
    row = Row(
        recipe=recipe,
        mode=mode,
        model=args.model,
        stem=stem,
        batch_size=training.batch_size,
        arithmetic=training.arithmetic,
        images=training.images,
        epoch_s=epoch_s,
        images_s=images_s,
        tflops=flops * images_s / 1e12,
        peak_tflops=peak_tflops(training.arithmetic),
        compile_s=compile_s,
        warm_up_s=warm_up_s,
        epochs_s=epochs_s,
        loss=loss,
        gpus=here.world_size,
    )
    return row, {key: value.cpu() for key, value in training.model.state_dict().items()}


def free() -> None:
    """Let go of the last network, its compiled code and its loader.

    The loader's threads must not call CUDA while a graph records.
    """
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# What is printed


def table(rows: Sequence[Row]) -> str:
    """The rows, and how their speeds compare, as text."""
    cells = tables.training_cells([asdict(row) for row in rows])
    return "\n".join([records.text_table(cells, names=3), *ratios(rows)])


def ratios(rows: Sequence[Row]) -> list[str]:
    """A line for each two rows of a stem that differ in the recipe or in the mode alone."""
    # (what is compared, the slower one, the faster one)
    pairs = []
    for mode in MODES:
        pairs.append((f"{mode}, reference / ours", ("reference", mode), ("ours", mode)))
    for recipe in RECIPES:
        pairs.append((f"{recipe}, QAT / float", (recipe, "qat"), (recipe, "float")))

    lines = []
    for stem in dict.fromkeys(row.stem for row in rows):
        speed = {(row.recipe, row.mode): row.images_s for row in rows if row.stem == stem}
        for what, slow, fast in pairs:
            if slow in speed and fast in speed:
                ratio = speed[fast] / speed[slow]
                lines.append(f"{stem} stem, time per image, {what}: {ratio:.2f}")
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("resnet18", "resnet34", "resnet50")
    add = parser.add_argument_group("what is timed").add_argument
    add("--m", "--model", dest="model", choices=names, default="resnet18")
    add("--stem", nargs="+", choices=STEMS, default=STEMS)
    state = "qat starts from float's weights if both run"
    add("--modes", nargs="+", choices=MODES, default=MODES, help=state)
    add("--recipes", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES))
    add("--epochs", type=int, default=3, help="timed ones (default: %(default)s)")
    add("--warm_up", type=int, default=1, help="epochs before them (default: %(default)s)")
    add("--dataset", choices=tuple(dataset.LOADERS), default="cifar10")
    add("--data_dir", type=Path, default=Path("data"))
    add("--reference_batch_size", type=int, default=128, help="default: %(default)s")

    add = parser.add_argument_group("ours").add_argument
    add("--batch_size", type=int, help="default: train.py's, 512 on a GPU")
    optimizers = tuple(train.DEFAULTS["scratch"].peak_lr)
    add("--optimizer", choices=optimizers, help="in float (default: train.py's, muon on a GPU)")

    add = parser.add_argument_group("output").add_argument
    add("--record", type=Path, metavar="FILE", help="written after each row: little can be lost")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if min(args.epochs, args.warm_up, args.reference_batch_size) < 1:
        raise UserError("--epochs, --warm_up and --reference_batch_size: at least 1")
    with ranks.started() as here:
        time_all(args, here)


def time_all(args: argparse.Namespace, here: Ranks) -> None:
    """Every recipe in every mode; the first rank writes."""
    if here.world_size > 1 and "reference" in args.recipes:
        raise UserError("the reference is for one GPU: add --recipes ours")
    data = dataset.load(args.dataset, args.data_dir)
    settings = {}
    for name, value in vars(args).items():
        settings[name] = str(value) if isinstance(value, Path) else value
    record = {
        "kind": "train_speed",
        "environment": records.environment(["pytorch"]),
        "commit": records.commit(),
        "flags": settings,
    }

    rows: list[Row] = []
    # references first: they fork, ours starts threads
    recipes = [recipe for recipe in RECIPES if recipe in args.recipes]
    for recipe, stem in itertools.product(recipes, args.stem):
        state = None
        for mode in MODES:
            if mode not in args.modes:
                continue
            row, state = measure(recipe, mode, stem, state, data, args, here)
            free()
            rows.append(row)
            if args.record and here.first:
                records.write(args.record, {**record, "rows": [asdict(row) for row in rows]})
    print(table(rows))


if __name__ == "__main__":
    run(main)
