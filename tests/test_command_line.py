"""The two scripts as a user calls them: commands, the record's format, one line a mistake."""

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import urllib.error
import urllib.request
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    STEMMED,
    build,
    digits_cut_to,
    normalised,
    write_graph_of_another_kind,
)

import dataset
import infer
import train
from utils import checkpoint as ckpt
from utils import compare, files, flags, networks, records, schema
from utils.backends import network as measure
from utils.backends import tensorrt_build
from utils.backends.network import EVALUATION_BATCH, Network, end_to_end_img_s, repeated
from utils.backends.onnxruntime import OnnxRuntimeNetwork
from utils.compare import Comparison
from utils.errors import UserError
from utils.files import locked
from utils.manifest import Manifest, read_export
from utils.plot import plot
from utils.recipe import Recipe
from utils.records import Record, Row
from utils.specs import DataSpec, NetworkSpec, Quantization

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
    "engines",
    "flags",
    "commit",
    "environment",
    "rows",
    "sensitivity",
    "choice",
}
ENVIRONMENT_KEYS = {
    "gpu",
    "cpu",
    "cpu_threads",
    "torch",
    "tensorrt",
    "openvino",
    "onnxruntime",
    "python",
}
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
    """Folder with a record, a plot, a report and `onnx`, of FP32 and INT8-QAT in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("exported")
    flags = "--m resnet18 --quantize --FP32 --INT8QAT --backend onnxruntime"
    files = f"--onnx_dir {folder}/onnx --record {folder}/record.json --plot {folder}/plot.png"
    files += f" --report {folder}/report.html"
    infer.main(f"--load_ckpt {qat_checkpoint} {flags} {files}".split())
    return folder


@pytest.fixture(scope="module")
def record(exported):
    """The record of `exported` as JSON."""
    return json.loads((exported / "record.json").read_text())


@pytest.fixture
def few_digits(digits):
    """For the rest of the test, `--dataset digits` is 60 train and 40 test images."""
    with digits_cut_to(60, 40, digits):
        yield


@pytest.fixture
def export_copy(exported, tmp_path):
    """An export to damage."""
    return Path(shutil.copytree(exported / "onnx", tmp_path / "onnx"))


@pytest.fixture
def imagenet_cache(tmp_path, monkeypatch, request):
    """Where torchvision looks for ResNet-18's weights, or those of `param`; there is no network."""
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
    if name == "resnet18":
        # the files of torchvision's first ResNets are older than BatchNorm's counters
        counters = [key for key in state if key.endswith("num_batches_tracked")]
        for key in counters:
            del state[key]
    return state


def printed_rows(text):
    """(back end, precision, batch) of each row of a printed table."""
    rows = []
    for line in text.splitlines():
        cells = line.split()
        if cells[:1] in (["pytorch"], ["openvino"], ["onnxruntime"]):
            rows.append((cells[0], cells[1], cells[5]))
    return rows


# the documented commands


def test_pretrained_float_training_with_engines_afterwards(
    imagenet_cache, few_digits, tmp_path, capsys
):
    torch.save(imagenet_state(), imagenet_cache)
    flags = "--m resnet18 --dataset digits --pretrain --num_epochs 1"
    engines = "--test_trt --FP16 --INT8PTC --backend onnxruntime"
    train.main(f"{flags} {engines} --od {tmp_path}/out".split())
    best = ckpt.load(tmp_path / "out" / "pytorch_exp" / "ckpt_best")
    assert vars(best.network) == {"name": "resnet18", "stem": "imagenet", "num_classes": 10}
    assert best.quantization is None

    rows = printed_rows(capsys.readouterr().out)
    networks = [("pytorch", "FP32"), ("pytorch", "FAKE-QUANT-PTC")]
    networks += [("onnxruntime", "FP16"), ("onnxruntime", "INT8-PTC")]
    assert list(dict.fromkeys(row[:2] for row in rows)) == networks
    assert [row[2] for row in rows if row[1] == "INT8-PTC"] == ["1", "128"]

    folder = tmp_path / "out" / "pytorch_exp" / "ckpt_best_onnx"
    graphs = {"fp32.onnx", "fp16.onnx", "int8_ptc.onnx", "int8_ptc_fp16.onnx"}
    assert {path.name for path in folder.iterdir()} == {*graphs, "export.json", "predictions.npz"}


@pytest.mark.parametrize(
    "argv",
    [
        "--test_trt --FP16 --INT8PTC --ptc_mode implicit --backend tensorrt",
        "--test_trt --INT8QAT --FP32 --skip_layers conv1 fc --calibrator mse --calib_images 64",
        "--test_trt",
    ],
)
def test_engines_afterwards_obey_the_flags_of_training(argv):
    """Whatever infer.py knows, too, means the same in train.py."""
    trained = train.build_parser().parse_args(argv.split())
    evaluated = infer.build_parser().parse_args(argv.replace("--test_trt", "").split())
    assert Comparison.of(trained) == Comparison.of(evaluated)
    assert flags.agreed_quantization(trained, None) == flags.agreed_quantization(evaluated, None)


def test_precisions_are_run_in_the_tables_order_each_once():
    args = infer.build_parser().parse_args(["--INT8QAT", "--FP32", "--INT8QAT"])
    assert Comparison.of(args).wanted == ["FP32", "INT8-QAT"]
    assert Comparison().wanted == ["FP32", "FP16", "INT8-PTC", "INT8-QAT"]
    implicit = Comparison(["INT8-PTC", "INT8-QAT"], ptc_mode="implicit")
    assert implicit.wanted == ["INT8-PTC", "INT8-PTC-IMPLICIT", "INT8-QAT"]


