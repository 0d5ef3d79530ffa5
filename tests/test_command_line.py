"""The two scripts as a user calls them: the documented commands, the record's format, and one line for each mistake."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, STEMMED, digits_cut_to, normalised

import infer
import models
import train
from utils import checkpoint as ckpt
from utils import files, flags, records
from utils.backends import network as measure
from utils.backends import tensorrt as tensorrt_engine
from utils.errors import UserError
from utils.files import locked

PRECISIONS = {
    "FP32",
    "FP16",
    "FAKE-QUANT-PTC",
    "FAKE-QUANT-QAT",
    "INT8-PTC",
    "INT8-PTC-IMPLICIT",
    "INT8-QAT",
}
RECORD_KEYS = {
    "kind",
    "model",
    "stem",
    "dataset",
    "seed",
    "quantization",
    "flags",
    "commit",
    "environment",
    "rows",
}
ENVIRONMENT_KEYS = {"gpu", "cpu", "torch", "tensorrt", "onnxruntime", "python"}
ROW_KEYS = {
    "backend",
    "precision",
    "accuracy_pct",
    "delta_pct",
    "agreement_pct",
    "batch_size",
    "latency_ms",
    "throughput_img_s",
    "file_mb",
    "int8_layers",
    "layers",
}

pytestmark = pytest.mark.usefixtures("quick_latencies")


@pytest.fixture(scope="module")
def exported(qat_checkpoint, tmp_path_factory, quick_latencies):
    """Folder with `record.json`, `plot.png` and `onnx`, from `infer.py ... --quantize --FP32 --INT8QAT` with ONNX Runtime."""
    folder = tmp_path_factory.mktemp("exported")
    flags = [
        "--m",
        "resnet18",
        "--load_ckpt",
        str(qat_checkpoint),
        "--quantize",
        "--FP32",
        "--INT8QAT",
    ]
    flags += ["--backend", "onnxruntime"]
    output = ["--onnx_dir", "onnx", "--record", "record.json", "--plot", "plot.png"]
    infer.main([*flags, *(value if value[0] == "-" else str(folder / value) for value in output)])
    return folder


@pytest.fixture
def few_digits(digits):
    """For the rest of the test, `--dataset digits` is 160 train and 40 test images."""
    with digits_cut_to(160, 40, digits):
        yield


@pytest.fixture
def export_copy(exported, tmp_path):
    """An export to damage."""
    return Path(shutil.copytree(exported / "onnx", tmp_path / "onnx"))


@pytest.fixture
def imagenet_cache(tmp_path, monkeypatch, request):
    """TORCH_HOME without network access; returns where torchvision looks for ResNet-18's weights, or those of `param`."""
    from torchvision.models import get_model_weights

    def urlopen(*_, **__):
        raise urllib.error.URLError("no route to host")

    weights = get_model_weights(getattr(request, "param", "resnet18")).DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    path = tmp_path / "torch_home" / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    return path


def imagenet_state(name="resnet18"):
    from torchvision.models import get_model

    torch.manual_seed(0)
    state = get_model(name, num_classes=1000).state_dict()
    # the files of torchvision's first ResNets are older than BatchNorm's counters
    return {
        key: value
        for key, value in state.items()
        if not (name == "resnet18" and key.endswith("num_batches_tracked"))
    }


def printed_rows(text):
    """(back end, precision, batch) of each row of a printed table."""
    cells = [
        line.split()
        for line in text.splitlines()
        if line.split()[:1] in (["pytorch"], ["onnxruntime"])
    ]
    return [(row[0], row[1], row[5]) for row in cells]


# the documented commands


def test_pretrained_float_training_with_engines_afterwards(
    imagenet_cache, few_digits, tmp_path, capsys
):
    torch.save(imagenet_state(), imagenet_cache)
    flags = "--m resnet18 --dataset digits --pretrain --num_epochs 1 --test_trt --FP16 --INT8PTC --backend onnxruntime"
    train.main([*flags.split(), "--od", str(tmp_path / "out")])
    best = ckpt.load(tmp_path / "out" / "pytorch_exp" / "ckpt_best")
    assert best["model"] == {"name": "resnet18", "stem": "imagenet", "num_classes": 10}
    assert best["quantization"] is None
    output = capsys.readouterr().out
    rows = printed_rows(output)
    expected = [("pytorch", precision) for precision in ("FP32", "FAKE-QUANT-PTC")]
    expected += [("onnxruntime", precision) for precision in ("FP16", "INT8-PTC")]
    assert list(dict.fromkeys(row[:2] for row in rows)) == expected
    assert [batch for backend, precision, batch in rows if precision == "INT8-PTC"] == ["1", "128"]
    files = {path.name for path in (tmp_path / "out" / "pytorch_exp" / "ckpt_best_onnx").iterdir()}
    assert files == {
        "fp32.onnx",
        "fp16.onnx",
        "int8_ptc.onnx",
        "int8_ptc_fp16.onnx",
        "export.json",
        "predictions.npz",
    }


