"""Which layers are swapped, what stays as it was, and the ranges that calibration finds."""

import copy
import re
import sys

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, Small, Tiny, build, made
from torch import nn

import models
from layers import Add, Mul
from layers.quantized import QUANTIZED_FORM, QuantAdd, QuantizedLayer, QuantLinear
from layers.quantizers import Quantizer
from utils.errors import UserError
from utils.quantization.calibrate import (
    CANDIDATES,
    COUNTERS,
    PERCENTILE,
    _Histogram,
    _RoundingError,
    calibrate,
    require_calibrated,
)
from utils.quantization.export import export_onnx
from utils.quantization.swap import quantizable_modules, quantize_modules, select
from utils.quantization.table import layer_table
from utils.specs import CALIBRATORS

calibration = sys.modules[calibrate.__module__]
HISTOGRAMS = tuple(method for method in CALIBRATORS if method != "max")
BLOCKS = [f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)]
DOWNSAMPLES = [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]
RESNET18 = [
    "conv1",
    *(
        name
        for block in BLOCKS
        for name in (f"{block}.conv1", f"{block}.conv2", f"{block}.downsample.0", f"{block}.add")
        if not name.endswith("downsample.0") or name in DOWNSAMPLES
    ),
    "avgpool",
    "fc",
]
"""Every quantizable layer of a ResNet-18, in order."""
ROUNDED = {}
"""Addition -> its quantizer: a shortcut's convolution is 1x1, so it is the one that adds."""
for _block in BLOCKS:
    has_shortcut = f"{_block}.downsample.0" in DOWNSAMPLES
    ROUNDED[f"{_block}.add"] = "x_quantizer" if has_shortcut else "other_quantizer"


def resnet18():
    torch.manual_seed(0)
    return build("resnet18", "imagenet")


def small():
    return made(Small)


def tiny():
    return made(Tiny)


