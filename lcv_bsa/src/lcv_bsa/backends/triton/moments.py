"""Mean and reach of every channel of a head, over all tokens, in one pass over them."""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.common import strides

_TOKENS = 2048  # of a program: enough programs for every GPU, few partial results
_TILE = 1 << 12  # tokens * channels that a program holds at once


@triton.jit
def moments_kernel(
    x, sums, least, most, x_b, x_h, x_s, heads, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one head. sums, least, most: fp32 [B * H, programs, D]."""
    part, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    x += bh // heads * x_b + bh % heads * x_h
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    low = tl.full([ROWS, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
    for first in range(0, TOKENS, ROWS):
        rows = part * TOKENS + first + tl.arange(0, ROWS)
        mask = (rows < S)[:, None] & (channels < D)[None, :]
        tile = tl.load(x + rows.to(tl.int64)[:, None] * x_s + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tile
        low = tl.minimum(low, tl.where(mask, tile, float("inf")))
        high = tl.maximum(high, tl.where(mask, tile, float("-inf")))
    place = (bh * tl.num_programs(0) + part) * D + channels
    tl.store(sums + place, tl.sum(total, 0), mask=channels < D)
    tl.store(least + place, tl.min(low, 0), mask=channels < D)
    tl.store(most + place, tl.max(high, 0), mask=channels < D)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, H, S, D], channels side by side -> mean over tokens, and the largest distance from it, fp32 [B, H, D]."""
    B, H, S, D = x.shape
    programs, channels = triton.cdiv(S, _TOKENS), triton.next_power_of_2(D)
    sums, least, most = torch.empty(3, B, H, programs, D, device=x.device)
    moments_kernel[(programs, B * H)](
        x, sums, least, most, *strides(x), H, S, D, channels, max(1, _TILE // channels), _TOKENS, num_warps=4
    )
    mean = sums.sum(2) / S
    return mean, torch.maximum(most.amax(2) - mean, mean - least.amin(2))
