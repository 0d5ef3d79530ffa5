"""TensorRT engines without a GPU.

The parser and the builder are TensorRT-RTX's own; what runs is a fake of each generation's API.
"""

import hashlib
import importlib.util
import json
import platform
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import EXAMPLE, build
from fake_tensorrt import (
    GENERATIONS,
    IMAGE,
    RECORDINGS,
    FakeCuda,
    FakeGraph,
    fake_tensorrt,
    logits_of,
)
from torch import nn

from utils.backends import tensorrt_build, tensorrt_layers, tensorrt_run
from utils.backends.network import BURST, Network
from utils.backends.tensorrt_build import CacheFile, EngineOptions
from utils.backends.tensorrt_run import TensorRTNetwork
from utils.errors import UserError
from utils.files import atomic_path
from utils.manifest import IMPLICIT, PRECISIONS
from utils.quantization.calibrate import calibrate
from utils.quantization.export import export_onnx, int8_nodes
from utils.quantization.swap import quantizable_modules, quantize_modules

SLOW = (
    ("resnet18", "cifar"),
    ("resnet34", "imagenet"),
    ("resnet50", "imagenet"),
    ("mobilenet_v2", "imagenet"),
    ("efficientnet_b0", "imagenet"),
)
MODELS = [
    ("vanilla_cnn", "cifar"),
    ("resnet18", "imagenet"),
    *(pytest.param(network, marks=pytest.mark.slow, id="-".join(network)) for network in SLOW),
]
LAYERS = {
    "vanilla_cnn": (6, 0, 0),
    "resnet18": (20, 8, 0),
    "resnet34": (36, 16, 0),
    "resnet50": (53, 16, 0),
    "mobilenet_v2": (52, 10, 0),
    "efficientnet_b0": (81, 9, 16),
}
"""Convolutions, residual additions, and multiplications, each with a pool before it."""
PRECISION = {"fp32": "FP32", "fp16": "FP16", "int8_ptc": "INT8-PTC", "int8_qat": "INT8-QAT"}
INT8_GRAPHS = ("int8_ptc", "int8_ptc_fp16", "int8_qat", "int8_qat_fp16")
STATISTICS = ([0.5, 0.4, 0.3], [0.25, 0.2, 0.3])
WITH_CALIBRATORS = ("8.6", "10", "10.16")
WITH_TILING = ("10.16", "11", "rtx")


def line_of(action, *arguments, **options):
    """The one line that `action` fails with."""
    with pytest.raises(UserError) as error:
        action(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# the real parser and builder


@dataclass(frozen=True)
class Export:
    folder: Path
    model: str
    layers: list[str]
    network: nn.Module

    def read(self, stem):
        return (self.folder / f"{stem}.onnx").read_bytes()


def thin(model):
    """Keep every fourth channel of a new network: the same graph for a sixteenth of the work."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(module, name).data = getattr(module, name).data[::4].clone()
        elif isinstance(module, nn.Conv2d):
            step = 4 if module.in_channels > 3 else 1
            module.weight.data = module.weight.data[::4, ::step].clone()
            if module.bias is not None:
                module.bias.data = module.bias.data[::4].clone()
            module.out_channels, channels = module.weight.shape[:2]
            module.groups = 1 if module.groups == 1 else module.out_channels  # depthwise
            module.in_channels = channels * module.groups
        elif isinstance(module, nn.Linear):
            module.weight.data = module.weight.data[:, ::4].clone()
            module.in_features = module.weight.shape[1]


@torch.no_grad()
def randomise(model, lowest):
    """Statistics and parameters as training leaves them.

    A factor of `lowest` below 0 turns some channels round.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(lowest, 1.5)
            module.bias.normal_(0, 0.1)


@torch.no_grad()
def switch_channels_off(model):
    """What training leaves of a channel that it has no use for: BatchNorm factors of exactly 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight[0] = 0


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def export(request, tmp_path_factory):
    """All graphs of one model, thinned out."""
    name, stem = request.param
    folder = tmp_path_factory.mktemp(f"{name}_{stem}")
    torch.manual_seed(0)
    model = build(name, stem)
    thin(model)
    randomise(model, 0.5)
    export_onnx(model, folder / "fp32.onnx", (32, 32), *STATISTICS)
    quantize_modules(model, EXAMPLE)
    calibrate(model, [torch.randn(8, 3, 32, 32)], "max")
    export_onnx(model, folder / "int8_ptc.onnx", (32, 32), *STATISTICS)
    randomise(model, -1.5)
    switch_channels_off(model)
    export_onnx(model, folder / "int8_qat.onnx", (32, 32), *STATISTICS)
    return Export(folder, name, list(quantizable_modules(model)), model)


@pytest.fixture(scope="module")
def rtx():
    """TensorRT-RTX, whose builder makes engines for GPUs that are not there."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("TensorRT-RTX has no wheel for this platform")
    return importlib.import_module("tensorrt_rtx_bindings")


def for_an_ampere_gpu(rtx, config):
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
    return config


def parsed(rtx, graph, precision="FP32"):
    """Builder, network and its layers."""
    builder, network = tensorrt_build.parse(rtx, tensorrt_build.make_logger(rtx), graph, precision)
    return builder, network, [network.get_layer(index) for index in range(network.num_layers)]


def quantized_readers(rtx, layers):
    """Layers that read a tensor which was quantized while the network runs: name -> that tensor."""
    kind = rtx.LayerType
    source = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }

    def is_quantized(tensor):
        dequantize = tensor and source.get(tensor.name)
        if dequantize is None or dequantize.type != kind.DEQUANTIZE:
            return False
        values = source[source[dequantize.get_input(0).name].get_input(0).name]
        return values.type != kind.CONSTANT

    inputs = [
        (layer.name, layer.get_input(index))
        for layer in layers
        for index in range(layer.num_inputs)
    ]
    return {name: tensor for name, tensor in inputs if is_quantized(tensor)}


@pytest.mark.parametrize("stem", ["fp32", "fp16", *INT8_GRAPHS])
def test_every_graph_builds_strongly_typed(rtx, export, stem):
    precision = PRECISION.get(stem, PRECISION.get(stem.removesuffix("_fp16")))
    builder, network, _ = parsed(rtx, export.read(stem), precision)
    assert network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    images, logits = network.get_input(0), network.get_output(0)
    assert (network.num_inputs, images.name, images.dtype, tuple(images.shape)) == (
        1,
        "images",
        rtx.uint8,
        (-1, 32, 32, 3),
    )
    assert (network.num_outputs, logits.name, logits.dtype, tuple(logits.shape)) == (
        1,
        "logits",
        rtx.float32,
        (-1, 10),
    )
    tensorrt_build.use_hwc_format(rtx, network)
    assert tuple(images.shape) == (-1, 3, 32, 32)
    config = tensorrt_build.configure(
        rtx, builder, network, EngineOptions(precision, (8,), level=2)
    )
    assert (
        builder.build_serialized_network(network, for_an_ampere_gpu(rtx, config)).nbytes > 100_000
    )


