"""Ulysses (DeepSpeed, arXiv 2309.14509): exchange a share of the tokens for one of the heads, attend, exchange back."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lcv_bsa.api import block_sparse_attention, select_blocks
from lcv_bsa.distributed.checks import check_selection, check_slabs
from lcv_bsa.distributed.shard import Shard, rank_in
from lcv_bsa.selection import BlockSelection


@overload
def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection | None, shard_q: Shard, mesh: DeviceMesh, *,
    shard_k: Shard | None = None, top_k: int | None = None, keep: float | None = None,
    cdf_threshold: float | None = None, min_blocks: int = 1, scale: float | None = None, backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection | None, shard_q: Shard, mesh: DeviceMesh, *,
    shard_k: Shard | None = None, top_k: int | None = None, keep: float | None = None,
    cdf_threshold: float | None = None, min_blocks: int = 1, scale: float | None = None, backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection | None, shard_q: Shard, mesh: DeviceMesh, *,
    shard_k: Shard | None = None, top_k: int | None = None, keep: float | None = None,
    cdf_threshold: float | None = None, min_blocks: int = 1, scale: float | None = None, backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`block_sparse_attention` of this rank's queries to the keys of all ranks, each rank computing H / R heads whole.

    q: [B, H, Sq_rank, D]; k, v: [B, Hkv, Skv_rank, D], this rank's slabs. R ranks must divide H; kv heads that they do
        not divide are repeated until they do. mesh: one dimension, R long.
    selection: all H heads, whole grids, the same on every rank, which takes its heads of it. None to select as
        `select_blocks` does by top_k, keep, cdf_threshold and min_blocks, each rank for its heads.
    shard_q, shard_k: how queries and keys are cut; shard_k None for shard_q. scale: None for D ** -0.5.
    backend: any of `block_sparse_attention`.

    Returns o [B, H, Sq_rank, D] in q's dtype; with return_lse also lse [B, H, Sq_rank], natural log, fp32 (fp64 for
    fp64). Both are differentiable in q, k and v. Raises ValueError.
    """
    shard_k = shard_q if shard_k is None else shard_k
    rank = rank_in(mesh, shard_q, shard_k)
    check_slabs(q, k, v, shard_q.local(rank), shard_k.local(rank))
    _check_heads(q, mesh)
    _check_rule(selection, top_k=top_k, keep=keep, cdf_threshold=cdf_threshold)
    if selection is not None:
        check_selection(selection, q, shard_q.layout, shard_k)
        selection = _heads_of(selection, rank, mesh.size())
    repeats = mesh.size() // gcd(k.shape[1], mesh.size())
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    q, k, v = (_to_heads(x, shard, mesh) for x, shard in ((q, shard_q), (k, shard_k), (v, shard_k)))
    if selection is None:
        selection = select_blocks(
            q, k, shard_q.grid, shard_k.grid, shard_q.block, block_k=shard_k.block, top_k=top_k, keep=keep,
            cdf_threshold=cdf_threshold, scale=scale, min_blocks=min_blocks,
        )  # fmt: skip
    if not return_lse:
        return _to_tokens(block_sparse_attention(q, k, v, selection, scale=scale, backend=backend), shard_q, mesh)
    o, lse = block_sparse_attention(q, k, v, selection, scale=scale, backend=backend, return_lse=True)
    return _to_tokens(o, shard_q, mesh), _to_tokens(lse[..., None], shard_q, mesh).squeeze(-1)


def _check_heads(q: Tensor, mesh: DeviceMesh) -> None:
    heads, ranks = q.shape[1], mesh.size()
    if heads % ranks:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"mesh must have a size that divides the {heads} heads of q ({divisors}), got {ranks}")


def _check_rule(selection: BlockSelection | None, **rule: float | None) -> None:
    given = [name for name, value in rule.items() if value is not None]
    if selection is None and not given:
        raise ValueError(f"selection, or one of {', '.join(rule)}, must be given, got none")
    if selection is not None and given:
        raise ValueError(f"{given[0]} must be None where a selection is given, got {rule[given[0]]!r}")


def _heads_of(selection: BlockSelection, rank: int, ranks: int) -> BlockSelection:
    share = selection.indices.shape[1] // ranks
    mine = slice(rank * share, (rank + 1) * share)
    return replace(
        selection, indices=selection.indices[:, mine].contiguous(), counts=selection.counts[:, mine].contiguous()
    )


class _ToHeads(torch.autograd.Function):
    """[B, H, S_rank, D] -> [B, H / R, S, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        ctx.where = shard, mesh
        B, H, _, D = x.shape
        shape = B, H // mesh.size()
        parts = x.unflatten(1, (mesh.size(), shape[1])).unbind(1)
        shapes = [(*shape, shard.local(rank).num_tokens, D) for rank in range(mesh.size())]
        return shard.join(_all_to_all(parts, shapes, mesh))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_tokens(grads[0], *ctx.where), None, None


class _ToTokens(torch.autograd.Function):
    """[B, H / R, S, D] -> [B, H, S_rank, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        ctx.where = shard, mesh
        parts = [shard.cut(x, rank) for rank in range(mesh.size())]
        return torch.cat(_all_to_all(parts, [parts[mesh.get_local_rank()].shape] * mesh.size(), mesh), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_heads(grads[0], *ctx.where), None, None


_Exchange = Callable[[Tensor, Shard, DeviceMesh], Tensor]
_to_heads = cast(_Exchange, torch.compiler.disable(_ToHeads.apply))
_to_tokens = cast(_Exchange, torch.compiler.disable(_ToTokens.apply))


def _all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], mesh: DeviceMesh) -> list[Tensor]:
    """Sends parts[r] to rank r; what came from rank r has shapes[r]."""
    sizes_sent, sizes = [part.numel() for part in parts], [prod(shape) for shape in shapes]
    sent, received = (parts[0].new_empty(sum(n)) for n in (sizes_sent, sizes))
    for place, part in zip(sent.split(sizes_sent), parts):
        place.view(part.shape).copy_(part)
    dist.all_to_all_single(received, sent, sizes, sizes_sent, group=mesh.get_group())
    return [x.view(shape) for x, shape in zip(received.split(sizes), shapes)]
