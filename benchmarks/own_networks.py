#!/usr/bin/env python3
"""How fast networks of torchvision and timm are in INT8, beside FP16 and NVIDIA Model Optimizer.

    python benchmarks/own_networks.py export out/own --networks torchvision/resnet18 timm/dla34
    python benchmarks/own_networks.py peer out/own
    python benchmarks/own_networks.py measure out/own --batch_size 1 32 128 --record own.json

Each step may run where its package is installed: `export` needs torch, `peer` Model Optimizer and
`measure` TensorRT. The weights are random, with BatchNorm statistics that fit them: an engine's
speed does not depend on weights. All engines are built from one float graph, in one run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
from collections.abc import Iterator, Sequence

import numpy as np

from utils import records
from utils.backends.network import Layer, repeated
from utils.errors import run
from utils.files import user_path
from utils.flags import IMAGENET
from utils.manifest import INPUT, graph_file

NETWORKS = (
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/regnet_y_400mf",
    "timm/mobilenetv3_small_100",
    "timm/resnext50_32x4d",
)
CALIB_IMAGES = 32
MEAN, STD = IMAGENET
FP32, INT8 = graph_file("FP32"), graph_file("INT8-PTC")
OURS, PEER = "this_project", "modelopt"


def images_of(img_size: int) -> np.ndarray:
    """Random images (N, H, W, 3) uint8 to calibrate with."""
    shape = (CALIB_IMAGES, img_size, img_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def graphs(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Network, who quantized it, and path of each graph that was exported to `root`."""
    for path in sorted(root.glob("*/*/*/*.onnx")):
        if path.name in (FP32, INT8):
            yield str(path.parent.parent.relative_to(root)), path.parent.name, path


def export(args: argparse.Namespace) -> None:
    """Float and calibrated graphs of each network."""
    import torch
    from torch import nn

    import models
    from layers import Normalize
    from utils.quantization import calibrate, export_onnx, layer_table, quantize_modules
    from utils.quantization.modularize import modularize
    from utils.quantization.watch import example_images

    size = (args.img_size, args.img_size)
    images = Normalize(MEAN, STD)(torch.from_numpy(images_of(args.img_size)))
    for name in args.networks:
        torch.manual_seed(0)
        model = models.build(name, 1000, "imagenet")
        # statistics of one batch: without them activations would vanish in deep networks
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        with torch.no_grad():
            model.train()(images)
        model.eval()

        folder = args.folder / name / OURS
        folder.mkdir(parents=True, exist_ok=True)
        example = example_images(*size)
        modularize(model, example)
        export_onnx(model, folder / FP32, size, MEAN, STD)
        quantize_modules(model, example)
        calibrate(model, [images])
        export_onnx(model, folder / INT8, size, MEAN, STD)
        print(f"{name}: {layer_table(model, example).splitlines()[-1]}", flush=True)


def peer(args: argparse.Namespace) -> None:
    """The float graphs quantized by Model Optimizer's ONNX PTQ, by its own defaults."""
    for name, _, path in graphs(args.folder):
        if path.name != FP32:
            continue
        out = path.parent.with_name(PEER)
        out.mkdir(exist_ok=True)
        by_modelopt(path.parent, images_of(args.img_size), out, "entropy")
        print(f"{name}: quantized by Model Optimizer", flush=True)


def by_modelopt(folder: Path, images: np.ndarray, out: Path, method: str) -> None:
    """The float graph of `folder` quantized to `out`; images (N, H, W, 3) uint8 calibrate."""
    graph = folder / FP32
    # what a user writes
    from modelopt.onnx.quantization import quantize

    quantize(
        str(graph),
        quantize_mode="int8",
        calibration_data={INPUT: images},
        calibration_method=method,
        high_precision_dtype="fp32",  # the type of our graph for TensorRT 8.6 too
        output_path=str(out / INT8),
    )
    # up to here
    lower_opset(out / INT8)


def lower_opset(path: Path) -> None:
    """Let TensorRT 8.6 read a graph: it says opset 19, for INT8 means what 17 means, in place."""
    import onnx

    model = onnx.load(path)
    model.opset_import[0].version = 17
    model.ir_version = 8
    for node in model.graph.node:
        newer = [a for a in node.attribute if a.name in ("saturate", "output_dtype")]
        for attribute in newer:
            node.attribute.remove(attribute)
    onnx.save(model, path)


def measure(args: argparse.Namespace) -> None:
    """Engines of every graph, and the median time of each batch size."""
    from utils.backends.tensorrt_build import EngineOptions
    from utils.backends.tensorrt_run import TensorRTNetwork

    sizes = tuple(sorted(args.batch_size))
    rows = []
    for name, variant, path in graphs(args.folder):
        if name not in args.networks:
            continue
        precision = "FP16" if path.name == FP32 else "INT8-PTC"
        options = EngineOptions(precision, sizes, level=args.opt_level)
        timings = args.folder / "timings"
        engine = TensorRTNetwork(path.parent, options, np.empty(0, np.uint8), timings)
        times = {}
        for size in sizes:
            images = repeated(images_of(args.img_size), size)
            p50, p99 = np.percentile(engine.latencies_ms(images), (50, 99))
            times[size] = {"p50": float(p50), "p99": float(p99)}
        row = {"network": name, "variant": variant, "precision": precision, "latency_ms": times}
        row["layers"] = layer_rows(engine.layers, engine.layer_times_ms())
        rows.append(row)
        medians = {size: round(time["p50"], 4) for size, time in times.items()}
        print(name, variant, precision, medians, flush=True)
        # after each engine: the next one may take minutes
        write_record(args, rows)


def write_record(args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    flags = {"img_size": str(args.img_size), "opt_level": str(args.opt_level)}
    record = {
        "kind": "own_networks",
        "flags": flags,
        "commit": records.commit(),
        "environment": records.environment(["tensorrt"]),
        "rows": rows,
    }
    records.write(args.record, record, follow_link=True)


def layer_rows(layers: Sequence[Layer], times_ms: Sequence[float | None]) -> list[list[object]]:
    """Each layer of the largest batch size: type of its input, kind, name, its time alone in ms."""
    rows = []
    for layer, ms in zip(layers, times_ms, strict=True):
        rows.append([layer.precision, layer.kind, layer.name, ms])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("export", "peer", "measure"))
    parser.add_argument("folder", type=user_path, help="of the graphs")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--opt_level", type=int, default=2)
    parser.add_argument("--record", type=user_path, default=Path("own_networks.json"))
    args = parser.parse_args(argv)
    {"export": export, "peer": peer, "measure": measure}[args.step](args)


if __name__ == "__main__":
    run(main)
