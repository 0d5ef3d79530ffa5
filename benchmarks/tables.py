"""The tables and plots of README.md and docs/, made from results/ and from train.py's defaults.

    python benchmarks/tables.py     write all of them again

A document marks where a table stands, and which:

    <!-- speed: results/2026-11-27_h200 -->
    <!-- end -->

The kinds are the keys of `TABLES`. The path, from the project's root, is a record's or a folder's.
The table of train.py's defaults stands between `<!-- recipes -->` and the end.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from utils import records
from utils.errors import UserError, run
from utils.files import atomic_path
from utils.plot import new_figure
from utils.recipe import Recipe, make_recipe
from utils.records import ROOT
from utils.specs import CALIBRATORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IN_PYTORCH = {
    "FP32": "FP32",
    "FP32 fine-tuned": "FP32-TUNED",
    "QAT": "FAKE-QUANT-QAT",
    "PTQ": "FAKE-QUANT-PTC",
}
IN_TENSORRT = {
    "FP16": "FP16",
    "QAT": "INT8-QAT",
    "PTQ": "INT8-PTC",
    "implicit PTQ": "INT8-PTC-IMPLICIT",
}
"""A table's title -> a record's precision."""

FAST = "INT8-QAT"
SLOW = "FP16"
"""The precisions whose speeds are compared."""

PLOT = "summary.png"

SAME_IN_A_STUDY = ("dataset", "epochs", "quantization", "train_flags")
"""What the records that a mean is taken of must have in common."""

TITLES = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "efficientnet_b0": "EfficientNet-B0",
}
"""A model's name in the code -> its name in the headline and the plot."""

TRAINING_TITLES = [
    "recipe",
    "mode",
    "stem",
    "batch",
    "s an epoch",
    "images/s",
    "times the reference",
    "TFLOP/s",
    "chip's peak",
    "compile s",
]

COSTLIEST = 5
SENSITIVITY_TITLES = [
    "network",
    "layer in INT8, or layers",
    "SQNR of this alone, dB",
    "of all but this, dB",
]

CHOICE_TITLES = [
    "network",
    "batch",
    "FP16 ms",
    "all in INT8, ms",
    "chosen",
    "its ms",
    "times FP16",
]

GPUS_TITLES = ["network", "GPUs", "s an epoch", "images/s", "times one GPU"]

RECIPE_TITLES = [
    "run",
    "flags",
    "optimizer",
    "last third of the epochs",
    "BatchNorm's statistics",
    "epochs",
    "peak lr at batch size 128",
]

RUNS = {
    "scratch": ("from scratch", "-"),
    "pretrained": (
        "from weights of other classes",
        "`--pretrain`, or `--load_ckpt --new_classifier`",
    ),
    "fine-tuning": ("float fine-tuning", "`--load_ckpt`"),
    "QAT": ("QAT", "`--quantize --partial_ckpt --load_ckpt`"),
}
"""A kind of training -> its title, and the flags that ask for it."""

OPTIMIZERS = {"muon": "Muon", "sgd": "SGD", "adamw": "AdamW"}

Row = dict[str, Any]
Record = dict[str, Any]
Groups = dict[str, list[Record]]


# Reading records


def load(folder: Path) -> Groups:
    """The inference records in a folder, by network and, where it is not the default, calibrator.

    Raises:
        UserError: a file is damaged, or two records of a network are not seeds of one study.
    """
    groups: Groups = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        if record.get("kind") != "inference":
            continue
        group = groups.setdefault(_group_name(record), [])
        for other in group:
            _require_one_study(path, record, other)
        group.append(record)
    return groups


def _group_name(record: Record) -> str:
    """Such as "resnet18, cifar stem"."""
    name = f"{record['model']}, {record['stem']} stem"
    calibrator = record.get("quantization", {}).get("calibrator", "calibrator not recorded")
    if calibrator == CALIBRATORS[0]:
        return name
    return f"{name}, {calibrator}"


