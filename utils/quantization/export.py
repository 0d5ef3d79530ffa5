"""A float or quantized network to ONNX: the one artifact that every back end reads."""

from __future__ import annotations

import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import InferenceError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layers.normalize import FromImages, logits_of
from layers.quantized import QuantizedLayer
from layers.quantizers import CODE_MAX, per_channel
from utils.errors import UserError, first_line, mendable
from utils.files import atomic_path
from utils.manifest import BATCH, INPUT, OUTPUT, layer_of, scope_of
from utils.metrics import sqnr_db
from utils.quantization.calibrate import require_calibrated
from utils.quantization.fold import to_inference
from utils.quantization.watch import Operation, Watch, example_images, run_on
from utils.specs import height_width

OPSET = 17
"""13 brought per-channel QuantizeLinear; TensorRT 8.6 reads up to 17."""
FP16_OPSET, FP16_IR = 19, 9
"""The first whose QuantizeLinear takes FP16 scales."""
SMALLEST_FP16, LARGEST_FP16 = 6e-8, 65504
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FREE_BATCH = (
    "the network makes a Python number of how many images there are, by int() or a loop over them, "
    "which a graph keeps: reshape by x.shape[0] or -1"
)
LEAST_SQNR_DB, UNSTABLE_DB = 40, 10
"""Without rounding, graphs of the tests have 100 dB or more. A network that differs from itself by
nearly as much, as one of hard thresholds may, says nothing."""
SIZED = ("avg_pool2d", "max_pool2d", "_max_pool2d", "layer_norm")
"""Functions that are given sizes, which a graph holds as numbers."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write the inference form of `model`, and the same graph in FP16 beside it.

    Both take raw images (batch, H, W, C) uint8 and return logits (batch, classes) float32, for any
    batch. Each quantizer becomes a QuantizeLinear / DequantizeLinear pair with a constant scale and
    zero point 0. `model` stays as it is. A line asks whether it was calibrated with images that
    were normalised by `mean` and `std`, where these hardly are.

    Args:
        path: of the graph; the one in FP16 is `<stem>_fp16.onnx`, or `fp16.onnx` if the stem is
            `fp32`.
        image_size: height and width in pixels; one number for a square.
        mean, std: of each of the C channels, in units of the full range (0..1).

    Raises:
        UserError: a range was never calibrated, `mean` and `std` are in other units or of several
            lengths, `image_size` is no size, or the network makes no logits of a single image,
            branches on values or computes what torch's exporter cannot write or writes wrongly.
        OSError: a file cannot be written.
        onnx.checker.ValidationError: the exporter made an invalid graph.
    """
    require_calibrated(model)
    if np.ndim(mean) != 1 or np.shape(mean) != np.shape(std):
        raise UserError(f"mean {mean} and std {std} need a number for each channel, both")
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise UserError(f"mean {mean} and std {std} are not in units of the full range: 0 to 1")
    path = Path(path)
    size = height_width(image_size)
    if len(size) != 2:
        raise UserError(f"image_size {image_size}: height and width, or one number for a square")
    example = example_images(*size, channels=len(mean))
    inference = to_inference(model, example)
    image = example[:1]
    with Watch(inference, 1) as watched:
        _require_single_image(inference, image)
    _say_if_not_normalised(inference, image, watched.operations, mean, std)
    network = FromImages(inference, mean, std).eval()
    graph, in_fp16 = _checked_graphs(network, (*size, len(mean)))
    fp16_stem = "fp16" if path.stem == "fp32" else f"{path.stem}_fp16"
    for version, target in ((graph, path), (in_fp16, path.with_stem(fp16_stem))):
        with atomic_path(target) as partial:
            partial.write_bytes(version.SerializeToString())


