"""What the command line writes: every kind of output, the settings in it, and `lcv rerun`."""

from __future__ import annotations

import dataclasses
import json
import stat
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from cli_helpers import clip, copy_model, left_in, made, refused, scale_weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcv_core.cli.job import InputFile, Job, Lora
from lcv_core.cli.main import run
from lcv_core.cli.outputs import read_settings
from lcv_core.errors import InputError
from lcv_core.image_io import read_image, write_png
from lcv_core.video_io import probe_video, read_metadata, read_video, write_video
from lcv_core.weights.checkpoint import open_checkpoint


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model; the working folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tiny_checkpoint


@pytest.fixture
def ball(model: Path) -> list[object]:
    return ["t2v", "-m", model, "-p", "a red ball", "--steps", 2, "--seed", 7]


def picture(path: str, seed: int = 0, size: tuple[int, int] = (48, 32)) -> Path:
    noise = torch.rand(size[1], size[0], 3, generator=torch.Generator().manual_seed(seed))
    write_png(path, noise)
    return Path(path)


def job_in(path: str) -> dict[str, Any]:
    data = read_metadata(path)
    assert data is not None
    return data["job"]


# Kinds of output


def test_video_with_a_frame_rate_and_a_quality(ball: list[object]) -> None:
    made(*ball, "-o", "a.mp4")
    made(*ball, "-o", "b.mp4", "--frame-rate", 24, "--crf", 40)
    made(*ball, "-o", "c.MKV")
    a, b = probe_video("a.mp4"), probe_video("b.mp4")
    assert (a.width, a.height, a.num_frames, a.frame_rate) == (48, 32, 9, 15.0)
    assert (b.num_frames, b.frame_rate) == (9, 24.0)
    assert Path("b.mp4").stat().st_size < Path("a.mp4").stat().st_size
    assert torch.equal(read_video("a.mp4"), read_video("c.MKV"))
    assert left_in(Path()) == {"a.mp4", "b.mp4", "c.MKV"}


def test_png_frames_hold_what_the_latents_decode_to(ball: list[object]) -> None:
    made(*ball, "-o", "frames")
    assert left_in(Path("frames")) == {f"frame_{i:05d}.png" for i in range(9)}
    made(*ball, "-o", "a.mp4", "--crf", 0)
    frames = torch.stack([read_image(file) for file in sorted(Path("frames").iterdir())])
    light = torch.tensor([0.2126, 0.7152, 0.0722])  # video halves the resolution of colours, not that of light
    assert (frames.float() @ light - read_video("a.mp4").float() @ light).abs().mean() < 2


def test_latents_decode_to_the_video(ball: list[object]) -> None:
    made(*ball, "-o", "a.safetensors")
    latents = load_file("a.safetensors")["latents"]
    assert latents.shape == (1, 16, 3, 4, 6) and latents.dtype == torch.float32
    assert left_in(Path()) == {"a.safetensors"}


def test_files_are_readable_by_those_whom_the_umask_allows(ball: list[object]) -> None:
    for name in ("a.mp4", "a.safetensors"):
        made(*ball, "-o", name)
        assert stat.S_IMODE(Path(name).stat().st_mode) & 0o044 == 0o044


def test_a_shorter_png_sequence_replaces_a_longer_one(ball: list[object]) -> None:
    made(*ball, "-o", "frames")
    Path("frames", "notes.txt").write_text("mine")
    made(*ball, "-o", "frames", "--frames", 5, "--overwrite")
    assert left_in(Path("frames")) == {"notes.txt"} | {f"frame_{i:05d}.png" for i in range(5)}


def test_the_working_folder_itself_takes_png_frames(ball: list[object]) -> None:
    made(*ball, "-o", ".")
    assert left_in(Path()) == {f"frame_{i:05d}.png" for i in range(9)}
    assert left_in(Path("..")) >= {"work"} and not any(".partial" in name for name in left_in(Path("..")))


def test_default_names_count_up(model: Path) -> None:
    for _ in range(2):
        made("t2v", "-m", model, "-p", "x", "--steps", 1)
    made("t2v", "-m", model, "-p", "x", "-p", "y", "--steps", 1)
    made("t2v", "-m", model, "-p", "x", "-p", "y", "--steps", 1)
    numbered = {f"t2v-000{n}-{i}.mp4" for n in (3, 4) for i in (1, 2)}
    assert left_in(Path("outputs")) == {"t2v-0001.mp4", "t2v-0002.mp4"} | numbered


