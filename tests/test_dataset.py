"""Images from every source, what happens when they are broken, the split, and the batches."""

import builtins
import errno
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, forbid_listing, normalised
from PIL import Image

import dataset
from dataset import cifar10, folder
from dataset.batches import MAX_SHIFT, Batches
from layers.normalize import FromImages, Normalize
from utils.errors import UserError

CPU = torch.device("cpu")
UNIT = Normalize([0.0] * 3, [1.0] * 3)


def made_images(count, seed=0, size=32):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def keras_arrays():
    labels = (np.arange(20, dtype=np.uint8) % 10)[:, None]  # (N, 1), as Keras has them
    return {
        "x_train": made_images(20),
        "y_train": labels,
        "x_test": made_images(10, 1),
        "y_test": labels[:10],
    }


class Python2Pickler(pickle._Pickler):
    """Writes bytes and text as Python 2's str, which is what Krizhevsky's files hold."""

    dispatch = {**pickle._Pickler.dispatch}

    def save_str2(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_str2


def python2_pickle(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch_content(images, labels):
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    return {
        b"batch_label": b"made",
        b"labels": [int(label) for label in labels],
        b"data": rows,
        b"filenames": [b"a.png"],
    }


def write_batches(folder):
    """Six files of four images; returns all train images, in order, and the test images."""
    folder.mkdir(parents=True)
    images = made_images(24)
    for index in range(6):
        chosen = slice(4 * index, 4 * index + 4)
        name = "test_batch" if index == 5 else f"data_batch_{index + 1}"
        content = batch_content(images[chosen], np.arange(4) + index)
        (folder / name).write_bytes(python2_pickle(content))
    return images[:20], images[20:]


def write_classes(root, classes=cifar10.CLASSES, count=2, size=32):
    """`count` PNGs for each class and split; returns split -> images, sorted by class name."""
    written = {}
    for seed, split in enumerate(("train", "test")):
        images = made_images(count * len(classes), seed, size)
        for index, image in enumerate(images):
            folder = root / split / sorted(classes)[index // count]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index % count}.png")
        written[split] = images
    return written


@pytest.fixture
def offline(monkeypatch):
    def urlopen(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def load_error(name, folder, *args):
    with pytest.raises(UserError) as error:
        dataset.load(name, folder, *args)
    assert "\n" not in str(error.value)
    return str(error.value)


# digits


def test_digits_are_1797_images_of_ten_classes(digits):
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert digits.test_images.shape == (360, 32, 32, 3)
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int64
    assert digits.classes == tuple("0123456789")
    assert set(digits.train_labels) == set(digits.test_labels) == set(range(10))
    assert not digits.mirror_and_cutout


def test_digits_are_the_archive_enlarged_four_times_in_three_equal_channels(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert np.array_equal(digits.test_labels, bunch.target[::5])
    expected = np.round(bunch.images[::5] * 255 / 16)
    for row in range(4):
        for channel in range(3):
            assert np.array_equal(digits.test_images[:, row::4, 3 - row :: 4, channel], expected)


# CIFAR-10


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("flat", [False, True])
def test_cifar10_reads_a_keras_archive(tmp_path, save, flat):
    arrays = keras_arrays()
    stored = {
        key: value.ravel() if flat and key[0] == "y" else value for key, value in arrays.items()
    }
    save(tmp_path / "cifar10.npz", **stored)
    data = dataset.load("cifar10", tmp_path)
    assert np.array_equal(data.train_images, arrays["x_train"])
    assert np.array_equal(data.test_images, arrays["x_test"])
    assert np.array_equal(data.train_labels, arrays["y_train"][:, 0])
    assert np.array_equal(data.test_labels, arrays["y_test"][:, 0])
    assert data.train_labels.dtype == np.int64
    assert data.classes == cifar10.CLASSES
    assert data.mirror_and_cutout


def test_cifar10_reads_torchvision_batches(tmp_path):
    train_images, test_images = write_batches(tmp_path / "cifar-10-batches-py")
    data = dataset.load("cifar10", tmp_path)
    assert np.array_equal(data.train_images, train_images)
    assert np.array_equal(data.test_images, test_images)
    assert data.train_labels.tolist() == [label + index for index in range(5) for label in range(4)]
    assert data.test_labels.tolist() == [5, 6, 7, 8]


def test_cifar10_reads_class_folders(tmp_path):
    written = write_classes(tmp_path)
    data = dataset.load("cifar10", tmp_path)
    assert np.array_equal(data.train_images, written["train"])
    assert np.array_equal(data.test_images, written["test"])
    assert np.array_equal(data.train_labels, np.repeat(np.arange(10), 2))
    assert data.classes == tuple(sorted(cifar10.CLASSES))


def test_cifar10_of_test_folders_alone_needs_no_download(tmp_path, offline):
    write_classes(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert not dataset.missing("cifar10", tmp_path)
    data = dataset.load("cifar10", tmp_path, test_only=True)
    assert len(data.test_images) == 2 * len(cifar10.CLASSES)


def test_cifar10_of_test_images_alone_is_all_that_an_evaluation_needs(tmp_path, offline):
    (tmp_path / "keras").mkdir()
    arrays = keras_arrays()
    del arrays["x_train"], arrays["y_train"]
    np.savez(tmp_path / "keras" / "cifar10.npz", **arrays)
    _, batch_images = write_batches(tmp_path / "batches")
    for path in (tmp_path / "batches").glob("data_batch_*"):
        path.unlink()
    for name, images in (("keras", arrays["x_test"]), ("batches", batch_images)):
        data = dataset.load("cifar10", tmp_path / name, test_only=True)
        assert np.array_equal(data.test_images, images)
        assert data.train_images.shape == (0, 32, 32, 3)
        assert len(data.train_labels) == 0


def test_a_test_folder_of_something_else_is_not_cifar10(tmp_path, offline):
    (tmp_path / "test").mkdir()
    assert "CIFAR-10 is not in" in dataset.missing("cifar10", tmp_path)


def test_folders_of_other_classes_are_not_cifar10(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "train" / "truck").rename(tmp_path / "train" / "lorry")
    (tmp_path / "test" / "truck").rename(tmp_path / "test" / "lorry")
    assert load_error("cifar10", tmp_path).endswith("add --dataset folder")


def test_cifar10_prefers_the_archive_then_the_batches_then_the_folders(tmp_path):
    write_classes(tmp_path)
    batch_images, _ = write_batches(tmp_path / "cifar-10-batches-py")
    arrays = keras_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    assert np.array_equal(dataset.load("cifar10", tmp_path).train_images, arrays["x_train"])
    (tmp_path / "cifar10.npz").unlink()
    assert np.array_equal(dataset.load("cifar10", tmp_path).train_images, batch_images)


def test_cifar10_offline_names_where_it_looked_and_the_way_out(tmp_path, offline):
    message = load_error("cifar10", tmp_path)
    for part in (
        str(tmp_path),
        "cifar10.npz",
        "cifar-10-batches-py",
        "train",
        "no route",
        "--data_dir",
        "--dataset digits",
    ):
        assert part in message
    assert list(tmp_path.iterdir()) == []


class Response(io.BytesIO):
    headers = {}


def made_archive(folder):
    """Train images of an archive's folder, written below `folder`, and the archive's bytes."""
    train_images, _ = write_batches(folder / "cifar-10-batches-py")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    return train_images, buffer.getvalue()


def test_cifar10_downloads_unpacks_and_reads(tmp_path, monkeypatch):
    train_images, archive = made_archive(tmp_path / "made")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(archive))
    with pytest.raises(UserError, match="damaged"):
        dataset.load("cifar10", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(cifar10, "MD5", cifar10.hashlib.md5(archive).hexdigest())
    assert np.array_equal(dataset.load("cifar10", tmp_path / "data").train_images, train_images)


@pytest.mark.filterwarnings("ignore:Python 3.14")
@pytest.mark.parametrize("python", ["newer", "3.11.3"])
def test_of_processes_that_download_at_once_the_first_one_s_images_stay(
    tmp_path, monkeypatch, python
):
    train_images, archive = made_archive(tmp_path / "made")

    def urlopen(*_, **__):
        # the other process is done meanwhile
        shutil.copytree(tmp_path / "made", tmp_path / "data", dirs_exist_ok=True)
        return Response(archive)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(cifar10, "MD5", cifar10.hashlib.md5(archive).hexdigest())
    if python == "3.11.3":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    assert np.array_equal(dataset.load("cifar10", tmp_path / "data").train_images, train_images)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]


def test_connection_lost_during_the_download_is_one_line(tmp_path, monkeypatch):
    class Lost(Response):
        def read(self, *_):
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Lost())
    assert "Connection reset" in load_error("cifar10", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_cifar10_unpacks_an_archive_that_is_there(tmp_path, monkeypatch, offline):
    train_images, archive = made_archive(tmp_path / "made")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    assert "damaged (MD5 differs; it begins with" in load_error("cifar10", tmp_path)
    monkeypatch.setattr(cifar10, "MD5", cifar10.hashlib.md5(archive).hexdigest())
    assert np.array_equal(dataset.load("cifar10", tmp_path).train_images, train_images)
    assert (tmp_path / "cifar-10-batches-py").is_dir()


@pytest.mark.parametrize("lacking", [None, "test_batch", "data_batch_1"])
def test_the_batches_folder_itself_may_be_the_data_dir(tmp_path, offline, lacking):
    train_images, _ = write_batches(tmp_path / "batches")
    if lacking:
        (tmp_path / "batches" / lacking).unlink()
        assert f"{lacking} is missing" in load_error("cifar10", tmp_path / "batches")
    else:
        data = dataset.load("cifar10", tmp_path / "batches")
        assert np.array_equal(data.train_images, train_images)


def test_a_link_to_itself_as_data_dir_is_one_line(tmp_path, offline):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in load_error("cifar10", tmp_path / "loop")
    assert "loop" in load_error("folder", tmp_path / "loop")


HTML = b"\xef\xbb\xbf\n<!DOCTYPE html><html>sign in</html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("content", [HTML, LFS])
@pytest.mark.parametrize(
    "name", ["cifar10.npz", "cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_3"]
)
def test_the_beginning_of_a_file_of_another_kind_is_shown(tmp_path, offline, name, content):
    if "/" in name:
        write_batches(tmp_path / "cifar-10-batches-py")
    (tmp_path / name).write_bytes(content)
    message = load_error("cifar10", tmp_path)
    assert str(tmp_path / name) in message
    assert f"it begins with {content[:32]}" in message


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ENOMEM, None])
@pytest.mark.parametrize("kind", ["npz", "batches", "images"])
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, kind, error):
    if kind == "npz":
        np.savez(tmp_path / "cifar10.npz", **keras_arrays())
    elif kind == "batches":
        write_batches(tmp_path / "cifar-10-batches-py")
    else:
        write_classes(tmp_path)
    plain_open = io.open

    def failing(path, *args, **options):
        if str(path).startswith(str(tmp_path)):
            raise OSError(error, os.strerror(error), str(path)) if error else MemoryError
        return plain_open(path, *args, **options)

    monkeypatch.setattr(io, "open", failing)
    monkeypatch.setattr(builtins, "open", failing)
    if kind == "images" and error:
        assert f"cannot be read ({os.strerror(error)})" in load_error("cifar10", tmp_path)
        return
    with pytest.raises((OSError, MemoryError)) as raised:
        dataset.load("cifar10", tmp_path)
    if error:
        assert raised.value.errno == error
        assert raised.value.filename.startswith(str(tmp_path))


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_truncated_archive_is_named(tmp_path, part):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **keras_arrays())
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    message = load_error("cifar10", tmp_path)
    assert f"{path} is no archive of the arrays" in message


@pytest.mark.parametrize("lacking", ["x_train", "y_train", "x_test", "y_test"])
def test_archive_without_an_array_names_the_array(tmp_path, lacking):
    arrays = keras_arrays()
    del arrays[lacking]
    np.savez(tmp_path / "cifar10.npz", **arrays)
    assert f"{lacking} is not a file in the archive" in load_error("cifar10", tmp_path)


def damaged_stream():
    """A compressed archive whose first compressed block has an impossible header."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **keras_arrays())
    data = bytearray(buffer.getvalue())
    name_length, extra_length = (int.from_bytes(data[at : at + 2], "little") for at in (26, 28))
    data[30 + name_length + extra_length] = 0xFF
    return bytes(data)


def single_array():
    buffer = io.BytesIO()
    np.save(buffer, made_images(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [damaged_stream(), single_array(), pickle.dumps(keras_arrays())],
    ids=["zlib", "npy", "pickle"],
)
def test_what_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "cifar10.npz").write_bytes(content)
    message = load_error("cifar10", tmp_path)
    assert f"{tmp_path}/cifar10.npz is no archive of the arrays" in message
    assert f"it begins with {content[:32]}" in message


def test_archive_of_python_objects_is_refused(tmp_path):
    np.savez(
        tmp_path / "cifar10.npz", **{**keras_arrays(), "y_train": np.array([{}] * 20, dtype=object)}
    )
    assert "Object arrays cannot be loaded" in load_error("cifar10", tmp_path)


def test_a_member_that_is_no_array_is_named(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **keras_arrays())
    with zipfile.ZipFile(tmp_path / "cifar10.npz") as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    members["x_train.npy"] = b"no array"
    with zipfile.ZipFile(tmp_path / "cifar10.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert "images |S8 () with 20 labels" in load_error("cifar10", tmp_path)


def test_an_archive_may_have_one_test_image_but_not_none(tmp_path):
    arrays = keras_arrays()
    for count in (1, 0):
        few = {"x_test": arrays["x_test"][:count], "y_test": arrays["y_test"][:count]}
        np.savez(tmp_path / "cifar10.npz", **{**arrays, **few})
        if count:
            assert dataset.load("cifar10", tmp_path).test_labels.tolist() == [0]
        else:
            assert "images uint8 (0, 32, 32, 3) with 0 labels" in load_error("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("x_train", made_images(20)[..., 0], "images uint8 (20, 32, 32) with 20 labels"),
        ("x_train", made_images(20)[..., :1], "images uint8 (20, 32, 32, 1)"),
        ("x_train", made_images(20).astype(np.float32), "images float32 (20, 32, 32, 3)"),
        ("x_train", made_images(20, size=16), "images uint8 (20, 16, 16, 3)"),
        ("x_train", made_images(19), "images uint8 (19, 32, 32, 3) with 20 labels"),
        ("y_test", np.full((10, 1), 10), "10 labels int64"),
        ("y_test", np.full((10, 1), -1), "10 labels int64"),
        ("y_test", np.full((10, 1), 0.5), "10 labels float64"),
        ("y_test", np.zeros((10, 2), np.int64), "20 labels int64"),
        ("y_test", np.full((10, 1), "cat"), "10 labels <U3"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, key, value, said):
    np.savez(tmp_path / "cifar10.npz", **{**keras_arrays(), key: value})
    message = load_error("cifar10", tmp_path)
    assert message.startswith(f"{tmp_path}/cifar10.npz: images ")
    assert said in message
    assert "are not CIFAR-10's" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        python2_pickle(batch_content(made_images(4), range(4)))[:-100],
        # OverflowError and AttributeError
        b"\x80\x04\x95" + b"\xff" * 8 + b".",
        b"\x80\x02}K\x01a.",
        # sound pickles of something else
        pickle.dumps(3),
        pickle.dumps({b"data": 1}),
        python2_pickle({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 1]}),
        b"\x80\x02cnumpy.nothing\nndarray\n.",
    ],
    ids=["empty", "text", "truncated", "frame", "append", "int", "keys", "shape", "class"],
)
def test_what_is_no_batch_is_named(tmp_path, content):
    write_batches(tmp_path / "cifar-10-batches-py")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(content)
    assert f"{path} is no batch of CIFAR-10" in load_error("cifar10", tmp_path)


def test_absent_batch_is_named(tmp_path):
    write_batches(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_5").unlink()
    message = load_error("cifar10", tmp_path)
    assert "data_batch_5" in message
    assert "missing" in message


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_batch_that_would_run_code_is_refused_and_does_not_run(tmp_path, protocol):
    write_batches(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(
        pickle.dumps([Runs(tmp_path / "ran")], protocol)
    )
    assert "unexpected posix.mkdir" in load_error("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


# class folders


def test_folder_resizes_to_img_size(tmp_path):
    for split in ("train", "test"):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (50, 20), colour).save(tmp_path / split / name / "image.png")
    data = dataset.load("folder", tmp_path, (24, 24))
    assert data.classes == ("blue", "red")
    assert data.mirror_and_cutout
    assert data.train_images.shape == (2, 24, 24, 3)
    assert data.train_images.dtype == np.uint8
    assert np.array_equal(data.train_labels, [0, 1])
    assert (data.train_images[0] == (0, 0, 200)).all()
    assert (data.train_images[1] == (200, 0, 0)).all()


def test_folder_keeps_images_that_have_the_size(tmp_path):
    written = write_classes(tmp_path, ("a", "b", "c"), size=20)
    assert np.array_equal(dataset.load("folder", tmp_path, (20, 20)).train_images, written["train"])


def test_folder_reads_grey_palette_and_transparent_images_as_rgb(tmp_path):
    write_classes(tmp_path, ("a", "b"), count=1)
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (32, 32), 1).save(tmp_path / "train" / "a" / f"{mode}.png")
    assert dataset.load("folder", tmp_path).train_images.shape == (6, 32, 32, 3)


def test_folder_turns_photographs_upright(tmp_path):
    write_classes(tmp_path, ("a", "b"), count=1)
    upright = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    turned = Image.new("RGB", (1, 1)).getexif()
    turned[0x0112] = 6  # turn by 90 degrees to the right to show
    for index, options in ((2, {}), (3, {"exif": turned})):
        image = upright.rotate(90) if options else upright
        image.save(tmp_path / "train" / "a" / f"z{index}.png", **options)
    images = dataset.load("folder", tmp_path).train_images
    assert np.array_equal(images[1], images[2])
    assert np.array_equal(images[1], np.asarray(upright))


def test_missing_split_is_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    assert str(tmp_path / "test") in load_error("folder", tmp_path)


def test_differing_classes_are_named(tmp_path):
    write_classes(tmp_path, ("a", "b", "c"))
    (tmp_path / "test" / "c").rename(tmp_path / "test" / "d")
    assert load_error("folder", tmp_path).endswith("c, d")


def test_single_class_is_refused(tmp_path):
    write_classes(tmp_path, ("a",))
    assert "at least 2" in load_error("folder", tmp_path)


def test_class_folder_without_images_is_named(tmp_path):
    write_classes(tmp_path, ("a", "b"))
    for path in (tmp_path / "train" / "b").iterdir():
        path.write_text("no image")
        path.rename(path.with_suffix(".txt"))
    assert f"{tmp_path / 'train' / 'b'} holds no images" in load_error("folder", tmp_path)


def huge_bitmap():
    """A header that claims 60,000 x 60,000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = (60000).to_bytes(4, "little") * 2
    return bytes(data)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", "cut", huge_bitmap()], ids=["empty", "text", "cut", "huge"]
)
def test_unreadable_image_is_named(tmp_path, content):
    write_classes(tmp_path, ("a", "b"))
    path = tmp_path / "train" / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:1000] if content == "cut" else content)
    assert f"{path} is not a readable image" in load_error("folder", tmp_path)


