"""Why a choice is as it is: what each setting that is not the first of its kind avoids."""

from __future__ import annotations

from dataclasses import replace

from lcv_core.planning.advice import size_text
from lcv_core.planning.choose import MARGIN, Choice, Planner, StageNeed
from lcv_core.planning.settings import Settings, words


def reasons(planner: Planner, choice: Choice) -> list[str]:
    """A sentence for each setting that the plan has changed; one in all where it has changed none."""
    first = Settings(cfg_mode=choice.settings.cfg_mode)
    lines = []
    for name, value in choice.settings.changed_from(first).items():
        if name in planner.fixed:
            lines.append(f"{words(name, value)}: as asked for")
            continue
        if name == "resident":
            lines.append(f"{words(name, value)}: {_resident(planner, choice)}")
            continue
        without = replace(choice.settings, **{name: getattr(first, name)})
        if "resident" not in planner.fixed:  # what stays on the device goes by this setting
            without = replace(without, resident=0)
        without = planner.filled(planner.choice(without))
        lines.append(f"{words(name, value)}: {_instead(planner, without, words(name, getattr(first, name)))}")
    return lines or ["everything fits as it is: plain weights, nothing tiled or streamed"]


def _resident(planner: Planner, choice: Choice) -> str:
    settings, depth = choice.settings, planner.models.dit.depth
    block = planner.block(settings)
    count = settings.resident // block
    saved = planner.choice(replace(settings, resident=0)).seconds - choice.seconds
    gain = f"which saves {saved:.0f} s" if saved >= 1 else "though computing takes longer than either"
    return (
        f"there is room for {count} of {depth}, so that a forward moves {size_text((depth - count) * block)} instead of"
        f" {size_text(depth * block)}, {gain}"
    )


def _instead(planner: Planner, without: Choice, what: str) -> str:
    short = [need for need in without.stages if not planner.fits(need)]
    if not short:
        return f"with {what} it would be slower"
    worst = max(short, key=lambda need: max(need.vram - planner.machine.free, need.ram - planner.machine.ram))
    return f"with {what} {worst.name} needs {_need(planner, worst)}"


def _need(planner: Planner, need: StageNeed) -> str:
    machine = planner.machine
    if need.ram > machine.ram:
        return f"{size_text(need.ram)} of system memory, of which {size_text(machine.ram)} are free"
    # near the limit it is the margin that does not fit, which has to be said
    spare = f" and {MARGIN:.0%} to spare" if need.vram <= machine.free else ""
    return f"{size_text(need.vram)}{spare}, of which {size_text(machine.free)} are free"