def test_quantized_fine_tuning_from_a_float_checkpoint_and_its_engine(
    float_checkpoint, few_digits, tmp_path, capsys
):
    # the few images of this test are others than the checkpoint's
    source, path = ckpt.load(float_checkpoint), tmp_path / "float"
    source.data = replace(source.data, digest=None)
    ckpt.save(path, source)
    flags = "--m resnet18 --quantize --partial_ckpt --num_epochs 1 --lr 1e-4 --lrdt 10"
    engines = "--test_trt --INT8QAT --backend onnxruntime"
    train.main(f"--load_ckpt {path} {flags} {engines} --od {tmp_path}".split())

    output = capsys.readouterr().out
    assert "122 float tensors and 0 ranges loaded, each exactly once" in output
    assert "0 unexpected, 0 missing, 51 ranges left" in output
    assert "INT8: 100.0 % of the multiply-adds, 8 of 8 additions; float: nothing" in output
    assert ("onnxruntime", "INT8-QAT", "128") in printed_rows(output)

    folder = tmp_path / "pytorch_exp"
    checkpoints = {path.name for path in folder.iterdir()} - {"ckpt_best_onnx"}
    assert checkpoints == {"ckpt_1", "ckpt_best"}
    last = ckpt.load(folder / "ckpt_1")
    assert [group["lr"] for group in last.optimizer["param_groups"]] == [1e-4, 1e-4]
    assert (last.network, last.data) == (source.network, source.data)

    # as many images calibrated it as there were
    manifest, _ = read_export(folder / "ckpt_best_onnx")
    assert manifest.quantization == last.quantization
    assert last.quantization.calib_images < Quantization().calib_images


def test_layers_are_listed_without_training(tmp_path, capsys):
    train.main(f"--m vanilla_cnn --list_layers --od {tmp_path}/out".split())
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:-1]]
    convolutions = [f"features.{index}" for index in (0, 3, 7, 10, 14, 17)]
    assert names == [*convolutions, "avgpool", "fc"]
    assert lines[-1] == "INT8: 100.0 % of the multiply-adds; float: nothing of these"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["2", "0", "-5"])
def test_layers_are_not_listed_for_images_that_cannot_be(size, tmp_path, error_line):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    argv = ["--m", "vanilla_cnn", "--list_layers", "--dataset", "folder", "--data_dir", tmp_path]
    line = error_line(train.main, [*argv, "--img_size", size])
    assert line == "error: --img_size: 8 to 4096 pixels"


def test_layers_are_listed_of_a_network_with_as_many_classes_as_there_are_folders(
    tmp_path, monkeypatch, error_line
):
    sizes = []
    build = networks.build_quantized
    monkeypatch.setattr(
        networks, "build_quantized", lambda spec, *args: sizes.append(spec) or build(spec, *args)
    )
    for name in ("ant", "bee", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
    argv = f"--m vanilla_cnn --list_layers --dataset folder --data_dir {tmp_path}"
    train.main(argv.split())
    assert [spec.num_classes for spec in sizes] == [3]
    assert "none/train is missing" in error_line(train.main, f"{argv}/none".split())


def test_listed_layers_show_the_choice(tmp_path, capsys):
    choice = "--quant_layers features.* fc --skip_layers features.3 fc"
    train.main(f"--m vanilla_cnn --list_layers {choice} --od {tmp_path}/out".split())
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"\s{2,}", line) for line in lines[1:-1]]
    assert [row[0] for row in rows if row[3] == "float"] == ["features.3", "avgpool", "fc"]
    assert lines[-1].endswith(" % of the multiply-adds; float: features.3, avgpool, fc")
    assert list(tmp_path.iterdir()) == []


def test_record_has_the_fixed_format(record, qat_checkpoint):
    assert set(record) == RECORD_KEYS
    assert record["kind"] == "inference"
    assert (record["model"], record["stem"]) == ("resnet18", "imagenet")
    assert (record["dataset"], record["seed"]) == ("digits", 0)
    assert record["flags"]["precisions"] == "['FP32', 'INT8-QAT']"
    assert record["quantization"] == vars(ckpt.load(qat_checkpoint).quantization)
    assert "load_ckpt" not in record["flags"]  # paths are this machine's, and tell a reader nothing
    assert record["commit"] is None or isinstance(record["commit"], str)
    assert set(record["environment"]) == ENVIRONMENT_KEYS
    for row in record["rows"]:
        assert set(row) == ROW_KEYS
        assert set(row["latency_ms"]) == {"p50", "p99"}
    assert {row["precision"] for row in record["rows"]} <= PRECISIONS


@pytest.mark.parametrize(
    "path",
    [
        "2026-11-25_h100/mobilenet_v2_cifar_seed0.json",
        "2026-11-25_h100/resnet18_cifar_seed0.json",
    ],
)
def test_a_record_of_the_first_version_is_still_one(path):
    content = json.loads((ROOT / "results" / path).read_text())
    record = schema.parse(Record, content, path)
    assert record.rows == [Row(**row) for row in content["rows"]]
    assert vars(record.quantization) == content["quantization"]
    # the study adds to its own what inference does not know; later fields are empty
    known = {name: content.get(name) for name in RECORD_KEYS}
    assert asdict(record) == {**known, "engines": []}


def test_a_flag_of_zero_is_recorded():
    args = infer.build_parser().parse_args(["--opt_level", "0", "--batch_size"])
    given = infer.flag_values(args)
    assert given["opt_level"] == "0"
    for name in ("audit", "calibrator", "batch_sizes", "torch_compile", "precisions"):
        assert name not in given


def test_a_records_environment_names_no_package_that_ran_no_row(record, monkeypatch):
    import onnxruntime
    import openvino

    # installed and imported, as on a machine where another back end is in use
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="9.9"))
    versions = {"torch": torch.__version__, "tensorrt": "9.9"}
    versions["onnxruntime"] = onnxruntime.__version__
    versions["openvino"] = openvino.__version__
    backends = {package: package for package in versions} | {"torch": "pytorch"}
    for ran in (["torch"], ["tensorrt"], ["openvino"], ["torch", "onnxruntime"], []):
        environment = records.environment([backends[package] for package in ran])
        for package, version in versions.items():
            assert environment[package] == (version if package in ran else None)
    here = record["environment"]
    assert (here["torch"], here["onnxruntime"]) == (versions["torch"], versions["onnxruntime"])
    assert here["tensorrt"] is None


@pytest.mark.parametrize("other", ["gpu", "cpu"])
def test_latencies_of_another_machine_are_left_out(other):
    row = Row("pytorch", "FP32", 90.0, 0.0, 100.0)
    rows = [row.timed(size, 1.0, 2.0) for size in (1, 128)]
    here = records.environment(["pytorch"])
    assert records.merge_environment(here, rows, []) == (here, rows)
    there = {**here, other: "another", "torch": "9.9"}
    environment, merged = records.merge_environment(there, rows, [])
    assert environment == {**here, "torch": "9.9"}
    assert merged == [row]


