"""Training: schedules, exact resumption, what QAT changes and what it leaves alone, and how a run ends early."""

import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import dataset
import infer
import models
import train
from utils import checkpoint as ckpt
from utils.errors import UserError

FLAGS = ["--dataset", "digits", "--batch_size", "16"]
EPOCHS, STEPS = 3, 3  # 50 images in full batches of 16

pytestmark = pytest.mark.usefixtures("small_digits")


def arguments(mode, start, epochs=EPOCHS):
    if mode == "float":
        return ["--m", "vanilla_cnn", *FLAGS, "--num_epochs", str(epochs)]
    return ["--quantize", "--partial_ckpt", "--load_ckpt", str(start), *FLAGS, "--num_epochs", str(epochs)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_digits):
    """Mode -> folder of three uninterrupted epochs; QAT starts from the float run's ckpt_3."""
    parent = tmp_path_factory.mktemp("runs")
    for mode in ("float", "qat"):
        train.main([*arguments(mode, parent / "float" / "ckpt_3"), "--od", str(parent), "--en", mode])
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
    return {key: value for key, value in checkpoint["state"].items() if key.endswith(suffixes)}


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


# schedules


@pytest.mark.parametrize(("epochs", "rate"), [(0, 0.2), (9.99, 0.2), (10, 0.02), (19.5, 0.02), (20, 0.002), (35, 0.0002)])
def test_lrdt_divides_the_rate_by_ten_every_n_epochs(epochs, rate):
    assert train.make_schedule(0.2, 40, 10)(epochs) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("epochs", "share"),
    [
        (0, 0.01),
        (2, 0.01 + 0.99 / 2),
        (4, 1),  # a tenth of all epochs warms up
        (4 + 36 / 4, (1 + math.sqrt(0.5)) / 2),
        (22, 0.5),
        (4 + 36 * 2 / 3, 0.25),
        (40, 0),
    ],
)
def test_default_schedule_warms_up_linearly_and_decays_as_a_cosine(epochs, share):
    assert train.make_schedule(0.2, 40, None)(epochs) == pytest.approx(0.2 * share, abs=1e-12)


@pytest.mark.parametrize("mode", ["float", "qat"])
def test_each_step_uses_the_rate_of_its_share_of_the_epoch(runs, mode):
    peak = 0.05 if mode == "float" else 0.0005  # from a checkpoint, a hundredth
    for epoch, checkpoint in checkpoints(runs[mode]).items():
        progress = (epoch - 1 + (STEPS - 1) / STEPS) / EPOCHS  # of the epoch's last step
        expected = peak * 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))
        for group in checkpoint["optimizer"]["param_groups"]:
            assert group["lr"] == (pytest.approx(expected, rel=1e-9) if epoch else 0.0)


@pytest.mark.parametrize(("optimizer", "peak"), [("sgd", 0.05), ("adamw", 2e-3)])
def test_default_peak_rate_is_a_hundredth_from_a_checkpoint(runs, optimizer, peak):
    assert train.parse_flags(["--optimizer", optimizer])[0].lr == peak
    start = ["--load_ckpt", str(runs["float"] / "ckpt_3")]
    assert train.parse_flags(["--optimizer", optimizer, *start])[0].lr == pytest.approx(peak / 100)
    assert train.parse_flags(["--optimizer", optimizer, *start, "--lr", "0.3"])[0].lr == 0.3


def test_only_matrices_and_kernels_decay():
    model = models.build("vanilla_cnn", 10, "cifar")
    for name in ("sgd", "adamw"):
        groups = train.make_optimizer(model, name).param_groups
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        assert {key: decay[id(p)] for key, p in model.named_parameters()} == {
            key: 5e-4 if p.ndim > 1 else 0.0 for key, p in model.named_parameters()
        }


# resuming


def stop_in(monkeypatch, epoch):
    """Ctrl-C in the second step of an epoch, counted from 1."""
    original, calls = train.F.cross_entropy, 0

    def cross_entropy(*args):
        nonlocal calls
        calls += 1
        if calls == STEPS * (epoch - 1) + 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)


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
        assert len(whole["history"]) == whole["epoch"]
        for key in ("history", "state", "optimizer", "epoch", "best_accuracy_pct", "start", "model", "data", "quantization"):
            assert_same(resumed[key], whole[key], f"{name}.{key}")


