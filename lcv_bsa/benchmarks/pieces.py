"""What choosing costs, part by part: in torch, by the kernels, and the copies that other layouts need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from bench import Bench, Item
from peers import Problem
from torch import Tensor

from lcv_bsa import BlockSelection, select_blocks
from lcv_bsa.layout import block_means, to_blocks


def selection(s: Bench) -> Iterator[Item]:
    """Every piece at both sizes, timed alone."""
    for shape in ("480p", "720p"):
        problem = s.problem(shape)
        for label in _PIECES:
            yield f"{label} {shape}", partial(_piece, s, problem, label)


def _piece(s: Bench, problem: Problem, label: str) -> None:
    inputs = s.inputs(problem)
    (q, k, _, _), kept = inputs.sets[0], inputs.selections[0]
    s.time_one(problem, label, "selection", lambda: _PIECES[label](problem, q, k, kept))


def _scores(problem: Problem, q: Tensor, k: Tensor, kept: BlockSelection) -> object:
    means = [block_means(x, problem.shape.layout) for x in (q, k)]
    return torch.matmul(means[0], means[1].mT)


def _select(backend: Literal["torch", "triton"]) -> Callable[[Problem, Tensor, Tensor, BlockSelection], object]:
    def run(problem: Problem, q: Tensor, k: Tensor, kept: BlockSelection) -> object:
        shape = problem.shape
        return select_blocks(q, k, shape.grid, shape.grid, shape.block, keep=problem.keep, backend=backend)

    return run


def _kernel_inverse(problem: Problem, q: Tensor, k: Tensor, kept: BlockSelection) -> object:
    from lcv_bsa.backends.triton.inverse import inverse_selection

    return inverse_selection(kept)


def _cdf(problem: Problem, q: Tensor, k: Tensor, kept: BlockSelection) -> object:
    shape = problem.shape
    return select_blocks(q, k, shape.grid, shape.grid, shape.block, keep=problem.keep, cdf_threshold=0.5)


_PIECES: dict[str, Callable[[Problem, Tensor, Tensor, BlockSelection], object]] = {
    "block means of q": lambda p, q, k, kept: block_means(q, p.shape.layout),
    "means and all scores": _scores,
    "select torch": _select("torch"),
    "select triton": _select("triton"),
    "select torch, cdf": _cdf,
    "inverse torch": lambda p, q, k, kept: kept.inverse(),
    "inverse triton": _kernel_inverse,
    "copy q to block order": lambda p, q, k, kept: to_blocks(q, p.shape.layout),
}
