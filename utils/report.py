"""A record as a page: one HTML file that needs no network and no scripts. Imports no torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.engine_layers import (
    LARGEST_CLIPPED_PCT,
    LEAST_USED_PCT,
    SLOWER,
    float_engines,
    layer_rows,
)
from utils.files import atomic_path
from utils.manifest import INT8, PRECISIONS, Manifest
from utils.plot import new_figure
from utils.records import Record, Row, cells_of

MOST_IMAGES, MOST_CLASSES, THUMBNAIL_PIXELS = 24, 20, 128


def write(
    path: Path,
    record: Record,
    manifest: Manifest,
    predictions: Mapping[str, np.ndarray],
    data: Any = None,
) -> None:
    """Write the page.

    Args:
        manifest, predictions: of the export, as `read_export` returns them.
        data: a `dataset.ImageData`; None: there are no test images.

    Raises:
        OSError: the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    tables = {}
    for name in reversed(INT8):
        if name in manifest.layers:
            tables[name] = layer_rows(manifest.layers[name], record.engines, name)
    loader = FileSystemLoader(Path(__file__).parent)
    lines = {"trim_blocks": True, "lstrip_blocks": True}
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **lines)
    page = jinja.get_template("report.html.j2").render(
        record=record,
        cells=cells_of(record.rows),
        sensitivity=record.sensitivity,
        tables=tables,
        floats=float_engines(record.engines),
        plot=speedup_plot(speedups(record.rows)),
        images=_images(predictions, data),
        limits=(LARGEST_CLIPPED_PCT, LEAST_USED_PCT, round(100 * SLOWER - 100)),
    )
    with atomic_path(path, follow_link=True) as partial:
        # names of folders need not be UTF-8
        partial.write_text(page, encoding="utf-8", errors="replace")


def _images(predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, Any]:
    """What the page shows of test images, where FP32 and INT8 predicted them."""
    predicted = [name for name in INT8 if PRECISIONS[name].in_pytorch in predictions]
    if data is None or not predicted:
        return {}
    float_labels = predictions["FP32"]
    int8_labels = predictions[PRECISIONS[predicted[-1]].in_pytorch]
    return {
        "precision": predicted[-1],
        "confusion": confusion(data.test_labels, float_labels, int8_labels, data.classes),
        "disagreements": disagreements(data, float_labels, int8_labels),
        "count": len(int8_labels),
        "differ": int((int8_labels != float_labels).sum()),
    }


def speedups(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Label, speed-up over the same back end's FP16 (else FP32) and points of accuracy lost."""
    timed = {}
    for row in rows:
        if row.latency_ms["p50"] and row.delta_pct is not None:
            timed[row.backend, row.precision, row.batch_size] = row
    points = []
    for (backend, precision, batch_size), row in timed.items():
        base = timed.get((backend, "FP16", batch_size)) or timed.get((backend, "FP32", batch_size))
        if precision.startswith("INT8") and base:
            ratio = base.latency_ms["p50"] / row.latency_ms["p50"]
            label = f"{precision}, batch {batch_size}, over {backend}'s {base.precision}"
            points.append((label, ratio, -row.delta_pct))
    return points


def speedup_plot(points: Sequence[tuple[str, float, float]]) -> str:
    """The points as an SVG element; "" if there are none."""
    if not points:
        return ""
    figure = new_figure(figsize=(6, 4))
    from matplotlib import rc_context

    # text stays text, in grey, which is read on white and on black
    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    look = {"svg.fonttype": "none", "svg.hashsalt": "report", **dict.fromkeys(parts, "grey")}
    with rc_context(look):
        axes = figure.subplots()
        for index, (label, ratio, lost_pct) in enumerate(points):
            axes.scatter(ratio, lost_pct, s=60, color=f"C{index % 10}", label=label)
        axes.axvline(1, color="grey", linestyle=":")
        axes.axhline(0, color="grey", linestyle=":")
        axes.set(xlabel="speed-up of INT8 (×)", ylabel="accuracy lost (points)")
        figure.legend(loc="outside lower center", fontsize="small", framealpha=0)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return text.getvalue()[text.getvalue().index("<svg") :]


def confusion(
    labels: np.ndarray, reference: np.ndarray, predicted: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    """Images of each class by the class predicted: in INT8, and how many more than in FP32.

    Of many classes only those with the most wrong predictions.
    """
    counts = np.zeros((2, len(classes), len(classes)), int)
    np.add.at(counts[0], (labels, reference), 1)
    np.add.at(counts[1], (labels, predicted), 1)
    wrong = counts[1].sum(1) - counts[1].diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES])
    part = counts[:, shown][:, :, shown]
    return {
        "classes": [classes[index] for index in shown],
        "counts": part[1].tolist(),
        "more": (part[1] - part[0]).tolist(),
        "all": len(shown) == len(classes),
    }


def disagreements(
    data: Any, reference: np.ndarray, predicted: np.ndarray
) -> list[tuple[str, str, str, str]]:
    """Picture as a data: URI, true class, FP32's and INT8's, of the first images that differ."""
    from PIL import Image

    found = []
    for index in np.flatnonzero(reference != predicted)[:MOST_IMAGES]:
        image = Image.fromarray(data.test_images[index])
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        png = io.BytesIO()
        image.save(png, format="PNG")
        uri = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        labels = (data.test_labels[index], reference[index], predicted[index])
        found.append((uri, *(data.classes[label] for label in labels)))
    return found
