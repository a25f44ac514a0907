"""Schedules against the official tables."""

from __future__ import annotations

import json

import pytest
import torch
from golden_vectors import GOLDEN
from torch import Tensor

from lcv_core import schedule

TABLES: dict[str, list[float]] = json.loads((GOLDEN / "schedules.json").read_text())


def build(name: str) -> Tensor:
    kind, *rest = name.split("_")
    if kind == "base":
        return schedule.base(int(rest[0]))
    if kind == "distill":
        return schedule.distilled(int(rest[0]))
    if kind == "refine":
        return schedule.refine(int(rest[0]), float(rest[1][1:]))
    return schedule.with_tail(schedule.base(50))


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    sigmas, timesteps = build(name), torch.tensor(TABLES[name])
    assert sigmas[-1] == 0
    assert (sigmas[:-1] * 1000 - timesteps).abs().max() <= 1e-3 * 0.2  # fp32 of 1000 resolves 6e-5
    assert (sigmas.diff() < 0).all()
