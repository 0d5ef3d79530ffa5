"""Records: what a run measured, as JSON; and the tables and plots made from them. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Record = dict[str, Any]
ROOT = Path(__file__).parent.parent

COLUMNS: dict[str, tuple[str, str]] = {
    "backend": ("back end", ""),
    "precision": ("precision", ""),
    "accuracy_pct": ("accuracy %", ".2f"),
    "delta_pct": ("Δ FP32", "+.2f"),
    "agreement_pct": ("agreement %", ".2f"),
    "batch_size": ("batch", "d"),
    "p50": ("p50 ms", ".3f"),
    "p99": ("p99 ms", ".3f"),
    "throughput_img_s": ("images/s", ",.0f"),
    "file_mb": ("MB", ".1f"),
    "int8_layers": ("INT8 layers", "d"),
    "layers": ("layers", "d"),
}


def make_row(
    backend: str,
    precision: str,
    accuracy_pct: float | None = None,
    delta_pct: float | None = None,
    agreement_pct: float | None = None,
    batch_size: int | None = None,
    p50: float | None = None,
    p99: float | None = None,
    file_mb: float | None = None,
    int8_layers: int | None = None,
    layers: int | None = None,
) -> Row:
    """One row of an inference record; latencies p50 and p99 in ms, for a batch. What was not measured stays None."""
    return {
        "backend": backend,
        "precision": precision,
        "accuracy_pct": accuracy_pct,
        "delta_pct": delta_pct,
        "agreement_pct": agreement_pct,
        "batch_size": batch_size,
        "latency_ms": {"p50": p50, "p99": p99},
        "throughput_img_s": 1000 * batch_size / p50 if batch_size and p50 else None,
        "file_mb": file_mb,
        "int8_layers": int8_layers,
        "layers": layers,
    }


def environment() -> dict[str, str | None]:
    """Hardware and versions. A package that this process did not load has version None."""
    names = {
        "torch": ("torch",),
        "tensorrt": ("tensorrt", "tensorrt_rtx_bindings"),
        "onnxruntime": ("onnxruntime",),
    }
    loaded = {
        package: next((sys.modules[n] for n in modules if n in sys.modules), None)
        for package, modules in names.items()
    }
    versions = {package: getattr(module, "__version__", None) for package, module in loaded.items()}
    return {"gpu": _gpu_name(), "cpu": _cpu_name(), **versions, "python": platform.python_version()}


def _gpu_name() -> str | None:
    """The GPU that this process uses, by torch or by PyCUDA."""
    torch, cuda = sys.modules.get("torch"), sys.modules.get("pycuda.driver")
    if torch is not None:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return cuda.Context.get_device().name() if cuda is not None else None


def merge_environment(
    exported: dict[str, str | None], rows: list[Row]
) -> tuple[dict[str, str | None], list[Row]]:
    """This machine's environment with the export's torch, and the export's rows.

    If the export was made on other hardware, its latencies must not stand beside this machine's: they become None.
    """
    here = environment()
    here["torch"] = here["torch"] or exported["torch"]
    if any(here[key] != exported[key] for key in ("gpu", "cpu")):
        keep = ("backend", "precision", "accuracy_pct", "delta_pct", "agreement_pct")
        rows = list(
            {
                (row["backend"], row["precision"]): make_row(**{key: row[key] for key in keep})
                for row in rows
            }.values()
        )
    return here, rows


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def commit() -> str | None:
    """The project's git commit, with "-dirty" if files differ from it; outside a checkout what $GIT_COMMIT says, or None."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")


def write(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def read(path: Path) -> Record:
    """What `write` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, it will be made again") from None


def cells_of(rows: list[Row]) -> list[list[str]]:
    """Rows as cells of a table with the titles on top; the first two columns are names, the others numbers."""
    flat = [{**row, **row["latency_ms"]} for row in rows]
    lines = [
        ["-" if row[key] is None else format(row[key], spec) for key, (_, spec) in COLUMNS.items()]
        for row in flat
    ]
    return [[title for title, _ in COLUMNS.values()], *lines]


def text_table(lines: Sequence[Sequence[str]], names: int) -> str:
    """Lines of cells as text for a terminal: the first `names` columns aligned to the left, the others to the right."""
    columns = []
    for index, column in enumerate(zip(*lines, strict=True)):
        align, width = str.ljust if index < names else str.rjust, max(map(len, column))
        columns.append([align(cell, width) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def markdown_table(lines: Sequence[Sequence[str]], names: int = 1) -> str:
    """The same as a Markdown table, the first line its titles."""
    ruler = [":--" if index < names else "--:" for index in range(len(lines[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], ruler, *lines[1:]))


@contextmanager
def axes_of(path: Path, **options: Any) -> Iterator[Axes]:
    """Axes to draw into; then they get a grid and a legend, and are written to `path` as PNG with these options of savefig."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    yield axes
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", **options)
    pyplot.close(figure)


def plot(path: Path, record: Record) -> None:
    """Accuracy against throughput, one point for each row that has both, as PNG."""
    rows = [
        row for row in record["rows"] if row["throughput_img_s"] and row["accuracy_pct"] is not None
    ]
    if not rows:
        raise UserError("--plot: no row has both an accuracy and a throughput")
    networks = dict.fromkeys((row["backend"], row["precision"]) for row in rows)
    markers = dict(
        zip(sorted({row["batch_size"] for row in rows}), cycle("os^Dv<>Pp*hXd8H"), strict=False)
    )
    colours = {
        network: f"C{index}" for index, network in enumerate(networks)
    }  # matplotlib goes round its ten colours
    with axes_of(path, dpi=120) as axes:
        for row in rows:
            colour, marker = colours[row["backend"], row["precision"]], markers[row["batch_size"]]
            axes.scatter(
                row["throughput_img_s"], row["accuracy_pct"], color=colour, marker=marker, s=60
            )
        for (backend, precision), colour in colours.items():
            axes.scatter([], [], color=colour, label=f"{backend} {precision}")
        for batch_size, marker in markers.items():
            axes.scatter([], [], color="grey", marker=marker, label=f"batch {batch_size}")
        machine = record["environment"]["gpu"] or record["environment"]["cpu"]
        axes.set(xscale="log", xlabel="images/s", ylabel="test accuracy (%)")
        axes.set_title(f"{record['model']} on {record['dataset']}, {machine}")
