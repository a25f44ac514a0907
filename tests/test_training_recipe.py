"""Recipes: every key and value checked, phases, learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lcv_core.errors import InputError
from lcv_core.training.recipe import Recipe, find_recipe, load_recipe, shipped_recipes
from lcv_core.training.strict import read_section

BASE: dict[str, Any] = {"stage": "flow", "steps": 100, "batch_size": 8}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 3}, "unknown key stepz; did you mean steps"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"micro_batch_size": 3}, "must be a multiple of micro_batch_size, got 3; try 2"),
        ({"micro_batch_size": 16}, "try 8"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"betas": [0.9]}, "betas must be a list of 2"),
        ({"betas": [0.9, 1.0]}, "betas must be in"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'muon', got 'sgd'"),
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16'"),
        ({"grad_clip": -1}, "grad_clip must not be negative"),
        ({"lr_end": 2}, "lr_end is a part of lr"),
        ({"model": 3}, "model must be a mapping"),
        ({"phases": [{"steps": 5, "model": {}}]}, r"unknown key phases\[0\].model"),
        ({"phases": [{"lr": 1e-3}]}, r"phases\[0\].steps must be at least 1"),
        ({"phases": [{"steps": 5}]}, "steps is 100, the phases have 5"),
        ({"steps": 0, "phases": [{"steps": 5, "lr": -1}]}, r"phases\[0\]: lr must be above 0"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Recipe.from_dict({**BASE, **changes}).plan  # noqa: B018


@pytest.mark.parametrize("key", ["stage", "batch_size"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"{key} is missing"):
        Recipe.from_dict({name: value for name, value in BASE.items() if name != key})


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    recipe = load_recipe(write(tmp_path / "r.yaml", "stage: flow\nsteps: 1e3\nbatch_size: 8\nlr: 1e-4\n"))
    assert (recipe.lr, recipe.steps) == (1e-4, 1000)


def test_a_recipe_goes_through_json() -> None:
    recipe = Recipe.from_dict({**BASE, "steps": 0, "model": {"depth": 2}, "phases": [{"steps": 5}, {"steps": 7}]})
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.steps == 12


def test_extends_and_changes(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "stage: flow\nsteps: 10\nbatch_size: 8\nmodel: {depth: 2, width: 3}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nsteps: 20\nmodel: {depth: 4}\n")
    recipe = load_recipe(child, ["lr=2e-3", "model.width=5", "data.cache=x"])
    assert (recipe.steps, recipe.model, recipe.lr) == (20, {"depth": 4, "width": 5}, 2e-3)
    assert recipe.data == {"cache": "x"}
    with pytest.raises(InputError, match="a change must be KEY=VALUE"):
        load_recipe(child, ["lr"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "must hold the keys of a recipe"),
        ("extends: other.yaml", "other.yaml does not exist"),
        ("extends: r.yaml", "extends itself"),
        ("extends: [a]", "extends must name one YAML file"),
        ("stage: flow\nbatch_size: 8\nstep: 3", "r.yaml: unknown key step; did you mean steps"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_recipe(write(tmp_path / "r.yaml", text))


def test_an_unknown_name_lists_the_shipped_recipes() -> None:
    with pytest.raises(InputError, match="mini/flow"):
        find_recipe("mini/flaw")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_sound_and_introduce_themselves(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.plan and find_recipe(name).read_text(encoding="utf-8").startswith("# ")


def test_phases() -> None:
    recipe = Recipe.from_dict(
        {
            **BASE, "steps": 0, "lr": 1e-3, "objective": {"a": 1, "b": {"c": 1}},
            "phases": [{"steps": 10, "objective": {"b": {"d": 2}}}, {"steps": 5, "lr": 1e-4, "batch_size": 4}],
        }
    )  # fmt: skip
    assert recipe.steps == 15
    assert [(p.start, p.stop) for p in recipe.plan] == [(0, 10), (10, 15)]
    assert recipe.at(9).objective == {"a": 1, "b": {"c": 1, "d": 2}} and recipe.at(10).objective == recipe.objective
    assert (recipe.at(9).batch_size, recipe.at(10).batch_size) == (8, 4)
    assert (recipe.lr_at(9), recipe.lr_at(10), recipe.lr_at(99)) == (1e-3, 1e-4, 1e-4)


def test_another_length() -> None:
    phases = Recipe.from_dict({**BASE, "steps": 0, "phases": [{"steps": 10}, {"steps": 5, "lr": 1e-5}]})
    assert [p.stop for p in phases.with_steps(7).plan] == [7]
    assert [p.stop for p in phases.with_steps(10).plan] == [10]
    assert [p.stop for p in phases.with_steps(40).plan] == [10, 40] and phases.with_steps(40).lr_at(39) == 1e-5
    assert Recipe.from_dict(BASE).with_steps(3).steps == 3


def test_learning_rates() -> None:
    def rates(schedule: str) -> list[float]:
        recipe = Recipe.from_dict({**BASE, "steps": 14, "lr": 1.0, "warmup": 4, "lr_schedule": schedule, "lr_end": 0.5})
        return [recipe.lr_at(step) for step in range(14)]

    for schedule in ("constant", "linear", "cosine"):
        assert rates(schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates("constant")[4:] == [1.0] * 10
    assert rates("linear")[4:] == pytest.approx([1 - 0.05 * k for k in range(10)])
    assert rates("cosine")[9] == pytest.approx(0.75) and rates("cosine")[13] > 0.5


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Section:
    path: Path
    kind: Literal["a", "b"] = "a"
    limit: float | None = None
    shift: float | Literal["auto"] = "auto"
    sizes: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    weights: dict[str, float] = field(default_factory=dict)


def test_sections() -> None:
    data = {"path": "x", "limit": 2, "shift": 3, "sizes": [1, 2], "inner": {"size": 4}, "weights": {"t": "1e1"}}
    section = read_section(Section, data, "data")
    assert section == Section(Path("x"), "a", 2.0, 3.0, (1, 2), Inner(4), {"t": 10.0})
    assert read_section(Section, {"path": "x", "shift": "auto", "limit": None}, "data").limit is None
    for change, words in {
        "inner": ({"sise": 3}, "unknown key data.inner.sise; did you mean size"),
        "sizes": ([1, "a"], "data.sizes must be a whole number"),
        "weights": ({"t": "x"}, "data.weights.t must be a number"),
        "kind": ("c", "data.kind must be 'a' or 'b'"),
        "path": (3, "data.path must be a path"),
    }.items():
        with pytest.raises(InputError, match=words[1]):
            read_section(Section, {**data, change: words[0]}, "data")
