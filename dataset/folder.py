"""Your own images: `train/<class>/*` and `test/<class>/*`, one folder for each class."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import stat
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

LeftOut = dict[tuple[str, str], list[str]]
"""Why files are left out, in singular and plural, and their names."""

NO_IMAGE = ("no image", "no images")
NO_FILE = ("not a regular file", "not regular files")
NO_CLASS = ("in no class folder", "in no class folder")

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows, but has no pixels of: data, films, and programs to be run."""
OTHER_SUFFIXES = {".heic", ".heif", ".jxl", ".svg"}
"""Of images that Pillow cannot read."""

OTHER_KINDS = {
    b"version https://git-lfs": "a git-lfs pointer: run git lfs pull",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML file",
    b"\x1f\x8b": "a gzip archive",
    b"\x89hdf": "an HDF5 file",
    b"\x93numpy": "a single NumPy array",
    b"\x80": "a pickle",
}
"""How sound files of other kinds begin, in small letters."""
HEAD_BYTES = 1 << 16
"""What is searched for a file's kind and the bits of its pixels."""

WIDE_TILES = re.compile(r"(?<!BGR);16|SGI16|BC6H")
"""What Pillow calls the decoding of wider pixels; BGR;16 is 5, 6 and 5 bits."""
WIDE_HEADS = {
    # SIZ marker, 38 bytes of sizes, Ssiz of the first channel: its bits - 1, the top bit its sign
    "JPEG2000": re.compile(rb"\xff\x4f\xff\x51.{38}[\x08-\x7f\x88-\xff]", re.DOTALL),
    # the third byte of the AV1 configuration has the bit high_bitdepth
    "AVIF": re.compile(rb"av1C..[\x40-\x7f\xc0-\xff]", re.DOTALL),
}
BITS_PER_SAMPLE = 258
"""Tag of a TIFF file."""

NOWHERE = (errno.ENOENT, errno.ELOOP)
"""What the system says of links to nothing."""
DECODED_PART = 4
"""Images that are decoded at once take at most this part of what all take in the end."""
LARGE = 1 << 20
"""Bytes of a decoded image that are worth a call to give them back."""
ORIENTATION = 0x0112
"""EXIF tag of how the camera was held."""
BLOCK = 256
"""Images that wait for a thread at once."""
SHOWN = 3
"""Names that a message has room for."""


