"""Exports in use: classes of any images, and times where there is no data set."""

import errno
import json
import os
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import digits_cut_to, forbid_listing
from PIL import Image

import dataset
import infer
from dataset import folder
from utils import compare, records
from utils.backends.network import Network
from utils.backends.onnxruntime import OnnxRuntimeNetwork
from utils.errors import UserError

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


def edit_manifest(export, **values):
    """Change fields of the manifest or of its `data`."""
    path = export / "export.json"
    manifest = json.loads(path.read_text())
    for name, value in values.items():
        (manifest["data"] if name in manifest["data"] else manifest)[name] = value
    path.write_text(json.dumps(manifest))


@pytest.fixture
def photos(digits, tmp_path):
    """A folder with ten digits as `0.png` to `9.png`."""
    path = tmp_path / "photos"
    path.mkdir()
    for index in range(10):
        Image.fromarray(digits.test_images[index]).save(path / f"{index}.png")
    return path


def predict(export, *words):
    infer.main(["--onnx", str(export), "--backend", "onnxruntime", "--predict", *map(str, words)])


def printed(text):
    """File -> class and probability, as lines say them; and the last line."""
    *lines, last = text.splitlines()
    found = {}
    for line in lines:
        label, probability, path = line.split(maxsplit=2)
        found[path] = label, float(probability.removesuffix("%")) / 100
    return found, last


def expected(export, images, precision="int8_qat"):
    """Classes and probabilities of images (N, H, W, 3) by the textbook formula."""
    logits = OnnxRuntimeNetwork(export / f"{precision}.onnx")(images).astype(np.float64)
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    return logits.argmax(1), probabilities.max(1)


# predictions


def test_each_image_gets_its_class_and_probability(export, photos, digits, capsys):
    predict(export, photos)
    found, last = printed(capsys.readouterr().out)
    assert last == "images predicted by onnxruntime INT8-QAT: 10"
    assert list(found) == [f"{photos}/{index}.png" for index in range(10)]
    labels, probabilities = expected(export, digits.test_images[:10])
    assert [label for label, _ in found.values()] == [str(label) for label in labels]
    said = [probability for _, probability in found.values()]
    assert said == pytest.approx(probabilities, abs=1e-4)


def test_images_are_predicted_where_only_a_back_end_and_pillow_are_installed(
    export, photos, run_script
):
    words = ["--onnx", export, "--backend", "onnxruntime", "--predict", photos / "3.png"]
    process = run_script("infer.py", *words, blocked=("torch", "sklearn", "onnx"))
    assert process.returncode == 0, process.stderr
    found, last = printed(process.stdout)
    assert list(found) == [f"{photos}/3.png"]
    assert last == "images predicted by onnxruntime INT8-QAT: 1"


@pytest.mark.parametrize(
    ("gone", "flags", "used"),
    [
        ((), [], "INT8-QAT"),
        ((), ["--INT8PTC"], "INT8-PTC"),
        ((), ["--FP32", "--FP32"], "FP32"),
        (("int8_qat.onnx", "int8_qat_fp16.onnx"), [], "INT8-PTC"),
        (
            ("int8_qat.onnx", "int8_qat_fp16.onnx", "int8_ptc.onnx", "int8_ptc_fp16.onnx"),
            [],
            "FP32",
        ),
    ],
)
def test_the_best_int8_that_is_there_predicts_unless_one_is_named(
    export_copy, photos, capsys, gone, flags, used
):
    for name in gone:
        (export_copy / name).unlink()
    predict(export_copy, photos / "0.png", *flags)
    assert printed(capsys.readouterr().out)[1] == f"images predicted by onnxruntime {used}: 1"


