"""Scans of the layers' sensitivity, and the choice of layers to quantize."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Small, digits_cut_to, made
from torch import nn

import infer
from utils import auto_quant, flags, records
from utils import checkpoint as ckpt
from utils.backends.network import Layer, Network
from utils.backends.onnxruntime import OnnxRuntimeNetwork
from utils.files import sha256
from utils.manifest import read_export
from utils.metrics import percent_equal, sqnr_db
from utils.quantization import calibrate, quantize_modules, sensitivity
from utils.quantization.codes import layer_facts
from utils.quantization.sensitivity import Progress, parts_of, scan, switched
from utils.records import Candidate, Record, Scan, Sensitivity
from utils.schema import parse

OUTLIER = "layer1.0.conv2"
LOUD = 3e4
"""Times this, one channel drives the others of its tensor into the code 0."""


@torch.no_grad()
def add_outlier(before, after):
    """Let the first of the channels between two layers be `LOUD`; the network computes the same."""
    before.weight[0] *= LOUD
    before.bias[0] *= LOUD
    after.weight[:, 0] /= LOUD


@pytest.fixture
def outlier_network():
    """A calibrated network of which `layer1.conv2` cannot be quantized, and its val batches."""
    model = made(Small).eval()
    add_outlier(model.layer1.bn1, model.layer1.conv2)
    torch.manual_seed(1)
    images = torch.randn(24, 3, 16, 16)
    with torch.no_grad():
        labels = model(images).argmax(1)
    quantize_modules(model, images[:2])
    calibrate(model, [images], "max")
    return model, list(zip(images.split(10), labels.split(10), strict=True))


def scan_all(model, batches, progress=None, save=lambda _: None):
    with switched(model) as network:
        return scan(network, batches, "INT8-PTC", progress or Progress({}), save)


def test_parts_are_all_layers_each_block_of_several_and_each_layer():
    names = ["conv", "layer1.0.conv", "layer1.0.add", "layer1.1.conv", "layer2.0.a", "layer2.0.b"]
    assert parts_of(names) == {
        "*": names,
        "layer1.*": names[1:4],
        "layer1.0.*": names[1:3],
        "layer2.*": names[4:],
        **{name: [name] for name in names},
    }


def test_the_scan_names_the_layer_that_cannot_be_quantized(outlier_network):
    found = scan_all(*outlier_network)
    layers = [part.layers for part in found.parts]
    assert set(layers) == set(parts_of(layers_of(outlier_network[0])))
    single = [part for part in found.parts if not part.layers.endswith("*")]
    assert single[0].layers == "layer1.conv2"
    assert single[1].only_sqnr_db - single[0].only_sqnr_db > 10
    # only without that layer is the rest any good
    assert max(single, key=lambda part: part.without_sqnr_db) is single[0]
    whole = next(part for part in found.parts if part.layers == "*")
    assert (whole.without_sqnr_db, whole.without_accuracy_pct) == (None, 100)


def layers_of(model):
    with switched(model) as network:
        return list(network.layers)


def test_a_scan_measures_what_whole_runs_do(outlier_network):
    model, batches = outlier_network
    found = {part.layers: part for part in scan_all(model, batches).parts}
    labels = torch.cat([labels for _, labels in batches])
    with switched(model) as network:
        names = set(network.layers)

        def measured(int8):
            exact = torch.cat([network(images, ()) for images, _ in batches])
            logits = torch.cat([network(images, int8) for images, _ in batches])
            return sqnr_db(exact.double(), logits.double()), percent_equal(logits.argmax(1), labels)

        for part, members in parts_of(list(network.layers)).items():
            if part != "*":
                row = found[part]
                assert (row.only_sqnr_db, row.only_accuracy_pct) == pytest.approx(measured(members))
                without = (row.without_sqnr_db, row.without_accuracy_pct)
                assert without == pytest.approx(measured(names - set(members)))


def test_a_scan_computes_only_what_lies_behind_the_change(outlier_network, monkeypatch):
    model, batches = outlier_network
    calls = dict.fromkeys(layers_of(model), 0)
    for name, layer in model.named_modules():
        if name in calls:
            cls = type(layer)

            def forward(self, *args, name=name, cls=cls):
                calls[name] += 1
                return cls.forward(self, *args)

            layer.__class__ = type(cls.__name__, (cls,), {"forward": forward})
    scan_all(model, batches[:1])
    # twice in whole, and for all; then for each block and layer that does not come later
    assert calls["conv"] == 2 + 2 * 2
    assert calls["fc"] == 2 + 2 * len(parts_of(list(calls)))


def test_afterwards_the_network_is_as_before(outlier_network):
    model, batches = outlier_network
    images = batches[0][0]
    with torch.no_grad():
        expected = model(images)
        scan_all(model, batches)
        assert torch.equal(model(images), expected)
    assert all("forward" not in vars(module) for module in model.modules())


class Halved(nn.Module):
    """A network that may write into the images that it is given."""

    def __init__(self, network, in_place):
        super().__init__()
        self.network = network
        self.in_place = in_place

    def forward(self, x):
        return self.network(x.mul_(0.5) if self.in_place else x * 0.5)


def test_a_first_layer_that_works_in_place_changes_no_range_and_no_scan():
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
    given = images.clone()
    found = []
    for in_place in (False, True):
        model = Halved(made(Small).eval(), in_place)
        quantize_modules(model, images[:2])
        calibrate(model, [images])
        facts = layer_facts(model, images)
        found.append([facts, scan_all(model, [(images, labels)])])
        assert torch.equal(images, given)
    assert found[0] == found[1]


def test_an_interrupted_scan_goes_on(outlier_network, tmp_path):
    path = tmp_path / "scan.json"

    def stop(progress):
        records.write(path, progress)
        if progress.batches == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_all(*outlier_network, Progress({"data": "a"}), stop)
    progress = auto_quant.read_progress(path, {"data": "a"})
    assert progress.batches == 2
    model, batches = outlier_network
    # what was done already is not looked at
    batches = [(None, labels) for _, labels in batches[:2]] + batches[2:]
    assert scan_all(model, batches, progress) == scan_all(*outlier_network)

    assert auto_quant.read_progress(path, {"data": "b"}) == Progress({"data": "b"})
    path.write_text(path.read_text()[:-20])
    assert auto_quant.read_progress(path, {"data": "a"}) == Progress({"data": "a"})


# The search, with times and accuracies that are made up


class Engine(Network):
    """Layers a, b and c, and times in milliseconds."""

    def __init__(self, times_ms, total_ms=None, pct=None):
        self.pct = pct
        nodes = [f"/model/{name}/Conv + /model/{name}/relu/Relu" for name in times_ms]
        self.layers = [Layer(node, "-", "-", "-") for node in nodes]
        self.times_ms = list(times_ms.values())
        self.total_ms = sum(self.times_ms) if total_ms is None else total_ms

    def layer_times_ms(self):
        return self.times_ms


NAMES = ["a", "b", "c"]
FLOAT_MS = {"a": 1.0, "b": 1.0, "c": 1.0}


def scan_of(noise):
    """A scan in which each layer's noise, as share of the signal, adds to the others'."""
    parts = []
    for name in NAMES:
        left = sum(noise.values()) - noise[name]
        values = [-10 * float(np.log10(value)) for value in (noise[name], left)]
        parts.append(Sensitivity(name, values[0], 90.0, values[1], 90.0))
    return Scan("INT8-PTC", 10, parts)


def right_images(pct):
    """Of 1000 images, the first are classified rightly."""
    return np.arange(1000) < 10 * pct


def search(
    int8_ms, accuracy, noise, max_drop=0.1, float_ms=FLOAT_MS, measured_pct=None, fp16_pct=100.0
):
    """What is left in float, by engines that add up their layers' times.

    Args:
        measured_pct: an engine's own accuracy, by the layers in float; fake quantization's if None.
    """
    measured_pct = measured_pct or accuracy
    float_right = right_images(accuracy(NAMES))

    def least_pct(pct):
        return auto_quant.least_pct(right_images(pct), float_right, max_drop)

    def keeps(skip):
        return accuracy(skip) >= least_pct(accuracy(skip))

    def engines(skip):
        if skip == ["*"]:
            return {"FP32": Engine(float_ms, 9.0, 100.0), "FP16": Engine(float_ms, pct=fp16_pct)}
        times = {name: (float_ms if name in skip else int8_ms)[name] for name in NAMES}
        return {"INT8-PTC": Engine(times, pct=measured_pct(skip))}

    def measured(skip, named):
        return [
            Candidate(name, skip, made.total_ms, made.pct, least_pct(made.pct))
            for name, made in named.items()
        ]

    choice = auto_quant.search(scan_of(noise), NAMES, engines, measured, keeps)
    return choice.skip_layers


def test_a_loss_of_as_many_images_as_chance_moves_is_within_the_budget():
    float_right = np.arange(1000) < 960

    def keeps(lost, gained, max_drop=0.1):
        right = float_right.copy()
        right[:lost] = False
        right[960 : 960 + gained] = True
        pct = auto_quant.accuracy_pct(right)
        return pct >= auto_quant.least_pct(right, float_right, max_drop)

    # one image is 0.1 points; of 4 and of 9 images that change, chance moves 2 and 3
    assert keeps(0, 0, max_drop=0)
    assert keeps(1, 0)
    assert keeps(2, 0)
    assert not keeps(4, 0)
    assert keeps(3, 1)
    assert keeps(6, 3) and not keeps(7, 2)
    assert keeps(6, 3, max_drop=0) and not keeps(6, 2, max_drop=0)


def test_of_few_images_chance_excuses_nothing():
    float_right = np.arange(10) < 3
    constant = np.arange(10) == 0
    least = auto_quant.least_pct(constant, float_right, 0.1)
    assert auto_quant.accuracy_pct(constant) < least < 30


@pytest.mark.parametrize("max_drop", [0.1, 5.0])
def test_what_cannot_be_quantized_stays_float_if_the_budget_says_so(max_drop):
    int8_ms = {"a": 0.5, "b": 0.5, "c": 0.5}
    noise = {"a": 1e-3, "b": 1e-1, "c": 1e-3}
    skip = search(int8_ms, lambda skip: 96.0 if "b" in skip else 92.0, noise, max_drop)
    assert skip == (["b"] if max_drop == 0.1 else [])


def test_the_layer_that_loses_the_least_time_for_its_noise_goes_first():
    int8_ms = {"a": 0.1, "b": 0.9, "c": 0.5}
    noise = {"a": 2e-2, "b": 1e-2, "c": 1e-3}
    assert search(int8_ms, lambda skip: 96.0 if skip else 90.0, noise) == ["b"]


def test_a_layer_that_the_budget_does_not_need_is_put_back():
    int8_ms = {"a": 1.0, "b": 0.5, "c": 0.5}
    noise = {"a": 1e-2, "b": 1e-2, "c": 1e-3}
    assert search(int8_ms, lambda skip: 96.0 if "b" in skip else 90.0, noise) == ["b"]


def test_no_layer_stays_float_where_the_budget_allows_all_in_int8():
    # halves would find that one layer does not do, but two
    accuracies = {0: 96.0, 1: 90.0, 2: 96.0, 3: 96.0}
    int8_ms = dict.fromkeys(NAMES, 0.5)
    noise = dict.fromkeys(NAMES, 1e-3)
    assert search(int8_ms, lambda skip: accuracies[len(skip)], noise) == []


def test_layers_that_are_slower_in_int8_stay_float():
    int8_ms = {"a": 0.5, "b": 1.5, "c": 0.5}
    assert search(int8_ms, lambda _: 96.0, dict.fromkeys(NAMES, 1e-3)) == ["b"]


@pytest.mark.parametrize("int8_ms", [0.99, 1.5])
def test_float_is_handed_over_unless_int8_is_2_percent_faster(int8_ms):
    noise = dict.fromkeys(NAMES, 1e-3)
    assert search(dict.fromkeys(NAMES, int8_ms), lambda _: 96.0, noise) == ["*"]


def test_an_engine_that_computes_something_else_is_not_chosen():
    """More layers stay in float than fake quantization says, until an engine is as good."""
    int8_ms = dict.fromkeys(NAMES, 0.5)
    noise = {"a": 1e-3, "b": 1e-1, "c": 1e-2}

    def accuracy(skip):
        return 96.0 if "b" in skip else 92.0

    def measured_pct(skip):
        return 96.0 if {"b", "c"} <= {*skip} else 90.0

    assert search(int8_ms, accuracy, noise) == ["b"]
    assert search(int8_ms, accuracy, noise, measured_pct=measured_pct) == ["b", "c"]
    assert search(int8_ms, accuracy, noise, measured_pct=lambda _: 90.0) == ["*"]


def test_an_engine_that_keeps_the_accuracy_is_taken_whatever_fake_quantization_says():
    noise = dict.fromkeys(NAMES, 1e-3)
    int8_ms = dict.fromkeys(NAMES, 0.5)

    def accuracy(skip):
        return 96.0 if len(skip) == 3 else 90.0

    assert search(int8_ms, accuracy, noise, measured_pct=lambda _: 96.0) == []


def test_one_layer_in_float_is_tried_where_fake_quantization_needs_none():
    int8_ms = dict.fromkeys(NAMES, 0.5)
    noise = {"a": 1e-3, "b": 1e-1, "c": 1e-2}

    def measured_pct(skip):
        return 96.0 if "b" in skip else 90.0

    assert search(int8_ms, lambda _: 96.0, noise, measured_pct=measured_pct) == ["b"]


def test_a_float_engine_whose_values_overflow_need_not_be_beaten():
    # 9 ms are FP32's
    int8_ms = dict.fromkeys(NAMES, 2.0)
    noise = dict.fromkeys(NAMES, 1e-3)
    assert search(int8_ms, lambda _: 96.0, noise) == ["*"]
    assert search(int8_ms, lambda _: 96.0, noise, fp16_pct=10.0) == []


def test_float_is_handed_over_where_nothing_keeps_the_budget():
    def accuracy(skip):
        return 96.0 if len(skip) == 3 else 90.0

    noise = dict.fromkeys(NAMES, 1e-3)
    assert search(dict.fromkeys(NAMES, 0.5), accuracy, noise) == ["*"]


def test_time_that_is_not_known_decides_nothing():
    engine = Engine({"a": None, "b": 2.0}, 2.0)
    engine.layers[1] = Layer("/model/b/Conv + /model/c/add/Add", "-", "-", "-")
    assert auto_quant.layer_times(engine, NAMES) == {"b": 1.0, "c": 1.0}


# The command line


@pytest.fixture(scope="module")
def outlier_checkpoint(float_checkpoint, trained_network, digits, tmp_path_factory):
    """A float checkpoint whose layer `OUTLIER` cannot be quantized."""
    checkpoint = ckpt.load(float_checkpoint)
    state = {key: value.clone() for key, value in checkpoint.state.items()}
    for name in ("bn1.weight", "bn1.bias"):
        state[f"layer1.0.{name}"][0] *= LOUD
    state["layer1.0.conv2.weight"][:, 0] /= LOUD
    path = tmp_path_factory.mktemp("outlier") / "ckpt_best"
    ckpt.save(path, replace(checkpoint, state=state))
    return path


@pytest.fixture
def few(digits):
    with digits_cut_to(300, 40, digits):
        yield


def run(checkpoint, *flags, folder):
    common = "--calibrator max --calib_images 128 --backend onnxruntime --record"
    argv = ["--load_ckpt", checkpoint, *common.split(), folder / "record.json"]
    infer.main([str(arg) for arg in [*argv, "--onnx_dir", folder / "onnx", *flags]])
    return parse(Record, json.loads((folder / "record.json").read_text()), "record")


@pytest.fixture(scope="module")
def scanned(outlier_checkpoint, digits, tmp_path_factory):
    """Folder with the record of a scan, and the export's folder."""
    folder = tmp_path_factory.mktemp("scanned")
    with digits_cut_to(300, 40, digits):
        run(outlier_checkpoint, "--sensitivity", folder=folder)
    return folder


