"""CIFAR-10 (Krizhevsky, 2009) from whichever copy is there: a Keras archive, torchvision's batches, or folders."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import folder
from utils.errors import UserError
from utils.files import atomic_path

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"


def load(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train images, train labels, test images, test labels, class names; (N, 32, 32, 3) uint8.

    Looks in `data_dir` for `cifar10.npz` (Keras keys), `cifar-10-batches-py` (torchvision) and `train/<class>/*`, then
    downloads the second of them.

    Raises:
        UserError: nothing there and no network, or a truncated or corrupt file.
    """
    archive, batches = data_dir / "cifar10.npz", data_dir / "cifar-10-batches-py"
    if archive.is_file():
        return *_read_npz(archive), CLASSES
    if not batches.is_dir():
        if (data_dir / "train").is_dir():
            return folder.load(data_dir, 32)
        _download(data_dir)
    train = [_read_batch(batches / f"data_batch_{index}") for index in range(1, 6)]
    images, labels = zip(*train, strict=True)
    return np.concatenate(images), np.concatenate(labels), *_read_batch(batches / "test_batch"), CLASSES


def _read_npz(path: Path) -> tuple[np.ndarray, ...]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x_train, y_train, x_test, y_test = (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    except KeyError as error:
        raise UserError(f"{path} lacks an array: {error.args[0]}; expected x_train, y_train, x_test, y_test") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); delete it and fetch it again") from None
    return x_train, y_train.squeeze(), x_test, y_test.squeeze()


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(path.open("rb"), encoding="bytes").load()
        images = np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 3072) -> (N, 32, 32, 3)
        return images, np.asarray(batch[b"labels"])
    except FileNotFoundError:
        raise UserError(f"{path} is missing; delete {path.parent} to have it downloaded again") from None
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); delete {path.parent} and fetch it again") from None


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and builtin containers; refuses anything that could run code."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name}")


def _download(data_dir: Path) -> None:
    """Fetch and unpack the batches; nothing is left behind if it fails."""
    data_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with atomic_path(data_dir / "cifar-10-python.tar.gz") as partial:
            with urllib.request.urlopen(URL, timeout=30) as response, partial.open("wb") as file:
                total = int(response.headers.get("Content-Length", 0))
                with tqdm(total=total, unit="B", unit_scale=True, desc="CIFAR-10") as bar:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
            if digest.hexdigest() != MD5:
                raise UserError(f"the download of {URL} is damaged (MD5 differs); run again")
    except (urllib.error.URLError, TimeoutError) as error:
        raise UserError(
            f"CIFAR-10 is not in {data_dir.resolve()} (looked for cifar10.npz, cifar-10-batches-py/, train/<class>/) and "
            f"cannot be downloaded ({getattr(error, 'reason', error)}); name its folder with --data_dir, or run on "
            "--dataset digits, which needs no download"
        ) from None
    with tarfile.open(data_dir / "cifar-10-python.tar.gz") as archive:
        archive.extractall(data_dir, filter="data")
