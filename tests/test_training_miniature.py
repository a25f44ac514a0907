"""Putting the miniature together from the runs of its recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lcv_core.errors import InputError
from lcv_core.training import miniature as made
from lcv_core.training.miniature import ADAPTERS, PARTS, RUNS, assemble, keep_records


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folders as the recipes leave them, a few bytes in each file."""
    root = tmp_path / "runs"
    for run in RUNS:
        (root / run / "model" / "lora").mkdir(parents=True)
        for name in ("metrics.csv", "curves.png"):
            (root / run / name).write_text(f"{run} {name}")
    for part, run in PARTS.items():
        place = root / run / "model" / part
        if place.suffix:
            place.write_text(part)
        else:
            place.mkdir()
            (place / "config.json").write_text(part)
    (root / "flow" / "model" / "vae").mkdir()
    (root / "flow" / "model" / "vae" / "config.json").write_text("that the transformer was trained with")
    for run, name in ADAPTERS.items():
        (root / run / "model" / "lora" / f"{name}.safetensors").write_text(name)
    return root


def test_every_part_comes_from_the_run_that_made_it(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "mini"
    (target / "old").mkdir(parents=True)
    assemble(runs, target)
    held = {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()}
    folders = [part for part in PARTS if "." not in part]
    assert held == {
        **{f"{part}/config.json": part for part in folders}, "model_index.json": "model_index.json",
        **{f"lora/{name}.safetensors": name for name in ADAPTERS.values()},
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_is_not_finished_is_named_and_nothing_is_replaced(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "mini"
    target.mkdir()
    (target / "kept").touch()
    (runs / "grpo" / "model" / "lora" / "grpo_lora.safetensors").unlink()
    with pytest.raises(InputError, match=r"grpo_lora\.safetensors is not there; finish that run first: make mini"):
        assemble(runs, target)
    assert [path.name for path in target.iterdir()] == ["kept"]


def test_it_may_not_outgrow_what_git_should_hold(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "MOST_BYTES", 20)
    with pytest.raises(InputError, match=r"the miniature takes .* more than the"):
        assemble(runs, tmp_path / "mini")
    assert not (tmp_path / "mini").exists()


def test_records_of_all_runs(runs: Path, tmp_path: Path) -> None:
    keep_records(runs, tmp_path / "records")
    held = {path.name: path.read_text() for path in (tmp_path / "records").iterdir()}
    assert held == {f"{run}.csv": f"{run} metrics.csv" for run in RUNS} | {
        f"{run}.png": f"{run} curves.png" for run in RUNS
    }


def test_the_command_says_what_it_wrote_or_what_is_missing(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lcv_core.training.miniature", str(runs), "--target", str(tmp_path / "mini")]
    command += ["--records", str(tmp_path / "records")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"wrote {tmp_path / 'mini'}, ")
    (runs / "vae" / "curves.png").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "curves.png is not there" in done.stderr