def test_several_videos_are_numbered_and_each_is_repeated_alone(model: Path) -> None:
    made("t2v", "-m", model, "-p", "x", "-p", "y", "--num-videos", 2, "--steps", 2, "--seed", 5, "-o", "a.mp4")
    assert left_in(Path()) == {f"a-{i}.mp4" for i in (1, 2, 3, 4)}
    assert [(job_in(f"a-{i}.mp4")["prompts"], job_in(f"a-{i}.mp4")["seed"]) for i in (1, 2, 3, 4)] == [
        (["x"], 5), (["x"], 6), (["y"], 7), (["y"], 8),
    ]  # fmt: skip
    assert len({Path(f"a-{i}.mp4").read_bytes() for i in (1, 2, 3, 4)}) == 4
    made("rerun", "a-4.mp4", "-o", "again.mp4")
    assert Path("again.mp4").read_bytes() == Path("a-4.mp4").read_bytes()
    made("t2v", "-m", model, "-p", "x", "-p", "y", "--steps", 1, "-o", "frames")
    assert {"frames-1", "frames-2"} <= left_in(Path())


def test_distilled_and_a_lora_change_the_video(ball: list[object], model: Path) -> None:
    lora = model / "lora" / "refinement_lora.safetensors"
    made(*ball, "-o", "a.safetensors")
    made(*ball, "-o", "b.safetensors", "--schedule", "distilled")
    made(*ball, "-o", "c.safetensors", "--lora", f"{lora}:2")
    a, b, c = (load_file(f"{name}.safetensors")["latents"] for name in "abc")
    assert not torch.equal(a, b) and not torch.equal(a, c)


# The tasks


def test_image_to_video_keeps_the_shape_of_the_picture(model: Path) -> None:
    made("i2v", "-m", model, "-i", picture("tall.png", size=(40, 60)), "-p", "x", "--steps", 1, "-o", "a.mp4")
    info = probe_video("a.mp4")
    assert info.height > info.width


def test_continue_keeps_the_clip_at_the_frame_rate_of_the_model(model: Path) -> None:
    a = clip(Path("a.mp4"), 30, frame_rate=30.0)
    made("continue", a, "-m", model, "-p", "x", "--steps", 1, "-o", "all.mp4", "--crf", 0)
    made("continue", a, "-m", model, "-p", "x", "--steps", 1, "-o", "new.mp4", "--keep", "new")
    assert (probe_video("all.mp4").num_frames, probe_video("all.mp4").frame_rate) == (15 + 4, 15.0)
    assert probe_video("new.mp4").num_frames == 4
    source = read_video(a, frame_rate=15.0).float()
    assert (read_video("all.mp4")[:15].float() - source).abs().mean() < 8  # encoded twice


