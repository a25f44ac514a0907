"""`lcv train`: from a recipe to a model, told in lines; stopped, gone on with, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import lcv, made, refused
from training_toys import ToyStage

from lcv_core.cli.progress import Reporter
from lcv_core.cli.train import SAY_EVERY, _Show
from lcv_core.training import stages
from lcv_core.training import trainer as trainer_module
from lcv_core.training.events import Event
from lcv_core.training.recipe import shipped_recipes

RECIPE = """# A toy.
stage: toy
steps: 6
batch_size: 8
micro_batch_size: 4
lr: 1e-2
log_every: 2
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)
    monkeypatch.setattr(ToyStage, "__module__", "training_toys")
    monkeypatch.setitem(stages.STAGES, "toy", "training_toys:ToyStage")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def train(*arguments: object) -> str:
    return made("train", "--device", "cpu", *arguments).err


def test_help_lists_the_recipes() -> None:
    outcome = lcv("train", "--help")
    assert outcome.code == 0 and "Examples" in outcome.out
    for name in shipped_recipes():
        assert f" {name}: " in outcome.out


def test_a_recipe_becomes_a_model(recipe: Path) -> None:
    said = train(recipe, "--out", "run")
    assert "stage toy: 658 of 658 parameters learn in fp32 on" in said and "6 steps of 8 samples, 4 at a time" in said
    assert "step 6/6: loss" in said and "wrote run/model" in said
    assert Path("run/model/toy.pt").is_file() and Path("run/metrics.csv").is_file()
    longer = train(recipe, "-o", "run", "--steps", "8", "--set", "lr=1e-3")
    assert "going on from step 6" in longer and "another lr" in longer and "step 8/8" in longer


def test_processes_share_each_step(tmp_path: Path) -> None:
    recipe = tmp_path / "text.yaml"
    recipe.write_text(
        "stage: text\nsteps: 2\nbatch_size: 8\nmicro_batch_size: 4\nlr: 1e-3\nlog_every: 1\n"
        "model: {d_model: 32, d_kv: 8, d_ff: 64, num_layers: 1, num_heads: 4}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "lcv_core", "train", str(recipe), "--device", "cpu", "--processes", "2"]
    done = subprocess.run([*command, "-o", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 2 processes, " in done.stderr and done.stderr.count("step 2/2: loss") == 1
    assert (tmp_path / "run" / "model" / "text_encoder" / "model.safetensors").is_file()


def test_the_folder_is_named_after_the_recipe(recipe: Path) -> None:
    train("toy.yaml")
    assert Path("outputs/toy/model/toy.pt").is_file()


def test_export_alone(recipe: Path) -> None:
    train(recipe, "-o", "run", "--steps", "2")
    Path("run/model/toy.pt").unlink()
    said = train(recipe, "-o", "run", "--export")
    assert Path("run/model/toy.pt").is_file() and "step 6/6" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    batch = ToyStage.batch

    def pressed(self: ToyStage, place: Any) -> Any:
        if place.step == 2 and place.micro == 0:
            os.kill(os.getpid(), number)
        return batch(self, place)

    monkeypatch.setattr(ToyStage, "batch", pressed)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    outcome = lcv("train", recipe, "-o", "run", "--device", "cpu")
    assert outcome.code == 130
    assert "stopping after this step" in outcome.err
    assert "lcv: stopped at step 3 of 6, kept in run; the same command goes on from there" in outcome.err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.undo()


def test_refusals(recipe: Path) -> None:
    assert "there is no recipe nope; name a YAML file, or one of: " in refused("train", "nope")
    assert "did you mean lr" in refused("train", recipe, "--set", "lrr=3")
    assert "a change must be KEY=VALUE" in refused("train", recipe, "--set", "lr")
    train(recipe, "-o", "run")
    assert "holds a run with another optimizer" in refused("train", recipe, "-o", "run", "--set", "optimizer=muon")


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("lcv_core.cli.train.time.monotonic", lambda: now[0])
    show = _Show(Reporter())
    for step in range(1, 5):
        show(Event("metrics", done=step, total=4, values={"step": step, "loss": 1 / step, "seconds": 1.0}))
        now[0] += SAY_EVERY / 2
    show(Event("nan", "step 7: loss nan; the step is left out"))
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["step 1/4: loss 1", "step 3/4: loss 0.3333", "step 4/4: loss 0.25"]
    assert said[3] == "warning: step 7: loss nan; the step is left out"
