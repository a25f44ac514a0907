"""Interrupted and killed runs of the command line go on where they stopped, with the bytes of uninterrupted ones."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_helpers import clip, lcv, left_in, made, refused
from safetensors import safe_open
from torch import Tensor

from lcv_core.cli.progress import Reporter
from lcv_core.cli.run import _Segments
from lcv_core.cli.segments import SegmentSink
from lcv_core.denoise import StepInfo
from lcv_core.errors import NumericalError
from lcv_core.video_io import VideoWriter, read_metadata

# Runs `lcv` and kills its own process, or says so and waits, when it gets to a place.
_CHILD = """
import json, os, signal, sys, time
from lcv_core.cli.main import run
from lcv_core.cli.progress import Reporter
from lcv_core.cli.run import _Segments
from lcv_core.cli.segments import SegmentSink
from lcv_core.partial import PartialRun

def before(owner, name, reached, act=lambda: os.kill(os.getpid(), signal.SIGKILL)):
    original = getattr(owner, name)
    def wrapped(self, *rest, **named):
        if reached(self, *rest):
            act()
        return original(self, *rest, **named)
    setattr(owner, name, wrapped)

def wait():
    print("HERE", flush=True)
    time.sleep(60)

def lcv(place, arguments):
    kind, numbers = place.split(":")[0], [int(n) for n in place.split(":")[1:]]
    if kind == "step":  # of a segment
        before(_Segments, "on_step", lambda self, index, info: [index, info.step] == numbers)
    elif kind == "saved":  # the latents of a segment, and not yet its piece
        before(SegmentSink, "write", lambda self, piece, chunks: piece.stem == f"{numbers[0]:04d}")
    elif kind == "join":
        before(SegmentSink, "join", lambda self, *rest: True)
    elif kind == "ticked":  # the latents of each step are on disk
        PartialRun.tick = PartialRun.save
        before(_Segments, "on_step", lambda self, index, info: [index, info.step] == numbers)
    elif kind == "wait":
        before(Reporter, "on_step", lambda self, info, label: info.step == numbers[0], wait)
    return run(arguments)
"""
# One command, in a process of its own.
_ALONE = _CHILD + "sys.exit(lcv(sys.argv[1], sys.argv[2:]))"
# Many commands, each in a fork of one process that has imported everything: seconds less for each.
_NURSERY = (
    _CHILD
    + """
