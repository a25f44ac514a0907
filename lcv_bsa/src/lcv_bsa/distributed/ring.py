"""Ring attention (Liu et al., arXiv 2310.01889) for given selections.

Keys and values travel round the ranks. At each step a rank attends to those of its kept blocks that are there, and
merges the partial results by their lse. The backward sends them round again, with their gradients a step behind.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from lcv_bsa import ops
from lcv_bsa.checks import checked_scale
from lcv_bsa.distributed.checks import check_selection, check_slabs, kernels_for
from lcv_bsa.distributed.owners import split_by_owner
from lcv_bsa.distributed.shard import Shard, rank_in
from lcv_bsa.precision import statistics_dtype
from lcv_bsa.selection import BlockSelection


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, shard_k: Shard, mesh: DeviceMesh, *,
    scale: float | None = None, backend: str = "auto", return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, shard_k: Shard, mesh: DeviceMesh, *,
    scale: float | None = None, backend: str = "auto", return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, shard_k: Shard, mesh: DeviceMesh, *,
    scale: float | None = None, backend: str = "auto", return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`block_sparse_attention` of this rank's queries to the keys of all ranks; any number of heads.

    q: [B, H, Sq_rank, D]; k, v: [B, Hkv, Skv_rank, D], this rank's slabs. selection: this rank's query grid against
        the whole key grid, as `select_blocks_sharded` makes it. shard_k: how the keys are cut. mesh: one dimension.
    scale: None for D ** -0.5. backend: "auto", "cpu", or any of the "triton" ones.

    Returns o [B, H, Sq_rank, D] in q's dtype; with return_lse also lse [B, H, Sq_rank], natural log, fp32 (fp64 for
    fp64). Both are differentiable in q, k and v. Partial results are merged in fp32; the Triton kernels round each of
    them to q's dtype first, which for 16 bits up to doubles the rounding error of one process. While it runs, a rank
    holds two slabs of keys and values, in the backward two of their fp32 gradients as well. Raises ValueError.
    """
    rank = rank_in(mesh, shard_k)
    check_slabs(q, k, v, selection.layout_q, shard_k.local(rank))
    check_selection(selection, q, selection.layout_q, shard_k)
    parts = split_by_owner(selection, shard_k)
    kernels = kernels_for(backend, q, k, v, next(part for part in parts if part is not None))
    o, lse = _attend(q, k, v, _Plan(mesh, shard_k, parts, checked_scale(scale, q.shape[-1]), kernels))
    return (o, lse) if return_lse else o


@dataclass(frozen=True)
class _Plan:
    """parts: what this rank's queries keep of each owner's keys."""

    mesh: DeviceMesh
    shard_k: Shard
    parts: list[BlockSelection | None]
    scale: float
    kernels: str

    def widened(self, x: Tensor) -> Tensor:
        """x as the kernels should have it: "cpu" computes in fp32 anyway, and given fp32 rounds no partial result."""
        return x.to(statistics_dtype(x.dtype)) if self.kernels == "cpu" else x


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        wide_q, merged = plan.widened(q), None
        for owner, kv in _travelling(torch.stack((k, v)), plan):
            part = plan.parts[owner]
            if part is not None:
                k_there, v_there = plan.widened(kv)
                found = ops.forward(wide_q, k_there, v_there, part, scale=plan.scale, kernels=plan.kernels)
                merged = (found[0].to(found[1].dtype), found[1]) if merged is None else _merge(*merged, *found)
        assert merged is not None, "every query block keeps a key block, so some owner has one"
        o, lse = merged[0].to(q.dtype), merged[1]
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, o, lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (q, k, v, o, lse), (do, dlse), plan = ctx.saved_tensors, grads, ctx.plan
        wide_q, o, do = (plan.widened(x) for x in (q, o, do))
        dq, sent = torch.zeros_like(q, dtype=lse.dtype), None
        for owner, kv in _travelling(torch.stack((k, v)), plan):
            part, found = plan.parts[owner], ()
            if part is not None:
                k_there, v_there = plan.widened(kv)
                # with the lse of all keys each step's probabilities are already those of the whole softmax
                found = ops.backward(
                    wide_q, k_there, v_there, o, lse, do, dlse, part, scale=plan.scale, kernels=plan.kernels
                )
            dkv = torch.zeros_like(kv, dtype=lse.dtype) if sent is None else sent.arrived()
            for total, grad in zip((dq, *dkv), found):
                total.add_(grad)
            sent = _Passing(dkv, owner - 1, plan)
        assert sent is not None, "a mesh has a rank"
        dk, dv = sent.arrived()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


# a compiler cannot trace the transfers; what surrounds them it can
_attend = cast(Callable[[Tensor, Tensor, Tensor, _Plan], tuple[Tensor, Tensor]], torch.compiler.disable(_Ring.apply))


class _Passing:
    """One transfer under way: `sent` to the next rank, from the previous rank what belongs to keys of `owner`."""

    def __init__(self, sent: Tensor, owner: int, plan: _Plan) -> None:
        size, rank = plan.mesh.size(), plan.mesh.get_local_rank()
        tokens = plan.shard_k.local(owner % size).num_tokens
        if size == 1:
            self._received, self._works = sent, []
            return
        # the buffer that leaves is kept until it has left
        self._sent, self._received = sent, sent.new_empty(*sent.shape[:3], tokens, sent.shape[4])
        group = plan.mesh.get_group()
        send = dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % size)
        receive = dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size)
        self._works = dist.batch_isend_irecv([send, receive])

    def arrived(self) -> Tensor:
        """What was received, waited for."""
        for work in self._works:
            work.wait()
        return self._received


def _travelling(kv: Tensor, plan: _Plan) -> Iterator[tuple[int, Tensor]]:
    """Each owner and its keys and values [2, B, Hkv, Skv_owner, D], one's own first; the next travel meanwhile."""
    size, rank = plan.mesh.size(), plan.mesh.get_local_rank()
    for step in range(size):
        owner = (rank - step) % size
        following = _Passing(kv, owner - 1, plan) if step < size - 1 else None
        yield owner, kv
        if following is not None:
            kv = following.arrived()


def _merge(o: Tensor, lse: Tensor, o_part: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over two sets of keys, from that over each. o is overwritten."""
    both = torch.logaddexp(lse, lse_part)
    # a row that has met no key yet has lse -inf: less a finite number it weighs nothing, less -inf it would be NaN
    finite = both.clamp(min=torch.finfo(both.dtype).min)
    weight, weight_part = ((x - finite).exp()[..., None] for x in (lse, lse_part))
    return o.mul_(weight).add_(o_part * weight_part), both
