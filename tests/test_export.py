"""What the exported graphs hold, node by node, and what ONNX Runtime computes from them."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EXAMPLE,
    NETWORK_PARAMS,
    Small,
    build,
    made,
    normalised,
    randomise_batch_norm,
)
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from layers import FromImages
from layers.quantized import QuantAdd, QuantMul
from utils import checkpoint as ckpt
from utils.backends.onnxruntime import OnnxRuntimeNetwork
from utils.backends.pytorch import TorchNetwork
from utils.checkpoint import load_weights
from utils.errors import UserError
from utils.manifest import layer_of
from utils.metrics import percent_equal, sqnr_db
from utils.networks import build_float, build_quantized
from utils.quantization import calibrate, export_onnx, layer_table, quantize_modules
from utils.quantization.export import int8_nodes, merge_shared_quantizers
from utils.quantization.fold import to_inference
from utils.quantization.swap import quantizable_modules

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
SHORTCUTS = {"resnet18": 3, "resnet34": 3, "resnet50": 4}
"""Convolutions whose output is an identity."""
ADDITIONS = {name: sum(depths) for name, depths in DEPTHS.items()}
ADDITIONS |= {"mobilenet_v2": 10, "efficientnet_b0": 9}
COMPUTING = ("Conv", "Gemm", "Add", "Mul", "GlobalAveragePool")
"""The node of each quantizable layer."""
STATS = ([0.5, 0.45, 0.4], [0.25, 0.2, 0.3])
"""Mean and standard deviation of the images."""


class Graph:
    """An exported file, with the questions that tests ask."""

    def __init__(self, path):
        self.proto = onnx.load(path)
        self.nodes = list(self.proto.graph.node)
        initializers = self.proto.graph.initializer
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in initializers}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.layers = {}
        for node in self.nodes:
            if node.op_type in COMPUTING and layer_of(node.name) and not self.is_silu(node):
                self.layers[layer_of(node.name)] = node

    def count(self, *kinds):
        return sum(node.op_type in kinds for node in self.nodes)

    def is_silu(self, node):
        """The node multiplies something with its own sigmoid."""
        factor = self.maker.get(node.input[1]) if node.op_type == "Mul" else None
        if factor is None or factor.op_type != "Sigmoid":
            return False
        return factor.input[0] == node.input[0]

    def is_quantized(self, name):
        return name in self.maker and self.maker[name].op_type == "DequantizeLinear"

    def quantized(self, name):
        """What `name` is dequantized of: float tensor, scale, axis (None: the whole tensor).

        Both nodes must have the same constants, the zero point 0 of signed INT8, and nobody else in
        between.
        """
        dequantize = self.maker[name]
        assert dequantize.op_type == "DequantizeLinear"
        quantize = self.maker[dequantize.input[0]]
        assert quantize.op_type == "QuantizeLinear"
        for node in (quantize, dequantize):
            assert len(node.input) == 3
            scale, zero_point = (self.constants[constant] for constant in node.input[1:])
            assert scale.dtype == np.float32
            assert zero_point.dtype == np.int8
            assert zero_point.shape == scale.shape
            assert not zero_point.any()
            assert np.isfinite(scale).all()
            assert (scale > 0).all()
        assert list(quantize.input[1:]) == list(dequantize.input[1:])
        attributes = (*quantize.attribute, *dequantize.attribute)
        axes = [attribute.i for attribute in attributes if attribute.name == "axis"]
        assert len(axes) == 2 * scale.ndim
        assert len(set(axes)) == scale.ndim
        return quantize.input[0], scale, axes[0] if axes else None


def batch_norm_of(model, name):
    """The BatchNorm after a convolution, by the names in the models; None for other layers."""
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(name)
    if not isinstance(module, nn.Conv2d) or module.bias is not None:
        return None
    following = str(int(last) + 1) if last.isdigit() else last.replace("conv", "bn")
    return model.get_submodule(f"{parent}.{following}" if parent else following)


def rounded_operands(layer):
    """Operand of a quantized layer, which is that of its node -> the activation's quantizer."""
    if isinstance(layer, QuantAdd):
        return {operand: getattr(layer, layer.QUANTIZERS[operand]) for operand in layer.rounds}
    if isinstance(layer, QuantMul):
        return {0: layer.factor_quantizer, 1: layer.input_quantizer}
    return {0: layer.input_quantizer}


def quantizer_pairs(name):
    """How many activations and weights a whole network quantizes, equal quantizers counted once."""
    if name == "vanilla_cnn":
        # the convolutions, the pool's and the classifier's input
        return 6 + 2, 6 + 1
    if name == "mobilenet_v2":
        # an addition's identity is a convolution's input
        return 52 + 2, 52 + 1
    if name == "efficientnet_b0":
        # and what a squeeze and excitation multiplies; its pool reads one of them
        return 81 + 2 * 16 + 2, 81 + 1
    # the stem; in each block the input (for conv1, shortcut or addition) and what follows conv1
    convolutions = 1 + sum(DEPTHS[name]) * (3 if name == "resnet50" else 2)
    # the identities, pool and classifier
    return convolutions + SHORTCUTS[name] + 2, convolutions + SHORTCUTS[name] + 1


def export(model, path, size=8):
    export_onnx(model, path, (size, size), *STATS)
    return Graph(path)


def random_images(count, size):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def in_torch(model, stats=STATS):
    return TorchNetwork(FromImages(copy.deepcopy(model), *stats), torch.device("cpu"))


@pytest.fixture(scope="module", params=NETWORK_PARAMS)
def exported(request, tmp_path_factory):
    """A calibrated network, its file, its graph, and images."""
    name, stem = request.param
    torch.manual_seed(0)
    model = build(name, stem).eval()
    randomise_batch_norm(model)
    # what the last stage sees as one pixel
    size = 4 if stem == "cifar" and name != "vanilla_cnn" else 8
    images = random_images(64, size)
    quantize_modules(model, EXAMPLE)
    calibrate(model, [normalised(images[:4], *STATS)], "max")
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    graph = export(model, path, size)
    return SimpleNamespace(name=name, model=model, path=path, graph=graph, images=images)


