"""Signed symmetric INT8 fake quantization: `Quantizer` to train with, `FrozenQuantizer` after.

The scheme is that of Wu et al., "Integer Quantization for Deep Learning Inference"
(arXiv:2004.09602). A range `amax` gives the step size, and a real value x has an INT8 code:

    scale = amax / 127        code = clamp(round(x / scale))        x is about scale * code

Ties round to even and the zero point is 0. Weights have one range for each output channel and codes
-127..127. Activations have one range for the tensor and codes -128..127, as ONNX's QuantizeLinear
saturates them. Fake quantization computes scale * code in float: what an INT8 kernel multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import absl.logging
import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from utils.errors import UserError

# the library reports every step of calibration as a warning
absl.logging.set_verbosity(absl.logging.FATAL)

CODE_MAX = 127
RANGE_FLOOR = 1e-12
"""The range of an all-zero channel, instead of a division by zero."""


def per_channel(values: Tensor, like: Tensor, axis: int = 0) -> Tensor:
    """Values (C,) shaped to go along `axis` of `like`: (C, 1, ...) for 0. NumPy arrays too."""
    return values.reshape(*[1] * axis, -1, *[1] * (like.ndim - axis - 1))


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, code_min: int, axis: int = 0
) -> Tensor:
    """Round `x` to the grid `scale * code`, code in `code_min`..127.

    The gradient passes straight through where the code is inside these limits and is 0 beyond.

    Args:
        x: any shape.
        scale, zero_point: float32 and int32, both () for the whole tensor or both (C,) for `axis`.
    """
    if scale.ndim == 0:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, code_min, CODE_MAX)
    # on a GPU, torch's own kernel for channels waits for the device
    if x.is_cuda:
        return StraightThrough.apply(x, per_channel(scale, x, axis), code_min)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, code_min, CODE_MAX)


class StraightThrough(torch.autograd.Function):
    """torch's fake quantization bit for bit, in plain operations; but NaN stays NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, code_min: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.code_min = code_min
        return (_unclamped_codes(x, scale).clamp(code_min, CODE_MAX) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes = _unclamped_codes(*ctx.saved_tensors)
        inside = (codes >= ctx.code_min) & (codes <= CODE_MAX)
        return gradient * inside, None, None


def _unclamped_codes(x: Tensor, scale: Tensor) -> Tensor:
    # as torch's kernels do: times the float32 inverse, which can differ from a division at ties
    return torch.round(x.float() * (1 / scale))


class Quantizer(TensorQuantizer):
    """Training form: a `pytorch_quantization` quantizer with torch's own fused kernels.

    The library's class supplies the switches (`enable_calib`, `disable_quant`, ...) and the hook of
    the calibrators. There are 8 bits, whatever its `num_bits` is set to. Its range buffer `_amax`
    exists here from the start, NaN until calibrated, so that state dicts always have the same keys
    and a checkpoint loads on any device. (The library creates the buffer while loading, on the GPU
    only.)

    Args:
        channels: number of output channels for a weight, None for an activation.
        channel_axis: where a weight has them.
    """

    def __init__(self, channels: int | None = None, channel_axis: int = 0):
        weight = channels is not None
        axis = channel_axis if weight else None
        super().__init__(QuantDescriptor(num_bits=8, axis=axis, narrow_range=weight))
        shape = (channels,) if weight else ()
        self.register_buffer("_amax", torch.full(shape, torch.nan))
        self.register_buffer("_zero_point", torch.zeros(shape, dtype=torch.int32), persistent=False)

    @property
    def scale(self) -> Tensor:
        """Step size, () or (channels,)."""
        return self._amax / CODE_MAX

    @property
    def code_min(self) -> int:
        """The lowest code: -127 of a weight, -128 of an activation."""
        return -CODE_MAX if self.narrow_range else -CODE_MAX - 1

    @property
    def is_weight(self) -> bool:
        """Whether it has a range for each output channel, not one for an activation."""
        return self.axis is not None

    @property
    def calibrated(self) -> bool:
        """Whether every range was set, to what can be one."""
        return bool((torch.isfinite(self._amax) & (self._amax >= 0)).all())

    @property
    def switched_on(self) -> bool:
        """Whether it rounds: neither `disable` nor `disable_quant` was called."""
        return self._if_quant and not self._disabled

    def set_range(self, amax: Tensor | float) -> None:
        """Set the range: `amax` holds one value, or one for each channel, in any shape.

        Raises:
            UserError: one of them is no magnitude, or there are fewer or more.
        """
        amax = torch.as_tensor(amax).detach().float().flatten()
        if len(amax) not in (1, self._amax.numel()):
            raise UserError(
                f"{len(amax)} ranges for {self._amax.numel()} channels: give one, or one for each"
            )
        wrong = amax[~(amax.isfinite() & (amax >= 0))]
        if len(wrong):
            raise UserError(f"a range is a largest magnitude, and no {wrong[0]:.4g}")
        self._amax.copy_(amax.clamp_min(RANGE_FLOOR).expand(self._amax.numel()).view_as(self._amax))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self._amax
        super()._apply(fn, recurse)
        # torch rounds by float32 scales alone, and a range would not be what was calibrated
        if self._amax.dtype != before.dtype:
            self._amax = before.to(self._amax.device)
        return self

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        return fake_quantize(inputs, self.scale, self._zero_point, self.code_min, self.axis or 0)


class FrozenQuantizer(nn.Module):
    """Inference form: one QuantizeLinear / DequantizeLinear pair with a constant scale.

    Nothing of pytorch-quantization is left in it. ONNX knows no limit of -127, and a frozen weight
    needs none: `layers.quantized.freeze_weight` leaves no code -128 in it.
    """

    def __init__(self, scale: Tensor, channel_axis: int = 0):
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero_point, -CODE_MAX - 1, self.channel_axis)
