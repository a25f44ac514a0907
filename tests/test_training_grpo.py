"""GRPO: the random step against theory, the loss against closed forms, the stage in the trainer."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import check_gradients
from tiny_models import make_dit, randn, seeded
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lcv_core.errors import InputError
from lcv_core.guidance import cfg_zero
from lcv_core.schedule import base
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.data.clips import sample_clip
from lcv_core.training.losses import gaussian_divergence, gaussian_log_prob, policy_loss
from lcv_core.training.optimizers import trained
from lcv_core.training.policy import (
    LARGEST_SPREAD,
    Rollout,
    advantages,
    grpo_loss,
    rollout,
    step_mean,
    step_spread,
    step_weight,
)
from lcv_core.training.recipe import Recipe
from lcv_core.training.rewards import BUILT_IN, give_rewards, load_reward
from lcv_core.training.stages import build_stage
from lcv_core.training.trainer import Trainer
from lcv_core.weights.lora import load_lora
from lcv_core.weights.lora_keys import official_targets

MEAN, STD = 1.5, 0.4  # of the data of the Gaussian toy


def one(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).view(1)


def toy_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 - noise | x] where x0 is normal, exactly."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return MEAN + ((1 - sigma) * STD**2 - sigma) / variance * (x - (1 - sigma) * MEAN)


def toy_moments(sigmas: Tensor, random_steps: set[int] | None, *, sign: float = 1.0) -> tuple[float, float]:
    """Mean and standard deviation of what sampling ends in. Every step is affine, so nothing has to be drawn."""
    mean, variance = one(0.0), one(1.0)
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        is_random = random_steps is None or step in random_steps
        spread = step_spread(one(sigma), one(following)) if is_random else one(0.0)

        def moved(x: Tensor) -> Tensor:
            now, then, s = one(sigma), one(following), spread  # noqa: B023
            drift = step_mean(x, toy_velocity(x, now), now, then, s)
            plain = step_mean(x, toy_velocity(x, now), now, then, one(0.0))
            return plain + sign * (drift - plain)

        offset, slope = moved(one(0.0)), moved(one(1.0)) - moved(one(0.0))
        mean, variance = offset + slope * mean, slope**2 * variance + spread**2
    return float(mean), float(variance.sqrt())


def test_random_steps_keep_the_marginals_of_the_flow() -> None:
    sigmas = torch.linspace(1, 0, 801, dtype=torch.float64)
    assert toy_moments(sigmas, set()) == pytest.approx((MEAN, STD), rel=5e-3)
    assert toy_moments(sigmas, None) == pytest.approx((MEAN, STD), rel=5e-3)
    # The published formula is for noise - x0; taken over as it stands, its drift would push the other way.
    assert abs(toy_moments(sigmas, None, sign=-1.0)[1] - STD) > 0.2


@pytest.mark.parametrize("critical", range(6))
def test_one_truncated_step_of_sixteen_changes_the_result_little(critical: int) -> None:
    sigmas = base(16).double()
    mean, std = toy_moments(sigmas, {critical})
    flow_mean, flow_std = toy_moments(sigmas, set())
    assert mean == pytest.approx(flow_mean, abs=1e-6)
    assert std == pytest.approx(flow_std, rel=0.06)


def test_the_spread_is_that_of_the_report_and_truncated() -> None:
    sigma, following = torch.tensor([1.0, 0.99, 0.5, 0.2]).double(), torch.tensor([0.99, 0.98, 0.45, 0.1]).double()
    spread = step_spread(sigma, following)
    assert spread[0] == spread[1] == LARGEST_SPREAD  # at 1 it would be infinite, at 0.99 it is 0.995
    assert spread[2:].tolist() == pytest.approx([math.sqrt(0.05), math.sqrt(0.25 * 0.1)])
    assert step_spread(sigma, following, level=0.4)[1] == pytest.approx(0.4 * math.sqrt(99 * 0.01))


def test_the_weight_is_the_reports_where_the_noise_is_not_truncated() -> None:
    sigma, following = torch.tensor([0.6, 0.3]).double(), torch.tensor([0.55, 0.2]).double()
    weight = step_weight(sigma, following, step_spread(sigma, following))
    d = sigma - following
    torch.testing.assert_close(weight, torch.sqrt(sigma / (d * (1 - sigma))))
    assert torch.isfinite(step_weight(one(1.0), one(0.994), step_spread(one(1.0), one(0.994)))).all()


# The loss


def test_log_probability_and_divergence_have_their_closed_forms() -> None:
    x, mean, other = (randn(3, 2, 4, 5, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    spread = torch.tensor([0.1, 0.45, 2.0], dtype=torch.float64)
    wide = spread.view(3, 1, 1, 1)
    expected = Normal(mean, wide.expand_as(mean)).log_prob(x).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, spread), expected)
    expected = kl_divergence(Normal(mean, wide.expand_as(mean)), Normal(other, wide.expand_as(mean)))
    torch.testing.assert_close(gaussian_divergence(mean, other, spread), expected.flatten(1).mean(dim=1))


def test_gradients_agree_with_finite_differences() -> None:
    x, reference, velocity, after = (randn(2, 3, 2, seed=s, dtype=torch.float64) for s in (1, 2, 3, 4))
    velocity.requires_grad_()
    sigma, following = torch.tensor([1.0, 0.7]).double(), torch.tensor([0.98, 0.6]).double()
    spread = step_spread(sigma, following)
    weight, advantage = step_weight(sigma, following, spread), torch.tensor([0.7, -1.2]).double()
    old = gaussian_log_prob(after, step_mean(x, velocity, sigma, following, spread), spread).detach()

    def loss(v: Tensor) -> Tensor:
        mean, other = (step_mean(x, y, sigma, following, spread) for y in (v, reference))
        policy = policy_loss(gaussian_log_prob(after, mean, spread), old, advantage, weight)
        return policy + 0.1 * (weight.square() * gaussian_divergence(mean, other, spread)).mean()

    assert torch.autograd.gradcheck(loss, velocity)


def test_gradients_of_the_adapter_agree_with_finite_differences() -> None:
    """Through guidance and a whole network; what drew the sample is held, as in a second update it would be."""
    model = AdaptedDiT(
        make_dit(torch.float64), official_targets("cfg_step_lora", 2), generator=seeded(), rank=2, dtype=torch.float64
    )
    x, after = randn(1, 16, 2, 4, 4, seed=1, dtype=torch.float64), randn(1, 16, 2, 4, 4, seed=2, dtype=torch.float64)
    texts = [randn(1, 4, 32, seed=seed, dtype=torch.float64) for seed in (3, 4)]
    sigma, following = one(0.97), one(0.94)
    spread = step_spread(sigma, following)
    weight = step_weight(sigma, following, spread)

    def mean() -> Tensor:
        cond, uncond = (model(x, sigma * 1000, text) for text in texts)
        return step_mean(x, cfg_zero(cond.double(), uncond.double(), 4.0), sigma, following, spread)

    with torch.no_grad():
        other = mean()
        for p in trained(model).values():
            p += 0.05 * torch.randn(p.shape, generator=seeded(5), dtype=p.dtype)
        old = gaussian_log_prob(after, mean(), spread)

    def loss() -> Tensor:
        policy = policy_loss(gaussian_log_prob(after, mean(), spread), old, one(0.8), weight)
        return policy + 0.1 * (weight.square() * gaussian_divergence(mean(), other, spread)).mean()

    names = ("blocks.0.attn.qkv", "blocks.1.cross_attn.kv_linear", "blocks.1.ffn.w2")
    chosen = [p for name, p in trained(model).items() if name.startswith(names)]
    assert len(chosen) == 6
    check_gradients(loss, chosen, tolerance=1e-5)


def found_for(P: int, G: int, sigma: list[float], following: list[float]) -> tuple[Rollout, Tensor, Tensor]:
    """A rollout of random numbers in fp64, the velocity it had, and the noise of its random steps."""
    shape = (2, 3, 2, 2)
    now, then = torch.tensor(sigma).double(), torch.tensor(following).double()
    spread = step_spread(now, then)
    before, velocity = randn(P, *shape, seed=1, dtype=torch.float64), randn(P, *shape, seed=2, dtype=torch.float64)
    noise = randn(P, G, *shape, seed=3, dtype=torch.float64)
    mean = step_mean(before, velocity, now, then, spread)
    after = mean.unsqueeze(1) + spread.view(P, 1, 1, 1, 1, 1) * noise
    return Rollout(before, after, after, now, then, spread), velocity, noise


def test_the_gradient_is_the_reports_at_every_step() -> None:
    """-(3/2) advantage noise and (9/4) (v - v_ref), per number, for truncated steps as for others."""
    P, G, kl_weight = 3, 4, 0.3
    found, velocity, noise = found_for(P, G, [1.0, 0.97, 0.4], [0.99, 0.95, 0.35])
    advantage = randn(P, G, seed=4, dtype=torch.float64)
    reference = velocity + 0.1 * randn(*velocity.shape, seed=5, dtype=torch.float64)
    velocity.requires_grad_()
    loss, values = grpo_loss(velocity, reference, found, advantage, policy_weight=2.0, kl_weight=kl_weight)
    loss.backward()
    n = velocity[0].numel()
    policy = -1.5 * (advantage.view(P, G, 1, 1, 1, 1) * noise).sum(dim=1) / (P * G * n)
    kl = 2.25 * (velocity.detach() - reference) / (P * n)
    torch.testing.assert_close(velocity.grad, 2.0 * policy + kl_weight * kl)
    assert values["kl"] > 0


def test_advantages_are_by_the_largest_group_deviation() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.4, 0.6]])
    torch.testing.assert_close(advantages(rewards), torch.tensor([[-1.0, 1.0], [-0.2, 0.2]]))
    assert advantages(torch.full((2, 4), 0.3)).eq(0).all()


# Rollouts


def test_a_group_shares_everything_up_to_its_critical_step() -> None:
    P, G, sigmas = 3, 4, base(6)
    noise, step_noise = randn(P, 2, 3, seed=1), randn(P, G, 2, 3, seed=2)
    critical = torch.tensor([0, 2, 1])
    rows = []

    def predict(x: Tensor, sigma: float, prompts: Tensor) -> Tensor:
        rows.append(len(x))
        return -x * sigma + prompts.view(-1, 1, 1) * 0.1

    found = rollout(predict, noise, step_noise, critical, sigmas)
    assert rows == [3, 1 + G + 1, 1 + 2 * G, 3 * G, 3 * G, 3 * G]
    for p in range(P):
        c = int(critical[p])
        prompt, x = torch.full((1,), p), noise[p : p + 1]
        for step in range(c):
            x = x + (sigmas[step] - sigmas[step + 1]) * predict(x, float(sigmas[step]), prompt)
        torch.testing.assert_close(found.before[p : p + 1], x)
        spread = step_spread(sigmas[c : c + 1], sigmas[c + 1 : c + 2])
        mean = step_mean(x, predict(x, float(sigmas[c]), prompt), sigmas[c : c + 1], sigmas[c + 1 : c + 2], spread)
        x = mean + spread * step_noise[p]
        torch.testing.assert_close(found.after[p], x)
        for step in range(c + 1, len(sigmas) - 1):
            velocity = predict(x, float(sigmas[step]), prompt.expand(G))
            x = x + (sigmas[step] - sigmas[step + 1]) * velocity
        torch.testing.assert_close(found.latents[p], x)


# Rewards


def test_built_in_rewards_tell_right_from_wrong() -> None:
    clip = sample_clip(3, 0, object="star", colour="red", motion="moves left", background="black")
    frames = clip.frames.float() / 255
    right = give_rewards(BUILT_IN, frames, "a red star moves left on a black background")
    wrong = give_rewards(BUILT_IN, frames, "a blue ball moves right on a brown background")
    for name in ("object", "colour", "motion", "background", "prompt"):
        assert right[name] > 0.5 > wrong[name]
    assert right["sharpness"] > 2 * give_rewards(["sharpness"], blurred(frames), "")["sharpness"]
    assert give_rewards(["motion"], frames, "a star")["motion"] == 0.0  # it names none


def blurred(frames: Tensor) -> Tensor:
    x = frames.permute(0, 3, 1, 2)
    return torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False).permute(0, 2, 3, 1)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with rewards of its own."""
    (tmp_path / "my_rewards.py").write_text(
        "def bright(frames, prompt):\n    return float(frames.mean())\n\n\n"
        "def broken(frames, prompt):\n    return float('nan')\n\n\n"
        "def failing(frames, prompt):\n    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    load_reward.cache_clear()
    return "my_rewards"


def test_rewards_are_plug_ins(plugin: str) -> None:
    assert give_rewards([f"{plugin}:bright"], torch.full((2, 4, 4, 3), 0.25), "") == {f"{plugin}:bright": 0.25}
    with pytest.raises(InputError, match=r"my_rewards:broken gave nan for 'a ball'"):
        give_rewards([f"{plugin}:broken"], torch.zeros(2, 4, 4, 3), "a ball")
    with pytest.raises(InputError, match=r"my_rewards:failing failed for 'a ball' \(ZeroDivisionError"):
        give_rewards([f"{plugin}:failing"], torch.zeros(2, 4, 4, 3), "a ball")
    with pytest.raises(InputError, match="unknown reward 'beauty'; there are object, colour"):
        load_reward("beauty")
    with pytest.raises(InputError, match="has no ugly"):
        load_reward(f"{plugin}:ugly")
    with pytest.raises(InputError, match="cannot be imported"):
        load_reward("no_such_module:reward")


# The stage


def recipe(checkpoint: Path, **changes: Any) -> Recipe:
    objective = {
        "rewards": {"sharpness": 1.0}, "num_steps": 4, "critical_steps": 2, "group_size": 3, "guidance_scale": 2.0
    } | changes.pop("objective", {})  # fmt: skip
    return Recipe.from_dict(
        {
            "stage": "grpo", "batch_size": 2, "steps": 2, "lr": 3e-3, "log_every": 1, "checkpoint_every": 1,
            "model": {"checkpoint": str(checkpoint), "rank": 2}, "objective": objective, "samples": {"count": 1},
        }
        | changes
    )  # fmt: skip


def train(recipe: Recipe, out: Path) -> Trainer:
    trainer = Trainer(build_stage(recipe), recipe, out, device="cpu")
    trainer.run()
    return trainer


def weights(out: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "model" / "lora" / "grpo_lora.safetensors")


def test_a_run_is_repeatable_resumes_and_may_be_dealt_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = recipe(tiny_checkpoint)
    train(whole, tmp_path / "whole")
    train(recipe(tiny_checkpoint, steps=1), tmp_path / "parts")
    train(whole, tmp_path / "parts")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
    # The largest deviation is that of all groups of a step, however they are dealt out.
    train(recipe(tiny_checkpoint, micro_batch_size=1), tmp_path / "micro")
    three = weights(tmp_path / "micro")
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_up" in name)
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=1e-3, atol=1e-4)