def small(**layers):
    """Calibrated, with the layers that `quantize_modules` is told to quantize."""
    model = made(Small).eval()
    quantize_modules(model, EXAMPLE, **layers)
    calibrate(model, [torch.randn(4, 3, 8, 8)], "max")
    return model


# every network


def test_graph_is_valid_opset_17_with_named_ends_and_a_free_batch(exported):
    proto = exported.graph.proto
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 17)]
    ends = []
    for value in (*proto.graph.input, *proto.graph.output):
        kind = value.type.tensor_type
        shape = [dimension.dim_param or dimension.dim_value for dimension in kind.shape.dim]
        ends.append((value.name, kind.elem_type, shape))
    size = exported.images.shape[1]
    assert ends == [
        ("images", TensorProto.UINT8, ["batch", size, size, 3]),
        ("logits", TensorProto.FLOAT, ["batch", 10]),
    ]


def test_graph_has_no_node_too_many_and_none_dangling(exported):
    graph = exported.graph
    assert [node.op_type for node in graph.nodes[:4]] == ["Cast", "Transpose", "Mul", "Add"]
    needless = ("BatchNormalization", "Identity", "Dropout", "Bernoulli", "RandomUniformLike")
    assert graph.count(*needless) == 0
    assert graph.count("Cast") == 1
    known = {"images", *graph.constants}
    for node in graph.nodes:
        assert node.domain == ""
        assert set(node.input) <= known, node.name
        assert known.isdisjoint(node.output), node.name
        known |= set(node.output)
    read = {name for node in graph.nodes for name in node.input} | {"logits"}
    assert {name for node in graph.nodes for name in node.output} - read == set()
    assert graph.constants.keys() - read == set()


def test_every_layer_is_there_once(exported):
    kinds = {"QuantConv2d": "Conv", "QuantLinear": "Conv", "QuantAdd": "Add", "QuantMul": "Mul"}
    kinds["QuantAdaptiveAvgPool2d"] = "GlobalAveragePool"
    layers = quantizable_modules(exported.model)
    expected = {name: kinds[type(layer).__name__] for name, layer in layers.items()}
    graph = exported.graph
    assert {name: node.op_type for name, node in graph.layers.items()} == expected
    activations = sum(isinstance(module, nn.SiLU) for module in exported.model.modules())
    # and the two that normalise the images
    assert graph.count(*COMPUTING) == len(expected) + activations + 2


def test_number_of_quantizers_follows_from_the_structure(exported):
    graph = exported.graph
    activations, weights = quantizer_pairs(exported.name)
    assert graph.count("QuantizeLinear") == activations + weights
    assert graph.count("DequantizeLinear") == activations + weights
    quantize = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    assert sum(node.input[0] in graph.constants for node in quantize) == weights
    assert len({node.input[0] for node in quantize}) == activations + weights


def test_every_input_and_weight_is_quantized_with_its_calibrated_range(exported):
    graph = exported.graph
    for name, layer in quantizable_modules(exported.model).items():
        node = graph.layers[name]
        for operand, quantizer in rounded_operands(layer).items():
            _, scale, axis = graph.quantized(node.input[operand])
            assert axis is None
            assert scale == (quantizer.amax / 127).numpy(), name
        if hasattr(layer, "weight"):
            weight, scale, axis = graph.quantized(node.input[1])
            assert axis == 0
            pointwise = (1, 1) if layer.weight.ndim == 2 else ()
            assert graph.constants[weight].shape == (*layer.weight.shape, *pointwise)
            expected = layer.weight_quantizer.amax.double() / 127
            bn = batch_norm_of(exported.model, name)
            if bn is not None:
                factor = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
                expected = expected * factor.abs()
            np.testing.assert_allclose(scale, expected.numpy(), rtol=1e-6, err_msg=name)


def test_weights_in_the_file_are_the_trained_codes(exported):
    """But for the sign, where BatchNorm's is negative. Looks at 16 channels; ties are left out."""
    graph = exported.graph
    for name, layer in quantizable_modules(exported.model).items():
        if hasattr(layer, "weight"):
            weight, scale, _ = graph.quantized(graph.layers[name].input[1])
            shape = -1, *[1] * (layer.weight.ndim - 1)
            stored = graph.constants[weight].reshape(layer.weight.shape)
            codes = stored[:16].astype(np.float64) / scale[:16].reshape(shape)
            assert np.abs(codes - np.rint(codes)).max() < 1e-4
            bn = batch_norm_of(exported.model, name)
            sign = np.ones(len(scale)) if bn is None else np.sign(bn.weight.detach().numpy())
            amax = layer.weight_quantizer.amax.double().numpy()[:16].reshape(shape)
            steps = layer.weight.detach().double().numpy()[:16] / amax * 127
            clear = np.abs(steps - np.floor(steps) - 0.5) > 1e-4
            trained = np.rint(codes) * sign[:16].reshape(shape)
            assert np.array_equal(trained[clear], np.rint(steps)[clear]), name


def test_of_an_addition_only_that_operand_is_quantized_which_the_adding_convolution_lacks(exported):
    """A BasicBlock's 1x1 shortcut adds; without one, and in a Bottleneck, the last one does."""
    graph = exported.graph
    additions = {name: node for name, node in graph.layers.items() if node.op_type == "Add"}
    assert len(additions) == ADDITIONS.get(exported.name, 0)
    for name, node in additions.items():
        block = name.removesuffix("add")
        shortcut = graph.layers.get(f"{block}downsample.0")
        inside = [layer for part, layer in graph.layers.items() if part.startswith(block)]
        first, *_, last, _ = [layer for layer in inside if layer is not shortcut]
        assert first.op_type == last.op_type == "Conv"
        adding, other = sorted(node.input, key=graph.is_quantized)
        source, _, _ = graph.quantized(other)
        if shortcut is None:
            assert graph.maker[adding] is last
            # one pair of nodes serves the first convolution and the addition
            assert other == first.input[0]
        elif exported.name == "resnet50":
            assert (graph.maker[adding], graph.maker[source]) == (last, shortcut), name
        else:
            assert (graph.maker[adding], graph.maker[source]) == (shortcut, last), name


