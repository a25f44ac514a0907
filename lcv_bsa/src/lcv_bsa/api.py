"""The three calls, and the checks on what comes in. Past this file inputs are trusted."""

from collections.abc import Sequence
from math import isfinite
from typing import Literal, overload

import torch
from torch import Tensor

from lcv_bsa.backends import resolve
from lcv_bsa.choosing import kept_blocks
from lcv_bsa.layout import BlockLayout, as_triple
from lcv_bsa.ops import select
from lcv_bsa.selection import BlockSelection

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def select_blocks(
    q: Tensor,
    k: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    block: Sequence[int] = (4, 4, 4),
    *,
    block_k: Sequence[int] | None = None,
    top_k: int | None = None,
    keep: float | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    min_blocks: int = 1,
) -> BlockSelection:
    """Choose the key blocks of each query block by the product of block means (LongCat-Video, arXiv 2510.22200).

    q: [B, H, Sq, D], k: [B, Hkv, Skv, D], tokens in raster (T, H, W) order of grid_q and grid_k; Hkv divides H, and
        every query head selects for itself.
    block: (t, h, w) tokens of a query block, and of a key block unless block_k says otherwise. A grid need not divide
        by its block: partial blocks count as blocks, and their mean is over the tokens they hold.
    top_k: key blocks to keep, 1 or more. keep: share of key blocks to keep, in (0, 1]; floor(keep * Nk) of them.
    cdf_threshold: in (0, 1]; as many blocks as have a cumulative softmax(score * scale), largest first, <= it.
        Of several given the larger count wins; at least one must be given.
    scale: of the cdf's softmax alone, None for D ** -0.5. min_blocks: least count, 1 or more.

    Counts lie in 1..Nk. Means and scores are fp32 (fp64 for fp64 inputs), under autocast too; ties go to the lower
    block, NaN ranks last. Nothing is differentiated. Raises ValueError.
    """
    layout_q = BlockLayout(as_triple("grid_q", grid_q), as_triple("block", block))
    layout_k = BlockLayout(as_triple("grid_k", grid_k), as_triple("block_k", block if block_k is None else block_k))
    _check_pair(q, k, layout_q, layout_k)
    if top_k is None and keep is None and cdf_threshold is None:
        raise ValueError("one of top_k, keep and cdf_threshold must be given, got none")
    _check_count("top_k", top_k)
    _check_count("min_blocks", min_blocks)
    _check_share("keep", keep)
    _check_share("cdf_threshold", cdf_threshold)
    num_blocks = layout_k.num_blocks
    kept = 0 if keep is None else kept_blocks(keep, num_blocks)
    least = min(num_blocks, max(min_blocks, top_k or 0, kept))
    return select(
        q, k, layout_q, layout_k, least=least, cdf_threshold=cdf_threshold, scale=_checked_scale(scale, q.shape[-1])
    )


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sel: BlockSelection,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sel: BlockSelection,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sel: BlockSelection,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sel: BlockSelection,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over all tokens of its block's selected key blocks.

    q: [B, H, Sq, D]; k, v: [B, Hkv, Skv, D]; one dtype (fp16, bf16, fp32, fp64), one device; tokens in raster order
        of the selection's grids. Query head h reads kv head h // (H / Hkv). Any strides.
    sel: for the same B and H, on the same device. scale: None for D ** -0.5.
    backend: "auto", "cpu" (gathers blocks; any device), "triton" (GPUs), "flex" (FlexAttention) or "reference" (dense;
        small inputs); the README has the whole table. A named one is used or refused, never replaced.

    Returns o [B, H, Sq, D] in q's dtype; with return_lse also lse [B, H, Sq], natural log, fp32 (fp64 for fp64).
    Both are differentiable in q, k and v. Softmax statistics and sums are fp32 (fp64 for fp64). Raises ValueError.
    """
    _check_pair(q, k, sel.layout_q, sel.layout_k)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v must be as k, {list(k.shape)} {k.dtype} {k.device}, got {list(v.shape)} {v.dtype} {v.device}"
        )
    if sel.indices.shape[:2] != q.shape[:2]:
        raise ValueError(f"sel must be for B, H = {list(q.shape[:2])} as q, got {list(sel.indices.shape[:2])}")
    if sel.indices.device != q.device:
        raise ValueError(f"sel must be on {q.device} as q, got {sel.indices.device}; try sel.to(q.device)")
    attend = resolve(backend, q, k, v, sel).attend
    o, lse = attend(q, k, v, sel, scale=_checked_scale(scale, q.shape[-1]), return_lse=return_lse)
    return o if lse is None or not return_lse else (o, lse)


@overload
def bsa_3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int] | None = None,
    *,
    block_q: Sequence[int] = (4, 4, 4),
    block_k: Sequence[int] | None = None,
    keep: float | None = 0.0625,
    top_k: int | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def bsa_3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int] | None = None,
    *,
    block_q: Sequence[int] = (4, 4, 4),
    block_k: Sequence[int] | None = None,
    keep: float | None = 0.0625,
    top_k: int | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def bsa_3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int] | None = None,
    *,
    block_q: Sequence[int] = (4, 4, 4),
    block_k: Sequence[int] | None = None,
    keep: float | None = 0.0625,
    top_k: int | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def bsa_3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int] | None = None,
    *,
    block_q: Sequence[int] = (4, 4, 4),
    block_k: Sequence[int] | None = None,
    keep: float | None = 0.0625,
    top_k: int | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`select_blocks`, then `block_sparse_attention`.

    grid_k: None for grid_q. block_k: None for block_q. Of keep, top_k and cdf_threshold the larger count wins, so
    give keep=None to have top_k or cdf_threshold decide alone. layout: "bhsd" for [B, H, S, D], "bshd" for
    [B, S, H, D], of q, k, v and o; lse is [B, H, Sq] in both. Raises ValueError.
    """
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', got {layout!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    sel = select_blocks(
        q,
        k,
        as_triple("grid_q", grid_q),
        as_triple("grid_k", grid_q if grid_k is None else grid_k),
        as_triple("block_q", block_q),
        block_k=block_k,
        top_k=top_k,
        keep=keep,
        cdf_threshold=cdf_threshold,
        scale=scale,
    )
    given = block_sparse_attention(q, k, v, sel, scale=scale, backend=backend, return_lse=return_lse)
    if layout == "bhsd":
        return given
    return (given[0].transpose(1, 2), given[1]) if isinstance(given, tuple) else given.transpose(1, 2)


def _check_pair(q: Tensor, k: Tensor, layout_q: BlockLayout, layout_k: BlockLayout) -> None:
    for name, x, layout in (("q", q, layout_q), ("k", k, layout_k)):
        _check_rank(name, x)
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {x.dtype}")
        if x.shape[2] != layout.num_tokens:
            T, H, W = layout.grid
            raise ValueError(f"{name} must have {T}*{H}*{W} = {layout.num_tokens} tokens, got {x.shape[2]}")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k must be {q.dtype} on {q.device} as q, got {k.dtype} on {k.device}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k must have B = {q.shape[0]} and D = {q.shape[3]} as q, got B = {k.shape[0]} and D = {k.shape[3]}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q and k must not be empty, got {list(q.shape)} and {list(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of k's, got {q.shape[1]} and {k.shape[1]}")


def _check_rank(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions (batch, heads, tokens, head_dim), got {list(x.shape)}")


def _check_count(name: str, count: int | None) -> None:
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"{name} must be an int >= 1, got {count!r}")


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 < share <= 1:
        hint = "; keep is 1 - sparsity" if name == "keep" else ""
        raise ValueError(f"{name} must be in (0, 1], got {share!r}{hint}")


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not (isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and > 0, got {scale!r}")
    return float(scale)
