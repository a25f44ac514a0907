"""The flow-matching stage: its batches by task, what it learns from, what comes out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from training_toys import Heard

from lcv_core.config import DiTConfig
from lcv_core.errors import InputError
from lcv_core.training import trainer as trainer_module
from lcv_core.training.logs import read_metrics
from lcv_core.training.recipe import Recipe, merge
from lcv_core.training.stage import Place
from lcv_core.training.stages import build_stage
from lcv_core.training.stages.flow import FlowStage, initial_state
from lcv_core.training.trainer import Trainer
from lcv_core.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
CONFIG = {"hidden_size": 64, "depth": 2, "num_heads": 4, "adaln_tembed_dim": 32}
EQUAL = {"t2i": 1, "t2v": 1, "i2v": 1, "continue": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)


def make_recipe(checkpoint: Path, cache: Path, **changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "stage": "flow", "steps": 30, "batch_size": 8, "micro_batch_size": 2, "lr": 3e-3, "ema_decay": 0.9,
        "model": {"checkpoint": str(checkpoint), "config": CONFIG},
        "data": {"procedural": {"count": 12, "num_frames": 9, "height": 32, "width": 48}, "cache": str(cache)},
        "objective": {"mixture": EQUAL, "cond_latents": [1, 2]}, "samples": {"count": 2, "num_steps": 2},
    }  # fmt: skip
    return Recipe.from_dict(merge(base, changes))


def make_stage(checkpoint: Path, cache: Path, *, prepared: bool = True, **changes: Any) -> FlowStage:
    stage = build_stage(make_recipe(checkpoint, cache, **changes))
    assert isinstance(stage, FlowStage)
    if prepared:
        stage.prepare(CPU, lambda _: None)
    return stage


def batch_of(stage: FlowStage, task: str, micro: int = 2) -> dict[str, Any]:
    for step in range(100):
        for number in range(4):
            batch = stage.batch(Place(step, number, range(number * micro, (number + 1) * micro)))
            if batch["task"] == task:
                return batch
    raise AssertionError(task)


def test_tasks_differ_in_their_condition_frames(tiny_checkpoint: Path, cache: Path) -> None:
    stage = make_stage(tiny_checkpoint, cache)
    for task, frames, cond in (("t2i", 1, {0}), ("t2v", 3, {0}), ("i2v", 3, {1}), ("continue", 3, {1, 2})):
        batch = batch_of(stage, task)
        assert batch["latents"].shape == batch["noise"].shape == (2, 16, frames, 4, 6)
        assert batch["num_cond_latents"] in cond and batch["levels"].shape == (2, batch["num_cond_latents"])
        assert ((batch["t"] > 0) & (batch["t"] < 1)).all() and (batch["levels"] <= 0.05).all()
        assert batch["text"].shape == (2, 512, 32) and batch["text_mask"].shape == (2, 512)


def test_a_place_decides_everything(tiny_checkpoint: Path, cache: Path) -> None:
    first, second = (make_stage(tiny_checkpoint, cache) for _ in range(2))
    second.batch(Place(0, 0, range(2)))
    for place in (Place(3, 1, range(2, 4)), Place(7, 3, range(6, 8))):
        a, b = first.batch(place), second.batch(place)
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name
    alone = first.batch(Place(3, 1, range(3, 4)))  # a sample does not know who is beside it
    together = first.batch(Place(3, 1, range(2, 4)))
    for name in ("latents", "noise", "t", "text"):
        assert torch.equal(alone[name][0], together[name][1]), name
    other = make_stage(tiny_checkpoint, cache, seed=1).batch(Place(3, 1, range(2, 4)))
    assert not torch.equal(other["noise"][:, :, :1], together["noise"][:, :, :1])


def test_the_mixture_is_met_and_neighbours_share_a_task(tiny_checkpoint: Path, cache: Path) -> None:
    mixture = {"t2i": 1, "t2v": 5, "i2v": 2, "continue": 0}
    stage = make_stage(tiny_checkpoint, cache, objective={"mixture": mixture})
    tasks = [[stage.batch(Place(step, m, range(m * 2, m * 2 + 2)))["task"] for m in range(4)] for step in range(100)]
    counts = Counter(task for step in tasks for task in step)
    for task, weight in mixture.items():
        assert counts[task] == pytest.approx(400 * weight / 8, abs=25)
    changes = [sum(a != b for a, b in zip(step, [*step[1:], step[0]], strict=True)) for step in tasks]
    assert max(changes) <= 3


def test_every_clip_is_seen_once_an_epoch(tiny_checkpoint: Path, cache: Path) -> None:
    stage = make_stage(tiny_checkpoint, cache)
    names = [
        name
        for step in range(3)
        for m in range(4)
        for name in stage.batch(Place(step, m, range(2 * m, 2 * m + 2)))["names"]
    ]
    assert sorted(Counter(names[:12]).values()) == [1] * 12 and len(names) == 24
    assert names[:12] != names[12:]


def test_clips_of_other_sizes_beside(tiny_checkpoint: Path, cache: Path) -> None:
    """A picture is made, not gone on with, and a short clip keeps a frame to make."""
    also = [{"count": 8, "num_frames": frames, "height": 64, "width": 48} for frames in (1, 5)]
    mixture = {"t2v": 1, "continue": 1, "t2i": 0, "i2v": 0}
    stage = make_stage(tiny_checkpoint, cache, data={"also": also}, objective={"mixture": mixture, "cond_latents": [2]})
    seen = set()
    for step in range(30):
        batch = stage.batch(Place(step, step % 4, range(2)))
        seen.add((batch["task"], tuple(batch["latents"].shape[2:]), batch["num_cond_latents"]))
        loss, _ = stage.loss(stage.model, batch)
        assert torch.isfinite(loss)
    assert seen == {
        ("t2i", (1, 8, 6), 0), ("t2v", (2, 8, 6), 0), ("continue", (2, 8, 6), 1),
        ("t2v", (3, 4, 6), 0), ("continue", (3, 4, 6), 2),
    }  # fmt: skip


def test_dropped_text_is_the_empty_prompt(tiny_checkpoint: Path, cache: Path) -> None:
    stage = make_stage(tiny_checkpoint, cache, objective={"text_dropout": 1.0})
    empty = stage._data[0].texts.rows("")
    batch = batch_of(stage, "t2v")
    assert batch["text_mask"].sum(dim=1).tolist() == [len(empty)] * 2
    assert torch.equal(batch["text"][0, : len(empty)], empty)
    assert batch_of(make_stage(tiny_checkpoint, cache, objective={"text_dropout": 0.0}), "t2v")["text_mask"].sum() > 8


def test_what_stands_for_no_prompt_is_drawn_by_micro_batch(tiny_checkpoint: Path, cache: Path) -> None:
    words = ["", "a red ball"]
    stage = make_stage(tiny_checkpoint, cache, objective={"text_dropout": 1.0, "no_prompt": words})
    lengths = {len(stage._data[0].texts.rows(text)) for text in words}
    found = [stage.batch(Place(step, 0, range(2)))["text_mask"].sum(dim=1).tolist() for step in range(16)]
    assert all(a == b for a, b in found)
    assert {a for a, _ in found} == lengths and len(lengths) == 2


def test_the_shift_is_that_of_the_noise_tokens_or_fixed(tiny_checkpoint: Path, cache: Path) -> None:
    auto, fixed = (make_stage(tiny_checkpoint, cache, objective={"flow_shift": shift}) for shift in ("auto", 4.0))
    place = Place(0, 0, range(2))
    t = auto.batch(place)["t"]  # 18 tokens: not shifted
    assert torch.allclose(fixed.batch(place)["t"], 4 * t / (1 + 3 * t), atol=1e-6)
    assert (auto.flow_shift, fixed.flow_shift) == (1.0, 4.0)


def test_posteriors_are_drawn_anew_each_time(tiny_checkpoint: Path, cache: Path) -> None:
    stage = make_stage(
        tiny_checkpoint,
        cache,
        data={"latents": {"posterior": "sample"}},
        objective={"mixture": {"t2v": 1, "t2i": 0, "i2v": 0, "continue": 0}},
    )
    seen: dict[str, list[torch.Tensor]] = {}
    for step in range(4):
        batch = stage.batch(Place(step, 0, range(8)))
        for name, latents in zip(batch["names"], batch["latents"], strict=True):
            seen.setdefault(name, []).append(latents)
    again = next(values for values in seen.values() if len(values) > 1)
    assert 0 < (again[0] - again[1]).abs().mean() < 0.5


def test_phases_have_their_own_tasks(tiny_checkpoint: Path, cache: Path) -> None:
    phases = [
        {"steps": 3, "objective": {"mixture": {**EQUAL, "t2v": 0, "i2v": 0, "continue": 0}}},
        {"steps": 3, "batch_size": 4},
    ]
    stage = make_stage(tiny_checkpoint, cache, steps=0, phases=phases)
    assert {stage.batch(Place(step, m, range(2)))["task"] for step in range(3) for m in range(4)} == {"t2i"}
    assert {stage.batch(Place(step, m, range(2)))["task"] for step in range(3, 6) for m in range(2)} - {"t2i"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_shows_and_comes_out_whole(
    tiny_checkpoint: Path, cache: Path, tmp_path: Path, precision: str
) -> None:
    recipe = make_recipe(tiny_checkpoint, cache, precision=precision, sample_every=30, export_precision=precision)
    heard = Heard()
    assert Trainer(build_stage(recipe), recipe, tmp_path, device="cpu", on_event=heard).run().finished
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert losses[-1] < 0.75 * losses[0]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        f"{task}-00000030.png" for task in ("continue", "i2v", "t2i", "t2v")
    ]
    assert any("a step takes about" in message for message in heard.messages("note"))
    made = open_checkpoint(tmp_path / "model")
    assert made.missing == () and made.flow_shift == 1.0 and made.native.num_frames == 9
    dit = made.load_dit()
    assert dit.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert dit.config == DiTConfig(caption_channels=32, **CONFIG)
    made.load_vae(), made.load_text_encoder()


def test_a_run_starts_from_another(tiny_checkpoint: Path, cache: Path) -> None:
    recipe = make_recipe(tiny_checkpoint, cache)
    official = open_checkpoint(tiny_checkpoint).load_dit()
    for start in ("checkpoint", str(tiny_checkpoint)):
        model = {"checkpoint": str(tiny_checkpoint), "start": start}
        stage = build_stage(dataclasses.replace(recipe, model=model))
        for name, p in stage.model.named_parameters():
            assert torch.equal(p, official.get_parameter(name)) and p.requires_grad


def test_a_random_start_changes_nothing_yet(tiny_checkpoint: Path, cache: Path) -> None:
    stage = make_stage(tiny_checkpoint, cache, prepared=False)
    out = stage.model(torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 8, 32))
    assert (out == 0).all()
    state = initial_state(stage.config, 0)
    assert all(state[name].std() > 0 for name in ("blocks.0.attn.qkv.weight", "blocks.1.ffn.w2.weight"))
    assert not torch.equal(state["x_embedder.proj.weight"], initial_state(stage.config, 1)["x_embedder.proj.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"mixture": {"v2v": 1}}}, "unknown key objective.mixture.v2v"),
        ({"objective": {"mixture": dict.fromkeys(EQUAL, 0)}}, "objective.mixture must have weights"),
        ({"objective": {"cond_latents": [3]}}, r"cond_latents must be in \[1, 2\] for clips of 9 frames \(3 latents\)"),
        ({"objective": {"text_dropout": 2}}, "objective.text_dropout must be in"),
        ({"objective": {"no_prompt": []}}, "objective.no_prompt must have a text"),
        ({"objective": {"flow_shift": "big"}}, "objective.flow_shift must be a number"),
        ({"objective": {"lr": 2}}, "unknown key objective.lr"),
        ({"data": {"procedural": {"num_frames": 10}}}, "num_frames must be 4k"),
        ({"data": {"procedural": {"num_frames": 1}}}, "need clips of at least 5 frames"),
        ({"data": {"procedural": {"heigth": 32}}}, "unknown key data.procedural.heigth; did you mean height"),
        ({"data": {"folder": {"path": "x"}}}, "data must have either procedural .* or folder"),
        ({"model": {"config": {"width": 3}}}, "unknown key model.config.width"),
        ({"model": {"config": {"num_heads": 3}}}, "not divisible by num_heads"),
        ({"model": {"checkpoint": "/nowhere"}}, "/nowhere does not exist"),
        ({"model": {"start": "checkpoint"}}, "model.config is for a random start"),
        ({"samples": {"steps": 3}}, "unknown key samples.steps; did you mean num_steps"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(
    tiny_checkpoint: Path, cache: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        make_stage(tiny_checkpoint, cache, prepared=False, **changes)


def test_an_unknown_stage_lists_the_known(tiny_checkpoint: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"unknown stage 'flaw'; there are: .*flow"):
        build_stage(make_recipe(tiny_checkpoint, cache, stage="flaw"))
