"""Forward with q.k in int8 or fp8 (e4m3), at twice the rate of 16 bits; p.v stays in the input's dtype. Inference only.

As in SageAttention (Zhang et al., arXiv 2410.02367): the mean of k over all tokens of a head is taken out first, which
leaves the softmax as it is and takes away most of what channels with outliers cost; each block of q and of k then has
one fp32 scale, its largest magnitude over 127 (int8) or 448 (fp8). lse gets the mean's part, q.mean, back.

Error of o against fp64, |difference| / |o| in the Euclidean norm, D = 128, 2048 keys, emulated in PyTorch with
bf16 inputs, p and o; beside it dense bf16 SDPA on a CPU:

    inputs                                          int8     fp8      SDPA
    normal, logit std 1                             1.3e-2   3.9e-2   2.3e-3
    normal, logit std 4                             2.9e-2   8.9e-2   1.7e-3
    4 channels of k moved by 10                     1.3e-2   3.9e-2   2.3e-3    (mean left in: 3.1e-2, 6.1e-2)
    4 channels times 8 in k and 2 in q, logit std 3 4.4e-2   1.1e-1   1.8e-3

So int8 is the better of the two on every one of them; on sm_90 wgmma moreover sums fp8 products in less than fp32. The
loop's products fall by a quarter, from 4 to 3 units, and its traffic from L2 by as much.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.common import block_tokens, dense_channels, interpreted, load_rows, strides
from lcv_bsa.backends.triton.descriptors import describable, tma_refusal
from lcv_bsa.backends.triton.forward_tma import forward_tile, launch
from lcv_bsa.backends.triton.tuning import Tile, tile_for
from lcv_bsa.layout import BlockLayout
from lcv_bsa.selection import BlockSelection

_ROWS = 64  # slots quantised at a time
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Quantised(NamedTuple):
    """x = values * scales of the block + mean. values [B, H, S, D], scales fp32 [B, H, N]; offsets: see `quantise`."""

    values: Tensor
    scales: Tensor
    offsets: Tensor


@triton.jit
def quantise_kernel(
    x, mean, values, scales, offsets, x_b, x_h, x_s, heads, group, largest,
    T, H, W, t: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head. CENTRE: take the mean out; without it, offsets get x.mean of every token."""
    tiles: tl.constexpr = (t * h * w + ROWS - 1) // ROWS
    block, bh = tl.program_id(0), tl.program_id(1)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    x += batch * x_b + head * x_h
    centre = tl.load(mean + (bh // group).to(tl.int64) * D + channels, mask=channels < D, other=0.0)
    first = bh.to(tl.int64) * T * H * W
    peaks = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(tiles):
        tokens, inside = block_tokens(block, i * ROWS + tl.arange(0, ROWS), T, H, W, t, h, w)
        rows = load_rows(x, tokens, inside, x_s, channels, D).to(tl.float32)
        if CENTRE:
            rows = tl.where(inside[:, None], rows - centre[None, :], 0.0)
        else:
            tl.store(offsets + first + tokens, tl.sum(rows * centre[None, :], 1), mask=inside)
        peaks = tl.maximum(peaks, tl.max(tl.abs(rows), 1))
    peak = tl.max(peaks, 0)
    scale = tl.where(peak == 0.0, 1.0, peak / largest)
    tl.store(scales + bh.to(tl.int64) * tl.num_programs(0) + block, scale)
    for i in tl.static_range(tiles):
        tokens, inside = block_tokens(block, i * ROWS + tl.arange(0, ROWS), T, H, W, t, h, w)
        rows = load_rows(x, tokens, inside, x_s, channels, D).to(tl.float32)
        if CENTRE:
            rows -= centre[None, :]
        rows /= scale
        if values.dtype.element_ty == tl.int8:
            rows = tl.floor(rows + 0.5)
        tl.store(
            values + (first + tokens)[:, None] * D + channels[None, :],
            rows.to(values.dtype.element_ty),
            mask=inside[:, None] & (channels[None, :] < D),
        )


def quantise(x: Tensor, mean: Tensor, layout: BlockLayout, dtype: torch.dtype, *, centre: bool) -> Quantised:
    """x [B, H, S, D] in blocks of int8 or fp8, less the mean if `centre`.

    mean: fp32 [B, Hkv, D], contiguous, of the kv head. offsets: x.mean, fp32 [B, H, S]; undefined if `centre`.
    """
    x = dense_channels(x)
    B, H, S, D = x.shape
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(B, H, layout.num_blocks, device=x.device)
    offsets = torch.empty(B, H, S, device=x.device)
    quantise_kernel[(layout.num_blocks, B * H)](
        x, mean, values, scales, offsets, *strides(x), H, H // mean.shape[1], _LARGEST[dtype],
        *layout.grid, *layout.block, D, triton.next_power_of_2(D),
        min(_ROWS, triton.next_power_of_2(layout.block_size)), centre, num_warps=4,
    )  # fmt: skip
    return Quantised(values, scales, offsets)


def forward(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o as q, lse fp32 [B, H, Sq]. dtype: torch.int8 or torch.float8_e4m3fn."""
    mean = k.mean(2, dtype=torch.float32)
    of_q = quantise(q, mean, selection.layout_q, dtype, centre=False)
    of_k = quantise(k, mean, selection.layout_k, dtype, centre=True)
    o = torch.empty_like(q)
    lse = launch(
        of_q.values, of_k.values, describable(v), o, selection, scale, _tile(q, selection),
        (of_q.scales, of_k.scales),
    )  # fmt: skip
    return o, lse.add_(of_q.offsets, alpha=scale)


def _tile(q: Tensor, selection: BlockSelection) -> Tile:
    """As of 16 bits, but for the usual size, where fewer stages are faster."""
    usual = q.shape[-1] <= 128 and selection.layout_q.block_size < 128
    return tile_for("forward_tma_8", q, selection) if usual else forward_tile(q, selection)


def int8_forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` in int8."""
    return forward(q, k, v, selection, scale, dtype=torch.int8)


def fp8_forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` in fp8."""
    return forward(q, k, v, selection, scale, dtype=torch.float8_e4m3fn)


def backward(*_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Raises ValueError: there is none."""
    raise ValueError("the quantised backends have no backward; train with backend 'triton'")


def fp8_refusal(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why these inputs cannot run here in fp8, None when they can."""
    if interpreted():
        return "the interpreter rounds to fp8 wrongly; use 'triton_int8'"
    return refusal(q, k, v, selection)


def refusal(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why these inputs cannot run here, None when they can."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "it has no backward; use torch.no_grad(), or 'triton' to train"
    if q.shape[-1] % 16:
        return f"a quantised head must be a multiple of 16 bytes, got D = {q.shape[-1]}"
    if q.shape[-1] < 32 and not interpreted():
        return f"8-bit products take head dims of 32 or more, got {q.shape[-1]}"
    return tma_refusal(q, k, v, selection)