@pytest.mark.parametrize(("said", "threads"), [("3", "3"), ("1,2", "1"), ("0", None), ("", None)])
def test_a_record_says_how_many_threads_may_compute(monkeypatch, said, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    expected = threads or str(len(os.sched_getaffinity(0)))
    assert records.environment([])["cpu_threads"] == expected


def test_a_back_end_has_as_many_threads_as_the_record_says(exported, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    network = OnnxRuntimeNetwork(exported / "onnx" / "fp32.onnx")
    assert network._session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize(("gpu", "kept"), [(None, False), ("H200", True)])
def test_another_number_of_threads_matters_on_a_cpu_alone(gpu, kept, monkeypatch):
    monkeypatch.setattr(records, "_gpu_name", lambda: gpu)
    row = Row("pytorch", "FP32", 90.0, 0.0, 100.0)
    timed = [row.timed(1, 1.0, 2.0)]
    here = records.environment(["pytorch"])
    assert records.merge_environment({**here, "cpu_threads": "99"}, timed, [])[1] == (
        timed if kept else [row]
    )
    earlier = {key: value for key, value in here.items() if key != "cpu_threads"}
    assert records.merge_environment(earlier, timed, [])[1] == timed


def test_times_of_the_first_calls_do_not_count(monkeypatch):
    monkeypatch.setattr(measure, "WARM_UP_RUNS", 2)
    calls = iter([[1e6], [1e6]] + [[1.0]] * 2000)
    assert set(measure.repeated_ms(lambda: next(calls))) == {1.0}


def test_record_has_a_row_for_each_network_and_batch_size(record):
    rows = record["rows"]
    assert [(row["backend"], row["precision"], row["batch_size"]) for row in rows] == [
        ("pytorch", "FP32", 1),
        ("pytorch", "FP32", 128),
        ("pytorch", "FAKE-QUANT-QAT", None),
        ("onnxruntime", "FP32", 1),
        ("onnxruntime", "FP32", 128),
        ("onnxruntime", "INT8-QAT", 1),
        ("onnxruntime", "INT8-QAT", 128),
    ]


def test_numbers_of_a_record_agree_with_each_other(exported, record):
    reference = record["rows"][0]["accuracy_pct"]
    files = {"FP32": "fp32.onnx", "INT8-QAT": "int8_qat.onnx"}
    for row in record["rows"]:
        assert row["accuracy_pct"] - row["delta_pct"] == pytest.approx(reference)
        assert 0 <= row["accuracy_pct"] <= 100
        assert row["agreement_pct"] == 100 or row["precision"] != "FP32"
        p50, p99 = row["latency_ms"]["p50"], row["latency_ms"]["p99"]
        if row["batch_size"] is None:
            assert (p50, p99, row["throughput_img_s"]) == (None, None, None)
        else:
            assert 0 < p50 <= p99
            assert row["throughput_img_s"] == pytest.approx(1000 * row["batch_size"] / p50)
        size_mb = None
        if row["backend"] == "onnxruntime":
            size_mb = (exported / "onnx" / files[row["precision"]]).stat().st_size / 1e6
        assert row["file_mb"] == size_mb


def test_recorded_accuracies_are_those_of_the_checkpoints_networks(
    record, trained_network, qat_checkpoint, digits
):
    content = ckpt.load(qat_checkpoint)
    qat_network = networks.build_quantized(content.network, content.quantization, (32, 32))
    qat_network.load_state_dict(content.state)
    images = normalised(digits.test_images, content.data.mean, content.data.std)
    rows = {(row["backend"], row["precision"]): row for row in record["rows"]}

    predictions = {}
    for precision, model in (("FP32", trained_network), ("FAKE-QUANT-QAT", qat_network)):
        with torch.no_grad():
            predictions[precision] = model.eval()(images).argmax(1).numpy()
        accuracy_pct = 100 * (predictions[precision] == digits.test_labels).mean()
        # one image is 0.28 %
        assert rows["pytorch", precision]["accuracy_pct"] == pytest.approx(accuracy_pct, abs=0.6)

    agreement_pct = 100 * (predictions["FP32"] == predictions["FAKE-QUANT-QAT"]).mean()
    assert agreement_pct < 90  # they are not the same network
    fake_quantized, int8 = rows["pytorch", "FAKE-QUANT-QAT"], rows["onnxruntime", "INT8-QAT"]
    assert fake_quantized["agreement_pct"] == pytest.approx(agreement_pct, abs=0.6)
    assert int8["accuracy_pct"] == pytest.approx(fake_quantized["accuracy_pct"], abs=1.5)
    assert int8["agreement_pct"] > 97  # with the same network in PyTorch


def test_plot_is_a_png(exported):
    from PIL import Image

    with Image.open(exported / "plot.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
        assert np.asarray(image.convert("L")).std() > 1


def test_the_report_has_the_rows_of_the_record(exported, record):
    page = (exported / "report.html").read_text()
    table = page.partition('<table id="rows">')[2].partition("</table>")[0]
    rows = schema.parse(Record, record, "record").rows
    found = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", table)
    assert found == [cell for line in records.cells_of(rows) for cell in line]
    # a range of each convolution
    assert page.count('<div class="use">') > 40


def test_plot_takes_many_batch_sizes(record, tmp_path):
    path = tmp_path / "plot.png"
    row = Row("onnxruntime", "FP32", 90.0)
    rows = [row.timed(size, 1.0, 2.0) for size in range(1, 20)]
    plot(path, replace(schema.parse(Record, record, "record"), rows=rows))
    assert path.exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_exported_files_are_evaluated_without_torch(
    exported, record, tmp_path, run_script, backend
):
    flags = f"--FP32 --INT8QAT --batch_size 32 --backend {backend}"
    output = f"--record {tmp_path}/record.json --report {tmp_path}/report.html"
    argv = f"infer.py --onnx {exported}/onnx {flags} {output}".split()
    process = run_script(*argv, blocked=("torch", "onnx"))
    assert process.returncode == 0, process.stderr
    # ONNX Runtime does not tell what it runs
    assert ("INT8-QAT ms" in (tmp_path / "report.html").read_text()) == (backend == "openvino")
    assert (backend, "INT8-QAT", "32") in printed_rows(process.stdout)
    there = json.loads((tmp_path / "record.json").read_text())
    assert there["environment"]["torch"] == record["environment"]["torch"]
    if backend == "onnxruntime":
        assert accuracies(there["rows"]) == accuracies(record["rows"])


def accuracies(rows):
    found = {}
    for row in rows:
        key = (row["backend"], row["precision"])
        found[key] = (row["accuracy_pct"], row["agreement_pct"])
    return found


def test_without_batch_sizes_only_accuracy_is_measured(exported, record, tmp_path):
    flags = "--FP32 --INT8QAT --backend onnxruntime --batch_size"
    infer.main(f"--onnx {exported}/onnx {flags} --record {tmp_path}/record.json".split())
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    untimed = [row for row in rows if row["backend"] == "onnxruntime"]
    assert [row["precision"] for row in untimed] == ["FP32", "INT8-QAT"]
    assert [row["throughput_img_s"] for row in untimed] == [None, None]
    assert accuracies(rows) == accuracies(record["rows"])


def test_all_exported_precisions_are_evaluated_if_none_is_named(exported, capsys):
    infer.main(f"--onnx {exported}/onnx --batch_size 1 --backend onnxruntime".split())
    output = capsys.readouterr().out
    assert "INT8-PTC: not in this export" in output
    networks = {row[:2] for row in printed_rows(output)}
    assert networks >= {("onnxruntime", "FP32"), ("onnxruntime", "INT8-QAT")}


# pretrained weights


@pytest.mark.parametrize(
    ("imagenet_cache", "stem", "classifier"),
    [
        ("resnet18", "imagenet", "fc"),
        ("mobilenet_v2", "cifar", "classifier.1"),
        ("efficientnet_b0", "cifar", "classifier.1"),
    ],
    indirect=["imagenet_cache"],
)
def test_pretrained_weights_fill_everything_but_the_classifier(
    imagenet_cache, request, stem, classifier
):
    name = request.node.callspec.params["imagenet_cache"]
    source = imagenet_state(name)
    torch.save(source, imagenet_cache)
    model = build(name, stem)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    networks.load_imagenet_weights(model, name)
    for key, value in model.state_dict().items():
        kept = key in (f"{classifier}.weight", f"{classifier}.bias") or key not in source
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
        (
            ["--m", "resnet18", "--stem", "cifar"],
            "1 of another shape: conv1.weight; use --stem imagenet",
        ),
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


def test_unknown_model_lists_the_models(tmp_path, error_line):
    line = error_line(train.main, f"--m resnet19 --dataset digits --od {tmp_path}".split())
    known = ", ".join(["vanilla_cnn", *STEMMED])
    elsewhere = "torchvision/NAME, timm/NAME or package.module:callable"
    assert line == f"error: no model 'resnet19'; there are {known}, and {elsewhere}"
    assert list(tmp_path.iterdir()) == []


def test_no_model_is_one_line(tmp_path, error_line):
    assert "--m is needed" in error_line(train.main, ["--dataset", "digits", "--od", tmp_path])


@pytest.mark.parametrize("flag", ["--quant_layers", "--skip_layers"])
def test_unknown_layer_pattern_lists_layers_near_it(tmp_path, float_checkpoint, error_line, flag):
    start = f"--quantize --partial_ckpt --load_ckpt {float_checkpoint} --od {tmp_path}"
    line = error_line(train.main, f"{start} {flag} layer1.0.convv1".split())
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
    flags = f"--m vanilla_cnn --dataset folder --data_dir {tmp_path} --od {tmp_path}/out"
    assert "no class has a second train image" in error_line(train.main, flags.split())


@pytest.mark.slow
def test_quantized_training_without_pytorch_quantization_is_one_line(
    tmp_path, float_checkpoint, run_script, failure_line
):
    flags = f"--quantize --partial_ckpt --load_ckpt {float_checkpoint} --num_epochs 0"
    argv = f"train.py {flags} --od {tmp_path}".split()
    process = run_script(*argv, blocked=("pytorch_quantization",))
    assert "pytorch" in failure_line(process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_checkpoint_that_is_only_calibrated_is_not_called_qat(
    qat_checkpoint, few_digits, tmp_path, capsys
):
    calibrated = replace(ckpt.load(qat_checkpoint), epoch=0)
    ckpt.save(tmp_path / "ckpt_0", calibrated)
    argv = f"--load_ckpt {tmp_path}/ckpt_0 --export_only".split()
    infer.main(argv)
    said = capsys.readouterr().out
    assert "this checkpoint is of epoch 0: its INT8-QAT is its INT8-PTC" in said
    assert "FAKE-QUANT-PTC" in said
    assert "FAKE-QUANT-QAT" not in said
    # unless it is asked for
    infer.main([*argv, "--INT8QAT"])
    assert "FAKE-QUANT-QAT" in capsys.readouterr().out
    # nor is it spoken of where nobody wants it
    infer.main([*argv, "--FP32", "--INT8PTC"])
    assert "epoch 0" not in capsys.readouterr().out


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
    assert "torch is missing: pip install torch" in failure_line(process)


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
def test_without_tensorrt_openvino_runs_and_says_why(exported, capsys, tmp_path):
    flags = f"--INT8QAT --batch_size 32 --audit --record {tmp_path}/record.json"
    infer.main(f"--onnx {exported}/onnx {flags}".split())
    output = capsys.readouterr().out
    assert "TensorRT is not used: the Python package " in output
    assert ("openvino", "INT8-QAT", "32") in printed_rows(output)
    record = json.loads((tmp_path / "record.json").read_text())
    row = record["rows"][-1]
    assert (row["backend"], row["agreement_pct"] > 97) == ("openvino", True)
    assert 0 < row["int8_layers"] < row["layers"]
    # ONNX Runtime checked it, but ran no row
    assert record["environment"]["openvino"].startswith("20")
    assert record["environment"]["onnxruntime"] is None


def test_folder_without_a_manifest_is_no_export(tmp_path, error_line):
    assert f"{tmp_path} is no complete export" in error_line(infer.main, ["--onnx", tmp_path])
    assert "none is no folder; make an export" in error_line(
        infer.main, ["--onnx", tmp_path / "none"]
    )
    assert not (tmp_path / "none").exists()


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
    export_copy, error_line, flag
):
    precision = flag.replace("--INT8", "INT8-")
    manifest = json.loads((export_copy / "export.json").read_text())
    manifest["int8_nodes"].pop(precision, None)
    (export_copy / "export.json").write_text(json.dumps(manifest))
    line = error_line(infer.main, f"--onnx {export_copy} --backend onnxruntime {flag}".split())
    said = f"{precision} is not in {export_copy}: export it again, with {flag}"
    assert line == f"error: {said}"


def test_two_exports_do_not_mix_in_one_folder(qat_checkpoint, export_copy, few_digits, error_line):
    flags = f"--load_ckpt {qat_checkpoint} --onnx_dir {export_copy} --export_only --batch_size"
    with locked(export_copy):
        line = error_line(infer.main, flags.split())
    assert f"another process is at work in {export_copy}" in line
    read_export(export_copy)


def test_an_export_is_locked_until_it_is_evaluated(
    qat_checkpoint, exported, few_digits, tmp_path, monkeypatch
):
    def at_work(folder, *_):
        with pytest.raises(UserError, match="another process is at work"), locked(folder):
            pass
        raise UserError("as expected")

    monkeypatch.setattr(compare, "evaluate_export", at_work)
    for source in (["--onnx", exported / "onnx"], ["--load_ckpt", qat_checkpoint, "--FP32"]):
        argv = [*source, "--batch_size"]
        if "--onnx" not in source:
            argv += ["--onnx_dir", tmp_path / "onnx"]
        monkeypatch.setattr(infer, "load_exported", lambda *_: None)
        monkeypatch.setattr(infer, "read_checkpoint", lambda _: (None, None, None))
        monkeypatch.setattr(compare, "export_checkpoint", lambda *_: None)
        monkeypatch.setattr(infer, "read_export", lambda _: (None, None))
        with pytest.raises(UserError, match="as expected"):
            infer.main([str(arg) for arg in argv])


@pytest.mark.parametrize("onnx_dir", [[], ["--onnx_dir", "deep/er/onnx"]])
def test_a_mistyped_checkpoint_makes_no_folder(tmp_path, monkeypatch, error_line, onnx_dir):
    monkeypatch.chdir(tmp_path)
    line = error_line(infer.main, ["--load_ckpt", "mistyped/run/best", *onnx_dir])
    assert line == "error: no checkpoint at mistyped/run/best"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--onnx {} --torch_compile 1", "--torch_compile: PyTorch runs before the export"),
        ("--onnx {} --record {}/x --plot {}/x", "--record, --plot and --report: two name one file"),
        (
            "--onnx {} --record {}/x --plot {}/../{}/x",
            "--record, --plot and --report: two name one file",
        ),
        ("--onnx {} --onnx_dir {}", "--onnx_dir: decided when the files were exported"),
        ("--onnx {} --calib_images 5", "--calib_images: decided when the files were exported"),
        ("--onnx {} --record {}", "is a folder: name a file in it"),
        ("--onnx {} --export_only", "--export_only runs no engine"),
    ],
)
def test_flags_that_would_be_ignored_or_overwrite_are_refused(
    tmp_path, monkeypatch, error_line, flags, said
):
    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path)
    assert said in error_line(infer.main, flags.replace("{}", "export").split())


