"""Kernels for training on an NVIDIA GPU: BatchNorm and what follows it, and fake quantization.

More than half of a training step of eager torch moves bytes: BatchNorm, addition, ReLU and rounding
read and write whole feature maps one after the other. Here two passes do all of them, the first for
BatchNorm's statistics. They are written in Triton (Tillet et al., 2019), which comes with torch
where it can run; importing this fails elsewhere.

Feature maps (N, C, H, W) lie channels last, so they are matrices (rows, channels), a row for each
pixel of each image. A program of a kernel works on a tile of BLOCK_M rows and BLOCK_C channels.
Triton compiles a kernel anew for an integer argument that is 1 or divisible by 16, unless it is
told not to (`do_not_specialize`); few variants compile in seconds, and stay in its cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

TILE = tl.constexpr(2048)  # values of a tile
PROGRAMS = 528  # that share a sum over all rows: four for each multiprocessor of an H100
BLOCK_P = tl.constexpr(128)  # of whose sums so many are added up at a time
FINAL_C = tl.constexpr(16)  # channels of a program that adds them up
ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to a float32 of at most 2^22 and taken off again, it rounds to even."""


# parts of kernels


@triton.jit
def _tile(rows, channels, row_block, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of a tile, whether they exist, its values' places in memory, and which exist."""
    r = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    return c, c < channels, r[:, None] * channels + c[None, :], inside


@triton.jit
def _per_channel(pointer, c, exists):
    return tl.load(pointer + c, mask=exists, other=0.0)[None, :]


@triton.jit
def _codes(x, amax):
    """INT8 codes as torch rounds, times the inverse of the scale, cut at 200; and the scale."""
    scale = tl.div_rn(amax, 127.0)
    x = tl.minimum(tl.maximum(x * tl.div_rn(1.0, scale), -200.0), 200.0)
    return (x + ROUNDING) - ROUNDING, scale


@triton.jit
def _add_up(sums_ptr, c, channels, programs):
    """Both sums (programs, 2, channels) over all programs, (FINAL_C,) each."""
    first = tl.zeros([BLOCK_P, FINAL_C], tl.float32)
    second = tl.zeros([BLOCK_P, FINAL_C], tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (c < channels)[None, :]
        at = sums_ptr + 2 * p[:, None] * channels + c[None, :]
        first += tl.load(at, mask=inside, other=0.0)
        second += tl.load(at + channels, mask=inside, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _gradient(
    dy_ptr, x_ptr, other_ptr, amax_ptr, at, inside, mean, rstd, weight, bias,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The gradient at the sum before the activation, and the normalised x."""
    gradient = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normalised = (x - mean) * rstd
    v = normalised * weight + bias
    if other_ptr is not None:
        v += tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if amax_ptr is not None:
        # straight through, but for what the codes do not reach
        code, scale = _codes(_activate(v, ACTIVATION), tl.load(amax_ptr))
        gradient = tl.where((code >= -128.0) & (code <= 127.0), gradient, 0.0)
    if ACTIVATION == "relu":
        gradient = tl.where(v > 0.0, gradient, 0.0)
    if ACTIVATION == "relu6":
        gradient = tl.where((v > 0.0) & (v < 6.0), gradient, 0.0)
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(v)
        gradient = gradient * sigmoid * (1.0 + v * (1.0 - sigmoid))
    return gradient, normalised


@triton.jit
def _activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, 6.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    return v


# kernels of BatchNorm


@triton.jit(do_not_specialize=["rows", "tiles"])
def _sum_kernel(
    x_ptr, shift_ptr, sums_ptr, rows, channels, tiles, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums of x - shift and of its square over `tiles` tiles of rows: (programs, 2, channels)."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tiles):
        c, exists, at, inside = _tile(rows, channels, program * tiles + tile, BLOCK_M, BLOCK_C)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - _per_channel(shift_ptr, c, exists), 0.0)
        total += x
        squares += x * x
    c, exists, at, inside = _tile(rows, channels, 0, BLOCK_M, BLOCK_C)
    out = sums_ptr + 2 * program * channels + c
    tl.store(out, tl.sum(total, 0), mask=exists)
    tl.store(out + channels, tl.sum(squares, 0), mask=exists)


@triton.jit(do_not_specialize=["rows", "programs"])
def _statistics_kernel(
    sums_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    rows, channels, programs, eps, momentum,
):  # fmt: skip
    """Mean and 1 / deviation of each channel; the running averages follow them.

    The sums are of x - running mean, so that the difference below loses no digits.
    """
    c = tl.program_id(0) * FINAL_C + tl.arange(0, FINAL_C)
    inside = c < channels
    total, squares = _add_up(sums_ptr, c, channels, programs)
    running_mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0)
    running_var = tl.load(running_var_ptr + c, mask=inside, other=0.0)

    # Var[x] = E[(x - shift)^2] - (E[x] - shift)^2
    offset = total / rows
    variance = tl.maximum(squares / rows - offset * offset, 0.0)
    tl.store(mean_ptr + c, running_mean + offset, mask=inside)
    tl.store(rstd_ptr + c, 1.0 / tl.sqrt(variance + eps), mask=inside)

    unbiased = variance * (rows / (rows - 1.0))
    running_var += momentum * (unbiased - running_var)
    tl.store(running_mean_ptr + c, running_mean + momentum * offset, mask=inside)
    tl.store(running_var_ptr + c, running_var, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, other_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, amax_ptr, rows, channels,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What `fused_batch_norm` says."""
    c, exists, at, inside = _tile(rows, channels, tl.program_id(0), BLOCK_M, BLOCK_C)
    mean, rstd = _per_channel(mean_ptr, c, exists), _per_channel(rstd_ptr, c, exists)
    weight, bias = _per_channel(weight_ptr, c, exists), _per_channel(bias_ptr, c, exists)

    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = (x - mean) * rstd * weight + bias
    if other_ptr is not None:
        y += tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = _activate(y, ACTIVATION)
    if amax_ptr is not None:
        code, scale = _codes(y, tl.load(amax_ptr))
        y = tl.minimum(tl.maximum(code, -128.0), 127.0) * scale
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _gradient_sum_kernel(
    dy_ptr, x_ptr, other_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, amax_ptr, sums_ptr,
    rows, channels, tiles,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient g and of g times the normalised x: (programs, 2, channels)."""
    program = tl.program_id(0)
    c, exists, at, inside = _tile(rows, channels, 0, BLOCK_M, BLOCK_C)
    mean, rstd = _per_channel(mean_ptr, c, exists), _per_channel(rstd_ptr, c, exists)
    weight, bias = _per_channel(weight_ptr, c, exists), _per_channel(bias_ptr, c, exists)
    plain = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tiles):
        c, exists, at, inside = _tile(rows, channels, program * tiles + tile, BLOCK_M, BLOCK_C)
        gradient, normalised = _gradient(
            dy_ptr, x_ptr, other_ptr, amax_ptr, at, inside, mean, rstd, weight, bias, ACTIVATION
        )  # fmt: skip
        plain += gradient
        weighted += gradient * normalised
    out = sums_ptr + 2 * program * channels + c
    tl.store(out, tl.sum(plain, 0), mask=exists)
    tl.store(out + channels, tl.sum(weighted, 0), mask=exists)


@triton.jit(do_not_specialize=["programs"])
def _parameter_gradient_kernel(sums_ptr, dbias_ptr, dweight_ptr, channels, programs):
    c = tl.program_id(0) * FINAL_C + tl.arange(0, FINAL_C)
    dbias, dweight = _add_up(sums_ptr, c, channels, programs)
    tl.store(dbias_ptr + c, dbias, mask=c < channels)
    tl.store(dweight_ptr + c, dweight, mask=c < channels)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr, x_ptr, other_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, amax_ptr,
    dbias_ptr, dweight_ptr, dx_ptr, dother_ptr, rows, channels, FROZEN: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient dx = weight / deviation * (g - mean(g) - normalised x * mean(g normalised x)).

    Without the means where the statistics are frozen. `other` has the gradient g.
    """
    c, exists, at, inside = _tile(rows, channels, tl.program_id(0), BLOCK_M, BLOCK_C)
    mean, rstd = _per_channel(mean_ptr, c, exists), _per_channel(rstd_ptr, c, exists)
    weight, bias = _per_channel(weight_ptr, c, exists), _per_channel(bias_ptr, c, exists)
    gradient, normalised = _gradient(
        dy_ptr, x_ptr, other_ptr, amax_ptr, at, inside, mean, rstd, weight, bias, ACTIVATION
    )  # fmt: skip
    if dother_ptr is not None:
        tl.store(dother_ptr + at, gradient.to(dother_ptr.dtype.element_ty), mask=inside)
    if not FROZEN:
        dbias = _per_channel(dbias_ptr, c, exists) / rows
        dweight = _per_channel(dweight_ptr, c, exists) / rows
        gradient = gradient - dbias - normalised * dweight
    dx = gradient * weight * rstd
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


class _Grid:
    """How programs share a feature map (N, C, H, W).

    Attributes:
        all_tiles: programs of a kernel that works on single tiles.
        sum_programs: those of a kernel that sums over rows, each over `tiles_per_program` tiles.
        final_programs: those of a kernel that adds up what these have.
    """

    def __init__(self, x: Tensor):
        self.channels = x.shape[1]
        self.rows = x.numel() // self.channels
        self.block_c = 64 if self.channels > 32 else 32
        self.block_m = TILE.value // self.block_c
        row_tiles = triton.cdiv(self.rows, self.block_m)
        channel_tiles = triton.cdiv(self.channels, self.block_c)
        self.all_tiles = (row_tiles, channel_tiles)
        self.tiles_per_program = triton.cdiv(row_tiles * channel_tiles, PROGRAMS)
        self.sum_programs = (triton.cdiv(row_tiles, self.tiles_per_program), channel_tiles)
        self.final_programs = (triton.cdiv(self.channels, FINAL_C),)


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        other: Tensor | None,
        norm: nn.BatchNorm2d,
        activation: str,
        amax: Tensor | None,
    ) -> Tensor:
        # as matrices of pixels and channels
        x = x.contiguous(memory_format=torch.channels_last)
        if other is not None:
            other = other.to(x.dtype).contiguous(memory_format=torch.channels_last)
        grid = _Grid(x)
        # first pass: the batch's statistics, unless they are frozen
        if norm.training:
            mean, rstd = _batch_statistics(x, norm, grid)
        else:
            mean, rstd = norm.running_mean.clone(), torch.rsqrt(norm.running_var + norm.eps)
        # second pass: everything else
        y = torch.empty_like(x)
        how = (activation, grid.block_m, grid.block_c)
        _forward_kernel[grid.all_tiles](
            x, other, y, mean, rstd, weight, bias, amax, grid.rows, grid.channels, *how
        )
        ctx.save_for_backward(x, other, mean, rstd, weight, bias, amax)
        ctx.frozen, ctx.how, ctx.grid = not norm.training, how, grid
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, other, mean, rstd, weight, bias, amax = ctx.saved_tensors
        grid = ctx.grid
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        given = (dy, x, other, mean, rstd, weight, bias, amax)
        sizes = (grid.rows, grid.channels)
        # first pass: the sums that make the gradients of scale and shift
        sums = weight.new_empty(grid.sum_programs[0], 2, grid.channels)
        dbias, dweight = torch.empty_like(bias), torch.empty_like(weight)
        _gradient_sum_kernel[grid.sum_programs](
            *given, sums, *sizes, grid.tiles_per_program, *ctx.how
        )
        _parameter_gradient_kernel[grid.final_programs](
            sums, dbias, dweight, grid.channels, len(sums)
        )
        # second pass: the gradients of x and other
        dx = torch.empty_like(x)
        dother = None if other is None else torch.empty_like(x)
        _backward_kernel[grid.all_tiles](
            *given, dbias, dweight, dx, dother, *sizes, ctx.frozen, *ctx.how
        )
        return dx, dweight, dbias, dother, None, None, None


def _batch_statistics(x: Tensor, norm: nn.BatchNorm2d, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation (C,) of a batch, which `norm`'s running averages follow."""
    sums = norm.running_mean.new_empty(grid.sum_programs[0], 2, grid.channels)
    mean, rstd = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_mean)
    _sum_kernel[grid.sum_programs](
        x, norm.running_mean, sums, grid.rows, grid.channels, grid.tiles_per_program,
        grid.block_m, grid.block_c,
    )  # fmt: skip
    _statistics_kernel[grid.final_programs](
        sums, mean, rstd, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        grid.rows, grid.channels, len(sums), norm.eps, norm.momentum,
    )  # fmt: skip
    return mean, rstd


def fused_batch_norm(
    x: Tensor,
    norm: nn.BatchNorm2d,
    other: Tensor | None = None,
    activation: str = "",
    amax: Tensor | None = None,
) -> Tensor:
    """round(activation(norm(x) + other)) of feature maps (N, C, H, W) in the type of `x`.

    `norm` in evaluation mode uses its running statistics; its scale and shift still train.

    Args:
        other: of the shape of `x`.
        activation: "relu", "relu6", "silu" or "".
        amax: (), the range of an INT8 fake quantization with a straight-through gradient.
    """
    return _FusedBatchNorm.apply(x, norm.weight, norm.bias, other, norm, activation, amax)


# fake quantization on its own: of weights, and of what no BatchNorm makes


@triton.jit(do_not_specialize=["width", "blocks"])
def _round_kernel(x_ptr, dy_ptr, amax_ptr, out_ptr, width, blocks, CODE_MIN: tl.constexpr):
    """Rows (rows, width), each with its own range and in so many blocks.

    Into `out`, x rounded or, if there is a gradient `dy` of that, the gradient of x.
    """
    row = tl.program_id(0).to(tl.int64) // blocks
    column = (tl.program_id(0) - row * blocks) * TILE + tl.arange(0, TILE)
    at = row * width + column
    x = tl.load(x_ptr + at, mask=column < width, other=0.0).to(tl.float32)
    code, scale = _codes(x, tl.load(amax_ptr + row))
    if dy_ptr is None:
        out = tl.minimum(tl.maximum(code, CODE_MIN), 127.0) * scale
    else:
        dy = tl.load(dy_ptr + at, mask=column < width, other=0.0).to(tl.float32)
        out = tl.where((code >= CODE_MIN) & (code <= 127.0), dy, 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=column < width)


def _round(x: Tensor, dy: Tensor | None, amax: Tensor, out: Tensor, code_min: float) -> None:
    """Launch `_round_kernel`; the tensors have one order in memory."""
    width = x.numel() // amax.numel()
    blocks = triton.cdiv(width, TILE)
    _round_kernel[(blocks * amax.numel(),)](x, dy, amax, out, width, blocks, code_min)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, code_min: float, dtype: torch.dtype) -> Tensor:
        # its values lie in one piece, whatever their order: the first axis stays the slowest
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        _round(x, None, amax, y, code_min)
        ctx.save_for_backward(x, amax)
        ctx.code_min = code_min
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, amax = ctx.saved_tensors
        dx = torch.empty_like(x)
        if dy.stride() != x.stride():
            dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
        _round(x, dy, amax, dx, ctx.code_min)
        return dx, None, None, None


def fused_fake_quantize(x: Tensor, amax: Tensor, code_min: int, dtype: torch.dtype) -> Tensor:
    """Fake quantization of a tensor of any shape in `dtype`, with a straight-through gradient.

    Args:
        code_min: the lowest INT8 code, -128 or -127.
        amax: () for the whole tensor, or (C,) for the first axis of `x`.
    """
    return _FakeQuantize.apply(x, amax, float(code_min), dtype)
