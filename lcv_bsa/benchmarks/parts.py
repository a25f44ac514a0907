"""The parts of one attention call, each timed apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from inputs import Inputs
from measure import Limits, Timing, measure
from peers import Contender, Problem, trains
from shapes import dense_pairs, kept_pairs
from torch import Tensor

# total: layout, selection and forward, from [B, H, S, D] in raster order to the same. backward: of attention alone.
PARTS: tuple[str, ...] = ("selection", "layout", "forward", "backward", "forward+backward", "total", "total+backward")


def pairs_of(made: Contender, problem: Problem, inputs: Inputs) -> int:
    return dense_pairs(problem.shape) if made.select is None else kept_pairs(inputs.selections[0])


def time_parts(
    made: Contender, problem: Problem, inputs: Inputs, parts: Sequence[str], limits: Limits
) -> Iterator[tuple[str, Timing | str]]:
    """Each part of `parts` that the contender has, and its timing or why there is none."""
    for part in PARTS:
        if part not in parts or (part == "layout" and made.pack is None):
            continue
        if part == "selection" and made.select is None:
            continue
        if "backward" in part and not trains(made.name, *inputs.sets[0][:3], inputs.selections[0]):
            yield part, "absent: it has no gradients here"
            continue
        try:
            run = _RUNS[part](made, inputs)
            yield part, measure(run, problem.device, limits)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory is a RuntimeError
            yield part, f"failed: {str(error).splitlines()[0][:160]}"


Run = Callable[[int], object]


def _packed(made: Contender, inputs: Inputs, *, grad: bool = False) -> list[tuple[list[Tensor], Any]]:
    """For each set packed q, k, v, do, and the given selection in the contender's form."""
    results: list[tuple[list[Tensor], Any]] = []
    for tensors, selection in zip(inputs.sets, inputs.selections):
        packed = [x.detach().requires_grad_(grad and i < 3) for i, x in enumerate(made.packed(*tensors))]
        results.append((packed, made.convert(selection)))
    return results


def _selection(made: Contender, inputs: Inputs) -> Run:
    packed, select = _packed(made, inputs), made.select
    assert select is not None

    def run(number: int) -> object:
        (q, k, _, _), _ = packed[number % len(packed)]
        return select(q, k)

    return run


def _layout(made: Contender, inputs: Inputs) -> Run:
    outputs = made.packed(*(do for _, _, _, do in inputs.sets))

    def run(number: int) -> object:
        q, k, v, _ = inputs.sets[number % len(inputs.sets)]
        return *made.packed(q, k, v), made.unpacked(outputs[number % len(outputs)])

    return run


def _forward(made: Contender, inputs: Inputs) -> Run:
    packed = _packed(made, inputs)

    @torch.no_grad()
    def run(number: int) -> object:
        (q, k, v, _), kept = packed[number % len(packed)]
        return made.attend(q, k, v, kept)

    return run


def _backward(made: Contender, inputs: Inputs) -> Run:
    packed = _packed(made, inputs, grad=True)
    outputs = [made.attend(q, k, v, kept)[0] for (q, k, v, _), kept in packed]

    def run(number: int) -> object:
        place = number % len(packed)
        (q, k, v, do), _ = packed[place]
        return torch.autograd.grad(outputs[place], (q, k, v), do, retain_graph=True)

    return run


def _forward_backward(made: Contender, inputs: Inputs) -> Run:
    packed = _packed(made, inputs, grad=True)

    def run(number: int) -> object:
        (q, k, v, do), kept = packed[number % len(packed)]
        return torch.autograd.grad(made.attend(q, k, v, kept)[0], (q, k, v), do)

    return run


def _end_to_end(made: Contender, tensors: Sequence[Tensor]) -> Tensor:
    q, k, v = made.packed(*tensors)
    kept = None if made.select is None else made.select(q.detach(), k.detach())
    return made.unpacked(made.attend(q, k, v, kept)[0])


def _total(made: Contender, inputs: Inputs) -> Run:
    @torch.no_grad()
    def run(number: int) -> object:
        return _end_to_end(made, inputs.sets[number % len(inputs.sets)][:3])

    return run


def _total_backward(made: Contender, inputs: Inputs) -> Run:
    def run(number: int) -> object:
        q, k, v, do = inputs.sets[number % len(inputs.sets)]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(_end_to_end(made, leaves), leaves, do)

    return run


_RUNS: dict[str, Callable[[Contender, Inputs], Run]] = {
    "selection": _selection,
    "layout": _layout,
    "forward": _forward,
    "backward": _backward,
    "forward+backward": _forward_backward,
    "total": _total,
    "total+backward": _total_backward,
}
