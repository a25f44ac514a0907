"""The gate: no timing is worth printing when the numbers are wrong.

Everyone attends over the same given indices on small problems and is compared with the fp64 reference on the same
rounded inputs. A result's error is its largest difference over the largest exact value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from inputs import Inputs
from peers import Absent, Contender, Problem, contender, refusal, trains
from rows import BACKENDS, QUANTISED
from torch import Tensor

from lcv_bsa import BlockSelection, reference_attention
from lcv_bsa.layout import Triple
from lcv_bsa.reference import token_mask
from lcv_bsa.testing import random_qkv, random_selection

FP32 = 1e-5
# Other people's rounding is theirs: this bound catches wrong glue, the error is printed.
PEER = 5e-2
# In blocks of 4x4x4: 4 full ones, 8 of which some are partial. Small for Triton's interpreter; a GPU takes them twice
# as long along each axis.
FULL: Triple = (4, 8, 8)
PARTIAL: Triple = (5, 6, 7)

Errors = dict[str, float]


def check(name: str, problem: Problem, paths: dict[str, str]) -> tuple[Errors, list[str]]:
    """Largest errors of `name` at the head dim, dtype and block of `problem`, and what is too large, one line each."""
    worst: Errors = {}
    failures: list[str] = []
    for small in _small(problem):
        made = contender(name, small, paths)
        got, allowed = _case(made, small)
        where = "x".join(map(str, small.shape.grid))
        failures += [
            f"{key} {error:.2g} > {allowed[key]:.2g} at {where}"
            for key, error in got.items()
            if not error <= allowed[key]  # NaN fails too
        ]
        worst |= {key: max(error, worst.get(key, 0.0)) for key, error in got.items()}
    return worst, failures


def gate(name: str, problem: Problem, inputs: Inputs, paths: dict[str, str]) -> str:
    """ "ok: largest error", "absent: why" or "wrong: why"; `inputs` are those of the problem itself."""
    try:
        contender(name, problem, paths)
        reason = refusal(name, *inputs.sets[0][:3], inputs.selections[0])
        if reason is not None:
            raise Absent(reason)
        errors, failures = check(name, problem, paths)
    except Absent as absent:
        return f"absent: {absent}"
    except Exception as error:  # other people's code may fail in any way, and is then not there; ours must not
        kind = "wrong" if name in BACKENDS else "absent"
        return f"{kind}: {type(error).__name__} in the gate: {(str(error).splitlines() or [''])[0][:160]}"
    if failures:
        return f"wrong: {'; '.join(failures)}"
    return "ok: " + ", ".join(f"{key} {error:.1e}" for key, error in errors.items())


def _small(problem: Problem) -> Iterator[Problem]:
    """A grid of full blocks, and one of partial blocks where the problem has some."""
    factor = 2 if problem.device.type == "cuda" else 1
    for grid in (FULL,) if problem.shape.layout.is_full else (FULL, PARTIAL):
        grid = _scaled(grid, problem.shape.block, factor)
        shape = dataclasses.replace(problem.shape, name="gate", grid=grid, heads=factor)
        yield dataclasses.replace(problem, shape=shape, keep=0.25)


def _scaled(grid: Triple, block: Triple, factor: int) -> Triple:
    """As many blocks whatever their size: the grids above are for 4x4x4."""
    T, H, W = (max(1, factor * g * b // 4) for g, b in zip(grid, block))
    return T, H, W


def _case(made: Contender, problem: Problem) -> tuple[Errors, Errors]:
    """Errors, and how large each may be."""
    generator = torch.Generator(problem.device).manual_seed(0)
    shape = problem.shape
    q, k, v = random_qkv(
        shape.grid, generator=generator, heads=shape.heads, head_dim=shape.head_dim, dtype=problem.dtype
    )
    kept = 2 if made.name in ("official", "vsa") else None  # counts of their own for each row where that is possible
    selection = random_selection(
        shape.grid, generator=generator, block_q=shape.block, heads=shape.heads, top_k=kept
    )  # fmt: skip
    if made.select is None:
        selection = _everything(selection)
    do = torch.randn(q.shape, generator=generator, device=q.device).to(q.dtype)
    got = _run(made, selection, q, k, v, do)
    exact = _exact(selection, q, k, v, do)
    errors = {key: _error(value, exact[key]) for key, value in got.items()}
    if made.name in QUANTISED:
        return errors, dict.fromkeys(errors, QUANTISED[made.name])
    if not made.own:
        return errors, dict.fromkeys(errors, PEER)
    return errors, _allowed(selection, q, k, v, do, exact)


def _everything(selection: BlockSelection) -> BlockSelection:
    return BlockSelection.from_mask(
        torch.ones_like(selection.to_mask()), grid_q=selection.grid_q, grid_k=selection.grid_k,
        block_q=selection.block_q,
    )  # fmt: skip


def _run(made: Contender, selection: BlockSelection, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Tensor]:
    train = trains(made.name, q, k, v, selection)
    leaves = [x.detach().clone().requires_grad_(train) for x in (q, k, v)]
    q, k, v = made.packed(*leaves)
    o, lse = made.attend(q, k, v, made.convert(selection))
    o = made.unpacked(o)
    results = {"o": o} | ({} if lse is None else {"lse": lse})
    if train:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do))
    return {key: value.detach() for key, value in results.items()}


def _exact(selection: BlockSelection, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Tensor]:
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o, lse = reference_attention(q, k, v, selection)
    grads = torch.autograd.grad(o, (q, k, v), do.double())
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


def _allowed(
    selection: BlockSelection, q: Tensor, k: Tensor, v: Tensor, do: Tensor, exact: dict[str, Tensor]
) -> Errors:
    """fp32: 1e-5. fp16 and bf16: twice the error of torch's attention, masked, in the same dtype; lse is fp32."""
    allowed = dict.fromkeys(exact, FP32)
    if q.dtype == torch.float32:
        return allowed
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(selection))
    grads = torch.autograd.grad(o, (q, k, v), do)
    for key, value in zip(("o", "dq", "dk", "dv"), (o.detach(), *grads)):
        allowed[key] = 2 * _error(value, exact[key])
    return allowed


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()
