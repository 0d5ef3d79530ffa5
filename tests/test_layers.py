"""Fake quantization to the last bit, quantized layers, and the folding of BatchNorm."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLE, NETWORK_PARAMS, build, randomise_batch_norm
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor, fake_tensor_quant
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from layers import Add, Mul
from layers.quantized import (
    PointwiseLinear,
    QuantAdaptiveAvgPool2d,
    QuantAdd,
    QuantAvgPool2d,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    QuantMul,
    quantized_form,
)
from layers.quantizers import FrozenQuantizer, Quantizer, StraightThrough, fake_quantize
from utils.errors import UserError
from utils.quantization.calibrate import calibrate
from utils.quantization.fold import conv_bn_pairs, to_inference
from utils.quantization.swap import quantizable_modules, quantize_modules
from utils.quantization.watch import watch

SCALES = [1.0, 2.0**-7, 0.1, 0.0371, 3e-5, 127.0]
EXACT_SCALES = [1.0, 2.0**-7, 2.0**5]
"""Powers of two: dividing by them and multiplying by their inverse are both exact."""
CODE_MIN = {"activation": -128, "weight": -127}


def reference_codes(x, scale, code_min):
    """Independent of torch: float64 division, rounding half to even, saturation."""
    codes = np.rint(np.asarray(x, np.float64) / np.asarray(scale, np.float64))
    return np.clip(codes, code_min, 127)


def steps_from_tie(x, scale):
    """How far x/scale is from the middle between two integers."""
    steps = np.asarray(x, np.float64) / np.asarray(scale, np.float64)
    return np.abs(steps - np.floor(steps) - 0.5)


def zero_point(shape=()):
    return torch.zeros(shape, dtype=torch.int32)


def samples(scale, seed=0):
    """Inputs inside and outside of the range of `scale`: many sizes, end codes, 0 and huge ones."""
    generator = torch.Generator().manual_seed(seed)
    spread = 2.0 ** (20 * torch.rand(20_000, generator=generator) - 10)
    codes = torch.arange(-130.0, 131.0)
    # torch's per-channel kernel ends at 2**63 steps
    huge = torch.tensor([2.0**20, 2.0**31, 2.0**32, 2.0**62, 1e-20, 0.0])
    normal = torch.randn(20_000, generator=generator) * spread
    return torch.cat([normal, codes, huge, -huge]) * scale


def quantizer_of(operand, amax, channels=3):
    quantizer = Quantizer(channels if operand == "weight" else None)
    quantizer.set_range(torch.as_tensor(amax))
    return quantizer


# fake quantization


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("code_min", [-128, -127])
def test_fake_quantization_of_a_tensor_is_torchs(scale, code_min):
    x, scale = samples(scale), torch.tensor(scale)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point(), code_min, 127)
    assert torch.equal(fake_quantize(x, scale, zero_point(), code_min), expected)


@pytest.mark.parametrize("code_min", [-128, -127])
def test_fake_quantization_of_channels_is_torchs(code_min):
    scale = torch.tensor(SCALES)
    x = torch.stack([samples(value, seed) for seed, value in enumerate(SCALES)])
    expected = torch.fake_quantize_per_channel_affine(
        x, scale, zero_point(len(scale)), 0, code_min, 127
    )
    assert torch.equal(fake_quantize(x, scale, zero_point(len(scale)), code_min), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("code_min", [-128, -127])
@pytest.mark.parametrize("channels", [0, 2])
def test_fake_quantization_is_the_definition(scale, code_min, channels):
    x, scale = samples(scale), torch.tensor(scale)
    if channels:  # the second channel has twice the scale, so that a mixed-up axis shows
        x, scale = torch.stack([x, x.flip(0)]), torch.stack([scale, 2 * scale])
    column = scale.reshape(-1, *[1] * (x.ndim - 1)).numpy() if channels else scale.numpy()
    codes = reference_codes(x.numpy(), column, code_min)
    expected = (codes * column.astype(np.float64)).astype(np.float32)
    result = fake_quantize(x, scale, zero_point(scale.shape), code_min).numpy()
    # torch multiplies by the float32 inverse of the scale: within 2e-5 steps of a tie it may
    # round to the other side
    clear = (steps_from_tie(x, column) > 2e-5) | (np.abs(x.numpy()) > 129 * column)
    assert clear.mean() > 0.99
    assert np.array_equal(result[clear], expected[clear])
    assert np.all(np.abs(result - expected) <= 1.001 * column)


@pytest.mark.parametrize("scale", EXACT_SCALES)
@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_halves_round_to_even(scale, operand):
    halves = np.arange(-130, 130) + 0.5
    below = np.arange(-130, 130)
    even = np.where(below % 2 == 0, below, below + 1)
    expected = even.clip(CODE_MIN[operand], 127) * scale
    x = torch.from_numpy(halves * scale).float()
    x = x if operand == "activation" else x.repeat(3, 1)
    result = quantizer_of(operand, [127 * scale] * (1 if operand == "activation" else 3))(x)
    assert np.array_equal(result.numpy(), np.broadcast_to(expected, x.shape))


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_every_code_is_reached_and_no_other(operand):
    x = torch.linspace(-300, 300, 6001).repeat(3, 1)
    codes = quantizer_of(operand, 127.0 if operand == "activation" else [127.0] * 3)(x).unique()
    assert codes.tolist() == list(range(CODE_MIN[operand], 128))


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_activations_saturate(sign):
    x = sign * torch.tensor([1e30, 3e38, torch.inf])
    assert (quantizer_of("activation", 1.0)(x) == (1.0 if sign > 0 else -128 / 127)).all()


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_quantizer_is_fake_quantization_with_a_127th_of_its_range(operand):
    amax = torch.tensor(2.9) if operand == "activation" else torch.tensor([0.01, 2.9, 500.0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator) * 2 * amax.reshape(-1, 1, 1)
    expected = fake_quantize(x, amax / 127, zero_point(amax.shape), CODE_MIN[operand])
    assert torch.equal(quantizer_of(operand, amax)(x), expected)


@pytest.mark.parametrize("scale", [torch.tensor(0.013), torch.tensor([0.01, 0.3, 1.0])])
def test_frozen_quantizer_is_fake_quantization_with_all_codes(scale):
    x = torch.linspace(-300, 300, 999).repeat(3, 1) * scale.reshape(-1, 1)
    result = FrozenQuantizer(scale)(x)
    assert torch.equal(result, fake_quantize(x, scale, zero_point(scale.shape), -128))
    assert torch.equal(result.amin(1), (-128 * scale).expand(3))


def test_frozen_quantizer_owns_its_scale():
    scale = torch.tensor(0.5, requires_grad=True)
    frozen = FrozenQuantizer(scale)
    with torch.no_grad():
        scale.mul_(2)
    assert frozen.scale == 0.5
    assert not frozen.scale.requires_grad


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_gradient_is_one_up_to_the_end_codes_and_zero_beyond(operand):
    least = CODE_MIN[operand]
    inside = [0.0, 0.3, -0.5, 126.6, 127.0, 127.49, -127.0, float(least), least - 0.49]
    outside = [127.51, 128.0, 1e9, least - 0.51, least - 1.0, -1e9]
    x = torch.tensor([inside + outside] * 3).mul_(0.25).requires_grad_()
    upstream = torch.randn(x.shape)
    quantizer = quantizer_of(operand, [0.25 * 127] * (1 if operand == "activation" else 3))
    quantizer(x).backward(upstream)
    assert torch.equal(x.grad[:, : len(inside)], upstream[:, : len(inside)])
    assert (x.grad[:, len(inside) :] == 0).all()


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_ranges_are_constants_in_training(operand):
    quantizer = quantizer_of(operand, 1.0 if operand == "activation" else [1.0, 2.0, 3.0]).train()
    before = quantizer.amax.clone()
    quantizer(torch.randn(3, 50).mul_(5).requires_grad_()).sum().backward()
    assert list(quantizer.parameters()) == []
    assert not quantizer.amax.requires_grad
    assert quantizer.amax.grad is None
    assert torch.equal(quantizer.amax, before)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["tensor", "channel"])
@pytest.mark.parametrize("code_min", [-128, -127])
@pytest.mark.parametrize("scale", SCALES)
def test_the_form_for_compilers_is_the_same_to_the_last_bit(shape, code_min, scale):
    inputs, scale = samples(scale)[None], torch.full(shape, scale)
    upstream = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for quantize in (
        lambda x: fake_quantize(x, scale, zero_point(shape), code_min),
        lambda x: StraightThrough.apply(x, scale.reshape(-1, 1), code_min),
    ):
        leaf = inputs.clone().requires_grad_()
        output = quantize(leaf)
        output.backward(upstream)
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# the library's own fake quantization


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_codes_are_the_librarys(operand):
    """With narrow_range as `Quantizer` sets it (for weights alone) the library has the same codes.

    It computes round(x * (127 / amax)) / (127 / amax), so its values differ by float rounding, and
    at ties its codes.
    """
    generator = torch.Generator().manual_seed(0)
    amax = torch.tensor(2.7) if operand == "activation" else torch.tensor([0.01, 2.7, 33.0])
    column = amax.reshape(-1, 1)
    # the tails are beyond the range, on both sides
    x = 1.5 * column * torch.randn(3, 50_000, generator=generator)
    library = fake_tensor_quant(x, column, 8, False, operand == "weight")
    ours = quantizer_of(operand, amax)(x)
    scale = (column / 127).numpy()
    clear = (steps_from_tie(x, scale) > 5e-5) | (np.abs(x.numpy()) > 129 * scale)
    assert clear.mean() > 0.99
    codes = (ours.double() / (column / 127)).round()
    assert codes.min() == CODE_MIN[operand]
    library_codes = (library.double() / (column / 127)).round()
    assert np.array_equal(codes.numpy()[clear], library_codes.numpy()[clear])
    np.testing.assert_allclose(ours.numpy()[clear], library.numpy()[clear], rtol=3e-7)
    assert np.all((ours - library).abs().numpy() <= 1.001 * scale)


def test_the_library_by_default_has_no_code_minus_128():
    """The one setting that `Quantizer` differs in: the function's default is narrow_range=True."""
    x, amax = torch.tensor([-200.0, -128.0, -127.0, 200.0]), torch.tensor(127.0)
    narrow, wide = [-127.0, -127.0, -127.0, 127.0], [-128.0, -128.0, -127.0, 127.0]
    assert fake_tensor_quant(x, amax).tolist() == narrow
    assert fake_tensor_quant(x, amax, 8, False, False).tolist() == wide
    assert quantizer_of("activation", 127.0)(x).tolist() == wide
    assert quantizer_of("weight", [127.0], channels=1)(x[None])[0].tolist() == narrow


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_gradient_is_the_librarys_inside_the_range(operand):
    """Beyond it the library's is 0 at once, torch's is 1 while the input rounds to an end code."""
    x = torch.cat([torch.linspace(-127, 127, 1001), torch.tensor([127.4, -127.4, -128.4])])[None]
    gradients = []
    for quantize in (
        quantizer_of(operand, [127.0], 1),
        lambda x: fake_tensor_quant(x, torch.tensor([127.0]), 8, False, operand == "weight"),
    ):
        leaf = x.clone().requires_grad_()
        quantize(leaf).sum().backward()
        gradients.append(leaf.grad[0])
    ours, library = gradients
    assert torch.equal(ours[:-3], library[:-3])
    assert (ours[:-3] == 1).all()
    assert library[-3:].tolist() == [0, 0, 0]
    assert ours[-3:].tolist() == [1, 1, 1 if operand == "activation" else 0]


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_quantizer_takes_the_librarys_switches(operand):
    quantizer = quantizer_of(operand, 1.0 if operand == "activation" else [1.0] * 3)
    library = TensorQuantizer(QuantDescriptor(num_bits=8, axis=quantizer.axis))
    assert isinstance(quantizer, TensorQuantizer)
    assert (quantizer.num_bits, quantizer.unsigned, quantizer.axis) == (8, False, library.axis)
    x = torch.randn(3, 7)
    quantized = quantizer(x)
    assert not torch.equal(quantized, x)
    quantizer.disable()
    assert quantizer(x) is x
    quantizer.enable()
    quantizer.disable_quant()
    assert quantizer(x) is x
    quantizer.enable_quant()
    assert torch.equal(quantizer(x), quantized)


