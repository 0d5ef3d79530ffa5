"""Checkpoints: whole or absent, refused with a clear line, and every weight where it belongs."""

import errno
import json
import os
import pickle

import pytest
import torch

import infer
import models
import train
from utils import checkpoint as ckpt
from utils.errors import UserError
from utils.files import new_folder
from utils.quantization.swap import quantize_modules


class Runs:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def network(quantized=False, classes=10, seed=0):
    torch.manual_seed(seed)
    model = models.build("resnet18", classes, "imagenet")
    if quantized:
        quantize_modules(model)
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
    content = {
        "state": {"w": torch.randn(3, 2)},
        "epoch": 4,
        "model": {"name": "x"},
        "history": [{"loss": 0.5}],
        "start": None,
    }
    ckpt.save(tmp_path / "new" / "ckpt_4", content)
    loaded = ckpt.load(tmp_path / "new" / "ckpt_4")
    assert torch.equal(loaded.pop("state")["w"], content.pop("state")["w"])
    assert loaded == {"format": 1, **content}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ckpt_4"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_write_that_fails_halfway_leaves_the_old_file_alone(tmp_path, monkeypatch, error):
    path = tmp_path / "ckpt_1"
    ckpt.save(path, {"epoch": 1})

    def half(_, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error)):
        ckpt.save(path, {"epoch": 2})
    assert ckpt.load(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_refuses_is_named_by_the_file_that_was_meant(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(PermissionError) as error:
        ckpt.save(tmp_path / "ckpt_1", {})
    assert error.value.filename == str(tmp_path / "ckpt_1")


def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(tmp_path, small_disk, error_line):
    path = tmp_path / "ckpt_1"
    ckpt.save(path, {"state": {"w": torch.ones(3)}})
    line = error_line(lambda _: ckpt.save(path, {"state": {"w": torch.ones(1_000_000)}}), [])
    assert line.startswith("error: cannot write ")
    assert str(path) in line
    assert torch.equal(ckpt.load(path)["state"]["w"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_on_a_full_disk_ends_in_one_line_and_leaves_no_folder(
    tmp_path, float_checkpoint, small_disk, error_line
):
    argv = [
        "--quantize",
        "--partial_ckpt",
        "--load_ckpt",
        float_checkpoint,
        "--num_epochs",
        "0",
        "--od",
        tmp_path,
    ]
    line = error_line(train.main, [*argv, "--calib_images", "64"])
    assert line.startswith("error: cannot write ")
    assert "ckpt_0" in line
    assert list(tmp_path.iterdir()) == []


# loading


def test_missing_checkpoint_lists_what_is_there(tmp_path):
    for name in ("ckpt_1", "ckpt_best", "other"):
        (tmp_path / name).touch()
    assert (
        load_error(tmp_path / "ckpt_7")
        == f"no checkpoint at {tmp_path}/ckpt_7; {tmp_path} holds ckpt_1, ckpt_best"
    )
    assert load_error(tmp_path / "none" / "ckpt_7") == f"no checkpoint at {tmp_path}/none/ckpt_7"


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    ckpt.save(tmp_path / "ckpt_1", {"state": {"w": torch.full((1000,), 0.7)}})
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


@pytest.mark.parametrize(
    "content", [{}, {"a": 1}, [torch.ones(2)], torch.ones(2), {"format": 2, "state": {}}]
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
    assert list(loaded) == ["state"]
    assert_equal_states(loaded["state"], state)


def test_latest_is_the_highest_epoch_as_a_number(tmp_path):
    for name in ("ckpt_9", "ckpt_10", "ckpt_best", "ckpt_best_onnx", ".ckpt_11.1.partial"):
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


def test_state_older_than_the_counters_of_batchnorm_is_complete():
    source, model = snapshot(network(seed=1)), network(seed=2)
    for key in [key for key in source if key.endswith("num_batches_tracked")]:
        del source[key]
    assert "0 missing" in ckpt.load_weights(model, source)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.items())


@pytest.mark.parametrize("quantized", [False, True])
def test_unexpected_missing_and_misshapen_tensors_are_listed_and_nothing_is_loaded(quantized):
    state = snapshot(network(seed=1, classes=7))
    state["layer9.weight"] = torch.ones(2)
    del state["layer1.0.conv1.weight"], state["bn1.running_var"]
    message = weights_error(network(quantized, seed=2), state, allow_missing_ranges=quantized)
    assert "2 missing: bn1.running_var, layer1.0.conv1.weight" in message
    assert "1 unexpected: layer9.weight" in message
    assert "2 misshapen: fc.bias, fc.weight" in message


def test_long_lists_are_cut():
    message = weights_error(network(seed=1), {"conv1.weight": torch.ones(64, 3, 7, 7)})
    counters = sum(key.endswith("num_batches_tracked") for key in network().state_dict())
    assert f"{len(network().state_dict()) - counters - 1} missing: " in message
    assert message.endswith(", ...")
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
    flags = [
        "--m",
        "resnet18",
        "--stem",
        "imagenet",
        "--dataset",
        "digits",
        "--quantize",
        "--num_epochs",
        "0",
    ]
    line = error_line(
        train.main, [*flags, "--load_ckpt", tmp_path / "state.pt", "--od", tmp_path / "out"]
    )
    assert "load train.py's checkpoint itself" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_float_checkpoint_into_quantized_training_names_partial_ckpt(
    tmp_path, float_checkpoint, error_line
):
    line = error_line(train.main, ["--quantize", "--load_ckpt", float_checkpoint, "--od", tmp_path])
    assert "--partial_ckpt" in line
    assert list(tmp_path.iterdir()) == []


def test_quantized_checkpoint_into_float_training_is_refused(tmp_path, qat_checkpoint, error_line):
    line = error_line(train.main, ["--load_ckpt", qat_checkpoint, "--od", tmp_path])
    assert "a quantized checkpoint for a float model" in line
    assert list(tmp_path.iterdir()) == []


def test_truncated_checkpoint_ends_training_in_one_line(tmp_path, float_checkpoint, error_line):
    path = tmp_path / "ckpt_best"
    path.write_bytes(float_checkpoint.read_bytes()[:50_000])
    line = error_line(train.main, ["--load_ckpt", path, "--od", tmp_path])
    assert f"{path} is truncated, damaged or not a checkpoint" in line
    assert list(tmp_path.iterdir()) == [path]


def test_plain_state_dict_is_no_checkpoint_for_infer_or_resume(tmp_path, error_line):
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    assert "bare state dict" in error_line(infer.main, ["--load_ckpt", tmp_path / "weights.pt"])
    assert "not a checkpoint of train.py" in error_line(
        train.main, ["--resume", tmp_path / "weights.pt"]
    )


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
