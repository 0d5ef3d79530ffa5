"""A float or quantized network to ONNX: the one artifact that every back end reads."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import onnx
import torch
from onnx import ModelProto
from torch import nn

from layers.fold import to_inference
from utils.files import atomic_path

OPSET = 17  # 13 brought per-channel QuantizeLinear; TensorRT 8.6 reads up to 17
INPUT, OUTPUT, BATCH = "input", "logits", "batch"


def export_onnx(model: nn.Module, path: Path, image_shape: tuple[int, int, int]) -> None:
    """Write the inference form of `model`: input (batch, 3, H, W) float32 normalised, output (batch, classes), any batch.

    Each quantizer becomes a QuantizeLinear / DequantizeLinear pair with a constant scale and zero point 0.

    Raises:
        OSError: the file cannot be written.
        onnx.checker.ValidationError: the exporter made an invalid graph.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated, its successor cannot export fake quantization
        torch.onnx.export(
            to_inference(model),
            (torch.zeros(2, *image_shape),),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
        )
    graph = onnx.load_from_string(buffer.getvalue())
    merge_shared_quantizers(graph)
    onnx.checker.check_model(graph, full_check=True)
    with atomic_path(path) as partial:
        partial.write_bytes(graph.SerializeToString())


def merge_shared_quantizers(model: ModelProto) -> None:
    """Let every tensor that is quantized twice to one scale be quantized once, in place.

    The exporter stores equal scales once and puts Identity nodes before their other readers; TensorRT takes those scales
    for computed ones and fuses nothing. Without them, a block's input that goes to a convolution and to the residual
    addition has two equal pairs of nodes: one pair is enough.
    """
    renamed: dict[str, str] = {}
    seen: dict[tuple[str, ...], str] = {}
    kept = []
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type == "Identity" and node.output[0] != OUTPUT:
            renamed[node.output[0]] = node.input[0]
            continue
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            key = (node.op_type, *node.input)
            if key in seen:
                renamed[node.output[0]] = seen[key]
                continue
            seen[key] = node.output[0]
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
