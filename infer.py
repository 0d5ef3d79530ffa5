#!/usr/bin/env python3
"""Export a checkpoint to ONNX, run it on a back end, and compare accuracy and speed in one table.

    python infer.py --m resnet18 --load_ckpt /tmp/pytorch_exp_1/ckpt_best --quantize --INT8QAT
    python infer.py --onnx /tmp/pytorch_exp_1/ckpt_best_onnx
    python infer.py --onnx /tmp/pytorch_exp_1/ckpt_best_onnx --predict IMAGE_OR_FOLDER ...

The first form needs torch: it rebuilds the networks from the checkpoint, evaluates them in PyTorch
and exports them. The second, which the first ends with, evaluates exported files and imports no
torch: it runs in a deployment container. Where the data set is missing, it measures times alone.
The third uses one of the networks: it prints the class of each image.
"""

from __future__ import annotations

from utils.errors import UserError, run  # first: it is ready for Ctrl-C during what follows

# isort: split
import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dataset
from dataset.folder import LeftOut, describe, printable, read_batches
from utils import compare, flags, records, report
from utils.compare import Comparison, comparison_refusals, tensorrt_flag
from utils.files import blocking_folder, locked, real_path, sha256, user_path
from utils.flags import Flags
from utils.manifest import PRECISIONS, Manifest, read_export
from utils.plot import plot
from utils.records import Choice, Record, Scan
from utils.specs import NetworkSpec, Quantization

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

DEFAULT = Comparison()
LARGEST_BATCH = 10**6
MAX_DROP = 0.1


def build_parser() -> argparse.ArgumentParser:
    parser = flags.make_parser(__doc__, tuple(dataset.LOADERS))
    add = parser.add_argument_group("export").add_argument
    add("--onnx", type=user_path, metavar="DIR", help="evaluate an earlier export; needs no torch")
    add("--onnx_dir", type=user_path, metavar="DIR", help="where to export (default: CKPT_onnx)")
    images = "print class and probability of each image, by one network of --onnx"
    add("--predict", type=user_path, nargs="+", metavar="IMAGE_OR_FOLDER", help=images)
    add("--export_only", action="store_true", help="run only PyTorch here, engines elsewhere")

    add = parser.add_argument_group("choice of layers").add_argument
    scan = "what INT8 in each layer and block costs, in PyTorch on val images; runs no engine"
    add("--sensitivity", action="store_true", help=scan)
    choose = "find --skip_layers that make the fastest engine within --max_drop, at one batch size"
    add("--auto_quant", action="store_true", help=choose)
    drop = f"val accuracy that --auto_quant may lose, in points (default: {MAX_DROP})"
    add("--max_drop", type=float, metavar="POINTS", help=drop)

    add = parser.add_argument_group("comparison").add_argument
    sizes = {"type": int, "default": DEFAULT.batch_sizes, "dest": "batch_sizes"}
    add("--batch_size", nargs="*", help="of latencies (default: 1 128; none: accuracy)", **sizes)
    compiled = "time PyTorch's FP16 too, eager and compiled, at these batch sizes"
    add("--torch_compile", type=int, nargs="+", default=(), metavar="B", help=compiled)
    audit = "list and time engine layers; fail if one meant for INT8 runs in another type"
    add("--audit", action="store_true", help=audit)
    add("--record", type=user_path, metavar="FILE", help="write the rows as JSON")
    add("--plot", type=user_path, metavar="FILE", help="plot accuracy against throughput as PNG")
    page = "write a page (HTML) of all that, of each layer, and of the images that INT8 changes"
    add("--report", type=user_path, metavar="FILE", help=page)

    add = parser.add_argument_group("TensorRT").add_argument
    rest = "what unquantized layers compute in (default: %(default)s)"
    add("--remainder", choices=("fp16", "fp32"), default=DEFAULT.remainder, help=rest)
    scratch = "limit of scratch memory (default: %(default)s)"
    add("--workspace_gb", type=float, default=DEFAULT.workspace_gb, help=scratch)
    level = "of the builder (default: %(default)s)"
    add("--opt_level", type=int, choices=range(6), default=DEFAULT.opt_level, help=level)
    tiling = "search for tiles that stay in the L2 cache, from TensorRT 10.8 on (default: 0, none)"
    add("--tiling_level", type=int, choices=range(4), default=DEFAULT.tiling_level, help=tiling)
    add("--l2_limit_mb", type=float, help="of the L2 cache for --tiling_level (default: all)")
    timings = "kernel timings to share between exports (default: each its own)"
    add("--timing_cache", type=user_path, metavar="DIR", help=timings)
    return parser