def test_a_commit_is_this_projects_own(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    outer = tmp_path / "outer"
    subprocess.run([*git, "init", "-q", str(outer)], check=True)
    empty = ["commit", "-q", "--allow-empty", "-m", "another project's"]
    subprocess.run([*git, "-C", str(outer), *empty], check=True)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    here = records.commit()

    # a hook's environment names another repository
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))
    assert records.commit() == here
    # copied into another repository, the project has no commit of its own
    (outer / "copy").mkdir()
    monkeypatch.setattr(records, "ROOT", outer / "copy")
    assert records.commit() is None
    monkeypatch.setattr(records, "ROOT", outer)
    assert records.commit() is not None


def test_an_export_says_how_many_images_calibrated(few_digits, tmp_path, float_checkpoint):
    flags = "--INT8PTC --calib_images 1000000 --calibrator max --export_only"
    infer.main(f"--load_ckpt {float_checkpoint} {flags} --onnx_dir {tmp_path}/onnx".split())
    manifest, _ = read_export(tmp_path / "onnx")
    assert manifest.quantization.calib_images == 50


def manifest_of(folder):
    """An export without a network: a manifest as JSON, and the files that it describes."""
    (folder / "fp32.onnx").write_bytes(b"a graph")
    np.savez(folder / "predictions.npz", FP32=np.zeros(4, np.int64))
    names = ("fp32.onnx", "predictions.npz")
    spec = DataSpec("digits", 32, ["a", "b"], 0, [0.5] * 3, [0.5] * 3, "1f")
    manifest = Manifest(
        model="resnet18",
        stem="cifar",
        data=spec,
        seed=0,
        quantization=Quantization(),
        int8_nodes={"FP32": []},
        files={name: files.sha256(folder / name) for name in names},
        environment={"gpu": None, "cpu": "x", "torch": "2"},
        rows=[Row("pytorch", "FP32", 90.0, 0.0, 100.0)],
    )
    records.write(folder / "export.json", manifest)
    read_export(folder)
    return json.loads((folder / "export.json").read_text())


