"""Tables and plots: many records as one, mean and spread over seeds, speeds over engines."""

import json
from dataclasses import replace

import pytest
from PIL import Image

import train
from benchmarks import tables
from utils.errors import UserError

NOT_MEASURED = {
    "batch_size": None,
    "latency_ms": {"p50": None, "p99": None},
    "throughput_img_s": None,
    "file_mb": None,
    "int8_layers": None,
    "layers": None,
}


def torch_row(precision, accuracy_pct, fp32_pct):
    accuracy = {"accuracy_pct": accuracy_pct, "delta_pct": accuracy_pct - fp32_pct}
    network = {"backend": "pytorch", "precision": precision, "agreement_pct": 99.0}
    return {**NOT_MEASURED, **network, **accuracy}


def engine_row(precision, accuracy_pct, batch_size, p50):
    return {
        "backend": "tensorrt",
        "precision": precision,
        "accuracy_pct": accuracy_pct,
        "delta_pct": 0.0,
        "agreement_pct": 99.5,
        "batch_size": batch_size,
        "latency_ms": {"p50": p50, "p99": p50},
        "throughput_img_s": 1000 * batch_size / p50,
        "file_mb": 3.0,
        "int8_layers": 7,
        "layers": 9,
    }


def record_of(seed, fp32, qat, engines=()):
    """A record of a network with these accuracies; `engines` are (precision, batch size, ms)."""
    rows = [
        torch_row("FP32", fp32, fp32),
        torch_row("FAKE-QUANT-QAT", qat, fp32),
        torch_row("FAKE-QUANT-PTC", qat - 2, fp32),
        torch_row("FP32-TUNED", fp32 + 0.5, fp32),
    ]
    for precision, batch_size, ms in engines:
        rows.append(engine_row(precision, qat, batch_size, ms))
        # Its host-to-host throughput stands in a row of its own, which has no latency.
        rows.append({**torch_row(precision, qat, fp32), "backend": "tensorrt end-to-end"})
    about = {"kind": "inference", "model": "net", "stem": "cifar", "seed": seed}
    return {**about, "quantization": {"calibrator": "sqnr"}, "rows": rows}


def write(path, record):
    path.write_text(json.dumps(record))


@pytest.fixture
def results(tmp_path):
    """Two seeds of one network, the first with engines, and a record of another kind."""
    engines = [("FP16", 1, 0.5), ("FP16", 64, 4.0), ("INT8-QAT", 1, 0.4), ("INT8-QAT", 64, 2.0)]
    write(tmp_path / "seed0.json", record_of(0, 90.0, 89.0, engines))
    write(tmp_path / "seed1.json", record_of(1, 92.0, 92.0))
    write(tmp_path / "other.json", {"kind": "calibrators"})
    return tmp_path


def cells(table):
    """Each line of a Markdown table as title -> cell."""
    lines = []
    for line in table.splitlines():
        lines.append([cell.strip() for cell in line.strip("|").split("|")])
    titles, _, *rows = lines
    return [dict(zip(titles, row, strict=True)) for row in rows]


def test_a_damaged_record_is_named(results):
    (results / "seed0.json").write_text('{"kind": "infer')
    with pytest.raises(UserError, match=r"seed0.json is damaged \(.*\): delete it"):
        tables.load(results)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 0},
        {"dataset": "digits"},
        {"quantization": {"calibrator": "sqnr", "more": 9}},
        {"train_flags": ["--lr", "0.1"]},
    ],
)
def test_a_mean_is_of_the_seeds_of_one_study(results, change):
    write(results / "seed2.json", {**record_of(2, 90.0, 90.0), **change})
    with pytest.raises(UserError, match="seed2.json is not of one study with the records beside"):
        tables.load(results)


def test_accuracies_are_means_over_seeds_with_their_spread(results):
    (line,) = cells(tables.accuracy_table(tables.load(results)))
    assert (line["network"], line["seeds"]) == ("net, cifar stem", "2")
    assert line["FP32"] == "91.00 ± 1.41"
    assert line["QAT"] == "90.50 ± 2.12"
    assert line["PTQ"] == "88.50 ± 2.12"
    assert line["QAT − FP32"] == "-0.50 ± 0.71"
    assert line["QAT − fine-tuned"] == "-1.00 ± 0.71"