@pytest.mark.parametrize("stem", INT8_GRAPHS)
def test_the_parsed_network_quantizes_exactly_the_nodes_that_are_meant_for_int8(rtx, export, stem):
    _, _, layers = parsed(rtx, export.read(stem), "INT8-PTC")
    readers = quantized_readers(rtx, layers)
    idle = [
        name
        for name, x in readers.items()
        if name.endswith("GlobalAveragePool") and tuple(x.shape)[2:] == (1, 1)
    ]
    single = {"efficientnet_b0": 6}.get(export.model, 1)  # pools that see one pixel: nothing to run
    assert len(idle) == (single if "imagenet" in export.folder.name else 0)
    # of the network's own layers none is missing
    meant = int8_nodes(export.folder / f"{stem}.onnx", export.network)
    assert sorted(readers) == sorted([*meant, *idle])
    convolutions, additions, multiplications = LAYERS[export.model]
    operations = Counter(name.rsplit("/", 1)[1] for name in readers)
    assert operations["Conv"] + operations["Gemm"] == convolutions + 1  # the classifier too
    assert (operations["Add"], operations["Mul"]) == (additions, multiplications)
    assert operations["GlobalAveragePool"] == multiplications + 1
    assert len(readers) == len(export.layers) == sum(operations.values())
    expected = rtx.float16 if stem.endswith("fp16") else rtx.float32
    assert {tensor.dtype for tensor in readers.values()} == {expected}


@pytest.mark.parametrize("stem", INT8_GRAPHS)
def test_every_convolution_reads_dequantized_images_and_weights(rtx, export, stem):
    _, _, layers = parsed(rtx, export.read(stem), "INT8-PTC")
    counts = Counter(layer.type.name for layer in layers)
    convolutions, *_ = LAYERS[export.model]
    nodes = Counter(node.op_type for node in onnx.load(export.folder / f"{stem}.onnx").graph.node)
    assert (
        counts["QUANTIZE"]
        == counts["DEQUANTIZE"]
        == nodes["QuantizeLinear"]
        == nodes["DequantizeLinear"]
    )
    weights = convolutions + 1
    assert (
        weights + convolutions <= counts["QUANTIZE"] <= weights + len(export.layers)
    )  # equal tensors are quantized once
    dequantized = {
        layer.get_output(0).name for layer in layers if layer.type == rtx.LayerType.DEQUANTIZE
    }
    multiplied = [
        layer
        for layer in layers
        if layer.type in (rtx.LayerType.CONVOLUTION, rtx.LayerType.MATRIX_MULTIPLY)
    ]
    assert len(multiplied) == convolutions + 1
    assert all(
        layer.get_input(index).name in dequantized for layer in multiplied for index in (0, 1)
    )


def test_float_graphs_quantize_nothing(rtx, export):
    for stem in ("fp32", "fp16"):
        assert int8_nodes(export.folder / f"{stem}.onnx", nn.Module()) == []
        _, _, layers = parsed(rtx, export.read(stem))
        assert not any("QUANTIZE" in layer.type.name for layer in layers)
        heavy = {
            layer.get_input(0).dtype for layer in layers if layer.type == rtx.LayerType.CONVOLUTION
        }
        assert heavy == {rtx.float16 if stem == "fp16" else rtx.float32}


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    """Folder with the graphs of a vanilla CNN whose first convolution and classifier stay float."""
    torch.manual_seed(0)
    model = build("vanilla_cnn")
    quantize_modules(model, EXAMPLE, skip_layers=["features.0", "fc"])
    calibrate(model, [torch.randn(8, 3, 32, 32)], "max")
    folder = tmp_path_factory.mktemp("vanilla")
    export_onnx(model, folder / "int8_qat.onnx", (32, 32), *STATISTICS)
    return folder


def test_layers_that_were_skipped_are_not_meant_for_int8(rtx, vanilla):
    nodes = int8_nodes(vanilla / "int8_qat_fp16.onnx", nn.Module())
    assert [node.split("/")[-2] for node in nodes] == [
        *(f"features.{index}" for index in (3, 7, 10, 14, 17)),
        "avgpool",
    ]
    _, _, layers = parsed(rtx, (vanilla / "int8_qat_fp16.onnx").read_bytes(), "INT8-QAT")
    assert sorted(quantized_readers(rtx, layers)) == sorted(nodes)


def test_a_plan_for_two_batch_sizes_is_built_and_timed(rtx, vanilla, tmp_path, monkeypatch):
    configure = tensorrt_build.configure
    monkeypatch.setattr(
        tensorrt_build,
        "configure",
        lambda rtx, *rest: for_an_ampere_gpu(rtx, configure(rtx, *rest)),
    )
    graph = (vanilla / "int8_qat_fp16.onnx").read_bytes()
    options = EngineOptions("INT8-QAT", (1, 8), level=2)
    timing = CacheFile(tmp_path, "timing.cache", {"gpu": "of the Ampere generation"})
    plan = tensorrt_build.build_plan(rtx, graph, options, timing)
    timed = timing.read()
    assert len(plan) > 1_000_000
    assert len(timed) > 0
    tensorrt_build.build_plan(rtx, graph, options, timing)
    assert len(timing.read()) >= len(timed)


def one_node_graph(operation):
    tensors = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3])
        for name in ("images", "logits")
    ]
    node = onnx.helper.make_node(operation, ["images"], ["logits"], name="odd_one")
    graph = onnx.helper.make_graph([node], "graph", tensors[:1], tensors[1:])
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