@pytest.mark.parametrize(
    "argv",
    [
        "--test_trt --FP16 --INT8PTC --ptc_mode implicit --backend tensorrt --data_dir there",
        "--test_trt --FP32 --INT8QAT --quant_layers * --skip_layers conv1 fc --calibrator mse --calib_images 64",
        "--test_trt",
    ],
)
def test_engines_afterwards_obey_the_flags_of_training(argv):
    """Whatever infer.py knows, too, it gets: but --m and the like, which the checkpoint knows."""
    given = train.build_parser().parse_args(argv.split())
    taken = infer.build_parser().parse_args(flags.handed_on(given))
    shared = vars(given).keys() & vars(taken).keys() - {"batch_size"}
    assert {"ptc_mode", "calibrator", "FP32", "INT8QAT", "skip_layers"} <= shared
    assert {key: vars(given)[key] for key in shared} == {key: vars(taken)[key] for key in shared}


def test_quantized_fine_tuning_from_a_float_checkpoint(
    float_checkpoint, few_digits, tmp_path, capsys
):
    flags = "--m resnet18 --quantize --partial_ckpt --num_epochs 1 --lr 1e-4 --lrdt 10"
    source, path = ckpt.load(float_checkpoint), tmp_path / "float"
    del source["data"]["digest"]  # the few images of this test are others
    ckpt.save(path, source)
    train.main([*flags.split(), "--load_ckpt", str(path), "--od", str(tmp_path)])
    output = capsys.readouterr().out
    assert (
        "122 float tensors and 0 ranges loaded, each exactly once; 0 unexpected, 0 missing, 51 ranges left"
        in output
    )
    assert "30 of 30 quantizable layers are quantized" in output
    folder = tmp_path / "pytorch_exp"
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt_0", "ckpt_1", "ckpt_best"]
    last = ckpt.load(folder / "ckpt_1")
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [1e-4, 1e-4]
    assert (last["model"], last["data"]) == (source["model"], source["data"])


def test_record_has_the_fixed_format(exported, qat_checkpoint):
    record = json.loads((exported / "record.json").read_text())
    assert set(record) == RECORD_KEYS
    assert (record["kind"], record["model"], record["stem"]) == (
        "inference",
        "resnet18",
        "imagenet",
    )
    assert (record["dataset"], record["seed"]) == ("digits", 0)
    assert record["flags"]["INT8QAT"] == "True"
    assert record["quantization"] == ckpt.load(qat_checkpoint)["quantization"]
    assert "load_ckpt" not in record["flags"]  # paths are this machine's, and tell a reader nothing
    assert record["commit"] is None or isinstance(record["commit"], str)
    assert set(record["environment"]) == ENVIRONMENT_KEYS
    assert record["environment"]["torch"] == torch.__version__
    assert all(
        set(row) == ROW_KEYS and set(row["latency_ms"]) == {"p50", "p99"} for row in record["rows"]
    )
    assert {row["precision"] for row in record["rows"]} <= PRECISIONS


def test_a_flag_of_zero_is_recorded(exported):
    args = infer.build_parser().parse_args(["--opt_level", "0", "--batch_size"])
    record = infer.make_record(infer.read_export(exported / "onnx")[0], [], args)
    assert record["flags"]["opt_level"] == "0"
    assert not {"audit", "calibrator", "batch_size", "torch_compile"} & set(
        record["flags"]
    )  # not given


@pytest.mark.parametrize("other", ["gpu", "cpu"])
def test_latencies_of_another_machine_are_left_out(other):
    rows = [
        records.make_row("pytorch", "FP32", 90.0, 0.0, 100.0, size, p50=1.0, p99=2.0)
        for size in (1, 128)
    ]
    here = records.environment()
    assert records.merge_environment(here, rows) == (here, rows)
    environment, merged = records.merge_environment(
        {**here, other: "another", "torch": "9.9"}, rows
    )
    assert environment == {**here, "torch": here["torch"] or "9.9"}
    assert merged == [records.make_row("pytorch", "FP32", 90.0, 0.0, 100.0)]