def test_records_of_unlike_calibrators_are_not_averaged(results):
    write(results / "max.json", {**record_of(0, 80.0, 79.0), "quantization": {"calibrator": "max"}})
    write(results / "old.json", {**record_of(0, 80.0, 79.0), "quantization": {}})
    lines = cells(tables.accuracy_table(tables.load(results)))
    assert {line["network"]: line["seeds"] for line in lines} == {
        "net, cifar stem": "2",
        "net, cifar stem, max": "1",
        "net, cifar stem, calibrator not recorded": "1",
    }


def test_qat_is_compared_with_the_fine_tuned_network_of_its_own_record(results):
    """The first record by name has none, as if infer.py alone had made it."""
    alone = record_of(2, 50.0, 40.0)
    alone["rows"] = [row for row in alone["rows"] if row["precision"] != "FP32-TUNED"]
    write(results / "alone.json", alone)
    (line,) = cells(tables.accuracy_table(tables.load(results)))
    assert (line["seeds"], line["QAT − fine-tuned"]) == ("3", "-1.00 ± 0.71")


def test_engines_are_compared_with_pytorch_of_the_same_seeds(results):
    (line,) = cells(tables.engines_table(tables.load(results)))
    assert (line["network"], line["seeds"]) == ("net, cifar stem", "1")
    assert line["FP32 in PyTorch"] == "90.00"
    assert (line["FP16"], line["QAT"]) == ("89.00", "89.00")
    # no engine of these
    assert not {"PTQ", "implicit PTQ"} & line.keys()
    assert line["QAT agreement"] == "99.50"


def test_speeds_are_of_the_records_with_engines(results):
    single, batch = cells(tables.speed_table(tables.load(results)))
    assert single["batch"] == "1"
    assert (single["FP16 ms"], single["INT8-QAT ms"], single["speed-up"]) == (
        "0.500",
        "0.400",
        "1.25",
    )
    assert (batch["batch"], batch["speed-up"]) == ("64", "2.00")
    assert batch["INT8-QAT images/s"] == "32,000"
    assert batch["INT8 layers"] == "7 of 9"


def test_on_a_cpu_int8_is_compared_with_the_faster_of_two_in_fp32(tmp_path):
    record = record_of(0, 90.0, 89.0)
    for backend, precision, ms in (
        ("openvino", "FP32", 6.0),
        ("openvino", "INT8-PTC", 2.0),
        ("onnxruntime", "FP32", 5.0),
        ("onnxruntime", "INT8-PTC", 7.0),
        ("openvino", "BF16", 1.0),
    ):
        record["rows"].append({**engine_row(precision, 90.0, 64, ms), "backend": backend})
    write(tmp_path / "seed0.json", record)
    write(tmp_path / "other.json", {**record_of(0, 90.0, 89.0), "model": "without"})
    (line,) = cells(tables.cpu_table(tables.load(tmp_path)))
    assert list(line.values()) == [
        "net, cifar stem",
        "64",
        "5.000",
        "6.000",
        "2.000",
        "2.50 ×",
        "99.50",
        "7 of 9",
    ]


def test_the_headline_has_the_speed_up_at_the_largest_batch(results, monkeypatch):
    monkeypatch.setattr(tables, "TITLES", {"absent": "Absent", "net": "Net"})
    (line,) = cells(tables.headline_table(tables.load(results)))
    assert line["network"] == "Net"
    assert (line["FP32"], line["INT8 QAT"]) == ("91.00 ± 1.41", "90.50 ± 2.12")
    assert line["INT8 speed-up over FP16"] == "2.00 ×"


def test_the_plot_holds_its_points(results):
    tables.plot(results)
    with Image.open(results / tables.PLOT) as image:
        assert json.loads(image.text["Description"]) == {"net, cifar stem": [2.0, -0.5, -2.5]}
        assert image.width > 500


def test_without_engines_there_is_no_plot(tmp_path):
    write(tmp_path / "seed1.json", record_of(1, 92.0, 92.0))
    tables.plot(tmp_path)
    assert not (tmp_path / tables.PLOT).exists()