def manifest_error(folder, content):
    (folder / "export.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_export(folder)
    return str(error.value)


NEEDED = [
    field.name
    for field in fields(Manifest)
    if field.default is MISSING and field.default_factory is MISSING
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_field_of_a_manifest_that_is_missing_or_of_another_type_is_named(tmp_path, name):
    content = manifest_of(tmp_path)
    without = {key: value for key, value in content.items() if key != name}
    assert f"lacks {name!r}" in manifest_error(tmp_path, without)
    for wrong in (None, 1.5, True, [1]):
        assert name in manifest_error(tmp_path, {**content, name: wrong})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["stem"], "vgg"),
        (["data", "classes"], []),
        (["data", "classes"], ["a", "a"]),
        (["data", "std"], [0.5, 0.5, 0.0]),
        (["data", "std"], [0.5, 0.5]),
        (["data", "mean"], [0.5, 0.5, float("nan")]),
        (["data", "img_size"], 10**9),
        (["data", "split_seed"], -1),
        (["data", "split_seed"], 10**30),
        (["quantization", "calibrator"], "best"),
        (["quantization", "calib_images"], 0),
        (["quantization", "quant_layers"], 5),
        (["quantization", "quant_layers"], "*"),
        (["int8_nodes", "FP32"], "x"),
        (["int8_nodes", "INT8-PTC"], []),  # a precision whose graph has no digest
        (["files", "fp32.onnx"], "00"),
        (["files", "predictions.npz"], "00"),
        (["rows", 0], None),
        (["rows", 0, "latency_ms"], {}),
        (["rows", 0, "agreement_pct"], float("nan")),
    ],
)
def test_a_value_of_a_manifest_that_cannot_be_is_one_line(tmp_path, place, value):
    content = manifest_of(tmp_path)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert "is no complete export" in manifest_error(tmp_path, content)


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "[" * 100_000, "9" * 5000, "{", "\0"])
def test_what_is_no_manifest_is_one_line(tmp_path, text):
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(UserError, match="is no complete export"):
        read_export(tmp_path)