def test_times_of_the_first_calls_do_not_count(monkeypatch):
    monkeypatch.setattr(measure, "WARM_UP_RUNS", 2)
    calls = iter([[1e6], [1e6]] + [[1.0]] * 2000)
    assert set(measure.repeated_ms(lambda: next(calls))) == {1.0}


def test_record_has_a_row_for_each_network_and_batch_size(exported):
    rows = json.loads((exported / "record.json").read_text())["rows"]
    assert [(row["backend"], row["precision"], row["batch_size"]) for row in rows] == [
        ("pytorch", "FP32", 1),
        ("pytorch", "FP32", 128),
        ("pytorch", "FAKE-QUANT-QAT", None),
        ("onnxruntime", "FP32", 1),
        ("onnxruntime", "FP32", 128),
        ("onnxruntime", "INT8-QAT", 1),
        ("onnxruntime", "INT8-QAT", 128),
    ]


def test_numbers_of_a_record_agree_with_each_other(exported):
    rows = json.loads((exported / "record.json").read_text())["rows"]
    reference = rows[0]["accuracy_pct"]
    for row in rows:
        assert row["accuracy_pct"] - row["delta_pct"] == pytest.approx(reference)
        assert 0 <= row["accuracy_pct"] <= 100
        assert (row["agreement_pct"] == 100) or row["precision"] != "FP32"
        p50, p99 = row["latency_ms"]["p50"], row["latency_ms"]["p99"]
        if row["batch_size"] is None:
            assert (p50, p99, row["throughput_img_s"]) == (None, None, None)
        else:
            assert 0 < p50 <= p99
            assert row["throughput_img_s"] == pytest.approx(1000 * row["batch_size"] / p50)
        file = {"FP32": "fp32.onnx", "INT8-QAT": "int8_qat.onnx"}.get(row["precision"])
        size = (
            (exported / "onnx" / file).stat().st_size / 1e6
            if row["backend"] == "onnxruntime"
            else None
        )
        assert row["file_mb"] == size


def test_recorded_accuracies_are_those_of_the_checkpoints_networks(
    exported, qat_checkpoint, digits
):
    content = ckpt.load(qat_checkpoint)
    images = normalised(digits.test_images, content["data"]["mean"], content["data"]["std"])
    rows = {
        (row["backend"], row["precision"]): row
        for row in json.loads((exported / "record.json").read_text())["rows"]
    }
    predictions = {}
    for precision, build, state in (
        (
            "FP32",
            infer.build_float,
            {key: value for key, value in content["start"].items() if "_quantizer" not in key},
        ),
        ("FAKE-QUANT-QAT", infer.build_quantized, content["state"]),
    ):
        model = build(content).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            predictions[precision] = model(images).argmax(1).numpy()
        accuracy = 100 * (predictions[precision] == digits.test_labels).mean()
        assert rows["pytorch", precision]["accuracy_pct"] == pytest.approx(
            accuracy, abs=0.3
        )  # one image is 0.28 %
    agreement = 100 * (predictions["FP32"] == predictions["FAKE-QUANT-QAT"]).mean()
    assert rows["pytorch", "FAKE-QUANT-QAT"]["agreement_pct"] == pytest.approx(agreement, abs=0.6)
    assert rows["onnxruntime", "INT8-QAT"]["accuracy_pct"] == pytest.approx(
        rows["pytorch", "FAKE-QUANT-QAT"]["accuracy_pct"], abs=1.0
    )