def test_images_are_read_as_training_reads_them(export, digits, tmp_path, capsys):
    """Grey, transparent, of another size, turned by the camera, deep in a folder."""
    deep = tmp_path / "photos" / "deep"
    deep.mkdir(parents=True)
    image = Image.fromarray(digits.test_images[4])
    image.convert("L").resize((50, 70)).save(deep / "grey.png")
    transparent = image.convert("RGBA")
    transparent.putalpha(image.convert("L"))
    transparent.save(deep / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(deep / "turned.jpg", exif=turned)
    (deep / ".hidden.png").write_bytes(b"")

    classes = tmp_path / "set"
    for split in ("train", "test"):
        shutil.copytree(deep, classes / split / "a")
        shutil.copytree(deep, classes / split / "b")
    read = dataset.load("folder", classes, (32, 32)).train_images[:3]
    capsys.readouterr()

    predict(export, tmp_path / "photos")
    found, _ = printed(capsys.readouterr().out)
    assert list(found) == [f"{deep}/{name}" for name in ("alpha.png", "grey.png", "turned.jpg")]
    labels, probabilities = expected(export, read)
    assert [label for label, _ in found.values()] == [str(label) for label in labels]
    said = [probability for _, probability in found.values()]
    assert said == pytest.approx(probabilities, abs=1e-4)


def test_what_cannot_be_used_is_said_in_the_end_and_the_others_are_predicted(
    export, photos, tmp_path, error_line, capsys, monkeypatch
):
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:100])
    Image.new("I;16", (8, 8)).save(photos / "2.png")
    Image.new("1", (20_000, 20_000)).save(photos / "3.png")
    (photos / "4.png").unlink()
    (photos / "4.png").symlink_to("nothing")
    (photos / "captions.txt").write_text("no image")
    os.mkfifo(photos / "pipe.png")
    closed = photos / "closed"
    closed.mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no image")
    forbid_listing(closed, monkeypatch)
    named = ["empty", "text.txt", "none.png", "photos"]
    flags = ["--onnx", export, "--backend", "onnxruntime", "--predict"]
    line = error_line(infer.main, [*flags, *(tmp_path / name for name in named)])
    assert line.startswith("error: --predict: 8 of its files cannot be used")

    output, errors = capsys.readouterr()
    found, last = printed(output)
    assert list(found) == [f"{photos}/{index}.png" for index in (0, 5, 6, 7, 8, 9)]
    assert last == (
        "images predicted by onnxruntime INT8-QAT: 6; left out: 1 without an image (captions.txt)"
    )
    said = errors.splitlines()
    assert len(said) == 8
    for path, fault in (
        (tmp_path / "none.png", "cannot be read (No such file or directory)"),
        (photos / "pipe.png", "is not a regular file"),
        (closed, "cannot be read (Permission denied)"),
        (tmp_path / "text.txt", "is no image"),
        (photos / "1.png", "is not a readable image"),
        (photos / "2.png", "has more than 8 bits"),
        (photos / "3.png", "is not a readable image"),
        (photos / "4.png", "cannot be read (No such file or directory)"),
    ):
        assert sum(line.startswith(f"{path} {fault}") for line in said) == 1, path


def test_a_file_that_may_not_be_read_is_said_and_the_others_are_predicted(
    export, photos, error_line, capsys, monkeypatch
):
    plain = Path.open

    def guarded(path, *args, **options):
        if path.name == "5.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "open", guarded)
    words = ["--onnx", export, "--backend", "onnxruntime", "--predict", photos]
    assert "1 of its files" in error_line(infer.main, words)
    output, errors = capsys.readouterr()
    assert len(printed(output)[0]) == 9
    assert errors == f"{photos}/5.png cannot be read (Permission denied)\n"


@pytest.mark.parametrize("content", [None, "no image"])
def test_a_folder_without_images_is_a_failure(export, tmp_path, error_line, content):
    (tmp_path / "photos").mkdir()
    if content:
        (tmp_path / "photos" / "captions.txt").write_text(content)
    words = ["--onnx", export, "--backend", "onnxruntime", "--predict", tmp_path / "photos"]
    assert error_line(infer.main, words).startswith("error: --predict: ")


def test_names_that_would_move_the_cursor_are_quoted(export, photos, capsys):
    (photos / "0.png").rename(photos / "0\x1b[2J\n.png")
    predict(export, photos)
    assert "0\\x1b[2J\\n.png'" in capsys.readouterr().out


@pytest.mark.parametrize(("place", "named"), [(".", "."), ("below", ".."), (".", "linked")])
def test_the_folder_in_which_one_is_may_be_named(photos, monkeypatch, place, named):
    (photos / "below").mkdir()
    (photos / "linked").symlink_to(photos)
    (photos.parent / "linked").symlink_to(photos)
    monkeypatch.chdir(photos / place if named != "linked" else photos.parent)
    refused = []
    [(files, images)] = folder.read_batches(
        [Path(named)], (8, 8), 100, folder.defaultdict(list), refused
    )
    assert [path.name for path in files] == [f"{index}.png" for index in range(10)]
    assert images.shape == (10, 8, 8, 3)
    assert refused == []


def test_batches_are_what_can_be_read_of_so_many_files(photos):
    for index in (0, 1, 5, 6, 7, 8):
        (photos / f"{index}.png").write_bytes(b"")
    refused = []
    batches = folder.read_batches([photos], (8, 8), 3, folder.defaultdict(list), refused)
    names = [[path.name[0] for path in files] for files, _ in batches]
    assert names == [["2"], ["3", "4"], ["9"]]
    assert len(refused) == 6


class Ahead(Network):
    """Takes two batches before it gives the logits of the first, as TensorRT's network does."""

    path = Path("graph.onnx")

    def stream(self, batches):
        waiting = []
        for batch in batches:
            if len(waiting) == 2:
                yield waiting.pop(0)
            # class i of an image of i, as sure as can be
            waiting.append(1000.0 * np.eye(3, dtype=np.float32)[batch[:, 0, 0, 0]])
        yield from waiting


