"""An adapter of one's own: the stage in the trainer, from a recipe to a file that the loaders take."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.live_bytes import LiveBytes
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.events import Event
from lcv_core.training.memory import step_bytes, whole_step_bytes
from lcv_core.training.optimizers import repeated_blocks, trained
from lcv_core.training.recipe import Recipe, load_recipe
from lcv_core.training.stage import Place
from lcv_core.training.stages import build_stage
from lcv_core.training.stages.lora import LoRAStage
from lcv_core.training.trainer import Trainer
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.lora import load_lora
from lcv_core.weights.lora_keys import official_targets

CLIPS = {"count": 6, "num_frames": 9, "height": 32, "width": 48}


def recipe(checkpoint: Path, cache: Path, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "stage": "lora", "steps": 3, "batch_size": 2, "lr": 1e-2,
        "model": {"checkpoint": checkpoint, "rank": 4},
        "data": {"procedural": CLIPS, "cache": cache},
        "objective": {"mixture": {"t2v": 1, "i2v": 1}, "flow_shift": 2.0},
        "samples": {"count": 1, "num_steps": 2},
    }  # fmt: skip
    return Recipe.from_dict(data | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def prepared(recipe: Recipe) -> LoRAStage:
    stage = build_stage(recipe)
    assert isinstance(stage, LoRAStage)
    stage.prepare(torch.device("cpu"), lambda _: None)
    return stage


def test_a_run_makes_a_file_that_changes_the_model(tmp_path: Path, tiny_checkpoint: Path, cache: Path) -> None:
    events: list[Event] = []
    how = recipe(tiny_checkpoint, cache, sample_every=3, recompute="blocks")
    trainer = Trainer(build_stage(how), how, tmp_path / "run", device="cpu", on_event=events.append)
    assert trainer.run().finished
    file = tmp_path / "run" / "model" / "lora" / "user_lora.safetensors"
    dit = open_checkpoint(tiny_checkpoint).load_dit()
    with load_lora(dit, file) as handle:
        assert (handle.report.dialect, handle.report.ranks, handle.report.unmatched) == ("official", (4,), ())
    assert all(up.any() for name, up in load_file(file).items() if "lora_up" in name)
    # The frozen model is as it is on disk, and no checkpoint of the run holds it.
    model = trainer.stage.model
    assert isinstance(model, AdaptedDiT)
    for name, weight in dit.named_parameters():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(model.get_parameter(f"{module}.base.{leaf}" if module in model.adapted else name), weight)
    saved = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "step-00000003").iterdir())
    assert saved < 4 * file.stat().st_size + 100_000
    assert any(e.kind == "note" and "frozen weights" in e.message for e in events)
    assert [path.name[:3] for path in sorted((tmp_path / "run" / "samples").iterdir())] == ["i2v", "t2v"]


def test_a_batch_is_a_function_of_its_place(tiny_checkpoint: Path, cache: Path) -> None:
    one, other = (prepared(recipe(tiny_checkpoint, cache)) for _ in range(2))
    other.batch(Place(0, 0, range(2)))
    a, b = one.batch(Place(5, 0, range(2))), other.batch(Place(5, 0, range(2)))
    assert a.keys() == b.keys() and all(str(value) == str(b[name]) for name, value in a.items())
    assert not torch.equal(a["noise"], other.batch(Place(6, 0, range(2)))["noise"])


def test_it_learns_a_fixed_batch(tiny_checkpoint: Path, cache: Path) -> None:
    stage = prepared(recipe(tiny_checkpoint, cache))
    batch = stage.batch(Place(0, 0, range(2)))
    optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss, _ = stage.loss(stage.model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_it_goes_on_from_a_file(tmp_path: Path, tiny_checkpoint: Path, cache: Path) -> None:
    adapter = tiny_checkpoint / "lora" / "cfg_step_lora.safetensors"
    model = {"checkpoint": tiny_checkpoint, "adapter": adapter}
    stage = build_stage(recipe(tiny_checkpoint, cache, model=model | {"rank": 4}))
    stage.export(stage.model, tmp_path)
    exported = load_file(tmp_path / "lora" / "user_lora.safetensors")
    assert all(torch.equal(t, exported[name]) for name, t in load_file(adapter).items())
    with pytest.raises(InputError, match="set rank to 4"):
        build_stage(recipe(tiny_checkpoint, cache, model=model))


@pytest.mark.parametrize(
    "model, message",
    [({"rank": 0}, "model.rank must be at least 1"), ({"start": "random"}, "unknown key model.start")],
)
def test_wrong_recipes(tiny_checkpoint: Path, cache: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_stage(recipe(tiny_checkpoint, cache, model={"checkpoint": tiny_checkpoint, **model}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_the_memory_that_is_stated_is_what_is_alive(dtype: torch.dtype, recompute: str) -> None:
    config = DiTConfig(hidden_size=64, depth=4, num_heads=4, caption_channels=32, adaln_tembed_dim=32)
    model = AdaptedDiT(
        LongCatDiT(config, dtype=dtype), official_targets("refinement_lora", 4), rank=4, generator=torch.Generator()
    )
    for p in trained(model).values():
        p.grad = torch.zeros_like(p)
    if recompute == "blocks":
        for block in repeated_blocks(model).values():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    x, text = torch.randn(2, 16, 3, 16, 24), torch.randn(2, 16, 32).to(dtype)
    with torch.no_grad():
        model(x, torch.ones(2), text)  # the rope table
    with LiveBytes() as live:
        model(x, torch.ones(2), text).square().mean().backward()
    stated = step_bytes(
        config, (2, 3, 16, 24), file="refinement_lora", rank=4, text_length=16, dtype=dtype,
        recompute=recompute == "blocks",
    )  # fmt: skip
    assert live.peak == pytest.approx(stated.kept + stated.working, rel=0.1)
    assert stated.learning == 16 * sum(p.numel() for p in trained(model).values())
    assert stated.frozen == sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def test_the_real_recipe_is_one(tmp_path: Path) -> None:
    how = load_recipe("longcat_lora")
    assert (how.stage, how.recompute, how.precision) == ("lora", "blocks", "bf16")
    stated = step_bytes(DiTConfig(), (1, 13, 60, 104), file="cfg_step_lora", rank=how.model["rank"], average=True)
    assert 40e9 < stated.total < 48e9
    assert whole_step_bytes(DiTConfig(), (1, 13, 60, 104), dtype=torch.bfloat16).total > 5 * stated.total
