"""Where tokens lie: raster order of a (T, H, W) grid against block order, partial blocks included."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_bsa.precision import statistics_dtype

Triple = tuple[int, int, int]


def as_triple(name: str, value: Sequence[int]) -> Triple:
    """`value` as three positive ints. Raises ValueError that names `name`."""
    values = tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != 3 or not all(_is_int(n) and n > 0 for n in values):
        raise ValueError(f"{name} must be three positive ints (T, H, W), got {value!r}")
    return values[0], values[1], values[2]


def _is_int(value: object) -> bool:
    # torch.export hands in sizes that it does not know yet as SymInt
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


@dataclass(frozen=True)
class BlockLayout:
    """A (T, H, W) grid of tokens cut into (t, h, w) blocks.

    Token (a, b, c) belongs to block ((a//t)*ceil(H/h) + b//h)*ceil(W/w) + c//w, in slot ((a%t)*h + b%h)*w + c%w.
    A grid that its block does not divide has partial blocks at its far edges: they keep the numbers of their slots,
    some of the slots hold no token. Raises ValueError unless grid and block are three positive ints each.
    """

    grid: Triple
    block: Triple

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", as_triple("grid", self.grid))
        object.__setattr__(self, "block", as_triple("block", self.block))

    @property
    def block_grid(self) -> Triple:
        """Blocks along T, H, W."""
        (T, H, W), (t, h, w) = self.grid, self.block
        return -(-T // t), -(-H // h), -(-W // w)

    @property
    def num_tokens(self) -> int:
        """S = T*H*W."""
        return prod(self.grid)

    @property
    def num_blocks(self) -> int:
        """N, partial blocks included."""
        return prod(self.block_grid)

    @property
    def block_size(self) -> int:
        """n = t*h*w slots in each block."""
        return prod(self.block)

    @property
    def is_full(self) -> bool:
        """True when no block is partial."""
        return self.num_blocks * self.block_size == self.num_tokens


def to_blocks(x: Tensor, layout: BlockLayout) -> Tensor:
    """[B, H, S, D] in raster order -> [B, H, N, n, D]; slots without a token hold zeros. Differentiable."""
    x = _split(x, layout).permute(0, 1, 2, 4, 6, 3, 5, 7, 8)
    return x.reshape(*x.shape[:2], layout.num_blocks, layout.block_size, x.shape[-1])


def from_blocks(x: Tensor, layout: BlockLayout) -> Tensor:
    """Inverse of `to_blocks`: [B, H, N, n, D] -> [B, H, S, D]; slots without a token are dropped."""
    (T, H, W), (bt, bh, bw), (t, h, w) = layout.grid, layout.block_grid, layout.block
    x = x.reshape(*x.shape[:2], bt, bh, bw, t, h, w, x.shape[-1]).permute(0, 1, 2, 5, 3, 6, 4, 7, 8)
    x = x.reshape(*x.shape[:2], bt * t, bh * h, bw * w, x.shape[-1])[:, :, :T, :H, :W]
    return x.reshape(*x.shape[:2], layout.num_tokens, x.shape[-1])


def block_means(x: Tensor, layout: BlockLayout) -> Tensor:
    """Mean over the tokens really in each block: [B, H, S, D] -> [B, H, N, D], fp32 (fp64 for fp64)."""
    # axis by axis: ten times as fast on a CPU as the three at once
    sums = _split(x, layout).sum(3, dtype=statistics_dtype(x.dtype)).sum(4).sum(5)
    return sums.flatten(2, 4) / token_counts(layout, x.device)[:, None]


def _split(x: Tensor, layout: BlockLayout) -> Tensor:
    """[B, H, S, D] -> [B, H, T/t, t, H/h, h, W/w, w, D], a view where no block is partial."""
    x = x.unflatten(2, layout.grid)
    if not layout.is_full:
        rest = [b * s - g for g, b, s in zip(layout.grid, layout.block_grid, layout.block)]
        x = F.pad(x, (0, 0, 0, rest[2], 0, rest[1], 0, rest[0]))
    (bt, bh, bw), (t, h, w) = layout.block_grid, layout.block
    return x.unflatten(4, (bw, w)).unflatten(3, (bh, h)).unflatten(2, (bt, t))


# The index tensors below are cached, hence shared: read them, never write to them. They are made outside inference
# mode, because a tensor made inside it could not be saved for a later backward.


@lru_cache(maxsize=64)
def token_blocks(layout: BlockLayout, device: torch.device) -> Tensor:
    """Block of each token, int64 [S] in raster order."""
    return _token_places(layout, device)[0]


@lru_cache(maxsize=64)
def block_order(layout: BlockLayout, device: torch.device) -> Tensor:
    """Raster index of each token in block order, int64 [S]: x[block_order] goes block by block, slot by slot."""
    with torch.inference_mode(False):
        block, slot = _token_places(layout, device)
        return (block * layout.block_size + slot).argsort()


@lru_cache(maxsize=64)
def token_counts(layout: BlockLayout, device: torch.device) -> Tensor:
    """Tokens really in each block, int32 [N]."""
    with torch.inference_mode(False):
        return slot_mask(layout, device).sum(-1, dtype=torch.int32)


@lru_cache(maxsize=64)
def slot_mask(layout: BlockLayout, device: torch.device) -> Tensor:
    """True where a slot holds a token, bool [N, n]."""
    with torch.inference_mode(False):
        block, slot = _token_places(layout, device)
        mask = torch.zeros(layout.num_blocks, layout.block_size, dtype=torch.bool, device=device)
        mask[block, slot] = True
        return mask


def _token_places(layout: BlockLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block and slot of each token, int64 [S] each in raster order."""
    with torch.inference_mode(False):
        (T, H, W), (_, bh, bw), (t, h, w) = layout.grid, layout.block_grid, layout.block
        a = torch.arange(T, device=device)[:, None, None]
        b = torch.arange(H, device=device)[None, :, None]
        c = torch.arange(W, device=device)[None, None, :]
        block = ((a // t) * bh + b // h) * bw + c // w
        slot = ((a % t) * h + b % h) * w + c % w
        return block.flatten(), slot.flatten()
