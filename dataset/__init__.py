"""Images as uint8 arrays. Imports NumPy alone, so that exported networks can be evaluated where torch is not installed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import cifar10, digits, folder
from utils.errors import UserError

VALIDATION_FRACTION = 0.02  # CIFAR-10: 1,000 of the 50,000 train images choose the checkpoint

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]
LOADERS: dict[str, Callable[[Path, int], Arrays]] = {
    "cifar10": lambda data_dir, img_size: cifar10.load(data_dir),
    "folder": folder.load,
    "digits": lambda data_dir, img_size: digits.load(),
}
"""Name -> loader of (data_dir, img_size). Each returns train images, train labels, test images, test labels, class names."""

NATURAL = {"cifar10": True, "folder": True, "digits": False}
"""Whether an image mirrored, or with a part hidden, still shows its class, so that training may do both."""


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
    def natural(self) -> bool:
        return NATURAL[self.name]

    def digest(self) -> str:
        """Tells these images and labels, in their order, from any others."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def split(
        self, seed: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Images and labels to train on, and those held out, as `split_train` draws them."""
        chosen, held_out = (
            (self.train_images[part], self.train_labels[part])
            for part in split_train(self.train_labels, seed)
        )
        return chosen, held_out


def load(name: str, data_dir: Path, img_size: int = 32) -> ImageData:
    """Load a data set and check it.

    Args:
        name: "cifar10", "folder" or "digits".
        data_dir: where the files are, or where CIFAR-10 is downloaded to; "digits" needs none.
        img_size: height and width in pixels that images of "folder" are resized to; the others are 32 pixels wide.

    Raises:
        UserError: files absent, truncated or corrupt; wrong shapes; labels out of range; a width that cannot be.
    """
    if img_size < 8:
        raise UserError(f"--img_size {img_size}: at least 8")
    train_images, train_labels, test_images, test_labels, classes = LOADERS[name](
        Path(data_dir), img_size
    )
    for split, images, labels in (
        ("train", train_images, train_labels),
        ("test", test_images, test_labels),
    ):
        _check(f"{name} ({split})", images, labels, len(classes))
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{name}: train images are {train_images.shape[1:]}, test images {test_images.shape[1:]}"
        )
    return ImageData(
        name,
        classes,
        train_images,
        train_labels.astype(np.int64),
        test_images,
        test_labels.astype(np.int64),
    )


def _check(what: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{what}: images are {images.dtype} {images.shape}, expected uint8 (N, height, width, 3)"
        )
    if labels.shape != (len(images),) or len(images) == 0:
        raise UserError(f"{what}: {len(images)} images but labels of shape {labels.shape}")
    integers = np.issubdtype(labels.dtype, np.integer)
    low, high = (
        (labels.min(), labels.max()) if integers else (labels[0], labels[-1])
    )  # not everything has an order
    if not integers or low < 0 or high >= num_classes:
        raise UserError(f"{what}: labels {low}..{high} are not integers in 0..{num_classes - 1}")


def split_train(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, held out) of a seeded shuffle; the held-out part takes its share of every class that has two.

    The held-out images choose checkpoints and are never trained on; calibration takes its images from the first part.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[
            members[: min(max(1, round(VALIDATION_FRACTION * len(members))), len(members) - 1)]
        ] = True
    return order[~held_out[order]], order[held_out[order]]


def channel_stats(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in units of the full range (0..1), for the normalisation.

    The mean is a whole level, the deviation a power of two of levels, so that FP16 holds (pixel - mean) / deviation exactly.
    With exact statistics FP16 would change one INT8 code of the first layer in thirty, and an engine that normalises in
    FP16 as many predictions as the quantization itself does.
    """
    levels, counts = np.arange(256), np.zeros((3, 256), dtype=np.int64)
    for part in np.array_split(images, 100):  # counting takes eight bytes for each value
        counts += np.stack(
            [np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(3)]
        )
    means = counts @ levels / counts.sum(1)
    variances = counts @ levels**2 / counts.sum(1) - means**2
    scales = [
        2.0 ** round(math.log2(max(variance, 1.0)) / 2) / 255 for variance in variances.tolist()
    ]
    return [round(mean) / 255 for mean in means.tolist()], scales
