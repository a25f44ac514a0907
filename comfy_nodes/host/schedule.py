"""The official schedules at the shift that a MODEL has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcv_core import schedule as schedules
from lcv_core.errors import InputError
from lcv_core.pipelines.base import REFINE_DEFAULT_STEPS, SCHEDULE_DEFAULTS

from .native import require_longcat

SCHEDULES = ("base", "base with tail", "distilled", "refine")


def flow_shift(model: Any) -> float:
    """The shift of a MODEL: its checkpoint's, or what a ModelSampling node set."""
    return float(getattr(model.get_model_object("model_sampling"), "shift", schedules.FLOW_SHIFT))


def sigmas_of(model: Any, name: str, num_steps: int | None = None, t_thresh: float = 0.5) -> Tensor:
    """Sigmas by the schedule's name; num_steps None takes its own number (refine counts the base schedule's steps)."""
    require_longcat(model)
    shift = flow_shift(model)
    if name == "refine":
        return schedules.refine(num_steps or REFINE_DEFAULT_STEPS, t_thresh, flow_shift=shift)
    if name == "distilled":
        return schedules.distilled(num_steps or SCHEDULE_DEFAULTS["distilled"][0], flow_shift=shift)
    if name not in SCHEDULES:
        raise InputError(f'unknown schedule "{name}"; there are: {", ".join(SCHEDULES)}')
    base = schedules.base(num_steps or SCHEDULE_DEFAULTS["base"][0], flow_shift=shift)
    return schedules.with_tail(base) if name == "base with tail" else base
