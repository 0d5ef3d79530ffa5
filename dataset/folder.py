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
    """Train images, train labels, test images, test labels, class names; (N, img_size, img_size, 3) uint8.

    Classes are numbered by the sorted names of the folders in `train`.

    Raises:
        UserError: a folder is missing or empty, the two splits have different classes, or an image cannot be read.
    """
    names = {}
    for split in ("train", "test"):
        root = data_dir / split
        if not root.is_dir():
            raise UserError(
                f"{root} is missing: put images into {data_dir}/train/<class>/ and {data_dir}/test/<class>/"
            )
        names[split] = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if names["train"] != names["test"]:
        differing = sorted(set(names["train"]) ^ set(names["test"]))
        raise UserError(
            f"{data_dir}: train and test have different class folders: {', '.join(differing)}"
        )
    if len(names["train"]) < 2:
        raise UserError(
            f"{data_dir}/train holds {len(names['train'])} class folders; at least 2 are needed"
        )
    splits = [
        _read_split(data_dir / split, names["train"], img_size) for split in ("train", "test")
    ]
    return *splits[0], *splits[1], names["train"]


def _read_split(
    root: Path, classes: tuple[str, ...], img_size: int
) -> tuple[np.ndarray, np.ndarray]:
    paths, labels = [], []
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
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            mode, image = image.mode, ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes
        raise UserError(f"{path} is not a readable image ({error}); delete or replace it") from None
    if mode[0] in "IF":
        raise UserError(
            f"{path} has more than 8 bits a channel, which would be clipped; convert it first"
        )
    if image.size != (img_size, img_size):
        image = image.resize((img_size, img_size), Image.Resampling.BILINEAR)
    return np.asarray(image)