# the range


@pytest.mark.parametrize("channels", [None, 1, 5])
def test_state_has_one_range_that_is_nan_until_calibrated(channels):
    quantizer = Quantizer(channels)
    state = quantizer.state_dict()
    assert list(state) == ["_amax"]
    assert state["_amax"].shape == (() if channels is None else (channels,))
    assert state["_amax"].isnan().all()
    assert not quantizer.calibrated
    quantizer.set_range(torch.ones(channels or 1))
    assert quantizer.calibrated
    assert list(quantizer.state_dict()) == ["_amax"]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_one_broken_channel_is_not_calibrated(broken):
    quantizer = Quantizer(3)
    with pytest.raises(UserError, match="a range is a largest magnitude, and no"):
        quantizer.set_range(torch.tensor([1.0, broken, 1.0]))
    quantizer._amax.copy_(torch.tensor([1.0, broken, 1.0]))
    assert not quantizer.calibrated


def test_one_range_is_that_of_every_channel():
    quantizer = Quantizer(3)
    quantizer.set_range(2.0)
    assert quantizer.amax.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(UserError, match="2 ranges for 3 channels"):
        quantizer.set_range(torch.ones(2))


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1, 1), (3, 1)])
def test_range_of_any_shape_sets_the_scale(shape):
    amax = torch.tensor([0.3, 1.7, 12.0])
    quantizer = Quantizer(3)
    quantizer.set_range(amax.reshape(shape).requires_grad_())
    assert torch.equal(quantizer.amax, amax)
    assert torch.equal(quantizer.scale, amax / 127)
    assert not quantizer.scale.requires_grad