def _checked_graphs(network: FromImages, shape: Sequence[int]) -> tuple[ModelProto, ModelProto]:
    """The graph of a network that takes images (H, W, C) of this shape, and the one in FP16.

    Raises as `export_onnx`.
    """
    try:
        graph = _traced(network, torch.zeros(2, *shape, dtype=torch.uint8))
        merge_shared_quantizers(graph)
        _require_free_batch(graph)
        in_fp16 = to_fp16(graph)
        for version in (graph, in_fp16):
            onnx.checker.check_model(version, full_check=True)
    # the network runs here, too: what it raises is torch's, mostly
    except (RuntimeError, InferenceError) as error:
        if mendable(error):
            raise
        reason = re.split(r"\. Please|\s+\[Caused by|\. Support for this op", first_line(error))[0]
        raise UserError(
            f"torch's exporter cannot write this network as ONNX: {reason}; compute that in "
            "operations that it knows"
        ) from None
    _require_same_function(graph, network, shape)
    return graph, in_fp16


def _traced(network: nn.Module, images: Tensor) -> ModelProto:
    buffer = io.BytesIO()
    # torch 2.11 switches on, for each export, that a failed one prints its whole graph
    silence = network.register_forward_pre_hook(
        lambda *_: torch._C._jit_set_onnx_log_enabled(False)
    )
    with silence, _named_by_path(network), _PlainSizes(), warnings.catch_warnings():
        # this exporter is deprecated, but its successor cannot export fake quantization
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (images,),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
        )
    return onnx.load_from_string(buffer.getvalue())


class _PlainSizes(TorchFunctionMode):
    """Gives functions their sizes as numbers, however a forward finds them."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        word, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if word in SIZED:
            # `x.shape[2:]` of a traced tensor holds tensors
            args = tuple(_numbers(value) for value in args)
            kwargs = {name: _numbers(value) for name, value in kwargs.items()}
        if word == "avg_pool2d":
            _require_known_average(*args, **kwargs)
        return function(*args, **kwargs)


def _numbers(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_numbers(side) for side in value]
    return int(value) if isinstance(value, Tensor) and value.ndim == 0 else value


def _require_known_average(*args: Any, **kwargs: Any) -> None:
    """Raises UserError where the exporter would write `F.avg_pool2d` as another function."""
    kwargs.pop("input", None)
    options = inspect.signature(nn.AvgPool2d).bind(*args[1:], **kwargs).arguments
    counts_padding = options.get("ceil_mode") and options.get("count_include_pad", True)
    if counts_padding or options.get("divisor_override") is not None:
        what = "F.avg_pool2d with ceil_mode or divisor_override is exported as another function"
        raise UserError(f"{what}: make it an nn.AvgPool2d")


@contextmanager
def _named_by_path(network: nn.Module) -> Iterator[None]:
    """Context manager: an exported node's name holds the whole name of its layer.

    The exporter names a node by the modules that are being called, each by the last part of its
    name. A container that is not called itself, such as a ModuleDict, would be missing.
    """
    running: list[str] = []  # names of the modules that are being called

    def enter(name: str, module: nn.Module, _: Any) -> None:
        scopes = torch.jit._trace._trace_module_map
        # where the exporter traces, not where it runs the network to look at its results
        if scopes is not None:
            scope = scope_of(name, running[-1] if running else "")
            kind = torch.typename(type(module))
            scopes[module] = torch._C._jit_onnx_create_full_scope_name(kind, scope)
        running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(enter, name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _require_single_image(network: nn.Module, image: Tensor) -> None:
    """Raises UserError unless a network makes logits (1, classes) of one image (1, C, H, W)."""
    mend = "squeeze() without a dimension drops the axis of the images: use flatten(1)"
    try:
        shape = tuple(logits_of(run_on(network, image)).shape)
    except Exception as error:  # of the network's own Python
        if mendable(error):
            raise
        raise UserError(
            f"the network fails on a single image ({first_line(error)}): {mend}"
        ) from None
    if len(shape) != 2 or shape[0] != 1:
        raise UserError(f"of a single image the network makes {shape}, not (1, classes): {mend}")


def _say_if_not_normalised(
    network: nn.Module,
    image: Tensor,
    operations: Sequence[Operation],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Print a line if a layer was calibrated with images as these numbers hardly make them.

    They make none that reach further. Some reach less than half as far, but few: dark ones.

    Args:
        network: in its inference form.
        operations: what it computes of the image (1, C, H, W).
    """
    # normalised images go from -mean / std to (1 - mean) / std, in each channel
    reaches = [max(m, 1 - m) / s for m, s in zip(mean, std, strict=True)]
    for operation in operations:
        reads_image = operation.reads == [None] and operation.shapes == [tuple(image.shape)]
        quantizer = operation.quantizer(0)
        if not reads_image or not quantizer:
            continue
        amax = CODE_MAX * network.get_submodule(quantizer).scale.item()
        if not min(reaches) / 2 <= amax <= 1.01 * max(reaches):
            print(
                f"{operation.name}: images were up to {amax:.3g} in calibration, and by mean and "
                f"std can be up to {max(reaches):.3g}: were they normalised by these?"
            )


