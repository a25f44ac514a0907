"""Whether a long video stays as quick and as small as it begins: each segment's time, and memory after it.

    python benchmarks/long_video.py                  # 60 segments, refining of 2, 4 and 8 windows; long_video.csv
    python benchmarks/long_video.py --tiny --out DIR # the same with few and small ones: shows that it runs

What runs is what `lcv long` and `lcv refine` run, on the miniature that comes with the package: text encoder, sampling
with the distilled schedule, KV cache, decoding, the hand-over, latents and pieces of video written to disk,
all joined at the end. Each job has a process of its own. As many segments again, tiny ones, run with all calls of
functions counted: that work of a segment does not grow can be seen on a busy machine too.
"""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from goals import Goal, print_goals
from measure import MIB, commit, device_name, rss

from lcv_core.cli.job import InputFile, Job
from lcv_core.cli.progress import Reporter
from lcv_core.cli.run import Request, carry_out
from lcv_core.miniature import MINIATURE
from lcv_core.video_io import write_video

HERE = Path(__file__).resolve().parent
PROMPT = "a large red ball moves left on a dark blue background"
COLUMNS: tuple[str, ...] = (
    "commit", "date", "device", "threads", "torch", "job", "part", "index", "cpu_s", "wall_s", "rss_mib", "tensors_mib",
    "calls", "note",
)  # fmt: skip
WARM_UP = 2  # the first segment has no condition, the second builds the first KV cache
COMPARED = 5
SLACK = 0.03  # by how much the end may exceed the beginning
SLACK_OF_CALLS = 0.001
COUNTED = "counted"


@dataclass(frozen=True)
class Mark:
    """A moment of a job: after reading and loading ("start"), a segment or window, or joining ("end")."""

    part: str
    cpu: float
    wall: float
    rss: int
    tensors: int
    calls: int = 0


class Calls:
    """Counts calls of functions, Python's and C's, while it is on; other programs do not change the count."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: object, event: str, arg: object) -> None:
        if event in ("call", "c_call"):
            self.count += 1


class Clock(Reporter):
    """Notes time and memory whenever a segment or a window has been written."""

    def __init__(self, calls: Calls | None = None) -> None:
        super().__init__()
        self.marks: list[Mark] = []
        self._calls = calls
        self._began = self._now_()

    def say(self, message: str) -> None:
        """A job says one line per segment; the table is enough."""

    def start(self, label: str, total: int, *, done: int = 0) -> None:
        if not self.marks:
            self.mark("start")
        super().start(label, total, done=done)

    def drop(self, label: str) -> None:
        super().drop(label)
        self.mark(label.split(" ")[0].lower())

    def mark(self, part: str) -> None:
        sys.setprofile(None)
        cpu, wall = (now - before for now, before in zip(self._now_(), self._began))
        calls = self._calls.count if self._calls else 0
        self.marks.append(Mark(part, cpu, wall, rss(), tensor_bytes(), calls))
        self._began = self._now_()  # what was done here is not part of the next segment
        if self._calls:
            self._calls.count = 0
            sys.setprofile(self._calls)

    @staticmethod
    def _now_() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()


def tensor_bytes() -> int:
    """Bytes of all storages that a tensor known to Python is of."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":  # isinstance would wake lazy ones
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# -- jobs -------------------------------------------------------------------------------------------------------------


def long_job(segments: int, tiny: bool) -> Job:
    size: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_cond_frames": 5} if tiny else {}
    return Job(
        task="long", model=MINIATURE, prompts=[PROMPT], seed=1, num_segments=segments, schedule="distilled",
        num_steps=1 if tiny else 2, attention="sdpa", dtype="fp32", **size,
    )  # fmt: skip


def refine_job(windows: int, tiny: bool, folder: Path) -> Job:
    """Of a clip that has this many windows of full length: drifting stripes, which any codec keeps."""
    window, side = (5, (32, 48)) if tiny else (9, (64, 96))
    shared = window // 2
    count = window + (windows - 1) * (window - shared)
    clip = folder / f"clip-{windows}.mp4"
    across = torch.arange(side[1]) / side[1]
    frames = [((across + i / count) % 1.0).expand(3, side[0], -1).permute(1, 2, 0).clone() for i in range(count)]
    write_video(clip, frames, frame_rate=15.0)
    size: dict[str, Any] = {"height": 64, "width": 64} if tiny else {}
    return Job(
        task="refine", model=MINIATURE, prompts=[PROMPT], seed=1, clip=InputFile.of(clip), window=window,
        refine_steps=1, attention="sdpa", dtype="fp32", **size,
    )  # fmt: skip


def run_job(name: str, count: int, tiny: bool, counted: bool) -> list[Mark]:
    with tempfile.TemporaryDirectory(prefix="lcv-bench-") as temporary:
        folder = Path(temporary)
        job = long_job(count, tiny) if name == "long" else refine_job(count, tiny, folder)
        clock = Clock(Calls() if counted else None)
        carry_out(Request(job, folder / "out.mp4", False, "cpu"), clock)
        clock.mark("end")
    return clock.marks


