"""Forward for sm_90 and up: FlashAttention-2's recurrence with K and V fetched block by block by TMA descriptors.

What the design rests on, at head dim 128, blocks of 64 tokens and 4 warps, is four CTAs per SM: 128 registers a thread
and 33 KB of shared memory leave room for them, and while one waits for its copy the other three multiply.

* K and V go from their places in memory to shared memory and from there into wgmma, through no register. q is read by
  pointers: a reshaped descriptor load of the left operand would be kept in registers, 43 more of them.
* A loop turn needs the id of its key block before its copy can start, so the id is read one turn ahead.
* A block's coordinates come from products with reciprocals, see `common.block_origin`.
* The maximum is taken of the raw products; scale and subtraction then are one fused multiply-add in fp32.
* The accumulator is rescaled at every turn. Doing so only where the maximum grew would need a vote of all warps and a
  barrier, which take longer than the 64 multiplications a thread they save.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

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
    strides,
)
from lcv_bsa.backends.triton.descriptors import (
    batches,
    box_inside,
    box_of,
    box_origin,
    describable,
    describe,
)
from lcv_bsa.backends.triton.forward import longest_rows_first
from lcv_bsa.backends.triton.tuning import Tile, tile_for
from lcv_bsa.selection import BlockSelection


@triton.jit
def tma_forward_kernel(
    q, k, v, o, lse, indices, counts, order, q_scales, k_scales,
    q_b, q_h, q_s, heads, group, num_q, num_k, width, log2_scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_K: tl.constexpr, PRECISION: tl.constexpr, ORDERED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query slots of one query block of one head.

    k, v, o: descriptors [B * heads, T, H, W, D]. order [B, H, Nq]: which block program i works on, where ORDERED.
    log2_scale: softmax scale * log2(e). q_scales [B, H, Nq], k_scales [B, Hkv, Nk]: what the integers or fp8 numbers
    of q and k are to be multiplied by, block by block, where SCALED.
    """
    tiles_m: tl.constexpr = tq * hq * wq // BLOCK_M
    tiles_n: tl.constexpr = tk * hk * wk // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    if ORDERED:
        block = tl.load(order + bh * num_q + block)
    batch, head = bh // heads, bh % heads
    kv = batch * (heads // group) + head // group
    rows, row_inside = block_tokens(block, tile * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq)
    q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    q_tile = load_rows(q, rows, row_inside, q_s, tl.arange(0, BLOCK_D), D)
    row = bh.to(tl.int64) * num_q + block
    if SCALED:
        log2_scale *= tl.load(q_scales + row)
        k_scales += kv.to(tl.int64) * num_k
    count = tl.load(counts + row)
    indices += row * width
    blocks_w = tl.cdiv(Wk, wk)
    blocks_hw = tl.cdiv(Hk, hk) * blocks_w

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    next_block = tl.load(indices)
    # The first slot of a block holds a token, so `top` is finite from the first turn on, also in partial blocks.
    for i in range(count * tiles_n):
        a, b, c = block_origin(next_block, blocks_hw, blocks_w, tk, hk, wk)
        slot = i % tiles_n * BLOCK_N
        a, b, c = a + slot // (hk * wk), b + slot // wk % hk, c + slot % wk
        turn_scale = log2_scale * tl.load(k_scales + next_block) if SCALED else log2_scale
        next_block = tl.load(indices + tl.minimum((i + 1) // tiles_n, width - 1))
        k_tile = k.load([kv, a, b, c, 0]).reshape(BLOCK_N, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION).to(tl.float32)
        if PARTIAL_K:
            s = tl.where(box_inside(a, b, c, Tk, Hk, Wk, hk, wk, BLOCK_N)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * turn_scale)
        p = tl.exp2(s * turn_scale - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(p, 1)
        v_tile = v.load([kv, a, b, c, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision=PRECISION)
        top = new_top
    # No key block at all: the sums are zero, and so is o; its lse is -inf.
    total = tl.where(total == 0.0, 1.0, total)
    o_tile = acc * (1.0 / total)[:, None]
    x, y, z = box_origin(block, tile, Hq, Wq, tq, hq, wq, BLOCK_M)
    o.store([bh, x, y, z, 0], o_tile.to(o.dtype).reshape(o.block_shape))
    lse += bh.to(tl.int64) * Tq * Hq * Wq
    tl.store(lse + rows, (top + tl.log2(total)) * LN2, mask=row_inside)


def forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """o as q, lse fp32 [B, H, Sq]; a row without key blocks gives o = 0 and lse = -inf.

    k and v are copied if their strides are not what descriptors can have, see `descriptors.describable`; q never is.
    """
    o = torch.empty_like(q)
    return o, launch(dense_channels(q), describable(k), describable(v), o, selection, scale, forward_tile(q, selection))


def launch(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, selection: BlockSelection, scale: float, tile: Tile,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Fill o, and return lse. q: channels side by side; k, v, o: describable. scales: see SCALED of the kernel."""
    B, H, S, D = q.shape
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    layout_q, layout_k = selection.layout_q, selection.layout_k
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    order = counts if selection.uniform else longest_rows_first(counts)
    q_scales, k_scales = scales or (lse, lse)
    box_q, box_k = box_of(selection.block_q, tile.m), box_of(selection.block_k, tile.n)
    for part in batches(k, v, o):
        tma_forward_kernel[(layout_q.num_blocks * (layout_q.block_size // tile.m), len(q[part]) * H)](
            q[part], describe(k[part], layout_k.grid, box_k), describe(v[part], layout_k.grid, box_k),
            describe(o[part], layout_q.grid, box_q), lse[part], indices[part], counts[part], order[part],
            q_scales[part], k_scales[part], *strides(q), H, H // k.shape[1], layout_q.num_blocks, layout_k.num_blocks,
            indices.shape[-1], scale * LOG2E.value,
            PARTIAL_K=has_empty_slots(layout_k.is_full, layout_k.block_size, tile.n), PRECISION=precision(q),
            ORDERED=not selection.uniform, SCALED=scales is not None, **shape_arguments(selection, D, tile),
        )  # fmt: skip
    return lse


def forward_tile(q: Tensor, selection: BlockSelection) -> Tile:
    """By head dim and block size: wgmma takes 64 query slots per four warps, and more where a block has them."""
    if q.shape[-1] > 128:
        return tile_for("forward_tma_256", q, selection)
    return tile_for("forward_tma" if selection.layout_q.block_size < 128 else "forward_tma_wide", q, selection)
