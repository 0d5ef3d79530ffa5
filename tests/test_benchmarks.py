"""Benchmarks: what they write, what they compare, what they leave behind."""

import json
import math
import multiprocessing
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision
from pytorch_quantization.nn import QuantConv2d, TensorQuantizer
from torch import nn

import infer
import train
from benchmarks import calibrators, cpu_speed, peers, reproduce, tables, train_speed
from utils import checkpoint as ckpt
from utils import flags
from utils.errors import UserError
from utils.files import locked
from utils.specs import Quantization

# train_speed


@pytest.mark.slow
@pytest.mark.usefixtures("small_digits")
def test_train_speed_times_both_recipes_in_both_modes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "WORKERS", 2)
    left = []
    free = train_speed.free

    def free_and_look():
        free()
        left.append(multiprocessing.active_children())

    monkeypatch.setattr(train_speed, "free", free_and_look)
    threads = threading.active_count()
    path = tmp_path / "record.json"
    argv = ["--dataset", "digits", "--stem", "imagenet", "--batch_size", "16"]
    argv += ["--reference_batch_size", "20", "--epochs", "2"]
    train_speed.main([*argv, "--record", str(path)])

    record = json.loads(path.read_text())
    assert set(record) == {"kind", "environment", "commit", "flags", "rows"}
    assert record["kind"] == "train_speed"
    assert record["environment"]["torch"] == torch.__version__
    rows = record["rows"]
    cases = [(row["recipe"], row["mode"], row["batch_size"], row["images"]) for row in rows]
    assert cases == [
        ("reference", "float", 20, 50),
        ("reference", "qat", 20, 50),
        ("ours", "float", 16, 48),
        ("ours", "qat", 16, 48),
    ]
    for row in rows:
        require_consistent(row)

    printed = capsys.readouterr().out
    ratio = rows[0]["epoch_s"] / 50 / (rows[2]["epoch_s"] / 48)
    assert f"imagenet stem, time per image, float, reference / ours: {ratio:.2f}" in printed
    assert sum("time per image" in line for line in printed.splitlines()) == 4
    # no worker of one timing runs during the next
    assert left == [[]] * 4
    # tqdm's own
    assert threading.active_count() <= threads + 1


def require_consistent(row):
    """A row's derived numbers follow from its epochs of 1 warm-up and 2 timed ones."""
    assert set(row) == {field.name for field in fields(train_speed.Row)}
    assert (row["arithmetic"], row["peak_tflops"]) == ("fp32", None)
    # of an epoch in each part of a run
    shares = [1.0] if row["recipe"] == "reference" else [2 / 3, 1 / 3]
    assert [len(seconds) for seconds in row["epochs_s"]] == [2] * len(shares)
    assert [len(seconds) for seconds in row["warm_up_s"]] == [1] * len(shares)
    medians = [sum(seconds) / 2 for seconds in row["epochs_s"]]
    epoch_s = sum(share * median for share, median in zip(shares, medians, strict=True))
    assert row["epoch_s"] == pytest.approx(epoch_s)
    warm_up_s = sum(seconds[0] for seconds in row["warm_up_s"])
    assert row["compile_s"] == pytest.approx(warm_up_s - sum(medians))
    assert row["images_s"] == pytest.approx(row["images"] / row["epoch_s"])
    flops = train_speed.flops_per_image("resnet18", "imagenet", 10, (16, 16, 3))
    assert row["tflops"] == pytest.approx(flops * row["images_s"] / 1e12)
    # on so few images float may diverge
    assert 0 < row["loss"] < (20 if row["mode"] == "qat" else math.inf)


def speed_row(recipe, mode, images_s):
    """One whose other numbers do not matter."""
    values = {field.name: 1.0 for field in fields(train_speed.Row)}
    names = {"recipe": recipe, "mode": mode, "stem": "cifar", "images_s": images_s}
    return train_speed.Row(**{**values, **names})


def test_train_speed_compares_what_differs_in_one_thing():
    rows = [speed_row("reference", "qat", 10.0), speed_row("ours", "float", 60.0)]
    assert train_speed.ratios(rows) == []
    rows.append(speed_row("ours", "qat", 40.0))
    assert train_speed.ratios(rows) == [
        "cifar stem, time per image, qat, reference / ours: 4.00",
        "cifar stem, time per image, ours, QAT / float: 1.50",
    ]


