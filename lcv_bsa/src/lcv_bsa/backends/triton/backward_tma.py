"""The two-kernel backward of `backward.py` for sm_90 and up, its walks fetched block by block by TMA descriptors.

What the design rests on, at head dim 128, blocks of 64 tokens and 4 warps on sm_90:

* What a program keeps (q and do for dq, k and v for dk and dv) is read by pointers: a reshaped descriptor load of the
  left operand of a product would be held in registers, 60 more of them. What it walks over goes from its place in
  memory to shared memory and from there into wgmma, through no register.
* s is computed as k @ trans(q) for dk and dv, so that p and ds go from the registers of one product to the left operand
  of the next. The price, lse and delta along the columns, 32 registers, is less than two trips through shared memory.
* lse and delta lie in block order, 64 neighbours per block, and mask the slots without a token by themselves.
* Two stages: while one pair of tiles is multiplied the next is on its way. With one stage dq would have three CTAs per
  SM instead of two, but each of its turns would wait for two copies, one after the other. dk and dv take a third stage,
  which holds no tile: it fetches the ids, which have to be there before a copy can start.
* Eight warps on tiles of 64 x 64 would compute s and dp twice: wgmma wants 64 rows for every four warps.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.backward import add_dq, backward_arguments, longest_keys_first
from lcv_bsa.backends.triton.common import LOG2E, block_origin, block_tokens, dense_channels, load_rows, strides
from lcv_bsa.backends.triton.descriptors import batches, box_inside, box_of, box_origin, describable, describe
from lcv_bsa.backends.triton.forward import longest_rows_first
from lcv_bsa.backends.triton.inverse import inverse_selection
from lcv_bsa.backends.triton.statistics import row_statistics
from lcv_bsa.backends.triton.tuning import Tile, tile_for
from lcv_bsa.selection import BlockSelection


@triton.jit
def slot_origin(block, slot, blocks_hw, blocks_w, t: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """Raster coordinates (a, b, c) of a slot of a block, see `block_origin`."""
    a, b, c = block_origin(block, blocks_hw, blocks_w, t, h, w)
    return a + slot // (h * w), b + slot // w % h, c + slot % w


@triton.jit
def tma_dq_kernel(
    q, k, v, do, dq, log2_lse, delta, indices, counts, order,
    q_b, q_h, q_s, do_b, do_h, do_s,
    heads, group, num_q, width, scale, log2_scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr, PARTIAL_K: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query slots, as `dq_kernel`. k, v, dq: descriptors [B * heads, T, H, W, D]."""
    tiles_m: tl.constexpr = tq * hq * wq // BLOCK_M
    tiles_n: tl.constexpr = tk * hk * wk // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    if ORDERED:
        block = tl.load(order + bh * num_q + block)
    batch, head = bh // heads, bh % heads
    kv = batch * (heads // group) + head // group
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    slots = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, row_inside = block_tokens(block, slots, Tq, Hq, Wq, tq, hq, wq)
    q_tile = load_rows(q + batch * q_b + head * q_h, rows, row_inside, q_s, channels, D)
    do_tile = load_rows(do + batch * do_b + head * do_h, rows, row_inside, do_s, channels, D)
    row = bh.to(tl.int64) * num_q + block
    row_lse = tl.load(log2_lse + row * SLOTS + slots)
    row_delta = tl.load(delta + row * SLOTS + slots)
    count = tl.load(counts + row)
    indices += row * width
    blocks_w = tl.cdiv(Wk, wk)
    blocks_hw = tl.cdiv(Hk, hk) * blocks_w

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(count * tiles_n):
        key_block, slot = tl.load(indices + i // tiles_n), i % tiles_n * BLOCK_N
        a, b, c = slot_origin(key_block, slot, blocks_hw, blocks_w, tk, hk, wk)
        k_tile = k.load([kv, a, b, c, 0]).reshape(BLOCK_N, BLOCK_D)
        v_tile = v.load([kv, a, b, c, 0]).reshape(BLOCK_N, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        p = tl.exp2(s * log2_scale - row_lse[:, None])
        if PARTIAL_K:
            p = tl.where(box_inside(a, b, c, Tk, Hk, Wk, hk, wk, BLOCK_N)[None, :], p, 0.0)
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    x, y, z = box_origin(block, tile, Hq, Wq, tq, hq, wq, BLOCK_M)
    dq.store([bh, x, y, z, 0], (acc * scale).to(dq.dtype).reshape(dq.block_shape))


@triton.jit
def tma_dkv_kernel(
    q, k, v, do, dq_sums, dk, dv, log2_lse, delta, offsets, pairs, order,
    k_b, k_h, k_s, v_b, v_h, v_s,
    kv_heads, group, num_q, num_k, scale, log2_scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr, PARTIAL_K: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N key slots, as `dkv_kernel`. q, do, dk, dv: descriptors [B * heads, T, H, W, D]."""
    tiles_m: tl.constexpr = tq * hq * wq // BLOCK_M
    tiles_n: tl.constexpr = tk * hk * wk // BLOCK_N
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
        bqh = bh * group + g
        first = tl.load(offsets + bqh.to(tl.int64) * (num_k + 1) + block)
        last = tl.load(offsets + bqh.to(tl.int64) * (num_k + 1) + block + 1)
        for i in range((last - first) * tiles_m):
            query_block, slot = tl.load(pairs + first + i // tiles_m), i % tiles_m * BLOCK_M
            a, b, c = slot_origin(query_block, slot, blocks_hw, blocks_w, tq, hq, wq)
            q_tile = q.load([bqh, a, b, c, 0]).reshape(BLOCK_M, BLOCK_D)
            do_tile = do.load([bqh, a, b, c, 0]).reshape(BLOCK_M, BLOCK_D)
            row = bqh.to(tl.int64) * num_q + query_block
            slots = slot + tl.arange(0, BLOCK_M)
            row_lse = tl.load(log2_lse + row * SLOTS + slots)
            row_delta = tl.load(delta + row * SLOTS + slots)
            s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)  # [N, M]
            p = tl.exp2(s * log2_scale - row_lse[None, :])
            if FUSED and PARTIAL_K:
                p = tl.where(key_inside[:, None], p, 0.0)
            dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
            dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
            ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
            dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision=PRECISION)
            if FUSED:
                add_dq(dq_sums, row * (SLOTS // BLOCK_M) + i % tiles_m, ds, k_tile, channels, BLOCK_M, PRECISION)
    x, y, z = box_origin(block, tile, Hk, Wk, tk, hk, wk, BLOCK_N)
    dk.store([bh, x, y, z, 0], (dk_acc * scale).to(dk.dtype).reshape(dk.block_shape))
    dv.store([bh, x, y, z, 0], dv_acc.to(dv.dtype).reshape(dv.block_shape))


def launch_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, rows: tuple[Tensor, Tensor], selection: BlockSelection, scale: float,
    tile: Tile,
) -> Tensor:  # fmt: skip
    """dq. rows: `row_statistics`."""
    q, do, k, v = dense_channels(q), dense_channels(do), describable(k), describable(v)
    H, num_q, uniform = q.shape[1], selection.layout_q.num_blocks, selection.uniform
    dq = torch.empty_like(q)
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    order = counts if uniform else longest_rows_first(counts)
    box_q, box_k = box_of(selection.block_q, tile.m), box_of(selection.block_k, tile.n)
    for part in batches(k, v, dq):
        tma_dq_kernel[(num_q * (selection.layout_q.block_size // tile.m), len(q[part]) * H)](
            q[part], *(describe(x[part], selection.grid_k, box_k) for x in (k, v)),
            do[part], describe(dq[part], selection.grid_q, box_q), *(x[part] for x in rows),
            indices[part], counts[part], order[part], *strides(q, do), H, H // k.shape[1], num_q, indices.shape[-1],
            scale, scale * LOG2E.value, ORDERED=not uniform, **backward_arguments(q, rows, selection, tile),
        )  # fmt: skip
    return dq


def launch_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, rows: tuple[Tensor, Tensor], selection: BlockSelection, scale: float,
    tile: Tile, dq_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk, dv. rows: `row_statistics`. dq_sums: see `add_dq`, None for no dq."""
    k, v, q, do = dense_channels(k), dense_channels(v), describable(q), describable(do)
    H, num_k = k.shape[1], selection.layout_k.num_blocks
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    inverse = inverse_selection(selection)
    order = longest_keys_first(inverse.offsets, H)
    box_q, box_k = box_of(selection.block_q, tile.m), box_of(selection.block_k, tile.n)
    for part in batches(q, do, dk, dv):
        tma_dkv_kernel[(num_k * (selection.layout_k.block_size // tile.n), len(k[part]) * H)](
            describe(q[part], selection.grid_q, box_q), k[part], v[part], describe(do[part], selection.grid_q, box_q),
            None if dq_sums is None else dq_sums[part],
            *(describe(x[part], selection.grid_k, box_k) for x in (dk, dv)), *(x[part] for x in rows),
            inverse.offsets[part], inverse.rows, order[part], *strides(k, v), H, q.shape[1] // H,
            selection.layout_q.num_blocks, num_k, scale, scale * LOG2E.value, FUSED=dq_sums is not None,
            **backward_arguments(q, rows, selection, tile),
        )  # fmt: skip
    return dk, dv


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v. do, dlse: gradients of o and lse, of any strides; what descriptors cannot read is copied,
    see `descriptors.describable`. Two runs agree to the bit."""
    for_dq, for_dkv = tile_for("dq_tma", q, selection), tile_for("dkv_tma", q, selection)
    rows = row_statistics(o, lse, do, dlse, selection, multiple=max(for_dq.m, for_dkv.m))
    dq = launch_dq(q, k, v, do, rows, selection, scale, for_dq)
    return dq, *launch_dkv(q, k, v, do, rows, selection, scale, for_dkv)
