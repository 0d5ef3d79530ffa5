#!/usr/bin/env python3
"""Export a checkpoint to ONNX, run it on every back end there is, and compare accuracy and speed in one table.

    python infer.py --m resnet18 --load_ckpt /tmp/pytorch_exp_1/ckpt_best --quantize --INT8QAT
    python infer.py --onnx /tmp/pytorch_exp_1/ckpt_best_onnx

The first form needs torch: it rebuilds the networks from the checkpoint, evaluates them in PyTorch and exports them. The
second, which the first ends with, evaluates exported files and imports no torch: it runs in a deployment container.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import dataset
from utils import flags, records
from utils.backends import network as measure
from utils.errors import UserError, run
from utils.files import locked, staged

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dataset.batches import Batches

FAKE = {"INT8-PTC": "FAKE-QUANT-PTC", "INT8-QAT": "FAKE-QUANT-QAT"}
"""Precision -> what PyTorch runs in its place."""
MANIFEST, PREDICTIONS = "export.json", "predictions.npz"
EXPORT_FLAGS = (*flags.QUANTIZATION, "onnx_dir")
MANIFEST_KEYS = (
    "model",
    "stem",
    "data",
    "seed",
    "quantization",
    "int8_nodes",
    "environment",
    "rows",
)
BATCH_SIZES = (1, 128)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_shared(parser, tuple(dataset.LOADERS))
    add = parser.add_argument
    add("--onnx", type=Path, metavar="DIR", help="evaluate files exported earlier; needs no torch")
    add(
        "--onnx_dir",
        type=Path,
        metavar="DIR",
        help="where to export to (default: <checkpoint>_onnx)",
    )
    add(
        "--batch_size",
        type=int,
        nargs="*",
        default=BATCH_SIZES,
        help="of the latencies (default: 1 128; none: accuracy only)",
    )
    add(
        "--remainder",
        choices=("fp16", "fp32"),
        default="fp16",
        help="what TensorRT computes the unquantized layers in",
    )
    add(
        "--workspace_gb",
        type=float,
        default=4.0,
        help="TensorRT's limit of scratch memory (default: %(default)s)",
    )
    add(
        "--opt_level",
        type=int,
        choices=range(6),
        default=3,
        help="of TensorRT's builder (default: %(default)s)",
    )
    add(
        "--timing_cache",
        type=Path,
        metavar="DIR",
        help="kernel timings to share between exports (default: each its own)",
    )
    add(
        "--audit",
        action="store_true",
        help="list and time engine layers; fail if one meant for INT8 runs in another type",
    )
    add(
        "--torch_compile",
        type=int,
        nargs="+",
        default=(),
        metavar="B",
        help="time torch.compile in FP16 at these batch sizes",
    )
    add(
        "--export_only",
        action="store_true",
        help="evaluate the export elsewhere, with --onnx; here only PyTorch",
    )
    add("--record", type=Path, metavar="FILE", help="write the rows as JSON")
    add("--plot", type=Path, metavar="FILE", help="plot accuracy against throughput as PNG")
    return parser


def build_float(config: dict[str, Any]) -> nn.Module:
    """The float network that a checkpoint's configuration describes, freshly initialised."""
    import models

    model = config["model"]
    return models.build(model["name"], model["num_classes"], model["stem"])


def build_quantized(config: dict[str, Any]) -> nn.Module:
    """The same with the selected layers in their training forms, ranges not calibrated."""
    from utils.quantization.swap import quantize_modules

    model = build_float(config)
    quantize_modules(
        model, config["quantization"]["quant_layers"], config["quantization"]["skip_layers"]
    )
    return model


def calibrate_model(model: nn.Module, quantization: dict[str, Any], train: Batches) -> None:
    """Calibrate with the first train images that `train`, a split without augmentation, serves."""
    from utils.quantization.calibrate import calibrate

    calibrate(model, train.first(quantization["calib_images"]), quantization["calibrator"])


def quantization_config(args: argparse.Namespace, known: dict[str, Any] | None) -> dict[str, Any]:
    """What to quantize and how to calibrate, from the flags and, where it is quantized already, the checkpoint."""
    known = known or {}
    defaults = {
        "quant_layers": ["*"],
        "skip_layers": [],
        "calibrator": flags.CALIBRATORS[0],
        "calib_images": 1024,
    }
    return {
        key: flags.agreed(f"--{key}", getattr(args, key), known.get(key), value)
        for key, value in defaults.items()
    }