def _require_one_study(path: Path, record: Record, other: Record) -> None:
    same_seed = record["seed"] == other["seed"]
    unlike = [key for key in SAME_IN_A_STUDY if record.get(key) != other.get(key)]
    if same_seed or unlike:
        raise UserError(
            f"{path} is not of one study with the records beside it: its seed is there twice, "
            f"or its {', '.join(SAME_IN_A_STUDY)} differ from those of another seed"
        )


def _rows_of(
    group: Sequence[Record], backend: str, precision: str, batch_size: int | None = None
) -> list[Row]:
    """At most one row of each record: the first of that back end, precision and batch size."""
    found = []
    for record in group:
        for row in record["rows"]:
            same_network = row["backend"] == backend and row["precision"] == precision
            if same_network and batch_size in (None, row["batch_size"]):
                found.append(row)
                break
    return found


def _batch_sizes(
    group: Sequence[Record], backend: str = "tensorrt", precisions: Sequence[str] = (SLOW, FAST)
) -> list[int]:
    """Batch sizes at which a back end was timed in all of `precisions`, the largest last."""
    rows = [row for record in group for row in record["rows"] if row["backend"] == backend]
    sizes = []
    for precision in precisions:
        sizes.append({row["batch_size"] for row in rows if row["precision"] == precision})
    return sorted(set.intersection(*sizes))


# Statistics


def _median_ms(rows: Sequence[Row]) -> float:
    return statistics.median(row["latency_ms"]["p50"] for row in rows)


def _speed_up(group: Sequence[Record], batch_size: int) -> float:
    """How many times as fast the INT8 engine is as the FP16 engine."""
    slow = _rows_of(group, "tensorrt", SLOW, batch_size)
    fast = _rows_of(group, "tensorrt", FAST, batch_size)
    return _median_ms(slow) / _median_ms(fast)


def _deltas(group: Sequence[Record], precision: str) -> list[float]:
    """Each seed's accuracy less that of its own FP32 network, in points."""
    return [row["delta_pct"] for row in _rows_of(group, "pytorch", precision)]


def _qat_less_fine_tuned(group: Sequence[Record]) -> list[float]:
    """Each seed's QAT accuracy less that of its float network trained as long, in points."""
    differences = []
    for record in group:
        qat = _rows_of([record], "pytorch", "FAKE-QUANT-QAT")
        tuned = _rows_of([record], "pytorch", "FP32-TUNED")
        # A record that infer.py made alone has no fine-tuned network.
        if qat and tuned:
            differences.append(qat[0]["accuracy_pct"] - tuned[0]["accuracy_pct"])
    return differences


