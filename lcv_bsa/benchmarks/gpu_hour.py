"""What a first GPU hour must answer, in stages of under nine minutes (see README.md).

Each stage runs in a process of its own that notes every item as it ends. A stage that is run again goes on where it
stopped; an item at which the process died or hung is noted as failed and passed over.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rows import COLUMNS, line, say
from targets import targets

STAGES = {
    1: "correctness of every Triton backend on this GPU",
    2: "ceilings; forward: backends, order of indices, TMA against pointers, warps and stages",
    3: "backward: two kernels against the fused one, warps and stages",
    4: "selection: block means, scores, top-k, inverse",
    5: "peers side by side, and the targets",
    6: "tuning, and its table",
}
# Seconds after which an item counts as hung: a kernel that hangs never ends by itself. Tuning compiles for minutes.
ITEM_LIMIT = 150.0
_LONG_ITEMS = {"tune": 470.0}
_LOST = 3  # exit status of a child whose GPU context is lost


class Store:
    """Notes of one stage, one JSON object a line; the last note of an item counts."""

    def __init__(self, folder: Path, stage: int) -> None:
        self.path = folder / f"stage_{stage}.jsonl"

    def note(self, item: str, state: str, **more: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"item": item, "state": state, "time": time.time(), **more}) + "\n")

    def notes(self) -> dict[str, dict]:
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {note["item"]: note for note in map(json.loads, lines)}

    def unfinished(self) -> dict | None:
        return next((note for note in self.notes().values() if note["state"] == "started"), None)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for notes, rows.csv and summary.json; needed but for --list")
    parser.add_argument("--stage", type=int, choices=STAGES, action="append", help="repeatable (default: all)")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds for each stage (default 500)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="folder to import a peer from")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: shows that everything runs")
    parser.add_argument("--list", action="store_true", help="say what the stages are and stop")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # this process runs the items of one stage
    args = parser.parse_args(arguments)
    if args.out is None and not args.list:
        parser.error("--out FOLDER is needed")
    return args


def run_stage(args: argparse.Namespace, stage: int, arguments: Sequence[str]) -> None:
    """Children until the items are done or the time is up."""
    store, until = Store(args.out, stage), time.time() + args.budget
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--stage", str(stage), "--until", str(until)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if args.tiny else {})
    while True:
        child = subprocess.Popen(command, env=environment)
        status = _watch(child, store, until)
        lost = store.unfinished()
        if lost is not None:
            store.note(lost["item"], "failed", why=f"the process ended here, exit status {status}")
        if status == 0 or time.time() >= until:
            return
        if lost is None and status != _LOST:
            say(f"stage {stage}: could not start, exit status {status}")
            return


def _watch(child: subprocess.Popen[bytes], store: Store, until: float) -> int:
    while True:
        try:
            return child.wait(1)
        except subprocess.TimeoutExpired:
            item = store.unfinished()
            hangs = item is not None and time.time() - item["time"] > _LONG_ITEMS.get(item["item"], ITEM_LIMIT)
            if hangs or time.time() > until + 20:
                child.kill()


def run_items(args: argparse.Namespace) -> int:
    """The items of one stage that are not yet noted as done or failed, while there is time."""
    import torch
    from bench import Bench
    from report import Report
    from run import paths_of
    from stages import STAGES as ITEMS

    if not args.tiny and not torch.cuda.is_available():
        say("this torch sees no CUDA GPU; --tiny shows on a CPU that everything runs")
        return 2
    stage = args.stage[-1]
    store, device = Store(args.out, stage), torch.device("cpu" if args.tiny else "cuda")
    bench = Bench(device, args.tiny, paths_of(args.peer), args.out, Report(device, None))
    done = {item for item, note in store.notes().items() if note["state"] in ("done", "failed")}
    longest = 0.0 if args.tiny else 15.0
    for item, run in ITEMS[stage](bench):
        if item in done:
            continue
        left = args.until - time.time()
        if left < longest:
            store.note(item, "skipped", why=f"{left:.0f} s left, it may take {longest:.0f}")
            continue
        begin, before = time.time(), len(bench.report.rows)
        store.note(item, "started")
        state, more = "done", {}
        try:
            run()
        except Exception as error:  # an item may fail in any way; the others still run
            state, more = "failed", {"why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
            say(f"{item}: {more['why']}")
        store.note(item, state, rows=bench.report.rows[before:], **more)
        longest = max(longest, time.time() - begin)
        if not _alive(device.type):
            return _LOST
    return 0


def _alive(device: str) -> bool:
    """False once a kernel has broken the GPU context: nothing else would work in this process."""
    import torch

    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def summary(args: argparse.Namespace, stages: Sequence[int]) -> list[str]:
    """Writes rows.csv and summary.json from all notes under --out; the short table."""
    rows: list[dict[str, str]] = []
    lines: list[str] = []
    for stage in STAGES:
        notes = Store(args.out, stage).notes()
        found = [
            {"stage": str(stage), "item": item} | row for item, note in notes.items() for row in note.get("rows", [])
        ]
        rows += found
        if stage not in stages:
            continue
        states = [note["state"] for note in notes.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "skipped"))
        lines += ["", f"stage {stage}, {STAGES[stage]}: {counts}"]
        lines += [line(row) for row in found]
        lines += [f"{note['state']}: {item}: {note['why']}" for item, note in notes.items() if "why" in note]
        if stage == 5:
            lines += ["targets:", *targets(found, *(("tiny", "tiny_partial") if args.tiny else ("720p", "480p")))]
    with (args.out / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["stage", "item", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (args.out / "summary.json").write_text(json.dumps({"rows": rows, "table": lines}, indent=1), encoding="utf-8")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.list:
        for stage, what in STAGES.items():
            say(f"{stage}  {what}")
        return 0
    if args.until is not None:
        return run_items(args)
    args.out.mkdir(parents=True, exist_ok=True)
    stages = args.stage or list(STAGES)
    for stage in stages:
        say(f"stage {stage}: {STAGES[stage]}")
        run_stage(args, stage, arguments)
    for text in summary(args, stages):
        say(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
