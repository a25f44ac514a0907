"""What every stage of the GPU hour shares: the machine, the inputs, the gate, the rows."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from inputs import Inputs
from measure import Limits, measure
from parts import pairs_of, time_parts
from peers import Problem, contender
from report import Report
from shapes import DTYPES, SHAPES
from verify import gate

Item = tuple[str, Callable[[], object]]
KEEP = 1 / 16
# Where --tiny puts small problems in place of real ones.
_TINY = {"480p": "tiny_partial", "720p": "tiny"}


@dataclasses.dataclass
class Bench:
    """The machine, and where rows go. tiny: small shapes on the CPU, which shows that everything runs and no more."""

    device: torch.device
    tiny: bool
    paths: dict[str, str]
    folder: Path
    report: Report
    _inputs: tuple[Problem, Inputs] | None = None
    _gates: dict[tuple[object, ...], str] = dataclasses.field(default_factory=dict)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """bf16 is wrong in the interpreter."""
        return ("fp32", "fp16") if self.tiny else ("bf16", "fp16", "fp32")

    @property
    def limits(self) -> Limits:
        return Limits(1, 0.1) if self.tiny else Limits(10, 3.0)

    def problem(self, shape: str, dtype: str = "bf16") -> Problem:
        name, kind = (_TINY[shape], "fp16" if dtype == "bf16" else dtype) if self.tiny else (shape, dtype)
        return Problem(SHAPES[name], DTYPES[kind], self.device, KEEP)

    def inputs(self, problem: Problem) -> Inputs:
        """Kept until another problem is asked for: two at 720p would be tight on some GPUs."""
        if self._inputs is None or self._inputs[0] != problem:
            self._inputs = None
            gc.collect()
            self._inputs = problem, Inputs.of(problem)
        return self._inputs[1]

    def gate(self, name: str, problem: Problem) -> str:
        shape = problem.shape
        key = name, problem.dtype, shape.head_dim, shape.block, shape.layout.is_full
        if key not in self._gates:
            self._gates[key] = gate(name, problem, self.inputs(problem), self.paths)
        return self._gates[key]

    def time(self, problem: Problem, name: str, parts: Sequence[str], *, variant: str = "") -> None:
        """A row for each part, once the gate is green; otherwise one row that says why not."""
        status, label = self.gate(name, problem), f"{name} {variant}".strip()
        if not status.startswith("ok"):
            self.report.add(problem, label, "gate", status)
            return
        made, inputs = contender(name, problem, self.paths), self.inputs(problem)
        for part, result in time_parts(made, problem, inputs, parts, self.limits):
            self.report.add(problem, label, part, result, pairs=pairs_of(made, problem, inputs))

    def time_one(self, problem: Problem, label: str, part: str, run: Callable[[], object]) -> None:
        self.report.add(problem, label, part, measure(lambda _: run(), self.device, self.limits))