# -- rows and goals ---------------------------------------------------------------------------------------------------


def in_a_process(name: str, count: int, tiny: bool) -> list[Mark]:
    """A job's marks; it runs alone in a process, so that no other job's memory is in them."""
    kind, counted = name.split(" ")[0], COUNTED in name
    command = [sys.executable, str(Path(__file__).resolve()), "--job", kind, "--count", str(count)]
    # One thread: then processor time is the time that the job needs, whatever else the machine does.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["--tiny"] * (tiny or counted) + ["--counted"] * counted
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} {count} failed:\n{done.stderr}")
    return [Mark(**values) for values in json.loads(done.stdout.splitlines()[-1])]


def rows_of(name: str, marks: Sequence[Mark], note: str) -> list[dict[str, str]]:
    fixed = {
        "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(torch.device("cpu")),
        "threads": "1", "torch": torch.__version__, "job": name, "note": note,
    }  # fmt: skip
    return [
        fixed | {
            "part": mark.part, "index": str(i), "cpu_s": f"{mark.cpu:.3f}", "wall_s": f"{mark.wall:.3f}",
            "rss_mib": f"{mark.rss / MIB:.1f}", "tensors_mib": f"{mark.tensors / MIB:.2f}", "calls": str(mark.calls),
        }
        for i, mark in enumerate(marks)
    ]  # fmt: skip


def repeated(marks: Sequence[Mark]) -> list[Mark]:
    """Segments or windows, without what comes before and after them."""
    return [mark for mark in marks if mark.part in ("segment", "window")]


def goals_of(jobs: dict[tuple[str, int], list[Mark]]) -> list[Goal]:
    goals: list[Goal] = []
    refined: dict[int, float] = {}
    for (name, count), marks in jobs.items():
        parts = repeated(marks)
        if name == "refine":
            refined[count] = sum(mark.cpu for mark in parts[1:]) / (count - 1)
            continue
        settled = parts[WARM_UP:]
        first, last = settled[:COMPARED], settled[-COMPARED:]
        for what in ("calls",) if COUNTED in name else ("cpu", "rss", "tensors"):
            ratio = median(getattr(mark, what) for mark in last) / median(getattr(mark, what) for mark in first)
            text = f"{count} segments: {what} of the last {len(last)} over the first {len(first)} after the warm-up"
            goals.append(Goal(text, ratio, most=1 + (SLACK_OF_CALLS if what == "calls" else SLACK)))
    if len(refined) > 1:
        few, many = min(refined), max(refined)
        text = f"refining: a window of {many} over one of {few}, processor time"
        goals.append(Goal(text, refined[many] / refined[few], most=1 + SLACK))
        peaks = {count: max(mark.rss for mark in marks) for (name, count), marks in jobs.items() if name == "refine"}
        goals.append(Goal(f"refining: memory of {many} windows over {few}", peaks[many] / peaks[few], most=1 + SLACK))
    return goals


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, help="of the long video (default 60)")
    parser.add_argument("--windows", type=int, nargs="*", help="refine jobs, each by its windows (default 2 4 8)")
    parser.add_argument("--only", nargs="+", choices=("long", COUNTED, "refine"), default=("long", COUNTED, "refine"))
    parser.add_argument("--append", action="store_true", help="add rows to the CSV that is there")
    parser.add_argument("--tiny", action="store_true", help="few segments and small frames; proves nothing")
    parser.add_argument("--note", default="", help="put into every row: say here what else the machine did")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of long_video.csv (default: beside this script)")
    parser.add_argument("--job", choices=("long", "refine"), help=argparse.SUPPRESS)  # a child: run it, print marks
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.segments is None:
        args.segments = 4 if args.tiny else 60
    if args.windows is None:
        args.windows = [2, 3] if args.tiny else [2, 4, 8]
    if args.segments < WARM_UP + 2:
        parser.error(f"--segments must be at least {WARM_UP + 2}")
    if any(count < 2 for count in args.windows):
        parser.error("--windows must be 2 or more each: the first window of all has no condition")
    return args


def main() -> int:
    args = parse()
    if args.job:
        print(json.dumps([mark.__dict__ for mark in run_job(args.job, args.count, args.tiny, args.counted)]))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    note = "; ".join(filter(None, ["tiny" if args.tiny else "", args.note]))
    jobs: dict[tuple[str, int], list[Mark]] = {}
    path = args.out / "long_video.csv"
    new = not (args.append and path.exists())
    wanted = [("long", args.segments), (f"long {COUNTED}", args.segments), *(("refine", n) for n in args.windows)]
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for name, count in wanted:
            if name.split(" ")[-1] not in args.only:
                continue
            jobs[name, count] = in_a_process(name, count, args.tiny)
            rows = rows_of(f"{name} {count}", jobs[name, count], note)
            writer.writerows(rows)
            file.flush()
            for row in rows:
                print("  ".join(row[key] for key in COLUMNS[5:13]), flush=True)
    print_goals(goals_of(jobs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
