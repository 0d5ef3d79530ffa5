"""scikit-learn's handwritten digits (Alpaydin and Kaynak, 1998): 1,797 images, no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEST_STRIDE = 5
SCALE = 4
"""8x8 pixels -> 32x32."""


def missing(data_dir: Path) -> str:
    """Says that they are not installed, wherever `data_dir` is; "" if they are."""
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError:
        return "scikit-learn, which holds the digits, is not installed"
    return ""


def load(
    data_dir: Path, size: tuple[int, int], test_only: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Train images, train labels, test images, test labels, class names; (N, 32, 32, 3) uint8.

    The archive has no official split: every fifth image is a test image. It is ordered by writer,
    13 writers in all, so both parts hold all of them.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 levels of grey, (N, 8, 8) -> (N, 32, 32) -> (N, 32, 32, 3)
    gray = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    gray = gray.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    images = gray[..., None].repeat(3, axis=3)
    labels = bunch.target.astype(np.int64)
    test = np.arange(len(labels)) % TEST_STRIDE == 0
    classes = tuple(str(name) for name in bunch.target_names)
    return images[~test], labels[~test], images[test], labels[test], classes
