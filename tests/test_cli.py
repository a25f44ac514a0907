"""The command line by itself: help, start-up, inspect and init, and what is seen while a job runs."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import lcv, made, refused, usage_error
from rich.console import Console

from lcv_core import __version__
from lcv_core.cli.app import app
from lcv_core.cli.main import _as_options
from lcv_core.cli.progress import Reporter, clock

COMMANDS = ("t2v", "i2v", "continue", "long", "refine", "rerun", "inspect", "plan", "init", "convert", "train")


def test_help_lists_every_command() -> None:
    outcome = lcv("--help")
    assert outcome.code == 0 and outcome.err == ""
    for command in COMMANDS:
        assert f" {command} " in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_its_examples(command: str) -> None:
    outcome = lcv(command, "--help")
    assert outcome.code == 0
    assert "Examples" in outcome.out and f"lcv {command} " in outcome.out


def test_examples_are_commands_that_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    epilogs = [command.epilog or "" for command in app.registered_commands]
    examples = [line.strip() for epilog in epilogs for line in epilog.splitlines() if line.strip().startswith("lcv ")]
    assert len(examples) > len(COMMANDS)
    for example in examples:
        if not example.startswith("lcv init"):  # which would go through
            outcome = lcv(*shlex.split(example)[1:])
            if example.startswith("lcv plan") and " -m " not in example:  # which needs no files
                assert outcome.code == 0, outcome.err
                continue
            assert outcome.code == 2 and "Usage:" not in outcome.err  # there are no such files, and that is all


def test_version() -> None:
    assert lcv("--version").out == f"lcv {__version__}\n"


def test_an_unknown_command_and_an_unknown_option_are_named() -> None:
    assert "t3v" in usage_error("t3v")
    assert "--promt" in usage_error("t2v", "--promt", "x")


def test_nothing_heavy_is_imported_for_help_and_wrong_options(tmp_path: Path) -> None:
    calls = [
        ["--help"], ["t2v", "--help"], ["t2v", "--steps", "0"], ["t2v", "-m", "x"],
        ["t2v", "-m", "x", "-p", "x", "-f", "8"],
        ["t2v", "-m", "x", "-p", "x", "-o", "x.gif"], ["long", "-m", "x", "-p", "x", "--cond-frames", "0"],
        ["i2v", "-m", "x", "-p", "x", "-i", "/nowhere.png"],
    ]  # fmt: skip
    script = (
        "import sys, json\n"
        "from lcv_core.cli.main import run\n"
        "codes = [run(call) for call in json.loads(sys.argv[1])]\n"
        "heavy = {'torch', 'transformers', 'av', 'PIL', 'numpy'} & set(sys.modules)\n"
        "print('\\n' + json.dumps([codes, sorted(heavy)]))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    codes, heavy = json.loads(process.stdout.splitlines()[-1])
    assert codes == [0, 0] + [2] * 6
    assert heavy == []


def test_names_of_arguments_become_options() -> None:
    assert _as_options("use num_cond_frames=5 or a longer clip") == "use --cond-frames 5 or a longer clip"
    assert _as_options("num_frames must be 4k+1, got 92") == "--frames must be 4k+1, got 92"
    assert _as_options("it has no vae; name one with vae=") == "it has no vae; name one with --vae"
    assert _as_options("/data/num_frames/vae.mp4 and num_frames.mp4 are gone") == (
        "/data/num_frames/vae.mp4 and num_frames.mp4 are gone"
    )


def test_inspect_json_parses_and_is_all_there_is_on_stdout(tiny_checkpoint: Path) -> None:
    outcome = lcv("inspect", tiny_checkpoint, "--json")
    assert outcome.code == 0 and outcome.err == ""
    data = json.loads(outcome.out)
    assert data["parameters"] > 0 and "t2v" in json.dumps(data)


def test_inspect_for_people(tiny_checkpoint: Path) -> None:
    outcome = lcv("inspect", tiny_checkpoint)
    assert outcome.code == 0
    assert "2 blocks of 64" in outcome.out and "can do:" in outcome.out


def test_inspect_of_nothing(tmp_path: Path) -> None:
    assert "does not exist" in refused("inspect", tmp_path / "gone")
    (tmp_path / "[b]notes.txt").write_text("not weights")
    assert "[b]notes.txt" in refused("inspect", tmp_path / "[b]notes.txt")


def test_init_writes_a_checkpoint_that_works_and_is_not_overwritten(tmp_path: Path) -> None:
    model = tmp_path / "a model"
    assert str(model) in made("init", model, "--preset", "tiny").err.replace("\n", "")
    assert lcv("inspect", model).code == 0
    assert "not empty" in refused("init", model, "--preset", "tiny")
    made("init", model, "--preset", "tiny", "--overwrite")
    assert "huge" in usage_error("init", tmp_path / "b", "--preset", "huge")
    (tmp_path / "file").write_text("x")
    refused("init", tmp_path / "file" / "model", code=1)


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_now_and_then_with_the_time_left() -> None:
    text, now = io.StringIO(), _Clock()
    reporter = Reporter(Console(file=text), now=now)
    with reporter.running():
        reporter.start("Denoising", 50)
        for step in range(1, 51):
            now.now += 4.0
            reporter.advance("Denoising", step, 50)
    lines = text.getvalue().splitlines()
    assert lines[0] == "Denoising: 3/50, 3:08 left"
    assert lines[-1] == "Denoising: 50/50"
    assert len(lines) == 17  # every 12 seconds of 200, and the end


def test_a_terminal_gets_a_bar_with_the_time_left_from_the_first_step_on() -> None:
    text, now = io.StringIO(), _Clock()
    reporter = Reporter(Console(file=text, force_terminal=True, width=100), now=now)
    with reporter.running():
        reporter.start("Denoising [1]", 50, done=10)
        now.now += 300.0  # a step that takes longer than rich remembers
        reporter.advance("Denoising [1]", 11, 50)
        reporter._progress.refresh()
        reporter.say("wrote [bold]a.mp4")
    assert "Denoising [1]" in text.getvalue() and "11/50" in text.getvalue()
    assert "3:15:00 left" in text.getvalue()
    assert "wrote [bold]a.mp4" in text.getvalue()


def test_a_clock_for_people() -> None:
    assert [clock(s) for s in (0.2, 7, 760, 11100)] == ["0:01", "0:07", "12:40", "3:05:00"]