def test_continue_of_a_video_with_uneven_times(model: Path) -> None:
    """Ten frames in two seconds, most of them at the end: by time, not by number."""
    with av.open("a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        for i, time in enumerate([0, 30, 33, 36, 39, 42, 45, 48, 51, 57]):
            frame = av.VideoFrame.from_ndarray(torch.full((32, 48, 3), 25 * i, dtype=torch.uint8).numpy(), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    made("continue", "a.mp4", "-m", model, "-p", "x", "--steps", 1, "-o", "b.mp4")
    assert read_video("b.mp4")[:16, 0, 0, 0].max() < 40  # the first frame stays for a second


@pytest.mark.parametrize("handover", ["frames", "official", "latents"])
def test_a_long_video_has_the_frames_of_its_segments(model: Path, handover: str) -> None:
    command = ["long", "-m", model, "-p", "x", "-p", "y", "-p", "z", "--steps", 1, "--seed", 1, "--handover", handover]
    made(*command, "-o", "a.mp4")
    made(*command, "-o", "a.mkv")
    made(*command, "-o", "frames")
    assert probe_video("a.mp4").num_frames == 9 + 2 * 4
    assert torch.equal(read_video("a.mp4"), read_video("a.mkv"))
    assert len(left_in(Path("frames"))) == 17
    assert left_in(Path()) == {"a.mp4", "a.mkv", "frames"}
    assert job_in("a.mp4")["handover"] == handover


def test_long_latents_have_each_moment_once(model: Path) -> None:
    command = ["long", "-m", model, "-p", "x", "--segments", 3, "--steps", 1, "--seed", 1]
    made(*command, "-o", "a.safetensors")
    assert load_file("a.safetensors")["latents"].shape[2] == 3 + 1 + 1  # 9, 4 and 4 frames
    assert read_settings(Path("a.safetensors"))["job"]["handover"] == "latents"
    made(*command, "--handover", "latents", "-o", "named.safetensors")
    assert Path("named.safetensors").read_bytes() == Path("a.safetensors").read_bytes()
    a = clip(Path("clip.mp4"), 9)
    made(*command, "--clip", a, "-o", "b.safetensors")
    assert load_file("b.safetensors")["latents"].shape[2] == 3 + 1 + 1  # those of the clip's last frames first


def test_a_long_video_starts_from_a_picture_or_a_clip(model: Path) -> None:
    a = clip(Path("clip.mp4"), 9)
    command = ["long", "-m", model, "-p", "x", "--segments", 2, "--steps", 1]
    made(*command, "--clip", a, "-o", "all.mp4")
    made(*command, "--clip", a, "-o", "new.mp4", "--keep", "new")
    made(*command, "-i", picture("a.png"), "-o", "image.mp4")
    names = ("all.mp4", "new.mp4", "image.mp4")
    assert [probe_video(name).num_frames for name in names] == [9 + 4 + 4, 8, 9 + 4]


def test_refine_doubles_size_and_frame_rate(model: Path) -> None:
    a = clip(Path("a.mp4"), 9)
    made("refine", a, "-m", model, "-o", "one.mp4", "--steps", 1)
    rest = ["-m", model, "--steps", 1, "--height", 32, "--width", 48]
    made("refine", a, *rest, "-o", "windows.mp4", "--window", 5)
    made("refine", a, *rest, "-o", "space.mp4", "--spatial-only", "--image", picture("a.png"))
    one, windows, space = (probe_video(f"{name}.mp4") for name in ("one", "windows", "space"))
    assert (one.height, one.width) == (64, 128) and (one.num_frames, one.frame_rate) == (18, 30.0)
    assert (windows.num_frames, windows.frame_rate) == (17, 30.0)
    assert (space.num_frames, space.frame_rate) == (9, 15.0)


def test_refine_takes_the_prompt_of_a_clip_that_lcv_made(ball: list[object], model: Path) -> None:
    made(*ball, "-o", "a.mp4")
    small = ["-m", model, "--steps", 1, "--height", 32, "--width", 32]
    made("refine", "a.mp4", *small, "-o", "b.mp4")
    assert job_in("b.mp4")["prompts"] == ["a red ball"]
    made("refine", clip(Path("c.mp4"), 5), *small, "-o", "d.mp4")
    assert job_in("d.mp4")["prompts"] == [""]
    write_video("e.mp4", torch.zeros(5, 32, 48, 3), frame_rate=15, metadata={"job": "of another program"})
    made("refine", "e.mp4", *small, "-o", "f.mp4")


# Settings and rerun


def test_every_output_carries_its_settings(ball: list[object], model: Path) -> None:
    for name in ("a.mp4", "a.mov", "a.mkv", "frames", "a.safetensors"):
        made(*ball, "-o", name)
    with safe_open("a.safetensors", "np") as file:
        latents = json.loads(file.metadata()["lcv"])["job"]
    jobs = [job_in(name) for name in ("a.mp4", "a.mov", "a.mkv", "frames", "frames/frame_00000.png")] + [latents]
    for job in jobs:
        assert (job["task"], job["prompts"], job["seed"], job["num_steps"]) == ("t2v", ["a red ball"], 7, 2)
        assert job["model_hash"] == open_checkpoint(model).fingerprint()
        assert set(job["part_hashes"]) == {"vae", "text_encoder", "tokenizer", "settings"}


@pytest.mark.parametrize(
    "source", ["a.mp4", "frames", "frames/frame_00000.png", "frames/frame_00004.png", "a.safetensors"]
)
def test_rerun_repeats_any_output_bit_for_bit(ball: list[object], source: str) -> None:
    name = source.partition("/")[0]
    made(*ball, "-o", name)
    again = f"again{Path(name).suffix}"
    made("rerun", source, "-o", again)
    if name == "frames":
        assert left_in(Path(name)) == left_in(Path(again))
        assert all(file.read_bytes() == Path(again, file.name).read_bytes() for file in Path(name).iterdir())
    else:
        assert Path(name).read_bytes() == Path(again).read_bytes()


def test_rerun_of_every_task(model: Path) -> None:
    a, image = clip(Path("clip.mp4"), 9), picture("a.png")
    lora = f"{model / 'lora' / 'refinement_lora.safetensors'}:0.5"
    rest = ["-m", model, "--seed", 3, "--steps", 1]
    small = ["--height", 32, "--width", 48, "--refine-attention", "dense"]
    made("i2v", "-i", image, "-p", "x", *rest, "-o", "i2v.mp4", "--lora", lora, "--fit", "pad", "--posterior", "sample")
    made("continue", a, "-p", "x", *rest, "-o", "continue.mp4", "--keep", "new", "--no-kv-cache", "--cfg-scope", "all")
    made("long", "--clip", a, "-p", "x", *rest, "--segments", 2, "--no-uniform-tail", "-o", "long.mp4")
    made("refine", a, "-p", "x", *rest, "-o", "refine.mp4", "--window", 5, "--joint", "cut", *small)
    for task in ("i2v", "continue", "long", "refine"):
        made("rerun", f"{task}.mp4", "-o", "again.mp4", "--overwrite")
        assert Path("again.mp4").read_bytes() == Path(f"{task}.mp4").read_bytes(), task


def test_rerun_with_another_form(ball: list[object]) -> None:
    made(*ball, "-o", "a.mp4")
    made("rerun", "a.mp4", "--frame-rate", 30, "--crf", 30)
    assert probe_video("outputs/t2v-0001.mp4").frame_rate == 30.0
    made("rerun", "a.mp4", "-o", "a.safetensors")
    made(*ball, "-o", "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_rerun_refuses_another_model(ball: list[object], model: Path, tmp_path: Path) -> None:
    made(*ball, "-o", "a.mp4")
    other = copy_model(model, tmp_path / "other")
    assert run(["rerun", "a.mp4", "-m", str(other), "-o", "same.mp4"]) == 0
    scale_weights(other / "vae" / "diffusion_pytorch_model.safetensors", 0.5)
    assert f"the vae of {other} is not the one that a.mp4 was made with" in refused("rerun", "a.mp4", "-m", other)
    scale_weights(other / "dit" / "diffusion_pytorch_model-00001-of-00002.safetensors", 0.5)
    assert "is not the model of a.mp4 (hash " in refused("rerun", "a.mp4", "-m", other)
    assert "no model at gone" in refused("rerun", "a.mp4", "-m", "gone")


def test_rerun_refuses_changed_inputs(model: Path) -> None:
    lora = Path("lora.safetensors")
    lora.write_bytes((model / "lora" / "refinement_lora.safetensors").read_bytes())
    image = picture("a.png")
    made("i2v", "-m", model, "-i", image, "-p", "x", "--steps", 1, "-o", "a.mp4", "--lora", lora)
    lora.write_bytes((model / "lora" / "cfg_step_lora.safetensors").read_bytes())
    assert "lora.safetensors is not the file the job was made with" in refused("rerun", "a.mp4")
    lora.unlink()
    assert "the job read lora.safetensors, which is not there" in refused("rerun", "a.mp4")
    lora.write_bytes((model / "lora" / "refinement_lora.safetensors").read_bytes())
    picture("a.png", seed=1)
    assert "a.png is not the file the job was made with" in refused("rerun", "a.mp4")
    image.unlink()
    assert "the job read a.png, which is not there" in refused("rerun", "a.mp4")


def test_rerun_refuses_files_that_lcv_did_not_make(model: Path) -> None:
    Image.new("RGB", (8, 8)).save("foreign.png")
    clip(Path("foreign.mp4"), 5)
    save_file({"x": torch.zeros(1)}, "foreign.safetensors")
    for name in ("foreign.png", "foreign.mp4", "foreign.safetensors"):
        assert refused("rerun", name) == f"{name} carries no settings; only files made by lcv do"
    Path("foreign").mkdir()
    assert "carries no settings" in refused("rerun", "foreign")
    Path("notes.txt").write_text("x")
    Path("broken.safetensors").write_text("x" * 100)
    assert "notes.txt" in refused("rerun", "notes.txt")
    assert "broken.safetensors is damaged or not a safetensors file" in refused("rerun", "broken.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "seven"}, {"seed": True}, {"prompts": "x"}, {"prompts": [1]}, {"task": "dance"}, {"image": "a.png"},
        {"loras": [{"path": "x"}]}, {"num_frames": 9.5}, {"schedule": None}, {"part_hashes": []}, {"model": None},
    ],
)  # fmt: skip
def test_rerun_of_damaged_settings(ball: list[object], change: dict[str, object]) -> None:
    made(*ball, "-o", "a.mp4")
    data = read_metadata("a.mp4") or {}
    write_png("b.png", torch.zeros(8, 8, 3), data | {"job": data["job"] | change})
    assert "b.png holds a damaged job" in refused("rerun", "b.png")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": -1}, "--seed must be"),
        ({"num_frames": 10}, "4k+1"),
        ({"prompts": []}, "prompt"),
        ({"tile": -32}, "--tile"),
    ],
)
def test_rerun_of_impossible_settings(ball: list[object], change: dict[str, object], says: str) -> None:
    made(*ball, "-o", "a.mp4")
    data = read_metadata("a.mp4") or {}
    write_png("b.png", torch.zeros(8, 8, 3), data | {"job": data["job"] | change})
    assert says in refused("rerun", "b.png")