def test_range_is_copied():
    amax = torch.tensor([1.0, 2.0])
    quantizer = Quantizer(2)
    quantizer.set_range(amax)
    amax.mul_(9)
    assert quantizer.amax.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("channels", [None, 3])
def test_range_lands_in_a_new_quantizer(channels):
    source, target = Quantizer(channels), Quantizer(channels)
    source.set_range(torch.rand(channels or 1) + 1)
    assert target.load_state_dict(source.state_dict()).missing_keys == []
    x = torch.randn(3, 20)
    assert torch.equal(target(x), source(x))
    assert target.amax.data_ptr() != source.amax.data_ptr()


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_zero_range_gets_a_floor(operand):
    quantizer = quantizer_of(operand, 0.0 if operand == "activation" else [0.0, 1.0, 0.0])
    floored = [0, 2] if operand == "weight" else [0, 1, 2]
    assert quantizer.calibrated
    assert (quantizer.scale > 0).all()
    assert (quantizer(torch.zeros(3, 4)) == 0).all()
    result = quantizer(torch.randn(3, 400) * 10)
    assert result.isfinite().all()
    assert result[floored].abs().max() < 1e-11


# quantized layers

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "same": {"padding": "same"},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "kernel_size": (3, 1)},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
}


def calibrated(layer, *inputs):
    """Sets the ranges of one quantized layer by hand, so that some operands are beyond them."""
    layer.input_quantizer.set_range(0.8 * inputs[-1].abs().max())
    if hasattr(layer, "factor_quantizer"):
        layer.factor_quantizer.set_range(0.8 * inputs[0].abs().max())
    if hasattr(layer, "weight_quantizer"):
        layer.weight_quantizer.set_range(0.9 * layer.weight.abs().flatten(1).amax(1))
    return layer


