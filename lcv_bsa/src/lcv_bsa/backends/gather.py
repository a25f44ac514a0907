"""Backend "cpu": gathers whole key blocks for a few query blocks at a time, then dense products. Runs on any device.

Memory past inputs and outputs is one chunk (and, for 16 bits, k and v in fp32); the backward recomputes each chunk's
probabilities from lse (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4).
On CUDA the sums of dk and dv use atomics: their last bits may differ from run to run.
"""

from math import prod

import torch
from torch import Tensor

from lcv_bsa.backends.chunks import Chunk, chunks, everything
from lcv_bsa.backends.rows import Rows, as_rows, scalar_rows
from lcv_bsa.layout import BlockLayout, from_blocks
from lcv_bsa.precision import no_autocast, statistics_dtype, true_fp32
from lcv_bsa.selection import BlockSelection

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
        for chunk in chunks(selection, kv_heads=k.shape[1]):
            qc = scratch.queries("q", queries, chunk)
            probs = _logits(qc, scratch.keys("kv", keys, chunk), chunk, scale, scratch)
            if peaks is not None and not small.in_chunk(chunk):
                # a row that keeps nothing has no finite logit, a total of zero and an lse of -inf
                peak = probs.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
                peaks[chunk.blocks] = peak
                probs.sub_(peak)
            total = probs.exp_().sum(-1, keepdim=True)
            totals[chunk.blocks] = total
            out = torch.bmm(probs, scratch.keys("kv", values, chunk), out=scratch.take("o", tuple(qc.shape)))
            o.write(chunk, out.div_(total if selection.uniform else total.masked_fill_(total == 0, 1)))
        totals.log_()
        _write(scalar_rows(lse, layout_q), everything(selection), totals if peaks is None else totals.add_(peaks))
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
        for chunk in chunks(selection, kv_heads=k.shape[1]):
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
            torch.bmm(doc, scratch.keys("dkv", values, chunk).mT, out=dlogits)
            dlogits.sub_(mean).mul_(probs)
            dq.write(chunk, torch.bmm(dlogits, kc, out=scratch.take("dq", tuple(qc.shape))).mul_(scale))
            dk.index_add_(0, chunk.ids, torch.bmm(dlogits.mT, qc, out=dkv).view(-1, *blocks[1:]))
        dk, dv = (_raster(x, layout_k, k.shape[1]).to(k.dtype) for x in (dk.mul_(scale), dv))
        return dq.written(), dk, dv


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
                # A view keeps the buffer alive that it is of: the outgrown one goes before the larger one comes.
                self._views = {known: old for known, old in self._views.items() if known[:2] != key}
                buffer = None
                self._buffers.pop(key, None)
                buffer = self._buffers[key] = torch.empty(prod(shape), dtype=key[1], device=self._device)
            view = self._views[*key, shape] = buffer[: prod(shape)].view(shape)
        return view

    def queries(self, name: str, x: Rows, chunk: Chunk) -> Tensor:
        """The chunk's query blocks, [c, n_q, D]."""
        return self._gathered(name, x.matrix, x.places[chunk.blocks])

    def keys(self, name: str, x: Rows, chunk: Chunk) -> Tensor:
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

    def write(self, chunk: Chunk, x: Tensor) -> None:
        """x [c, n_q, D]."""
        _write(self._rows, chunk, x.to(self._buffer.dtype))

    def written(self) -> Tensor:
        return self._result if self._buffer is self._result else self._result.copy_(self._buffer)


def _rows(x: Tensor, layout: BlockLayout) -> Rows:
    rows = as_rows(x, layout) or as_rows(x.contiguous(), layout)
    assert rows is not None, "a contiguous tensor lies in rows"
    return rows


def _write(target: Rows, chunk: Chunk, x: Tensor) -> None:
    """x [c, n_q, D or 1] to where the chunk's queries lie."""
    places = target.places[chunk.blocks]
    if chunk.written is not None:
        places, x = places[chunk.written], x[chunk.written]
    target.matrix.index_copy_(0, places.flatten(), x.reshape(-1, x.shape[-1]))


class _SmallLogits:
    """Which chunks can have no logit past _SMALL_LOGIT, by the lengths of tokens (Cauchy-Schwarz). NaN is not small.

    On a GPU none are: the answer would have to be waited for.
    """

    def __init__(self, q: Tensor, k: Tensor, selection: BlockSelection, scale: float) -> None:
        self._known, self.everywhere = q.device.type == "cpu", False
        if self._known:
            of_q, of_k = (torch.linalg.vector_norm(x, dim=-1, dtype=statistics_dtype(x.dtype)) for x in (q, k))
            self.everywhere = bool(of_q.max() * of_k.max() * scale < _SMALL_LOGIT)
            if not self.everywhere:
                self._of_q = _longest(of_q, selection.layout_q).mul_(scale)
                self._of_k = _longest(of_k, selection.layout_k)

    def in_chunk(self, chunk: Chunk) -> bool:
        if not self._known or self.everywhere:
            return self.everywhere
        return bool(self._of_q[chunk.blocks].max() * self._of_k[chunk.ids].max() < _SMALL_LOGIT)


def _longest(lengths: Tensor, layout: BlockLayout) -> Tensor:
    """Of tokens [B, H, S]: that of the longest token of each block of each head, flat."""
    rows = scalar_rows(lengths.contiguous(), layout)
    return rows.matrix.flatten()[rows.places].amax(-1)


def _logits(q: Tensor, k: Tensor, chunk: Chunk, scale: float, scratch: _Scratch) -> Tensor:
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