def _spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean_and_spread(values: Sequence[float], spec: str = ".2f") -> str:
    """Mean ± standard deviation; the mean alone of a single value; "-" of none."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), spec)
    if len(values) == 1:
        return mean
    return f"{mean} ± {_spread(values):.2f}"


def _accuracies(group: Sequence[Record], backend: str, precisions: Iterable[str]) -> list[str]:
    """A cell for each precision: the test accuracy in percent over the seeds."""
    cells = []
    for precision in precisions:
        rows = _rows_of(group, backend, precision)
        cells.append(_mean_and_spread([row["accuracy_pct"] for row in rows]))
    return cells


# Tables of a study: many records as one


def markdown_table(lines: Sequence[Sequence[str]], names: int = 1) -> str:
    """Lines of cells in Markdown, titles first: `names` columns to the left, others right."""
    ruler = [":--" if index < names else "--:" for index in range(len(lines[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], ruler, *lines[1:]))


def headline_table(groups: Groups) -> str:
    """What a reader wants to know first: test accuracies in percent in PyTorch, and the gain."""
    lines = [["network", "FP32", "INT8 PTQ", "INT8 QAT", "INT8 speed-up over FP16"]]
    for model, title in TITLES.items():
        group = groups.get(f"{model}, cifar stem", [])
        sizes = _batch_sizes(group)
        if not sizes:
            continue
        precisions = ("FP32", "FAKE-QUANT-PTC", "FAKE-QUANT-QAT")
        cells = _accuracies(group, "pytorch", precisions)
        lines.append([title, *cells, f"{_speed_up(group, sizes[-1]):.2f} ×"])
    return markdown_table(lines)


def accuracy_table(groups: Groups) -> str:
    """Test accuracy of each network in PyTorch, and what QAT and PTQ change, over its seeds.

    QAT also trains for longer. So it is compared with the float network fine-tuned as long too:
    that difference is quantization's alone.
    """
    lines = [["network", "seeds", *IN_PYTORCH, "QAT − FP32", "QAT − fine-tuned", "PTQ − FP32"]]
    for name, group in groups.items():
        cells = [name, str(len(group))]
        cells += _accuracies(group, "pytorch", IN_PYTORCH.values())
        cells.append(_mean_and_spread(_deltas(group, "FAKE-QUANT-QAT"), "+.2f"))
        cells.append(_mean_and_spread(_qat_less_fine_tuned(group), "+.2f"))
        cells.append(_mean_and_spread(_deltas(group, "FAKE-QUANT-PTC"), "+.2f"))
        lines.append(cells)
    return markdown_table(lines)


def engines_table(groups: Groups) -> str:
    """Test accuracy of engines over the seeds that have them, beside PyTorch's FP32 of those seeds.

    Agreements are of predictions with those of the fake quantized network in PyTorch.
    """
    every = [record for group in groups.values() for record in group]
    # a study may have no engines of implicit calibration
    shown = {
        title: precision
        for title, precision in IN_TENSORRT.items()
        if _rows_of(every, "tensorrt", precision)
    }
    lines = [["network", "seeds", "FP32 in PyTorch", *shown, "QAT agreement", "PTQ agreement"]]
    for name, group in groups.items():
        built = [record for record in group if _rows_of([record], "tensorrt", FAST)]
        if not built:
            continue
        cells = [name, str(len(built))]
        cells += _accuracies(built, "pytorch", ["FP32"])
        cells += _accuracies(built, "tensorrt", shown.values())
        for precision in ("INT8-QAT", "INT8-PTC"):
            rows = _rows_of(built, "tensorrt", precision)
            cells.append(_mean_and_spread([row["agreement_pct"] for row in rows]))
        lines.append(cells)
    return markdown_table(lines)


def speed_table(groups: Groups) -> str:
    """Latency, throughput and size of engines: medians over the seeds that have them."""
    titles = ["network", "batch", f"{SLOW} ms", f"{FAST} ms", "speed-up"]
    titles += [f"{SLOW} images/s", f"{FAST} images/s"]
    titles += [f"{SLOW} MB", f"{FAST} MB", "INT8 layers"]
    lines = [titles]
    for name, group in groups.items():
        lines += [[name, str(size), *_speed_cells(group, size)] for size in _batch_sizes(group)]
    return markdown_table(lines)


def _speed_cells(group: Sequence[Record], batch_size: int) -> list[str]:
    slow = _rows_of(group, "tensorrt", SLOW, batch_size)
    fast = _rows_of(group, "tensorrt", FAST, batch_size)
    times_ms, images_s, megabytes = [], [], []
    for rows in (slow, fast):
        time_ms = _median_ms(rows)
        times_ms.append(f"{time_ms:.3f}")
        images_s.append(f"{1000 * batch_size / time_ms:,.0f}")
        megabytes.append(f"{statistics.median(row['file_mb'] for row in rows):.1f}")
    speed_up = f"{_speed_up(group, batch_size):.2f}"
    layers = f"{fast[0]['int8_layers']} of {fast[0]['layers']}"
    return [*times_ms, speed_up, *images_s, *megabytes, layers]


CPU_TITLES = [
    "network",
    "batch",
    "FP32 ms, ONNX Runtime",
    "FP32 ms, OpenVINO",
    "INT8 ms, OpenVINO",
    "INT8 over the faster FP32",
    "agreement %",
    "INT8 layers",
]


OWN_TITLES = [
    "network",
    "batch",
    "FP16 ms",
    "INT8 ms",
    "Model Optimizer, INT8 ms",
    "INT8 over FP16",
    "Model Optimizer over FP16",
]


PEER_TITLES = {
    "float": "nobody: FP32",
    "this_project_sqnr": "this project, `sqnr`",
    "this_project_entropy": "this project, `entropy`",
    "this_project_max": "this project, `max`",
    "this_project_float_head": "this project, pool and classifier float",
    "pytorch_quantization_percentile": "pytorch-quantization, percentile",
    "pytorch_quantization_max": "pytorch-quantization, max",
    "modelopt_entropy": "Model Optimizer, entropy",
    "modelopt_max": "Model Optimizer, max",
    "onnxruntime": "ONNX Runtime",
    "nncf": "NNCF",
    "torchao": "torchao",
}
"""The folder of a graph -> who quantized it."""

PEER_SCORES = {
    "accuracy_pct": ("accuracy %", ".2f"),
    "agreement_pct": ("agreement %", ".2f"),
    "logits_sqnr_db": ("SQNR dB", ".1f"),
    "calibration_s": ("calibration s", ".1f"),
    "user_lines": ("lines", "d"),
}
"""Key of a row -> its title and format."""

BACKEND_TITLES = {"tensorrt": "TensorRT", "openvino": "OpenVINO"}


def cpu_table(groups: Groups) -> str:
    """Latency on a CPU, and what INT8 gains over the faster of two back ends in FP32.

    Agreement is of OpenVINO's predictions with those of the fake quantized network in PyTorch.
    """
    lines = [CPU_TITLES]
    for name, group in groups.items():
        for size in _batch_sizes(group, "openvino", ("FP32", "INT8-PTC")):
            lines.append([name, str(size), *_cpu_cells(group, size)])
    return markdown_table(lines)


def _cpu_cells(group: Sequence[Record], batch_size: int) -> list[str]:
    fast = _rows_of(group, "openvino", "INT8-PTC", batch_size)
    times_ms = []
    for backend in ("onnxruntime", "openvino"):
        times_ms.append(_median_ms(_rows_of(group, backend, "FP32", batch_size)))
    fast_ms = _median_ms(fast)
    cells = [f"{time_ms:.3f}" for time_ms in (*times_ms, fast_ms)]
    cells.append(f"{min(times_ms) / fast_ms:.2f} ×")
    cells.append(f"{statistics.fmean(row['agreement_pct'] for row in fast):.2f}")
    cells.append(f"{fast[0]['int8_layers']} of {fast[0]['layers']}")
    return cells


def own_networks_table(folder: Path) -> str:
    """Networks of other people: FP16, and INT8 by this project and by Model Optimizer."""
    times_ms: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for path in sorted(folder.glob("own_networks*.json")):
        for row in records.read(path)["rows"]:
            for size, time in row["latency_ms"].items():
                found = times_ms.setdefault((row["network"], size), {})
                found[row["variant"], row["precision"]] = time["p50"]
    lines = [OWN_TITLES]
    for name, size in sorted(times_ms, key=lambda key: (key[0], int(key[1]))):
        found = times_ms[name, size]
        float_ms = found.get(("this_project", "FP16"))
        quantized_ms = [
            found.get((variant, "INT8-PTC")) for variant in ("this_project", "modelopt")
        ]
        cells = [f"{ms:.3f}" if ms else "-" for ms in (float_ms, *quantized_ms)]
        for ms in quantized_ms:
            cells.append(f"{float_ms / ms:.2f} ×" if float_ms and ms else "-")
        lines.append([name, size, *cells])
    return markdown_table(lines)


def peers_table(folder: Path) -> str:
    """One float network quantized by this project and by others: what is kept, and times in ms."""
    rows: dict[tuple[str, str], Row] = {}
    times_ms: dict[tuple[str, str], dict[str, float]] = {}
    titles: dict[str, None] = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        for row in record["rows"]:
            key = record["network"], row["variant"]
            rows.setdefault(key, row)
            for size, time in row["latency_ms"].items():
                title = f"{BACKEND_TITLES[record['backend']]} ms, batch {size}"
                titles[title] = None
                times_ms.setdefault(key, {})[title] = time["p50"]

    networks = list(dict.fromkeys(network for network, _ in rows))
    lines = [["network", "quantized by", *(title for title, _ in PEER_SCORES.values()), *titles]]
    for network in networks:
        for variant, title in PEER_TITLES.items():
            key = network, variant
            if key not in rows:
                continue
            cells = [network, title]
            for name, (_, spec) in PEER_SCORES.items():
                value = rows[key].get(name)
                cells.append("-" if value is None else format(value, spec))
            for name in titles:
                time_ms = times_ms.get(key, {}).get(name)
                cells.append(f"{time_ms:.3f}" if time_ms else "-")
            lines.append(cells)
    return markdown_table(lines, names=2)


# Tables of one record


def record_table(path: Path) -> str:
    """All rows of one inference record."""
    rows = [records.Row(**row) for row in records.read(path)["rows"]]
    return markdown_table(records.cells_of(rows), names=2)


def training_table(path: Path) -> str:
    """A record of training speed."""
    return markdown_table(training_cells(records.read(path)["rows"]))


def training_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Titles and rows of training speed; each recipe against the reference by time per image."""
    reference = {}
    for row in rows:
        if row["recipe"] == "reference":
            reference[row["mode"], row["stem"]] = row["images_s"]
    lines = [TRAINING_TITLES]
    for row in rows:
        slower = reference.get((row["mode"], row["stem"]))
        lines.append(
            [
                row["recipe"],
                row["mode"],
                row["stem"],
                str(row["batch_size"]),
                f"{row['epoch_s']:.2f}",
                f"{row['images_s']:,.0f}",
                f"{row['images_s'] / slower:.1f}" if slower else "-",
                f"{row['tflops']:.1f}",
                f"{row['peak_tflops'] or '-'} ({row['arithmetic']})",
                f"{row['compile_s']:.0f}",
            ]
        )
    return lines


