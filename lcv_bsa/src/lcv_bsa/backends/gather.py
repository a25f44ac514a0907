"""Backend "cpu": gathers whole key blocks for a few query blocks at a time, then dense products. Runs on any device.

Memory past the inputs is one copy of q, k, v in block order plus one chunk; the backward recomputes each chunk's
probabilities from lse (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4) and sums gradients in fp32.
On CUDA the sums of dk and dv use atomics: their last bits may differ from run to run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcv_bsa.layout import from_blocks, slot_mask, to_blocks
from lcv_bsa.precision import no_autocast, statistics_dtype
from lcv_bsa.selection import BlockSelection

# Logits of one chunk: on a CPU they should stay in its caches, elsewhere a launch should have work enough.
_LOGITS_AT_ONCE_CPU = 1 << 19
_LOGITS_AT_ONCE = 1 << 26


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Block sparse attention by gathering, see `api.block_sparse_attention`. Differentiable once, lse included."""
    plan = _Plan.of(selection, kv_heads=k.shape[1])
    with no_autocast(q.device):
        qb = to_blocks(q, selection.layout_q)  # [B, H, Nq, n_q, D]
        kb, vb = (to_blocks(x, selection.layout_k).flatten(0, 2) for x in (k, v))  # [B * Hkv * Nk, n_k, D]
        o, lse = _GatherAttention.apply(qb.flatten(0, 2), kb, vb, plan, scale)
        o = from_blocks(o.view(qb.shape), selection.layout_q)
        lse = from_blocks(lse.view(*qb.shape[:-1], 1), selection.layout_q).squeeze(-1)
    return o, lse


