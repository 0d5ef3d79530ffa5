"""A record as a picture. Imports no torch."""

from __future__ import annotations

import io
import os
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import atomic_path
from utils.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "os^Dv<>Pp*hXd8H"


def new_figure(**options: Any) -> Figure:
    """A figure of matplotlib's, with a constrained layout."""
    # what a notebook left there may not be installed
    os.environ["MPLBACKEND"] = "Agg"
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def plot(path: Path, record: Record) -> None:
    """Accuracy against throughput, one point for each row that has both, as PNG.

    Raises:
        UserError: no row has both.
    """
    rows = [row for row in record.rows if row.throughput_img_s and row.accuracy_pct is not None]
    if not rows:
        raise UserError("--plot: no row has both an accuracy and a throughput")
    # a colour for each network, a marker for each batch size
    networks = dict.fromkeys(f"{row.backend} {row.precision}" for row in rows)
    colours = {network: f"C{index}" for index, network in enumerate(networks)}
    batch_sizes = sorted({row.batch_size for row in rows})
    markers = dict(zip(batch_sizes, cycle(MARKERS), strict=False))

    figure = new_figure(figsize=(8, 5))
    axes = figure.subplots()
    for row in rows:
        colour = colours[f"{row.backend} {row.precision}"]
        marker = markers[row.batch_size]
        axes.scatter(row.throughput_img_s, row.accuracy_pct, color=colour, marker=marker, s=60)
    for network, colour in colours.items():
        axes.scatter([], [], color=colour, label=network)
    for batch_size, marker in markers.items():
        axes.scatter([], [], color="grey", marker=marker, label=f"batch {batch_size}")
    machine = record.environment["gpu"] or record.environment["cpu"]
    axes.set(xscale="log", xlabel="images/s", ylabel="test accuracy (%)")
    axes.set_title(f"{record.model} on {record.dataset}, {machine}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    # not all that can be written to can be sought in
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    with atomic_path(path, follow_link=True) as partial:
        partial.write_bytes(png.getvalue())