def test_of_a_multiplication_both_operands_are_quantized(exported):
    graph = exported.graph
    multiplications = {name: node for name, node in graph.layers.items() if node.op_type == "Mul"}
    assert len(multiplications) == (16 if exported.name == "efficientnet_b0" else 0)
    for name, node in multiplications.items():
        scale, x = node.input
        factors, step, _ = graph.quantized(scale)
        assert graph.maker[factors].op_type == "Sigmoid"
        assert step == (exported.model.get_submodule(name).factor_quantizer.amax / 127).numpy()
        graph.quantized(x)
        # one pair of nodes serves both
        assert x == graph.layers[name.replace("mul", "avgpool")].input[0]


def test_shortcut_convolution_shares_the_blocks_quantized_input(exported):
    graph = exported.graph
    shortcuts = [name for name in graph.layers if name.endswith("downsample.0")]
    assert len(shortcuts) == SHORTCUTS.get(exported.name, 0)
    for name in shortcuts:
        first = graph.layers[name.replace("downsample.0", "conv1")]
        assert graph.layers[name].input[0] == first.input[0]


def values_in_onnx_runtime(graph, images):
    """Name -> value of every tensor that a graph computes, and of its weights."""
    model = onnx.shape_inference.infer_shapes(graph.proto)
    model.graph.output.extend(model.graph.value_info)
    names = [value.name for value in model.graph.output]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = session.run(names, {"images": images})
    return {**graph.constants, **dict(zip(names, found, strict=True))}


def assert_near(result, expected, what):
    """Equal but for what float32 rounds, by the size of the largest value."""
    assert (result - expected).abs().max() <= 2e-5 * expected.abs().max(), what


def assert_same_codes_but_at_ties(graph, values, name, quantizer):
    """ONNX finds codes by dividing, torch by multiplying with the inverse of the scale."""
    source, scale, _ = graph.quantized(name)
    steps = values[source].astype(np.float64) / scale
    codes = values[graph.maker[name].input[0]].astype(np.float64)
    expected = (quantizer(torch.from_numpy(values[source])).double() / float(scale)).round().numpy()
    clear = np.abs(steps - np.floor(steps) - 0.5) > 1e-4
    assert np.array_equal(codes[clear], expected[clear]), name
    assert np.abs(codes - expected).max() <= 1, name


@torch.no_grad()
def test_every_layer_computes_in_onnx_runtime_what_it_computes_in_pytorch(exported):
    """Each on ONNX Runtime's own inputs: one code that differs moves all that comes after it.

    PyTorch runs the network, but goes on from each layer with what ONNX Runtime made of it.
    """
    graph, images = exported.graph, exported.images[:4]
    values = values_in_onnx_runtime(graph, images)
    network = FromImages(to_inference(exported.model, EXAMPLE), *STATS)
    checked = []

    def check(layer, args, output, name):
        node = graph.layers[name]
        rounded = rounded_operands(layer)
        operands = []
        for index, arg in enumerate(args):
            source = operand = node.input[index]
            assert graph.is_quantized(operand) is (index in rounded)
            if index in rounded:
                source = graph.quantized(operand)[0]
                assert_same_codes_but_at_ties(graph, values, operand, rounded[index])
            # what comes before this layer, from the outputs of other layers
            assert_near(torch.from_numpy(values[source]).reshape(arg.shape), arg, source)
            operands.append(torch.from_numpy(values[operand]).reshape(arg.shape))
        # the layer itself, on ONNX Runtime's codes: to quantize them again changes nothing
        result = type(layer).forward(layer, *operands)
        computed = torch.from_numpy(values[node.output[0]].copy()).reshape(result.shape)
        assert_near(result, computed, name)
        checked.append(name)
        return computed

    for name in quantizable_modules(exported.model):
        layer = network.model.get_submodule(name)
        layer.register_forward_hook(partial(check, name=name))
    network(torch.from_numpy(images))
    assert sorted(checked) == sorted(graph.layers)


def test_onnx_runtime_predicts_what_pytorch_predicts_at_every_batch_size(exported):
    """Of 64 images, as a few differ in codes at ties; their logits lie apart by far more."""
    network, images = OnnxRuntimeNetwork(exported.path), exported.images
    expected = in_torch(exported.model)(images)
    for batch in (1, 3, 64):
        result = network(images[:batch])
        assert result.shape == (batch, 10)
        assert result.dtype == np.float32
    assert percent_equal(result.argmax(1), expected.argmax(1)) >= 90
    assert sqnr_db(expected, result) > 15


# float networks, and float layers in quantized ones


@pytest.mark.parametrize("network", NETWORK_PARAMS)
def test_float_graph_has_no_quantizer_and_computes_the_same(tmp_path, network):
    torch.manual_seed(0)
    name, stem = network
    model = build(name, stem, num_classes=7).eval()
    randomise_batch_norm(model)
    graph = export(model, tmp_path / "model.onnx")
    assert graph.count("QuantizeLinear", "DequantizeLinear", "BatchNormalization", "Identity") == 0
    assert {tensor.dtype.type for tensor in graph.constants.values()} <= {np.float32}
    assert set(graph.layers) == set(quantizable_modules(model))
    images = random_images(5, 8)
    expected = in_torch(model)(images)
    session = OnnxRuntimeNetwork(tmp_path / "model.onnx")
    # a random network amplifies what float rounds
    tolerance = 1e-3 * np.abs(expected).max()
    for batch in (1, 5):
        np.testing.assert_allclose(session(images[:batch]), expected[:batch], atol=tolerance)


