"""The miniature that comes with the package: complete, small, and it shows what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from comfyui.reference import components, seeded
from torch import Tensor

from lcv_core.miniature import MINIATURE, find_model, miniature
from lcv_core.pipelines import Components, continue_video, image_to_video, refine_video, text_to_video
from lcv_core.training.evaluation.judge import measure
from lcv_core.training.miniature import MOST_BYTES
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint
from lcv_core.weights.convert import convert
from lcv_core.weights.inspect import inspect_checkpoint

PROMPT = "a large red ball moves left on a black background"
SHOWN = {"object": "ball", "colour": "red", "background": "black", "motion": "moves left"}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(MINIATURE)


@pytest.fixture(scope="module")
def c() -> Components:
    return components(miniature())


def shown(frames: Tensor, names: Sequence[str]) -> dict[str, str | None]:
    """What a clip [F, H, W, 3] in [0, 1] shows of these attributes."""
    found = measure((frames * 255).round().to(torch.uint8))
    return {name: found[name].value for name in names}


@pytest.fixture(scope="module")
def made(c: Components) -> Tensor:
    return text_to_video(c, text=PROMPT, schedule="distilled", generator=seeded(1))[0]


def test_it_is_small_and_complete(checkpoint: Checkpoint) -> None:
    files = [path for path in miniature().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    for part in ("dit", "vae", "text_encoder", "tokenizer"):
        assert checkpoint.require(part)
    assert {*checkpoint.adapters} == {"distill", "refinement"}


def test_its_name_is_a_folder_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("mini") == miniature()
    assert find_model("models/mini") == Path("models/mini")
    (tmp_path / "mini").mkdir()
    assert find_model("mini") == Path("mini")


def test_its_name_serves_wherever_a_checkpoint_is_named(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(MINIATURE)
    assert inspection.path == miniature()
    convert(MINIATURE, tmp_path / "int8", "int8")
    assert open_checkpoint(tmp_path / "int8").dit_config == open_checkpoint(MINIATURE).dit_config


def test_text(made: Tensor, c: Components) -> None:
    assert made.shape == (c.native.num_frames, c.native.height, c.native.width, 3)
    assert shown(made, [*SHOWN]) == SHOWN


def test_image(c: Components, made: Tensor) -> None:
    image = made[0]
    frames = image_to_video(c, text="the red ball moves right", image=image, num_steps=20, generator=seeded(2))[0]
    error = (frames[0] - image).square().mean()
    assert -10 * torch.log10(error) > 30
    assert shown(frames, ["object", "colour", "motion"]) == {"object": "ball", "colour": "red", "motion": "moves right"}


def test_continuation(c: Components, made: Tensor) -> None:
    frames = continue_video(c, text=PROMPT, frames=made, schedule="distilled", generator=seeded(3))[0]
    assert frames.shape == made.shape  # its first frames are the given ones
    assert shown(frames, [*SHOWN]) == SHOWN


def test_refinement(c: Components) -> None:
    """What it shows is kept; how many patterns come back is for `lcv eval` to say."""
    text = "a large red ball with stripes stays still on a black background"
    frames = text_to_video(c, text=text, schedule="distilled", generator=seeded(1))[0]
    fine = refine_video(c, text=text, frames=frames, bsa=c.dit.config.bsa, generator=seeded(4))[0]
    assert fine.shape[1:3] == (2 * c.native.height, 2 * c.native.width)
    assert len(fine) >= 2 * len(frames) - 1
    names = ["object", "colour", "background"]
    assert shown(fine, names) == {"object": "ball", "colour": "red", "background": "black"}
