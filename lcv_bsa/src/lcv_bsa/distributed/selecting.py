"""Selection when queries and keys are cut across ranks: only the block means of the keys are sent."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lcv_bsa.api import select_blocks
from lcv_bsa.checks import check_pair
from lcv_bsa.distributed.shard import Shard, gather, rank_in
from lcv_bsa.layout import block_means
from lcv_bsa.precision import no_autocast
from lcv_bsa.selection import BlockSelection


def select_blocks_sharded(
    q: Tensor,
    k: Tensor,
    shard_q: Shard,
    shard_k: Shard | None,
    mesh: DeviceMesh,
    *,
    top_k: int | None = None,
    keep: float | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    min_blocks: int = 1,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> BlockSelection:
    """`select_blocks` over the whole key grid, for this rank's query blocks.

    q: [B, H, Sq_rank, D], k: [B, Hkv, Skv_rank, D], this rank's slabs. shard_k: None for shard_q. mesh: one dimension.
    The other arguments are those of `select_blocks`; keep counts blocks of the whole key grid.

    Returns a selection with this rank's grid_q, the whole grid_k, and ids of the whole grid: this rank's rows of what
    one process selects, as `ring_attention` takes it. (Scores that differ in their last bits alone may order otherwise:
    a product of fewer rows may be summed in another order.) Nothing is differentiated. Raises ValueError.
    """
    shard_k = shard_q if shard_k is None else shard_k
    rank = rank_in(mesh, shard_q, shard_k)
    local_q, local_k = shard_q.local(rank), shard_k.local(rank)
    check_pair(q, k, local_q, local_k)
    with torch.no_grad(), no_autocast(q.device):
        mean_q, mean_k = block_means(q, local_q), block_means(k, local_k)
        mean_k = gather(mean_k, shard_k.of_blocks, mesh)
    # a mean is a token in a block of its own, so that rule and ties are those of one process
    found = select_blocks(
        mean_q,
        mean_k,
        local_q.block_grid,
        shard_k.layout.block_grid,
        (1, 1, 1),
        top_k=top_k,
        keep=keep,
        cdf_threshold=cdf_threshold,
        scale=scale,
        min_blocks=min_blocks,
        backend=backend,
    )
    return replace(found, grid_q=local_q.grid, grid_k=shard_k.grid, block_q=shard_q.block, block_k=shard_k.block)
