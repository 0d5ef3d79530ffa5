"""Several records as one: mean and spread over seeds, speed-ups, a plot; and the README's tables. Imports no torch.

python benchmarks/tables.py     write the README's tables and plots again from the records
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from utils import records
from utils.errors import UserError, run
from utils.files import atomic_path
from utils.flags import CALIBRATORS
from utils.records import ROOT, Record, Row

IN_PYTORCH = {
    "FP32": "FP32",
    "FP32 fine-tuned": "FP32-TUNED",
    "INT8-QAT": "FAKE-QUANT-QAT",
    "INT8-PTC": "FAKE-QUANT-PTC",
}
IN_TENSORRT = {
    "FP16": "FP16",
    "INT8-QAT": "INT8-QAT",
    "INT8-PTC": "INT8-PTC",
    "implicit INT8-PTC": "INT8-PTC-IMPLICIT",
}
"""Title -> precision."""
FAST, SLOW = "INT8-QAT", "FP16"
PLOT = "summary.png"
SAME = ("dataset", "epochs", "quantization")  # of the records that a mean is taken of

Groups = dict[str, list[Record]]


def load(folder: Path) -> Groups:
    """The inference records in a folder, by network and, where it is not the default, calibrator.

    Raises:
        UserError: a file is damaged, or two records of a network are not seeds of one study.
    """
    groups: Groups = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        if record.get("kind") == "inference":
            calibrator = record.get("quantization", {}).get("calibrator", "calibrator not recorded")
            other = "" if calibrator == CALIBRATORS[0] else f", {calibrator}"
            group = groups.setdefault(f"{record['model']}, {record['stem']} stem{other}", [])
            for there in group:
                if record["seed"] == there["seed"] or any(
                    record.get(key) != there.get(key) for key in SAME
                ):
                    what = f"its seed is there twice, or its {', '.join(SAME)} differ from those of another seed"
                    raise UserError(
                        f"{path} is not of one study with the records beside it: {what}"
                    )
            group.append(record)
    return groups


def rows_of(
    group: Sequence[Record], backend: str, precision: str, batch_size: int | None = None
) -> list[Row]:
    """At most one row of each record: the first of that back end, precision and, if given, batch size."""
    found = []
    for record in group:
        rows = [
            row
            for row in record["rows"]
            if (row["backend"], row["precision"]) == (backend, precision)
        ]
        found += [row for row in rows if batch_size in (None, row["batch_size"])][:1]
    return found


def deltas_of(group: Sequence[Record]) -> list[list[float]]:
    """What QAT and what calibration alone change in each record's accuracy, in points."""
    return [
        [row["delta_pct"] for row in rows_of(group, "pytorch", f"FAKE-QUANT-{kind}")]
        for kind in ("QAT", "PTC")
    ]


def median_ms(rows: Sequence[Row]) -> float:
    return statistics.median(row["latency_ms"]["p50"] for row in rows)


def mean_and_spread(values: Sequence[float], spec: str = ".2f") -> str:
    """Mean ± sample standard deviation, the latter where there are two values or more."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), spec)
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def accuracies(group: Sequence[Record], backend: str, precisions: Iterable[str]) -> list[str]:
    """Mean and spread of the test accuracy in percent in each precision."""
    return [
        mean_and_spread([row["accuracy_pct"] for row in rows_of(group, backend, key)])
        for key in precisions
    ]


def accuracy_table(groups: Groups) -> str:
    """Test accuracy in percent of each network in PyTorch, over its seeds, and what QAT and calibration alone change.

    QAT also trains for longer: its difference to the float network fine-tuned as long is that of quantization alone.
    """
    lines = [["network", "seeds", *IN_PYTORCH, "QAT − FP32", "QAT − fine-tuned", "PTC − FP32"]]
    for name, group in groups.items():
        cells = [name, str(len(group)), *accuracies(group, "pytorch", IN_PYTORCH.values())]
        qat, ptc = deltas_of(group)
        both = [
            [rows_of([record], "pytorch", key) for key in ("FAKE-QUANT-QAT", "FP32-TUNED")]
            for record in group
        ]
        paired = [
            q[0]["accuracy_pct"] - t[0]["accuracy_pct"] for q, t in both if q and t
        ]  # infer.py alone makes no tuned one
        lines.append(cells + [mean_and_spread(values, "+.2f") for values in (qat, paired, ptc)])
    return records.markdown_table(lines)


def engines_table(groups: Groups) -> str:
    """Test accuracy in percent of engines, over the seeds that have them, beside PyTorch's FP32 of the same seeds.

    Agreements are of predictions with those of the fake quantized network in PyTorch.
    """
    lines = [
        ["network", "seeds", "FP32 in PyTorch", *IN_TENSORRT, "QAT agreement", "PTC agreement"]
    ]
    for name, group in groups.items():
        group = [record for record in group if rows_of([record], "tensorrt", FAST)]
        if group:
            cells = [name, str(len(group)), *accuracies(group, "pytorch", ["FP32"])]
            cells += accuracies(group, "tensorrt", IN_TENSORRT.values())
            agreements = [
                [row["agreement_pct"] for row in rows_of(group, "tensorrt", key)]
                for key in ("INT8-QAT", "INT8-PTC")
            ]
            lines.append(cells + list(map(mean_and_spread, agreements)))
    return records.markdown_table(lines)


def speed_table(groups: Groups) -> str:
    """What TensorRT makes of each network: medians over the records that have engines."""
    titles = [
        "network",
        "batch",
        f"{SLOW} ms",
        f"{FAST} ms",
        "speed-up",
        f"{SLOW} images/s",
        f"{FAST} images/s",
    ]
    titles += [f"{SLOW} MB", f"{FAST} MB", "INT8 layers"]
    lines = [titles]
    for name, group in groups.items():
        sizes = {
            row["batch_size"]
            for record in group
            for row in record["rows"]
            if row["backend"] == "tensorrt"
        }
        for size in sorted(sizes):
            slow, fast = (rows_of(group, "tensorrt", precision, size) for precision in (SLOW, FAST))
            if not slow or not fast:
                continue
            times = [median_ms(slow), median_ms(fast)]
            cells = [
                name,
                str(size),
                *(f"{time:.3f}" for time in times),
                f"{times[0] / times[1]:.2f}",
            ]
            cells += [f"{1000 * size / time:,.0f}" for time in times]
            cells += [
                f"{statistics.median(row['file_mb'] for row in rows):.1f}" for rows in (slow, fast)
            ]
            lines.append([*cells, f"{fast[0]['int8_layers']} of {fast[0]['layers']}"])
    return records.markdown_table(lines)


def points(groups: Groups) -> dict[str, list[float]]:
    """Network -> speed-up of INT8-QAT over FP16 at the largest batch size; accuracies of QAT and PTC less FP32's, in points."""
    found = {}
    for name, group in groups.items():
        sizes = [row["batch_size"] for row in rows_of(group, "tensorrt end-to-end", FAST)]
        slow, fast = (
            rows_of(group, "tensorrt", precision, max(sizes, default=None))
            for precision in (SLOW, FAST)
        )
        if slow and fast:
            deltas = [round(statistics.fmean(values), 3) for values in deltas_of(group)]
            found[name] = [round(median_ms(slow) / median_ms(fast), 3), *deltas]
    return found


