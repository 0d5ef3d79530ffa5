"""The page of a run: its numbers are the record's, its names are text, and layers find engines."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, Small, made
from torch import nn

from layers.quantized import QuantLinear
from utils import report
from utils.engine_layers import audit_lines, layer_rows, spent_by
from utils.manifest import Manifest
from utils.quantization import calibrate, quantize_modules
from utils.quantization.codes import layer_facts
from utils.records import Candidate, Choice, Engine, Layer, Record, Row, cells_of
from utils.specs import CodeUse, DataSpec, LayerFacts, Quantization

HOSTILE = "<script>alert('1')</script>"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The tags of a page, their attributes, its text, and the cells of each table with an id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.tables = [], [], "", {}
        self._open, self._lines = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        assert not any(name.startswith("on") for name in values)
        if tag == "table":
            self._lines = self.tables.setdefault(values.get("id", len(self.tables)), [])
        if tag == "tr":
            self._lines.append([])
        if tag in ("th", "td"):
            self._lines[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if {"th", "td"} & set(self._open):
            self._lines[-1][-1] += data


def facts(name, macs=1000, int8=True, ranges=(), kind="Conv2d"):
    return LayerFacts(name, kind, int8, macs, 100, 200, 50, list(ranges))


def use(used_pct=80.0, clipped_pct=0.0):
    return CodeUse("input", 2.5, 2.5, clipped_pct, used_pct, [0.0] * 8 + [0.125] * 8)


def engine(precision, layers, missed=()):
    return Engine("tensorrt", precision, 10, list(layers), list(missed))


def make_page(tmp_path, record, layers=None, classes=("cat", "dog"), data=True, **predictions):
    digits = {"cat": 0, "dog": 1}
    images = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.array([digits["cat"], 0, digits["dog"], 1])
    spec = DataSpec("folder", 8, list(classes), 0, [0.5] * 3, [0.5] * 3)
    files = {"predictions.npz": ""}
    manifest = Manifest(
        record.model, "cifar", spec, 0, Quantization(), {}, files, {}, [], layers=layers or {}
    )
    given = SimpleNamespace(test_images=images, test_labels=labels, classes=classes)
    shown = {"FP32": labels, "FAKE-QUANT-QAT": np.array([0, 1, 1, 1]), **predictions}
    report.write(tmp_path / "page.html", record, manifest, shown, given if data else None)
    return Page((tmp_path / "page.html").read_text())


def make_record(rows=(), engines=(), model="resnet18"):
    machine = {"gpu": None, "cpu": "a CPU", "torch": "2"}
    return Record(
        model, "cifar", "folder", 0, {}, "abc", machine, list(rows), Quantization(), list(engines)
    )


ROWS = [
    Row("tensorrt", "FP16", 90.0, -0.5, 99.0).timed(8, 2.0, 2.5),
    Row("tensorrt", "INT8-QAT", 90.25, -0.25, 98.0, file_mb=1.5).timed(8, 1.0, 1.5),
]


def test_the_numbers_of_the_page_are_the_records(tmp_path):
    page = make_page(tmp_path, make_record(ROWS))
    assert page.tables["rows"] == cells_of(ROWS)
    [point] = report.speedups(ROWS)
    assert point == ("INT8-QAT, batch 8, over tensorrt's FP16", 2.0, 0.25)
    assert point[0] in page.text


def test_the_page_needs_no_network_and_no_scripts(tmp_path):
    page = make_page(tmp_path, make_record(ROWS))
    assert "script" not in page.tags
    assert "link" not in page.tags
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,"))
    assert page.tags.count("img") == 1


def test_hostile_names_are_text(tmp_path):
    layers = {"INT8-QAT": [facts(HOSTILE, ranges=[use(used_pct=1.0)])]}
    kernel = Layer(f"/model/{HOSTILE}/Conv", HOSTILE, "INT8", HOSTILE, 1.0)
    record = make_record(ROWS, [engine("INT8-QAT", [kernel], [HOSTILE])])
    record.environment["cpu"] = record.dataset = HOSTILE
    page = make_page(tmp_path, record, layers, classes=(HOSTILE, '"><img src=x>'))
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert page.text.count(HOSTILE) >= 8


def test_images_on_which_int8_and_fp32_disagree_and_confusion(tmp_path):
    page = make_page(tmp_path, make_record())
    assert "1 of 4 test images." in page.text
    confusion = next(lines for lines in page.tables.values() if lines[0][0].startswith("is, "))
    assert [[cell.split() for cell in line] for line in confusion[1:]] == [
        [["cat"], ["1", "-1"], ["1", "+1"]],
        [["dog"], ["·"], ["2"]],
    ]


@pytest.mark.parametrize("data", [True, False])
def test_what_was_not_measured_is_left_out(tmp_path, data):
    """No times, no engines, no layers of an earlier version's export; perhaps no images."""
    page = make_page(tmp_path, make_record([Row("pytorch", "FP32")]), data=data)
    assert "Nothing to show" in page.text
    assert "Layers" not in page.text
    assert ("Confusion" in page.text) == data


