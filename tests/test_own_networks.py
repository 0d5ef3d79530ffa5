"""Networks that this project did not write: functional operations, subclasses, odd structures."""

import copy
import importlib
import io
import threading
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from conftest import normalised
from onnx import numpy_helper
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from layers import Add, FromImages, Mul, Normalize
from layers.pool import MatrixAvgPool2d
from layers.quantized import QuantAdd, QuantConv2d, QuantizedLayer, quantized_form
from layers.quantizers import StraightThrough, per_channel
from utils.backends import tensorrt_build
from utils.backends.onnxruntime import OnnxRuntimeNetwork
from utils.backends.tensorrt_build import EngineOptions
from utils.errors import UserError
from utils.manifest import INPUT, layer_of
from utils.metrics import sqnr_db
from utils.quantization import calibrate, export_onnx, layer_table, quantize_modules
from utils.quantization.export import int8_nodes
from utils.quantization.fold import conv_bn_pairs, to_inference
from utils.quantization.modularize import is_candidate, modularize
from utils.quantization.sensitivity import before, switched
from utils.quantization.watch import example_images, watch

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
SIZE = 16
EXAMPLE = example_images(SIZE, SIZE)


class Base(nn.Module):
    """Two convolutions and a classifier, for networks that differ in one place."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def head(self, x):
        return self.fc(x.mean((2, 3)))


class Residual(Base):
    def forward(self, x):
        x = self.conv1(x)
        return self.head(F.relu(self.conv2(x) + x))


class InPlace(Base):
    def forward(self, x):
        x = self.conv1(x)
        out = self.conv2(x)
        out += x
        return self.head(out)


class Method(Base):
    def forward(self, x):
        x = self.conv1(x)
        return self.head(torch.relu(self.conv2(x).add(x)))


class TwoNames(Base):
    """`same` sees what is added to `x`."""

    def forward(self, x):
        x = self.conv1(x)
        same = x
        x += self.conv2(x)
        return self.head(same)


class Dropped(Base):
    def forward(self, x):
        x = self.conv1(x)
        x = F.dropout(x, 0.5, self.training)
        return self.head(self.conv2(x) + x)


class Unlike(Base):
    """Training adds, evaluation concatenates."""

    def forward(self, x):
        x = self.conv1(x)
        if self.training:
            return self.head(self.conv2(x) + x)
        return self.head(self.conv2(x) + self.conv2(x) + x)


class Branch(Base):
    def forward(self, x):
        x = self.conv1(x)
        if x.mean() > 0:
            x = self.conv2(x) + x
        return self.head(x)


class ByShape(Base):
    def forward(self, x):
        x = self.conv1(x)
        if x.shape[2] > 4:
            x = self.conv2(x) + x
        return self.head(x)


class Gate(Base):
    """Squeeze and excitation, written by hand."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(8, 4, 1)
        self.up = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = self.conv1(x)
        factor = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        x = x * torch.sigmoid(factor)
        x = x * torch.sigmoid(x)  # SiLU, which is no gate
        return self.head(self.conv2(x))


class Concatenation(Base):
    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.conv1(x)
        x = torch.cat([self.conv2(x), x], dim=1)
        return self.head(self.conv3(F.max_pool2d(x, 2)))


class Upward(Base):
    """A U-Net of one level, whose transposed convolution has a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.bn = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x):
        wide = self.conv1(x)
        x = self.bn(self.up(F.max_pool2d(self.conv2(wide), 2)))
        return self.head(self.conv3(torch.cat((x, wide), 1)))


class KernelOfImage(Base):
    """A convolution whose kernel depends on the images, as CondConv's."""

    def forward(self, x):
        x = self.conv1(x)
        share = x.mean((1, 2, 3)).sigmoid()
        kernels = share[:, None] * self.conv2.weight.flatten()[None]
        kernels = kernels.reshape(-1, 8, 3, 3)  # 8 for each image
        grouped = x.reshape(1, -1, SIZE, SIZE)
        made = F.conv2d(grouped, kernels, padding=1, groups=x.shape[0])
        return self.head(made.reshape(-1, 8, SIZE, SIZE))


def test_a_network_that_torch_fx_made_goes_the_whole_way(tmp_path):
    torch.manual_seed(0)
    model = torch.fx.symbolic_trace(Residual())
    assert "add" in quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    copy.deepcopy(model.train())(EXAMPLE).sum().backward()
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)


class Hooked(Base):
    """Reads what a hook has left, once more in training alone; holds its layers in a list, too."""

    def __init__(self):
        super().__init__()
        self.features = {}
        self.layers = [self.conv1, self.conv2]
        self.conv2.register_forward_hook(self._keep)

    def _keep(self, module, args, out):
        self.features["conv2"] = out

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        if self.training:
            self.kept = x
        return self.head(self.features["conv2"])


def test_what_holds_a_layer_beside_its_parent_holds_the_quantized_one(tmp_path):
    torch.manual_seed(0)
    model = Hooked()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    others = torch.randn(3, 3, SIZE, SIZE)
    model.eval()(others)
    assert len(model.features["conv2"]) == 3
    # which leaves tensors with gradients
    model.train()(EXAMPLE).sum().backward()
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)


@pytest.mark.parametrize("compute", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_a_hook_computes_are_exported_after_training(compute, tmp_path):
    model = Residual()
    compute(model.conv2)
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    model.train()(EXAMPLE).sum().backward()
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)


def test_a_network_that_fails_on_images_of_a_size_is_not_exported(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)).eval()
    with pytest.raises(UserError, match="fails on images of 8x9 .* give the size"):
        export_onnx(model, tmp_path / "fp32.onnx", (8, 9), MEAN, STD)


def test_a_forward_that_a_copy_does_not_follow_is_not_exported(tmp_path):
    model = Residual().eval()
    model.forward = lambda x: model.head(model.conv1(x))
    with pytest.raises(UserError, match="exporter cannot write this network"):
        export_onnx(model, tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)


def test_the_exporters_reason_is_a_short_line(tmp_path):
    with pytest.raises(UserError, match="exporter cannot write this network") as caught:
        export_onnx(KernelOfImage().eval(), tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)
    assert "Caused by" not in str(caught.value)
    assert len(str(caught.value)) < 300


class Tokens(Base):
    """A Linear on (N, H, W, C), as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = self.mix(self.conv1(x).permute(0, 2, 3, 1))
        x = self.last(x.flatten(1, 2)).unflatten(1, (SIZE, SIZE))
        return self.head(self.conv2(x.permute(0, 3, 1, 2)))


class OddPool(Base):
    """3x3 windows of a 16x16 map differ in size."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.fc = nn.Linear(72, 5)

    def forward(self, x):
        return self.fc(self.pool(self.conv2(self.conv1(x))).flatten(1))


class Resized(Base):
    def forward(self, x):
        x = F.interpolate(self.conv1(x), scale_factor=2, mode="nearest")
        return self.head(self.conv2(x))


class TwoOutputs(Base):
    def forward(self, x):
        x = self.conv2(self.conv1(x))
        return self.head(x), x


class OfTuple(nn.Module):
    """Takes one map or a tuple of them, as blocks of timm's DPN do."""

    def forward(self, x):
        return x[0] + x[1] if isinstance(x, tuple) else x