@torch.no_grad()
def fake_quantized(x, scale, code_min):
    """By torch's kernel for one scale, slice by slice of axis 0 where each has its own."""
    if scale.ndim:
        slices = zip(x, scale, strict=True)
        return torch.stack([fake_quantized(part, own, code_min) for part, own in slices])
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point(), code_min, 127)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_quantized_convolution_is_a_convolution_of_quantized_operands(geometry, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **geometry}, bias=bias)
    quant = QuantConv2d.convert(copy.deepcopy(conv))
    x = torch.randn(2, 4, 9, 8)
    calibrated(quant, x)
    inputs = fake_quantized(x, 0.8 * x.abs().max() / 127, -128)
    weight = fake_quantized(conv.weight, 0.9 * conv.weight.abs().flatten(1).amax(1) / 127, -127)
    padding = geometry.get("padding", 0)
    if "padding_mode" in geometry:
        rows, columns = (padding, padding) if isinstance(padding, int) else padding
        inputs, padding = F.pad(inputs, (columns, columns, rows, rows), geometry["padding_mode"]), 0
    names = ("stride", "dilation", "groups")
    rest = {name: geometry.get(name, 1) for name in names}
    expected = F.conv2d(inputs, weight, conv.bias, padding=padding, **rest)
    assert torch.equal(quant(x), expected)
    assert quant(x).shape == conv(x).shape
    assert not torch.allclose(expected, conv(x), atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometry_is_taken_over(geometry):
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **geometry})
    quant = QuantConv2d.convert(copy.deepcopy(conv))
    for name in nn.Conv2d.__constants__:
        assert getattr(quant, name) == getattr(conv, name), name


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_quantized_linear_layer_is_a_product_of_quantized_operands(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=bias)
    quant = QuantLinear.convert(copy.deepcopy(linear))
    x = torch.randn(shape)
    calibrated(quant, x)
    inputs = fake_quantized(x, 0.8 * x.abs().max() / 127, -128)
    weight = fake_quantized(linear.weight, 0.9 * linear.weight.abs().amax(1) / 127, -127)
    assert torch.equal(quant(x), F.linear(inputs, weight, linear.bias))
    assert not torch.allclose(quant(x), linear(x), atol=1e-4)
    assert (quant.in_features, quant.out_features) == (6, 4)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1, bias=False), nn.Linear(2, 3)]
)
def test_parameters_stay_and_only_ranges_are_new(layer):
    before, names = dict(layer.named_parameters()), set(layer.state_dict())
    quant = (QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear).convert(layer)
    after = dict(quant.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert quant.state_dict().keys() - names == {
        "input_quantizer._amax",
        "weight_quantizer._amax",
    }


def test_gradients_reach_the_weight_through_the_rounding():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 6, 6)
    quant = QuantConv2d.convert(conv)
    quant.input_quantizer.set_range(x.abs().max())
    quant.weight_quantizer.set_range(conv.weight.abs().flatten(1).amax(1))
    quant(x).sum().backward()
    rounded = quant.input_quantizer(x)
    # of each kernel position (2, 3, 3), for every channel
    expected = rounded.unfold(2, 4, 1).unfold(3, 4, 1).sum((0, 4, 5))
    torch.testing.assert_close(conv.weight.grad, expected.expand(3, 2, 3, 3))


@pytest.mark.parametrize("rounds", [(0,), (1,), (0, 1)])
def test_quantized_addition_rounds_the_operands_that_it_names(rounds):
    operands = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)]
    layer = Add()
    layer.rounds = rounds
    quant = QuantAdd.convert(layer)
    names = [("x_quantizer", "other_quantizer")[operand] for operand in rounds]
    assert list(quant.state_dict()) == [f"{name}._amax" for name in names]
    expected = list(operands)
    for name, operand in zip(names, rounds, strict=True):
        largest = operands[operand].abs().max()
        getattr(quant, name).set_range(0.8 * largest)
        expected[operand] = fake_quantized(operands[operand], 0.8 * largest / 127, -128)
    assert torch.equal(quant(*operands), expected[0] + expected[1])


