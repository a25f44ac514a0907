"""Backend "cpu": gathers whole key blocks for a few query blocks at a time, then dense products. Runs on any device.

Memory past the inputs is one copy of q, k, v in block order, in the precision of the statistics, plus one chunk; the
backward recomputes each chunk's probabilities from lse (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4).
On CUDA the sums of dk and dv use atomics: their last bits may differ from run to run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lcv_bsa.layout import from_blocks, slot_mask, to_blocks
from lcv_bsa.precision import no_autocast, statistics_dtype, true_fp32
from lcv_bsa.selection import BlockSelection

# Logits of one chunk: on a CPU they should stay in its caches, elsewhere a launch should have work enough.
_LOGITS_AT_ONCE_CPU = 1 << 19
_LOGITS_AT_ONCE = 1 << 26

# No logit beyond this: its exponential is far from overflow and underflow, so a row's peak need not be taken off.
_SMALL_LOGIT = 60.0


def forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, H, Sq, D] as q, lse [B, H, Sq]."""
    dtype = statistics_dtype(q.dtype)
    with no_autocast(q.device), true_fp32(q.device):
        plan = _Plan.of(selection, kv_heads=k.shape[1])
        qb = plan.sorted(to_blocks(q.to(dtype), selection.layout_q).flatten(0, 2))  # [R, n_q, D]
        kb, vb = (to_blocks(x.to(dtype), selection.layout_k).flatten(0, 2) for x in (k, v))  # [B * Hkv * Nk, n_k, D]
        o, lse = torch.empty_like(qb), qb.new_empty(*qb.shape[:2], 1)
        scratch, lengths = _Scratch(qb), (_lengths(qb, scale), _lengths(kb, 1.0))
        for chunk in plan.chunks():
            probs = _logits(qb[chunk.rows], scratch.gather("k", kb, chunk), chunk, scale, scratch)
            peak = None
            if not _logits_are_small(*lengths, chunk):
                # a row that keeps nothing has no finite logit, a total of zero and an lse of -inf
                peak = probs.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
                probs.sub_(peak)
            total = torch.sum(probs.exp_(), -1, keepdim=True, out=lse[chunk.rows])
            out = torch.bmm(probs, scratch.gather("v", vb, chunk), out=o[chunk.rows])
            out.div_(total.masked_fill(total == 0, 1))
            total.log_()
            if peak is not None:
                total.add_(peak)
        o, lse = plan.unsorted(o), plan.unsorted(lse)
        blocks = *q.shape[:2], selection.layout_q.num_blocks, selection.layout_q.block_size
        lse = from_blocks(lse.view(*blocks, 1), selection.layout_q).squeeze(-1)
        return _laid_as(q, from_blocks(o.view(*blocks, q.shape[-1]), selection.layout_q)), lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v."""
    dtype, layout_q, layout_k = lse.dtype, selection.layout_q, selection.layout_k
    with no_autocast(q.device), true_fp32(q.device):
        plan = _Plan.of(selection, kv_heads=k.shape[1])
        qb, ob, dob, lseb, dlseb = (
            plan.sorted(to_blocks(x.to(dtype), layout_q).flatten(0, 2))
            for x in (q, o, do, lse[..., None], dlse[..., None])
        )
        # softmax's own derivative takes out the row's mean; lse's adds its gradient to every logit
        meanb, lseb = (dob * ob).sum(-1, keepdim=True) - dlseb, lseb.clamp(min=torch.finfo(dtype).min)
        kb, vb = (to_blocks(x.to(dtype), layout_k).flatten(0, 2) for x in (k, v))
        dq, dk, dv, scratch = torch.empty_like(qb), torch.zeros_like(kb), torch.zeros_like(vb), _Scratch(qb)
        for chunk in plan.chunks():
            qc, doc, keys = qb[chunk.rows], dob[chunk.rows], chunk.keys.flatten()
            kc = scratch.gather("k", kb, chunk)
            probs = _logits(qc, kc, chunk, scale, scratch).sub_(lseb[chunk.rows]).exp_()
            dv.index_add_(0, keys, torch.bmm(probs.mT, doc, out=scratch.take("dkv", kc.shape)).view(-1, *vb.shape[1:]))
            dlogits = scratch.take("dlogits", tuple(probs.shape))
            torch.bmm(doc, scratch.gather("v", vb, chunk).mT, out=dlogits)
            dlogits.sub_(meanb[chunk.rows]).mul_(probs)
            torch.bmm(dlogits, kc, out=dq[chunk.rows])
            dk.index_add_(0, keys, torch.bmm(dlogits.mT, qc, out=scratch.take("dkv", kc.shape)).view(-1, *kb.shape[1:]))
        dq, dk = plan.unsorted(dq.mul_(scale)), dk.mul_(scale)
        dq = from_blocks(dq.view(*q.shape[:2], -1, *qb.shape[1:]), layout_q)
        dk, dv = (from_blocks(x.view(*k.shape[:2], -1, *x.shape[1:]), layout_k) for x in (dk, dv))
        return _laid_as(q, dq), _laid_as(k, dk), _laid_as(v, dv)


def _laid_as(like: Tensor, x: Tensor) -> Tensor:
    """x in the dtype and memory order of `torch.empty_like(like)`."""
    out = torch.empty_like(like)
    return x if x.dtype == out.dtype and x.stride() == out.stride() else out.copy_(x)


def _lengths(x: Tensor, scale: float) -> Tensor | None:
    """Longest row of each block, scaled, [R]; None where to read it back would be to wait for it."""
    return torch.linalg.vector_norm(x, dim=-1).amax(-1) * scale if x.device.type == "cpu" else None


def _logits_are_small(of_q: Tensor | None, of_k: Tensor | None, chunk: "_Chunk") -> bool:
    """Whether no logit of the chunk can pass _SMALL_LOGIT, from `_lengths` (Cauchy-Schwarz). False for NaN."""
    if of_q is None or of_k is None:
        return False
    return bool(of_q[chunk.rows].max() * of_k[chunk.keys].max() < _SMALL_LOGIT)


@dataclass(frozen=True)
class _Chunk:
    """rows: c query blocks. keys: their key blocks, int64 [c, K]. hidden: bool [c, 1, K * n_k]."""

    rows: slice
    keys: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """The order of work. A row is a query block of any batch entry and head: R = B * H * Nq of them.

    Rows are sorted by rising count, so that a chunk is no wider than it must; where counts are equal they stay.
    """

    indices: Tensor  # int32 [R, K], ids within a head
    counts: Tensor  # int32 [R]
    first: Tensor  # int64 [R], the first key block of the row's kv head
    order: Tensor | None  # int64 [R], which row comes when; None: as they lie
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
        indices, counts = selection.indices.reshape(-1, K), selection.counts.flatten()
        heads = torch.arange(B * H * Nq, device=device) // Nq
        first = (heads // H * kv_heads + heads % H // (H // kv_heads)) * selection.layout_k.num_blocks
        order, widths = None, [K] * -(-len(heads) // step)
        if not selection.uniform:
            order = counts.argsort(stable=True)
            indices, counts, first = indices[order], counts[order], first[order]
            widths = torch.stack([part[-1] for part in counts.split(step)]).clamp(min=1).tolist()
        slots = None if selection.layout_k.is_full else slot_mask(selection.layout_k, device)
        return cls(indices, counts, first, order, widths, step, selection.layout_k.block_size, slots)

    def sorted(self, x: Tensor) -> Tensor:
        """x [R, ...] in the order of work."""
        return x if self.order is None else x[self.order]

    def unsorted(self, x: Tensor) -> Tensor:
        """Inverse of `sorted`."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def chunks(self) -> Iterator[_Chunk]:
        for i, width in enumerate(self.widths):
            rows = slice(i * self.step, (i + 1) * self.step)
            ids = self.indices[rows, :width].long()  # [c, K]
            yield _Chunk(rows, ids + self.first[rows, None], self._hidden(rows, ids))

    def _hidden(self, rows: slice, ids: Tensor) -> Tensor | None:
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

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised, contiguous; valid until `name` is taken again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < prod(shape):
            buffer = self._buffers[name] = self._like.new_empty(prod(shape))
        return buffer[: prod(shape)].view(shape)

    def gather(self, name: str, x: Tensor, chunk: _Chunk) -> Tensor:
        """Each row's key blocks side by side: x [B * Hkv * Nk, n_k, D] -> [c, K * n_k, D]."""
        (c, K), (n, D) = chunk.keys.shape, x.shape[1:]
        gathered = self.take(name, (c * K, n, D))
        torch.index_select(x, 0, chunk.keys.flatten(), out=gathered)
        return gathered.view(c, K * n, D)


def _logits(q: Tensor, k: Tensor, chunk: _Chunk, scale: float, scratch: _Scratch) -> Tensor:
    """Scaled [c, n_q, K * n_k] of q [c, n_q, D] and gathered k [c, K * n_k, D]; -inf where hidden."""
    logits = scratch.take("logits", (*q.shape[:2], k.shape[1]))
    # with beta = 0 what the memory held is not read; the scale is applied in fp32, after the sum
    torch.baddbmm(logits, q, k.mT, beta=0, alpha=scale, out=logits)
    return logits if chunk.hidden is None else logits.masked_fill_(chunk.hidden, -torch.inf)
