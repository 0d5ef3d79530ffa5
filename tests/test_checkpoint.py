"""Checkpoints: whole or absent, refused with a clear line, and every weight where it belongs."""

import argparse
import errno
import json
import os
import pickle
import re
import socket

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, build

import infer
import train
from utils import checkpoint as ckpt
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.files import new_folder
from utils.quantization.swap import quantize_modules
from utils.specs import DataSpec, NetworkSpec, Quantization


class Runs:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def network(quantized=False, classes=10, seed=0):
    torch.manual_seed(seed)
    model = build("resnet18", "imagenet", classes)
    if quantized:
        quantize_modules(model, EXAMPLE)
    return model


@pytest.fixture(scope="module")
def calibrated():
    """A quantized network with ranges."""
    model = network(quantized=True)
    for key, value in model.state_dict().items():
        if key.endswith("_amax"):
            value.fill_(1.0)
    return model


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key].nan_to_num(-1), b[key].nan_to_num(-1))]
    assert different == []


def load_error(path):
    with pytest.raises(UserError) as error:
        ckpt.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def weights_error(model, state, **options):
    before = snapshot(model)
    with pytest.raises(UserError) as error:
        ckpt.load_weights(model, state, **options)
    assert_equal_states(snapshot(model), before)
    return str(error.value)


# saving


def test_a_saved_checkpoint_loads_back(tmp_path):
    checkpoint = Checkpoint(
        state={"w": torch.randn(3, 2)},
        network=NetworkSpec("x", "cifar", 3),
        data=DataSpec("digits", 32, ["a", "b", "c"], 7, [0.1, 0.2, 0.3], [0.5, 0.5, 0.5], "1f"),
        quantization=Quantization(skip_layers=["fc"]),
        ptq_state={"w": torch.randn(3, 2)},
        recipe={"seed": 7, "lr": 0.5},
        optimizer={"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        epoch=4,
        best_val_loss=0.25,
        history=[{"loss": 0.5, "val_loss": 0.25}],
    )
    ckpt.save(tmp_path / "new" / "ckpt_4", checkpoint)
    loaded = ckpt.load(tmp_path / "new" / "ckpt_4")
    assert loaded.whole
    for name in ("state", "ptq_state"):
        here, there = getattr(checkpoint, name), getattr(loaded, name)
        assert_equal_states(here, there)
        setattr(loaded, name, here)
    assert loaded == checkpoint
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ckpt_4"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_write_that_fails_halfway_leaves_the_old_file_alone(tmp_path, monkeypatch, error):
    path = tmp_path / "ckpt_1"
    ckpt.save(path, Checkpoint({}, epoch=1))

    def half(_, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error)):
        ckpt.save(path, Checkpoint({}, epoch=2))
    assert ckpt.load(path).epoch == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_refuses_is_named_by_the_file_that_was_meant(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(PermissionError) as error:
        ckpt.save(tmp_path / "ckpt_1", Checkpoint({}))
    assert error.value.filename == str(tmp_path / "ckpt_1")


def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(tmp_path, small_disk, error_line):
    path = tmp_path / "ckpt_1"
    ckpt.save(path, Checkpoint({"w": torch.ones(3)}))
    large = Checkpoint({"w": torch.ones(1_000_000)})
    line = error_line(lambda _: ckpt.save(path, large), [])
    assert line.startswith("error: cannot read or write ")
    assert str(path) in line
    assert torch.equal(ckpt.load(path).state["w"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_on_a_full_disk_ends_in_one_line_and_leaves_no_folder(
    tmp_path, float_checkpoint, small_disk, error_line
):
    start = f"--quantize --partial_ckpt --load_ckpt {float_checkpoint} --od {tmp_path}"
    quick = "--num_epochs 0 --calib_images 16 --calibrator max"
    line = error_line(train.main, f"{start} {quick}".split())
    assert line.startswith("error: cannot read or write ")
    assert "ckpt_0" in line
    assert list(tmp_path.iterdir()) == []


# loading


def test_missing_checkpoint_lists_what_is_there(tmp_path):
    for name in ("ckpt_1", "ckpt_best", "other"):
        (tmp_path / name).touch()
    (tmp_path / "ckpt_1_onnx").mkdir()
    assert (
        load_error(tmp_path / "ckpt_7")
        == f"no checkpoint at {tmp_path}/ckpt_7; {tmp_path} holds ckpt_1, ckpt_best"
    )
    assert load_error(tmp_path / "none" / "ckpt_7") == f"no checkpoint at {tmp_path}/none/ckpt_7"


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    ckpt.save(tmp_path / "ckpt_1", Checkpoint({"w": torch.full((1000,), 0.7)}))
    data = bytearray((tmp_path / "ckpt_1").read_bytes())
    data[data.index(torch.full((100,), 0.7).numpy().tobytes()) + 6] ^= 1
    (tmp_path / "ckpt_1").write_bytes(data)
    assert f"{tmp_path}/ckpt_1 is truncated, damaged or not a checkpoint" in load_error(
        tmp_path / "ckpt_1"
    )


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.999])
def test_truncated_checkpoint_is_named(tmp_path, qat_checkpoint, part):
    data = qat_checkpoint.read_bytes()
    (tmp_path / "ckpt_1").write_bytes(data[: int(part * len(data))])
    assert f"{tmp_path}/ckpt_1 is truncated, damaged or not a checkpoint" in load_error(
        tmp_path / "ckpt_1"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"hello world\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        json.dumps({"a": 1}).encode(),
        pickle.dumps({"a": 1}),
        pickle.dumps([1, 2]),
        b"a text file\n",
        b"G\n",
    ],
    ids=["text", "png", "json", "pickled dict", "pickled list", "IndexError", "struct.error"],
)
def test_something_else_is_not_a_checkpoint(tmp_path, content):
    (tmp_path / "ckpt_1").write_bytes(content)
    assert f"{tmp_path}/ckpt_1 is " in load_error(tmp_path / "ckpt_1")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_now_is_not_blamed(
    tmp_path, monkeypatch, error_line, code
):
    ckpt.save(tmp_path / "ckpt_1", Checkpoint({"w": torch.ones(1)}))

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), str(tmp_path / "ckpt_1"))

    monkeypatch.setattr(torch, "load", refuse)
    line = error_line(train.main, ["--load_ckpt", tmp_path / "ckpt_1"])
    assert line.startswith(f"error: cannot read or write {tmp_path}/ckpt_1: {os.strerror(code)}")


