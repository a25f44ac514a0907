"""What an evaluation is told, and the rows that come out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcv_core.errors import InputError
from lcv_core.names import Handover
from lcv_core.training.evaluation.maker import Sampling
from lcv_core.training.evaluation.statistics import Estimate

Suite = Literal["t2v", "i2v", "continuation", "refine", "distilled", "rewards"]
Unit = Literal["%", "dB", "ratio", "points", "steps of 255", "score"]

HANDOVERS: tuple[Handover, ...] = ("frames", "official", "latents")
JUDGED = ("colour", "object", "background", "motion", "size", "texture")


@dataclass(frozen=True)
class Settings:
    """seed: chooses scenes, captions and noise. count: cases of t2v, i2v, distilled and rewards; continuation takes a
    tenth, refine a half of it. batch: cases made at a time.

    segments: of a continued video, the first included; over the first `kept_segments` colour, object and seams are
        counted, over all of them the drift.
    num_steps, guidance_scale, negative_prompt: of the base schedule. distilled_steps: of the distilled one.
    adapter: what the rewards suite compares the model with. rewards: by name. sheet: cases on a contact sheet.
    """

    seed: int = 0
    count: int = 200
    batch: int = 8
    segments: int = 20
    kept_segments: int = 10
    num_steps: int = 50
    guidance_scale: float = 4.0
    distilled_steps: tuple[int, ...] = (16, 8, 4)
    negative_prompt: str = ""
    adapter: Path | None = None
    rewards: tuple[str, ...] = ("prompt",)
    sheet: int = 8

    def __post_init__(self) -> None:
        for name in ("count", "batch", "num_steps", "sheet"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.kept_segments <= self.segments:
            raise InputError(f"segments must be at least {max(2, self.kept_segments)}, got {self.segments}")

    @property
    def continued(self) -> int:
        """Cases of continuation."""
        return max(1, self.count // 10)

    @property
    def refined(self) -> int:
        """Cases of refine."""
        return max(1, self.count // 2)

    @property
    def base(self) -> Sampling:
        return Sampling("base", self.num_steps, self.guidance_scale)

    @property
    def adapted(self) -> Sampling:
        return Sampling("base", self.num_steps, self.guidance_scale, self.adapter)

    @staticmethod
    def distilled(steps: int) -> Sampling:
        return Sampling("distilled", steps, 1.0)


QUICK = {"count": 8, "segments": 4, "kept_segments": 3, "sheet": 4}
"""Settings of a run that shows in minutes that everything works; its numbers mean little."""


@dataclass(frozen=True)
class Target:
    """What a metric has to reach: at least, or at most. p_value: and how improbable the difference has to be."""

    limit: float
    at_least: bool = True
    p_value: float | None = None

    def met(self, value: float, p_value: float | None) -> bool:
        reached = value >= self.limit if self.at_least else value <= self.limit
        return reached and (self.p_value is None or (p_value is not None and p_value < self.p_value))

    def __str__(self) -> str:
        p = "" if self.p_value is None else f", p < {self.p_value:g}"
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{p}"


@dataclass(frozen=True)
class Row:
    """One number. variant: of the suite (a schedule, a hand-over, ...). group: the part of the cases it is of: "all",
    "motion: circles", "segment 7". low, high: its 95% interval. count: how many observations. p_value: of a paired
    difference. seconds: making and measuring the clips behind it took."""

    suite: str
    variant: str
    metric: str
    group: str
    unit: Unit
    value: float
    low: float
    high: float
    count: int
    seconds: float
    target: Target | None = None
    p_value: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None or math.isnan(self.value) else self.target.met(self.value, self.p_value)


def row(
    suite: str, variant: str, metric: str, unit: Unit, estimate: Estimate, *, seconds: float, group: str = "all",
    target: Target | None = None, p_value: float | None = None,
) -> Row:  # fmt: skip
    """A row from an estimate; shares become percent, and differences of shares points."""
    factor = 100.0 if unit in ("%", "points") else 1.0
    return Row(
        suite, variant, metric, group, unit, estimate.value * factor, estimate.low * factor, estimate.high * factor,
        estimate.count, seconds, target, p_value,
    )  # fmt: skip