def predict_refusals(args: Flags) -> Iterator[str]:
    if not args.predict:
        return
    if not args.onnx:
        yield "--predict uses an export: name its folder with --onnx"
    measures = ("audit", "auto_quant", "sensitivity", "record", "plot", "report")
    found = flags.given(args, (*measures, "dataset", "data_dir", "img_size"))
    if args.ptc_mode == "implicit":
        found = "--ptc_mode implicit"
    if found:
        yield f"{found}: --predict measures nothing and reads no data set; drop it"
    if len(set(args.precisions or ())) > 1:
        yield "--predict uses one network: name one precision"


def run_refusals(args: Flags) -> Iterator[str]:
    sizes = [*args.batch_sizes, *args.torch_compile, 1]
    if not 1 <= min(sizes) <= max(sizes) <= LARGEST_BATCH:
        yield f"--batch_size and --torch_compile: at least 1, at most {LARGEST_BATCH}"
    if not 0 < args.workspace_gb <= 1024:
        yield "--workspace_gb: more than 0, at most 1024"
    limit = args.l2_limit_mb
    if limit is not None and not (args.tiling_level and 0 < limit <= 1024):
        yield "--l2_limit_mb: more than 0, at most 1024, and only with --tiling_level"
    outputs = [path for path in (args.record, args.plot, args.report) if path]
    if len({*map(real_path, outputs)}) < len(outputs):
        yield "--record, --plot and --report: two name one file; name another"
    for path in outputs:
        if path.is_dir():
            yield f"{path} is a folder: name a file in it"
        if folder := blocking_folder(path):
            yield f"{path} cannot be written: {folder} does not let you"
    if args.export_only and args.plot and args.batch_sizes is DEFAULT.batch_sizes:
        yield "--plot: --export_only times nothing unless --batch_size says so: name it"
    if args.export_only and (args.onnx or args.audit or tensorrt_flag(args)):
        yield "--export_only runs no engine: drop it, or --onnx, --audit and what is TensorRT's"


def source_refusals(args: Flags) -> Iterator[str]:
    if args.load_ckpt is None and tunes(args):
        yield f"{tunes(args)} needs torch and a checkpoint: name that by --load_ckpt"
    if (args.onnx is None) == (args.load_ckpt is None):
        yield "name a checkpoint with --load_ckpt, or files exported earlier with --onnx"
    if not args.onnx:
        return
    if not args.onnx.is_dir():
        yield f"--onnx {args.onnx} is no folder; make an export with infer.py --load_ckpt"
    if args.torch_compile:
        yield "--torch_compile: PyTorch runs before the export; name the checkpoint by --load_ckpt"
    if found := flags.given(args, (*flags.QUANTIZATION, "onnx_dir")):
        yield f"{found}: decided when the files were exported; drop it or export again"


def choice_refusals(args: Flags) -> Iterator[str]:
    named = args.precisions or ()
    wants_int8 = tunes(args) or flags.given(args, ["quantize"])
    if named and wants_int8 and not any(PRECISIONS[name].int8 for name in named):
        mend = "name --INT8PTC or --INT8QAT, or drop it"
        if args.auto_quant:
            mend = "name --INT8PTC, too"
        yield f"{wants_int8}: the precisions named are all float; {mend}"
    runs_engine = flags.given(args, ["audit", "plot", "report"]) or tensorrt_flag(args)
    if args.sensitivity and not args.auto_quant and runs_engine:
        yield f"{runs_engine}: --sensitivity runs no engine; drop one of them, or add --auto_quant"
    if args.sensitivity and args.export_only:
        yield "--sensitivity exports nothing: drop it, or --export_only"
    if args.auto_quant and (args.export_only or len(set(args.batch_sizes)) != 1):
        yield "--auto_quant times engines of one batch size: name it by --batch_size"
    if args.auto_quant and args.ptc_mode == "implicit":
        yield "--auto_quant: TensorRT's own calibration chooses layers itself; drop --ptc_mode"
    if args.auto_quant and "INT8-QAT" in named:
        yield "--auto_quant chooses layers before QAT: drop --INT8QAT"
    if args.max_drop is not None and not args.auto_quant:
        yield "--max_drop is of --auto_quant: add that, or drop it"
    if not 0 <= (args.max_drop or 0) <= 100:
        yield "--max_drop: 0 to 100 points"


