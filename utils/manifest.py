"""What an export folder holds: its graphs, their tensors, and the manifest. Imports no torch.

<precision>.onnx         for ONNX Runtime and OpenVINO, and for TensorRT without strong typing
<precision>_fp16.onnx    the same graph, FP16 where it is not INT8: strongly typed TensorRT's
predictions.npz          what PyTorch predicts of the test images in each precision
export.json              the manifest: network, data, quantization, PyTorch's rows
sensitivity.json         what scans of single layers have found so far
engines/                 TensorRT's cache
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import regular, sha256
from utils.records import Row
from utils.schema import parse
from utils.specs import DataSpec, LayerFacts, NetworkSpec, Quantization

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
"""Names of a graph's input (batch, height, width, 3) uint8, its output (batch, classes) float32,
and the dimension that is free in both."""

MANIFEST, PREDICTIONS, ENGINES = "export.json", "predictions.npz", "engines"


@dataclass(frozen=True)
class Precision:
    """One way to run an exported network.

    Args:
        flag: the command line's word for it, without dashes.
        help: what the command line says of the flag.
        in_pytorch: the row of PyTorch whose predictions it is compared with. Fake quantization
            computes in float exactly what an INT8 engine computes.
        int8: whether its graph has Q/DQ nodes.
    """

    flag: str
    help: str
    in_pytorch: str
    int8: bool


PRECISIONS = {
    "FP32": Precision("FP32", "FP32 by the back end too, not by PyTorch alone", "FP32", False),
    "FP16": Precision("FP16", "FP16", "FP16", False),
    "INT8-PTC": Precision("INT8PTC", "INT8 by calibration alone (PTQ)", "FAKE-QUANT-PTC", True),
    "INT8-QAT": Precision("INT8QAT", "INT8 of a QAT checkpoint", "FAKE-QUANT-QAT", True),
}
"""Name in tables and records -> what it is."""

INT8 = [name for name, precision in PRECISIONS.items() if precision.int8]
"""The best one last."""

FLOAT = [name for name, precision in PRECISIONS.items() if not precision.int8]

IMPLICIT = "INT8-PTC-IMPLICIT"
"""FP32's graph with ranges that TensorRT's own calibration finds; it has no graph of its own."""


def graph_file(precision: str, remainder: str = "fp32") -> str:
    """The file that holds the graph of one of `PRECISIONS`.

    Args:
        remainder: "fp16" for the INT8 graph that computes in FP16 where it is not quantized.
    """
    stem = precision.lower().replace("-", "_")
    half = remainder == "fp16" and PRECISIONS[precision].int8
    return f"{stem}_fp16.onnx" if half else f"{stem}.onnx"


ANEW = "^"
"""In a node's name: the layer's own begins again."""


def scope_of(name: str, caller: str) -> str:
    """What a module adds to the names of its nodes: "enc/blocks.0/conv1" of enc.blocks.0.conv1.

    Args:
        caller: the module that calls it, whose names stand before it. If it does not hold the
            called one, which several may share, all of the name follows `ANEW`.
    """
    if not f"{name}.".startswith(f"{caller}.") and caller:
        return f"{ANEW}/{scope_of(name, '')}"
    # numbers stay with the word before them
    words = re.findall(r"[^.]+(?:\.\d+(?=\.|$))*", name)
    added = []
    for count, word in enumerate(words, start=1):
        container = ".".join(words[:count])
        if not f"{caller}.".startswith(f"{container}."):
            added.append(word)
    return "/".join(added)


def layer_of(node: str) -> str:
    """The layer of a node: layer1.0.conv1 of "/model/layer1/layer1.0/conv1/Conv".

    "" for what the network's own forward computes, and for the nodes that normalise the images.
    """
    parts: list[str] = []
    for part in node.rpartition(f"/{ANEW}/")[2].strip("/").split("/")[:-1]:
        # a module that calls itself adds no name
        if not part:
            continue
        # what a Sequential holds is named with it: "layer1", then "layer1.0"
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    root, _, layer = ".".join(parts).partition(".")
    return layer if root == "model" else ""


@dataclass
class Manifest:
    """`export.json`.

    Args:
        seed: of the training.
        int8_nodes: precision -> the graph's nodes that are meant to run in INT8.
        files: SHA-256 of every other file of the export, by name.
        environment: where PyTorch's rows were measured.
        rows: PyTorch's.
        test_digest: tells the test images from any others (`dataset.ImageData.test_digest`); None
            in exports of earlier versions.
        layers: INT8 precision -> its network's layers; exports of earlier versions have none.
    """

    model: str
    stem: str
    data: DataSpec
    seed: int
    quantization: Quantization
    int8_nodes: dict[str, list[str]]
    files: dict[str, str]
    environment: dict[str, str | None]
    rows: list[Row]
    test_digest: str | None = None
    layers: dict[str, list[LayerFacts]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        NetworkSpec(self.model, self.stem, len(self.data.classes))  # raises if it cannot be
        described = {PREDICTIONS, *(graph_file(name) for name in self.int8_nodes)}
        if missing := described - self.files.keys():
            raise ValueError(f"files lacks {', '.join(sorted(missing))}")

    def lacks(self, precision: str) -> bool:
        """Whether `precision` needs a graph with Q/DQ nodes that was not exported."""
        return precision in INT8 and precision not in self.int8_nodes


def read_export(folder: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Manifest of an export, and what PyTorch predicts of the test images by row, FP32 always.

    Graphs may be missing: a deployment needs one of them.

    Raises:
        UserError: something else is missing, or a file is not the one that was exported.
    """
    try:
        manifest = parse(Manifest, json.loads(regular(folder / MANIFEST).read_text()), MANIFEST)
        for name, digest in manifest.files.items():
            path = folder / Path(name).name
            if (path.exists() or name == PREDICTIONS) and sha256(path) != digest:
                raise UserError(f"{path} is not the file that {MANIFEST} describes")
        with np.load(folder / PREDICTIONS) as arrays:
            # an error where FP32 is missing, which all others are compared with
            return manifest, {"FP32": arrays["FP32"], **arrays}
    except PermissionError:
        raise
    except Exception as error:  # json, zipfile and NumPy raise anything on damaged files
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        what = f"{folder} is no complete export ({kind}{error})"
        raise UserError(f"{what}; make one with infer.py --load_ckpt") from None
