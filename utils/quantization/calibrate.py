"""Find the ranges of a quantized network from images.

Weights: the largest magnitude of each output channel. Activations: one range for the tensor, from
the magnitudes |x| that flow by in the float network, by one of five methods:

    max         the largest |x|
    percentile  the 99.99th percentile of |x|
    entropy     the range that keeps the histogram of |x| most alike, by Kullback-Leibler divergence
                (Migacz, "8-bit inference with TensorRT", GTC 2017)
    mse         the range of the least squared rounding error
    sqnr        the range of the least squared rounding error relative to the squared values, image
                by image and then averaged: in deep networks a few images have activations far
                larger than all others, which alone decide a sum

All but "max" go over the images twice: the second pass counts |x| between 0 and the largest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from pytorch_quantization.calib import HistogramCalibrator
from torch import Tensor, nn
from tqdm import tqdm

from layers.quantizers import CODE_MAX, Quantizer
from utils.errors import UserError
from utils.quantization.watch import run_on
from utils.specs import CALIBRATORS

VALUES_AT_A_TIME = 1 << 23
"""histc counts in float32, which is exact up to 2 ** 24."""

PERCENTILE = 99.99
HISTOGRAM_BINS = 2048
ENTROPY_STRIDE = 32
"""Histogram bins between two candidate ranges; at 1 the library needs seconds for each layer."""

CANDIDATES = 2 ** torch.linspace(-10, 0, 61)
"""The ranges that "mse" and "sqnr" try, as shares of the largest magnitude."""
OCTAVES = 20
BINS_PER_OCTAVE = 128
BINS = OCTAVES * BINS_PER_OCTAVE
"""Bins of magnitudes for "mse" and "sqnr": see `_RoundingError`."""


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], method: str = CALIBRATORS[0]) -> None:
    """Set every range of `model`; its weights and BatchNorm statistics stay as they are.

    Args:
        batches: normalised images (B, C, H, W), or (images, labels) as a DataLoader serves them.
            All are kept in memory for a second pass: a thousand images are enough.
        method: one of `utils.specs.CALIBRATORS`.

    Raises:
        UserError: no such method, no images or what is none, images that are bytes, nothing to
            calibrate, a quantizer that is switched off, or an activation that was not finite or
            never computed. Ranges are then what they were.
    """
    if method not in CALIBRATORS:
        raise UserError(f"no calibration {method!r}; there are {', '.join(CALIBRATORS)}")
    # a tensor is one batch
    batches = [batches] if isinstance(batches, Tensor) else batches
    batches = [_images_of(batch) for batch in batches]
    if not batches:
        raise UserError("there are no images to calibrate with")
    quantizers = _quantizers(model)
    if not quantizers:
        raise UserError("there is nothing to calibrate: call quantize_modules first")
    _require_switched_on(quantizers)
    try:
        _find_ranges(model, batches, quantizers, method)
        for quantizer in tqdm(quantizers.values(), f"calibrate ({method})", leave=False):
            quantizer.set_range(quantizer._calibrator.compute_amax())
    finally:
        for quantizer in quantizers.values():
            quantizer.disable_calib()
            quantizer.enable_quant()
            quantizer._calibrator = None


def _images_of(batch: Any) -> Tensor:
    """The images of a batch that may have labels, too; raises UserError if they are none."""
    if isinstance(batch, Mapping):
        raise UserError("calibration takes images, or (images, labels), and no dictionaries")
    images = batch
    if not isinstance(batch, Tensor):
        with suppress(TypeError, IndexError, KeyError):
            images = batch[0]
    if not isinstance(images, Tensor) or not images.is_floating_point() or len(images) == 0:
        what = "float tensors (B, C, H, W), with their mean at about 0"
        raise UserError(f"calibration needs normalised images: {what}")
    return images


def _find_ranges(
    model: nn.Module, batches: list[Tensor], quantizers: dict[str, Quantizer], method: str
) -> None:
    """Leave each quantizer a calibrator that knows its range."""
    activations = [found for found in quantizers.values() if not found.is_weight]

    # first pass, in float: the largest magnitudes, which are all that weights and "max" need
    for quantizer in quantizers.values():
        quantizer._calibrator = _Largest(quantizer.axis)
        quantizer.disable_quant()
    _collect(model, batches, activations)
    # afterwards, as a hook may compute a weight in each run
    for module in model.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer._calibrator.collect(module.weight)
    for name, quantizer in quantizers.items():
        _require_finite(name, quantizer._calibrator.compute_amax())

    # second pass: how the activations are spread below them
    if method != "max":
        for quantizer in activations:
            largest = quantizer._calibrator.compute_amax()
            quantizer._calibrator = COUNTERS[method](largest, method)
        _collect(model, batches, activations)


def _quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Name -> quantizer of everything that has a range to be set."""
    return {name: child for name, child in model.named_modules() if isinstance(child, Quantizer)}


