"""Who holds which tokens: a slab of whole blocks along one axis of the grid for each rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lcv_bsa.layout import BlockLayout, Triple

_AXES = ("T", "H", "W")


@dataclass(frozen=True)
class Shard:
    """A (T, H, W) grid of (t, h, w) blocks cut across num_ranks ranks along one axis.

    axis: "T", "H" or "W", None for the one with most blocks (the first of equals). Rank r holds num_blocks // num_ranks
    consecutive blocks along it, the first num_blocks % num_ranks ranks one more; only the last rank holds blocks that
    are partial along the axis. Tokens of a slab are in raster order of `local(rank).grid`. Raises ValueError for an
    axis with fewer blocks than ranks.
    """

    grid: Triple
    block: Triple
    num_ranks: int
    axis: str | None = None

    def __post_init__(self) -> None:
        blocks = self.layout.block_grid
        object.__setattr__(self, "grid", self.layout.grid)
        object.__setattr__(self, "block", self.layout.block)
        if self.axis is None:
            object.__setattr__(self, "axis", _AXES[blocks.index(max(blocks))])
        if self.axis not in _AXES:
            raise ValueError(f"axis must be 'T', 'H', 'W' or None, got {self.axis!r}")
        if not 1 <= self.num_ranks <= blocks[self.dim]:
            raise ValueError(
                f"num_ranks must be 1..{blocks[self.dim]} (the blocks along axis {self.axis}), got {self.num_ranks}"
            )

    @cached_property
    def layout(self) -> BlockLayout:
        """Layout of the whole grid."""
        return BlockLayout(self.grid, self.block)

    @property
    def dim(self) -> int:
        """Place of the axis in (T, H, W)."""
        return _AXES.index(self.axis or "")

    @property
    def of_blocks(self) -> "Shard":
        """The same cut of the blocks themselves, each seen as one token: for means, [B, H, N, D]."""
        return Shard(self.layout.block_grid, (1, 1, 1), self.num_ranks, self.axis)

    def span(self, rank: int) -> tuple[int, int]:
        """First block along the axis that `rank` holds, and the first that it holds no more."""
        share, rest = divmod(self.layout.block_grid[self.dim], self.num_ranks)
        return rank * share + min(rank, rest), (rank + 1) * share + min(rank + 1, rest)

    def local(self, rank: int) -> BlockLayout:
        """Layout of the slab that `rank` holds."""
        start, stop = self._token_span(rank)
        grid = [*self.grid]
        grid[self.dim] = stop - start
        return BlockLayout((grid[0], grid[1], grid[2]), self.block)

    def cut(self, x: Tensor, rank: int) -> Tensor:
        """The slab of `rank`: [B, H, S, ...] -> [B, H, S_rank, ...]. Differentiable."""
        start, stop = self._token_span(rank)
        return x.unflatten(2, self.grid).narrow(2 + self.dim, start, stop - start).flatten(2, 4)

    def join(self, slabs: Sequence[Tensor]) -> Tensor:
        """Inverse of `cut`: slabs [B, H, S_rank, ...] of all ranks, in order -> [B, H, S, ...]. Differentiable."""
        boxes = [x.unflatten(2, self.local(rank).grid) for rank, x in enumerate(slabs)]
        return torch.cat(boxes, 2 + self.dim).flatten(2, 4)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Owner and local id of blocks of the whole grid, int32 as `ids`. Order is kept within an owner."""
        stride, blocks = prod(self.layout.block_grid[self.dim + 1 :]), self.layout.block_grid[self.dim]
        spans = torch.tensor([self.span(rank) for rank in range(self.num_ranks)], dtype=torch.int32, device=ids.device)
        starts, sizes = spans[:, 0].contiguous(), spans[:, 1] - spans[:, 0]
        place = ids // stride % blocks
        owner = torch.bucketize(place, starts[1:], right=True)
        local = (ids // (stride * blocks) * sizes[owner] + place - starts[owner]) * stride + ids % stride
        return owner.to(torch.int32), local

    def _token_span(self, rank: int) -> tuple[int, int]:
        size = self.block[self.dim]
        start, stop = self.span(rank)
        return start * size, min(stop * size, self.grid[self.dim])


def scatter(x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
    """This rank's slab of a tensor that every rank holds whole: [B, H, S, ...] -> [B, H, S_rank, ...].

    Nothing is sent. Differentiable: the gradient of x is zero outside the slab. Raises ValueError.
    """
    rank = rank_in(mesh, shard)
    check_tokens("x", x, shard.layout)
    return shard.cut(x, rank)


def gather(x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
    """The whole tensor on every rank: slabs [B, H, S_rank, ...] -> [B, H, S, ...].

    Differentiable where every rank goes on to compute the same loss: each takes its slab of the gradient that it
    holds itself, and nothing is sent. Raises ValueError.
    """
    rank = rank_in(mesh, shard)
    check_tokens("x", x, shard.local(rank))
    return _gather(x, shard, mesh)


def rank_in(mesh: DeviceMesh, *shards: Shard) -> int:
    """This process's rank in the mesh. Raises ValueError unless the mesh has one dimension, of the shards' size."""
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        hint = f"; take one of its dimensions, such as mesh[{names[-1]!r}]" if names else ""
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}{hint}")
    for shard in shards:
        if shard.num_ranks != mesh.size():
            raise ValueError(f"mesh must have the shard's {shard.num_ranks} ranks, got {mesh.size()}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must hold this process, global rank {dist.get_rank()}, got ranks {mesh.mesh.tolist()}")
    return mesh.get_local_rank()


def check_tokens(name: str, x: Tensor, layout: BlockLayout) -> None:
    """Raises ValueError unless x is [B, H, S, ...] with the tokens of the layout's grid."""
    if x.ndim < 3 or x.shape[2] != layout.num_tokens:
        T, H, W = layout.grid
        raise ValueError(f"{name} must be [B, H, {T}*{H}*{W} = {layout.num_tokens}, ...], got {list(x.shape)}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        ctx.shard, ctx.rank = shard, mesh.get_local_rank()
        tokens = [shard.local(rank).num_tokens for rank in range(shard.num_ranks)]
        # slabs may be uneven, what is gathered must not
        sent = F.pad(x, (0, 0) * (x.ndim - 3) + (0, max(tokens) - x.shape[2])).contiguous()
        received = [torch.empty_like(sent) for _ in tokens]
        dist.all_gather(received, sent, group=mesh.get_group())
        return shard.join([slab[:, :, :n] for slab, n in zip(received, tokens)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.shard.cut(grads[0], ctx.rank), None, None


_gather = cast(Callable[[Tensor, Shard, DeviceMesh], Tensor], torch.compiler.disable(_Gather.apply))
