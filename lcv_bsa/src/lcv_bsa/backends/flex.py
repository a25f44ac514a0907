"""Backend "flex": PyTorch's own FlexAttention (Dong et al., arXiv 2412.05496), compiled.

It wants the tokens block by block, so q, k, v and o are permuted, and index tables as wide as there are key blocks.
"""

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lcv_bsa.layout import from_blocks, slot_mask, to_blocks
from lcv_bsa.selection import BlockSelection

_SMALLEST_BLOCK = 16


def refusal(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why these inputs cannot run here, None when they can."""
    if q.dtype == torch.float64:
        return "it has no fp64; use 'cpu' or 'reference'"
    for name, layout in (("query", selection.layout_q), ("key", selection.layout_k)):
        if layout.block_size < _SMALLEST_BLOCK or layout.block_size & (layout.block_size - 1):
            wanted = f"its blocks hold a power of two of tokens, {_SMALLEST_BLOCK} or more"
            return f"{wanted}, got {name} blocks of {layout.block_size}"
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "on a CPU it has no gradients; use 'cpu'"
        # what is being compiled has found its compiler, and could not be told to look for one
        if not torch.compiler.is_compiling() and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            return "on a CPU it needs a C++ compiler, found none of g++, clang++, cl"
    return None


def flex_block_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """o [B, H, Sq, D] in q's dtype, lse fp32 [B, H, Sq]; differentiable on GPUs. A CPU gives no lse: ValueError."""
    if return_lse and q.device.type == "cpu":
        raise ValueError("backend 'flex' gives no lse on a CPU; use 'cpu'")
    layout_q, layout_k = selection.layout_q, selection.layout_k
    qb = to_blocks(q, layout_q)
    kb, vb = (to_blocks(x, layout_k).flatten(2, 3) for x in (k, v))
    attend: Callable[..., Any] = flex_attention if torch.compiler.is_compiling() else _compiled()
    given: Any = attend(
        qb.flatten(2, 3), kb, vb, block_mask=_block_mask(selection), scale=scale,
        enable_gqa=q.shape[1] != k.shape[1], return_lse=return_lse,
    )  # fmt: skip
    o, lse = given if return_lse else (given, None)
    if lse is not None:
        lse = from_blocks(lse.view(*qb.shape[:-1], 1), layout_q).squeeze(-1)
    return from_blocks(o.view(qb.shape), layout_q), lse


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(selection: BlockSelection) -> BlockMask:
    layout_q, layout_k = selection.layout_q, selection.layout_k
    unused = layout_k.num_blocks - selection.indices.shape[-1]
    table = torch.nn.functional.pad(selection.indices, (0, unused))
    nothing = torch.zeros_like(selection.counts), torch.zeros_like(table)
    some, whole = (nothing, (selection.counts, table)) if layout_k.is_full else ((selection.counts, table), nothing)
    return BlockMask.from_kv_blocks(
        *some, *whole, BLOCK_SIZE=(layout_q.block_size, layout_k.block_size), mask_mod=_visible(selection)
    )


def _visible(selection: BlockSelection) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """True where a slot of a partial block holds a token; None where all do."""
    if selection.layout_k.is_full:
        return None
    slots = slot_mask(selection.layout_k, selection.indices.device).flatten()
    return lambda b, h, query, key: slots[key]
