"""What was changed because memory ran out stands in the output, beside the job that asked for something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import clip, lcv, made
from safetensors.torch import load_file
from tiny_models import pictures

from lcv_core.cli import run
from lcv_core.cli.job import Job
from lcv_core.cli.outputs import CHANGED, changed_line, changes_in, read_settings
from lcv_core.dit.model import LongCatDiT
from lcv_core.image_io import read_sequence_metadata, rewrite_sequence_metadata, write_png_sequence
from lcv_core.planning import plan
from lcv_core.planning.machine import Machine, Speed
from lcv_core.text.encoder import TextEncoder
from lcv_core.vae.model import WanVAE
from lcv_core.video_io import iter_video, probe_video, read_metadata, read_video, rewrite_metadata, write_video

T2V = ("t2v", "-p", "a ball", "--steps", 3, "--seed", 1)
LONG = ("long", "-p", "a ball", "--segments", 2, "--steps", 2, "--no-uniform-tail", "--seed", 1)
TO_RAM = {"from": {"stream": "off"}, "to": {"stream": "ram"}}


@pytest.fixture(autouse=True)
def a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned for a card on which everything fits, while the model is tiny and on the CPU."""
    machine = Machine("a card", "gpu", 10**12, 10**12, Speed(1e14, 1e12, 1e10))
    monkeypatch.setattr(run, "this_machine", lambda device: machine)
    monkeypatch.setattr(plan, "STREAM_SLOTS", 1)  # two blocks are all that the tiny model has
    monkeypatch.chdir(tmp_path)


def fail(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: dict[int, BaseException | None]) -> None:
    """Errors at some calls of a method, counted from 1; None: the device has run out of memory."""
    count, original = 0, getattr(owner, name)

    def wrapped(*args: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count in at:
            raise at[count] or torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **named)

    monkeypatch.setattr(owner, name, wrapped)


def changes(path: str) -> Any:
    settings = read_settings(Path(path))
    assert Job.from_metadata(settings, Path(path)).stream == "off"  # what was asked for
    return settings.get(CHANGED)


def test_changes_of_a_clip_stand_in_it_and_its_repetition_says_so(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(*T2V, "-m", tiny_checkpoint, "-o", "plain.safetensors")
    assert changes("plain.safetensors") is None
    with monkeypatch.context() as patch:
        fail(patch, TextEncoder, "encode", {1: None})
        fail(patch, LongCatDiT, "forward", {3: None})
        made(*T2V, "-m", tiny_checkpoint, "-o", "a.safetensors")
    assert changes("a.safetensors") == [
        {"stage": "text encode", "where": "", "from": {"text_device": "same"}, "to": {"text_device": "cpu"}},
        {"stage": "sampling", "where": "at step 2", **TO_RAM},
    ]
    outcome = made("rerun", "a.safetensors", "-o", "b.safetensors")
    words = "text_device same became cpu in text encode; stream off became ram in sampling at step 2"
    assert f"ran out of memory while it was made ({words})" in " ".join(outcome.err.split())
    assert changes("b.safetensors") is None
    latents = [load_file(f"{name}.safetensors")["latents"] for name in ("plain", "a", "b")]
    assert latents[0].equal(latents[1]) and latents[0].equal(latents[2])


@pytest.mark.parametrize("output", ["a.mp4", "a.mkv", "frames"])
def test_changes_while_it_is_decoded_are_in_it_too(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    command = (*T2V, "-m", tiny_checkpoint)
    made(*command, "-o", output)
    read = read_video if "." in output else _pictures
    expected = read(Path(output))
    with monkeypatch.context() as patch:
        fail(patch, WanVAE, "decode_step", {2: None})
        made(*command, "-o", output, "--overwrite")
    assert changes(output) == [{"stage": "VAE decode", "where": "at latent frame 2", **TO_RAM}]
    assert read(Path(output)).equal(expected)
    assert not list(Path.cwd().glob(".*"))


def _pictures(folder: Path) -> torch.Tensor:
    from lcv_core.image_io import read_image

    return torch.stack([read_image(file) for file in sorted(folder.glob("*.png"))])


def test_of_several_outputs_only_those_after_it_carry_a_change(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, LongCatDiT, "forward", {2 * 3 + 3: None})
    made(*T2V, "-m", tiny_checkpoint, "--num-videos", 3, "-o", "a.safetensors")
    here = [{"stage": "sampling", "where": "a-2.safetensors, at step 2", **TO_RAM}]
    assert [changes(f"a-{i}.safetensors") for i in (1, 2, 3)] == [None, here, here]


def test_a_long_video_names_the_segment(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, LongCatDiT, "forward", {2 * 2 + 3: None})
    made(*LONG, "-m", tiny_checkpoint, "--no-kv-cache", "-o", "a.mp4")
    assert changes("a.mp4") == [{"stage": "sampling", "where": "segment 2 of 2, at step 2", **TO_RAM}]


@pytest.mark.parametrize("command", [T2V, LONG], ids=["clip", "long"])
def test_what_was_changed_before_an_interruption_is_kept(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[Any, ...]
) -> None:
    arguments = (*command, "-m", tiny_checkpoint, "-o", "a.mp4")
    with monkeypatch.context() as patch:
        fail(patch, LongCatDiT, "forward", {1: None, 6: KeyboardInterrupt()})
        assert lcv(*arguments).code == 130
    with monkeypatch.context() as patch:
        fail(patch, LongCatDiT, "forward", {2: KeyboardInterrupt()})  # once more, with nothing changed
        assert lcv(*arguments).code == 130
    made(*arguments)
    first, back = changes("a.mp4")
    assert first["stage"] == "sampling" and first["where"].endswith("at step 1")
    assert {name: first[name] for name in TO_RAM} == TO_RAM
    assert back == {"stage": "all", "where": "gone on with later", "from": {"stream": "ram"}, "to": {"stream": "off"}}


def test_a_refinement_too(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = clip(Path("clip.mp4"), 5)
    fail(monkeypatch, LongCatDiT, "forward", {1: None})
    made("refine", source, "-p", "a ball", "-m", tiny_checkpoint, "--steps", 1, "--seed", 1, "-o", "a.mp4")
    assert changes("a.mp4") == [{"stage": "sampling", "where": "at step 1", **TO_RAM}]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_other_settings_in_a_finished_video_leave_its_frames_and_times(name: str) -> None:
    path = Path(name)
    write_video(path, pictures(7), frame_rate=12.5, metadata={"a": 1})
    frames, info = read_video(path), probe_video(path)
    rewrite_metadata(path, {"b": [2, "ü"]})
    assert read_metadata(path) == {"b": [2, "ü"]}
    assert read_video(path).equal(frames) and probe_video(path) == info
    assert len(list(iter_video(path, frame_rate=25.0))) == 14


def test_other_settings_in_a_finished_sequence_leave_its_pictures() -> None:
    write_png_sequence("frames", pictures(3), {"a": 1})
    before = _pictures(Path("frames"))
    rewrite_sequence_metadata("frames", {"b": 2})
    assert read_sequence_metadata("frames") == {"b": 2} and _pictures(Path("frames")).equal(before)


@pytest.mark.parametrize(
    "settings", [{}, {CHANGED: 3}, {CHANGED: [4, None, {"from": 1, "to": {}}]}, {CHANGED: {}}, None]
)
def test_damaged_changes_are_passed_over(settings: Any) -> None:
    assert changes_in(settings) == []
    assert changed_line(settings, Path("a.mp4")) is None