def plot(folder: Path) -> None:
    """Accuracy lost against speed gained, for each network with QAT and with calibration alone, as PNG with `points` in it."""
    found = points(load(folder))
    if not found:
        return  # no engines, no speeds
    with records.axes_of(
        folder / PLOT, dpi=110, metadata={"Description": json.dumps(found)}
    ) as axes:
        for index, (name, (speed_up, qat, ptc)) in enumerate(found.items()):
            style = {
                "marker": "osD^v<>Ph*"[index % 10],
                "edgecolors": f"C{index}",
                "s": 70,
                "zorder": 2,
            }
            axes.plot([speed_up] * 2, [ptc, qat], color=f"C{index}", linewidth=1, zorder=1)
            axes.scatter(speed_up, ptc, facecolors="white", **style)
            axes.scatter(speed_up, qat, facecolors=f"C{index}", label=name, **style)
        axes.axhline(0, color="grey", linewidth=0.8, zorder=0)
        axes.set(
            xlabel=f"speed-up of {FAST} over {SLOW}, largest batch",
            ylabel="accuracy less FP32's (points)",
        )
        axes.set_title("filled: QAT, hollow: calibration alone", fontsize="medium")


def record_table(path: Path) -> str:
    """All rows of one record."""
    return records.markdown_table(records.cells_of(records.read(path)["rows"]), names=2)


def training_table(path: Path) -> str:
    """A record of training speed; ours against the reference by time per image."""
    rows = records.read(path)["rows"]
    titles = [
        "recipe",
        "mode",
        "stem",
        "batch",
        "s an epoch",
        "images/s",
        "times the reference",
        "TFLOP/s",
        "chip's peak",
    ]
    lines = [[*titles, "compile s"]]
    for row in rows:
        same = [other for other in rows if all(other[key] == row[key] for key in ("mode", "stem"))]
        reference = next(
            (other["images_s"] for other in same if other["recipe"] == "reference"), None
        )
        peak = f"{row['peak_tflops'] or '-'} ({row['arithmetic']})"
        cells = [
            row["recipe"],
            row["mode"],
            row["stem"],
            str(row["batch_size"]),
            f"{row['epoch_s']:.2f}",
        ]
        cells += [
            f"{row['images_s']:,.0f}",
            f"{row['images_s'] / reference:.1f}" if reference else "-",
        ]
        lines.append([*cells, f"{row['tflops']:.1f}", peak, f"{row['compile_s']:.0f}"])
    return records.markdown_table(lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "table": record_table,
    "accuracy": lambda folder: accuracy_table(load(folder)),
    "engines": lambda folder: engines_table(load(folder)),
    "training": training_table,
    "speed": lambda folder: speed_table(load(folder)),
}


def refresh_tables(text: str) -> str:
    """Replace what stands between `<!-- KIND: PATH -->` and `<!-- end -->` by the table of that kind, see `TABLES`."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}: {match[2]} -->\n{TABLES[match[1]](ROOT / match[2])}\n<!-- end -->"

    return re.sub(
        rf"<!-- ({'|'.join(TABLES)}): (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL
    )


def main() -> None:
    readme = ROOT / "README.md"
    text = refresh_tables(readme.read_text())
    with atomic_path(readme) as partial:
        partial.write_text(text)
    for image in re.findall(rf"\(([^)\s]+)/{PLOT}\)", text):
        plot(ROOT / image)


if __name__ == "__main__":
    run(main)
