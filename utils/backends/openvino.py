"""OpenVINO on the CPU as a back end: INT8 kernels for the exported INT8 graph. Imports no torch.

It moves Q/DQ nodes through the graph until layers are INT8. Some graphs become another function
that way, and on CPUs without VNNI sums of products saturate. So `checked_network` compares it with
ONNX Runtime, which takes the nodes literally.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operations

from utils.backends.network import BURST, EVALUATION_BATCH, Network, repeated, require_ends
from utils.errors import UserError
from utils.records import Layer, allowed_threads

OPTIONS = {
    "PERFORMANCE_HINT": "LATENCY",
    # what is not INT8; by default it is bfloat16 where the CPU has that
    "INFERENCE_PRECISION_HINT": "f32",
}

CHECKED_IMAGES = 32
LARGEST_ERROR = 0.2
"""Of logits, as a share of how they differ from image to image. Networks whose INT8 is right have
0.1 and less, hardly trained ones up to 0.22. Where 16 bits saturate it is 0.27 or more."""

TYPES = {"i8": "INT8", "u8": "INT8", "f32": "FP32", "f16": "FP16", "bf16": "BF16"}
"""OpenVINO's types -> a record's."""

KEEP_PIXELS = ("Reorder", "Transpose")
"""Layers that only move values: what they make of pixels are pixels."""

KEEP_SIGN = ("MaxPool", "AvgPool", "ReduceMean", "Reshape", "Convert")
"""Operations that make nothing negative of a first operand that is not."""

ALL_POSITIVE = ("Minimum", "Multiply", "Concat")
"""Operations that make nothing negative if no operand is."""


class OpenVinoNetwork(Network):
    """An ONNX file as a network.

    Args:
        options: properties of OpenVINO beside `OPTIONS`, or in their place.
        batch_size: of evaluations, and of the layers' times.

    Raises:
        UserError: the file is missing, truncated or not a graph that OpenVINO can run.
    """

    name = "openvino"

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any] | None = None,
        batch_size: int = EVALUATION_BATCH,
    ):
        self.path = path
        self.evaluation_batch = batch_size
        self._options = {**OPTIONS, "INFERENCE_NUM_THREADS": allowed_threads(), **(options or {})}
        with self._loading():
            model = core().read_model(path)
            use_unsigned_codes(model)
            keep_extremes_float(model)
        ends = []
        for port in (*model.inputs, *model.outputs):
            kind = port.element_type.get_type_name()
            ends.append((port.any_name, kind, port.partial_shape.rank.get_length()))
        require_ends(path, ends, ("u8", "f32"))
        self.image_shape = tuple(side.get_length() for side in model.input().partial_shape[1:])
        kinds = [node.get_type_name() for node in model.get_ordered_ops()]
        self.is_quantized = "FakeQuantize" in kinds
        self._model = model
        self._requests: dict[int, openvino.InferRequest] = {}  # by batch size

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Context manager: what OpenVINO does not load is a UserError."""
        try:
            yield
        except Exception as error:  # a RuntimeError, or of one of the libraries that it reads with
            raise UserError(
                f"OpenVINO cannot load {self.path}: {_reason(error)}; export it again"
            ) from None

    def _compile(self, batch_size: int, **options: Any) -> openvino.CompiledModel:
        with self._loading():
            model = self._model.clone()
            model.reshape([batch_size, *self.image_shape])
            return core().compile_model(model, "CPU", self._options | options)

    @cached_property
    def layers(self) -> list[Layer]:
        """What it runs in an evaluation."""
        return read_layers(self._request(self.evaluation_batch).get_compiled_model())

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of a batch, by a copy that is compiled for one batch size.

        One for any size is slower, at batch size 1 by an eighth. And on a CPU with AMX, OpenVINO
        2026.4 computes some INT8 networks wrongly where a small batch follows a larger one.
        """
        size = count = len(images)
        if size not in self._requests:
            # a smaller batch than one that was compiled for, such as the last, is filled up
            size = min((other for other in self._requests if other > count), default=count)
            images = repeated(images, size)
        request = self._request(size)
        try:
            request.infer(openvino.Tensor(images))
        except Exception as error:  # images of another size, too little memory
            raise UserError(f"OpenVINO cannot run {self.path}: {_reason(error)}") from None
        # a copy: the next batch comes into the same memory
        return request.get_output_tensor().data[:count].copy()

    def _request(self, batch_size: int) -> openvino.InferRequest:
        if batch_size not in self._requests:
            self._requests[batch_size] = self._compile(batch_size).create_infer_request()
        return self._requests[batch_size]

    def latencies_ms(self, images: np.ndarray) -> np.ndarray:
        """Wall-clock times of a copy that is compiled for this batch size."""
        self._request(len(images))
        return super().latencies_ms(images)

    def layer_times_ms(self) -> list[float | None]:
        """The median time of each of `layers` at the evaluation's batch size.

        Of a copy that measures itself, which takes time too.
        """
        compiled = self._compile(self.evaluation_batch, PERF_COUNT=True)
        request = compiled.create_infer_request()
        # what the images show does not matter
        images = np.zeros((self.evaluation_batch, *self.image_shape), np.uint8)
        times_ms = defaultdict(list)
        for _ in range(BURST):
            request.infer([images])
            for info in request.profiling_info:
                times_ms[info.node_name].append(1000 * info.real_time.total_seconds())
        # OpenVINO numbers the layers that it adds, and others in a copy
        names = [layer.name.split()[0] for layer in self.layers]
        return [statistics.median(times_ms[name]) if name in times_ms else None for name in names]

    def float_nodes(self, nodes: Iterable[str]) -> list[str]:
        """Those of the graph's `nodes` that no layer runs in INT8, or some layer in another type.

        An addition is in INT8 if it is a part of a convolution that is.
        """
        types = defaultdict(set)
        for layer in self.layers:
            for name in layer.name.split():
                types[name].add(layer.precision)
        only_reader = {}
        for operation in self._model.get_ordered_ops():
            readers = [end for output in operation.outputs() for end in output.get_target_inputs()]
            if len(readers) == 1:
                reader = readers[0].get_node()
                only_reader[operation.get_friendly_name()] = reader.get_friendly_name()

        found = []
        for node in nodes:
            # what OpenVINO calls a layer that has no bias to add
            name = f"{node}/WithoutBiases"
            if name not in types:
                name = node
            # a convolution whose weight took up the factors of a BatchNorm goes by the name of
            # that: conv/Conv is found as bn/BatchNormalization
            while name not in types and name in only_reader:
                name = only_reader[name]
            if types.get(name) != {"INT8"}:
                found.append(node)
        return found


@cache
def core() -> openvino.Core:
    """The one entrance to OpenVINO, which lives as long as the process.

    On CPUs with AMX each core gives the thread another stack for signals, and puts the one before
    back when it goes. Two that do not go in turn leave a stack that is freed: the next signal that
    Python handles, Ctrl-C or the end of a child, is a segmentation fault.
    """
    return openvino.Core()


def checked_network(path: Path, batch_size: int = EVALUATION_BATCH) -> Network:
    """The file in OpenVINO, or in ONNX Runtime if OpenVINO computes something else in INT8.

    Args:
        batch_size: of evaluations, and of the layers' times.

    Raises:
        UserError: as `OpenVinoNetwork`.
    """
    network = OpenVinoNetwork(path, batch_size=batch_size)
    if not network.is_quantized:
        return network
    try:
        from utils.backends.onnxruntime import OnnxRuntimeNetwork
    except ImportError:
        print(f"{path.name}: not checked what OpenVINO computes, for want of ONNX Runtime")
        return network
    reference = OnnxRuntimeNetwork(path)
    images = smooth_images(CHECKED_IMAGES, *network.image_shape)
    expected = reference(images).astype(np.float64)
    error = np.linalg.norm(network(images) - expected)
    spread = np.linalg.norm(expected - expected.mean(0))
    # false for NaN, too
    if error <= LARGEST_ERROR * spread:
        return network
    print(f"{path.name}: OpenVINO computes something else in INT8 here: ONNX Runtime runs it")
    return reference


def smooth_images(count: int, height: int, width: int, channels: int) -> np.ndarray:
    """Images (N, H, W, C) uint8 that go over smoothly between a random colour in each corner.

    Logits of noise hardly differ from image to image, and rounding then outweighs what they show.
    """
    corners = np.random.default_rng(0).uniform(0, 255, (count, 2, 2, channels))
    down, right = np.linspace(0, 1, height), np.linspace(0, 1, width)
    rows, columns = np.stack([1 - down, down]), np.stack([1 - right, right])
    return np.einsum("nijc,ih,jw->nhwc", corners, rows, columns).astype(np.uint8)


def read_layers(compiled: openvino.CompiledModel) -> list[Layer]:
    """What a compiled model runs.

    A layer's name is its own in OpenVINO's graph and those of the file's nodes that it holds.
    """
    layers = []
    # where the bytes are pixels, not codes
    pixels = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        name, kind = node.get_friendly_name(), info["layerType"]
        sources = [value.get_node().get_friendly_name() for value in node.input_values()[:1]]
        reads_pixels = not pixels.isdisjoint(sources)
        if kind == "Input" or (kind in KEEP_PIXELS and reads_pixels):
            pixels.add(name)
        # constants, ends, and views of memory
        if info["primitiveType"].startswith("unknown"):
            continue
        nodes = [other for other in info["originalLayersNames"].split(",") if other != name]
        precision = "UINT8" if reads_pixels else TYPES.get(info["runtimePrecision"], "-")
        full_name = " ".join([name, *nodes]).strip()
        layers.append(Layer(full_name, kind, precision, info["primitiveType"]))
    return layers


def use_unsigned_codes(model: openvino.Model) -> None:
    """Quantize what is never negative to unsigned codes, in place. No value changes.

    Behind a ReLU the INT8 codes are 0..127. OpenVINO's kernels read unsigned codes, and it would
    make these 128..255 with the zero point 128. That costs a quarter of the time, and digits, as it
    adds 128 before it rounds. Limited to the value of code 127, and rounded to 0..255 in the same
    steps, they are 0..127 with the zero point 0. Two products of such codes with weights also fit
    into the 16 bits in which CPUs without VNNI add them.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        source = node.input_value(0)
        is_weight = source.get_node().get_type_name() == "Constant"
        if is_weight or not _never_negative(source):
            continue
        # QuantizeLinear is this node and a conversion to INT8
        bounds = [value.get_node() for value in node.input_values()[1:]]
        converts = [target.get_node() for target in node.output(0).get_target_inputs()]
        kinds = [other.get_type_name() for other in (*bounds, *converts)]
        if kinds != ["Constant"] * 4 + ["Convert"] or any(end.data.size != 1 for end in bounds):
            continue
        low, high, *codes = (float(end.data.item()) for end in bounds)
        if codes != [-128, 127] or not math.isclose(low * 127, high * -128, rel_tol=1e-6):
            continue

        limited = operations.clamp(source, 0, high)
        ends = [np.float32(value) for value in (0, high / 127 * 255, 0, 255)]
        rounded = operations.fake_quantize(limited, *map(operations.constant, ends), 256)
        unsigned = operations.convert(rounded, "u8")
        for target in converts[0].output(0).get_target_inputs():
            target.replace_source_output(unsigned.output(0))
    model.validate_nodes_and_infer_types()


