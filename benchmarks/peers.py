#!/usr/bin/env python3
"""One float checkpoint, quantized by this project and by its peers: what each keeps, and how fast.

    python benchmarks/peers.py export CKPT out/peers
    python benchmarks/peers.py peer out/peers --package modelopt
    python benchmarks/peers.py evaluate out/peers
    python benchmarks/peers.py measure out/peers --backend tensorrt --batch_size 1 1024 --record R

Each step may run where its packages are installed. `export` and `evaluate` need this project's,
`peer` those of benchmarks/requirements-peers.txt in an environment of their own, and `measure`
NumPy and the back end. All start from one float graph and calibrate with the same train images.
TensorRT is 8.6: in later versions a graph's own types are the engine's, and these are FP32.

- pytorch-quantization is `quant_modules.initialize()` and what its manual does next.
- NNCF's graph is OpenVINO's, with unsigned codes that TensorRT does not take.
- torchao (PT2E) exports no ONNX: its network runs in PyTorch alone, and has no engine.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.own_networks import FP32, INT8, by_modelopt
from utils import records
from utils.backends.network import Network, repeated
from utils.errors import UserError, run
from utils.files import user_path
from utils.manifest import BATCH, INPUT, OUTPUT
from utils.metrics import percent_equal, sqnr_db

if TYPE_CHECKING:
    from torch import Tensor, nn

    from utils.checkpoint import Checkpoint

FLOAT = "float"
"""The folder of what all are quantized from."""
INT8_OPENVINO = "int8_ptc.xml"
GRAPHS = (INT8, INT8_OPENVINO, FP32)
CHECKPOINT = "ckpt"
"""A copy of the checkpoint, beside the float graph."""
FACTS, LOGITS, IMAGES, ABOUT = "facts.json", "logits.npy", "images.npz", "about.json"
"""Files of a folder: what is known of a graph, what it makes of the test images. Then of the root:
calibration images, test images and labels; network and data set."""

Run = Callable[[np.ndarray], np.ndarray]
"""Images (N, H, W, 3) uint8 -> logits (N, classes)."""

BATCH_SIZE = 128
"""Images at a time in calibration."""

START, END = "# what a user writes", "# up to here"


def user_lines(function: Callable[..., None]) -> int:
    """How many lines of code stand between the two marks in a function."""
    while isinstance(function, partial):
        function = function.func
    lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    between = lines[lines.index(START) + 1 : lines.index(END)]
    return sum(line != "" and not line.startswith("#") for line in between)


def note(folder: Path, **facts: object) -> None:
    """Add to what is known of a folder's graph."""
    records.write(folder / FACTS, {**facts_of(folder), **facts})