def test_train_speed_trains_ours_as_train_py_does_by_default():
    args = train_speed.build_parser().parse_args(["--epochs", "2", "--optimizer", "adamw"])
    words = ["--m", "resnet18", "--num_epochs", "3", "--optimizer", "adamw"]
    expected, _ = train.read_flags(words)
    assert train_speed.our_recipe("float", "cifar", "cifar10", args) == expected

    qat = train_speed.our_recipe("qat", "cifar", "cifar10", args)
    assert (qat.kind, qat.optimizer, qat.lr) == ("QAT", "sgd", 0.0025)
    assert qat.quantization == Quantization()


def test_train_speed_counts_the_products_of_the_reference_network():
    """Against torchvision's published multiply-adds at 224 pixels, and the layers' shapes."""
    # forward
    published = torchvision.models.ResNet18_Weights.DEFAULT.meta["_ops"] * 1e9
    # no gradient for the images
    first = 112 * 112 * 64 * 3 * 49
    flops = train_speed.flops_per_image("resnet18", "imagenet", 1000, (224, 224, 3))
    assert flops == pytest.approx(2 * (3 * published - first), rel=1e-3)

    model = train_speed.reference_network("resnet18", "cifar", 10, False)
    products = {}

    def count(module, _, out):
        products[module] = out.shape[2:].numel() * module.weight.numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(2, 3, 32, 32))
    expected = 2 * (3 * sum(products.values()) - products[model.conv1])
    assert train_speed.flops_per_image("resnet18", "cifar", 10, (32, 32, 3)) == expected


def test_the_quantized_reference_has_the_librarys_layers_and_ranges():
    float_classes = nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d
    model = train_speed.reference_network("resnet18", "cifar", 10, True)
    assert (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d) == float_classes
    assert sum(isinstance(module, QuantConv2d) for module in model.modules()) == 20
    assert isinstance(model.conv1, QuantConv2d)
    assert model.conv1.stride == (1, 1)
    float_model = train_speed.reference_network("resnet18", "cifar", 10, False)
    model.load_state_dict(float_model.state_dict())

    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    data = train_speed.Images(images, np.arange(6), torchvision.transforms.ToTensor())
    train_speed.calibrate_by_maximum(model, data, 4, torch.device("cpu"))
    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer)]
    # the pool has no weight
    assert len(quantizers) == 2 * (20 + 1) + 1
    for quantizer in quantizers:
        assert quantizer.amax.isfinite().all()
        assert quantizer._if_quant
        assert not quantizer._if_calib
    assert model.conv1._input_quantizer.amax.item() == pytest.approx(images.max() / 255)
    assert model.conv1._weight_quantizer.amax.numel() == 64


@pytest.mark.parametrize("flag", ["--epochs", "--warm_up", "--reference_batch_size"])
def test_train_speed_wants_at_least_one(flag):
    with pytest.raises(UserError, match="at least 1"):
        train_speed.main(["--dataset", "digits", flag, "0"])


# calibrators


@pytest.mark.usefixtures("small_digits")
def test_calibrators_are_judged_on_the_val_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrators, "CALIBRATORS", ("sqnr", "max"))
    argv = ["--m", "vanilla_cnn", "--dataset", "digits", "--num_epochs", "1"]
    train.main([*argv, "--od", str(tmp_path), "--en", "run"])
    best = tmp_path / "run" / "ckpt_best"
    path = tmp_path / "record.json"
    argv = ["--load_ckpt", str(best), "--calib_images", "20", "50", "--record", str(path)]
    calibrators.main(argv)

    record = json.loads(path.read_text())
    assert set(record) == {"kind", "commit", "environment", "rows"}
    assert record["kind"] == "calibrators"
    rows = record["rows"]
    cases = [(row["calibrator"], row["calib_images"]) for row in rows]
    assert cases == [("sqnr", 20), ("sqnr", 50), ("max", 20), ("max", 50)]
    val_pct = ckpt.load(best).history[-1]["val_accuracy_pct"]
    for row in rows:
        assert set(row) == {field.name for field in fields(calibrators.Row)}
        assert row["model"] == "vanilla_cnn (cifar stem)"
        assert row["val_float_pct"] == pytest.approx(val_pct)
        # there are 10 images
        assert row["delta_pct"] % 10 == pytest.approx(0, abs=1e-6)
        assert row["logits_sqnr_db"] > 0
    assert capsys.readouterr().out.count("logits_sqnr_db") == len(rows)
    with pytest.raises(UserError, match="--calib_images: at least 1"):
        calibrators.main(["--load_ckpt", str(best), "--calib_images", "0"])