def test_the_result_is_an_adapter_of_the_official_kind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trainer = train(recipe(tiny_checkpoint, sample_every=2), tmp_path)
    stage: Any = trainer.stage
    x, t, text = randn(1, 16, 3, 4, 6), torch.tensor([500.0]), randn(1, 5, 32)
    with torch.no_grad():
        expected = stage.model(x, t, text)
        with stage.model.using(None):
            plain = stage.model(x, t, text)
    dit = stage.checkpoint.load_dit()
    with load_lora(dit, tmp_path / "model" / "lora" / "grpo_lora.safetensors") as handle, torch.no_grad():
        torch.testing.assert_close(dit(x, t, text), expected)
        assert len(handle.report.matched) == 7 * dit.config.depth
    assert not torch.equal(plain, expected)
    assert (tmp_path / "samples" / "clips-00000002.png").is_file()


def test_a_reward_is_learnt(tiny_checkpoint: Path, tmp_path: Path, plugin: str) -> None:
    changes = {"rewards": {f"{plugin}:bright": 1.0}, "guidance_scale": 1.0, "group_size": 4, "num_steps": 3}
    settings = {"steps": 10, "batch_size": 3, "lr": 2e-2, "samples": {"count": 4}, "checkpoint_every": 0}
    stage: Any = train(recipe(tiny_checkpoint, objective=changes, **settings), tmp_path).stage
    after = stage.samples(stage.model)["clips"].double().mean(dim=(1, 2, 3, 4))
    with stage.model.using(None):
        before = stage.samples(stage.model)["clips"].double().mean(dim=(1, 2, 3, 4))
    assert (after > before).all(), (after, before)