def test_quantized_multiplication_rounds_both_operands():
    scale, x = torch.rand(2, 3, 1, 1), torch.randn(2, 3, 4, 4)
    quant = calibrated(QuantMul.convert(Mul()), scale, x)
    factor, values = (fake_quantized(t, 0.8 * t.abs().max() / 127, -128) for t in (scale, x))
    assert torch.equal(quant(scale, x), factor * values)
    assert list(quant.state_dict()) == ["factor_quantizer._amax", "input_quantizer._amax"]


@pytest.mark.parametrize("size", [1, (2, 3), (None, 1)])
def test_quantized_pool_is_a_pool_of_a_quantized_input(size):
    x = torch.randn(2, 3, 5, 6)
    quant = calibrated(QuantAdaptiveAvgPool2d.convert(nn.AdaptiveAvgPool2d(size)), x)
    rounded = fake_quantized(x, 0.8 * x.abs().max() / 127, -128)
    assert torch.equal(quant(x), F.adaptive_avg_pool2d(rounded, size))
    assert quant(x).shape == nn.AdaptiveAvgPool2d(size)(x).shape


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"ceil_mode": True}])
def test_quantized_pool_of_windows_is_a_pool_of_a_quantized_input(options):
    x = torch.randn(2, 3, 7, 6)
    pool = nn.AvgPool2d(3, **options)
    quant = calibrated(QuantAvgPool2d.convert(pool), x)
    assert torch.equal(quant(x), pool(fake_quantized(x, 0.8 * x.abs().max() / 127, -128)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": (1, 0), "output_padding": 1}, {"groups": 2}, {"dilation": 2}],
    ids=str,
)
def test_quantized_transposed_convolution_is_one_of_quantized_operands(geometry, bias):
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(4, 6, 3, **geometry, bias=bias)
    quant = QuantConvTranspose2d.convert(conv)
    x = torch.randn(2, 4, 5, 6)
    # (in, out / groups, height, width): a range for each of the second axis
    amax = conv.weight.abs().amax((0, 2, 3))
    quant.input_quantizer.set_range(0.8 * x.abs().max())
    quant.weight_quantizer.set_range(0.9 * amax)
    inputs = fake_quantized(x, 0.8 * x.abs().max() / 127, -128)
    weight = fake_quantized(conv.weight.transpose(0, 1), 0.9 * amax / 127, -127).transpose(0, 1)
    options = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    expected = F.conv_transpose2d(inputs, weight, conv.bias, **{**options, **geometry})
    torch.testing.assert_close(quant(x), expected)
    assert quant(x).shape == conv(x).shape


@pytest.mark.parametrize("between", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
def test_inference_form_of_a_linear_layer_computes_the_same_of_any_shape(between):
    torch.manual_seed(0)
    x = torch.randn(2, *between, 6)
    quant = calibrated(QuantLinear.convert(nn.Linear(6, 4)), x)
    expected = quant(x)
    torch.testing.assert_close(PointwiseLinear.from_linear(quant)(x), expected)


class Same(nn.Conv2d):
    """As timm's: its own `forward`, which computes what its base computes."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Gained(nn.Conv2d):
    """With a factor that is 1 until it is trained."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gain


class Dropping(nn.Conv2d):
    def forward(self, x):
        return F.dropout2d(super().forward(x), 0.5, self.training)


class Standardised(nn.Conv2d):
    """As in networks with weight standardisation: another weight than its own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Limited(nn.Conv2d):
    """As EEGNet's: its weight is held below a norm, which it may be already."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 10.0)
        return super().forward(x)


class Masked(nn.Conv2d):
    """As PixelCNN's: what it may not see is written out of its weight."""

    def forward(self, x):
        self.weight.data[:, :, 2:] = 0
        return super().forward(x)


def test_looking_for_a_quantized_form_leaves_the_weight_alone():
    layer = Masked(3, 4, 3)
    before = layer.weight.detach().clone()
    quantized_form(layer)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        (nn.Conv2d(3, 4, 3), QuantConv2d),
        (Same(3, 4, 3, padding=1), QuantConv2d),
        (Same(3, 4, 3, dilation=2), None),  # which it forgets
        (Standardised(3, 4, 3), None),
        (Limited(3, 4, 3), None),
        (Masked(3, 4, 3), None),
        (Gained(3, 4, 3), None),
        (Dropping(3, 4, 3).eval(), None),
        (Dropping(3, 4, 3), None),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), None),
        (nn.ConvTranspose2d(3, 4, 3), QuantConvTranspose2d),
        (nn.Conv1d(3, 4, 3), None),
        (QuantConv2d.convert(nn.Conv2d(3, 4, 3)), None),
    ],
)
def test_a_layer_has_a_quantized_form_if_it_computes_what_its_base_does(layer, form):
    assert quantized_form(layer) is form


