"""Forward in which two neighbouring query blocks, 2i and 2i + 1, read K and V once for both. The backward is the usual.

One program holds the queries of both blocks and walks the union of their lists of key blocks. Where only one of the two
keeps a key block, the rows of the other take no part, but their share of the products is computed all the same. If the
lists share f of their K entries, the union has (2 - f) K: the products grow by 2 - f and the traffic from L2 falls by
1 - f / 2. So it never pays while products are the limit. Where traffic holds the plain kernel at u TFLOP/s, and this
kernel would do m TFLOP/s of products, it pays for f > 2 - m / u: at u = 500 and m = 650, above 0.7.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import torch.nn.functional as F
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
from lcv_bsa.backends.triton.descriptors import batches, box_inside, box_of, describable, describe, tma_refusal
from lcv_bsa.backends.triton.tuning import architecture, tile_for
from lcv_bsa.selection import BlockSelection

# Two CTAs of eight warps then fit an SM; without the limit Triton 3.9 takes 130 on sm_90 and one fits. sm_120 spills.
_REGISTERS = {"sm_90": 128}


@triton.jit
def pair_forward_kernel(
    q, k, v, o, lse, union, counts,
    q_b, q_h, q_s, heads, group, pairs, width, log2_scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the BLOCK_M = 2 * tq * hq * wq query slots of a pair of blocks of one head.

    union, counts: see `pair_lists`. The rest as in `forward_tma.tma_forward_kernel`.
    """
    tiles_n: tl.constexpr = tk * hk * wk // BLOCK_N
    slots_q: tl.constexpr = tq * hq * wq
    pair, bh = tl.program_id(0), tl.program_id(1)
    batch, head = bh // heads, bh % heads
    kv = batch * (heads // group) + head // group
    half = tl.arange(0, BLOCK_M) // slots_q
    # past the last block a is past T, so the rows of a missing second block are outside
    rows, row_inside = block_tokens(2 * pair + half, tl.arange(0, BLOCK_M) % slots_q, Tq, Hq, Wq, tq, hq, wq)
    bit = half + 1  # of an entry of union
    channels = tl.arange(0, BLOCK_D)
    q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    q_tile = load_rows(q, rows, row_inside, q_s, channels, D)
    row = bh.to(tl.int64) * pairs + pair
    count = tl.load(counts + row)
    union += row * width
    blocks_w = tl.cdiv(Wk, wk)
    blocks_hw = tl.cdiv(Hk, hk) * blocks_w

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    entry = tl.load(union)
    for i in range(count * tiles_n):
        a, b, c = block_origin(entry >> 2, blocks_hw, blocks_w, tk, hk, wk)
        slot = i % tiles_n * BLOCK_N
        a, b, c = a + slot // (hk * wk), b + slot // wk % hk, c + slot % wk
        kept = (entry & bit) != 0
        entry = tl.load(union + tl.minimum((i + 1) // tiles_n, width - 1))
        k_tile = k.load([kv, a, b, c, 0]).reshape(BLOCK_N, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if PARTIAL_K:
            s = tl.where(box_inside(a, b, c, Tk, Hk, Wk, hk, wk, BLOCK_N)[None, :], s, float("-inf"))
        new_top = tl.where(kept, tl.maximum(top, tl.max(s, 1) * log2_scale), top)
        # a row that does not keep the block subtracts infinity: no exponential of it is more than 0
        shift = tl.where(kept, new_top, float("inf"))
        p = tl.exp2(s * log2_scale - shift[:, None])
        keep = tl.exp2(tl.where(kept, top - shift, 0.0))
        total = total * keep + tl.sum(p, 1)
        v_tile = v.load([kv, a, b, c, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision=PRECISION)
        top = new_top
    # No key block at all: the sums are zero, and so is o; its lse is -inf.
    total = tl.where(total == 0.0, 1.0, total)
    lse += bh.to(tl.int64) * Tq * Hq * Wq
    tl.store(lse + rows, (top + tl.log2(total)) * LN2, mask=row_inside)
    o_tile = (acc * (1.0 / total)[:, None]).to(o.dtype).reshape(2, slots_q, BLOCK_D)
    first, second = tl.split(tl.permute(o_tile, (1, 2, 0)))
    blocks_w = tl.cdiv(Wq, wq)
    blocks_hw = tl.cdiv(Hq, hq) * blocks_w
    a, b, c = block_origin(2 * pair, blocks_hw, blocks_w, tq, hq, wq)
    o.store([bh, a, b, c, 0], first.reshape(o.block_shape))
    a, b, c = block_origin(2 * pair + 1, blocks_hw, blocks_w, tq, hq, wq)
    o.store([bh, a, b, c, 0], second.reshape(o.block_shape))


def forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """o as q, lse fp32 [B, H, Sq]; a row without key blocks gives o = 0 and lse = -inf."""
    q, k, v = dense_channels(q), describable(k), describable(v)
    B, H, S, D = q.shape
    o = torch.empty_like(q)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    layout = selection.layout_k
    union, counts = pair_lists(selection)
    tile = tile_for("pair", q, selection)
    arguments = shape_arguments(selection, D, tile) | {"BLOCK_M": 2 * selection.layout_q.block_size}
    box = box_of(selection.block_k, tile.n)
    for part in batches(k, v, o):
        pair_forward_kernel[(union.shape[2], len(q[part]) * H)](
            q[part], describe(k[part], layout.grid, box), describe(v[part], layout.grid, box),
            describe(o[part], selection.grid_q, selection.block_q), lse[part], union[part], counts[part], *strides(q),
            H, H // k.shape[1], union.shape[2], union.shape[3], scale * LOG2E.value,
            PARTIAL_K=has_empty_slots(layout.is_full, layout.block_size, tile.n), PRECISION=precision(q),
            maxnreg=_REGISTERS.get(architecture(q.device)), **arguments,
        )  # fmt: skip
    return o, lse


def pair_lists(selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """Union of the ids of query blocks 2i and 2i + 1, by merging the two sorted rows: no sort, no dense mask.

    Returns int32 [B, H, ceil(Nq / 2), 2K] of ascending id * 4 + kept, where bit 0 of kept says that block 2i keeps the
    id and bit 1 that 2i + 1 does, and their numbers, int32 [B, H, ceil(Nq / 2)]. Past its number a row holds zeros.
    """
    num_blocks = selection.layout_k.num_blocks
    K, odd = selection.indices.shape[-1], selection.indices.shape[2] % 2
    # a last block without a neighbour gets one that keeps nothing
    counts = F.pad(selection.counts, (0, odd))
    ids = F.pad(selection.indices, (0, 0, 0, odd))
    places = torch.arange(K, dtype=torch.int32, device=ids.device)
    live = places < counts[..., None]
    ids = torch.where(live, ids, num_blocks)  # what is not live sorts behind
    first, second = (x.contiguous() for x in (ids[:, :, ::2], ids[:, :, 1::2]))
    first_live, second_live = live[:, :, ::2], live[:, :, 1::2]
    # how many of the other row are smaller, and whether it has the same id
    of_first = torch.searchsorted(second, first, out_int32=True)
    of_second = torch.searchsorted(first, second, out_int32=True)
    shared = (second.gather(-1, of_first.clamp(max=K - 1).long()) == first) & first_live
    shared_before = F.pad(shared.cumsum(-1, dtype=torch.int32), (1, 0))
    place_first = places + of_first - shared_before[..., :-1]
    place_second = places + of_second - shared_before.gather(-1, of_second.long())
    union = torch.zeros(*first.shape[:3], 2 * K + 1, dtype=torch.int32, device=ids.device)
    dump = 2 * K  # a column of its own for what is not live
    # a shared id has one place, where what comes from `first` overwrites
    union.scatter_(-1, torch.where(second_live, place_second, dump).long(), second * 4 + 2)
    union.scatter_(-1, torch.where(first_live, place_first, dump).long(), first * 4 + 1 + 2 * shared.int())
    return union[..., :dump].contiguous(), (first_live.sum(-1) + second_live.sum(-1) - shared.sum(-1)).to(torch.int32)


def refusal(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why these inputs cannot run here, None when they can."""
    if selection.layout_q.block_size > 64 or q.shape[-1] > 128:
        got = f"{selection.layout_q.block_size} and {q.shape[-1]}"
        return f"it takes query blocks of up to 64 tokens and head dims up to 128, got {got}"
    return tma_refusal(q, k, v, selection)
