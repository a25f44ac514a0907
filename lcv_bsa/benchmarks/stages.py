"""What a first GPU hour asks, as stages of small items. Each item is run on its own and may fail alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from bench import Bench, Item
from inputs import Inputs
from measure import copy_ceiling
from parts import pairs_of, time_parts
from peers import PEERS, Problem, contender
from pieces import selection
from rows import QUANTISED
from shapes import DTYPES, Shape

from lcv_bsa import BlockSelection, block_sparse_attention
from lcv_bsa.testing import run_with_gradients

_TABLE = "tuning.json"
EXACT = ("triton", "triton_pointer", "triton_tma", "triton_fused", "triton_pair")


def correctness(s: Bench) -> Iterator[Item]:
    """Every backend against the fp64 reference, two runs against each other, and real sizes against the cpu backend."""
    for name in (*EXACT, *QUANTISED):
        for dtype in s.dtypes:
            for head_dim in (32,) if s.tiny else (64, 128):
                shape = Shape("gate", (6, 7, 9), 1, head_dim, "partial blocks")
                problem = Problem(shape, DTYPES[dtype], s.device, 0.25)
                yield f"{name} {dtype} {head_dim}", partial(_gate, s, problem, name)
    for shape in ("480p", "720p"):
        yield f"two runs {shape}", partial(_two_runs, s, s.problem(shape))
        yield f"real size {shape}", partial(_real_size, s, s.problem(shape))


def _gate(s: Bench, problem: Problem, name: str) -> None:
    s.report.add(problem, name, "gate", s.gate(name, problem))


def _two_runs(s: Bench, problem: Problem) -> None:
    first, second = (_results(s, problem, "triton") for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second))
    s.report.add(problem, "triton", "two runs", "ok: bit-equal" if same else "wrong: two runs differ")


def _real_size(s: Bench, problem: Problem) -> None:
    """64-bit addresses and long rows: nothing small shows a fault in them."""
    bound = 2e-2
    worst = max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(_results(s, problem, "triton"), _results(s, problem, "cpu"))
    )
    verdict = "ok" if worst <= bound else "wrong"
    s.report.add(problem, "triton", "real size", f"{verdict}: {worst:.1e} from the cpu backend, bound {bound:g}")


def _results(s: Bench, problem: Problem, name: str) -> tuple[torch.Tensor, ...]:
    inputs = s.inputs(problem)
    (q, k, v, do), selection = inputs.sets[0], inputs.selections[0]
    dlse = torch.zeros(q.shape[:3], device=q.device)
    return run_with_gradients(
        lambda q, k, v: block_sparse_attention(q, k, v, selection, backend=name, return_lse=True), q, k, v, do, dlse
    )


def forward(s: Bench) -> Iterator[Item]:
    """Ceilings, every forward, the order of the indices, warps and stages."""
    size = 1 << 20 if s.tiny else 1 << 30
    yield "ceilings", partial(_ceilings, s, size)
    for shape in ("480p", "720p"):
        for name in (*EXACT, *QUANTISED):
            yield f"{name} {shape}", partial(s.time, s.problem(shape), name, ["forward"])
        for order in ("shuffled", "neighbours"):
            yield f"{order} {shape}", partial(_order, s, s.problem(shape), order)
    for warps, stages in ((4, 2), (8, 1)) if s.tiny else [(w, n) for w in (4, 8) for n in (1, 2, 3)]:
        for name in ("triton_pointer", "triton_tma", "triton_pair"):
            variant = f"warps={warps} stages={stages}"
            yield f"{name} {variant}", partial(_sweep, s, name, "forward", warps, stages)


def _ceilings(s: Bench, size: int) -> None:
    problem = s.problem("720p")
    rate = copy_ceiling(s.device, size=size)
    s.report.add(problem, "copy", "ceiling", f"ok: {rate / 1e12:.3g} TB/s read and written")
    for dtype in s.dtypes:
        speed = s.report.ceiling(DTYPES[dtype]) / 1e12
        s.report.add(s.problem("720p", dtype), "matmul", "ceiling", f"ok: {speed:.4g} TFLOP/s")


def _order(s: Bench, problem: Problem, order: str) -> None:
    """The same counts in another order or at other places: what the cache makes of them."""
    inputs = s.inputs(problem)
    made = contender("triton", problem, s.paths)
    changed = [_reordered(selection, order) for selection in inputs.selections]
    for part, result in time_parts(made, problem, Inputs(inputs.sets, changed), ["forward"], s.limits):
        s.report.add(problem, f"triton {order}", part, result, pairs=pairs_of(made, problem, inputs))


def _reordered(selection: BlockSelection, order: str) -> BlockSelection:
    """shuffled: each row in random order, as a sort by score leaves it. neighbours: the K nearest ids, ascending."""
    indices = selection.indices
    Nq, K = indices.shape[2:]
    if order == "shuffled":
        changed = indices.gather(-1, torch.rand(indices.shape, device=indices.device).argsort(-1))
    else:
        first = (torch.arange(Nq, device=indices.device) - K // 2).clamp(0, selection.layout_k.num_blocks - K)
        ids = first[:, None] + torch.arange(K, device=indices.device)
        changed = ids.to(torch.int32).expand(indices.shape).contiguous()
    return dataclasses.replace(selection, indices=changed)


def backward(s: Bench) -> Iterator[Item]:
    """The two-kernel backward against the fused one, then warps and stages of both."""
    for shape in ("480p", "720p"):
        for name in EXACT:
            yield f"{name} {shape}", partial(s.time, s.problem(shape), name, ["backward", "forward+backward"])
    for warps, stages in ((8, 1),) if s.tiny else [(w, n) for w in (4, 8) for n in (1, 2)]:
        for name in ("triton", "triton_fused"):
            variant = f"warps={warps} stages={stages}"
            yield f"{name} {variant}", partial(_sweep, s, name, "backward", warps, stages)


def _sweep(s: Bench, name: str, part: str, warps: int, stages: int) -> None:
    problem = s.problem("480p" if part == "backward" else "720p")
    if not s.gate(name, problem).startswith("ok"):
        s.report.add(problem, name, "gate", s.gate(name, problem))
        return
    with _tiles(s, problem, name, part, warps, stages):
        s.time(problem, name, [part], variant=f"warps={warps} stages={stages}")


@contextmanager
def _tiles(s: Bench, problem: Problem, name: str, part: str, warps: int, stages: int) -> Iterator[None]:
    """Every tile that this part of this backend looks up, with other warps and stages."""
    from lcv_bsa.backends.triton import tuning

    (q, k, v, do), selection = s.inputs(problem).sets[0], s.inputs(problem).selections[0]
    leaves = [x.detach().requires_grad_(part == "backward") for x in (q, k, v)]
    with tuning.recorded_lookups() as found:
        o = block_sparse_attention(leaves[0], leaves[1], leaves[2], selection, backend=name)
        if part == "backward":
            found.clear()
            torch.autograd.grad(o, leaves, do)
    usual = dict(found)
    if not usual:
        raise ValueError(f"{name} looks up no tile for its {part}, so there is nothing to vary")
    tuning.install({key: dataclasses.replace(tile, warps=warps, stages=stages) for key, tile in usual.items()})
    try:
        yield
    finally:
        tuning.install(usual)


def peers(s: Bench) -> Iterator[Item]:
    """Everyone side by side, selection and layout included."""
    last = "flex", "dense_flash"  # slow to compile, slow to run: should time run out, the targets miss nothing
    for shape in ("720p", "480p"):
        problem = s.problem(shape)
        for name in (*EXACT, *(peer for peer in PEERS if peer not in last), *last):
            dense = name.startswith("dense") or name == "fa3"
            parts = ["total", "total+backward"] + ([] if dense else ["selection", "layout", "forward", "backward"])
            yield f"{name} {shape}", partial(s.time, problem, name, parts)


def tuning(s: Bench) -> Iterator[Item]:
    """Let the tuner choose, write what it chose, and time that."""
    yield "tune", partial(_tune, s, s.problem("720p"))
    for shape in ("720p", "480p"):
        yield f"tuned {shape}", partial(_tuned, s, s.problem(shape))


def _tune(s: Bench, problem: Problem) -> None:
    from lcv_bsa.backends.triton.autotune import tune

    (q, k, v, _), kept = s.inputs(problem).sets[0], s.inputs(problem).selections[0]
    # the interpreter has nothing to time: there every tile takes as long, and the first one wins
    winners = tune(q, k, v, kept, cache=s.folder / _TABLE, bench=(lambda run: 1.0) if s.tiny else None)
    for situation, tile in winners.items():
        text = f"ok: {tile.m}x{tile.n}, {tile.warps} warps, {tile.stages} stages; {tile.reason}"
        s.report.add(problem, f"triton {situation.kernel}", "tile", text)


def _tuned(s: Bench, problem: Problem) -> None:
    from lcv_bsa.backends.triton.autotune import load_tuning

    load_tuning(s.folder / _TABLE)
    s.time(problem, "triton", ["forward", "backward"], variant="tuned")


STAGES: dict[int, Callable[[Bench], Iterator[Item]]] = {
    1: correctness, 2: forward, 3: backward, 4: selection, 5: peers, 6: tuning,
}  # fmt: skip
