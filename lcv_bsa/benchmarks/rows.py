"""Rows as text: the CSV, the printed table, who is how much faster. Free of torch, so that reading them is quick."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS: tuple[str, ...] = (
    "commit", "date", "device", "threads", "torch", "triton", "shape", "tokens", "heads", "head_dim", "sparsity",
    "dtype", "backend", "part", "runs", "ms", "ms_min", "ms_max", "tflops", "fraction", "peak_bytes", "status",
)  # fmt: skip
Row = dict[str, str]

# Names of this library's backends. Those that quantise are bounded apart in the gate, and forward only.
BACKENDS = (
    "cpu", "flex", "triton", "triton_pointer", "triton_tma", "triton_fused", "triton_pair", "triton_int8", "triton_fp8",
    "triton_int8_fp8",
)  # fmt: skip
CPU_BACKENDS = ("cpu", "flex")
QUANTISED: dict[str, float] = {"triton_int8": 5e-2, "triton_fp8": 1e-1, "triton_int8_fp8": 1e-1}


def say(line: str = "") -> None:
    print(line, flush=True)


def line(row: Mapping[str, str]) -> str:
    text = f"{row['shape']:13} {row['sparsity']:>7} {row['dtype']:4} {row['backend']:14} {row['part']:16} "
    if not row["ms"]:
        return text + row["status"]
    text += f"{row['ms']:>8} ms [{row['ms_min']} .. {row['ms_max']}] n={row['runs']}"
    if row["tflops"]:
        text += f"  {row['tflops']} TFLOP/s = {row['fraction']} of matmul"
    return f"{text}  {int(row['peak_bytes']) / 2**20:.0f} MiB"


def append(path: Path, row: Row) -> None:
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def speedups(rows: Sequence[Mapping[str, str]], part: str) -> list[str]:
    """For each problem and contender: dense time over its time in `part`. Dense is the fastest dense contender.

    Only rows that are ok count: who failed the gate has none.
    """
    problems: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["part"] == part and row["status"] == "ok":
            key = row["shape"], row["dtype"], row["sparsity"]
            problems.setdefault(key, {})[row["backend"]] = float(row["ms"])
    lines: list[str] = []
    for (shape, dtype, sparsity), times in problems.items():
        dense = {name: ms for name, ms in times.items() if name.startswith("dense") or name == "fa3"}
        if not dense:
            continue
        base = min(dense, key=lambda name: dense[name])
        lines += [
            f"{shape} {dtype} sparsity {sparsity} {part}: {name} {dense[base] / ms:.2f}x {base} ({ms:.4g} ms)"
            for name, ms in times.items()
            if name not in dense
        ]
    return lines
