#!/usr/bin/env python3
"""Train a float network, or fine-tune a quantized one (QAT), and keep the best checkpoint.

    python train.py --m resnet18 --num_epochs 40
    python train.py --m resnet18 --quantize --partial_ckpt --load_ckpt /tmp/pytorch_exp/ckpt_best --num_epochs 10
    torchrun --nproc_per_node=2 train.py --model resnet18 --num_epochs 40

QAT follows Wu et al. (2020, arXiv:2004.09602): swap the selected layers, calibrate, then fine-tune through the rounding with
a straight-through gradient and ranges that stay fixed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import dataset
import infer
import models
from dataset.batches import Batches
from utils import checkpoint as ckpt
from utils import flags
from utils.errors import UserError, run
from utils.files import link, locked, new_folder
from utils.training import ranks as distributed
from utils.training.optimizers import load_optimizer, make_optimizer
from utils.training.step import Step, evaluate, freeze_batch_norm, make_schedule

LEARNING_RATE = {
    "sgd": 0.05,
    "adamw": 2e-3,
    "muon": 0.0125,
}  # peak, at batch size 128; proportional to the batch size
FINE_TUNE = 0.05  # of it when training starts from a checkpoint
BATCH_SIZE = {"cpu": 128, "cuda": 512}
LABEL_SMOOTHING = 0.1
LAST_PART = 1 / 3  # of the epochs: see `set_mode` and `make_step`
SHARPNESS = 0.005  # of SAM
COMPILE_STEPS = 10_000  # from which torch.compile pays on one H100: it takes 15 to 50 s and saves 2 to 6 ms of a step
MAX_SEED = 2**32 - 1  # a million times it, as `fit` needs, is a seed that torch takes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_shared(parser, tuple(dataset.LOADERS))
    add = parser.add_argument
    add("--pretrain", action="store_true", help="start from torchvision's ImageNet weights")
    add(
        "--partial_ckpt",
        action="store_true",
        help="--load_ckpt is a float checkpoint: it fills all but the ranges",
    )
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="continue an interrupted run from its folder, with its own flags",
    )
    add(
        "--num_epochs",
        type=int,
        help="default: 40, with --quantize 10; with --quantize, 0 calibrates only",
    )
    add(
        "--batch_size", type=int, help="of all ranks together (default: 512 on a GPU, 128 on a CPU)"
    )
    add(
        "--optimizer",
        choices=tuple(LEARNING_RATE),
        help="default: muon from scratch on a GPU, otherwise sgd",
    )
    add(
        "--lr",
        type=float,
        help="peak learning rate (default: by optimizer and batch size; less from a checkpoint)",
    )
    add(
        "--lrdt",
        type=int,
        metavar="N",
        help="divide the rate by 10 every N epochs (default: warm-up, then a line to 0)",
    )
    add(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile on one GPU (default: where the run is long enough)",
    )
    add("--no_compile", action="store_false", dest="compile", default=None, help="no torch.compile")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--od",
        "--output_dir",
        dest="output_dir",
        type=Path,
        default=Path("/tmp"),
        help="default: %(default)s",
    )
    add(
        "--en",
        "--exp_name",
        dest="exp_name",
        default="pytorch_exp",
        help="default: %(default)s, then _1, _2, ...",
    )
    add(
        "--test_trt",
        action="store_true",
        help="afterwards build and compare engines of the best checkpoint",
    )
    return parser


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Flags, and the checkpoint to start from ({} for none). A resumed run's flags are its own unless given again."""
    parser = build_parser()
    args = parser.parse_args(argv)
    start: dict[str, Any] = {}
    if args.resume and args.load_ckpt:
        raise UserError("--resume and --load_ckpt both name a checkpoint to start from: drop one")
    if args.resume:
        path = ckpt.latest(args.resume)
        start = ckpt.load(path)
        if "flags" not in start:
            raise UserError(f"--resume {args.resume}: not a checkpoint of train.py")
        there = ckpt.by_epoch(path.parent)
        newest = max(there, default=0)
        if newest > start["epoch"]:
            raise UserError(
                f"--resume {path}: {there[newest]} goes on from there; resume or delete that"
            )
        parser.set_defaults(**start["flags"])
        args = parser.parse_args(argv)
        if args.quantize != start["flags"]["quantize"]:
            raise UserError(
                "--resume goes on with a run as it was; QAT starts with --load_ckpt, --quantize and --partial_ckpt"
            )
        flags.agreed(
            "--optimizer", args.optimizer, start["flags"].get("optimizer")
        )  # its state is of no use to another
    elif args.load_ckpt:
        start = ckpt.load(args.load_ckpt)
    if args.quantize and not start:
        raise UserError("--quantize starts from a trained network: name it with --load_ckpt")
    idle = (
        []
        if args.test_trt
        else [f"--{name}" for name in flags.QUANTIZATION if getattr(args, name) is not None]
    )
    if (idle or args.partial_ckpt) and not args.quantize:
        raise UserError(
            f"{', '.join(idle or ['--partial_ckpt'])}: this run trains in float; add --quantize, or drop it"
        )
    engines = [flags.PRECISIONS[precision] for precision in flags.named_precisions(args)]
    engines += [
        f"--{name}"
        for name in ("backend", "ptc_mode")
        if getattr(args, name) != parser.get_default(name)
    ]
    if engines and not args.test_trt:
        raise UserError(
            f"{', '.join(engines)}: nothing is exported here; add --test_trt, or drop it"
        )
    if args.test_trt and args.INT8QAT and not args.quantize:
        raise UserError(
            "--INT8QAT: this run trains in float; fine-tune its checkpoint with --quantize, and build that engine then"
        )
    if args.test_trt:  # refuse contradictions now, not after training
        infer.wanted_precisions(args)
        infer.tensorrt_flag(args)
    if args.pretrain and args.load_ckpt and not args.resume:
        raise UserError("--pretrain and --load_ckpt both name weights to start from: drop one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scratch = not (args.load_ckpt or args.pretrain)
    if args.num_epochs is None:
        args.num_epochs = 10 if args.quantize else 40
    if args.batch_size is None:
        args.batch_size = BATCH_SIZE[device]
    if args.optimizer is None:
        args.optimizer = "muon" if scratch and device == "cuda" else "sgd"
    if args.optimizer == "muon" and not (scratch or args.resume):
        raise UserError(
            "--optimizer muon sets the length of every kernel, so it trains from scratch only: use sgd"
        )
    if args.lr is None:
        args.lr = (
            LEARNING_RATE[args.optimizer]
            * args.batch_size
            / 128
            * (FINE_TUNE if args.load_ckpt else 1)
        )
    least = {
        "num_epochs": 0 if args.quantize else 1,
        "batch_size": 2,
        "lr": 0,
        "lrdt": 1,
        "calib_images": 1,
        "seed": 0,
    }
    for name, low in least.items():
        high = MAX_SEED if name == "seed" else math.inf
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(
                f"--{name} {value}: at least {low}"
                + (f", at most {high}" if high < math.inf else "")
            )
    return args, start


@dataclass
class Run:
    """Everything that training changes, and what is needed to write it down."""

    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: dict[str, Any]
    epoch: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The checkpoint of the last epoch completed."""
        return self.folder / f"ckpt_{self.epoch}"

    def require_finite(self, loss: float, lr: float) -> None:
        """Raises UserError, which names the last good checkpoint, if the epoch's loss or a weight is not finite any more."""
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in self.model.parameters()):
            left = (
                f"the last good checkpoint is {self.path}"
                if self.path.exists()
                else "no checkpoint was written yet"
            )
            raise UserError(
                f"the loss became {loss} in epoch {self.epoch + 1}: use a lower --lr than {lr:g}; {left}"
            )

    def save(self, held_out_loss: float) -> None:
        """Write `ckpt_<epochs completed>`, and `ckpt_best` if no earlier epoch's loss on the held-out images was lower.

        Their loss is less noisy than their accuracy.
        """
        best = held_out_loss <= self.best_loss
        if best:
            self.best_loss = held_out_loss
        content = {
            **self.config,
            "state": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "history": self.history,
        }
        ckpt.save(self.path, content)
        if best:
            link(self.path, self.folder / "ckpt_best")

    def tidy(self) -> None:
        """Do what a killed process left undone: remove its partial files, and let `ckpt_best` be the last if that is best."""
        for partial in self.folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)
        last_loss = self.history[-1]["held_out_loss"] if self.history else self.best_loss
        if not (self.folder / "ckpt_best").exists():  # the checkpoint was copied without it
            self.best_loss = last_loss if self.path.exists() else math.inf
        if last_loss == self.best_loss and self.path.exists():
            link(self.path, self.folder / "ckpt_best")