def test_rerun_of_a_later_format(ball: list[object]) -> None:
    made(*ball, "-o", "a.mp4")
    data = read_metadata("a.mp4") or {}
    write_png("b.png", torch.zeros(8, 8, 3), data | {"format": 99})
    assert "b.png holds no job this version can repeat (its format is 99)" in refused("rerun", "b.png")
    del data["job"]["seed"]
    write_png("c.png", torch.zeros(8, 8, 3), data)
    assert "it lacks seed" in refused("rerun", "c.png")


# The key of a job


_JOB = Job(task="t2v", model="m", prompts=["x"], seed=1)
_OTHER: dict[str, Any] = {
    "task": "i2v", "prompts": ["y"], "seed": 2, "model_hash": "b", "part_hashes": {"vae": "b"}, "negative_prompt": "",
    "loras": [Lora("l", 1.0, "a")], "image": InputFile("i", "a"), "clip": InputFile("c", "a"),
    "cond_video": InputFile("v", "a"), "height": 16, "width": 16, "num_frames": 5, "num_cond_frames": 5,
    "num_segments": 2, "num_videos": 2, "num_steps": 3, "guidance_scale": 1.0, "schedule": "distilled",
    "uniform_tail": False, "kv_cache": False, "handover": "frames", "fit": "pad", "posterior": "sample",
    "cfg_scope": "all", "cfg_mode": "batched", "t_thresh": 0.4, "refine_steps": 3, "spatial_only": True,
    "time_mapping": "exact", "joint": "cut", "window": 9, "attention": "bsa", "refine_attention": "dense",
    "dtype": "bf16", "weights": "int8", "timestep_precision": "fp32", "tile": 256,
    "cfg_interval": [0.1, 0.9], "step_cache": 0.05, "compile": "blocks", "sparsity": 0.5, "sparse_8bit": True,
    "kv_cache_storage": "fp8", "kernels": "torch",
}  # fmt: skip
# What does not change the latents: where things are, and the form of the output.
_FORM: dict[str, Any] = {
    "model": "n", "vae": "v", "text_encoder": "t", "tokenizer": "k", "frame_rate": 30.0, "crf": 30.0, "keep": "new",
    "stream": "disk", "resident": 2.0, "kv_cache_place": "cpu",
}  # fmt: skip


