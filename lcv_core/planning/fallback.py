"""What a stage goes on with when it has run out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lcv_core.planning.advice import size_text
from lcv_core.planning.choose import AS_STORED, TILES, Choice, Planner, StageNeed
from lcv_core.planning.settings import Settings, sentence

# By stage, the changes in the order in which they are tried; the weights' form and the windows are what the result is
# made of and stay. All but the last of sampling change no numbers, or only their rounding. Blocks that stay on the
# device go first: they are there for speed alone.
_RESIDENT = ("resident", 0)
_VAE = (_RESIDENT, *(("tile", tile) for tile in TILES[1:]), ("stream", "ram"), ("stream", "disk"))
MOVES: dict[str, tuple[tuple[str, Any], ...]] = {
    "text encode": (("text_device", "cpu"),),
    "sampling": (
        _RESIDENT, ("cfg_mode", "sequential"), ("cache_place", "cpu"), ("stream", "ram"), ("stream", "disk"),
        ("cache_storage", "fp8"),
    ),
    "VAE encode": _VAE,
    "VAE decode": _VAE,
}  # fmt: skip
_ORDER = {
    "text_device": ("same", "cpu"), "cfg_mode": ("batched", "sequential"), "cache_place": ("device", "cpu"),
    "stream": ("off", "ram", "disk"), "cache_storage": ("model", "fp8"),
}  # fmt: skip


@dataclass(frozen=True)
class Move:
    """A change of settings after which a stage needs less of what ran out."""

    settings: Settings
    changes: dict[str, Any]

    @property
    def words(self) -> str:
        return sentence(self.changes)


def moves(planner: Planner, settings: Settings, stage: str, *, host: bool = False, disk: bool = True) -> Iterator[Move]:
    """The changes that are left for a stage, by the end of its name in the plan; each is one step. All that are left
    where the plan has no such stage.

    host: it was system memory that ran out, not the device's. disk: blocks can be read from disk for each pass.
    """
    now = stage_need(planner.choice(settings), stage)
    on_cpu = planner.machine.device == "cpu"
    disk = disk and settings.weights in AS_STORED
    for name, value in MOVES[stage]:
        if name in planner.fixed or not _onward(name, getattr(settings, name), value):
            continue
        if name == "stream" and (on_cpu or (value == "disk" and not disk)):
            continue
        if name == "resident" and host:
            continue
        for changes in _ways(planner, settings, name, value, disk=disk):
            changed = replace(settings, **changes)
            then = stage_need(planner.choice(changed), stage)
            if now is None or then is None:
                better = True
            elif host or on_cpu:
                better = then.ram < now.ram
            else:
                better = then.vram < now.vram and then.ram <= max(planner.machine.ram, now.ram)
            if better:
                yield Move(changed, changes)
                break


def _ways(planner: Planner, settings: Settings, name: str, value: Any, *, disk: bool) -> list[dict[str, Any]]:
    """How a setting can change. Blocks that leave the device wait with the others, or where system memory has no room
    for them all of them on disk."""
    ways: list[dict[str, Any]] = [{name: value}]
    if name == "resident" and settings.stream == "ram" and disk and "stream" not in planner.fixed:
        ways.append({"resident": value, "stream": "disk"})
    return ways


def remaining(planner: Planner, choice: Choice) -> dict[str, list[str]]:
    """For each stage of a choice, in words, what it would go on with: one after the other."""
    out: dict[str, list[str]] = {}
    for need in choice.stages:
        name = need.name.removeprefix("refine ")
        settings, steps = choice.settings, []
        while (move := next(moves(planner, settings, name), None)) is not None:
            steps.append(move.words)
            settings = move.settings
        out[need.name] = steps
    return out


def describe(need: StageNeed) -> str:
    """ "sampling 5.8 GB" for a sentence."""
    ram = f" and {size_text(need.ram)} of system memory" if need.ram else ""
    return f"{need.name} {size_text(need.vram)}{ram}"


def stage_need(choice: Choice, stage: str) -> StageNeed | None:
    """Of a stage by the end of its name."""
    return next((need for need in choice.stages if need.name.endswith(stage)), None)


def _onward(name: str, now: Any, value: Any) -> bool:
    if name == "tile":
        return now == 0 or value < now
    if name == "resident":
        return value < now
    order = _ORDER[name]
    return order.index(value) > order.index(now)
