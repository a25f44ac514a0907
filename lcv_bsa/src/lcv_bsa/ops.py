"""The attention as PyTorch operators, so that autograd, torch.compile, torch.export and the meta device know it.

`lcv_bsa::select` chooses key blocks. `lcv_bsa::attention` and `lcv_bsa::attention_backward` call a set of kernels by
name: which sets exist and what each refuses is the business of `lcv_bsa.backends`, what they compute that of
`lcv_bsa.reference`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcv_bsa.choosers import choose
from lcv_bsa.kernels import load_kernels
from lcv_bsa.layout import BlockLayout, Triple
from lcv_bsa.precision import statistics_dtype
from lcv_bsa.selection import BlockSelection


def select(
    q: Tensor, k: Tensor, layout_q: BlockLayout, layout_k: BlockLayout, *, least: int, cdf_threshold: float | None,
    scale: float, backend: str,
) -> BlockSelection:  # fmt: skip
    """`api.select_blocks` past its checks: `least` blocks per row, or more where the cdf asks for more."""
    geometry = [*layout_q.grid, *layout_k.grid, *layout_q.block, *layout_k.block]
    indices, counts = torch.ops.lcv_bsa.select(q, k, geometry, least, cdf_threshold, scale, backend)
    return _selection(indices, counts, cdf_threshold is None, geometry)


def attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, kernels: str
) -> tuple[Tensor, Tensor]:
    """o [B, H, Sq, D], lse [B, H, Sq]; differentiable once in q, k and v. Inputs are trusted."""
    return torch.ops.lcv_bsa.attention(q, k, v, *_flat(selection), scale, kernels)


def forward(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, kernels: str
) -> tuple[Tensor, Tensor]:
    """`attention` without a gradient."""
    with torch.no_grad():
        return attention(q, k, v, selection, scale=scale, kernels=kernels)


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection, *,
    scale: float, kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv from what the forward gave. o and lse may be those of a larger set of keys: ring attention's are."""
    with torch.no_grad():
        return torch.ops.lcv_bsa.attention_backward(do, dlse, q, k, v, o, lse, *_flat(selection), scale, kernels)


def _flat(selection: BlockSelection) -> tuple[Tensor, Tensor, bool, list[int]]:
    geometry = [*selection.grid_q, *selection.grid_k, *selection.block_q, *selection.block_k]
    return selection.indices, selection.counts, selection.uniform, geometry


def _selection(indices: Tensor, counts: Tensor, uniform: bool, geometry: Sequence[int]) -> BlockSelection:
    grid_q, grid_k, block_q, block_k = _triples(geometry)
    return BlockSelection(indices, counts, grid_q, grid_k, block_q, block_k, uniform)


def _layouts(geometry: Sequence[int]) -> tuple[BlockLayout, BlockLayout]:
    grid_q, grid_k, block_q, block_k = _triples(geometry)
    return BlockLayout(grid_q, block_q), BlockLayout(grid_k, block_k)


def _triples(geometry: Sequence[int]) -> list[Triple]:
    return [(geometry[i], geometry[i + 1], geometry[i + 2]) for i in range(0, 12, 3)]


@torch.library.custom_op("lcv_bsa::select", mutates_args=())
def _select(
    q: Tensor, k: Tensor, geometry: Sequence[int], least: int, cdf_threshold: float | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    options = {"least": least, "cdf_threshold": cdf_threshold, "scale": scale, "backend": backend}
    return choose(q, k, *_layouts(geometry), **options)


@_select.register_fake
def _(
    q: Tensor, k: Tensor, geometry: Sequence[int], least: int, cdf_threshold: float | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    layout_q, _ = _layouts(geometry)
    # how many blocks a cdf keeps depends on the values
    width = least if cdf_threshold is None else torch.library.get_ctx().new_dynamic_size(min=1)
    counts = q.new_empty(*q.shape[:2], layout_q.num_blocks, dtype=torch.int32)
    return counts.new_empty(*counts.shape, width), counts


@torch.library.custom_op("lcv_bsa::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, uniform: bool, geometry: Sequence[int],
    scale: float, kernels: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, lse = load_kernels(kernels).forward(q, k, v, _selection(indices, counts, uniform, geometry), scale)
    return _laid_as(q, o), lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, uniform: bool, geometry: Sequence[int],
    scale: float, kernels: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


@torch.library.custom_op("lcv_bsa::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, indices: Tensor,
    counts: Tensor, uniform: bool, geometry: Sequence[int], scale: float, kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    selection = _selection(indices, counts, uniform, geometry)
    dq, dk, dv = load_kernels(kernels).backward(q, k, v, o, lse, do, dlse, selection, scale)
    return _laid_as(q, dq), _laid_as(k, dk), _laid_as(v, dv)


@_attention_backward.register_fake
def _(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, indices: Tensor,
    counts: Tensor, uniform: bool, geometry: Sequence[int], scale: float, kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, counts, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, indices, counts)


def _differentiate(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, indices, counts = ctx.saved_tensors
    gradients = torch.ops.lcv_bsa.attention_backward(do, dlse, q, k, v, o, lse, indices, counts, *ctx.options)
    return *gradients, None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _laid_as(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides that the fakes promise."""
    promised = torch.empty_like(like, device="meta").stride()
    return x if x.stride() == promised else torch.empty_like(like).copy_(x)
