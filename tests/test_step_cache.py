"""Step caching: what a reused step gives, which steps are reused, what its budget means, stopping and going on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import made, refused
from tiny_models import components, make_dit, randn, text
from torch import Tensor, nn

from lcv_core import schedule
from lcv_core.config import BSAConfig
from lcv_core.denoise import Guidance, StepInfo, denoise
from lcv_core.dit import step_cache
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.step_cache import FIRST_STEPS, LAST_STEPS, StepCache
from lcv_core.errors import InputError
from lcv_core.partial import PartialRun
from lcv_core.pipelines import text_to_video
from lcv_core.weights.lora import load_lora

ALWAYS = 0.999  # with `small_gains`: every step that may be reused is
STEPS = 7
MAY = list(range(FIRST_STEPS, STEPS - LAST_STEPS))
GUIDED = Guidance(4.0, text(seed=9))
BATCHED = Guidance(4.0, text(seed=9), mode="batched")


@pytest.fixture
def small_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no movement brought an error."""
    monkeypatch.setattr(step_cache, "_distance", lambda x, _reference: 1e-6 * x.shape[0])


def run(dit: LongCatDiT | None = None, **changes: Any) -> tuple[Tensor, list[StepInfo]]:
    seen: list[StepInfo] = []
    options: dict[str, Any] = {"text": text(), "sigmas": schedule.base(STEPS), "on_step": seen.append} | changes
    latents = options.pop("latents", randn(1, 16, 3, 4, 6))
    return denoise(dit or make_dit(depth=3), latents, **options), seen


def reused(seen: list[StepInfo]) -> list[int]:
    """From 0."""
    return [info.step - 1 for info in seen if info.reused]


class Calls:
    """Which blocks are run, forward by forward, and what they were given and gave."""

    def __init__(self, dit: LongCatDiT) -> None:
        self.forwards: list[dict[int, Tensor]] = []
        dit.x_embedder.register_forward_hook(lambda *_: self.forwards.append({}))
        for i, block in enumerate(dit.blocks):
            block.register_forward_hook(lambda _m, _x, out, i=i: self.forwards[-1].update({i: out.clone()}))

    def __iter__(self) -> Iterator[dict[int, Tensor]]:
        return iter(self.forwards)


@pytest.mark.parametrize("guidance", [None, GUIDED, BATCHED])
@pytest.mark.parametrize("cond", [{}, {"num_cond_latents": 1}, {"num_cond_latents": 1, "use_kv_cache": True}])
def test_a_budget_too_small_changes_no_bit(guidance: Guidance | None, cond: dict[str, Any]) -> None:
    options = {"guidance": guidance, **cond}
    plain, _ = run(**options)
    got, seen = run(step_cache=1e-12, **options)
    assert torch.equal(got, plain)
    assert reused(seen) == []


@pytest.mark.usefixtures("small_gains")
@pytest.mark.parametrize("guidance", [None, GUIDED, BATCHED])
def test_the_first_and_last_steps_are_computed(guidance: Guidance | None) -> None:
    dit = make_dit(depth=3)
    calls, (_, seen) = Calls(dit), run(dit, guidance=guidance, step_cache=ALWAYS)
    assert reused(seen) == MAY
    forwards = 2 if guidance is GUIDED else 1
    expected = [[0] if step in MAY else [0, 1, 2] for step in range(STEPS) for _ in range(forwards)]
    assert [list(forward) for forward in calls] == expected


@pytest.mark.usefixtures("small_gains")
def test_no_block_but_the_first_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are brought in when their block's turn comes stay away."""
    dit, asked = make_dit(depth=3), []
    blocks = list(dit.blocks)

    def in_turn(self: nn.ModuleList) -> Iterator[nn.Module]:
        for i, block in enumerate(blocks):
            asked.append(i)
            yield block

    monkeypatch.setattr(nn.ModuleList, "__iter__", in_turn)
    run(dit, step_cache=ALWAYS)
    assert asked == [i for step in range(STEPS) for i in ([0] if step in MAY else [0, 1, 2])]


@pytest.mark.usefixtures("small_gains")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_reused_step_gives(dtype: torch.dtype) -> None:
    """The first block's output plus what the others added to that of the last step computed in full."""
    dit = make_dit(dtype, depth=3)
    calls, given = Calls(dit), []
    dit.final_layer.register_forward_hook(lambda _m, x, _y: given.append(x[0].clone()))
    _, seen = run(dit, step_cache=ALWAYS)
    assert reused(seen) == MAY
    # In steps computed in full from the second on the final layer also runs for what reuse would have given.
    for step in MAY:
        last = calls.forwards[MAY[0] - 1]
        expected = calls.forwards[step][0].double() + (last[2].double() - last[0].double())
        streams = given[2 * FIRST_STEPS - 1 :]
        error = (streams[step - MAY[0]].double() - expected).norm() / expected.norm()
        assert error <= 4 * torch.finfo(dtype).eps