# folding of BatchNorm

GAMMAS = torch.tensor([1.0, -1.5, 0.0, 1e-9, -1e-9, 1e-3, -1e4, 1e6])


def batch_norm(affine=True, variance=None):
    """Eight channels with random statistics and every kind of gamma."""
    bn = nn.BatchNorm2d(8, affine=affine)
    bn.running_mean.normal_()
    bn.running_var.copy_(torch.rand(8) + 0.3 if variance is None else torch.full((8,), variance))
    if affine:
        bn.weight.data.copy_(GAMMAS)
        bn.bias.data.normal_()
    return bn


def batch_norm_1d():
    """The same for features (N, 8)."""
    bn = nn.BatchNorm1d(8)
    bn.load_state_dict(batch_norm().state_dict())
    return bn


def quantized_pair(bias=False, **options):
    """A calibrated convolution with 8 channels, one all zero, and its BatchNorm; its images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), batch_norm(**options)).eval()
    model[0].weight.data[5] = 0
    quantize_modules(model, EXAMPLE)
    images = torch.randn(4, 3, 7, 7)
    calibrate(model, [images], "max")
    return model, images


def column(values, weight):
    """One value for each output channel, shaped to go with `weight`, in float64."""
    return values.double().reshape(-1, *[1] * (weight.ndim - 1))


def assert_codes_stay(frozen, layer, factor=None, channels=None):
    """The INT8 codes of the frozen layer are those of the layer, but for the sign of the factor.

    Within 2e-5 steps of a tie torch may round to the other side. Looks at the first `channels`.
    """
    weight = layer.weight.detach()[:channels]
    result = frozen.weight.detach().reshape(layer.weight.shape)[:channels].double()
    scale = column(layer.weight_quantizer.amax[:channels], weight) / 127
    steps = result / column(frozen.weight_quantizer.scale[:channels], weight)
    codes = steps.round()
    assert (steps - codes).abs().max() < 1e-4
    if factor is not None:
        codes *= torch.where(column(factor[:channels], weight) < 0, -1, 1)
    expected = torch.from_numpy(reference_codes(weight, scale, -127))
    clear = torch.from_numpy(steps_from_tie(weight, scale) > 2e-5)
    assert torch.equal(codes[clear], expected[clear])
    assert (codes - expected).abs().max() <= 1


def factors(bn):
    """What BatchNorm multiplies each channel with, in float64."""
    gamma = bn.weight.detach().double() if bn.affine else 1
    return (bn.running_var.double() + bn.eps).rsqrt() * gamma


def assert_channels_close(result, expected, tolerance=1e-4):
    """Every channel by its own size: the large ones must not hide the small ones."""
    error = (result - expected).abs().amax((0, 2, 3))
    assert (error <= tolerance * expected.abs().amax((0, 2, 3))).all(), error


FOLDS = {
    "plain": {},
    "bias": {"bias": True},
    "not affine": {"affine": False},
    "not affine, bias": {"affine": False, "bias": True},
    "tiny variance": {"variance": 1e-12},
    "no variance": {"variance": 0.0, "bias": True},
    "large variance": {"variance": 1e8},
}


@pytest.mark.parametrize("options", FOLDS.values(), ids=FOLDS)
def test_folding_keeps_every_weight_code_but_for_its_sign(options):
    model, _ = quantized_pair(**options)
    inference = to_inference(model, EXAMPLE)
    assert_codes_stay(inference[0], model[0], factors(model[1]))
    weights, scale = inference[0].weight, inference[0].weight_quantizer.scale
    largest = (weights.abs().flatten(1).amax(1) / scale).round().tolist()
    assert largest == [127, 127, 127, 127, 127, 0, 127, 127]


@pytest.mark.parametrize("options", FOLDS.values(), ids=FOLDS)
def test_folding_keeps_the_outputs(options):
    model, images = quantized_pair(**options)
    inference = to_inference(model, EXAMPLE)
    assert [type(module) for module in inference] == [QuantConv2d, nn.Identity]
    with torch.no_grad():
        assert_channels_close(inference(images), model(images))


@pytest.mark.parametrize("options", FOLDS.values(), ids=FOLDS)
def test_folding_a_float_convolution_keeps_the_outputs(options):
    torch.manual_seed(0)
    norm_options = {key: value for key, value in options.items() if key != "bias"}
    conv = nn.Conv2d(3, 8, 3, bias=options.get("bias", False))
    model = nn.Sequential(conv, batch_norm(**norm_options)).eval()
    images = torch.randn(4, 3, 7, 7)
    inference = to_inference(model, EXAMPLE)
    assert [type(module) for module in inference] == [nn.Conv2d, nn.Identity]
    with torch.no_grad():
        assert_channels_close(inference(images), model(images))


def test_frozen_ranges_are_the_calibrated_ones_times_the_factor():
    model, _ = quantized_pair()
    inference = to_inference(model, EXAMPLE)
    assert torch.equal(inference[0].input_quantizer.scale, model[0].input_quantizer.amax / 127)
    scale = inference[0].weight_quantizer.scale.double()
    expected = model[0].weight_quantizer.amax.double() / 127 * factors(model[1]).abs()
    used = GAMMAS != 0
    torch.testing.assert_close(scale[used], expected[used], rtol=1e-6, atol=0)
    assert (scale > 0).all()  # an engine accepts no scale of 0
    assert scale[~used].max() < 1e-12


def test_frozen_weights_lie_on_their_grid():
    model, _ = quantized_pair(bias=True)
    conv = to_inference(model, EXAMPLE)[0]
    assert torch.equal(conv.weight_quantizer(conv.weight), conv.weight)


def test_without_batch_norm_codes_and_ranges_stay():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).train()
    quantize_modules(model, EXAMPLE)
    images = torch.randn(2, 3, 6, 6)
    calibrate(model, [images], "max")
    inference = to_inference(model, EXAMPLE)
    for name in "04":
        layer, frozen = model.get_submodule(name), inference.get_submodule(name)
        assert_codes_stay(frozen, layer)
        assert torch.equal(frozen.weight_quantizer.scale, layer.weight_quantizer.amax / 127)
        assert torch.equal(frozen.bias, layer.bias)
    assert torch.equal(inference[2].input_quantizer.scale, model[2].input_quantizer.amax / 127)
    torch.testing.assert_close(inference(images), model(images))


class TwoReaders(nn.Module):
    """The output of `conv` goes to `bn` and an addition; that of `alone` to its `alone_bn` only."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), batch_norm()
        self.alone, self.alone_bn = nn.Conv2d(8, 8, 1), batch_norm()
        self.add = Add()

    def forward(self, x):
        x = self.conv(x)
        return self.add(self.alone_bn(self.alone(x)), self.bn(x))