def gpus_table(folder: Path) -> str:
    """Training on several GPUs of one host, against one of them at the same batch size."""
    rows = []
    for path in sorted(folder.glob("train_speed*.json")):
        rows += records.read(path)["rows"]
    rows.sort(key=lambda row: (*_compared(row), row["gpus"]))
    alone = {_compared(row): row for row in rows if row["gpus"] == 1}

    lines = [GPUS_TITLES]
    for row in rows:
        one = alone.get(_compared(row))
        if one is None:
            what = f"{folder} has no timing on one GPU to compare {_compared(row)} with"
            raise UserError(f"{what}: record one by train_speed.py without torchrun")
        lines.append(
            [
                f"{TITLES[row['model']]}, {row['stem']} stem",
                str(row["gpus"]),
                f"{row['epoch_s']:.2f}",
                f"{row['images_s']:,.0f}",
                f"{row['images_s'] / one['images_s']:.2f}",
            ]
        )
    return markdown_table(lines)


def _compared(row: Row) -> tuple[str, str, str, str, int]:
    """What timings on one and on several GPUs must have in common."""
    return row["recipe"], row["model"], row["stem"], row["mode"], row["batch_size"]


def sensitivity_table(folder: Path) -> str:
    """Of each scan all layers together, and the single layers that cost most signal."""
    lines = [SENSITIVITY_TITLES]
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        parts = record["sensitivity"]["parts"]
        single = [part for part in parts if "*" not in part["layers"]]
        # one that changes nothing has none
        single = [part for part in single if part["only_sqnr_db"] is not None]
        single.sort(key=lambda part: part["only_sqnr_db"])
        [every] = [part for part in parts if part["layers"] == "*"]
        for part in (every, *single[:COSTLIEST]):
            without_db = part["without_sqnr_db"]
            lines.append(
                [
                    f"{TITLES[record['model']]}, {record['stem']} stem",
                    "all" if part is every else f"`{part['layers']}`",
                    f"{part['only_sqnr_db']:.1f}",
                    "-" if without_db is None else f"{without_db:.1f}",
                ]
            )
    return markdown_table(lines, names=2)


