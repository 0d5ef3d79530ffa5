"""Find the ranges of a quantized model from images: the weights' from the weights, the activations' from what flows by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pytorch_quantization.calib import HistogramCalibrator, MaxCalibrator
from torch import Tensor, nn
from tqdm import tqdm

from layers.quantizers import CODE_MAX, Quantizer
from utils.errors import UserError

PERCENTILE = 99.99
BINS = 2048
HISTC_VALUES = 1 << 23  # histc counts in float32, exact up to 2 ** 24
ENTROPY_STRIDE = 32  # histogram bins between two candidate ranges; at 1 the library needs seconds for each layer


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], method: str) -> None:
    """Set every range of `model`; its weights and BatchNorm statistics stay as they are.

    Weights: the largest magnitude of each output channel. Activations, one range for the tensor, from |x|: its maximum,
    its 99.99th percentile, the range with the least mean squared rounding error, or with the least Kullback-Leibler
    divergence (Migacz, "8-bit inference with TensorRT", GTC 2017). All but the first go over the images twice.

    Args:
        batches: normalised images (B, 3, H, W) on the model's device.
        method: one of utils.flags.CALIBRATORS.

    Raises:
        UserError: an activation was not finite or never computed.
    """
    batches = list(batches)
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}
    activations = {name: quantizer for name, quantizer in quantizers.items() if quantizer.axis is None}
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
            raise UserError(f"calibration of {name} found no finite value: the model's weights or the images are broken")
    if method != "max":
        for name, quantizer in activations.items():
            quantizer._calibrator = _Histogram(largest[name])
        _collect(model, batches, activations.values())
    known: dict[bytes, Tensor] = {}  # a block's first convolution, its downsampling and its addition see the same values
    for name, quantizer in tqdm(quantizers.items(), desc=f"calibrate ({method})", unit="range", leave=False):
        amax = largest[name]
        if isinstance(quantizer._calibrator, _Histogram):
            seen = quantizer._calibrator.counts.cpu().numpy().tobytes() + amax.cpu().numpy().tobytes()
            if seen not in known:
                known[seen] = quantizer._calibrator.amax(method)
            amax = known[seen]
        quantizer.set_range(amax)
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
    """Counts |x| up to its largest value, which is known.

    The library's own histogram grows with the values it sees, and fails if the first are zeros.
    """

    def __init__(self, largest: Tensor):
        self.largest, self.counts = largest, torch.zeros(BINS, dtype=torch.int64, device=largest.device)

    def collect(self, x: Tensor) -> None:
        upper = float(self.largest) or 1.0  # waits for the device
        for part in x.abs().float().flatten().split(HISTC_VALUES):
            self.counts += torch.histc(part, BINS, 0, upper).long()

    def amax(self, method: str) -> Tensor:
        """The range by "percentile", "mse" or "entropy"; 0 if all values are."""
        edges = torch.linspace(0, 1, BINS + 1, device=self.counts.device) * self.largest
        if self.largest == 0:
            return self.largest
        if method == "mse":
            return _least_squares_amax(self.counts, edges)
        calibrator = HistogramCalibrator(num_bits=8, axis=None, unsigned=False)
        # tensors would become 32-bit integers, which large images overflow; the search by entropy writes into its counts
        calibrator._calib_hist, calibrator._calib_bin_edges = self.counts.cpu().numpy().copy(), edges.cpu().numpy()
        options = {"percentile": PERCENTILE} if method == "percentile" else {"stride": ENTROPY_STRIDE}
        return calibrator.compute_amax(method, **options)


def _least_squares_amax(counts: Tensor, edges: Tensor) -> Tensor:
    """The bin centre that as range gives the least squared error. The library's own search insists on a GPU.

    Args:
        counts: (bins,) how many |x| fell into each bin; edges: (bins + 1,).
    """
    centres = (edges[1:] + edges[:-1]) / 2
    candidates = centres[CODE_MAX + 1 :, None]  # (candidates, 1): a smaller range would be finer than the bins
    scale = candidates / CODE_MAX
    rounded = (centres / scale).round().clamp_max(CODE_MAX) * scale  # (candidates, bins)
    errors = ((rounded - centres).square() * counts).sum(1)
    return candidates[errors.argmin(), 0]


def require_calibrated(model: nn.Module) -> None:
    """Raises UserError if a range of `model` was never set."""
    missing = [name for name, module in model.named_modules() if isinstance(module, Quantizer) and not module.calibrated]
    if missing:
        raise UserError(f"{len(missing)} ranges are not calibrated, the first is {missing[0]}")
