"""Benchmarks: what they write, what they compare, what they leave behind."""

import json
import math
import multiprocessing
import threading
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from pytorch_quantization.nn import QuantConv2d, TensorQuantizer
from torch import nn

import infer
import train
from benchmarks import reproduce, train_speed
from utils import checkpoint as ckpt
from utils.errors import UserError
from utils.files import locked


@pytest.mark.usefixtures("small_digits")
def test_train_speed_times_both_recipes_in_both_modes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "WORKERS", 2)
    left = []
    free = train_speed.free
    monkeypatch.setattr(
        train_speed, "free", lambda: (free(), left.append(multiprocessing.active_children()))
    )
    threads = threading.active_count()
    path = tmp_path / "record.json"
    argv = [
        "--dataset",
        "digits",
        "--stem",
        "imagenet",
        "--batch_size",
        "16",
        "--reference_batch_size",
        "20",
        "--epochs",
        "2",
    ]
    train_speed.main([*argv, "--record", str(path)])
    record = json.loads(path.read_text())
    assert (set(record), record["kind"]) == (
        {"kind", "environment", "commit", "flags", "rows"},
        "train_speed",
    )
    rows = record["rows"]
    cases = [(row["recipe"], row["mode"], row["batch_size"], row["images"]) for row in rows]
    assert cases == [
        (recipe, mode, *sizes)
        for recipe, *sizes in (("reference", 20, 50), ("ours", 16, 48))
        for mode in ("float", "qat")
    ]
    flops = train_speed.flops_per_image("resnet18", "imagenet", 10, (16, 16, 3))
    for row in rows:
        assert set(row) == {field.name for field in fields(train_speed.Row)}
        shares = (
            [1.0] if row["recipe"] == "reference" else [2 / 3, 1 / 3]
        )  # of an epoch in each part of a run
        assert [len(seconds) for seconds in row["epochs_s"]] == [2] * len(shares)
        assert [len(seconds) for seconds in row["warm_up_s"]] == [1] * len(shares)
        assert (row["arithmetic"], row["peak_tflops"]) == ("fp32", None)
        medians = [sum(seconds) / 2 for seconds in row["epochs_s"]]
        assert row["epoch_s"] == pytest.approx(
            sum(share * median for share, median in zip(shares, medians, strict=True))
        )
        assert row["compile_s"] == pytest.approx(
            sum(seconds[0] for seconds in row["warm_up_s"]) - sum(medians)
        )
        assert row["images_s"] == pytest.approx(row["images"] / row["epoch_s"])
        assert row["tflops"] == pytest.approx(flops * row["images_s"] / 1e12)
        assert (
            0 < row["loss"] < (20 if row["mode"] == "qat" else math.inf)
        )  # on so few images float may diverge
    printed = capsys.readouterr().out
    ratio = rows[0]["epoch_s"] / 50 / (rows[2]["epoch_s"] / 48)
    assert f"imagenet stem, time per image, float, reference / ours: {ratio:.2f}" in printed
    assert sum("time per image" in line for line in printed.splitlines()) == 4
    assert left == [[]] * 4  # no worker of one timing runs during the next
    assert threading.active_count() <= threads + 1  # tqdm's own


def test_train_speed_counts_the_products_of_the_reference_network():
    """Against torchvision's published multiply-adds at 224 pixels, and against the layers' shapes."""
    published = torchvision.models.ResNet18_Weights.DEFAULT.meta["_ops"] * 1e9  # forward
    first = 112 * 112 * 64 * 3 * 49  # no gradient for the images
    flops = train_speed.flops_per_image("resnet18", "imagenet", 1000, (224, 224, 3))
    assert flops == pytest.approx(2 * (3 * published - first), rel=1e-3)

    model, shapes = train_speed.reference_network("resnet18", "cifar", 10, False), {}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda module, _, out: shapes.update({module: out.shape[2:].numel()})
            )
    model(torch.zeros(2, 3, 32, 32))
    products = {module: pixels * module.weight.numel() for module, pixels in shapes.items()}
    expected = 2 * (3 * sum(products.values()) - products[model.conv1])
    assert train_speed.flops_per_image("resnet18", "cifar", 10, (32, 32, 3)) == expected


