"""What the public calls check of their arguments: a ValueError of one line that names what was wanted and got."""

from math import isfinite

import torch
from torch import Tensor

from lcv_bsa.layout import BlockLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_pair(q: Tensor, k: Tensor, layout_q: BlockLayout, layout_k: BlockLayout) -> None:
    for name, x, layout in (("q", q, layout_q), ("k", k, layout_k)):
        check_rank(name, x)
        if x.dtype not in DTYPES:
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


def check_rank(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions (batch, heads, tokens, head_dim), got {list(x.shape)}")


def check_count(name: str, count: int | None) -> None:
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"{name} must be an int >= 1, got {count!r}")


def check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 < share <= 1:
        hint = "; keep is 1 - sparsity" if name == "keep" else ""
        raise ValueError(f"{name} must be in (0, 1], got {share!r}{hint}")


def checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not (isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and > 0, got {scale!r}")
    return float(scale)
