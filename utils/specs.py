"""What a checkpoint, an export and a record say of a network. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

CALIBRATORS = ("sqnr", "entropy", "percentile", "mse", "max")
"""How activation ranges are found (`utils.quantization.calibrate`); the first is the default.
`benchmarks/calibrators.py` compares them."""

MAX_SEED = 2**32 - 1
"""A million times it, as an epoch's seed is, is a seed that torch takes."""

MOST_IMAGES = 10**9

STEMS = ("imagenet", "cifar")
OWN_STEM = "own"
"""What a network from elsewhere has: `--stem` is for the built-in ones."""
MAX_SIZE = 4096
"""Of an image's height and width in pixels."""


def height_width(size: int | Sequence[int]) -> list[int]:
    """The two sides of an image; one number means a square."""
    sides = list(size) if isinstance(size, Iterable) else [size]  # NumPy has numbers of its own
    return sides * 2 if len(sides) == 1 else sides


def is_foreign(name: str) -> bool:
    """Whether a network is from elsewhere: torchvision/NAME, timm/NAME, package.module:callable."""
    return "/" in name or runs_code(name)


def runs_code(name: str) -> bool:
    """Whether to build a network of that name runs a module's code: package.module:callable."""
    return ":" in name


@dataclass(frozen=True)
class NetworkSpec:
    """Enough to build the float network: its name, stem and number of classes.

    The name is one of `models.MODELS`, or that of a network from elsewhere (`models.foreign`).
    """

    name: str
    stem: str
    num_classes: int

    def __post_init__(self) -> None:
        stems = (OWN_STEM,) if is_foreign(self.name) else STEMS
        if self.stem not in stems or self.num_classes < 1:
            raise ValueError(f"there is no network {self} of {self.num_classes} classes")

    def __str__(self) -> str:
        return f"{self.name} ({self.stem} stem)"


@dataclass(frozen=True)
class DataSpec:
    """The images that a network was trained on, and how it sees them.

    Args:
        img_size: height and width in pixels; one number for a square.
        digest: tells these images from any others (`dataset.ImageData.digest`).
        split_seed: draws the val part from the train images.
        mean, std: of each channel, in units of the full range (0..1).
    """

    dataset: str
    img_size: int | list[int]
    classes: list[str]
    split_seed: int
    mean: list[float]
    std: list[float]
    digest: str | None = None

    def __post_init__(self) -> None:
        numbers = [*self.mean, *self.std]
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, numbers)):
            raise ValueError("mean and std are not three finite numbers each")
        if min(self.std) <= 0:
            raise ValueError("a std is not above 0")
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes are none, or two have one name")
        # frozen, but one form is enough for whoever reads it
        object.__setattr__(self, "img_size", height_width(self.img_size))
        if len(self.img_size) != 2 or not all(1 <= side <= MAX_SIZE for side in self.img_size):
            raise ValueError(f"img_size {self.img_size} cannot be")
        if not 0 <= self.split_seed <= MAX_SEED:
            raise ValueError(f"split_seed {self.split_seed} cannot be")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return tuple(self.img_size)


@dataclass(frozen=True)
class Quantization:
    """Which layers are quantized and how their ranges are found.

    Args:
        quant_layers, skip_layers: glob patterns of layers' names.
        calibrator: one of `CALIBRATORS`.
        calib_images: how many train images calibrate.
    """

    quant_layers: list[str] = field(default_factory=lambda: ["*"])
    skip_layers: list[str] = field(default_factory=list)
    calibrator: str = CALIBRATORS[0]
    calib_images: int = 1024

    def __post_init__(self) -> None:
        if self.calibrator not in CALIBRATORS:
            raise ValueError(f"calibrator {self.calibrator!r}: one of {', '.join(CALIBRATORS)}")
        if not 1 <= self.calib_images <= MOST_IMAGES:
            raise ValueError(f"calib_images {self.calib_images}: 1 to {MOST_IMAGES} images")


@dataclass(frozen=True)
class CodeUse:
    """A range of a quantized layer, and how its INT8 codes are used.

    Args:
        operand: which it is of: "input", "weight", "x", "other" or "factor".
        smallest, largest: of the range; they differ where each channel has its own.
        clipped_pct: values beyond the range, which get its last code.
        used_pct: codes that occur, of -127..127 or, where nothing is negative, of 0..127; of as
            many as there are values where these are fewer.
        histogram: share of the values in each sixteenth of the codes -128..127.
    """

    operand: str
    smallest: float
    largest: float
    clipped_pct: float
    used_pct: float
    histogram: list[float]


@dataclass(frozen=True)
class LayerFacts:
    """A layer of a network that has INT8 layers.

    Args:
        kind: its float form's, as "Conv2d".
        int8: whether it is quantized.
        macs, reads, writes: multiply-adds, values read and values written for one image.
        parameters: values of its weight.
        ranges: none where it is float.
    """

    name: str
    kind: str
    int8: bool
    macs: int
    reads: int
    writes: int
    parameters: int
    ranges: list[CodeUse] = field(default_factory=list)