@pytest.mark.parametrize(
    "skip_layers",
    [
        ["conv"],
        ["fc"],
        ["*.add"],
        ["avgpool"],
        ["layer1.*"],
        ["layer2.conv1", "layer2.downsample.0"],
        ["layer*", "avgpool"],
    ],
    ids=str,
)
def test_skipped_layers_are_float(tmp_path, skip_layers):
    model = small(skip_layers=skip_layers)
    graph = export(model, tmp_path / "model.onnx")
    skipped = 0
    for name, layer in quantizable_modules(model).items():
        node = graph.layers[name]
        operands = [operand for operand in node.input if "bias" not in operand]
        if node.op_type == "Add":
            operands = [node.input[operand] for operand in layer.rounds]
        floats = [not graph.is_quantized(operand) for operand in operands]
        assert set(floats) == {not type(layer).__name__.startswith("Quant")}, name
        skipped += floats[0]
    assert 0 < skipped < len(graph.layers)


def test_only_the_chosen_layer_is_quantized(tmp_path):
    graph = export(small(quant_layers=["layer1.conv2"]), tmp_path / "model.onnx")
    assert graph.count("QuantizeLinear") == graph.count("DequantizeLinear") == 2
    assert all(graph.is_quantized(name) for name in graph.layers["layer1.conv2"].input[:2])


def test_equal_ranges_of_one_tensor_share_a_quantizer_and_different_ones_do_not(tmp_path):
    model = small()
    equal = export(model, tmp_path / "equal.onnx")
    model.layer1.add.other_quantizer.amax.mul_(2)
    different = export(model, tmp_path / "different.onnx")
    assert different.count("QuantizeLinear") == equal.count("QuantizeLinear") + 1
    assert different.count("DequantizeLinear") == equal.count("DequantizeLinear") + 1
    sources = [
        different.quantized(different.layers[f"layer1.{part}"].input[index])
        for part, index in (("conv1", 0), ("add", 1))
    ]
    assert sources[0][0] == sources[1][0]
    assert sources[1][1] == 2 * sources[0][1]


def test_equal_ranges_of_different_tensors_keep_their_quantizers(tmp_path):
    model = small()
    before = export(model, tmp_path / "before.onnx")
    for layer in quantizable_modules(model).values():
        for quantizer in rounded_operands(layer).values():
            quantizer.set_range(torch.tensor(3.0))
    after = export(model, tmp_path / "after.onnx")
    assert after.count("QuantizeLinear") == before.count("QuantizeLinear")
    assert after.count("Identity") == 0
    for name, layer in quantizable_modules(model).items():
        for operand in rounded_operands(layer):
            _, scale, _ = after.quantized(after.layers[name].input[operand])
            assert scale == np.float32(3) / np.float32(127)


class Decoder(nn.Module):
    """A window's average, a transposed convolution and a concatenation, two of them functional."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 2, 2)
        self.bn, self.head = nn.BatchNorm2d(6), nn.Conv2d(9, 5, 1)

    def forward(self, x):
        y = nn.functional.avg_pool2d(self.down(x).relu(), 2)
        y = self.bn(self.up(y)).relu()
        return self.head(torch.cat([x, y], dim=1)).mean((2, 3))


def test_transposed_convolution_and_pools_are_exported_in_int8(tmp_path):
    model = made(Decoder).eval()
    names = ["down", "up", "head", "pool", "avgpool"]
    assert quantize_modules(model, EXAMPLE) == names
    images = random_images(64, 8)
    calibrate(model, [normalised(images[:4], *STATS)], "max")
    graph = export(model, tmp_path / "model.onnx")
    made_by_kind = {node.op_type: node for node in graph.nodes}
    for kind in ("AveragePool", "ConvTranspose", "GlobalAveragePool"):
        assert graph.is_quantized(made_by_kind[kind].input[0]), kind
    weight, scale, axis = graph.quantized(made_by_kind["ConvTranspose"].input[1])
    assert (axis, scale.shape, graph.constants[weight].shape) == (1, (6,), (4, 6, 2, 2))
    expected = in_torch(model)(images)
    assert sqnr_db(expected, OnnxRuntimeNetwork(tmp_path / "model.onnx")(images)) > 30


# trained networks


def run(network, images):
    return np.concatenate([network(images[start : start + 120]) for start in (0, 120, 240)])


def restored(path, build_from):
    """The network of a checkpoint, and mean and standard deviation of its images."""
    content = ckpt.load(path)
    model = build_from(content)
    load_weights(model, content.state)
    return model, (content.data.mean, content.data.std)


def float_network(content):
    return build_float(content.network, (32, 32))


def quantized_network(content):
    return build_quantized(content.network, content.quantization, (32, 32), content.state)


def test_trained_int8_graph_predicts_what_pytorch_predicts(qat_checkpoint, digits, tmp_path):
    model, stats = restored(qat_checkpoint, quantized_network)
    export_onnx(model, tmp_path / "int8.onnx", (32, 32), *stats)
    expected = run(in_torch(model, stats), digits.test_images)
    result = run(OnnxRuntimeNetwork(tmp_path / "int8.onnx"), digits.test_images)
    assert len(result) == len(digits.test_labels) == 360
    # of a network of one epoch, which codes at ties move more than others
    assert percent_equal(result.argmax(1), expected.argmax(1)) > 98
    assert sqnr_db(expected, result) > 25
    # it is trained: the comparison means something
    assert percent_equal(expected.argmax(1), digits.test_labels) > 50


def test_trained_float_graph_computes_what_pytorch_computes(float_checkpoint, digits, tmp_path):
    model, stats = restored(float_checkpoint, float_network)
    export_onnx(model, tmp_path / "fp32.onnx", (32, 32), *stats)
    expected = run(in_torch(model, stats), digits.test_images)
    result = run(OnnxRuntimeNetwork(tmp_path / "fp32.onnx"), digits.test_images)
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())
    # the same graph in FP16; the INT8 one is not for ONNX Runtime, which truncates there
    half = run(OnnxRuntimeNetwork(tmp_path / "fp16.onnx"), digits.test_images)
    assert half.dtype == np.float32
    assert percent_equal(result.argmax(1), half.argmax(1)) > 98
    assert np.abs(result - half).max() > 0


# what the export leaves alone


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float"])
def test_the_model_passed_in_stays_as_it_is(tmp_path, training, quantized):
    model = small() if quantized else Small()
    model.train(training)
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    export(model, tmp_path / "model.onnx")
    assert dict(model.named_modules()) == modules
    assert all(module.training is training for module in modules.values())
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad
        assert parameter.grad is None


def test_a_model_in_training_mode_is_exported_in_evaluation_mode(tmp_path):
    model = small()
    export(model, tmp_path / "evaluation.onnx")
    export(model.train(), tmp_path / "training.onnx")
    assert (tmp_path / "training.onnx").read_bytes() == (tmp_path / "evaluation.onnx").read_bytes()


class Grey(nn.Module):
    """One channel, and a head that wants its input in one piece of memory."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))


