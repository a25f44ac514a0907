"""What the backward needs to know about each query: its lse and its delta, in block order."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.common import LOG2E, block_tokens, dense_channels, load_rows, shape_arguments, strides
from lcv_bsa.backends.triton.tuning import Tile
from lcv_bsa.selection import BlockSelection

_ROWS_AT_ONCE = 64


@triton.jit
def statistics_kernel(
    o, do, lse, dlse, log2_lse, delta,
    o_b, o_h, o_s, do_b, do_h, do_s, dlse_b, dlse_h, dlse_s, heads, num_q,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query slots of one query block of one head."""
    tiles: tl.constexpr = SLOTS // BLOCK_M
    block, tile, bh = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    slots = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, inside = block_tokens(block, slots, Tq, Hq, Wq, tq, hq, wq)
    o_tile = load_rows(o + batch * o_b + head * o_h, rows, inside, o_s, channels, D)
    do_tile = load_rows(do + batch * do_b + head * do_h, rows, inside, do_s, channels, D)
    row_dlse = tl.load(dlse + batch * dlse_b + head * dlse_h + rows * dlse_s, mask=inside, other=0.0)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1) - row_dlse.to(tl.float32)
    row_lse = tl.load(lse + bh.to(tl.int64) * Tq * Hq * Wq + rows, mask=inside, other=float("inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    place = (bh.to(tl.int64) * num_q + block) * SLOTS + slots
    tl.store(log2_lse + place, row_lse * LOG2E)
    tl.store(delta + place, row_delta)


def row_statistics(
    o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection, *, multiple: int
) -> tuple[Tensor, Tensor]:
    """lse * log2(e), and delta = sum(o * do) - dlse (Dao, arXiv 2307.08691), both fp32 [B, H, Nq, slots].

    Slots that hold no token, and rows that keep no key, have +inf for their lse: exp2(s - lse) is 0 there, without a
    mask. multiple: the slots of a block are rounded up to it; a power of two from 16.
    """
    o, do = dense_channels(o), dense_channels(do)
    B, H, _, D = o.shape
    layout = selection.layout_q
    slots = triton.cdiv(layout.block_size, multiple) * multiple
    log2_lse, delta = torch.empty(2, B, H, layout.num_blocks, slots, dtype=torch.float32, device=o.device)
    rows = min(multiple, _ROWS_AT_ONCE)
    statistics_kernel[(layout.num_blocks * (slots // rows), B * H)](
        o, do, lse.contiguous(), dlse, log2_lse, delta, *strides(o, do, dlse), H, layout.num_blocks,
        SLOTS=slots, **shape_arguments(selection, D, Tile(rows, rows, 4, 1)),
    )  # fmt: skip
    return log2_lse, delta
