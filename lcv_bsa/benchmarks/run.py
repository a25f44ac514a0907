"""Time block sparse attention and its peers: the gate first, then one row per part (see README.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import HERE, Limits
from parts import PARTS, Inputs, pairs_of, time_parts
from peers import PEERS, Problem, contender
from report import Report
from rows import BACKENDS, CPU_BACKENDS, say, speedups
from shapes import DTYPES, SHAPES
from verify import gate


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", help="comma separated (default: cpu_8k on a CPU, 480p,720p on a GPU)")
    parser.add_argument("--sparsities", default="0.9375", help="shares of key blocks left out, comma separated")
    parser.add_argument("--dtypes", help="of fp32, bf16, fp16 (default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--backends", help=f"of {','.join(BACKENDS)}, none (default: cpu,flex on a CPU, all on a GPU)")
    parser.add_argument("--peers", help=f"of {','.join(PEERS)}, none (default: dense on a CPU, all on a GPU)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="folder to import a peer from")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma separated (default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of a part, at most (default 20)")
    parser.add_argument("--seconds", type=float, default=10.0, help="start no timed run after this (default 10)")
    parser.add_argument("--threads", type=int, help="of a CPU (default: as torch has it)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv", help="CSV to append to")
    parser.add_argument("--no-out", action="store_true", help="write no CSV")
    parser.add_argument("--list", action="store_true", help="describe the shapes and stop")
    return parser.parse_args(arguments)


def names(text: str, known: Sequence[str], option: str) -> list[str]:
    """Comma separated names, each one known. Ends the program otherwise."""
    wanted = [name for name in text.split(",") if name and name != "none"]
    wrong = [name for name in wanted if name not in known]
    if wrong:
        raise SystemExit(f"--{option}: expected of {', '.join(known)}, got {', '.join(wrong)}")
    return wanted


def paths_of(options: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for option in options:
        name, _, path = option.partition("=")
        pairs[name] = path
    wrong = [name for name, path in pairs.items() if name not in PEERS or not path]
    if wrong:
        raise SystemExit(f"--peer: expected NAME=PATH with a name of {', '.join(PEERS)}, got {', '.join(wrong)}")
    return pairs


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no CUDA GPU; try --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def run_problem(
    problem: Problem, contenders: Sequence[str], parts: Sequence[str], limits: Limits, paths: dict[str, str],
    report: Report,
) -> bool:  # fmt: skip
    """Rows of everyone on one problem; False when a backend of this library failed the gate."""
    green = True
    report.ceiling(problem.dtype)
    inputs = Inputs.of(problem)
    for name in contenders:
        status = gate(name, problem, inputs, paths)
        report.add(problem, name, "gate", status)
        green &= not (status.startswith("wrong") and name in BACKENDS)
        if status.startswith("ok"):
            made = contender(name, problem, paths)
            for part, result in time_parts(made, problem, inputs, parts, limits):
                report.add(problem, name, part, result, pairs=pairs_of(made, problem, inputs))
    return green


def problems_of(args: argparse.Namespace, device: torch.device) -> list[Problem]:
    gpu = device.type == "cuda"
    shapes = names(args.shapes or ("480p,720p" if gpu else "cpu_8k"), list(SHAPES), "shapes")
    dtypes = names(args.dtypes or ("bf16" if gpu else "fp32"), list(DTYPES), "dtypes")
    sparsities = [float(text) for text in args.sparsities.split(",")]
    if not all(0 <= s < 1 for s in sparsities):
        raise SystemExit(f"--sparsities: expected shares in [0, 1), got {args.sparsities}")
    return [
        Problem(SHAPES[shape], DTYPES[dtype], device, 1 - s) for shape in shapes for dtype in dtypes for s in sparsities
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.list:
        for shape in SHAPES.values():
            T, H, W = shape.grid
            size = f"{T}x{H}x{W} = {shape.layout.num_tokens} tokens, {shape.heads} heads of {shape.head_dim}"
            say(f"{shape.name:13} {size}; {shape.what}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    device = device_of(args.device)
    gpu = device.type == "cuda"
    problems = problems_of(args, device)
    backends = names(args.backends or ",".join(BACKENDS if gpu else CPU_BACKENDS), BACKENDS, "backends")
    peers = names(args.peers or (",".join(PEERS) if gpu else "dense"), list(PEERS), "peers")
    parts = names(args.parts, PARTS, "parts")
    limits, paths = Limits(max(1, args.repeats), args.seconds), paths_of(args.peer)
    report = Report(device, None if args.no_out else args.out)
    green = True
    for problem in problems:
        green &= run_problem(problem, [*peers, *backends], parts, limits, paths, report)
    say()
    for part in ("total", "total+backward"):
        for text in speedups(report.rows, part):
            say(text)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