def _require_finite(name: str, amax: Tensor | None) -> None:
    if amax is None:
        why = "the model does not call its layer, or keeps it in a list that is no nn.ModuleList"
        raise UserError(f"{name} was never computed: {why}")
    if not torch.isfinite(amax).all():
        raise UserError(f"{name} met values that are not finite: weights or images are broken")


def _collect(model: nn.Module, batches: Iterable[Tensor], quantizers: Iterable[Quantizer]) -> None:
    """Run the float model over the images while the quantizers' calibrators look on."""
    for quantizer in quantizers:
        quantizer.enable_calib()
    for images in tqdm(batches, desc="calibrate", unit="batch", leave=False):
        run_on(model, images)


class _Largest:
    """The largest |x|: of an activation, or of each output channel of a weight.

    The library's own reads x once for each dimension, and waits for the device each time.

    Args:
        axis: where a weight has its output channels.
    """

    def __init__(self, axis: int | None):
        self.axis = axis
        self.largest: Tensor | None = None

    def collect(self, x: Tensor) -> None:
        if self.axis is None:
            low, high = x.aminmax()
        else:
            channels = x.movedim(self.axis, 0).flatten(1)
            low, high = channels.aminmax(dim=1)
        # NaN, if one is
        found = torch.maximum(-low, high)
        self.largest = found if self.largest is None else torch.maximum(self.largest, found)

    def compute_amax(self) -> Tensor | None:
        """None if nothing was seen."""
        return self.largest


class _Histogram:
    """Counts |x| in bins of equal width up to its largest value, for "percentile" and "entropy".

    The library's own histogram grows with the values that it sees, and fails if the first are
    zeros. Its search for the range is taken as it is, but begins where a candidate keeps any value.
    """

    def __init__(self, largest: Tensor, method: str):
        self.largest = largest
        self.method = method
        self.counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64, device=largest.device)

    def collect(self, x: Tensor) -> None:
        upper = float(self.largest) or 1.0  # waits for the device
        for values in x.abs().float().flatten().split(VALUES_AT_A_TIME):
            self.counts += torch.histc(values, HISTOGRAM_BINS, 0, upper).long()

    def compute_amax(self) -> Tensor:
        """The range; 0 if all values are."""
        counts = self.counts.cpu().numpy().tobytes()
        return self.largest.new_tensor(_library_amax(counts, float(self.largest), self.method))


# a block's first convolution, its shortcut and its addition see the same values
@functools.lru_cache(maxsize=8)
def _library_amax(counts: bytes, largest: float, method: str) -> float:
    if largest == 0:
        return 0.0
    calibrator = HistogramCalibrator(num_bits=8, axis=None, unsigned=False)
    # an array, as tensors would become 32-bit integers, which many large images overflow; a copy,
    # as the search by entropy writes into it
    calibrator._calib_hist = np.frombuffer(counts, np.int64).copy()
    calibrator._calib_bin_edges = np.linspace(0, largest, HISTOGRAM_BINS + 1)
    if method == "percentile":
        return float(calibrator.compute_amax(method, percentile=PERCENTILE))
    # The library takes a divergence of NaN for the least. That is one of a range below all values,
    # where zeros do not count: it overwrites bin 0 with bin 1.
    filled = 1 + int(np.flatnonzero(calibrator._calib_hist[1:])[0])
    first = max(CODE_MAX + 1, ENTROPY_STRIDE * math.ceil((filled + 1) / ENTROPY_STRIDE))
    return float(calibrator.compute_amax(method, stride=ENTROPY_STRIDE, start_bin=first))