def batches(count=3, seed=0, size=12):
    """Of different sizes and magnitudes, the largest value in the middle one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(4 + i, 3, size, size, generator=generator) * (1 + i % 2) for i in range(count)
    ]


def ranges(model):
    return {
        name: module.amax.clone()
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
    }


def snapshot(model):
    return {
        key: value.clone() for key, value in model.state_dict().items() if not key.endswith("_amax")
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def quantizers_of(names):
    """Names of the quantizers of these layers of a ResNet-18."""
    found = set()
    for name in names:
        found.add(f"{name}.{ROUNDED.get(name, 'input_quantizer')}")
        if not name.endswith(("add", "avgpool")):
            found.add(f"{name}.weight_quantizer")
    return found


# selection


@pytest.mark.parametrize(
    ("quant_layers", "skip_layers", "expected"),
    [
        (["*"], [], RESNET18),
        (["layer1.*"], [], RESNET18[1:7]),
        (["fc"], [], ["fc"]),
        (["*.add"], [], [f"{block}.add" for block in BLOCKS]),
        (["*conv1"], [], ["conv1", *(f"{block}.conv1" for block in BLOCKS)]),
        (["*.conv1"], [], [f"{block}.conv1" for block in BLOCKS]),
        (["layer[23].0.downsample.?"], [], DOWNSAMPLES[:2]),
        (["fc", "conv1"], [], ["conv1", "fc"]),
        (["fc", "*"], ["fc"], RESNET18[:-1]),
        (["*"], ["conv1", "fc"], RESNET18[1:-1]),
        (["*"], ["*.add", "layer*conv?"], ["conv1", *DOWNSAMPLES, "avgpool", "fc"]),
        (["layer4.1.*", "avgpool"], ["*.add"], ["layer4.1.conv1", "layer4.1.conv2", "avgpool"]),
    ],
    ids=str,
)
def test_globs_select_layers_in_the_models_order(quant_layers, skip_layers, expected):
    model = resnet18()
    before = dict(model.named_modules())
    kinds = {name: type(module) for name, module in before.items()}
    assert list(quantizable_modules(model)) == RESNET18
    assert quantize_modules(model, EXAMPLE, quant_layers, skip_layers) == expected
    assert list(quantizable_modules(model)) == RESNET18
    after = dict(model.named_modules())
    for name, module in before.items():
        kind = kinds[name]
        assert after[name] is module, name
        assert type(module) is (QUANTIZED_FORM[kind] if name in expected else kind), name
    assert {name for name in after if name not in before} == quantizers_of(expected)


def test_everything_is_quantized_by_default():
    model = resnet18()
    assert quantize_modules(model, EXAMPLE) == RESNET18
    assert all(isinstance(module, QuantizedLayer) for module in quantizable_modules(model).values())
    assert not any(type(module) in QUANTIZED_FORM for module in model.modules())


@pytest.mark.parametrize("name", models.MODELS)
def test_no_convolution_matrix_product_or_addition_of_a_model_is_missed(name):
    layers = quantizable_modules(build(name)).values()
    kinds = [type(layer) for layer in layers]
    additions, convolutions = {
        **{"vanilla_cnn": (0, 6), "resnet18": (8, 20), "resnet34": (16, 36), "resnet50": (16, 53)},
        **{"mobilenet_v2": (10, 52), "efficientnet_b0": (9, 49 + 32)},
    }[name]
    # a pool, two convolutions and a multiplication each
    squeezes = 16 if name == "efficientnet_b0" else 0
    assert [kinds.count(kind) for kind in (Add, nn.Conv2d, Mul)] == [
        additions,
        convolutions,
        squeezes,
    ]
    assert [kinds.count(kind) for kind in (nn.AdaptiveAvgPool2d, nn.Linear)] == [squeezes + 1, 1]


def test_only_quantizable_layers_can_be_selected():
    for pattern in ("bn1", "relu", "layer1", "layer1.0", "conv1.input_quantizer", "FC"):
        with pytest.raises(UserError):
            select(RESNET18, [pattern], [])


def test_a_network_of_which_no_layer_is_left_to_quantize_is_refused():
    with pytest.raises(
        UserError, match="--quant_layers and --skip_layers leave no layer to quantize"
    ):
        quantize_modules(small(), EXAMPLE, skip_layers=["*"])


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layer1.0.conv3", "layer1.0.conv1"),
        ("layer1.0.conv3", "layer1.0.conv2"),
        ("layr1.*", "layer1.*"),
        ("layer2.0.downsample", "layer2.0.downsample.0"),
        ("fcc", "fc"),
        ("avg_pool", "avgpool"),
        ("conv_1", "conv1"),
        ("bn1", "conv1"),
        ("???", "conv1"),  # nothing is near: the first names
    ],
)
@pytest.mark.parametrize("skip", [False, True], ids=["quant_layers", "skip_layers"])
def test_pattern_without_a_layer_is_one_line_with_near_names(pattern, near, skip):
    model = resnet18()
    before = dict(model.named_modules())
    with pytest.raises(UserError) as error:
        quantize_modules(
            model, EXAMPLE, ["*"] if skip else ["conv1", pattern], [pattern] if skip else []
        )
    message = str(error.value)
    assert "\n" not in message
    assert f"layer pattern {pattern!r} matches no quantizable layer" in message
    listed = message.partition("near it: ")[2].split(", ")
    assert near in listed
    assert 1 <= len(listed) <= 4
    assert dict(model.named_modules()) == before


def test_quantized_layers_are_not_swapped_again():
    model = small()
    quantize_modules(model, EXAMPLE, ["conv", "layer1.*"])
    calibrate(model, batches(), "max")
    before, known = dict(model.named_modules()), ranges(model)
    known_layers = [name for name in before if isinstance(before[name], QuantizedLayer)]
    quantize_modules(model, EXAMPLE)
    after = dict(model.named_modules())
    assert all(isinstance(module, QuantizedLayer) for module in quantizable_modules(model).values())
    assert all(after[name] is before[name] for name in known_layers)
    assert_same(known, {name: ranges(model)[name] for name in known})


# what stays


def test_parameters_keep_their_names_and_identity():
    model = resnet18()
    parameters, buffers, state = (
        dict(model.named_parameters()),
        dict(model.named_buffers()),
        model.state_dict(),
    )
    quantize_modules(model, EXAMPLE, skip_layers=["layer2.*"])
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())
    swapped = [name for name in RESNET18 if not name.startswith("layer2")]
    expected = {f"{name}._amax" for name in quantizers_of(swapped)}
    assert model.state_dict().keys() - state.keys() == expected
    assert state.keys() <= model.state_dict().keys()


def test_with_quantizers_disabled_it_is_the_float_network():
    model = small().train()
    quantized = copy.deepcopy(model)
    quantize_modules(quantized, EXAMPLE)
    for module in quantized.modules():
        if isinstance(module, Quantizer):
            module.disable()
    images, labels = torch.randn(8, 3, 12, 12), torch.arange(8) % 5
    for network in (model, quantized):
        nn.functional.cross_entropy(network(images), labels).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(
        gradient.abs().max() > 0 for name, gradient in gradients.items() if name.endswith("weight")
    )
    assert_same(
        gradients, {name: parameter.grad for name, parameter in quantized.named_parameters()}
    )
    assert_same(snapshot(model), snapshot(quantized))  # BatchNorm statistics
    assert torch.equal(model.eval()(images), quantized.eval()(images))


def test_with_quantizers_enabled_it_is_near_the_float_network_but_not_equal():
    model = small().eval()
    quantized = copy.deepcopy(model)
    quantize_modules(quantized, EXAMPLE)
    images = batches()
    calibrate(quantized, images, "max")
    expected, result = model(images[0]), quantized(images[0])
    assert not torch.equal(result, expected)
    assert (result - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_statistics_move_in_quantized_training_unless_frozen(frozen):
    model = small()
    quantize_modules(model, EXAMPLE)
    calibrate(model, batches(), "max")
    model.train()
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    for norm in norms.values():
        norm.train(not frozen)
    before = snapshot(model)
    seen = {}
    hook = model.bn.register_forward_pre_hook(
        lambda _, args: seen.update(bn=args[0].detach().clone())
    )
    model(batches()[1])
    hook.remove()
    after = snapshot(model)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    statistics = {
        f"{name}.{key}"
        for name in norms
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert moved == (set() if frozen else statistics)
    if not frozen:
        expected = 0.9 * before["bn.running_mean"] + 0.1 * seen["bn"].mean((0, 2, 3))
        torch.testing.assert_close(after["bn.running_mean"], expected)


# the table of layers


def table(model):
    """Header, rows and last line of the table; cells are two or more spaces apart."""
    *lines, last = layer_table(model, EXAMPLE).splitlines()
    header, *rows = (re.split(r"\s{2,}", line) for line in lines)
    return header, rows, last


def test_table_lists_every_quantizable_layer():
    model = resnet18()
    quantize_modules(model, EXAMPLE, skip_layers=["conv1", "layer3.*", "fc"])
    header, rows, last = table(model)
    ranges_title = "ranges: operands in their order; weight"
    assert header == ["layer", "type", "multiply-adds", "form", ranges_title]
    assert [row[0] for row in rows] == RESNET18
    assert re.fullmatch(r"INT8: [\d.]+ % of the multiply-adds, 6 of 8 additions; float: .+", last)
    skipped = ["conv1", *(name for name in RESNET18 if name.startswith("layer3.")), "fc"]
    assert last.endswith(f"; float: {', '.join(skipped[:-1])} and 1 more")
    for name, kind, share, form, text in rows:
        plain = name.endswith(("add", "avgpool"))
        assert kind == type(model.get_submodule(name)).__name__
        assert (share == "-") is plain
        if name in skipped:
            assert (form, text) == ("float", "not selected")
        else:
            assert (form, text) == ("INT8", "; ".join(["not calibrated"] * (1 if plain else 2)))


SMALL_MACS = {
    "conv": 6 * 3 * 9 * 256,
    "layer1.conv1": 6 * 6 * 9 * 256,
    "layer1.conv2": 6 * 6 * 9 * 256,
    "layer2.conv1": 4 * 6 * 9 * 64,
    "layer2.conv2": 4 * 4 * 9 * 64,
    "layer2.downsample.0": 4 * 6 * 64,
    "fc": 4 * 5,
}
"""Multiply-adds of `Small` for one image of 16x16."""


def test_table_shows_each_layers_part_of_the_multiply_adds():
    model = small()
    quantize_modules(model, EXAMPLE, skip_layers=["layer1.conv2", "layer1.add"])
    _, rows, last = table(model)
    total = sum(SMALL_MACS.values())
    expected = {name: f"{100 * macs / total:.1f} %" for name, macs in SMALL_MACS.items()}
    assert {row[0]: row[2] for row in rows if row[2] != "-"} == expected
    share = 100 * (1 - SMALL_MACS["layer1.conv2"] / total)
    rest = "float: layer1.conv2, layer1.add"
    assert last == f"INT8: {share:.1f} % of the multiply-adds, 1 of 2 additions; {rest}"


def test_table_shows_granularity_and_calibrated_ranges():
    model = small()
    quantize_modules(model, EXAMPLE, skip_layers=["layer1.conv2"])
    calibrate(model, batches(), "max")
    _, rows, _ = table(model)
    found = ranges(model)
    for name, _, _, form, text in rows:
        known = [amax for key, amax in found.items() if key.rpartition(".")[0] == name]
        assert (form == "float") is (name == "layer1.conv2") is (not known)
        for amax, part in zip(known, text.split("; ") if known else [], strict=True):
            if amax.ndim == 0:
                assert part.endswith(" per tensor")
                assert float(part.split()[0]) == pytest.approx(float(amax), rel=1e-3)
                continue
            low, high, count = re.fullmatch(r"(\S+)\.\.(\S+) per channel \((\d+)\)", part).groups()
            assert int(count) == len(amax)
            limits = float(amax.min()), float(amax.max())
            assert (float(low), float(high)) == pytest.approx(limits, rel=1e-2)


def test_table_shows_the_ranges_alone_of_a_layer_with_parts_of_its_own(monkeypatch):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation = nn.Sigmoid()

        def forward(self, x):
            return self.activation(x)

    class QuantGate(QuantizedLayer, Gate):
        def forward(self, x):
            return super().forward(self.input_quantizer(x))

    monkeypatch.setitem(QUANTIZED_FORM, Gate, QuantGate)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Gate())
    quantize_modules(model, EXAMPLE)
    assert table(model)[1][1] == ["1", "QuantGate", "-", "INT8", "not calibrated"]


def test_table_of_a_float_network_counts_none():
    _, rows, last = table(small())
    assert {(row[3], row[4]) for row in rows} == {("float", "not selected")}
    names = ", ".join(row[0] for row in rows[:8])
    counts = "INT8: 0.0 % of the multiply-adds, 0 of 2 additions"
    assert last == f"{counts}; float: {names} and 2 more"


def test_a_quantized_layer_takes_its_input_by_torchs_keyword():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    conv, pool, _, fc = model
    features = pool(input=conv(input=EXAMPLE)).flatten(1)
    assert torch.equal(fc(input=features), model(EXAMPLE))


@pytest.mark.parametrize("smallest", [0.5, 0.9])
def test_entropy_finds_no_range_below_all_values(smallest):
    """Sigmoids' results, say, have none near 0, and may have zeros beside them."""
    values = torch.linspace(smallest, 1, 10_000)
    for seen in (values, torch.cat([torch.zeros(100), values])):
        histogram = _Histogram(seen.max(), "entropy")
        histogram.collect(seen)
        assert smallest < histogram.compute_amax() <= 1


