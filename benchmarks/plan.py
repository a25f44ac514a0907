"""Writes plan.csv: what `lcv plan` chooses for jobs of the released model on cards of several sizes.

python benchmarks/plan.py. Nothing is measured: memory is what tests/test_planning.py and tests/test_plan_bytes.py hold
against the tensors that are alive, time is the estimate of lcv_core/planning/seconds.py.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from lcv_core.cli.fit import Known, make_planner
from lcv_core.cli.job import Job
from lcv_core.cli.options import AUTO
from lcv_core.planning.choose import Choice
from lcv_core.planning.machine import Machine, machine_named
from lcv_core.planning.settings import Settings, sentence

TARGET = Path(__file__).with_name("plan.csv")
COLUMNS: tuple[str, ...] = (
    "case", "device", "vram_gb", "ram_gb", "fits", "settings", "peak_vram_gb", "peak_ram_gb", "seconds", "stage",
    "stage_vram_gb", "goal",
)  # fmt: skip
CASES = {
    "t2v 480p 93 frames, 50 steps": {"task": "t2v"},
    "t2v 480p 93 frames, 16 steps": {"task": "t2v", "schedule": "distilled"},
    "continue 480p 93 frames, 56 steps": {"task": "continue"},
    "refine to 720p 189 frames, 5 steps": {"task": "refine"},
}
# (card whose speed it is, GB of the card, GB of system memory)
MACHINES = (
    ("rtx4070", 8, 32), ("rtx4070", 12, 32), ("rtx4080", 16, 32), ("rtx4090", 24, 64), ("rtx5090", 32, 64),
    ("h100", 80, 128),
)  # fmt: skip
GOALS = {("t2v 480p 93 frames, 50 steps", 12): 12, ("refine to 720p 189 frames, 5 steps", 16): 16}


def rows() -> list[dict[str, object]]:
    return [row(case, name, vram, ram) for case in CASES for name, vram, ram in MACHINES]


def row(case: str, name: str, vram: int, ram: int) -> dict[str, object]:
    job = Job(model="", prompts=[""], seed=0, **CASES[case])  # type: ignore[arg-type]
    machine = machine_named(name).limited(vram, ram)
    planner = make_planner(job, Known(), machine, dtype=torch.bfloat16, free=frozenset(AUTO), sparse="triton")
    steps = planner.steps()
    goal = GOALS.get((case, vram))
    start = {"case": case, "device": name, "vram_gb": vram, "ram_gb": ram, "fits": bool(steps)}
    return start | (_of(steps[0], machine) if steps else {}) | {"goal": "" if goal is None else f"<= {goal} GB"}


def _of(choice: Choice, machine: Machine) -> dict[str, object]:
    largest = max(choice.stages, key=lambda need: need.vram)
    return {
        "settings": sentence(choice.settings.changed_from(Settings())) or "plain, nothing tiled or streamed",
        "peak_vram_gb": round(choice.vram / 1e9, 2), "peak_ram_gb": round(choice.ram / 1e9, 2),
        "seconds": round(choice.seconds), "stage": largest.name, "stage_vram_gb": round(largest.vram / 1e9, 2),
    }  # fmt: skip


def main() -> None:
    with TARGET.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows())


if __name__ == "__main__":
    main()
