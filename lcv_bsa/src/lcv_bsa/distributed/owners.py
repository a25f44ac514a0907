"""A selection split by who owns the key blocks."""

from dataclasses import replace

import torch
from torch import Tensor

from lcv_bsa.distributed.shard import Shard
from lcv_bsa.selection import BlockSelection


def split_by_owner(selection: BlockSelection, shard_k: Shard) -> list[BlockSelection | None]:
    """For each rank, what `selection` keeps of its key blocks, in ids local to it; None where no row keeps any.

    A row that keeps none of them has count 0 there. One wait for the device, none later.
    """
    owner, local = shard_k.locate(selection.indices)  # [B, H, Nq, K]
    places = torch.arange(selection.indices.shape[-1], device=selection.indices.device)
    owner = torch.where(places < selection.counts[..., None], owner, -1)
    counts = torch.stack([(owner == rank).sum(-1, dtype=torch.int32) for rank in range(shard_k.num_ranks)])
    widths = counts.flatten(1).amax(1).tolist()
    return [
        replace(
            selection,
            indices=_left_aligned(local, owner == rank, width),
            counts=counts[rank],
            grid_k=shard_k.local(rank).grid,
            uniform=False,
        )
        if width
        else None
        for rank, width in enumerate(widths)
    ]


def _left_aligned(ids: Tensor, wanted: Tensor, width: int) -> Tensor:
    """The wanted of each row's ascending ids, int32 [..., width], then its last one again, or 0 where there is none."""
    places = torch.where(wanted, wanted.cumsum(-1) - 1, width)
    aligned = ids.new_zeros(*ids.shape[:-1], width + 1).scatter_(-1, places, ids)
    return aligned[..., :width].cummax(-1).values
