"""The KV cache of condition frames: held for one run of a sampler, rebuilt when anything it depends on changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lcv_core.dit.kv_cache import KVCache

# Two conditions at a time: context windows and regional prompts alternate between them.
_ENTRIES = 2


@dataclass
class ConditionCache:
    """Keys and values of condition latents.

    An entry serves the latents it was made of, under the weights and the sparsity it was made with; `key` stands for
    the latter two. Condition frames see neither noise nor text, so steps, prompts and CFG branches share an entry.
    """

    _entries: list[tuple[Any, Tensor, KVCache]] = field(default_factory=list)

    def get(self, cond: Tensor, key: Any, build: Callable[[Tensor], KVCache]) -> KVCache:
        """The cache of condition latents [B, C, n_c, H, W]; `build` makes it for one sample where all are the same."""
        rows = cond[:1] if cond.shape[0] == 1 or torch.equal(cond, cond[:1].expand_as(cond)) else cond
        for known, latents, cache in self._entries:
            if known == key and latents.shape == rows.shape and torch.equal(latents, rows):
                return cache
        del self._entries[: len(self._entries) - _ENTRIES + 1]  # before the next one takes its memory
        cache = build(rows)
        self._entries.append((key, rows.clone(), cache))
        return cache
