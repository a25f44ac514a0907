"""Video and text tokens in one sequence: video to video is sparse, whatever has text on either side is dense."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_bsa.adapters.options import SparseOptions
from lcv_bsa.api import block_sparse_attention
from lcv_bsa.layout import BlockLayout, Triple, as_triple
from lcv_bsa.selection import BlockSelection

# Text keys are one row of tokens, cut into blocks that every backend takes.
_TEXT_BLOCK = (1, 1, 64)


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Triple, *, text_lengths: Sequence[int], options: SparseOptions
) -> Tensor:
    """q, k, v [B, S + L, H, D], the S = prod(grid) video tokens first, then L text tokens -> o, as q.

    text_lengths: of each batch entry, how many of its text tokens are keys (0..L), the first ones. A video query
    attends to its selected video blocks and to all of these; a text query to every video token and to all of these.
    """
    tokens = prod(grid)
    video, text_k, text_v = q[:, :tokens], k[:, tokens:], v[:, tokens:]
    o, lse = options.attend(video, k[:, :tokens], v[:, :tokens], grid, layout="bshd")
    merged = [
        _with_text(o[rows], lse[rows], video[rows], text_k[rows, :length], text_v[rows, :length], grid, options)
        for rows, length in _runs(text_lengths)
    ]
    return torch.cat([torch.cat(merged), _text_queries(q[:, tokens:], k, v, tokens, text_lengths)], 1)


def text_lengths_of(mask: Tensor | None, *, batch: int, tokens: int, text_tokens: int) -> list[int]:
    """How many text tokens each batch entry's key mask keeps. mask: bool [B, 1, 1, tokens + text_tokens], None for all.

    Waits for the device. Raises ValueError unless the mask keeps all video tokens and a leading part of the text.
    """
    if mask is None:
        return [text_tokens] * batch
    shape = (batch, 1, 1, tokens + text_tokens)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    kept = mask.sum(-1).flatten()
    leading = torch.arange(shape[-1], device=mask.device) < kept[:, None]
    if not torch.equal(leading, mask.flatten(1)) or int(kept.min()) < tokens:
        raise ValueError("attention_mask must keep all video tokens and the first text tokens, got another mask")
    return [n - tokens for n in kept.tolist()]


def _runs(lengths: Sequence[int]) -> list[tuple[slice, int]]:
    """Batch entries next to each other with as many text keys: one call when all have the same."""
    starts = [i for i, n in enumerate(lengths) if i == 0 or n != lengths[i - 1]]
    return [(slice(a, b), lengths[a]) for a, b in zip(starts, [*starts[1:], len(lengths)])]


def _with_text(
    o: Tensor, lse: Tensor, q: Tensor, text_k: Tensor, text_v: Tensor, grid: Triple, options: SparseOptions
) -> Tensor:
    """Merges o [B, S, H, D], lse [B, H, S] over video keys with the same queries' attention over text keys."""
    if text_k.shape[1] == 0:
        return o
    q, text_k, text_v = (x.transpose(1, 2) for x in (q, text_k, text_v))
    every = _every_text_block(q, text_k.shape[2], BlockLayout(grid, as_triple("block", options.block)))
    text_o, text_lse = block_sparse_attention(q, text_k, text_v, every, backend=options.backend, return_lse=True)
    total = torch.logaddexp(lse, text_lse)
    weight, text_weight = ((part - total).exp()[..., None].transpose(1, 2) for part in (lse, text_lse))
    return (o * weight + text_o.transpose(1, 2) * text_weight).to(o.dtype)


def _every_text_block(q: Tensor, length: int, layout: BlockLayout) -> BlockSelection:
    B, H = q.shape[:2]
    num_blocks = -(-length // _TEXT_BLOCK[2])
    ids = torch.arange(num_blocks, dtype=torch.int32, device=q.device)
    indices = ids.repeat(B, H, layout.num_blocks, 1)
    counts = torch.full_like(indices[..., 0], num_blocks)
    return BlockSelection(indices, counts, layout.grid, (1, 1, length), layout.block, _TEXT_BLOCK, uniform=True)


def _text_queries(q: Tensor, k: Tensor, v: Tensor, tokens: int, lengths: Sequence[int]) -> Tensor:
    mask = None
    if min(lengths) < q.shape[1]:
        kept = torch.tensor([tokens + n for n in lengths], device=k.device)
        mask = (torch.arange(k.shape[1], device=k.device) < kept[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
