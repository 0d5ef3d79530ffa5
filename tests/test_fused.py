"""The fused kernels compute what torch's modules do, and `fuse` puts them where they fit.

Without a GPU, Triton interprets the kernels in NumPy.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLE, ROOT
from torch import nn
from torchvision.ops import StochasticDepth

from layers import Add
from utils.quantization import quantize_modules
from utils.quantization.calibrate import calibrate
from utils.training import kernels, optimizers
from utils.training.fuse import Chain, find_chains, fuse

pytest.importorskip("triton")
from layers import fused, fused_optimizer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = {"": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
AMAX = 2.5


def feature_map(*shape):
    return torch.randn(shape, device=DEVICE).to(memory_format=torch.channels_last)


def random_norm(channels):
    norm = nn.BatchNorm2d(channels).to(DEVICE)
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


# kernels


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize(
    ("adds", "activation", "rounds"),
    [
        (False, "", False),
        (False, "relu", True),
        (False, "relu6", False),
        (False, "silu", True),
        (True, "", False),
        (True, "relu", False),
        (True, "relu", True),
    ],
)
def test_batch_norm_and_what_follows_it_is_torchs(monkeypatch, adds, activation, rounds, training):
    monkeypatch.setattr(fused, "PROGRAMS", 3)  # each adds up several tiles
    torch.manual_seed(0)
    mine = random_norm(72).train(training)  # more channels than one tile has
    theirs = copy.deepcopy(mine)
    x, other = 3 + 2 * feature_map(5, 72, 7, 6), feature_map(5, 72, 7, 6)
    upstream = feature_map(5, 72, 7, 6)

    given = [x.clone().requires_grad_(), other.clone().requires_grad_()]
    amax = torch.tensor(AMAX, device=DEVICE)
    result = fused.fused_batch_norm(
        given[0], mine, given[1] if adds else None, activation, amax if rounds else None
    )
    result.backward(upstream)

    expected_of = [x.clone().requires_grad_(), other.clone().requires_grad_()]
    v = theirs(expected_of[0])
    expected = FUNCTIONS[activation](v + expected_of[1] if adds else v)
    if rounds:
        expected = torch.fake_quantize_per_tensor_affine(expected, AMAX / 127, 0, -128, 127)
    expected.backward(upstream)

    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(result, expected, **close)
    for one, two in zip(given[: 1 + adds], expected_of, strict=False):
        torch.testing.assert_close(one.grad, two.grad, **close)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(mine.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-3)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(mine.get_buffer(name), buffer, **close)


def test_a_mean_far_from_zero_costs_no_digits():
    """The difference of two large squares would leave no variance."""
    torch.manual_seed(0)
    norm = random_norm(16)
    norm.running_mean.fill_(300)
    x = 300 + 0.01 * feature_map(8, 16, 8, 8)
    result = fused.fused_batch_norm(x, norm)
    expected = F.batch_norm(x.double(), None, None, norm.weight.double(), norm.bias.double(), True)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fake_quantization_is_torchs_bit_for_bit(layout):
    torch.manual_seed(0)
    weight = torch.randn(7, 5, 3, 3, device=DEVICE).to(memory_format=layout)
    upstream = torch.randn(7, 5, 3, 3, device=DEVICE)
    ranges = torch.rand(7, device=DEVICE) + 0.5
    zeros = torch.zeros(7, dtype=torch.int32, device=DEVICE)
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    result = fused.fused_fake_quantize(mine, ranges, -127, torch.float32)
    expected = torch.fake_quantize_per_channel_affine(theirs, ranges / 127, zeros, 0, -127, 127)
    assert torch.equal(result, expected)
    result.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(mine.grad, theirs.grad)

    whole = fused.fused_fake_quantize(weight, ranges[0], -128, torch.float32)
    scale = float(ranges[0] / 127)
    assert torch.equal(whole, torch.fake_quantize_per_tensor_affine(weight, scale, 0, -128, 127))


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 3, 3, 3), (20, 10, 1, 1)])
def test_muons_kernels_do_what_torchs_operations_do(shape):
    torch.manual_seed(0)
    kernel, gradient, buffer = (feature_map(*shape) for _ in range(3))
    slot = torch.zeros(64, 128, dtype=torch.bfloat16, device=DEVICE)
    results = []
    for module in (optimizers, fused_optimizer):
        own = [kernel.clone(), buffer.clone()]
        part = optimizers._view_in_slot(slot.clone(), kernel)
        module.nesterov_momentum(gradient, own[1], 0.9, part)
        lr, length = torch.tensor(0.1, device=DEVICE), kernel.norm()
        module.rescale_and_step(own[0], part, lr, length, 4.0)
        results.append([*own, part.float()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)  # bf16's


# where they fit


class Block(nn.Module):
    """As torchvision's, of which one ReLU ends two chains; the shortcut has a BatchNorm too."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.depth = StochasticDepth(0.0, "row")
        self.shortcut = nn.Sequential(
            nn.Conv2d(3, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.add = Add()
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.depth(self.bn2(self.conv2(out)))
        out = self.relu(self.add(out, self.shortcut(x)))
        return self.fc(self.pool(self.conv3(out)).flatten(1))


EXPECTED = [
    Chain("bn1", activation="relu"),
    Chain("bn2", add="add", activation="relu"),
    Chain("shortcut.1"),
]


def test_chains_of_a_residual_block():
    assert find_chains(Block(), EXAMPLE) == EXPECTED


def test_what_is_random_in_training_ends_a_chain():
    model = Block()
    model.depth.p = 0.5
    model.eval()
    chains = {chain.norm: chain for chain in find_chains(model, EXAMPLE)}
    assert chains["bn2"] == Chain("bn2")
    assert chains["shortcut.1"].add == "add"
    assert not model.training


def test_a_buffer_that_is_added_keeps_its_place():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(4)
            self.add = Add()
            self.register_buffer("positions", torch.ones(len(EXAMPLE), 4, *EXAMPLE.shape[2:]))

        def forward(self, x):
            return self.add(self.positions, self.bn(self.conv(x)))

    assert find_chains(Positions(), EXAMPLE) == [Chain("bn", add="add", operand=1)]


def test_a_module_with_a_forward_of_its_own_ends_a_chain():
    block = Block()
    block.relu.forward = lambda x: torch.nn.functional.leaky_relu(x, 0.1)
    assert not any(chain.activation for chain in find_chains(block, EXAMPLE))
    block.add.forward = lambda x, other: 2 * x + other
    assert not any(chain.add for chain in find_chains(block, EXAMPLE))


class TwoReaders(nn.Module):
    """BatchNorm's result goes two ways, and a ReLU also follows something else."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last_conv, self.last_bn = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.add, self.relu = Add(), nn.ReLU()

    def forward(self, x):
        out = self.bn(self.conv(x))
        out = self.add(out, self.relu(out))
        return self.relu(self.last_bn(self.last_conv(out))).mean((2, 3))


def test_a_result_that_goes_two_ways_ends_a_chain():
    assert find_chains(TwoReaders(), EXAMPLE) == [Chain("bn"), Chain("last_bn")]


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_a_fused_network_trains_as_before(quantized):
    torch.manual_seed(0)
    model = Block().to(DEVICE)
    if quantized:
        quantize_modules(model, EXAMPLE)
        calibrate(model, [2 * torch.randn(16, 3, 16, 16, device=DEVICE)], "max")
        chains = {chain.norm: chain for chain in find_chains(model, EXAMPLE)}
        # the shortcut's convolution adds: it is the cheaper one
        assert chains["bn1"] == Chain("bn1", "", 0, "relu", ["conv2.input_quantizer"])
        assert chains["bn2"] == Chain("bn2", "", 0, "", ["add.x_quantizer"])
        last = Chain("shortcut.1", "add", 1, "relu", ["conv3.input_quantizer"])
        assert chains["shortcut.1"] == last
    model.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    fuse(model, EXAMPLE)
    assert model.state_dict().keys() == plain.state_dict().keys()

    # a copy is bound to its own parameters
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()

    images = torch.randn(4, 3, 16, 16, device=DEVICE)
    with kernels.fusing():
        model.train()(images).square().sum().backward()
        assert copied.train()(images).count_nonzero() == 0
    plain.train()(images).square().sum().backward()
    for (name, p), mine in zip(plain.named_parameters(), model.parameters(), strict=True):
        # a value beside a tie may be rounded the other way
        assert (mine.grad - p.grad).norm() <= 2e-2 * p.grad.norm(), name
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), plain.eval()(images))


# for a GPU, without one

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from layers import fused, fused_optimizer

FLOATS = ("eps", "momentum", "target_norm")
MAPS = ("x_ptr", "other_ptr", "y_ptr", "dy_ptr", "dx_ptr", "dother_ptr", "out_ptr", "step_ptr")

def compile_for_an_h100(kernel, **constants):
    signature = {}
    for name in kernel.arg_names:
        kind = "*fp32" if name.endswith("_ptr") else "i32"
        kind = "fp32" if name in FLOATS else "*bf16" if name in MAPS else kind
        kind = "*i64" if name == "batches_ptr" else kind
        signature[name] = "constexpr" if name in constants else kind
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

tile = {"BLOCK_M": 32, "BLOCK_C": 64}
compile_for_an_h100(fused._sum_kernel, **tile)
compile_for_an_h100(fused._statistics_kernel)
compile_for_an_h100(fused._parameter_gradient_kernel)
for activation, absent in (
    ("relu", {}), ("silu", {}), ("", {"other_ptr": None, "amax_ptr": None})
):
    how = {"ACTIVATION": activation, **absent, **tile}
    compile_for_an_h100(fused._forward_kernel, **how)
    compile_for_an_h100(fused._gradient_sum_kernel, **how)
    if absent:
        how["dother_ptr"] = None
    compile_for_an_h100(fused._backward_kernel, FROZEN=False, **how)
for absent in ({}, {"dy_ptr": None}):
    compile_for_an_h100(fused._round_kernel, CODE_MIN=-127.0, **absent)
for kernel in (fused_optimizer._momentum_kernel, fused_optimizer._step_kernel):
    compile_for_an_h100(kernel)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """What the interpreter runs need not compile; it needs no GPU."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
