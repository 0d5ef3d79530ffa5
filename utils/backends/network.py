"""The one interface of every back end, and how its accuracy and speed are measured. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.manifest import INPUT, OUTPUT
from utils.records import Layer

EVALUATION_BATCH = 128

WARM_UP_RUNS = 5
MIN_RUNS = 30
MIN_SECONDS = 1.0

BURST = 20
"""Runs that are timed one after the other: a GPU's by events, so that it never waits for the host,
and those that time single layers."""

PASSES = 5
"""Over the test set, for the end-to-end throughput."""


class Network:
    """A network on a back end: images (N, H, W, 3) uint8 -> logits (N, classes) float32.

    Both are on the host. What a back end cannot tell has a default here, so no caller needs to
    know which one it holds.
    """

    name: str
    """The back end's, in tables and records."""

    path: Path | None = None
    """The file that it was loaded from, if it was one."""

    layers: Sequence[Layer] = ()
    """What it runs, where the back end can tell."""

    evaluation_batch: int = EVALUATION_BATCH
    """Images at a time when a whole test set is evaluated."""

    device_time: bool = False
    """Whether `latencies_ms` counts the device alone: the throughput from host to host is then a
    figure of its own."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Logits of each batch, in order; a back end may work on several batches at a time."""
        return map(self, batches)

    def latencies_ms(self, images: np.ndarray) -> np.ndarray:
        """Times (runs,) of single runs over one batch, as many as `repeated_ms` makes.

        Here they are wall-clock times, from images to logits on the host.
        """

        def once() -> list[float]:
            start = time.perf_counter()
            self(images)
            return [1000 * (time.perf_counter() - start)]

        return repeated_ms(once)

    def layer_times_ms(self) -> list[float | None]:
        """The time of each of `layers`, None where it is not known."""
        return [None for _ in self.layers]

    def float_nodes(self, nodes: Iterable[str]) -> list[str]:
        """Those of the graph's `nodes`, all meant to run in INT8, that are not seen to do so.

        Here that is none of them: the back end does not tell what it runs.
        """
        return list(nodes)


def require_ends(path: Path, ends: list[tuple[str, str, int]], types: tuple[str, str]) -> None:
    """Raises UserError unless a file's graph turns images into logits.

    Args:
        ends: name, type and number of dimensions of each input and output.
        types: how the back end calls uint8 and float32.
    """
    expected = [(INPUT, types[0], 4), (OUTPUT, types[1], 2)]
    if ends != expected:
        raise UserError(f"{path}: it has {ends}, not {expected}; export it again")


def repeated_ms(burst: Callable[[], Sequence[float]]) -> np.ndarray:
    """Times (runs,) that `burst` measures: at least 30 and 1 s of them, after a warm-up."""
    for _ in range(WARM_UP_RUNS):
        burst()
    times_ms: list[float] = []
    while len(times_ms) < MIN_RUNS or sum(times_ms) < 1000 * MIN_SECONDS:
        times_ms += burst()
    return np.asarray(times_ms)


def repeated(images: np.ndarray, count: int) -> np.ndarray:
    """The first `count` images, over and over where there are fewer; contiguous."""
    return np.ascontiguousarray(images[np.arange(count) % len(images)])


def predict(network: Network, images: np.ndarray, batch_size: int, what: str = "") -> np.ndarray:
    """Predicted classes (N,) int64 of images (N, H, W, 3) uint8.

    Args:
        what: label of the progress bar; there is none without it.
    """
    starts = range(0, len(images), batch_size)
    batches = (images[start : start + batch_size] for start in starts)
    logits = network.stream(batches)
    bar = tqdm(logits, what, len(starts), leave=False, unit="batch", disable=not what)
    return np.concatenate([batch_logits.argmax(1) for batch_logits in bar])


def end_to_end_img_s(network: Network, images: np.ndarray, batch_size: int) -> float:
    """Images per second from images to labels, both on the host: the median of several passes."""
    if len(images) < batch_size:
        images = repeated(images, batch_size)
    times_s = []
    for _ in range(1 + PASSES):
        start = time.perf_counter()
        predict(network, images, batch_size)
        times_s.append(time.perf_counter() - start)
    # the first pass warms up
    return len(images) / float(np.median(times_s[1:]))
