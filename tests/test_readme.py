"""README and docs keep their word: tables, commands, links, code and the demo."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, ROOT, Small
from PIL import Image
from torch import nn

import infer
import train
from benchmarks import tables, train_speed
from layers.quantized import QuantizedLayer
from utils import records
from utils.quantization import calibrate, quantize_modules

README = (ROOT / "README.md").read_text()
WITH_TABLES = tables.documents()
DOCUMENTS = [
    *WITH_TABLES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "layers" / "README.md",
    ROOT / "results" / "README.md",
]
RECORDS = sorted((ROOT / "results").rglob("*.json"))
ORIGINAL_COMMANDS = """\
python train.py --m resnet18 --pretrain --num_epochs 40 --test_trt --FP16 --INT8PTC
python train.py --m resnet18 --quantize --partial_ckpt --load_ckpt /tmp/pytorch_exp/ckpt_best \
--num_epochs 10 --lr 1e-4 --lrdt 10
python infer.py --m resnet18 --load_ckpt /tmp/pytorch_exp_1/ckpt_best --quantize --INT8QAT
"""


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(text, language):
    """What stands in the document's code blocks of a language, in quotes too."""
    without_quotes = re.sub(r"^> ?", "", text, flags=re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", without_quotes, re.DOTALL)


def commands(text):
    """The words of each command that runs train.py or infer.py."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    ours = [line for line in lines if re.search(r"(train|infer)\.py ", line)]
    return [shlex.split(line, comments=True) for line in ours]


def parse(words):
    """The script of a command, and its flags as that script's parser reads them."""
    for index, word in enumerate(words):
        if word.endswith(("train.py", "infer.py")):
            script = train if word.endswith("train.py") else infer
            return script, script.build_parser().parse_args(words[index + 1 :])
    raise AssertionError(words)


def commands_of_documents():
    found = []
    for path in DOCUMENTS:
        for block in blocks(path.read_text(), "sh"):
            found += commands(block)
    return found


# Tables and plots


@pytest.mark.parametrize("path", WITH_TABLES, ids=name_of)
def test_tables_are_those_of_the_records(path):
    text = path.read_text()
    assert tables.refresh_tables(text) == text, "run `make tables`"


def test_every_kind_of_table_is_somewhere():
    text = "".join(path.read_text() for path in WITH_TABLES)
    kinds = re.findall(r"<!-- (\w+): results/", text)
    assert set(kinds) == set(tables.TABLES)


def test_a_changed_number_is_noticed():
    table = re.search(r"<!-- headline: .*?<!-- end -->", README, re.DOTALL)[0]
    accuracy = re.search(r"\d\d\.\d\d", table)[0]
    changed = table.replace(accuracy, "12.34", 1)
    assert tables.refresh_tables(changed) == table


@pytest.mark.parametrize("path", WITH_TABLES, ids=name_of)
def test_plots_are_those_of_the_records(path):
    for folder in tables.plot_folders(path):
        with Image.open(folder / tables.PLOT) as image:
            shown = json.loads(image.text["Description"])
        assert shown == tables.points(tables.load(folder)), "run `make tables`"


def test_the_readme_shows_the_plot():
    assert tables.plot_folders(ROOT / "README.md")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: str(path.relative_to(ROOT / "results")))
def test_records_are_of_known_kinds_and_of_committed_code(path):
    record = json.loads(path.read_text())
    kinds = ("inference", "calibrators", "train_speed", "own_networks", "peers")
    assert record["kind"] in kinds
    # None: it ran outside a checkout.
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    assert record["rows"]
    row_of = {"inference": records.Row, "train_speed": train_speed.Row}
    if record["kind"] in row_of:
        keys = {field.name for field in fields(row_of[record["kind"]])}
        for row in record["rows"]:
            assert set(row) | {"gpus"} == keys | {"gpus"}  # older records are of one GPU
    elif record["kind"] == "own_networks":
        for row in record["rows"]:
            assert set(row) == {"network", "variant", "precision", "latency_ms", "layers"}


