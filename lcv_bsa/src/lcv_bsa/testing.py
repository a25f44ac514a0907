"""For tests of this package and of what is built on it: inputs, selections, and results with their gradients."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lcv_bsa.layout import BlockLayout, as_triple
from lcv_bsa.selection import BlockSelection


class Results(NamedTuple):
    """What an implementation gives: o [B, H, Sq, D], lse [B, H, Sq], and the gradients of q, k, v."""

    o: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def random_qkv(
    grid_q: Sequence[int],
    grid_k: Sequence[int] | None = None,
    *,
    generator: torch.Generator,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q [batch, heads, Sq, head_dim] and k, v [batch, kv_heads, Skv, head_dim], on the generator's device.

    Drawn in fp64 and rounded, so that one seed gives the same values in every dtype. grid_k: None for grid_q.
    kv_heads: None for heads.
    """
    tokens_q, tokens_k = prod(grid_q), prod(grid_q if grid_k is None else grid_k)
    kv = (batch, heads if kv_heads is None else kv_heads, tokens_k, head_dim)
    shapes = (batch, heads, tokens_q, head_dim), kv, kv
    draws = (torch.randn(s, generator=generator, dtype=torch.float64, device=generator.device) for s in shapes)
    q, k, v = (x.to(dtype) for x in draws)
    return q, k, v


def random_selection(
    grid_q: Sequence[int],
    grid_k: Sequence[int] | None = None,
    *,
    generator: torch.Generator,
    block_q: Sequence[int] = (4, 4, 4),
    block_k: Sequence[int] | None = None,
    batch: int = 1,
    heads: int = 1,
    top_k: int | None = None,
) -> BlockSelection:
    """`top_k` distinct key blocks per query block; for None each row draws its own count in 1..Nk."""
    layout_q = BlockLayout(as_triple("grid_q", grid_q), as_triple("block_q", block_q))
    layout_k = BlockLayout(
        as_triple("grid_k", grid_q if grid_k is None else grid_k),
        as_triple("block_k", block_q if block_k is None else block_k),
    )
    rows, num_blocks, device = (batch, heads, layout_q.num_blocks), layout_k.num_blocks, generator.device
    ranks = torch.rand((*rows, num_blocks), generator=generator, device=device).argsort(-1).argsort(-1)
    if top_k is None:
        counts = torch.randint(1, num_blocks + 1, rows, generator=generator, device=device)
    else:
        counts = torch.full(rows, top_k, device=device)
    return BlockSelection.from_mask(
        ranks < counts[..., None],
        grid_q=layout_q.grid,
        grid_k=layout_k.grid,
        block_q=layout_q.block,
        block_k=layout_k.block,
    )


def run_with_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor,
) -> Results:
    """`attend(q, k, v) -> o, lse` and the gradients of (o * do).sum() + (lse * dlse).sum(); inputs stay as they are.

    do and dlse are cast to the dtype of o and lse.
    """
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = attend(*leaves)
    dq, dk, dv = torch.autograd.grad((o, lse), leaves, (do.to(o.dtype), dlse.to(lse.dtype)))
    return Results(o.detach(), lse.detach(), dq, dk, dv)


def largest_errors(found: Results, exact: Results) -> dict[str, float]:
    """For each result the largest difference over the largest exact value (1e-3 where that is smaller)."""
    pairs = zip(Results._fields, found, exact)
    return {name: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for name, a, b in pairs}