@pytest.mark.parametrize("name", ["export.json", "predictions.npz", "fp32.onnx"])
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_in_an_export_is_not_waited_for(tmp_path, name, kind):
    manifest_of(tmp_path)
    (tmp_path / name).unlink()
    if kind == "fifo":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="not a file"):
        read_export(tmp_path)


@pytest.mark.parametrize(
    "predicted",
    [
        np.zeros(40),
        np.zeros(40, bool),
        np.zeros(3, np.int64),
        np.zeros((40, 1), np.int64),
        np.full(40, 10),
        np.full(40, -1),
    ],
    ids=["float", "bool", "few", "2d", "above", "below"],
)
def test_predictions_that_are_not_one_class_for_each_image_are_refused(
    tmp_path, few_digits, predicted
):
    data = dataset.load("digits", tmp_path)
    with pytest.raises(UserError, match="predictions of FP32 are not one class for each image"):
        compare.evaluate_export(tmp_path, None, {"FP32": predicted}, data, Comparison())


def test_a_graph_of_another_kind_is_refused_where_it_is_loaded(tmp_path):
    write_graph_of_another_kind(tmp_path / "fp32.onnx")
    with pytest.raises(UserError, match=r"it has \[\('images', 'tensor\(float\)', 4\)"):
        OnnxRuntimeNetwork(tmp_path / "fp32.onnx")


def test_images_of_another_size_than_the_graphs_are_one_line(exported):
    network = OnnxRuntimeNetwork(exported / "onnx" / "fp32.onnx")
    with pytest.raises(UserError, match="ONNX Runtime cannot run"):
        network(np.zeros((2, 16, 16, 3), np.uint8))


def test_fields_that_are_flags_have_the_flags_names():
    """Recipes, comparisons and quantizations are made of flags by name."""
    trained = vars(train.build_parser().parse_args([]))
    evaluated = vars(infer.build_parser().parse_args([]))
    derived = {"kind", "label_smoothing", "sam_rho", "freeze_batch_norm"}
    derived |= {"quantization", "comparison"}
    assert {field.name for field in fields(Recipe)} - trained.keys() == derived
    assert {field.name for field in fields(Comparison)} <= evaluated.keys()
    assert {field.name for field in fields(Quantization)} <= trained.keys() & evaluated.keys()
    # and no flag of a run is forgotten in what a checkpoint stores of it
    stored = set(Recipe("QAT", "m", "cifar", 1, 2, "sgd", 0.1).flags())
    stored |= {field.name for cls in (Comparison, Quantization) for field in fields(cls)}
    assert trained.keys() - stored == {
        "resume",
        "list_layers",
        "output_dir",
        "exp_name",
        "normalization",
    }


def test_a_record_follows_a_link_and_spares_what_is_no_file(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "elsewhere.json")
    records.write(link, {"kind": "linked"}, follow_link=True)
    assert link.is_symlink()
    assert json.loads((tmp_path / "elsewhere.json").read_text()) == {"kind": "linked"}
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        records.write(pipe, {"kind": "piped"}, follow_link=True)
        assert json.loads(reader.read()) == {"kind": "piped"}
    assert pipe.is_fifo()
    # without a reader it is one line, where plain opening would wait for ever
    with pytest.raises(OSError, match="No such device"):
        records.write(pipe, {}, follow_link=True)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    records.write(loop, {"kind": "new"}, follow_link=True)
    assert json.loads(loop.read_text()) == {"kind": "new"}


def test_an_export_interrupted_leaves_the_one_before_or_none(
    float_checkpoint, export_copy, few_digits, error_line, monkeypatch, tmp_path
):
    # any network will do, so a small one
    state = build("vanilla_cnn").state_dict()
    spec = NetworkSpec("vanilla_cnn", "cifar", 10)
    small = replace(ckpt.load(float_checkpoint), network=spec, state=state)
    ckpt.save(tmp_path / "small", small)
    argv = f"--load_ckpt {tmp_path}/small --onnx_dir {export_copy} --FP32 --batch_size".split()
    interrupted = Mock(side_effect=KeyboardInterrupt)
    there = sorted(export_copy.iterdir())

    # before, while and after the graphs are written: whole as before
    steps = ((compare, "evaluate_in_pytorch"), (compare.np, "savez"), (compare.records, "write"))
    for module, name in steps:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            infer.main(argv)
        read_export(export_copy)
        assert sorted(export_copy.iterdir()) == there

    # a full disk, too
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(compare.np, "savez", Mock(side_effect=full))
        line = error_line(infer.main, argv)
    said = f"error: cannot read or write {export_copy}: No space left on device; "
    assert line == f"{said}give access, free space or name another"
    read_export(export_copy)

    # as the files are renamed: none
    monkeypatch.setattr(files, "sorted", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        infer.main(argv)
    assert f"{export_copy} is no complete export" in error_line(infer.main, ["--onnx", export_copy])


def test_export_made_from_other_test_images_is_one_line(exported, few_digits, error_line):
    line = error_line(infer.main, ["--onnx", exported / "onnx", "--backend", "onnxruntime"])
    assert "other images, or in another order, than the checkpoint or export was made with" in line
    assert line.endswith("name those, or export again")


def test_what_one_run_held_out_is_not_trained_on_by_the_next(
    float_checkpoint, few_digits, error_line, tmp_path
):
    argv = ["--load_ckpt", float_checkpoint, "--od", tmp_path]
    for more, mend in (
        (["--quantize", "--partial_ckpt"], "train a float network on the others first"),
        ([], "add --new_classifier"),
    ):
        line = error_line(train.main, [*argv, *more])
        assert "other images, or in another order" in line
        assert line.endswith(f"name those, or {mend}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--m", "resnet50"], "--m resnet50 contradicts"),
        (["--dataset", "cifar10"], "--dataset cifar10 contradicts"),
        (["--batch_size", "0"], "--batch_size and --torch_compile: at least 1"),
        (["--torch_compile", "1", "0"], "--batch_size and --torch_compile: at least 1"),
        (["--workspace_gb", "0"], "--workspace_gb: more than 0, at most 1024"),
        (["--workspace_gb", "-1"], "--workspace_gb: more than 0, at most 1024"),
        (["--workspace_gb", "nan"], "--workspace_gb: more than 0, at most 1024"),
        (["--workspace_gb", "inf"], "--workspace_gb: more than 0, at most 1024"),
        (["--l2_limit_mb", "8"], "--l2_limit_mb: more than 0, at most 1024, and only with"),
        (["--l2_limit_mb", "nan", "--tiling_level", "1"], "--l2_limit_mb: more than 0"),
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