def test_of_many_classes_those_with_errors_are_shown():
    labels = np.arange(100)
    predicted = labels.copy()
    predicted[[7, 50]] = 8
    shown = report.confusion(labels, labels, predicted, [str(label) for label in labels])
    assert len(shown["classes"]) == report.MOST_CLASSES
    assert {"7", "50"} <= set(shown["classes"])
    assert not shown["all"]


def test_sensitivity_is_shown_if_there_is_one(tmp_path):
    record = make_record()
    layers = {"INT8-PTC": [facts("conv1"), facts("fc")]}
    page = make_page(tmp_path, record, layers)
    assert "Sensitivity" not in page.text
    assert page.tables["layers-INT8-PTC"][0] == ["layer", "ranges and codes", "MACs"]

    part = {"only_accuracy_pct": 90.0, "without_sqnr_db": None, "without_accuracy_pct": 89.5}
    parts = [
        {"layers": name, "only_sqnr_db": db, **part} for name, db in (("fc", 31.2), ("*", 9.5))
    ]
    record.sensitivity = {"precision": "INT8-PTC", "images": 500, "parts": parts}
    page = make_page(tmp_path, record, layers)
    assert "Of INT8-PTC on 500 val images" in page.text
    assert page.tables["scan"][1:] == [
        ["fc", "31.2", "90.00", "–", "89.50"],
        ["*", "9.5", "90.00", "–", "89.50"],
    ]
    beside = [line[:2] for line in page.tables["layers-INT8-PTC"]]
    assert beside == [["layer", "alone: SQNR dB"], ["conv1 Conv2d", "–"], ["fc Conv2d", "31.2"]]


def test_the_engines_that_auto_quant_tried_are_shown_if_it_did(tmp_path):
    record = make_record()
    assert "candidates" not in make_page(tmp_path, record).tables
    candidates = [
        Candidate("FP16", ["*"], 2.5, 95.4, 95.3),
        Candidate("INT8-PTC", [], 1.25, 95.2, 95.25),
        Candidate("INT8-PTC", ["conv1", "fc"], 1.5, 95.4, 95.3),
    ]
    record.choice = Choice(["conv1", "fc"], candidates)
    page = make_page(tmp_path, record)
    assert page.tables["candidates"][1:] == [
        ["FP16", "2.500", "95.40", "95.30", "all"],
        ["INT8-PTC", "1.250", "95.20", "95.25", "none"],
        ["INT8-PTC", "1.500", "95.40", "95.30", "conv1 fc"],
    ]


# Layers and engines

NETWORK = [facts("conv1"), facts("layer1.0.conv1"), facts("layer1.0.add", 0, kind="Add")]
BLOCK = "/model/layer1/layer1.0"


