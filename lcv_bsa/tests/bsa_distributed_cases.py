"""The inputs of test_bsa_distributed.py: every process makes them whole, from the same seeds."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lcv_bsa import BlockSelection
from lcv_bsa.distributed import Shard
from lcv_bsa.layout import Triple
from lcv_bsa.testing import random_qkv, random_selection


@dataclass(frozen=True)
class Case:
    """keeps: "random", or "first" where every row keeps key block 0 alone, which one rank owns."""

    grid_q: Triple
    grid_k: Triple
    block_q: Triple
    block_k: Triple
    batch: int = 1
    heads: int = 6
    kv_heads: int = 6
    axis_q: str | None = None
    axis_k: str | None = None
    keeps: str = "random"
    backend: str = "auto"
    dtype: torch.dtype = torch.float64

    def shards(self, num_ranks: int) -> tuple[Shard, Shard]:
        """Of queries and of keys."""
        shard_q = Shard(self.grid_q, self.block_q, num_ranks, self.axis_q)
        return shard_q, Shard(self.grid_k, self.block_k, num_ranks, self.axis_k)

    def tensors(self) -> list[Tensor]:
        """q, k, v, do, dlse, whole."""
        g = torch.Generator().manual_seed(0)
        sizes = {"batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": 8}
        q, k, v = random_qkv(self.grid_q, self.grid_k, generator=g, dtype=self.dtype, **sizes)
        do = torch.randn(q.shape, generator=g, dtype=torch.float64).to(self.dtype)
        return [q, k, v, do, torch.randn(q.shape[:3], generator=g, dtype=torch.float64)]

    def selection(self) -> BlockSelection:
        """Of the whole grids, counts vary."""
        g = torch.Generator().manual_seed(1)
        found = random_selection(
            self.grid_q, self.grid_k, generator=g, block_q=self.block_q, block_k=self.block_k, batch=self.batch,
            heads=self.heads,
        )  # fmt: skip
        if self.keeps == "random":
            return found
        first = torch.zeros_like(found.indices[..., :1])
        return replace(found, indices=first, counts=torch.ones_like(found.counts), uniform=True)


CASES = {
    "whole blocks": Case((6, 4, 4), (6, 4, 4), (2, 2, 4), (2, 2, 4)),
    # five blocks along H, of which the last holds one token: three ranks have 2, 2 and 1 of them
    "uneven, partial, gqa": Case((3, 9, 5), (3, 9, 5), (2, 2, 4), (2, 2, 4), batch=2, kv_heads=2),
    "one kv head": Case((3, 9, 5), (3, 9, 5), (2, 2, 4), (2, 2, 4), kv_heads=1),
    "along W": Case((3, 3, 7), (3, 3, 7), (2, 2, 2), (2, 2, 2), axis_q="W", axis_k="W"),
    "condition keys": Case((4, 6, 4), (5, 6, 4), (2, 2, 4), (2, 2, 2), axis_q="H", axis_k="H", kv_heads=3),
    "two axes": Case((7, 4, 3), (3, 2, 9), (2, 2, 2), (2, 2, 3), axis_q="T", axis_k="W", kv_heads=2),
    "keys of one rank": Case((6, 4, 4), (6, 4, 4), (2, 2, 4), (2, 2, 4), keeps="first"),
    "fp32": Case((3, 9, 5), (3, 9, 5), (2, 2, 4), (2, 2, 4), kv_heads=2, dtype=torch.float32),
    "bf16": Case((3, 9, 5), (3, 9, 5), (2, 2, 4), (2, 2, 4), kv_heads=2, dtype=torch.bfloat16),
}
# tiny: Triton's interpreter runs it where there is no GPU
TRITON_CASE = Case(
    (3, 2, 3), (3, 2, 3), (1, 2, 2), (1, 2, 2), heads=2, kv_heads=1, dtype=torch.float32, backend="triton"
)
# means of 4, 8 or 16 tokens: of `few_values` they are exact, and so are their products
SELECTION_CASE = Case((7, 4, 3), (3, 2, 10), (2, 2, 2), (2, 2, 4), axis_q="T", axis_k="W", kv_heads=2)
ONE_RANK_CASE = "uneven, partial, gqa"
RULES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "keep": {"keep": 0.2, "min_blocks": 3},
    "cdf": {"cdf_threshold": 0.6, "scale": 0.5},
}


def few_values(x: Tensor) -> Tensor:
    """1 or -1 in one channel, 0 in the others: scores tie often."""
    return x.sign() * (torch.arange(x.shape[-1]) == 0)


def placed_by_loop(slabs: list[Tensor], shard: Shard) -> Tensor:
    """[B, H, S, ...] token by token: where a token's block lies along the axis decides who holds it."""
    T, H, W = shard.grid
    rank_of = [rank for rank in range(shard.num_ranks) for _ in range(*shard.span(rank))]
    read = [0] * shard.num_ranks
    tokens = []
    for place in ((a, b, c) for a in range(T) for b in range(H) for c in range(W)):
        rank = rank_of[place[shard.dim] // shard.block[shard.dim]]
        tokens.append(slabs[rank][:, :, read[rank]])
        read[rank] += 1
    assert read == [x.shape[2] for x in slabs]
    return torch.stack(tokens, 2)