def test_a_network_of_one_channel_that_flattens_by_view_is_exported(tmp_path):
    torch.manual_seed(0)
    model = Grey().eval()
    export_onnx(model, str(tmp_path / "grey.onnx"), (8, 8), [0.5], [0.25])
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    logits = OnnxRuntimeNetwork(tmp_path / "grey.onnx")(images)
    x = torch.from_numpy(((images / 255 - 0.5) / 0.25).astype(np.float32).transpose(0, 3, 1, 2))
    expected = model(x.clone(memory_format=torch.contiguous_format)).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mean", "std"), [([127.0] * 3, [0.2] * 3), ([0.5] * 3, [58.0] * 3)])
def test_normalisation_in_units_of_levels_is_refused(tmp_path, mean, std):
    with pytest.raises(UserError, match="units of the full range"):
        export_onnx(small(), tmp_path / "x.onnx", (8, 8), mean, std)
    assert list(tmp_path.iterdir()) == []


def test_one_number_is_a_square_and_each_channel_has_both_numbers(tmp_path):
    export_onnx(small(), tmp_path / "square.onnx", 8, *STATS)
    export_onnx(small(), tmp_path / "both.onnx", (8, 8), *STATS)
    square, both = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("square", "both"))
    assert square.input == both.input
    for mean, std in ((STATS[0], [0.25]), (0.5, 0.25)):
        with pytest.raises(UserError, match="need a number for each channel, both"):
            export_onnx(small(), tmp_path / "model.onnx", 8, mean, std)
    with pytest.raises(UserError, match="height and width, or one number"):
        export_onnx(small(), tmp_path / "model.onnx", (3, 8, 8), *STATS)


@pytest.mark.parametrize(("factor", "said"), [(1, False), (255 * 0.25, True), (0.25, True)])
def test_images_that_were_not_normalised_in_calibration_are_told(tmp_path, capsys, factor, said):
    """By the numbers that go into the graph: images of 0...255, and of 0...1."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = normalised(random_images(4, 8), (0.5,) * 3, (0.25,) * 3)
    quantize_modules(model, images)
    calibrate(model, [factor * images])
    capsys.readouterr()
    export_onnx(model, tmp_path / "net.onnx", 8, (0.5,) * 3, (0.25,) * 3)
    assert capsys.readouterr().out.startswith("0: images were up to ") == said


@pytest.mark.parametrize("layers", [[], [nn.Linear(4, 2)], [nn.BatchNorm1d(4), nn.Linear(4, 2)]])
def test_a_network_that_squeezes_the_axis_of_images_is_refused(tmp_path, layers):
    class Squeeze(nn.Module):
        def forward(self, x):
            return x.squeeze()

    squeezing = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), Squeeze()]
    with pytest.raises(UserError, match="a single image.*flatten"):
        export_onnx(nn.Sequential(*squeezing, *layers), tmp_path / "x.onnx", 8, *STATS)


def test_a_graph_with_branches_is_exported_in_fp16_too(tmp_path):
    """The exporter writes local response normalisation with an If."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(288, 5)).eval()
    export_onnx(model, tmp_path / "net.onnx", 8, *STATS)
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert "If" in kinds
    images = random_images(4, 8)
    expected = in_torch(model)(images)
    for name, tolerance in (("net", 1e-5), ("net_fp16", 1e-2)):
        logits = OnnxRuntimeNetwork(tmp_path / f"{name}.onnx")(images)
        np.testing.assert_allclose(logits, expected, atol=tolerance)