class Reused(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn, self.call = nn.Conv2d(8, 8, 1), batch_norm(), forward

    def forward(self, x):
        return self.call(self, x)


@pytest.mark.parametrize(
    ("forward", "folded"),
    [
        (lambda model, x: model.bn(model.conv(x)) + model.conv(2 * x), False),
        (lambda model, x: model.bn(model.conv(x)) + model.bn(x), False),
        (lambda model, x: model.bn(model.conv(x)) * model.conv.weight.mean(), False),
        (lambda model, x: model.bn(model.conv(x)) * model.bn.weight.mean(), False),
        (lambda model, x: (lambda y: (model.bn(y), y))(model.conv(x)), False),
        (lambda model, x: model.bn(input=model.conv(x)), True),
    ],
    ids=[
        "convolution called twice",
        "BatchNorm called twice",
        "weight read",
        "gamma read",
        "convolution returned",
        "called by keyword",
    ],
)
def test_only_what_is_called_once_is_folded(forward, folded):
    model, x = Reused(forward).eval(), torch.randn(2, 8, 5, 5)
    assert conv_bn_pairs(watch(model, x)) == [("conv", "bn")] * folded
    torch.testing.assert_close(to_inference(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


def test_batch_norm_without_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert conv_bn_pairs(watch(model, EXAMPLE)) == []


class NormAct(nn.BatchNorm2d):
    """As timm's: BatchNorm and an activation in one layer."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Scaled(nn.BatchNorm2d):
    """Does more than its base, in no layer of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float"])
@pytest.mark.parametrize(
    ("layer", "norm", "folded"),
    [
        (lambda: nn.ConvTranspose2d(3, 8, 3, 2), batch_norm, True),
        (lambda: nn.ConvTranspose2d(3, 9, 3, 2, groups=3), lambda: nn.BatchNorm2d(9), False),
        (lambda: nn.Conv2d(3, 8, 3), lambda: NormAct(8), True),
        (lambda: nn.Conv2d(3, 8, 3), lambda: Scaled(8), False),
        (lambda: nn.Linear(8, 8), batch_norm_1d, True),
    ],
    ids=["transposed", "groups", "with activation", "scaled", "linear"],
)
def test_other_layers_fold_where_they_can(layer, norm, folded, quantized):
    torch.manual_seed(0)
    model, images = nn.Sequential(layer(), norm()).eval(), EXAMPLE
    if isinstance(model[0], nn.Linear):
        first = [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        model = nn.Sequential(*first, *model).eval()
    if quantized:
        quantize_modules(model, EXAMPLE)
        calibrate(model, [images], "max")
    inference = to_inference(model, EXAMPLE)
    left = [module for module in inference.modules() if isinstance(module, _BatchNorm)]
    assert len(left) == (0 if folded else 1)
    with torch.no_grad():
        expected, result = model(images), inference(images)
    assert_channels_close(
        result.reshape(*result.shape[:2], -1, 1), expected.reshape(*result.shape[:2], -1, 1)
    )


@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float"])
def test_convolution_with_another_reader_is_not_folded(quantized):
    torch.manual_seed(0)
    model = TwoReaders().eval()
    images = torch.randn(2, 3, 7, 7)
    if quantized:
        quantize_modules(model, EXAMPLE)
        calibrate(model, [images], "max")
    assert conv_bn_pairs(watch(model, EXAMPLE)) == [("alone", "alone_bn")]
    inference = to_inference(model, EXAMPLE)
    assert isinstance(inference.bn, nn.BatchNorm2d)
    assert isinstance(inference.alone_bn, nn.Identity)
    assert torch.equal(inference.conv.bias, model.conv.bias)
    if quantized:
        assert_codes_stay(inference.conv, model.conv)
        scale = model.conv.weight_quantizer.amax / 127
        assert torch.equal(inference.conv.weight_quantizer.scale, scale)
    with torch.no_grad():
        assert_channels_close(inference(images), model(images))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float"])
def test_the_model_passed_in_stays_as_it_is(training, quantized):
    model, _ = quantized_pair(bias=True)
    if not quantized:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), batch_norm())
    model.train(training)
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    inference = to_inference(model, EXAMPLE)
    assert not inference.training
    assert all(module.training is training for module in model.modules())
    assert dict(model.named_modules()) == modules
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] and p.requires_grad for name, p in model.named_parameters())
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    inference[0].weight.data.zero_()
    inference[0].bias.data.zero_()
    assert torch.equal(model[0].weight, state["0.weight"])
    assert torch.equal(model[0].bias, state["0.bias"])


