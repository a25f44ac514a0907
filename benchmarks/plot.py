"""Pictures of pipeline.csv and long_video.csv.

python benchmarks/plot.py --pipeline DIR/pipeline.csv --out DIR    # parts of a block, steps, share of their limits
python benchmarks/plot.py --long benchmarks/long_video.csv         # time and memory, segment by segment
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Row = dict[str, str]
WHOLE = ("block", "step", "cache", "embed", "final")


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{path} has no rows; run the benchmark that writes it first")
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="a pipeline.csv")
    parser.add_argument("--long", type=Path, help="a long_video.csv")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures (default: beside this script)")
    args = parser.parse_args()
    if args.pipeline is None and args.long is None:
        parser.error("name a CSV: --pipeline FILE, --long FILE, or both")
    return args


def figure(size: tuple[float, float], columns: int) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=size, constrained_layout=True)


def draw_pipeline(rows: Sequence[Row], out: Path) -> Path:
    timed = [row for row in rows if row["stage"] == "transformer" and row["status"] == "ok" and row["ms"]]
    cases = list(dict.fromkeys((row["job"], row["side"], row["form"]) for row in timed if _is_part(row)))
    fig, (times, limits) = figure((14, 1.5 + 0.5 * len(cases)), 2)
    names = list(dict.fromkeys(row["part"] for row in timed if _is_part(row)))
    values = {(row["job"], row["side"], row["form"], row["part"]): row for row in timed}

    def ms(case: tuple[str, str, str], part: str) -> float:
        """What a form does not change was timed in the form before it alone."""
        forms = [case[2], *(["fp8-matmul"] if case[2] == "fp8-all" else []), "plain"]
        found = (values.get((*case[:2], form, part)) for form in forms)
        return next((float(row["ms"]) for row in found if row), 0.0)

    left = [0.0] * len(cases)
    for name in names:
        widths = [ms(case, name) for case in cases]
        times.barh(range(len(cases)), widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths)]
    blocks = [ms(case, "block") for case in cases]
    times.plot(blocks, range(len(cases)), "k|", markersize=14, label="the block itself")
    times.set(xlabel="ms of one block", title="parts of a block")
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        shares = [float(values.get((*case, name), {}).get("of_limit") or 0.0) for case in cases]
        limits.barh([y + (i - len(names) / 2) * height for y in range(len(cases))], shares, height, label=name)
    limits.axvline(1, color="grey", linewidth=1)
    limits.set(xlim=(0, 1.2), xlabel="measured limit of the device / time", title="how near each part is to its limit")
    for axes in (times, limits):
        axes.set_yticks(range(len(cases)), [" ".join(case) for case in cases], fontsize=8)
        axes.invert_yaxis()
    times.legend(fontsize=7, ncols=2)
    first = rows[0]
    words = [first["device"], first["dtype"], f"torch {first['torch']}", first["commit"], first["note"].split("; ")[-1]]
    fig.suptitle(", ".join(words))
    fig.savefig(out / "pipeline.png", dpi=110)
    return out / "pipeline.png"


def _is_part(row: Row) -> bool:
    return row["part"] not in WHOLE and " of " not in row["part"]


def draw_long(rows: Sequence[Row], out: Path) -> Path:
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    fig, (seconds, memory) = figure((11, 4), 2)
    for job in jobs:
        found = [row for row in rows if row["job"] == job and row["part"] in ("segment", "window")]
        x = [int(row["index"]) for row in found]
        if "counted" in job:
            calls = [int(row["calls"]) for row in found]
            seconds.plot(x, [count / calls[-1] for count in calls], ".-", label="calls of functions, last = 1")
            continue
        seconds.plot(x, [float(row["cpu_s"]) for row in found], ".-", label=f"{job}, processor time, s")
        memory.plot(x, [float(row["rss_mib"]) for row in found], ".-", label=job)
    seconds.set(xlabel="segment or window", title="time of each", ylim=(0, None))
    memory.set(xlabel="segment or window", ylabel="MiB", title="resident memory after each", ylim=(0, None))
    for axes in (seconds, memory):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    first = rows[0]
    fig.suptitle(", ".join(filter(None, [first["device"], f"torch {first['torch']}", first["note"]])))
    fig.savefig(out / "long_video.png", dpi=110)
    return out / "long_video.png"


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    for path, draw in ((args.pipeline, draw_pipeline), (args.long, draw_long)):
        if path is not None:
            print(f"drew {draw(read(path), args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