def test_what_is_whole_but_of_another_kind_is_called_by_its_name(tmp_path):
    path = tmp_path / "ckpt_1"
    model = torch.nn.Linear(2, 2)
    torch.jit.script(model).save(path)
    assert "not a checkpoint; use an earlier one, or save model.state_dict()" in load_error(path)
    for content in (model, {"args": argparse.Namespace(lr=1), "w": torch.ones(1)}):
        torch.save(content, path)
        assert "holds Python objects besides tensors" in load_error(path)
    torch.save({"acc": np.float64(1.0), "w": torch.ones(1)}, path)
    assert "damaged" not in load_error(path)


@pytest.mark.parametrize("main", [train.main, infer.main])
@pytest.mark.parametrize("kind", ["fifo", "socket", "loop", "dangling", "folder", "/dev/zero"])
def test_what_is_no_file_is_no_checkpoint_and_not_waited_for(tmp_path, error_line, main, kind):
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to({"loop": "x", "dangling": "nowhere"}.get(kind, kind))
    assert f"no checkpoint at {path}" in error_line(main, ["--load_ckpt", path])


@pytest.mark.parametrize(
    "content",
    [{}, {"a": 1}, [torch.ones(2)], torch.ones(2), {"format": ckpt.FORMAT + 1, "state": {}}],
)
def test_torch_file_of_something_else_is_not_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "ckpt_1")
    assert "not a checkpoint of this project" in load_error(tmp_path / "ckpt_1")


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path, legacy):
    content = {"format": 1, "state": Runs(tmp_path / "ran")}
    torch.save(content, tmp_path / "ckpt_1", _use_new_zipfile_serialization=not legacy)
    assert "ckpt_1" in load_error(tmp_path / "ckpt_1")
    (tmp_path / "ckpt_1").write_bytes(pickle.dumps(content))
    assert "ckpt_1" in load_error(tmp_path / "ckpt_1")
    assert not (tmp_path / "ran").exists()