def test_an_unsupported_node_is_named_in_the_parsers_own_words(rtx):
    line = line_of(parsed, rtx, one_node_graph("Nonsense"))
    assert line.startswith(f"TensorRT {rtx.__version__} rejects the graph: ")
    assert "Nonsense" in line
    assert "odd_one" in line
    assert "Plugin not found" in line
    assert parsed(rtx, one_node_graph("Relu"))


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_bytes_that_are_no_graph_are_rejected(rtx, vanilla, damage):
    whole = (vanilla / "int8_qat.onnx").read_bytes()
    graph = {"garbage": b"garbage" * 99, "truncated": whole[: len(whole) // 2], "empty": b""}[
        damage
    ]
    line = line_of(parsed, rtx, graph)
    assert line.startswith(f"TensorRT {rtx.__version__} rejects the graph: ")
    assert ("Failed to parse the ONNX model" in line) == (damage != "empty")


# recordings and the fakes made of them


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_recordings_file_name_is_its_version(generation):
    version = json.loads((RECORDINGS / f"{generation}.json").read_text())["version"]
    assert version.startswith(f"{generation}.") or generation == "rtx"
    assert sorted(path.stem for path in RECORDINGS.glob("*.json")) == sorted(GENERATIONS)


def test_the_recording_of_tensorrt_rtx_is_what_is_installed(rtx, monkeypatch):
    recorded = json.loads((RECORDINGS / "rtx.json").read_text())
    if rtx.__version__ != recorded["version"]:
        pytest.skip(
            f"TensorRT-RTX {rtx.__version__} is installed, {recorded['version']} was recorded"
        )
    monkeypatch.syspath_prepend(str(RECORDINGS))
    record = importlib.import_module("record").record
    assert record("tensorrt_rtx_bindings", recorded["source"]) == recorded


@pytest.fixture(params=GENERATIONS)
def trt(request):
    """A fake of each generation; `trt._generation` names it."""
    module = fake_tensorrt(request.param)
    module._generation = request.param
    return module


def test_a_fake_has_no_attribute_that_the_real_one_lacks(trt):
    config = trt.IBuilderConfig()
    for thing, name in (
        (trt, "Bulider"),
        (trt.BuilderFlag, "INT9"),
        (config, "set_flags_please"),
        (trt.Builder, "reboot"),
    ):
        assert not hasattr(thing, name)
    with pytest.raises(AttributeError):
        config.int9_calibrator = None
    assert hasattr(config, "set_calibration_profile") == (trt._generation in WITH_CALIBRATORS)


def test_a_fake_does_not_deny_what_the_real_one_has(trt):
    for thing, name in ((trt.IBuilderConfig(), "clear_flag"), (trt, "get_plugin_registry")):
        with pytest.raises(NotImplementedError):
            hasattr(thing, name)


@pytest.mark.parametrize(
    ("owner", "name", "generations"),
    [
        ("BuilderFlag", "INT8", WITH_CALIBRATORS),
        ("BuilderFlag", "FP16", WITH_CALIBRATORS),
        ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", WITH_CALIBRATORS),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", ("10", "10.16", "11", "rtx")),
        ("PreviewFeature", "PROFILE_SHARING_0806", WITH_CALIBRATORS),
        (None, "TilingOptimizationLevel", WITH_TILING),
        ("TacticSource", "CUDNN", WITH_CALIBRATORS),
        (None, "IInt8EntropyCalibrator2", WITH_CALIBRATORS),
        (None, "ComputeCapability", ("rtx",)),
    ],
)
def test_generations_differ_where_the_code_asks_them(trt, owner, name, generations):
    thing = getattr(trt, owner) if owner else trt
    assert (name in dir(thing)) == (trt._generation in generations)
    if trt._generation not in generations:
        with pytest.raises(AttributeError):
            getattr(thing, name)


# one code path for every generation

CREATION_BITS = {"8.6": 0b01, "10": 0b11, "10.16": 0b11, "11": 0b1, "rtx": 0b1}
TACTIC_BITS = {"8.6": 0b11000, "10": 0b11000, "10.16": 0b11000, "11": 0b11, "rtx": 0b11}
GRAPHS = {
    # precision, remainder: where the graph's types are the engine's; in 8.6, where flags allow FP16
    # and INT8
    ("FP32", "fp16"): ("fp32.onnx", "fp32.onnx"),
    ("FP32", "fp32"): ("fp32.onnx", "fp32.onnx"),
    ("FP16", "fp16"): ("fp16.onnx", "fp32.onnx"),
    ("FP16", "fp32"): ("fp16.onnx", "fp32.onnx"),
    ("INT8-PTC", "fp16"): ("int8_ptc_fp16.onnx", "int8_ptc.onnx"),
    ("INT8-PTC", "fp32"): ("int8_ptc.onnx", "int8_ptc.onnx"),
    ("INT8-QAT", "fp16"): ("int8_qat_fp16.onnx", "int8_qat.onnx"),
    ("INT8-QAT", "fp32"): ("int8_qat.onnx", "int8_qat.onnx"),
    (IMPLICIT, "fp16"): ("fp32.onnx", "fp32.onnx"),
    (IMPLICIT, "fp32"): ("fp32.onnx", "fp32.onnx"),
}


@pytest.fixture
def timing(tmp_path):
    return CacheFile(tmp_path, "timing.cache", {"gpu": "some"})


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def few_images():
    """Calibration images, two whole batches and a part of one."""
    return np.random.default_rng(0).integers(0, 256, (300, *IMAGE), np.uint8)


def built(trt, options, timing, calibrator=None):
    """Network and configuration that the builder was called with."""
    plan = tensorrt_build.build_plan(trt, b"graph", options, timing, calibrator)
    assert plan == b"plan %d of graph" % len(trt._built)
    return trt._built[-1]


@pytest.mark.parametrize(("precision", "remainder"), GRAPHS)
def test_the_graph_that_a_generation_builds(trt, precision, remainder):
    typed, weak = GRAPHS[precision, remainder]
    options = EngineOptions(precision, (1,), remainder=remainder)
    assert tensorrt_build.graph_name(trt, options) == (weak if trt._generation == "8.6" else typed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graphs_types_are_the_engines_where_the_version_can(trt, precision, timing):
    network, config = built(trt, EngineOptions(precision, (1,)), timing)
    assert network._creation_flags == CREATION_BITS[trt._generation]
    assert tensorrt_build.strongly_typed(trt, precision) == (trt._generation != "8.6")
    if trt._generation != "8.6":
        assert config._flags == ({"REQUIRE_USER_ALLOCATION"} if trt._generation == "rtx" else set())


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("FP32", set()),
        ("FP16", {"FP16"}),
        ("INT8-PTC", {"INT8", "FP16"}),
        ("INT8-QAT", {"INT8", "FP16"}),
    ],
)
def test_flags_allow_8_6_what_the_precision_asks_for(precision, flags, remainder, timing):
    _, config = built(
        fake_tensorrt("8.6"), EngineOptions(precision, (1,), remainder=remainder), timing
    )
    assert config._flags == (flags - {"FP16"} if remainder == "fp32" and "INT8" in flags else flags)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_options_reach_the_builder_by_the_versions_own_numbers(trt, precision, timing):
    _, config = built(
        trt, EngineOptions(precision, (1, 32, 128), workspace_gb=1.5, level=4), timing
    )
    assert config._tactic_sources == TACTIC_BITS[trt._generation]
    assert config._pools == {"WORKSPACE": 1_610_612_736}
    assert config.builder_optimization_level == 4
    assert config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
    assert config._profiles == [
        {"images": ((1, 3, 4, 4), (size, 3, 4, 4), (size, 3, 4, 4))} for size in (1, 32, 128)
    ]
    shared = {"PROFILE_SHARING_0806": True} if trt._generation in WITH_CALIBRATORS else {}
    assert config._features == shared
    assert not hasattr(config, "_calibrator")
    assert not hasattr(config, "_calibration_profile")