def test_an_engine_layer_is_counted_to_its_largest_part_with_the_copies_for_it():
    name = f"Reformatting CopyNode for Input Tensor 0 to {BLOCK}/conv1/Conv"
    copy = Layer(name, "Reformat", "FP16", "x", 0.5)
    fused = Layer(
        f"{BLOCK}/conv1/Conv + {BLOCK}/add/Add + {BLOCK}/relu/Relu [profile 1] "
        f"[ONNX Layer: {BLOCK}/conv1/Conv] [ONNX Layer: {BLOCK}/add/Add]",
        "Convolution",
        "INT8",
        "sm80_xmma",
        0.25,
    )
    spent = spent_by(engine("INT8-QAT", [copy, fused]), NETWORK)
    assert set(spent) == {"layer1.0.conv1"}
    found = spent["layer1.0.conv1"]
    assert (found.main, found.ms, found.generation) == (fused, 0.75, "sm80")
    assert found.fused == ["layer1.0.add"]
    # 10 images of 1000 multiply-adds in 0.25 ms
    assert found.tops == pytest.approx(2 * 10 * 1000 / 0.25e-3 / 1e12)
    # two layers read 100 values each and write 200, 200 of which stay inside; 100 weights
    assert found.gb_s == pytest.approx((10 * (200 - 200 + 200) + 100) / 0.25e-3 / 1e9)


def test_quantizers_are_their_layers_and_other_versions_names_are_understood():
    quantize = Layer(f"{BLOCK}/conv1/input_quantizer/QuantizeLinear", "Scale", "FP16", "x", 0.5)
    openvino = Layer("Conv_7 /model/conv1/Conv /model/relu/Relu", "Convolution", "INT8", "-", None)
    spent = spent_by(engine("INT8-QAT", [quantize, openvino]), NETWORK)
    assert (spent["layer1.0.conv1"].ms, spent["layer1.0.conv1"].tops) == (0.5, None)
    assert (spent["conv1"].ms, spent["conv1"].tops, spent["conv1"].generation) == (None, None, "-")


def test_an_audit_lists_what_each_engine_layer_reaches():
    layers = [
        Layer("Reformatting CopyNode for /model/conv1/Conv", "Reformat", "FP16", "copy", 0.5),
        Layer("/model/conv1/Conv", "Convolution", "INT8", "sm80_xmma_i8", 0.00025),
        Layer("/model/conv1/Conv", "Convolution", "-", "brgconv_avx512_core_vnni", 0.00025),
        Layer("/model/pool/Pool", "Pool", "INT8", "-", None),
    ]
    titles, *lines = audit_lines(engine("INT8-QAT", layers), NETWORK)
    assert titles.split()[:3] == ["ms", "TFLOP/s", "GB/s"]
    # 10 images of 1000 multiply-adds, and of 300 values beside 50 weights, in 250 ns
    assert [line.split()[:4] for line in lines] == [
        ["0.5000", "-", "-", "-"],
        ["0.0003", "0.08", "12.2", "sm80"],
        ["0.0003", "0.08", "-", "avx512_core_vnni"],
        ["-", "-", "-", "-"],
    ]
    # an export without INT8 does not know its layers
    [_, line] = audit_lines(engine("FP32", layers[1:2]), [])
    assert line.split()[:4] == ["0.0003", "-", "-", "sm80"]


def test_times_of_other_fusions_are_not_compared():
    alone = Layer(f"{BLOCK}/conv1/Conv", "Convolution", "FP16", "-", 1.0)
    fused = Layer(f"{BLOCK}/conv1/Conv + {BLOCK}/add/Add", "Convolution", "INT8", "-", 2.0)
    slower = ["2.00 × the time of the float engine"]
    three = replace(fused, name=f"{fused.name} + {BLOCK}/conv2/Conv", ms=1.0)
    for other, odd in ((alone, []), (replace(fused, ms=1.0), slower), (three, slower)):
        engines = [engine("FP16", [other]), engine("INT8-QAT", [fused])]
        rows = {row.facts.name: row for row in layer_rows(NETWORK, engines, "INT8-QAT")}
        assert rows["layer1.0.conv1"].odd == odd
        assert rows["layer1.0.add"].fused_into == "layer1.0.conv1"