def test_plain_state_dict_is_accepted(tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "weights.pt")
    loaded = ckpt.load(tmp_path / "weights.pt")
    assert not loaded.whole
    assert_equal_states(loaded.state, state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": None}, " lacks 'state'"),
        ({"state": {"w": 1.0}}, ": state is 1.0, not of type Tensor"),
        ({"epoch": "three"}, ": epoch is 'three', not of type int"),
        ({"network": {"name": "resnet18", "stem": "imagenet"}}, ": network lacks 'num_classes'"),
        ({"data": ["digits"]}, ": data: ['digits'] stands where DataSpec should"),
        ({"history": [{"val_loss": "low"}]}, ": history is 'low', not of type float"),
        ({"state": {1: torch.ones(1)}}, ": a name in state is 1, not of type str"),
    ],
)
@pytest.mark.parametrize("main", [train.main, infer.main])
def test_a_field_that_is_missing_or_of_another_type_is_one_line(
    tmp_path, error_line, main, change, said
):
    content = {"format": ckpt.FORMAT, "state": {"w": torch.ones(1)}, "epoch": 1, **change}
    content = {name: value for name, value in content.items() if value is not None}
    torch.save(content, tmp_path / "ckpt_1")
    line = error_line(main, ["--load_ckpt", tmp_path / "ckpt_1"])
    assert line == f"error: {tmp_path}/ckpt_1{said}"


WRONG = (5, 1.5, "x", True, [], [1.0], b"x", torch.ones(2), float("nan"), 10**400, -1)


def small_content():
    """A float checkpoint as `save` writes it."""
    info = DataSpec("digits", 32, ["a", "b"], 0, [0.5] * 3, [0.5] * 3, "1f")
    return {
        "format": ckpt.FORMAT,
        "state": {"w": torch.ones(1)},
        "network": {"name": "x", "stem": "cifar", "num_classes": 2},
        "data": vars(info).copy(),
        "quantization": vars(Quantization()).copy(),
        "ptq_state": {"w": torch.ones(1)},
        "recipe": {"seed": 0},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 1,
        "best_val_loss": 1.0,
        "history": [{"val_loss": 1.0}],
    }


PLACES = [(key,) for key in small_content() if key != "format"]
for _outer in ("network", "data", "quantization"):
    PLACES += [(_outer, key) for key in small_content()[_outer]]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_field_of_another_type_is_refused_and_named(tmp_path, place):
    hint = {
        "epoch": int,
        "best_val_loss": float,
        "name": str,
        "stem": str,
        "dataset": str,
        "digest": str,
        "calibrator": str,
        "num_classes": int,
        "img_size": int,
        "split_seed": int,
        "calib_images": int,
    }.get(place[-1])
    for wrong in WRONG:
        content = small_content()
        inner = content[place[0]] if len(place) == 2 else content
        if hint is float and isinstance(wrong, int | float) and wrong in (5, 1.5):
            continue
        if hint is not None and type(wrong) is hint and wrong != -1 and wrong != 10**400:
            continue
        if isinstance(wrong, list) and wrong == [] and isinstance(inner[place[-1]], list):
            continue
        inner[place[-1]] = wrong
        torch.save(content, tmp_path / "ckpt_1")
        assert f"{tmp_path}/ckpt_1" in load_error(tmp_path / "ckpt_1"), wrong


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_field_that_is_missing_is_refused_or_has_a_default(tmp_path, place):
    content = small_content()
    inner = content[place[0]] if len(place) == 2 else content
    del inner[place[-1]]
    torch.save(content, tmp_path / "ckpt_1")
    optional = {"network", "data", "quantization", "recipe", "optimizer", "epoch", "best_val_loss"}
    optional |= {"history", "digest", "quant_layers", "skip_layers", "calibrator", "calib_images"}
    if place[-1] in optional:
        ckpt.load(tmp_path / "ckpt_1")
    else:
        assert repr(place[-1]) in load_error(tmp_path / "ckpt_1")


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 10**7},
        {"best_val_loss": -1.0},
        {"history": [{}]},
        {"history": [{"val_loss": float("nan")}]},
        {"recipe": {}},
        {"recipe": {"seed": "0"}},
        {"recipe": {"seed": 2**32}},
        {"recipe": {"seed": 0, "data_dir": 5}},
        {"format": torch.ones(2)},
        {"format": 10**400},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_value_that_cannot_be_is_one_line(tmp_path, change):
    torch.save({**small_content(), **change}, tmp_path / "ckpt_1")
    load_error(tmp_path / "ckpt_1")


