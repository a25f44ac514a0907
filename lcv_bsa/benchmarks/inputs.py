"""Random inputs, in several sets where one would stay in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from measure import cache_bytes
from peers import Problem
from torch import Tensor

from lcv_bsa import BlockSelection
from lcv_bsa.testing import random_qkv

_MOST_SETS = 8


@dataclass(frozen=True)
class Inputs:
    """q, k, v, do [1, H, S, D] and what is kept. There are several sets where one would stay in a cache."""

    sets: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    selections: list[BlockSelection]

    @classmethod
    def of(cls, problem: Problem) -> Inputs:
        generator = torch.Generator(problem.device).manual_seed(0)
        sets: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        while not sets or (len(sets) < _MOST_SETS and _bytes(sets) < cache_bytes(problem.device)):
            sets.append(_draw(problem, generator))
        return cls(sets, [problem.select(q, k) for q, k, _, _ in sets])


def _draw(problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, rest = problem.shape, {"generator": generator, "heads": 1, "head_dim": problem.shape.head_dim}
    # head by head: drawing is in fp64, and all heads at once would take four times the memory of the result
    heads = [random_qkv(shape.grid, dtype=problem.dtype, **rest) for _ in range(shape.heads)]
    q, k, v = (torch.cat(tensors, 1) for tensors in zip(*heads))
    do = torch.randn(v.shape, generator=generator, device=v.device, dtype=v.dtype)
    return q, k, v, do


def _bytes(sets: Sequence[tuple[Tensor, ...]]) -> int:
    return sum(x.numel() * x.element_size() for tensors in sets for x in tensors)