def choices_table(folder: Path) -> str:
    """What `--auto_quant` chose, beside the engines with all layers in FP16 and in INT8."""
    lines = [CHOICE_TITLES]
    ends = {(): "all in INT8", ("*",): "all in FP16"}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        choice = record["choice"]
        times_ms = {}
        for candidate in choice["candidates"]:
            times_ms[tuple(candidate["skip_layers"])] = candidate["latency_ms"]
        chosen = tuple(choice["skip_layers"])
        title = ends.get(chosen) or f"`{' '.join(chosen)}` in float"
        [batch_size] = {row["batch_size"] for row in record["rows"]} - {None}
        cells = [f"{TITLES[record['model']]}, {record['stem']} stem", str(batch_size)]
        cells += [f"{times_ms['*',]:.3f}", f"{times_ms[()]:.3f}", title]
        cells += [f"{times_ms[chosen]:.3f}", f"{times_ms['*',] / times_ms[chosen]:.2f}"]
        lines.append(cells)
    return markdown_table(lines)


# The table of recipes


def recipes_table() -> str:
    """What each kind of training is by default: one line, or two where a CPU's is another."""
    lines = [RECIPE_TITLES]
    for kind, defaults in train.DEFAULTS.items():
        title, words = RUNS[kind]
        recipes = {}
        for device, device_type in (("GPU", "cuda"), ("CPU", "cpu")):
            recipes[device] = make_recipe(
                kind, defaults, device_type, model="", stem="", batch_size=128
            )
        if recipes["GPU"] == recipes["CPU"]:
            lines.append([title, words, *_recipe_cells(recipes["GPU"])])
            continue
        for device, recipe in recipes.items():
            lines.append([f"{title}, {device}", words, *_recipe_cells(recipe)])
    return markdown_table(lines, names=4)


