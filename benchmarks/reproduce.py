#!/usr/bin/env python3
"""The study behind the README's results: every model, several seeds, float, fine-tuned, calibrated, QAT, and engines.

    python benchmarks/reproduce.py --data_dir data --results out/results                        all of it: hours on one GPU
    python benchmarks/reproduce.py --m resnet18 --stem cifar --seeds 1 --results out/results    one row, in minutes

For each model, stem and seed: train in float (40 epochs), fine-tune that in float and in QAT (10 epochs each, at the same
rate), evaluate all of it and the calibrated network on the test set, export. ResNet-18's seeds and the first that is asked for
of every other model also become TensorRT engines. Each leaves one record in --results, and what is there is not done again. An
interrupted run goes on where it was as long as --work is there.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import infer
import models
import train
from benchmarks import tables as summary
from utils import flags, records
from utils.backends import network as measure
from utils.errors import UserError, run
from utils.files import locked
from utils.records import ROOT

BOTH_STEMS = ("resnet18", "resnet34", "resnet50")
ENGINES_OF_ALL_SEEDS = "resnet18"
BATCH_SIZES = ("1", "1024")
FINE_TUNED = "FP32-TUNED"
DECIDED = {
    "model",
    "stem",
    "dataset",
    "data_dir",
    "seed",
    "output_dir",
    "exp_name",
    "pretrain",
    "load_ckpt",
    "resume",
}
DECIDED |= {
    "quantize",
    "partial_ckpt",
    "num_epochs",
    "test_trt",
    "onnx",
    "onnx_dir",
    "export_only",
    "record",
}
"""Flags of train.py and infer.py that a study gives itself."""


def finished(folder: Path, num_epochs: int, data_dir: Path, argv: Sequence[str]) -> Path:
    """Train until `ckpt_<num_epochs>` is there, going on from what an interrupted run left; returns the best checkpoint.

    All other checkpoints are deleted: those of one study would fill a disk.
    """
    resumable = any(path.name != "ckpt_best" for path in folder.glob("ckpt_*"))
    if folder.exists() and not resumable:
        shutil.rmtree(folder)
    start = ["--resume", str(folder)] if resumable else [*argv, "--num_epochs", str(num_epochs)]
    train.main(
        [*start, "--data_dir", str(data_dir), "--od", str(folder.parent), "--en", folder.name]
    )
    for path in folder.glob("ckpt_*"):
        if path.name not in ("ckpt_best", f"ckpt_{num_epochs}"):
            path.unlink()
    return folder / "ckpt_best"


def in_float(words: Sequence[str]) -> list[str]:
    """The flags among `words` that training in float takes too: all but those that say how to quantize."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in flags.QUANTIZATION:
        parser.add_argument(f"--{name}", nargs="+")
    return parser.parse_known_args(words)[1]


def allowed(
    name: str, parser: argparse.ArgumentParser, words: Sequence[str], decided: Set[str]
) -> argparse.Namespace:
    """What `words`, the flag `name`, say to the script of that parser. Raises UserError for a flag that is decided."""
    given = parser.parse_args(words)
    taken = [
        f"--{key}"
        for key, value in vars(given).items()
        if key in decided and value != parser.get_default(key)
    ]
    if taken:
        raise UserError(f"{name}: {', '.join(taken)} must be left to the study")
    return given


def add_fine_tuned(onnx: Path, tuned: Path, draft: Path) -> None:
    """Put the fine-tuned float network, exported to `tuned`, into the export `onnx` and its record as one more PyTorch row."""
    (manifest, reference), (tuned_manifest, predictions) = (
        infer.read_export(folder) for folder in (onnx, tuned)
    )
    pct, float_pct = (content["rows"][0]["accuracy_pct"] for content in (tuned_manifest, manifest))
    agreement_pct = measure.percent_equal(predictions["FP32"], reference["FP32"])
    row = records.make_row("pytorch", FINE_TUNED, pct, pct - float_pct, agreement_pct)
    for path, content in ((onnx / infer.MANIFEST, manifest), (draft, records.read(draft))):
        records.write(path, {**content, "rows": [*content["rows"], row]})