# Prose


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("words", commands_of_documents(), ids=" ".join)
def test_commands_parse(words):
    parse([word for word in words if word != "…"])


def test_the_original_commands_are_there():
    assert ORIGINAL_COMMANDS in blocks(README, "sh")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_make_has_the_targets(path):
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in blocks(path.read_text(), "sh"):
        assert set(re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)) <= set(targets)


def headings(path):
    """The anchors of a document's headings, as GitHub makes them."""
    anchors = set()
    for title in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE):
        letters = re.sub(r"[^\w\- ]", "", title.lower())
        anchors.add(letters.replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked), target


# Code


def test_the_python_code_runs(tmp_path, monkeypatch):
    """The README's blocks, one after the other, with a network of five classes."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    labels = torch.tensor([0, 1, 2, 3])

    def fine_tune(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model = Small()
    before = model.conv.weight.detach().clone()
    names = {
        "model": model,
        "batches": [images],
        "fine_tune": fine_tune,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "images": images,
    }
    monkeypatch.chdir(tmp_path)
    for block in blocks(README, "python"):
        if "import onnxruntime" in block:
            # the program that deploys has raw ones
            names["images"] = np.zeros((7, 32, 32, 3), dtype=np.uint8)
        exec(block, names)
    assert isinstance(model.conv, QuantizedLayer)
    assert not isinstance(model.fc, QuantizedLayer)
    assert not torch.equal(model.conv.weight, before)
    assert names["logits"].shape == (7, 5)
    assert names["logits"].dtype == np.float32
    assert np.isfinite(names["logits"]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model_fp16.onnx"}


def test_a_quantized_network_is_reloaded_as_the_readme_says():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    model = Small().eval()
    quantize_modules(model, EXAMPLE, skip_layers=["fc"])
    # as a DataLoader serves them
    calibrate(model, [(images, torch.zeros(4))])

    again = Small().eval()
    quantize_modules(again, EXAMPLE, skip_layers=["fc"])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))


# A network of one's own


@pytest.mark.slow
def test_the_way_of_an_own_network_runs(tmp_path, digits, monkeypatch):
    """Each command of the document, with few images and one epoch."""
    text = (ROOT / "docs" / "own-network.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (module,) = blocks(text, "python")
    Path("mynet.py").write_text(module)
    for part, count in (("train", 60), ("test", 20)):
        images = getattr(digits, f"{part}_images")[:count]
        labels = getattr(digits, f"{part}_labels")[:count]
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = Path("my_images") / part / f"digit{label % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    import mynet

    torch.save(mynet.build(3).state_dict(), "weights.pth")
    for block in blocks(text, "sh"):
        for words in commands(block):
            argv = ["1" if word == "10" else word for word in words[2:]]
            command = [sys.executable, ROOT / words[1], *argv]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(Path("out/record.json").read_text())
    assert {"FP32", "INT8-PTC", "INT8-QAT"} <= {row["precision"] for row in record["rows"]}
    monkeypatch.delitem(sys.modules, "mynet")


# The demo


@pytest.mark.slow
def test_demo_runs(tmp_path, small_digits, quick_latencies, monkeypatch):
    """Its commands, as make would run them, but with one epoch and few images."""
    dry_run = ["make", "-n", "demo"]
    said = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    recipe = commands(said.replace("out/demo", str(tmp_path)))
    assert len(recipe) == 3
    for words in recipe:
        script, _ = parse(words)
        argv = words[2:]
        if script is train:
            argv += ["--num_epochs", "1"]
        script.main(argv)
    record = json.loads((tmp_path / "record.json").read_text())
    precisions = {row["precision"] for row in record["rows"]}
    assert precisions >= {"FP32", "INT8-PTC", "INT8-QAT", "FAKE-QUANT-QAT"}
    assert (tmp_path / "plot.png").stat().st_size > 1000
    # three networks, each in FP32 and in FP16 form
    assert len(list(tmp_path.rglob("*.onnx"))) == 6