def _recipe_cells(recipe: Recipe) -> list[str]:
    last_third = f"SAM, radius {recipe.sam_rho:g}" if recipe.sam_rho else "as before"
    statistics = "frozen" if recipe.freeze_batch_norm else "move"
    optimizer = OPTIMIZERS[recipe.optimizer]
    return [optimizer, last_third, statistics, str(recipe.num_epochs), f"{recipe.lr:g}"]


# The plot


def points(groups: Groups) -> dict[str, list[float]]:
    """What the plot shows of each network that has engines.

    Returns:
        name -> speed-up of INT8 over FP16 at the largest batch size; then what QAT and what PTQ
        change in the accuracy, in points: means over the seeds.
    """
    found = {}
    for name, group in groups.items():
        sizes = _batch_sizes(group)
        if not sizes:
            continue
        qat = statistics.fmean(_deltas(group, "FAKE-QUANT-QAT"))
        ptq = statistics.fmean(_deltas(group, "FAKE-QUANT-PTC"))
        found[name] = [round(value, 3) for value in (_speed_up(group, sizes[-1]), qat, ptq)]
    return found


def plot(folder: Path) -> None:
    """Accuracy lost and speed gained by each network, as PNG beside its records.

    The PNG's Description holds the numbers, so that a test can compare them with the records.
    """
    groups = load(folder)
    found = points(groups)
    # Without engines there is no speed to show.
    if not found:
        return
    # The fastest gain stands on top: matplotlib counts rows from below.
    names = sorted(found, key=lambda name: found[name][0])
    height = 1.5 + 0.36 * len(names)
    figure = new_figure(figsize=(9, height))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_losses(left, [groups[name] for name in names])
    _draw_speed_ups(right, [found[name][0] for name in names])
    left.set_yticks(range(len(names)), [_plot_title(name) for name in names])
    left.set_ylim(-0.6, len(names) - 0.4)
    with atomic_path(folder / PLOT) as partial:
        figure.savefig(partial, format="png", dpi=180, metadata={"Description": json.dumps(found)})