from transformers import UMT5EncoderModel
for line in sys.stdin:
    folder, place, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(lcv(place, arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)


def python(script: str, *arguments: object, **pipes: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **pipes)


Kill = Callable[..., None]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    process = python(_NURSERY, stdin=subprocess.PIPE)
    with process:
        yield process
        process.kill()


@pytest.fixture
def killed(nursery: subprocess.Popen[str]) -> Kill:
    """killed(place, *arguments): `lcv` run until it gets to a place, where SIGKILL ends it."""

    def kill(place: str, *arguments: object) -> None:
        assert nursery.stdin is not None and nursery.stdout is not None
        nursery.stdin.write(json.dumps([str(Path.cwd()), place, [str(argument) for argument in arguments]]) + "\n")
        nursery.stdin.flush()
        assert int(nursery.stdout.readline()) == -signal.SIGKILL

    return kill


class Stop:
    """Raises from a callback, as Ctrl-C or a failing disk would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(
        self, owner: type, name: str, when: Callable[..., bool], error: BaseException, *arguments: object
    ) -> tuple[int, str]:
        """Run `lcv` with `error` raised before owner.name(...) when `when(...)`; (exit code, stderr)."""
        original = getattr(owner, name)

        def wrapped(this: object, *rest: object, **named: object) -> object:
            if when(*rest):
                raise error
            return original(this, *rest, **named)

        with self.monkeypatch.context() as patch:
            patch.setattr(owner, name, wrapped)
            outcome = lcv(*arguments)
        return outcome.code, outcome.err


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tiny_checkpoint


def at_step(step: int) -> Callable[..., bool]:
    return lambda info, *_: isinstance(info, StepInfo) and info.step == step


def contents(path: str) -> dict[str, bytes] | bytes:
    if Path(path).is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
    return Path(path).read_bytes()


# One clip


def test_sigint_keeps_the_steps_and_the_same_command_goes_on(model: Path) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 6, "--seed", 4]
    process = python(_ALONE, "wait:3", *command, "-o", "a.mp4", stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "HERE\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == (
        "lcv: stopped; what is done is kept in a.mp4.partial.safetensors, the same command goes on from it"
    )
    assert left_in(Path()) == {"a.mp4.partial.safetensors"}
    with safe_open("a.mp4.partial.safetensors", "np") as file:
        assert file.metadata()["step"] == "3"
    outcome = made(*command, "-o", "a.mp4")
    assert "going on after step 3 of 6, kept in a.mp4.partial.safetensors" in outcome.err
    assert left_in(Path()) == {"a.mp4"}
    made(*command, "-o", "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("the preview broke"), 1)])
def test_an_error_in_a_callback_keeps_the_steps(model: Path, stop: Stop, error: BaseException, code: int) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 5, "--seed", 4, "-o"]
    original = Reporter.on_step

    def failing(self: Reporter, info: StepInfo, label: str = "") -> None:
        if info.step == 4:
            raise error
        original(self, info, label)

    with stop.monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_step", failing)
        from lcv_core.cli.main import run

        assert run([str(a) for a in [*command, "a.safetensors"]]) == code
    assert left_in(Path()) == {"a.safetensors.partial.safetensors"}
    assert "going on after step 4 of 5" in made(*command, "a.safetensors").err
    made(*command, "whole.safetensors")
    assert contents("a.safetensors") == contents("whole.safetensors")
    assert left_in(Path()) == {"a.safetensors", "whole.safetensors"}


@pytest.mark.parametrize("task", ["i2v", "continue"])
def test_conditioned_clips_go_on_too(model: Path, stop: Stop, task: str) -> None:
    source = clip(Path("clip.mp4"), 9)
    if task == "i2v":
        made("t2v", "-m", model, "-p", "x", "--steps", 1, "--frames", 1, "-o", "png")
        source = Path("png/frame_00000.png")
    given = ["-i", source] if task == "i2v" else [source]
    command = [task, *given, "-m", model, "-p", "x", "--steps", 4, "--seed", 4, "--posterior", "sample", "-o"]
    code, err = stop(Reporter, "on_step", at_step(2), KeyboardInterrupt(), *command, "a.mp4")
    assert code == 130 and "a.mp4.partial.safetensors" in err
    assert "going on after step 2" in made(*command, "a.mp4").err
    made(*command, "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")


def test_ctrl_c_before_the_first_step_leaves_nothing(model: Path, stop: Stop) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 2, "-o", "a.mp4"]
    code, err = stop(Reporter, "start", lambda *_: True, KeyboardInterrupt(), *command)
    assert code == 130 and "lcv: stopped; nothing was finished that could be kept" in err
    assert left_in(Path()) == set()
    command[0] = "long"
    code, err = stop(Reporter, "start", lambda *_: True, KeyboardInterrupt(), *command)
    assert code == 130 and "nothing was finished" in err
    assert left_in(Path()) == set()


def test_ctrl_c_before_anything_was_begun(model: Path, stop: Stop) -> None:
    def interrupted(job: object) -> None:
        raise KeyboardInterrupt

    stop.monkeypatch.setattr("lcv_core.cli.run.open_for", interrupted)
    outcome = lcv("t2v", "-m", model, "-p", "x", "-o", "a.mp4")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "lcv: stopped\n")


@pytest.mark.parametrize("task", ["t2v", "long"])
def test_latents_before_a_step_that_failed_for_good_are_not_kept(model: Path, stop: Stop, task: str) -> None:
    def fail_in_the_second_step(velocity: Tensor, step: int, *_: object) -> None:
        if step == 1:
            raise NumericalError("step 2 of 3 produced NaN")

    stop.monkeypatch.setattr("lcv_core.denoise._check_finite", fail_in_the_second_step)
    outcome = lcv(task, "-m", model, "-p", "x", "--steps", 3, "-o", "a.mp4")
    assert (outcome.code, outcome.err.splitlines()[-1]) == (1, "lcv: step 2 of 3 produced NaN")
    assert left_in(Path()) == set()


def test_ctrl_c_while_writing_keeps_the_latents(model: Path, stop: Stop) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 2, "--seed", 1, "-o"]
    code, _ = stop(VideoWriter, "close", lambda *_: True, KeyboardInterrupt(), *command, "a.mp4")
    assert code == 130 and left_in(Path()) == {"a.mp4.partial.safetensors"}
    assert "going on after step 2 of 2" in made(*command, "a.mp4").err
    made(*command, "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")


def test_the_same_command_without_a_seed_goes_on_with_its_seed(model: Path, stop: Stop) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 4]
    code, err = stop(Reporter, "on_step", at_step(2), KeyboardInterrupt(), *command)
    seed = re.search(r"seed (\d+)", err)
    assert code == 130 and seed is not None
    made("t2v", "-m", model, "-p", "another job", "--steps", 1)  # takes another name
    err = made(*command).err
    assert seed.group() in err and "going on after step 2 of 4" in err
    assert left_in(Path("outputs")) == {"t2v-0001.mp4", "t2v-0002.mp4"}
    assert (read_metadata("outputs/t2v-0001.mp4") or {})["job"]["prompts"] == ["x"]
    assert seed.group() not in made(*command).err  # a new run is a new video


def test_several_videos_go_on_with_the_one_that_was_stopped(model: Path, stop: Stop) -> None:
    command = ["t2v", "-m", model, "-p", "x", "-p", "y", "-p", "z", "--steps", 3]
    code, err = stop(
        Reporter, "on_step", lambda info, label: info.step == 2 and "a-2" in label, KeyboardInterrupt(),
        *command, "-o", "a.mp4",
    )  # fmt: skip
    assert code == 130 and left_in(Path()) == {"a-1.mp4", "a-2.mp4.partial.safetensors"}
    first = contents("a-1.mp4")
    err = made(*command, "-o", "a.mp4").err
    assert "a-1.mp4" not in err and "going on after step 2 of 3" in err
    assert left_in(Path()) == {"a-1.mp4", "a-2.mp4", "a-3.mp4"} and contents("a-1.mp4") == first
    seed = (read_metadata("a-1.mp4") or {})["job"]["seed"]
    made(*command, "--seed", seed, "-o", "b.mp4")
    assert [contents(f"a-{i}.mp4") == contents(f"b-{i}.mp4") for i in (1, 2, 3)] == [True] * 3
    assert "a-1.mp4 exists; add --overwrite" in refused(*command, "-o", "a.mp4")


def test_another_quality_goes_on_from_the_same_steps(model: Path, stop: Stop) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 3, "--seed", 1]
    stop(Reporter, "on_step", at_step(2), KeyboardInterrupt(), *command, "-o", "a.mp4")
    assert "going on after step 2" in made(*command, "-o", "a.mp4", "--crf", 30).err
    made(*command, "-o", "whole.mp4", "--crf", 30)
    assert contents("a.mp4") == contents("whole.mp4")


def test_other_settings_start_afresh_and_say_so(model: Path, stop: Stop) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 3, "-o", "a.mp4", "--seed"]
    stop(Reporter, "on_step", at_step(2), KeyboardInterrupt(), *command, 1)
    err = made(*command, 2).err
    assert "a.mp4.partial.safetensors belongs to a run with other settings; starting afresh" in err
    assert "going on" not in err and left_in(Path()) == {"a.mp4"}


def test_leftovers_of_a_killed_run_are_removed(model: Path) -> None:
    for name in (".a.mp4.0123abcd.part", ".a.mp4.partial.safetensors.0123abcd.part"):
        Path(name).write_text("half a file")
    Path(".other.mp4.0123abcd.part").write_text("not ours")
    made("t2v", "-m", model, "-p", "x", "--steps", 1, "-o", "a.mp4")
    assert left_in(Path()) == {"a.mp4", ".other.mp4.0123abcd.part"}


# Segments


LONG = ["long", "-p", "v", "-p", "w", "-p", "x", "-p", "y", "-p", "z", "--steps", 2, "--seed", 9, "--no-uniform-tail"]


@pytest.mark.parametrize(
    ("handover", "place", "says"),
    [
        ("frames", "step:2:1", "going on after segment 2 of 5"),
        ("frames", "saved:2", "going on after segment 2 of 5"),
        ("official", "ticked:2:2", "going on after step 2 of 2"),
        ("latents", "step:2:2", "going on after segment 2 of 5"),
        ("latents", "saved:2", "going on after segment 2 of 5"),
        ("latents", "join", "going on after segment 5 of 5"),
    ],
)
def test_a_long_video_killed_in_segment_3_of_5(model: Path, killed: Kill, handover: str, place: str, says: str) -> None:
    command = [*LONG, "-m", model, "--handover", handover]
    killed(place, *command, "-o", "a.mp4")
    assert left_in(Path()) == {"a.mp4.segments"}
    assert {"segment_0000.safetensors", "segment_0001.safetensors"} <= left_in(Path("a.mp4.segments"))
    err = made(*command, "-o", "a.mp4").err
    assert says in err and "Segment 2 of 5" not in err
    made(*command, "-o", "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")
    assert left_in(Path()) == {"a.mp4", "whole.mp4"}


def test_a_long_png_sequence_of_a_clip_killed_between_latents_and_frames(model: Path, killed: Kill) -> None:
    command = [*LONG, "-m", model, "--clip", clip(Path("clip.mp4"), 9)]
    killed("saved:2", *command, "-o", "a")
    assert "going on after segment 2 of 5" in made(*command, "-o", "a").err
    made(*command, "-o", "whole")
    assert contents("a") == contents("whole") and len(left_in(Path("a"))) == 9 + 5 * 4
    assert left_in(Path()) == {"a", "clip.mp4", "whole"}


@pytest.mark.parametrize("place", ["step:2:1", "saved:2"])
def test_refine_killed_in_window_3(model: Path, killed: Kill, place: str) -> None:
    command = ["refine", clip(Path("clip.mp4"), 11), "-m", model, "--window", 5, "--seed", 1, "--steps", 2]
    command += ["--height", 32, "--width", 48, "--spatial-only"]
    killed(place, *command, "-o", "a.mp4")
    err = made(*command, "-o", "a.mp4").err
    assert "going on after window 2 of 3" in err and "Window 2 of 3" not in err
    made(*command, "-o", "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")
    assert left_in(Path()) == {"a.mp4", "clip.mp4", "whole.mp4"}


def in_segment(index: int, step: int = 1) -> Callable[..., bool]:
    return lambda i, info: (i, info.step) == (index, step)


def test_ctrl_c_in_a_long_video_says_where_it_is_kept(model: Path, stop: Stop) -> None:
    command = [*LONG, "-m", model]
    seed = command.index("--seed")
    del command[seed : seed + 2]
    code, err = stop(_Segments, "on_step", in_segment(1), KeyboardInterrupt(), *command, "-o", "a.mp4")
    assert code == 130
    assert "what is done is kept in a.mp4.segments, the same command goes on from it" in err
    err = made(*command, "-o", "a.mp4").err
    assert "going on after segment 1 of 5" in err and "going on after step 1 of 2" in err
    assert left_in(Path()) == {"a.mp4"}


def test_another_quality_or_the_clip_left_out_goes_on_from_the_same_segments(model: Path, stop: Stop) -> None:
    command = [*LONG, "-m", model, "--clip", clip(Path("clip.mp4"), 9)]
    stop(_Segments, "on_step", in_segment(2), KeyboardInterrupt(), *command, "-o", "a.mp4")
    form = ["--crf", 30, "--keep", "new"]
    err = made(*command, *form, "-o", "a.mp4").err
    assert "Segment 1 of 5" not in err and "Segment 2 of 5" not in err  # their latents serve
    made(*command, *form, "-o", "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")
    assert left_in(Path()) == {"a.mp4", "clip.mp4", "whole.mp4"}


def test_the_clip_is_left_out_when_only_new_frames_are_wanted_after_all(model: Path, stop: Stop) -> None:
    command = [*LONG, "-m", model, "--clip", clip(Path("clip.mp4"), 9)]
    stop(_Segments, "on_step", in_segment(2), KeyboardInterrupt(), *command, "-o", "a.mp4")
    made(*command, "--keep", "new", "-o", "a.mp4")
    made(*command, "--keep", "new", "-o", "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")


def test_the_segments_of_another_job_are_refused_and_kept(model: Path, stop: Stop) -> None:
    stop(_Segments, "on_step", in_segment(1), KeyboardInterrupt(), *LONG, "-m", model, "-o", "a.mp4")
    before = contents("a.mp4.segments")
    other = ["long", "-p", "other", "--segments", 2, "--steps", 1, "-m", model, "-o", "a.mp4"]
    says = refused(*other)
    assert "a.mp4.segments holds the segments of a job with other settings" in says
    assert contents("a.mp4.segments") == before
    err = made(*other, "--overwrite").err
    assert "warning: discarding a.mp4.segments, the unfinished work of another job" in err
    assert left_in(Path()) == {"a.mp4"}


@pytest.mark.parametrize("memory", ["auto", "given"])
def test_what_was_begun_with_another_hand_over_goes_on_with_it(model: Path, stop: Stop, memory: str) -> None:
    """As a run that was interrupted when another one was the default."""
    command = ["long", "-p", "v", "-p", "w", "--steps", 2, "--no-uniform-tail", "-m", model, "--memory", memory]
    begun = [*command, "--handover", "frames", "--seed", 9]
    stop(_Segments, "on_step", in_segment(1), KeyboardInterrupt(), *begun, "-o", "a.mp4")
    named = refused(*command, "--seed", 9, "--handover", "latents", "-o", "a.mp4")
    assert "a.mp4.segments holds the segments of a job with other settings" in named
    err = made(*command, "-o", "a.mp4").err  # of any seed
    assert "going on with --handover frames, as it was begun" in err and "going on after segment 1 of 2" in err
    assert left_in(Path()) == {"a.mp4"}
    made(*begun, "-o", "whole.mp4")
    assert contents("a.mp4") == contents("whole.mp4")


def test_what_was_begun_waits_where_the_default_output_is(model: Path, stop: Stop) -> None:
    command = ["long", "-p", "v", "-p", "w", "--steps", 2, "--no-uniform-tail", "--seed", 9, "-m", model]
    stop(_Segments, "on_step", in_segment(1), KeyboardInterrupt(), *command, "--handover", "official")
    assert "going on with --handover official, as it was begun" in made(*command).err
    made(*command)
    found = [(read_metadata(path) or {})["job"]["handover"] for path in sorted(Path("outputs").iterdir())]
    assert found == ["official", "latents"]


def test_a_folder_of_the_users_is_never_taken_for_segments(model: Path) -> None:
    Path("a.mp4.segments").mkdir()
    Path("a.mp4.segments/holiday.txt").write_text("mine")
    refused(*LONG, "-m", model, "-o", "a.mp4", "--overwrite")
    assert Path("a.mp4.segments/holiday.txt").read_text() == "mine"


def test_overwrite_of_an_output_goes_on_too(model: Path, stop: Stop) -> None:
    Path("a.mp4").write_text("old")
    command = [*LONG, "-m", model, "-o", "a.mp4", "--overwrite"]
    stop(_Segments, "on_step", in_segment(1), KeyboardInterrupt(), *command)
    assert Path("a.mp4").read_text() == "old"
    assert "going on after segment 1 of 5" in made(*command).err
    assert len(Path("a.mp4").read_bytes()) > 1000 and left_in(Path()) == {"a.mp4"}


def test_unfinished_work_is_not_continued_in_another_dtype(model: Path, stop: Stop) -> None:
    command = [*LONG, "-m", model, "-o", "a.mp4"]
    stop(_Segments, "on_step", in_segment(1), KeyboardInterrupt(), *command)
    assert "job with other settings" in refused(*command, "--dtype", "bf16")
    stop.monkeypatch.setattr("lcv_core.cli.load.SMALL_MODEL", 0)  # now "auto" is another dtype
    assert "job with other settings" in refused(*command)


def test_segments_are_on_disk_as_they_finish_and_one_at_a_time_in_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    on_disk: dict[int, set[str]] = {}
    write, on_step = SegmentSink.write, _Segments.on_step

    def watched_write(self: SegmentSink, piece: Path, chunks: list[Tensor]) -> None:
        # Of a view the tensor that it is a view of: that is where the memory is.
        alive.extend(weakref.ref(chunk if chunk._base is None else chunk._base) for chunk in chunks)
        write(self, piece, chunks)

    def watched_step(self: _Segments, index: int, info: StepInfo) -> None:
        assert [ref for ref in alive if ref() is not None] == []
        on_disk[index] = {str(path.relative_to(self.store.folder)) for path in self.store.folder.rglob("*.mp4")}
        on_step(self, index, info)

    monkeypatch.setattr(SegmentSink, "write", watched_write)
    monkeypatch.setattr(_Segments, "on_step", watched_step)
    made(*LONG, "-m", model, "-o", "a.mp4")
    assert len(alive) == 5 and {index: len(files) for index, files in on_disk.items()} == dict(enumerate(range(5)))
    alive.clear()
    on_disk.clear()
    refine = ["--window", 5, "--steps", 1, "--height", 32, "--width", 48]
    made("refine", clip(Path("clip.mp4"), 9), "-m", model, *refine, "-o", "r.mp4")
    assert len(alive) == 3


def test_the_note_in_unfinished_work_is_its_job(model: Path, stop: Stop) -> None:
    stop(_Segments, "on_step", in_segment(1), KeyboardInterrupt(), *LONG, "-m", model, "-o", "a.mp4")
    note = json.loads(Path("a.mp4.segments/job.json").read_text())["note"]
    assert json.loads(note)["job"]["prompts"] == ["v", "w", "x", "y", "z"]
