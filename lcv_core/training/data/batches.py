"""From cached clips to batches: which clip a sample is, and how the texts of several lie together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lcv_core.text.encoder import MAX_LENGTH
from lcv_core.training.data.cache import Item, LatentCache, TextCache
from lcv_core.training.data.sources import ClipSource
from lcv_core.training.randomness import generator


@dataclass(frozen=True)
class CachedClips:
    """A source of clips with the latents and text states that were computed of it."""

    source: ClipSource
    latents: LatentCache
    texts: TextCache

    def captions(self, item: Item) -> tuple[str, ...]:
        return self.source.captions(item.part, item.position)


def pad_text(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States [L_b, C] of each sample -> [B, MAX_LENGTH, C] and mask int64 [B, MAX_LENGTH], as the DiT takes them."""
    text = rows[0].new_zeros(len(rows), MAX_LENGTH, rows[0].shape[1])
    mask = torch.zeros(len(rows), MAX_LENGTH, dtype=torch.int64)
    for b, states in enumerate(rows):
        text[b, : len(states)] = states
        mask[b, : len(states)] = 1
    return text, mask


def choose(options: Sequence[Any], g: torch.Generator) -> Any:
    """One of them; always takes one draw."""
    index = int(torch.randint(0, max(len(options), 1), (1,), generator=g))
    return options[index] if options else 0


def draw_bucket(cache: LatentCache, g: torch.Generator) -> tuple[tuple[int, int, int], list[Item]]:
    """A size, as often as clips have it."""
    position = int(torch.randint(0, len(cache), (1,), generator=g))
    for size, items in cache.buckets.items():
        if position < len(items):
            return size, items
        position -= len(items)
    raise AssertionError


def shuffled(seed: int, count: int, position: int) -> int:
    """The item at a position of an endless sequence that goes through all `count`, in another order each time."""
    return int(_order(seed, count, position // count)[position % count])


@lru_cache(maxsize=8)
def _order(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", count, epoch))