class Pair(Base):
    def __init__(self):
        super().__init__()
        self.sum = OfTuple()

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.sum((self.conv2(x), x)))


class OfMany(nn.Module):
    """Takes arguments of every kind, as wrappers do."""

    def forward(self, x, /, factor=1.0, *others, scale=2.0, last, **unused):
        for other in others:
            x = x + other
        return scale * x + last * factor


class AnyNumber(Base):
    def __init__(self):
        super().__init__()
        self.sum = OfMany()

    def forward(self, x, *nothing, **unused):
        x = self.conv1(x)
        y = self.conv2(x)
        return self.head(self.sum(x, 0.5, y, y, last=x) + y)


class OnlyByName(nn.Module):
    def forward(self, x, factor=1.0, *, scale=2.0, last):
        return scale * x + last * factor


class Named(Base):
    def __init__(self):
        super().__init__()
        self.sum = OnlyByName()

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.sum(x, last=self.conv2(x)))


class ActivatedNorm(nn.BatchNorm2d):
    """As timm's: BatchNorm and an activation in one."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(x)


class Activated(Base):
    def __init__(self):
        super().__init__()
        self.bn = ActivatedNorm(8)

    def forward(self, x):
        return self.head(self.conv2(self.bn(self.conv1(x))))


MINIATURES = (
    Residual,
    InPlace,
    Method,
    Dropped,
    Gate,
    Concatenation,
    Upward,
    Tokens,
    OddPool,
    Resized,
    TwoOutputs,
    Pair,
    Activated,
)


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def images_of(size, count=256):
    """Digits (N, H, W, 3) uint8: noise looks alike to a deep network."""
    images = sklearn.datasets.load_digits().images[:count] * 15.9  # (N, 8, 8)
    enlarged = images.repeat(-(-size // 8), 1).repeat(-(-size // 8), 2)[:, :size, :size]
    return np.repeat(enlarged[..., None].astype(np.uint8), 3, axis=3)


@torch.no_grad()
def like_trained(model, size):
    """BatchNorm's statistics are those of 64 digits: else the signal dies in a deep network."""
    images = Normalize(MEAN, STD)(torch.from_numpy(images_of(size, 64)))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    model.eval()


@torch.no_grad()
def fit_last_layer(model, images):
    """Let a quantized network tell 256 digits apart.

    Where logits lie close together, any rounding decides which is the largest.
    """
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    seen = []
    hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for part in images.split(64):
        model(part)
    hook.remove()
    features = torch.cat(seen).flatten(1)
    if last.weight[0].numel() != features.shape[1]:
        return
    # ridge regression of the classes on what the layer reads
    classes = torch.from_numpy(sklearn.datasets.load_digits().target[:256]) % len(last.weight)
    target = 10.0 * F.one_hot(classes, len(last.weight)) - 1
    ones = torch.ones(len(features), 1)
    features = torch.cat([features, ones], 1).double()
    ridge = 0.1 * features.square().sum(1).mean()
    gram = features @ features.T + ridge * torch.eye(len(features))
    solution = (features.T @ torch.linalg.solve(gram, target.double())).float()
    last.weight.copy_(solution[:-1].T.reshape(last.weight.shape))
    last.bias.copy_(solution[-1])
    last.weight_quantizer.set_range(last.weight.abs().flatten(1).amax(1))


