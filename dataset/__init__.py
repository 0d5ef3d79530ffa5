"""Images as uint8 arrays. Imports NumPy alone: networks are evaluated without torch too."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import cifar10, digits, folder
from utils.errors import UserError

VAL_FRACTION = 0.02
"""Of the train images; CIFAR-10: 1,000 of 50,000 choose the checkpoint."""

MIN_SIZE = 8
MAX_SIZE = 4096
"""Of an image's height and width in pixels."""

Part = tuple[np.ndarray, np.ndarray]
"""Images and labels."""

LOADERS = {"cifar10": cifar10.load, "folder": folder.load, "digits": digits.load}
"""Name -> loader of (data_dir, (height, width), test_only), which takes of these what it needs."""

MISSING = {"cifar10": cifar10.missing, "folder": folder.missing, "digits": digits.missing}
"""Name -> what says that nothing of it is in data_dir; "" if something is, sound or not."""

MIRROR_AND_CUTOUT = {"cifar10": True, "folder": True, "digits": False}
"""Whether an image that is mirrored, or has a part hidden, still shows its class."""


@dataclass(frozen=True)
class ImageData:
    """A data set: images (N, H, W, 3) uint8, labels (N,) int64 in 0..len(classes)-1."""

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def mirror_and_cutout(self) -> bool:
        """Whether training may mirror images and hide parts of them."""
        return MIRROR_AND_CUTOUT[self.name]

    def digest(self) -> str:
        """Tells these images and labels, in their order, from any others."""
        return _digest(self.train_images, self.train_labels, self.test_images, self.test_labels)

    def test_digest(self) -> str:
        """The same of the test images alone."""
        return _digest(self.test_images, self.test_labels)

    def split(self, seed: int) -> tuple[Part, Part]:
        """`train_part` and `val`, as `split_train` draws them.

        Raises:
            UserError: `val` would be empty.
        """
        train_part, val = split_train(self.train_labels, seed)
        if len(val) == 0:
            raise UserError(f"{self.name}: no class has a second train image to choose epochs by")
        return (
            (self.train_images[train_part], self.train_labels[train_part]),
            (self.train_images[val], self.train_labels[val]),
        )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _require_known(name: str) -> None:
    if name not in LOADERS:
        raise UserError(f"there is no data set {name!r}, but {', '.join(LOADERS)}")


def missing(name: str, data_dir: Path) -> str:
    """What says that nothing of a data set is in `data_dir`; "" if something is, sound or not.

    Raises:
        UserError: there is no such data set.
    """
    _require_known(name)
    return MISSING[name](data_dir)


def load(
    name: str, data_dir: Path, img_size: Sequence[int] | None = None, test_only: bool = False
) -> ImageData:
    """Load a data set.

    Args:
        name: "cifar10", "folder" or "digits".
        data_dir: where the files are, or where CIFAR-10 is downloaded to; "digits" needs none.
        img_size: height and width in pixels that images of class folders are resized to
            (default: 32); digits, and CIFAR-10 in its own files, are 32 pixels wide.
        test_only: the train images are of no use, and there may be none.

    Raises:
        UserError: files absent, damaged or of another kind; wrong shapes; labels out of range; a
            width that cannot be.
        OSError: the system cannot read a file now.
    """
    _require_known(name)
    *arrays, classes = LOADERS[name](Path(data_dir), size_of(img_size), test_only)
    return ImageData(name, classes, *arrays)


def size_of(img_size: Sequence[int] | None) -> tuple[int, int]:
    """Height and width in pixels, by default 32; raises UserError for what cannot be."""
    height, width = img_size or (32, 32)
    if not (MIN_SIZE <= height <= MAX_SIZE and MIN_SIZE <= width <= MAX_SIZE):
        # it may have more digits than Python writes
        raise UserError(f"--img_size: {MIN_SIZE} to {MAX_SIZE} pixels")
    return height, width


def split_train(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train_part, val) of a seeded shuffle; `val` takes its part of every class.

    `val` chooses checkpoints and is never trained on. Calibration takes its images from
    `train_part`.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    in_val = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        # at least one image of each class, but never the only one
        count = max(1, round(VAL_FRACTION * len(members)))
        count = min(count, len(members) - 1)
        in_val[members[:count]] = True
    return order[~in_val[order]], order[in_val[order]]


def channel_stats(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in units of the full range, for normalisation.

    The mean is rounded to a whole level m and the deviation to a power of two of levels s: then
    FP16 holds (pixel - m) / s exactly. With exact statistics FP16 would change one INT8 code of the
    first layer in thirty, and an engine that normalises in FP16 would change as many predictions
    as the quantization itself does.

    Args:
        images: (N, H, W, 3) uint8.
    """
    # how often each level occurs in each channel; in parts, as counting takes 8 bytes a value
    counts = np.zeros((3, 256), dtype=np.int64)
    for part in np.array_split(images, 100):
        for channel in range(3):
            counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
    # variance = E[level^2] - E[level]^2
    levels = np.arange(256)
    means = counts @ levels / counts.sum(1)
    variances = counts @ levels**2 / counts.sum(1) - means**2
    # log2 of the deviation is half that of the variance; images of one grey have none
    exponents = [round(math.log2(max(variance, 1.0)) / 2) for variance in variances]
    mean = [round(level) / 255 for level in means.tolist()]
    std = [2.0**exponent / 255 for exponent in exponents]
    return mean, std
