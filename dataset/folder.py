"""Your own images: `train/<class>/*` and `test/<class>/*`, one folder for each class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.errors import UserError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def load(
    data_dir: Path, img_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train images, train labels, test images, test labels, class names.

    Images are (N, img_size, img_size, 3) uint8. Classes are numbered by the sorted names of the
    folders in `train`.

    Raises:
        UserError: a folder is missing or empty, the two splits have different classes, or an image
            cannot be read.
    """
    classes = _class_names(data_dir, "train")
    test_classes = _class_names(data_dir, "test")
    if classes != test_classes:
        differing = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise UserError(f"{data_dir}: train and test have different class folders: {differing}")
    if len(classes) < 2:
        raise UserError(
            f"{data_dir}/train holds {len(classes)} class folders; at least 2 are needed"
        )
    train = _read_split(data_dir / "train", classes, img_size)
    test = _read_split(data_dir / "test", classes, img_size)
    return *train, *test, classes


def _class_names(data_dir: Path, split: str) -> tuple[str, ...]:
    root = data_dir / split
    if not root.is_dir():
        raise UserError(
            f"{root} is missing: put images into {data_dir}/train/<class>/ and "
            f"{data_dir}/test/<class>/"
        )
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))


def _read_split(
    root: Path, classes: tuple[str, ...], img_size: int
) -> tuple[np.ndarray, np.ndarray]:
    paths = []
    labels = []
    for label, name in enumerate(classes):
        files = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{root / name} holds no images ({' '.join(sorted(SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda path: _read_image(path, img_size), paths))
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _read_image(path: Path, img_size: int) -> np.ndarray:
    """(img_size, img_size, 3) uint8, turned upright as its camera says."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            mode = opened.mode
            image = ImageOps.exif_transpose(opened).convert("RGB")
    # Pillow's decoders raise anything on damaged bytes
    except Exception as error:
        raise UserError(f"{path} is not a readable image ({error}); delete or replace it") from None
    # "I", "I;16" and "F" are Pillow's modes of wider pixels
    if mode[0] in "IF":
        raise UserError(
            f"{path} has more than 8 bits a channel, which would be clipped; convert it first"
        )
    if image.size != (img_size, img_size):
        image = image.resize((img_size, img_size), Image.Resampling.BILINEAR)
    return np.asarray(image)
