"""Distillation: its targets against closed forms, the stage in the trainer."""

from __future__ import annotations

import copy
import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import check_gradients
from safetensors.torch import load_file
from tiny_models import make_dit, randn, seeded
from torch import Tensor

from lcv_core import schedule as schedules
from lcv_core.denoise import Guidance, denoise, model_output
from lcv_core.errors import InputError
from lcv_core.schedule import euler_step
from lcv_core.text.encoder import TextStates
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.distillation import consistent_velocity, guided, levels, pseudo_huber
from lcv_core.training.recipe import Recipe, load_recipe
from lcv_core.training.stage import Place
from lcv_core.training.stages import build_stage
from lcv_core.training.stages.distill import DistillStage
from lcv_core.training.trainer import Trainer
from lcv_core.weights.lora import load_lora
from lcv_core.weights.lora_keys import official_names, official_targets

CLIPS = {"count": 4, "num_frames": 9, "height": 32, "width": 48}
STD = 0.7  # of the data of the Gaussian toy


def toy(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 - noise | x] where x0 is normal with mean 0, exactly."""
    t = t.double().view(-1, *[1] * (x.ndim - 1))
    return ((1 - t) * STD**2 - t) / ((1 - t) ** 2 * STD**2 + t**2) * x


def follow(velocity: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """Sampling as `denoise` does it."""
    for sigma, following in itertools.pairwise(sigmas.double()):
        x = euler_step(x, model_output(velocity(x, sigma.expand(len(x)))), sigma, following)
    return x


def exact_student(num_steps: int, shift: float) -> Any:
    """The velocity that leads from each level to its segment's end along the teacher's 50 steps; at 0 it is 0."""
    grid = schedules.distilled(50, flow_shift=shift).double()
    ends = levels(num_steps, shift).end.double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for b in t.nonzero().flatten().tolist():
            i = int((grid - t[b].double()).abs().argmin())
            last = int((grid - ends[i]).abs().argmin())
            end = follow(toy, x[b : b + 1], grid[i : last + 1])
            out[b] = (end[0] - x[b]) / (grid[i] - ends[i])
        return out

    return velocity


@pytest.mark.parametrize("num_steps, shift", [(1, 12.0), (4, 1.4), (8, 12.0), (12, 3.0), (16, 12.0), (50, 12.0)])
def test_segments_end_where_the_steps_do(num_steps: int, shift: float) -> None:
    grid, steps = levels(num_steps, shift), schedules.distilled(num_steps, flow_shift=shift)
    assert torch.equal(grid.level, schedules.distilled(50, flow_shift=shift)[:-1])
    assert torch.equal(grid.following[:-1], grid.level[1:]) and grid.following[-1] == 0
    for t, s, end in zip(*(values.tolist() for values in (grid.level, grid.following, grid.end)), strict=True):
        assert end == max(step for step in steps.tolist() if step < t) and end <= s < t


@pytest.mark.parametrize("num_steps", [1, 3, 8, 16, 50])
def test_the_exact_student_has_no_error_and_lands_where_the_teacher_does(num_steps: int) -> None:
    student = exact_student(num_steps, 12.0)
    index = torch.arange(50)
    x = randn(50, 3, 2, 2, 2, dtype=torch.float64)
    grid = levels(num_steps, 12.0)
    target = consistent_velocity(toy, student, x, index, grid)
    torch.testing.assert_close(student(x, grid.level), target, rtol=1e-5, atol=1e-6)
    start = randn(2, 3, 2, 2, 2, seed=1, dtype=torch.float64)
    expected = follow(toy, start, schedules.distilled(50))
    torch.testing.assert_close(follow(student, start, schedules.distilled(num_steps)), expected, rtol=1e-5, atol=1e-6)


def test_why_segments_end_where_the_steps_do() -> None:
    """Led to 0 in all its steps, as a consistency model of one segment says, a sample spreads too far."""
    start = randn(1, 3, 2, 2, 2, dtype=torch.float64)
    expected = follow(toy, start, schedules.distilled(50))
    ratio = follow(exact_student(1, 12.0), start, schedules.distilled(16)) / expected
    assert ratio.min() > 1.3
    undistilled = follow(toy, start, schedules.distilled(16)) / expected
    assert undistilled.max() < 0.7


@pytest.mark.parametrize("num_steps", [1, 8, 16, 50])
def test_levels_are_drawn_by_halves(num_steps: int) -> None:
    grid = levels(num_steps, 12.0)
    drawn = grid.index(torch.arange(200_000) / 200_000).bincount(minlength=50) / 200_000
    assert float(drawn.min()) > 0.5 / 50 and float(drawn.sum()) == pytest.approx(1.0)
    for end in grid.end.unique():
        inside = grid.end == end
        length = float(grid.level[inside].max() - end)
        assert float(drawn[inside].sum()) == pytest.approx(0.01 * int(inside.sum()) + 0.5 * length, abs=1e-3)


def test_condition_frames_stay_on_the_way() -> None:
    seen: list[Tensor] = []

    def target(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return toy(x, t)

    x = randn(2, 3, 4, 2, 2, dtype=torch.float64)
    consistent_velocity(toy, target, x, torch.tensor([0, 40]), levels(4, 3.0), num_cond_latents=2)
    assert torch.equal(seen[0][:, :, :2], x[:, :, :2]) and not torch.equal(seen[0][:, :, 2:], x[:, :, 2:])


def test_pseudo_huber() -> None:
    small, large = torch.tensor(1e-8, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64)
    assert float(pseudo_huber(small, 0.03)) == pytest.approx(1e-8 / 0.06, rel=1e-4)
    assert float(pseudo_huber(large, 0.03)) == pytest.approx(3.0, rel=0.02) and pseudo_huber(large * 0, 0.03) == 0


# The stage


def recipe(checkpoint: Path, cache: Path, method: str, **changes: Any) -> Recipe:
    objective = {"method": method, "mixture": {"t2v": 1, "i2v": 1, "continue": 1}, "cond_latents": [2],
                 "text_dropout": 0.0, "cond_noise": 0.05, "weight_floor": 1.0}  # fmt: skip
    data: dict[str, Any] = {
        "stage": "distill", "steps": 3, "batch_size": 2, "lr": 1e-2, "checkpoint_every": 1, "keep": 9,
        "model": {"checkpoint": checkpoint, "rank": 4},
        "data": {"procedural": CLIPS, "cache": cache},
        "samples": {"count": 1, "num_steps": 2},
    }  # fmt: skip
    return Recipe.from_dict(data | changes | {"objective": objective | changes.get("objective", {})})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def prepared(recipe: Recipe) -> DistillStage:
    stage = build_stage(recipe)
    assert isinstance(stage, DistillStage)
    stage.prepare(torch.device("cpu"), lambda _: None)
    return stage


@functools.cache
def stage_of(checkpoint: Path, cache: Path, method: str) -> DistillStage:
    """Not to be changed."""
    return prepared(recipe(checkpoint, cache, method, objective={"cond_noise": 0.0}))


def batch_of(stage: DistillStage, task: str) -> dict[str, Any]:
    return next(b for step in range(60) if (b := stage.batch(Place(step, 0, range(2))))["task"] == task)


@pytest.mark.parametrize("task, n_c", [("t2v", 0), ("i2v", 1), ("continue", 2)])
def test_guidance_is_learnt_as_the_pipelines_do_it(tiny_checkpoint: Path, cache: Path, task: str, n_c: int) -> None:
    """The target is what one step of `denoise` with guidance moves along."""
    stage = stage_of(tiny_checkpoint, cache, "guidance")
    batch = batch_of(stage, task)
    x0, noise, t = batch["latents"][:1], batch["noise"][:1], batch["t"][:1]
    x = (1 - t) * x0 + t * noise
    x[:, :, :n_c] = x0[:, :, :n_c]
    first = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    target = stage._target(stage._distillations[0], first, x)
    text = TextStates(batch["text"][:1], batch["text_mask"][:1])
    negative = TextStates(batch["negative"], batch["negative_mask"])
    with stage.adapted.using(None):
        moved = denoise(
            stage.model, x, torch.tensor([float(t), 0.0]), text=text, guidance=Guidance(4.0, negative),
            num_cond_latents=n_c,
        )  # fmt: skip
    assert batch["num_cond_latents"] == n_c
    torch.testing.assert_close((moved - x)[:, :, n_c:], float(t) * target[:, :, n_c:], rtol=1e-3, atol=1e-4)


def test_levels_of_a_batch_are_those_of_the_distilled_schedule(tiny_checkpoint: Path, cache: Path) -> None:
    stage = stage_of(tiny_checkpoint, cache, "consistency")
    batch = stage.batch(Place(2, 0, range(50)))
    grid = schedules.distilled(50, flow_shift=open_shift(tiny_checkpoint))
    assert torch.equal(batch["t"], grid[batch["index"]]) and len(set(batch["index"].tolist())) > 30
    guidance = prepared(recipe(tiny_checkpoint, cache, "guidance", objective={"flow_shift": 1.0}))
    t = guidance.batch(Place(2, 0, range(50)))["t"]
    assert 0.4 < float(t.mean()) < 0.6


def open_shift(checkpoint: Path) -> float:
    from lcv_core.weights.checkpoint import open_checkpoint

    return open_checkpoint(checkpoint).flow_shift


@pytest.mark.parametrize("method", ["guidance", "consistency"])
def test_a_batch_is_a_function_of_its_place(tiny_checkpoint: Path, cache: Path, method: str) -> None:
    one = stage_of(tiny_checkpoint, cache, method)
    other = prepared(recipe(tiny_checkpoint, cache, method, objective={"cond_noise": 0.0}))
    other.batch(Place(0, 0, range(2)))
    a, b = one.batch(Place(5, 0, range(2))), other.batch(Place(5, 0, range(2)))
    assert a.keys() == b.keys() and all(str(value) == str(b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    "method, distance", [("guidance", "l2"), ("consistency", "l2"), ("consistency", "pseudo_huber")]
)
def test_it_learns_a_fixed_batch(tiny_checkpoint: Path, cache: Path, method: str, distance: str) -> None:
    objective = {"distance": distance, "average_decay": 0.5}
    model = {"checkpoint": tiny_checkpoint, "rank": 4}
    if method == "consistency":
        model["adapter"] = tiny_checkpoint / "lora" / "cfg_step_lora.safetensors"
    stage = prepared(recipe(tiny_checkpoint, cache, method, model=model, objective=objective))
    batch = stage.batch(Place(1, 0, range(2)))
    optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(1, 16):
        stage.explore(stage.model, [batch | {"step": step}])
        optimizer.zero_grad()
        loss, _ = stage.loss(stage.model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_against_differences(tiny_checkpoint: Path, cache: Path) -> None:
    """Through the student alone: the target is worked out without gradients, and does not move with it."""
    for method in ("guidance", "consistency"):
        stage = copy.copy(stage_of(tiny_checkpoint, cache, method))
        model = AdaptedDiT(
            make_dit(torch.float64), official_targets("cfg_step_lora", 2), rank=2, generator=seeded(1),
            dtype=torch.float64,
        )  # fmt: skip
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p += 0.1 * randn(*p.shape, seed=i, dtype=torch.float64)
        model.keep("average")
        stage.model = model
        stage.config = model.config
        batch = batch_of(stage, "i2v")
        for name in ("latents", "noise", "levels", "t", "weight"):
            batch[name] = batch[name].double()
        for name in ("text", "negative"):
            batch[name] = randn(len(batch[name]), *batch[name].shape[1:], dtype=torch.float64)
        check_gradients(lambda s=stage, b=batch, m=model: s.loss(m, b)[0], parameters)


def test_two_stages_make_one_file(tmp_path: Path, tiny_checkpoint: Path, cache: Path) -> None:
    """Guidance, then steps from its file; the run is interrupted and goes on to the same bits."""
    guidance = recipe(tiny_checkpoint, cache, "guidance", steps=2)
    Trainer(build_stage(guidance), guidance, tmp_path / "guidance", device="cpu").run()
    first = tmp_path / "guidance" / "model" / "lora" / "cfg_step_lora.safetensors"
    steps = recipe(
        tiny_checkpoint, cache, "consistency", steps=0, sample_every=4,
        model={"checkpoint": tiny_checkpoint, "rank": 4, "adapter": first},
        phases=[{"steps": 2}, {"steps": 2, "objective": {"num_steps": 8}}],
    )  # fmt: skip
    out = tmp_path / "steps"
    trainer = Trainer(build_stage(steps), steps, out, device="cpu")
    trainer.run()
    file = out / "model" / "lora" / "cfg_step_lora.safetensors"
    whole = load_file(file)
    stage = trainer.stage
    assert isinstance(stage, DistillStage) and stage.teacher == "fixed"
    fixed = stage.adapted.get_submodule("blocks.1.attn.proj.branches.fixed")
    expected = load_file(first)[official_names("blocks.1.attn.proj", 1)[1][0]]
    assert torch.equal(fixed.up, expected)  # type: ignore[arg-type]
    assert any(not torch.equal(value, load_file(first)[name]) for name, value in whole.items())
    with load_lora(make_dit(), file) as handle:
        assert handle.report.unmatched == ()
    for step in (2, 3, 4):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    again = Trainer(build_stage(steps), steps, out, device="cpu")
    assert again.step == 1
    again.run()
    assert all(torch.equal(value, whole[name]) for name, value in load_file(file).items())


def test_the_guided_velocity_of_a_teacher_that_agrees_with_itself() -> None:
    v = randn(2, 3, 4, 2, 2)
    torch.testing.assert_close(guided(v, v, 4.0, 1), v)
    torch.testing.assert_close(guided(v, 0.5 * v, 4.0, 1), v)


@pytest.mark.parametrize(
    "objective, message",
    [
        ({"num_steps": 51}, r"objective.num_steps must be in \[1, 50\], got 51"),
        ({"average_decay": 1.0}, "objective.average_decay"),
        ({"method": "magic"}, "objective.method must be 'guidance' or 'consistency'"),
        ({"guidance": 3}, "unknown key objective.guidance"),
        ({"guidance_scale": 0.5}, "objective.guidance_scale must be at least 1"),
    ],
)
def test_wrong_recipes(tiny_checkpoint: Path, cache: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_stage(recipe(tiny_checkpoint, cache, "guidance", objective=objective))


@pytest.mark.parametrize("name", ["mini/cfg_distill", "mini/step_distill"])
def test_shipped_recipes(tiny_checkpoint: Path, name: str) -> None:
    how = load_recipe(name, [f"model.checkpoint={tiny_checkpoint}", "model.adapter=null"])
    assert isinstance(build_stage(how), DistillStage)
