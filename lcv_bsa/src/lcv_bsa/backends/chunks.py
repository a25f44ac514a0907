"""The work of backend "cpu" in chunks: a few query blocks at a time, with the key blocks that they keep."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lcv_bsa.backends.rows import Rows
from lcv_bsa.layout import slot_mask
from lcv_bsa.selection import BlockSelection

# Logits of one chunk: on a CPU they should stay in its caches, elsewhere a launch should have work enough.
_LOGITS_AT_ONCE_CPU = 1 << 19
_LOGITS_AT_ONCE = 1 << 26


@dataclass
class Chunk:
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


def everything(selection: BlockSelection) -> Chunk:
    """All query blocks as one chunk, for writing."""
    layout, heads = selection.layout_q, selection.counts.shape[:2].numel()
    written = None if layout.is_full else slot_mask(layout, selection.counts.device).repeat(heads, 1)
    return Chunk(slice(None), 0, written, selection.indices.new_empty(0), None)


def chunks(selection: BlockSelection, *, kv_heads: int) -> Iterator[Chunk]:
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
        yield Chunk(rows, width, written, (ids + firsts[rows, None]).flatten(), _hidden(selection, ids, counts[rows]))


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