def test_the_gain_is_the_error_over_the_movement() -> None:
    """Against the velocity of a run that reuses in that very step, the movement from the first block's output."""
    dit = make_dit(depth=3)
    calls, cache = Calls(dit), StepCache(1e-12, STEPS)
    xs = [randn(1, 16, 3, 4, 6), randn(1, 16, 3, 4, 6) + 0.1 * randn(1, 16, 3, 4, 6, seed=1)]
    velocities = []
    for step, x in enumerate(xs):
        cache.begin(step, ["cond"])
        states = text()
        with torch.no_grad():
            v = dit(x, torch.tensor([500.0]), states.states, states.mask, step_cache=cache.branch("cond"))
        velocities.append(v)
        would = cache.branch("cond").would
        assert not cache.end(v, lambda made: made["cond"])
    before, now = calls.forwards
    movement = ((now[0] - before[0]).norm() / before[0].norm()).item()
    assert would is not None
    error = ((would - velocities[1]).norm() / velocities[1].norm()).item()
    assert error > 1e-3
    assert cache.gains == [pytest.approx(error / movement, rel=1e-4)]
    # The other way round: had the step been reused, it would have given `would`.
    loose = StepCache(0.9, STEPS, [1e-6])
    for step, x in enumerate(xs):
        loose.begin(FIRST_STEPS + step, ["cond"])
        with torch.no_grad():
            v = dit(x, torch.tensor([500.0]), states.states, states.mask, step_cache=loose.branch("cond"))
        loose.end(v, lambda made: made["cond"])
    assert loose.reused == [FIRST_STEPS + 1]
    assert torch.allclose(v, would, atol=1e-5)


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_the_budget_holds_where_the_network_is_smooth(budget: float) -> None:
    """A network of small steps: the true error of every reused step, by the whole network at that step's latents."""
    dit = make_dit(depth=3)
    sigmas = torch.cat([torch.linspace(1.0, 0.995, 24), torch.zeros(1)])
    start, states = randn(1, 16, 3, 4, 6), text()
    _, seen = run(dit, latents=start, sigmas=sigmas, step_cache=budget)
    before, errors = start, []
    for info in seen:
        if info.reused:
            with torch.no_grad():
                true = dit(before, torch.tensor([1000 * info.sigma]), states.states, states.mask)
            used = (info.denoised - before) / info.sigma
            errors.append(((used - true).norm() / true.norm()).item())
        before = info.latents
    assert len(errors) >= 3
    assert max(errors) <= 1.5 * budget  # an estimate, from the last two measurements


@pytest.mark.usefixtures("small_gains")
@pytest.mark.parametrize("bsa", [None, BSAConfig(sparsity=0.5, block_q=(1, 2, 2), block_k=(1, 2, 2))])
def test_caches_branches_and_conditions_agree(bsa: BSAConfig | None) -> None:
    """With and without a KV cache, branch by branch and in a batch: the same steps and, up to rounding, numbers."""
    results = []
    for guidance in (GUIDED, BATCHED):
        for use_kv_cache in (True, False):
            got, seen = run(
                guidance=guidance, num_cond_latents=2, use_kv_cache=use_kv_cache, bsa=bsa, step_cache=ALWAYS
            )
            assert reused(seen) == MAY
            results.append(got)
    plain, _ = run(guidance=GUIDED, num_cond_latents=2, bsa=bsa)
    assert all((got - results[0]).abs().max() <= 1e-3 for got in results[1:])
    assert (plain - results[0]).abs().max() > 0.01


@pytest.mark.usefixtures("small_gains")
def test_samples_of_a_batch_keep_to_themselves() -> None:
    start, states = randn(2, 16, 3, 4, 6), text(2)
    together, _ = run(latents=start, text=states, step_cache=ALWAYS)
    for b in range(2):
        alone, _ = run(latents=start[b : b + 1], text=states.select(b), step_cache=ALWAYS)
        assert (together[b : b + 1] - alone).abs().max() <= 1e-4


def test_condition_tokens_do_not_count_and_the_worst_sample_does() -> None:
    x, moved = randn(2, 10, 8), randn(2, 10, 8)
    moved[:, :4] += 1.0
    moved[1, 4:] *= 1.25
    assert step_cache._distance(step_cache._some(moved, 4), step_cache._some(x, 4)) == pytest.approx(0.25, rel=1e-5)
    assert step_cache._distance(step_cache._some(moved[:1], 4), step_cache._some(x[:1], 4)) == 0.0


def test_few_tokens_of_many_are_compared() -> None:
    x = randn(1, 40_000, 1)
    some = step_cache._some(x, 1000)
    assert 4096 <= some.shape[1] <= 8192
    assert torch.equal(some[0, :2, 0], x[0, [1000, 1009], 0])