def test_plot_is_a_png(exported):
    from PIL import Image

    with Image.open(exported / "plot.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
        assert np.asarray(image.convert("L")).std() > 1


def test_plot_takes_many_batch_sizes(exported, tmp_path):
    sizes = [str(size) for size in range(1, 9)]
    path = tmp_path / "plot.png"
    infer.main(
        [
            "--onnx",
            str(exported / "onnx"),
            "--backend",
            "onnxruntime",
            "--batch_size",
            *sizes,
            "--plot",
            str(path),
        ]
    )
    assert path.exists()


def test_exported_files_are_evaluated_without_torch(exported, tmp_path, run_script):
    argv = [
        "--onnx",
        exported / "onnx",
        "--FP32",
        "--INT8QAT",
        "--batch_size",
        "1",
        "--backend",
        "onnxruntime",
    ]
    process = run_script(
        "infer.py", *argv, "--record", tmp_path / "record.json", blocked=("torch",)
    )
    assert process.returncode == 0, process.stderr
    assert ("onnxruntime", "INT8-QAT", "1") in printed_rows(process.stdout)
    here, there = (
        json.loads(path.read_text())
        for path in (exported / "record.json", tmp_path / "record.json")
    )
    assert there["environment"]["torch"] == here["environment"]["torch"]

    def accuracies(record):
        return {
            (row["backend"], row["precision"]): (row["accuracy_pct"], row["agreement_pct"])
            for row in record["rows"]
        }

    assert accuracies(there) == accuracies(here)


def test_without_batch_sizes_only_accuracy_is_measured(exported, tmp_path):
    argv = [
        "--onnx",
        str(exported / "onnx"),
        "--FP32",
        "--INT8QAT",
        "--backend",
        "onnxruntime",
        "--batch_size",
    ]
    infer.main([*argv, "--record", str(tmp_path / "record.json")])
    timed, untimed = (
        [row for row in json.loads(path.read_text())["rows"] if row["backend"] == "onnxruntime"]
        for path in (exported / "record.json", tmp_path / "record.json")
    )
    assert [(row["precision"], row["throughput_img_s"]) for row in untimed] == [
        ("FP32", None),
        ("INT8-QAT", None),
    ]
    assert {(row["precision"], row["accuracy_pct"]) for row in untimed} == {
        (row["precision"], row["accuracy_pct"]) for row in timed
    }


def test_all_exported_precisions_are_evaluated_if_none_is_named(exported, capsys):
    infer.main(["--onnx", str(exported / "onnx"), "--batch_size", "1", "--backend", "onnxruntime"])
    output = capsys.readouterr().out
    assert "INT8-PTC: not in this export" in output
    assert {row[:2] for row in printed_rows(output)} >= {
        ("onnxruntime", "FP32"),
        ("onnxruntime", "INT8-QAT"),
    }


# pretrained weights


@pytest.mark.parametrize(
    ("imagenet_cache", "name", "stem", "classifier"),
    [
        ("resnet18", "resnet18", "imagenet", ["fc.weight", "fc.bias"]),
        *(
            (name, name, "cifar", ["classifier.1.weight", "classifier.1.bias"])
            for name in ("mobilenet_v2", "efficientnet_b0")
        ),
    ],
    indirect=["imagenet_cache"],
)
def test_pretrained_weights_fill_everything_but_the_classifier(
    imagenet_cache, name, stem, classifier
):
    source = imagenet_state(name)
    torch.save(source, imagenet_cache)
    model = models.build(name, 10, stem)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    models.load_imagenet_weights(model, name)
    for key, value in model.state_dict().items():
        kept = key in classifier or key not in source
        assert torch.equal(value, before[key] if kept else source[key]), key


def test_pretrain_offline_names_the_file_and_where_to_put_it(imagenet_cache, tmp_path, error_line):
    argv = ["--m", "resnet18", "--dataset", "digits", "--pretrain", "--od", tmp_path / "out"]
    line = error_line(train.main, argv)
    assert imagenet_cache.name in line
    assert str(imagenet_cache.parent) in line
    assert "no route to host" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_pretrain_with_a_damaged_file_names_it(imagenet_cache, tmp_path, error_line):
    torch.save(imagenet_state(), imagenet_cache)
    imagenet_cache.write_bytes(imagenet_cache.read_bytes()[:1000])
    argv = ["--m", "resnet18", "--dataset", "digits", "--pretrain", "--od", tmp_path / "out"]
    assert imagenet_cache.name in error_line(train.main, argv)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--m", "vanilla_cnn"],
            f"torchvision has no ImageNet weights for vanilla_cnn, but for {', '.join(STEMMED)}",
        ),
        (["--m", "resnet18", "--stem", "cifar"], "1 misshapen: conv1.weight; use --stem imagenet"),
    ],
)
def test_pretrain_that_cannot_fit_says_why(imagenet_cache, tmp_path, error_line, flags, said):
    torch.save(imagenet_state(), imagenet_cache)
    line = error_line(
        train.main, [*flags, "--dataset", "digits", "--pretrain", "--od", tmp_path / "out"]
    )
    assert said in line
    assert list((tmp_path / "out").iterdir()) == []


# mistakes with train.py


def test_unknown_model_lists_the_models(tmp_path, run_script, failure_line):
    process = run_script("train.py", "--m", "resnet19", "--dataset", "digits", "--od", tmp_path)
    assert failure_line(
        process
    ) == "error: no model 'resnet19'; there are vanilla_cnn, " + ", ".join(STEMMED)
    assert list(tmp_path.iterdir()) == []