class _RoundingError:
    """Squared rounding error of every candidate range, for "mse" and "sqnr".

    To round every activation with every candidate would be 61 passes over memory. Instead its
    magnitude v, as share of the largest one, is counted in bins so small that the values in one bin
    have about the same error; then

        error of a candidate = sum over bins of (count in the bin) * (mean error in the bin)

    is one matrix product. How small? Candidate c rounds to steps of c / 127, and c goes down to
    2^-10. Bins of equal width would have to suit the finest of these steps everywhere. But what
    lies beyond c is clipped, with the smooth error (v - c)^2, so only bins below c must be about as
    fine as c / 127. Bins of 1/128 of an octave are: those below c are at most c / 128 wide.

    They are found without a logarithm. A float32 v >= 0 is, from its highest bit down, a 0, 8 bits
    of exponent (floor(log2 v) + 127) and 23 bits of mantissa. So its upper 16 bits, read as an
    integer, count the 1/128 octaves from below:

        bits(v) >> 16  =  128 * (floor(log2 v) + 127)  +  the upper 7 bits of the mantissa

    `BINS` of them reach from 2^-20 to 1. What is smaller is left out: the finest candidate's half
    step is 2^-18, so all of them make it 0, an error that is the same for all.
    """

    def __init__(self, largest: Tensor, method: str):
        self.largest = largest
        self.relative = method == "sqnr"
        self.errors = torch.zeros(len(CANDIDATES), device=largest.device)

    def collect(self, x: Tensor) -> None:
        errors, squares = _errors_of_bins(x.device)
        x = torch.atleast_2d(x).flatten(1)  # (N, values)
        for images in x.split(max(1, VALUES_AT_A_TIME // max(x.shape[1], BINS))):
            shares = images.abs().float()
            shares /= self.largest.clamp_min(1e-30)
            counts = _count(shares)  # (n, BINS)
            found = errors @ counts.T  # (candidates, n)
            if self.relative:
                found = found / (counts @ squares).clamp_min(1e-30)
            self.errors += found.sum(1)

    def compute_amax(self) -> Tensor:
        best = self.errors.argmin()
        return CANDIDATES.to(self.largest.device)[best] * self.largest


_FIRST_BIN = (127 - OCTAVES) * BINS_PER_OCTAVE
"""The upper 16 bits of 2^-OCTAVES."""


def _count(shares: Tensor) -> Tensor:
    """(n, values) in 0..1 -> (n, BINS) float32: how many values of each image lie in each bin.

    `shares` is used up: memory is what this takes its time for.
    """
    bins = shares.view(torch.int32)
    bins >>= 16
    # column 0 is for what is too small, 1..BINS are the bins; 1 itself belongs to the last one
    bins -= _FIRST_BIN - 1
    bins.clamp_(0, BINS)
    # one count over all images: each has its own BINS + 1 numbers
    image = torch.arange(len(bins), device=bins.device, dtype=torch.int32)[:, None]
    bins += image * (BINS + 1)
    counts = torch.bincount(bins.flatten(), minlength=len(bins) * (BINS + 1))
    return counts.view(len(bins), -1)[:, 1:].float()


@functools.lru_cache(maxsize=1)
def _errors_of_bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean squared rounding error by each candidate (candidates, BINS), mean square (BINS,)."""
    # a bin's lower edge has 16 zero bits below its number
    numbers = torch.arange(_FIRST_BIN, _FIRST_BIN + BINS + 1, dtype=torch.int32, device=device)
    edges = (numbers << 16).view(torch.float32)
    # eight values spread evenly in each bin stand for all: (8, BINS)
    places = (torch.arange(8, device=device)[:, None] + 0.5) / 8
    values = edges[:-1] + edges.diff() * places
    # round them with each candidate's step: (candidates, 8, BINS)
    steps = CANDIDATES.to(device)[:, None, None] / CODE_MAX
    rounded = (values / steps).round().clamp_max(CODE_MAX) * steps
    return (rounded - values).square().mean(1), values.square().mean(0)


COUNTERS = {
    "percentile": _Histogram,
    "entropy": _Histogram,
    "mse": _RoundingError,
    "sqnr": _RoundingError,
}
"""What counts |x| in the second pass of each method that has one."""


def require_calibrated(model: nn.Module) -> None:
    """Raises UserError if a range of `model` was never set, or a quantizer is switched off."""
    quantizers = _quantizers(model)
    missing = [name for name, found in quantizers.items() if not found.calibrated]
    if missing:
        raise UserError(f"{len(missing)} ranges are not calibrated, the first is {missing[0]}")
    _require_switched_on(quantizers)


def _require_switched_on(quantizers: Mapping[str, Quantizer]) -> None:
    off = [name for name, found in quantizers.items() if not found.switched_on]
    if off:
        raise UserError(f"{off[0]} is switched off: switch it on, or name its layer in skip_layers")
