"""Your own images: `train/<class>/*` and `test/<class>/*`, one folder for each class."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from utils.errors import UserError, and_more

if TYPE_CHECKING:
    from PIL import Image

LeftOut = dict[str, list[str]]
"""Why files are left out, and their names."""

NO_IMAGE = "without an image"
NO_CLASS = "outside of class folders"

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows, but has no pixels of: data, films, and programs to be run."""

IMAGE_NAME = re.compile(
    r"\.(avif|bmp|gif|hei[cf]|jfif|jp2|jpe?g|jxl|p[bgp]m|png|svg|tga|tiff?|webp)$", re.IGNORECASE
)
"""Promises an image: a file of such a name is refused where another is left out."""

BITS_PER_SAMPLE = 258
"""Tag of a TIFF file."""
HEAD_BYTES = 32
"""What is shown of a file that cannot be read: an HTML page or a git-lfs pointer is known by it."""

DECODERS = 8
"""Threads, each of which holds one decoded image."""
BLOCK = 256
"""Images that wait for a thread at once."""
SHOWN = 3
"""Names that a message has room for."""


def load(
    data_dir: Path, size: tuple[int, int], test_only: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train images, train labels, test images, test labels, class names.

    Images are (N, *size, 3) uint8. Classes are numbered by the sorted names of the folders in
    `train`. Links are followed, hidden names never count. Prints how many images there are, and
    which files are none.

    Args:
        size: height and width in pixels.
        test_only: there are no train images, and the folders in `test` are the classes.

    Raises:
        UserError: a folder is missing or holds no images, the two splits have different classes,
            files cannot be read or would lose bits unevenly (greys of 16 bits, some TIFFs), or do
            not fit into memory. Of 16-bit colours the upper 8 bits are taken.
    """
    # all files are known before the first is read, which may take long
    left_out: LeftOut = defaultdict(list)
    refused: list[str] = []
    train = {} if test_only else _class_files(data_dir / "train", left_out, refused)
    test = _class_files(data_dir / "test", left_out, refused)
    classes = tuple(test if test_only else train)
    if classes != tuple(test):
        differing = ", ".join(sorted(train.keys() ^ test.keys()))
        raise UserError(f"{data_dir}: train and test have different class folders: {differing}")
    if len(classes) < 2:
        raise UserError(f"{data_dir}/test: {len(classes)} class folders; at least 2 are needed")
    count = sum(map(len, (*train.values(), *test.values())))
    # in training a second time: the train part is a copy without the val part
    _require_memory(count + sum(map(len, train.values())), size)

    train_images, train_labels = _read(train, size, left_out, refused)
    test_images, test_labels = _read(test, size, left_out, refused)
    if refused:
        faults = and_more(refused, SHOWN, "; ")
        raise UserError(f"{len(refused)} of {count} files cannot be used: {faults}")
    for split, files_of, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for label, name in enumerate(files_of):
            if label not in labels:
                raise UserError(f"{data_dir / split / name} holds no images")
    counts = f"{len(train_labels)} train and {len(test_labels)} test images"
    pixels = "x".join(map(str, size))
    print(f"{counts} of {len(classes)} classes, at {pixels} pixels{describe(left_out)}")
    return train_images, train_labels, test_images, test_labels, classes


def count_classes(data_dir: Path) -> int:
    """How many classes `load` would find; raises UserError if `train` is missing."""
    return len(_class_files(data_dir / "train", defaultdict(list), []))


def missing(data_dir: Path) -> str:
    """Says that there is nothing of the data set; "" if there is something."""
    if (data_dir / "train").is_dir() or (data_dir / "test").is_dir():
        return ""
    return f"{data_dir.absolute()} has no folders train and test"


def read_batches(
    paths: Sequence[Path],
    size: tuple[int, int],
    batch_size: int,
    left_out: LeftOut,
    refused: list[str],
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Files, and what `load` would read of them: images (B, *size, 3) uint8.

    Each batch is what can be used of the next `batch_size` files.

    Args:
        paths: of images, and of folders that hold images at any depth.
        size: height and width in pixels that images are resized to.
        left_out: files in folders that are no images are added to it.
        refused: what else cannot be used is added to it, a line each.
    """
    files = []
    for path in paths:
        files += _files_below(path, refused) if path.is_dir() else [path]
    for start in range(0, len(files), batch_size):
        block = files[start : start + batch_size]
        images = np.empty((len(block), *size, 3), dtype=np.uint8)
        used = _fill(images, block, left_out, refused, named=paths)
        if used:
            yield used, images[: len(used)]


def _class_files(split: Path, left_out: LeftOut, refused: list[str]) -> dict[str, list[Path]]:
    """Class name -> its files, both sorted."""
    if not split.is_dir():
        raise UserError(f"{split} is missing: put images into {split}/<class>/")
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(split.iterdir(), key=_composed):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            files[_composed(path).name] += _files_below(path, refused)
        else:
            left_out[NO_CLASS].append(path.name)
    return files


def _composed(path: Path) -> Path:
    """The path in the one form of Unicode; macOS takes letters and their accents apart."""
    return Path(unicodedata.normalize("NFC", str(path)))


def _files_below(top: Path, refused: list[str]) -> list[Path]:
    """Files at any depth, sorted by the parts of their paths."""

    def refuse(error: OSError) -> None:
        refused.append(f"{error.filename} cannot be read ({error.strerror})")

    # a link to a folder above leads to the images of other classes, and in a circle
    seen = set(top.resolve().parents)
    files = []
    for folder, subfolders, names in os.walk(top, onerror=refuse, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=_composed)


def _require_memory(count: int, size: tuple[int, int]) -> None:
    """Raises UserError where so many images (H, W, 3) uint8 are more than there is room for."""
    height, width = size
    needed = count * height * width * 3
    available = _available_bytes()
    if needed > available:
        raise UserError(
            f"images of {height}x{width} need {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free: use a smaller --img_size"
        )


def _available_bytes() -> float:
    """Memory that Linux can give, at most the container's limit; infinite where nothing tells."""
    available = math.inf
    with suppress(OSError):
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            available = int(found[1]) * 1024
    # "max" is no limit
    with suppress(OSError, ValueError):
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available


def _read(
    files_of: dict[str, list[Path]], size: tuple[int, int], left_out: LeftOut, refused: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each class's files, those that are images (N, *size, 3) uint8, and their labels (N,)."""
    label_of: dict[Path, int] = {}
    for label, paths in enumerate(files_of.values()):
        label_of |= dict.fromkeys(paths, label)
    files = list(label_of)
    images = np.empty((len(files), *size, 3), dtype=np.uint8)
    used: list[Path] = []
    # every rank reads, the first one shows it: on a terminal, as None means
    silent = None if os.environ.get("RANK", "0") == "0" else True
    with tqdm(total=len(files), desc="images", disable=silent) as bar:
        for start in range(0, len(files), BLOCK):
            block = files[start : start + BLOCK]
            used += _fill(images[len(used) :], block, left_out, refused)
            bar.update(len(block))
    labels = np.array([label_of[path] for path in used], dtype=np.int64)
    return images[: len(used)], labels


def _fill(
    images: np.ndarray,
    files: list[Path],
    left_out: LeftOut,
    refused: list[str],
    named: Sequence[Path] = (),
) -> list[Path]:
    """Fill the first of `images` (N, H, W, 3) uint8 with those `files` that are images.

    Args:
        named: files that must be images.

    Returns:
        The files that are images, in order.
    """
    used: list[Path] = []
    with ThreadPoolExecutor(DECODERS) as pool:
        faults = pool.map(_read_image, files, images)
        for path, image, fault in zip(files, images, faults, strict=False):
            if fault is None:
                # closes the gaps that unusable files leave
                images[len(used)] = image
                used.append(path)
            elif fault != NO_IMAGE:
                refused.append(fault)
            elif path in named:
                refused.append(f"{path} is no image")
            else:
                left_out[NO_IMAGE].append(path.name)
    return used


def _read_image(path: Path, pixels: np.ndarray) -> str | None:
    """Fill `pixels` (H, W, 3) uint8; return what is wrong with the file, if anything.

    What is no image at all returns NO_IMAGE.
    """
    from PIL import Image

    head = b""
    image = None
    try:
        # to read a FIFO may wait for ever
        if path.exists() and not path.is_file():
            return f"{path} is not a regular file"
        with path.open("rb") as file:
            head = file.peek()[:HEAD_BYTES]
            image = Image.open(file)
            if image.format in NO_PICTURES:
                return NO_IMAGE
            # of wide colours Pillow keeps the upper 8 bits, but wide greys it clips, and of a TIFF
            # that stores its channels apart it mistakes the bytes
            bits = image.tag_v2.get(BITS_PER_SAMPLE, ()) if image.format == "TIFF" else ()
            if image.mode[0] in "IF" or max(bits, default=8) > 8:
                return f"{path} has more than 8 bits a channel, which would be lost: convert it"
            pixels[:] = _to_rgb(image, pixels.shape[:2])
        return None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes
        # Pillow's own have no number
        if isinstance(error, OSError) and error.errno:
            return f"{path} cannot be read ({error.strerror})"
        if image is None and not IMAGE_NAME.search(path.name):
            return NO_IMAGE
        reason = f"{error}; it begins with {head}"
        return f"{path} is not a readable image ({reason}): delete or replace it"


def _to_rgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The first frame, resized to `size` (height, width), in RGB and upright as its camera says."""
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        # on white, as paper is: drawings in alpha alone are black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def describe(left_out: LeftOut) -> str:
    """Which files are left out and why; empty if none are."""
    reasons = []
    for reason, names in left_out.items():
        shown = and_more([printable(name) for name in names], SHOWN)
        reasons.append(f"{len(names)} {reason} ({shown})")
    return f"; left out: {', '.join(reasons)}" if reasons else ""


def printable(text: str) -> str:
    """A name as a terminal may show it: it may hold what moves the cursor."""
    return text if text.isprintable() else repr(text)
