"""Bad input to the command line: one sentence that says what to do, before any long work."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import clip, copy_model, lcv, left_in, made, refused, scale_weights, usage_error
from PIL import Image
from safetensors.torch import load_file, save_file

DIT_SHARD = "dit/diffusion_pytorch_model-00001-of-00002.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model; the working folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tiny_checkpoint


@pytest.fixture
def changed(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model to damage."""
    monkeypatch.chdir(tmp_path)
    return copy_model(tiny_checkpoint, tmp_path / "model")


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (48, 32), **save: object) -> Path:
    Image.new(mode, size, 60000 if mode.startswith("I") else None).save(path, **save)  # type: ignore[arg-type]
    return path


# What is wrong whatever the model


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--frames 10", "--frames must be 4k+1, got 10; try 9 or 13"),
        ("--frames 0", "--frames must be 4k+1 and at least 1, got 0"),
        ("--frames -3", "--frames must be 4k+1 and at least 1, got -3"),
        ("--height 40", "height must be a multiple of 16, got 40; try 32 or 48"),
        ("--width 0", "width must be a multiple of 16, got 0; try 16 or 32"),
        ("--width 31", "width must be a multiple of 16, got 31"),
        ("--seed 18446744073709551616", "--seed must be from 0 to 18446744073709551615"),
        ("--seed 18446744073709551615 -p y", "--seed must be from 0 to"),
        ("--guidance inf", "--guidance must be at least 0, got inf"),
        ("--frame-rate inf", "--frame-rate must be from 0.1 to 1000"),
        ("--tile 40", "--tile must be a multiple of 32, got 40; try 32"),
        ("--tile 8", "--tile must be a multiple of 32, got 8; try 32"),
        ("-o a.gif", "cannot write .gif files; use a.mp4 for video"),
        ("-o a.png", "cannot write .png files; use a.mp4 for video, a for a folder of PNG frames"),
        ("--device warp", 'unknown device "warp"; use cpu, cuda'),
        ("--device meta", 'device "meta" computes nothing; try --device auto'),
        ("--attention fast", 'unknown attention backend "fast"; there are: auto, sdpa'),
        ("--attention xformers", 'attention backend "xformers" is not usable: '),
        ("--schedule distilled --steps 51", "the distilled schedule has at most 50 steps, got 51"),
    ],
)
def test_t2v_options(model: Path, options: str, says: str) -> None:
    assert says in refused("t2v", "-m", model, "-p", "x", *options.split())
    assert not any(path.is_file() for path in Path().rglob("*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--steps 0", "--steps"), ("--steps -1", "--steps"), ("--steps many", "--steps"), ("--seed -1", "--seed"),
        ("--guidance -1", "--guidance"), ("--num-videos 0", "--num-videos"), ("--crf 52", "--crf"),
        ("--schedule slow", "slow"), ("--dtype fp8", "fp8"), ("--frame-rate 0", "--frame-rate"),
        ("--guidance nan", "--guidance"), ("--crf nan", "--crf"),
    ],
)  # fmt: skip
def test_values_that_the_parser_refuses(model: Path, options: str, says: str) -> None:
    assert says in usage_error("t2v", "-m", model, "-p", "x", *options.split())


def test_devices_that_are_not_here(model: Path) -> None:
    if torch.cuda.is_available():
        assert "cannot be used here" in refused("t2v", "-m", model, "-p", "x", "--device", "cuda:99")
    else:
        says = refused("t2v", "-m", model, "-p", "x", "--device", "cuda")
        assert 'device "cuda" cannot be used here (' in says and says.endswith("try --device auto")
    assert len(refused("t2v", "-m", model, "-p", "x", "--device", "xla")) < 200


def test_no_prompt_and_no_such_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no prompt" in refused("t2v", "-m", model)
    monkeypatch.delenv("LCV_MODEL", raising=False)
    assert "there is no prompt" in refused("t2v")  # but there is a model
    assert "no model at gone; check --model" in refused("t2v", "-m", "gone", "-p", "x")
    monkeypatch.setenv("LCV_MODEL", "gone too")
    assert "no model at gone too" in refused("t2v", "-p", "x")