def test_no_model_is_one_line(tmp_path, error_line):
    assert "--m is needed" in error_line(train.main, ["--dataset", "digits", "--od", tmp_path])


@pytest.mark.parametrize("flag", ["--quant_layers", "--skip_layers"])
def test_unknown_layer_pattern_lists_layers_near_it(tmp_path, float_checkpoint, error_line, flag):
    argv = [
        "--quantize",
        "--partial_ckpt",
        "--load_ckpt",
        float_checkpoint,
        flag,
        "layer1.0.convv1",
        "--od",
        tmp_path,
    ]
    line = error_line(train.main, argv)
    assert "'layer1.0.convv1' matches no quantizable layer" in line
    assert "layer1.0.conv1" in line.split("near it:")[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--m", "resnet18", "--quantize"], "--load_ckpt"),
        (["--m", "resnet18", "--quantize", "--partial_ckpt"], "--load_ckpt"),
        (["--m", "resnet18", "--pretrain", "--load_ckpt", "{}"], "--pretrain and --load_ckpt"),
    ],
)
def test_nothing_or_too_much_to_start_from_is_one_line(
    tmp_path, float_checkpoint, error_line, flags, said
):
    argv = [flag.format(float_checkpoint) for flag in flags]
    assert said in error_line(train.main, [*argv, "--dataset", "digits", "--od", tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_class_with_one_image_does_not_divide_by_zero(tmp_path, error_line):
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    argv = [
        "--m",
        "vanilla_cnn",
        "--dataset",
        "folder",
        "--data_dir",
        tmp_path,
        "--num_epochs",
        "1",
        "--od",
        tmp_path / "out",
    ]
    assert str(tmp_path) in error_line(train.main, argv)


def test_float_training_works_without_pytorch_quantization(tmp_path, small_cifar10, run_script):
    argv = [
        "--m",
        "resnet18",
        "--stem",
        "imagenet",
        "--data_dir",
        small_cifar10,
        "--num_epochs",
        "1",
        "--od",
        tmp_path,
    ]
    process = run_script("train.py", *argv, blocked=("pytorch_quantization",))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "pytorch_exp" / "ckpt_best").exists()


def test_quantized_training_without_pytorch_quantization_is_one_line(
    tmp_path, float_checkpoint, run_script, failure_line
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
    process = run_script("train.py", *argv, blocked=("pytorch_quantization",))
    assert "pytorch" in failure_line(process)
    assert list(tmp_path.iterdir()) == []


# mistakes with infer.py


@pytest.mark.parametrize("flags", [[], ["--onnx", "a", "--load_ckpt", "b"]])
def test_infer_needs_exactly_one_source(error_line, flags):
    line = error_line(infer.main, flags)
    assert "--load_ckpt" in line
    assert "--onnx" in line


def test_infer_from_a_checkpoint_without_torch_names_the_package(
    qat_checkpoint, run_script, failure_line
):
    process = run_script("infer.py", "--load_ckpt", qat_checkpoint, blocked=("torch",))
    assert "'torch' is missing" in failure_line(process)


def test_int8_qat_of_a_float_checkpoint_says_how_to_get_it(float_checkpoint, tmp_path, error_line):
    argv = ["--load_ckpt", float_checkpoint, "--INT8QAT", "--onnx_dir", tmp_path / "onnx"]
    line = error_line(infer.main, argv)
    assert "is a float checkpoint" in line
    assert "train.py --quantize" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    importlib.util.find_spec("pycuda") is not None, reason="PyCUDA is installed: there may be a GPU"
)
def test_tensorrt_by_name_without_the_package_says_what_is_missing(exported, error_line):
    line = error_line(infer.main, ["--onnx", exported / "onnx", "--backend", "tensorrt"])
    assert line.startswith("error: --backend tensorrt: the Python package ")
    assert "pip install" in line


@pytest.mark.skipif(
    importlib.util.find_spec("pycuda") is not None, reason="PyCUDA is installed: there may be a GPU"
)
def test_without_tensorrt_onnx_runtime_runs_and_says_why(exported, capsys):
    infer.main(["--onnx", str(exported / "onnx"), "--batch_size", "1"])
    output = capsys.readouterr().out
    assert "TensorRT is not used: the Python package " in output
    assert ("onnxruntime", "INT8-QAT", "1") in printed_rows(output)


def test_folder_without_a_manifest_is_no_export(tmp_path, error_line):
    assert f"{tmp_path} is no complete export" in error_line(infer.main, ["--onnx", tmp_path])
    assert "is no complete export" in error_line(infer.main, ["--onnx", tmp_path / "none"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("export.json", b""),
        ("export.json", b'{"model": "resnet18", "fi'),
        ("export.json", b"\xff\xfe"),
        ("export.json", b"{}"),
        ("export.json", b"[]"),
        ("predictions.npz", b"PK\x03\x04"),
        ("predictions.npz", b""),
    ],
)
def test_damaged_export_is_one_line(export_copy, error_line, name, content):
    (export_copy / name).write_bytes(content)
    assert f"{export_copy} is no complete export" in error_line(infer.main, ["--onnx", export_copy])


@pytest.mark.parametrize("size", [0, 1000, -1000, None])
def test_truncated_or_missing_network_is_named(export_copy, error_line, size):
    path = export_copy / "int8_qat.onnx"
    data = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(data[:size])
    argv = ["--onnx", export_copy, "--INT8QAT", "--batch_size", "1", "--backend", "onnxruntime"]
    assert str(path) in error_line(infer.main, argv)


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_stops_reading_is_no_failure(lines):
    main = f"input(), [print('line') for _ in range({lines})]"  # few stay in a buffer until the end
    code = f"from utils.errors import run; run(lambda: ({main}))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("go on\n")
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_terminal_without_a_tables_letters_gets_another():
    code = "from utils.errors import run; run(lambda: print('Δ FP32'))"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True
        ).stdout
        == b"? FP32\n"
    )