def test_a_qat_run_stopped_in_its_first_epoch_resumes_from_its_calibration(runs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 1)
        with pytest.raises(UserError, match="--resume"):
            train.main([*arguments("qat", runs["float"] / "ckpt_3"), "--od", str(tmp_path), "--en", "run"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ckpt_0", "ckpt_best"]
    train.main(["--resume", str(tmp_path / "run")])
    assert_same(ckpt.load(tmp_path / "run" / "ckpt_3")["state"], ckpt.load(runs["qat"] / "ckpt_3")["state"])


def test_a_float_run_stopped_in_its_first_epoch_leaves_nothing(tmp_path, error_line):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 1)
        line = error_line(train.main, [*arguments("float", None), "--od", tmp_path])
    assert line == "error: interrupted; nothing was saved yet"
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_flags_unless_they_are_given_again(runs, tmp_path):
    own, _ = train.parse_flags(["--resume", str(runs["float"])])
    assert (own.model, own.dataset, own.batch_size, own.num_epochs, own.lr, own.seed) == (
        "vanilla_cnn",
        "digits",
        16,
        3,
        0.05,
        0,
    )
    given, _ = train.parse_flags(["--resume", str(runs["float"]), "--lr", "0.007", "--num_epochs", "5"])
    assert (given.lr, given.num_epochs, given.batch_size) == (0.007, 5, 16)


def test_lr_on_the_command_line_wins_over_the_resumed_checkpoint(runs, tmp_path):
    copy = part_of_run(runs["float"], tmp_path / "run", 2)
    train.main(["--resume", str(copy), "--lr", "1e-4", "--lrdt", "100"])
    groups = ckpt.load(copy / "ckpt_3")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-4, 1e-4]
    assert changed(ckpt.load(copy / "ckpt_3")["state"], ckpt.load(runs["float"] / "ckpt_3")["state"])


def test_a_finished_run_can_be_resumed_for_more_epochs(runs, tmp_path):
    copy = part_of_run(runs["float"], tmp_path / "run", 3)
    train.main(["--resume", str(copy), "--num_epochs", "4"])
    last = ckpt.load(copy / "ckpt_4")
    assert (last["epoch"], len(last["history"])) == (4, 4)


def test_resuming_with_another_optimizer_is_one_line(runs, tmp_path, error_line):
    copy = part_of_run(runs["float"], tmp_path / "run", 2)
    assert "--optimizer" in error_line(train.main, ["--resume", copy, "--optimizer", "adamw"])


def test_a_run_with_an_img_size_that_its_data_set_ignores_can_be_resumed(tmp_path):
    argv = ["--m", "vanilla_cnn", *FLAGS, "--lr", "0.01", "--img_size", "64", "--od", str(tmp_path), "--en", "run"]
    train.main([*argv, "--num_epochs", "1"])
    train.main(["--resume", str(tmp_path / "run"), "--num_epochs", "2"])
    assert (tmp_path / "run" / "ckpt_2").exists()


@pytest.mark.parametrize("flags", [["--resume", "{}"], ["--resume", "{}/none"], ["--load_ckpt", "{}/ckpt_best"]])
def test_nothing_to_start_from_is_one_line(tmp_path, error_line, flags):
    line = error_line(train.main, ["--od", tmp_path, *(flag.format(tmp_path) for flag in flags)])
    assert str(tmp_path) in line
    assert list(tmp_path.iterdir()) == []


# what training changes


def test_batch_norm_statistics_move_in_qat_until_the_last_third(runs):
    states = checkpoints(runs["qat"])
    for suffix in ("running_mean", "running_var", "num_batches_tracked"):
        statistics = {epoch: tensors(state, suffix) for epoch, state in states.items()}
        assert len(statistics[0]) == 6
        assert changed(statistics[0], statistics[1]) == changed(statistics[1], statistics[2]) == statistics[0].keys()
        assert changed(statistics[2], statistics[3]) == set()


def test_batch_norm_statistics_move_in_every_float_epoch(runs):
    states = checkpoints(runs["float"])
    assert list(states) == [1, 2, 3]
    for epoch in (1, 2):
        before, after = (tensors(states[index], "running_mean", "running_var") for index in (epoch, epoch + 1))
        assert changed(before, after) == before.keys()


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


def test_ckpt_best_is_the_last_of_the_epochs_with_the_highest_held_out_accuracy(tmp_path):
    model = torch.nn.Linear(2, 2)
    run = train.Run(tmp_path, model, train.make_optimizer(model, "sgd"), {"seed": 0})
    best = []
    for epoch, accuracy in enumerate([40.0, 70.0, 60.0, 70.0, 65.0]):
        run.epoch = epoch
        run.save(accuracy)
        content = ckpt.load(tmp_path / "ckpt_best")
        best.append((content["epoch"], content["best_accuracy_pct"]))
        assert ckpt.load(tmp_path / f"ckpt_{epoch}")["epoch"] == epoch
    assert best == [(0, 40.0), (1, 70.0), (1, 70.0), (3, 70.0), (3, 70.0)]


@pytest.mark.parametrize("mode", ["float", "qat"])
def test_history_holds_the_held_out_accuracy_of_each_epochs_network(runs, mode, digits):
    _, held_out = dataset.split_train(digits.train_labels[:60], 0)
    for epoch, content in checkpoints(runs[mode]).items():
        model = (infer.build_quantized if mode == "qat" else infer.build_float)(content).eval()
        model.load_state_dict(content["state"])
        info = content["data"]
        images = torch.from_numpy(dataset.normalise(digits.train_images[held_out], info["mean"], info["std"]))
        with torch.no_grad():
            right = (model(images).argmax(1).numpy() == digits.train_labels[held_out]).mean()
        recorded = content["history"][-1]["held_out_accuracy_pct"] if epoch else content["best_accuracy_pct"]
        assert recorded == pytest.approx(100 * right)