def facts_of(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    return records.read(path) if path.exists() else {}


def quantized(folder: Path, quantize: Callable[..., Run | None], *args: object) -> Run | None:
    """What one way to quantize returns; its time and lines are noted."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = quantize(*args)
    seconds = time.perf_counter() - start
    note(folder, calibration_s=seconds, user_lines=user_lines(quantize))
    print(f"{folder.name}: {seconds:.1f} s", flush=True)
    return result


# This project, and pytorch-quantization


@dataclass(frozen=True)
class Source:
    """What a user begins with: a float network and calibration images.

    Args:
        images: (N, 3, H, W), normalised.
        size: height and width in pixels.
    """

    checkpoint: Checkpoint
    images: Tensor
    size: tuple[int, int]

    def network(self) -> nn.Module:
        """The float network in evaluation mode."""
        from utils import checkpoint as ckpt
        from utils import networks

        model = networks.build_float(self.checkpoint.network, self.size)
        ckpt.load_weights(model, self.checkpoint.state)
        return model.eval()


def this_project(
    source: Source,
    model: nn.Module,
    path: Path,
    method: str = "sqnr",
    skip_layers: Sequence[str] = (),
) -> None:
    images, size = source.images, source.size
    mean, std = source.checkpoint.data.mean, source.checkpoint.data.std
    # what a user writes
    from utils.quantization import calibrate, export_onnx, quantize_modules

    quantize_modules(model, images[:2], skip_layers=skip_layers)
    calibrate(model, images.split(BATCH_SIZE), method)
    export_onnx(model, path, size, mean, std)
    # up to here


def pytorch_quantization(source: Source, model: nn.Module, path: Path, method: str) -> None:
    """As "Post training quantization" in its manual, on the network behind the normalisation."""
    import torch

    import models
    from layers import FromImages

    spec, data = source.checkpoint.network, source.checkpoint.data
    state, batches = model.state_dict(), source.images.split(BATCH_SIZE)
    example = torch.zeros(2, *source.size, 3, dtype=torch.uint8)
    # what a user writes
    from pytorch_quantization import quant_modules
    from pytorch_quantization.calib import MaxCalibrator
    from pytorch_quantization.nn import QuantConv2d, QuantLinear, TensorQuantizer
    from pytorch_quantization.tensor_quant import QuantDescriptor

    kind = "max" if method == "max" else "histogram"
    QuantConv2d.set_default_quant_desc_input(QuantDescriptor(calib_method=kind))
    QuantLinear.set_default_quant_desc_input(QuantDescriptor(calib_method=kind))
    quant_modules.initialize()
    model = models.build(spec.name, spec.num_classes, spec.stem).eval()
    quant_modules.deactivate()
    model.load_state_dict(state)
    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for images in batches:
            model(images)
    for quantizer in quantizers:
        if isinstance(quantizer._calibrator, MaxCalibrator):
            quantizer.load_calib_amax()
        else:
            quantizer.load_calib_amax(method, percentile=99.99)
        quantizer.disable_calib()
        quantizer.enable_quant()
    TensorQuantizer.use_fb_fake_quant = True
    torch.onnx.export(
        FromImages(model, data.mean, data.std).eval(),
        (example,),
        path,
        dynamo=False,
        opset_version=17,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
    )
    # up to here
    TensorQuantizer.use_fb_fake_quant = False


def export(args: argparse.Namespace) -> None:
    """The float graph, images, and what is quantized by the packages of this project."""
    import torch

    from layers import Normalize
    from utils import checkpoint as ckpt
    from utils import compare
    from utils.quantization.export import export_onnx

    checkpoint = ckpt.load_whole(args.checkpoint)
    info = checkpoint.data
    data = compare.load_data(info.dataset, args.data_dir, info.img_size, info)
    (train_images, _), _ = data.split(info.split_seed)
    images = train_images[: args.calib_images]
    normalised = Normalize(info.mean, info.std)(torch.from_numpy(images))
    source = Source(checkpoint, normalised, images.shape[1:3])

    folder = args.folder / FLOAT
    folder.mkdir(parents=True, exist_ok=True)
    about = {"network": str(checkpoint.network), "dataset": info.dataset}
    records.write(args.folder / ABOUT, {**about, "calib_images": len(images)})
    np.savez(args.folder / IMAGES, calib=images, test=data.test_images, labels=data.test_labels)

    shutil.copy(args.checkpoint, folder / CHECKPOINT)
    model = source.network()
    export_onnx(model, folder / FP32, source.size, info.mean, info.std)
    for name, quantize in own_ways(model, normalised[:2]).items():
        path = args.folder / name / INT8
        quantized(path.parent, quantize, source, source.network(), path)


def own_ways(model: nn.Module, example: Tensor) -> dict[str, Callable[..., None]]:
    """Folder -> a way to quantize.

    Args:
        example: normalised images (N, 3, H, W).
    """
    from utils.quantization.swap import is_quantizable
    from utils.quantization.watch import watch

    operations = watch(model, example).operations
    # the pool and the classifier come last
    last = [op.name for op in operations if is_quantizable(op.module)][-2:]
    return {
        "this_project_sqnr": this_project,
        "this_project_entropy": partial(this_project, method="entropy"),
        "this_project_max": partial(this_project, method="max"),
        "this_project_float_head": partial(this_project, skip_layers=last),
        "pytorch_quantization_percentile": partial(pytorch_quantization, method="percentile"),
        "pytorch_quantization_max": partial(pytorch_quantization, method="max"),
    }


# Peers in an environment of their own


def by_onnxruntime(folder: Path, images: np.ndarray, out: Path) -> None:
    """Its static quantization, with the options that its manual gives for TensorRT."""
    graph = folder / FP32
    # what a user writes
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, max(1, len(images) // BATCH_SIZE)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    quantize_static(
        graph,
        out / INT8,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,
        },
    )
    # up to here


def by_nncf(folder: Path, images: np.ndarray, out: Path) -> None:
    graph = folder / FP32
    # what a user writes
    import nncf
    import openvino

    batches = nncf.Dataset([image[None] for image in images])
    model = openvino.Core().read_model(graph)
    model = nncf.quantize(model, batches, subset_size=len(images))
    openvino.save_model(model, out / INT8_OPENVINO)
    # up to here


def by_torchao(folder: Path, images: np.ndarray, out: Path) -> Run:
    """PT2E for x86. The network is returned, for there is no file that others run."""
    import torch

    import models
    from layers import FromImages
    from utils import checkpoint as ckpt

    checkpoint = ckpt.load_whole(folder / CHECKPOINT)
    spec, data = checkpoint.network, checkpoint.data
    network = models.build(spec.name, spec.num_classes, spec.stem)
    network.load_state_dict(checkpoint.state)
    network = FromImages(network, data.mean, data.std).eval()
    batches = torch.from_numpy(images).split(BATCH_SIZE)
    # what a user writes
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    any_batch = ({0: torch.export.Dim("batch")},)
    # traced otherwise, no layer is recognised, and none quantized
    program = torch.export.export(network, (batches[0],), dynamic_shapes=any_batch, strict=True)
    model = prepare_pt2e(program.module(), quantizer)
    for batch in batches:
        model(batch)
    model = convert_pt2e(model)
    # up to here
    return lambda batch: model(torch.from_numpy(batch)).detach().numpy()


PEERS: dict[str, tuple[str, Callable[..., None]]] = {
    "modelopt_entropy": ("modelopt.onnx.quantization", partial(by_modelopt, method="entropy")),
    "modelopt_max": ("modelopt.onnx.quantization", partial(by_modelopt, method="max")),
    "onnxruntime": ("onnxruntime.quantization", by_onnxruntime),
    "nncf": ("nncf", by_nncf),
    "torchao": ("torchao.quantization.pt2e", by_torchao),
}
"""Folder -> module, and what quantizes by it."""


def peer(args: argparse.Namespace) -> None:
    """The float network quantized by another package, by its own defaults."""
    images = np.load(args.folder / IMAGES)
    for name, (module, quantize) in PEERS.items():
        if module.split(".")[0] != args.package:
            continue
        # before the clock runs
        importlib.import_module(module)
        folder = args.folder / name
        network = quantized(folder, quantize, args.folder / FLOAT, images["calib"], folder)
        if network is not None:
            np.save(folder / LOGITS, all_logits(network, images["test"]))


# What they keep


def folders(root: Path) -> list[Path]:
    """Those of the float network, first, and of what is made of it."""
    others = [path.parent for path in root.glob(f"*/{FACTS}") if path.parent.name != FLOAT]
    return [root / FLOAT, *sorted(others)]


def all_logits(network: Network | Run, images: np.ndarray) -> np.ndarray:
    """(N, classes) of all images, a batch at a time."""
    size = getattr(network, "evaluation_batch", BATCH_SIZE)
    stream = getattr(network, "stream", partial(map, network))
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    return np.concatenate(list(stream(batches)))


def scores(logits: np.ndarray, exact: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Accuracy, agreement in percent and signal-to-noise ratio in decibels of logits (N, classes).

    The ratio is None where there is no noise.

    Args:
        exact: the float network's.
    """
    predicted = logits.argmax(1)
    ratio_db = sqnr_db(exact.astype(np.float64), logits.astype(np.float64))
    return {
        "accuracy_pct": percent_equal(predicted, labels),
        "agreement_pct": percent_equal(predicted, exact.argmax(1)),
        "logits_sqnr_db": None if ratio_db == math.inf else ratio_db,
    }


def evaluate(args: argparse.Namespace) -> None:
    """What each graph keeps, by ONNX Runtime; OpenVINO's by OpenVINO, torchao's by PyTorch."""
    from utils.backends.onnxruntime import OnnxRuntimeNetwork
    from utils.backends.openvino import OpenVinoNetwork

    images = np.load(args.folder / IMAGES)
    test, labels = images["test"], images["labels"]
    exact = all_logits(OnnxRuntimeNetwork(args.folder / FLOAT / FP32), test)
    np.save(args.folder / FLOAT / LOGITS, exact)
    for folder in folders(args.folder):
        if folder.name == FLOAT:
            logits = exact
        elif (folder / INT8).exists():
            logits = all_logits(OnnxRuntimeNetwork(folder / INT8), test)
        elif (folder / INT8_OPENVINO).exists():
            logits = all_logits(OpenVinoNetwork(folder / INT8_OPENVINO), test)
        else:
            logits = np.load(folder / LOGITS)
        found = scores(logits, exact, labels)
        note(folder, **found)
        print(folder.name, found, flush=True)


# How fast they are


def opened(folder: Path, args: argparse.Namespace) -> Network | None:
    """A folder's graph on the back end; None if that cannot run it, and why is printed."""
    if not any(map(Path.exists, map(folder.joinpath, GRAPHS))):
        return None
    try:
        if args.backend == "tensorrt":
            from utils.backends.tensorrt_build import EngineOptions
            from utils.backends.tensorrt_run import TensorRTNetwork

            precision = "FP16" if folder.name == FLOAT else "INT8-PTC"
            options = EngineOptions(precision, tuple(args.batch_size), level=args.opt_level)
            calibration = np.empty(0, np.uint8)
            return TensorRTNetwork(folder, options, calibration, args.folder / "timings")
        from utils.backends.openvino import OpenVinoNetwork

        [graph] = [path for path in map(folder.joinpath, GRAPHS) if path.exists()]
        return OpenVinoNetwork(graph)
    except UserError as error:
        print(f"{folder.name}: no engine: {error}", flush=True)
        return None


def measure(args: argparse.Namespace) -> None:
    """Medians of each graph's times, all in one process and by turns."""
    args.batch_size.sort()
    if args.backend == "tensorrt" and not args.batch_size:
        raise UserError("--batch_size: TensorRT builds for at least one")
    images = np.load(args.folder / IMAGES)
    test, labels = images["test"], images["labels"]
    exact = np.load(args.folder / FLOAT / LOGITS)
    networks = {folder: opened(folder, args) for folder in folders(args.folder)}
    if not any(networks.values()):
        raise UserError(f"--backend {args.backend}: it runs none of these graphs here")

    # the clock of a chip drifts: each gets its share of every minute
    times_ms = defaultdict(list)
    for _ in range(args.rounds):
        for size in args.batch_size:
            batch = repeated(test, size)
            for folder, network in networks.items():
                if network is not None:
                    times_ms[folder, size] += network.latencies_ms(batch).tolist()

    rows = []
    for folder, network in networks.items():
        row = {"variant": folder.name, **facts_of(folder), "latency_ms": {}}
        if network is not None:
            for size in args.batch_size:
                p50, p99 = np.percentile(times_ms[folder, size], (50, 99))
                row["latency_ms"][size] = {"p50": float(p50), "p99": float(p99)}
            row["engine"] = scores(all_logits(network, test), exact, labels)
            row["layers"] = len(network.layers)
            row["int8_layers"] = sum(layer.precision == "INT8" for layer in network.layers)
        rows.append(row)
        print(folder.name, row["latency_ms"], row.get("engine"), flush=True)
    write_record(args, rows)


def write_record(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    flags = {"rounds": str(args.rounds)}
    if args.backend == "tensorrt":
        flags["opt_level"] = str(args.opt_level)
    record = {
        "kind": "peers",
        **records.read(args.folder / ABOUT),
        "backend": args.backend,
        "flags": flags,
        "commit": records.commit(),
        "environment": records.environment([args.backend]),
        "rows": rows,
    }
    records.write(args.record, record, follow_link=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    step = {}
    for function in (export, peer, evaluate, measure):
        step[function] = steps.add_parser(function.__name__, help=function.__doc__)
        step[function].set_defaults(function=function)
    step[export].add_argument("checkpoint", type=user_path, help="a float one of train.py")
    for parser_of in step.values():
        parser_of.add_argument("folder", type=user_path, help="of the graphs")
    step[export].add_argument("--data_dir", type=user_path, default=Path("data"))
    step[export].add_argument("--calib_images", type=int, default=512)
    packages = sorted({module.split(".")[0] for module, _ in PEERS.values()})
    step[peer].add_argument("--package", choices=packages, required=True)
    add = step[measure].add_argument
    add("--backend", choices=("tensorrt", "openvino"), default="tensorrt")
    add("--batch_size", type=int, nargs="*", default=[1, 128, 1024], help="none: no times")
    add("--opt_level", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--record", type=user_path, default=Path("peers.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    run(main)