def test_a_checkpoint_of_an_earlier_format_is_one_line(tmp_path):
    torch.save({**small_content(), "format": ckpt.FORMAT - 1}, tmp_path / "ckpt_1")
    said = "ckpt_1 is of an earlier version of this project: train again"
    assert said in load_error(tmp_path / "ckpt_1")


def test_latest_is_the_highest_epoch_as_a_number(tmp_path):
    for name in (
        "ckpt_9",
        "ckpt_10",
        "ckpt_best",
        "ckpt_best_onnx",
        "ckpt_²",
        "ckpt_-1",
        ".ckpt_11.1.partial",
    ):
        (tmp_path / name).touch()
    assert ckpt.latest(tmp_path) == tmp_path / "ckpt_10"
    assert ckpt.latest(tmp_path / "ckpt_9") == tmp_path / "ckpt_9"


def test_folder_without_epochs_cannot_be_resumed(tmp_path):
    (tmp_path / "ckpt_best").touch()
    with pytest.raises(UserError, match="no ckpt_<epoch>"):
        ckpt.latest(tmp_path)


# weights


def test_every_float_weight_lands_in_the_quantized_model_and_only_ranges_are_missing():
    source, target = network(seed=1), network(quantized=True, seed=2)
    state = snapshot(source)
    message = ckpt.load_weights(target, state, allow_missing_ranges=True)
    loaded = target.state_dict()
    ranges = loaded.keys() - state.keys()
    assert all(key.endswith("_quantizer._amax") for key in ranges)
    assert_equal_states({key: loaded[key] for key in state}, state)
    assert message == (
        f"{len(state)} float tensors and 0 ranges loaded, each exactly once; "
        f"0 unexpected, 0 missing, {len(ranges)} ranges left to calibrate"
    )


def test_quantized_state_lands_with_its_ranges():
    source, target = network(quantized=True, seed=1), network(quantized=True, seed=2)
    for key, value in source.state_dict().items():
        if key.endswith("_amax"):
            value.copy_(torch.rand_like(value) + 0.1)
    message = ckpt.load_weights(target, snapshot(source))
    assert_equal_states(target.state_dict(), source.state_dict())
    count = sum(key.endswith("_amax") for key in source.state_dict())
    assert message.startswith(
        f"{len(source.state_dict()) - count} float tensors and {count} ranges loaded"
    )
    assert message.endswith("0 ranges left to calibrate")


def test_float_state_without_partial_ckpt_names_the_flag():
    message = weights_error(network(quantized=True, seed=1), network(seed=2).state_dict())
    assert "--partial_ckpt" in message
    assert "missing" in message


def test_quantized_state_for_a_float_model_says_so():
    message = weights_error(network(seed=1), network(quantized=True, seed=2).state_dict())
    assert "a quantized checkpoint for a float model" in message
    assert "--partial_ckpt" not in message


def test_weights_that_are_not_finite_are_not_loaded():
    state = snapshot(network(seed=1))
    state["fc.bias"][0] = torch.nan
    message = weights_error(network(seed=2), state)
    assert "a training that diverged or a damaged file" in message
    assert message.endswith(": 1 not finite: fc.bias")