@torch.no_grad()
def assert_layers_agree(model, path, size):
    """Each quantized layer in PyTorch, going on from what ONNX Runtime made of the one before."""
    proto = onnx.load(path)
    made = {}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            made[layer_of(node.name)] = node.output[0]
    proto.graph.output.extend(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    images = images_of(size, 4)
    names = list(dict.fromkeys(value.name for value in proto.graph.output))
    values = dict(zip(names, session.run(names, {"images": images}), strict=True))

    network = FromImages(to_inference(model, example_images(size, size)), MEAN, STD).eval()
    checked = []

    def check(layer, args, result, name):
        computed = torch.from_numpy(values[made[name]].copy())
        # the exporter joins transpositions of (N, H, W, C)
        if computed.shape != result.shape:
            computed = computed.permute(0, 2, 3, 1)
        assert sqnr_db(computed.numpy(), result.numpy()) > 30, name
        checked.append(name)
        return computed

    for name, layer in network.model.named_modules():
        if isinstance(layer, QuantizedLayer) and name in made:
            layer.register_forward_hook(partial(check, name=name))
    network(torch.from_numpy(images))
    return checked


def quantized_and_exported(model, size, path):
    """Quantize, calibrate and export a network; returns its predictions by fake quantization."""
    example = example_images(size, size)
    quantize_modules(model, example)
    images = images_of(size)
    normalised = Normalize(MEAN, STD)(torch.from_numpy(images))
    calibrate(model, normalised[:128].split(64), "max")
    fit_last_layer(model, normalised)
    export_onnx(model, path, (size, size), MEAN, STD)
    with torch.no_grad():
        return torch.cat([first(model(part)) for part in normalised.split(64)]).numpy()


def in_onnx_runtime(path, images):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    return np.concatenate([session.run(None, {"images": part})[0] for part in np.split(images, 4)])


def check_whole_way(model, size, folder, unfoldable=0, agreement=0.99):
    """From a float network to graphs that compute the same, with nothing left in float."""
    like_trained(model, size)
    example = example_images(size, size)
    cls = type(model)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = first(model(example))
    assert modularize(model, example) == {}

    # it is the same network
    with torch.no_grad():
        assert torch.equal(first(model(example)), before)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert list(model.state_dict()) == keys

    # nothing functional is left, and BatchNorm goes
    watched = watch(model, example)
    for left in filter(is_candidate, watched.operations):
        # a product of whole maps
        assert left.function == "mul"
        assert (1, 1) not in [shape[2:] for shape in left.shapes]
    norms = [o for o in watched.operations if isinstance(o.module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) - len(conv_bn_pairs(watched)) == unfoldable

    expected = quantized_and_exported(model, size, folder / "int8.onnx")
    nodes = int8_nodes(folder / "int8.onnx", model)
    assert all(node.startswith("/model/") for node in nodes), "a quantized layer without a node"
    operations = watch(model, example).operations
    assert not [op.name for op in operations if type(op.module) is Add]
    assert not [
        op.name for op in operations if op.macs and not isinstance(op.module, QuantizedLayer)
    ]
    for stem in ("int8", "int8_fp16"):
        graph = onnx.load(folder / f"{stem}.onnx").graph
        assert sum(node.op_type == "BatchNormalization" for node in graph.node) == unfoldable
    assert assert_layers_agree(model, folder / "int8.onnx", size)
    result = in_onnx_runtime(folder / "int8.onnx", images_of(size))
    assert (result.argmax(1) == expected.argmax(1)).mean() >= agreement


@pytest.mark.parametrize("network", MINIATURES)
def test_a_miniature_goes_the_whole_way(network, tmp_path):
    torch.manual_seed(0)
    check_whole_way(network(), SIZE, tmp_path)


ZOO = {
    "torchvision/resnet18": 0,
    "torchvision/resnet50": 0,
    "torchvision/mobilenet_v2": 0,
    "torchvision/mobilenet_v3_small": 0,
    "torchvision/regnet_y_400mf": 0,
    "torchvision/densenet121": 62,
    "torchvision/squeezenet1_1": 0,
    "torchvision/efficientnet_v2_s": 0,
    "torchvision/shufflenet_v2_x1_0": 0,
    "torchvision/mnasnet1_0": 0,
    "torchvision/convnext_tiny": 0,
    "torchvision/vgg11_bn": 0,
    "torchvision/googlenet": 0,
    "timm/resnet26d": 0,
    "timm/resnext50_32x4d": 0,
    "timm/resnext26ts": 0,
    "timm/mobilenetv3_small_100": 0,
    "timm/efficientnet_b0": 0,
    "timm/mobilenetv4_conv_small": 0,
    "timm/hrnet_w18_small": 0,
    "timm/dla34": 0,
    "timm/repvgg_a0": 17,
    "timm/cspresnet50": 0,
    "timm/ghostnet_100": 0,
    "timm/seresnet18": 0,
}
"""Name -> how many BatchNorms no layer can take up: those after a sum or before a convolution."""


AGREEMENT = dict.fromkeys(
    ("timm/repvgg_a0", "timm/efficientnet_b0", "torchvision/regnet_y_400mf"), 0.93
)
"""Where a code that differs at a tie moves the most of what comes after, with random weights."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_network_of_the_libraries_goes_the_whole_way(name, tmp_path):
    torch.manual_seed(0)
    check_whole_way(build(name), 64, tmp_path, ZOO[name], AGREEMENT.get(name, 0.97))
    for stem in ("int8", "int8_fp16"):
        assert tensorrt_rtx_builds(tmp_path / f"{stem}.onnx")


def tensorrt_rtx_builds(path):
    """The strongly typed builder takes the graph, for a GPU that need not be there."""
    rtx = importlib.import_module("tensorrt_rtx_bindings")
    log = tensorrt_build.make_logger(rtx)
    builder, network = tensorrt_build.parse(rtx, log, path.read_bytes(), "INT8-PTC")
    options = EngineOptions("INT8-PTC", (8,), level=0)
    config = tensorrt_build.configure(rtx, builder, network, options)
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
    return builder.build_serialized_network(network, config) is not None


def build(name):
    import timm
    import torchvision

    library, _, builder = name.partition("/")
    if library == "timm":
        return timm.create_model(builder, num_classes=10)
    return torchvision.models.get_model(builder, num_classes=10, weights=None)


# how modules are made


def modularized(network):
    torch.manual_seed(0)
    model = network().eval()
    return model, modularize(model, EXAMPLE)


@pytest.mark.parametrize(
    ("network", "kinds"),
    [
        (Residual, {"add": Add, "avgpool": nn.AdaptiveAvgPool2d}),
        (Gate, {"mul": Mul, "avgpool": nn.AdaptiveAvgPool2d, "avgpool2": nn.AdaptiveAvgPool2d}),
        (Concatenation, {"avgpool": nn.AdaptiveAvgPool2d}),
        (AnyNumber, {"add": Add, "avgpool": nn.AdaptiveAvgPool2d}),
    ],
)
def test_functions_become_children_with_plain_names(network, kinds):
    model, kept = modularized(network)
    assert kept == {}
    added = {
        name: type(m)
        for name, m in model.named_children()
        if name not in dict(children_of(network))
    }
    assert added == kinds


def children_of(network):
    return network().named_children()


def test_names_do_not_depend_on_the_size_of_the_example():
    """At 1x1 pixels every product looks like one with a factor for each channel."""
    names = []
    for size in (1, 16):
        model = Gate()
        modularize(model, example_images(size, size))
        names.append([name for name, _ in model.named_modules()])
    assert names[0] == names[1]


def test_the_second_time_nothing_changes():
    model, _ = modularized(Residual)
    before = list(model.named_modules())
    modularize(model, EXAMPLE)
    assert list(model.named_modules()) == before


@pytest.mark.parametrize(
    ("network", "children"), [(AnyNumber, ["add", "add2", "add3"]), (Named, ["add"])]
)
def test_a_forward_may_take_arguments_of_every_kind(network, children):
    others = torch.randn(3, 3, SIZE, SIZE)
    torch.manual_seed(0)
    model = network().eval()
    with torch.no_grad():
        before = model(others)
        assert modularize(model, EXAMPLE) == {}
        assert torch.equal(model(others), before)
    assert [name for name, _ in model.sum.named_children()] == children
    assert isinstance(model.sum.add, Add)


def test_a_forward_of_any_number_of_arguments_is_given_as_many_as_traced():
    class Network(AnyNumber):
        def forward(self, x):
            x = self.conv1(x)
            y = self.conv2(x)
            more = [y] if self.training else []
            return self.head(self.sum(x, 0.5, y, *more, last=x))

    model = Network()
    modularize(model, EXAMPLE)
    model.eval()(EXAMPLE)
    with pytest.raises(UserError, match="1 arguments behind its star is given 2"):
        model.train()(EXAMPLE)


class Optional(Base):
    def forward(self, x, features=False, scale=1.0, mask=None):
        x = self.conv1(x)
        x = x if mask is None else x * mask
        x = (x + self.conv2(x)).mean((2, 3)) * scale
        return x if features else self.fc(x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"features": True}, "Optional.forward was rewritten for features=False and is given True"),
        ({"scale": 2.0}, "scale=1.0 and is given 2.0"),
        ({"mask": torch.zeros(2, 8, SIZE, SIZE)}, "mask=None and is given a tensor"),
    ],
)
def test_a_forward_is_given_the_constants_that_it_was_rewritten_for(given, said):
    model = Optional().eval()
    assert modularize(model, EXAMPLE) == {}
    model(EXAMPLE, scale=1)
    with pytest.raises(UserError, match=said):
        model(EXAMPLE, **given)


class Keeper(Base):
    """Keeps features in lists of lists."""

    def __init__(self):
        super().__init__()
        self.taps = {"conv1": []}

    def forward(self, x):
        x = self.conv1(x)
        self.taps["conv1"].append(x)
        return self.head(self.conv2(x) + x)


def test_features_that_a_forward_keeps_in_lists_are_tensors():
    model = Keeper().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    model.taps["conv1"].clear()
    model(EXAMPLE)
    assert [type(features) for features in model.taps["conv1"]] == [torch.Tensor]


class Tied(Base):
    """An autoencoder's tied decoder."""

    def forward(self, x):
        codes = self.conv1(x).relu()
        return self.head(self.conv2(codes)) + self.decoded(codes).mean((1, 2, 3))[:, None]

    def decoded(self, codes):
        return F.conv_transpose2d(codes, self.conv1.weight, padding=1)


def test_a_layer_whose_weight_a_function_reads_stays_float():
    model = Tied().eval()
    assert quantize_modules(model, EXAMPLE) == ["conv2", "fc", "avgpool"]
    calibrate(model, [EXAMPLE])
    assert "float  a function reads its weight, too" in layer_table(model, EXAMPLE)


def test_a_second_call_leaves_the_additions_of_the_first():
    model = Residual()
    quantize_modules(model, EXAMPLE, skip_layers=["fc"])
    model.add.round_instead((0, 1))
    calibrate(model, [EXAMPLE])
    before = model.eval()(EXAMPLE)
    quantize_modules(model, EXAMPLE, quant_layers=["conv1"])
    assert model.add.rounds == (0, 1)
    assert torch.equal(model(EXAMPLE), before)


class Block(nn.Module):
    def forward(self, x):
        return x.relu() + x


def test_a_block_that_comes_before_calibration_stays_float_for_that_reason():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    quantize_modules(model, EXAMPLE)
    model.insert(1, Block())
    assert "NaN of the example" in modularize(model, EXAMPLE)["1"]
    calibrate(model, [EXAMPLE])
    assert modularize(model, EXAMPLE) == {}
    assert isinstance(model[1].add, Add)


class Reducing(Residual):
    def __reduce__(self):
        return Reducing, (), vars(self)


def test_a_rewritten_module_with_a_way_to_pickle_of_its_own_is_copied_as_it_is():
    model = Reducing()
    modularize(model, EXAMPLE)
    assert isinstance(copy.deepcopy(model).add, Add)
    assert type(copy.deepcopy(model)) is type(model)


def test_pruned_weights_are_calibrated_as_they_are_and_exported_once_they_are_plain(tmp_path):
    model = Residual()
    quantize_modules(model, EXAMPLE)
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    with torch.no_grad():
        model.conv2.weight_orig *= 4
    calibrate(model, [EXAMPLE])
    ranges = model.conv2.weight_quantizer.amax
    assert torch.equal(ranges, model.conv2.weight.abs().amax((1, 2, 3)))
    with pytest.raises(UserError, match="a hook computes conv2.weight in each run: call prune"):
        export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)
    prune.remove(model.conv2, "weight")
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)


