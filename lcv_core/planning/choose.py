"""Choosing settings for a machine: the best that fits, and what to go on with where memory runs out all the same.

The order of choices, best first:

1. Whole windows before shorter ones: a refinement sees as much at once as in training, if that can be had.
2. Within these the weights with the smallest error: plain (none), q8_0, int8, fp8, q5_k, q4_k. Blocks that are
   streamed compute the very same numbers, so plain weights that are streamed come before eight bits that stay. They are
   hardly slower either: a step at 480x832x93 takes a 4070 about a minute, in which the 27 GB of blocks pass its link
   50 times over.
3. A KV cache in the model's dtype before one in fp8, whose values are off by 2.6 %.
4. Of equal numbers blocks and cache on the device, then in system memory, then on disk; but what takes more than
   `ALIKE` times the time of the fastest of them comes last.
5. But a choice of more than `PATIENCE` times the time of the fastest with eight bits comes after the eight bits: short
   clips are computed faster than their blocks can be brought.

Tiles of the VAE and the place of the text encoder change no weights and are decided by themselves: the largest tile
that fits, the device before the CPU. The schedule, sizes and counts are the user's and stay.

A choice fits where what every stage needs, and `MARGIN` of it for what the allocator loses, is free.

Where blocks are streamed, as many whole ones as there is room for beside that stay on the device: fewer bytes pass the
link in every forward. They leave `RESERVE` of what each stage needs free, which is twice `MARGIN`. A job that has room
is not to run out of it for them: what is free shrinks when another program opens a window, activations are counted and
not yet measured on a GPU, and giving blocks up costs a step, while keeping them saves little or nothing where computing
takes longest. From disk they are read before the first step; they stay only where that is won back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from lcv_core.errors import InputError
from lcv_core.names import Weights
from lcv_core.planning.advice import size_text
from lcv_core.planning.job import Job
from lcv_core.planning.machine import Machine
from lcv_core.planning.plan import STREAM_SLOTS, Models, Plan, Stage, plan_with
from lcv_core.planning.seconds import Work, stage_seconds
from lcv_core.planning.settings import Settings, sentence

QUALITY: tuple[Weights, ...] = ("plain", "q8_0", "int8", "fp8", "q5_k", "q4_k")
AS_STORED: tuple[Weights, ...] = ("plain", "stored")  # what can be read from disk anew for every pass
TILES = (0, 512, 256, 128)  # pixels; 384 would need more than 512 does, for its overlaps
PATIENCE = 2.0
ALIKE = 1.25
MARGIN = 0.05
RESERVE = 0.10
_SHORTEST_WINDOW = 29  # frames
_WINDOW_STEP = 16

Fixed = Mapping[str, Any]


@dataclass(frozen=True)
class StageNeed:
    """What one stage needs. vram: bytes of the device; ram: of system memory, which on a CPU is the same one."""

    name: str
    vram: int
    ram: int
    seconds: float


@dataclass(frozen=True)
class Choice:
    """A way to do a job: expected peaks in bytes, without margins, and estimated seconds of the whole."""

    settings: Settings
    stages: tuple[StageNeed, ...]

    @property
    def vram(self) -> int:
        return max(stage.vram for stage in self.stages)

    @property
    def ram(self) -> int:
        return max(stage.ram for stage in self.stages)

    @property
    def seconds(self) -> float:
        return math.fsum(stage.seconds for stage in self.stages)

    def stage(self, name: str) -> StageNeed:
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class Planner:
    """A job on a machine. fixed: settings that the user has chosen, by name; they are never changed. forms: of the
    weights, those to choose from."""

    job: Job
    models: Models
    machine: Machine
    work: Work = field(default_factory=Work)
    fixed: Fixed = field(default_factory=dict)
    forms: tuple[Weights, ...] = QUALITY

    def plan(self, settings: Settings) -> Plan:
        job = settings.applied(self.job)
        same = job.weight_dtype == self.job.weight_dtype
        return plan_with(self.models if same else replace(self.models, dit_weights=None), job)

    def choice(self, settings: Settings) -> Choice:
        """What the job needs with these settings."""
        plan = self.plan(settings)
        needs = (self._need(stage, plan) for stage in plan.stages)
        return Choice(settings, tuple(needs))

    def _need(self, stage: Stage, plan: Plan) -> StageNeed:
        seconds = stage_seconds(stage, plan.models, plan.job, self.machine, self.work)
        ram = stage.total + stage.ram if self.machine.device == "cpu" else stage.ram
        return StageNeed(stage.name, stage.total, ram, seconds)

    def fits(self, need: StageNeed) -> bool:
        """Whether a stage fits with its margin."""
        return self._has_room(need) and need.ram <= self.machine.ram

    def _has_room(self, need: StageNeed) -> bool:
        """On the device, that is."""
        return need.vram * (1 + MARGIN) <= self.machine.free

    def steps(self) -> list[Choice]:
        """All choices that fit, best first; see the module. Empty where none does."""
        for window in self._windows():
            fitting = [choice for choice in self._choices(window) if all(map(self.fits, choice.stages))]
            if fitting:
                return _by_quality(fitting)
        return []

    def best(self) -> Choice:
        """The first of `steps`. InputError, with what is missing, where nothing fits."""
        steps = self.steps()
        if not steps:
            raise InputError(self.refusal())
        return steps[0]

    def refusal(self) -> str:
        """Why nothing fits: the stage that is nearest to fitting, in its smallest form."""
        choices = (choice for window in self._windows() for choice in self._choices(window))
        smallest = min(choices, key=lambda choice: self._missing(choice)[1])
        stage, missing = self._missing(smallest)
        where = "system memory" if self.machine.device == "cpu" or stage.vram <= self.machine.free else "its memory"
        return (
            f"this job does not fit on {self.machine.name}: even with {sentence(_all(smallest.settings))} {stage.name}"
            f" misses {size_text(missing)} of {where} ({size_text(self.machine.free)} free on the device,"
            f" {size_text(self.machine.ram)} of system memory); ask for fewer --frames or a smaller --height"
            " and --width, or try it all the same with --memory given"
        )

    def _missing(self, choice: Choice) -> tuple[StageNeed, int]:
        def short(need: StageNeed) -> int:
            return max(math.ceil(need.vram * (1 + MARGIN)) - self.machine.free, need.ram - self.machine.ram)

        worst = max(choice.stages, key=short)
        return worst, short(worst)

    def _windows(self) -> Iterator[int | None]:
        """Frames refined at once: as asked for, then ever fewer."""
        if "window" in self.fixed:
            yield self.fixed["window"]
            return
        yield None
        refine = self.job.refine
        if refine is None:
            return
        whole = min(refine.window or self.job.num_frames, self.job.num_frames)
        yield from range(whole - _WINDOW_STEP, max(_SHORTEST_WINDOW, 2 * refine.overlap) - 1, -_WINDOW_STEP)

    def _choices(self, window: int | None) -> Iterator[Choice]:
        """Every combination of what concerns the transformer, each with the tile and text device that go with it."""
        options = (self._weights(), self._streams(), self._options("cache_storage"), self._options("cache_place"))
        for weights, stream, storage, place in product(*options):
            if stream == "disk" and weights not in AS_STORED:
                continue
            settings = Settings(
                weights=weights, stream=stream, cache_storage=storage, cache_place=place, window=window,
                cfg_mode=self.fixed.get("cfg_mode", "sequential"), resident=self.fixed.get("resident", 0),
            )  # fmt: skip
            yield self.filled(self._completed(settings))

    def _completed(self, settings: Settings) -> Choice:
        """With the text on the device and the largest tile, where these fit; else what needs least."""
        tiles = [self.fixed["tile"]] if "tile" in self.fixed else TILES
        settings = replace(settings, text_device="same")
        if not self._has_room(self.choice(settings).stage("text encode")) and self.machine.device == "gpu":
            settings = replace(settings, text_device=self.fixed.get("text_device", "cpu"))
        tried = [self.choice(replace(settings, tile=tile)) for tile in tiles]
        fitting = (c for c in tried if all(self._has_room(need) for need in c.stages if "VAE" in need.name))
        return next(fitting, None) or min(tried, key=_vae_need)

    def filled(self, choice: Choice) -> Choice:
        """With the whole blocks on the device that there is room for, where that takes no longer."""
        settings, count = choice.settings, self._spare_blocks(choice)
        if "resident" in self.fixed or settings.stream == "off" or self.machine.device == "cpu" or count < 1:
            return choice
        filled = self.choice(replace(settings, resident=count * self.block(settings)))
        return filled if filled.seconds <= choice.seconds else choice

    def _spare_blocks(self, choice: Choice) -> int:
        """How many blocks there is room for in every stage in which the transformer is on the device."""
        names = ("sampling", "VAE encode", "VAE decode") if self.job.together else ("sampling",)
        peak = max(need.vram for need in choice.stages if need.name.endswith(names))
        room = int(self.machine.free / (1 + RESERVE)) - peak
        return min(room // self.block(choice.settings), self.models.dit.depth - STREAM_SLOTS)

    def block(self, settings: Settings) -> int:
        """Bytes of one of the transformer's blocks."""
        plan = self.plan(settings)
        return plan.models.block(plan.job)

    def _weights(self) -> Iterable[Weights]:
        if "weights" in self.fixed:
            return [self.fixed["weights"]]
        return self.forms

    def _streams(self) -> Iterable[Any]:
        if "stream" in self.fixed:
            return [self.fixed["stream"]]
        return ("off",) if self.machine.device == "cpu" else ("off", "ram", "disk")

    def _options(self, name: str) -> Iterable[Any]:
        """How a KV cache may be kept, where there is one."""
        if name in self.fixed:
            return [self.fixed[name]]
        if not (self.job.kv_cache and self.job.num_cond_frames) or self.job.refine_only:
            return [getattr(Settings(), name)]
        if name == "cache_place":
            return ("device",) if self.machine.device == "cpu" else ("device", "cpu")
        return ("model", "fp8")


