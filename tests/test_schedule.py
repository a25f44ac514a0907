"""Noise schedules by their definitions, for every number of steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lcv_core import schedule
from lcv_core.errors import InputError

steps = st.integers(1, 200)
shifts = st.floats(0.5, 20.0)


def is_schedule(sigmas: Tensor) -> bool:
    return (
        sigmas.dtype == torch.float32
        and bool((sigmas.diff() < 0).all())
        and sigmas[-1].item() == 0.0
        and 0.0 < sigmas[0].item() <= 1.0
    )


def shifted(s: float, shift: float) -> float:
    return shift * s / (1 + (shift - 1) * s)


@given(steps, shifts)
def test_base(n: int, shift: float) -> None:
    sigmas = schedule.base(n, flow_shift=shift)
    assert is_schedule(sigmas) and len(sigmas) == n + 1
    assert sigmas[0] >= 1 - 1e-6
    expected = [shifted(1.0 - 0.999 * i / max(n - 1, 1), shift) for i in range(n)]
    assert (sigmas[:-1].double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-6


@given(st.integers(1, 50), shifts)
def test_distilled(n: int, shift: float) -> None:
    sigmas = schedule.distilled(n, flow_shift=shift)
    assert is_schedule(sigmas) and len(sigmas) == n + 1
    assert sigmas[0] >= 1 - 1e-6
    expected = [shifted((50 - int(i * 50 / n + 1e-9)) / 50, shift) for i in range(n)]
    assert (sigmas[:-1].double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-6


def test_the_released_shift_starts_at_pure_noise() -> None:
    assert all(schedule.base(n)[0] == 1.0 for n in range(1, 201))
    assert all(schedule.distilled(n)[0] == 1.0 for n in range(1, 51))


def test_the_distilled_16_levels() -> None:
    levels = [1, .94, .88, .82, .76, .70, .64, .58, .50, .44, .38, .32, .26, .20, .14, .08]  # fmt: skip
    assert torch.allclose(schedule.distilled(16, flow_shift=1.0)[:-1], torch.tensor(levels), atol=1e-6)


@given(steps, st.floats(0.05, 1.0), st.integers(1, 30))
def test_tail(n: int, start: float, tail: int) -> None:
    base = schedule.base(n)
    sigmas = schedule.with_tail(base, start=start, num_steps=tail)
    kept = int((base > start).sum())
    assert is_schedule(sigmas) and len(sigmas) == kept + tail + 1
    assert torch.equal(sigmas[:kept], base[:kept])
    equal = torch.tensor([start * (1 - i / tail) for i in range(tail + 1)])
    assert (sigmas[kept:] - equal).abs().max() <= 1e-6


def test_tail_of_the_released_continuation() -> None:
    sigmas = schedule.with_tail(schedule.base(50))
    assert len(sigmas) - 1 == 56
    assert torch.allclose(sigmas[-11:] * 1000, torch.arange(500.0, -1, -50), atol=1e-3)


@pytest.mark.parametrize(("n", "expected"), [(16, 3), (20, 3), (30, 4), (40, 4), (50, 5), (60, 6), (100, 9)])
def test_refine_counts(n: int, expected: int) -> None:
    assert len(schedule.refine(n)) - 1 == expected


@given(steps, st.floats(0.01, 1.0))
def test_refine(n: int, t: float) -> None:
    sigmas, base = schedule.refine(n, t), schedule.base(n)
    assert is_schedule(sigmas)
    assert sigmas[0] == torch.tensor(t)
    assert torch.equal(sigmas[1:], base[base < sigmas[0]])


def test_refine_from_pure_noise_is_the_base_schedule() -> None:
    assert torch.equal(schedule.refine(20, 1.0), schedule.base(20))


@given(st.integers(1, 20), st.floats(0.2, 1.0))
def test_refine_exact(n: int, t: float) -> None:
    sigmas = schedule.refine_exact(n, t)
    assert is_schedule(sigmas) and len(sigmas) == n + 1
    assert sigmas[0] == torch.tensor(t)


def test_refine_exact_takes_the_shortest_base() -> None:
    assert torch.equal(schedule.refine_exact(3), schedule.refine(min(n for n in range(1, 60) if
                       len(schedule.refine(n)) == 4)))  # fmt: skip


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedule.base(0), "num_steps must be at least 1, got 0"),
        (lambda: schedule.base(5, flow_shift=0.0), "flow_shift must be positive"),
        (lambda: schedule.distilled(51), "at most 50 steps, got 51"),
        (lambda: schedule.distilled(0), "at least 1"),
        (lambda: schedule.with_tail(schedule.base(5), start=0.0), r"must start in \(0, 1\]"),
        (lambda: schedule.with_tail(schedule.base(5), start=1.5), r"must start in \(0, 1\]"),
        (lambda: schedule.with_tail(schedule.base(5), num_steps=0), "at least 1"),
        (lambda: schedule.refine(50, 0.0), r"t_thresh must be in \(0, 1\], got 0.0"),
        (lambda: schedule.refine(50, 1.1), r"t_thresh must be in \(0, 1\]"),
        (lambda: schedule.refine_exact(0), "at least 1"),
        (lambda: schedule.refine_exact(100, 0.001), "ask for fewer"),
    ],
)
def test_errors(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]


def test_euler_step() -> None:
    x, m = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(schedule.euler_step(x, m, 0.75, 0.25), x - 0.5 * m)


def test_bf16_merges_six_of_the_fifty_base_timesteps() -> None:
    assert len((schedule.base(50)[:-1] * 1000).bfloat16().unique()) == 44