REFUSALS = (comparison_refusals, predict_refusals, run_refusals, source_refusals, choice_refusals)
"""What infer.py's flags may not say, checked in this order."""


def tunes(args: Flags) -> str:
    """The flags given that look at single layers of a checkpoint's network."""
    return flags.given(args, ["auto_quant", "sensitivity"])


def read_checkpoint(args: Flags) -> tuple[Checkpoint, dataset.ImageData, Quantization]:
    """The checkpoint, the images that it was made with, and what to quantize of it."""
    import models  # needs torch, as all that is done with a checkpoint
    from utils import checkpoint as ckpt

    checkpoint = ckpt.load_whole(args.load_ckpt)
    name, _ = flags.agreed_network(args, checkpoint.network)
    flags.require_named(name, args.model)
    models.require(name)
    stored = checkpoint.quantization
    if args.auto_quant and stored is not None and checkpoint.epoch > 0:
        raise UserError("--auto_quant: this checkpoint went through QAT; name the float one")
    if stored is not None and checkpoint.epoch == 0:
        # what the flags say, and the checkpoint where they say nothing
        wanted = dict(vars(stored))
        for flag in wanted:
            if getattr(args, flag) is not None:
                wanted[flag] = getattr(args, flag)
        if args.auto_quant or wanted != vars(stored):
            # only calibrated, so its weights are the float network's: as if the flags had said all
            state = ckpt.without_ranges(checkpoint.state)
            checkpoint = replace(checkpoint, state=state, quantization=None, ptq_state=None)
            vars(args).update(wanted)
    quantization = flags.agreed_quantization(args, checkpoint.quantization)
    if "INT8-QAT" in (args.precisions or ()) and checkpoint.quantization is None:
        mend = "fine-tune it with train.py --quantize first"
        raise UserError(f"--INT8QAT: this is a float checkpoint; {mend}")

    images, img_size = flags.agreed_images(args, checkpoint.data)
    data_dir = flags.agreed_data_dir(args, checkpoint.recipe.get("data_dir"))
    data = compare.load_data(images, data_dir, img_size, checkpoint.data, other_images=True)
    return checkpoint, data, quantization


def tune(
    args: Flags,
    comparison: Comparison,
    folder: Path,
    checkpoint: Checkpoint,
    data: dataset.ImageData,
    quantization: Quantization,
) -> tuple[Scan, Choice | None]:
    """Scan the checkpoint's layers and print that; with --auto_quant also choose.

    A choice is made by setting flags as by hand: `args.skip_layers` and, if float wins,
    `args.precisions`. Without one the scan is all that there is, and is recorded here.
    """
    from utils.auto_quant import Tuner, choice_table
    from utils.quantization.sensitivity import scan_table

    tuner = Tuner(checkpoint, sha256(args.load_ckpt), data, quantization, comparison, folder)
    scan = tuner.scan()
    if args.sensitivity:
        print(scan_table(scan), flush=True)
    choice: Choice | None = None
    if args.auto_quant:
        choice = tuner.choose(scan, MAX_DROP if args.max_drop is None else args.max_drop)
        print(choice_table(choice, len(tuner.val[0])))
        args.skip_layers = [*quantization.skip_layers, *choice.skip_layers] or None
        by_hand = "no --skip_layers"
        if args.skip_layers:
            by_hand = f"--skip_layers {shlex.join(args.skip_layers)}"
        if choice.skip_layers == ["*"]:
            args.precisions = list(tuner.floats)
            for name in tuner.floats:
                by_hand += f" --{PRECISIONS[name].flag}"
        print(f"the same by hand: {by_hand}", flush=True)
    else:
        write_record(args, tuner.record(scan, flag_values(args)))
    return scan, choice


def require_network(args: Flags, manifest: Manifest) -> None:
    """Raises UserError if a flag names another network than the export's."""
    network = NetworkSpec(manifest.model, manifest.stem, len(manifest.data.classes))
    flags.agreed_network(args, network)


