"""Accuracy and latency of any network that maps a NumPy batch to logits. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

Network = Callable[[np.ndarray], np.ndarray]
"""Images (N, 3, H, W) float32 normalised -> logits (N, classes), on the host."""

EVALUATION_BATCH = 128
WARM_UP_RUNS, MIN_RUNS, MIN_SECONDS = 5, 30, 1.0


def predict(network: Network, images: np.ndarray, normalise: Callable[[np.ndarray], np.ndarray], what: str) -> np.ndarray:
    """Predicted classes (N,) int64 of uint8 images (N, H, W, 3), under a progress bar named `what`."""
    predictions = np.empty(len(images), dtype=np.int64)
    starts = range(0, len(images), EVALUATION_BATCH)
    for start in tqdm(starts, desc=what, unit="batch", leave=False):
        chosen = slice(start, start + EVALUATION_BATCH)
        predictions[chosen] = network(normalise(images[chosen])).argmax(1)
    return predictions


def percent_equal(a: np.ndarray, b: np.ndarray) -> float:
    """Share of equal elements, in percent."""
    return 100 * float((a == b).mean())


def latencies_ms(network: Network, batch: np.ndarray) -> np.ndarray:
    """Wall-clock times of single calls in ms, host array in, host array out, after a warm-up: at least 30 and 1 s."""
    for _ in range(WARM_UP_RUNS):
        network(batch)
    times: list[float] = []
    while len(times) < MIN_RUNS or sum(times) < MIN_SECONDS:
        start = time.perf_counter()
        network(batch)
        times.append(time.perf_counter() - start)
    return 1000 * np.asarray(times)