def test_the_quantized_reference_has_the_librarys_layers_and_ranges():
    float_classes = nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d
    model = train_speed.reference_network("resnet18", "cifar", 10, True)
    assert (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d) == float_classes
    assert sum(isinstance(module, QuantConv2d) for module in model.modules()) == 20
    assert isinstance(model.conv1, QuantConv2d)
    assert model.conv1.stride == (1, 1)
    model.load_state_dict(
        train_speed.reference_network("resnet18", "cifar", 10, False).state_dict()
    )
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    data = train_speed.Images(images, np.arange(6), torchvision.transforms.ToTensor())
    train_speed.calibrate_by_maximum(model, data, 4, torch.device("cpu"))
    quantizers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    }
    assert len(quantizers) == 2 * (20 + 1) + 1  # the pool has no weight
    assert all(
        q.amax.isfinite().all() and q._if_quant and not q._if_calib for q in quantizers.values()
    )
    assert model.conv1._input_quantizer.amax.item() == pytest.approx(images.max() / 255)
    assert model.conv1._weight_quantizer.amax.numel() == 64


@pytest.mark.parametrize("flag", ["--epochs", "--warm_up", "--reference_batch_size"])
def test_train_speed_wants_at_least_one(flag):
    with pytest.raises(UserError, match="at least 1"):
        train_speed.main(["--dataset", "digits", flag, "0"])


# reproduce