def test_tiling_is_set_where_it_is_known_and_refused_elsewhere(trt, timing):
    options = EngineOptions("FP16", (1,), tiling_level=2, l2_limit_mb=1.5)
    if trt._generation not in WITH_TILING:
        line = line_of(built, trt, options, timing)
        assert line.startswith(f"--tiling_level: TensorRT {trt.__version__} has no tiling")
        return
    _, config = built(trt, options, timing)
    assert config.tiling_optimization_level is trt.TilingOptimizationLevel.MODERATE
    assert config.l2_limit_for_tiling == 1_572_864


def test_images_are_read_as_they_lie_and_not_transposed(trt, timing):
    network, _ = built(trt, EngineOptions("INT8-QAT", (2,)), timing)
    images, scaling = network.get_input(0), network.get_layer(3)
    assert images.shape == (-1, 3, 4, 4)
    assert images.allowed_formats == 1 << int(trt.TensorFormat.HWC)
    assert [scaling.get_input(index).name for index in range(2)] == ["cast", "scale"]


def test_the_timing_cache_is_read_and_written(trt, timing):
    for before, after in ((b"", b"timed "), (b"timed ", b"timed timed ")):
        _, config = built(trt, EngineOptions("FP16", (1,)), timing)
        assert config._timing_before == before
        assert timing.read() == after
    timing.path.write_bytes(timing.path.read_bytes()[:-1])
    assert built(trt, EngineOptions("FP16", (1,)), timing)[1]._timing_before == b""


@pytest.mark.parametrize(("remainder", "flags"), [("fp16", {"INT8", "FP16"}), ("fp32", {"INT8"})])
@pytest.mark.parametrize("generation", WITH_CALIBRATORS)
def test_implicit_calibration_leaves_the_types_to_the_builder(
    generation, remainder, flags, timing, cuda, few_images, tmp_path
):
    trt, table = fake_tensorrt(generation), CacheFile(tmp_path, "calibration.cache", {})
    calibrator = tensorrt_build._make_calibrator(trt, cuda, few_images, table)
    network, config = built(
        trt, EngineOptions(IMPLICIT, (1, 8), remainder=remainder), timing, calibrator
    )
    assert network._creation_flags == 0b01
    assert config._flags == flags
    assert config._calibrator is calibrator
    assert config._calibration_profile == {"images": ((128, *IMAGE),) * 3}
    assert [most[0] for _, _, most in (profile["images"] for profile in config._profiles)] == [1, 8]
    assert table.read() == b"ranges"


def test_calibration_feeds_whole_batches_and_reads_its_table(cuda, few_images, tmp_path):
    trt, table = fake_tensorrt("8.6"), CacheFile(tmp_path, "calibration.cache", {})
    calibrator = tensorrt_build._make_calibrator(trt, cuda, few_images, table)
    assert calibrator.read_calibration_cache() is None
    for start in (0, 128):
        [address] = calibrator.get_batch(["images"])
        assert cuda.memory[address].tobytes() == few_images[start : start + 128].tobytes()
    assert calibrator.get_batch(["images"]) is None
    calibrator.write_calibration_cache(memoryview(b"table"))
    assert (
        tensorrt_build._make_calibrator(trt, cuda, few_images, table).read_calibration_cache()
        == b"table"
    )


def test_calibration_takes_fewer_images_than_a_batch_as_one(cuda, few_images, tmp_path):
    table = CacheFile(tmp_path, "calibration.cache", {})
    calibrator = tensorrt_build._make_calibrator(fake_tensorrt("10"), cuda, few_images[:50], table)
    assert calibrator.get_batch_size() == 50
    assert cuda.memory[calibrator.get_batch(["images"])[0]].tobytes() == few_images[:50].tobytes()
    assert calibrator.get_batch(["images"]) is None


@pytest.mark.parametrize("generation", ["11", "rtx"])
def test_implicit_calibration_where_there_is_none_any_more_is_one_line(
    generation, cuda, few_images, tmp_path
):
    (tmp_path / "fp32.onnx").write_bytes(b"graph")
    trt, options = fake_tensorrt(generation), EngineOptions(IMPLICIT, (1,))
    line = line_of(tensorrt_build.cached_plan, trt, cuda, tmp_path, options, few_images)
    assert line == (
        f"--ptc_mode implicit: TensorRT {trt.__version__} has no calibrators any more; use explicit"
    )
    assert trt._built == []


# failures of TensorRT, each in one line


def test_a_tensorrt_that_cannot_start_says_why(trt, timing):
    trt._fails = "start"
    line = line_of(built, trt, EngineOptions("FP32", (1,)), timing)
    assert (
        line
        == f"TensorRT {trt.__version__} cannot start: CUDA initialization failure with error: 35"
    )


def test_a_rejected_graph_quotes_every_error_of_the_parser(trt, timing):
    trt._fails = "parse"
    line = line_of(built, trt, EngineOptions("FP32", (1,)), timing)
    said = "In node 0 (odd): No importer for Nonsense; Failed to parse"
    assert line == f"TensorRT {trt.__version__} rejects the graph: {said}"


def test_a_failed_build_ends_with_tensorrts_last_error_and_stores_nothing(trt, timing):
    trt._fails = "build"
    line = line_of(built, trt, EngineOptions("INT8-QAT", (1,)), timing)
    assert line == (
        f"TensorRT {trt.__version__} cannot build the INT8-QAT engine: no tactic for /conv1/Conv"
    )
    assert timing.read() is None


# what is installed

DRIVER = "class Error(Exception): pass\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install modules from {name: source}; of TensorRT and PyCUDA nothing else is there."""
    names = ("pycuda", *tensorrt_build.MODULES)
    saved = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names
    }
    find_spec = importlib.util.find_spec

    def install(sources=()):
        for name, source in dict(sources).items():
            path = tmp_path / "site" / Path(*name.split("."))
            path = path / "__init__.py" if "." not in name else path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        known = {name.split(".")[0] for name in dict(sources)}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: find_spec(name) if name in known else None
        )
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        for name in set(names) - known:
            monkeypatch.setitem(
                sys.modules, name, None
            )  # what import finds of a package that is not there

    yield install
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(saved)


def test_no_tensorrt_is_one_line(install):
    install()
    line = line_of(tensorrt_build.require_gpu)
    assert line.startswith("the Python package tensorrt is missing")
    assert "requirements-gpu.txt" in line


@pytest.mark.parametrize(
    "failure",
    [
        "ImportError('libcudnn.so.8: cannot open')",
        "OSError('libnvinfer.so.8')",
        "RuntimeError('no\\nlibs')",
    ],
)
def test_a_broken_tensorrt_is_one_line(install, failure):
    install({"tensorrt": f"raise {failure}"})
    line = line_of(tensorrt_build.require_gpu)
    assert line.startswith(f"tensorrt cannot be loaded ({' '.join(str(eval(failure)).split())})")


@pytest.mark.parametrize("name", tensorrt_build.MODULES)
def test_whichever_tensorrt_is_installed_is_loaded(install, name):
    install({name: "__version__ = '1'", "another": ""})
    assert tensorrt_build.load_tensorrt().__name__ == name