def calibration_mode(python: str) -> str:
    """What TensorRT of that Python offers as --ptc_mode: "implicit" too, where it still has calibrators.

    Raises:
        UserError: it cannot run there.
    """
    probe = "from utils import errors; from utils.backends import tensorrt as t\n"
    probe += "errors.run(lambda: print(hasattr(t.require_gpu()[0], 'IInt8EntropyCalibrator2')))"
    try:
        done = subprocess.run([python, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--engine_python {python} cannot be run ({error.strerror})") from None
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise UserError(f"no engines with {python}: {said}; or leave them out with --no_engines")
    return "implicit" if done.stdout.strip() == "True" else "explicit"


def build_engines(args: argparse.Namespace, onnx: Path, record: Path) -> None:
    """Evaluate the export on TensorRT, in a process of the Python that has it, which need not have torch."""
    command = [
        args.engine_python,
        "infer.py",
        "--onnx",
        onnx.resolve(),
        "--data_dir",
        args.data_dir.resolve(),
    ]
    command += [
        "--backend",
        "tensorrt",
        "--FP16",
        "--INT8PTC",
        "--INT8QAT",
        "--ptc_mode",
        args.ptc_mode,
    ]
    command += ["--batch_size", *BATCH_SIZES, "--opt_level", args.opt_level]
    command += [
        "--timing_cache",
        args.work.resolve() / "timings",
        "--record",
        record.resolve(),
        *args.infer_flags,
    ]
    if subprocess.run([str(word) for word in command], cwd=ROOT).returncode:
        raise UserError(
            f"engines of {onnx} failed, see above; mend it and run again, or add --no_engines"
        )


def study(args: argparse.Namespace, model: str, stem: str, seed: int, engines: bool) -> None:
    """One record, unless it is there."""
    record = args.results / f"{model}_{stem}_seed{seed}.json"
    epochs = {"float": args.num_epochs, "fine-tuning": args.tune_epochs}
    if record.exists():
        there = records.read(record)
        wanted = {
            "dataset": args.dataset,
            "epochs": epochs,
            "train_flags": args.train_flags,
            "quantization": args.quantization,
        }
        made = {key: there.get(key) for key in wanted}
        if made != wanted:
            raise UserError(
                f"{record} is of another study ({made}, not {wanted}): choose other --results"
            )
        if engines and not any(row["backend"] == "tensorrt" for row in there["rows"]):
            raise UserError(
                f"{record} has no engines: choose other --results and the same --work, or add --no_engines"
            )
        print(f"{record} is there")
        return
    identity = [
        record.stem,
        args.dataset,
        str(args.num_epochs),
        str(args.tune_epochs),
        *args.train_flags,
    ]
    work = args.work / "_".join(identity).replace("/", "_")
    onnx, tuned_onnx, draft, clock = (
        work / name for name in ("onnx", "tuned_onnx", "record.json", "seconds.json")
    )
    seconds = records.read(clock) if clock.exists() else {}  # an interrupted study's go on

    def timed(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        print(f"== {record.stem}: {what}", flush=True)
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            seconds[what] = round(seconds.get(what, 0) + time.perf_counter() - started, 1)
            records.write(clock, seconds)

    def evaluate(checkpoint: Path, folder: Path, *words: str) -> None:
        sizes = BATCH_SIZES if engines else ()  # speeds are compared with those of engines
        paths = (
            "--load_ckpt",
            checkpoint,
            "--onnx_dir",
            folder,
            "--data_dir",
            args.data_dir,
            "--record",
            draft,
        )
        infer.main([*map(str, paths), "--export_only", "--batch_size", *sizes, *words])

    shared = ["--dataset", args.dataset, "--seed", str(seed)]
    plain, rounded = in_float(args.train_flags), [*args.train_flags, "--quantize", "--partial_ckpt"]
    new = ["--m", model, "--stem", stem, *shared, *plain]
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        best = timed("float", finished, work / "float", args.num_epochs, args.data_dir, new)
        going_on = ["--load_ckpt", str(best), *shared]
        tuned = timed(
            "fine-tuning",
            finished,
            work / "tuned",
            args.tune_epochs,
            args.data_dir,
            [*going_on, *plain],
        )
        qat = timed(
            "qat", finished, work / "qat", args.tune_epochs, args.data_dir, [*going_on, *rounded]
        )
        timed("evaluation of the fine-tuned", evaluate, tuned, tuned_onnx, "--FP16")
        timed("evaluation", evaluate, qat, onnx, "--INT8PTC", "--INT8QAT", *args.infer_flags)
        add_fine_tuned(onnx, tuned_onnx, draft)
        if engines:
            timed("engines", build_engines, args, onnx, draft)
        trained = {"epochs": epochs, "train_flags": args.train_flags, "seconds": seconds}
        records.write(record, {**records.read(draft), **trained})
        if not args.keep:
            shutil.rmtree(work)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--m",
        "--model",
        dest="models",
        nargs="+",
        choices=tuple(models.MODELS),
        default=tuple(models.MODELS),
    )
    add(
        "--stem",
        nargs="+",
        choices=("cifar", "imagenet"),
        default=("cifar", "imagenet"),
        help="ResNets have both",
    )
    add("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    add(
        "--first_seed",
        type=int,
        default=0,
        help="several processes can share a study (default: %(default)s)",
    )
    add("--num_epochs", type=int, default=40, help="of float training (default: %(default)s)")
    add(
        "--tune_epochs",
        type=int,
        default=10,
        help="of QAT and of float fine-tuning (default: %(default)s)",
    )
    add("--dataset", default="cifar10", choices=("cifar10", "digits"))
    add("--data_dir", type=Path, default=Path("data"))
    add("--results", type=Path, required=True, help="folder of the records")
    add(
        "--work",
        type=Path,
        default=Path("/tmp/reproduce"),
        help="folder of checkpoints and engines (default: %(default)s)",
    )
    add("--keep", action="store_true", help="keep each study's checkpoints and exports in --work")
    add(
        "--train_flags",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="more for train.py: --train_flags=--compile",
    )
    add(
        "--infer_flags",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="more for infer.py, such as '--torch_compile 128'",
    )
    add("--no_engines", action="store_true", help="PyTorch only")
    add(
        "--engine_python",
        default=sys.executable,
        help="Python that has TensorRT (default: this one)",
    )
    add(
        "--opt_level",
        type=int,
        choices=range(6),
        default=2,
        help="of TensorRT's builder (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    chosen = [
        (m, stem) for m in args.models for stem in args.stem if stem == "cifar" or m in BOTH_STEMS
    ]
    least = min(args.seeds, args.num_epochs, args.tune_epochs)
    if least < 1:
        raise UserError(f"--seeds, --num_epochs and --tune_epochs: at least 1, not {least}")
    if not chosen:
        raise UserError(f"only {', '.join(BOTH_STEMS)} are studied with the ImageNet stem")
    given = allowed(
        "--train_flags", train.build_parser(), args.train_flags, DECIDED
    )  # errors come before the work
    allowed(
        "--infer_flags", infer.build_parser(), args.infer_flags, DECIDED.union(flags.QUANTIZATION)
    )
    if given.optimizer == "muon":
        raise UserError(
            "--train_flags are for all three trainings: no muon, which trains from scratch only"
        )
    args.quantization = infer.quantization_config(given, None)
    args.ptc_mode = None if args.no_engines else calibration_mode(args.engine_python)
    started = time.perf_counter()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for model, stem in chosen:
            wanted = seed == args.first_seed or model == ENGINES_OF_ALL_SEEDS
            study(args, model, stem, seed, wanted and not args.no_engines)
    print(f"{time.perf_counter() - started:.0f} s")
    groups = summary.load(args.results)
    for table in (summary.accuracy_table, summary.engines_table, summary.speed_table):
        print(f"\n{table(groups)}")
    summary.plot(args.results)


if __name__ == "__main__":
    run(main)
