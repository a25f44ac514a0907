"""Choosing key blocks on the GPU: block means where the tokens lie, scores a slice at a time, top-k without a sort.

It computes what `lcv_bsa.choosing.choose_blocks` does without a cdf. Memory past the inputs and the result is the block
means and one slice of scores, which stays in the L2 cache from the product that writes it to the top-k that reads it.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.common import block_tokens, interpreted
from lcv_bsa.layout import BlockLayout
from lcv_bsa.precision import true_fp32
from lcv_bsa.selection import BlockSelection

_SCORES_AT_ONCE = 1 << 23  # 32 MB; an H100 has 50 MB of L2
_MEANS_TILE = 1 << 13  # slots * channels that a program holds at once
_SCORES_PER_WARP = 1 << 10  # 32 registers per thread hold the scores

_LARGEST = tl.constexpr(3.4028234663852886e38)
_BELOW_ALL = tl.constexpr(-(2**31))


@triton.jit
def means_kernel(
    x, means, x_b, x_h, x_s, x_d, heads, num_blocks, T, H, W,
    t: tl.constexpr, h: tl.constexpr, w: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the mean of one block of one head, over the tokens really in it, summed in fp32."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    x += bh // heads * x_b + bh % heads * x_h
    sums = tl.zeros([BLOCK_D], tl.float32)
    tokens = 0
    for first in tl.static_range(0, t * h * w, BLOCK_N):
        rows, inside = block_tokens(block, first + tl.arange(0, BLOCK_N), T, H, W, t, h, w)
        mask = inside[:, None] & (channels < D)[None, :]
        tile = tl.load(x + rows[:, None] * x_s + (channels * x_d)[None, :], mask=mask, other=0.0)
        sums += tl.sum(tile.to(tl.float32), 0)
        tokens += tl.sum(inside.to(tl.int32), 0)
    mean = tl.math.div_rn(sums, tl.zeros([BLOCK_D], tl.float32) + tokens.to(tl.float32))
    tl.store(means + (bh * num_blocks + block) * D + channels, mean, mask=channels < D)


@triton.jit
def top_k_kernel(scores, indices, num_k, K, BLOCK: tl.constexpr):
    """One program: the ascending ids of the K largest of num_k scores of one row, ties to the lower id.

    The smallest kept score is found by bisection over the scores' bits, which are ordered as integers are.
    """
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    score = tl.load(scores + row * num_k + ids, mask=ids < num_k, other=0.0)
    # as choosing._finite: NaN ranks with -inf; what tl.maximum makes of it differs between versions of Triton
    score = tl.where(score == score, score, -_LARGEST)
    score = tl.minimum(tl.maximum(score, -_LARGEST), _LARGEST)
    # -0.0 equals 0.0 but has other bits
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    keys = tl.where(ids < num_k, bits ^ ((bits >> 31) & 0x7FFFFFFF), _BELOW_ALL)

    # at least K keys are >= low, fewer than K are > high; exactly K ends it early
    low = tl.min(tl.where(ids < num_k, keys, 0x7FFFFFFF), 0)
    high = tl.max(keys, 0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        high = tl.where(count > K, high, tl.where(count == K, middle, middle - 1))
        low = tl.where(count >= K, middle, low)

    above, ties = (keys > low).to(tl.int32), (keys == low).to(tl.int32)
    wanted = K - tl.sum(above, 0)
    ties_so_far = tl.cumsum(ties, 0)
    place = tl.cumsum(above, 0) + tl.minimum(ties_so_far, wanted) - 1
    keep = (above > 0) | ((ties > 0) & (ties_so_far <= wanted))
    tl.store(indices + row * K + place, ids, mask=keep)


def refusal(q: Tensor) -> str | None:
    """Why blocks cannot be selected here for q [B, H, S, D], None when they can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes fp16, bf16 and fp32, got {q.dtype}"
    if interpreted():
        return "the interpreter has no bf16; use fp16 or fp32" if q.dtype == torch.bfloat16 else None
    return None if q.device.type == "cuda" else f"it needs a GPU (or TRITON_INTERPRET=1), the inputs are on {q.device}"


