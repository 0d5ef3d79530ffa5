"""Training: schedules, exact resumption, what QAT changes, and how a run ends early."""

import copy
import errno
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, normalised, small_net
from torch import nn

import dataset
import models
import train
from layers import FromImages, quantizers
from utils import checkpoint as ckpt
from utils import networks, recipe
from utils.backends.pytorch import TorchNetwork
from utils.device import memory_format
from utils.errors import UserError
from utils.files import locked
from utils.training import ranks
from utils.training import step as training
from utils.training.optimizers import make_optimizer

FLAGS = ["--dataset", "digits", "--batch_size", "16", "--keep", "9"]
EPOCHS, STEPS = 3, 3  # 50 images in full batches of 16

pytestmark = pytest.mark.usefixtures("small_digits")


def arguments(mode, start, epochs=EPOCHS):
    if mode == "float":
        return ["--m", "vanilla_cnn", *FLAGS, "--num_epochs", str(epochs)]
    return [
        "--quantize",
        "--partial_ckpt",
        "--load_ckpt",
        str(start),
        *FLAGS,
        "--num_epochs",
        str(epochs),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_digits):
    """Mode -> folder of three uninterrupted epochs; QAT starts from the float run's ckpt_3."""
    parent = tmp_path_factory.mktemp("runs")
    for mode in ("float", "qat"):
        train.main(
            [*arguments(mode, parent / "float" / "ckpt_3"), "--od", str(parent), "--en", mode]
        )
    return {mode: parent / mode for mode in ("float", "qat")}


def checkpoints(folder):
    """Epoch -> checkpoint."""
    return {int(path.name[5:]): ckpt.load(path) for path in sorted(folder.glob("ckpt_[0-9]*"))}


def part_of_run(folder, copy, last):
    """A copy of a run as it was after epoch `last`."""
    copy.mkdir()
    for epoch in range(last + 1):
        if (folder / f"ckpt_{epoch}").exists():
            shutil.copy(folder / f"ckpt_{epoch}", copy)
    shutil.copy(folder / "ckpt_1", copy / "ckpt_best")
    return copy


def assert_same(a, b, path=""):
    """Equal values of equal types, tensors to the last bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def tensors(checkpoint, *suffixes):
    return {key: value for key, value in checkpoint.state.items() if key.endswith(suffixes)}


def resolved(*argv, model=("--m", "vanilla_cnn")):
    """The recipe that flags mean."""
    return train.read_flags([*model, *argv])[0]


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


# schedules


@pytest.mark.parametrize(
    ("epochs", "rate"), [(0, 0.2), (9.99, 0.2), (10, 0.02), (19.5, 0.02), (20, 0.002), (35, 0.0002)]
)
def test_lrdt_divides_the_rate_by_ten_every_n_epochs(epochs, rate):
    assert train.make_schedule(0.2, 40, 10)(epochs) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("epochs", "share"),
    [
        (0, 0.01),
        (1, 0.01 + 0.99 / 2),
        (1.5, 0.01 + 0.99 * 3 / 4),
        (2, 1),  # a twentieth of all epochs warms up
        (2 + 38 / 4, 0.75),
        (21, 0.5),
        (2 + 38 * 2 / 3, 1 / 3),
        (39.9, 0.1 / 38),
        (40, 0),
    ],
)
def test_default_schedule_is_a_line_up_and_a_line_down(epochs, share):
    assert train.make_schedule(0.2, 40, None)(epochs) == pytest.approx(0.2 * share, abs=1e-12)


@pytest.mark.parametrize("mode", ["float", "qat"])
def test_each_step_uses_the_rate_of_its_share_of_the_epoch(runs, mode):
    peak = 0.05 * 16 / 128 * (1 if mode == "float" else 0.05)  # from a checkpoint, a twentieth
    for epoch, checkpoint in checkpoints(runs[mode]).items():
        progress = (epoch - 1 + (STEPS - 1) / STEPS) / EPOCHS  # of the epoch's last step
        expected = peak * (1 - progress) / 0.95
        for group in checkpoint.optimizer["param_groups"]:
            assert group["lr"] == (pytest.approx(expected, rel=1e-9) if epoch else 0.0)


@pytest.mark.parametrize(("optimizer", "peak"), [("sgd", 0.05), ("adamw", 2e-3)])
def test_default_peak_rate_is_a_twentieth_from_a_checkpoint(runs, optimizer, peak):
    assert resolved("--optimizer", optimizer).lr == peak
    start = ["--load_ckpt", str(runs["float"] / "ckpt_3")]
    assert resolved("--optimizer", optimizer, *start).lr == pytest.approx(peak / 20)
    assert resolved("--optimizer", optimizer, *start, "--lr", "0.3").lr == 0.3


def test_default_peak_rate_is_proportional_to_the_batch_size():
    assert resolved("--batch_size", "32").lr == 0.05 / 4
    assert resolved("--batch_size", "1024", "--optimizer", "muon").lr == 0.08


@pytest.mark.parametrize(
    ("gpu", "start", "optimizer", "batch_size", "lr"),
    [
        (False, [], "sgd", 128, 0.05),
        (False, ["--load_ckpt"], "sgd", 128, 0.0025),
        (True, [], "muon", 512, 0.04),
        (True, ["--load_ckpt"], "sgd", 512, 0.01),
        (True, ["--pretrain"], "sgd", 512, 0.2),
        (True, ["--optimizer", "adamw"], "adamw", 512, 0.008),
    ],
)
def test_defaults_depend_on_the_device_and_the_start(
    runs, monkeypatch, gpu, start, optimizer, batch_size, lr
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    source = [str(runs["float"] / "ckpt_3")] if "--load_ckpt" in start else []
    args = resolved(*start, *source)
    assert (args.optimizer, args.batch_size, args.lr) == (optimizer, batch_size, pytest.approx(lr))


def test_only_matrices_and_kernels_decay():
    model = models.build("vanilla_cnn", 10, "cifar")
    for name in ("sgd", "adamw"):
        groups = train.make_optimizer(model, name).param_groups
        decay = {
            id(parameter): group["weight_decay"]
            for group in groups
            for parameter in group["params"]
        }
        assert {key: decay[id(p)] for key, p in model.named_parameters()} == {
            key: 5e-4 if p.ndim > 1 else 0.0 for key, p in model.named_parameters()
        }


# steps


@pytest.fixture
def small_model(monkeypatch):
    """`--m small` is `small_net`: Muon's products take long on a CPU."""
    monkeypatch.setitem(models.MODELS, "small", lambda classes, stem: small_net(classes))
    return ("--m", "small")


