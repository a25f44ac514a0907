"""Forward with plain pointers: FlashAttention-2's recurrence (Dao, arXiv 2307.08691) over the listed key blocks.

Statistics are fp32; the softmax scale is applied in fp32 after the dot product, never to a rounded operand. Rows of
ids ascend, so neighbouring programs meet the same keys at about the same time (L2).
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.common import (
    LN2,
    LOG2E,
    block_origin,
    block_tokens,
    dense_channels,
    has_empty_slots,
    load_rows,
    precision,
    shape_arguments,
    slot_tokens,
    store_rows,
    strides,
)
from lcv_bsa.backends.triton.tuning import forward_tile
from lcv_bsa.selection import BlockSelection


@triton.jit
def forward_kernel(
    q, k, v, o, lse, indices, counts, order,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    heads, group, num_q, width, log2_scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_K: tl.constexpr, PRECISION: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query slots of one query block of one head.

    order [B, H, Nq]: which block program i works on, where ORDERED. log2_scale: softmax scale * log2(e).
    """
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    if ORDERED:
        block = tl.load(order + bh * num_q + block)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    rows, row_inside = block_tokens(block, tile * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq)
    q_tile = load_rows(q + batch * q_b + head * q_h, rows, row_inside, q_s, channels, D)
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    row = bh.to(tl.int64) * num_q + block
    count = tl.load(counts + row)
    indices += row * width
    blocks_w = tl.cdiv(Wk, wk)
    blocks_hw = tl.cdiv(Hk, hk) * blocks_w

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    next_block = tl.load(indices)
    # The first slot of a block holds a token, so `top` is finite from the first turn on, also in partial blocks.
    for j in range(count):
        a, b, c = block_origin(next_block, blocks_hw, blocks_w, tk, hk, wk)
        # one turn ahead: the keys' addresses would have to wait for it
        next_block = tl.load(indices + tl.minimum(j + 1, width - 1))
        for n in tl.static_range(tiles_n):
            slots = n * BLOCK_N + tl.arange(0, BLOCK_N)
            keys, key_inside = slot_tokens(a, b, c, slots, Tk, Hk, Wk, tk, hk, wk)
            k_tile = load_rows(k, keys, key_inside, k_s, channels, D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if PARTIAL_K:
                s = tl.where(key_inside[None, :], s, float("-inf"))
            # of the raw products: scale and subtraction then are one fused multiply-add in fp32
            new_top = tl.maximum(top, tl.max(s, 1) * log2_scale)
            p = tl.exp2(s * log2_scale - new_top[:, None])
            keep = tl.exp2(top - new_top)
            total = total * keep + tl.sum(p, 1)
            v_tile = load_rows(v, keys, key_inside, v_s, channels, D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision=PRECISION)
            top = new_top
    # No key block at all: the sums are zero, and so is o; its lse is -inf.
    total = tl.where(total == 0.0, 1.0, total)
    o_tile = acc * (1.0 / total)[:, None]
    store_rows(o + batch * o_b + head * o_h, rows, row_inside, o_s, channels, o_tile, D)
    lse += bh.to(tl.int64) * Tq * Hq * Wq
    tl.store(lse + rows, (top + tl.log2(total)) * LN2, mask=row_inside)


def forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """o as q, lse fp32 [B, H, Sq]; a row without key blocks gives o = 0 and lse = -inf."""
    q, k, v = (dense_channels(x) for x in (q, k, v))
    B, H, S, D = q.shape
    o = torch.empty_like(q)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    tile = forward_tile(q, selection)
    layout = selection.layout_q
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    order = counts if selection.uniform else longest_rows_first(counts)
    grid = (layout.num_blocks * triton.cdiv(layout.block_size, tile.m), B * H)
    forward_kernel[grid](
        q, k, v, o, lse, indices, counts, order, *strides(q, k, v, o),
        H, H // k.shape[1], layout.num_blocks, indices.shape[-1], scale * LOG2E.value,
        PARTIAL_K=has_empty_slots(selection.layout_k.is_full, selection.layout_k.block_size, tile.n),
        PRECISION=precision(q), ORDERED=not selection.uniform, **shape_arguments(selection, D, tile),
    )  # fmt: skip
    return o, lse


def longest_rows_first(counts: Tensor) -> Tensor:
    """The order in which query blocks are worked on, int32 [B, H, Nq], from counts [B, H, Nq].

    By the power of two of the count, the largest first; within one ascending, as neighbours read the same keys.
    """
    _, exponents = torch.frexp(counts.float())
    return exponents.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