def wanted_precisions(args: argparse.Namespace) -> list[str]:
    """The precisions that the flags name, for the back end to run; without such flags, all that are exported.

    Raises:
        UserError: implicit calibration is asked for, but no engine that is calibrated.
    """
    wanted = flags.named_precisions(args) or list(flags.PRECISIONS)
    if args.ptc_mode == "implicit":
        if "INT8-PTC" not in wanted:
            raise UserError("--ptc_mode implicit is a second --INT8PTC: name that too, or drop it")
        wanted.insert(wanted.index("INT8-PTC") + 1, "INT8-PTC-IMPLICIT")
    return wanted


def tensorrt_flag(args: argparse.Namespace) -> str | None:
    """A flag that only TensorRT can obey, if one is given. Raises UserError if --backend onnxruntime contradicts it."""
    given = {
        "--backend tensorrt": args.backend == "tensorrt",
        "--ptc_mode implicit": args.ptc_mode == "implicit",
        "--audit": getattr(args, "audit", False),  # train.py has none
    }
    flag = next((flag for flag, on in given.items() if on), None)
    if flag and args.backend == "onnxruntime":
        raise UserError(f"{flag} is TensorRT's: drop it or --backend onnxruntime")
    return flag


def restore(
    checkpoint: dict[str, Any], wanted: Sequence[str], args: argparse.Namespace, train: Batches
) -> dict[str, nn.Module]:
    """The networks, by precision, that a checkpoint holds or that calibration makes of it, on the device of `train`.

    A float checkpoint gives FP32 and, calibrated here, INT8-PTC. A quantized one holds the float weights and ranges it
    started from, and so gives all three.

    Raises:
        UserError: INT8-QAT is asked for of a float checkpoint.
    """
    from utils.checkpoint import RANGE_SUFFIX, load_weights

    quantized = checkpoint["quantization"] is not None
    if args.INT8QAT and not quantized:
        raise UserError(
            f"--INT8QAT: {args.load_ckpt} is a float checkpoint; fine-tune it with train.py --quantize first"
        )
    config = {**checkpoint, "quantization": quantization_config(args, checkpoint["quantization"])}
    start = checkpoint["start"] if quantized else checkpoint["state"]
    networks = {"FP32": build_float(config)}
    load_weights(
        networks["FP32"],
        {key: value for key, value in start.items() if not key.endswith(RANGE_SUFFIX)},
    )
    if "INT8-PTC" in wanted:
        networks["INT8-PTC"] = build_quantized(config)
        load_weights(networks["INT8-PTC"], start, allow_missing_ranges=not quantized)
    if "INT8-QAT" in wanted and quantized:
        networks["INT8-QAT"] = build_quantized(config)
        load_weights(networks["INT8-QAT"], checkpoint["state"])
    for network in networks.values():
        network.to(train.device)
    if "INT8-PTC" in wanted and not quantized:
        calibrate_model(networks["INT8-PTC"], config["quantization"], train)
    return networks


def export_checkpoint(
    args: argparse.Namespace, wanted: Sequence[str]
) -> tuple[Path, dataset.ImageData]:
    """Evaluate a checkpoint's networks in PyTorch and export them; returns the folder of the files, and the images."""
    import torch

    from dataset.batches import Batches
    from utils import checkpoint as ckpt
    from utils.quantization.export import export_onnx, int8_nodes

    checkpoint = ckpt.load_whole(args.load_ckpt)
    model, info = checkpoint["model"], checkpoint["data"]
    flags.agreed_network(args, model["name"], model["stem"])
    data = load_data(args, info, others=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, _ = data.split(info["split_seed"])
    train = Batches(*chosen, info["mean"], info["std"], 128, device)
    networks = restore(checkpoint, wanted, args, train)
    rows, predictions = evaluate_torch(
        networks, data, info, args, device
    )  # before an earlier export is touched: it may fail
    folder = args.onnx_dir or args.load_ckpt.with_name(args.load_ckpt.name + "_onnx")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), staged(folder, MANIFEST) as draft:
        for precision, network in networks.items():
            path = draft / graph_file(precision)
            export_onnx(network, path, data.train_images.shape[1:3], info["mean"], info["std"])
        np.savez(draft / PREDICTIONS, **predictions)
        manifest = {
            "model": model["name"],
            "stem": model["stem"],
            "data": {**info, "digest": data.digest()},
            "seed": checkpoint["seed"],
            "quantization": quantization_config(args, checkpoint["quantization"]),
            "int8_nodes": {
                precision: int8_nodes(draft / graph_file(precision)) for precision in networks
            },
            "environment": records.environment(),
            "rows": rows,
        }
        records.write(draft / MANIFEST, manifest)
    return folder, data