def test_a_step_on_the_cpu_is_the_textbook_loop():
    torch.manual_seed(0)
    mine = small_net()
    model = copy.deepcopy(mine)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    step = training.Step(mine, torch.optim.SGD(mine.parameters(), lr=1.0, momentum=0.9), 0.1)
    for batch_sizes in ([6, 6, 6], [6, 3]):  # the totals are of the steps since the last ones
        loss_sum, hits = 0.0, 0
        for index, size in enumerate(batch_sizes):
            images, labels = torch.randn(size, 3, 8, 8), torch.randint(0, 4, (size,))
            optimizer.param_groups[0]["lr"] = 0.1 / (index + 1)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            step.set_lr(0.1 / (index + 1))
            step(images, labels)
            loss_sum += loss.item() * size
            hits += (logits.argmax(1) == labels).sum().item()
        assert_same(dict(mine.state_dict()), dict(model.state_dict()))
        mean_loss, accuracy = step.totals()
        assert mean_loss == pytest.approx(loss_sum / sum(batch_sizes), rel=1e-6)
        assert accuracy == pytest.approx(100 * hits / sum(batch_sizes), rel=1e-6)
        assert (step.count, step.loss_sum, step.hits) == (0, 0, 0)


def test_a_groups_scale_multiplies_its_rate():
    model = small_net()
    groups = [
        {"params": [model[0].weight]},
        {"params": [model[3].weight], "scale": 3.0},
        {"params": [model[7].weight]},
    ]
    step = training.Step(model, torch.optim.SGD(groups, lr=0.0), 0.1)
    step.set_lr(0.25)
    assert [group["lr"] for group in step.optimizer.param_groups] == [0.25, 0.75, 0.25]
    reference = copy.deepcopy(model)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(reference(images), labels, label_smoothing=0.1).backward()
    step(images, labels)
    for index, rate in ((0, 0.25), (3, 0.75), (7, 0.25)):
        expected = reference[index].weight - rate * reference[index].weight.grad
        torch.testing.assert_close(model[index].weight, expected, rtol=1e-6, atol=1e-8)


def test_a_sam_step_takes_the_gradient_up_the_hill_and_leaves_from_where_it_was():
    torch.manual_seed(0)
    model = small_net()
    reference = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))

    def gradient():
        reference.zero_grad()
        logits = reference(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        return loss.item()

    loss = gradient()
    statistics = copy.deepcopy(dict(reference.named_buffers()))
    for name, p in reference.named_parameters():
        if p.ndim > 1:
            p.data += 0.05 * start[name].norm() * p.grad / p.grad.norm()
            assert (p.data - start[name]).norm() == pytest.approx(
                0.05 * start[name].norm(), rel=1e-4
            )
    assert gradient() > loss  # it is up the hill
    step = training.Step(model, torch.optim.SGD(model.parameters(), lr=0.0), 0.1, sam_rho=0.05)
    step.set_lr(0.2)
    step(images, labels)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name), start[name] - 0.2 * p.grad, rtol=1e-4, atol=1e-6
        )
    for name, value in statistics.items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(model.get_buffer(name), value)
    assert step.totals()[0] == pytest.approx(
        loss, rel=1e-6
    )  # loss and statistics are those of the weights themselves


def test_weights_of_five_dimensions_keep_their_layout():
    gpu = torch.device("cuda")
    assert memory_format(gpu, nn.Conv2d(3, 4, 3)) == torch.channels_last
    assert memory_format(gpu, nn.Conv3d(3, 4, 3)) == torch.preserve_format


class Dimmed(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.net = small_net()
        self.in_place = in_place

    def forward(self, x):
        return self.net(x.mul_(0.5) if self.in_place else x * 0.5)


def test_both_passes_of_a_sam_step_are_given_the_same_images():
    trained = []
    for in_place in (False, True):
        model = Dimmed(in_place)
        step = training.Step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.1, sam_rho=0.05)
        torch.manual_seed(1)
        step(torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,)))
        trained.append(dict(model.state_dict()))
    assert_same(*trained)


@pytest.mark.parametrize(
    ("mode", "optimizer"), [("float", "muon"), ("float", "sgd"), ("qat", "sgd")]
)
def test_the_last_third_of_a_run_with_muon_has_sam(
    runs, tmp_path, monkeypatch, small_model, mode, optimizer
):
    steps = []

    class Recorded(training.Step):
        def __call__(self, *batch):
            steps.append(self.sam_rho)
            super().__call__(*batch)

    monkeypatch.setattr(train, "Step", Recorded)
    train.main(
        [
            *arguments(mode, runs["float"] / "ckpt_3"),
            *(small_model if mode == "float" else ()),
            "--optimizer",
            optimizer,
            "--od",
            str(tmp_path),
        ]
    )
    assert steps == [0.0] * 2 * STEPS + [recipe.SAM_RHO if optimizer == "muon" else 0.0] * STEPS


SCALES = {
    "scalar": torch.tensor(0.013),
    "channels": torch.tensor([0.013, 0.5, 3e-5, quantizers.RANGE_FLOOR / 127]),
}