def test_a_mask_of_infinities_is_loaded_where_the_network_has_the_same():
    model = torch.nn.Linear(2, 1)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    state = snapshot(model)
    state["mask"][0] = 1.0
    ckpt.load_weights(model, state)
    assert model.mask.tolist() == [1.0, -torch.inf]
    for values in ([0.0, torch.inf], [0.0, torch.nan], [-torch.inf, 0.0]):
        state["mask"] = torch.tensor(values)
        assert "1 not finite: mask" in weights_error(model, state)


def odd_tensors(like):
    """Tensors of the shape of `like` that are no weights, and what is wrong with them."""
    ones = torch.ones_like(like)
    return {
        "int8": (ones.to(torch.int8), "of another type"),
        "bool": (ones.bool(), "of another type"),
        "complex": (ones.to(torch.complex64), "of another type"),
        "sparse": (ones.to_sparse(), "of another type"),
        "meta": (ones.to("meta"), "of another type"),
        "quantized": (torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), "of another type"),
        "too large": (torch.full_like(like, 1e300, dtype=torch.float64), "not finite"),
        "bomb": (torch.ones(1).expand(10**6, 10**6), "of another shape"),
        "empty": (torch.ones(0), "of another shape"),
        "scalar": (torch.tensor(1.0), "of another shape"),
    }


@pytest.mark.parametrize("key", ["fc.bias", "bn1.running_var", "conv1.weight_quantizer._amax"])
@pytest.mark.parametrize("kind", list(odd_tensors(torch.ones(1))))
def test_tensors_that_are_no_weights_are_not_loaded(key, kind, calibrated):
    state = snapshot(calibrated)
    state[key], said = odd_tensors(state[key])[kind]
    assert f"1 {said}: {key}" in weights_error(calibrated, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_float_type_are_loaded(dtype, calibrated):
    state = snapshot(calibrated)
    state["fc.bias"] = torch.arange(10).to(dtype)
    ckpt.load_weights(calibrated, state)
    assert torch.equal(calibrated.fc.bias, torch.arange(10.0))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45, float("nan"), float("inf")])
def test_ranges_that_make_no_sense_are_not_loaded(value, calibrated):
    state, key = snapshot(calibrated), "conv1.input_quantizer._amax"
    state[key] = torch.full_like(state[key], value)
    assert key in weights_error(calibrated, state)


def test_a_negative_variance_is_not_loaded(calibrated):
    state = snapshot(calibrated)
    state["bn1.running_var"][3] = -1.0
    assert "1 below 0: bn1.running_var" in weights_error(calibrated, state)


def test_state_older_than_the_counters_of_batchnorm_is_complete():
    source, model = snapshot(network(seed=1)), network(seed=2)
    for key in [key for key in source if key.endswith("num_batches_tracked")]:
        del source[key]
    assert "0 missing" in ckpt.load_weights(model, source)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.items())


@pytest.mark.parametrize("quantized", [False, True])
def test_unexpected_missing_and_other_tensors_are_listed_and_nothing_is_loaded(quantized):
    state = snapshot(network(seed=1, classes=7))
    state["layer9.weight"] = torch.ones(2)
    del state["layer1.0.conv1.weight"], state["bn1.running_var"]
    message = weights_error(network(quantized, seed=2), state, allow_missing_ranges=quantized)
    assert "2 missing: bn1.running_var, layer1.0.conv1.weight" in message
    assert "1 unexpected: layer9.weight" in message
    assert "2 of another shape: fc.bias, fc.weight" in message


def test_long_lists_are_cut():
    message = weights_error(network(seed=1), {"conv1.weight": torch.ones(64, 3, 7, 7)})
    counters = sum(key.endswith("num_batches_tracked") for key in network().state_dict())
    assert f"{len(network().state_dict()) - counters - 1} missing: " in message
    assert re.search(r" and \d+ more$", message)
    assert len(message) < 300


# what the scripts make of them


