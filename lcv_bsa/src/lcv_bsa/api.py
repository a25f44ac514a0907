"""The three calls, and the checks on what comes in. Past this file inputs are trusted."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from lcv_bsa import choosers
from lcv_bsa.backends import resolve
from lcv_bsa.checks import check_count, check_pair, check_rank, check_share, checked_scale
from lcv_bsa.choosing import kept_blocks
from lcv_bsa.layout import BlockLayout, as_triple
from lcv_bsa.ops import select
from lcv_bsa.selection import BlockSelection


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
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> BlockSelection:
    """Choose the key blocks of each query block by the product of block means (LongCat-Video, arXiv 2510.22200).

    q: [B, H, Sq, D], k: [B, Hkv, Skv, D], tokens in raster (T, H, W) order of grid_q and grid_k; Hkv divides H, and
        every query head selects for itself.
    block: (t, h, w) tokens of a query block, and of a key block unless block_k says otherwise. A grid need not divide
        by its block: partial blocks count as blocks, and their mean is over the tokens they hold.
    top_k: key blocks to keep, 1..Nk. keep: share of key blocks to keep, in (0, 1]; floor(keep * Nk) of them.
    cdf_threshold: in (0, 1]; as many blocks as have a cumulative softmax(score * scale), largest first, <= it.
        Of several given the larger count wins; at least one must be given.
    scale: of the cdf's softmax alone, None for D ** -0.5. min_blocks: least count, 1 or more.
    backend: who computes it; "auto" takes "triton" on a GPU where there is one and no cdf, else "torch". Their block
        means differ in the order of their sums, so near ties may fall differently.

    Counts lie in 1..Nk. Means and scores are fp32 (fp64 for fp64 inputs), under autocast too; ties go to the lower
    block, NaN ranks last. Nothing is differentiated. Raises ValueError.
    """
    layout_q = BlockLayout(as_triple("grid_q", grid_q), as_triple("block", block))
    layout_k = BlockLayout(as_triple("grid_k", grid_k), as_triple("block_k", block if block_k is None else block_k))
    check_pair(q, k, layout_q, layout_k)
    if backend not in choosers.NAMES:
        raise ValueError(f"backend of a selection must be one of {', '.join(choosers.NAMES)}, got {backend!r}")
    if top_k is None and keep is None and cdf_threshold is None:
        raise ValueError("one of top_k, keep and cdf_threshold must be given, got none")
    check_count("top_k", top_k)
    check_count("min_blocks", min_blocks)
    check_share("keep", keep)
    check_share("cdf_threshold", cdf_threshold)
    num_blocks = layout_k.num_blocks
    if top_k is not None and top_k > num_blocks:
        raise ValueError(f"top_k must be 1..{num_blocks} (the key blocks), got {top_k}")
    kept = 0 if keep is None else kept_blocks(keep, num_blocks)
    least = min(num_blocks, max(min_blocks, top_k or 0, kept))
    return select(
        q, k, layout_q, layout_k, least=least, cdf_threshold=cdf_threshold, scale=checked_scale(scale, q.shape[-1]),
        backend=backend,
    )  # fmt: skip


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
    check_pair(q, k, sel.layout_q, sel.layout_k)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v must be as k, {list(k.shape)} {k.dtype} {k.device}, got {list(v.shape)} {v.dtype} {v.device}"
        )
    if sel.indices.shape[:2] != q.shape[:2]:
        raise ValueError(f"sel must be for B, H = {list(q.shape[:2])} as q, got {list(sel.indices.shape[:2])}")
    if sel.indices.device != q.device:
        raise ValueError(f"sel must be on {q.device} as q, got {sel.indices.device}; try sel.to(q.device)")
    attend = resolve(backend, q, k, v, sel).attend
    o, lse = attend(q, k, v, sel, scale=checked_scale(scale, q.shape[-1]), return_lse=return_lse)
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
        check_rank(name, x)
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