def test_the_full_tensorrt_comes_before_the_rtx_one(install):
    install(dict.fromkeys(tensorrt_build.MODULES, ""))
    assert tensorrt_build.load_tensorrt().__name__ == "tensorrt"


def test_no_pycuda_is_one_line(install):
    install()
    line = line_of(tensorrt_build.load_cuda, fake_tensorrt("10"))
    mend = "on a GPU machine: pip install -r requirements-gpu.txt"
    assert line == f"the Python package pycuda is missing ({mend})"


def test_no_driver_is_one_line(install):
    install(
        {
            "pycuda": "",
            "pycuda.driver": "raise ImportError('libcuda.so.1: cannot open shared object file')",
        }
    )
    line = line_of(tensorrt_build.load_cuda, fake_tensorrt("10"))
    assert line == (
        "there is no usable NVIDIA GPU here (libcuda.so.1: cannot open shared object file); "
        "run on a GPU machine or use --backend onnxruntime"
    )


def test_no_gpu_is_one_line(install):
    reason = "cuInit failed: no CUDA-capable device is detected"
    context = f"from pycuda.driver import Error\nraise Error('{reason}')"
    install({"pycuda": "", "pycuda.driver": DRIVER, "pycuda.autoprimaryctx": context})
    line = line_of(tensorrt_build.load_cuda, fake_tensorrt("10"))
    assert line.startswith(f"there is no usable NVIDIA GPU here ({reason}); ")


def install_pycuda(install, capability):
    device = (
        "import types\nname = lambda: 'Some GPU'\n" + f"compute_capability = lambda: {capability}\n"
    )
    device += "device = types.SimpleNamespace(name=name, compute_capability=compute_capability)\n"
    device += "Context = types.SimpleNamespace(get_device=lambda: device)\n"
    install({"pycuda": "", "pycuda.driver": DRIVER + device, "pycuda.autoprimaryctx": ""})


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (9, 0), (10, 0)])
def test_tensorrt_rtx_on_a_gpu_that_is_too_old_or_of_a_data_centre_is_one_line(install, capability):
    install_pycuda(install, capability)
    line = line_of(tensorrt_build.load_cuda, fake_tensorrt("rtx"))
    number = ".".join(map(str, capability))
    assert line.startswith(
        f"TensorRT-RTX 1.7.1.116 does not run on Some GPU (compute capability {number}); "
    )
    assert "requirements-gpu.txt" in line


@pytest.mark.parametrize(
    ("generation", "capability"),
    [("rtx", (8, 6)), ("rtx", (12, 0)), ("10", (9, 0)), ("8.6", (9, 0)), ("11", (10, 0))],
)
def test_gpus_that_a_version_runs_on_are_taken(install, generation, capability):
    install_pycuda(install, capability)
    assert (
        tensorrt_build.load_cuda(fake_tensorrt(generation)).Context.get_device().name()
        == "Some GPU"
    )


# files of earlier builds


def cache_file(folder, number=1):
    return CacheFile(folder, "x.engine", {"gpu": "some", "shape": (1, 2), "number": number})


def sidecar(path):
    return path.with_name(f"{path.name}.json")


def test_a_cache_file_reads_back_for_its_own_key(tmp_path):
    first, other = cache_file(tmp_path / "new", 1), cache_file(tmp_path / "new", 2)
    assert first.read() is None
    first.write(b"plan")
    assert first.read() == b"plan"
    assert cache_file(tmp_path / "new", 1).read() == b"plan"
    assert other.read() is None
    # renamed by hand, it is still another engine
    other.path.write_bytes(first.path.read_bytes())
    sidecar(other.path).write_bytes(sidecar(first.path).read_bytes())
    assert other.read() is None


def test_a_cache_file_is_its_content_with_a_readable_key_beside_it(tmp_path):
    file = cache_file(tmp_path)
    file.write(b"plan")
    assert file.path.read_bytes() == b"plan"
    assert json.loads(sidecar(file.path).read_text()) == {
        "key": {"gpu": "some", "shape": [1, 2], "number": 1},
        "sha256": hashlib.sha256(b"plan").hexdigest(),
    }
    assert sorted(tmp_path.iterdir()) == [file.path, sidecar(file.path)]


@pytest.mark.parametrize("beside", [None, b"", b"null", b"[]", b"{}", b'{"key": {', b"\xff"])
def test_a_cache_file_of_any_other_origin_counts_as_absent(tmp_path, beside):
    file = cache_file(tmp_path)
    file.path.write_bytes(b"plan")
    if beside is not None:
        sidecar(file.path).write_bytes(beside)
    assert file.read() is None
    file.write(b"plan")
    assert file.read() == b"plan"


def test_damage_anywhere_makes_a_cache_file_count_as_absent(tmp_path):
    file = cache_file(tmp_path)
    file.write(bytes(range(100)))
    for path in (file.path, sidecar(file.path)):
        whole = path.read_bytes()
        for position in range(len(whole)):
            flipped = bytes([whole[position] ^ 1])
            path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
            assert file.read() is None
            path.write_bytes(whole[:position])
            assert file.read() is None
        path.write_bytes(whole + b"x")
        assert file.read() is None
        path.unlink()
        assert file.read() is None
        path.write_bytes(whole)
        assert file.read() == bytes(range(100))


@pytest.mark.parametrize("steps", [0, 1])
def test_a_process_killed_while_it_writes_leaves_nothing_that_counts(tmp_path, monkeypatch, steps):
    file, done = cache_file(tmp_path), []
    file.write(b"old")

    def killed(path):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(path)
        return atomic_path(path)

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_build, "atomic_path", killed)
        with pytest.raises(KeyboardInterrupt):
            file.write(b"new")
    assert file.read() is None
    file.write(b"new")
    assert file.read() == b"new"


@pytest.fixture
def exported(tmp_path):
    """A folder with two graphs."""
    for name in ("fp32", "fp16"):
        (tmp_path / f"{name}.onnx").write_bytes(b"graph")
    return tmp_path


def plan_of(trt, cuda, folder, options, images):
    plan, path = tensorrt_build.cached_plan(trt, cuda, folder, options, images)
    assert path.parent == folder / "engines"
    assert path.read_bytes() == plan
    return plan


def test_an_engine_is_built_once_and_read_afterwards(trt, cuda, exported, few_images):
    options = EngineOptions("FP16", (1, 8))
    plans = [plan_of(trt, cuda, exported, options, few_images[:count]) for count in (300, 10, 0)]
    assert plans == [b"plan 1 of graph"] * 3
    assert len(trt._built) == 1
    assert plan_of(trt, FakeCuda(), exported, replace(options), few_images) == plans[0]