@pytest.mark.parametrize("main", [train.main, infer.main])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--m", "resnet34"], "--m resnet34 contradicts the checkpoint, which says resnet18"),
        (["--stem", "cifar"], "--stem cifar contradicts the checkpoint, which says imagenet"),
        (
            ["--dataset", "cifar10"],
            "--dataset cifar10 contradicts the checkpoint, which says digits",
        ),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(
    tmp_path, float_checkpoint, error_line, main, flags, said
):
    output = ["--od", tmp_path] if main is train.main else ["--onnx_dir", tmp_path / "onnx"]
    assert said in error_line(main, ["--load_ckpt", float_checkpoint, *flags, *output])
    assert list(tmp_path.iterdir()) == []


def test_ranges_in_a_bare_state_dict_are_not_calibrated_anew(tmp_path, error_line):
    model = network(quantized=True)
    for key, value in model.state_dict().items():
        if key.endswith("_amax"):
            value.fill_(1.0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    flags = "--m resnet18 --stem imagenet --dataset digits --quantize --num_epochs 0"
    argv = f"{flags} --load_ckpt {tmp_path}/state.pt --od {tmp_path}/out".split()
    assert "load train.py's checkpoint itself" in error_line(train.main, argv)
    assert not (tmp_path / "out").exists()


def test_float_checkpoint_into_quantized_training_names_partial_ckpt(
    tmp_path, float_checkpoint, error_line
):
    line = error_line(train.main, ["--quantize", "--load_ckpt", float_checkpoint, "--od", tmp_path])
    assert "--partial_ckpt" in line
    assert list(tmp_path.iterdir()) == []


def test_quantized_checkpoint_into_float_training_is_refused(tmp_path, qat_checkpoint, error_line):
    line = error_line(train.main, ["--load_ckpt", qat_checkpoint, "--od", tmp_path])
    assert "is a quantized network, and this run trains in float: add --quantize" in line
    assert list(tmp_path.iterdir()) == []


def test_truncated_checkpoint_ends_training_in_one_line(tmp_path, float_checkpoint, error_line):
    path = tmp_path / "ckpt_best"
    path.write_bytes(float_checkpoint.read_bytes()[:50_000])
    line = error_line(train.main, ["--load_ckpt", path, "--od", tmp_path])
    assert f"{path} is truncated, damaged or not a checkpoint" in line
    assert list(tmp_path.iterdir()) == [path]


def test_plain_state_dict_is_no_checkpoint_for_infer_or_resume(tmp_path, error_line):
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    for main, flag in ((infer.main, "--load_ckpt"), (train.main, "--resume")):
        assert "bare state dict" in error_line(main, [flag, tmp_path / "weights.pt"])


# folders


def test_new_folders_are_numbered(tmp_path):
    names = [new_folder(tmp_path / "deep" / "er", "run").name for _ in range(3)]
    assert names == ["run", "run_1", "run_2"]
    (tmp_path / "deep" / "er" / "run_1").rmdir()
    assert new_folder(tmp_path / "deep" / "er", "run").name == "run_1"


@pytest.mark.parametrize(
    "flags",
    [
        ["--m", "resnet19", "--dataset", "digits"],
        ["--dataset", "digits"],
        ["--m", "resnet18", "--dataset", "folder", "--data_dir", "nowhere"],
    ],
)
def test_failed_run_leaves_no_folder_and_its_number_free(tmp_path, error_line, flags):
    (tmp_path / "pytorch_exp").mkdir()
    error_line(train.main, [*flags, "--od", tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_exp"]


@pytest.mark.parametrize(
    "flags", [["--od", "{}/file"], ["--od", "{}/file/below"], ["--od", "{}", "--en", "a/b"]]
)
def test_impossible_output_folder_is_one_line(tmp_path, error_line, flags):
    (tmp_path / "file").touch()
    line = error_line(
        train.main,
        ["--m", "resnet18", "--dataset", "digits", *(flag.format(tmp_path) for flag in flags)],
    )
    assert str(tmp_path) in line