def test_an_export_draws_no_random_numbers(tmp_path):
    model = Residual()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    state = torch.get_rng_state()
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_ranges_stay_what_they_are_in_another_type(dtype):
    model = Residual().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    before = model.conv1.input_quantizer.amax
    assert model.to(dtype)(EXAMPLE.to(dtype)).dtype == dtype
    assert torch.equal(model.conv1.input_quantizer.amax, before)


def test_dropout_goes_on_in_training_alone():
    model, _ = modularized(Dropped)
    model.train()
    assert not torch.equal(model(EXAMPLE), model(EXAMPLE))
    model.eval()
    assert torch.equal(model(EXAMPLE), model(EXAMPLE))


def test_attributes_methods_and_hooks_stay():
    model = Residual().eval()
    model.note = {"a": 1}
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    modularize(model, EXAMPLE)
    calls.clear()
    model(EXAMPLE)
    assert model.note == {"a": 1}
    assert calls == [1]
    assert model.head.__func__ is Base.head
    clone = copy.deepcopy(model)
    assert torch.equal(clone(EXAMPLE), model(EXAMPLE))
    assert clone.add is not model.add


def test_a_whole_network_can_be_saved():
    model = Residual().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE], "max")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    assert type(loaded) is type(model)
    assert isinstance(loaded, Residual)


class OwnWeight(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, self.weight, bias)


def test_a_subclass_that_takes_its_weight_by_itself_has_it_rounded():
    torch.manual_seed(0)
    model = nn.Sequential(OwnWeight(3, 4, 3))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    plain.load_state_dict(model.state_dict())
    for network in (model, plain):
        quantize_modules(network, EXAMPLE)
        calibrate(network, [EXAMPLE])
    assert torch.equal(model(EXAMPLE), plain(EXAMPLE))


class OfSize(nn.Module):
    """Is given the size of its maps as a pair of numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, size):
        return F.interpolate(self.conv(x), size) + F.interpolate(x, size)


class Sized(Base):
    def __init__(self, size):
        super().__init__()
        self.of_size = OfSize()
        self.size = size

    def forward(self, x):
        return self.head(self.of_size(self.conv1(x), self.size))


def test_a_pair_of_numbers_is_a_constant_too():
    model = Sized((8, 8)).eval()
    assert "of_size.add" in quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    with pytest.raises(UserError, match=r"size=\(8, 8\) and is given \(4, 4\)"):
        model.of_size(torch.zeros(2, 8, SIZE, SIZE), (4, 4))


def test_other_threads_run_as_they_are_while_a_network_is_rewritten():
    found = []

    class Waiting(Base):
        def forward(self, x):
            x = self.conv1(x)
            thread = threading.Thread(target=lambda: found.append(torch.is_grad_enabled()))
            thread.start()
            thread.join()
            return self.head(self.conv2(x) + x)

    modularize(Waiting(), EXAMPLE)
    assert found
    assert all(found)


class Doubled(nn.Conv2d):
    """With a method of its own, which the network calls."""

    def twice(self, x):
        return 2 * self(x)


class OfDoubled(Base):
    def __init__(self):
        super().__init__()
        self.conv2 = Doubled(8, 8, 3)

    def forward(self, x):
        return self.head(self.conv2.twice(self.conv1(x)))


def test_a_subclass_keeps_its_own_methods(tmp_path):
    model = OfDoubled().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE], "max")
    assert isinstance(model.conv2, QuantConv2d)
    assert isinstance(model.conv2, Doubled)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded.conv2) is type(model.conv2)
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Unlike, "control flow"),
        (TwoNames, "modules in their place give another result"),
        (Branch, "control flow"),
        (ByShape, "control flow"),
    ],
)
def test_what_cannot_be_rewritten_stays_as_it_was(network, why):
    model = network().eval()
    names = list(dict(model.named_modules()))
    with torch.no_grad():
        before = model(EXAMPLE)
        kept = modularize(model, EXAMPLE)
        assert torch.equal(model(EXAMPLE), before)
    assert why in kept[""]
    assert list(dict(model.named_modules())) == names
    assert type(model) is network
    table = layer_table(model, EXAMPLE)
    assert "functional, at test_own_networks.py:" in table


class CountingImages(Base):
    def forward(self, x):
        x = self.conv1(x)
        return self.fc(x.reshape(int(x.shape[0] * 1.0), 8, -1).mean(2))


class OneByOne(Base):
    def forward(self, x):
        return torch.cat([self.head(image[None]) for image in self.conv1(x)])


def all_rows(logits):
    """The same, but shape inference cannot tell how many there are."""
    return logits[torch.nonzero(logits[:, 0] == logits[:, 0]).flatten()]


class CountingGroups(Base):
    def forward(self, x):
        x = self.conv1(x)
        groups = x.reshape(8 * int(x.shape[0] * 1.0), -1).mean(1)
        return all_rows(self.fc(groups.reshape(-1, 8)))


class CountingRows(Base):
    def forward(self, x):
        x = self.conv1(x)
        rows = x.reshape(8 * int(x.shape[0] * 1.0), SIZE * SIZE).mean(1)
        return all_rows(self.fc(rows.reshape(-1, 8)))


@pytest.mark.parametrize(
    ("network", "what"),
    [
        (CountingImages, "a graph of as many images"),
        (OneByOne, "a graph of as many images"),
        (CountingGroups, "of 3 images the graph makes logits"),
        (CountingRows, "the graph fails on 3 images"),
    ],
)
def test_a_graph_of_two_images_alone_is_not_exported(network, what, tmp_path):
    with pytest.raises(UserError, match=f"{what}.*a Python number of how many images"):
        export_onnx(network(), tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)
    assert not list(tmp_path.iterdir())


class OwnRounding(Base):
    """A network that rounds by itself, to a grid of its own."""

    def forward(self, x):
        x = self.conv1(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))
        x = self.conv2(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))
        return self.head(x)


class Unstable(Base):
    """No two machines make the same of an image."""

    def forward(self, x):
        x = self.conv1(x)
        for _ in range(4):
            x = torch.sin(1000 * x)
        return self.head(x)


@pytest.mark.parametrize("network", [OwnRounding, Unstable])
def test_what_rounds_by_itself_or_is_unstable_is_exported(network, tmp_path):
    torch.manual_seed(0)
    export_onnx(network().eval(), tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)


class NeverTrained(Base):
    def __init__(self):
        super().__init__()
        self.eval()

    def train(self, mode):
        if mode:
            raise RuntimeError("for inference only")
        return super().train(mode)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x)))


def test_a_network_for_inference_only_is_never_set_to_training(tmp_path):
    model = NeverTrained()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)


class HalfRectified(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv1(x)
        self.act(x[:, :4])
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_a_graph_that_is_another_function_is_not_exported(quantized, tmp_path):
    model = HalfRectified().eval()
    if quantized:
        quantize_modules(model, EXAMPLE)
        calibrate(model, [EXAMPLE])
    with pytest.raises(UserError, match="other logits than the network .* in place on a slice"):
        export_onnx(model, tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)
    assert not list(tmp_path.iterdir())


class Several(Base):
    def forward(self, x):
        x = self.conv1(x)
        return {"boxes": self.fc(x.mean((2, 3))), "scores": self.head(x)}


def test_a_network_of_several_results_says_which_are_its_logits(tmp_path):
    with pytest.raises(UserError, match="returns a dict of boxes, scores: return the logits alone"):
        export_onnx(Several(), tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)


class Excited(Base):
    """Squeeze and excitation as its authors' PyTorch code has it."""

    def forward(self, x):
        x = self.conv1(x)
        factor = torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
        return self.head(x * factor.expand_as(x))