def load_exported(args: Flags, manifest: Manifest) -> dataset.ImageData | None:
    """The images that an earlier export was made with; None: there are none, which is said.

    Raises:
        UserError: there are none, and accuracies alone are asked for.
    """
    require_network(args, manifest)
    name, img_size = flags.agreed_images(args, manifest.data)
    data_dir = flags.agreed_data_dir(args, None)
    missing = dataset.missing(name, data_dir)
    # a folder that is named must have them
    if args.data_dir or not missing:
        # train images are for TensorRT's own calibration alone
        digest = None if args.ptc_mode == "implicit" else manifest.test_digest
        known, mend = manifest.data, "export again"
        return compare.load_data(name, data_dir, img_size, known, mend=mend, test_digest=digest)
    if not args.batch_sizes and not args.audit:
        raise UserError(f"{missing}: name their folder by --data_dir, or a --batch_size to time")
    print(f"{missing}: times are of random images, accuracies are left out (see --data_dir)")
    return None


def predict(args: Flags, comparison: Comparison) -> None:
    """Print class and probability of each image that --predict names.

    Raises:
        UserError: there are none, or some cannot be used; the others are predicted.
    """
    # others may export there once the network is loaded
    with locked(args.onnx):
        manifest, _ = read_export(args.onnx)
        require_network(args, manifest)
        network, precision = compare.load_network(args.onnx, manifest, comparison)

    # one line for each image, as soon as it is predicted
    left_out: LeftOut = defaultdict(list)
    refused: list[str] = []
    size, batch_size = manifest.data.size, network.evaluation_batch
    batches = read_batches(args.predict, size, batch_size, left_out, refused)
    classes = [printable(name) for name in manifest.data.classes]
    width = max(map(len, classes))
    count = 0
    for path, label, probability in compare.classified(network, batches, len(classes)):
        print(f"{classes[label]:{width}}  {probability:7.2%}  {printable(str(path))}")
        count += 1
    used = f"{network.name} {precision}"
    print(f"images predicted by {used}: {count}{describe(left_out)}", flush=True)

    # what cannot be used
    for line in refused:
        print(printable(line), file=sys.stderr)
    if refused:
        raise UserError(f"--predict: {len(refused)} of its files cannot be used; mend or drop them")
    if count == 0:
        raise UserError("--predict: there are no images; name a file or a folder of images")


def flag_values(args: Flags) -> dict[str, str]:
    """What a record says of the command line: every flag with a value, but for paths."""
    words = {}
    for name, value in vars(args).items():
        # by identity, as 0 equals False; a list without entries says nothing
        absent = value is None or value is False or value in ((), [])
        if not absent and not isinstance(value, Path):
            words[name] = str(value)
    return words


def write_record(args: Flags, record: Record) -> None:
    if args.record:
        records.write(args.record, record, follow_link=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    flags.refuse(REFUSALS, args)
    if args.export_only and args.batch_sizes is DEFAULT.batch_sizes:
        args.batch_sizes = ()  # times belong to where the export will run
    comparison = Comparison.of(args)
    if args.predict:
        predict(args, comparison)
        return

    # the files, then what a back end makes of them; nobody else may export there meanwhile
    folder = args.onnx or args.onnx_dir or compare.export_folder(args.load_ckpt)
    rows, engines = [], []
    scan: Scan | None = None
    choice: Choice | None = None
    with locked(folder, make=not args.onnx):
        if not args.onnx:
            checkpoint, data, quantization = read_checkpoint(args)
            if tunes(args):
                scan, choice = tune(args, comparison, folder, checkpoint, data, quantization)
                if not args.auto_quant:
                    return
                # as its choice has set the flags
                comparison = Comparison.of(args)
                quantization = flags.agreed_quantization(args, checkpoint.quantization)
            compare.export_checkpoint(checkpoint, data, quantization, comparison, folder)
        manifest, predictions = read_export(folder)
        if args.onnx:
            data = load_exported(args, manifest)
        if not args.export_only:
            rows, engines = compare.evaluate_export(folder, manifest, predictions, data, comparison)
        record = compare.make_record(manifest, rows, flag_values(args), engines)
        record = replace(record, sensitivity=scan, choice=choice)

    # the table comes before the files, which may fail to be written
    compare.print_record(record)
    write_record(args, record)
    if args.plot:
        plot(args.plot, record)
    if args.report:
        report.write(args.report, record, manifest, predictions, data)
    complaints = []
    for engine in engines:
        complaints += [f"{engine.precision}: {node}" for node in engine.missed]
    if args.audit and complaints:
        raise UserError(
            f"--audit: meant for INT8, but not seen to run in it: {'; '.join(complaints)}"
        )


if __name__ == "__main__":
    run(main)
