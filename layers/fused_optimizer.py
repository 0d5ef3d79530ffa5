"""Kernels of Muon's step on an NVIDIA GPU, in Triton: what it does beside matrix products.

Every convolution's weight takes one launch before the products and one after them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(2048)  # values of a program


@triton.jit(do_not_specialize=["columns", "row_stride", "size"])
def _momentum_kernel(
    gradient_ptr, buffer_ptr, out_ptr, columns, row_stride, column_stride, momentum, size
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradient_ptr + i, mask=i < size, other=0.0)
    buffer = tl.load(buffer_ptr + i, mask=i < size, other=0.0) * momentum + gradient
    tl.store(buffer_ptr + i, buffer, mask=i < size)
    out = out_ptr + (i // columns) * row_stride + (i % columns) * column_stride
    tl.store(out, (gradient + momentum * buffer).to(tl.bfloat16), mask=i < size)


@triton.jit(do_not_specialize=["columns", "row_stride", "size"])
def _step_kernel(
    weight_ptr, step_ptr, lr_ptr, norm_ptr, target_norm, columns, row_stride, column_stride, size
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = target_norm / tl.maximum(tl.load(norm_ptr), 1e-7)
    step = step_ptr + (i // columns) * row_stride + (i % columns) * column_stride
    step = tl.load(step, mask=i < size, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=i < size, other=0.0)
    tl.store(weight_ptr + i, weight * factor - tl.load(lr_ptr) * step, mask=i < size)


def nesterov_momentum(gradient: Tensor, buffer: Tensor, momentum: float, out: Tensor) -> None:
    """As `utils.training.optimizers.nesterov_momentum`.

    Args:
        gradient, buffer: (O, I, H, W) in one order, without gaps.
        out: (O, I H W) bfloat16, with any strides.
    """
    if gradient.stride() != buffer.stride():
        gradient = torch.empty_like(buffer).copy_(gradient)
    _momentum_kernel[(triton.cdiv(buffer.numel(), BLOCK),)](
        gradient, buffer, out, out.shape[1], *out.stride(), momentum, buffer.numel()
    )


def rescale_and_step(
    weight: Tensor, step: Tensor, lr: Tensor, norm: Tensor, target_norm: float
) -> None:
    """As `utils.training.optimizers.rescale_and_step`, with `step` (O, I H W) of any strides."""
    _step_kernel[(triton.cdiv(weight.numel(), BLOCK),)](
        weight, step, lr, norm, target_norm, step.shape[1], *step.stride(), weight.numel()
    )
