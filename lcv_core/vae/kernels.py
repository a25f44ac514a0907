"""What the VAE does beside convolutions, in Triton, each in one pass: norm, SiLU and joining with earlier frames; bias
and residual; doubling of height and width.

PyTorch's own passes go over what a causal convolution sees eight times. `norm.RMSNorm` and `convolve` say what is
computed.
"""

# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHANNELS = 1024
_ELEMENTS = 2048  # that a program holds at once: two loads of 16 bytes of each of 128 threads


@triton.jit
def norm_silu_kernel(
    x, gamma, out, C, wide, pixels, stride_x, stride_out, scale, floor, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some pixels of a sample: silu(v / max(||v||, floor ** 0.5) * (scale * gamma)) of each one's C channels v.

    x and out hold a sample's pixels one after the other, and samples stride_x and stride_out apart; those of out have
    `wide` channels, zeros behind the C. All is in fp32 and
    rounded once; PyTorch's passes round to 16 bits three times, which here would bring instructions and errors alone.
    """
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    real = channels < C
    inside = (pixel < pixels)[:, None] & real[None, :]
    place = pixel.to(tl.int64)[:, None] * C + channels[None, :]
    y = tl.load(x + sample * stride_x + place, mask=inside, other=0.0).to(tl.float32)
    # a NaN stays one, as in PyTorch
    square = tl.maximum(tl.sum(y * y, 1), floor, propagate_nan=tl.PropagateNan.ALL)
    y *= tl.rsqrt(square)[:, None]
    y *= scale * tl.load(gamma + channels, mask=real, other=0.0).to(tl.float32)[None, :]
    # y / (1 + exp(-y)); a division and exp, with their care for results that fp32 hardly holds, are a quarter more
    # instructions of the kernel, which C = 96 in blocks of 128 has none to spare of
    root = tl.rsqrt(1.0 + tl.exp2(y * -1.4426950408889634))
    y *= root * root
    place = pixel.to(tl.int64)[:, None] * wide + channels[None, :]
    inside = (pixel < pixels)[:, None] & (channels < wide)[None, :]  # silu(0) = 0
    tl.store(out + sample * stride_out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_bias_kernel(
    x, bias, residual, C, pixels, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some pixels: x += bias of their C channels, and a residual that lies as x does, in fp32 and rounded once."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (channels < C)[None, :]
    place = pixel.to(tl.int64)[:, None] * C + channels[None, :]
    y = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + place, y.to(x.dtype.element_ty), mask=inside)


@triton.jit
def double_kernel(x, out, C, pixels, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some pixels of frames whose lines are `width` long, each to four places of frames of twice the size."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (channels < C)[None, :]
    y = tl.load(x + pixel.to(tl.int64)[:, None] * C + channels[None, :], mask=inside, other=0.0)
    line, column = (pixel // width).to(tl.int64), pixel % width
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            target = (2 * line + down) * (2 * width) + 2 * column + right
            tl.store(out + target[:, None] * C + channels[None, :], y, mask=inside)


def add_bias_(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x plus a bias of its channels, C numbers, plus a residual, written over x. Channels lie last in both tensors."""
    C, pixels = x.shape[1], x.numel() // x.shape[1]
    block, rows = _tile(C)
    add_bias_kernel[(triton.cdiv(pixels, rows),)](
        x, x if bias is None else bias, x if residual is None else residual, C, pixels,
        BIAS=bias is not None, RESIDUAL=residual is not None, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return x


def doubled(x: Tensor) -> Tensor:
    """x [N, C, H, W] with channels last at twice the height and width, each pixel four times; channels last."""
    N, C, H, W = x.shape
    out = torch.empty(N, 2 * H, 2 * W, C, dtype=x.dtype, device=x.device)
    block, rows = _tile(C)
    double_kernel[(triton.cdiv(N * H * W, rows),)](
        x, out, C, N * H * W, W, ROWS=rows, BLOCK=block, num_warps=4
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _tile(channels: int) -> tuple[int, int]:
    """Channels and pixels that a program holds at once."""
    block = triton.next_power_of_2(channels)
    return block, max(1, _ELEMENTS // block)


def norm_silu_behind(
    x: Tensor, gamma: Tensor, scale: float, floor: float, history: int, wide: int | None = None
) -> Tensor:
    """x [B, C, T, H, W] with channels last -> [B, C, history + T, H, W] with channels last: frames that are still to be
    written, and behind them norm and SiLU of x. gamma: C numbers. wide: channels of the result, zeros behind the C."""
    B, C, T, H, W = x.shape
    wide = C if wide is None else wide
    out = torch.empty(B, history + T, H, W, wide, dtype=x.dtype, device=x.device)
    pixels, (block, rows) = T * H * W, _tile(wide)
    norm_silu_kernel[(triton.cdiv(pixels, rows), B)](
        x, gamma, out[:, history:], C, wide, pixels, C * pixels, out.stride(0), scale, floor,
        ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)