def fail_halfway(self, data):
    with self.open("wb") as file:
        file.write(bytes(data)[: len(data) // 2])
    raise OSError("disk full")


def refuse(*_, **__):
    raise onnx.checker.ValidationError("invalid")


@pytest.mark.parametrize(
    ("target", "name", "failure", "error"),
    [
        (Path, "write_bytes", fail_halfway, OSError),
        (onnx.checker, "check_model", refuse, onnx.checker.ValidationError),
    ],
    ids=["writing", "checking"],
)
@pytest.mark.parametrize("exists", [True, False], ids=["old file", "no file"])
def test_a_failure_leaves_the_old_file_alone(
    tmp_path, monkeypatch, target, name, failure, error, exists
):
    path = tmp_path / "model.onnx"
    if exists:
        path.write_bytes(b"old")
    monkeypatch.setattr(target, name, failure)
    with pytest.raises(error):
        export_onnx(small(), path, (8, 8), *STATS)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == ([path] if exists else [])
    assert not exists or path.read_bytes() == b"old"


def test_a_model_that_cannot_run_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="fails on images"):
        # the first has 5 logits
        export_onnx(nn.Sequential(small(), nn.Linear(7, 2)), path, (8, 8), *STATS)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "deep" / "er" / "model.onnx"
    first = export(small(), path)
    second = export(small(quant_layers=["fc"]), str(path))
    assert first.count("QuantizeLinear") > second.count("QuantizeLinear") == 2
    assert sorted(path.parent.iterdir()) == [path, path.with_name("model_fp16.onnx")]


# FP16


def test_fp16_graph_computes_in_fp16_and_quantizes_as_before(exported):
    """Opset 19 takes FP16 scales; what goes in and comes out keeps its type."""
    path = exported.path.with_name("model_fp16.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    half = Graph(path)
    assert [opset.version for opset in half.proto.opset_import] == [19]
    kinds = [node.op_type for node in half.nodes]
    assert kinds == [*(node.op_type for node in exported.graph.nodes), "Cast"]
    assert not any(tensor.dtype == np.float32 for tensor in half.constants.values())
    assert half.constants.keys() == exported.graph.constants.keys()
    for name, tensor in exported.graph.constants.items():
        if tensor.dtype == np.float32:
            found = half.constants[name]
            np.testing.assert_allclose(found, tensor, rtol=2**-10, atol=6e-8, err_msg=name)
    ends = (*half.proto.graph.input, *half.proto.graph.output)
    kinds = [value.type.tensor_type.elem_type for value in ends]
    assert kinds == [TensorProto.UINT8, TensorProto.FLOAT]


def test_weights_of_the_fp16_graph_have_the_same_codes(exported):
    assert_same_codes(Graph(exported.path.with_name("model_fp16.onnx")), exported.graph)


def test_weights_whose_scale_is_subnormal_in_fp16_keep_their_codes(tmp_path):
    model = small()
    with torch.no_grad():
        for factor, channel in ((1e-3, 1), (1e-4, 2)):
            model.conv.weight[channel] *= factor
            model.conv.weight_quantizer.amax[channel] *= factor
    whole = export(model, tmp_path / "model.onnx")
    half = Graph(tmp_path / "model_fp16.onnx")
    smallest = half.constants[half.maker[half.layers["conv"].input[1]].input[1]].min()
    assert smallest < 6e-5
    assert_same_codes(half, whole)


def assert_same_codes(half, whole):
    for node in half.nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] in half.constants:
            codes = []
            for constants in (half.constants, whole.constants):
                weight, scale = (constants[name].astype(np.float64) for name in node.input[:2])
                codes.append(np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))))
            assert np.array_equal(*codes), node.name


def test_a_scale_too_small_for_fp16_stays_above_zero(tmp_path):
    model = small()
    model.conv.weight_quantizer.amax[2] = 1e-9
    export(model, tmp_path / "model.onnx")
    half = Graph(tmp_path / "model_fp16.onnx")
    scales = [
        half.constants[node.input[1]] for node in half.nodes if node.op_type == "QuantizeLinear"
    ]
    assert all((scale > 0).all() and scale.dtype == np.float16 for scale in scales)


# merging, on graphs made by hand