def train_epoch(
    step: Step, batches: Batches, rate: Callable[[float], float], epoch: int, bar: tqdm
) -> tuple[float, float]:
    """Epoch number `epoch` in place, by the schedule `rate`; mean loss and accuracy in percent on augmented images."""
    for index, (images, labels) in enumerate(batches):
        step.set_rate(rate(epoch + index / len(batches)))
        step(images, labels)
        if not step.on_gpu:  # reading a value off a GPU would make it wait
            loss, hits = step.loss_sum / step.count, 100 * step.hits / step.count
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {hits:.1f} %", refresh=False)
        bar.update(batches.batch_size)
    return step.totals()


def set_mode(model: nn.Module, args: argparse.Namespace, last: bool) -> None:
    """Training mode; in the last part of fine-tuning, in QAT and, to compare it with, in float, BatchNorm's statistics stay."""
    model.train()
    if last and (args.quantize or args.load_ckpt):
        freeze_batch_norm(model)


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    last: bool,
    compiled: bool,
) -> Step:
    """The step of the last part of a run or of all before; the model is in its mode.

    Muon, which is for runs from scratch, ends with SAM, for which late is enough (Zhou et al., 2024, arXiv:2410.10373). SGD
    does not: on digits SAM cost it accuracy, and in QAT, with frozen statistics, nothing cancels the perturbation.
    """
    sharpness = SHARPNESS if last and args.optimizer == "muon" else 0.0
    return Step(model, optimizer, LABEL_SMOOTHING, compiled, sharpness)


