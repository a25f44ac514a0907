"""Tokens as rows of a matrix, wherever they lie in memory: blocks of them are gathered without a permuted copy."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lcv_bsa.layout import BlockLayout, block_order, slot_mask


class Rows(NamedTuple):
    """x [B, H, S, D] as rows [R, D] of its own memory.

    places: int64 [B * H * N, n], the row of the token in each slot of each block; in a slot without a token, that of
    the block's first.
    """

    matrix: Tensor
    places: Tensor


def as_rows(x: Tensor, layout: BlockLayout) -> Rows | None:
    """None where x [B, H, S, D] does not lie in memory as rows of D neighbours."""
    B, H, S, D = x.shape
    strides = x.stride()
    if strides[3] != 1 or any(stride % D for stride in strides[:3]):
        return None
    b, h, s = (stride // D for stride in strides[:3])
    count = (B - 1) * b + (H - 1) * h + (S - 1) * s + 1
    return Rows(x.as_strided((count, D), (D, 1)), _places(layout, (B, H), (b, h, s), x.device))


def scalar_rows(x: Tensor, layout: BlockLayout) -> Rows:
    """x [B, H, S], contiguous, as B * H * S rows of one."""
    B, H, S = x.shape
    return Rows(x.view(-1, 1), _places(layout, (B, H), (H * S, S, 1), x.device))


@lru_cache(maxsize=8)
def _places(layout: BlockLayout, heads: tuple[int, int], strides: tuple[int, int, int], device: torch.device) -> Tensor:
    """Cached, hence shared: q, o and their gradients have one, k and v another."""
    with torch.inference_mode(False):
        mask = slot_mask(layout, device)
        tokens = torch.zeros(mask.shape, dtype=torch.int64, device=device)
        tokens[mask] = block_order(layout, device)
        tokens = torch.where(mask, tokens, tokens[:, :1]) * strides[2]
        firsts = [torch.arange(n, device=device) * stride for n, stride in zip(heads, strides)]
        return (firsts[0][:, None, None, None] + firsts[1][:, None, None] + tokens).flatten(0, 2)
