#!/usr/bin/env python3
"""Train a float network, or fine-tune a quantized one (QAT), and keep the best checkpoint.

    python train.py --m resnet18 --num_epochs 40
    python train.py --m resnet18 --quantize --partial_ckpt --load_ckpt /tmp/pytorch_exp/ckpt_best
    torchrun --nproc_per_node=2 train.py --model resnet18 --num_epochs 40

QAT follows Wu et al. (2020, arXiv:2004.09602): swap the selected layers, calibrate, then fine-tune
through the rounding with a straight-through gradient and ranges that stay fixed.
"""

from __future__ import annotations

from utils.errors import UserError, run  # first: it is ready for Ctrl-C during what follows

# isort: split
import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import dataset
import models
from dataset.batches import Batches
from dataset.folder import count_classes
from utils import checkpoint as ckpt
from utils import compare, flags, networks
from utils.checkpoint import Checkpoint
from utils.device import default_device, memory_format
from utils.files import locked, new_folder, user_path
from utils.manifest import read_export
from utils.quantization import layer_table
from utils.quantization.watch import example_images
from utils.recipe import Defaults, Recipe, fit_to_images, given_refusals, resolve, stored_flags
from utils.specs import DataSpec, NetworkSpec, is_foreign
from utils.training import kernels, ranks
from utils.training.fuse import fuse
from utils.training.optimizers import make_optimizer
from utils.training.run import BEST, Run, at_work_in, load_to_resume
from utils.training.schedule import make_schedule
from utils.training.step import Step, estimate_batch_norm, evaluate, freeze_batch_norm

# What is trained how, unless flags say otherwise. A peak learning rate is for batch size 128 and
# grows in proportion to it; the rate rises for a twentieth of the run and falls to 0, in a line.
# fmt: off
DEFAULTS = {
    #                     epochs, on a GPU, on a CPU, peak lr of each optimizer, BatchNorm frozen?
    "scratch":     Defaults(40, "muon", "sgd", {"muon": 0.01, "sgd": 0.05, "adamw": 2e-3}),
    "pretrained":  Defaults(40, "sgd",  "sgd", {"sgd": 0.05, "adamw": 2e-3}),
    "fine-tuning": Defaults(40, "sgd",  "sgd", {"sgd": 0.0025, "adamw": 1e-4}, True),
    "QAT":         Defaults(10, "sgd",  "sgd", {"sgd": 0.0025, "adamw": 1e-4}, True),
}
# fmt: on
LAST_PART = 1 / 3  # of the epochs: with Muon they are SAM's
HANDICAP = 1.1  # of ckpt_0's val loss: a few val images alone do not make it the best
FEW_VAL = 100  # images, of which one more or less that is right is over a point
FEW_STEPS = 100  # until which BatchNorm's running averages lag too far behind to evaluate by