def constant(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


CONSTANTS = {
    "scale": np.float32(0.5),
    "other_scale": np.float32(0.25),
    "zero": np.int8(0),
    "one": np.int8(1),
}


def merged(lines, outputs=("logits",)):
    """Merge a graph of lines "output = Op input input"; returns the lines that are left."""
    nodes = []
    for line in lines:
        output, _, operation = line.partition(" = ")
        kind, *inputs = operation.split()
        nodes.append(helper.make_node(kind, inputs, [output]))
    names = ("x", "y", *outputs)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in names]
    constants = [constant(name, value) for name, value in CONSTANTS.items()]
    graph = helper.make_graph(nodes, "test", values[:2], values[2:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    before = evaluate(model, outputs)
    merge_shared_quantizers(model)
    onnx.checker.check_model(model, full_check=True)
    for old, new in zip(before, evaluate(model, outputs), strict=True):
        assert np.array_equal(old, new)
    nodes = model.graph.node
    return [f"{node.output[0]} = {node.op_type} {' '.join(node.input)}" for node in nodes]


def evaluate(model, outputs):
    feeds = {
        "x": np.linspace(-3, 3, 11, dtype=np.float32),
        "y": np.linspace(5, -70, 11, dtype=np.float32),
    }
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(list(outputs), feeds)


def pair(name, source, scale="scale", zero="zero"):
    return [
        f"{name}_q = QuantizeLinear {source} {scale} {zero}",
        f"{name} = DequantizeLinear {name}_q {scale} {zero}",
    ]


def test_equal_pairs_on_one_tensor_become_one():
    assert merged([*pair("a", "x"), *pair("b", "x"), "logits = Add a b"]) == [
        *pair("a", "x"),
        "logits = Add a a",
    ]


def test_three_equal_pairs_become_one():
    lines = [*pair("a", "x"), *pair("b", "x"), *pair("c", "x"), "ab = Mul a b", "logits = Sub ab c"]
    assert merged(lines) == [*pair("a", "x"), "ab = Mul a a", "logits = Sub ab a"]


@pytest.mark.parametrize(
    "second",
    [pair("b", "y"), pair("b", "x", scale="other_scale"), pair("b", "x", zero="one")],
    ids=["tensor", "scale", "zero point"],
)
def test_pairs_that_differ_stay(second):
    lines = [*pair("a", "x"), *second, "logits = Add a b"]
    assert merged(lines) == lines


def test_one_rounding_read_in_two_scales_is_rounded_once():
    lines = [
        "a_q = QuantizeLinear x scale zero",
        "a = DequantizeLinear a_q scale zero",
        "b_q = QuantizeLinear x scale zero",
    ]
    lines += ["b = DequantizeLinear b_q other_scale zero", "logits = Add a b"]
    assert merged(lines) == [*lines[:2], "b = DequantizeLinear a_q other_scale zero", lines[4]]


def test_copies_of_a_scale_are_seen_through():
    lines = [
        "copy = Identity scale",
        "copy_2 = Identity copy",
        *pair("a", "x"),
        *pair("b", "x", "copy"),
        *pair("c", "y", "copy_2"),
    ]
    lines += ["ab = Add a b", "logits = Add ab c"]
    assert merged(lines) == [*pair("a", "x"), *pair("c", "y"), "ab = Add a a", "logits = Add ab c"]


def test_copies_of_a_tensor_are_seen_through():
    lines = ["x2 = Identity x", *pair("a", "x"), *pair("b", "x2"), "logits = Add a b"]
    assert merged(lines) == [*pair("a", "x"), "logits = Add a a"]


def test_pairs_after_merged_pairs_merge_too():
    lines = [
        *pair("a", "x"),
        *pair("b", "x"),
        *pair("c", "a", "other_scale"),
        *pair("d", "b", "other_scale"),
        "logits = Add c d",
    ]
    assert merged(lines) == [*pair("a", "x"), *pair("c", "a", "other_scale"), "logits = Add c c"]


def test_a_copy_that_is_the_graphs_output_stays():
    assert merged([*pair("a", "x"), "logits = Identity a"]) == [
        *pair("a", "x"),
        "logits = Identity a",
    ]


def test_equal_nodes_of_other_kinds_stay():
    lines = ["a = Relu x", "b = Relu x", "c = Add a b", "d = Add a b", "logits = Mul c d"]
    assert merged(lines) == lines


def test_graph_without_quantizers_stays():
    assert merged(["logits = Add x y"]) == ["logits = Add x y"]


# the names of nodes


class InContainers(nn.Module):
    """Layers in containers that are not called themselves."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Module()
        self.enc.conv = nn.Conv2d(3, 4, 3)
        self.dec = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "fc-1": nn.Linear(4, 2)})
        self.enc.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())])

    def forward(self, x):
        x = self.dec["conv"](self.enc.conv(x))
        return self.dec["fc-1"](self.enc.blocks[0](x).mean((2, 3)))


class InBlock(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.position = shared
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.position(x))


class SharedByBlocks(nn.Module):
    """Blocks call what they do not hold alone, by another name, as CoaT's do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.shared = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.blocks = nn.Sequential(InBlock(self.shared), InBlock(self.shared))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


SHARED_LAYERS = ["stem", "shared.0", "blocks.0.conv", "shared.0", "blocks.1.conv", "fc"]


def test_a_layer_that_blocks_share_is_found_in_a_graph(tmp_path):
    torch.manual_seed(0)
    model = SharedByBlocks().eval()
    example = torch.randn(2, 3, 32, 32).clamp(-1, 1)
    quantize_modules(model, example)
    calibrate(model, [example])
    export_onnx(model, tmp_path / "model.onnx", 32, [0.5] * 3, [0.5] * 3)
    nodes = [node for node in int8_nodes(tmp_path / "model.onnx", model) if "Conv" in node]
    assert [layer_of(node) for node in nodes] == SHARED_LAYERS
    assert "shared.0" not in int8_nodes(tmp_path / "model.onnx", model)


def test_a_module_that_calls_itself_keeps_its_layers_names():
    assert layer_of("/model/r/c/Conv") == layer_of("/model/r//c/Conv") == "r.c"


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (SharedByBlocks, SHARED_LAYERS),
        (InContainers, ["enc.conv", "dec.conv", "enc.blocks.0.0", "dec.fc-1"]),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
                nn.Flatten(),
                nn.Linear(4 * 28 * 28, 2),
            ),
            ["0", "1.0", "3"],
        ),
    ],
    ids=["shared", "containers", "sequential"],
)
def test_a_nodes_name_holds_its_layers_whole_name(tmp_path, network, layers):
    export_onnx(network().eval(), tmp_path / "fp32.onnx", (32, 32), *STATS)
    nodes = onnx.load(tmp_path / "fp32.onnx").graph.node
    assert [layer_of(node.name) for node in nodes if node.op_type in ("Conv", "Gemm")] == layers
    assert all(layer_of(node.name) == "" for node in nodes if "normalize" in node.name)


# what torch's exporter would write as another function, or not at all


def assert_computes_the_same(model, path, image_size, tolerance=1e-4):
    """The graph, and if `model` is float the graph in FP16, in ONNX Runtime as in PyTorch."""
    model.eval()
    export_onnx(model, path, image_size, *STATS)
    images = np.random.default_rng(0).integers(0, 256, (6, *image_size, 3), dtype=np.uint8)
    expected = in_torch(model)(images)
    scale = np.abs(expected - expected.mean(0)).max()
    found = OnnxRuntimeNetwork(path)(images)
    assert np.abs(found - expected).max() <= tolerance * scale
    return images, expected, scale


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d((5, 3), (3, 2), (2, 1), ceil_mode=True),
        nn.AvgPool2d(2, 3, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=5),
        nn.AvgPool2d(3, 2, 1, divisor_override=1),
        nn.AdaptiveAvgPool2d((None, 1)),
        nn.AdaptiveAvgPool2d((4, 5)),
        nn.AdaptiveAvgPool2d((8, 3)),
        nn.AdaptiveAvgPool2d(1),
    ],
    ids=str,
)
@pytest.mark.parametrize("quantized", [False, True])
def test_every_average_pool_is_exported_as_what_it_computes(tmp_path, pool, quantized):
    torch.manual_seed(0)
    # behind a pad, the exporter does not know the size that a pool reads
    model = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), copy.deepcopy(pool), nn.Flatten())
    model.append(nn.Linear(model(torch.zeros(1, 3, 16, 18)).shape[1], 5)).eval()
    if quantized:
        quantize_modules(model, torch.randn(2, 3, 16, 18))
        calibrate(model, torch.randn(4, 3, 16, 18), "max")
    path = tmp_path / "model.onnx"
    images, expected, scale = assert_computes_the_same(model, path, (16, 18))
    if not quantized:
        in_fp16 = OnnxRuntimeNetwork(tmp_path / "model_fp16.onnx")(images)
        assert np.abs(in_fp16 - expected).max() <= 1e-2 * scale


