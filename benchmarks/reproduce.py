#!/usr/bin/env python3
"""The study behind the results: every network, several seeds, float, PTQ, QAT, and engines.

    python benchmarks/reproduce.py --results out/results                     hours on one GPU
    python benchmarks/reproduce.py --results out/results --seeds 1 --m resnet18 --stem cifar

For each model, stem and seed: train in float for 40 epochs; fine-tune that in float and in QAT, for
10 epochs each at the same learning rate; evaluate all of it and the calibrated network on the test
set; export. ResNet-18 of each seed, and of every other model the first seed that is asked for, also
become TensorRT engines. Each leaves one record in --results. What is there is not done again. An
interrupted study goes on where it was as long as --work is there.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import infer
import models
import train
from benchmarks import tables
from utils import checkpoint as ckpt
from utils import compare, flags, networks, records
from utils.compare import Comparison
from utils.device import default_device
from utils.errors import UserError, run
from utils.files import locked
from utils.manifest import MANIFEST, read_export
from utils.metrics import percent_equal
from utils.specs import STEMS, Quantization
from utils.training.run import BEST

BOTH_STEMS = ("resnet18", "resnet34", "resnet50")
ENGINES_OF_ALL_SEEDS = "resnet18"
BATCH_SIZES = ("1", "1024")
FINE_TUNED = "FP32-TUNED"

SUBJECT = ("model", "stem", "dataset", "data_dir", "seed", "num_epochs")
START = ("quantize", "pretrain", "load_ckpt", "partial_ckpt", "new_classifier", "resume")
OUTPUT = ("output_dir", "exp_name", "test_trt", "onnx", "onnx_dir", "export_only", "record")
DECIDED = (*SUBJECT, *START, *OUTPUT, "list_layers")
"""Flags of train.py and infer.py that a study gives itself."""


@dataclass(frozen=True)
class Plan:
    """What all records of a study have in common.

    Args:
        results, work: folders of the records, and of checkpoints, exports and kernel timings.
        keep: whether a finished record's folder in `work` stays.
        num_epochs, tune_epochs: of float training; of QAT and of float fine-tuning.
        train_flags, infer_flags: more for train.py and infer.py.
        quantization: what `train_flags` make of it.
        engine_python: the Python that has TensorRT.
        ptc_mode, opt_level: of engines, as infer.py's flags; `ptc_mode` None: there are none.
    """

    results: Path
    work: Path
    keep: bool
    dataset: str
    data_dir: Path
    num_epochs: int
    tune_epochs: int
    train_flags: list[str]
    infer_flags: list[str]
    quantization: Quantization
    engine_python: str
    ptc_mode: str | None
    opt_level: int

    @property
    def identity(self) -> dict[str, Any]:
        """What a record says of its study. Records that differ in it are not of one study."""
        return {
            "dataset": self.dataset,
            "epochs": {"float": self.num_epochs, "fine-tuning": self.tune_epochs},
            "train_flags": self.train_flags,
            "quantization": asdict(self.quantization),
        }


class Study:
    """One network with one seed, from its training to its record.

    Args:
        engines: whether TensorRT runs it too.
    """

    def __init__(self, plan: Plan, model: str, stem: str, seed: int, engines: bool):
        self.plan = plan
        self.model = model
        self.stem = stem
        self.seed = seed
        self.engines = engines
        self.record = plan.results / f"{model}_{stem}_seed{seed}.json"

        # other epochs or flags are other work
        words = [self.record.stem, plan.dataset, str(plan.num_epochs), str(plan.tune_epochs)]
        self.work = plan.work / "_".join([*words, *plan.train_flags]).replace("/", "_")
        self.onnx = self.work / "onnx"
        self.draft = self.work / "record.json"
        self.clock = self.work / "seconds.json"

    def run(self) -> None:
        """Leave one record, unless it is there.

        Raises:
            UserError: what is there is of another study or lacks engines; or training, export or
                engines failed.
        """
        if self.record.exists():
            self.require_same()
            print(f"{self.record} is there")
            return
        self.work.mkdir(parents=True, exist_ok=True)
        with locked(self.work):
            tuned, qat = self.train()
            self.evaluate(tuned, qat)
            content = {**records.read(self.draft), **self.plan.identity, "seconds": self.seconds()}
            records.write(self.record, content)
            if not self.plan.keep:
                shutil.rmtree(self.work)

    def require_same(self) -> None:
        """Raises UserError unless the record that is there is what `run` would leave."""
        there = records.read(self.record)
        wanted = self.plan.identity
        made = {key: there.get(key) for key in wanted}
        if made != wanted:
            raise UserError(
                f"{self.record} is of another study ({made}, not {wanted}): choose other --results"
            )
        backends = {row["backend"] for row in there["rows"]}
        if self.engines and "tensorrt" not in backends:
            raise UserError(
                f"{self.record} has no engines: choose other --results and the same --work, or "
                "add --no_engines"
            )

    def train(self) -> tuple[Path, Path]:
        """The best checkpoints of fine-tuning in float and of QAT, after training in float."""
        plan = self.plan
        shared = ["--dataset", plan.dataset, "--seed", str(self.seed)]
        # flags that say how to quantize are for QAT alone
        in_float = without(flags.QUANTIZATION, plan.train_flags)
        new = ["--m", self.model, "--stem", self.stem]
        with self.timed("float"):
            argv = [*new, *shared, *in_float]
            best = finished(self.work / "float", plan.num_epochs, plan.data_dir, argv)

        going_on = ["--load_ckpt", str(best), *shared]
        with self.timed("fine-tuning"):
            argv = [*going_on, *in_float]
            tuned = finished(self.work / "tuned", plan.tune_epochs, plan.data_dir, argv)

        with self.timed("qat"):
            argv = [*going_on, *plan.train_flags, "--quantize", "--partial_ckpt"]
            qat = finished(self.work / "qat", plan.tune_epochs, plan.data_dir, argv)
        return tuned, qat

    def evaluate(self, tuned: Path, qat: Path) -> None:
        """Export the QAT checkpoint and draft the record: PyTorch's rows, then TensorRT's."""
        # speeds are compared with those of engines
        sizes = BATCH_SIZES if self.engines else ()
        paths = ["--load_ckpt", qat, "--onnx_dir", self.onnx, "--record", self.draft]
        words = ["--export_only", "--batch_size", *sizes, "--INT8PTC", "--INT8QAT"]
        with self.timed("evaluation"):
            argv = [*paths, "--data_dir", self.plan.data_dir, *words, *self.plan.infer_flags]
            infer.main([str(word) for word in argv])
        with self.timed("evaluation of the fine-tuned"):
            add_fine_tuned(self.onnx, tuned, self.draft, self.plan.data_dir)
        if self.engines:
            with self.timed("engines"):
                build_engines(self.plan, self.onnx, self.draft)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Write down how long a stage takes, in all: an interrupted study goes on."""
        print(f"== {self.record.stem}: {stage}", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds()
            taken = seconds.get(stage, 0) + time.perf_counter() - started
            records.write(self.clock, {**seconds, stage: round(taken, 1)})

    def seconds(self) -> dict[str, float]:
        """Wall time of each stage so far."""
        return records.read(self.clock) if self.clock.exists() else {}


def finished(folder: Path, num_epochs: int, data_dir: Path, argv: Sequence[str]) -> Path:
    """Train until `ckpt_<num_epochs>` is there, going on from what an interrupted run left.

    Returns the best checkpoint.
    """
    resumable = any(path.name != BEST for path in folder.glob("ckpt_*"))
    if resumable:
        start = ["--resume", str(folder)]
    else:
        start = [*argv, "--num_epochs", str(num_epochs)]
        start += ["--od", str(folder.parent), "--en", folder.name]
        # killed before its first checkpoint was whole
        if folder.exists():
            shutil.rmtree(folder)
    train.main([*start, "--data_dir", str(data_dir)])
    return folder / BEST


def without(names: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words of a command line but for the flags of these names and their values."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="+")
    _, others = parser.parse_known_args(words)
    return others


def add_fine_tuned(onnx: Path, tuned: Path, draft: Path, data_dir: Path) -> None:
    """Put the fine-tuned float network into an export and its record, as one more PyTorch row."""
    checkpoint = ckpt.load_whole(tuned)
    info = checkpoint.data
    data = compare.load_data(info.dataset, data_dir, info.img_size, info, other_images=True)
    model = networks.build_float(checkpoint.network, info.size)
    ckpt.load_weights(model, checkpoint.state)
    model.to(default_device())
    rows, predictions = compare.evaluate_in_pytorch(
        {"FP32": model}, data, info, Comparison(batch_sizes=())
    )

    # against the network that it was fine-tuned from
    manifest, reference = read_export(onnx)
    row = rows[0]
    row.precision = FINE_TUNED
    row.delta_pct = row.accuracy_pct - manifest.rows[0].accuracy_pct
    row.agreement_pct = percent_equal(predictions["FP32"], reference["FP32"])

    manifest.rows.append(row)
    records.write(onnx / MANIFEST, manifest)
    record = records.read(draft)
    record["rows"].append(asdict(row))
    records.write(draft, record)


def calibration_mode(python: str) -> str:
    """What TensorRT of that Python offers as --ptc_mode.

    "implicit", which is both, where it still has calibrators, else "explicit".

    Raises:
        UserError: it cannot run there.
    """
    probe = (
        "from utils import errors\n"
        "from utils.backends.tensorrt_build import require_gpu\n"
        "errors.run(lambda: print(hasattr(require_gpu()[0], 'IInt8EntropyCalibrator2')))"
    )
    try:
        done = subprocess.run(
            [python, "-c", probe], cwd=records.ROOT, capture_output=True, text=True
        )
    except OSError as error:
        raise UserError(f"--engine_python {python} cannot be run ({error.strerror})") from None
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise UserError(f"no engines with {python}: {said}; or leave them out with --no_engines")
    return "implicit" if done.stdout.strip() == "True" else "explicit"


def build_engines(plan: Plan, onnx: Path, record: Path) -> None:
    """Evaluate the export on TensorRT and write its record.

    In a process of the Python that has TensorRT, which need not have torch.
    """
    command = [plan.engine_python, "infer.py", "--backend", "tensorrt"]
    command += ["--onnx", onnx.resolve(), "--data_dir", plan.data_dir.resolve()]
    command += ["--FP16", "--INT8PTC", "--INT8QAT", "--ptc_mode", plan.ptc_mode]
    command += ["--batch_size", *BATCH_SIZES, "--opt_level", plan.opt_level]
    command += ["--timing_cache", plan.work.resolve() / "timings"]
    # PyTorch has run before the export
    command += ["--record", record.resolve(), *without(["torch_compile"], plan.infer_flags)]
    if subprocess.run([str(word) for word in command], cwd=records.ROOT).returncode:
        raise UserError(
            f"engines of {onnx} failed, see above; mend it and run again, or add --no_engines"
        )


def parse_flags(
    flag: str, parser: argparse.ArgumentParser, words: Sequence[str], decided: Sequence[str]
) -> argparse.Namespace:
    """What `words`, the value of `flag`, say to the script of that parser.

    Raises:
        UserError: one of them is `decided` by the study.
    """
    given = parser.parse_args(words)
    taken = []
    for name in decided:
        if getattr(given, name, None) != parser.get_default(name):
            taken.append(f"--{name}")
    if taken:
        raise UserError(f"{flag}: {', '.join(taken)} must be left to the study")
    return given


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that the command line means, checked whole: errors come before the work.

    Raises:
        UserError: a flag that a study cannot take, or no TensorRT to build engines with.
    """
    least = min(args.seeds, args.num_epochs, args.tune_epochs)
    if least < 1:
        raise UserError(f"--seeds, --num_epochs and --tune_epochs: at least 1, not {least}")
    given = parse_flags("--train_flags", train.build_parser(), args.train_flags, DECIDED)
    if given.optimizer == "muon":
        raise UserError(
            "--train_flags are for all three trainings: no muon, which trains from scratch only"
        )
    decided = (*DECIDED, *flags.QUANTIZATION)
    parse_flags("--infer_flags", infer.build_parser(), args.infer_flags, decided)

    ptc_mode = None if args.no_engines else calibration_mode(args.engine_python)
    if ptc_mode and args.no_implicit:
        ptc_mode = "explicit"
    return Plan(
        results=args.results,
        work=args.work,
        keep=args.keep,
        dataset=args.dataset,
        data_dir=args.data_dir,
        num_epochs=args.num_epochs,
        tune_epochs=args.tune_epochs,
        train_flags=args.train_flags,
        infer_flags=args.infer_flags,
        quantization=flags.agreed_quantization(given, None),
        engine_python=args.engine_python,
        ptc_mode=ptc_mode,
        opt_level=args.opt_level,
    )


def studies(plan: Plan, args: argparse.Namespace) -> list[Study]:
    """Every network for the first seed, then for the next.

    Raises:
        UserError: there are none.
    """
    found = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for model in args.models:
            wanted = seed == args.first_seed or model == ENGINES_OF_ALL_SEEDS
            engines = wanted and plan.ptc_mode is not None
            for stem in args.stem:
                if stem == "cifar" or model in BOTH_STEMS:
                    found.append(Study(plan, model, stem, seed, engines))
    if not found:
        raise UserError(f"only {', '.join(BOTH_STEMS)} are studied with the ImageNet stem")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = tuple(models.MODELS)
    add = parser.add_argument_group("what is studied").add_argument
    add("--m", "--model", dest="models", nargs="+", choices=every, default=every)
    add("--stem", nargs="+", choices=STEMS, default=STEMS, help="ResNets have both")
    add("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    add("--first_seed", type=int, default=0, help="where several processes share a study")
    add("--dataset", default="cifar10", choices=("cifar10", "digits"))
    add("--data_dir", type=Path, default=Path("data"))
    add("--num_epochs", type=int, default=40, help="of float training (default: %(default)s)")
    tuning = "of QAT and of float fine-tuning (default: %(default)s)"
    add("--tune_epochs", type=int, default=10, help=tuning)
    more = {"type": shlex.split, "default": [], "metavar": "FLAGS"}
    add("--train_flags", **more, help="more for train.py: --train_flags=--optimizer=sgd")
    add("--infer_flags", **more, help="more for infer.py, such as '--torch_compile 128'")

    add = parser.add_argument_group("engines").add_argument
    add("--no_engines", action="store_true", help="PyTorch only")
    implicit = "without TensorRT's own calibration, which takes minutes a network"
    add("--no_implicit", action="store_true", help=implicit)
    python = "Python that has TensorRT (default: this one)"
    add("--engine_python", default=sys.executable, help=python)
    level = "of TensorRT's builder (default: %(default)s)"
    add("--opt_level", type=int, choices=range(6), default=2, help=level)

    add = parser.add_argument_group("output").add_argument
    add("--results", type=Path, required=True, help="folder of the records")
    work = "folder of checkpoints and engines (default: %(default)s)"
    add("--work", type=Path, default=Path("/tmp/reproduce"), help=work)
    add("--keep", action="store_true", help="keep each study's checkpoints and exports in --work")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    plan = make_plan(args)
    started = time.perf_counter()
    for study in studies(plan, args):
        study.run()
    print(f"{time.perf_counter() - started:.0f} s")
    groups = tables.load(plan.results)
    for table in (tables.accuracy_table, tables.engines_table, tables.speed_table):
        print(f"\n{table(groups)}")
    tables.plot(plan.results)


if __name__ == "__main__":
    run(main)
