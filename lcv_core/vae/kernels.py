"""Norm, SiLU and joining with earlier frames in Triton: reads and writes what a causal convolution sees once.

PyTorch's own passes go over it eight times, and the VAE has next to no arithmetic beside its convolutions.
`norm.RMSNorm` says what is computed.
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
    x, gamma, out, C, pixels, stride_x, stride_out, scale, floor, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some pixels of a sample: silu(v / max(||v||, floor ** 0.5) * (scale * gamma)) of each one's C channels v.

    x and out hold a sample's pixels one after the other, and samples stride_x and stride_out apart. All is in fp32 and
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
    tl.store(out + sample * stride_out + place, y.to(out.dtype.element_ty), mask=inside)


def norm_silu_behind(x: Tensor, gamma: Tensor, scale: float, floor: float, history: int) -> Tensor:
    """x [B, C, T, H, W] with channels last -> [B, C, history + T, H, W] with channels last: frames that are still to be
    written, and behind them norm and SiLU of x. gamma: C numbers."""
    B, C, T, H, W = x.shape
    out = torch.empty(B, history + T, H, W, C, dtype=x.dtype, device=x.device)
    pixels, block = T * H * W, triton.next_power_of_2(C)
    rows = max(1, _ELEMENTS // block)
    norm_silu_kernel[(triton.cdiv(pixels, rows), B)](
        x, gamma, out[:, history:], C, pixels, C * pixels, out.stride(0), scale, floor,
        ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)