def build_parser() -> argparse.ArgumentParser:
    parser = flags.make_parser(__doc__, tuple(dataset.LOADERS))
    add = parser.add_argument_group("start").add_argument
    add("--pretrain", action="store_true", help="from torchvision's ImageNet weights")
    add("--partial_ckpt", action="store_true", help="--load_ckpt is float: it has no ranges")
    other = "--load_ckpt is of other classes or images: all but its last layer is loaded"
    add("--new_classifier", action="store_true", help=other)
    resume = "go on with an interrupted run, by its own flags"
    add("--resume", type=user_path, metavar="DIR", help=resume)

    add = parser.add_argument_group("normalisation, which a checkpoint knows").add_argument
    rgb = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
    add("--mean", help="what --load_ckpt's weights were trained with, 0..1", **rgb)
    add("--std", help="(default: computed from the train images)", **rgb)
    add("--normalization", choices=("imagenet",), help="ImageNet's mean and std")

    add = parser.add_argument_group("training").add_argument
    add("--num_epochs", type=int, help="default: 40, with --quantize 10 (0 calibrates only)")
    add("--batch_size", type=int, help="of all ranks together (default: GPU 512, CPU 128)")
    optimizers = "default: muon from scratch on a GPU, else sgd"
    add("--optimizer", choices=tuple(DEFAULTS["scratch"].peak_lr), help=optimizers)
    add("--lr", type=float, help="peak learning rate (default: by optimizer, start, batch size)")
    lrdt = "divide the rate by 10 every N epochs (default: warm-up, then a line to 0)"
    add("--lrdt", type=int, metavar="N", help=lrdt)
    add("--seed", type=int, default=0, help="default: %(default)s")
    sync = "torch's SyncBatchNorm: statistics of all GPUs' images, not of each GPU's own"
    add("--sync_batchnorm", action="store_true", help=sync)

    add = parser.add_argument_group("output").add_argument
    parent = "folder of experiments (default: /tmp)"
    add("--od", "--output_dir", dest="output_dir", type=user_path, help=parent)
    name = "an experiment's folder (default: pytorch_exp, then _1, _2, ...)"
    add("--en", "--exp_name", dest="exp_name", help=name)
    add("--keep", type=int, help="of how many last epochs checkpoints stay (default: 1)")
    add("--test_trt", action="store_true", help="afterwards build and compare engines")
    add("--list_layers", action="store_true", help="print the layers' names, and do no more")
    return parser


def fit(run: Run, recipe: Recipe, train_part: Batches, plain: Batches, val: Batches) -> None:
    """Train from `run.epoch` to `recipe.num_epochs`, writing a checkpoint after each epoch.

    The random state of an epoch is a function of the seed and the epoch's number, so a resumed run
    repeats exactly what an uninterrupted one with as many threads does.

    Args:
        train_part: augmented, to train on.
        plain: the same images as they are, for BatchNorm's statistics while steps are few.

    Raises:
        UserError: as `Run.require_finite`.
    """
    schedule = make_schedule(recipe.lr, recipe.num_epochs, recipe.lrdt)
    last_part = recipe.num_epochs - int(recipe.num_epochs * LAST_PART)
    first = run.epoch
    # where a step begins: the last part has another one if it has SAM
    starts = {first, last_part} if recipe.sam_rho else {first}
    with closing(run), progress_bar(run, recipe, train_part) as bar, ExitStack() as opened:
        for epoch in range(first, recipe.num_epochs):
            set_mode(run.model, recipe)
            if epoch in starts:
                opened.close()  # the step of the part before
                step = make_step(run.model, run.optimizer, recipe, epoch >= last_part)
                opened.enter_context(closing(step))

            # one pass over the images
            bar.set_description(f"epoch {epoch + 1}/{recipe.num_epochs}")
            torch.manual_seed(1_000_003 * (recipe.seed + 1) + epoch)
            started = time.perf_counter()
            loss, train_pct = train_epoch(step, train_part, schedule, epoch, bar)
            seconds = time.perf_counter() - started

            # its network on the val part
            ranks.average_statistics(run.model)
            few = (epoch + 1) * len(train_part) < FEW_STEPS
            if few and not recipe.freeze_batch_norm:
                estimate_batch_norm(run.model, plain)
            val_loss, val_pct = evaluate(run.model, val)
            run.require_finite(loss + val_loss, recipe.lr)

            # what it leaves
            run.finish_epoch(loss, train_pct, val_loss, val_pct, train_part.rank == 0)
            line = f"train loss {loss:.4f}, {train_pct:.2f} %, val loss {val_loss:.4f}"
            line = f"epoch {run.epoch}: {line}, {val_pct:.2f} %, {seconds:.2f} s"
            bar.write(line, file=sys.stdout)


def progress_bar(run: Run, recipe: Recipe, train_part: Batches) -> tqdm:
    """A bar over all images of the run, on the first rank."""
    images = len(train_part) * train_part.batch_size
    return tqdm(
        total=images * recipe.num_epochs,
        initial=images * run.epoch,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=train_part.rank > 0,
    )