def graph_file(precision: str) -> str:
    """The file that ONNX Runtime reads for a precision; `utils.backends.tensorrt.graph_name` says it for TensorRT."""
    return f"{precision.lower().replace('-', '_')}.onnx"


def load_data(
    args: argparse.Namespace, known: dict[str, Any], others: bool = False
) -> dataset.ImageData:
    """The data set that the flags name, or that a checkpoint or an export was made with, which is then `known`.

    Args:
        others: the images may be others, of the same classes.

    Raises:
        UserError: --dataset contradicts it, or the files there hold something else.
    """
    name = flags.agreed("--dataset", args.dataset, known.get("dataset"), "cifar10")
    if name != "folder" and args.img_size not in (None, 32):
        raise UserError(
            f"--img_size {args.img_size}: the images of {name} are 32 pixels wide; it is for --dataset folder"
        )
    data = dataset.load(
        name, args.data_dir, flags.agreed("--img_size", args.img_size, known.get("img_size"), 32)
    )
    if known and list(data.classes) != known["classes"]:
        raise UserError(
            f"--data_dir {args.data_dir}: classes differ from those the network was trained on"
        )
    if not others and "digest" in known and known["digest"] != data.digest():
        what = "other images, or in another order, than the checkpoint or export was made with"
        raise UserError(
            f"--data_dir {args.data_dir}: {what}; name those, or begin with a float network again"
        )
    return data


