"""Two ranks, on the CPU through gloo, train what one process trains on the same batches."""

import copy
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from conftest import ROOT, plain_net
from torch import nn

import train
from dataset.batches import Batches
from layers import Normalize
from utils import checkpoint as ckpt
from utils.errors import UserError
from utils.training import ranks as distributed
from utils.training.optimizers import Muon, make_optimizer
from utils.training.step import Step

# a rate so low that later steps do not amplify the rounding of earlier ones
FLAGS = ["--batch_size", "16", "--lr", "1e-5", "--keep", "9"]


def part(tensor, rank):
    half = len(tensor) // 2
    return tensor[rank * half : (rank + 1) * half]


# what each of two ranks runs


def two_ranks(rank, ports, folder, data):
    """All of it in one process, because each takes seconds to start."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(ports[0])
    with distributed.started() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.device.type) == (rank, 2, "cpu")
        assert distributed.from_first(lambda: f"rank {rank}") == "rank 0"
        # what fails on the first alone is no riddle to the others
        with pytest.raises(UserError, match="cannot read or write /x"):
            distributed.from_first(lambda: cannot_write(rank))
        statistics_become_the_ranks_mean(rank)
        muon_shares_its_matrices(rank)
        steps_equal_the_textbook_loop(rank)
    assert not distributed.active()
    refused = (
        (["--batch_size", "15"], "15 is not a multiple of the 2 ranks"),
        (["--batch_size", "2"], "2 images for 2 ranks, which need two each"),
        (["--sync_batchnorm"], "needs GPUs"),
    )
    for port, (flags, said) in zip(ports[1:], refused, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        # one rank of a host says what is wrong for all
        kind, match = (UserError, f"{flags[0]}.*{said}") if rank == 0 else (SystemExit, "1")
        with pytest.raises(kind, match=match):
            train.main(["--m", "vanilla_cnn", "--data_dir", str(data), *flags, "--od", str(folder)])


def cannot_write(rank):
    assert rank == 0
    raise OSError(errno.ENOSPC, "No space left on device", "/x")


def statistics_become_the_ranks_mean(rank):
    """Each rank's BatchNorm has its own until then."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    model[0].running_mean += torch.tensor([1.0, 2.0]) * (1 + rank)
    model[0].running_var += rank
    distributed.average_statistics(model)
    assert model[0].running_mean.tolist() == [1.5, 3.0]
    assert model[0].running_var.tolist() == [1.5, 1.5]