# reproduce


@pytest.fixture
def arguments(tmp_path):
    """Of a study so small that it takes seconds."""
    words = ["--m", "vanilla_cnn", "--dataset", "digits", "--no_engines"]
    words += ["--num_epochs", "2", "--tune_epochs", "1"]
    return [*words, "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]


@pytest.fixture
def no_training(monkeypatch):
    """For the rest of the test, whoever calls train.py's main fails."""
    monkeypatch.setattr(train, "main", None)


def executable(path, script):
    """A shell script in the place of a Python."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def require_record_of_a_study(record, seed):
    assert (record["kind"], record["model"], record["seed"]) == ("inference", "vanilla_cnn", seed)
    assert (record["dataset"], record["epochs"]) == ("digits", {"float": 2, "fine-tuning": 1})
    assert record["train_flags"] == ["--batch_size", "64"]
    stages = {"float", "fine-tuning", "qat", "evaluation of the fine-tuned", "evaluation"}
    assert set(record["seconds"]) == stages
    rows = record["rows"]
    precisions = [row["precision"] for row in rows]
    assert precisions == ["FP32", "FAKE-QUANT-PTC", "FAKE-QUANT-QAT", "FP32-TUNED"]
    # nothing to compare a speed with
    assert [row["batch_size"] for row in rows] == [None] * 4
    expected_delta = rows[-1]["accuracy_pct"] - rows[0]["accuracy_pct"]
    assert rows[-1]["delta_pct"] == pytest.approx(expected_delta)


@pytest.mark.usefixtures("small_digits", "quick_latencies")
def test_a_study_leaves_one_record_for_each_seed_and_nothing_to_do(
    arguments, tmp_path, monkeypatch, capsys
):
    arguments += ["--train_flags", "--batch_size 64"]
    reproduce.main([*arguments, "--seeds", "2", "--infer_flags=--FP32"])
    paths = sorted((tmp_path / "results").glob("*.json"))
    names = ["vanilla_cnn_cifar_seed0.json", "vanilla_cnn_cifar_seed1.json"]
    assert [path.name for path in paths] == names
    for seed, path in enumerate(paths):
        record = json.loads(path.read_text())
        require_record_of_a_study(record, seed)
        assert not any(str(tmp_path) in value for value in record["flags"].values())
    assert list((tmp_path / "work").iterdir()) == []
    assert "| vanilla_cnn, cifar stem | 2 |" in capsys.readouterr().out

    monkeypatch.setattr(train, "main", None)
    reproduce.main([*arguments, "--seeds", "2"])
    reproduce.main([*arguments, "--seeds", "1", "--first_seed", "1"])
    assert not any((tmp_path / "work").iterdir())
    for other in (["--num_epochs", "3"], ["--train_flags", ""]):
        with pytest.raises(UserError, match="another study .*choose other --results"):
            reproduce.main([*arguments, "--seeds", "2", *other])

    monkeypatch.setattr(reproduce, "calibration_mode", lambda _: "explicit")
    arguments.remove("--no_engines")
    with pytest.raises(UserError, match="no engines"):
        reproduce.main(arguments)
    # made when that was the default
    paths[0].write_text(paths[0].read_text().replace('"sqnr"', '"entropy"'))
    with pytest.raises(UserError, match="another study .*'entropy'.*choose other --results"):
        reproduce.main(arguments)


@pytest.mark.usefixtures("small_digits", "quick_latencies")
def test_the_fine_tuned_network_is_in_the_export_and_the_record(arguments, tmp_path):
    """Its predictions against those of the network that it was fine-tuned from."""
    reproduce.main([*arguments, "--seeds", "1", "--keep"])
    record = json.loads((tmp_path / "results" / "vanilla_cnn_cifar_seed0.json").read_text())
    (work,) = (tmp_path / "work").iterdir()
    manifest = json.loads((work / "onnx" / "export.json").read_text())
    assert record["rows"] == manifest["rows"]

    argv = ["--load_ckpt", str(work / "tuned" / "ckpt_best"), "--onnx_dir", str(tmp_path / "tuned")]
    infer.main([*argv, "--export_only", "--batch_size", "--FP16"])
    predicted = np.load(tmp_path / "tuned" / "predictions.npz")["FP32"]
    before = np.load(work / "onnx" / "predictions.npz")["FP32"]
    row = record["rows"][-1]
    assert row["precision"] == "FP32-TUNED"
    assert row["agreement_pct"] == pytest.approx(100 * np.mean(predicted == before))


@pytest.fixture
def plan(tmp_path):
    """One with engines, whose Python is a shell script that writes a record."""
    script = f"""echo "$@" > {tmp_path / "log"}
while [ "$1" != --record ]; do shift; done
echo '{{"kind": "inference"}}' > "$2"
exit $(cat {tmp_path / "code"})"""
    return reproduce.Plan(
        results=tmp_path / "results",
        work=tmp_path / "work",
        keep=False,
        dataset="digits",
        data_dir=tmp_path,
        num_epochs=2,
        tune_epochs=1,
        train_flags=[],
        infer_flags=["--audit", "--torch_compile", "8", "--batch_size", "8"],
        quantization=Quantization(),
        engine_python=executable(tmp_path / "python", script),
        ptc_mode="implicit",
        opt_level=4,
    )


@pytest.mark.parametrize(
    "other", [{"train_flags": ["--lr", "0.1"]}, {"dataset": "cifar10"}, {"num_epochs": 3}]
)
def test_work_done_with_other_flags_is_not_taken_over(plan, other):
    folders = set()
    for one in (plan, replace(plan, **other)):
        folders.add(reproduce.Study(one, "resnet18", "cifar", 0, False).work)
    assert len(folders) == 2


@pytest.mark.usefixtures("small_digits")
def test_a_stage_killed_before_it_linked_its_best_checkpoint_is_mended(tmp_path):
    argv = ["--m", "vanilla_cnn", "--dataset", "digits"]
    best = reproduce.finished(tmp_path / "float", 2, tmp_path, argv)
    epoch = ckpt.load(best).epoch
    assert {path.name for path in best.parent.iterdir()} == {"ckpt_2", "ckpt_best"}
    if epoch == 2:
        best.unlink()
    assert ckpt.load(reproduce.finished(tmp_path / "float", 2, tmp_path, argv)).epoch == epoch


def test_an_interrupted_stage_goes_on_with_the_images_where_they_are_now(tmp_path, monkeypatch):
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "ckpt_1").touch()
    given = []
    monkeypatch.setattr(train, "main", given.extend)
    reproduce.finished(tmp_path / "float", 2, tmp_path / "moved", ["--m", "resnet18"])
    assert given[:4] == ["--resume", str(tmp_path / "float"), "--data_dir", str(tmp_path / "moved")]


def test_engines_are_wanted_of_all_seeds_of_resnet18_and_of_the_others_first(
    arguments, monkeypatch
):
    asked = []

    def run(study):
        asked.append((study.model, study.seed, study.engines))

    monkeypatch.setattr(reproduce.Study, "run", run)
    monkeypatch.setattr(reproduce, "calibration_mode", lambda _: "explicit")
    arguments[1:2] = ["vanilla_cnn", "resnet18"]
    few = ["--stem", "cifar", "--first_seed", "3", "--seeds", "2"]
    reproduce.main([*arguments, *few])
    assert not any(engines for *_, engines in asked)

    arguments.remove("--no_engines")
    reproduce.main([*arguments, *few])
    assert asked[4:] == [
        ("vanilla_cnn", 3, True),
        ("resnet18", 3, True),
        ("vanilla_cnn", 4, False),
        ("resnet18", 4, True),
    ]


@pytest.mark.parametrize("offered", ["implicit", "explicit"])
def test_tensorrts_own_calibration_can_be_left_out(arguments, monkeypatch, offered):
    monkeypatch.setattr(reproduce, "calibration_mode", lambda _: offered)
    parse = reproduce.build_parser().parse_args
    arguments.remove("--no_engines")
    assert reproduce.make_plan(parse(arguments)).ptc_mode == offered
    assert reproduce.make_plan(parse([*arguments, "--no_implicit"])).ptc_mode == "explicit"
    arguments.append("--no_engines")
    assert reproduce.make_plan(parse([*arguments, "--no_implicit"])).ptc_mode is None


def test_a_study_of_nothing_is_an_error(arguments):
    with pytest.raises(UserError, match="ImageNet stem"):
        reproduce.main([*arguments, "--stem", "imagenet"])
    for flag in ("--seeds", "--num_epochs", "--tune_epochs"):
        with pytest.raises(UserError, match="at least 1"):
            reproduce.main([*arguments, flag, "0"])


def test_two_processes_cannot_make_one_record(arguments, tmp_path):
    work = tmp_path / "work" / "vanilla_cnn_cifar_seed0_digits_2_1"
    work.mkdir(parents=True)
    with locked(work), pytest.raises(UserError, match=f"another process is at work in {work}"):
        reproduce.main([*arguments, "--seeds", "1"])


@pytest.mark.usefixtures("small_digits", "quick_latencies")
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("float", marks=pytest.mark.slow),
        "tuned",
        pytest.param("qat", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_study_goes_on_where_it_was(arguments, tmp_path, monkeypatch, stage):
    """Interrupted in a stage's last epoch, it trains that and the later stages, nothing again."""
    folder = tmp_path / "work" / "vanilla_cnn_cifar_seed0_digits_2_1"
    epochs = {"float": 2, "tuned": 1, "qat": 1}
    trained = []
    real = train.train_epoch

    def train_epoch(*args):
        stages = [path for path in folder.iterdir() if path.name in epochs]
        name = max(stages, key=lambda path: path.stat().st_ctime_ns).name
        trained.append(name)
        if not resumed and name == stage and trained.count(name) == epochs[name]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    resumed = False
    with pytest.raises(UserError, match="interrupted"):
        reproduce.main([*arguments, "--seeds", "1"])
    trained.clear()
    resumed = True
    reproduce.main([*arguments, "--seeds", "1"])
    order = ["float", "tuned", "qat"]
    later = order[order.index(stage) + 1 :]
    assert len(trained) == 1 + sum(epochs[name] for name in later)
    assert (tmp_path / "results" / "vanilla_cnn_cifar_seed0.json").exists()


def test_engines_are_built_by_the_python_that_has_tensorrt(plan, tmp_path):
    record = tmp_path / "record.json"
    (tmp_path / "code").write_text("0")
    reproduce.build_engines(plan, tmp_path / "onnx", record)
    script, *words = (tmp_path / "log").read_text().split()
    given = infer.build_parser().parse_args(words)
    assert (script, given.onnx, given.record) == ("infer.py", tmp_path / "onnx", record)
    assert (given.ptc_mode, given.opt_level, given.batch_sizes) == ("implicit", 4, [8])
    assert given.backend == "tensorrt"
    assert given.precisions == ["FP16", "INT8-PTC", "INT8-QAT"]
    # --torch_compile, which is of PyTorch's part, is not handed on
    assert given.audit
    assert not given.torch_compile
    assert given.timing_cache == tmp_path / "work" / "timings"
    assert json.loads(record.read_text()) == {"kind": "inference"}

    (tmp_path / "code").write_text("3")
    with pytest.raises(UserError, match="engines of .* failed"):
        reproduce.build_engines(plan, tmp_path / "onnx", record)


@pytest.mark.usefixtures("no_training")
def test_a_study_with_engines_says_first_that_there_can_be_none(arguments, tmp_path):
    script = "echo 'a warning\nerror: no GPU here' >&2\nexit 1"
    python = executable(tmp_path / "python", script)
    arguments.remove("--no_engines")
    said = f"no engines with {python}: no GPU here; or leave them out with --no_engines"
    with pytest.raises(UserError, match=said):
        reproduce.main([*arguments, "--engine_python", python])


@pytest.mark.parametrize(("printed", "mode"), [("True", "implicit"), ("False", "explicit")])
def test_the_calibration_that_tensorrt_offers_is_asked_for(tmp_path, printed, mode):
    python = executable(tmp_path / "python", f"echo {printed}")
    assert reproduce.calibration_mode(python) == mode


def test_flags_that_say_how_to_quantize_are_not_for_training_in_float():
    words = "--batch_size 64 --skip_layers fc *.add --sync_batchnorm --calibrator entropy --lr 0.1"
    expected = "--batch_size 64 --sync_batchnorm --lr 0.1"
    assert reproduce.without(flags.QUANTIZATION, words.split()) == expected.split()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "words", ["--test_trt", "--optimizer muon", "--seed 7", "--od x --m resnet18", "--pretr"]
)
def test_flags_that_not_every_training_can_have_are_refused_first(arguments, words):
    refusal = ": --.* must be left to the study"
    if "muon" in words:
        refusal = " are for all three trainings: no muon"
    with pytest.raises(UserError, match=f"--train_flags{refusal}"):
        reproduce.main([*arguments, f"--train_flags={words}"])


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "words", ["--calib_images 512", "--record x.json", "--onnx_dir x", "--data_dir x --audit"]
)
def test_flags_that_a_study_gives_itself_are_refused_first(arguments, words):
    refusal = f"--infer_flags: {words.split()[0]} must be left to the study"
    with pytest.raises(UserError, match=refusal):
        reproduce.main([*arguments, f"--infer_flags={words}"])


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "flags", ["--train_flags=--nonsense", "--infer_flags=--batch_size x", "--opt_level=9"]
)
def test_flags_with_typing_errors_are_refused_first(arguments, flags):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main([*arguments, flags])