def test_an_expanded_factor_is_one_for_each_channel():
    model = Excited()
    with torch.no_grad():
        before = model(EXAMPLE)
    assert modularize(model, EXAMPLE) == {}
    assert isinstance(model.mul, Mul)
    assert torch.equal(model(EXAMPLE), before)
    assert "expand_as" not in [operation.function for operation in watch(model, EXAMPLE).operations]
    assert "mul" in quantize_modules(model, EXAMPLE)


class Normed(Residual):
    """Spectral normalisation, which computes the weight, in the first convolution."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.conv1)


def test_computed_weights_are_exported_as_their_values(tmp_path):
    model = Normed().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE], "max")
    with torch.no_grad():
        before = model(EXAMPLE)
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)
    with torch.no_grad():
        assert torch.equal(model(EXAMPLE), before)
        network = FromImages(model, MEAN, STD)
        images = images_of(SIZE)
        expected = network(torch.from_numpy(images)).numpy()
    assert sqnr_db(in_onnx_runtime(tmp_path / "int8.onnx", images), expected) > 40


class Attending(Base):
    """A transformer's layer, whose fused kernel calls none of its own layers."""

    def __init__(self):
        super().__init__()
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        return self.fc(self.encode(x).mean(1))


def test_the_layers_of_a_transformer_are_calibrated():
    model = Attending().eval()
    assert "encode.linear1" in quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE], "max")
    with_gradients = model(EXAMPLE)
    with torch.no_grad():
        before = model(EXAMPLE)
        assert torch.equal(before, with_gradients)
        model.encode.linear1.input_quantizer.set_range(torch.tensor(1e-3))
        assert not torch.equal(model(EXAMPLE), before)


def test_a_network_without_quantizable_layers_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU())
    with pytest.raises(UserError, match="no layer of this network has a quantized form"):
        quantize_modules(model, EXAMPLE)


class SizesOfTokens(nn.Module):
    """A linear layer of (N, values, C), and sizes that are read off what it makes."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.inner = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.inner(x)
        images, values, _ = tokens.shape
        scale = tokens.view(images, values, 4, -1).mean((2, 3))
        return self.fc((x * scale[..., None]).mean(1))


def test_a_graph_that_reads_sizes_off_a_linear_layer_takes_any_batch(tmp_path):
    torch.manual_seed(0)
    model = SizesOfTokens().eval()
    quantize_modules(model, EXAMPLE, skip_layers=["fc"])
    calibrate(model, [EXAMPLE])
    export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)
    network = OnnxRuntimeNetwork(tmp_path / "int8.onnx")
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    np.testing.assert_allclose(network(images)[:1], network(images[:1]), rtol=1e-4, atol=1e-5)


class Cached(Base):
    """Keeps in evaluation what it computed of a parameter, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8, 1, 1))
        self.doubled = None

    def train(self, mode=True):
        self.doubled = None if mode else self.doubled
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.head(self.conv1(x) + 2 * self.bias)
        if self.doubled is None:
            self.doubled = 2 * self.bias
        return self.head(self.conv1(x) + self.doubled)


def test_what_a_network_keeps_in_evaluation_is_of_the_weights_loaded_last():
    torch.manual_seed(0)
    trained = Cached()
    nn.init.normal_(trained.bias)
    quantize_modules(trained, EXAMPLE)
    calibrate(trained, [EXAMPLE])
    fresh = Cached()
    quantize_modules(fresh, EXAMPLE)
    fresh.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(EXAMPLE), trained.eval()(EXAMPLE))


class OneVector(Base):
    def forward(self, x):
        return self.fc(self.conv1(x).mean((0, 2, 3)))


def test_a_linear_layer_of_a_single_vector_is_calibrated():
    model = OneVector().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    with torch.no_grad():
        assert model(EXAMPLE).isfinite().all()


def test_dictionaries_of_images_are_refused():
    model = Residual().eval()
    quantize_modules(model, EXAMPLE)
    with pytest.raises(UserError, match="no dictionaries"):
        calibrate(model, [{"image": EXAMPLE}])


def test_a_branch_on_values_is_not_exported(tmp_path):
    model = Branch()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE], "max")
    with pytest.raises(UserError, match=r"computed values at test_own_networks\.py:\d+"):
        export_onnx(model, tmp_path / "int8.onnx", (SIZE, SIZE), MEAN, STD)


# which operand of an addition is rounded


class Sum(nn.Module):
    """`first(x) + second(x)`."""

    def __init__(self, first, second):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = first
        self.second = second

    def forward(self, x):
        x = self.stem(x)
        return (self.first(x) + self.second(x)).mean((2, 3))


def conv(kernel, groups=1):
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups)


@pytest.mark.parametrize(
    ("first", "second", "rounds"),
    [
        (conv(3), nn.Identity(), (1,)),
        (nn.Identity(), conv(3), (0,)),
        (conv(3), conv(1), (0,)),
        (conv(1), conv(3), (1,)),
        # of one size, the one with less work adds
        (conv(1), conv(1, groups=8), (0,)),
        (nn.Sequential(conv(3), nn.BatchNorm2d(8)), nn.Identity(), (1,)),
        (nn.Sequential(conv(3), nn.ReLU()), nn.Identity(), (0, 1)),
        (nn.Sequential(conv(3), nn.ReLU()), conv(3), (0,)),
        (nn.MaxPool2d(3, 1, 1), nn.Identity(), (0, 1)),
    ],
)
def test_the_operand_of_the_adding_convolution_is_not_rounded(first, second, rounds):
    model = Sum(first, second).eval()
    quantize_modules(model, EXAMPLE)
    assert isinstance(model.add, QuantAdd)
    assert model.add.rounds == rounds
    named = {QuantAdd.QUANTIZERS[operand] for operand in rounds}
    assert {name for name, _ in model.add.named_children()} == named