@pytest.mark.parametrize("flag", ["--record", "--plot", "--report"])
@pytest.mark.parametrize("below", ["", "file/below"])
def test_output_that_cannot_be_written_is_one_line(
    exported, tmp_path, error_line, flag, below, capsys
):
    (tmp_path / "file").touch()
    flags = "--INT8QAT --batch_size 1 --backend onnxruntime"
    argv = f"--onnx {exported}/onnx {flags} {flag} {tmp_path / below}".split()
    said = f"{tmp_path} is a folder: name a file"
    if below:
        said = f"{tmp_path}/file/below cannot be written: {tmp_path}/file does not let you"
    assert error_line(infer.main, argv).startswith(f"error: {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # it is told before the work
    assert capsys.readouterr().out == ""


def test_an_output_that_may_not_be_written_is_told_before_the_work(
    exported, tmp_path, error_line, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    argv = ["--onnx", exported / "onnx", "--record", tmp_path / "new" / "record.json"]
    assert f"record.json cannot be written: {tmp_path} does not let" in error_line(infer.main, argv)
    # a device is written to, whoever owns its folder
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert files.blocking_folder(Path(os.devnull)) is None


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
    agreed = flags.agreed
    assert agreed("--x", 1, 1) == agreed("--x", 1, None) == 1
    assert agreed("--x", None, 1, 2) == agreed("--x", None, None, 1) == 1
    with pytest.raises(UserError, match="--x 1 contradicts the checkpoint, which says 2"):
        agreed("--x", 1, 2)
    with pytest.raises(UserError, match="--x is needed"):
        agreed("--x", None, None)


@pytest.mark.parametrize(
    ("flag", "backend"),
    [
        (["--audit"], "onnxruntime"),
        (["--ptc_mode", "implicit"], "onnxruntime"),
        (["--ptc_mode", "implicit"], "openvino"),
        (["--ptc_mode", "implicit"], "auto"),
    ],
)
def test_what_a_back_end_cannot_do_is_refused(exported, flag, backend, error_line, monkeypatch):
    def require_gpu():
        raise UserError("there is no GPU here")

    monkeypatch.setattr(tensorrt_build, "require_gpu", require_gpu)
    argv = ["--onnx", exported / "onnx", "--dataset", "digits", "--backend", backend, *flag]
    assert " ".join(flag) in error_line(infer.main, argv)


def test_without_latencies_an_engine_is_for_the_batches_of_the_evaluation(tmp_path, monkeypatch):
    from utils.backends import tensorrt_run

    built = []
    monkeypatch.setattr(tensorrt_build, "require_gpu", lambda: None)
    monkeypatch.setattr(tensorrt_run, "TensorRTNetwork", lambda *args: built.append(args[1]))
    images = np.zeros((1, 8, 8, 3), np.uint8)
    compare.choose_backend(tmp_path, Comparison(batch_sizes=()), images)("FP16")
    assert [options.batch_sizes for options in built] == [(EVALUATION_BATCH,)]


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
        (["--resume", "x", "--load_ckpt", "y"], "--load_ckpt: --resume goes on"),
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


@pytest.mark.parametrize("words", ["--FP32", "--FP16", "--FP32 --FP16"])
def test_quantize_with_float_precisions_alone_is_refused(qat_checkpoint, error_line, words):
    argv = f"--load_ckpt {qat_checkpoint} --quantize {words}".split()
    assert "--quantize: the precisions named are all float" in error_line(infer.main, argv)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--torch_compile", "8"], "no GPU"),
        (["--calib_images", "0"], "--calib_images"),
        (["--audit", "--backend", "onnxruntime"], "--audit: ONNX Runtime does not tell"),
        (["--audit", "--export_only"], "--export_only runs no engine"),
        (["--plot", "p.png", "--export_only"], "--export_only times nothing unless"),
        (["--FP32", "--ptc_mode", "implicit"], "--ptc_mode implicit is a second --INT8PTC"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_an_earlier_export(
    qat_checkpoint, export_copy, few_digits, flags, said, error_line, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["--load_ckpt", qat_checkpoint, "--onnx_dir", export_copy, *flags]
    assert said in error_line(infer.main, argv)
    read_export(export_copy)


@pytest.mark.parametrize(
    "ask",
    [lambda _: np.empty(1 << 60, np.uint8), lambda _: torch.empty(1 << 60, dtype=torch.uint8)],
)
def test_too_little_memory_is_one_line(ask, error_line):
    assert "out of memory: use a smaller --batch_size" in error_line(ask, [])


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_graph_that_was_not_copied_is_named(backend, exported, tmp_path, error_line):
    folder = shutil.copytree(exported / "onnx", tmp_path / "onnx")
    (folder / "fp32.onnx").unlink()
    argv = ["--onnx", folder, "--FP32", "--backend", backend, "--batch_size", "1"]
    there = "--FP16, --INT8QAT"
    said = f"fp32.onnx is not there: name those that are: {there}"
    assert error_line(infer.main, argv).endswith(said)


def test_an_export_with_images_of_an_unknown_kind_is_one_line(export_copy, error_line):
    path = export_copy / "export.json"
    content = json.loads(path.read_text())
    content["data"]["dataset"] = "mnist"
    path.write_text(json.dumps(content))
    argv = ["--onnx", export_copy, "--INT8QAT", "--batch_size", "1"]
    assert "there is no data set 'mnist', but" in error_line(infer.main, argv)


def test_export_only_leaves_a_complete_export_and_runs_only_pytorch(
    float_checkpoint, few_digits, tmp_path, capsys
):
    (tmp_path / "onnx").mkdir()
    for name in ("int8_ptc.onnx", "int8_qat_fp16.onnx", "own.onnx"):
        (tmp_path / "onnx" / name).touch()
    flags = f"--FP32 --export_only --onnx_dir {tmp_path}/onnx --record {tmp_path}/record.json"
    infer.main(f"--load_ckpt {float_checkpoint} {flags}".split())
    # of the graphs that were there, only the user's own
    graphs = {path.name for path in (tmp_path / "onnx").glob("*.onnx")}
    assert graphs == {"fp32.onnx", "fp16.onnx", "own.onnx"}
    assert {row[0] for row in printed_rows(capsys.readouterr().out)} == {"pytorch"}
    environment = json.loads((tmp_path / "record.json").read_text())["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["onnxruntime"] is None

    manifest, predictions = read_export(tmp_path / "onnx")
    assert manifest.int8_nodes == {"FP32": []}
    assert predictions["FP32"].shape == (40,)


def test_an_export_says_what_should_run_in_int8_and_what_pytorch_predicts(exported):
    manifest, predictions = read_export(exported / "onnx")
    assert sorted(manifest.int8_nodes) == ["FP32", "INT8-QAT"]
    assert manifest.int8_nodes["FP32"] == []
    assert len(manifest.int8_nodes["INT8-QAT"]) == 29  # all but the pool, which sees one pixel
    assert sorted(predictions) == ["FAKE-QUANT-QAT", "FP32"]
    for classes in predictions.values():
        assert classes.shape == (360,)


def test_a_network_that_reports_its_layers_and_the_devices_time_has_more_columns_and_rows(
    exported, digits
):
    """As TensorRT's does: layers are counted, and the time from host to host has its own row."""
    network = OnnxRuntimeNetwork(exported / "onnx" / "int8_qat.onnx")
    network.layers = [SimpleNamespace(precision=kind) for kind in ("INT8", "INT8", "FP16")]
    network.device_time = True
    network.evaluation_batch = 64
    images, labels = digits.test_images[:64], digits.test_labels[:64]
    predictions = {"FP32": labels, "FAKE-QUANT-QAT": 1 + labels}
    rows = compare.evaluate_network(network, "INT8-QAT", images, labels, predictions, [1, 64])

    assert [(row.backend, row.batch_size) for row in rows] == [
        ("onnxruntime", 1),
        ("onnxruntime", 64),
        ("onnxruntime end-to-end", 64),
    ]
    # it agrees with the same precision's network
    predicted = network(images).argmax(1)
    agreement_pct = 100 * np.mean(predicted == 1 + labels)
    for row in rows:
        assert row.agreement_pct == pytest.approx(agreement_pct)
        assert row.accuracy_pct - 100 == pytest.approx(row.delta_pct)
        assert (row.int8_layers, row.layers) == (2, 3)
    assert rows[2].latency_ms == {"p50": None, "p99": None}
    assert rows[2].throughput_img_s > 0


def test_the_throughput_is_of_the_batch_size_that_its_row_names(digits):
    """Also where there are fewer test images than that."""
    sizes = []

    class Recording(Network):
        def __call__(self, images):
            sizes.append(len(images))
            return np.zeros((len(images), 10))

    end_to_end_img_s(Recording(), digits.test_images[:5], 64)
    assert set(sizes) == {64}


def test_a_batch_to_time_is_cut_out_of_the_test_images():
    """It is contiguous, as what a network reads is, and no copy of all of them is made."""
    images = np.arange(4096 * 75, dtype=np.uint8).reshape(4096, 3, 5, 5).transpose(0, 2, 3, 1)
    tracemalloc.start()
    batch = repeated(images, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(batch, images[:4])
    assert batch.flags.c_contiguous
    assert peak < images.nbytes / 10
    assert np.array_equal(repeated(images[:3], 5), images[[0, 1, 2, 0, 1]])


@pytest.mark.parametrize(("wrong", "said"), [(0, False), (1, False), (4, False), (12, True)])
def test_a_network_that_is_much_worse_than_in_pytorch_is_told(
    exported, digits, capsys, wrong, said
):
    network = OnnxRuntimeNetwork(exported / "onnx" / "int8_qat.onnx")
    images = digits.test_images[:64]
    labels = network(images).argmax(1)
    predictions = {"FP32": labels, "FAKE-QUANT-QAT": labels.copy()}
    labels = labels.copy()
    # what PyTorch got right there and the network did not
    labels[:wrong] = predictions["FAKE-QUANT-QAT"][:wrong] = (labels[:wrong] + 1) % 10
    compare.evaluate_network(network, "INT8-QAT", images, labels, predictions, [])
    line = "onnxruntime INT8-QAT is 18.75 points below the same network in PyTorch; try other"
    assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize(("other", "said"), [(6, False), (8, False), (12, True)])
def test_a_network_that_predicts_otherwise_than_in_pytorch_is_told(
    exported, digits, capsys, other, said
):
    """Also where as many of its images are right."""
    network = OnnxRuntimeNetwork(exported / "onnx" / "int8_qat.onnx")
    images = digits.test_images[:64]
    predicted = network(images).argmax(1)
    in_pytorch = predicted.copy()
    in_pytorch[:other] = (predicted[:other] + 1) % 10
    labels = (predicted + 2) % 10  # all are wrong
    predictions = {"FP32": labels, "FAKE-QUANT-QAT": in_pytorch}
    compare.evaluate_network(network, "INT8-QAT", images, labels, predictions, [])
    line = "INT8-QAT: 19 % of its predictions are not what the same network predicts in PyTorch"
    assert (line in capsys.readouterr().out) == said