def test_every_setting_is_known_to_change_the_numbers_or_not() -> None:
    assert set(_OTHER) | set(_FORM) == {field.name for field in dataclasses.fields(Job)}


@pytest.mark.parametrize("name", _OTHER)
def test_unfinished_work_is_not_shared_when_numbers_change(name: str) -> None:
    assert dataclasses.replace(_JOB, **{name: _OTHER[name]}).key() != _JOB.key()


def test_unfinished_work_is_shared_when_only_the_form_changes() -> None:
    assert dataclasses.replace(_JOB, **_FORM).key() == _JOB.key()
    here = dataclasses.replace(_JOB, image=InputFile("here", "a"), loras=[Lora("here", 1.0, "a")])
    there = dataclasses.replace(_JOB, image=InputFile("there", "a"), loras=[Lora("there", 1.0, "a")])
    assert here.key() == there.key()


def test_a_job_comes_back_from_its_metadata() -> None:
    job = dataclasses.replace(_JOB, **_OTHER, **_FORM)
    assert Job.from_metadata(json.loads(json.dumps(job.to_metadata())), Path("x")) == job


@pytest.mark.parametrize(
    "change",
    [{"guidance_scale": float("nan")}, {"crf": float("nan")}, {"num_steps": 0}, {"num_segments": 0}, {"window": 4}],
)
def test_numbers_that_no_job_may_have(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--"):
        dataclasses.replace(_JOB, **change).check()
