"""A float or quantized network to ONNX: the one artifact that every back end reads."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from utils.backends.pytorch import FromImages
from utils.files import atomic_path
from utils.quantization.calibrate import require_calibrated
from utils.quantization.fold import to_inference

OPSET = 17  # 13 brought per-channel QuantizeLinear; TensorRT 8.6 reads up to 17
FP16_OPSET, FP16_IR = 19, 9  # the first whose QuantizeLinear takes FP16 scales
SMALLEST_FP16 = 6e-8
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def export_onnx(
    model: nn.Module,
    path: Path,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write the inference form of `model`, and beside it the same graph in FP16 (`..._fp16.onnx`, or `fp16.onnx`).

    Both take raw images (batch, H, W, 3) uint8 and return logits (batch, classes) float32, for any batch. Each quantizer
    becomes a QuantizeLinear / DequantizeLinear pair with a constant scale and zero point 0.

    Raises:
        UserError: a range was never calibrated.
        OSError: a file cannot be written.
        onnx.checker.ValidationError: the exporter made an invalid graph.
    """
    require_calibrated(model)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the TorchScript exporter is deprecated, its successor cannot export fake quantization
        torch.onnx.export(
            FromImages(to_inference(model), mean, std).eval(),
            (torch.zeros(2, *image_size, 3, dtype=torch.uint8),),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
        )
    graph = onnx.load_from_string(buffer.getvalue())
    merge_shared_quantizers(graph)
    fp16 = "fp16" if path.stem == "fp32" else f"{path.stem}_fp16"
    for version, target in ((graph, path), (to_fp16(graph), path.with_stem(fp16))):
        onnx.checker.check_model(version, full_check=True)
        with atomic_path(target) as partial:
            partial.write_bytes(version.SerializeToString())


def int8_nodes(path: Path) -> list[str]:
    """Names of the nodes of a graph that read a quantized activation, and so are meant to run in INT8.

    A pool over a single pixel is left out: it does nothing, and an engine has no layer for it.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    constants = {tensor.name for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    quantized = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and made_by[node.input[0]].input[0] not in constants
    }
    readers = [
        node
        for node in graph.node
        if node.op_type != "QuantizeLinear" and quantized & set(node.input)
    ]
    return [
        node.name
        for node in readers
        if node.op_type != "GlobalAveragePool" or shapes[node.input[0]][2:] != [1, 1]
    ]


def to_fp16(model: ModelProto) -> ModelProto:
    """A copy that computes in FP16 whatever it does not compute in INT8; what goes in and comes out keeps its type."""
    model = copy.deepcopy(model)
    model.ir_version, model.opset_import[0].version = FP16_IR, FP16_OPSET
    constants = [
        a.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for a in node.attribute
        if a.name == "value"
    ]
    scales = {
        node.input[1]
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    codes = _weight_codes(model)
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            if tensor.name in scales:  # a channel that does nothing has a scale of almost 0
                values = np.maximum(values, np.float16(SMALLEST_FP16))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, (scale, values) in codes.items():  # weights stay on the grid of their rounded scale
        steps = (
            numpy_helper.to_array(tensors[scale])
            .astype(np.float32)
            .reshape(-1, *[1] * (values.ndim - 1))
        )
        tensors[name].CopyFrom(numpy_helper.from_array((values * steps).astype(np.float16), name))
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Cast" else ():
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
        node.output[:] = [f"{OUTPUT}_fp16" if name == OUTPUT else name for name in node.output]
    model.graph.node.append(
        helper.make_node(
            "Cast", [f"{OUTPUT}_fp16"], [OUTPUT], name="cast_logits", to=TensorProto.FLOAT
        )
    )
    del model.graph.value_info[:]
    return model


def _weight_codes(model: ModelProto) -> dict[str, tuple[str, np.ndarray]]:
    """Name of each quantized weight -> name of its scale, and its INT8 codes as floats."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in tensors:
            weight, scale = (tensors[name] for name in node.input[:2])
            found[node.input[0]] = (
                node.input[1],
                np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))),
            )
    return found


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