def load(
    data_dir: Path, size: tuple[int, int], test_only: bool = False
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
            images cannot be read or have more than 8 bits a channel, or do not fit into memory.
        OSError: the system cannot read a file or a folder now.
    """
    left_out: LeftOut = defaultdict(list)
    train_folders = {} if test_only else _class_folders(data_dir / "train", left_out)
    test_folders = _class_folders(data_dir / "test", left_out)
    classes = tuple(test_folders if test_only else train_folders)
    if classes != tuple(test_folders):
        differing = ", ".join(sorted(train_folders.keys() ^ test_folders.keys()))
        raise UserError(f"{data_dir}: train and test have different class folders: {differing}")
    if len(classes) < 2:
        raise UserError(
            f"{data_dir}/{'test' if test_only else 'train'} holds {len(classes)} class folders; "
            "at least 2 are needed"
        )

    # all files are known before the first is read, which may take long
    train_paths, train_labels = _files_and_labels(train_folders, left_out)
    test_paths, test_labels = _files_and_labels(test_folders, left_out)
    paths = train_paths + test_paths
    _require_memory(len(paths), size)
    images, is_image = _read(paths, size, left_out)

    # of some classes all files may be no images
    train_labels = train_labels[is_image[: len(train_paths)]]
    test_labels = test_labels[is_image[len(train_paths) :]]
    _require_each_class(train_folders, train_labels)
    _require_each_class(test_folders, test_labels)
    if _first_rank():
        counts = f"{len(train_labels)} train and {len(test_labels)} test images"
        print(f"{counts} of {len(classes)} classes{describe(left_out)}")
    count = len(train_labels)
    return images[:count], train_labels, images[count:], test_labels, classes


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

    They come `batch_size` at a time; the last are fewer.

    Args:
        paths: of images, and of folders that hold images at any depth.
        size: height and width in pixels that images are resized to.
        left_out: files in folders that are no images are added to it.
        refused: what else cannot be used is added to it, a line each.
    """
    files = []
    for path in paths:
        files += _files_at(path, left_out, refused)
    named = set(paths)
    read = partial(_read_one, size=size)
    ready: list[tuple[Path, np.ndarray]] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            block = files[start : start + batch_size]
            for path, outcome in zip(block, pool.map(read, block), strict=True):
                if isinstance(outcome, np.ndarray):
                    ready.append((path, outcome))
                elif outcome is not NO_IMAGE:
                    refused.append(outcome)
                elif path in named:
                    refused.append(f"{path} is no image")
                else:
                    left_out[NO_IMAGE].append(path.name)
            # what is short of a batch waits for the next block
            while len(ready) >= batch_size:
                yield _stacked(ready[:batch_size])
                ready = ready[batch_size:]
    if ready:
        yield _stacked(ready)


def _files_at(path: Path, left_out: LeftOut, refused: list[str]) -> list[Path]:
    """A file itself, or those below a folder."""
    faults = len(refused)
    try:
        if path.is_dir():
            files = _files_below(path, left_out, refused)
            if not files and len(refused) == faults:
                refused.append(f"{path} holds no files")
            return files
        if path.is_file():
            return [path]
        # to read a FIFO may wait for ever
        kind = "not a regular file" if path.exists() else "not there"
        refused.append(f"{path} is {kind}")
    except OSError as error:
        refused.append(f"{path} cannot be read ({error.strerror})")
    return []


def _read_one(path: Path, size: tuple[int, int]) -> np.ndarray | str | tuple[str, str]:
    """The image (*size, 3) uint8 of a file, else what `_read_image` says is wrong with it."""
    pixels = np.empty((*size, 3), dtype=np.uint8)
    try:
        fault = _read_image(path, pixels)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return pixels if fault is None else fault


def _stacked(ready: list[tuple[Path, np.ndarray]]) -> tuple[list[Path], np.ndarray]:
    return [path for path, _ in ready], np.stack([image for _, image in ready])


def other_kind(head: bytes) -> str | None:
    """What a sound file of another kind is, by its first bytes; None if they tell of none."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, kind in OTHER_KINDS.items():
        if start.startswith(beginning):
            return kind
    return None


def cannot_read_now(error: Exception, path: Path) -> bool:
    """Whether an error is the system's, not the content's; such a one names `path` from now on.

    Damaged bytes can ask for a place before a file's beginning (EINVAL).
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        error.filename = error.filename or str(path)
        return True
    return isinstance(error, MemoryError)


def _class_folders(root: Path, left_out: LeftOut) -> dict[str, Path]:
    """Class name -> its folder, sorted by name."""
    if not root.is_dir():
        raise UserError(
            f"{root} is missing: put images into {root.parent}/train/<class>/ and "
            f"{root.parent}/test/<class>/"
        )
    folders: dict[str, Path] = {}
    for path in _visible(root):
        name = _composed(path)
        if not path.is_dir():
            left_out[NO_CLASS].append(path.name)
        elif name in folders:
            raise UserError(f"{root}: two folders are named {name}, in two forms of Unicode")
        else:
            folders[name] = path
    return folders


def _composed(path: Path) -> str:
    """The name in the one form of Unicode; macOS takes letters and their accents apart."""
    return unicodedata.normalize("NFC", path.name)


def _visible(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, sorted by name."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(paths, key=_composed)


def _files_and_labels(folders: dict[str, Path], left_out: LeftOut) -> tuple[list[Path], np.ndarray]:
    """All files of a split's class folders, and the number of each one's class."""
    files_of = [_files_below(folder, left_out) for folder in folders.values()]
    counts = np.array([len(files) for files in files_of], dtype=np.int64)
    labels = np.repeat(np.arange(len(files_of)), counts)
    _require_each_class(folders, labels)
    return sum(files_of, []), labels


def _files_below(top: Path, left_out: LeftOut, refused: list[str] | None = None) -> list[Path]:
    """Regular files at any depth, sorted by the parts of their paths.

    Args:
        refused: where what cannot be looked into is said; None: it raises OSError.
    """
    # a link to a folder above leads to the images of other classes, and in a circle
    above = [*top.resolve().parents]
    if top.is_symlink():
        split = top.parent.resolve()
        above += [split, *split.parents]
    seen = {_identity(path.stat()) for path in above}
    files = []
    # the last one is the next one
    pending = [top]
    while pending:
        path = pending.pop()
        try:
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                files.append(path)
            elif not stat.S_ISDIR(status.st_mode):
                left_out[NO_FILE].append(path.name)
            elif _identity(status) not in seen:
                seen.add(_identity(status))
                pending += reversed(_visible(path))
        except OSError as error:
            if error.errno in NOWHERE:
                # a link to nothing is refused when it is read
                files.append(path)
            elif refused is None:
                raise
            else:
                refused.append(f"{path} cannot be read ({error.strerror})")
    return files


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Tells a file from all others of the machine."""
    return status.st_dev, status.st_ino


def _require_each_class(folders: dict[str, Path], labels: np.ndarray) -> None:
    for label, folder in enumerate(folders.values()):
        if label not in labels:
            raise UserError(f"{folder} holds no images")


def _require_memory(count: int, size: tuple[int, int]) -> None:
    height, width = size
    needed = count * height * width * 3
    available = _available_bytes()
    if needed > available:
        raise UserError(
            f"needs {needed / 1e9:.1f} GB of memory for {count} images of {height}x{width}, "
            f"{available / 1e9:.1f} GB are free: use a smaller --img_size"
        )


def _available_bytes() -> float:
    """Memory that Linux and the container's limit can give; infinite where nothing tells."""

    def number(file: str, pattern: str) -> float:
        try:
            return float(re.search(pattern, Path(file).read_text(), re.MULTILINE)[1])
        except (OSError, TypeError):  # no such file, or the pattern is not in it
            return math.nan

    machine = number("/proc/meminfo", r"^MemAvailable: +(\d+) kB") * 1024
    limit = number("/sys/fs/cgroup/memory.max", r"^(\d+)$")
    used = number("/sys/fs/cgroup/memory.current", r"^(\d+)$")
    # what is only kept of files is given back
    cached = number("/sys/fs/cgroup/memory.stat", r"^inactive_file (\d+)$")
    known = [value for value in (machine, limit - used + cached) if not math.isnan(value)]
    return min(known, default=math.inf)


def _first_rank() -> bool:
    """Every rank reads, the first one tells of it."""
    return os.environ.get("RANK", "0") == "0"


class _Room:
    """At most so many bytes of decoded images at once, but one image always."""

    def __init__(self, total: int):
        self.total = total
        self.taken = 0
        self.changed = threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + count <= self.total)
            self.taken += count
        try:
            yield
        finally:
            with self.changed:
                self.taken -= count
                self.changed.notify_all()


def _read(
    paths: list[Path], size: tuple[int, int], left_out: LeftOut
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, *size, 3) uint8 of those files that are images, and which of all these are.

    Files that are none are added to `left_out`.

    Raises:
        UserError: what is wrong with others.
    """
    images = np.empty((len(paths), *size, 3), dtype=np.uint8)
    is_image = np.zeros(len(paths), dtype=bool)
    refused: list[str] = []
    kept = 0
    read = partial(_read_image, room=_Room(images.nbytes // DECODED_PART))
    silent = None if _first_rank() else True
    with tqdm(total=len(paths), desc="images", disable=silent) as bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), BLOCK):
            block = slice(start, start + BLOCK)
            outcomes = pool.map(read, paths[block], images[block])
            for index, outcome in enumerate(outcomes, start):
                bar.update()
                if outcome is NO_IMAGE:
                    left_out[NO_IMAGE].append(paths[index].name)
                elif outcome is not None:
                    refused.append(outcome)
                else:
                    is_image[index] = True
                    # in the place of one that is none
                    if kept < index:
                        images[kept] = images[index]
                    kept += 1
    if refused:
        raise UserError(
            f"{len(refused)} of {len(paths)} files cannot be used: {_first(refused, '; ')}"
        )
    return images[:kept], is_image


def _read_image(
    path: Path, pixels: np.ndarray, room: _Room | None = None
) -> str | tuple[str, str] | None:
    """Fill `pixels` (H, W, 3) uint8; return what is wrong with the image, if any.

    What is no image at all returns NO_IMAGE.
    """
    from PIL import Image, UnidentifiedImageError

    head = b""
    image = None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            image = Image.open(file)
            if image.format in NO_PICTURES:
                return NO_IMAGE
            if _is_wide(image, head):
                return f"{path} has more than 8 bits a channel, which would be clipped: convert it"
            needed = _decoded_bytes(image)
            with room.take(needed) if room else nullcontext():
                pixels[:] = _to_rgb(image, pixels.shape[:2])
                # its memory goes before another one's comes
                image.close()
                if needed > LARGE:
                    _give_back()
            return None
    # Pillow's decoders raise anything on damaged bytes
    except Exception as error:
        leads_nowhere = getattr(error, "errno", None) in NOWHERE
        if not leads_nowhere and cannot_read_now(error, path):
            raise
        if image is None and not leads_nowhere and path.suffix.lower() not in _image_suffixes():
            return NO_IMAGE
        unknown = isinstance(error, UnidentifiedImageError)
        reason = other_kind(head) or ("of no known format" if unknown else error)
        return f"{path} is not a readable image ({reason}): delete or replace it"


def _give_back() -> None:
    """Freed memory to the system: glibc would keep that of large images for each thread."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _decoded_bytes(image: Image.Image) -> int:
    """What Pillow needs at most while `_to_rgb` works: four bytes a pixel for each copy."""
    turned = image.getexif().get(ORIENTATION, 1) != 1
    copies = 2 if turned else 1
    return 4 * image.width * image.height * (copies if image.mode == "RGB" else 4)


def _image_suffixes() -> set[str]:
    from PIL import Image

    suffixes = set(OTHER_SUFFIXES)
    for suffix, name in Image.registered_extensions().items():
        # some formats are only written
        if name in Image.OPEN and name not in NO_PICTURES:
            suffixes.add(suffix)
    return suffixes


def _is_wide(image: Image.Image, head: bytes) -> bool:
    """Whether pixels have more than 8 bits a channel, of which Pillow may keep the upper 8."""
    # "I", "I;16" and "F" are Pillow's modes of wider pixels
    if image.mode[0] in "IF" or WIDE_TILES.search(repr(image.tile)):
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8
    if image.format == "PPM":
        # the decoder's last argument is the highest level
        return isinstance(image.tile[0][3], tuple) and image.tile[0][3][-1] > 255
    return image.format in WIDE_HEADS and bool(WIDE_HEADS[image.format].search(head))


def _to_rgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The first frame, resized to `size` (height, width), in RGB and upright as its camera says."""
    from PIL import Image, ImageCms, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data:
        # on white, as paper is: drawings in alpha alone are black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def describe(left_out: LeftOut) -> str:
    """Which files are left out and why; empty if none are."""
    if not left_out:
        return ""
    total = sum(len(names) for names in left_out.values())
    parts = []
    for kind, names in left_out.items():
        plain = [printable(name) for name in names]
        parts.append(f"{len(names)} {kind[len(names) > 1]} ({_first(plain, ', ')})")
    return f"; {total} file{'s' * (total > 1)} left out: {', '.join(parts)}"


def printable(text: str) -> str:
    """A name as a terminal may show it: it may hold what moves the cursor."""
    return text if text.isprintable() else repr(text)


def _first(texts: list[str], separator: str) -> str:
    return separator.join(texts[:SHOWN] + ["..."] * (len(texts) > SHOWN))