@pytest.mark.usefixtures("small_gains")
def test_branches_that_come_and_go_start_afresh() -> None:
    """Guidance on some of the steps: a step with other branches than the one before is computed in full."""
    sigmas = schedule.base(12)
    levels = sigmas.tolist()
    guidance = Guidance(4.0, text(seed=9), interval=(levels[7], levels[5]))
    _, seen = run(sigmas=sigmas, guidance=guidance, step_cache=ALWAYS)
    assert reused(seen) == [3, 4, 6, 7, 9, 10]  # 5 to 7 are guided


@pytest.mark.parametrize("guidance", [None, GUIDED])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, guidance: Guidance | None) -> None:
    """Wherever it stops: bit for bit, with steps reused before and after."""
    dit = make_dit(depth=3)
    sigmas = torch.cat([torch.linspace(1.0, 0.995, 14), torch.zeros(1)])
    options: dict[str, Any] = {"sigmas": sigmas, "guidance": guidance, "step_cache": 0.3, "num_cond_latents": 1}
    whole, seen = run(dit, **options)
    assert 3 <= len(reused(seen)) <= 10
    for stop_at in range(1, 15):

        def stop(info: StepInfo, at: int = stop_at) -> None:
            if info.step == at:
                raise KeyboardInterrupt

        def progress(at: int = stop_at) -> PartialRun:
            return PartialRun(tmp_path / f"{at}.safetensors", "key", every=0.0)

        with pytest.raises(KeyboardInterrupt):
            run(dit, progress=progress(), **{**options, "on_step": stop})
        resumed, again = run(dit, progress=progress(), **options)
        assert torch.equal(resumed, whole)
        assert set(reused(again)) <= set(reused(seen))
        if stop_at > 1:
            assert again[0].step in (stop_at, *(s + 1 for s in range(stop_at) if s not in reused(seen)))


@pytest.mark.usefixtures("small_gains")
def test_with_an_adapter() -> None:
    """What the blocks added is what they add with the adapter."""
    dit = make_dit(depth=3)
    up = randn(dit.config.ffn_dim, 4, seed=6)
    adapter = {"blocks.2.ffn.w1.lora_A.weight": randn(4, 64, seed=5), "blocks.2.ffn.w1.lora_B.weight": up}
    plain, _ = run(dit, step_cache=ALWAYS)
    with load_lora(dit, adapter):
        runtime, seen = run(dit, step_cache=ALWAYS)
    with load_lora(dit, adapter, mode="merged"):
        merged, _ = run(dit, step_cache=ALWAYS)
    assert reused(seen) == MAY
    assert (runtime - merged).abs().max() <= 1e-3 < (runtime - plain).abs().max()


def test_two_tensors_for_each_branch() -> None:
    """What the blocks added, and some of the first block's output in fp32."""
    dit, cache = make_dit(torch.bfloat16, depth=3), StepCache(0.1, STEPS)
    cache.begin(0, ["cond"])
    states = text()
    with torch.no_grad():
        dit(randn(1, 16, 3, 4, 6), torch.tensor([500.0]), states.states, states.mask, step_cache=cache.branch("cond"))
    branch = cache.branch("cond")
    kept = [y for y in vars(branch).values() if isinstance(y, Tensor)]
    assert sum(y.nbytes for y in kept) == 18 * 64 * (2 + 4)


def test_training_cannot_use_it() -> None:
    dit, cache, states = make_dit().requires_grad_(True), StepCache(0.1, STEPS), text()
    cache.begin(0, ["cond"])
    with pytest.raises(InputError, match="step caching writes over what a backward pass needs"):
        dit(randn(1, 16, 3, 4, 6), torch.tensor([500.0]), states.states, states.mask, step_cache=cache.branch("cond"))


@pytest.mark.parametrize("budget", [-0.1, 1.0, float("nan"), float("inf")])
def test_budgets_that_are_none(budget: float) -> None:
    with pytest.raises(InputError, match="step_cache must be from 0"):
        run(step_cache=budget)
    with pytest.raises(InputError, match="step_cache must be from 0"):
        text_to_video(components(), text=text(), guidance_scale=1.0, step_cache=budget)


def test_on_the_command_line(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["t2v", "-m", tiny_checkpoint, "-p", "x", "--steps", 6, "--seed", 1, "--frames", 5]
    call += ["--height", 32, "--width", 32]
    assert "reused" not in made(*call, "-o", "plain.safetensors").err
    assert "2 of 6 steps were reused by the step cache" in made(*call, "--step-cache", 0.9, "-o", "a.safetensors").err
    assert "try 0.05" in refused(*call, "--step-cache", 1.5)
