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
MD5 = "c58f30108f718f92721af3b95e74349a"


def load(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train images, train labels, test images, test labels, class names; (N, 32, 32, 3) uint8.

    Looks in `data_dir` for `cifar10.npz` (Keras keys), `cifar-10-batches-py` (torchvision) and
    `train/<class>/*`, in this order, then downloads the second of them.

    Raises:
        UserError: nothing there and no network, or a truncated or corrupt file.
    """
    archive = data_dir / "cifar10.npz"
    batches = data_dir / "cifar-10-batches-py"
    if archive.is_file():
        return *_read_npz(archive), CLASSES
    if not batches.is_dir() and (data_dir / "train").is_dir():
        return _read_folders(data_dir)
    if not batches.is_dir():
        _download(batches)
    train = [_read_batch(batches / f"data_batch_{index}") for index in range(1, 6)]
    train_images = np.concatenate([images for images, _ in train])
    train_labels = np.concatenate([labels for _, labels in train])
    return train_images, train_labels, *_read_batch(batches / "test_batch"), CLASSES


def _read_folders(
    data_dir: Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    loaded = folder.load(data_dir, img_size=32)
    if loaded[-1] != CLASSES:
        message = f"{data_dir}/train holds other classes than CIFAR-10's: add --dataset folder"
        raise UserError(message)
    return loaded


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x_train, y_train, x_test, y_test = (arrays[key] for key in keys)
    except KeyError as error:
        lacking = error.args[0]
        raise UserError(f"{path} lacks an array: {lacking}; expected {', '.join(keys)}") from None
    # zipfile, zlib and NumPy raise anything on damaged bytes
    except Exception as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}); delete it and fetch it again"
        ) from None
    # Keras's labels have the shape (N, 1)
    return x_train, y_train.squeeze(), x_test, y_test.squeeze()


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(path.open("rb"), encoding="bytes").load()
        images = np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32)  # (N, 3072) -> (N, 3, 32, 32)
        return images.transpose(0, 2, 3, 1), np.asarray(batch[b"labels"])  # NCHW -> NHWC
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; delete {path.parent} to have it downloaded again"
        ) from None
    # unpicklers raise anything on damaged bytes, even ModuleNotFoundError
    except Exception as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}); delete {path.parent} and fetch it again"
        ) from None


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and builtin containers; refuses anything that could run code."""

    def find_class(self, module: str, name: str) -> object:
        array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        # bytes, where Python 3 wrote protocol 2
        text = (module, name) == ("_codecs", "encode")
        if not (array or text):
            raise pickle.UnpicklingError(f"unexpected {module}.{name}")
        return super().find_class(module, name)


def _download(batches: Path) -> None:
    """Fetch the archive and unpack its folder to be `batches`.

    Several processes may do so at once: the ranks of one training do.
    """
    data_dir = batches.parent
    data_dir.mkdir(parents=True, exist_ok=True)
    archive = _fetch(data_dir)
    with (
        tempfile.TemporaryDirectory(prefix=".", dir=data_dir) as partial,
        tarfile.open(fileobj=archive) as files,
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


def _fetch(data_dir: Path) -> io.BytesIO:
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
            f"CIFAR-10 is not in {data_dir.resolve()} (looked for cifar10.npz, "
            f"cifar-10-batches-py/, train/<class>/) and cannot be downloaded "
            f"({getattr(error, 'reason', error)}); name its folder with --data_dir, or run on "
            "--dataset digits, which needs no download"
        ) from None
    if hashlib.md5(archive.getbuffer(), usedforsecurity=False).hexdigest() != MD5:
        raise UserError(f"the download of {URL} is damaged (MD5 differs); run again")
    archive.seek(0)
    return archive