def fit(run: Run, train: Batches, held_out: Batches, args: argparse.Namespace) -> None:
    """Train from `run.epoch` to `args.num_epochs`, writing a checkpoint after each epoch.

    The random state of an epoch is a function of the seed and the epoch's number, so a resumed run repeats exactly what
    an uninterrupted one does.

    Raises:
        UserError: as `Run.require_finite`.
    """
    rate = make_schedule(args.lr, args.num_epochs, args.lrdt)
    last_part = args.num_epochs - int(args.num_epochs * LAST_PART)
    total, done = (
        len(train) * train.batch_size * epochs for epochs in (args.num_epochs, run.epoch)
    )
    compiled = (
        args.num_epochs * len(train) >= COMPILE_STEPS if args.compile is None else args.compile
    )
    compiled = compiled and train.device.type == "cuda" and train.share[1] == 1
    if compiled:
        torch.compiler.reset()  # a process that trains several networks would soon have compiled as often as it may
    step, writer = None, train.share[0] == 0
    bar = tqdm(
        total=total,
        initial=done,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not writer,
    )
    try:
        for epoch in range(run.epoch, args.num_epochs):
            bar.set_description(f"epoch {epoch + 1}/{args.num_epochs}")
            torch.manual_seed(1_000_003 * (args.seed + 1) + epoch)
            set_mode(run.model, args, epoch >= last_part)
            if step is None or epoch == last_part:
                step = make_step(run.model, run.optimizer, args, epoch >= last_part, compiled)
            started = time.perf_counter()
            loss, train_pct = train_epoch(step, train, rate, epoch, bar)
            seconds = time.perf_counter() - started
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {train_pct:.1f} %")
            held_out_loss, held_out_pct = evaluate(run.model, held_out)
            run.require_finite(loss + held_out_loss, args.lr)
            run.epoch = epoch + 1
            past = {"loss": loss, "train_accuracy_pct": train_pct}
            run.history.append(
                {**past, "held_out_loss": held_out_loss, "held_out_accuracy_pct": held_out_pct}
            )
            if writer:
                run.save(held_out_loss)
                said = f"epoch {epoch + 1}: train loss {loss:.4f}, {train_pct:.2f} %, held-out loss {held_out_loss:.4f}"
                bar.write(f"{said}, {held_out_pct:.2f} %, {seconds:.2f} s", file=sys.stdout)
    finally:
        if step is not None:
            step.graph = None  # an exception keeps this frame, and NCCL would wait for ever for a graph of its own to go
        bar.close()


def make_config(
    args: argparse.Namespace, start: dict[str, Any], data: dataset.ImageData
) -> dict[str, Any]:
    """What a checkpoint holds besides weights: enough to rebuild the network, its images and the run without flags.

    A checkpoint's split and normalisation go on, so that its held-out images stay held out.
    """
    info = start.get("data")
    if not info:
        mean, std = dataset.channel_stats(data.train_images)
        info = {
            "dataset": data.name,
            "img_size": data.train_images.shape[1],
            "classes": list(data.classes),
            "digest": data.digest(),
            "split_seed": args.seed,
            "mean": mean,
            "std": std,
        }
    known = start.get("model", {})
    default_stem = "imagenet" if args.pretrain else "cifar"
    name, stem = flags.agreed_network(args, known.get("name"), known.get("stem"), default_stem)
    quantization = (
        infer.quantization_config(args, start.get("quantization")) if args.quantize else None
    )
    return {
        "model": {"name": name, "stem": stem, "num_classes": len(data.classes)},
        "data": info,
        "quantization": quantization,
        "start": start.get("start"),
        "seed": args.seed,
        "flags": {
            key: str(value.resolve()) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if key != "resume"
        },
    }