@pytest.fixture
def arguments(tmp_path):
    """Of a study so small that it takes seconds."""
    words = [
        "--m",
        "vanilla_cnn",
        "--dataset",
        "digits",
        "--num_epochs",
        "2",
        "--tune_epochs",
        "1",
        "--no_engines",
    ]
    return [*words, "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]


@pytest.mark.usefixtures("small_digits", "quick_latencies")
def test_a_study_leaves_one_record_for_each_seed_and_nothing_to_do(
    arguments, tmp_path, monkeypatch, capsys
):
    reproduce.main(
        [*arguments, "--seeds", "2", "--train_flags", "--batch_size 64", "--infer_flags=--FP32"]
    )
    paths = sorted((tmp_path / "results").glob("*.json"))
    assert [path.name for path in paths] == [
        "vanilla_cnn_cifar_seed0.json",
        "vanilla_cnn_cifar_seed1.json",
    ]
    for seed, path in enumerate(paths):
        record = json.loads(path.read_text())
        assert (record["kind"], record["model"], record["seed"]) == (
            "inference",
            "vanilla_cnn",
            seed,
        )
        precisions = list(dict.fromkeys(row["precision"] for row in record["rows"]))
        assert precisions == ["FP32", "FAKE-QUANT-PTC", "FAKE-QUANT-QAT", "FP32-TUNED"]
        assert all(
            row["batch_size"] is None for row in record["rows"]
        )  # nothing to compare a speed with
        tuned, fp32 = record["rows"][-1], record["rows"][0]
        assert tuned["delta_pct"] == pytest.approx(tuned["accuracy_pct"] - fp32["accuracy_pct"])
        assert (record["dataset"], record["epochs"]) == ("digits", {"float": 2, "fine-tuning": 1})
        assert record["train_flags"] == ["--batch_size", "64"]
        assert set(record["seconds"]) == {
            "float",
            "fine-tuning",
            "qat",
            "evaluation of the fine-tuned",
            "evaluation",
        }
        assert not any(str(tmp_path) in value for value in record["flags"].values())
    assert list((tmp_path / "work").iterdir()) == []
    assert "| vanilla_cnn, cifar stem | 2 |" in capsys.readouterr().out
    monkeypatch.setattr(train, "main", None)  # would fail if it was called
    arguments += ["--train_flags", "--batch_size 64"]
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
    paths[0].write_text(
        paths[0].read_text().replace('"sqnr"', '"entropy"')
    )  # made when that was the default
    with pytest.raises(UserError, match="another study .*'entropy'.*choose other --results"):
        reproduce.main(arguments)


@pytest.mark.usefixtures("small_digits", "quick_latencies")
def test_work_done_with_other_flags_is_not_taken_over(arguments, tmp_path):
    for rate in ("1e-9", "0.01"):
        extra = [
            "--results",
            str(tmp_path / rate),
            "--keep",
            "--seeds",
            "1",
            "--train_flags",
            f"--lr {rate}",
        ]
        reproduce.main([*arguments, *extra])
    rates = [
        ckpt.load(path)["flags"]["lr"]
        for path in sorted((tmp_path / "work").glob("*/float/ckpt_2"))
    ]
    assert sorted(rates) == [1e-9, 0.01]


@pytest.mark.usefixtures("small_digits")
def test_a_stage_killed_before_it_linked_its_best_checkpoint_is_mended(tmp_path):
    argv = ["--m", "vanilla_cnn", "--dataset", "digits"]
    best = reproduce.finished(tmp_path / "float", 2, tmp_path, argv)
    epoch = ckpt.load(best)["epoch"]
    assert {path.name for path in best.parent.iterdir()} == {"ckpt_2", "ckpt_best"}
    if epoch == 2:
        best.unlink()
    assert ckpt.load(reproduce.finished(tmp_path / "float", 2, tmp_path, argv))["epoch"] == epoch


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
    monkeypatch.setattr(
        reproduce,
        "study",
        lambda _, model, stem, seed, engines: asked.append((model, seed, engines)),
    )
    monkeypatch.setattr(reproduce, "calibration_mode", lambda _: "explicit")
    arguments[1:2] = ["vanilla_cnn", "resnet18"]
    few = ["--stem", "cifar", "--first_seed", "3", "--seeds", "2"]
    reproduce.main([*arguments, *few])
    assert not any(engines for *_, engines in asked)
    arguments.remove("--no_engines")
    reproduce.main([*arguments, *few])
    expected = [
        ("vanilla_cnn", 3, True),
        ("resnet18", 3, True),
        ("vanilla_cnn", 4, False),
        ("resnet18", 4, True),
    ]
    assert asked[4:] == expected


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
@pytest.mark.parametrize("stage", ["float", "tuned", "qat"])
def test_an_interrupted_study_goes_on_where_it_was(arguments, tmp_path, monkeypatch, stage):
    """Interrupted in the last epoch of a stage, it trains that epoch and the later stages, and nothing again."""
    folder, epochs = (
        tmp_path / "work" / "vanilla_cnn_cifar_seed0_digits_2_1",
        {"float": 2, "tuned": 1, "qat": 1},
    )
    trained, real = [], train.train_epoch

    def train_epoch(*args):
        name = max(
            (path for path in folder.iterdir() if path.name in epochs),
            key=lambda path: path.stat().st_ctime_ns,
        ).name
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
    assert len(trained) == 1 + sum(epochs[name] for name in order[order.index(stage) + 1 :])
    assert (tmp_path / "results" / "vanilla_cnn_cifar_seed0.json").exists()


ENGINE_PYTHON = """#!/bin/sh
echo "$@" > {log}
while [ "$1" != --record ]; do shift; done
echo '{{"kind": "inference"}}' > "$2"
exit {code}
"""


@pytest.mark.parametrize("code", [0, 3])
def test_engines_are_built_by_the_python_that_has_tensorrt(tmp_path, code):
    python, log, record = tmp_path / "python", tmp_path / "log", tmp_path / "record.json"
    python.write_text(ENGINE_PYTHON.format(log=log, code=code))
    python.chmod(0o755)
    flags = {
        "opt_level": 4,
        "ptc_mode": "implicit",
        "infer_flags": ["--audit", "--batch_size", "8"],
    }
    args = SimpleNamespace(engine_python=python, data_dir=tmp_path, work=tmp_path / "work", **flags)
    if code:
        with pytest.raises(UserError, match="engines of .* failed"):
            reproduce.build_engines(args, tmp_path / "onnx", record)
        return
    reproduce.build_engines(args, tmp_path / "onnx", record)
    script, *words = log.read_text().split()
    given = infer.build_parser().parse_args(words)
    assert (script, given.onnx, given.record) == ("infer.py", tmp_path / "onnx", record)
    assert (given.ptc_mode, given.opt_level, given.batch_size) == ("implicit", 4, [8])
    assert given.audit
    assert given.timing_cache == tmp_path / "work" / "timings"
    assert json.loads(record.read_text()) == {"kind": "inference"}


def test_a_study_with_engines_says_first_that_there_can_be_none(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "main", None)  # would fail if it was called
    (tmp_path / "python").write_text(
        "#!/bin/sh\necho 'a warning\nerror: no GPU here' >&2\nexit 1\n"
    )
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(
        UserError,
        match=f"no engines with {tmp_path}/python: no GPU here; or leave them out with --no_engines",
    ):
        reproduce.main(
            [
                *(word for word in arguments if word != "--no_engines"),
                "--engine_python",
                str(tmp_path / "python"),
            ]
        )


def test_flags_that_say_how_to_quantize_are_not_for_training_in_float():
    words = [
        "--batch_size",
        "64",
        "--skip_layers",
        "fc",
        "*.add",
        "--compile",
        "--calibrator",
        "entropy",
        "--lr",
        "0.1",
    ]
    assert reproduce.in_float(words) == ["--batch_size", "64", "--compile", "--lr", "0.1"]


@pytest.mark.parametrize(
    "words", ["--test_trt", "--optimizer muon", "--seed 7", "--od x --m resnet18", "--pretr"]
)
def test_flags_that_not_every_training_can_have_are_refused_first(arguments, words, monkeypatch):
    monkeypatch.setattr(train, "main", None)  # would fail if it was called
    refusal = (
        " are for all three trainings: no muon"
        if "muon" in words
        else ": --.* must be left to the study"
    )
    with pytest.raises(UserError, match=f"--train_flags{refusal}"):
        reproduce.main([*arguments, f"--train_flags={words}"])


@pytest.mark.parametrize(
    "words", ["--calib_images 512", "--record x.json", "--onnx_dir x", "--data_dir x --audit"]
)
def test_flags_that_a_study_gives_itself_are_refused_first(arguments, words, monkeypatch):
    monkeypatch.setattr(train, "main", None)  # would fail if it was called
    with pytest.raises(
        UserError, match=f"--infer_flags: {words.split()[0]} must be left to the study"
    ):
        reproduce.main([*arguments, f"--infer_flags={words}"])


@pytest.mark.parametrize(
    "flags", ["--train_flags=--nonsense", "--infer_flags=--batch_size x", "--opt_level=9"]
)
def test_flags_with_typing_errors_are_refused_first(arguments, flags, monkeypatch):
    monkeypatch.setattr(train, "main", None)  # would fail if it was called
    with pytest.raises(SystemExit, match="2"):
        reproduce.main([*arguments, flags])


@pytest.mark.parametrize(("printed", "mode"), [("True", "implicit"), ("False", "explicit")])
def test_the_calibration_that_tensorrt_offers_is_asked_for(tmp_path, printed, mode):
    (tmp_path / "python").write_text(f"#!/bin/sh\necho {printed}\n")
    (tmp_path / "python").chmod(0o755)
    assert reproduce.calibration_mode(str(tmp_path / "python")) == mode
