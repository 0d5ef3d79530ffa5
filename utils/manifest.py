"""What an export folder holds: its graphs, their tensors, and the manifest. Imports no torch.

    <precision>.onnx         for ONNX Runtime and OpenVINO, and for TensorRT without strong typing
    <precision>_fp16.onnx    the same graph, FP16 where it is not INT8: strongly typed TensorRT's
    predictions.npz          what PyTorch predicts of the test images in each precision
    export.json              the manifest: network, data, quantization, PyTorch's rows
    engines/                 TensorRT's cache
"""

from __future__ import annotations

from dataclasses import dataclass

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
"""Names of a graph's input (batch, height, width, 3) uint8, its output (batch, classes) float32,
and the dimension that is free in both."""

MANIFEST, PREDICTIONS, ENGINES = "export.json", "predictions.npz", "engines"


@dataclass(frozen=True)
class Precision:
    """One way to run an exported network.

    Args:
        flag: the command line's word for it, without dashes.
        in_pytorch: the row of PyTorch whose predictions it is compared with. Fake quantization
            computes in float exactly what an INT8 engine computes.
        int8: whether its graph has Q/DQ nodes.
    """

    flag: str
    in_pytorch: str
    int8: bool


PRECISIONS = {
    "FP32": Precision("FP32", "FP32", int8=False),
    "FP16": Precision("FP16", "FP16", int8=False),
    "INT8-PTC": Precision("INT8PTC", "FAKE-QUANT-PTC", int8=True),
    "INT8-QAT": Precision("INT8QAT", "FAKE-QUANT-QAT", int8=True),
}
"""Name in tables and records -> what it is."""

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