def test_prompts_from_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n\na blue star\na ring\n")
    stage: Any = build_stage(recipe(tiny_checkpoint, data={"prompts": str(tmp_path / "prompts.txt")}))
    names = [stage._prompt(step, index) for step in range(3) for index in range(2)]
    assert sorted(names[:3]) == sorted(names[3:]) == ["a blue star", "a red ball", "a ring"]
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(InputError, match="has no prompts"):
        build_stage(recipe(tiny_checkpoint, data={"prompts": str(tmp_path / "prompts.txt")}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"rewards": {}}}, "names no reward"),
        ({"objective": {"rewards": {"beauty": 1.0}}}, "unknown reward"),
        ({"objective": {"critical_steps": 4}}, r"critical_steps must be in \[1, 3\]"),
        ({"objective": {"group_size": 1}}, "at least 2"),
        ({"data": {"prompt": "x"}}, "did you mean prompts"),
    ],
)
def test_wrong_recipes_are_refused(tiny_checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_stage(recipe(tiny_checkpoint, **changes))


def _worker(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = advantages(torch.tensor([[0.0, 1.0]]) * (rank + 1))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()  # gloo may abort a process that leaves while the other is still talking
    dist.destroy_process_group()


def test_the_largest_deviation_is_that_of_all_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(torch.cat([one, two]), torch.tensor([[-0.5, 0.5], [-1.0, 1.0]]))
