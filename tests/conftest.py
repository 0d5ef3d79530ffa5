"""Shared by all tests: real digits, small networks, checkpoints, and ways to run the scripts."""

import os

# two processes of pytest-xdist share the two cores of the smallest machine
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# threads that spin slow each other down wherever cores are shared
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# kernels for a GPU run in NumPy where there is none; Triton asks when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# isort: split
import errno
import resource
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn
from torchvision.models.resnet import BasicBlock

import dataset
from dataset.batches import Batches
from layers import Normalize
from utils import checkpoint, errors, networks
from utils.backends import network as measure
from utils.checkpoint import Checkpoint
from utils.quantization.modularize import modularize
from utils.quantization.watch import example_images
from utils.specs import DataSpec, NetworkSpec, Quantization

ROOT = Path(__file__).parent.parent
STEMMED = ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "efficientnet_b0")
NETWORKS = [
    ("vanilla_cnn", "cifar"),
    *((name, stem) for name in STEMMED for stem in ("imagenet", "cifar")),
]
"""Every model with every stem that it has."""

_FAST = (("resnet18", "cifar"), ("efficientnet_b0", "cifar"))
NETWORK_PARAMS = [
    pytest.param(network, id="-".join(network), marks=() if network in _FAST else pytest.mark.slow)
    for network in NETWORKS
]
"""The same as parameters of a test: two stand for all where tests have to be fast."""

BLOCK = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


EXAMPLE = example_images(16, 16)
"""Images of a size that all networks of the tests take."""


class Small(nn.Module):
    """One of each: a convolution, blocks without and with a shortcut, a pool, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(6, 6, 1, None)
        shortcut = nn.Sequential(nn.Conv2d(6, 4, 1, 2, bias=False), nn.BatchNorm2d(4))
        self.layer2 = BasicBlock(6, 4, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(self.flatten(self.avgpool(x)))


class Tiny(nn.Sequential):
    """Three layers with an input range, for what takes long for each."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(16, 5)


def small_net(classes=4):
    """Two convolutions before BatchNorms, and a classifier: for single steps of training."""
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def plain_net(num_classes=4):
    """Without BatchNorm: ranks that train it together do exactly what one process does."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def forbid_listing(folder, monkeypatch):
    """Nobody may list `folder`, as root still could without its permission."""
    plain = os.scandir

    def guarded(path):
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", guarded)


def build(name, stem="cifar", num_classes=10):
    """A network of the registry as the scripts build it for images of 32x32."""
    return networks.build_float(NetworkSpec(name, stem, num_classes), (32, 32))


def made(network, seed=0):
    """A network of the class `network`, with BatchNorms that matter."""
    torch.manual_seed(seed)
    model = network()
    modularize(model, EXAMPLE)
    randomise_batch_norm(model)
    return model


def normalised(images, mean, std):
    """Images (N, H, W, 3) uint8 -> (N, 3, H, W) float32 by the textbook formula."""
    values = ((images / 255 - mean) / std).astype(np.float32)
    return torch.from_numpy(values.transpose(0, 3, 1, 2)).contiguous()


@torch.no_grad()
def randomise_batch_norm(model):
    """Affine parameters as if trained, a fifth of the gammas negative; statistics of random images.

    Statistics that do not fit what they normalise let the signal die: all images would have the
    same logits.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand_like(norm.weight) < 0.2, -1, 1))
        norm.bias.normal_(0, 0.1)
        norm.momentum = 1
    training = model.training
    model.train()(torch.randn(32, 3, 8, 8))
    model.train(training)
    for norm in norms:
        norm.momentum = 0.1
        # or a channel that hardly moves becomes the loudest
        norm.running_var.clamp_(min=0.5 * norm.running_var.mean())


def write_graph_of_another_kind(path):
    """An ONNX file that turns feature maps into feature maps."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 8, 8])
    node = helper.make_node("Relu", ["images"], ["logits"])
    graph = helper.make_graph([node], "other", [images], [logits])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def digits_spec(digits, split_seed=0):
    """What a checkpoint says of the digits."""
    mean, std = dataset.channel_stats(digits.train_images)
    classes = list(digits.classes)
    return DataSpec("digits", 32, classes, split_seed, mean, std, digits.digest())


@pytest.fixture(scope="session")
def digits():
    """The digits data set, whole."""
    return dataset.load("digits", Path("unused"))


@contextmanager
def digits_cut_to(train, test, digits, width=32):
    """Meanwhile, `--dataset digits` is its first `train` and `test` images, `width` pixels wide."""
    few = (
        digits.train_images[:train],
        digits.train_labels[:train],
        digits.test_images[:test],
        digits.test_labels[:test],
    )
    few = [array[:, :: 32 // width, :: 32 // width] if array.ndim == 4 else array for array in few]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset.LOADERS, "digits", lambda *_: (*few, digits.classes))
        yield


@pytest.fixture(scope="module")
def small_digits(digits):
    """For the rest of the module, `--dataset digits` has 60 train and 40 test images of 16x16.

    Of the train images, 50 remain for training after the split.
    """
    with digits_cut_to(60, 40, digits, width=16):
        yield


@pytest.fixture(scope="session")
def small_cifar10(digits, tmp_path_factory):
    """Folder with 160 train and 40 test digits as a CIFAR-10 archive, for other processes."""
    folder = tmp_path_factory.mktemp("cifar10")
    train = {"x_train": digits.train_images[:160], "y_train": digits.train_labels[:160]}
    np.savez(
        folder / "cifar10.npz",
        **train,
        x_test=digits.test_images[:40],
        y_test=digits.test_labels[:40],
    )
    return folder


@pytest.fixture
def small_disk():
    """For the rest of the test, files hold at most 100 kB: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
