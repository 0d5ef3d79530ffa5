"""Find the ranges of a quantized model from images: the weights' from the weights, the activations' from what flows by."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
from pytorch_quantization.calib import HistogramCalibrator, MaxCalibrator
from torch import Tensor, nn
from tqdm import tqdm

from layers.quantizers import CODE_MAX, Quantizer
from utils.errors import UserError

PERCENTILE = 99.99
BINS = 2048
ENTROPY_STRIDE = (
    32  # histogram bins between two candidate ranges; at 1 the library needs seconds for each layer
)
CANDIDATES = 2 ** torch.linspace(-10, 0, 61)  # ranges to try, as shares of the largest magnitude
OCTAVES, OCTAVE = (
    20,
    128,
)  # octaves below the largest magnitude, of less all candidates make 0; bins in each
FIRST = (
    127 - OCTAVES
) * OCTAVE  # the upper 16 bits of 2 ** -OCTAVES in float32: its exponent and 7 bits of its mantissa
PART = 1 << 23  # values counted at a time: float32, in which histc counts, is exact up to 2 ** 24


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], method: str) -> None:
    """Set every range of `model`; its weights and BatchNorm statistics stay as they are.

    Weights: the largest magnitude of each output channel. Activations: one range for the tensor, from |x|. "max" takes the
    largest, "percentile" the 99.99th percentile, "entropy" the range with the least Kullback-Leibler divergence (Migacz,
    "8-bit inference with TensorRT", GTC 2017), "mse" that with the least squared rounding error, and "sqnr" that with the
    least ratio of this error to the squared values themselves, image by image and then averaged: in deep networks a few
    images have activations far larger than all others, which alone decide a sum. All but "max" go over the images twice.

    Args:
        batches: normalised images (B, 3, H, W) on the model's device.
        method: one of utils.flags.CALIBRATORS.

    Raises:
        UserError: an activation was not finite or never computed.
    """
    batches = list(batches)
    quantizers = {
        name: module for name, module in model.named_modules() if isinstance(module, Quantizer)
    }
    activations = {
        name: quantizer for name, quantizer in quantizers.items() if quantizer.axis is None
    }
    for quantizer in quantizers.values():
        quantizer._calibrator = MaxCalibrator(num_bits=8, axis=quantizer.axis, unsigned=False)
        quantizer.disable_quant()
    for module in model.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer._calibrator.collect(module.weight)
    _collect(model, batches, activations.values())
    largest = {name: quantizer._calibrator.compute_amax() for name, quantizer in quantizers.items()}
    for name, amax in largest.items():
        if amax is None or not torch.isfinite(amax).all():
            raise UserError(
                f"calibration of {name} found no finite value: the model's weights or the images are broken"
            )
    if method != "max":
        for name, quantizer in activations.items():
            quantizer._calibrator = (_Noise if method in ("sqnr", "mse") else _Histogram)(
                largest[name], method
            )
        _collect(model, batches, activations.values())
    for quantizer in tqdm(
        quantizers.values(), desc=f"calibrate ({method})", unit="range", leave=False
    ):
        quantizer.set_range(quantizer._calibrator.compute_amax())
        quantizer.enable_quant()
        quantizer._calibrator = None


def _collect(model: nn.Module, batches: Iterable[Tensor], quantizers: Iterable[Quantizer]) -> None:
    """Run the float model over the images while the quantizers' calibrators look on."""
    training = model.training
    model.eval()
    for quantizer in quantizers:
        quantizer._if_calib = True
    for images in tqdm(batches, desc="calibrate", unit="batch", leave=False):
        model(images)
    for quantizer in quantizers:
        quantizer._if_calib = False
    model.train(training)


class _Histogram:
    """Counts |x| up to its largest value, which is known; a range by "percentile" or "entropy".

    The library's own histogram grows with the values it sees, and fails if the first are zeros.
    """

    def __init__(self, largest: Tensor, method: str):
        self.largest, self.method = largest, method
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=largest.device)

    def collect(self, x: Tensor) -> None:
        upper = float(self.largest) or 1.0  # waits for the device
        for part in x.abs().float().flatten().split(PART):
            self.counts += torch.histc(part, BINS, 0, upper).long()

    def compute_amax(self) -> Tensor:
        """The range; 0 if all values are."""
        return self.largest.new_tensor(
            _library_amax(self.counts.cpu().numpy().tobytes(), float(self.largest), self.method)
        )


@functools.lru_cache(
    maxsize=8
)  # a block's first convolution, its downsampling and its addition see the same values
def _library_amax(counts: bytes, largest: float, method: str) -> float:
    if largest == 0:
        return 0.0
    calibrator = HistogramCalibrator(num_bits=8, axis=None, unsigned=False)
    # tensors would become 32-bit integers, which large images overflow; the search by entropy writes into its counts
    calibrator._calib_hist = np.frombuffer(counts, np.int64).copy()
    calibrator._calib_bin_edges = np.linspace(0, largest, BINS + 1)
    options = {"percentile": PERCENTILE} if method == "percentile" else {"stride": ENTROPY_STRIDE}
    return float(calibrator.compute_amax(method, **options))


@functools.lru_cache(maxsize=1)
def _bin_errors(device: torch.device) -> tuple[Tensor, Tensor]:
    """Squared rounding error by each candidate (candidates, bins), and square (bins,), of values spread evenly in each bin."""
    edges = (
        torch.arange(FIRST, FIRST + OCTAVES * OCTAVE + 1, dtype=torch.int32, device=device) << 16
    ).view(torch.float32)
    values = (
        edges[:-1] + edges.diff() * (torch.arange(8, device=device)[:, None] + 0.5) / 8
    )  # (8, bins)
    steps = CANDIDATES.to(device)[:, None, None] / CODE_MAX
    errors = ((values / steps).round().clamp_max(CODE_MAX) * steps - values).square()
    return errors.mean(1), values.square().mean(0)


class _Noise:
    """Sums the squared rounding error of each candidate range: all images' alike ("mse") or relative to each ("sqnr").

    From |x| as share of its largest value, counted in bins as wide as the values are large.
    """

    def __init__(self, largest: Tensor, method: str):
        self.largest, self.relative = largest, method == "sqnr"
        self.noise = torch.zeros(len(CANDIDATES), device=largest.device)

    def collect(self, x: Tensor) -> None:
        errors, squares = _bin_errors(x.device)
        x = x.flatten(1)
        for images in x.split(max(1, PART // x.shape[1])):
            share = images.abs().float() / self.largest.clamp_min(1e-30)
            bins = ((share.view(torch.int32) >> 16) - FIRST + 1).clamp_(
                0, OCTAVES * OCTAVE
            )  # bin 0: zeros
            image = torch.arange(len(images), device=x.device, dtype=torch.int32)[:, None] * (
                OCTAVES * OCTAVE + 1
            )
            counts = torch.bincount(
                (bins + image).flatten(), minlength=len(images) * (OCTAVES * OCTAVE + 1)
            )
            counts = counts.view(len(images), -1)[:, 1:].float()
            noise = errors @ counts.T  # (candidates, images)
            if self.relative:
                noise = noise / (counts @ squares).clamp_min(1e-30)
            self.noise += noise.sum(1)

    def compute_amax(self) -> Tensor:
        return CANDIDATES.to(self.largest.device)[self.noise.argmin()] * self.largest


def require_calibrated(model: nn.Module) -> None:
    """Raises UserError if a range of `model` was never set."""
    missing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Quantizer) and not module.calibrated
    ]
    if missing:
        raise UserError(f"{len(missing)} ranges are not calibrated, the first is {missing[0]}")