def make_model(
    args: argparse.Namespace, start: dict[str, Any], config: dict[str, Any], train: Batches
) -> nn.Module:
    """The network to train on the device of `train`: built, loaded, quantized and calibrated as the flags say."""
    torch.manual_seed(args.seed)
    if (
        args.quantize
        and "quantization" not in start
        and any(key.endswith(ckpt.RANGE_SUFFIX) for key in start["state"])
    ):
        raise UserError(
            f"--load_ckpt {args.load_ckpt}: ranges, but not what they are of; load train.py's checkpoint itself"
        )
    model = infer.build_quantized(config) if args.quantize else infer.build_float(config)
    if start:
        print(
            ckpt.load_weights(
                model, start["state"], allow_missing_ranges=args.quantize and args.partial_ckpt
            )
        )
    elif args.pretrain:
        models.load_imagenet_weights(model, config["model"]["name"])
    model.to(
        train.device,
        memory_format=torch.channels_last if train.device.type == "cuda" else torch.preserve_format,
    )
    if args.quantize:
        if not start.get("quantization"):
            infer.calibrate_model(model, config["quantization"], train)
            config["start"] = {
                key: value.detach().cpu().clone() for key, value in model.state_dict().items()
            }
        from utils.quantization.swap import audit  # float training needs no pytorch-quantization

        print(audit(model))
    return model


def train(
    args: argparse.Namespace, start: dict[str, Any], folder: Path, ranks: distributed.Ranks
) -> None:
    """Train as the flags say and test the best checkpoint."""
    data = infer.load_data(args, start.get("data", {}))
    config = make_config(args, start, data)
    info = config["data"]

    def batches(images: np.ndarray, labels: np.ndarray, **options: Any) -> Batches:
        return Batches(
            images, labels, info["mean"], info["std"], args.batch_size, ranks.device, **options
        )

    chosen, held_out = data.split(info["split_seed"])
    if not len(held_out[0]):
        raise UserError(
            f"{args.data_dir}: every class has one train image; add images: one to train on, one to hold out"
        )
    if args.batch_size % ranks.count:
        raise UserError(
            f"--batch_size {args.batch_size} is not a multiple of the {ranks.count} ranks"
        )
    if args.compile and ranks.count > 1:
        raise UserError("--compile: several ranks do not; drop it, or resume with --no_compile")
    model = make_model(args, start, config, batches(*chosen))
    distributed.share_model(model)
    run = Run(folder, model, make_optimizer(model, args.optimizer), config)
    if args.resume:
        load_optimizer(run.optimizer, start["optimizer"])
        run.epoch, run.best_loss, run.history = start["epoch"], start["best_loss"], start["history"]
        if ranks.rank == 0:
            run.tidy()
    elif args.quantize and ranks.rank == 0:
        run.save(math.inf)  # ckpt_0: calibrated, not yet fine-tuned; any epoch is better
    share = (ranks.rank, ranks.count)
    fit(
        run,
        batches(*chosen, augment=True, natural=data.natural, share=share),
        batches(*held_out),
        args,
    )
    if ranks.rank == 0:
        best = ckpt.load(folder / "ckpt_best")
        model.load_state_dict(best["state"])
        _, test_pct = evaluate(model, batches(data.test_images, data.test_labels))
        print(f"{folder}/ckpt_best is epoch {best['epoch']}: test accuracy {test_pct:.2f} %")


def main(argv: Sequence[str] | None = None) -> None:
    args, start = parse_flags(sys.argv[1:] if argv is None else argv)
    torch.backends.cudnn.benchmark = True
    with (
        distributed.joined() as ranks,
        contextlib.redirect_stdout(sys.stdout if ranks.rank == 0 else io.StringIO()),
    ):
        new = None if args.resume or ranks.rank else new_folder(args.output_dir, args.exp_name)
        folder = ckpt.latest(args.resume).parent if args.resume else distributed.from_first(new)
        print(f"experiment folder: {folder}", flush=True)
        try:
            with locked(folder) if ranks.rank == 0 else contextlib.nullcontext():
                train(args, start, folder, ranks)
        except (KeyboardInterrupt, torch.AcceleratorError) as error:
            what = (
                f"the GPU failed ({str(error).splitlines()[0]})" if str(error) else "interrupted"
            )  # Ctrl-C says nothing
            saved = any(folder.glob("ckpt_*"))
            mend = (
                f"continue with: python train.py --resume {shlex.quote(str(folder))}"
                if saved
                else "nothing was saved yet"
            )
            raise UserError(f"{what}; {mend}") from None
        finally:
            if ranks.rank == 0 and not any(folder.iterdir()):
                folder.rmdir()  # a run that failed before its first checkpoint leaves nothing, and frees its number
    if args.test_trt and ranks.rank == 0:
        infer.main(["--load_ckpt", str(folder / "ckpt_best"), *flags.handed_on(args)])


if __name__ == "__main__":
    run(main)
