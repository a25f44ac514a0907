"""The whole pipeline by stages at the real model's shapes, ours beside the official implementation, and its goals.

    python benchmarks/pipeline.py --device cuda --official PATH --out DIR    # on a GPU: under nine minutes
    python benchmarks/pipeline.py --device cpu --blocks 1 --frames 4         # real width, few tokens: hours otherwise
    python benchmarks/pipeline.py --tiny --out DIR                           # everything in a minute, on any machine

Weights are random, of full width. Of the 48 blocks `--blocks` are timed and the rest is counted from one more block's
time; what is counted so is marked "extrapolated". Rows go to pipeline.csv as they come, all of it to pipeline.json;
`benchmarks/plot.py` draws them.
"""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import dataclasses
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import official
import torch
from clocks import Clocks
from ends import text_rows, vae_rows
from goals import print_goals
from measure import DTYPES, MIB, commit, device_name
from parity import compare, noise_ratio, psnr
from parts import ALL_EIGHT, FORMS, PLAIN, Absent, Inputs, Job, Ours, Part, build, build_quantised
from projection import assumptions, goals_of

from lcv_core.config import LONGCAT_VIDEO, WAN_VAE, TextConfig
from lcv_core.dit.attention import resolve_backend
from lcv_core.errors import InputError
from lcv_core.weights.init import PRESETS

JOBS = {
    "t2v 480p93 dense": Job("t2v 480p93 dense", (24, 30, 52)),
    "t2v 480p93 sparse": Job("t2v 480p93 sparse", (24, 30, 52), sparse=True),
    "refine 720p189 sparse": Job("refine 720p189 sparse", (48, 44, 80), sparse=True),
    "continue 480p93 cached": Job("continue 480p93 cached", (24, 30, 52), cached=4),
}
TINY_GRIDS = {"t2v": (4, 4, 6), "refine": (8, 8, 12), "continue": (6, 4, 6)}
# What eight bits change; the rest is the plain form's.
LINEAR_PARTS = ("qkv", "proj", "cross", "ffn", "block", "step")
CHANGED = {ALL_EIGHT: ("attention", "block", "step")}
COLUMNS: tuple[str, ...] = (
    "commit", "date", "device", "torch", "dtype", "stage", "job", "form", "side", "part", "shape", "runs", "ms", "min",
    "max", "limit_ms", "of_limit", "peak_mib", "status", "extrapolated", "note",
)  # fmt: skip
Row = dict[str, str]


@dataclasses.dataclass
class Bench:
    """What all stages share: the machine, the clock, and the rows so far."""

    args: argparse.Namespace
    clocks: Clocks
    file: Any
    rows: list[Row] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.fixed = {
            "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(self.clocks.device),
            "torch": torch.__version__, "dtype": next(k for k, v in DTYPES.items() if v == self.clocks.dtype),
        }  # fmt: skip
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
        self.writer.writeheader()

    @property
    def sizes(self) -> str:
        """What every row of this run says about its shapes."""
        frames = f"{self.args.frames} latent frames alone" if self.args.frames else "real shapes"
        return "tiny shapes" if self.args.tiny else frames

    @property
    def left(self) -> float:
        return self.args.until - time.monotonic()

    def add(self, **cells: str) -> None:
        row = dict.fromkeys(COLUMNS, "") | self.fixed | {"status": "ok"} | cells
        row["note"] = "; ".join(filter(None, [row["note"], self.sizes]))
        self.rows.append(row)
        self.writer.writerow(row)
        self.file.flush()
        shown = ("stage", "job", "form", "side", "part", "ms", "of_limit", "peak_mib", "status", "extrapolated", "note")
        print("  ".join(row[key] for key in shown if row[key]), flush=True)

    def measure(self, work: Part, **cells: str) -> float | None:
        """Time a part and write its row; its milliseconds, or None where it failed."""
        form = cells.get("form", PLAIN)
        try:
            timed = self.clocks.time(work.run)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory too
            self.add(status=f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}", **cells)
            self.free()
            return None
        limit = self.clocks.limit_ms(form, work.matmul, work.attention, work.moved)
        bounded = limit if limit and (work.matmul or work.moved) else None
        self.add(
            runs=str(len(timed.ms)), ms=f"{timed.median:.4g}", min=f"{min(timed.ms):.4g}", max=f"{max(timed.ms):.4g}",
            limit_ms=f"{bounded:.4g}" if bounded else "", of_limit=f"{bounded / timed.median:.3f}" if bounded else "",
            peak_mib=f"{timed.peak / MIB:.1f}", **cells,
        )  # fmt: skip
        return timed.median

    def absent(self, why: object, **cells: str) -> None:
        self.add(status=f"absent: {why}", **cells)

    def free(self) -> None:
        gc.collect()
        if self.clocks.cuda:
            torch.cuda.empty_cache()


