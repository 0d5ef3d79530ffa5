#!/usr/bin/env python3
"""What INT8 gains on a CPU: every network in FP32 and INT8, by OpenVINO and by ONNX Runtime.

    python benchmarks/cpu_speed.py --results results/<date>_cpu_openvino-<version>

Leaves a record of each network. What is there is not done again. A network is trained for one epoch
on scikit-learn's digits and calibrated: its accuracy counts for nothing, its times do not depend on
it, and its agreement with fake quantization is that of a network with trained statistics. Let
nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import infer
import train
from benchmarks import tables
from benchmarks.reproduce import BOTH_STEMS
from models import MODELS
from utils import compare, records
from utils.backends.openvino import OpenVinoNetwork, core
from utils.compare import Comparison
from utils.errors import run
from utils.manifest import graph_file, read_export
from utils.records import Row
from utils.specs import STEMS

BACKENDS = ("openvino", "onnxruntime")
PRECISIONS = ("FP32", "INT8-PTC")
BATCH_SIZES = (1, 128)
BFLOAT16 = {"INFERENCE_PRECISION_HINT": "bf16"}


def exported(model: str, stem: str, epochs: int, work: Path) -> Path:
    """The export of a network that is trained and calibrated on digits."""
    words = f"--m {model} --stem {stem} --dataset digits --num_epochs {epochs} --batch_size 64"
    train.main([*words.split(), "--od", str(work), "--en", "float"])
    checkpoint = work / "float" / "ckpt_best"
    infer.main(["--load_ckpt", str(checkpoint), "--FP32", "--INT8PTC", "--export_only"])
    return compare.export_folder(checkpoint)


def measured(folder: Path, batch_sizes: Sequence[int]) -> records.Record:
    """A record of an export on both back ends."""
    manifest, predictions = read_export(folder)
    data = compare.load_data(manifest.data.dataset, Path("data"), None, manifest.data)
    rows: list[Row] = []
    for backend in BACKENDS:
        comparison = Comparison(PRECISIONS, backend, batch_sizes=batch_sizes)
        found, _ = compare.evaluate_export(folder, manifest, predictions, data, comparison)
        rows += found

    # what OpenVINO makes of the float network by default, where the CPU has bfloat16
    if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        network = OpenVinoNetwork(folder / graph_file("FP32"), BFLOAT16)
        images, labels = data.test_images, data.test_labels
        rows += compare.evaluate_network(network, "BF16", images, labels, predictions, batch_sizes)
    return compare.make_record(manifest, rows, {"batch_sizes": str(list(batch_sizes))})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--m", "--model", dest="models", nargs="+", choices=MODELS, default=tuple(MODELS))
    add("--stem", nargs="+", choices=STEMS, default=STEMS, help="ResNets have both")
    add("--num_epochs", type=int, default=1, help="of training (default: %(default)s)")
    add("--batch_size", dest="batch_sizes", nargs="+", type=int, default=BATCH_SIZES)
    add("--results", type=Path, required=True, help="folder of the records")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for model in args.models:
        for stem in args.stem:
            path = args.results / f"{model}_{stem}_digits_seed0.json"
            if path.exists() or (stem == "imagenet" and model not in BOTH_STEMS):
                continue
            with tempfile.TemporaryDirectory() as work:
                folder = exported(model, stem, args.num_epochs, Path(work))
                records.write(path, measured(folder, args.batch_sizes))
    print(tables.cpu_table(tables.load(args.results)))


if __name__ == "__main__":
    run(main)
