"""OpenVINO: INT8 kernels that compute what the graph says, or a line that says they do not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, STEMMED, Small, made, normalised, write_graph_of_another_kind
from onnx import TensorProto, helper
from torch import nn

import models
from layers import FromImages
from utils import compare
from utils.backends import openvino as backend
from utils.backends.network import predict
from utils.backends.onnxruntime import OnnxRuntimeNetwork
from utils.backends.openvino import OpenVinoNetwork, checked_network
from utils.backends.pytorch import TorchNetwork
from utils.compare import Comparison
from utils.errors import UserError
from utils.metrics import percent_equal
from utils.quantization import calibrate, export_onnx, quantize_modules
from utils.quantization.export import int8_nodes

STATS = ([0.5, 0.45, 0.4], [0.25, 0.2, 0.3])
"""Mean and standard deviation of the images."""

pytestmark = pytest.mark.usefixtures("quick_latencies")


def random_images(count, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def exported(model, path, **layers):
    """The path of the model's INT8 graph, for images of 8x8."""
    quantize_modules(model, normalised(random_images(2), *STATS), **layers)
    calibrate(model, [normalised(random_images(8), *STATS)], "max")
    export_onnx(model, path, (8, 8), *STATS)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory, quick_latencies):
    return exported(made(Small).eval(), tmp_path_factory.mktemp("small") / "int8.onnx")


SIGNAL = """
import os, signal, sys
from pathlib import Path
from utils.backends.openvino import OpenVinoNetwork

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
path = Path(sys.argv[1])
first, second = OpenVinoNetwork(path), OpenVinoNetwork(path)
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_two_networks_is_handled(small):
    """On a CPU with AMX it would find no stack."""
    command = [sys.executable, "-c", SIGNAL, small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n")


# what it computes


def test_it_computes_the_graph_at_every_batch_size(small):
    network, reference = OpenVinoNetwork(small), OnnxRuntimeNetwork(small)
    images = random_images(5)
    for batch in (5, 1, 3):
        logits = network(images[:batch])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, reference(images[:batch]), rtol=1e-4, atol=1e-4)
    # timed, it is compiled for one size, and still takes others
    assert (network.latencies_ms(images[:3]) > 0).all()
    for batch in (3, 5):
        expected = reference(images[:batch])
        np.testing.assert_allclose(network(images[:batch]), expected, rtol=1e-4, atol=1e-4)


class Largest(nn.Module):
    """A quantized layer reads a maximum, as in CBAM's attention."""

    def __init__(self, extreme):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 5)
        self.extreme = extreme

    def forward(self, x):
        return self.fc(self.extreme(self.conv(x), dim=(2, 3)))


@pytest.mark.parametrize("extreme", [torch.amax, torch.amin])
def test_a_maximum_before_a_quantizer_stays_no_whole_number(tmp_path, extreme):
    torch.manual_seed(0)
    path = exported(Largest(extreme).eval(), tmp_path / "int8.onnx")
    images = random_images(16)
    expected = OnnxRuntimeNetwork(path)(images)
    error = np.linalg.norm(OpenVinoNetwork(path)(images) - expected)
    # a code at a tie is 1 % of it, and what OpenVINO makes of the graph as it is more than all
    assert error < 0.05 * np.linalg.norm(expected - expected.mean(0))