@pytest.mark.parametrize("code_min", [-128, -127])
@pytest.mark.parametrize("kind", list(SCALES))
def test_straight_through_is_torchs_fake_quantization(kind, code_min):
    scale = SCALES[kind]
    column = scale.reshape(-1, 1, 1).expand(4, 1, 1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.cat(
        [torch.arange(-131.0, 132), torch.arange(-131.0, 132) + 0.5]
    )  # the grid and its ties
    values = [column * codes, *(column * (codes * (1 + eps)) for eps in (-1e-7, 1e-7, 1e-6))]
    values += [
        column * torch.randn(1, 1, 2000, generator=generator) * spread
        for spread in (0.3, 10, 100, 1e4)
    ]
    huge = torch.tensor(
        [0.0, 1.0, 700.0, 6e4, 1e-30, 1e-42]
    )  # times 1 / 7.9e-15, still a 64-bit integer
    values.append(torch.cat([huge, -huge]).expand(4, 1, -1))
    x = torch.cat([v.reshape(4, 1, -1) for v in values], 2)
    assert x.dtype == torch.float32
    upstream = torch.randn(x.shape, generator=generator)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    result = quantizers.StraightThrough.apply(mine, scale.reshape(-1, 1, 1), code_min)
    if kind == "scalar":
        expected = torch.fake_quantize_per_tensor_affine(
            theirs, scale, torch.tensor(0, dtype=torch.int32), code_min, 127
        )
    else:
        zeros = torch.zeros(4, dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(theirs, scale, zeros, 0, code_min, 127)
    result.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(result, expected)
    assert torch.equal(mine.grad, theirs.grad)
    assert set((result / column).round().unique().tolist()) == set(range(code_min, 128))
    assert 0.2 < (mine.grad == 0).float().mean() < 0.8  # of the values outside the range


def test_infinite_values_take_the_ends_of_the_range():
    x = torch.tensor([torch.inf, -torch.inf, 1e38, -1e38], requires_grad=True)
    result = quantizers.StraightThrough.apply(x, torch.tensor([0.5]), -128)
    assert result.tolist() == [63.5, -64, 63.5, -64]
    result.sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 0]


def test_evaluation_allows_no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    class Spy(nn.Flatten):
        def forward(self, x):
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    images, labels = torch.zeros(2, 3, 1, 1), torch.zeros(2, dtype=torch.int64)
    assert training.evaluate(Spy(), [(images, labels)]) == (pytest.approx(math.log(3)), 100)
    network = TorchNetwork(FromImages(Spy(), [0.5] * 3, [0.5] * 3), torch.device("cpu"))
    assert network(np.zeros((2, 1, 1, 3), np.uint8)).shape == (2, 3)
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32


# resuming


def stop_in(monkeypatch, epoch, error=KeyboardInterrupt):
    """Ctrl-C, or another error, in the second step of an epoch, counted from 1."""
    original, calls = training.F.cross_entropy, 0

    def cross_entropy(*args, **options):
        nonlocal calls
        calls += "label_smoothing" in options  # the val loss has none
        if calls == STEPS * (epoch - 1) + 2:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(training.F, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("saved", [1, 2])
@pytest.mark.parametrize("mode", ["float", "qat"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(runs, tmp_path, mode, saved):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, saved + 1)
        argv = [*arguments(mode, runs["float"] / "ckpt_3"), "--od", str(tmp_path), "--en", "run"]
        with pytest.raises(UserError, match=f"--resume {tmp_path}/run$"):
            train.main(argv)
    assert max(checkpoints(tmp_path / "run")) == saved
    torch.manual_seed(99)  # what went before must not matter
    train.main(["--resume", str(tmp_path / "run")])
    for name in ("ckpt_3", "ckpt_best"):
        resumed, whole = ckpt.load(tmp_path / "run" / name), ckpt.load(runs[mode] / name)
        assert len(whole.history) == whole.epoch
        for key in vars(whole).keys() - {"recipe"}:  # paths differ
            assert_same(getattr(resumed, key), getattr(whole, key), f"{name}.{key}")


def test_a_qat_run_stopped_in_its_first_epoch_resumes_from_its_calibration(runs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 1)
        with pytest.raises(UserError, match="--resume"):
            train.main(
                [*arguments("qat", runs["float"] / "ckpt_3"), "--od", str(tmp_path), "--en", "run"]
            )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ckpt_0", "ckpt_best"]
    train.main(["--resume", str(tmp_path / "run")])
    assert_same(
        ckpt.load(tmp_path / "run" / "ckpt_3").state, ckpt.load(runs["qat"] / "ckpt_3").state
    )


def test_the_hint_names_the_script_and_a_network_that_runs_code_as_the_user_did(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["../qat/train.py"])
    assert ranks.command(None) == ranks.command("timm/resnet18") == "python ../qat/train.py"
    assert ranks.command("my net:build") == "python ../qat/train.py --model 'my net:build'"
    # another program calls main
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert ranks.command(None) == "python train.py"


def test_a_failing_gpu_is_one_line_that_tells_how_to_go_on(tmp_path, error_line):
    failure = torch.AcceleratorError(
        "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`"
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 2, failure)
        line = error_line(train.main, [*arguments("float", None), "--od", tmp_path, "--en", "run"])
    what = "error: the GPU failed (CUDA error: unspecified launch failure); "
    assert line == f"{what}continue with: python train.py --resume {tmp_path / 'run'}"


def test_an_interrupt_in_the_export_after_training_says_how_to_go_on(tmp_path, error_line):
    def interrupt(*_):
        raise KeyboardInterrupt

    flags = [*arguments("float", None, epochs=1), "--test_trt", "--backend", "onnxruntime"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.compare, "export_checkpoint", interrupt)
        line = error_line(train.main, [*flags, "--od", tmp_path, "--en", "run"])
    assert line == f"error: interrupted; continue with: python train.py --resume {tmp_path / 'run'}"


def test_a_float_run_stopped_in_its_first_epoch_leaves_nothing(tmp_path, error_line):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 1)
        line = error_line(train.main, [*arguments("float", None), "--od", tmp_path])
    assert line == "error: interrupted; nothing was saved yet"
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [".", "tests"]
import conftest, dataset, torch, train
from utils.training import step as training

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

steps, cross_entropy, save = 0, training.F.cross_entropy, torch.save

def in_an_epoch(*args, **options):
    global steps
    steps += 1
    if steps == {steps} + 2:
        # the first epoch's files are written meanwhile
        while sorted(path.name for path in folder.iterdir()) != ["ckpt_1", "ckpt_best"]:
            time.sleep(0.01)
        die()
    return cross_entropy(*args, **options)

def in_a_write(content, file):
    save(content, file)
    if "/.ckpt_2." in str(file.name):
        file.truncate(file.tell() // 2)
        die()

folder = Path(sys.argv[-3], sys.argv[-1])  # --od DIR --en NAME
if sys.argv.pop(1) == "epoch":
    training.F.cross_entropy = in_an_epoch
else:
    torch.save = in_a_write
with conftest.digits_cut_to(60, 40, dataset.load("digits", Path()), width=16):
    train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Place -> folder of a run that was killed there in its second epoch."""
    processes = {}
    for place in ("epoch", "write"):
        folder = tmp_path_factory.mktemp(place) / "run"
        argv = [place, *arguments("float", None), "--od", str(folder.parent), "--en", folder.name]
        command = [sys.executable, "-c", KILLED.format(steps=STEPS), *argv]
        processes[place] = subprocess.Popen(command, cwd=ROOT), folder
    for process, _ in processes.values():
        assert process.wait(timeout=100) == -signal.SIGKILL
    return {place: folder for place, (_, folder) in processes.items()}


def names(folder):
    return {path.name for path in folder.iterdir()}


def assert_finishes_like(whole, folder):
    """A resumed run leaves the uninterrupted run's files and nothing else."""
    train.main(["--resume", str(folder)])
    assert names(folder) == names(whole) == {"ckpt_1", "ckpt_2", "ckpt_3", "ckpt_best"}
    for name in names(folder):
        mine, theirs = ckpt.load(folder / name), ckpt.load(whole / name)
        for key in ("history", "state", "optimizer", "epoch", "best_val_loss"):
            assert_same(getattr(mine, key), getattr(theirs, key), f"{name}.{key}")


@pytest.mark.parametrize(
    ("place", "left"),
    [("epoch", {"ckpt_1", "ckpt_best"}), ("write", {"ckpt_1", "ckpt_best", ".ckpt_2.partial"})],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(runs, killed, place, left):
    folder = killed[place]
    assert {re.sub(r"ckpt_2\.\w+", "ckpt_2", name) for name in names(folder)} == left
    assert_finishes_like(runs["float"], folder)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_killed_before_it_linked_its_best_checkpoint_equals_an_uninterrupted_one(
    runs, tmp_path, epoch
):
    folder = part_of_run(runs["float"], tmp_path / "run", epoch)
    (folder / "ckpt_best").unlink()
    losses = [past["val_loss"] for past in ckpt.load(folder / f"ckpt_{epoch}").history]
    if epoch > 1:
        best = min(range(1, epoch), key=lambda index: losses[index - 1])  # of the epochs before
        before = ckpt.load(folder / f"ckpt_{best}")
        before.optimizer = None
        ckpt.save(folder / "ckpt_best", before)
    (folder / ".ckpt_best.x1.partial").mkdir()
    (folder / ".ckpt_best.x1.partial" / "ckpt_best").write_bytes(b"half")
    assert_finishes_like(runs["float"], folder)


def test_a_run_with_muon_resumes_exactly(tmp_path, small_model):
    argv = [
        *arguments("float", None, epochs=2),
        *small_model,
        "--optimizer",
        "muon",
        "--od",
        str(tmp_path),
        "--en",
        "run",
    ]
    train.main(argv)
    whole = checkpoints(tmp_path / "run")
    (tmp_path / "run" / "ckpt_2").unlink()
    train.main(["--resume", str(tmp_path / "run")])
    for key in ("history", "state", "optimizer"):
        again = ckpt.load(tmp_path / "run" / "ckpt_2")
        assert_same(getattr(again, key), getattr(whole[2], key), key)
    rates = [group["lr"] for group in whole[2].optimizer["param_groups"]]
    assert rates[1] == 2 * rates[0] > 0
    assert all(
        changed(tensors(whole[1], kind), tensors(whole[2], kind)) for kind in ("weight", "bias")
    )


@pytest.mark.parametrize(
    "start", [["--load_ckpt"], ["--pretrain"], ["--quantize", "--partial_ckpt", "--load_ckpt"]]
)
def test_muon_from_a_checkpoint_is_one_line(runs, tmp_path, error_line, start):
    source = [runs["float"] / "ckpt_3"] if start[-1] == "--load_ckpt" else []
    argv = [*start, *source, *FLAGS, "--m", "vanilla_cnn", "--optimizer", "muon"]
    line = error_line(train.main, [*argv, "--od", tmp_path])
    assert "--optimizer muon" in line
    assert line.endswith("use sgd or adamw")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_flags_unless_they_are_given_again(runs, tmp_path):
    own = resolved("--resume", str(runs["float"]), model=())
    assert (own.model, own.dataset, own.batch_size, own.num_epochs, own.lr, own.seed) == (
        "vanilla_cnn",
        "digits",
        16,
        3,
        0.05 * 16 / 128,
        0,
    )
    again = ["--lr", "0.007", "--num_epochs", "5"]
    given = resolved("--resume", str(runs["float"]), *again, model=())
    assert (given.lr, given.num_epochs, given.batch_size) == (0.007, 5, 16)


def test_lr_on_the_command_line_wins_over_the_resumed_checkpoint(runs, tmp_path):
    copy = part_of_run(runs["float"], tmp_path / "run", 2)
    train.main(["--resume", str(copy), "--lr", "1e-4", "--lrdt", "100"])
    groups = ckpt.load(copy / "ckpt_3").optimizer["param_groups"]
    assert [group["lr"] for group in groups] == [1e-4, 1e-4]
    assert changed(ckpt.load(copy / "ckpt_3").state, ckpt.load(runs["float"] / "ckpt_3").state)


def test_a_finished_run_can_be_resumed_for_more_epochs(runs, tmp_path):
    copy = part_of_run(runs["float"], tmp_path / "run", 3)
    train.main(["--resume", str(copy), "--num_epochs", "4"])
    last = ckpt.load(copy / "ckpt_4")
    assert (last.epoch, len(last.history)) == (4, 4)


def test_a_finished_run_that_is_resumed_says_that_it_is_done(runs, tmp_path, capsys):
    copy = part_of_run(runs["float"], tmp_path / "run", 3)
    files = sorted(path.name for path in copy.iterdir())
    train.main(["--resume", str(copy), "--num_epochs", "2"])
    assert "3 epochs are done: a larger --num_epochs" in capsys.readouterr().out
    assert sorted(path.name for path in copy.iterdir()) == files


def test_resuming_with_another_optimizer_is_one_line(runs, tmp_path, error_line):
    copy = part_of_run(runs["float"], tmp_path / "run", 2)
    assert "--optimizer" in error_line(train.main, ["--resume", copy, "--optimizer", "adamw"])


def test_resuming_from_within_a_longer_run_is_one_line(runs, tmp_path, error_line):
    copy = part_of_run(runs["float"], tmp_path / "run", 3)
    before = sorted(copy.iterdir())
    assert f"the run went on to {copy}/ckpt_3" in error_line(
        train.main, ["--resume", copy / "ckpt_2"]
    )
    assert sorted(copy.iterdir()) == before


def test_a_checkpoint_by_itself_can_be_resumed(runs, tmp_path):
    """Copied elsewhere under any name."""
    for name in ("ckpt_2", "other"):
        (tmp_path / name).mkdir()
        copy = Path(shutil.copy(runs["float"] / "ckpt_2", tmp_path / name / name))
        train.main(["--resume", str(copy)])
        assert {path.name for path in copy.parent.iterdir()} >= {"ckpt_3", "ckpt_best"}
        assert_same(
            ckpt.load(copy.parent / "ckpt_3").state, ckpt.load(runs["float"] / "ckpt_3").state
        )


def test_a_checkpoint_that_is_not_the_best_can_be_resumed_without_it(runs, tmp_path):
    content = ckpt.load(runs["float"] / "ckpt_2")
    content.best_val_loss = 0.0  # no epoch to come is better
    ckpt.save(tmp_path / "ckpt_2", content)
    train.main(["--resume", str(tmp_path)])
    history = ckpt.load(tmp_path / "ckpt_3").history
    best = min((2, 3), key=lambda epoch: history[epoch - 1]["val_loss"])
    assert ckpt.load(tmp_path / "ckpt_best").epoch == best


def test_two_processes_cannot_train_in_one_folder(runs, tmp_path, error_line):
    copy = part_of_run(runs["float"], tmp_path / "run", 2)
    with locked(copy):
        line = error_line(train.main, ["--resume", copy])
    assert (
        line == f"error: another process is at work in {copy}: wait for it, or name another folder"
    )
    train.main(["--resume", str(copy)])


def test_resuming_a_float_run_as_qat_is_one_line(runs, tmp_path, error_line):
    copy = part_of_run(runs["float"], tmp_path / "run", 2)
    assert "QAT starts with --load_ckpt" in error_line(train.main, ["--resume", copy, "--quantize"])


@pytest.mark.parametrize(
    "flags", [["--resume", "{}"], ["--resume", "{}/none"], ["--load_ckpt", "{}/ckpt_best"]]
)
def test_nothing_to_start_from_is_one_line(tmp_path, error_line, flags):
    line = error_line(train.main, [flag.format(tmp_path) for flag in flags])
    assert str(tmp_path) in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_a_checkpoint_is_told_what_it_holds(runs, error_line):
    assert f"{runs['float']} holds ckpt_1, ckpt_2, ckpt_3, ckpt_best" in error_line(
        train.main, ["--load_ckpt", runs["float"]]
    )


# what training changes


def test_batch_norm_statistics_stay_in_qat(runs):
    states = checkpoints(runs["qat"])
    for suffix in ("running_mean", "running_var", "num_batches_tracked"):
        statistics = [tensors(state, suffix) for state in states.values()]
        assert len(statistics[0]) == 6
        assert all(changed(statistics[0], later) == set() for later in statistics[1:])


def test_batch_norm_statistics_move_in_every_float_epoch(runs):
    states = checkpoints(runs["float"])
    assert list(states) == [1, 2, 3]
    for epoch in (1, 2):
        before, after = (
            tensors(states[index], "running_mean", "running_var") for index in (epoch, epoch + 1)
        )
        assert changed(before, after) == before.keys()


def test_float_fine_tuning_freezes_batch_norm_statistics_as_qat_does(runs, tmp_path):
    argv = [
        *arguments("float", None, 3),
        "--load_ckpt",
        runs["float"] / "ckpt_3",
        "--od",
        tmp_path,
        "--en",
        "run",
    ]
    train.main(list(map(str, argv)))
    first = tensors(checkpoints(runs["float"])[3], "running_mean", "running_var")
    for state in checkpoints(tmp_path / "run").values():
        assert changed(first, tensors(state, "running_mean", "running_var")) == set()


@pytest.mark.parametrize("mode", ["float", "qat"])
def test_every_parameter_trains_in_every_epoch(runs, mode):
    states = checkpoints(runs[mode])
    for epoch in list(states)[:-1]:
        before, after = (tensors(states[index], "weight", "bias") for index in (epoch, epoch + 1))
        assert len(before) == 6 + 2 * 6 + 2
        assert changed(before, after) == before.keys()


def test_ranges_stay_fixed_in_qat(runs):
    states = checkpoints(runs["qat"])
    ranges = tensors(states[0], "_amax")
    assert len(ranges) == 15
    assert all((amax > 0).all() and amax.isfinite().all() for amax in ranges.values())
    assert all(changed(ranges, tensors(states[epoch], "_amax")) == set() for epoch in (1, 2, 3))


def test_ckpt_best_is_the_last_of_the_epochs_with_the_lowest_val_loss(tmp_path):
    model = nn.Linear(2, 2)
    run = train.Run(tmp_path, model, train.make_optimizer(model, "sgd"), ckpt.Checkpoint({}))
    best = []
    for epoch, loss in enumerate([math.inf, 0.7, 0.4, 0.6, 0.4, 0.5]):
        run.epoch = epoch
        run.save(loss)
        run.wait()
        content = ckpt.load(tmp_path / "ckpt_best")
        best.append((content.epoch, content.best_val_loss))
        assert ckpt.load(tmp_path / f"ckpt_{epoch}").epoch == epoch
    assert best == [(0, math.inf), (1, 0.7), (2, 0.4), (2, 0.4), (4, 0.4), (4, 0.4)]


def test_a_val_loss_that_is_no_number_is_never_the_best(tmp_path):
    model = nn.Linear(2, 2)
    run = train.Run(tmp_path, model, train.make_optimizer(model, "sgd"), ckpt.Checkpoint({}))
    for epoch, loss in enumerate([2.0, math.nan, 3.0, 1.0, 1.5]):
        run.epoch = epoch
        run.save(loss)
    run.close()
    assert (ckpt.load(tmp_path / "ckpt_best").epoch, run.best_val_loss) == (3, 1.0)


def test_ckpt_best_is_half_a_checkpoint_and_no_place_to_resume_from(runs, error_line):
    best = ckpt.load(runs["float"] / "ckpt_best")
    whole = ckpt.load(runs["float"] / f"ckpt_{best.epoch}")
    assert best.optimizer is None
    whole.optimizer = None
    assert_same(vars(best), vars(whole))
    alone = runs["float"] / "ckpt_best"
    sizes = [path.stat().st_size for path in (alone, runs["float"] / "ckpt_3")]
    assert sizes[0] < 0.6 * sizes[1]


def test_what_is_saved_is_as_it_was_then_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, "sgd")
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = copy.deepcopy([dict(model.state_dict()), optimizer.state_dict()])
    changed = threading.Event()
    save = ckpt.save

    def late(path, checkpoint):
        assert changed.wait(10)
        save(path, checkpoint)

    monkeypatch.setattr(ckpt, "save", late)
    run = train.Run(tmp_path, model, optimizer, ckpt.Checkpoint({}))
    run.save(1.0)
    optimizer.step()
    run.history.append({"val_loss": 0.5})
    changed.set()
    run.close()
    saved = ckpt.load(tmp_path / "ckpt_0")
    assert_same([saved.state, saved.optimizer, saved.history], [*before, []])


def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_epochs_before(tmp_path, error_line):
    full = OSError(errno.ENOSPC, "No space left on device", "ckpt_2")
    save = ckpt.save

    def fail(path, checkpoint):
        if checkpoint.epoch == 2:
            raise full
        save(path, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ckpt, "save", fail)
        line = error_line(train.main, [*arguments("float", None), "--od", tmp_path, "--en", "run"])
    assert "No space left on device" in line
    assert names(tmp_path / "run") == {"ckpt_1", "ckpt_best"}
    assert ckpt.load(tmp_path / "run" / "ckpt_1").epoch == 1


@pytest.mark.parametrize(("keep", "left"), [(1, {4}), (2, {3, 4}), (9, {0, 1, 2, 3, 4})])
def test_of_earlier_epochs_as_many_stay_as_are_to_be_kept(tmp_path, keep, left):
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, "sgd")
    run = train.Run(tmp_path, model, optimizer, ckpt.Checkpoint({}), keep=keep)
    for epoch in range(5):
        run.epoch = epoch
        run.save(1.0 + epoch)
    run.close()
    assert set(ckpt.by_epoch(tmp_path)) == left
    assert ckpt.load(tmp_path / "ckpt_best").epoch == 0


def test_a_best_checkpoint_alone_says_that_it_has_no_optimizer(runs, tmp_path, error_line):
    copy = Path(shutil.copy(runs["float"] / "ckpt_best", tmp_path / "other"))
    assert "no optimizer state" in error_line(train.main, ["--resume", copy])


def test_an_optimizer_of_another_shape_is_one_line(runs, tmp_path, error_line):
    checkpoint = ckpt.load(runs["float"] / "ckpt_3")
    for spoil in (
        lambda state: state["param_groups"].pop(),
        lambda state: state.pop("state"),
        lambda state: state["state"][0].update(momentum_buffer=torch.zeros(1).expand(1 << 40)),
        lambda state: state["state"][0].update(momentum_buffer="nonsense"),
    ):
        spoilt = copy.deepcopy(checkpoint)
        spoil(spoilt.optimizer)
        ckpt.save(tmp_path / "ckpt_3", spoilt)
        argv = ["--resume", tmp_path, "--num_epochs", "4"]
        assert "optimizer state does not fit" in error_line(train.main, argv)


def respoilt(folder, copy, **changes):
    """A copy of a run's last checkpoint with other contents."""
    content = torch.load(folder / "ckpt_3", weights_only=True)
    copy.mkdir()
    torch.save({**content, **changes}, copy / "ckpt_3")
    return copy


@pytest.mark.parametrize(
    "name", [field.name for field in fields(recipe.Recipe) if field.name not in ("kind", "compile")]
)
def test_a_recipe_of_other_types_is_one_line(runs, tmp_path, error_line, name):
    stored = ckpt.load(runs["float"] / "ckpt_3").recipe
    for number, wrong in enumerate(([None], {"a": 1}, torch.ones(2), 10**400)):
        if name in ("quantization", "comparison"):
            continue  # made of the flags of their own fields
        changed = {**stored, name: wrong}
        copy = respoilt(runs["float"], tmp_path / str(number), recipe=changed)
        line = error_line(train.main, ["--resume", copy])
        assert name in line, wrong


@pytest.mark.parametrize("name", ["quant_layers", "calib_images", "precisions", "batch_sizes"])
def test_a_recipes_engines_and_layers_of_other_types_are_one_line(runs, tmp_path, error_line, name):
    stored = ckpt.load(runs["qat"] / "ckpt_3").recipe
    for number, wrong in enumerate((torch.ones(2), {"a": 1}, "*")):
        copy = respoilt(runs["qat"], tmp_path / str(number), recipe={**stored, name: wrong})
        assert name in error_line(train.main, ["--resume", copy])


@pytest.mark.parametrize("part", ["state", "ptq_state"])
def test_a_resumed_qat_run_lacks_no_range_and_holds_what_an_export_needs(
    runs, tmp_path, error_line, part
):
    whole = getattr(ckpt.load(runs["qat"] / "ckpt_3"), part)
    key = "fc.weight_quantizer._amax"
    lacking = {name: value for name, value in whole.items() if name != key}
    for number, (state, said) in enumerate(
        [
            (lacking, f"1 missing: {key}"),
            ({**whole, key: -whole[key]}, f"1 not above 0: {key}"),
            ({**whole, "fc.weight": whole["fc.weight"].to(torch.int8)}, "1 of another type"),
            ({**whole, "more": torch.ones(1)}, "1 unexpected: more"),
        ]
    ):
        copy = respoilt(runs["qat"], tmp_path / str(number), **{part: state})
        argv = ["--resume", copy, "--num_epochs", "4"]
        assert said in error_line(train.main, argv)


def test_a_resume_reads_its_checkpoint_after_it_has_the_lock(runs, tmp_path, monkeypatch):
    copy = part_of_run(runs["float"], tmp_path / "run", 2)

    def read(_):
        with pytest.raises(UserError, match="another process is at work"), locked(copy):
            pass
        raise UserError("as expected")

    monkeypatch.setattr(train, "load_to_resume", read)
    for start in (copy, copy / "ckpt_2"):
        with pytest.raises(UserError, match="as expected"):
            train.main(["--resume", str(start)])


@pytest.mark.parametrize("flags", [["--od", "x"], ["--en", "x"], ["--pretrain"], ["--list_layers"]])
def test_flags_that_a_resumed_run_would_ignore_are_refused(runs, error_line, flags):
    assert "drop" in error_line(train.main, ["--resume", runs["float"], *flags])


def test_a_resumed_run_names_its_engines_anew_and_finds_moved_images(runs, tmp_path):
    checkpoint = ckpt.load(runs["float"] / "ckpt_3")
    checkpoint.recipe |= {"test_trt": True, "precisions": ["FP16"], "data_dir": "/gone/data"}
    ckpt.save(tmp_path / "ckpt_3", checkpoint)
    for flags, precisions in (([], ["FP16"]), (["--INT8PTC"], ["INT8-PTC"])):
        recipe, _ = train.read_flags(["--resume", str(tmp_path), *flags])
        assert recipe.comparison.precisions == precisions
        assert recipe.data_dir == Path("data")


def test_fine_tuning_that_collapses_leaves_the_calibrated_network(runs, tmp_path, capsys):
    argv = arguments("qat", runs["float"] / "ckpt_3", epochs=2)
    train.main([*argv, "--lr", "3", "--od", str(tmp_path), "--en", "run"])
    assert "QAT ended below the calibrated network" in capsys.readouterr().out
    assert ckpt.load(tmp_path / "run" / "ckpt_best").epoch == 0


def test_a_stem_that_a_network_has_not_is_refused(tmp_path, error_line):
    argv = ["--m", "vanilla_cnn", *FLAGS, "--stem", "imagenet", "--od", tmp_path]
    assert "vanilla_cnn has no other stem" in error_line(train.main, argv)


def test_a_short_run_is_evaluated_with_the_statistics_of_its_own_weights(tmp_path):
    """Running averages of six steps would still be those of the initialisation."""
    argv = ["--m", "vanilla_cnn", *FLAGS, "--num_epochs", "2", "--od", str(tmp_path)]
    train.main([*argv, "--en", "run"])
    trained = ckpt.load(tmp_path / "run" / "ckpt_2")
    data = dataset.load("digits", tmp_path)
    (images, _), _ = data.split(trained.data.split_seed)
    x = normalised(images, trained.data.mean, trained.data.std)
    seen = F.conv2d(x, trained.state["features.0.weight"], padding=1)
    for name, expected in (("mean", seen.mean((0, 2, 3))), ("var", seen.var((0, 2, 3)))):
        estimated = trained.state[f"features.1.running_{name}"]
        assert (estimated - expected).norm() < 0.05 * expected.norm()


def test_a_last_batch_of_one_image_has_no_statistics(tmp_path):
    """ResNet's last layers see a single pixel of these images."""
    argv = "--m resnet18 --stem imagenet --dataset digits --batch_size 49 --num_epochs 1"
    train.main([*argv.split(), "--od", str(tmp_path)])
    state = ckpt.load(tmp_path / "pytorch_exp" / "ckpt_1").state
    assert all(value.isfinite().all() for value in state.values())


def test_a_batch_size_above_the_data_set_is_what_the_rate_follows(tmp_path):
    for size in ("50", "5000"):
        argv = f"--m vanilla_cnn --dataset digits --num_epochs 1 --od {tmp_path} --en {size}"
        train.main([*argv.split(), "--batch_size", size])
    small, large = (ckpt.load(tmp_path / size / "ckpt_1").recipe for size in ("50", "5000"))
    assert (large["batch_size"], large["lr"]) == (small["batch_size"], small["lr"])


def test_a_link_in_a_runs_folder_is_replaced_not_followed(runs, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = part_of_run(runs["float"], tmp_path / "run", 2)
    (folder / "ckpt_best").unlink()
    (folder / "ckpt_best").symlink_to(precious)
    train.main(["--resume", str(folder)])
    assert precious.read_text() == "mine"
    assert not (folder / "ckpt_best").is_symlink()


@pytest.mark.parametrize("mode", ["float", "qat"])
def test_history_holds_what_each_epochs_network_does_on_the_val_images(runs, mode, digits):
    _, val = dataset.split_train(digits.train_labels[:60], 0)
    for content in (content for epoch, content in checkpoints(runs[mode]).items() if epoch):
        info = content.data
        size = tuple(info.img_size)
        if mode == "qat":
            model = networks.build_quantized(content.network, content.quantization, size)
        else:
            model = networks.build_float(content.network, size)
        model.eval().load_state_dict(content.state)
        images = normalised(digits.train_images[val, ::2, ::2], info.mean, info.std)
        with torch.no_grad():
            logits = model(images).double().numpy()
        labels, past = digits.train_labels[val], content.history[-1]
        losses = np.log(np.exp(logits).sum(1)) - logits[range(len(labels)), labels]
        assert past["val_accuracy_pct"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
        # images are normalised in another order here: beside a tie that is another code
        tolerance = 1e-4 if mode == "float" else 1e-2
        assert past["val_loss"] == pytest.approx(losses.mean(), rel=tolerance)
        assert content.best_val_loss == min(past["val_loss"] for past in content.history)


def test_ckpt_0_of_a_qat_run_is_the_float_network_with_ranges(runs):
    state, source = ckpt.load(runs["qat"] / "ckpt_0"), ckpt.load(runs["float"] / "ckpt_3")
    assert (state.epoch, state.history) == (0, [])
    assert_same({key: state.state[key] for key in source.state}, dict(source.state))
    assert_same(state.ptq_state, dict(state.state))


def test_no_epochs_of_quantized_training_calibrate_only(runs, tmp_path, capsys):
    train.main(
        [
            *arguments("qat", runs["float"] / "ckpt_3", epochs=0),
            "--od",
            str(tmp_path),
            "--en",
            "run",
        ]
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ckpt_0", "ckpt_best"]
    assert_same(
        ckpt.load(tmp_path / "run" / "ckpt_0").state, ckpt.load(runs["qat"] / "ckpt_0").state
    )
    assert "ckpt_best is epoch 0: test accuracy" in capsys.readouterr().out


def test_no_epochs_of_float_training_are_refused(tmp_path, error_line):
    assert "--num_epochs 0: at least 1" in error_line(
        train.main, [*arguments("float", None, epochs=0), "--od", tmp_path]
    )


@pytest.mark.parametrize("mode", ["float", "qat"])
def test_checkpoint_holds_what_rebuilds_and_continues_the_run(runs, mode):
    for path in runs[mode].glob("ckpt_[0-9]"):
        content = torch.load(path, weights_only=True)
        assert content["format"] == ckpt.FORMAT
        assert content["network"] == {"name": "vanilla_cnn", "stem": "cifar", "num_classes": 10}
        assert content["data"]["dataset"] == "digits"
        assert content["data"]["classes"] == list("0123456789")
        assert (content["data"]["img_size"], content["data"]["split_seed"]) == ([16, 16], 0)
        assert content["recipe"]["seed"] == 0
        assert content["quantization"] == (
            None
            if mode == "float"
            else {
                "quant_layers": ["*"],
                "skip_layers": [],
                "calibrator": "sqnr",
                "calib_images": 50,  # all there are
            }
        )
        assert set(content["optimizer"]) == {"state", "param_groups"}
        assert len(content["history"]) == content["epoch"]
        assert content["recipe"]["batch_size"] == 16


def test_runs_of_different_seeds_differ_and_record_their_seed(runs, tmp_path):
    train.main(
        [*arguments("float", None, epochs=1), "--seed", "5", "--od", str(tmp_path), "--en", "run"]
    )
    content = ckpt.load(tmp_path / "run" / "ckpt_1")
    assert (content.recipe["seed"], content.data.split_seed) == (5, 5)
    assert content.history[0]["loss"] != ckpt.load(runs["float"] / "ckpt_1").history[0]["loss"]


@pytest.mark.parametrize("seed", ["-1", "100000000000000000000"])
def test_impossible_seed_is_one_line(tmp_path, error_line, seed):
    assert "--seed" in error_line(
        train.main, [*arguments("float", None, epochs=1), "--seed", seed, "--od", tmp_path]
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--batch_size", "0"), ("--lrdt", "0"), ("--calib_images", "0"), ("--lr", "-1")],
)
def test_senseless_number_is_one_line(tmp_path, error_line, flag, value):
    line = error_line(
        train.main,
        [*arguments("float", None, epochs=1), "--test_trt", flag, value, "--od", tmp_path],
    )
    assert f"{flag} {value}" in line
    assert list(tmp_path.iterdir()) == []


# unlucky ends


def test_a_loss_that_is_not_finite_ends_the_first_epoch_without_a_checkpoint(tmp_path, error_line):
    line = error_line(train.main, [*arguments("float", None), "--lr", "1e30", "--od", tmp_path])
    assert "--lr than 1e+30" in line
    assert line.endswith("no checkpoint was written yet")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_no_recorded_step_behind(tmp_path, monkeypatch):
    """NCCL's communicators wait for their graphs, and an exception keeps the frames it passed."""
    steps = []

    class Recorded(training.Step):
        def __call__(self, images, labels):
            super().__call__(images, labels)
            self.graph = "recorded"
            steps.append(self)

    monkeypatch.setattr(train, "Step", Recorded)
    with pytest.raises(UserError, match="--lr than 1e"):
        train.main([*arguments("float", None), "--lr", "1e30", "--od", str(tmp_path)])
    assert steps
    assert {step.graph for step in steps} == {None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("optimizer", "sam_rho"),
    [("sgd", 0.0), ("muon", 0.0), ("muon", 0.05)],
    ids=["sgd", "muon", "sam"],
)
def test_a_recorded_step_does_what_an_eager_one_does(monkeypatch, optimizer, sam_rho):
    torch.manual_seed(0)
    device, model = torch.device("cuda"), models.build("vanilla_cnn", 10, "cifar")
    batches = [
        (torch.randn(64, 3, 32, 32, device=device), torch.randint(10, (64,), device=device))
        for _ in range(8)
    ]
    totals, states = [], []
    for eager_steps in (training.EAGER_STEPS, len(batches)):
        monkeypatch.setattr(training, "EAGER_STEPS", eager_steps)
        trained = copy.deepcopy(model).to(device, memory_format=torch.channels_last).train()
        step = training.Step(trained, make_optimizer(trained, optimizer), 0.1, sam_rho)
        for images, labels in batches:
            step.set_lr(0.01)
            step(images, labels)
        assert (step.graph is None) == (eager_steps == len(batches))
        totals.append(step.totals())
        states.append(trained.state_dict())
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)
    for name, recorded in states[0].items():
        eager = states[1][name].float()
        assert (recorded.float() - eager).norm() <= 1e-3 * eager.norm(), name


@pytest.mark.parametrize("resumed", [False, True])
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    runs, tmp_path, error_line, resumed
):
    folder = tmp_path / "run"
    if resumed:
        part_of_run(runs["float"], folder, 2)
        argv = ["--resume", folder]
    else:
        argv = [*arguments("qat", runs["float"] / "ckpt_3"), "--od", tmp_path, "--en", "run"]
    line = error_line(train.main, [*argv, "--lr", "1e30"])
    assert line.endswith(
        f"the last good checkpoint is {folder / ('ckpt_2' if resumed else 'ckpt_0')}"
    )
    assert sorted(path.name for path in folder.iterdir()) == (
        ["ckpt_1", "ckpt_2", "ckpt_best"] if resumed else ["ckpt_0", "ckpt_best"]
    )
    for path in folder.iterdir():
        assert all(value.isfinite().all() for value in ckpt.load(path).state.values())


@pytest.mark.slow
def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path, small_cifar10, failure_line):
    argv = [
        "--m",
        "vanilla_cnn",
        "--data_dir",
        small_cifar10,
        "--num_epochs",
        "1000",
        "--od",
        tmp_path,
    ]
    folder = tmp_path / "pytorch_exp"
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background job's children ignore it otherwise
    )
    try:
        give_up = time.monotonic() + 60
        while (
            not (folder / "ckpt_best").exists()
            and process.poll() is None
            and time.monotonic() < give_up
        ):
            time.sleep(0.05)
        time.sleep(0.3)  # into the second epoch
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (
        failure_line(process, stderr)
        == f"error: interrupted; continue with: python train.py --resume {folder}"
    )
    assert all(path.name.startswith("ckpt_") for path in folder.iterdir())
    assert ckpt.load(ckpt.latest(folder)).epoch >= 1
