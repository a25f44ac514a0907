"""The backward with plain pointers (Dao, arXiv 2307.08691, algorithm 2, split in two): sm_80 and up, gfx942.

dq walks a query block's row of ids, dk and dv walk a key block's column (the CSR inverse); neither adds atomically, so
two runs agree to the bit. The softmax scale is applied in fp32 after the dot product: a K scaled beforehand and rounded
to 16 bits would put errors of 0.7 on the gradients of large logits.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.common import (
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
from lcv_bsa.backends.triton.forward import longest_rows_first
from lcv_bsa.backends.triton.inverse import inverse_selection
from lcv_bsa.backends.triton.statistics import row_statistics
from lcv_bsa.backends.triton.tuning import Tile, tile_for
from lcv_bsa.selection import BlockSelection


@triton.jit
def dq_kernel(
    q, k, v, do, dq, log2_lse, delta, indices, counts, order,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    heads, group, num_q, width, scale, log2_scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr, PARTIAL_K: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query slots. log2_lse, delta [B, H, Nq, SLOTS]: `row_statistics`. order [B, H, Nq]: which block
    program i works on, where ORDERED. log2_scale: scale * log2(e)."""
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    if ORDERED:
        block = tl.load(order + bh * num_q + block)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    slots = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, row_inside = block_tokens(block, slots, Tq, Hq, Wq, tq, hq, wq)
    q_tile = load_rows(q + batch * q_b + head * q_h, rows, row_inside, q_s, channels, D)
    do_tile = load_rows(do + batch * do_b + head * do_h, rows, row_inside, do_s, channels, D)
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    row = bh.to(tl.int64) * num_q + block
    row_lse = tl.load(log2_lse + row * SLOTS + slots)
    row_delta = tl.load(delta + row * SLOTS + slots)
    count = tl.load(counts + row)
    indices += row * width
    blocks_w = tl.cdiv(Wk, wk)
    blocks_hw = tl.cdiv(Hk, hk) * blocks_w

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(count * tiles_n):
        a, b, c = block_origin(tl.load(indices + i // tiles_n), blocks_hw, blocks_w, tk, hk, wk)
        key_slots = i % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        keys, key_inside = slot_tokens(a, b, c, key_slots, Tk, Hk, Wk, tk, hk, wk)
        k_tile = load_rows(k, keys, key_inside, k_s, channels, D)
        v_tile = load_rows(v, keys, key_inside, v_s, channels, D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        p = tl.exp2(s * log2_scale - row_lse[:, None])
        if PARTIAL_K:
            p = tl.where(key_inside[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(dq + batch * dq_b + head * dq_h, rows, row_inside, dq_s, channels, acc * scale, D)


@triton.jit
def dkv_kernel(
    q, k, v, do, dq_sums, dk, dv, log2_lse, delta, offsets, pairs, order,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    kv_heads, group, num_q, num_k, scale, log2_scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr, PARTIAL_K: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N key slots of one key block, summed over the query blocks that keep it and, with grouped
    heads, over the query heads of its group: always in the same order, so two runs agree to the bit.

    offsets [B, H, Nk + 1], pairs: the selection's CSR inverse. order [B, Hkv, Nk]: which block program i works on.
    FUSED adds this block's share of dq / scale to dq_sums, see `add_dq`.
    """
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    tile, bh = tl.program_id(0) % tiles_n, tl.program_id(1)
    block = tl.load(order + bh * num_k + tl.program_id(0) // tiles_n)
    batch, kv_head = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    keys, key_inside = block_tokens(block, tile * BLOCK_N + tl.arange(0, BLOCK_N), Tk, Hk, Wk, tk, hk, wk)
    k_tile = load_rows(k + batch * k_b + kv_head * k_h, keys, key_inside, k_s, channels, D)
    v_tile = load_rows(v + batch * v_b + kv_head * v_h, keys, key_inside, v_s, channels, D)
    blocks_w = tl.cdiv(Wq, wq)
    blocks_hw = tl.cdiv(Hq, hq) * blocks_w

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(group):
        q_base = q + batch * q_b + (kv_head * group + g) * q_h
        do_base = do + batch * do_b + (kv_head * group + g) * do_h
        bqh = bh.to(tl.int64) * group + g
        first = tl.load(offsets + bqh * (num_k + 1) + block)
        last = tl.load(offsets + bqh * (num_k + 1) + block + 1)
        for i in range((last - first) * tiles_m):
            query_block = tl.load(pairs + first + i // tiles_m)
            a, b, c = block_origin(query_block, blocks_hw, blocks_w, tq, hq, wq)
            slots = i % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
            rows, row_inside = slot_tokens(a, b, c, slots, Tq, Hq, Wq, tq, hq, wq)
            q_tile = load_rows(q_base, rows, row_inside, q_s, channels, D)
            do_tile = load_rows(do_base, rows, row_inside, do_s, channels, D)
            row = bqh * num_q + query_block
            row_lse = tl.load(log2_lse + row * SLOTS + slots)
            row_delta = tl.load(delta + row * SLOTS + slots)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)  # [N, M]
            p = tl.exp2(s * log2_scale - row_lse[None, :])
            # a slot without a key spoils but its own row of dk and dv, which is not stored
            if FUSED and PARTIAL_K:
                p = tl.where(key_inside[:, None], p, 0.0)
            dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
            dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision=PRECISION)
            if FUSED:
                add_dq(dq_sums, row * (SLOTS // BLOCK_M) + i % tiles_m, ds, k_tile, channels, BLOCK_M, PRECISION)
    store_rows(dk + batch * dk_b + kv_head * dk_h, keys, key_inside, dk_s, channels, dk_acc * scale, D)
    store_rows(dv + batch * dv_b + kv_head * dv_h, keys, key_inside, dv_s, channels, dv_acc, D)


@triton.jit
def add_dq(dq_sums, tile, ds, k_tile, channels, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):
    """Adds trans(k) @ ds to tile `tile` of dq_sums, fp32 [tiles, BLOCK_D, BLOCK_M]. ds [N, M], k_tile [N, BLOCK_D]."""
    part = tl.dot(tl.trans(k_tile), ds, input_precision=PRECISION)
    places = channels[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.atomic_add(dq_sums + tile * (k_tile.shape[1] * BLOCK_M) + places, part, sem="relaxed")


def launch_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, rows: tuple[Tensor, Tensor], selection: BlockSelection, scale: float,
    tile: Tile,
) -> Tensor:  # fmt: skip
    """dq. rows: `row_statistics`."""
    q, k, v, do = (dense_channels(x) for x in (q, k, v, do))
    B, H = q.shape[:2]
    dq = torch.empty_like(q)
    layout = selection.layout_q
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    order = counts if selection.uniform else longest_rows_first(counts)
    dq_kernel[(layout.num_blocks * triton.cdiv(layout.block_size, tile.m), B * H)](
        q, k, v, do, dq, *rows, indices, counts, order, *strides(q, k, v, do, dq),
        H, H // k.shape[1], layout.num_blocks, indices.shape[-1], scale, scale * LOG2E.value,
        ORDERED=not selection.uniform, **backward_arguments(q, rows, selection, tile),
    )  # fmt: skip
    return dq


def launch_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, rows: tuple[Tensor, Tensor], selection: BlockSelection, scale: float,
    tile: Tile, dq_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk, dv. rows: `row_statistics`. dq_sums: see `add_dq`, None for no dq."""
    q, k, v, do = (dense_channels(x) for x in (q, k, v, do))
    B, H = q.shape[:2]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    layout = selection.layout_k
    inverse = inverse_selection(selection)
    order = longest_keys_first(inverse.offsets, k.shape[1])
    dkv_kernel[(layout.num_blocks * triton.cdiv(layout.block_size, tile.n), B * k.shape[1])](
        q, k, v, do, dq_sums, dk, dv, *rows, inverse.offsets, inverse.rows, order,
        *strides(q, k, v, do, dk, dv), k.shape[1], H // k.shape[1], selection.layout_q.num_blocks, layout.num_blocks,
        scale, scale * LOG2E.value, FUSED=dq_sums is not None, **backward_arguments(q, rows, selection, tile),
    )  # fmt: skip
    return dk, dv


def backward_arguments(q: Tensor, rows: tuple[Tensor, Tensor], selection: BlockSelection, tile: Tile) -> dict[str, Any]:
    """What both kernels, with pointers or descriptors, want to know besides grids and heads."""
    layout = selection.layout_k
    partial = has_empty_slots(layout.is_full, layout.block_size, tile.n)
    more = {"SLOTS": rows[0].shape[-1], "PARTIAL_K": partial, "PRECISION": precision(q)}
    return shape_arguments(selection, q.shape[-1], tile) | more


def longest_keys_first(offsets: Tensor, kv_heads: int) -> Tensor:
    """The order in which key blocks are worked on, int32 [B, Hkv, Nk], from CSR offsets [B, H, Nk + 1].

    Popular keys are kept many times as often as others, and a long column begun last would run on alone.
    """
    columns = offsets.diff(dim=-1).unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.int32)
    return longest_rows_first(columns)


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v. do, dlse: gradients of o and lse, of any strides."""
    for_dq, for_dkv = tile_for("dq", q, selection), tile_for("dkv", q, selection)
    rows = row_statistics(o, lse, do, dlse, selection, multiple=max(for_dq.m, for_dkv.m))
    dq = launch_dq(q, k, v, do, rows, selection, scale, for_dq)
    return dq, *launch_dkv(q, k, v, do, rows, selection, scale, for_dkv)