def test_a_convolution_that_others_read_too_does_not_add():
    class Shared(Sum):
        def forward(self, x):
            x = self.stem(x)
            return (x + self.second(x)).mean((2, 3))

    model = Shared(nn.Identity(), nn.MaxPool2d(3, 1, 1)).eval()
    modularize(model, EXAMPLE)
    assert model.add.rounds == (0, 1)


# forms of layers


class Checked(nn.Conv2d):
    """Its own forward, the standard arithmetic."""

    def forward(self, x):
        assert x.ndim == 4
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """Weight standardisation: not the standard arithmetic."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.std(), self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    ("layer", "has_form"),
    [
        (type("Named", (nn.Conv2d,), {})(3, 8, 3), True),
        (Checked(3, 8, 3), True),
        (Scaled(3, 8, 3), False),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), False),
        (nn.Conv1d(3, 8, 3), False),
    ],
)
def test_a_subclass_is_quantized_if_it_computes_what_its_base_does(layer, has_form):
    assert (quantized_form(layer) is not None) is has_form


def test_a_layer_with_a_forward_of_its_own_stays_float():
    layer = nn.Conv2d(3, 8, 3)
    layer.forward = lambda x: 2 * nn.Conv2d.forward(layer, x)
    assert quantized_form(layer) is None


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_a_range_for_each_output_channel(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)
    quant = quantized_form(layer).convert(layer)
    x = torch.randn(2, 4, 5, 5)
    channels = 6 // groups
    amax = layer.weight.detach().abs().amax((0, 2, 3))
    assert quant.weight_quantizer._amax.shape == (channels,)
    quant.weight_quantizer.set_range(amax)
    quant.input_quantizer.set_range(x.abs().max())
    scale = (amax / 127).reshape(1, -1, 1, 1)
    weight = (layer.weight / scale).round() * scale
    step = x.abs().max() / 127
    expected = F.conv_transpose2d((x / step).round() * step, weight, layer.bias, 2, groups=groups)
    torch.testing.assert_close(quant(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("size", "out"), [(16, 3), (1, 7), (7, 5), (5, 4)])
def test_an_odd_average_pool_is_two_matrix_products(size, out):
    x = torch.randn(2, 3, size, size)
    pool = MatrixAvgPool2d(nn.AdaptiveAvgPool2d(out), (size, size), (out, out))
    torch.testing.assert_close(pool(x), F.adaptive_avg_pool2d(x, out))


# what the table says


def test_table_says_how_much_is_int8_and_why_the_rest_is_not():
    model = Gate()
    quantize_modules(model, EXAMPLE, skip_layers=["conv2", "mul"])
    *lines, last = layer_table(model, EXAMPLE).splitlines()
    assert last.startswith("INT8: ")
    assert last.endswith("% of the multiply-adds; float: mul, conv2")
    assert "not selected" in next(line for line in lines if line.startswith("conv2 "))


def test_table_says_that_a_weight_of_a_parametrization_is_computed():
    model = Residual()
    nn.utils.parametrizations.weight_norm(model.conv2)
    quantize_modules(model, EXAMPLE)
    line = next(line for line in layer_table(model, EXAMPLE).splitlines() if "conv2" in line)
    assert "its weight is computed: " in line


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_table_says_that_a_computed_weight_is_no_parameter():
    model = Residual()
    nn.utils.weight_norm(model.conv2)
    quantize_modules(model, EXAMPLE)
    line = next(line for line in layer_table(model, EXAMPLE).splitlines() if "conv2" in line)
    assert "its weight is computed: remove_weight_norm, " in line


def test_table_counts_multiply_adds():
    model = Residual()
    quantize_modules(model, EXAMPLE, skip_layers=["conv1"])
    pixels = SIZE * SIZE
    conv1, conv2, fc = 3 * 8 * 9 * pixels, 8 * 8 * 9 * pixels, 8 * 5
    share = 100 * (conv2 + fc) / (conv1 + conv2 + fc)
    last = layer_table(model, EXAMPLE).splitlines()[-1]
    assert last == f"INT8: {share:.1f} % of the multiply-adds, 1 of 1 additions; float: conv1"


@pytest.mark.parametrize(
    ("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)], ids=["LSTM", "GRU", "RNN"]
)
def test_table_counts_recurrent_layers(kind, gates):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)
            self.rnn = kind(6, 5, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(10, 4)

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2)
            return self.fc(self.rnn(x)[0][:, -1])

    model = Recurrent()
    quantize_modules(model, EXAMPLE)
    pixels = SIZE * SIZE
    int8 = 3 * 6 * pixels + 10 * 4
    share = 100 * int8 / (int8 + pixels * 2 * gates * (6 * 5 + 5 * 5))
    last = layer_table(model, EXAMPLE).splitlines()[-1]
    assert last == f"INT8: {share:.1f} % of the multiply-adds; float: rnn"


def test_table_counts_addmm_as_no_addition():
    class Product(Residual):
        def forward(self, x):
            return torch.addmm(x.new_zeros(5), super().forward(x), x.new_ones(5, 5))

    model = Product()
    quantize_modules(model, EXAMPLE)
    assert ", 1 of 1 additions; float: addmm" in layer_table(model, EXAMPLE)


def test_layers_that_are_never_called_are_named():
    class Auxiliary(Residual):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(8, 5)

    model = Auxiliary()
    assert "aux" not in quantize_modules(model, EXAMPLE)
    line = next(
        text for text in layer_table(model, EXAMPLE).splitlines() if text.startswith("aux ")
    )
    assert "not called as a module" in line


class Ramp(Residual):
    """Adds a ramp that it makes itself, as positions are added."""

    def forward(self, x):
        ramp = torch.arange(x.shape[3], dtype=x.dtype, device=x.device) / x.shape[3]
        return super().forward(x + ramp)


class Noisy(Residual):
    def forward(self, x):
        return super().forward(x + 1e-9 * torch.randn(1))


def test_random_numbers_are_exported_in_both_types(tmp_path):
    # whoever exports checks the graphs; ONNX Runtime has no kernel for this in FP16
    export_onnx(Noisy().eval(), tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)
    assert (tmp_path / "fp16.onnx").exists()


def test_a_ramp_that_a_network_makes_is_exported_in_both_types(tmp_path):
    model = Ramp().eval()
    export_onnx(model, tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    expected = model(normalised(images, MEAN, STD)).detach().numpy()
    for name, tolerance in (("fp32.onnx", 1e-4), ("fp16.onnx", 2e-2)):
        session = onnxruntime.InferenceSession(tmp_path / name)
        np.testing.assert_allclose(session.run(None, {INPUT: images})[0], expected, atol=tolerance)


def test_resize_scales_of_the_fp16_graph_stay_fp32(tmp_path):
    model = Resized()
    export_onnx(model, tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)
    graph = onnx.load(tmp_path / "fp16.onnx").graph
    onnxruntime.InferenceSession(tmp_path / "fp16.onnx")
    resize = next(node for node in graph.node if node.op_type == "Resize")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    assert constants[resize.input[2]].dtype == np.float32


# structures that look like others


def conv_bn(channels=8, **options):
    conv = nn.Conv2d(channels, channels, 3, padding=options.pop("padding", 1), **options)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class WithBody(Base):
    def __init__(self):
        super().__init__()
        self.body = conv_bn()

    def forward(self, x):
        return self.head(self.body(self.conv1(x)))


class TwoNamed(WithBody):
    """Layers that are attributes, too, of which `forward` uses the Sequential."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = self.body[0], self.body[1]