def test_every_unreadable_image_counts_and_the_first_are_named(tmp_path):
    write_classes(tmp_path, ("a", "b"), count=5)
    damaged = sorted((tmp_path / "train").rglob("*.png"))[3:7] + [tmp_path / "test" / "a" / "1.png"]
    contents = [b"", HTML, LFS, b"P6 0 0 255\n", b"text"]
    for path, content in zip(damaged, contents, strict=True):
        path.write_bytes(content)
    message = load_error("folder", tmp_path)
    assert message.startswith("5 of 20 files cannot be used")
    for path, named in zip(damaged, (True, True, True, False, False), strict=True):
        assert (str(path) in message) == named
    assert f"it begins with {HTML[:32]}" in message and f"it begins with {LFS[:32]}" in message


def deep_png(colour_type, channels):
    """A PNG of 8 x 8 pixels of 16 bits a channel."""

    def chunk(name, data):
        return (
            len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        )

    header = (8).to_bytes(4, "big") * 2 + bytes([16, colour_type, 0, 0, 0])
    rows = zlib.compress(8 * (b"\0" + 16 * channels * b"\x12"))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def saved(mode="RGB", kind="PNG", colour=0, **options):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(buffer, kind, **options)
    return buffer.getvalue()


def wide_tiff(planar):
    """A TIFF of 8 x 8 pixels and three channels of 16 bits."""
    tags = [(256, 8), (257, 8), (258, 16), (262, 2), (273, 200), (277, 3), (279, 384)]
    table = b""
    for tag, value in [*tags, (284, planar)]:
        # the bits of the three channels lie behind the table
        count, value = (3, 150) if tag == 258 else (1, value)
        table += struct.pack("<HHII", tag, 3, count, value)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + table
    return head.ljust(150, b"\0") + 3 * b"\x10\0" + bytes(44 + 384)


