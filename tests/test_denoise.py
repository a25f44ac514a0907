"""The denoising loop: its sign, its steps, stopping and going on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_dit, randn, text
from torch import Tensor

from lcv_core import schedule
from lcv_core.config import BSAConfig
from lcv_core.denoise import Guidance, StepInfo, denoise
from lcv_core.errors import InputError, NumericalError


class Oracle:
    """Stands in for the DiT: knows x0 and answers x0 - noise, the convention of the network."""

    device = torch.device("cpu")

    def __init__(self, x0: Tensor, noise: Tensor) -> None:
        self.velocity = x0 - noise
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, latents: Tensor, timestep: Tensor, _states: Tensor, _mask: Tensor, **options: Any) -> Tensor:
        self.calls.append((latents, timestep))
        self.num_cond_latents = options["num_cond_latents"]
        return self.velocity[:, :, -latents.shape[2] :]


@given(st.integers(1, 12), st.sampled_from(["base", "distilled"]))
def test_euler_on_the_true_velocity_ends_in_x0(steps: int, name: str) -> None:
    """The network says x0 - noise, the scheduler wants noise - x0: one flip too many or too few ends far from x0."""
    x0, noise = randn(2, 16, 3, 4, 6), randn(2, 16, 3, 4, 6, seed=1)
    sigmas = getattr(schedule, name)(steps)
    seen: list[StepInfo] = []
    got = denoise(Oracle(x0, noise), noise, sigmas, text=text(2), on_step=seen.append)  # type: ignore[arg-type]
    assert (got - x0).abs().max() <= 1e-5
    for info in seen:  # every estimate on the way is x0 too
        assert (info.denoised - x0).abs().max() <= 1e-5


def test_from_an_intermediate_level() -> None:
    """The refine schedule starts at 0.5, where the latents are half noise."""
    x0, noise = randn(1, 16, 3, 4, 6), randn(1, 16, 3, 4, 6, seed=1)
    got = denoise(Oracle(x0, noise), 0.5 * (x0 + noise), schedule.refine(20), text=text())  # type: ignore[arg-type]
    assert (got - x0).abs().max() <= 1e-5


def test_timesteps_of_condition_and_noise_frames() -> None:
    x0, noise = randn(1, 16, 3, 4, 6), randn(1, 16, 3, 4, 6, seed=1)
    start = torch.cat([x0[:, :, :1], noise[:, :, 1:]], dim=2)
    oracle, sigmas = Oracle(x0, noise), schedule.base(4)
    got = denoise(oracle, start, sigmas, text=text(), num_cond_latents=1)  # type: ignore[arg-type]
    assert oracle.num_cond_latents == 1
    assert torch.equal(got[:, :, :1], x0[:, :, :1])
    assert (got - x0).abs().max() <= 1e-5
    for (latents, timestep), sigma in zip(oracle.calls, sigmas.tolist()):
        assert torch.equal(latents[:, :, :1], x0[:, :, :1])
        assert timestep.tolist() == [[0.0, pytest.approx(1000 * sigma), pytest.approx(1000 * sigma)]]
    assert len(oracle.calls) == 4


def run(**changes: Any) -> Tensor:
    options: dict[str, Any] = {"text": text(), "sigmas": schedule.base(4)} | changes
    return denoise(options.pop("dit", None) or make_dit(), options.pop("latents", randn(1, 16, 3, 4, 6)), **options)


GUIDED = Guidance(4.0, text(seed=9))


@pytest.mark.parametrize("use_kv_cache", [False, True])
@pytest.mark.parametrize("guidance", [None, GUIDED, Guidance(4.0, text(seed=9), mode="batched")])
def test_condition_frames_stay_as_they_are(use_kv_cache: bool, guidance: Guidance | None) -> None:
    start = randn(1, 16, 3, 4, 6)
    before = start.clone()
    kept: list[bool] = []

    def check(info: StepInfo) -> None:
        kept.append(torch.equal(info.latents[:, :, :1], before[:, :, :1]))
        kept.append(torch.equal(info.denoised[:, :, :1], before[:, :, :1]))

    got = run(latents=start, num_cond_latents=1, use_kv_cache=use_kv_cache, guidance=guidance, on_step=check)
    assert len(kept) == 8 and all(kept)
    assert torch.equal(got[:, :, :1], before[:, :, :1])
    assert (got[:, :, 1:] - before[:, :, 1:]).abs().amax() > 0.1
    assert torch.equal(start, before)  # the caller's tensor is not written to


@pytest.mark.parametrize("bsa", [None, BSAConfig(sparsity=0.5, block_q=(1, 2, 2), block_k=(1, 2, 2))])
@pytest.mark.parametrize("guidance", [None, GUIDED, Guidance(4.0, text(seed=9), mode="batched")])
def test_the_cache_is_exact(guidance: Guidance | None, bsa: BSAConfig | None) -> None:
    """With the guidance scale taken over the noise frames, also with sparse attention."""
    both = [run(num_cond_latents=2, use_kv_cache=use, guidance=guidance, bsa=bsa) for use in (True, False)]
    assert (both[0] - both[1]).abs().max() <= 1e-4


def test_a_cache_for_each_sample_of_a_batch() -> None:
    """Samples with conditions of their own, guidance batched: the cache is doubled with them."""
    start = randn(2, 16, 3, 4, 6)
    guidance = Guidance(4.0, text(2, seed=9), mode="batched")
    options: dict[str, Any] = {"num_cond_latents": 1, "use_kv_cache": True}
    together = run(latents=start, text=text(2), guidance=guidance, **options)
    for b in range(2):
        alone = Guidance(4.0, text(2, seed=9).select(b))
        single = run(latents=start[b : b + 1], text=text(2).select(b), guidance=alone, **options)
        assert (together[b : b + 1] - single).abs().max() <= 1e-4


def test_scope_all_differs_from_noise_without_a_cache() -> None:
    noise, everything = (
        run(num_cond_latents=1, guidance=Guidance(4.0, text(seed=9), scope=scope))  # type: ignore[arg-type]
        for scope in ("noise", "all")
    )
    assert (noise - everything).abs().max() > 1e-3


def test_guidance_off_never_runs_the_negative() -> None:
    plain = run()
    assert torch.equal(run(guidance=Guidance(1.0, text(seed=9))), plain)
    assert not torch.equal(run(guidance=GUIDED), plain)


def test_guidance_without_a_negative_text() -> None:
    with pytest.raises(InputError, match="needs a negative text"):
        run(guidance=Guidance(2.0))


def test_batched_guidance_needs_texts_of_one_length() -> None:
    with pytest.raises(InputError, match='use cfg_mode="sequential"'):
        run(guidance=Guidance(4.0, text(length=9), mode="batched"))
    run(guidance=Guidance(4.0, text(length=9)))


def test_on_step_once_per_step() -> None:
    sigmas, seen = schedule.with_tail(schedule.base(3)), []
    got = run(sigmas=sigmas, on_step=seen.append)
    assert [info.step for info in seen] == list(range(1, len(sigmas)))
    assert {info.num_steps for info in seen} == {len(sigmas) - 1}
    assert [info.sigma for info in seen] == sigmas[:-1].tolist()
    assert torch.equal(seen[-1].latents, got)
    assert all(info.latents.shape == info.denoised.shape == got.shape for info in seen)
    # The last step goes to sigma 0, where the estimate and the latents are one.
    assert torch.allclose(seen[-1].denoised, got, atol=1e-5)


@dataclass
class Memory:
    """A progress that keeps everything in memory."""

    saved: list[tuple[int, Tensor]] = field(default_factory=list)
    ticks: list[int] = field(default_factory=list)

    def load(self, latents: Tensor) -> tuple[int, Tensor]:
        return self.saved[-1] if self.saved else (0, latents)

    def save(self, step: int, latents: Tensor) -> None:
        self.saved.append((step, latents.clone()))

    def tick(self, step: int, _latents: Tensor) -> None:
        self.ticks.append(step)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_callback_that_raises_stops_and_what_was_done_is_kept(stop_at: int, error: type[BaseException]) -> None:
    calls: list[int] = []

    def stop(info: StepInfo) -> None:
        calls.append(info.step)
        if info.step == stop_at:
            raise error("enough")

    progress, whole = Memory(), run(num_cond_latents=1, guidance=GUIDED)
    with pytest.raises(error, match="enough"):
        run(num_cond_latents=1, guidance=GUIDED, on_step=stop, progress=progress)
    assert calls == progress.ticks == list(range(1, stop_at + 1))
    assert [step for step, _ in progress.saved] == [stop_at]
    seen: list[int] = []
    resumed = run(num_cond_latents=1, guidance=GUIDED, on_step=lambda info: seen.append(info.step), progress=progress)
    assert seen == list(range(stop_at + 1, 5))
    assert torch.equal(resumed, whole)
    assert progress.saved[-1][0] == 4 and torch.equal(progress.saved[-1][1], whole)


def test_nothing_done_is_nothing_saved() -> None:
    dit, progress = make_dit(), Memory()
    dit.x_embedder.register_forward_hook(lambda *_: pytest.fail("out of memory"))
    with pytest.raises(pytest.fail.Exception):
        run(dit=dit, progress=progress)
    assert progress.saved == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_stops_the_run(value: float) -> None:
    dit, progress, calls = make_dit(), Memory(), []

    def break_third(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            output[0, 0, 0] = value
        return output

    dit.final_layer.register_forward_hook(break_third)
    with pytest.raises(NumericalError, match=r"step 3 of 4 \(sigma 0\.\d+\) produced NaN or infinite values"):
        run(dit=dit, progress=progress)
    assert len(calls) == 3
    assert [step for step, _ in progress.saved] == [2]


def test_latents_are_fp32_in_a_bf16_model() -> None:
    seen: list[StepInfo] = []
    got = run(dit=make_dit(torch.bfloat16), on_step=seen.append)
    assert got.dtype == torch.float32
    assert {info.latents.dtype for info in seen} == {torch.float32}
    assert not torch.equal(got.bfloat16().float(), got)


def test_no_gradients_are_kept() -> None:
    assert not run(dit=make_dit().requires_grad_(True)).requires_grad