@pytest.mark.slow
def test_cpu_speed_leaves_a_record_of_both_runtimes(
    tmp_path, small_digits, quick_latencies, capsys
):
    """Of a network that is hardly trained: OpenVINO's INT8 may be another than ONNX Runtime's."""
    argv = ["--m", "resnet18", "--stem", "imagenet", "--batch_size", "2", "--results", tmp_path]
    cpu_speed.main([str(word) for word in argv])
    [path] = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert (record["kind"], record["dataset"]) == ("inference", "digits")
    ran = {(row["backend"], row["precision"]) for row in record["rows"]}
    assert ran >= {("openvino", "FP32"), ("onnxruntime", "FP32"), ("onnxruntime", "INT8-PTC")}
    timed = [row for row in record["rows"] if row["backend"] != "pytorch"]
    assert {row["batch_size"] for row in timed} == {2}
    for package in ("torch", "openvino", "onnxruntime"):
        assert record["environment"][package]

    # what is there is not done again
    before = path.read_bytes()
    cpu_speed.main([str(word) for word in argv])
    assert path.read_bytes() == before
    assert "| network | batch |" in capsys.readouterr().out


# peers


@pytest.mark.slow
@pytest.mark.usefixtures("small_digits", "quick_latencies")
def test_peers_are_compared_with_this_project(tmp_path):
    """A peer's graph is a copy of one of ours here; another's has no file, as torchao's."""
    argv = ["--m", "vanilla_cnn", "--dataset", "digits", "--num_epochs", "1"]
    train.main([*argv, "--od", str(tmp_path), "--en", "run"])
    best = tmp_path / "run" / "ckpt_best"
    root, path = tmp_path / "graphs", tmp_path / "records" / "record.json"
    peers.main(["export", str(best), str(root), "--calib_images", "16"])
    ours = root / "this_project_max"
    for name in ("modelopt_max", "torchao"):
        (root / name).mkdir()
        peers.note(root / name, calibration_s=1.0, user_lines=9)
    (root / "modelopt_max" / peers.INT8).write_bytes((ours / peers.INT8).read_bytes())
    count = len(np.load(root / peers.IMAGES)["labels"])
    np.save(root / "torchao" / peers.LOGITS, np.eye(10, dtype=np.float32)[np.arange(count) % 10])

    peers.main(["evaluate", str(root)])
    words = ["--backend", "openvino", "--batch_size", "2", "1", "--rounds", "1"]
    peers.main(["measure", str(root), *words, "--record", str(path)])

    record = json.loads(path.read_text())
    assert (record["kind"], record["dataset"], record["calib_images"]) == ("peers", "digits", 16)
    rows = {row["variant"]: row for row in record["rows"]}
    assert next(iter(rows)) == "float"
    assert rows.keys() <= tables.PEER_TITLES.keys()
    assert rows["float"]["agreement_pct"] == 100
    assert rows["float"]["logits_sqnr_db"] is None
    lines = [rows[name]["user_lines"] for name in ("this_project_max", "pytorch_quantization_max")]
    assert 0 < lines[0] < lines[1]
    for key in ("accuracy_pct", "agreement_pct", "logits_sqnr_db", "engine", "int8_layers"):
        assert rows["modelopt_max"][key] == rows["this_project_max"][key]
    assert list(rows["modelopt_max"]["latency_ms"]) == ["1", "2"]
    # what is float in one of them is two layers more in the other
    int8_layers = rows["this_project_sqnr"]["int8_layers"]
    assert rows["this_project_float_head"]["int8_layers"] == int8_layers - 2
    assert "engine" not in rows["torchao"]
    assert rows["torchao"]["latency_ms"] == {}

    table = tables.peers_table(path.parent)
    assert table.splitlines()[0].endswith("| OpenVINO ms, batch 1 | OpenVINO ms, batch 2 |")
    assert len(table.splitlines()) == 2 + len(rows)