def evaluate_torch(
    networks: dict[str, nn.Module],
    data: dataset.ImageData,
    info: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[list[records.Row], dict[str, np.ndarray]]:
    """Rows and test predictions of the PyTorch networks. Fake quantization computes in float, so it gets no latency.

    With --torch_compile, also FP16 rows of PyTorch itself, eager and compiled, to compare engines with.
    """
    from utils.backends.pytorch import FromImages, TorchNetwork

    if args.torch_compile and device.type != "cuda":
        raise UserError("--torch_compile compares GPU times, and there is no GPU here: drop it")
    runs = [
        ("pytorch", precision, args.batch_size if precision == "FP32" else ())
        for precision in networks
    ]
    runs += [
        (name, "FP16", args.torch_compile)
        for name in ("pytorch", "torch.compile")
        if args.torch_compile
    ]
    rows, predictions = [], {}
    for name, precision, batch_sizes in runs:
        model = FromImages(
            copy.deepcopy(networks["FP32" if precision == "FP16" else precision]),
            info["mean"],
            info["std"],
        )
        network = TorchNetwork(model.half() if precision == "FP16" else model, device, name)
        key = FAKE.get(precision, precision)
        batch_size = max(batch_sizes, default=measure.EVALUATION_BATCH)
        predicted = measure.predict(network, data.test_images, batch_size, f"{name} {key}")
        predictions.setdefault(key, predicted)  # torch.compile's FP16 comes after eager's
        shared = accuracies(predicted, data.test_labels, predictions["FP32"], predictions["FP32"])
        timed = latency_columns(network, data.test_images, batch_sizes)
        rows += [records.make_row(name, key, **shared, **columns) for columns in timed]
    return rows, predictions


def accuracies(
    predicted: np.ndarray, labels: np.ndarray, fp32: np.ndarray, twin: np.ndarray
) -> dict[str, float]:
    """Accuracy, its difference from that of FP32's predictions and the agreement with the twin's, all in percent."""
    accuracy_pct, fp32_pct, agreement_pct = (
        measure.percent_equal(*pair)
        for pair in ((predicted, labels), (fp32, labels), (predicted, twin))
    )
    return {
        "accuracy_pct": accuracy_pct,
        "delta_pct": accuracy_pct - fp32_pct,
        "agreement_pct": agreement_pct,
    }


def latency_columns(
    network: measure.Network, images: np.ndarray, batch_sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Latency percentiles at each batch size, over test images; without a batch size once no columns."""
    columns = []
    for batch_size in batch_sizes:
        p50, p99 = np.percentile(
            network.latencies_ms(np.resize(images, (batch_size, *images.shape[1:]))), (50, 99)
        )
        columns.append({"batch_size": batch_size, "p50": float(p50), "p99": float(p99)})
    return columns or [{}]


def choose_backend(
    folder: Path, args: argparse.Namespace, calibration: np.ndarray
) -> Callable[[str], measure.Network]:
    """A function from a precision to its network. "auto" is ONNX Runtime where TensorRT cannot run, and says why.

    Raises:
        UserError: TensorRT is asked for by name and cannot run here.
    """
    flag = tensorrt_flag(args)
    if args.backend != "onnxruntime":
        from utils.backends.tensorrt import EngineOptions, TensorRTNetwork, require_gpu

        sizes = tuple(sorted(set(args.batch_size)))
        try:
            require_gpu()
        except UserError as error:
            if flag:
                raise UserError(f"{flag}: {error}") from None
            print(f"TensorRT is not used: {error}. ONNX Runtime runs the networks on the CPU.")
        else:
            if not sizes:
                raise UserError(
                    "--batch_size: TensorRT builds an engine for sizes, name one or more"
                )
            options = partial(
                EngineOptions,
                batch_sizes=sizes,
                remainder=args.remainder,
                workspace_gb=args.workspace_gb,
                level=args.opt_level,
            )
            return lambda precision: TensorRTNetwork(
                folder, options(precision), calibration, args.timing_cache
            )
    from utils.backends.onnxruntime import OnnxRuntimeNetwork

    return lambda precision: OnnxRuntimeNetwork(folder / graph_file(precision))


def read_export(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Manifest of an export, and what PyTorch's networks predict of the test images, FP32 always among them.

    Raises:
        UserError: something is missing or damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        with np.load(folder / PREDICTIONS) as arrays:
            return {key: content[key] for key in MANIFEST_KEYS}, {"FP32": arrays["FP32"], **arrays}
    except Exception as error:  # json, zipfile and NumPy raise anything on damaged files
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{folder} is no complete export ({what}); make one with infer.py --load_ckpt"
        ) from None


def evaluate_network(
    network: measure.Network,
    precision: str,
    data: dataset.ImageData,
    in_torch: dict[str, np.ndarray],
    batch_sizes: Sequence[int],
) -> list[records.Row]:
    """A row for each batch size with the network's own time; on a GPU also one with the time from host to host.

    The agreement is with what PyTorch predicts in the same precision or, where it was not run in that, in FP32.
    """
    batch_size = max(batch_sizes) if network.layers else measure.EVALUATION_BATCH
    predicted = measure.predict(
        network, data.test_images, batch_size, f"{network.name} {precision}"
    )
    twin = in_torch.get(FAKE.get(precision, precision), in_torch["FP32"])
    shared = accuracies(predicted, data.test_labels, in_torch["FP32"], twin)
    shared["file_mb"] = network.path.stat().st_size / 1e6
    if network.layers:
        shared["layers"], shared["int8_layers"] = (
            len(network.layers),
            sum(x.precision == "INT8" for x in network.layers),
        )
    timed = latency_columns(network, data.test_images, batch_sizes)
    rows = [records.make_row(network.name, precision, **shared, **columns) for columns in timed]
    if network.layers:
        rows.append(
            records.make_row(
                f"{network.name} end-to-end", precision, **shared, batch_size=batch_size
            )
        )
        rows[-1]["throughput_img_s"] = measure.end_to_end_img_s(
            network, data.test_images, batch_size
        )
    return rows


def evaluate_exported(
    folder: Path, data: dataset.ImageData | None, wanted: Sequence[str], args: argparse.Namespace
) -> tuple[records.Record, list[str]]:
    """Evaluate exported files on a back end: the record, which starts with the PyTorch rows of the export, and complaints."""
    manifest, in_torch = read_export(folder)
    flags.agreed_network(args, manifest["model"], manifest["stem"])
    info = manifest["data"]
    data = data or load_data(args, info)
    chosen, _ = dataset.split_train(data.train_labels, info["split_seed"])
    backend = choose_backend(
        folder, args, data.train_images[chosen[: manifest["quantization"]["calib_images"]]]
    )
    for precision in flags.named_precisions(args):
        if precision in FAKE and precision not in manifest["int8_nodes"]:
            raise UserError(
                f"{precision} is not in {folder}: export it again, with {flags.PRECISIONS[precision]}"
            )
    rows, complaints = [], []
    for precision in wanted:
        source = precision if precision in FAKE else "FP32"
        if source not in manifest["int8_nodes"]:
            print(f"{precision}: not in this export, no row")
            continue
        network = backend(precision)
        rows += evaluate_network(network, precision, data, in_torch, args.batch_size)
        if args.audit and network.layers:
            print(
                f"{precision} engine, batch size {max(args.batch_size)}; ms of each layer alone, in sum more than its own"
            )
            for layer, ms in zip(network.layers, network.layer_times_ms(), strict=True):
                print(f"{'-' if ms is None else f'{ms:.4f}':>8} {layer}")
            complaints += [
                f"{precision}: {node}"
                for node in network.float_nodes(manifest["int8_nodes"][source])
            ]
    return make_record(manifest, rows, args), complaints


def make_record(
    manifest: dict[str, Any], rows: list[records.Row], args: argparse.Namespace
) -> records.Record:
    """A record of the PyTorch rows that an export holds, and of `rows`."""
    environment, torch_rows = records.merge_environment(manifest["environment"], manifest["rows"])
    given = {
        key: value
        for key, value in vars(args).items()
        if value is not False and value not in (None, [], ())
    }
    return {
        "kind": "inference",
        "model": manifest["model"],
        "stem": manifest["stem"],
        "dataset": manifest["data"]["dataset"],
        "seed": manifest["seed"],
        "quantization": manifest["quantization"],
        "flags": {key: str(value) for key, value in given.items() if not isinstance(value, Path)},
        "commit": records.commit(),
        "environment": environment,
        "rows": torch_rows + rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    wanted, data = wanted_precisions(args), None
    tensorrt_flag(args)  # contradictions come before the work
    if (args.onnx is None) == (args.load_ckpt is None):
        raise UserError("name a checkpoint with --load_ckpt, or files exported earlier with --onnx")
    if (
        min(
            (
                *args.batch_size,
                *args.torch_compile,
                1 if args.calib_images is None else args.calib_images,
            )
        )
        < 1
    ):
        raise UserError("--batch_size, --torch_compile and --calib_images: at least 1")
    if not 0 < args.workspace_gb <= 1024:
        raise UserError(f"--workspace_gb {args.workspace_gb:g}: more than 0, at most 1024")
    for path in (args.record, args.plot):
        if path and path.is_dir():
            raise UserError(f"{path} is a folder: name a file in it")
    decided = [
        f"--{name}" for name in EXPORT_FLAGS if args.onnx and getattr(args, name) is not None
    ]
    if decided:
        raise UserError(
            f"{', '.join(decided)}: decided when {args.onnx} was exported; drop it or export again"
        )
    folder = args.onnx
    if folder is None:
        folder, data = export_checkpoint(args, wanted)
        print(f"exported to {folder}")
    if args.export_only:
        record, complaints = make_record(read_export(folder)[0], [], args), []
    else:
        record, complaints = evaluate_exported(folder, data, wanted, args)
    print(f"{record['model']} ({record['stem']} stem) on {record['dataset']}, test set")
    print(records.text_table(records.cells_of(record["rows"]), names=2), flush=True)
    if args.record:
        records.write(args.record, record)
    if args.plot:
        records.plot(args.plot, record)
    if complaints:
        raise UserError(f"--audit: meant for INT8, but not run in it: {'; '.join(complaints)}")


if __name__ == "__main__":
    run(main)
