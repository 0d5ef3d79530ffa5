"""Exports in use: classes of any images, and times where there is no data set."""

import json
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import digits_cut_to

import dataset
import infer
from utils import compare, records
from utils.compare import Comparison

pytestmark = pytest.mark.usefixtures("quick_latencies")


@pytest.fixture(scope="module")
def export(qat_checkpoint, digits, tmp_path_factory):
    """An export of the digits in FP32, INT8-PTC and INT8-QAT."""
    path = tmp_path_factory.mktemp("export") / "onnx"
    precisions = "--FP32 --INT8PTC --INT8QAT --export_only --batch_size"
    with digits_cut_to(60, 40, digits):
        infer.main(f"--load_ckpt {qat_checkpoint} --onnx_dir {path} {precisions}".split())
    return path


@pytest.fixture
def export_copy(export, tmp_path):
    return Path(shutil.copytree(export, tmp_path / "onnx"))


# without a data set


@pytest.fixture
def of_cifar10(export_copy, tmp_path, monkeypatch):
    """The export, said to be of CIFAR-10, in a folder without it; nothing may be downloaded."""
    manifest = json.loads((export_copy / "export.json").read_text())
    manifest["data"] |= {"dataset": "cifar10", "classes": list(dataset.cifar10.CLASSES)}
    (export_copy / "export.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", None)
    return export_copy


def test_engines_are_timed_without_a_data_set(of_cifar10, tmp_path, capsys):
    flags = "--INT8PTC --INT8QAT --backend onnxruntime --batch_size 2 3 --record record.json"
    infer.main(["--onnx", str(of_cifar10), *flags.split()])
    output = capsys.readouterr().out
    assert f"CIFAR-10 is not in {tmp_path}/data: times are of random images" in output
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    timed = [row for row in rows if row["backend"] == "onnxruntime"]
    assert [(row["precision"], row["batch_size"]) for row in timed] == [
        (precision, size) for precision in ("INT8-PTC", "INT8-QAT") for size in (2, 3)
    ]
    for row in timed:
        assert row["latency_ms"]["p50"] > 0
        assert (row["accuracy_pct"], row["delta_pct"], row["agreement_pct"]) == (None, None, None)
    [line] = [
        line
        for line in output.splitlines()
        if line.startswith("onnxruntime  INT8-QAT") and " 3 " in line
    ]
    assert line.split()[2:6] == ["-", "-", "-", "3"]


def test_engines_are_timed_where_only_a_back_end_is_installed(export, run_script):
    argv = f"infer.py --onnx {export} --INT8QAT --backend onnxruntime --batch_size 1".split()
    process = run_script(*argv, blocked=("torch", "sklearn", "PIL", "onnx"))
    assert process.returncode == 0, process.stderr
    assert "scikit-learn, which holds the digits, is not installed: times are" in process.stdout


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("folder", "train/"),
        ("folder", "test/"),
        ("cifar10", "train/"),
        ("cifar10", "cifar-10-batches-py/"),
        ("cifar10", "cifar10.npz"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar10", "test_batch"),
        ("cifar10", "data_batch_1"),
    ],
)
def test_what_is_there_of_a_data_set_is_read_sound_or_not(tmp_path, name, there):
    missing = dataset.MISSING[name]
    assert str(tmp_path) in missing(tmp_path)
    assert str(tmp_path / "none") in missing(tmp_path / "none")
    if there.endswith("/"):
        (tmp_path / there).mkdir()
    else:
        (tmp_path / there).touch()
    assert missing(tmp_path) == ""


def test_accuracy_alone_needs_the_data_set(of_cifar10, tmp_path, error_line):
    words = ["--onnx", of_cifar10, "--backend", "onnxruntime", "--batch_size"]
    line = error_line(infer.main, words)
    assert line.startswith(f"error: CIFAR-10 is not in {tmp_path}/data: name their folder")


def test_a_data_dir_that_is_named_must_have_the_data_set(export_copy, tmp_path, error_line):
    manifest = json.loads((export_copy / "export.json").read_text())
    manifest["data"]["dataset"] = "folder"
    (export_copy / "export.json").write_text(json.dumps(manifest))
    words = ["--onnx", export_copy, "--backend", "onnxruntime", "--data_dir", tmp_path / "none"]
    assert f"{tmp_path}/none/train is missing" in error_line(infer.main, words)


def test_tensorrts_own_calibration_needs_the_train_images(of_cifar10, error_line):
    words = ["--onnx", of_cifar10, "--ptc_mode", "implicit", "--batch_size", "1"]
    line = error_line(infer.main, words)
    assert line == "error: --ptc_mode implicit needs the train images: name them with --data_dir"


def test_random_images_are_those_of_every_run_in_the_graphs_size():
    info = SimpleNamespace(img_size=8)
    images = compare.random_images(info, Comparison(batch_sizes=(1, 4)))
    assert images.shape == (4 * compare.RANDOM_BATCHES, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images.std() > 70
    assert np.array_equal(images, compare.random_images(info, Comparison(batch_sizes=(4,))))


def test_a_network_without_accuracies_has_dashes_in_the_table():
    row = records.Row("onnxruntime", "FP32").timed(1, 1.0, 2.0)
    assert records.cells_of([row])[1][:6] == ["onnxruntime", "FP32", "-", "-", "-", "1"]