@pytest.mark.parametrize("flag", ["--INT8PTC", "--INT8QAT"])
def test_a_network_that_was_not_exported_is_one_line_if_it_was_asked_for(
    export_copy, error_line, flag, capsys
):
    precision = flag.replace("--INT8", "INT8-")
    manifest = json.loads((export_copy / "export.json").read_text())
    manifest["int8_nodes"].pop(precision, None)
    (export_copy / "export.json").write_text(json.dumps(manifest))
    argv = ["--onnx", export_copy, "--batch_size", "1", "--backend", "onnxruntime"]
    assert (
        error_line(infer.main, [*argv, flag])
        == f"error: {precision} is not in {export_copy}: export it again, with {flag}"
    )
    infer.main(list(map(str, argv)))  # all that there are
    assert f"{precision}: not in this export, no row" in capsys.readouterr().out


def test_two_exports_do_not_mix_in_one_folder(qat_checkpoint, export_copy, error_line):
    argv = [
        "--load_ckpt",
        qat_checkpoint,
        "--onnx_dir",
        export_copy,
        "--export_only",
        "--batch_size",
    ]
    with locked(export_copy):
        assert f"another process is at work in {export_copy}" in error_line(infer.main, argv)
    infer.read_export(export_copy)


def test_a_record_follows_a_link_and_spares_what_is_no_file(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "elsewhere.json")
    records.write(link, {"kind": "linked"})
    assert link.is_symlink()
    assert json.loads((tmp_path / "elsewhere.json").read_text()) == {"kind": "linked"}
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        records.write(pipe, {"kind": "piped"})
        assert json.loads(read.result()) == {"kind": "piped"}
    assert pipe.is_fifo()