@pytest.mark.parametrize("count", ["0", "2", "-1"])
@pytest.mark.parametrize("command", ["continue", "long"])
def test_condition_frames(model: Path, command: str, count: str) -> None:
    file = [clip(Path("a.mp4"), 9)] if command == "continue" else []
    says = refused(command, *file, "-m", model, "-p", "x", f"--cond-frames={count}")
    assert says.startswith("--cond-frames must be ") and f"got {count}" in says


def test_too_many_condition_frames(model: Path) -> None:
    a = clip(Path("a.mp4"), 9)
    assert "nothing would be new" in refused("continue", a, "-m", model, "-p", "x", "--cond-frames", "9")
    assert "nothing would be new" in refused("long", "-m", model, "-p", "x", "--frames", "5")
    says = refused("continue", a, "-m", model, "-p", "x", "--cond-frames", "13", "--frames", "33")
    assert "only 9 frames at 15 frames per second, 13 are needed" in says


def test_prompts_and_segments(model: Path) -> None:
    assert "2 prompts for 3 segments" in refused("long", "-m", model, "-p", "x", "-p", "y", "--segments", "3")
    assert "--segments" in usage_error("long", "-m", model, "-p", "x", "--segments", "0")
    a = clip(Path("a.mp4"), 9)
    assert "2 prompts for 1 windows" in refused("refine", a, "-m", model, "-p", "x", "-p", "y")


def test_image_to_video_needs_a_picture_and_five_frames(model: Path) -> None:
    image = picture(Path("a.png"))
    assert "name it with --image" in refused("i2v", "-m", model, "-p", "x")
    assert "at least 5, got 1" in refused("i2v", "-m", model, "-p", "x", "-i", image, "--frames", "1")
    assert "not both" in refused("long", "-m", model, "-p", "x", "-i", image, "--clip", image)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--t-thresh 0", "--t-thresh must be in (0, 1], got 0"),
        ("--t-thresh 1.5", "--t-thresh must be in (0, 1], got 1.5"),
        ("--t-thresh nan", "--t-thresh must be in (0, 1], got nan"),
        ("--steps 900", "no refine schedule has 900 steps"),
        ("--cond-frames 3", "--cond-frames counts frames of --video"),
        ("--video a.mp4 --cond-frames 0", "--cond-frames counts frames of --video"),
        ("--video a.mp4", "has only 18 frames at 30 frames per second, 26 are needed"),
        ("--image a.mp4", "is not an image"),
        ("--image a.mp4 --video a.mp4", "not both"),
        ("-o out.safetensors", "refine writes video or PNG frames, not latents"),
    ],
)
def test_refine_options(model: Path, options: str, says: str) -> None:
    clip(Path("a.mp4"), 9)
    assert says in refused("refine", "a.mp4", "-m", model, *options.split())


def test_long_latents_need_the_latent_handover(model: Path) -> None:
    command = ["long", "-m", model, "-p", "x", "--handover", "frames", "-o", "a.safetensors"]
    assert "--handover latents" in refused(*command)


# Files that are read


def test_missing_files_folders_and_empty_files(model: Path) -> None:
    Path("folder").mkdir()
    Path("empty.png").touch()
    assert "gone.png does not exist" in refused("i2v", "-m", model, "-p", "x", "-i", "gone.png")
    assert "folder is a folder" in refused("i2v", "-m", model, "-p", "x", "-i", "folder")
    assert "empty.png is empty" in refused("i2v", "-m", model, "-p", "x", "-i", "empty.png")
    for command in ("continue", "refine"):
        assert "gone.mp4 does not exist" in refused(command, "gone.mp4", "-m", model, "-p", "x")
        assert "folder is a folder" in refused(command, "folder", "-m", model, "-p", "x")
    assert "gone.mp4 does not exist" in refused("long", "-m", model, "-p", "x", "--clip", "gone.mp4")
    assert "gone.safetensors does not exist" in refused("t2v", "-m", model, "-p", "x", "--lora", "gone.safetensors")
    assert "gone.mp4 does not exist" in refused("rerun", "gone.mp4")