def _draw_losses(axes: Axes, groups: Sequence[Sequence[Record]]) -> None:
    """One row for each network: mean and standard deviation of what PTQ and QAT lose."""
    styles = [
        ("PTQ", "FAKE-QUANT-PTC", 0.14, "white", "tab:orange"),
        ("QAT", "FAKE-QUANT-QAT", -0.14, "tab:blue", "tab:blue"),
    ]
    for label, precision, offset, fill, colour in styles:
        deltas = [_deltas(group, precision) for group in groups]
        axes.errorbar(
            x=[-statistics.fmean(values) for values in deltas],
            y=[row + offset for row in range(len(groups))],
            xerr=[_spread(values) for values in deltas],
            fmt="o",
            color=colour,
            markerfacecolor=fill,
            capsize=2.5,
            label=label,
        )
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("accuracy lost, points (left of 0: gained)")
    axes.set_title("INT8 against FP32: mean ± sd over seeds", fontsize="medium")
    axes.legend(loc="lower right")


def _draw_speed_ups(axes: Axes, speed_ups: Sequence[float]) -> None:
    bars = axes.barh(range(len(speed_ups)), speed_ups, height=0.6, color="tab:green", alpha=0.75)
    axes.bar_label(bars, fmt="%.2f ×", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.3 * max(1, *speed_ups))
    axes.set_xlabel("times as fast as FP16 (line: 1)")
    axes.set_title("INT8 over FP16 at the largest batch", fontsize="medium")
    axes.tick_params(left=False)


def _plot_title(name: str) -> str:
    """Of "resnet18, imagenet stem" it is "ResNet-18, ImageNet stem"; CIFAR's is not named."""
    model, _, rest = name.partition(", ")
    rest = rest.removeprefix("cifar stem").replace("imagenet stem", "ImageNet stem")
    return ", ".join(part for part in (TITLES.get(model, model), rest) if part)


# Documents

TABLES: dict[str, Callable[[Path], str]] = {
    "headline": lambda folder: headline_table(load(folder)),
    "accuracy": lambda folder: accuracy_table(load(folder)),
    "engines": lambda folder: engines_table(load(folder)),
    "speed": lambda folder: speed_table(load(folder)),
    "cpu": lambda folder: cpu_table(load(folder)),
    "own": own_networks_table,
    "peers": peers_table,
    "table": record_table,
    "training": training_table,
    "gpus": gpus_table,
    "sensitivity": sensitivity_table,
    "choice": choices_table,
}
"""The kind of a table -> what makes it from the path in its marker."""


def documents() -> list[Path]:
    """The files whose tables are made from records."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def refresh_tables(text: str) -> str:
    """Put the table of its kind between each marker and `<!-- end -->`."""
    between = r"\n.*?<!-- end -->"

    def table(match: re.Match[str]) -> str:
        kind, path = match[1], match[2]
        return f"<!-- {kind}: {path} -->\n{TABLES[kind](ROOT / path)}\n<!-- end -->"

    def recipes(match: re.Match[str]) -> str:
        return f"{match[1]}\n{recipes_table()}\n<!-- end -->"

    marker = rf"<!-- ({'|'.join(TABLES)}): (\S+) -->"
    text = re.sub(marker + between, table, text, flags=re.DOTALL)
    return re.sub(r"(<!-- recipes -->)" + between, recipes, text, flags=re.DOTALL)


def plot_folders(document: Path) -> list[Path]:
    """Folders of the plots that a document shows."""
    links = re.findall(rf"\(([^)\s]+)/{PLOT}\)", document.read_text())
    return [document.parent / link for link in links]


def main() -> None:
    for document in documents():
        text = refresh_tables(document.read_text())
        with atomic_path(document) as partial:
            partial.write_text(text)
        for folder in plot_folders(document):
            plot(folder)


if __name__ == "__main__":
    # it takes no flags
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    run(main)