def test_an_export_interrupted_leaves_the_one_before_or_none(
    qat_checkpoint, export_copy, error_line, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    there = sorted(export_copy.iterdir())
    for module, name in ((infer, "evaluate_torch"), (infer.np, "savez"), (infer.records, "write")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            infer.main(["--load_ckpt", str(qat_checkpoint), "--onnx_dir", str(export_copy)])
        infer.read_export(export_copy)  # whole as before
        assert sorted(export_copy.iterdir()) == there
    with monkeypatch.context() as patch:
        patch.setattr(
            infer.np, "savez", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        )
        line = error_line(infer.main, ["--load_ckpt", qat_checkpoint, "--onnx_dir", export_copy])
        assert (
            line
            == f"error: cannot write {export_copy}: No space left on device; free space or name another folder"
        )
    infer.read_export(export_copy)
    monkeypatch.setattr(files, "sorted", interrupted, raising=False)  # as the files are renamed
    with pytest.raises(KeyboardInterrupt):
        infer.main(["--load_ckpt", str(qat_checkpoint), "--onnx_dir", str(export_copy)])
    assert f"{export_copy} is no complete export" in error_line(infer.main, ["--onnx", export_copy])


def test_export_made_from_other_test_images_is_one_line(exported, few_digits, error_line):
    line = error_line(infer.main, ["--onnx", exported / "onnx", "--backend", "onnxruntime"])
    assert "other images, or in another order, than the checkpoint or export was made with" in line


def test_what_one_run_held_out_is_not_trained_on_by_the_next(
    float_checkpoint, few_digits, error_line, tmp_path
):
    argv = ["--quantize", "--partial_ckpt", "--load_ckpt", float_checkpoint, "--od", tmp_path]
    assert "other images, or in another order" in error_line(train.main, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--m", "resnet50"], "--m resnet50 contradicts"),
        (["--dataset", "cifar10"], "--dataset cifar10 contradicts"),
        (["--batch_size", "0"], "--batch_size, --torch_compile and --calib_images: at least 1"),
        (["--calib_images", "0"], "--batch_size, --torch_compile and --calib_images: at least 1"),
        *((["--workspace_gb", value], "--workspace_gb ") for value in ("0", "-1", "nan", "inf")),
        (["--stem", "cifar"], "--stem cifar contradicts"),
        (["--img_size", "64"], "--img_size 64: the images of digits are 32 pixels wide"),
        (
            ["--skip_layers", "fc", "--calib_images", "64"],
            "--skip_layers, --calib_images: decided when",
        ),
    ],
)
def test_flags_that_contradict_the_export_are_refused(exported, error_line, flags, said):
    assert said in error_line(infer.main, ["--onnx", exported / "onnx", *flags])


@pytest.mark.parametrize("flag", ["--record", "--plot"])
@pytest.mark.parametrize("below", ["", "file/below"])
def test_output_that_cannot_be_written_is_one_line(
    exported, tmp_path, error_line, flag, below, capsys
):
    (tmp_path / "file").touch()
    argv = [
        "--onnx",
        exported / "onnx",
        "--batch_size",
        "1",
        "--backend",
        "onnxruntime",
        flag,
        tmp_path / below,
    ]
    line = error_line(infer.main, argv)
    assert line.startswith(
        f"error: cannot write {tmp_path}/file: "
        if below
        else f"error: {tmp_path} is a folder: name a file"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # the table is there, whatever becomes of the file
    assert ("onnxruntime  INT8-QAT" in capsys.readouterr().out) == bool(below)


@pytest.mark.parametrize(
    "flags",
    [["--dataset", "mnist"], ["--backend", "cuda"], ["--calibrator", "best"], ["--no_such_flag"]],
)
@pytest.mark.parametrize("main", [train.main, infer.main])
def test_values_that_argparse_knows_to_be_wrong_exit_with_usage(main, flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    assert exit_info.value.code == 2
    assert flags[-1] in capsys.readouterr().err


def test_shared_flags_agree_or_contradict():
    from utils.flags import agreed

    assert (
        agreed("--x", 1, 1)
        == agreed("--x", 1, None)
        == agreed("--x", None, 1, 2)
        == agreed("--x", None, None, 1)
        == 1
    )
    with pytest.raises(UserError, match="--x 1 contradicts the checkpoint, which says 2"):
        agreed("--x", 1, 2)
    with pytest.raises(UserError, match="--x is needed"):
        agreed("--x", None, None)


def test_implicit_calibration_without_tensorrt_is_one_line(exported, error_line):
    assert "--ptc_mode implicit: " in error_line(
        infer.main, ["--onnx", exported / "onnx", "--INT8PTC", "--ptc_mode", "implicit"]
    )


@pytest.mark.parametrize("flag", [["--audit"], ["--ptc_mode", "implicit"]])
@pytest.mark.parametrize("backend", ["onnxruntime", "auto"])
def test_what_only_tensorrt_can_do_is_refused_without_it(
    exported, flag, backend, error_line, monkeypatch
):
    def require_gpu():
        raise UserError("there is no GPU here")

    monkeypatch.setattr(tensorrt_engine, "require_gpu", require_gpu)
    argv = ["--onnx", exported / "onnx", "--dataset", "digits", "--backend", backend, *flag]
    assert " ".join(flag) in error_line(infer.main, argv)


def test_engines_for_no_batch_size_are_refused(exported, error_line, monkeypatch):
    monkeypatch.setattr(tensorrt_engine, "require_gpu", lambda: None)
    assert "--batch_size: " in error_line(
        infer.main, ["--onnx", exported / "onnx", "--dataset", "digits", "--batch_size"]
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--test_trt", "--INT8QAT"], "--INT8QAT: this run trains in float"),
        (["--quantize", "--pretrain"], "--quantize starts from a trained network"),
        (["--partial_ckpt"], "--partial_ckpt: this run trains in float"),
        (
            ["--skip_layers", "fc", "--calib_images", "64"],
            "--skip_layers, --calib_images: this run trains in float",
        ),
        (
            ["--FP16", "--INT8PTC", "--backend", "tensorrt"],
            "--FP16, --INT8PTC, --backend: nothing is exported here",
        ),
        (["--resume", "x", "--load_ckpt", "y"], "--resume and --load_ckpt"),
        (
            ["--test_trt", "--FP16", "--ptc_mode", "implicit"],
            "--ptc_mode implicit is a second --INT8PTC",
        ),
        (
            ["--test_trt", "--ptc_mode", "implicit", "--backend", "onnxruntime"],
            "--ptc_mode implicit is TensorRT's",
        ),
    ],
)
def test_training_flags_that_contradict_each_other_are_refused_at_once(argv, said, error_line):
    assert said in error_line(train.main, [*argv, "--m", "resnet18"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--torch_compile", "8"], "no GPU"),
        (["--audit", "--backend", "onnxruntime"], "--audit is TensorRT's"),
        (["--FP32", "--ptc_mode", "implicit"], "--ptc_mode implicit is a second --INT8PTC"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_an_earlier_export(
    qat_checkpoint, export_copy, flags, said, error_line, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in error_line(
        infer.main, ["--load_ckpt", qat_checkpoint, "--onnx_dir", export_copy, *flags]
    )
    infer.read_export(export_copy)


@pytest.mark.parametrize(
    "ask",
    [lambda _: np.empty(1 << 60, np.uint8), lambda _: torch.empty(1 << 60, dtype=torch.uint8)],
)
def test_too_little_memory_is_one_line(ask, error_line):
    assert "out of memory: use a smaller --batch_size" in error_line(ask, [])


def test_export_only_leaves_a_complete_export_and_runs_only_pytorch(
    qat_checkpoint, tmp_path, capsys
):
    infer.main(
        [
            "--load_ckpt",
            str(qat_checkpoint),
            "--INT8QAT",
            "--export_only",
            "--onnx_dir",
            str(tmp_path / "onnx"),
        ]
    )
    assert {row[0] for row in printed_rows(capsys.readouterr().out)} == {"pytorch"}
    manifest, in_torch = infer.read_export(tmp_path / "onnx")
    assert sorted(manifest["int8_nodes"]) == ["FP32", "INT8-QAT"]
    assert manifest["int8_nodes"]["FP32"] == []
    assert len(manifest["int8_nodes"]["INT8-QAT"]) == 29  # all but the pool, which sees one pixel
    assert {name: len(classes) for name, classes in in_torch.items()} == {
        "FP32": 360,
        "FAKE-QUANT-QAT": 360,
    }


def test_the_backend_takes_a_network_that_reports_its_layers(exported, digits):
    """As TensorRT does: layers are counted, and a row with the time from host to host stands beside the engine's own."""
    from types import SimpleNamespace

    from utils.backends.onnxruntime import OnnxRuntimeNetwork

    network = OnnxRuntimeNetwork(exported / "onnx" / "int8_qat.onnx")
    network.layers = [SimpleNamespace(precision=kind) for kind in ("INT8", "INT8", "FP16")]
    in_torch = {"FP32": digits.test_labels, "FAKE-QUANT-QAT": 1 + digits.test_labels}
    rows = infer.evaluate_network(network, "INT8-QAT", digits, in_torch, [1, 64])
    agreement_pct = 100 * np.mean(network(digits.test_images).argmax(1) == 1 + digits.test_labels)
    assert all(
        row["agreement_pct"] == pytest.approx(agreement_pct) for row in rows
    )  # with the same precision's network
    assert all(row["accuracy_pct"] - 100 == pytest.approx(row["delta_pct"]) for row in rows)
    assert [(row["backend"], row["batch_size"]) for row in rows] == [
        ("onnxruntime", 1),
        ("onnxruntime", 64),
        ("onnxruntime end-to-end", 64),
    ]
    assert all((row["int8_layers"], row["layers"]) == (2, 3) for row in rows)
    assert rows[2]["latency_ms"] == {"p50": None, "p99": None}
    assert rows[2]["throughput_img_s"] > 0
