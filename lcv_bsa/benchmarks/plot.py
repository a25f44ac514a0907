"""The crossover from results.csv, as a table and a plot: dense over sparse time against length and kept share."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import Row, say

HERE = Path(__file__).resolve().parent

PARTS = {"total": "forward", "total+backward": "forward and backward"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=HERE / "results.csv")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "crossover.png")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--sparsity", type=float, default=0.9375, help="of the plot against length")
    parser.add_argument("--shape", default="cpu_8k", help="of the plot against the kept share")
    return parser.parse_args(arguments)


def latest(path: Path, dtype: str) -> dict[tuple[str, str, str, str], Row]:
    """The last row that is ok for each (shape, sparsity, backend, part); all from one device, that of the last row."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok" and row["dtype"] == dtype]
    if not rows:
        raise SystemExit(f"{path} has no row that is ok in {dtype}; run benchmarks/run.py first")
    device = rows[-1]["device"], rows[-1]["threads"]
    kept = [row for row in rows if (row["device"], row["threads"]) == device]
    return {(row["shape"], row["sparsity"], row["backend"], row["part"]): row for row in kept}


def speedups(rows: dict[tuple[str, str, str, str], Row], backend: str, part: str) -> list[tuple[Row, float]]:
    """Rows of the backend, and the time of dense attention over theirs: of the same shape, measured beside it."""
    found: list[tuple[Row, float]] = []
    for (shape, sparsity, name, row_part), row in rows.items():
        dense = rows.get((shape, sparsity, "dense", part))
        if name == backend and row_part == part and dense is not None:
            found.append((row, float(dense["ms"]) / float(row["ms"])))
    return found


def table(rows: dict[tuple[str, str, str, str], Row], backend: str) -> list[str]:
    """Markdown: milliseconds of dense and sparse, and how many times faster, for each length and kept share."""
    cells: dict[tuple[int, float], list[str]] = {}
    for part in PARTS:
        for row, faster in speedups(rows, backend, part):
            key = int(row["tokens"]), 1 - float(row["sparsity"])
            ms = float(row["ms"])
            cells.setdefault(key, []).append(f"{ms * faster:.0f} / {ms:.0f} ms = **{faster:.1f}x**")
    head = ["| tokens | kept | " + " | ".join(PARTS.values()) + " |", "|---" * (2 + len(PARTS)) + "|"]
    return head + [
        f"| {tokens} | {kept:.4g} | " + " | ".join(texts) + " |" for (tokens, kept), texts in sorted(cells.items())
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    rows = latest(args.csv, args.dtype)
    for text in table(rows, args.backend):
        say(text)
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib, which nothing else here does: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for part, label in PARTS.items():
        found = speedups(rows, args.backend, part)
        length = [(int(row["tokens"]), x) for row, x in found if float(row["sparsity"]) == args.sparsity]
        share = [(1 - float(row["sparsity"]), x) for row, x in found if row["shape"] == args.shape]
        draw(left, sorted(length), label)
        draw(right, sorted(share), label)
    finish(left, "tokens", f"keeping {1 - args.sparsity:.4g} of the key blocks")
    finish(right, "share of key blocks kept", f"{args.shape}: {tokens(rows, args.shape)} tokens")
    row = next(iter(rows.values()))
    figure.suptitle(f'"{args.backend}" against dense SDPA, {args.dtype}; {row["device"]}, threads: {row["threads"]}')
    figure.savefig(args.out, dpi=110)
    say(f"drew {args.out}")


def draw(axes: Any, points: Sequence[tuple[float, float]], label: str) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)


def finish(axes: Any, xlabel: str, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator  # pyright: ignore[reportMissingImports]

    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="dense time / sparse time", title=title)
    axes.margins(y=0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=2))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}" if value < 1 else f"{value:.0f}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def tokens(rows: dict[tuple[str, str, str, str], Row], shape: str) -> str:
    return next((row["tokens"] for (name, _, _, _), row in rows.items() if name == shape), "?")


if __name__ == "__main__":
    main()
