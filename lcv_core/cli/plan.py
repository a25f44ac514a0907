"""`lcv plan`: what a job needs on a machine, what is chosen for it, and what it would go on with."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lcv_core.cli.fit import Known, make_planner
from lcv_core.cli.job import Job
from lcv_core.cli.load import open_for, pick_device, pick_dtype
from lcv_core.cli.progress import clock
from lcv_core.errors import InputError
from lcv_core.planning.advice import size_text
from lcv_core.planning.choose import MARGIN, RESERVE, Choice, Planner
from lcv_core.planning.fallback import remaining
from lcv_core.planning.machine import CARDS, Machine, machine_named, this_machine
from lcv_core.planning.reasons import reasons
from lcv_core.planning.settings import Settings, sentence

_SHOWN = 4  # other choices


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `lcv plan` was asked. model: whether one is named; else it is LongCat-Video as released. free: fields of the
    job that may be chosen. device: of `--device`, or a card. vram, ram: GB."""

    job: Job
    model: bool
    free: frozenset[str]
    device: str
    vram: float | None
    ram: float | None


def planner_for(asked: Asked) -> Planner:
    """InputError for a device or a model that there is not."""
    machine = _machine(asked).limited(asked.vram, asked.ram)
    checkpoint = open_for(asked.job) if asked.model else None
    known = Known() if checkpoint is None else Known.of(checkpoint)
    return make_planner(
        asked.job, known, machine, dtype=_dtype(asked, machine, checkpoint), free=asked.free,
        sparse="triton" if machine.device == "gpu" else "gather",
    )  # fmt: skip


def _machine(asked: Asked) -> Machine:
    name = asked.device
    if name in ("auto", "cpu") or name.split(":")[0] == "cuda":
        if name == "auto" and asked.vram is not None and not torch.cuda.is_available():
            return machine_named(_like(asked.vram))
        return this_machine(pick_device(name), measured=True)
    try:
        return machine_named(name)
    except InputError as unknown:
        try:
            device = pick_device(name)
        except InputError:
            raise unknown from None
        return this_machine(device, measured=True)


def _like(vram: float) -> str:
    """A card with about so many GB, for its speed."""
    return min(CARDS, key=lambda card: abs(machine_named(card).free / 1e9 - vram))


def _dtype(asked: Asked, machine: Machine, checkpoint: Any) -> torch.dtype:
    device = torch.device("cpu" if machine.device == "cpu" else "cuda")
    if checkpoint is not None:
        return pick_dtype(asked.job.dtype, device, checkpoint)
    return {"fp16": torch.float16, "fp32": torch.float32}.get(asked.job.dtype, torch.bfloat16)


def to_json(planner: Planner) -> str:
    """Bytes and seconds; `steps` are all choices that fit, best first, the first of them the one that is taken."""
    steps = planner.steps()
    machine = planner.machine
    data = {
        "machine": {"name": machine.name, "device": machine.device, "free": machine.free, "ram": machine.ram},
        "job": {name: value for name, value in dataclasses.asdict(planner.job).items() if name != "bsa"},
        "fits": bool(steps),
        "why": reasons(planner, steps[0]) if steps else [planner.refusal()],
        "then": remaining(planner, steps[0]) if steps else {},
        "steps": [_as_data(choice) for choice in steps],
    }
    return json.dumps(data, indent=1, default=str)


def _as_data(choice: Choice) -> dict[str, Any]:
    peaks = {"vram": choice.vram, "ram": choice.ram, "seconds": round(choice.seconds, 1)}
    return dataclasses.asdict(choice) | peaks


def print_plan(planner: Planner, console: Console) -> None:
    """InputError, which says what is missing, where nothing fits."""
    machine, job = planner.machine, planner.job
    choice = planner.best()
    console.print(f"{_what(planner)} on {machine.name}: {_free(machine)}", highlight=False)
    console.print(_stages(choice, machine))
    console.print(f"chosen: {_settings(choice)}", highlight=False)
    for line in reasons(planner, choice):
        console.print(f"  {line}", highlight=False)
    for stage, steps in remaining(planner, choice).items():
        if steps:
            console.print(f"should memory run out in {stage}: {', then '.join(steps)}", highlight=False)
    others = [other for other in planner.steps()[1 : 1 + _SHOWN] if other != choice]
    for other in others:
        console.print(
            f"or: {_settings(other)}: {_peaks(other, machine)}, {clock(other.seconds)}", highlight=False, soft_wrap=True
        )
    margin = f"{MARGIN:.0%} are kept free for what the allocator loses"
    if choice.settings.resident and "resident" not in planner.fixed:
        margin += f", {RESERVE:.0%} by blocks that are there for speed alone"
    console.print(f"memory is counted and {margin}; times are estimates ({job.compute_dtype})", highlight=False)


def _what(planner: Planner) -> str:
    job = planner.job
    if job.refine_only:
        assert job.refine is not None
        windows = planner.work.windows
        return f"a refinement to {job.refine.width}x{job.refine.height}, {windows} window{'s' if windows > 1 else ''}"
    given = f", {job.num_cond_frames} of them given" if job.num_cond_frames else ""
    return f"{job.num_frames} frames of {job.width}x{job.height}{given}, {planner.work.steps} steps"


def _free(machine: Machine) -> str:
    ram = f"{size_text(machine.ram)} of system memory"
    return f"{ram} free" if machine.device == "cpu" else f"{size_text(machine.free)} of its memory and {ram} free"


def _settings(choice: Choice) -> str:
    return sentence(choice.settings.changed_from(Settings())) or "plain weights, nothing tiled or streamed"


def _peaks(choice: Choice, machine: Machine) -> str:
    if machine.device == "cpu":
        return size_text(choice.ram)
    return f"{size_text(choice.vram)} and {size_text(choice.ram)} of system memory"


def _stages(choice: Choice, machine: Machine) -> Table:
    gpu = machine.device == "gpu"
    table = Table("stage", *(["on the device"] if gpu else []), "system memory", "time, estimated")
    for need in choice.stages:
        sizes = ([size_text(need.vram)] if gpu else []) + [size_text(need.ram) if need.ram else ""]
        table.add_row(need.name, *sizes, clock(need.seconds))
    sizes = ([size_text(choice.vram)] if gpu else []) + [size_text(choice.ram) if choice.ram else ""]
    table.add_row("peak, total time", *sizes, clock(choice.seconds), style="bold")
    return table
