"""The objectives against closed forms, and their gradients against finite differences in fp64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import make_dit, randn, seeded, text
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from lcv_core.denoise import model_output
from lcv_core.errors import InputError
from lcv_core.schedule import base, euler_step, shift_sigmas
from lcv_core.training.losses import (
    OFFICIAL_TOKENS,
    flow_pair,
    kl_divergence,
    logit_normal_density,
    noisy_condition,
    shift_for,
    spread_uniform,
    timestep_weight,
    velocity_errors,
)
from lcv_core.training.stages.flow import FlowStage

F64 = torch.float64


def uniform(count: int = 200_000) -> Tensor:
    """The middles of so many equal pieces of (0, 1)."""
    return (torch.arange(count, dtype=F64) + 0.5) / count


def test_the_pair_is_the_line_from_clean_to_noise() -> None:
    x0, noise = randn(3, 2, 4, 2, 2, seed=1), randn(3, 2, 4, 2, 2, seed=2)
    for t, expected in ((0.0, x0), (1.0, noise)):
        assert torch.equal(flow_pair(x0, noise, torch.full((3,), t))[0], expected)
    x, v = flow_pair(x0.double(), noise.double(), torch.tensor([0.1, 0.5, 0.9], dtype=F64))
    ahead, _ = flow_pair(x0.double(), noise.double(), torch.tensor([0.2, 0.6, 1.0], dtype=F64))
    assert torch.allclose((ahead - x) / 0.1, -v)  # dx/dt = noise - x0, the network's sign is the other
    per_frame = torch.tensor([[0.0, 0.3, 0.6, 1.0]]).repeat(3, 1)
    frames, _ = flow_pair(x0, noise, per_frame)
    assert torch.equal(frames[:, :, 0], x0[:, :, 0]) and torch.equal(frames[:, :, 3], noise[:, :, 3])
    with pytest.raises(InputError, match=r"t must be \[B\] or \[B, T\]"):
        flow_pair(x0, noise, torch.zeros(4))


def test_the_sampler_follows_the_target_back_to_the_clean_latents() -> None:
    """The sign convention of training and of `denoise` are one."""
    x0, noise = randn(1, 2, 3, 2, 2, seed=1), randn(1, 2, 3, 2, 2, seed=2)
    sigmas, x = base(7), noise
    for now, after in pairwise(sigmas):
        _, velocity = flow_pair(x0, noise, now[None])
        x = euler_step(x, model_output(velocity), now, after)
    assert torch.allclose(x, x0, atol=1e-5)


def test_condition_frames_count_for_nothing() -> None:
    velocity, target = randn(2, 3, 4, 2, 2, seed=1), randn(2, 3, 4, 2, 2, seed=2)
    changed = velocity.clone()
    changed[:, :, :2] += 5
    errors = velocity_errors(velocity, target, 2)
    assert torch.equal(errors, velocity_errors(changed, target, 2))
    assert torch.allclose(errors, (velocity - target)[:, :, 2:].square().mean(dim=(1, 2, 3, 4)))
    assert errors.shape == (2,) and not torch.equal(errors, velocity_errors(velocity, target))
    assert velocity_errors(velocity.bfloat16(), target.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("mean", "std", "floor"), [(0.0, 1.0, 0.0), (0.5, 0.7, 0.1), (-1.0, 1.4, 1.0)])
def test_weights_have_mean_1(mean: float, std: float, floor: float) -> None:
    weights = timestep_weight(uniform(), mean=mean, std=std, floor=floor)
    assert weights.mean() == pytest.approx(1.0, abs=1e-4)
    assert weights.min() >= floor


def test_weighting_a_uniform_draw_is_drawing_from_the_logit_normal() -> None:
    def loss(u: Tensor) -> Tensor:
        return u.square() + torch.sin(5 * u)

    u = uniform()
    weighted = (timestep_weight(u, mean=0.3, std=0.8, floor=0.0) * loss(u)).mean()
    drawn = torch.sigmoid(0.3 + 0.8 * Normal(0.0, 1.0).icdf(u))
    assert weighted == pytest.approx(float(loss(drawn).mean()), abs=1e-4)


def test_the_density_vanishes_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert torch.isfinite(logit_normal_density(ends)).all() and (logit_normal_density(ends) < 1e-3).all()
    assert (timestep_weight(ends, floor=0.1) >= 0.1).all()


def test_timesteps_are_spread_evenly_over_any_run_of_samples() -> None:
    for first in (0, 37):
        values = spread_uniform(0.77, range(first, first + 64)).sort().values
        assert values.min() >= 0 and values.max() < 1
        assert (values.diff()).max() <= 2.7 / 64  # three gaps at most exist, the largest below phi^2 / n
    offsets = torch.rand(4000, generator=seeded(), dtype=F64).tolist()
    alone = torch.cat([spread_uniform(offset, [5]) for offset in offsets])
    counts = torch.histc(alone, 10, 0, 1)
    assert ((counts - 400).square() / 400).sum() < 30  # chi squared of uniform: 9 degrees of freedom, p < 0.001


def test_the_shift_grows_with_the_tokens_up_to_the_official_one() -> None:
    assert shift_for(OFFICIAL_TOKENS) == 12.0
    assert shift_for(24 * 44 * 80) == 12.0  # 720p, as released
    shifts = [shift_for(n) for n in (1, 120, 1560, 12480, OFFICIAL_TOKENS)]
    assert shifts == sorted(shifts) and shifts[0] == 1.0
    assert shift_for(OFFICIAL_TOKENS // 4) == pytest.approx(6.0)
    # The variance that is left of a signal averaged over n tokens is the same at equal u: t / (1 - t) ~ sqrt(n).
    odds = [(t := shift_sigmas(torch.tensor(0.3), shift_for(n)).item()) / (1 - t) for n in (9360, 37440)]
    assert odds[1] / odds[0] == pytest.approx(2.0, rel=1e-4)


def test_noisy_condition() -> None:
    x0, noise = randn(1, 2, 2, 2, 2, seed=1), randn(1, 2, 2, 2, 2, seed=2)
    made = noisy_condition(x0, noise, torch.tensor([[0.0, 0.25]]))
    assert torch.equal(made[:, :, 0], x0[:, :, 0])
    assert torch.allclose(made[:, :, 1], 0.75 * x0[:, :, 1] + 0.25 * noise[:, :, 1])


def test_kl_against_the_distributions() -> None:
    mean, logvar = randn(3, 4, 2, 2, 2, seed=1), randn(3, 4, 2, 2, 2, seed=2)
    exact = exact_kl(Normal(mean.double(), torch.exp(0.5 * logvar.double())), Normal(0.0, 1.0))
    assert torch.allclose(kl_divergence(mean, logvar).double(), exact.flatten(1).mean(dim=1), rtol=1e-5)
    assert kl_divergence(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def flow_batch(n_c: int) -> dict[str, Any]:
    B, T = 2, 3
    states = text(B)
    assert states.mask is not None
    return {
        "task": "i2v" if n_c else "t2v", "num_cond_latents": n_c, "latents": randn(B, 16, T, 4, 4, seed=1, dtype=F64),
        "noise": randn(B, 16, T, 4, 4, seed=2, dtype=F64), "levels": torch.full((B, n_c), 0.03, dtype=F64),
        "t": torch.tensor([0.3, 0.8], dtype=F64), "weight": torch.tensor([1.5, 0.5], dtype=F64),
        "text": states.states.double(), "text_mask": states.mask,
    }  # fmt: skip


@pytest.mark.parametrize("n_c", [0, 1])
def test_gradients_of_the_flow_loss(n_c: int) -> None:
    """Through the network, along a random direction in all parameters at once."""
    dit = make_dit(F64).requires_grad_(True)
    stage = FlowStage.__new__(FlowStage)
    batch = flow_batch(n_c)

    def loss() -> Tensor:
        return stage.loss(dit, batch)[0]

    loss().backward()
    params = list(dit.parameters())
    for seed in range(3):
        directions = [randn(*p.shape, seed=100 * seed + k, dtype=F64) for k, p in enumerate(params)]
        norm = math.sqrt(sum(d.square().sum().item() for d in directions))
        expected = sum((p.grad * d).sum().item() for p, d in zip(params, directions, strict=True)) / norm  # type: ignore[operator]
        found = []
        with torch.no_grad():
            for move in (1e-6, -2e-6):
                for p, d in zip(params, directions, strict=True):
                    p += move / norm * d
                found.append(loss().item())
            for p, d in zip(params, directions, strict=True):
                p += 1e-6 / norm * d
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("n_c", [0, 1, 2])
def test_the_network_sees_clean_time_at_condition_frames(n_c: int) -> None:
    seen: dict[str, Any] = {}

    def network(x: Tensor, timestep: Tensor, *_: Tensor, num_cond_latents: int) -> Tensor:
        seen.update(x=x, timestep=timestep, n_c=num_cond_latents)
        return torch.zeros_like(x)

    batch = flow_batch(n_c)
    stage = FlowStage.__new__(FlowStage)
    loss, metrics = stage.loss(network, batch)  # type: ignore[arg-type]
    assert (seen["timestep"][:, :n_c] == 0).all() and seen["n_c"] == n_c
    assert torch.allclose(seen["timestep"][:, n_c:], 1000 * batch["t"][:, None].expand(2, 3 - n_c))
    cond = 0.97 * batch["latents"][:, :, :n_c] + 0.03 * batch["noise"][:, :, :n_c]
    assert torch.allclose(seen["x"][:, :, :n_c], cond)
    target = (batch["latents"] - batch["noise"])[:, :, n_c:]
    assert loss == pytest.approx(float((batch["weight"] * target.square().mean(dim=(1, 2, 3, 4))).mean()))
    assert set(metrics) == {"mse", f"loss_{batch['task']}"}