def set_mode(model: nn.Module, recipe: Recipe) -> None:
    """Training mode. In QAT and fine-tuning BatchNorm uses its running statistics, which stay.

    Ranges were calibrated with these. A few images can have values so large that they make most of
    a batch's variance. Ranges cut them off, so a quantized batch has another variance, and by its
    own statistics the network would be another one than was calibrated.
    """
    model.train()
    if recipe.freeze_batch_norm:
        freeze_batch_norm(model)


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, last: bool
) -> Step:
    """The step of the last part of a run, or of all before."""
    return Step(model, optimizer, recipe.label_smoothing, recipe.sam_rho if last else 0.0)


def train_epoch(
    step: Step, batches: Batches, schedule: Callable[[float], float], epoch: int, bar: tqdm
) -> tuple[float, float]:
    """Epoch number `epoch`; its mean loss and accuracy in percent, on augmented images."""
    for index, (images, labels) in enumerate(batches):
        step.set_lr(schedule(epoch + index / len(batches)))
        step(images, labels)
        if not step.on_gpu:  # reading a value off a GPU would make it wait
            bar.set_postfix(loss=step.loss_sum.item() / step.count, refresh=False)
        bar.update(batches.batch_size)
    return step.totals()


def describe_data(recipe: Recipe, start: Checkpoint | None, data: dataset.ImageData) -> DataSpec:
    """What checkpoints say of the images.

    A checkpoint's split and normalisation go on, so that its val part is never trained on.
    """
    if start and start.data:
        return start.data
    mean, std, origin = recipe.mean, recipe.std, "as the flags or the checkpoint say"
    if mean is None:
        mean, std = dataset.channel_stats(data.train_images)
        origin = "computed from the train images; if the weights need another, name it"
    if start or recipe.pretrain:
        numbers = [" ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
        print(f"normalisation: mean {numbers[0]}, std {numbers[1]}, {origin}")
    return DataSpec(
        dataset=data.name,
        img_size=list(data.train_images.shape[1:3]),
        classes=list(data.classes),
        split_seed=recipe.seed,
        mean=mean,
        std=std,
        digest=data.digest(),
    )


def describe(recipe: Recipe, start: Checkpoint | None, info: DataSpec) -> Checkpoint:
    """The constant part of the run's checkpoints."""
    return Checkpoint(
        state={},
        network=NetworkSpec(recipe.model, recipe.stem, len(info.classes)),
        data=info,
        quantization=recipe.quantization if recipe.quantize else None,
        ptq_state=start.ptq_state if start else None,
        recipe=recipe.flags(),
    )


def make_model(
    recipe: Recipe, start: Checkpoint | None, base: Checkpoint, train_part: Batches
) -> nn.Module:
    """The network to train, on its device: built, loaded, quantized and calibrated.

    What QAT starts from goes into `base`.
    """
    torch.manual_seed(recipe.seed)
    size = base.data.size
    if recipe.quantize:
        model = networks.build_quantized(base.network, base.quantization, size, start.state)
    else:
        model = networks.build_float(base.network, size)
    if recipe.num_epochs and not any(p.requires_grad for p in model.parameters()):
        what = "no parameter of the network has requires_grad, so there is nothing to train"
        raise UserError(f"{what}: set it in some, or calibrate alone: --quantize --num_epochs 0")
    if start:
        partial = recipe.partial_ckpt and start.quantization is None
        if start.quantization is not None:
            # only tried, as an export will need it after the training; the next one replaces it
            ckpt.load_weights(model, start.ptq_state)
        # a run that is resumed has its own classifier by now
        new_classifier = recipe.new_classifier and not start.whole
        print(ckpt.load_weights(model, start.state, partial, new_classifier))
    elif recipe.pretrain:
        networks.load_imagenet_weights(model, recipe.model)
    device = train_part.device
    model.to(device, memory_format=memory_format(device, model))

    if recipe.quantize:
        if start.quantization is None:
            networks.calibrate_model(model, base.quantization, train_part)
            # a copy, which training does not change
            base.ptq_state = {key: value.cpu().clone() for key, value in model.state_dict().items()}
        print(layer_table(model, example_images(*size)))
    if is_foreign(recipe.model):
        networks.require_exportable(model, base.data)
    model = ranks.share_model(model, recipe.sync_batchnorm)
    if kernels.usable():
        fuse(model, example_images(*size))
    return model


def load_images(recipe: Recipe, start: Checkpoint | None, resume: bool) -> dataset.ImageData:
    """The images of a run; those of the checkpoint that it starts from, if that has any."""
    known = start.data if start else None
    # what to do with others: weights are of use for them, ranges and a half-done run are not
    mend = "add --new_classifier"
    if recipe.quantize:
        mend = "train a float network on the others first"
    if resume:
        mend = "begin a new run"
    return compare.load_data(recipe.dataset, recipe.data_dir, recipe.img_size, known, mend=mend)


def train_batches(
    recipe: Recipe, info: DataSpec, part: dataset.Part, mirror_and_cutout: bool, here: ranks.Ranks
) -> tuple[Batches, Batches]:
    """The train part twice: as it is, to calibrate with, and augmented, to train on."""
    plain = networks.batches_of(*part, info, recipe.batch_size // here.world_size)
    augmented = Batches(
        plain.images,
        plain.labels,
        plain.normalize,
        recipe.batch_size,
        here.device,
        augment=True,
        mirror_and_cutout=mirror_and_cutout,
        rank=here.rank,
        world_size=here.world_size,
    )
    return plain, augmented


def train(
    recipe: Recipe, start: Checkpoint | None, folder: Path, here: ranks.Ranks, resume: bool = False
) -> dataset.ImageData:
    """Train as the recipe says and test the best checkpoint.

    Args:
        start: the checkpoint to start from or, with `resume`, to go on from.

    Returns:
        The images.
    """
    print(f"experiment folder: {folder}", flush=True)
    # before the images, which may take long to read
    models.require(recipe.model)
    # the images, and what the recipe makes of so many
    data = load_images(recipe, start, resume)
    info = describe_data(recipe, start, data)
    train_arrays, val_arrays = data.split(info.split_seed)
    if len(val_arrays[0]) < FEW_VAL:
        print(f"only {len(val_arrays[0])} val images choose the best epoch: add train images")
    check_ranks(recipe, here, len(train_arrays[0]))
    shared = len(train_arrays[0]) // here.world_size * here.world_size
    recipe = fit_to_images(recipe, DEFAULTS[recipe.kind], shared)
    base = describe(recipe, start, info)
    plain, augmented = train_batches(recipe, info, train_arrays, data.mirror_and_cutout, here)
    own_size = recipe.batch_size // here.world_size
    val = networks.batches_of(*val_arrays, info, own_size)

    # the network, trained from where it is
    model = make_model(recipe, start, base, plain)
    optimizer = make_optimizer(model, recipe.optimizer)
    run = Run(folder, model, optimizer, base, keep=recipe.keep)
    if resume:
        run.go_on(start, write=here.first)
        if run.epoch >= recipe.num_epochs:
            print(f"{run.epoch} epochs are done: a larger --num_epochs than that goes on")
    elif recipe.quantize and here.first:
        # ckpt_0: calibrated, not yet fine-tuned; it is the best where QAT clearly lost
        val_loss, val_pct = evaluate(model, val)
        print(f"epoch 0, calibrated: val loss {val_loss:.4f}, {val_pct:.2f} %")
        run.save(HANDICAP * val_loss)
    fit(run, recipe, augmented, plain, val)

    # the test images, for the first time
    if here.first:
        best = ckpt.load(run.best)
        if recipe.quantize and best.epoch == 0 < run.epoch:
            print("QAT ended below the calibrated network, which is ckpt_best: use a lower --lr")
        ckpt.load_weights(model, best.state)
        test = networks.batches_of(data.test_images, data.test_labels, info, own_size)
        _, test_pct = evaluate(model, test)
        print(f"{run.best} is epoch {best.epoch}: test accuracy {test_pct:.2f} %")
    return data


def check_ranks(recipe: Recipe, here: ranks.Ranks, images: int) -> None:
    """Raises UserError where a batch, or what is asked, cannot be shared out to several ranks."""
    count = here.world_size
    if count == 1:
        return
    if recipe.batch_size % count:
        size = recipe.batch_size
        raise UserError(f"--batch_size {size} is not a multiple of the {count} ranks")
    # one image has no variance where it is a single pixel
    size = min(recipe.batch_size, images)
    if size < 2 * count:
        what = f"--batch_size: {size} images for {count} ranks, which need two each"
        raise UserError(f"{what}; start fewer")
    if recipe.sync_batchnorm and here.device.type != "cuda":
        raise UserError("--sync_batchnorm: torch's SyncBatchNorm needs GPUs: drop it")


def read_flags(argv: Sequence[str] | None) -> tuple[Recipe, Checkpoint | None]:
    """The recipe that the flags mean, and the checkpoint to start from, if any.

    A resumed run's flags are its own unless given again.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    start = None
    if args.resume:
        start = load_to_resume(args.resume)
        stored = stored_flags(start)
        # argparse would add those that are named now
        if args.precisions:
            stored.pop("precisions", None)
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
    elif args.load_ckpt:
        start = ckpt.load(args.load_ckpt)
    recipe = resolve(args, start, DEFAULTS, default_device().type)
    if args.new_classifier and not args.resume:
        # of its data only the normalisation goes on, which the recipe has by now
        start = replace(start, data=None)
    return recipe, start


def main(argv: Sequence[str] | None = None) -> None:
    given = build_parser().parse_args(argv)
    flags.refuse([given_refusals], given)
    with ranks.started() as here:
        if given.resume:
            # what is read there must be the newest: nobody else may train on meanwhile
            folder = ckpt.latest(given.resume).parent
            with at_work_in(folder, here.first, given.model):
                recipe, start = read_flags(argv)
                data = train(recipe, start, folder, here, resume=True)
        else:
            recipe, start = read_flags(argv)
            if given.list_layers:
                list_layers(recipe)
                return
            parent, name = given.output_dir or Path("/tmp"), given.exp_name or "pytorch_exp"
            folder = ranks.from_first(lambda: new_folder(parent, name))
            with at_work_in(folder, here.first, given.model):
                data = train(recipe, start, folder, here)
    if recipe.comparison and here.first:
        with at_work_in(folder, here.first, given.model):
            compare_best(folder / BEST, recipe, data)


def list_layers(recipe: Recipe) -> None:
    """Print the layers that can be quantized, and which of them the flags choose."""
    num_classes = 10
    if recipe.dataset == "folder":
        num_classes = count_classes(recipe.data_dir)
    spec = NetworkSpec(recipe.model, recipe.stem, num_classes)
    size = dataset.size_of(recipe.img_size)
    model = networks.build_quantized(spec, recipe.quantization, size)
    print(layer_table(model, example_images(*size)))


def compare_best(path: Path, recipe: Recipe, data: dataset.ImageData) -> None:
    """Export a checkpoint and compare its engines, as infer.py does."""
    checkpoint = ckpt.load_whole(path)
    # a quantized one was calibrated with no more images than there are
    quantization = checkpoint.quantization or recipe.quantization
    folder = compare.export_folder(path)
    with locked(folder, make=True):
        compare.export_checkpoint(checkpoint, data, quantization, recipe.comparison, folder)
        manifest, predictions = read_export(folder)
        rows, _ = compare.evaluate_export(folder, manifest, predictions, data, recipe.comparison)
    compare.print_record(compare.make_record(manifest, rows))


if __name__ == "__main__":
    run(main, needs_stdout=False)
