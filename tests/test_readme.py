"""The README keeps its word: its tables are the records', its commands parse, its links lead somewhere, its demo runs."""

import json
import re
import shlex
import subprocess
from dataclasses import fields

import pytest
from conftest import ROOT
from PIL import Image

import infer
import train
from benchmarks import tables as summary
from benchmarks import train_speed
from utils import records

README = (ROOT / "README.md").read_text()
RECORDS = sorted((ROOT / "results").rglob("*.json"))


def commands(text):
    """The words of each command that starts with `python train.py` or the like."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [
        shlex.split(line, comments=True) for line in lines if re.search(r"(train|infer)\.py ", line)
    ]


def parse(words):
    script = next(
        index for index, word in enumerate(words) if word.endswith(("train.py", "infer.py"))
    )
    module = train if words[script].endswith("train.py") else infer
    return module, module.build_parser().parse_args(words[script + 1 :])


def test_tables_are_those_of_the_records():
    assert summary.refresh_tables(README) == README, "run `make tables`"
    assert "<!-- table: " in README


def test_plots_are_those_of_the_records():
    for folder in re.findall(rf"\(([^)\s]+)/{summary.PLOT}\)", README):
        with Image.open(ROOT / folder / summary.PLOT) as image:
            assert json.loads(image.text["Description"]) == summary.points(
                summary.load(ROOT / folder)
            ), "run `make tables`"


def test_a_changed_number_is_noticed():
    table = re.search(r"<!-- table: .*?<!-- end -->", README, re.DOTALL)[0]
    assert (
        summary.refresh_tables(table.replace("100.00", "99.99", 1))
        == table
        != table.replace("100.00", "99.99", 1)
    )


@pytest.mark.parametrize(
    "words", commands("\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))), ids=" ".join
)
def test_commands_parse(words):
    module, args = parse([word for word in words if word != "…"])
    assert args.model in (None, "resnet18") or module is infer


def test_linked_files_exist():
    for target in re.findall(
        r"\]\((?!https?:)([^)#]+)", README + (ROOT / "layers" / "README.md").read_text()
    ):
        assert (ROOT / target).exists(), target


def test_demo_runs(tmp_path, small_digits, quick_latencies, monkeypatch):
    recipe = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    argvs = commands(recipe.replace("out/demo", str(tmp_path)))
    assert len(argvs) == 3
    for words in argvs:
        module, args = parse(words)
        argv = [*words[2:], "--num_epochs", "1"] if module is train else words[2:]
        module.main(argv)
    record = json.loads((tmp_path / "record.json").read_text())
    assert {row["precision"] for row in record["rows"]} >= {
        "FP32",
        "INT8-PTC",
        "INT8-QAT",
        "FAKE-QUANT-QAT",
    }
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: str(path.relative_to(ROOT / "results")))
def test_records_are_of_known_kinds_and_of_committed_code(path):
    record = json.loads(path.read_text())
    assert record["kind"] in ("inference", "calibrators", "train_speed")
    assert record["commit"] is None or re.fullmatch(
        r"[0-9a-f]{40}", record["commit"]
    )  # None: ran outside a checkout
    assert record["rows"]
    keys = {
        "inference": set(records.make_row("", "")),
        "train_speed": {field.name for field in fields(train_speed.Row)},
    }
    for row in record["rows"] if record["kind"] in keys else ():
        assert set(row) == keys[record["kind"]]