def test_a_maximum_of_whole_numbers_is_left_alone(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return x.mean((2, 3)) * (x > 0).long().amax((1, 2, 3))[:, None]

    export_onnx(Counting().eval(), tmp_path / "fp32.onnx", (8, 8), *STATS)
    images = random_images(2)
    expected = OnnxRuntimeNetwork(tmp_path / "fp32.onnx")(images)
    np.testing.assert_allclose(OpenVinoNetwork(tmp_path / "fp32.onnx")(images), expected, atol=1e-4)


def test_logits_stay_when_the_next_batch_runs(small):
    network = OpenVinoNetwork(small)
    images = random_images(4)
    first = network(images[:2])
    before = first.copy()
    network(images[2:])
    assert np.array_equal(first, before)


def test_float_is_float32_even_where_the_cpu_has_bfloat16(tmp_path):
    model = made(Small).eval()
    export_onnx(model, tmp_path / "fp32.onnx", (8, 8), *STATS)
    network = OpenVinoNetwork(tmp_path / "fp32.onnx")
    expected = TorchNetwork(FromImages(model, *STATS), torch.device("cpu"))(random_images(4))
    np.testing.assert_allclose(network(random_images(4)), expected, rtol=1e-4, atol=1e-4)
    assert {layer.precision for layer in network.layers} <= {"FP32", "UINT8"}


class Dense(nn.Module):
    """Concatenations of what comes out of ReLUs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(24, 8, 3, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x).relu()
        y = torch.cat([x, self.second(x).relu()], 1)
        z = self.third(y).relu()
        x = self.last(torch.cat([y, z], 1)).relu()
        return self.fc(self.avgpool(x).flatten(1))


def test_concatenations_of_what_is_never_negative_are_right(tmp_path, capsys):
    torch.manual_seed(0)
    path = exported(Dense().eval(), tmp_path / "int8.onnx")
    network = checked_network(path)
    assert network.name == "openvino"
    assert "OpenVINO computes" not in capsys.readouterr().out


def test_what_it_computes_wrongly_is_run_by_onnx_runtime(small, monkeypatch, capsys):
    wrong = lambda self, images: OnnxRuntimeNetwork(small)(images)[:, ::-1]  # noqa: E731
    monkeypatch.setattr(OpenVinoNetwork, "__call__", wrong)
    assert checked_network(small).name == "onnxruntime"
    said = "int8.onnx: OpenVINO computes something else in INT8 here: ONNX Runtime runs it\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_wrong(small, value, monkeypatch):
    logits = np.full((32, 5), value, np.float32)
    monkeypatch.setattr(OpenVinoNetwork, "__call__", lambda *_: logits)
    assert checked_network(small).name == "onnxruntime"


def test_a_float_graph_needs_no_check(tmp_path, monkeypatch):
    export_onnx(made(Small).eval(), tmp_path / "fp32.onnx", (8, 8), *STATS)
    monkeypatch.setattr(OpenVinoNetwork, "__call__", None)
    assert checked_network(tmp_path / "fp32.onnx").name == "openvino"


def test_without_onnx_runtime_it_says_that_nothing_was_checked(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "utils.backends.onnxruntime", None)
    assert checked_network(small).name == "openvino"
    assert "int8.onnx: not checked what OpenVINO computes" in capsys.readouterr().out


# trained networks, with and without VNNI


def trained(name, digits):
    """A network of a few quick epochs, whose predictions are about as sure as trained ones."""
    epochs = 6
    stem = "cifar" if name == "vanilla_cnn" else "imagenet"
    torch.manual_seed(0)
    model = models.build(name, 10, stem)
    images = normalised(digits.train_images, *STATS)
    labels = torch.from_numpy(digits.train_labels)
    batches = [slice(start, start + 64) for start in range(0, len(images) - 63, 64)]
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * len(batches))
    for batch in epochs * batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()

    # BatchNorm's averages lag behind after so few steps
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in batches:
            model(images[batch])
    quantize_modules(model.eval(), images[:2])
    calibrate(model, [images[batch] for batch in batches[:4]])
    return model


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from utils.backends.network import predict
from utils.backends.openvino import checked_network

folder = Path(sys.argv[1])
images = np.load(folder / "images.npy")
network = checked_network(folder / "int8.onnx")
np.save(folder / "classes.npy", predict(network, images, 128))
print(network.name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla_cnn", *STEMMED])
def test_trained_networks_predict_what_fake_quantization_predicts(name, digits, tmp_path):
    """Of all the digits; without VNNI too, where sums saturate unless ONNX Runtime steps in."""
    model = trained(name, digits)
    images = np.concatenate([digits.test_images, digits.train_images])
    export_onnx(model, tmp_path / "int8.onnx", (32, 32), *STATS)
    fake_quantized = TorchNetwork(FromImages(model, *STATS), torch.device("cpu"))
    expected = predict(fake_quantized, images, 128)

    np.save(tmp_path / "images.npy", images)
    for limit in ({}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}):
        # the limit is read when the library is loaded
        command = [sys.executable, "-c", SCRIPT, tmp_path]
        environment = {**os.environ, **limit}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert percent_equal(np.load(tmp_path / "classes.npy"), expected) >= 99.5, done.stdout
        if not limit and has_vnni():
            assert done.stdout == "openvino\n"


def has_vnni():
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "vnni" in cpuinfo.read_text()


# unsigned codes


def graph_file(path, nodes, constants, shape=("n", 8, 8, 3)):
    """A file of nodes between images and logits."""
    ends = [("images", TensorProto.UINT8, shape), ("logits", TensorProto.FLOAT, ["n", None])]
    first, last = (helper.make_tensor_value_info(*end) for end in ends)
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "test", [first], [last], tensors)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.mark.parametrize("zero_point", [np.int8(0), np.int8(3), np.uint8(0), np.uint8(128)])
@pytest.mark.parametrize("kind", ["Relu", "Sigmoid", "Identity"])
def test_rounding_behind_a_relu_gives_the_same_values(tmp_path, kind, zero_point):
    """Values far beyond code 127 too: the step is a half, the images go up to 255."""
    make = helper.make_node
    nodes = [
        make("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        make("Sub", ["x", "offset"], ["centred"]),
        make(kind, ["centred"], ["y"]),
        make("QuantizeLinear", ["y", "scale", "zero_point"], ["codes"]),
        make("DequantizeLinear", ["codes", "scale", "zero_point"], ["rounded"]),
        make("Flatten", ["rounded"], ["logits"]),
    ]
    constants = {"offset": np.float32(128.2), "scale": np.float32(0.5), "zero_point": zero_point}
    path = graph_file(tmp_path / "int8.onnx", nodes, constants)
    images = random_images(2)
    [expected] = onnxruntime.InferenceSession(path).run(None, {"images": images})
    np.testing.assert_allclose(OpenVinoNetwork(path)(images), expected, atol=1e-5)


def test_behind_relus_no_code_is_signed(small):
    import openvino

    model = openvino.Core().read_model(small)
    backend.use_unsigned_codes(model)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    # what two blocks of two convolutions and the mean read; not images and an addition's operand
    assert kinds.count("Clamp") == 5


# what it runs


def test_every_layer_meant_for_int8_runs_in_it(small):
    network = OpenVinoNetwork(small)
    nodes = int8_nodes(small, made(Small))
    assert len(nodes) > 8
    assert network.float_nodes(nodes) == []
    assert network.float_nodes(["/no/such/Conv"]) == ["/no/such/Conv"]
    convolutions = [layer for layer in network.layers if layer.kind == "Convolution"]
    assert len(convolutions) == 7
    assert {layer.precision for layer in convolutions} == {"INT8"}
    # in small letters in the names of some kernels
    assert all("I8" in layer.tactic.upper() for layer in convolutions)


class Twice(nn.Module):
    """Its BatchNorm stays behind the convolution, which is called twice."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(self.block(self.block(x)).mean((2, 3)))


def test_a_convolution_that_takes_up_a_factor_is_known_by_what_follows(tmp_path):
    model = Twice().eval()
    path = exported(model, tmp_path / "int8.onnx")
    nodes = int8_nodes(path, model)
    assert len([node for node in nodes if node.startswith("/model/block")]) == 2
    assert OpenVinoNetwork(path).float_nodes(nodes) == []


def test_a_layer_with_a_bias_of_zeros_is_known_without_it(tmp_path):
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    model = nn.Sequential(*layers).eval()
    nn.init.zeros_(layers[-1].bias)
    path = exported(model, tmp_path / "int8.onnx")
    assert OpenVinoNetwork(path).float_nodes(int8_nodes(path, model)) == []


def test_convolutions_have_times(small):
    network = OpenVinoNetwork(small, batch_size=3)
    assert network.evaluation_batch == 3
    for layer, ms in zip(network.layers, network.layer_times_ms(), strict=True):
        assert 0 <= ms < 1000 if layer.kind == "Convolution" else ms is None or ms < 1000


def test_layers_left_in_float_are_told(tmp_path):
    path = exported(made(Small).eval(), tmp_path / "int8.onnx", skip_layers=["layer1.conv2"])
    network = OpenVinoNetwork(path)
    node = "/model/layer1/conv2/Conv"
    assert network.float_nodes([node]) == [node]
    [layer] = [layer for layer in network.layers if node in layer.name.split()]
    assert layer.precision == "FP32"


# the back end among the others


def refuse():
    raise UserError("there is no GPU here")


def test_auto_is_openvino_where_there_is_no_tensorrt(small, capsys, monkeypatch):
    monkeypatch.setattr("utils.backends.tensorrt_build.require_gpu", refuse)
    small.with_name("int8_qat.onnx").write_bytes(small.read_bytes())
    network = compare.choose_backend(small.parent, Comparison(), random_images(4))("INT8-QAT")
    assert network.name == "openvino"
    assert "TensorRT is not used: there is no GPU here" in capsys.readouterr().out


def test_without_openvino_auto_is_onnx_runtime_but_cannot_audit(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "utils.backends.openvino", None)
    monkeypatch.setattr("utils.backends.tensorrt_build.require_gpu", refuse)
    small.with_name("int8_qat.onnx").write_bytes(small.read_bytes())
    network = compare.choose_backend(small.parent, Comparison(), random_images(4))("INT8-QAT")
    assert network.name == "onnxruntime"
    assert "OpenVINO is not used: " in capsys.readouterr().out
    with pytest.raises(UserError, match="--audit: ONNX Runtime does not tell"):
        compare.choose_backend(small.parent, Comparison(audit=True), random_images(4))
    with pytest.raises(UserError, match="--backend openvino: .*pip install"):
        compare.choose_backend(small.parent, Comparison(backend="openvino"), random_images(4))


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x08\x12\x04test"])
def test_a_file_that_is_no_graph_is_one_line(tmp_path, content):
    (tmp_path / "int8.onnx").write_bytes(content)
    with pytest.raises(UserError, match="OpenVINO cannot load .*int8.onnx: .*; export it again"):
        OpenVinoNetwork(tmp_path / "int8.onnx")
    with pytest.raises(UserError, match="OpenVINO cannot load"):
        OpenVinoNetwork(tmp_path / "absent.onnx")


def test_a_graph_of_another_kind_is_refused_where_it_is_loaded(tmp_path):
    write_graph_of_another_kind(tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"it has \[\('images', 'f32', 4\)"):
        OpenVinoNetwork(tmp_path / "x.onnx")


def test_images_of_another_size_are_one_line(small):
    with pytest.raises(UserError, match="OpenVINO cannot run"):
        OpenVinoNetwork(small)(random_images(2, size=16))