def triton_select(
    q: Tensor, k: Tensor, layout_q: BlockLayout, layout_k: BlockLayout, *, least: int
) -> BlockSelection:  # fmt: skip
    """The `least` key blocks of largest score of each query block, see `api.select_blocks`. Inputs are trusted.

    q: [B, H, Sq, D], k: [B, Hkv, Skv, D]; fp16, bf16, fp32; any strides. least: 1..Nk.
    """
    B, H, _, D = q.shape
    Nq, Nk, kv_heads = layout_q.num_blocks, layout_k.num_blocks, k.shape[1]
    indices = torch.empty(B, H, Nq, least, dtype=torch.int32, device=q.device)
    with torch.no_grad(), true_fp32(q.device):
        # the query heads of a group are consecutive: a kv head's scores are one product
        mean_q = block_means(q, layout_q).view(B * kv_heads, -1, D)
        mean_k = block_means(k, layout_k).view(B * kv_heads, Nk, D)
        _select_rows(mean_q, mean_k, indices.view(B * kv_heads, -1, least))
    counts = torch.full((B, H, Nq), least, dtype=torch.int32, device=q.device)
    return BlockSelection(
        indices, counts, layout_q.grid, layout_k.grid, layout_q.block, layout_k.block, uniform=True
    )  # fmt: skip


def block_means(x: Tensor, layout: BlockLayout) -> Tensor:
    """Mean over the tokens really in each block: [B, H, S, D] of any strides -> fp32 [B, H, N, D], contiguous."""
    B, H, _, D = x.shape
    means = torch.empty(B, H, layout.num_blocks, D, dtype=torch.float32, device=x.device)
    channels = triton.next_power_of_2(D)
    slots = min(triton.next_power_of_2(layout.block_size), max(1, _MEANS_TILE // channels))
    means_kernel[(layout.num_blocks, B * H)](
        x, means, *x.stride(), H, layout.num_blocks, *layout.grid, *layout.block, D, channels, slots, num_warps=4
    )
    return means


def top_k_ids(scores: Tensor, indices: Tensor) -> None:
    """Write to indices, int32 [R, K], the ascending ids of the K largest of each row of scores, fp32 [R, Nk].

    Ties go to the lower id; NaN ranks last, with -inf. Both are contiguous.
    """
    rows, num_k = scores.shape
    block = triton.next_power_of_2(num_k)
    warps = min(16, max(1, block // _SCORES_PER_WARP))
    top_k_kernel[(rows,)](scores, indices, num_k, indices.shape[1], block, num_warps=warps)


def _select_rows(mean_q: Tensor, mean_k: Tensor, indices: Tensor) -> None:
    """mean_q [heads, R, D], mean_k [heads, Nk, D] -> indices [heads, R, K]. A slice is whole heads, or rows of one."""
    heads, R, _ = mean_q.shape
    Nk = mean_k.shape[1]
    many = max(1, min(heads, _SCORES_AT_ONCE // (R * Nk)))
    step = R if many > 1 else max(1, min(R, _SCORES_AT_ONCE // Nk))
    buffer = torch.empty(many * step * Nk, dtype=torch.float32, device=mean_q.device)
    for head in range(0, heads, many):
        keys = mean_k[head : head + many].mT
        for row in range(0, R, step):
            part = mean_q[head : head + many, row : row + step]
            scores = buffer[: part.shape[0] * part.shape[1] * Nk].view(*part.shape[:2], Nk)
            torch.bmm(part, keys, out=scores)  # autocast leaves alone what is given `out`
            top_k_ids(scores.flatten(0, 1), indices[head : head + many, row : row + step].flatten(0, 1))
