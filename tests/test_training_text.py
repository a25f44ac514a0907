"""The text stage: labels of damaged captions, the loss over real tokens, what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradients
from tiny_models import randn

from lcv_core.errors import InputError
from lcv_core.training import trainer as trainer_module
from lcv_core.training.data.grammar import ATTRIBUTES, is_held_back, parse
from lcv_core.training.logs import METRICS_FILE, read_metrics
from lcv_core.training.recipe import Recipe, load_recipe, merge
from lcv_core.training.stage import Place
from lcv_core.training.stages import build_stage
from lcv_core.training.stages.text import UNCLEAR, TextStage, accuracy, labels, reading_loss
from lcv_core.training.trainer import Trainer
from lcv_core.weights.checkpoint import open_checkpoint

RED_BALL = {
    "object": "ball", "colour": "red", "size": "small", "motion": "bounces", "background": "dark blue",
    "texture": "none",
}  # fmt: skip


def make_recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "stage": "text", "steps": 80, "batch_size": 16, "lr": 1e-2, "warmup": 5, "betas": [0.9, 0.99],
        "model": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    }  # fmt: skip
    return Recipe.from_dict(merge(base, changes))


def make_stage(**changes: Any) -> TextStage:
    stage = build_stage(make_recipe(**changes))
    assert isinstance(stage, TextStage)
    return stage


def named(row: list[int]) -> dict[str, str]:
    """What labels mean, by attribute; those that are unnamed are absent."""
    values = {name: value for (name, _), value in zip(ATTRIBUTES.items(), row, strict=True)}
    return {
        name: "unclear" if value == UNCLEAR else ATTRIBUTES[name][value]
        for name, value in values.items()
        if value < len(ATTRIBUTES[name])
    }


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (
            "a small red ball bounces up and down on a dark blue background",
            {"size": "small", "colour": "red", "object": "ball", "motion": "bounces", "background": "dark blue"},
        ),
        ("A red ball.", {"colour": "red", "object": "ball"}),
        ("", {}),
        ("a cat in the rain", {}),
        # What is left of "bounces up and down" looks like another motion: no answer is right.
        ("a ball up and down", {"object": "ball", "motion": "unclear"}),
        # Without "dark" it is no background, and its colour is none of the object's.
        ("on a blue background, a ball", {"object": "ball", "colour": "unclear"}),
    ],
)
def test_labels(text: str, meaning: dict[str, str]) -> None:
    assert named(labels(text, RED_BALL)) == meaning


def test_every_caption_of_a_batch_is_labelled_by_its_scene() -> None:
    stage = make_stage(data={"watched": 5})
    seen = []
    for step in range(8):
        batch = stage.batch(Place(step, 0, range(16)))
        assert batch["ids"].shape == batch["mask"].shape and batch["labels"].shape == (21, len(ATTRIBUTES))
        assert batch["learnt"] == len(batch["names"]) == 16
        assert (batch["ids"][batch["mask"] == 0] == stage.tokenizer.pad_token_id).all()
        seen += list(zip(batch["names"], batch["labels"][:16].tolist(), strict=True))
    for text, row in seen:
        assert {k: v for k, v in named(row).items() if v != "unclear"}.items() <= parse(text).items()
    texts = [text for text, _ in seen]
    assert any(not text for text in texts) and any(text.endswith(".") for text in texts)
    assert sum(len(named(row)) >= 3 for _, row in seen) > 90, "most captions are whole"
    assert sum(not named(row) for _, row in seen) > 3, "some name nothing"


def test_held_back_combinations_are_not_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcv_core.training.stages import text

    drawn = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        drawn.append((real(*args, **kwargs), kwargs.get("held_back", "exclude")))
        return drawn[-1][0]

    real = text.draw_scene
    monkeypatch.setattr(text, "draw_scene", remember)
    make_stage(data={"watched": 7}).batch(Place(0, 0, range(40)))
    assert [is_held_back(scene) for scene, _ in drawn] == [False] * 40 + [True] * 7


def test_the_same_place_gives_the_same_batch_and_others_another() -> None:
    stage = make_stage()
    first, again = stage.batch(Place(3, 0, [0, 1])), stage.batch(Place(3, 0, [0, 1]))
    assert first["names"] == again["names"] and torch.equal(first["ids"], again["ids"])
    assert stage.batch(Place(4, 0, [0, 1]))["names"] != first["names"]
    assert stage.batch(Place(3, 1, [1, 2]))["names"][0] == first["names"][1]


def toy_reading(dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    logits = {
        name: randn(3, 5, len(values) + 1, seed=i, dtype=dtype) for i, (name, values) in enumerate(ATTRIBUTES.items())
    }
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    wanted = torch.tensor([[0, 1, 1, 2, 3, 1], [5, UNCLEAR, 2, 10, 0, 4], [1, 8, UNCLEAR, 3, 5, 0]])
    return logits, mask, wanted


def test_the_loss_is_a_mean_over_captions_of_the_mean_over_their_tokens() -> None:
    logits, mask, wanted = toy_reading()
    expected = []
    for row, length in enumerate((5, 2, 1)):
        for column, values in enumerate(logits.values()):
            answer = int(wanted[row, column])
            if answer == UNCLEAR:
                expected.append(torch.zeros(()))
                continue
            chances = F.log_softmax(values[row, :length], dim=-1)[:, answer]
            expected.append(-chances.mean())
    torch.testing.assert_close(reading_loss(logits, mask, wanted), torch.stack(expected).mean())


def test_padding_and_unclear_labels_change_nothing() -> None:
    logits, mask, wanted = toy_reading()
    loss, right = reading_loss(logits, mask, wanted), accuracy(logits, mask, wanted)
    other = {name: values.clone() for name, values in logits.items()}
    for values in other.values():
        values[mask == 0] = 1e4
    other["colour"][1] = -1e3
    torch.testing.assert_close(reading_loss(other, mask, wanted), loss)
    assert torch.equal(accuracy(other, mask, wanted), right)


def test_accuracy_counts_answers() -> None:
    logits, mask, wanted = toy_reading()
    for column, values in enumerate(logits.values()):
        values.zero_()
        values.scatter_(2, wanted[:, column, None, None].clamp_min(0).expand(3, 5, 1), 1.0)
    assert accuracy(logits, mask, wanted) == 1.0
    logits["object"][0, 4] = F.one_hot(torch.tensor(3), 6).float()  # one of 5 * 6 + 2 * 5 + 1 * 5 answers
    assert accuracy(logits, mask, wanted).item() == pytest.approx(44 / 45)


def test_gradients_of_the_loss() -> None:
    logits, mask, wanted = toy_reading(torch.float64)
    for values in logits.values():
        values.requires_grad_(True)
    check_gradients(lambda: reading_loss(logits, mask, wanted), list(logits.values()))


def test_states_do_not_depend_on_padding() -> None:
    stage = make_stage()
    batch = stage.batch(Place(0, 0, range(4)))
    ids, mask = batch["ids"], batch["mask"]
    more = F.pad(ids, (0, 9)), F.pad(mask, (0, 9))
    for head in stage.model.heads.values():
        torch.nn.init.normal_(head.weight)
    short, long = stage.model(ids, mask), stage.model(*more)
    for name, values in short.items():
        torch.testing.assert_close(values[mask != 0], long[name][:, : ids.shape[1]][mask != 0], atol=1e-5, rtol=1e-4)


def test_it_learns_and_the_heads_are_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)
    recipe = make_recipe(log_every=5, export_precision="bf16")
    assert Trainer(build_stage(recipe), recipe, tmp_path, device="cpu").run().finished
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert rows[-1]["held_back_accuracy"] > rows[0]["held_back_accuracy"] + 0.1
    encoder = open_checkpoint(tmp_path / "model").load_text_encoder()
    assert encoder.dtype == torch.bfloat16
    assert not [name for name in encoder.model.state_dict() if "head" in name]
    states = encoder.encode(["a red ball bounces", ""])
    assert states.states.shape == (2, 512, 32) and states.states.isfinite().all()
    assert states.mask is not None and states.mask.sum(dim=1).tolist() == [5, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"d_kv": 8}}, "model.num_heads \\* model.d_kv must be model.d_model 32, got 16"),
        ({"data": {"empty": 1.5}}, "data.empty is a share in"),
        ({"objective": {"kl": 1.0}}, "the text stage has no choice of objective"),
        ({"data": {"droped": 0.1}}, "unknown key data.droped; did you mean dropped"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_stage(**changes)


def test_the_shipped_recipe() -> None:
    stage = build_stage(load_recipe("mini/text"))
    assert isinstance(stage, TextStage)
    assert stage.config.num_heads * stage.config.d_kv == stage.config.d_model