def test_predictions_keep_to_their_files_where_batches_are_taken_ahead():
    batches = []
    for number in range(5):
        labels = np.array([number % 3, 1])
        batches.append(
            (
                [Path(str(number)), Path("one")],
                np.zeros((2, 8, 8, 3), np.uint8) + labels[:, None, None, None].astype(np.uint8),
            )
        )
    found = list(compare.classified(Ahead(), batches, 3))
    assert found[::2] == [(Path(str(number)), number % 3, 1.0) for number in range(5)]
    assert found[1::2] == [(Path("one"), 1, 1.0)] * 5
    with pytest.raises(UserError, match="has 3 classes, not 4"):
        list(compare.classified(Ahead(), batches, 4))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--load_ckpt x", "--predict uses an export: name its folder with --onnx"),
        ("--onnx {} --FP32 --INT8QAT", "--predict uses one network: name one precision"),
        ("--onnx {} --record x", "--record: --predict measures nothing"),
        ("--onnx {} --data_dir x --img_size 32", "--data_dir, --img_size: --predict measures"),
        ("--onnx {} --audit", "--audit: --predict measures nothing"),
        ("--onnx {} --ptc_mode implicit", "--ptc_mode implicit: --predict measures nothing"),
        ("--onnx {} --m resnet50", "--m resnet50 contradicts"),
    ],
)
def test_flags_that_do_not_go_with_predictions_are_refused(export, photos, error_line, flags, said):
    words = flags.format(export).split()
    assert said in error_line(infer.main, [*words, "--predict", photos])


def test_a_precision_that_was_not_exported_is_one_line(export_copy, photos, error_line):
    edit_manifest(export_copy, int8_nodes={"FP32": [], "INT8-QAT": []})
    words = ["--onnx", export_copy, "--INT8PTC", "--predict", photos]
    assert f"INT8-PTC is not in {export_copy}" in error_line(infer.main, words)


# without a data set


@pytest.fixture
def of_cifar10(export_copy, tmp_path, monkeypatch):
    """The export, said to be of CIFAR-10, in a folder without it; nothing may be downloaded."""
    edit_manifest(export_copy, dataset="cifar10", classes=list(dataset.cifar10.CLASSES))
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
    edit_manifest(export_copy, dataset="folder")
    words = ["--onnx", export_copy, "--backend", "onnxruntime", "--data_dir", tmp_path / "none"]
    assert f"{tmp_path}/none/test is missing" in error_line(infer.main, words)


def test_tensorrts_own_calibration_needs_the_train_images(of_cifar10, error_line):
    words = ["--onnx", of_cifar10, "--ptc_mode", "implicit", "--batch_size", "1"]
    line = error_line(infer.main, words)
    assert line == "error: --ptc_mode implicit needs the train images: name them with --data_dir"


@pytest.fixture
def of_test_folder(export_copy, digits, tmp_path):
    """Flags for the export, said to be of class folders of test images alone.

    Image i is said to be of class i modulo 10.
    """
    for index in range(40):
        path = tmp_path / "images" / "test" / digits.classes[index % 10] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.test_images[index]).save(path)
    data = dataset.load("folder", tmp_path / "images", test_only=True)
    assert data.train_images.shape == (0, 32, 32, 3)
    edit_manifest(export_copy, test_digest=data.test_digest(), dataset="folder")
    words = f"--onnx {export_copy} --data_dir {tmp_path}/images --INT8PTC --batch_size"
    return words.split()


def test_accuracy_needs_the_test_images_alone(
    of_test_folder, export, digits, tmp_path, monkeypatch, capsys
):
    record = ["--backend", "onnxruntime", "--record", tmp_path / "record.json"]
    infer.main([*of_test_folder, *map(str, record)])
    assert "0 train and 40 test images of 10 classes, at 32x32 pixels\n" in capsys.readouterr().out
    labels, _ = expected(export, digits.test_images[:40], "int8_ptc")
    row = json.loads((tmp_path / "record.json").read_text())["rows"][-1]
    assert row["precision"] == "INT8-PTC"
    assert row["accuracy_pct"] == 100 * np.mean(labels == np.arange(40) % 10)


def test_test_images_must_be_those_of_the_export(of_test_folder, tmp_path, error_line):
    path = next((tmp_path / "images" / "test" / "3").iterdir())
    Image.new("RGB", (32, 32)).save(path)
    line = error_line(infer.main, [*of_test_folder, "--backend", "onnxruntime"])
    assert "other images, or in another order" in line


@pytest.mark.parametrize("needed_by", ["implicit", "an earlier version"])
def test_train_images_are_needed_where_they_are_used_or_checked(
    of_test_folder, export_copy, tmp_path, error_line, needed_by
):
    words = of_test_folder
    if needed_by == "implicit":
        words += ["--ptc_mode", "implicit"]
    else:
        edit_manifest(export_copy, test_digest=None)
    assert f"{tmp_path}/images/train is missing" in error_line(infer.main, words)


def test_random_images_are_those_of_every_run_in_the_graphs_size():
    info = SimpleNamespace(size=(8, 8))
    images = compare.random_images(info, 40)
    assert images.shape == (40, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images.std() > 70
    assert np.array_equal(images, compare.random_images(info, 40))


def test_a_network_without_accuracies_has_dashes_in_the_table():
    row = records.Row("onnxruntime", "FP32").timed(1, 1.0, 2.0)
    assert records.cells_of([row])[1][:6] == ["onnxruntime", "FP32", "-", "-", "-", "1"]
