"""Running the command line inside the test process, and the small files it is given."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lcv_core.cli.main import run
from lcv_core.video_io import write_video


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def lcv(*arguments: object) -> Outcome:
    """`lcv` with these arguments; no traceback may ever be shown."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    assert "Traceback" not in err.getvalue()
    assert "this is a bug" not in err.getvalue(), err.getvalue()
    return Outcome(code, out.getvalue(), err.getvalue())


def made(*arguments: object) -> Outcome:
    """A call that has to succeed, and to leave stdout alone."""
    outcome = lcv(*arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    return outcome


def refused(*arguments: object, code: int = 2) -> str:
    """A call that has to fail with one sentence, before any weights are loaded; returns the sentence."""
    outcome = lcv(*arguments)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "reading the prompt" not in outcome.err and "loading the model" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("lcv: ")]
    assert len(lines) == 1, outcome.err
    return lines[0].removeprefix("lcv: ")


def usage_error(*arguments: object) -> str:
    """A call whose options are refused by the parser; returns what it says on one line."""
    outcome = lcv(*arguments)
    assert outcome.code == 2
    assert "Usage: lcv" in outcome.err
    return " ".join(outcome.err.replace("│", " ").split())


def copy_model(model: Path, folder: Path, *, without: Sequence[str] = ()) -> Path:
    """A checkpoint that a test may change: to change a file of it, replace it (the others are hard links)."""
    shutil.copytree(model, folder, copy_function=os.link)
    for name in without:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def scale_weights(file: Path, factor: float) -> None:
    """Multiply every tensor of a weights file; NaN for what nothing survives."""
    tensors = {name: tensor * factor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def clip(path: Path, frames: int, *, frame_rate: float = 15.0, size: tuple[int, int] = (32, 48)) -> Path:
    """A video of moving noise."""
    noise = torch.rand(size[0], size[1] + frames, 3, generator=torch.Generator().manual_seed(frames))
    write_video(path, [noise[None, :, i : i + size[1]] for i in range(frames)], frame_rate=frame_rate, crf=10)
    return path


def left_in(folder: Path) -> set[str]:
    """Everything in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}
