"""CIFAR-10 (Krizhevsky, 2009) from whichever copy is there: Keras's, torchvision's, or folders."""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import folder
from utils.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = URL.split("/")[-1]
MD5 = "c58f30108f718f92721af3b95e74349a"

TRAIN_BATCHES = tuple(f"data_batch_{index}" for index in range(1, 6))
TEST_BATCH = "test_batch"

DAMAGED = "is truncated or corrupt ({})"


def load(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train images, train labels, test images, test labels, class names; (N, 32, 32, 3) uint8.

    Looks in `data_dir` for `cifar10.npz` (Keras keys), `cifar-10-batches-py` (torchvision; it may
    be `data_dir` itself), `train/<class>/*` and `cifar-10-python.tar.gz`, in this order, then
    downloads the last of them.

    Raises:
        UserError: nothing there and no network, or a file that is damaged or of another kind.
        OSError: the system cannot read a file now.
    """
    archive = data_dir / "cifar10.npz"
    batches = data_dir / "cifar-10-batches-py"
    if (data_dir / TEST_BATCH).exists() or (data_dir / TRAIN_BATCHES[0]).exists():
        batches = data_dir
    if archive.is_file():
        return *_read_npz(archive), CLASSES
    if not batches.is_dir() and (data_dir / "train").is_dir():
        return _read_folders(data_dir)
    if not batches.is_dir():
        _unpack(_present(data_dir) or _fetch(data_dir), batches)
    train = [_read_batch(batches / name) for name in TRAIN_BATCHES]
    train_images = np.concatenate([images for images, _ in train])
    train_labels = np.concatenate([labels for _, labels in train])
    return train_images, train_labels, *_read_batch(batches / TEST_BATCH), CLASSES


def missing(data_dir: Path) -> str:
    """Says that `load` would find nothing and download it; "" if there is something."""
    files = ("cifar10.npz", ARCHIVE)
    folders = ("cifar-10-batches-py", "train")
    # data_dir itself may be the folder of batches
    batches = (TEST_BATCH, TRAIN_BATCHES[0])
    found = (
        any((data_dir / name).is_file() for name in files)
        or any((data_dir / name).is_dir() for name in folders)
        or any((data_dir / name).exists() for name in batches)
    )
    return "" if found else f"CIFAR-10 is not in {data_dir.absolute()}"


def _read_folders(
    data_dir: Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    loaded = folder.load(data_dir, (32, 32))
    if loaded[-1] != CLASSES:
        message = f"{data_dir}/train holds other classes than CIFAR-10's: add --dataset folder"
        raise UserError(message)
    return loaded


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            # a member that is no array is read as bytes
            x_train, y_train, x_test, y_test = (np.asarray(arrays[key]) for key in keys)
    except KeyError as error:
        lacking = error.args[0]
        raise UserError(f"{path} lacks an array: {lacking}; expected {', '.join(keys)}") from None
    # zipfile, zlib and NumPy raise anything on damaged bytes
    except Exception as error:
        if folder.cannot_read_now(error, path):
            raise
        with path.open("rb") as file:
            kind = folder.other_kind(file.read(folder.HEAD_BYTES))
        if str(error).startswith("Object arrays"):
            kind = "an archive of Python objects"
        if kind:
            raise UserError(f"{path} is {kind}; expected arrays {', '.join(keys)}") from None
        raise UserError(f"{path} {DAMAGED.format(error)}; delete it and fetch it again") from None
    return x_train, _flat(y_train), x_test, _flat(y_test)


def _flat(labels: np.ndarray) -> np.ndarray:
    """Keras's labels have the shape (N, 1)."""
    return labels[:, 0] if labels.shape[1:] == (1,) else labels


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} is missing; delete {path.parent} to have it downloaded again")
    content = path.read_bytes()
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except (MemoryError, UserError):
        raise
    # unpicklers raise anything on damaged bytes
    except Exception as error:
        kind = folder.other_kind(content)
        if kind and kind != "a pickle":
            raise UserError(f"{path} is {kind}; expected a batch of CIFAR-10") from None
        raise UserError(
            f"{path} {DAMAGED.format(error)}; delete {path.parent} and fetch it again"
        ) from None
    try:
        # Python 2's keys are bytes
        data = batch[b"data"] if b"data" in batch else batch["data"]
        labels = batch[b"labels"] if b"labels" in batch else batch["labels"]
        images = np.asarray(data).reshape(-1, 3, 32, 32)  # (N, 3072) -> (N, 3, 32, 32)
        return images.transpose(0, 2, 3, 1), np.asarray(labels)  # NCHW -> NHWC
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is a pickle of something else than a batch of CIFAR-10 ({error})"
        ) from None


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and builtin containers; refuses anything that could run code."""

    numpy = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.zeros(1).__reduce_ex__(2)[0],
        "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
        "scalar": np.int64(0).__reduce__()[0],
    }
    """By name alone: the modules have other names in NumPy 1 and 2."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in self.numpy:
            return self.numpy[name]
        # bytes, where Python 3 wrote protocol 2
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise UserError(f"a batch of CIFAR-10 holds arrays alone; unexpected {module}.{name}")


def _unpack(archive: bytes, batches: Path) -> None:
    """Unpack the archive's folder to be `batches`.

    Several processes may do so at once: the ranks of one training do.
    """
    data_dir = batches.parent
    data_dir.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".", dir=data_dir) as partial,
        tarfile.open(fileobj=io.BytesIO(archive)) as files,
    ):
        # Python 3.10.11, 3.11.3 and older have no filters
        files.extraction_filter = getattr(tarfile, "data_filter", None)
        files.extractall(partial)
        try:
            Path(partial, batches.name).rename(batches)
        except OSError:
            # another process may have been faster
            if not batches.is_dir():
                raise


def _present(data_dir: Path) -> bytes | None:
    """The archive in `data_dir`, None if there is none."""
    path = data_dir / ARCHIVE
    if not path.is_file():
        return None
    return _sound(path.read_bytes(), str(path), "delete it and fetch it again")


def _sound(archive: bytes, what: str, remedy: str) -> bytes:
    """The archive itself; raises UserError if it is not CIFAR-10's."""
    if hashlib.md5(archive, usedforsecurity=False).hexdigest() == MD5:
        return archive
    kind = folder.other_kind(archive[: folder.HEAD_BYTES])
    if kind in (None, "a gzip archive"):
        kind = "damaged (MD5 differs)"
    raise UserError(f"{what} is {kind}; {remedy}")


def _fetch(data_dir: Path) -> bytes:
    """The archive (170 MB), in memory: a download that fails leaves nothing behind."""
    archive = io.BytesIO()
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            total = int(response.headers.get("Content-Length", 0))
            with tqdm(total=total, unit="B", unit_scale=True, desc="CIFAR-10") as bar:
                while chunk := response.read(1 << 20):
                    archive.write(chunk)
                    bar.update(len(chunk))
    # refused, timed out or lost: all that a connection raises
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"CIFAR-10 is not in {data_dir.absolute()} (looked for cifar10.npz, "
            "cifar-10-batches-py/, train/<class>/, cifar-10-python.tar.gz) and cannot be "
            f"downloaded ({getattr(error, 'reason', error)}); name its folder with --data_dir, "
            "or run on --dataset digits, which needs no download"
        ) from None
    return _sound(archive.getvalue(), f"the download of {URL}", "run again")