def test_the_command_scans_and_remembers(outlier_checkpoint, scanned, few, capsys, monkeypatch):
    record = parse(Record, json.loads((scanned / "record.json").read_text()), "record")
    single = [part for part in record.sensitivity.parts if not part.layers.endswith("*")]
    assert single[0].layers == OUTLIER
    assert record.rows == []
    # nothing is computed again
    monkeypatch.setattr(sensitivity, "before", None)
    again = run(outlier_checkpoint, "--sensitivity", folder=scanned)
    assert again.sensitivity == record.sensitivity
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith(OUTLIER) for line in table)
    images = record.sensitivity.images
    assert f"of {images} val images: one is {100 / images:.2f} points" in table
    # nor for other flags taken for known
    with pytest.raises(TypeError):
        run(outlier_checkpoint, "--sensitivity", "--skip_layers", "fc", folder=scanned)


@pytest.mark.usefixtures("quick_latencies")
@pytest.mark.parametrize("int8_ms", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_the_command_chooses(
    outlier_checkpoint, scanned, few, tmp_path, capsys, monkeypatch, int8_ms
):
    shutil.copytree(scanned, tmp_path, dirs_exist_ok=True)
    # SHA-256 of the graphs that are timed, by their folder
    timed = defaultdict(set)

    def latencies_ms(self, images):
        timed[self.path.parent].add(sha256(self.path))
        return np.full(3, int8_ms if "int8" in self.path.name else 2.0)

    monkeypatch.setattr(OnnxRuntimeNetwork, "latencies_ms", latencies_ms)
    record = run(outlier_checkpoint, "--auto_quant", "--batch_size", 1, folder=tmp_path)
    said = capsys.readouterr().out
    manifest, _ = read_export(tmp_path / "onnx")
    assert record.sensitivity is not None
    # all in FP32, in FP16 and in INT8, at least
    tried = [candidate.precision for candidate in record.choice.candidates]
    assert tried[:3] == ["FP32", "FP16", "INT8-PTC"]
    assert all(f"{precision} " in said for precision in tried)
    # the drafts are what is exported: engines of them are built once
    exported = timed.pop(tmp_path / "onnx")
    assert exported <= set.union(*timed.values())
    if int8_ms > 2:
        assert "the same by hand: --skip_layers '*' --FP32 --FP16" in said
        assert manifest.int8_nodes.keys() == {"FP32"}
        assert manifest.quantization.skip_layers == record.choice.skip_layers == ["*"]
    else:
        assert f"the same by hand: --skip_layers {OUTLIER}\n" in said
        assert manifest.quantization.skip_layers == record.choice.skip_layers == [OUTLIER]
        assert not any("layer1.0/conv2/" in node for node in manifest.int8_nodes["INT8-PTC"])
        assert {row.precision for row in record.rows} >= {"FP32", "INT8-PTC"}


@pytest.mark.usefixtures("quick_latencies")
@pytest.mark.slow
def test_a_choice_must_beat_just_the_float_precision_that_is_named(
    outlier_checkpoint, scanned, few, tmp_path, capsys, monkeypatch
):
    shutil.copytree(scanned, tmp_path, dirs_exist_ok=True)
    timed = set()

    def latencies_ms(self, images):
        timed.add(self.path.name)
        return np.full(3, 2.0)

    monkeypatch.setattr(OnnxRuntimeNetwork, "latencies_ms", latencies_ms)
    flags = ["--auto_quant", "--FP16", "--INT8PTC", "--batch_size", 1]
    run(outlier_checkpoint, *flags, folder=tmp_path)
    assert timed == {"fp16.onnx", "int8_ptc.onnx"}
    assert "the same by hand: --skip_layers '*' --FP16\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sensitivity", "--sensitivity needs torch and a checkpoint: name that by --load_ckpt"),
        ("--sensitivity --onnx .", "--sensitivity needs torch and a checkpoint"),
        ("--auto_quant --onnx . --batch_size 1", "--auto_quant needs torch and a checkpoint"),
        ("--auto_quant --load_ckpt x", "name it by --batch_size"),
        ("--auto_quant --load_ckpt x --batch_size 1 --export_only", "times engines"),
        ("--auto_quant --load_ckpt x --batch_size 1 --INT8QAT", "drop --INT8QAT"),
        ("--auto_quant --load_ckpt x --batch_size 1 --max_drop -1", "--max_drop: 0 to 100"),
        ("--sensitivity --load_ckpt x --max_drop 1", "--max_drop is of --auto_quant"),
        ("--sensitivity --load_ckpt x --FP32", "--sensitivity: the precisions named are all float"),
        ("--sensitivity --load_ckpt x --export_only", "--sensitivity exports nothing"),
        ("--sensitivity --load_ckpt x --audit", "--audit: --sensitivity runs no engine"),
        ("--sensitivity --load_ckpt x --report y", "--report: --sensitivity runs no engine"),
        ("--sensitivity --onnx . --predict a", "--sensitivity: --predict measures nothing"),
    ],
)
def test_contradictions_are_one_line(error_line, flags, said):
    assert said in error_line(infer.main, flags.split())