def _vae_need(choice: Choice) -> int:
    return max((need.vram for need in choice.stages if "VAE" in need.name), default=0)


def _all(settings: Settings) -> dict[str, Any]:
    return settings.changed_from(Settings()) or {"weights": settings.weights}


def _by_quality(choices: list[Choice]) -> list[Choice]:
    large = [c.seconds for c in choices if c.settings.weights not in ("q5_k", "q4_k")]
    patient = PATIENCE * min(large, default=math.inf)
    quickest: dict[Any, float] = {}
    for choice in choices:
        quickest[_numbers(choice)] = min(quickest.get(_numbers(choice), math.inf), choice.seconds)

    def key(choice: Choice) -> tuple[float, ...]:
        s = choice.settings
        quality = QUALITY.index(s.weights) if s.weights in QUALITY else 1
        place = ("off", "ram", "disk").index(s.stream) + (s.cache_place == "cpu")
        slow = choice.seconds > ALIKE * quickest[_numbers(choice)]
        return choice.seconds > patient, quality, s.cache_storage == "fp8", slow, place, choice.seconds

    return sorted(choices, key=key)


def _numbers(choice: Choice) -> tuple[str, str]:
    """What decides the numbers that a choice computes."""
    return choice.settings.weights, choice.settings.cache_storage