def test_ckpt_0_of_a_qat_run_is_the_float_network_with_ranges(runs):
    state, source = ckpt.load(runs["qat"] / "ckpt_0"), ckpt.load(runs["float"] / "ckpt_3")
    assert (state["epoch"], state["history"]) == (0, [])
    assert_same({key: state["state"][key] for key in source["state"]}, dict(source["state"]))
    assert_same(state["start"], dict(state["state"]))


def test_no_epochs_of_quantized_training_calibrate_only(runs, tmp_path, capsys):
    train.main([*arguments("qat", runs["float"] / "ckpt_3", epochs=0), "--od", str(tmp_path), "--en", "run"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ckpt_0", "ckpt_best"]
    assert_same(ckpt.load(tmp_path / "run" / "ckpt_0")["state"], ckpt.load(runs["qat"] / "ckpt_0")["state"])
    assert "ckpt_best is epoch 0: test accuracy" in capsys.readouterr().out


def test_no_epochs_of_float_training_are_refused(tmp_path, error_line):
    assert "--num_epochs 0: at least 1" in error_line(train.main, [*arguments("float", None, epochs=0), "--od", tmp_path])


@pytest.mark.parametrize("mode", ["float", "qat"])
def test_checkpoint_holds_what_rebuilds_and_continues_the_run(runs, mode):
    for path in runs[mode].glob("ckpt_*"):
        content = torch.load(path, weights_only=True)
        assert content["model"] == {"name": "vanilla_cnn", "stem": "cifar", "num_classes": 10}
        assert content["data"]["dataset"] == "digits"
        assert content["data"]["classes"] == list("0123456789")
        assert (content["data"]["img_size"], content["data"]["split_seed"], content["seed"]) == (32, 0, 0)
        assert content["quantization"] == (
            None if mode == "float" else {"quant_layers": ["*"], "skip_layers": [], "calibrator": "max", "calib_images": 1024}
        )
        assert set(content["optimizer"]) == {"state", "param_groups"}
        assert len(content["history"]) == content["epoch"]
        assert content["flags"]["batch_size"] == 16


def test_runs_of_different_seeds_differ_and_record_their_seed(runs, tmp_path):
    train.main([*arguments("float", None, epochs=1), "--seed", "5", "--od", str(tmp_path), "--en", "run"])
    content = ckpt.load(tmp_path / "run" / "ckpt_1")
    assert (content["seed"], content["data"]["split_seed"]) == (5, 5)
    assert content["history"][0]["loss"] != ckpt.load(runs["float"] / "ckpt_1")["history"][0]["loss"]


@pytest.mark.parametrize("seed", ["-1", "100000000000000000000"])
def test_impossible_seed_is_one_line(tmp_path, error_line, seed):
    assert "--seed" in error_line(train.main, [*arguments("float", None, epochs=1), "--seed", seed, "--od", tmp_path])


@pytest.mark.parametrize(("flag", "value"), [("--batch_size", "0"), ("--lrdt", "0"), ("--calib_images", "0"), ("--lr", "-1")])
def test_senseless_number_is_one_line(tmp_path, error_line, flag, value):
    line = error_line(train.main, [*arguments("float", None, epochs=1), flag, value, "--od", tmp_path])
    assert f"{flag} {value}" in line
    assert list(tmp_path.iterdir()) == []


# unlucky ends


def test_a_loss_that_is_not_finite_ends_the_first_epoch_without_a_checkpoint(tmp_path, error_line):
    line = error_line(train.main, [*arguments("float", None), "--lr", "1e30", "--od", tmp_path])
    assert "--lr than 1e+30" in line
    assert line.endswith("no checkpoint was written yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resumed", [False, True])
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(runs, tmp_path, error_line, resumed):
    folder = tmp_path / "run"
    if resumed:
        part_of_run(runs["float"], folder, 2)
        argv = ["--resume", folder]
    else:
        argv = [*arguments("qat", runs["float"] / "ckpt_3"), "--od", tmp_path, "--en", "run"]
    line = error_line(train.main, [*argv, "--lr", "1e30"])
    assert line.endswith(f"the last good checkpoint is {folder / ('ckpt_2' if resumed else 'ckpt_0')}")
    assert sorted(path.name for path in folder.iterdir()) == (
        ["ckpt_1", "ckpt_2", "ckpt_best"] if resumed else ["ckpt_0", "ckpt_best"]
    )
    for path in folder.iterdir():
        assert all(value.isfinite().all() for value in ckpt.load(path)["state"].values())


def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path, small_cifar10, failure_line):
    argv = ["--m", "vanilla_cnn", "--data_dir", small_cifar10, "--num_epochs", "1000", "--od", tmp_path]
    folder = tmp_path / "pytorch_exp"
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it otherwise
    )
    try:
        give_up = time.monotonic() + 60
        while not (folder / "ckpt_best").exists() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        time.sleep(0.3)  # into the second epoch
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert failure_line(process, stderr) == f"error: interrupted; continue with: python train.py --resume {folder}"
    assert all(path.name.startswith("ckpt_") for path in folder.iterdir())
    assert ckpt.load(ckpt.latest(folder))["epoch"] >= 1