def test_what_is_odd_is_said(tmp_path):
    layers = [
        facts("fine", ranges=[use()]),
        facts("slow", ranges=[use()]),
        facts("float", ranges=[use()]),
        facts("clipped", ranges=[use(clipped_pct=2.0)]),
        facts("empty", ranges=[use(used_pct=10.0)]),
    ]

    def run(precision, times_ms):
        return [
            Layer(f"/model/{layer.name}/Conv", "Convolution", precision, "-", ms)
            for layer, ms in zip(layers, times_ms, strict=True)
        ]

    engines = [
        engine("FP16", run("FP16", [2, 2, 2, 2, 2])),
        engine("INT8-QAT", run("INT8", [1, 3, 1, 1, 1]), ["/model/float/Conv"]),
    ]
    rows = {row.facts.name: row for row in layer_rows(layers, engines, "INT8-QAT")}
    assert {name: row.odd for name, row in rows.items()} == {
        "fine": [],
        "slow": ["1.50 × the time of the float engine"],
        "float": ["meant for INT8, but not run in it"],
        "clipped": ["input: 2.0 % beyond the range"],
        "empty": ["input: 10 % of the codes used"],
    }
    page = make_page(tmp_path, make_record(ROWS, engines), {"INT8-QAT": layers})
    assert "4 of 5 layers odd" in page.text
    table = page.tables["layers-INT8-QAT"][1:]
    assert [line[1:3] for line in table] == [[f"{ms}.0000", "2.0000"] for ms in (1, 3, 1, 1, 1)]


# Codes


def test_use_of_codes_is_counted():
    layer = QuantLinear.convert(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [-127, 127, 0, 1]]))
    layer.input_quantizer.set_range(torch.tensor(127.0))
    layer.weight_quantizer.set_range(torch.tensor([127.0, 127.0]))
    model = nn.Sequential(layer)
    x = torch.tensor([[0.0, 1, 126, 500], [5, 6, 7, 1000]])
    [found] = layer_facts(model, x)
    assert (found.name, found.kind, found.int8, found.macs) == ("0", "Linear", True, 8)
    assert (found.reads, found.writes, found.parameters) == (4, 2, 8)
    operand, weight = found.ranges
    # 0 1 5 6 7 126 127, of eight values; two of them lie beyond
    assert (operand.operand, operand.smallest, operand.largest) == ("input", 127, 127)
    assert operand.used_pct == pytest.approx(100 * 7 / 8)
    assert operand.clipped_pct == 25
    assert operand.histogram == [0] * 8 + [5 / 8] + [0] * 6 + [3 / 8]
    # -127 0 1 2 3 4 127, of eight values
    assert weight.used_pct == pytest.approx(100 * 7 / 8)
    assert weight.clipped_pct == 0
    # however many images there are, a weight has its values once
    [found] = layer_facts(model, x.repeat(40, 1))
    assert found.ranges[1] == weight


def test_every_layer_of_a_network_has_its_facts():
    model = made(Small).eval()
    quantize_modules(model, EXAMPLE, skip_layers=["fc"])
    calibrate(model, [EXAMPLE])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = {layer.name: layer for layer in layer_facts(model, EXAMPLE)}
    assert not found["fc"].int8
    assert found["fc"].ranges == []
    assert [use.operand for use in found["conv"].ranges] == ["input", "weight"]
    assert found["conv"].macs == 16 * 16 * 6 * 3 * 9
    for layer in found.values():
        for one in layer.ranges:
            assert sum(one.histogram) == pytest.approx(1, abs=1e-3)
            assert 0 < one.used_pct <= 100
            assert re.fullmatch("input|weight|x|other|factor", one.operand)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
