"""Backend "cpu": gathers whole key blocks for a few query blocks at a time, then dense products. Runs on any device.

Memory past inputs and outputs is one chunk (and, for 16 bits, k and v in fp32); the backward recomputes each chunk's
probabilities from lse (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4).
On CUDA the sums of dk and dv use atomics: their last bits may differ from run to run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lcv_bsa.backends.rows import Rows, as_rows, scalar_rows
from lcv_bsa.layout import BlockLayout, from_blocks, slot_mask
from lcv_bsa.precision import no_autocast, statistics_dtype, true_fp32
from lcv_bsa.selection import BlockSelection

# Logits of one chunk: on a CPU they should stay in its caches, elsewhere a launch should have work enough.
_LOGITS_AT_ONCE_CPU = 1 << 19
_LOGITS_AT_ONCE = 1 << 26

# No logit beyond this: its exponential is far from overflow and underflow, so a row's peak need not be taken off.
_SMALL_LOGIT = 60.0


def forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, H, Sq, D] as q, lse [B, H, Sq]."""
    dtype, layout_q, layout_k = statistics_dtype(q.dtype), selection.layout_q, selection.layout_k
    with no_autocast(q.device), true_fp32(q.device):
        scratch = _Scratch(dtype, q.device)
        queries, keys, values = _rows(q, layout_q), _rows(k.to(dtype), layout_k), _rows(v.to(dtype), layout_k)
        small = _SmallLogits(q, k, selection, scale)
        o, lse = _Written(q, layout_q), q.new_empty(q.shape[:3], dtype=dtype)
        totals = lse.new_empty(len(queries.places), layout_q.block_size, 1)
        peaks = None if small.everywhere else torch.zeros_like(totals)
        for chunk in _chunks(selection, kv_heads=k.shape[1]):
            qc = scratch.queries("q", queries, chunk)
            probs = _logits(qc, scratch.keys("k", keys, chunk), chunk, scale, scratch)
            if peaks is not None and not small.in_chunk(chunk):
                # a row that keeps nothing has no finite logit, a total of zero and an lse of -inf
                peak = probs.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
                peaks[chunk.blocks] = peak
                probs.sub_(peak)
            total = probs.exp_().sum(-1, keepdim=True)
            totals[chunk.blocks] = total
            out = torch.bmm(probs, scratch.keys("v", values, chunk), out=scratch.take("o", tuple(qc.shape)))
            o.write(chunk, out.div_(total if selection.uniform else total.masked_fill_(total == 0, 1)))
        totals.log_()
        _write(scalar_rows(lse, layout_q), _everything(selection), totals if peaks is None else totals.add_(peaks))
        return o.written(), lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v."""
    dtype, layout_q, layout_k = lse.dtype, selection.layout_q, selection.layout_k
    with no_autocast(q.device), true_fp32(q.device):
        scratch, dq = _Scratch(dtype, q.device), _Written(q, layout_q)
        queries, outs, grads = (_rows(x, layout_q) for x in (q, o, do))
        keys, values = (_rows(x.to(dtype), layout_k) for x in (k, v))
        lses, dlses = (scalar_rows(x.contiguous(), layout_q) for x in (lse, dlse))
        blocks = k.shape[0] * k.shape[1] * layout_k.num_blocks, layout_k.block_size, k.shape[-1]
        dk, dv = lse.new_zeros(blocks), lse.new_zeros(blocks)
        for chunk in _chunks(selection, kv_heads=k.shape[1]):
            qc, doc = scratch.queries("q", queries, chunk), scratch.queries("do", grads, chunk)
            # softmax's own derivative takes out the row's mean; lse's adds its gradient to every logit
            mean = (scratch.queries("o", outs, chunk) * doc).sum(-1, keepdim=True)
            mean.sub_(scratch.queries("dlse", dlses, chunk))
            if chunk.written is not None:
                # a slot without a token repeats one: it must not count twice
                doc.masked_fill_(~chunk.written[..., None], 0)
                mean.masked_fill_(~chunk.written[..., None], 0)
            kc = scratch.keys("k", keys, chunk)
            row_lse = scratch.queries("lse", lses, chunk).clamp_(min=torch.finfo(dtype).min)
            probs = _logits(qc, kc, chunk, scale, scratch).sub_(row_lse).exp_()
            dkv = scratch.take("dkv", tuple(kc.shape))
            dv.index_add_(0, chunk.ids, torch.bmm(probs.mT, doc, out=dkv).view(-1, *blocks[1:]))
            dlogits = scratch.take("dlogits", tuple(probs.shape))
            torch.bmm(doc, scratch.keys("v", values, chunk).mT, out=dlogits)
            dlogits.sub_(mean).mul_(probs)
            dq.write(chunk, torch.bmm(dlogits, kc, out=scratch.take("dq", tuple(qc.shape))).mul_(scale))
            dk.index_add_(0, chunk.ids, torch.bmm(dlogits.mT, qc, out=dkv).view(-1, *blocks[1:]))
        dk, dv = (_raster(x, layout_k, k.shape[1]).to(k.dtype) for x in (dk.mul_(scale), dv))
        return dq.written(), dk, dv


@dataclass
class _Chunk:
    """c query blocks, of any batch entry and head, and what they keep."""

    blocks: Tensor | slice  # int64 [c], query blocks of all heads
    width: int  # K, key blocks to each
    written: Tensor | None  # bool [c, n_q], slots that hold a token; None: all do
    ids: Tensor  # int64 [c * K], key blocks of all kv heads
    hidden: Tensor | None  # bool [c, 1, K * n_k], keys without a token
    _places: tuple[Tensor, Tensor] | None = None

    def key_places(self, x: Rows) -> Tensor:
        """Rows of the chunk's keys, int64 [c, K * n_k]; those of k serve v too where both lie alike."""
        if self._places is None or self._places[0] is not x.places:
            rows = x.places.index_select(0, self.ids).view(-1, self.width * x.places.shape[1])
            self._places = x.places, rows
        return self._places[1]


