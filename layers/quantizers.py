"""Signed symmetric INT8 fake quantization: `Quantizer` while ranges are found and trained with, `FrozenQuantizer` after.

The scheme is that of Wu et al., "Integer Quantization for Deep Learning Inference" (arXiv:2004.09602): a real value x is
represented by the code clamp(round(x / scale)), scale = amax / 127, round half to even, zero point 0. Weights have one
range for each output channel and codes -127..127; activations one range for the tensor and codes -128..127, as ONNX's
QuantizeLinear saturates them.
"""

from __future__ import annotations

from typing import Any

import absl.logging
import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

absl.logging.set_verbosity(
    absl.logging.FATAL
)  # the library reports every step of calibration as a warning

CODE_MAX = 127
RANGE_FLOOR = 1e-12  # an all-zero channel gets this range instead of a division by zero


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, code_min: int) -> Tensor:
    """Round `x` to the grid `scale * code`, code in `code_min`..127; the gradient passes straight through inside it.

    Args:
        x: any shape.
        scale, zero_point: float32 and int32, both () for the whole tensor or both (C,) for axis 0 of `x`.
    """
    if torch.compiler.is_compiling() or (
        x.is_cuda and scale.ndim
    ):  # torch's own for channels waits for the GPU
        return StraightThrough.apply(x, scale.reshape(-1, *[1] * (x.ndim - 1)), code_min)
    if scale.ndim == 0:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, code_min, CODE_MAX)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, code_min, CODE_MAX)


class StraightThrough(torch.autograd.Function):
    """torch's fake quantization bit for bit, in operations that a compiler fuses into the layers before and after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, code_min: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.code_min = code_min
        values = _codes(x, scale).clamp(code_min, CODE_MAX) * scale
        return (
            values if values.dtype == x.dtype else values.to(x.dtype)
        )  # compiled, `.to` the same type loses the gradient

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes = _codes(*ctx.saved_tensors)
        return gradient * ((codes >= ctx.code_min) & (codes <= CODE_MAX)), None, None


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return torch.round(x.float() * (1 / scale))


class Quantizer(TensorQuantizer):
    """Training form: a `pytorch_quantization` quantizer with torch's own fused fake-quantization kernels.

    The library's class supplies the switches (`enable_calib`, `disable_quant`, ...) and the calibrator hook. Its range
    buffer `_amax` exists here from the start, NaN until calibrated, so that state dicts always have the same keys and a
    checkpoint loads on any device (the library creates the buffer while loading, on the GPU only).

    Args:
        channels: number of output channels for a weight, None for an activation.
    """

    def __init__(self, channels: int | None = None):
        axis = None if channels is None else 0
        super().__init__(QuantDescriptor(num_bits=8, axis=axis, narrow_range=channels is not None))
        shape = () if channels is None else (channels,)
        self.register_buffer("_amax", torch.full(shape, torch.nan))
        self.register_buffer("_zero_point", torch.zeros(shape, dtype=torch.int32), persistent=False)

    @property
    def scale(self) -> Tensor:
        """Step size, () or (channels,)."""
        return self._amax / CODE_MAX

    @property
    def calibrated(self) -> bool:
        return bool(torch.isfinite(self._amax).all())

    def set_range(self, amax: Tensor) -> None:
        """Set the range: `amax` holds one value, or one for each channel, in any shape."""
        self._amax.copy_(amax.detach().reshape(self._amax.shape).clamp_min(RANGE_FLOOR))

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        code_min = -CODE_MAX if self.narrow_range else -CODE_MAX - 1
        return fake_quantize(inputs, self.scale, self._zero_point, code_min)


class FrozenQuantizer(nn.Module):
    """Inference form: one QuantizeLinear / DequantizeLinear pair with a constant scale, nothing of the library left."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(
            x, self.scale, self.zero_point, -CODE_MAX - 1
        )  # weights hold no code -128: see utils.quantization.fold

    def extra_repr(self) -> str:
        granularity = "per-tensor" if self.scale.ndim == 0 else f"per-channel({len(self.scale)})"
        return f"int8 {granularity} scale={self.scale.min():.3g}..{self.scale.max():.3g}"