def test_graphs_in_several_folders_can_share_their_engines(trt, cuda, exported, few_images):
    options = EngineOptions("FP32", (1,))
    arguments = few_images, None, exported / "engines"
    shutil.copytree(exported, exported / "draft")
    for folder in (exported / "draft", exported):
        plan, path = tensorrt_build.cached_plan(trt, cuda, folder, options, *arguments)
        assert (plan, path.parent) == (b"plan 1 of graph", exported / "engines")


CHANGES = {
    "precision": "FP32",
    "batch_sizes": (1, 16),
    "remainder": "fp32",
    "workspace_gb": 2.0,
    "level": 4,
    "tiling_level": 1,
    "l2_limit_mb": 8.0,
}


@pytest.mark.parametrize("option", CHANGES)
def test_another_option_means_another_engine(cuda, exported, few_images, option):
    trt, options = fake_tensorrt("11"), EngineOptions("FP16", (1, 8))
    assert plan_of(trt, cuda, exported, options, few_images) == b"plan 1 of graph"
    changed = replace(options, **{option: CHANGES[option]})
    assert plan_of(trt, cuda, exported, changed, few_images) == b"plan 2 of graph"
    assert plan_of(trt, cuda, exported, options, few_images) == b"plan 1 of graph"


def test_options_are_all_part_of_the_key():
    assert set(CHANGES) == set(EngineOptions.__dataclass_fields__)


@pytest.mark.parametrize("changed", ["version", "module", "GPU", "capability", "graph"])
def test_another_platform_or_graph_means_another_engine(cuda, exported, few_images, changed):
    trt, options = fake_tensorrt("10"), EngineOptions("FP16", (1, 8))
    plan_of(trt, cuda, exported, options, few_images)
    if changed == "version":
        trt.__version__ = "10.0.2"
    elif changed == "module":
        trt.__name__ = "tensorrt_rtx"
    elif changed == "GPU":
        cuda = FakeCuda(name="Another GPU")
    elif changed == "capability":
        cuda = FakeCuda(capability=(8, 9))
    else:
        (exported / "fp16.onnx").write_bytes(b"another graph")
    assert plan_of(trt, cuda, exported, options, few_images).startswith(b"plan 2 of ")


def test_calibration_images_are_part_of_an_implicit_engines_key_alone(cuda, exported, few_images):
    trt, options = fake_tensorrt("8.6"), EngineOptions(IMPLICIT, (1, 8))
    numbers = []
    for images, level in ((few_images, 3), (few_images, 3), (few_images[:200], 3), (few_images, 5)):
        plan_of(trt, cuda, exported, replace(options, level=level), images)
        numbers.append(len(trt._built))
    assert numbers == [1, 1, 2, 3]
    # another level needs no other ranges
    assert len(list(exported.glob("engines/calibration-*.cache"))) == 2


def test_an_engines_key_says_what_it_depends_on(cuda, exported, few_images):
    trt, options = fake_tensorrt("8.6"), EngineOptions(IMPLICIT, (1, 8))
    _, path = tensorrt_build.cached_plan(trt, cuda, exported, options, few_images)
    assert json.loads(sidecar(path).read_text())["key"] == {
        "graph_sha256": hashlib.sha256(b"graph").hexdigest(),
        "calibration_sha256": hashlib.sha256(few_images.tobytes()).hexdigest(),
        "tensorrt": f"tensorrt {trt.__version__}",
        "gpu": "Some GPU",
        "compute_capability": [8, 6],
        "options": {**asdict(options), "batch_sizes": [1, 8]},
    }


@pytest.mark.parametrize("beside", [False, True])
def test_a_damaged_engine_is_built_again(trt, cuda, exported, few_images, beside):
    options = EngineOptions("FP16", (1, 8))
    _, path = tensorrt_build.cached_plan(trt, cuda, exported, options, few_images)
    damaged = sidecar(path) if beside else path
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert plan_of(trt, cuda, exported, options, few_images) == b"plan 2 of graph"
    assert plan_of(trt, cuda, exported, options, few_images) == b"plan 2 of graph"


def test_a_missing_graph_is_one_line(trt, cuda, tmp_path, few_images):
    options = EngineOptions("FP32", (1,))
    line = line_of(tensorrt_build.cached_plan, trt, cuda, tmp_path, options, few_images)
    assert line == (
        f"{tmp_path}/fp32.onnx cannot be read (No such file or directory); export it again"
    )


# what the inspector tells

INT8 = "Thirty-two wide channel vectorized row major Int8 format"
FP16 = "Channel major FP16 format where channel % 8 == 0"


def layer(name, types, weights=None, metadata=None, key="Format/Datatype", **more):
    """One layer as the inspector writes it, with an input for each of `types`."""
    tensors = [
        {"Name": f"x{i}", "Location": "Device", "Dimensions": [-1, 64, 8, 8], key: t}
        for i, t in enumerate(types)
    ]
    content = {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": tensors,
        "Outputs": tensors[:1],
        **more,
    }
    if weights:
        content["Weights"] = {"Type": weights, "Count": 36864}
    if metadata:
        content["Metadata"] = "\x1e".join(f"[ONNX Layer: {node}]" for node in metadata)
    return content


def inspection(*layers):
    """JSON of each layer with the control characters that TensorRT leaves in it."""
    return [
        json.dumps(layer, indent=1).replace("\\u001e", "\x1e").replace("Device", "De\tvice")
        for layer in layers
    ]


def layers_of(*layers):
    return [tensorrt_layers.parse_layer(text) for text in inspection(*layers)]


def float_nodes(layers, nodes):
    return [node for node in nodes if not tensorrt_layers.runs_in_int8(layers, node)]


def test_layers_of_8_6_are_read():
    fused = layer(
        "/conv1/Conv + PWN(/relu/Relu)",
        [INT8],
        "Int8",
        ParameterType="Convolution",
        TacticName="sm90_i8i8",
    )
    pool = layer("/maxpool/MaxPool", [FP16], LayerType="CaskPooling", TacticValue="0x1f")
    conv, pooling = layers_of(fused, pool)
    assert (conv.name, conv.kind) == ("/conv1/Conv + PWN(/relu/Relu)", "Convolution")
    assert (conv.precision, conv.tactic) == ("INT8", "sm90_i8i8")
    assert (pooling.kind, pooling.precision, pooling.tactic) == ("CaskPooling", "FP16", "0x1f")
    assert str(conv).split() == [
        "INT8",
        "Convolution",
        "/conv1/Conv",
        "+",
        "PWN(/relu/Relu)",
        "sm90_i8i8",
    ]


