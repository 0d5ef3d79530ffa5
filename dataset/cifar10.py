"""CIFAR-10 (Krizhevsky, 2009) from whichever copy is there: Keras's, torchvision's, or folders."""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from dataset import folder
from utils.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"

NPZ, BATCHES, FOLDERS = "cifar10.npz", "cifar-10-batches-py", "train"
TEST_FOLDERS = f"test/{CLASSES[0]}"
ARCHIVE = URL.split("/")[-1]
SOURCES = (NPZ, BATCHES, FOLDERS, ARCHIVE, TEST_FOLDERS)
"""What is looked for, in this order: Keras's, torchvision's, class folders, URL's archive, and the
test images' class folders alone."""
TRAIN_BATCHES = tuple(f"data_batch_{index}" for index in range(1, 6))
TEST_BATCH = "test_batch"
ARRAY_PARTS = ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct")
"""What their pickles make arrays of. NumPy 2 has kept these names."""


def load(
    data_dir: Path, size: tuple[int, int], test_only: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train images, train labels, test images, test labels, class names; (N, 32, 32, 3) uint8.

    Looks in `data_dir` for `SOURCES`; it may be the folder of batches itself. If there are none,
    `ARCHIVE` is downloaded. With `test_only` there are no train images.

    Raises:
        UserError: nothing there and no network, or a file that is damaged or of another kind.
        OSError: the system cannot read a file now.
    """
    source = _source(data_dir)
    if source in (data_dir / FOLDERS, data_dir / TEST_FOLDERS):
        loaded = folder.load(data_dir, size, test_only)
        if loaded[-1] != CLASSES:
            raise UserError(f"{source} holds other classes than CIFAR-10's: add --dataset folder")
        return loaded
    if source in (None, data_dir / ARCHIVE):
        archive = source.read_bytes() if source else _fetch(data_dir)
        source = data_dir / BATCHES
        _unpack(archive, source)
    read = _read_npz if source == data_dir / NPZ else _read_batches
    test = _checked(source, *read(source, "test"))
    train = [array[:0] for array in test]
    if not test_only:
        train = _checked(source, *read(source, "train"))
    return *train, *test, CLASSES


def _checked(source: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels (N,) int64; raises UserError if they cannot be CIFAR-10's."""
    labels = labels.reshape(-1)  # Keras's are (N, 1)
    shape = (len(labels), 32, 32, 3)
    of_classes = len(labels) > 0 and np.isin(labels, np.arange(len(CLASSES))).all()
    if images.dtype != np.uint8 or images.shape != shape or not of_classes:
        raise UserError(
            f"{source}: images {images.dtype} {images.shape} with {len(labels)} labels "
            f"{labels.dtype} are not CIFAR-10's: uint8 (N, 32, 32, 3), N labels of 0..9"
        )
    return images, labels.astype(np.int64)


def missing(data_dir: Path) -> str:
    """Says that `load` would find nothing and download it; "" if there is something."""
    return "" if _source(data_dir) else f"CIFAR-10 is not in {data_dir.absolute()}"


def _source(data_dir: Path) -> Path | None:
    """What there is of CIFAR-10, None if nothing."""
    sources = [data_dir / name for name in SOURCES]
    # data_dir itself may be the folder of batches, of which one may be lost
    if any((data_dir / name).exists() for name in (TRAIN_BATCHES[0], TEST_BATCH)):
        sources.insert(1, data_dir)
    return next((source for source in sources if source.exists()), None)


@contextmanager
def _content(path: Path, what: str, fetched: Path) -> Iterator[BinaryIO]:
    """A file's content, for a block that raises if it is damaged or no `what`.

    Args:
        fetched: the file, or the folder that it came in.
    """
    content = path.read_bytes()
    try:
        yield io.BytesIO(content)
    # unpicklers, zipfile, zlib and NumPy raise anything on damaged bytes
    except Exception as error:
        reason = f"{error}; it begins with {content[: folder.HEAD_BYTES]}"
        raise UserError(
            f"{path} is no {what} ({reason}); delete {fetched} and fetch it again"
        ) from None


def _read_npz(path: Path, part: str) -> list[np.ndarray]:
    """Images and labels of "train" or "test"."""
    with _content(path, "archive of the arrays x_train, y_train, x_test, y_test", path) as file:
        arrays = np.load(file, allow_pickle=False)
        # a member that is no array is read as bytes
        return [np.asarray(arrays[f"{name}_{part}"]) for name in "xy"]


def _read_batches(batches: Path, part: str) -> list[np.ndarray]:
    """Images and labels of "train" or "test"."""
    names = TRAIN_BATCHES if part == "train" else (TEST_BATCH,)
    read = [_read_batch(batches / name) for name in names]
    return [np.concatenate(arrays) for arrays in zip(*read, strict=True)]


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} is missing; delete {path.parent} to have it downloaded again")
    with _content(path, "batch of CIFAR-10", path.parent) as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
        # (N, 3072) -> (N, 3, 32, 32) -> (N, 32, 32, 3)
        images = np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, np.asarray(batch[b"labels"])


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and builtin containers; refuses anything that could run code."""

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"unexpected {module}.{name}")
        return super().find_class(module, name)


def _unpack(archive: bytes, batches: Path) -> None:
    """Unpack the archive's folder to be `batches`.

    Several processes may do so at once: the ranks of one training do.
    """
    if hashlib.md5(archive, usedforsecurity=False).hexdigest() != MD5:
        head = archive[: folder.HEAD_BYTES]
        raise UserError(
            f"{batches.with_name(ARCHIVE)} is damaged (MD5 differs; it begins with {head}); delete "
            "it if it is there, and run again"
        )
    batches.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".", dir=batches.parent) as partial,
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


def _fetch(data_dir: Path) -> bytes:
    """The archive (170 MB), in memory: a download that fails leaves nothing behind."""
    archive = io.BytesIO()
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            total = int(response.headers.get("Content-Length", 0))
            with tqdm.wrapattr(response, "read", total=total, desc="CIFAR-10") as stream:
                shutil.copyfileobj(stream, archive, 1 << 20)
    # refused, timed out or lost: all that a connection raises
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"CIFAR-10 is not in {data_dir.absolute()} (looked for {', '.join(SOURCES)}) and "
            f"cannot be downloaded ({getattr(error, 'reason', error)}); name its folder with "
            "--data_dir, or run on --dataset digits, which needs no download"
        ) from None
    return archive.getvalue()