# -- the transformer --------------------------------------------------------------------------------------------------


def jobs_of(args: argparse.Namespace) -> list[Job]:
    jobs = list(JOBS.values())
    if args.tiny:
        jobs = [dataclasses.replace(j, grid=TINY_GRIDS[j.name.split()[0]], cached=min(j.cached, 2)) for j in jobs]
    elif args.frames:
        cached = {True: max(1, args.frames // 4), False: 0}
        jobs = [dataclasses.replace(j, grid=(args.frames, *j.grid[1:]), cached=cached[bool(j.cached)]) for j in jobs]
    return jobs


def run_parts(bench: Bench, side: Ours | official.Official, form: str, note: str = "") -> None:
    """Every part of one side on one job, and the step of the whole model."""
    job, config, depth = side.job, side.config, bench.args.depth
    cells = {"stage": "transformer", "job": job.name, "form": form, "side": side.name, "note": note}
    cells["shape"] = f"{job.passed[0]}x{job.grid[1]}x{job.grid[2]}"
    with torch.inference_mode():
        parts = side.parts()
    found: dict[str, float | None] = {}
    for name, part in parts.items():
        if form != PLAIN and name not in CHANGED.get(form, LINEAR_PARTS) and name != "cache":
            continue
        label = f"{name} of {config.depth} blocks" if name in ("step", "cache") else name
        found[name] = bench.measure(part, part=label, **cells)
    extrapolate(bench, found, config.depth, depth, cells)


def extrapolate(bench: Bench, found: dict[str, float | None], blocks: int, depth: int, cells: dict[str, str]) -> None:
    """The step of the whole model: that of few blocks, and one block's time for each of the others.

    Of a job whose blocks are not timed alone, a step of few blocks is taken for so many blocks and nothing else.
    """
    for name in ("step", "cache"):
        few = found.get(name)
        if few is None:
            continue
        block = found.get("block") if name == "step" else None
        per_block = few / blocks if block is None else block
        whole = few + (depth - blocks) * per_block
        bench.add(part=name, ms=f"{whole:.5g}", extrapolated=f"{blocks} of {depth} blocks", **cells)


def plain_side(bench: Bench, job: Job, name: str) -> None:
    c, args = bench.clocks, bench.args
    cells = {"stage": "transformer", "job": job.name, "form": PLAIN, "side": name}
    if name == "official" and args.official is None:
        return bench.absent("no --official PATH was given", **cells)
    model = build(args.config, c.device, c.dtype)
    model.set_attention(args.attention)
    inputs = Inputs.of(args.config, job, c.device, c.dtype)
    if name == "ours":
        return run_parts(bench, Ours(model, job, inputs), PLAIN)
    try:
        official.load(args.official)
        other = official.Official(official.build(model, c.device, c.dtype), args.config, job, inputs)
    except Absent as why:
        return bench.absent(why, **cells)
    return run_parts(bench, other, PLAIN, "; ".join(official.notes))


def eight_bits(bench: Bench, job: Job, form: str) -> None:
    c, args = bench.clocks, bench.args
    try:
        model = build_quantised(args.config, c.device, c.dtype, form)
    except Absent as why:
        return bench.absent(why, stage="transformer", job=job.name, form=form, side="ours")
    model.set_attention(args.attention)
    return run_parts(bench, Ours(model, job, Inputs.of(args.config, job, c.device, c.dtype), form), form)


def parity_stage(bench: Bench, jobs: list[Job]) -> None:
    """Distance of each output from the same model's in a wider dtype, on few frames, densely."""
    c, args = bench.clocks, bench.args
    job = dataclasses.replace(jobs[0], name="parity", grid=(min(4, jobs[0].grid[0]), *jobs[0].grid[1:]))
    with torch.inference_mode():
        found, missing = compare(args.config, job, c.device, c.dtype, args.official)
    for key, why in missing.items():
        bench.absent(why, stage="parity", job=job.name, side=key)
    for key, output in found.items():
        if key == "exact":
            continue
        note = f"relative error {noise_ratio(output, found['exact']):.4g}, PSNR {psnr(output, found['exact']):.2f} dB"
        bench.add(stage="parity", job=job.name, side=key, part="step", note=f"{note}; against a wider dtype")


# -- running ----------------------------------------------------------------------------------------------------------


def stages(bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and work of each stage; what the goals need comes first."""
    jobs = jobs_of(bench.args)
    for job in jobs:
        yield f"ours {job.name}", lambda job=job: plain_side(bench, job, "ours")
        yield f"official {job.name}", lambda job=job: plain_side(bench, job, "official")
    yield "VAE", lambda: vae_rows(bench, bench.args.vae, bench.args.tiny)
    yield "text", lambda: text_rows(bench, bench.args.text, bench.args.tiny)
    yield "parity", lambda: parity_stage(bench, jobs)
    for form in FORMS:
        for job in jobs:
            if form == ALL_EIGHT and not job.sparse:
                continue
            yield f"{form} {job.name}", lambda job=job, form=form: eight_bits(bench, job, form)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder of pipeline.csv and .json")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--official", type=Path, metavar="PATH", help="a checkout of the official repository")
    parser.add_argument("--attention", default="auto", help="our dense attention backend (default auto)")
    parser.add_argument("--blocks", type=int, default=2, help="transformer blocks that are built (default 2)")
    parser.add_argument("--frames", type=int, help="latent frames instead of a job's own; then nothing is projected")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of a part, at most")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no further stage is begun")
    parser.add_argument("--only", default="", help="stages whose name contains this")
    parser.add_argument("--goals", action="store_true", help="run nothing: the goals from the pipeline.csv in --out")
    parser.add_argument("--tiny", action="store_true", help="the tiny model and small clips on the CPU; proves nothing")
    args = parser.parse_args()
    if args.blocks < 1:
        parser.error("--blocks must be at least 1")
    if args.frames is not None and (args.frames < 4 or args.frames % 4):
        parser.error("--frames must be a multiple of 4: whole sparse blocks")
    args.until = time.monotonic() + args.budget
    if args.tiny:
        args.device, args.repeats = "cpu", 2
    return args


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The machine, and the configurations into `args`. SystemExit for what cannot be had here."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: this torch sees no CUDA GPU; try --device cpu --blocks 1 --frames 4, or --tiny"
        )
    device = torch.device(name)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.bfloat16 if name == "cuda" else torch.float32
    tiny = PRESETS["tiny"]
    config, args.vae, args.text = (
        (tiny.dit, tiny.vae, tiny.text) if args.tiny else (LONGCAT_VIDEO, WAN_VAE, TextConfig())
    )
    args.depth = config.depth
    args.config = dataclasses.replace(config, depth=min(args.blocks, config.depth))
    try:
        resolve_backend(args.attention, device=device, dtype=dtype, head_dim=config.head_dim)
    except InputError as error:
        raise SystemExit(f"--attention: {error}") from None
    return device, dtype


def run(bench: Bench) -> None:
    bench.clocks.measure_ceilings(FORMS)
    for form, rate in bench.clocks.rates.items():
        bench.add(stage="ceiling", form=form, part="square matmul", note=f"{rate / 1e12:.4g} TFLOP/s")
    bench.add(stage="ceiling", part="copy", note=f"{bench.clocks.bandwidth / 1e9:.4g} GB/s")
    for name, stage in stages(bench):
        if bench.args.only not in name:
            continue
        if bench.left <= 0:
            bench.add(stage=name, status="skipped: the time of --budget is up")
            continue
        try:
            stage()
        except Exception as error:  # a stage may fail in any way; the others still run
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            bench.add(stage=name, status=f"failed: {why}")
        bench.free()


def summary(args: argparse.Namespace, rows: list[Row], ceilings: dict[str, Any]) -> None:
    """The goals, on the screen and with everything else in pipeline.json."""
    goals = goals_of(rows, full=not (args.tiny or args.frames))
    said = assumptions(args.blocks, LONGCAT_VIDEO.depth)
    verdicts = [dataclasses.asdict(goal) | {"verdict": goal.verdict} for goal in goals]
    content = {"rows": rows, "goals": verdicts, "assumptions": said, "ceilings": ceilings}
    (args.out / "pipeline.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print_goals(goals)
    print("assumed:", *said, sep="\n  ")


def main() -> int:
    args = parse()
    path = args.out / "pipeline.csv"
    if args.goals:
        with path.open(newline="", encoding="utf-8") as file:
            summary(args, list(csv.DictReader(file)), {})
        return 0
    device, dtype = prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    clocks = Clocks(device, dtype, args.repeats, seconds=0.1 if args.tiny else 4.0, side=128 if args.tiny else 0)
    with path.open("w", newline="", encoding="utf-8") as file:
        bench = Bench(args, clocks, file)
        run(bench)
    summary(args, bench.rows, {"flops": clocks.rates, "bytes_per_second": clocks.bandwidth})
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