def _require_free_batch(graph: ModelProto) -> None:
    """Raises UserError if a graph makes logits of as many images as it was traced with."""
    skeleton = ModelProto()
    skeleton.CopyFrom(graph)
    # what the exporter was told of the dimension
    del skeleton.graph.value_info[:]
    skeleton.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    # without dimensions where nothing is known
    sides = inferred.graph.output[0].type.tensor_type.shape.dim
    if sides and sides[0].HasField("dim_value"):
        raise UserError(f"a graph of as many images as it was traced with: {FREE_BATCH}")


def _require_same_function(graph: ModelProto, network: FromImages, shape: Sequence[int]) -> None:
    """Raises UserError if ONNX Runtime, where there is one, makes other logits than PyTorch.

    Both compute without rounding: a value may lie between two codes and be rounded either way.
    """
    # one image more than the graph was traced with
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    made = _logits_of_graph(_without_rounding(graph), images)
    if made is None:
        return
    x = network.normalize(torch.from_numpy(images))
    with _Unrounded(), torch.no_grad():
        expected = logits_of(network.model(x.clone())).numpy()
    if made.shape != expected.shape:
        raise UserError(
            f"of {len(images)} images the graph makes logits {made.shape}: {FREE_BATCH}"
        )
    sqnr = sqnr_db(expected, made)
    if not np.isfinite(expected).all() or sqnr >= LEAST_SQNR_DB:
        return
    with _Unrounded(), torch.no_grad():
        # what a difference that no kernel is free of makes of the logits
        moved = logits_of(network.model(x * (1 + 1e-6))).numpy()
    if not sqnr_db(expected, moved) <= sqnr + UNSTABLE_DB:
        raise UserError(
            f"the graph makes other logits than the network ({sqnr:.0f} dB signal-to-noise ratio): "
            "torch's exporter cannot write one of its operations, as one in place on a slice or "
            "one that makes random numbers"
        )


def _logits_of_graph(graph: ModelProto, images: np.ndarray) -> np.ndarray | None:
    """What ONNX Runtime makes of images; None if it is missing, or lacks an operator.

    Raises:
        UserError: the graph is of as many images as it was traced with.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    # onnxruntime's exceptions share no base class but Exception
    try:
        content = graph.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception:
        return None
    try:
        return session.run([OUTPUT], {INPUT: images})[0]
    except Exception as error:
        raise UserError(
            f"the graph fails on {len(images)} images ({first_line(error)}): {FREE_BATCH}"
        ) from None


class _Unrounded(TorchFunctionMode):
    """Lets fake quantization, a network's own too, return what it is given."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "").startswith("fake_quantize_per_"):
            return args[0]
        return function(*args, **(kwargs or {}))


