"""What goes wrong while a model is streamed: named, raised where it can be caught, and nothing of the work is lost."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import copy_model, lcv, left_in, made
from offload_fakes import FakeLanes
from test_offload_turns import DEPTH, Files, reading_threads, run, settle
from tiny_models import make_dit
from torch import Tensor

from lcv_core.cli.progress import Reporter
from lcv_core.cli.run import _Segments
from lcv_core.denoise import StepInfo
from lcv_core.errors import CheckpointError
from lcv_core.offload.lanes import CpuLanes
from lcv_core.offload.turns import BlocksInTurn
from lcv_core.weights import data_file, streamed
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.convert import convert
from lcv_core.weights.tensors import TensorFile


def shards(model: Path) -> list[Path]:
    return sorted((model / "dit").glob("*.safetensors"))


def change_time(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def remove(file: Path) -> None:
    file.unlink()


def own_copy(model: Path, folder: Path) -> Path:
    """A checkpoint whose transformer files may be changed in place."""
    copy_model(model, folder)
    for file in shards(folder):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        (change_time, "changed while it was read; leave a model's files alone"),
        (cut, "changed while it was read"),
        (empty, "changed while it was read"),
        (remove, "is gone; put it back"),
    ],
)
def test_a_file_that_is_not_what_it_was(
    tiny_checkpoint: Path, tmp_path: Path, happens: Callable[[Path], None], says: str
) -> None:
    model = own_copy(tiny_checkpoint, tmp_path / "model")
    dit = open_checkpoint(model).load_dit(streaming="disk", slots=1)
    run(dit)
    settle(dit._in_turn)  # type: ignore[arg-type]
    files = shards(model)
    for file in files:
        happens(file)
    with pytest.raises(CheckpointError, match=says) as error:
        run(dit), run(dit)
    assert any(str(file) in str(error.value) for file in files)
    dit.stop_streaming()


def test_a_gguf_file_that_is_cut_short(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "dit.gguf"
    convert(tiny_checkpoint / "dit", file, "q8_0")
    dit = open_checkpoint(file).load_dit(streaming="disk", weights="stored", slots=1)
    run(dit)
    cut(file)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        run(dit), run(dit)
    dit.stop_streaming()


def test_a_file_that_shrinks_between_the_check_and_the_end_of_the_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal, whatever the moment: it is read, not mapped."""
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1 << 16)}, path)
    file, stat = TensorFile(path), os.fstat

    def then_cut(number: int) -> os.stat_result:
        result = stat(number)
        cut(path)
        return result

    monkeypatch.setattr(data_file.os, "fstat", then_cut)
    with pytest.raises(CheckpointError, match=f"{path} changed while it was read; download it again"):
        file.read("a")


def test_a_disk_that_fails_and_comes_back(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = open_checkpoint(tiny_checkpoint).load_dit(streaming="disk")
    expected = run(dit)
    settle(dit._in_turn)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:

        def fails(number: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(data_file.os, "fstat", fails)
        dit._in_turn._slots[0].block = None  # type: ignore[union-attr]
        with pytest.raises(CheckpointError, match=r"safetensors cannot be read \(Input/output error\); check its disk"):
            run(dit)
    assert run(dit).equal(expected)
    dit.stop_streaming()


class _Unpinned(FakeLanes):
    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    def pin(self, buffer: Tensor) -> object | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return None


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_memory_that_cannot_be_pinned_serves_as_it_is(place: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(make_dit(depth=DEPTH))
    dit, lanes = make_dit(depth=DEPTH), _Unpinned(RuntimeError("CUDA error: out of memory\nand so on"))
    files = Files(make_dit(depth=DEPTH)) if place == "disk" else None
    with caplog.at_level(logging.WARNING, "lcv_core"):
        turns = BlocksInTurn(list(dit.blocks), lanes, "disk" if place == "disk" else "ram", files)
    assert lanes.asked == (2 if place == "disk" else 1)  # not once more for every block
    assert "could not be pinned (CUDA error: out of memory)" in caplog.text and "pageable" in caplog.text
    dit.set_streaming(turns)
    assert run(dit).equal(expected)
    turns.close()


def test_ctrl_c_while_a_block_is_awaited_leaves_no_thread() -> None:
    before = reading_threads()
    dit, files, hold = make_dit(depth=DEPTH), Files(make_dit(depth=DEPTH)), threading.Event()
    read = files.read

    def slow(block: int, name: str, out: Tensor) -> None:
        if block == 2 and not hold.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            hold.wait(60)
        read(block, name, out)

    files.read = slow  # type: ignore[method-assign]
    turns = BlocksInTurn(list(dit.blocks), CpuLanes(), "disk", files)
    dit.set_streaming(turns)
    with pytest.raises(KeyboardInterrupt):
        run(dit)
    hold.set()
    assert run(dit).equal(run(make_dit(depth=DEPTH)))  # it can even go on
    dit.stop_streaming()
    assert reading_threads() == before


# the command line


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return own_copy(tiny_checkpoint, tmp_path / "model")


def test_ctrl_c_ends_the_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = reading_threads(), []

    def interrupt(self: Reporter, info: StepInfo, label: str) -> None:
        seen.append(len(reading_threads()))
        raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "on_step", interrupt)
    outcome = lcv("t2v", "-m", model, "-p", "x", "--steps", 3, "--seed", 1, "--stream", "disk", "-o", "a.mp4")
    assert outcome.code == 130 and seen == [len(before) + 1]
    assert reading_threads() == before


def test_a_long_video_keeps_its_segments_when_the_model_changes_and_goes_on_with_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["long", "-m", model, "-p", "x", "--segments", 3, "--steps", 2, "--seed", 9, "--no-uniform-tail"]
    contents = {file: file.read_bytes() for file in shards(model)}
    before, on_step = reading_threads(), _Segments.on_step

    def watched(self: _Segments, index: int, info: StepInfo) -> None:
        if (index, info.step) == (2, 1):
            for file in contents:
                cut(file)
        on_step(self, index, info)

    with monkeypatch.context() as patch:
        patch.setattr(_Segments, "on_step", watched)
        # The tiny model's two blocks would stay in two slots.
        patch.setattr(streamed, "BlocksInTurn", lambda *given, **named: BlocksInTurn(*given, **{**named, "slots": 1}))
        outcome = lcv(*command, "--stream", "disk", "-o", "a.mp4")
    assert outcome.code == 2 and "safetensors changed while it was read" in outcome.err
    assert reading_threads() == before
    assert {"segment_0000.safetensors", "segment_0001.safetensors"} <= left_in(Path("a.mp4.segments"))
    for file, content in contents.items():
        file.write_bytes(content)
    err = made(*command, "--stream", "disk", "-o", "a.mp4").err
    assert "going on after segment 2 of 3" in err and "Segment 1 of 3" not in err
    made(*command, "-o", "whole.mp4")
    assert Path("whole.mp4").stat().st_size > 1000
    assert frames(Path("a.mp4")).equal(frames(Path("whole.mp4")))
    assert left_in(Path()) == {"a.mp4", "whole.mp4"}


def frames(path: Path) -> Tensor:
    from lcv_core.video_io import read_video

    return read_video(path)
