"""Records: what a run measured, as JSON, and the tables made of them. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_path
from utils.specs import Quantization

ROOT = Path(__file__).parent.parent


@dataclass
class Row:
    """One network on one back end, at one batch size. What was not measured is None.

    Args:
        delta_pct: accuracy less that of PyTorch's FP32, in points.
        agreement_pct: predictions that equal those of the reference.
        latency_ms: percentiles "p50" and "p99", for a batch.
        layers, int8_layers: how many the engine has, and how many of them run in INT8.
    """

    backend: str
    precision: str
    accuracy_pct: float | None = None
    delta_pct: float | None = None
    agreement_pct: float | None = None
    batch_size: int | None = None
    latency_ms: dict[str, float | None] = field(default_factory=lambda: {"p50": None, "p99": None})
    throughput_img_s: float | None = None
    file_mb: float | None = None
    int8_layers: int | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.latency_ms.keys() != {"p50", "p99"}:
            raise ValueError("latency_ms has not just p50 and p99")

    def timed(self, batch_size: int, p50_ms: float, p99_ms: float) -> Row:
        """This row with the latency of a batch."""
        return replace(
            self,
            batch_size=batch_size,
            latency_ms={"p50": p50_ms, "p99": p99_ms},
            throughput_img_s=1000 * batch_size / p50_ms,
        )


@dataclass(frozen=True)
class Layer:
    """One layer that a back end runs, which may hold several nodes of the graph.

    Args:
        precision: type of its first input ("INT8", "FP16", ...), "-" if the back end does not tell.
        tactic: the kernel that it runs.
        ms: its time alone, for a batch.
    """

    name: str
    kind: str
    precision: str
    tactic: str
    ms: float | None = None

    def __str__(self) -> str:
        return f"{self.precision:5} {self.kind:24} {self.name}  {self.tactic}"


@dataclass(frozen=True)
class Engine:
    """What a back end runs of one precision.

    Args:
        batch_size: of the layers' times.
        missed: the graph's nodes that are meant for INT8, but not seen to run in it.
    """

    backend: str
    precision: str
    batch_size: int
    layers: list[Layer]
    missed: list[str]


@dataclass(frozen=True)
class Sensitivity:
    """What rounding some layers costs, on val images and by fake quantization.

    Ratios are of the logits' signal to their noise, in decibels; None: nothing changes.

    Args:
        layers: name of one layer, or a pattern for all of a block, as `layer3.*`, or of all.
        only_sqnr_db, only_accuracy_pct: with just these layers in INT8.
        without_sqnr_db, without_accuracy_pct: with all but these layers in INT8.
    """

    layers: str
    only_sqnr_db: float | None
    only_accuracy_pct: float
    without_sqnr_db: float | None
    without_accuracy_pct: float


@dataclass(frozen=True)
class Scan:
    """The sensitivity of every quantized layer and block of a network.

    Args:
        precision: the network's, of `utils.manifest.PRECISIONS`.
        images: how many val images it is of.
        parts: layers, blocks and all; those that cost the most come first.
    """

    precision: str
    images: int
    parts: list[Sensitivity]


@dataclass(frozen=True)
class Candidate:
    """An engine that `--auto_quant` tried.

    Args:
        skip_layers: those in float; of a float engine `["*"]`.
        latency_ms: the median, of a batch.
        val_accuracy_pct: the engine's own.
        least_pct: what that must be.
    """

    precision: str
    skip_layers: list[str]
    latency_ms: float
    val_accuracy_pct: float
    least_pct: float

    @property
    def within(self) -> bool:
        """Whether it keeps the accuracy."""
        return self.val_accuracy_pct >= self.least_pct


@dataclass(frozen=True)
class Choice:
    """What `--auto_quant` chose.

    Args:
        skip_layers: of the candidate that it chose.
        candidates: in the order in which they were tried.
    """

    skip_layers: list[str]
    candidates: list[Candidate]


@dataclass
class Record:
    """An inference record: one checkpoint on the back ends of one machine.

    Args:
        flags: those of the command line that have a value, defaults among them.
        commit: of this project; None: not in a checkout.
        environment: hardware and versions.
        engines: what an audit or a report looked into.
        sensitivity: of the layers, where it was scanned.
        choice: of layers, where there was one.
    """

    model: str
    stem: str
    dataset: str
    seed: int
    flags: dict[str, str]
    commit: str | None
    environment: dict[str, str | None]
    rows: list[Row]
    quantization: Quantization | None = None
    engines: list[Engine] = field(default_factory=list)
    kind: str = "inference"
    sensitivity: Scan | None = None
    choice: Choice | None = None


PACKAGES = {
    "torch": ("pytorch", ("torch",)),
    "tensorrt": ("tensorrt", ("tensorrt", "tensorrt_rtx_bindings")),
    "openvino": ("openvino", ("openvino",)),
    "onnxruntime": ("onnxruntime", ("onnxruntime",)),
}
"""Package -> the back end that it is, and the modules that say its version."""


def environment(backends: Iterable[str]) -> dict[str, str | None]:
    """Hardware, and versions of the packages that ran: those behind `backends`."""
    ran = set(backends)
    versions = dict.fromkeys(PACKAGES)
    for package, (backend, modules) in PACKAGES.items():
        loaded = [sys.modules[name] for name in modules if name in sys.modules]
        if backend in ran and loaded:
            versions[package] = getattr(loaded[0], "__version__", None)
    machine = {"gpu": _gpu_name(), "cpu": _cpu_name(), "cpu_threads": _cpu_threads()}
    return {**machine, **versions, "python": platform.python_version()}


def merge_environment(
    exported: dict[str, str | None], torch_rows: list[Row], rows: list[Row]
) -> tuple[dict[str, str | None], list[Row]]:
    """This machine's environment with the export's torch, and the export's rows.

    If the export was made on other hardware, or with more or fewer threads of a CPU, its latencies
    must not stand beside this machine's: they become None.
    """
    here = environment(row.backend for row in rows)
    here["torch"] = exported.get("torch")
    differs = any(here[key] != exported.get(key) for key in ("gpu", "cpu"))
    # earlier exports do not say
    other_threads = exported.get("cpu_threads") not in (None, here["cpu_threads"])
    if differs or (other_threads and here["gpu"] is None):
        untimed = {}
        for row in torch_rows:
            accuracies = row.accuracy_pct, row.delta_pct, row.agreement_pct
            untimed[row.backend, row.precision] = Row(row.backend, row.precision, *accuracies)
        torch_rows = list(untimed.values())
    return here, torch_rows


def _gpu_name() -> str | None:
    """The GPU that this process uses, by torch or by PyCUDA."""
    torch, cuda = sys.modules.get("torch"), sys.modules.get("pycuda.driver")
    if torch is not None:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if cuda is None:
        return None
    try:
        return cuda.Context.get_device().name()
    except cuda.Error:  # there is none, so that TensorRT was not used
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"model name\s*: (.*)", text)
    return match[1].strip() if match else platform.processor() or platform.machine()


def allowed_threads() -> int:
    """How many threads OMP_NUM_THREADS allows a back end; 0, its own default, if it says nothing.

    PyTorch obeys that variable by itself.
    """
    # "4,2" are those of the outer and of the inner of nested loops
    outer = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(outer) if outer.isdecimal() else 0


def _cpu_threads() -> str:
    """How many threads may compute: what OMP_NUM_THREADS says, or the CPUs of this process."""
    # not on macOS
    cpus = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return str(allowed_threads() or len(cpus(0)))


def commit() -> str | None:
    """The project's git commit, with "-dirty" if files differ from it.

    Outside a checkout it is what $GIT_COMMIT says, or None.
    """
    # GIT_DIR and the like name another repository, as a hook's environment does
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # a repository above is another one: this project was copied into it
    own["GIT_CEILING_DIRECTORIES"] = str(ROOT.parent)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        said = subprocess.check_output(command, cwd=ROOT, env=own, stderr=subprocess.DEVNULL)
        return said.decode().strip()
    return os.environ.get("GIT_COMMIT")


def write(path: Path, record: Any, follow_link: bool = False) -> None:
    """Write a dataclass or a dictionary as JSON, as `utils.files.atomic_path` does."""
    with atomic_path(path, follow_link) as partial:
        partial.write_text(json.dumps(record, indent=1, default=asdict) + "\n")


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, it will be made again") from None


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
"""Field of a row -> its title and format in a table."""


def cells_of(rows: Sequence[Row]) -> list[list[str]]:
    """Rows as cells of a table, titles on top; the first two columns are names, others numbers."""
    lines = [[title for title, _ in COLUMNS.values()]]
    for row in rows:
        values = {**vars(row), **row.latency_ms}
        cells = []
        for key, (_, spec) in COLUMNS.items():
            cells.append("-" if values[key] is None else format(values[key], spec))
        lines.append(cells)
    return lines


def text_table(lines: Sequence[Sequence[str]], names: int) -> str:
    """Lines of cells for a terminal: `names` columns aligned to the left, others to the right."""
    columns = []
    for index, column in enumerate(zip(*lines, strict=True)):
        width = max(len(cell) for cell in column)
        align = str.ljust if index < names else str.rjust
        columns.append([align(cell, width) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