def _without_rounding(model: ModelProto) -> ModelProto:
    """A copy whose Q/DQ nodes do nothing."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for node in _nodes(copy):
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    _forget_types(copy)
    return copy


def int8_nodes(path: Path, model: nn.Module) -> list[str]:
    """Names of a graph's nodes that read a quantized activation, and so are meant to run in INT8.

    A pool over a single pixel is left out: it does nothing, and an engine has no layer for it. So
    are pools that are products of matrices, which run in float.

    Args:
        model: what the graph was exported of. Its quantized layers without such a node are listed
            too: the table says of them that they are INT8, and no engine will run them.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    constants = {tensor.name for tensor in graph.initializer}
    shapes = {}
    for value in graph.value_info:
        shapes[value.name] = [side.dim_value for side in value.type.tensor_type.shape.dim]
    pools = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AvgPool2d))
    )
    # activations that are rounded; nodes are in the order of their runs
    quantized: set[str] = set()
    names, idle = [], []
    for node in graph.node:
        source = node.input[0] if node.input else ""
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            # a weight that is rounded is a constant still
            if source in constants:
                constants.update(node.output)
            else:
                quantized.update(node.output)
        elif node.op_type == "GlobalAveragePool" and shapes.get(source, [])[2:] == [1, 1]:
            idle.append(node.name)
        elif not quantized.isdisjoint(node.input):
            if node.op_type == "MatMul" and layer_of(node.name).startswith(pools):
                idle.append(node.name)
            else:
                names.append(node.name)
    found = [f"{layer_of(name)}." for name in (*names, *idle)]
    for name, module in model.named_modules():
        is_there = any(layer.startswith(f"{name}.") for layer in found)
        if isinstance(module, QuantizedLayer) and not is_there:
            names.append(name)
    return names


def to_fp16(model: ModelProto) -> ModelProto:
    """A copy that computes in FP16 whatever it does not compute in INT8.

    What goes in and comes out keeps its type.
    """
    model = onnx.version_converter.convert_version(model, FP16_OPSET)
    model.ir_version = FP16_IR
    without_fp16 = _without_fp16(model)
    _round_constants(model)
    _retype_ends(model)
    _cast_around(model, without_fp16)
    _forget_types(model)
    return model


def _forget_types(model: ModelProto) -> None:
    """Leave out, in place, the types of all tensors in between, which are no longer these."""
    for graph in _graphs(model.graph):
        del graph.value_info[:]


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and then those that its nodes hold, as an If holds its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _nodes(model: ModelProto) -> list[NodeProto]:
    """The nodes of all of a model's graphs."""
    return [node for graph in _graphs(model.graph) for node in graph.node]