def test_dilated_same_padding_of_an_even_kernel_is_exported(tmp_path):
    conv = nn.Conv2d(3, 4, 2, dilation=3, padding="same")
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    assert_computes_the_same(model, tmp_path / "model.onnx", (8, 10))


class OfConstant(nn.Module):
    """A quantized layer that reads a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("codes", torch.randn(1, 6))
        self.gate = nn.Linear(6, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc((self.conv(x) * self.gate(self.codes)[:, :, None, None]).mean((2, 3)))


def test_a_quantized_layer_may_read_a_constant(tmp_path):
    torch.manual_seed(0)
    model = OfConstant().eval()
    quantize_modules(model, torch.randn(2, 3, 8, 8))
    calibrate(model, torch.randn(4, 3, 8, 8), "max")
    assert_computes_the_same(model, tmp_path / "model.onnx", (8, 8))


class Masked(nn.Module):
    """Attention over pixels of which some rows are masked as a whole."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x).flatten(2)
        return self.fc((y.masked_fill(y < 100, -1e9).softmax(2) * y).sum(2))


class UnitLength(Masked):
    """Divides by lengths of which some are 0."""

    def forward(self, x):
        return self.fc(F.normalize(self.conv(x).relu() * (x[:, :1, 1:-1, 1:-1] > 0)).mean((2, 3)))


@pytest.mark.parametrize("network", [Masked, UnitLength])
def test_numbers_beyond_fp16_stay_finite_and_not_zero_in_the_fp16_graph(tmp_path, network):
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    images, expected, scale = assert_computes_the_same(network(), path, (8, 8))
    in_fp16 = OnnxRuntimeNetwork(tmp_path / "model_fp16.onnx")(images)
    assert np.abs(in_fp16 - expected).max() <= 1e-2 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_type_is_exported_in_float32(tmp_path, dtype):
    model = small().to(dtype)
    # numbers of NumPy's are doubles
    stats = [np.array(values) for values in STATS]
    export_onnx(model, tmp_path / "model.onnx", (8, 8), *stats)
    assert np.isfinite(OnnxRuntimeNetwork(tmp_path / "model.onnx")(random_images(2, 8))).all()


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (nn.ChannelShuffle(2), "operator 'aten::channel_shuffle' to ONNX opset version 17"),
        (nn.AdaptiveMaxPool2d(5), "operator adaptive_max_pool2d, output size"),
    ],
    ids=str,
)
def test_what_the_exporter_cannot_write_is_one_line(tmp_path, capfd, operation, said):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), operation, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError) as error:
        export_onnx(model.eval(), tmp_path / "model.onnx", (8, 8), *STATS)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    # the exporter itself would print the graph
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


class Sized(nn.Module):
    """Gives a function a size that it reads off a tensor."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.avg_pool2d(x, x.size()[2:]),
        lambda x: F.max_pool2d(x, kernel_size=x.shape[2:]),
        lambda x: F.avg_pool2d(input=x, kernel_size=2),
        lambda x: F.layer_norm(x, x.shape[1:]) * x,
    ],
    ids=["average", "maximum", "named", "norm"],
)
def test_sizes_may_be_read_off_a_tensor(tmp_path, function):
    assert_computes_the_same(Sized(function), tmp_path / "model.onnx", (8, 10))


def test_no_engine_is_asked_for_int8_of_a_pool_that_is_written_as_matrices(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(100, 5)
    ).eval()
    example = torch.randn(2, 3, 8, 8)
    quantize_modules(model, example)
    calibrate(model, example, "max")
    assert layer_table(model, example).endswith("% of the multiply-adds; float: 1")
    export_onnx(model, tmp_path / "model.onnx", (8, 8), *STATS)
    layers = {layer_of(node) for node in int8_nodes(tmp_path / "model.onnx", model)}
    assert layers == {"0", "3"}


@pytest.mark.parametrize("options", [{"ceil_mode": True}, {"divisor_override": 3}], ids=str)
def test_a_functional_pool_that_would_be_another_is_refused(tmp_path, options):
    model = Sized(lambda x: F.avg_pool2d(input=x, kernel_size=2, padding=1, **options))
    with pytest.raises(UserError, match="make it an nn.AvgPool2d"):
        export_onnx(model.eval(), tmp_path / "model.onnx", (8, 8), *STATS)


class Pooled(nn.Module):
    """Pools several feature maps by one pool."""

    def __init__(self, pool, others):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = pool
        self.others = others

    def forward(self, x):
        x = self.conv(x)
        return torch.cat([self.pool(x), self.pool(self.others(x))], 1).flatten(1)


@pytest.mark.parametrize(
    ("pool", "others"),
    [
        (nn.AdaptiveAvgPool2d(2), lambda x: x[:, :, ::2, ::2]),
        (nn.AdaptiveAvgPool2d(3), lambda x: torch.cat([x, x], 1)),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), lambda x: torch.cat([x, x], 1)),
    ],
    ids=["regular", "adaptive", "ceil"],
)
def test_one_pool_may_read_several_feature_maps(tmp_path, pool, others):
    assert_computes_the_same(Pooled(pool, others), tmp_path / "model.onnx", (10, 10))


def test_a_hook_of_a_pool_is_exported(tmp_path):
    pool = nn.AdaptiveAvgPool2d(2)
    pool.register_forward_hook(lambda *given: given[-1] * 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Flatten(), nn.Linear(16, 5))
    assert_computes_the_same(model, tmp_path / "model.onnx", (8, 8))