@torch.no_grad()
def trained_network(digits):
    """A float ResNet-18 that gets about two thirds of the test digits right, made in seconds.

    Its convolutions are random. BatchNorm's statistics are those of 500 train images, and the
    classifier fits these images in the sense of least squares.
    """
    info = digits_spec(digits)
    (images, labels), _ = digits.split(info.split_seed)
    images = normalised(images[:500], info.mean, info.std)
    labels = torch.from_numpy(labels[:500])
    torch.manual_seed(0)
    model = build("resnet18", "imagenet")
    classifier = model.fc
    model.fc = nn.Identity()

    # statistics of this one batch
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(images)
    features = model.eval()(images)  # (500, 512)

    # ridge regression on the features and a constant: 9 for an image's class, -1 for the others
    features = torch.cat([features, torch.ones(500, 1)], dim=1)
    target = 10 * nn.functional.one_hot(labels, 10) - 1.0
    gram = features.T @ features + 10 * torch.eye(513)
    weights = torch.linalg.solve(gram, features.T @ target)  # (513, 10)
    classifier.weight.copy_(weights[:-1].T)
    classifier.bias.copy_(weights[-1])
    model.fc = classifier
    return model


@pytest.fixture(scope="session")
def float_checkpoint(trained_network, digits, tmp_path_factory):
    """`ckpt_best` of `trained_network`, as train.py writes one."""
    path = tmp_path_factory.mktemp("float") / "ckpt_best"
    content = Checkpoint(
        state=trained_network.state_dict(),
        network=NetworkSpec("resnet18", "imagenet", 10),
        data=digits_spec(digits),
        recipe={"seed": 0, "quantize": False},
        epoch=1,
        best_val_loss=1.0,
    )
    checkpoint.save(path, content)
    return path


@pytest.fixture(scope="session")
def qat_checkpoint(float_checkpoint, digits, tmp_path_factory):
    """`ckpt_best` as QAT leaves one: the float network calibrated, then its weights moved a bit."""
    path = tmp_path_factory.mktemp("qat") / "ckpt_best"
    start = checkpoint.load(float_checkpoint)
    quantization = Quantization(calib_images=128)
    model = networks.build_quantized(start.network, quantization, (32, 32))
    checkpoint.load_weights(model, start.state, allow_missing_ranges=True)
    train_part, _ = digits.split(start.data.split_seed)
    normalize = Normalize(start.data.mean, start.data.std)
    batches = Batches(*train_part, normalize, 64, torch.device("cpu"))
    networks.calibrate_model(model, quantization, batches)
    ptq_state = {key: value.clone() for key, value in model.state_dict().items()}

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    content = replace(
        start,
        state=model.state_dict(),
        quantization=quantization,
        ptq_state=ptq_state,
        recipe={"seed": 0, "quantize": True},
    )
    checkpoint.save(path, content)
    return path


@pytest.fixture(scope="module")
def quick_latencies():
    """For the rest of the module, latencies are of two calls: its tests read their format alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WARM_UP_RUNS", 0), ("MIN_RUNS", 2), ("MIN_SECONDS", 0.0)):
            patch.setattr(measure, name, value)
        yield


@pytest.fixture(scope="session")
def error_line():
    """Run a script's main in this process as its `__main__` does: it must end with one line."""

    def run(main, argv):
        with pytest.raises(SystemExit) as exit_info:
            errors.run(partial(main, [str(arg) for arg in argv]))
        message = exit_info.value.code
        assert isinstance(message, str)  # Python prints it to stderr and exits with code 1
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    return run


@pytest.fixture(scope="session")
def run_script():
    """Run a script in a process of its own, in which the packages `blocked` are not installed."""

    def run(*argv, blocked=()):
        prefix = ["-c", BLOCK.format(blocked=tuple(blocked))] if blocked else []
        command = [sys.executable, *prefix, *map(str, argv)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def failure_line():
    """What a failed process says: it must end with one line on stderr, and no traceback."""

    def line(process, stderr=None):
        stderr = process.stderr if stderr is None else stderr
        assert "Traceback" not in stderr, stderr
        assert process.returncode not in (0, None)
        said = [text for text in stderr.splitlines() if text.strip()]
        assert said[-1].startswith("error: "), stderr
        assert sum(text.startswith("error: ") for text in said) == 1
        return said[-1]

    return line