def _round_constants(model: ModelProto) -> None:
    """Every FP32 constant to FP16, in place; quantized weights keep their codes."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = set()
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                tensors[node.output[0]] = attribute.t
        # how much larger an image becomes is FP32 by definition
        if node.op_type == "Resize":
            sizes.update(node.input[1:3])

    values, rounded = {}, {}
    for name, tensor in tensors.items():
        if tensor.data_type == TensorProto.FLOAT and name not in sizes:
            values[name] = numpy_helper.to_array(tensor)
            rounded[name] = _in_fp16(values[name])
    for node in model.graph.node:
        if node.op_type != QUANTIZE:
            continue
        weight, scale = node.input[:2]
        # the scale was rounded: a weight moves to the new grid, where its codes are the same
        if weight in values and values[scale].ndim:
            axis = helper.get_node_attr_value(node, "axis")
            codes = np.rint(values[weight] / per_channel(values[scale], values[weight], axis))
            new_scale = per_channel(rounded[scale].astype(np.float32), codes, axis)
            rounded[weight] = (codes * new_scale).astype(np.float16)
    for name, value in rounded.items():
        tensors[name].CopyFrom(numpy_helper.from_array(value, tensors[name].name))


def _in_fp16(values: np.ndarray) -> np.ndarray:
    """What is finite stays so, and what is not 0.

    A row that a mask's infinity covers as a whole would be NaN, and so would 0 / max(0, 1e-12). A
    channel that does nothing has a scale of almost 0, and no engine accepts 0.
    """
    held = np.where(np.isfinite(values), values.clip(-LARGEST_FP16, LARGEST_FP16), values)
    is_tiny = (values != 0) & (np.abs(values) < SMALLEST_FP16)
    return np.where(is_tiny, np.copysign(SMALLEST_FP16, values), held).astype(np.float16)


def _without_fp16(model: ModelProto) -> dict[str, list[str]]:
    """Nodes that compute in FP32 and whose operator has no FP16, such as Range.

    Name of the node -> names of the FP32 tensors that it reads.
    """
    # by their operators, which are rare: types are inferred for these alone
    nodes = []
    for node in model.graph.node:
        types = onnx.defs.get_schema(node.op_type, FP16_OPSET, node.domain).outputs[0].types
        if "tensor(float)" in types and "tensor(float16)" not in types:
            nodes.append(node)
    if not nodes:
        return {}

    graph = onnx.shape_inference.infer_shapes(model).graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            floats.add(value.name)
    found = {}
    for node in nodes:
        if node.output[0] in floats:
            found[node.name] = [name for name in node.input if name in floats]
    return found


def _cast_around(model: ModelProto, nodes: dict[str, list[str]]) -> None:
    """Let these nodes, as `_without_fp16` finds them, go on in FP32 among FP16, in place."""
    kept = []
    for node in model.graph.node:
        reads = nodes.get(node.name, [])
        for name in reads:
            own = f"{node.name}/{name}/fp32"
            kept.append(helper.make_node("Cast", [name], [own], own, to=TensorProto.FLOAT))
            node.input[:] = [own if read == name else read for read in node.input]
        kept.append(node)
        if node.name in nodes:
            made, own = node.output[0], f"{node.name}/made_fp32"
            node.output[0] = own
            kept.append(helper.make_node("Cast", [own], [made], own, to=TensorProto.FLOAT16))
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _retype_ends(model: ModelProto) -> None:
    """Bytes are cast to FP16 instead of FP32, and the logits from FP16 to FP32, in place."""
    for node in _nodes(model):
        for attribute in node.attribute:
            # of a Cast, or of what makes tensors of nothing, such as random ones
            is_type = attribute.name in ("to", "dtype")
            if is_type and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
        node.output[:] = [f"{OUTPUT}_fp16" if name == OUTPUT else name for name in node.output]
    # what inner graphs return
    _, *inner = _graphs(model.graph)
    for graph in inner:
        for result in graph.output:
            if result.type.tensor_type.elem_type == TensorProto.FLOAT:
                result.type.tensor_type.elem_type = TensorProto.FLOAT16
    cast = helper.make_node(
        "Cast", [f"{OUTPUT}_fp16"], [OUTPUT], name="cast_logits", to=TensorProto.FLOAT
    )
    model.graph.node.append(cast)


def merge_shared_quantizers(model: ModelProto) -> None:
    """Let every tensor that is quantized twice to one scale be quantized once, in place.

    The exporter stores equal scales once and puts Identity nodes before their other readers.
    TensorRT takes those scales for computed ones and fuses nothing. Without them, a block's input
    that goes to a convolution and to the residual addition has two equal pairs of nodes: one pair
    is enough.
    """
    renamed: dict[str, str] = {}
    made: dict[tuple[str, ...], str] = {}
    kept = []
    # nodes are in the order in which they run, so what a node reads has its final name by then
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        output = node.output[0]
        same = output  # the first tensor with these values
        if node.op_type == "Identity" and output != OUTPUT:
            same = node.input[0]
        elif node.op_type in (QUANTIZE, DEQUANTIZE):
            same = made.setdefault((node.op_type, *node.input), output)
        if same == output:
            kept.append(node)
        else:
            renamed[output] = same
    del model.graph.node[:]
    model.graph.node.extend(kept)
