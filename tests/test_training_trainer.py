"""The loop: resuming, accumulation, averages, NaN, Ctrl-C and a full disk."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import Heard, ToyNetwork, ToyStage, state_of, toy_recipe, toy_trainer

from lcv_core.errors import CheckpointError, InputError, NumericalError
from lcv_core.training import checkpoints, optimizers
from lcv_core.training import trainer as trainer_module
from lcv_core.training.ema import EMA
from lcv_core.training.logs import read_metrics
from lcv_core.training.trainer import Trainer, skeleton


def assert_same(a: Trainer, b: Trainer) -> None:
    mine, other = state_of(a), state_of(b)
    assert mine.keys() == other.keys() and len(mine) > 20
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib takes longer than all the training here; one test draws."""
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "weight_decay": 0.1}, {"ema_decay": 0.0}])
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = toy_trainer(tmp_path / "whole", **changes)
    assert whole.run().finished
    assert toy_trainer(tmp_path / "parts", **{**changes, "steps": 5}).run().step == 5
    parts = toy_trainer(tmp_path / "parts", **changes)
    assert parts.step == 5
    stage = parts.stage
    assert isinstance(stage, ToyStage)
    parts.run()
    assert [(p.step, p.micro) for p in stage.seen] == [(s, m) for s in range(5, 12) for m in range(4)]
    assert_same(whole, parts)
    rows = [
        [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_s")} for row in read_metrics(file)]
        for file in (tmp_path / "whole/metrics.csv", tmp_path / "parts/metrics.csv")
    ]
    assert rows[0][-1] == rows[1][-1] and [row["step"] for row in rows[1]] == [4, 5, 8, 12]


def test_the_loss_falls(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=30, log_every=10, lr=2e-2).run()
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert len(losses) == 3 and losses[-1] < 0.5 * losses[0]


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """Plain gradient descent would be equal to rounding; Adam's first step divides by a gradient's size, so compare
    the gradients' own moments."""
    whole, parts = (toy_trainer(tmp_path / str(n), steps=1, micro_batch_size=n) for n in (16, 4))
    whole.run(), parts.run()
    mine, other = state_of(whole), state_of(parts)
    for name in mine:
        if name.startswith("exp_avg/"):
            assert torch.allclose(mine[name], other[name], atol=1e-7), name


def test_what_is_written(tmp_path: Path) -> None:
    heard = Heard()
    trainer = toy_trainer(tmp_path, steps=8, checkpoint_every=3, keep=2, sample_every=4, on_event=heard)
    trainer.run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["grey-00000004.png", "grey-00000008.png"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [4, 8]
    assert list((tmp_path / "tensorboard").iterdir())
    folder = tmp_path / "checkpoints/step-00000008"
    note = json.loads((folder / "checkpoint.json").read_text())
    assert note["step"] == 8 and note["recipe"]["lr"] == 1e-2
    suffixes = {file.suffix for file in folder.iterdir()}
    assert suffixes == {".json", ".safetensors"}
    assert set(load_file(folder / "weights-00001.safetensors")) == set(trainer._params)
    exported = torch.load(tmp_path / "model/toy.pt", weights_only=True)
    for name, value in trainer._ema.average.items():  # the average comes out, not the last weights
        assert torch.equal(exported[name], value) and not torch.equal(value, trainer._params[name])
    for kind, count in {"step": 8, "metrics": 2, "saved": 3, "samples": 2, "exported": 1}.items():
        assert heard.kinds().count(kind) == count, kind


def test_curves_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    toy_trainer(tmp_path).run()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_can_be_exported_at_any_time_and_somewhere_else(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", steps=4).run()
    again = toy_trainer(tmp_path / "run", steps=12)
    again.export(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/toy.pt").is_file() and again.step == 4


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    toy_trainer(tmp_path).run()
    again = toy_trainer(tmp_path)
    assert again.run().finished and isinstance(again.stage, ToyStage) and again.stage.seen == []


def test_a_run_is_gone_on_with_by_a_recipe_that_fits(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=4).run()
    heard = Heard()
    toy_trainer(tmp_path, steps=6, lr=1e-3, log_every=1, on_event=heard)
    assert any("another lr" in message for message in heard.messages("note"))
    assert not any("steps" in message or "log_every" in message for message in heard.messages("note")[:1])
    for changes, words in (
        ({"optimizer": "muon"}, "another optimizer"),
        ({"model": {"depth": 3}}, "another model"),
        ({"steps": 3}, "at step 4 already"),
    ):
        with pytest.raises(InputError, match=words):
            toy_trainer(tmp_path, **changes)


def test_an_average_may_begin_later(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=4, ema_decay=0.0).run()
    later = toy_trainer(tmp_path, steps=8)
    for name, value in later._ema.average.items():
        assert torch.equal(value, later._params[name])
    later.run()


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=8, checkpoint_every=4).run()
    file = tmp_path / "checkpoints/step-00000008/optimizer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"damaged or missing.*the checkpoint before it"):
        toy_trainer(tmp_path)


def test_nan_is_skipped_or_stops_as_the_recipe_says(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"step 4: loss nan.*samples sample 0, sample 1") as error:
        toy_trainer(tmp_path / "stop", broken=(3,)).run()
    assert "on_nan: skip" in str(error.value)
    stopped = toy_trainer(tmp_path / "stop", broken=(3,))
    assert stopped.step == 3  # as it was before, kept

    heard = Heard()
    skipping = toy_trainer(tmp_path / "skip", broken=(3,), on_nan="skip", on_event=heard)
    assert skipping.run().finished
    assert len(heard.messages("nan")) == 1 and "step 4" in heard.messages("nan")[0]
    assert all(torch.isfinite(value).all() for value in state_of(skipping).values())
    assert read_metrics(tmp_path / "skip/metrics.csv")[0]["skipped"] == 0.25
    clean = toy_trainer(tmp_path / "clean")
    clean.run()
    assert not torch.equal(state_of(clean)["first.weight"], state_of(skipping)["first.weight"])


def test_skipping_for_ever_is_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 3)
    with pytest.raises(NumericalError, match=r"step 5.*; 3 steps in a row"):
        toy_trainer(tmp_path, broken=tuple(range(2, 12)), on_nan="skip").run()


def test_stop_saves_and_ends(tmp_path: Path) -> None:
    whole = toy_trainer(tmp_path / "whole")
    whole.run()

    def press(event: Any) -> None:
        if event.kind == "step" and event.done == 5:
            trainer.stop()

    trainer = toy_trainer(tmp_path / "stopped", on_event=press)
    outcome = trainer.run()
    assert (outcome.step, outcome.finished) == (6, False)
    assert not (tmp_path / "stopped/model").exists()
    resumed = toy_trainer(tmp_path / "stopped")
    assert resumed.step == 6
    resumed.run()
    assert_same(whole, resumed)


@pytest.mark.parametrize("when", ["weights", "optimizer", "checkpoint.json"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    toy_trainer(tmp_path, steps=4).run()
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}

    def write(path: Path, data: bytes) -> None:
        if when in path.name:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(checkpoints, "_write", write)
    with pytest.raises(InputError, match=r"no room left on the disk for .*step-00000012"):
        toy_trainer(tmp_path).run()
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    assert toy_trainer(tmp_path).step == 4


def test_a_killed_write_is_cleaned_up(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=4).run()
    leftover = tmp_path / "checkpoints/.step-00000008.0123abcd.part"
    leftover.mkdir()
    (leftover / "weights-00001.safetensors").write_bytes(b"half")
    toy_trainer(tmp_path)
    assert not leftover.exists()


def test_what_is_in_a_checkpoint_is_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 1000)
    first = toy_trainer(tmp_path, steps=4)
    first.run()
    assert len(list((tmp_path / "checkpoints/step-00000004").glob("weights-*"))) > 1
    assert_same(first, toy_trainer(tmp_path))


def test_batches_are_shared_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_resume", lambda _: None)
    trainer = toy_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    with pytest.raises(InputError, match="makes 4, which 3 processes cannot share evenly"):
        trainer._deal_out()


def test_muon_steps_are_orthogonal_and_as_long_as_adamws() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 4, 3, 3))
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizers.Muon([weight], lr=0.1, weight_decay=0.0).step()
    moved = (before - weight.detach()).flatten(1)  # [16, 36]
    assert moved.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)
    singular = torch.linalg.svdvals(moved) / (0.1 * 0.2 * 6)
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = ToyNetwork()
    adamw, muon = optimizers.build_optimizers(model, toy_recipe(optimizer="muon", weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for g in muon.param_groups for p in g["params"]] == ["blocks.0.0.weight", "blocks.1.0.weight"]
    decaying, plain = adamw.param_groups
    assert [names[id(p)] for p in decaying["params"]] == ["first.weight", "last.weight"]
    assert decaying["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 4


def test_the_learning_rate_follows_the_recipe(tmp_path: Path) -> None:
    toy_trainer(tmp_path, warmup=3, lr_schedule="linear", log_every=1).run()
    recipe = toy_recipe(warmup=3, lr_schedule="linear")
    rates = [row["lr"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert rates == pytest.approx([recipe.lr_at(step) for step in range(12)], rel=1e-5)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, steps=1, grad_clip=1e-3)
    trainer.run()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in trainer._params.values() if p.grad is not None))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert read_metrics(tmp_path / "metrics.csv")[0]["grad_norm"] > 0.1  # as it was before


def test_the_average_against_its_recurrence() -> None:
    p = nn.Parameter(torch.zeros(3))
    ema, expected = EMA({"p": p}, 0.9), torch.zeros(3)
    for step in range(40):
        with torch.no_grad():
            p.add_(1.0)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach()
    assert torch.allclose(ema.average["p"], expected)
    kept, average = p.detach().clone(), ema.average["p"].clone()
    with ema.applied():
        assert torch.equal(p, average)
    assert torch.equal(p, kept) and torch.equal(ema.average["p"], average)


def test_a_skeleton_copies_no_values() -> None:
    model = ToyNetwork()
    model.register_buffer("table", torch.arange(3.0), persistent=False)
    copy = skeleton(model)
    assert all(p.is_meta for p in copy.parameters()) and copy.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(copy.table, model.table) and not any(p.is_meta for p in model.parameters())  # type: ignore[arg-type]


def test_trained_parameters_have_to_be_fp32(tmp_path: Path) -> None:
    recipe = toy_recipe()
    stage = ToyStage(recipe)
    stage.model.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"first\.weight is in torch\.bfloat16"):
        Trainer(stage, recipe, tmp_path, device="cpu")
    stage.model.float().requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        Trainer(stage, recipe, tmp_path, device="cpu")


@pytest.mark.parametrize("how", ["recompute", pytest.param("compile", marks=pytest.mark.slow)])
def test_blocks_may_be_recomputed_or_compiled(tmp_path: Path, how: str) -> None:
    plain, other = toy_trainer(tmp_path / "a"), toy_trainer(tmp_path / "b", **{how: "blocks"})
    plain.run(), other.run()
    mine, theirs = state_of(plain), state_of(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], atol=1e-5), name