def steps_equal_the_textbook_loop(rank):
    torch.manual_seed(0)
    single = plain_net()
    reference = make_optimizer(single, "sgd")
    torch.manual_seed(rank)
    model = distributed.share_model(plain_net(), sync_batchnorm=False)  # rank 0's weights
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), single.parameters(), strict=True)
    )
    optimizer = make_optimizer(model, "sgd")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    served = [
        Batches(
            images,
            np.arange(40) % 4,
            Normalize([0.5] * 3, [0.25] * 3),
            12,
            torch.device("cpu"),
            augment=True,
            mirror_and_cutout=True,
            rank=own_rank,
            world_size=world_size,
        )
        for own_rank, world_size in ((rank, 2), (0, 1))
    ]
    for lr, sam_rho in ((0.05, 0.0), (0.02, 0.0), (0.02, 0.01)):
        step = Step(model, optimizer, 0.1, sam_rho)
        torch.manual_seed(7)
        mine = list(served[0])
        torch.manual_seed(7)
        losses, hits = [], 0
        for (own_images, own_labels), (images, labels) in zip(mine, served[1], strict=True):
            step.set_lr(lr)
            step(own_images, own_labels)
            for group in reference.param_groups:
                group["lr"] = lr
            logits = single(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            loss.backward()
            if sam_rho:
                before = {key: value.clone() for key, value in single.state_dict().items()}
                for p in single.parameters():
                    p.data += (p.ndim > 1) * sam_rho * p.norm() * p.grad / p.grad.norm()
                reference.zero_grad()
                F.cross_entropy(single(images), labels, label_smoothing=0.1).backward()
                single.load_state_dict(
                    before
                )  # weights, and the statistics that the second pass moved
            reference.step()
            reference.zero_grad()
            losses.append(loss.item())
            hits += (logits.argmax(1) == labels).sum().item()
        loss, accuracy = step.totals()
        assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert accuracy == pytest.approx(100 * hits / 36)
        for (key, one), other in zip(
            model.state_dict().items(), single.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(
                one, other, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
            copies = [torch.empty_like(one) for _ in range(2)]
            dist.all_gather(copies, one)
            assert torch.equal(*copies)  # to the last bit, or ranks would drift apart
        step.close()


def muon_shares_its_matrices(rank):
    """Three kernels for two ranks, of which each turns its own; all get what one process gives."""
    torch.manual_seed(0)
    alone = [
        nn.Parameter(torch.randn(shape)) for shape in ((8, 4, 3, 3), (6, 8, 1, 1), (8, 8, 1, 1))
    ]
    together = copy.deepcopy(alone)
    for kernels in (alone, together):
        for p in kernels:
            p.grad = torch.sin(p.detach())
    shares = {"world_size": lambda: 1, "rank": lambda: 0, "gather": lambda part: part}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shares.items():
            patch.setattr(distributed, name, value)
        one_step(alone)
    one_step(together)
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)  # bf16's rounding


def one_step(kernels):
    optimizer = Muon([{"params": kernels, "lr": 0.1}], momentum=0.9)
    optimizer.step()


# tests


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for server in sockets:
        server.bind(("localhost", 0))
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    """Folder with 74 train (64 after the split) and 20 test digits as a CIFAR-10 archive."""
    folder = tmp_path_factory.mktemp("cifar10")
    arrays = {"x_train": digits.train_images[:74], "y_train": digits.train_labels[:74]}
    np.savez(
        folder / "cifar10.npz",
        **arrays,
        x_test=digits.test_images[:20],
        y_test=digits.test_labels[:20],
    )
    return folder


def start_torchrun(*argv):
    """Two ranks with one thread each."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
        *map(str, argv),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """(ranks, mode) -> folder of a run; QAT starts from the one process's float checkpoint."""
    parent = tmp_path_factory.mktemp("runs")
    network = ["--model", "conftest:plain_net", "--data_dir", data, *FLAGS]
    float_flags = [*network, "--num_epochs", "1"]
    start = parent / "float_1" / "ckpt_best"
    qat_flags = [*network, "--quantize", "--partial_ckpt", "--load_ckpt", start]
    qat_flags += ["--num_epochs", "3"]
    processes = []
    try:
        for mode, flags in (
            ("float", float_flags),
            ("qat", qat_flags),
        ):  # at the same time: they spend it on starting
            processes.append(start_torchrun(*flags, "--od", parent, "--en", f"{mode}_2"))
            train.main([*map(str, flags), "--od", str(parent), "--en", f"{mode}_1"])
        for process in processes:
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
            assert stdout.count("experiment folder") == stdout.count("ckpt_best is epoch") == 1
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks too
    return {
        (ranks, mode): parent / f"{mode}_{ranks}" for ranks in (1, 2) for mode in ("float", "qat")
    }


def assert_close(mine, theirs, tolerance):
    """Relative to the length of each tensor."""
    assert mine.keys() == theirs.keys()
    for key, one in mine.items():
        difference = (one.double() - theirs[key].double()).norm()
        assert difference <= tolerance * theirs[key].double().norm(), key


def gradients(checkpoint):
    """The momentum: it says far more of the gradients than weights that a low rate hardly moves."""
    return {
        str(key): value["momentum_buffer"] for key, value in checkpoint.optimizer["state"].items()
    }


def test_ranks_step_as_one_process_and_refuse_a_batch_they_cannot_share(tmp_path, data):
    torch.multiprocessing.spawn(two_ranks, (free_ports(4), tmp_path, data), nprocs=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_mistake_of_all_ranks_or_of_the_first_is_said_once(tmp_path, data):
    (tmp_path / "file").touch()
    flags = ["--model", "vanilla_cnn", "--data_dir", data, *FLAGS]
    for wrong, said in (
        (["--load_ckpt", "/nowhere"], "error: no checkpoint at /nowhere"),
        (["--od", tmp_path / "file"], f"error: cannot read or write {tmp_path}/file: File exists"),
    ):
        process = start_torchrun(*flags, *wrong)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode != 0
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert lines[0].startswith(said)
        # torchrun has a traceback of its own
        assert "train.py" not in stderr.split("Traceback")[0].replace(lines[0], "")
        assert "[rank" not in stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_is_one_line_that_says_how_to_go_on(tmp_path, data):
    flags = ["--model", "vanilla_cnn", "--data_dir", data, *FLAGS, "--num_epochs", "900"]
    process = start_torchrun(*flags, "--od", tmp_path, "--en", "run")
    try:
        deadline = time.monotonic() + 100
        while not list((tmp_path / "run").glob("ckpt_[0-9]*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(rank_process(process, 1), signal.SIGKILL)
        _, stderr = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    hint = f"torchrun --nproc_per_node=2 train.py --resume {tmp_path}/run"
    # torchrun ends the other rank, which may not yet have missed this one
    said = [
        f"error: {what}; continue with: {hint}"
        for what in ("another rank has ended", "interrupted")
    ]
    assert len(lines) == 1
    assert lines[0] in said
    assert "utils/" not in stderr


STUCK = """
import ctypes, os
from utils import errors
from utils.training import ranks

def wait_for_ever():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("waiting", flush=True)
    libc.pthread_mutex_lock(mutex)

def main():
    with ranks.started():
        wait_for_ever()

ranks.GRACE_S = 0.5
errors.run(main)
"""


def test_a_rank_that_waits_in_c_for_a_dead_one_ends_when_it_is_told_to():
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_ports(1)[0])}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.5)  # until it does
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    what = "told to end, but still waiting for a rank that may be gone"
    assert f"error: {what}; go on with --resume and the run's folder\n" in stderr


def rank_process(process, rank):
    """The id of the process of a rank that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"\0LOCAL_RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError("no such rank")


@pytest.mark.slow
def test_only_the_first_rank_writes(runs):
    parent = runs[1, "float"].parent
    assert {path.name for path in parent.iterdir()} == {"float_1", "float_2", "qat_1", "qat_2"}
    for mode in ("float", "qat"):
        assert {path.name for path in runs[2, mode].iterdir()} == {
            path.name for path in runs[1, mode].iterdir()
        }


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does(runs):
    one, two = (ckpt.load(runs[ranks, "float"] / "ckpt_1") for ranks in (1, 2))
    assert len(gradients(one)) == 6
    assert_close(
        gradients(two), gradients(one), 1e-2
    )  # roundings grow through steps; a wrong mean would be off by far more
    for biases, tolerance in (
        (False, 1e-4),
        (True, 1e-2),
    ):  # biases start at 0: they are their gradients, and no more exact
        part = {key: value for key, value in one.state.items() if key.endswith("bias") == biases}
        assert_close({key: two.state[key] for key in part}, part, tolerance)
    assert two.history[0]["loss"] == pytest.approx(one.history[0]["loss"], rel=1e-5)
    for key in ("train_accuracy_pct", "val_accuracy_pct"):
        assert two.history[0][key] == one.history[0][key]
    for key in ("network", "data", "recipe", "epoch"):
        assert getattr(two, key) == getattr(one, key)


@pytest.mark.slow
def test_two_ranks_fine_tune_a_quantized_network_as_one_process_does(runs):
    """As closely as one process repeats itself with its last bits changed.

    Values beside a tie are then rounded the other way.
    """
    for epoch in range(4):
        one, two = (ckpt.load(runs[ranks, "qat"] / f"ckpt_{epoch}") for ranks in (1, 2))
        ranges = {key for key in one.state if key.endswith("_amax")}
        assert_close(
            {key: two.state[key] for key in ranges},
            {key: one.state[key] for key in ranges},
            1e-6,
        )
        rest = {key for key in one.state if key.endswith(("weight", "bias"))}
        assert_close(
            {key: two.state[key] for key in rest}, {key: one.state[key] for key in rest}, 1e-2
        )
        if epoch:
            a, b = (
                torch.cat([value.flatten() for value in gradients(run).values()])
                for run in (two, one)
            )
            assert (
                torch.cosine_similarity(a, b, dim=0) > 0.5
            )  # exactness is the float test's: roundings beside ties spread
            assert 0.7 < a.norm() / b.norm() < 1.4
            assert two.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], rel=1e-3)
