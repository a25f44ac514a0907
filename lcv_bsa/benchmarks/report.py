"""Makes rows from timings."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
from measure import Timing, commit, device_name, matmul_ceiling, triton_version
from peers import Problem
from rows import COLUMNS, Row, append, line, say
from shapes import DTYPES, flops


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


class Report:
    """Makes rows and appends each to `out` at once, so that a run that is cut short leaves what it measured."""

    def __init__(self, device: torch.device, out: Path | None) -> None:
        self.device, self.out = device, out
        self.rows: list[Row] = []
        self.ceilings: dict[torch.dtype, float] = {}
        self._machine: Row = {
            "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(device),
            "threads": str(torch.get_num_threads()), "torch": torch.__version__, "triton": triton_version(),
        }  # fmt: skip

    def ceiling(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large matmul in this dtype, measured at the first call."""
        if dtype not in self.ceilings:
            self.ceilings[dtype] = matmul_ceiling(dtype, self.device)
            say(f"matmul ceiling in {dtype_name(dtype)}: {self.ceilings[dtype] / 1e12:.4g} TFLOP/s")
        return self.ceilings[dtype]

    def add(self, problem: Problem, backend: str, part: str, result: Timing | str, *, pairs: int = 0) -> Row:
        """pairs: (query token, key token) pairs of the attention. A string as result is the row's status."""
        shape = problem.shape
        row = dict.fromkeys(COLUMNS, "") | self._machine
        row |= {
            "shape": shape.name, "tokens": str(shape.layout.num_tokens), "heads": str(shape.heads),
            "head_dim": str(shape.head_dim), "sparsity": f"{1 - problem.keep:.6g}", "dtype": dtype_name(problem.dtype),
            "backend": backend, "part": part, "status": result if isinstance(result, str) else "ok",
        }  # fmt: skip
        if isinstance(result, Timing):
            row |= self._numbers(problem, part, result, pairs)
        self.rows.append(row)
        if self.out is not None:
            append(self.out, row)
        say(line(row))
        return row

    def _numbers(self, problem: Problem, part: str, timing: Timing, pairs: int) -> Row:
        cells = {
            "runs": str(len(timing.ms)), "ms": f"{timing.median:.4g}", "ms_min": f"{min(timing.ms):.4g}",
            "ms_max": f"{max(timing.ms):.4g}", "peak_bytes": str(timing.peak_bytes),
        }  # fmt: skip
        useful = flops(pairs, problem.shape.head_dim, part)
        if useful is not None and pairs:
            speed = useful / timing.median * 1e3
            cells |= {"tflops": f"{speed / 1e12:.4g}", "fraction": f"{speed / self.ceiling(problem.dtype):.3g}"}
        return cells