# whole networks


@pytest.fixture(scope="module", params=NETWORK_PARAMS)
def network(request):
    """A calibrated network in training form, its inference form, and images."""
    torch.manual_seed(0)
    name, stem = request.param
    model = build(name, stem)
    randomise_batch_norm(model)
    model.eval()
    # what the last stage sees as one pixel
    size = 4 if stem == "cifar" and name != "vanilla_cnn" else 8
    images = torch.randn(8, 3, size, size)
    float_inference = to_inference(model, EXAMPLE)
    with torch.no_grad():
        float_logits = model(images), float_inference(images)
    quantize_modules(model, EXAMPLE)
    calibrate(model, [images], "max")
    return model, to_inference(model, EXAMPLE), images, float_logits


def relative_errors(result, expected):
    """Of each image's logits."""
    return (result - expected).norm(dim=1) / expected.norm(dim=1)


def test_float_network_computes_the_same_when_folded(network):
    expected, result = network[3]
    # a random network amplifies what float rounds
    assert relative_errors(result, expected).max() < 1e-3
    # and tells images apart: all comparisons mean something
    assert relative_errors(expected.mean(0), expected).mean() > 0.01


@torch.no_grad()
def test_every_folded_layer_computes_the_same_from_the_same_input(network):
    """Layer by layer: where float sums of two layers lie on two sides of a tie, a code differs.

    Then all that comes after differs too.
    """
    model, inference, images, _ = network
    seen = {}

    def record(name, args, output):
        # copies, as activations are overwritten in place
        seen[name] = ([arg.clone() for arg in args], output.clone())

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: record(name, args, output))
        for name, module in model.named_modules()
        if name in quantizable_modules(model) or isinstance(module, nn.BatchNorm2d)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    pairs = dict(conv_bn_pairs(watch(model, EXAMPLE)))
    without_bias = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.bias is None
    ]
    # all but those of squeeze and excitation
    assert sorted(pairs) == sorted(without_bias)
    assert len(pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for name in quantizable_modules(model):
        expected = seen[pairs.get(name, name)][1]
        result = inference.get_submodule(name)(*seen[name][0])
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_codes_and_ranges_of_every_layer_stay(network):
    model, inference, _, _ = network
    pairs = dict(conv_bn_pairs(watch(model, EXAMPLE)))
    for name, layer in quantizable_modules(model).items():
        frozen = inference.get_submodule(name)
        for child_name, quantizer in layer.named_children():
            if child_name != "weight_quantizer":
                scale = frozen.get_submodule(child_name).scale
                assert torch.equal(scale, quantizer.amax / 127), (name, child_name)
        if hasattr(layer, "weight"):
            factor = torch.ones(len(layer.weight))
            if name in pairs:
                factor = factors(model.get_submodule(pairs[name]))
            assert_codes_stay(frozen, layer, factor, channels=16)
            expected = layer.weight_quantizer.amax.double() / 127 * factor.abs()
            scale = frozen.weight_quantizer.scale.double()
            torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)


def test_nothing_of_the_library_is_left_in_the_inference_form(network):
    model, inference, _, _ = network
    assert any(isinstance(module, TensorQuantizer) for module in model.modules())
    for name, module in inference.named_modules():
        assert not isinstance(module, nn.BatchNorm2d), name
        values = [module, *vars(module).values()]
        classes = {base for value in values for base in type(value).__mro__}
        assert not any(base.__module__.startswith("pytorch_quantization") for base in classes), name
        assert Quantizer not in classes, name
