"""Accuracy and speed of any network that maps a batch of images to logits. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

EVALUATION_BATCH = 128
WARM_UP_RUNS, MIN_RUNS, MIN_SECONDS = 5, 30, 1.0
BURST = 20  # runs that a GPU's events time back to back, so that it never waits for the host
PASSES = 5  # over the test set, for the end-to-end throughput


class Network:
    """A back end's network: raw images (N, H, W, 3) uint8 -> logits (N, classes) float32, both on the host."""

    name: str
    path: Path
    """The file it was loaded from."""
    layers: Sequence[Any] = ()
    """What it runs, where the back end can tell (TensorRT)."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Logits of each batch, in order; back ends that can work on several at a time do."""
        return map(self, batches)

    def latencies_ms(self, images: np.ndarray) -> np.ndarray:
        """Times of single runs over one batch in ms, at least 30 and 1 s of them, after a warm-up.

        Here wall-clock time, from images to logits on the host; a GPU's back end counts its device time alone.
        """

        def once() -> list[float]:
            start = time.perf_counter()
            self(images)
            return [1000 * (time.perf_counter() - start)]

        return repeated_ms(once)


def repeated_ms(burst: Callable[[], Sequence[float]]) -> np.ndarray:
    """Times in ms that `burst` measures, called until there are enough of them; those of the first calls do not count."""
    for _ in range(WARM_UP_RUNS):
        burst()
    times: list[float] = []
    while len(times) < MIN_RUNS or sum(times) < 1000 * MIN_SECONDS:
        times += burst()
    return np.asarray(times)


def predict(network: Network, images: np.ndarray, batch_size: int, what: str = "") -> np.ndarray:
    """Predicted classes (N,) int64 of images (N, H, W, 3) uint8, under a progress bar if it is named by `what`."""
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    logits = network.stream(batches)
    total = -(-len(images) // batch_size)
    return np.concatenate(
        [
            part.argmax(1)
            for part in tqdm(logits, what, total, False, unit="batch", disable=not what)
        ]
    )


def end_to_end_img_s(network: Network, images: np.ndarray, batch_size: int) -> float:
    """Images per second from the host's images to the host's labels: the median of several passes, after one to warm up."""
    times = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        predict(network, images, batch_size)
        times.append(time.perf_counter() - start)
    return len(images) / float(np.median(times[1:]))


def percent_equal(a: np.ndarray, b: np.ndarray) -> float:
    """Share of equal elements, in percent."""
    return 100 * float((a == b).mean())
