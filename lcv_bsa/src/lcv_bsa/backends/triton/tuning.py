"""Tile shapes, warps and stages."""

from dataclasses import dataclass

import triton
from torch import Tensor

from lcv_bsa.selection import BlockSelection

_LARGEST = 64


@dataclass(frozen=True)
class Tile:
    """m query slots by n key slots, on `warps` warps with `stages` pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


def _side(block_size: int, largest: int) -> int:
    """A power of two for tl.dot, at least 16: the block whole where it fits."""
    return max(16, min(largest, triton.next_power_of_2(block_size)))


def forward_tile(q: Tensor, selection: BlockSelection) -> Tile:
    m = _side(selection.layout_q.block_size, _LARGEST)
    n = _side(selection.layout_k.block_size, _LARGEST)
    return Tile(m, n, 4, 2 if q.element_size() == 2 else 1)


def backward_tiles(q: Tensor, selection: BlockSelection) -> tuple[Tile, Tile]:
    """For dq, and for dk and dv."""
    largest = _LARGEST if q.shape[-1] <= 128 else _LARGEST // 2
    m = _side(selection.layout_q.block_size, largest)
    n = _side(selection.layout_k.block_size, largest)
    return Tile(m, n, 4, 1), Tile(m, n, 4, 1)