def test_a_quantized_checkpoint_has_chosen_already(qat_checkpoint, few, tmp_path, error_line):
    flags = ["--load_ckpt", qat_checkpoint, "--auto_quant", "--batch_size", 1]
    line = error_line(infer.main, [*flags, "--onnx_dir", tmp_path / "onnx"])
    assert "this checkpoint went through QAT; name the float one" in line


def test_a_calibrated_checkpoint_is_chosen_of_as_the_float_one(qat_checkpoint, tmp_path):
    content = torch.load(qat_checkpoint, weights_only=True)
    content |= {"epoch": 0, "state": content["ptq_state"]}
    content["quantization"]["skip_layers"] = ["fc"]
    torch.save(content, tmp_path / "ckpt_0")
    argv = ["--load_ckpt", str(tmp_path / "ckpt_0"), "--auto_quant", "--batch_size", "1"]
    args = infer.build_parser().parse_args(argv)
    checkpoint, _, quantization = infer.read_checkpoint(args)
    assert checkpoint.quantization is None
    assert checkpoint.state.keys() == ckpt.without_ranges(content["state"]).keys()
    # what it was calibrated with holds on, as if the flags had said it
    assert quantization.skip_layers == args.skip_layers == ["fc"]
    assert flags.agreed_quantization(args, None) == quantization

    # the choice by hand
    by_hand = ["--load_ckpt", str(tmp_path / "ckpt_0"), "--skip_layers", "conv1"]
    checkpoint, _, quantization = infer.read_checkpoint(infer.build_parser().parse_args(by_hand))
    assert checkpoint.quantization is None
    assert quantization.skip_layers == ["conv1"]