WIDE = {
    "grey.png": deep_png(0, 1),
    "grey.tif": saved("I;16", "TIFF"),
    "integers.tif": saved("I", "TIFF"),
    "floats.tif": saved("F", "TIFF"),
    "colour.tif": wide_tiff(1),
    "planes.tif": wide_tiff(2),
    "grey.pgm": b"P5 8 8 1023\n" + bytes(128),
    "grey.jp2": saved("I;16", "JPEG2000"),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_greys_and_tiffs_are_named(tmp_path, name):
    write_classes(tmp_path, ("a", "b"))
    path = tmp_path / "train" / "a" / name
    path.write_bytes(WIDE[name])
    assert f"{path} has more than 8 bits" in load_error("folder", tmp_path)


def first_pixel(tmp_path, name, content):
    """What is read of the file `name`, which is the first of its class."""
    write_classes(tmp_path, ("a", "b"), count=1)
    (tmp_path / "train" / "a" / f"!{name}").write_bytes(content)
    return dataset.load("folder", tmp_path, (8, 8)).train_images[0, 0, 0].tolist()


PURPLE = (120, 20, 200)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.gif", saved(kind="GIF", colour=PURPLE), PURPLE),
        ("a.jfif", saved("L", "JPEG", 99), (99, 99, 99)),
        ("a.tga", saved(kind="TGA", colour=PURPLE), PURPLE),
        ("a.jp2", saved(kind="JPEG2000", colour=PURPLE), PURPLE),
        ("a.ppm", b"P6 8 8 100\n" + 64 * bytes([40, 0, 100]), (102, 0, 255)),
        ("565.bmp", None, (255, 0, 0)),
        ("without_suffix", saved(colour=PURPLE), PURPLE),
        ("other.txt", saved(colour=PURPLE), PURPLE),
        ("1.png", saved("1", colour=1), (255, 255, 255)),
        ("cmyk.jpg", saved("CMYK", "JPEG", (0, 255, 255, 0)), (255, 0, 0)),
        ("ycbcr.jpg", saved("YCbCr", "JPEG", (76, 85, 255)), (255, 0, 0)),
        # of more than eight bits a channel the upper eight
        ("wide.png", deep_png(2, 3), (18, 18, 18)),
        ("wide-alpha.png", deep_png(6, 4), (238, 238, 238)),
        ("wide.ppm", b"P6 8 8 65535\n" + 192 * b"\x12\x34", (18, 18, 18)),
        # alpha alone makes the drawing
        ("half.png", saved("RGBA", colour=(0, 0, 0, 128)), (127, 127, 127)),
        ("none.png", saved("RGBA", colour=(9, 9, 9, 0)), (255, 255, 255)),
        ("opaque.png", saved("RGBA", colour=(*PURPLE, 255)), PURPLE),
        ("la.png", saved("LA", colour=(0, 0)), (255, 255, 255)),
        ("palette.png", saved("P", transparency=0), (255, 255, 255)),
        ("palette.gif", saved("P", "GIF", 3, transparency=3), (255, 255, 255)),
        ("key.png", saved(colour=PURPLE, transparency=PURPLE), (255, 255, 255)),
        ("grey-key.png", saved("L", colour=7, transparency=7), (255, 255, 255)),
        ("another-key.png", saved("L", colour=7, transparency=8), (7, 7, 7)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folder_reads_what_pillow_can_as_rgb_on_white(tmp_path, name, content, expected):
    if content is None:
        # 5, 6 and 5 bits a pixel are not 16 bits a channel
        header = b"BM" + (198).to_bytes(4, "little") + bytes(4) + (70).to_bytes(4, "little")
        header += b"".join(value.to_bytes(4, "little") for value in (40, 8, 8))
        header += b"\x01\0\x10\0" + (3).to_bytes(4, "little") + bytes(20)
        header += b"".join(mask.to_bytes(4, "little") for mask in (0xF800, 0x7E0, 0x1F))
        content = header.ljust(70, b"\0") + 64 * b"\0\xf8"
    # JPEG loses a little
    difference = np.subtract(first_pixel(tmp_path, name, content), expected)
    assert np.abs(difference).max() <= 2


def test_of_a_film_the_first_frame_counts(tmp_path):
    later = Image.new("RGB", (8, 8), (0, 255, 0))
    film = saved(kind="GIF", colour=(255, 0, 0), save_all=True, append_images=[later])
    assert first_pixel(tmp_path, "film.gif", film) == [255, 0, 0]


def test_hidden_names_never_count(tmp_path, capsys):
    written = write_classes(tmp_path, ("a", "b"))
    for place in ("train", "train/a", "train/a/deep"):
        for name in (".ipynb_checkpoints", ".git"):
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "x.png").write_bytes(saved())
        for name in ("._0.png", ".DS_Store"):
            (tmp_path / place / name).write_bytes(b"no image")
    assert np.array_equal(dataset.load("folder", tmp_path).train_images, written["train"])
    assert capsys.readouterr().out == "4 train and 4 test images of 2 classes, at 32x32 pixels\n"


def test_what_is_left_out_is_said(tmp_path, capsys):
    written = write_classes(tmp_path, ("a", "b"))
    (tmp_path / "train" / "labels.csv").write_text("no class")
    (tmp_path / "train" / "a" / "README").write_text("P1 and P2 are no images")
    for name in ("Thumbs.db", "clip.mpg", "figure.eps", "b.txt"):
        (tmp_path / "test" / "b" / name).write_bytes(b"\0\0\x01\xb3" + bytes(20))
    data = dataset.load("folder", tmp_path)
    assert np.array_equal(data.train_images, written["train"])
    assert np.array_equal(data.test_images, written["test"])
    assert capsys.readouterr().out == (
        "4 train and 4 test images of 2 classes, at 32x32 pixels; left out: "
        "1 outside of class folders (labels.csv), "
        "5 without an image (README, Thumbs.db, b.txt and 2 more)\n"
    )


def test_what_would_wait_for_ever_is_refused(tmp_path):
    write_classes(tmp_path, ("a", "b"))
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    assert "pipe.png is not a regular file" in load_error("folder", tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    written = write_classes(tmp_path, ("a", "b"))
    linked = tmp_path / "elsewhere"
    linked.mkdir()
    (tmp_path / "train" / "a" / "0.png").rename(linked / "0.png")
    # sorted by name, the images stay where they were
    (tmp_path / "train" / "a" / "0").symlink_to(linked)
    (tmp_path / "test" / "a" / "1.png").rename(tmp_path / "one.png")
    (tmp_path / "test" / "a" / "1.png").symlink_to(tmp_path / "one.png")
    (tmp_path / "pool").mkdir()
    (tmp_path / "test" / "b").rename(tmp_path / "pool" / "b")
    (tmp_path / "test" / "b").symlink_to(tmp_path / "pool" / "b")
    # a circle, ways to other classes, and a second way to the same images
    (linked / "circle").symlink_to(linked)
    (tmp_path / "train" / "b" / "up").symlink_to("..")
    (tmp_path / "pool" / "b" / "up").symlink_to("..")
    (tmp_path / "pool" / "other.png").write_bytes(saved())
    (tmp_path / "train" / "a" / "again").symlink_to(linked)
    data = dataset.load("folder", tmp_path)
    assert np.array_equal(data.train_images, written["train"])
    assert np.array_equal(data.test_images, written["test"])


@pytest.mark.parametrize("name", ["image.png", "folder"])
@pytest.mark.parametrize("target", ["nothing", "itself"])
def test_links_that_lead_nowhere_are_named(tmp_path, name, target):
    write_classes(tmp_path, ("a", "b"))
    path = tmp_path / "train" / "a" / name
    path.symlink_to(name if target == "itself" else "nothing")
    assert f"{path} cannot be read" in load_error("folder", tmp_path)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    write_classes(tmp_path, ("a", "b"))
    closed = tmp_path / "train" / "a" / "deep"
    closed.mkdir()
    forbid_listing(closed, monkeypatch)
    assert f"{closed} cannot be read (Permission denied)" in load_error("folder", tmp_path)


def test_class_names_are_compared_in_one_unicode_form(tmp_path):
    write_classes(tmp_path, ("caf\u00e9", "tea"))
    apart = unicodedata.normalize("NFD", "caf\u00e9")
    (tmp_path / "test" / "caf\u00e9").rename(tmp_path / "test" / apart)
    assert dataset.load("folder", tmp_path).classes == ("caf\u00e9", "tea")
    # a second form is the same class
    (tmp_path / "train" / apart).mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / apart / "2.png")
    assert dataset.load("folder", tmp_path).train_labels.tolist() == [0, 0, 0, 1, 1]


def test_images_that_do_not_fit_into_memory_are_not_begun(tmp_path, monkeypatch):
    write_classes(tmp_path, ("a", "b"))
    monkeypatch.setattr(folder, "_available_bytes", lambda: 4.0e8)
    monkeypatch.setattr(folder, "_read_image", None)
    message = load_error("folder", tmp_path, (4096, 4096))
    # four to train on, twice, and four to test
    assert message.startswith("images of 4096x4096 need 0.6 GB of memory, 0.4 GB are free")


PEAK = """
import sys
from pathlib import Path
import dataset
from PIL import Image, ImageCms, ImageOps

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

Image.init()
before = kilobytes("VmRSS")
data = dataset.load("folder", Path(sys.argv[1]), (640, 640))
arrays = data.train_images.nbytes + data.test_images.nbytes
print((kilobytes("VmHWM") - before) * 1024 / arrays)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_images_are_loaded_in_little_more_memory_than_they_take(tmp_path):
    """Photographs that take 3 MB each while they are decoded, and 197 MB all in the end."""
    photo = Image.fromarray(made_images(1)[0]).resize((1000, 800))
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for index in range(60 if split == "train" else 20):
            (tmp_path / split / name / f"{index}.jpg").write_bytes(buffer.getvalue())
    process = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert 1 <= float(process.stdout.splitlines()[-1]) <= 1.5


def test_a_containers_limit_counts(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2000 kB\n",
        "/sys/fs/cgroup/memory.max": "1000000\n",
    }

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(folder.Path, "read_text", read_text)
    assert folder._available_bytes() == 1_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert folder._available_bytes() == 2_048_000
    files.clear()
    assert folder._available_bytes() == float("inf")


def test_images_need_not_be_square(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            image = Image.new("RGB", (50, 20), "blue")
            # the upper half is red
            image.paste("red", (0, 0, 50, 10))
            image.save(tmp_path / split / name / "image.png")
    images = dataset.load("folder", tmp_path, [16, 24]).train_images
    assert images.shape == (2, 16, 24, 3)
    assert (images[:, :7] == (255, 0, 0)).all()
    assert (images[:, 9:] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    "img_size", [[-(10**400)] * 2, [0, 32], [32, 7], [4097, 32], [10**400] * 2]
)
def test_senseless_img_size_is_not_blamed_on_the_images(tmp_path, img_size):
    write_classes(tmp_path, ("a", "b"))
    assert load_error("folder", tmp_path, img_size) == "--img_size: 8 to 4096 pixels"


# no torch


def test_dataset_package_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import pathlib, dataset\n"
        "labels = dataset.digits.np.arange(50) % 5\n"
        "dataset.split_train(labels, 0)\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'torch'))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stdout) == (0, "['torch']\n"), process.stderr


# split


def test_split_is_a_partition(digits):
    train_part, val = dataset.split_train(digits.train_labels, 3)
    assert sorted([*train_part, *val]) == list(range(len(digits.train_labels)))


def test_val_has_two_percent_of_every_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (100, 200, 500, 1000)))
    _, val = dataset.split_train(labels, 0)
    assert np.bincount(labels[val]).tolist() == [2, 4, 10, 20]


def test_val_has_an_image_of_a_rare_class():
    labels = np.repeat([0, 1], (100, 3))
    _, val = dataset.split_train(labels, 0)
    assert np.bincount(labels[val]).tolist() == [2, 1]


def test_split_trains_on_every_class():
    train_part, _ = dataset.split_train(np.array([0, 0, 0, 1]), 0)
    assert 3 in train_part


def test_classes_of_one_image_each_leave_none_to_choose_by(tmp_path):
    write_classes(tmp_path, ("a", "b"), count=1)
    with pytest.raises(UserError, match="no class has a second train image"):
        dataset.load("folder", tmp_path).split(0)


def test_split_depends_on_the_seed_alone(digits):
    first, again, other = (dataset.split_train(digits.train_labels, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert set(first[1]) != set(other[1])


def test_split_is_shuffled(digits):
    train_part, val = dataset.split_train(digits.train_labels, 0)
    for part in (train_part, val):
        assert not np.array_equal(part, np.sort(part))
        assert len(set(digits.train_labels[part[:100]])) == 10


# normalisation


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("divisors", [(1, 1, 1), (1, 2, 3), (9, 40, 255)])
def test_what_a_network_sees_of_a_pixel_is_exact_in_fp16_too(kind, divisors):
    images = made_images(7) // np.uint8(divisors)
    mean, std = dataset.channel_stats(images)
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    network = FromImages(torch.nn.Identity(), mean, std).to(kind)
    seen = network(torch.from_numpy(levels)).permute(0, 2, 3, 1)
    assert seen.dtype == kind
    whole, power = np.rint(255 * np.array(mean)), np.rint(255 * np.array(std))
    assert np.array_equal(seen.double().numpy(), (levels.astype(float) - whole) / power)
    assert (np.abs(whole - images.mean((0, 1, 2))) <= 0.5).all()
    assert (np.abs(np.log2(power) - np.log2(np.maximum(images.std((0, 1, 2)), 1))) <= 0.5).all()


# batches


def test_plain_batches_are_the_normalised_images_in_order(digits):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    batches = Batches(digits.test_images, digits.test_labels, Normalize(mean, std), 128, CPU)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert [len(labels) for _, labels in batches] == [128, 128, 104]
    assert len(batches) == 3
    assert torch.equal(labels, torch.from_numpy(digits.test_labels))
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images, normalised(digits.test_images, mean, std), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (4, [4]), (7, [4, 3]), (10, [4, 4, 2]), (99, [4, 4, 2])]
)
def test_first_serves_exactly_that_many_images(count, sizes):
    images = made_images(10, size=8)
    served = list(Batches(images, np.arange(10), UNIT, 4, CPU).first(count))
    assert [len(batch) for batch in served] == sizes
    expected = images[:count].transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(torch.cat(served), expected, atol=1e-6)


GREY = 127.5 / 255
"""A mean that no pixel has: normalised, only pixels that are cut out are 0."""


def epoch_of(images, seed, batch_size=32, **options):
    """One augmented epoch: images (N, 3, H, W), normalised around GREY; labels, their indices."""
    options = {"augment": True, "mirror_and_cutout": True, **options}
    batches = Batches(
        images, np.arange(len(images)), Normalize([GREY] * 3, [0.5] * 3), batch_size, CPU, **options
    )
    torch.manual_seed(seed)
    return list(batches)


def augmented(images, mirror_and_cutout, seed, batch_size=32):
    """One epoch: uint8 images (N, H, W, 3), where they are blanked (N, H, W), original indices."""
    parts, indices = zip(
        *epoch_of(images, seed, batch_size, mirror_and_cutout=mirror_and_cutout), strict=True
    )
    normalised = torch.cat(parts)
    blank = (normalised == 0).all(1)
    assert torch.equal(blank, (normalised == 0).any(1))  # in all channels alike
    pixels = ((normalised * 0.5 + GREY) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.numpy(), blank.numpy(), torch.cat(indices).numpy()


def found_moves(image, blank, original):
    """Every (down, right, mirrored) that makes `image`, where not blank, of `original` on black."""
    height, width, _ = original.shape
    moves = set()
    for mirrored in (False, True):
        padded = np.pad(original, ((MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)))
        for down in range(2 * MAX_SHIFT + 1):
            for right in range(2 * MAX_SHIFT + 1):
                moved = padded[down : down + height, right : right + width]
                if ((moved[:, ::-1] if mirrored else moved) == image).all(-1)[~blank].all():
                    moves.add((down - MAX_SHIFT, right - MAX_SHIFT, mirrored))
    return moves


@pytest.mark.parametrize("mirror_and_cutout", [False, True])
def test_augmented_images_are_shifted_originals_mirrored_only_where_allowed(mirror_and_cutout):
    # not square, no black
    originals = np.random.default_rng(0).integers(1, 256, (320, 12, 10, 3), dtype=np.uint8)
    images, blank, indices = augmented(originals, mirror_and_cutout, seed=0)
    moves = [
        found_moves(*found, originals[index])
        for *found, index in zip(images, blank, indices, strict=True)
    ]
    assert all(len(found) == 1 for found in moves)
    downs, rights, mirrored = zip(*(found.pop() for found in moves), strict=True)
    assert set(downs) == set(rights) == set(range(-MAX_SHIFT, MAX_SHIFT + 1))
    # neither follows from the other
    assert len(set(zip(downs, rights, strict=True))) > 2 * (2 * MAX_SHIFT + 1)
    assert set(mirrored) == ({False, True} if mirror_and_cutout else {False})
    assert not mirror_and_cutout or 0.4 < np.mean(mirrored) < 0.6


@pytest.mark.parametrize(("size", "side"), [((32, 32), 12), ((12, 10), 4), ((9, 8), 3)])
def test_each_image_that_may_loses_one_square_of_three_eighths_of_its_width(size, side):
    originals = np.random.default_rng(0).integers(0, 256, (640, *size, 3), dtype=np.uint8)
    blank = augmented(originals, True, seed=0)[1]
    corners = set()
    for mask in blank:
        spans = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
        assert mask.sum() == len(spans[0]) * len(spans[1])  # a filled rectangle
        for span, length in zip(spans, size, strict=True):
            assert len(span) == span[-1] - span[0] + 1
            # its centre is in the image, its edges need not be
            clipped = span[0] == 0 or span[-1] == length - 1
            assert side // 2 <= len(span) <= side if clipped else len(span) == side
        corners.add((spans[0][0], spans[1][0]))
    assert len(corners) > min(200, size[0] * size[1] // 3)
    assert (blank.reshape(len(blank), -1).sum(1) == side**2).mean() > 0.3
    assert blank.any(0).all()  # no place is spared


def test_nothing_is_blanked_where_it_is_not_allowed_or_nothing_is_augmented():
    originals = made_images(64, size=8)
    assert not augmented(originals, False, seed=0)[1].any()
    for images, _ in epoch_of(originals, 0, augment=False):
        assert (images != 0).all()


@pytest.mark.parametrize(("count", "served"), [(96, 96), (100, 96), (20, 20)])
def test_an_epoch_serves_each_image_at_most_once_in_full_batches(count, served):
    images, _, indices = augmented(made_images(count, size=8), True, seed=0)
    assert len(images) == len(indices) == len(set(indices)) == served
    assert not np.array_equal(indices, np.sort(indices))


def test_augmentation_is_a_function_of_torch_seed():
    originals = made_images(64, size=8)
    first, again, other = (augmented(originals, True, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[2], other[2])


def test_epochs_leave_out_different_images():
    batches = Batches(made_images(40, size=8), np.arange(40), UNIT, 32, CPU, augment=True)
    torch.manual_seed(0)
    epochs = [set(torch.cat([labels for _, labels in batches]).tolist()) for _ in range(2)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("mirror_and_cutout", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_ranks_are_the_batches_of_one_process(world_size, mirror_and_cutout):
    originals = made_images(100, size=8)
    whole = epoch_of(originals, 0, mirror_and_cutout=mirror_and_cutout)
    parts = [
        epoch_of(
            originals, 0, mirror_and_cutout=mirror_and_cutout, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert {len(epoch) for epoch in parts} == {len(whole)} == {3}
    for (images, labels), *served in zip(whole, *parts, strict=True):
        assert {len(labels) for _, labels in served} == {32 // world_size}
        assert torch.equal(torch.cat([images for images, _ in served]), images)
        assert torch.equal(torch.cat([labels for _, labels in served]), labels)


@pytest.mark.parametrize(("count", "world_size"), [(0, 1), (2, 3)])
def test_fewer_images_than_ranks_are_refused(count, world_size):
    images = made_images(count, size=8)
    message = f"{count} images cannot be shared by {world_size} ranks"
    with pytest.raises(UserError, match=message):
        Batches(images, np.arange(count), UNIT, 4, CPU, world_size=world_size)


def test_ranks_get_equal_parts_of_fewer_images_than_a_batch():
    served = [
        epoch_of(made_images(21, size=8), 0, 64, rank=rank, world_size=2) for rank in range(2)
    ]
    labels = [torch.cat([labels for _, labels in epoch]).tolist() for epoch in served]
    assert [len(part) for part in labels] == [10, 10]
    assert len(set(sum(labels, []))) == 20