def gpus_row(gpus, images_s, recipe="ours", batch_size=512):
    return {
        "recipe": recipe,
        "model": "resnet18",
        "stem": "cifar",
        "mode": "float",
        "batch_size": batch_size,
        "gpus": gpus,
        "epoch_s": 3000 / images_s,
        "images_s": images_s,
    }


def test_the_table_of_several_gpus_compares_with_one_of_them(tmp_path):
    for gpus, images_s in ((2, 1500.0), (1, 1000.0)):
        rows = [gpus_row(gpus, images_s)]
        write(tmp_path / f"train_speed_{gpus}.json", {"kind": "train_speed", "rows": rows})
    one, two = cells(tables.gpus_table(tmp_path))
    assert (one["GPUs"], one["s an epoch"], one["times one GPU"]) == ("1", "3.00", "1.00")
    assert (two["GPUs"], two["images/s"], two["times one GPU"]) == ("2", "1,500", "1.50")


@pytest.mark.parametrize("other", [{"recipe": "reference"}, {"batch_size": 1024}])
def test_several_gpus_are_compared_at_the_same_recipe_and_batch_size(tmp_path, other):
    rows = [gpus_row(1, 1000.0), gpus_row(1, 4000.0, **other), gpus_row(2, 1500.0)]
    write(tmp_path / "train_speed.json", {"kind": "train_speed", "rows": rows})
    ratios = [(line["GPUs"], line["times one GPU"]) for line in cells(tables.gpus_table(tmp_path))]
    assert ("2", "1.50") in ratios


@pytest.mark.parametrize(
    ("chosen", "title", "milliseconds", "times"),
    [
        (["conv1", "fc"], "`conv1 fc` in float", "2.400", "1.25"),
        ([], "all in INT8", "2.000", "1.50"),
        (["*"], "all in FP16", "3.000", "1.00"),
    ],
)
def test_the_table_of_choices_compares_with_the_two_ends(
    tmp_path, chosen, title, milliseconds, times
):
    candidates = [
        {"skip_layers": ["*"], "latency_ms": 3.0},
        {"skip_layers": [], "latency_ms": 2.0},
        {"skip_layers": ["conv1", "fc"], "latency_ms": 2.4},
    ]
    record = {"model": "resnet18", "stem": "cifar"}
    record["rows"] = [{"batch_size": None}, {"batch_size": 32}]
    record["choice"] = {"skip_layers": chosen, "candidates": candidates}
    write(tmp_path / "record.json", record)
    (line,) = cells(tables.choices_table(tmp_path))
    assert (line["batch"], line["FP16 ms"], line["all in INT8, ms"]) == ("32", "3.000", "2.000")
    assert (line["chosen"], line["its ms"], line["times FP16"]) == (title, milliseconds, times)


def test_the_table_of_recipes_has_each_kind_of_training():
    lines = cells(tables.recipes_table())
    by_run = {line["run"]: line for line in lines}
    assert len(by_run) == len(lines) == len(train.DEFAULTS) + 1
    muon = by_run["from scratch, GPU"]
    assert (muon["optimizer"], muon["last third of the epochs"]) == ("Muon", "SAM, radius 0.005")
    assert by_run["from scratch, CPU"]["optimizer"] == "SGD"
    qat = by_run["QAT"]
    assert (qat["epochs"], qat["peak lr at batch size 128"]) == ("10", "0.0025")
    assert qat["last third of the epochs"] == "as before"
    statistics = "BatchNorm's statistics"
    assert (muon[statistics], qat[statistics]) == ("move", "frozen")


def test_a_changed_default_is_noticed(monkeypatch):
    text = (tables.ROOT / "docs" / "training.md").read_text()
    assert text.count("<!-- recipes -->") == 1
    assert tables.refresh_tables(text) == text, "run `make tables`"
    longer = replace(train.DEFAULTS["QAT"], num_epochs=77)
    monkeypatch.setitem(train.DEFAULTS, "QAT", longer)
    changed = tables.refresh_tables(text)
    assert changed.count("| 77 |") == 1
    assert changed.replace("| 77 |", "| 10 |") == text