class ItemSet(WithBody):
    def forward(self, x):
        x = self.body[0](self.conv1(x))
        x[:, :4] = 0
        return self.head(self.body[1](x))


class HookedConv(WithBody):
    def __init__(self):
        super().__init__()
        self.body[0].register_forward_hook(lambda module, args, out: out.clamp(-1, 1))


class HookedNorm(WithBody):
    def __init__(self):
        super().__init__()
        self.body[1].register_forward_hook(lambda module, args, out: 3 * out)


class HookedLinear(WithBody):
    def __init__(self):
        super().__init__()
        self.fc.register_forward_hook(lambda module, args, out: out.flip(1))


class Dilated(WithBody):
    def __init__(self):
        super().__init__()
        self.body = conv_bn(padding="same", dilation=2)


@pytest.mark.parametrize(
    "network", [TwoNamed, ItemSet, HookedConv, HookedNorm, HookedLinear, Dilated]
)
def test_an_export_computes_what_the_network_does(network, tmp_path):
    torch.manual_seed(0)
    model = network()
    like_trained(model, SIZE)
    images = images_of(SIZE)
    with torch.no_grad():
        expected = model(Normalize(MEAN, STD)(torch.from_numpy(images))).numpy()
    export_onnx(model, tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)
    assert sqnr_db(in_onnx_runtime(tmp_path / "fp32.onnx", images), expected) > 80

    # and in INT8, but for codes at ties
    expected = quantized_and_exported(model, SIZE, tmp_path / "int8.onnx")
    assert sqnr_db(in_onnx_runtime(tmp_path / "int8.onnx", images), expected) > 25


class Scaling(nn.Module):
    def forward(self, x, factor):
        return x + factor * x


class CalledDifferently(Base):
    def __init__(self):
        super().__init__()
        self.scaling = Scaling()

    def forward(self, x):
        return self.head(self.scaling(self.scaling(self.conv1(x), 1.0), -3.0))


class Dropping(nn.Module):
    def forward(self, x, training):
        return x + F.dropout(x, 0.5, training)


class GivenAFlag(Base):
    def __init__(self):
        super().__init__()
        self.dropping = Dropping()

    def forward(self, x):
        return self.head(self.dropping(self.conv1(x), self.training))


class Gathering(nn.Module):
    def forward(self, parts):
        return parts["a"] + parts["b"]


class OfDict(Base):
    def __init__(self):
        super().__init__()
        self.gathering = Gathering()

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.gathering({"a": x, "b": self.conv2(x)}))


class Naming(nn.Module):
    def forward(self, x, **others):
        return x + others["y"]


class OfNames(Base):
    def __init__(self):
        super().__init__()
        self.naming = Naming()

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.naming(x, y=self.conv2(x)))


class Asking(nn.Module):
    def forward(self, *parts):
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        return tensors[0] + tensors[1] if tensors else parts[0]


class OfKinds(Base):
    def __init__(self):
        super().__init__()
        self.asking = Asking()

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.asking(x, self.conv2(x)))


class ConstantDefault(nn.Module):
    def forward(self, x, shift=torch.ones(8, 1, 1)):  # noqa: B008
        return x + x.abs() + shift


class OfDefault(Base):
    def __init__(self):
        super().__init__()
        self.shifting = ConstantDefault()

    def forward(self, x):
        return self.head(self.shifting(self.conv1(x)))


class Featured(Base):
    """Leaves its features for another loss."""

    def forward(self, x):
        x = self.conv1(x)
        self.features = self.conv2(x) + x
        return self.head(self.features)


class Keeping(nn.Module):
    """Adds what another module left in an attribute."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x):
        return x + self.kept["x"]


class Shared(Base):
    def __init__(self):
        super().__init__()
        self.keeping = Keeping()

    def forward(self, x):
        x = self.conv1(x)
        self.keeping.kept["x"] = x
        return self.head(self.keeping(self.conv2(x)))


class Frozen(Base):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv1(x)
        return self.head(x + self.conv2(x))


class Signs(torch.autograd.Function):
    """Its gradient passes straight through."""

    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(Base):
    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.conv2(Signs.apply(x)) + x)


by_signs = Signs.apply


class BinaryByAnotherName(Base):
    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.conv2(by_signs(x)) + x)


class AsksForAutocast(Base):
    def forward(self, x):
        x = self.conv1(x)
        factor = 2 if torch.is_autocast_enabled("cpu") else 1
        return self.head(factor * self.conv2(x) + x)


class Resetting(Base):
    def forward(self, x):
        self.taps = []
        x = self.conv1(x)
        return self.head(self.conv2(x) + x)


class InFloat(Base):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.conv1(x)
        return self.head(self.conv2(x) + x)


class Checkpointed(Base):
    def forward(self, x):
        x = self.conv1(x)
        return self.head(checkpoint(self.conv2, x, use_reentrant=False) + x)


class AsksForGradients(Base):
    def forward(self, x):
        x = self.conv1(x)
        if torch.is_grad_enabled():
            x.register_hook(print)
        return self.head(self.conv2(x) + x)


class OfAGraph(Base):
    """Holds what torchvision makes by torch.fx, which has another graph in training."""

    def __init__(self):
        super().__init__()
        self.body = create_feature_extractor(Residual(), {"add": "features"})
        self.conv1 = self.body.conv1

    def forward(self, x):
        return self.head(self.body(x)["features"])


class Gated(Base):
    """Gives a parameter to a child module, and a buffer to a product."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8))
        self.sigmoid = nn.Sigmoid()
        self.register_buffer("gain", torch.ones(1, 3, 1, 1))

    def forward(self, x):
        x = self.conv1(x * self.gain)
        return self.head(self.conv2(x) * self.sigmoid(self.gate)[:, None, None] + x)


def test_parameters_and_buffers_keep_no_addition_from_becoming_a_module(capsys):
    model = Gated()
    assert "add" in quantize_modules(model, EXAMPLE)
    assert not capsys.readouterr().out


class Gained(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(1, 3, 1, 1))

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x * self.gain)).amax((2, 3)))


def test_a_product_with_a_buffer_alone_is_no_functional_operation():
    assert modularize(Gained(), EXAMPLE) == {}


class Reserved(Base):
    """Holds a module under a word of Python, which no generated code can call it by."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleDict({"in": nn.Identity()})

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self.steps["in"](self.conv2(x)) + x)


class PromptedTokens(Base):
    """A layer reads a parameter."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 8))
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(input=self.conv1(x).mean((2, 3)) + self.mix(self.token))