def test_files_that_are_not_what_they_are_taken_for(model: Path) -> None:
    Path("notes.mp4").write_text("not a video")
    Path("cut.mp4").write_bytes(clip(Path("a.mp4"), 9).read_bytes()[:300])
    Path("cut.png").write_bytes(picture(Path("b.png"), size=(480, 320)).read_bytes()[:150])
    for file in ("notes.mp4", "cut.mp4"):
        for command in ("continue", "refine"):
            assert file in refused(command, file, "-m", model, "-p", "x")
    for file in ("notes.mp4", "cut.png"):
        assert file in refused("i2v", "-m", model, "-p", "x", "-i", file)


def test_a_clip_shorter_than_the_condition(model: Path) -> None:
    a = clip(Path("a.mp4"), 3)
    assert "only 3 frames at 15 frames per second, 5 are needed" in refused("continue", a, "-m", model, "-p", "x")
    assert "only 3 frames" in refused("long", "-m", model, "-p", "x", "--clip", a)


def test_pictures_of_any_mode_make_the_same_video_as_plain_ones(model: Path) -> None:
    def latents(name: str) -> torch.Tensor:
        made(
            "i2v", "-m", model, "-p", "x", "-i", name, "--steps", 1, "--seed", 1, "-o", "out.safetensors", "--overwrite"
        )
        return load_file("out.safetensors")["latents"]

    noise = torch.randint(0, 256, (32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    grey = Image.fromarray(noise)
    grey.convert("RGB").save("rgb.png")
    grey.save("grey.png")
    grey.convert("RGBA").save("rgba.png")
    grey.convert("P").save("palette.png")
    Image.fromarray(noise.astype("uint16") * 257).save("sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    grey.convert("RGB").transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    expected = latents("rgb.png")
    for name in ("grey.png", "rgba.png", "palette.png", "sixteen.png", "turned.png"):
        assert torch.equal(latents(name), expected), name


# Models


@pytest.mark.parametrize("file", [DIT_SHARD, VAE_FILE, "text_encoder/model-00001-of-00002.safetensors"])
def test_truncated_weights(changed: Path, file: str) -> None:
    data = (changed / file).read_bytes()
    (changed / file).unlink()
    (changed / file).write_bytes(data[:-100])
    says = refused("t2v", "-m", changed, "-p", "x")
    assert Path(file).name in says and "cut short: 100 bytes are missing; download it again" in says
    (changed / file).write_bytes(b"\xff" * 200)
    assert Path(file).name in refused("t2v", "-m", changed, "-p", "x")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("dit", {"hidden_size": 128}, "128"),
        ("dit", {"depth": "two"}, "depth must be a positive integer"),
        ("dit", {"_class_name": "WanTransformer3DModel"}, "not a LongCat-Video DiT config"),
        ("vae", {"_class_name": "AutoencoderKL"}, "expected a Wan 2.1 VAE config"),
        ("text_encoder", {"model_type": "bert"}, "expected a umT5 text encoder config"),
    ],
)
def test_wrong_config(changed: Path, part: str, change: dict[str, object], says: str) -> None:
    config = changed / part / "config.json"
    data = json.loads(config.read_text()) | change
    config.unlink()
    config.write_text(json.dumps(data))
    assert says in refused("t2v", "-m", changed, "-p", "x")
    config.write_text("{")
    assert "config.json is not valid JSON" in refused("t2v", "-m", changed, "-p", "x")


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("dit", "has no dit; download the dit folder"),
        ("vae", "has no vae; download the vae folder of the checkpoint, or name one with --vae"),
        ("text_encoder", "or name one with --text-encoder"),
        ("tokenizer", "or name one with --tokenizer"),
    ],
)
def test_parts_that_are_missing(tiny_checkpoint: Path, tmp_path: Path, absent: str, says: str) -> None:
    model = copy_model(tiny_checkpoint, tmp_path / "model", without=[absent])
    assert says in refused("t2v", "-m", model, "-p", "x", "-o", tmp_path / "a.mp4")
    if absent != "dit":
        option = "--" + absent.replace("_", "-")
        made("t2v", "-m", model, "-p", "x", "-o", tmp_path / "a.mp4", "--steps", 1, option, tiny_checkpoint / absent)


