"""The deterministic two-kernel backward with plain pointers (Dao, arXiv 2307.08691, algorithm 2, split in two).

dq walks a query block's row of ids, dk and dv walk a key block's column (the CSR inverse); neither adds atomically, so
two runs agree to the bit.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.common import (
    LOG2E,
    block_tokens,
    dense_channels,
    has_empty_slots,
    load_rows,
    precision,
    shape_arguments,
    store_rows,
    strides,
)
from lcv_bsa.backends.triton.tuning import backward_tiles
from lcv_bsa.selection import BlockSelection


@triton.jit
def dq_kernel(
    q, k, v, do, dq, lse, delta, indices, counts,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    heads, group, num_q, width, scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query slots. lse, delta: fp32 [B, H, Sq]; delta = sum(o * do) - dlse."""
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    rows, row_inside = block_tokens(block, tile * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq)
    q_tile = load_rows(q + batch * q_b + head * q_h, rows, row_inside, q_s, channels, D)
    do_tile = load_rows(do + batch * do_b + head * do_h, rows, row_inside, do_s, channels, D)
    statistics = bh.to(tl.int64) * Tq * Hq * Wq + rows
    row_lse = tl.load(lse + statistics, mask=row_inside, other=0.0) * LOG2E
    row_delta = tl.load(delta + statistics, mask=row_inside, other=0.0)
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    row = bh.to(tl.int64) * num_q + block
    count = tl.load(counts + row)
    indices += row * width

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(count):
        key_block = tl.load(indices + j)
        for n in tl.static_range(tiles_n):
            keys, key_inside = block_tokens(key_block, n * BLOCK_N + tl.arange(0, BLOCK_N), Tk, Hk, Wk, tk, hk, wk)
            k_tile = load_rows(k, keys, key_inside, k_s, channels, D)
            v_tile = load_rows(v, keys, key_inside, v_s, channels, D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(s - row_lse[:, None])
            if PARTIAL_K:
                p = tl.where(key_inside[None, :], p, 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(dq + batch * dq_b + head * dq_h, rows, row_inside, dq_s, channels, acc * scale, D)


@triton.jit
def dkv_kernel(
    q, k, v, do, dk, dv, lse, delta, offsets, pairs,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    kv_heads, group, num_k, scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N key slots of one key block, summed over the query blocks that keep it and, with grouped
    heads, over the query heads of its group: always in the same order, so two runs agree to the bit.

    offsets [B, H, Nk + 1], pairs: the selection's CSR inverse.
    """
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tl.program_id(1)
    batch, kv_head = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    keys, key_inside = block_tokens(block, tile * BLOCK_N + tl.arange(0, BLOCK_N), Tk, Hk, Wk, tk, hk, wk)
    k_tile = load_rows(k + batch * k_b + kv_head * k_h, keys, key_inside, k_s, channels, D)
    v_tile = load_rows(v + batch * v_b + kv_head * v_h, keys, key_inside, v_s, channels, D)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(group):
        head = kv_head * group + g
        q_base = q + batch * q_b + head * q_h
        do_base = do + batch * do_b + head * do_h
        bqh = batch * kv_heads * group + head
        statistics = bqh * Tq * Hq * Wq
        first = tl.load(offsets + bqh * (num_k + 1) + block)
        last = tl.load(offsets + bqh * (num_k + 1) + block + 1)
        for j in range(first, last):
            query_block = tl.load(pairs + j)
            for m in tl.static_range(tiles_m):
                rows, row_inside = block_tokens(
                    query_block, m * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq
                )
                q_tile = load_rows(q_base, rows, row_inside, q_s, channels, D)
                do_tile = load_rows(do_base, rows, row_inside, do_s, channels, D)
                row_lse = tl.load(lse + statistics + rows, mask=row_inside, other=0.0) * LOG2E
                row_delta = tl.load(delta + statistics + rows, mask=row_inside, other=0.0)
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)  # [N, M]
                p = tl.exp2(s - row_lse[None, :])
                if PARTIAL_Q:
                    p = tl.where(row_inside[None, :], p, 0.0)
                dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
                ds = p * (dp - row_delta[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_rows(dk + batch * dk_b + kv_head * dk_h, keys, key_inside, dk_s, channels, dk_acc * scale, D)
    store_rows(dv + batch * dv_b + kv_head * dv_h, keys, key_inside, dv_s, channels, dv_acc, D)


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v. do, dlse: gradients of o and lse."""
    q, k, v, do = (dense_channels(x) for x in (q, k, v, do))
    B, H, _, D = q.shape
    group = H // k.shape[1]
    delta = (o.float() * do.float()).sum(-1) - dlse.float()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    inverse = selection.inverse()
    layout_q, layout_k = selection.layout_q, selection.layout_k
    for_dq, for_dkv = backward_tiles(q, selection)
    dq_kernel[(layout_q.num_blocks * triton.cdiv(layout_q.block_size, for_dq.m), B * H)](
        q, k, v, do, dq, lse, delta, selection.indices.contiguous(), selection.counts.contiguous(),
        *strides(q, k, v, do, dq), H, group, layout_q.num_blocks, selection.indices.shape[-1], scale,
        PARTIAL_K=has_empty_slots(layout_k.is_full, layout_k.block_size, for_dq.n),
        PRECISION=precision(q), **shape_arguments(selection, D, for_dq),
    )  # fmt: skip
    dkv_kernel[(layout_k.num_blocks * triton.cdiv(layout_k.block_size, for_dkv.n), B * k.shape[1])](
        q, k, v, do, dk, dv, lse, delta, inverse.offsets, inverse.rows, *strides(q, k, v, do, dk, dv),
        k.shape[1], group, layout_k.num_blocks, scale,
        PARTIAL_Q=has_empty_slots(layout_q.is_full, layout_q.block_size, for_dkv.m),
        PRECISION=precision(q), **shape_arguments(selection, D, for_dkv),
    )  # fmt: skip
    return dq, dk, dv