def test_a_quantized_layer_may_read_a_parameter(tmp_path):
    model = PromptedTokens()
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    rows = layer_table(model, EXAMPLE).splitlines()
    assert any(row.startswith("mix ") and "INT8" in row for row in rows)
    export_onnx(model, tmp_path / "net.onnx", SIZE, MEAN, STD)


def test_a_quantized_activation_in_place_trains_as_the_float_one_does(monkeypatch):
    """Rounding that keeps its input for the gradient, as it does on a GPU."""

    def rounding(x, scale, zero_point, code_min, axis=0):
        scale = per_channel(scale, x, axis) if scale.ndim else scale
        return StraightThrough.apply(x, scale, code_min)

    monkeypatch.setattr("layers.quantizers.fake_quantize", rounding)

    class InPlace(Base):
        def __init__(self):
            super().__init__()
            self.act = nn.Hardswish(inplace=True)

        def forward(self, x):
            x = self.conv1(x)
            self.act(x)  # the result is left in x
            return self.fc(x.amax((2, 3)))

    model = InPlace()
    plain = copy.deepcopy(model)
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    for network in (model, plain):
        network.train()(EXAMPLE).square().sum().backward()
    found, wanted = model.conv1.weight.grad, plain.conv1.weight.grad
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(
    ("network", "name", "why"),
    [
        (Reserved, "", "a word of Python for a name"),
        (CalledDifferently, "scaling", "its calls differ"),
        (GivenAFlag, "dropping", "it is given a flag"),
        (OfDict, "gathering", "parts holds tensors in a dict"),
        (OfNames, "naming", "others holds tensors in a dict"),
        (OfKinds, "asking", "stands for one"),
        (OfDefault, "shifting", "a tensor that is neither given nor its own"),
        (Featured, "", "it sets self.features"),
        (Shared, "keeping", "which torch.fx cannot trace"),
        (Frozen, "", "it switches gradients off"),
        (Binary, "", "it has a gradient of its own"),
        (InFloat, "", "it asks for gradients or autocast, or switches them"),
        (Checkpointed, "", "it asks for gradients or autocast, or switches them"),
        (AsksForGradients, "", "it asks for gradients or autocast, or switches them"),
        (Keeper, "", "it changes self.taps"),
        (Resetting, "", "it sets self.taps"),
        (BinaryByAnotherName, "", "it has a gradient of its own"),
        (AsksForAutocast, "", "it asks for gradients or autocast, or switches them"),
        (OfAGraph, "body", "it is made by torch.fx"),
    ],
)
def test_what_a_trace_of_one_call_would_change_stays(network, name, why):
    torch.manual_seed(0)
    model = network().eval()
    others = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        before = model(others)
    attributes = {*vars(model.get_submodule(name))}
    assert why in modularize(model, EXAMPLE)[name]
    assert {*vars(model.get_submodule(name))} == attributes
    with torch.no_grad():
        assert torch.equal(model(others), before)
    if network is Featured:
        assert isinstance(model.features, torch.Tensor)
    model(others).sum().backward()
    assert (model.conv1.weight.grad is None) == (network is Frozen)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.equal(x[0], x[1]),
        lambda x: 0.25 in x,
        lambda x: torch.is_nonzero(x.sum()),
        lambda x: np.asarray(x.detach()).max() > 1,
    ],
)
def test_every_way_to_look_at_a_value_is_noticed(read):
    class Looking(Base):
        def forward(self, x):
            x = self.conv1(x)
            return self.head(x if read(x) else -x)

    assert watch(Looking(), EXAMPLE).value_reads


def test_one_pool_for_feature_maps_of_two_sizes_is_refused(tmp_path):
    class SharedPool(Base):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(3)
            self.fc = nn.Linear(8 * 18, 5)

        def forward(self, x):
            x = self.conv1(x)
            pooled = [self.pool(x), self.pool(x[:, :, ::2, ::2])]
            return self.fc(torch.cat(pooled, 1).flatten(1))

    with pytest.raises(UserError, match="pool pools feature maps of several sizes"):
        export_onnx(SharedPool(), tmp_path / "fp32.onnx", (SIZE, SIZE), MEAN, STD)


# what works in place, and what is computed of buffers and parameters


@pytest.mark.parametrize(
    "act", [nn.LeakyReLU(0.1, inplace=True), nn.Hardswish(inplace=True)], ids=str
)
@pytest.mark.parametrize("as_statement", [False, True])
def test_what_reads_the_input_of_an_activation_in_place_reads_its_result(act, as_statement):
    class InPlace(Base):
        def __init__(self):
            super().__init__()
            self.act = copy.deepcopy(act)
            self.again = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.conv1(x)
            if as_statement:
                self.act(input=x)
                return self.head(x + self.again(x))
            return self.head(x + self.again(self.act(x)))

    torch.manual_seed(0)
    model = InPlace().eval()
    images = torch.randn(8, 3, SIZE, SIZE)
    expected = model(images)
    quantize_modules(model, EXAMPLE)
    calibrate(model, images, "max")
    assert model.act.inplace
    # rounding alone; without the write it is 5 times as much and more
    assert (model(images) - expected).norm() < 0.1 * (expected - expected.mean(0)).norm()
    # the gradient passes through the write
    model(images).square().sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0
    # a scan that looks results up has to write, too
    with switched(model) as network:
        calls = []
        whole = network(images, (), keep=calls)
        torch.testing.assert_close(network(images, (), before(calls, ["head"])), whole)


def test_an_activation_whose_input_nobody_reads_again_works_on_a_copy():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(inplace=True), nn.Conv2d(4, 4, 3)).eval()
    quantize_modules(model, EXAMPLE)
    assert not model[1].inplace


def test_what_is_computed_of_a_buffer_follows_a_checkpoint():
    class Scaled(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.0))

        def forward(self, x):
            x = self.conv1(x)
            return self.head(x + x * torch.tanh(self.scale))

    model = Scaled().eval()
    float_model = copy.deepcopy(model)
    modularize(model, EXAMPLE)
    state = {**model.state_dict(), "scale": torch.tensor(1.5)}
    for network in (model, float_model):
        network.load_state_dict(state)
    torch.testing.assert_close(model(EXAMPLE), float_model(EXAMPLE))


def test_a_buffer_may_decide_what_a_forward_does():
    class Switched(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("on", torch.tensor(True))

        def forward(self, x):
            x = self.conv1(x)
            return self.head(self.conv2(x) + x if self.on else x)

    model = Switched().eval()
    assert not modularize(model, EXAMPLE)
    assert isinstance(model.add, Add)


@pytest.mark.parametrize("images", [1, 2])
def test_parameters_are_no_feature_maps_however_many_images_the_example_has(images):
    class Shifted(Base):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(1, 8, 1, 1))
            self.shift = nn.Parameter(torch.randn(1, 8, SIZE, SIZE))

        def forward(self, x):
            x = self.conv1(x)
            return self.head(x + x * self.gamma + self.shift)

    model = Shifted().eval()
    assert not modularize(model, EXAMPLE[:images])
    assert [name for name, child in model.named_modules() if isinstance(child, (Add, Mul))] == [
        "add"
    ]