def _everything(selection: BlockSelection) -> _Chunk:
    """All query blocks as one chunk, for writing."""
    layout, heads = selection.layout_q, selection.counts.shape[:2].numel()
    written = None if layout.is_full else slot_mask(layout, selection.counts.device).repeat(heads, 1)
    return _Chunk(slice(None), 0, written, selection.indices.new_empty(0), None)


def _chunks(selection: BlockSelection, *, kv_heads: int) -> Iterator[_Chunk]:
    """Rows by rising count, so that a chunk is no wider than it must; where all counts are equal as they lie."""
    layout_q, layout_k, device = selection.layout_q, selection.layout_k, selection.indices.device
    _, H, Nq, K = selection.indices.shape
    limit = _LOGITS_AT_ONCE_CPU if device.type == "cpu" else _LOGITS_AT_ONCE
    step = max(1, limit // (layout_q.block_size * K * layout_k.block_size))
    counts, indices = selection.counts.flatten(), selection.indices.flatten(0, 2)
    # the heads of a batch entry follow each other, so the group divides b * H + h as it does h
    firsts = torch.arange(len(counts), device=device) // (Nq * (H // kv_heads)) * layout_k.num_blocks
    order, widths = None, [K] * -(-len(counts) // step)
    if not selection.uniform:
        order = counts.argsort(stable=True)
        widths = torch.stack([part[-1] for part in counts[order].split(step)]).clamp(min=1).tolist()
    for i, width in enumerate(widths):
        rows: Tensor | slice = slice(i * step, (i + 1) * step)
        if order is not None:
            rows = order[rows]
        ids = indices[rows, :width].long()  # [c, K]
        written = None
        if not layout_q.is_full:
            written = slot_mask(layout_q, device)[torch.arange(len(counts), device=device)[rows] % Nq]
        yield _Chunk(rows, width, written, (ids + firsts[rows, None]).flatten(), _hidden(selection, ids, counts[rows]))


def _hidden(selection: BlockSelection, ids: Tensor, counts: Tensor) -> Tensor | None:
    """Keys without a token: entries past a row's count, and empty slots of partial blocks. bool [c, 1, K * n_k]."""
    layout = selection.layout_k
    if selection.uniform and layout.is_full:
        return None
    places = torch.arange(ids.shape[1], device=ids.device)
    hidden = (places >= counts[:, None])[..., None]  # [c, K, 1]
    if not layout.is_full:
        hidden = hidden | ~slot_mask(layout, ids.device)[ids]
    return hidden.expand(-1, -1, layout.block_size).reshape(len(ids), 1, -1)


class _Scratch:
    """Buffers that all chunks share: a CPU spends a quarter of the time on page faults when each chunk has its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised, contiguous; valid until `name` is taken again. dtype: None for that of the statistics."""
        key = name, dtype or self._dtype
        view = self._views.get((*key, shape))
        if view is None:
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() < prod(shape):
                buffer = self._buffers[key] = torch.empty(prod(shape), dtype=key[1], device=self._device)
            view = self._views[*key, shape] = buffer[: prod(shape)].view(shape)
        return view

    def queries(self, name: str, x: Rows, chunk: _Chunk) -> Tensor:
        """The chunk's query blocks, [c, n_q, D]."""
        return self._gathered(name, x.matrix, x.places[chunk.blocks])

    def keys(self, name: str, x: Rows, chunk: _Chunk) -> Tensor:
        """Each row's key blocks side by side, [c, K * n_k, D]."""
        return self._gathered(name, x.matrix, chunk.key_places(x))

    def _gathered(self, name: str, matrix: Tensor, places: Tensor) -> Tensor:
        given = self.take(name, (places.numel(), matrix.shape[1]), matrix.dtype)
        torch.index_select(matrix, 0, places.flatten(), out=given)
        if given.dtype != self._dtype:
            given = self.take(name, tuple(given.shape)).copy_(given)
        return given.view(*places.shape, -1)


class _Written:
    """A result in the dtype and memory order of `torch.empty_like(like)`, written block by block."""

    def __init__(self, like: Tensor, layout: BlockLayout) -> None:
        self._result = torch.empty_like(like)
        rows = as_rows(self._result, layout)
        self._buffer = self._result if rows else torch.empty_like(like, memory_format=torch.contiguous_format)
        self._rows = rows or _rows(self._buffer, layout)

    def write(self, chunk: _Chunk, x: Tensor) -> None:
        """x [c, n_q, D]."""
        _write(self._rows, chunk, x.to(self._buffer.dtype))

    def written(self) -> Tensor:
        return self._result if self._buffer is self._result else self._result.copy_(self._buffer)


def _rows(x: Tensor, layout: BlockLayout) -> Rows:
    rows = as_rows(x, layout) or as_rows(x.contiguous(), layout)
    assert rows is not None, "a contiguous tensor lies in rows"
    return rows


def _write(target: Rows, chunk: _Chunk, x: Tensor) -> None:
    """x [c, n_q, D or 1] to where the chunk's queries lie."""
    places = target.places[chunk.blocks]
    if chunk.written is not None:
        places, x = places[chunk.written], x[chunk.written]
    target.matrix.index_copy_(0, places.flatten(), x.reshape(-1, x.shape[-1]))


class _SmallLogits:
    """Which chunks can have no logit past _SMALL_LOGIT, by the lengths of q and k (Cauchy-Schwarz). NaN is not small.

    On a GPU none are: the answer would have to be waited for.
    """

    def __init__(self, q: Tensor, k: Tensor, selection: BlockSelection, scale: float) -> None:
        self.everywhere = self._known = q.device.type == "cpu"
        if self._known:
            self._of_q = self._longest(q, selection.layout_q).mul_(scale)
            self._of_k = self._longest(k, selection.layout_k)
            self.everywhere = bool(self._of_q.max() * self._of_k.max() < _SMALL_LOGIT)

    def in_chunk(self, chunk: _Chunk) -> bool:
        if not self._known or self.everywhere:
            return self.everywhere
        return bool(self._of_q[chunk.blocks].max() * self._of_k[chunk.ids].max() < _SMALL_LOGIT)

    @staticmethod
    def _longest(x: Tensor, layout: BlockLayout) -> Tensor:
        """Longest token of each block of each head, flat."""
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=statistics_dtype(x.dtype))
        rows = scalar_rows(norms.contiguous(), layout)
        return rows.matrix.flatten()[rows.places].amax(-1)


def _logits(q: Tensor, k: Tensor, chunk: _Chunk, scale: float, scratch: _Scratch) -> Tensor:
    """Scaled [c, n_q, K * n_k] of q [c, n_q, D] and gathered k [c, K * n_k, D]; -inf where hidden."""
    logits = scratch.take("logits", (*q.shape[:2], k.shape[1]))
    # with beta = 0 what the memory held is not read; the scale is applied in fp32, after the sum
    torch.baddbmm(logits, q, k.mT, beta=0, alpha=scale, out=logits)
    return logits if chunk.hidden is None else logits.masked_fill_(chunk.hidden, -torch.inf)


def _raster(x: Tensor, layout: BlockLayout, heads: int) -> Tensor:
    """[B * H * N, n, D] in block order -> [B, H, S, D]; in place, head by head, where no block is partial."""
    x = x.view(-1, heads, layout.num_blocks, *x.shape[1:])
    if not layout.is_full:
        return from_blocks(x, layout)
    for head in x.flatten(0, 1):
        head.view(layout.num_tokens, -1).copy_(from_blocks(head[None, None].clone(), layout)[0, 0])
    return x.view(*x.shape[:2], layout.num_tokens, -1)