def test_every_method_has_a_counter_of_its_own_name():
    assert {*COUNTERS, "max"} == {*CALIBRATORS}


@pytest.mark.parametrize("batch", [EXAMPLE[:0], EXAMPLE.numpy(), [EXAMPLE.numpy()]])
def test_what_holds_no_images_does_not_calibrate(batch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    quantize_modules(model, EXAMPLE)
    with pytest.raises(UserError, match="calibration needs normalised images"):
        calibrate(model, [batch])


def test_ranges_by_hand_are_checked():
    quantizer = Quantizer()
    quantizer.set_range(3.0)
    assert quantizer.calibrated
    with pytest.raises(UserError, match="a range is a largest magnitude, and no -3"):
        quantizer.set_range(torch.tensor(-3.0))
    quantizer._amax.fill_(-1.0)
    assert not quantizer.calibrated


class PairOfOwn:
    """A batch of a class of its own, as some loaders make."""

    def __getitem__(self, index):
        return (EXAMPLE, torch.zeros(len(EXAMPLE)))[index]


def test_a_batch_may_be_any_object_whose_first_item_are_the_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    quantize_modules(model, EXAMPLE)
    calibrate(model, [PairOfOwn()])
    assert model[0].input_quantizer.calibrated


@pytest.mark.parametrize("batch", [3, [], [3]])
def test_what_is_no_batch_is_not_calibrated_with(batch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    quantize_modules(model, EXAMPLE)
    with pytest.raises(UserError, match="calibration needs normalised images"):
        calibrate(model, [batch])


def test_what_is_switched_off_is_not_exported_nor_calibrated(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    quantize_modules(model, EXAMPLE)
    calibrate(model, [EXAMPLE])
    assert "INT8: 100.0 % of the multiply-adds" in layer_table(model, EXAMPLE)
    model[0].weight_quantizer.disable_quant()
    table = layer_table(model, EXAMPLE)
    assert "float  a quantizer is switched off" in table
    assert "INT8: 0.0 % of the multiply-adds; float: 0" in table
    with pytest.raises(UserError, match="0.weight_quantizer is switched off"):
        export_onnx(model, tmp_path / "net.onnx", 32, [0.5] * 3, [0.25] * 3)
    with pytest.raises(UserError, match="0.weight_quantizer is switched off"):
        calibrate(model, [EXAMPLE])


def test_a_model_that_is_a_layer_and_an_example_of_no_image_are_refused():
    with pytest.raises(UserError, match="put it into an nn.Sequential"):
        quantize_modules(nn.Conv2d(3, 4, 3), EXAMPLE)
    with pytest.raises(UserError, match="the example must be normalised images"):
        quantize_modules(nn.Sequential(nn.Conv2d(3, 4, 3)), EXAMPLE[:0])


class Odd(nn.Module):
    """What is not quantized, for three reasons."""

    def __init__(self):
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.conv1d = nn.Conv1d(3, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        x = x @ x.transpose(2, 3)
        return self.conv1d(x.flatten(2))


def test_table_says_why_a_layer_is_float():
    model = Odd()
    assert quantize_modules(model, EXAMPLE) == ["conv"]
    _, rows, last = table(model)
    forms = {row[0]: row[3:] for row in rows}
    assert [row[0] for row in rows] == ["conv", "(the network itself)", "conv1d", "unused"]
    assert forms["conv"][0] == "INT8"
    assert re.fullmatch(r"functional, at test_wrapper\.py:\d+", forms["(the network itself)"][1])
    assert forms["conv1d"] == ["float", "no quantized form"]
    assert forms["unused"] == ["float", "not called as a module in evaluation"]
    assert last.endswith("; float: matmul, conv1d")


# calibration


@torch.no_grad()
def magnitudes(model, images):
    """Range -> |what would be rounded|, of all images, in the float network in evaluation mode."""
    model = copy.deepcopy(model).eval()
    seen = {}
    for name, layer in quantizable_modules(model).items():
        operands = {"input_quantizer": 0}
        if isinstance(layer, Add):
            operands = {QuantAdd.QUANTIZERS[operand]: operand for operand in layer.rounds}
        for quantizer, operand in operands.items():
            parts = seen[f"{name}.{quantizer}"] = []
            layer.register_forward_pre_hook(
                lambda _, args, parts=parts, operand=operand: parts.append(
                    args[operand].abs().flatten().clone()
                )
            )
    for batch in images:
        model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def check_weight_ranges(model, found):
    for name, layer in quantizable_modules(model).items():
        if hasattr(layer, "weight"):
            expected = torch.stack([channel.abs().max() for channel in layer.weight.detach()])
            assert torch.equal(found[f"{name}.weight_quantizer"], expected), name


@pytest.mark.parametrize("network", [small, resnet18])
def test_max_is_the_largest_magnitude_that_the_layer_saw(network):
    model, images = network(), batches(size=12)
    expected = magnitudes(model, images)
    quantize_modules(model, EXAMPLE)
    calibrate(model, iter(images), "max")
    found = ranges(model)
    assert {name for name in found if not name.endswith("weight_quantizer")} == set(expected)
    for name, values in expected.items():
        assert found[name] == values.max(), name
    check_weight_ranges(model, found)


@pytest.mark.parametrize("method", HISTOGRAMS)
def test_histogram_ranges_are_positive_and_at_most_the_maximum(method):
    model, images = tiny(), batches()
    largest = {name: values.max() for name, values in magnitudes(model, images).items()}
    quantize_modules(model, EXAMPLE)
    calibrate(model, images, method)
    found = ranges(model)
    check_weight_ranges(model, found)
    for name, value in largest.items():
        assert found[name].shape == ()
        assert 0 < found[name] <= value, name


def test_percentile_is_numpys_within_one_bin():
    model, images = small(), batches(count=5, size=24)
    values = magnitudes(model, images)
    quantize_modules(model, EXAMPLE)
    calibrate(model, images, "percentile")
    assert PERCENTILE == 99.99
    found = ranges(model)
    for name, seen in values.items():
        if len(seen) > 2000:
            expected = np.percentile(seen.numpy(), PERCENTILE, method="inverted_cdf")
            assert abs(float(found[name]) - expected) <= 1.01 * float(seen.max()) / 2048, name


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_counts_beyond_32_bits_give_the_same_range(method):
    """A layer sees so many values in 1,024 images of 224 pixels."""
    histogram = _Histogram(torch.tensor(4.0), method)
    histogram.collect(torch.randn(100_000, generator=torch.Generator().manual_seed(0)).clamp(-4, 4))
    few = histogram.compute_amax()
    histogram.counts *= 2**20
    before = histogram.counts.clone()
    assert float(histogram.compute_amax()) == pytest.approx(float(few), rel=1e-6)
    assert torch.equal(histogram.counts, before)


def test_every_value_of_a_large_tensor_is_counted():
    histogram = _Histogram(torch.tensor(1.0), "entropy")
    histogram.collect(torch.zeros(3, 1 << 23))  # one bin of float32 would stop at 2 ** 24
    assert histogram.counts[0] == 3 << 23


class OneLayer(nn.Module):
    """Its only range is that of the values passed in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.conv(x)


def range_of(parts, method):
    """The range of a layer that sees these batches, each (values,) or (images, values)."""
    model = OneLayer()
    quantize_modules(model, EXAMPLE[:, :1])
    parts = [torch.as_tensor(part) for part in parts]
    calibrate(
        model,
        [part.reshape(-1 if part.ndim > 1 else 1, 1, 1, part.shape[-1]) for part in parts],
        method,
    )
    return float(model.conv.input_quantizer.amax)


def rounding_errors(values):
    """Range -> squared error of rounding each image (images, values) with it."""
    found = {}
    for amax in float(np.abs(values).max()) * CANDIDATES.numpy():
        scale = amax / 127
        rounded = np.clip(np.rint(values / scale), -127, 127) * scale
        found[float(amax)] = ((rounded - values) ** 2).sum(1)
    return found


def assert_best(found, errors):
    """`found` is one of the ranges, and no other has an error that is clearly smaller."""
    nearest = min(errors, key=lambda amax: abs(amax - found))
    assert found == pytest.approx(nearest, rel=1e-5)
    assert errors[nearest] <= 1.01 * min(errors.values())


def tail(images=24, outlier=1.0, seed=0):
    """(images, 2000) normal values, of which one image's first is an outlier."""
    values = np.random.default_rng(seed).normal(0, 0.2, (images, 2000)).astype(np.float32)
    values = values.clip(-0.99, 0.99)
    values[-1, 0] = outlier
    return values


@pytest.mark.parametrize("outlier", [1.0, 3.0, 6.0, 20.0, 100.0])
def test_mse_is_the_best_range_by_brute_force(outlier):
    values = tail(images=2, outlier=outlier)
    errors = {amax: error.sum() for amax, error in rounding_errors(values).items()}
    found = range_of([values[:1], values[1:]], "mse")
    assert_best(found, errors)
    if outlier == 1.0:
        assert found > 0.5
    if outlier == 20.0:
        assert found > 10  # one value of 20 weighs more than fine steps for all others


@pytest.mark.parametrize("outlier", [1.0, 3.0, 6.0, 20.0, 100.0])
def test_sqnr_is_the_range_with_the_least_relative_error_by_brute_force(outlier):
    values = tail(outlier=outlier) * np.linspace(0.1, 1, 24, dtype=np.float32)[:, None]
    energy = (values**2).sum(1)
    errors = {amax: (error / energy).mean() for amax, error in rounding_errors(values).items()}
    assert_best(range_of([values[:9], values[9:]], "sqnr"), errors)


@pytest.mark.parametrize("part", [1, 5_000, calibration.VALUES_AT_A_TIME])
@pytest.mark.parametrize("method", ["mse", "sqnr"])
def test_error_of_every_range_is_that_of_brute_force(monkeypatch, method, part):
    monkeypatch.setattr(calibration, "VALUES_AT_A_TIME", part)
    values = tail(outlier=5.0) * np.linspace(0.1, 1, 24, dtype=np.float32)[:, None]
    found = _RoundingError(torch.tensor(np.abs(values).max()), method)
    for images in np.split(values, [9]):
        features = torch.as_tensor(images).reshape(-1, 20, 10, 10)
        found.collect(features.to(memory_format=torch.channels_last))
    # errors are of shares of the largest value
    scale = np.abs(values).max() ** 2 if method == "mse" else (values**2).sum(1)
    expected = [(error / scale).sum() for error in rounding_errors(values).values()]
    assert found.errors.numpy() == pytest.approx(np.array(expected), rel=0.01)


def test_one_image_decides_the_sum_of_errors_but_not_their_ratio():
    values = tail()
    values[-1] *= 100
    assert range_of([values], "mse") > 50
    assert 0.5 < range_of([values], "sqnr") < 10
    values[0] = 0  # an image without a value other than 0 has no ratio
    assert 0.5 < range_of([values], "sqnr") < 10


def test_mse_clips_an_outlier_when_many_values_gain_from_it():
    values = np.full(100_001, 0.9, dtype=np.float32)
    values[:50_000] = 0.4567
    values[-1] = 1.5
    errors = {amax: float(error[0]) for amax, error in rounding_errors(values[None]).items()}
    found = range_of([values], "mse")
    assert found < 1.49
    # all values are one of two: the mean over a bin is not their error, but the end is far worse
    assert errors[min(errors, key=lambda amax: abs(amax - found))] < errors[max(errors)]


def test_every_method_has_its_own_opinion_of_a_long_tail():
    values = (np.random.default_rng(0).exponential(1, (10, 5_000)) ** 1.5).astype(np.float32)
    values *= np.linspace(0.2, 1, 10, dtype=np.float32)[:, None]
    found = {method: range_of([values], method) for method in CALIBRATORS}
    assert found.pop("max") == values.max()
    assert all(0.3 * values.max() < value < 0.9 * values.max() for value in found.values())
    assert len(set(found.values())) == len(HISTOGRAMS)


def test_sqnr_is_the_default():
    model, same = tiny(), tiny()
    for network in (model, same):
        quantize_modules(network, EXAMPLE)
    calibrate(model, batches())
    calibrate(same, batches(), "sqnr")
    assert_same(ranges(model), ranges(same))


@pytest.mark.parametrize("method", CALIBRATORS)
def test_weights_and_statistics_stay(method):
    model = tiny()
    quantize_modules(model, EXAMPLE)
    before = snapshot(model)
    calibrate(model, batches(1), method)
    assert_same(before, snapshot(model))
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("method", ["max", "percentile"])
def test_mode_is_restored_and_does_not_matter(training, method):
    found = []
    for mode in (training, False):
        model = small()
        quantize_modules(model, EXAMPLE)
        model.train(mode)
        calibrate(model, batches(), method)
        assert all(module.training is mode for module in model.modules())
        found.append(ranges(model))
    assert_same(*found)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_calibrating_twice_finds_the_same_ranges(method):
    model = tiny()
    quantize_modules(model, EXAMPLE)
    calibrate(model, batches(1), method)
    first = ranges(model)
    quantized = model.eval()(batches(1)[0])
    calibrate(model, batches(1), method)
    assert_same(first, ranges(model))
    assert torch.equal(model(batches(1)[0]), quantized)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_another_calibration_forgets_the_first(method):
    model, fresh = tiny(), tiny()
    for network in (model, fresh):
        quantize_modules(network, EXAMPLE)
    calibrate(model, [100 * batch for batch in batches(1)], "max")
    calibrate(model, batches(1, seed=1), method)
    calibrate(fresh, batches(1, seed=1), method)
    assert_same(ranges(fresh), ranges(model))


@pytest.mark.parametrize("method", CALIBRATORS)
def test_calibrated_network_quantizes_and_collects_no_more(method):
    model = tiny().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, batches(1), method)
    before = ranges(model)
    x = 50 * batches(1)[0]
    seen = {}
    model.conv.input_quantizer.register_forward_hook(
        lambda _, args, output: seen.update(output=output)
    )
    model(x)
    assert_same(before, ranges(model))
    scale = before["conv.input_quantizer"] / 127
    assert torch.equal(
        seen["output"],
        torch.fake_quantize_per_tensor_affine(x, scale, torch.tensor(0).int(), -128, 127),
    )


@pytest.mark.parametrize("method", CALIBRATORS)
def test_skipped_layers_have_no_range_and_stay_float(method):
    model = tiny()
    quantize_modules(model, EXAMPLE, skip_layers=["avgpool", "fc"])
    calibrate(model, batches(1), method)
    assert not [name for name in ranges(model) if name.startswith(("avgpool.", "fc."))]
    require_calibrated(model)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_layer_that_sees_only_zeros_gets_a_tiny_range(method):
    assert 0 < range_of([torch.zeros(100), torch.zeros(100)], method) < 1e-6


@pytest.mark.parametrize("method", CALIBRATORS)
def test_first_batch_of_zeros_does_not_matter(method):
    assert 0 < range_of([torch.zeros(100), torch.linspace(0, 2, 1000)], method) <= 2


@pytest.mark.parametrize("method", CALIBRATORS)
def test_any_growth_of_the_largest_value_is_taken(method):
    first, second = 4.458950996398926, 6.568679275456816
    found = range_of([torch.linspace(0, first, 1000), torch.linspace(0, second, 1000)], method)
    assert 0 < found <= np.float32(second)
    assert found > 0.8 * second  # the values lie evenly: nothing to clip


# calibration that cannot work


def test_an_unknown_method_is_one_line_with_those_that_there_are():
    model = tiny()
    quantize_modules(model, EXAMPLE)
    with pytest.raises(UserError, match="no calibration 'best'; there are sqnr, entropy"):
        calibrate(model, batches(), "best")


def calibration_error(model, images, method):
    quantize_modules(model, EXAMPLE)
    with pytest.raises(UserError) as error:
        calibrate(model, images, method)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", CALIBRATORS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["image", "last image", "weight", "activation"])
def test_values_that_are_not_finite_are_one_line(method, broken, where):
    model, images = small(), batches(2, size=6)
    if where == "weight":
        model.layer1.conv2.weight.data[0, 0, 0, 0] = broken
    elif where == "activation":
        model.bn.bias.data[0] = broken
    else:
        images[0 if where == "image" else -1][0, 0, 0, 0] = broken
    message = calibration_error(model, images, method)
    assert "finite" in message
    assert {"weight": "_quantizer", "activation": "layer1.conv1.input_quantizer"}.get(
        where, "conv.input_quantizer"
    ) in message
    if where.endswith("image"):
        assert "layer" not in message


@pytest.mark.parametrize("method", CALIBRATORS)
def test_a_failed_calibration_leaves_the_network_as_it_was(method):
    model = tiny().eval()
    quantize_modules(model, EXAMPLE)
    calibrate(model, batches(1), method)
    before = model(batches(1)[0])
    with pytest.raises(UserError, match="not finite"):
        calibrate(model, [torch.full_like(EXAMPLE, torch.nan)], method)
    assert torch.equal(model(batches(1)[0]), before)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_layer_that_never_ran_is_named(method):
    model = small()
    # quantize_modules leaves out what its example does not reach
    model.layer1.unused = QuantLinear.convert(nn.Linear(2, 2))
    message = calibration_error(model, batches(1, size=4), method)
    assert "layer1.unused.input_quantizer was never computed" in message


def test_no_images_are_one_line():
    assert "no images to calibrate with" in calibration_error(small(), [], "max")


def test_images_that_are_not_normalised_are_one_line():
    images = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    assert "needs normalised images" in calibration_error(small(), [images], "max")


def test_a_network_that_was_never_quantized_is_not_calibrated_silently():
    with pytest.raises(UserError, match="nothing to calibrate: call quantize_modules first"):
        calibrate(small(), batches())


def test_batches_may_have_labels_as_a_data_loader_serves_them():
    plain, labelled = small(), small()
    for model in (plain, labelled):
        quantize_modules(model, EXAMPLE)
    calibrate(plain, batches(2), "max")
    calibrate(labelled, [[images, torch.zeros(len(images))] for images in batches(2)], "max")
    assert_same(ranges(plain), ranges(labelled))


@pytest.mark.parametrize(
    "example",
    [EXAMPLE[0], EXAMPLE.to(torch.uint8), (EXAMPLE, torch.zeros(2))],
    ids=["one", "bytes", "batch"],
)
def test_an_example_that_is_no_batch_of_normalised_images_is_refused(example):
    with pytest.raises(UserError, match=r"normalised images: a float tensor \(B, C, H, W\)"):
        quantize_modules(small(), example)


def test_one_tensor_of_images_is_one_batch():
    images = batches(1)[0]
    one, listed = small(), small()
    for model in (one, listed):
        quantize_modules(model, EXAMPLE)
    calibrate(one, images, "max")
    calibrate(listed, [images], "max")
    assert_same(ranges(one), ranges(listed))


def test_one_pattern_is_not_taken_for_its_letters():
    assert quantize_modules(small(), EXAMPLE, skip_layers="fc") == quantize_modules(
        small(), EXAMPLE, skip_layers=["fc"]
    )


def test_ranges_that_are_missing_are_counted_and_the_first_is_named():
    model = small()
    quantize_modules(model, EXAMPLE)
    with pytest.raises(
        UserError, match=r"^17 ranges are not calibrated, the first is conv\.input_quantizer$"
    ):
        require_calibrated(model)
    calibrate(model, batches(), "max")
    require_calibrated(model)
    model.layer2.conv1.weight_quantizer.amax[1] = torch.nan
    with pytest.raises(
        UserError,
        match=r"^1 ranges are not calibrated, the first is layer2\.conv1\.weight_quantizer$",
    ):
        require_calibrated(model)
    require_calibrated(small())  # a float network has none