@dataclass(frozen=True)
class _Chunk:
    """rows: c query blocks, int64 [c] or a slice. keys: key blocks, int64 [c, K]. hidden: bool [c, 1, K * n_k]."""

    rows: Tensor | slice
    keys: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """The order of work. A row is a query block of any batch entry and head: R = B * H * Nq of them."""

    indices: Tensor  # int32 [R, K], ids within a head
    counts: Tensor  # int32 [R]
    first: Tensor  # int64 [R], the first key block of the row's kv head
    order: Tensor | None  # int64 [R], rows by rising count, so that a chunk is no wider than it must; None: as they lie
    widths: list[int]  # key blocks per row, of each chunk
    step: int  # rows per chunk
    block_size: int  # n_k
    slots: Tensor | None  # bool [Nk, n_k], where some key block is partial

    @classmethod
    def of(cls, selection: BlockSelection, *, kv_heads: int) -> "_Plan":
        B, H, Nq, K = selection.indices.shape
        device = selection.indices.device
        limit = _LOGITS_AT_ONCE_CPU if device.type == "cpu" else _LOGITS_AT_ONCE
        step = max(1, limit // (selection.layout_q.block_size * K * selection.layout_k.block_size))
        counts = selection.counts.flatten()
        rows = torch.arange(B * H * Nq, device=device)
        heads = rows // Nq
        kv = heads // H * kv_heads + heads % H // (H // kv_heads)
        if selection.uniform:
            order, widths = None, [K] * -(-len(rows) // step)
        else:
            order = counts.argsort(stable=True)
            widths = torch.stack([part[-1] for part in counts[order].split(step)]).tolist()
        return cls(
            indices=selection.indices.reshape(-1, K),
            counts=counts,
            first=kv * selection.layout_k.num_blocks,
            order=order,
            widths=widths,
            step=step,
            block_size=selection.layout_k.block_size,
            slots=None if selection.layout_k.is_full else slot_mask(selection.layout_k, device),
        )

    def chunks(self) -> Iterator[_Chunk]:
        for i, width in enumerate(self.widths):
            rows = slice(i * self.step, (i + 1) * self.step)
            if self.order is not None:
                rows = self.order[rows]
            ids = self.indices[rows, :width].long()  # [c, K]
            yield _Chunk(rows, ids + self.first[rows, None], self._hidden(rows, ids))

    def _hidden(self, rows: Tensor | slice, ids: Tensor) -> Tensor | None:
        """Keys without a token: entries past a row's count, and empty slots of partial blocks."""
        if self.order is None and self.slots is None:
            return None
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = (places >= self.counts[rows, None])[..., None]  # [c, K, 1]
        if self.slots is not None:
            hidden = hidden | ~self.slots[ids]
        return hidden.expand(-1, -1, self.block_size).reshape(len(ids), 1, -1)


class _Scratch:
    """Buffers that all chunks share: a CPU spends a quarter of the time on page faults when each chunk has its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, contiguous; valid until `name` is taken again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < prod(shape):
            buffer = self._buffers[name] = torch.empty(prod(shape), dtype=dtype, device=self._device)
        return buffer[: prod(shape)].view(shape)

    def gather(self, name: str, x: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
        """Each row's key blocks side by side: x [B * Hkv * Nk, n_k, D] -> [c, K * n_k, D]."""
        (c, K), (n, D) = chunk.keys.shape, x.shape[1:]
        gathered = self.take(f"{name} as given", (c * K, n, D), x.dtype)
        torch.index_select(x, 0, chunk.keys.flatten(), out=gathered)
        if dtype != x.dtype:
            gathered = self.take(name, (c * K, n, D), dtype).copy_(gathered)
        return gathered.view(c, K * n, D)


class _GatherAttention(torch.autograd.Function):
    """q [R, n_q, D], k, v [B * Hkv * Nk, n_k, D] -> o [R, n_q, D], lse [R, n_q]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, scale: float) -> tuple[Tensor, Tensor]:
        dtype = statistics_dtype(q.dtype)
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=dtype)
        scratch = _Scratch(q.device)
        for chunk in plan.chunks():
            probs, qc, _ = _logits(q, k, chunk, scale, scratch)
            peak = probs.amax(-1, keepdim=True)
            total = probs.sub_(peak).exp_().sum(-1, keepdim=True)
            out = torch.bmm(probs, scratch.gather("v", v, chunk, dtype), out=scratch.take("o", qc.shape, dtype))
            o[chunk.rows] = out.div_(total).to(q.dtype)
            lse[chunk.rows] = peak.add_(total.log_()).squeeze(-1)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.scale = plan, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor, dlse: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        dtype = lse.dtype
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
        scratch = _Scratch(q.device)
        with no_autocast(q.device):
            for chunk in ctx.plan.chunks():
                logits, qc, kc = _logits(q, k, chunk, ctx.scale, scratch)
                lse_c, dlse_c, do_c, o_c = (x[chunk.rows].to(dtype) for x in (lse[..., None], dlse[..., None], do, o))
                probs, keys = logits.sub_(lse_c).exp_(), chunk.keys.flatten()
                dkv = torch.bmm(probs.mT, do_c, out=scratch.take("dkv", kc.shape, dtype))
                dv.index_add_(0, keys, dkv.view(-1, *v.shape[1:]))
                vc = scratch.gather("v", v, chunk, dtype)
                dlogits = torch.bmm(do_c, vc.mT, out=scratch.take("dlogits", probs.shape, dtype))
                # softmax's own derivative takes out the row's mean; lse's adds its gradient to every logit
                mean = (do_c * o_c).sum(-1, keepdim=True) - dlse_c
                dlogits.sub_(mean).mul_(probs)
                dq[chunk.rows] = torch.bmm(dlogits, kc).mul_(ctx.scale).to(q.dtype)
                dkv = torch.bmm(dlogits.mT, qc, out=scratch.take("dkv", kc.shape, dtype))
                dk.index_add_(0, keys, dkv.view(-1, *k.shape[1:]))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _logits(q: Tensor, k: Tensor, chunk: _Chunk, scale: float, scratch: _Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled logits [c, n_q, K * n_k], -inf where hidden; and what they came from, q scaled and k gathered."""
    dtype = statistics_dtype(q.dtype)
    # scaled in fp32: in bf16 the product would round before it meets the keys
    qc = q[chunk.rows].to(dtype) * scale
    kc = scratch.gather("k", k, chunk, dtype)
    logits = torch.bmm(qc, kc.mT, out=scratch.take("logits", (*qc.shape[:2], kc.shape[1]), dtype))
    if chunk.hidden is not None:
        logits.masked_fill_(chunk.hidden, -torch.inf)
    return logits, qc, kc