def test_adapters_that_are_missing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_checkpoint, tmp_path / "model", without=["lora"])
    says = refused("t2v", "-m", model, "-p", "x", "--schedule", "distilled", "-o", tmp_path / "a.mp4")
    assert "has no lora/cfg_step_lora.safetensors" in says and "--lora" in says
    a = clip(tmp_path / "clip.mp4", 5)
    assert "has no lora/refinement_lora.safetensors" in refused("refine", a, "-m", model, "-o", tmp_path / "r.mp4")
    own = tiny_checkpoint / "lora" / "refinement_lora.safetensors"
    outcome = made("refine", a, "-m", model, "-o", tmp_path / "r.mp4", "--lora", own, "--steps", 1)
    assert "warning" in outcome.err and "the --lora given has to do its work" in outcome.err


def test_a_damaged_adapter_of_the_model_is_found_before_the_weights_are_loaded(changed: Path) -> None:
    file = changed / "lora" / "refinement_lora.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-10])
    assert "cut short" in refused("refine", clip(Path("clip.mp4"), 5), "-m", changed)


def test_loras_of_other_models(model: Path) -> None:
    wan = {f"blocks.0.ffn.0.lora_{half}.weight": torch.zeros(4, 4) for half in ("down", "up")}
    save_file(wan, "wan.safetensors")
    assert "wan.safetensors is not for this model" in refused(
        "t2v", "-m", model, "-p", "x", "--lora", "wan.safetensors"
    )
    other = load_file(model / "lora" / "cfg_step_lora.safetensors")
    save_file({k: torch.cat([v, v], dim=-1) if "down" in k else v for k, v in other.items()}, "big.safetensors")
    assert "made for a model of another size" in refused("t2v", "-m", model, "-p", "x", "--lora", "big.safetensors")
    says = refused("t2v", "-m", model, "-p", "x", "--lora", model / VAE_FILE)
    assert "is not a LoRA adapter" in says


@pytest.mark.parametrize("strength", ["strong", "", "nan", "inf", "1,5"])
def test_strength_of_a_lora(model: Path, strength: str) -> None:
    lora = model / "lora" / "cfg_step_lora.safetensors"
    says = refused("t2v", "-m", model, "-p", "x", "--lora", f"{lora}:{strength}")
    assert says.startswith(f"the strength of --lora {lora} must be a number")


def test_a_lora_with_a_strength_and_a_colon_in_its_name(model: Path) -> None:
    lora = model / "lora" / "cfg_step_lora.safetensors"
    Path("a:b.safetensors").write_bytes(lora.read_bytes())
    latents = {}
    for name in (f"{lora}:0", f"{lora}:-0.5", "a:b.safetensors:-0.5", "a:b.safetensors"):
        made(
            "t2v",
            "-m",
            model,
            "-p",
            "x",
            "--steps",
            1,
            "--seed",
            1,
            "--lora",
            name,
            "-o",
            "o.safetensors",
            "--overwrite",
        )
        latents[name] = load_file("o.safetensors")["latents"]
    assert torch.equal(latents[f"{lora}:-0.5"], latents["a:b.safetensors:-0.5"])
    assert not torch.equal(latents[f"{lora}:0"], latents["a:b.safetensors"])