def keep_extremes_float(model: openvino.Model) -> None:
    """Put something between a maximum over an axis and its quantizer, in place.

    OpenVINO 2026.4 makes one layer of both, which rounds the maximum to a whole number. It does not
    if a `Select` comes between, here of all that is less than the largest number. No finite value
    changes.
    """
    largest = operations.constant(np.finfo(np.float32).max)
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("ReduceMax", "ReduceMin"):
            continue
        result = node.output(0)
        if result.get_element_type() != openvino.Type.f32:
            continue
        readers = result.get_target_inputs()  # before the comparison becomes one of them
        limited = operations.select(operations.less(result, largest), result, largest)
        for target in readers:
            target.replace_source_output(limited.output(0))
    model.validate_nodes_and_infer_types()


def _never_negative(value: openvino.Output) -> bool:
    """Whether a tensor is known to be 0 or more everywhere."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return bool((node.data >= 0).all())
    operands = node.input_values()
    if kind in KEEP_SIGN:
        return value.get_element_type() == openvino.Type.u8 or _never_negative(operands[0])
    # Clip is a minimum of a maximum
    if kind == "Maximum":
        return any(map(_never_negative, operands))
    if kind in ALL_POSITIVE:
        return all(map(_never_negative, operands))
    # DequantizeLinear multiplies codes less their zero point
    if kind == "Subtract":
        return _never_negative(operands[0]) and _is_zero(operands[1])
    return kind in ("Relu", "Sigmoid")


def _is_zero(value: openvino.Output) -> bool:
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and not node.data.any()


def _reason(error: Exception) -> str:
    """The last line of what OpenVINO says; those before name its own source files."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