def test_layers_of_10_bear_the_names_of_their_nodes():
    [fused] = layers_of(
        layer("__myl_ConvAdd_myl0_3", [INT8], "Int8", metadata=["/conv2/Conv", "/add/Add"])
    )
    assert float_nodes([fused], ["/conv2/Conv", "/add/Add"]) == []
    assert float_nodes([fused], ["/conv1/Conv"]) == ["/conv1/Conv"]
    assert str(fused).isprintable()


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        (INT8, "INT8"),
        (FP16, "FP16"),
        ("Four wide channel vectorized row major Int8 format.", "INT8"),
        ("Two wide channel vectorized row major FP16 format", "FP16"),
        ("Row major linear FP32", "FP32"),
        ("Row major linear UInt8 format", "UINT8"),
        ("Row major Int32 format", "INT32"),
        ("Half", "FP16"),
        ("Float", "FP32"),
        ("Int8", "INT8"),
        ("N/A due to dynamic shapes", "-"),
    ],
)
def test_precision_is_the_type_of_the_first_input(text, precision):
    [found] = layers_of(layer("/conv1/Conv", [text, "Row major linear FP32"]))
    assert found.precision == precision


def test_a_type_that_the_inspector_keeps_to_itself_is_that_of_the_weights():
    unknown = "N/A due to dynamic shapes"
    found = layers_of(
        layer("a", [unknown], "Int8"),
        layer("b", [unknown], "Half"),
        layer("c", [FP16], "Int8"),
        layer("d", []),
    )
    assert [layer.precision for layer in found] == ["INT8", "FP16", "FP16", "-"]


def test_types_of_11_have_a_key_of_their_own():
    split = [
        {"Name": "x", "Dimensions": [-1, 64], "Datatype": "Int8", "Format": "Row major linear"}
    ]
    assert (
        layers_of({"Name": "/conv1/Conv", "LayerType": "conv", "Inputs": split, "Outputs": []})[
            0
        ].precision
        == "INT8"
    )


def test_a_layer_that_the_inspector_is_silent_about_is_of_no_precision():
    for told in ("", None, '{"Name": "/conv1/Conv", "Inpu'):
        silent = tensorrt_layers.parse_layer(told)
        assert silent.precision == "-"
        assert float_nodes([silent], ["/conv1/Conv"]) == ["/conv1/Conv"]


def test_layers_of_each_profile_are_told_apart():
    names = [
        "/conv1/Conv",
        "/fc/Gemm",
        "/conv1/Conv [profile 1]",
        "/fc/Gemm [profile 1]",
        "/conv1/Conv [profile 12]",
    ]
    layers = layers_of(*(layer(name, [INT8]) for name in names))
    assert [found.name for found in tensorrt_layers.profile_layers(layers, 0)] == names[:2]
    assert [found.name for found in tensorrt_layers.profile_layers(layers, 1)] == names[2:4]
    assert [found.name for found in tensorrt_layers.profile_layers(layers, 12)] == names[4:]
    # a version that lists each layer once
    assert tensorrt_layers.profile_layers(layers[:2], 1) == layers[:2]


def test_a_node_is_found_in_whatever_it_was_fused_into():
    names = [
        "a.weight + /a/weight_quantizer/QuantizeLinear + /a/Conv + PWN(/a/Relu)",
        "PWN(PWN(/b/Sigmoid), /b/Mul)",
    ]
    layers = layers_of(*(layer(name, [INT8]) for name in names))
    assert float_nodes(layers, ["/a/Conv", "/a/Relu", "/b/Sigmoid", "/b/Mul"]) == []


def test_a_node_whose_name_begins_another_is_not_taken_for_it():
    layers = layers_of(
        layer("/layer1/conv1/Conv", [FP16]),
        layer("/layer1/conv1/Conv_1", [INT8]),
        layer("/x/fc", [INT8]),
    )
    nodes = [
        "/layer1/conv1/Conv",
        "/layer1/conv1/Conv_1",
        "/layer1/conv1",
        "/fc",
        "/conv1/Conv",
        "/x/fc",
    ]
    assert float_nodes(layers, nodes) == [
        "/layer1/conv1/Conv",
        "/layer1/conv1",
        "/fc",
        "/conv1/Conv",
    ]


def test_a_node_in_no_layer_is_reported():
    assert float_nodes([], ["/conv1/Conv"]) == ["/conv1/Conv"]


def test_a_node_must_run_in_int8_for_every_batch_size():
    layers = layers_of(
        layer("/conv1/Conv", [INT8]),
        layer("/conv1/Conv [profile 1]", [FP16]),
        layer("/fc/Gemm", [INT8]),
    )
    assert float_nodes(layers, ["/conv1/Conv", "/fc/Gemm"]) == ["/conv1/Conv"]


def test_copies_into_another_memory_layout_are_not_taken_for_their_layer():
    copies = [
        f"Reformatting CopyNode for {side} Tensor 0 to /conv1/Conv + /add/Add"
        for side in ("Input", "Output")
    ]
    layers = layers_of(
        *(layer(name, [FP16]) for name in copies), layer("/conv1/Conv + /add/Add", [INT8])
    )
    assert float_nodes(layers, ["/conv1/Conv", "/add/Add"]) == []
    assert float_nodes(layers[:2], ["/add/Add"]) == ["/add/Add"]


# running engines