def test_nan_in_the_weights_stops_at_the_step_and_names_it(changed: Path) -> None:
    scale_weights(changed / DIT_SHARD, float("nan"))
    outcome = lcv("t2v", "-m", changed, "-p", "x", "--steps", 3, "-o", "a.mp4")
    assert outcome.code == 1
    assert "lcv: step 1 of 3 (sigma 1.0000) produced NaN or infinite values; stopped there" in outcome.err
    outcome = lcv("long", "-m", changed, "-p", "x", "--steps", 3, "-o", "b.mp4")
    assert outcome.code == 1 and "step 1 of 3" in outcome.err
    assert left_in(Path()) == {"model"}


# Prompts


def test_an_empty_prompt_works(model: Path) -> None:
    made("t2v", "-m", model, "-p", "", "--steps", 1, "-o", "a.mp4")
    assert left_in(Path()) == {"a.mp4"}


def test_a_long_prompt_is_cut_with_a_warning(model: Path) -> None:
    long = " ".join(f"word{i}" for i in range(600))
    err = made("t2v", "-m", model, "-p", long, "--steps", 1, "-o", "a.mp4").err
    assert re.search(r"lcv: warning: the prompt has \d+ tokens, only 512 are kept; cut from", err)


# Places that cannot be written


def test_an_output_that_exists_is_kept(model: Path) -> None:
    Path("a.mp4").write_text("precious")
    Path("frames").mkdir()
    Path("frames", "holiday.png").write_text("precious")
    assert "a.mp4 exists; add --overwrite" in refused("t2v", "-m", model, "-p", "x", "-o", "a.mp4")
    assert "frames exists; add --overwrite" in refused("t2v", "-m", model, "-p", "x", "-o", "frames")
    Path("b-2.mp4").write_text("precious")
    assert "b-2.mp4 exists" in refused("t2v", "-m", model, "-p", "x", "-p", "y", "-o", "b.mp4")
    assert {Path(name).read_text() for name in ("a.mp4", "b-2.mp4", "frames/holiday.png")} == {"precious"}
    made("t2v", "-m", model, "-p", "x", "-o", "a.mp4", "--overwrite", "--steps", 1)
    assert Path("a.mp4").stat().st_size > 1000


def test_folders_in_place_of_files_and_the_other_way_round(model: Path) -> None:
    for name in ("a.mp4", "a.safetensors"):
        Path(name).mkdir()
        assert f"{name} is a folder; choose the name of a file" in refused("t2v", "-m", model, "-p", "x", "-o", name)
    Path("file").write_text("x")
    assert "file is a file without extension" in refused("t2v", "-m", model, "-p", "x", "-o", "file")
    for name in ("file/a.mp4", "file/frames", "file/a.safetensors", "/proc/nowhere/a.mp4", "/dev/null/a.mp4"):
        assert "cannot be written" in refused("t2v", "-m", model, "-p", "x", "-o", name)


def test_a_disk_that_is_full_while_latents_are_saved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        outcome = lcv("t2v", "-m", model, "-p", "x", "--steps", 2, "-o", "a.mp4")
    assert outcome.code == 2
    assert "no room left on the disk for a.mp4.partial.safetensors" in outcome.err
    assert left_in(Path()) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 kB: enough for the latents of a tiny clip, not for its video."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a disk")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_is_done_and_the_same_command_goes_on(model: Path, small_disk: Path) -> None:
    command = ["t2v", "-m", model, "-p", "x", "--steps", 3, "--seed", 1, "--crf", 0, "-o", small_disk / "a.mp4"]
    outcome = lcv(*command)
    assert outcome.code == 2
    assert f"no room left on the disk for {small_disk}/a.mp4; what was finished before it is kept" in outcome.err
    assert left_in(small_disk) == {"a.mp4.partial.safetensors"}
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    err = made(*command).err
    assert "going on after step 3 of 3" in err
    assert left_in(small_disk) == {"a.mp4"}
