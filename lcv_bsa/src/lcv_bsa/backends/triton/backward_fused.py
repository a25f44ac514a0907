"""The fused backward: one walk over the queries of each key block gives dk, dv and its share of dq.

Five products per pair of blocks in place of the seven of the two kernels, and one exp2 in place of two. The shares of
dq are added by fp32 atomics in whatever order the programs run, so two runs differ by the rounding of those sums.
Each pair of 64 x 64 tokens adds 32 KB, at head dim 128, to sums that lie in block order: B * H * S * D * 4 bytes more
memory than the two kernels take.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.backward import launch_dkv
from lcv_bsa.backends.triton.backward_tma import launch_dkv as launch_tma_dkv
from lcv_bsa.backends.triton.common import block_tokens, dense_channels, shape_arguments, store_rows, strides
from lcv_bsa.backends.triton.descriptors import tma_refusal
from lcv_bsa.backends.triton.statistics import row_statistics
from lcv_bsa.backends.triton.tuning import Tile, tile_for
from lcv_bsa.selection import BlockSelection


@triton.jit
def dq_sums_kernel(
    dq_sums, dq, dq_b, dq_h, dq_s, heads, num_q, scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of sums, times the scale, to its places in dq."""
    tiles: tl.constexpr = SLOTS // BLOCK_M
    block, tile, bh = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    rows, inside = block_tokens(block, tile * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq)
    dq_sums += ((bh.to(tl.int64) * num_q + block) * tiles + tile) * (BLOCK_D * BLOCK_M)
    sums = tl.load(dq_sums + channels[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :])
    store_rows(dq + batch * dq_b + head * dq_h, rows, inside, dq_s, channels, tl.trans(sums) * scale, D)


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v; dk and dv are those of the two kernels. Not deterministic: dq's sums are atomic.

    Walks with descriptors where `tma_refusal` has no objection, with pointers elsewhere.
    """
    walk = "fused" if tma_refusal(q, k, v, selection) else "fused_tma"
    return walked_backward(q, k, v, o, lse, do, dlse, selection, scale, walk=walk)


def walked_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float, *, walk: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward`. walk: "fused" for pointers, "fused_tma" for descriptors."""
    tile = tile_for(walk, q, selection)
    rows = row_statistics(o, lse, do, dlse, selection, multiple=tile.m)
    B, H, num_q, slots = rows[0].shape
    arguments = shape_arguments(selection, q.shape[-1], Tile(tile.m, tile.m, 4, 1))
    dq_sums = q.new_zeros(B, H, num_q, slots * arguments["BLOCK_D"], dtype=torch.float32)
    dk, dv = _LAUNCH_DKV[walk](q, k, v, do, rows, selection, scale, tile, dq_sums)
    dq = torch.empty_like(dense_channels(q))
    dq_sums_kernel[(num_q * (slots // tile.m), B * H)](
        dq_sums, dq, *strides(dq), H, num_q, scale, SLOTS=slots, **arguments
    )
    return dq, dk, dv


_LAUNCH_DKV = {"fused": launch_dkv, "fused_tma": launch_tma_dkv}