def layer_report(profile):
    """As 8.6 does: layers of all profiles, with types for that of the inspector's context alone."""
    types = [INT8 if profile == index else "N/A due to dynamic shapes" for index in range(2)]
    return inspection(
        layer("/avgpool/Pool", types[:1]), layer("/avgpool/Pool [profile 1]", types[1:])
    )


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a fake engine for batches of 2 and 8."""

    def load(
        generation="8.6", fails=None, eager=(), sizes=(2, 8), memory=10**9, inspect=layer_report
    ):
        trt, cuda = fake_tensorrt(generation), FakeCuda(eager=eager)
        trt._fails, trt._cuda, trt._inspect, cuda.free = fails, cuda, inspect, memory
        monkeypatch.setattr(tensorrt_run, "require_gpu", lambda: (trt, cuda))
        monkeypatch.setattr(tensorrt_run, "cuda_graph", FakeGraph)
        (tmp_path / "fp32.onnx").write_bytes(b"graph")
        network = TensorRTNetwork(
            tmp_path, EngineOptions("FP32", sizes), np.zeros((1, *IMAGE), np.uint8)
        )
        cuda.calls.clear()
        return network, cuda

    return load


def test_an_engine_answers_what_callers_ask_of_any_back_end(load):
    network, _ = load(sizes=(2, 8))
    assert (network.name, network.evaluation_batch, network.device_time) == ("tensorrt", 8, True)
    assert network.path.read_bytes() == b"plan 1 of graph"


def test_a_back_end_that_does_not_tell_what_it_runs_is_not_seen_to_run_int8():
    network = Network()
    network.name = "another"
    assert (network.evaluation_batch, network.device_time, network.path) == (128, False, None)
    assert (list(network.layers), network.layer_times_ms()) == ([], [])
    assert network.float_nodes(["/conv1/Conv"]) == ["/conv1/Conv"]


def test_a_layer_that_is_silent_for_one_batch_size_does_not_pass_as_int8(load):
    nodes = ["/avgpool/Pool", "/fc/Gemm"]
    network, _ = load()
    assert network.float_nodes(nodes) == ["/fc/Gemm"]

    def silent_for_the_largest(profile):
        return [layer_report(profile)[0], "" if profile else layer_report(profile)[1]]

    network, _ = load(inspect=silent_for_the_largest)
    assert network.float_nodes(nodes) == nodes


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (
            [
                "/avgpool",
                "/avgpool/Pool",
                "/avgpool/Pool [profile 1]",
                "/avgpool/Pool [profile 12]",
            ],
            [2.5],
        ),
        (["/avgpool/Pool\x1e[profile 1]"], [0.5]),
        (["/avgpool/Poo", "/avgpool/Pool [profile 1] + /fc/Gemm"], [None]),
        ([], [None]),
    ],
)
def test_a_profiler_times_the_layers_that_it_names(load, generation, named, expected):
    network, _ = load(generation)
    network._trt._profiled = lambda profile: named if profile == 1 else []
    assert network.layer_times_ms() == expected
    network._trt._fails = "run"
    assert (
        line_of(network.layer_times_ms)
        == "TensorRT could not run the engine; delete it and build it again"
    )
    network._trt._fails = None
    [images] = batches_of(8)
    assert np.array_equal(network(images), logits_of(images))


def batches_of(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (size, *IMAGE), np.uint8) for size in sizes]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_engine_runs_on_every_generations_api(load, generation):
    network, _ = load(generation)
    [images] = batches_of(8)
    assert np.array_equal(network(images), logits_of(images))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_graph_records_the_kernels_for_its_batch_size(load, generation):
    network, _ = load(generation)
    list(network.stream(iter(batches_of(8))))
    strategies = getattr(network._trt, "DynamicShapesKernelSpecializationStrategy", None)
    assert (strategies is not None) == (generation == "rtx")
    for batch_context in network._contexts.values():
        config = batch_context.context._config
        assert (config and config.dynamic_shapes_kernel_specialization_strategy) is (
            strategies and strategies.EAGER
        )


@pytest.mark.parametrize(
    "eager",
    [(), (0,), (1,), (0, 1)],
    ids=["both late", "copies early", "compute early", "both early"],
)
@pytest.mark.parametrize("sizes", [(8,) * 7 + (3,), (8, 8), (8,), (5, 2, 5, 1), (1, 5), (1,), ()])
def test_a_stream_keeps_order_and_overwrites_nothing_in_flight(load, eager, sizes):
    network, _ = load(eager=eager)
    batches = batches_of(*sizes)
    results = list(network.stream(iter(batches)))
    assert len(results) == len(batches)
    assert all(
        np.array_equal(logits, logits_of(images))
        for logits, images in zip(results, batches, strict=True)
    )


def test_a_stream_starts_a_batch_before_it_waits_for_the_one_before(load):
    network, cuda = load()
    logits = network.stream(iter(batches_of(8, 8, 8)))
    next(logits)
    once = ["in", "record", "wait", "run", "out", "record"]
    assert cuda.calls == once * 2
    next(logits)
    assert cuda.calls == once * 3
    next(logits)
    assert cuda.calls == once * 3


def test_results_stay_what_they_are_while_the_stream_goes_on(load):
    network, _ = load()
    batches = batches_of(8, 8, 8, 8)
    first = next(logits := network.stream(iter(batches)))
    kept = first.copy()
    list(logits)
    assert np.array_equal(first, kept)


def test_a_stream_that_is_abandoned_spoils_nothing_for_the_next(load):
    network, _ = load(eager=(0,))
    next(network.stream(iter(batches_of(8, 8, 8))))
    [images] = batches_of(8)
    assert np.array_equal(network(images), logits_of(images))


def test_a_batch_runs_in_the_smallest_profile_that_holds_it(load):
    network, _ = load(sizes=(2, 8))
    for images in batches_of(1, 2, 3, 8):
        assert np.array_equal(network(images), logits_of(images))
    profiles = {size: batch.context._profile for size, batch in network._contexts.items()}
    assert profiles == {1: 0, 2: 0, 3: 1, 8: 1}


def test_a_batch_larger_than_built_for_is_one_line(load):
    network, _ = load(sizes=(2, 8))
    line = line_of(network, batches_of(9)[0])
    assert line == "the engine was built for batches of at most 8, not 9"


def test_types_are_read_for_every_batch_size(load):
    network, _ = load()
    assert [(layer.name, layer.precision) for layer in network.layers] == [
        ("/avgpool/Pool [profile 1]", "INT8")
    ]  # the largest
    assert network.float_nodes(["/avgpool/Pool", "/fc/Gemm"]) == ["/fc/Gemm"]


def test_latencies_are_device_times_of_back_to_back_launches(load, quick_latencies):
    network, cuda = load()
    times = network.latencies_ms(batches_of(8)[0])
    assert len(times) == BURST
    assert (times > 0).all()
    burst = ["record", "run"] * BURST + ["record"]
    assert cuda.calls[-len(burst) :] == burst


def test_too_little_memory_for_a_context_is_one_line(load):
    assert (
        line_of(load, fails="context")
        == "the GPU has too little memory for this engine: use a smaller --batch_size"
    )


def test_too_little_memory_for_buffers_is_one_line(load):
    assert (
        line_of(load, memory=500)
        == "the GPU has too little memory for this engine: use a smaller --batch_size"
    )


def test_an_engine_that_does_not_load_is_one_line_with_the_reason(load):
    line = line_of(load, fails="load")
    reason = "cannot be loaded: Version tag does not match; delete it to have it built again"
    assert re.fullmatch(rf"\S+\.engine {reason}", line)


def test_an_engine_that_does_not_run_is_one_line(load):
    assert (
        line_of(load, fails="run")
        == "TensorRT could not run the engine; delete it and build it again"
    )


# without torch

SCRIPT = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from fake_tensorrt import fake_tensorrt
from utils.backends.tensorrt_build import CacheFile, EngineOptions, build_plan
from utils.backends.tensorrt_run import TensorRTNetwork

timing = CacheFile(Path(sys.argv[1]), "timing.cache", {})
print(build_plan(fake_tensorrt("8.6"), b"graph", EngineOptions("INT8-QAT", (1,)), timing).decode())
print("torch" in sys.modules)
"""
NEEDS_TORCH = (
    "PIL",
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "pytorch_quantization",
    "sklearn",
    "matplotlib",
)


def test_engines_need_no_torch(run_script, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = run_script(tmp_path / "script.py", tmp_path, blocked=NEEDS_TORCH)
    assert process.stdout.splitlines() == ["plan 1 of graph", "False"], process.stderr


def test_the_gpu_tests_start_without_torch_and_pytest(run_script):
    process = run_script(
        "tests/test_gpu.py",
        "--help",
        blocked=(*NEEDS_TORCH, "pytest", "pycuda", *tensorrt_build.MODULES),
    )
    assert process.returncode == 0, process.stderr
    assert "EXPORT_DIR" in process.stdout
