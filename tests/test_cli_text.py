"""The command line encodes the prompts that a job reads, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_helpers import clip, made
from safetensors.torch import load_file
from torch import Tensor

from lcv_core.cli import load
from lcv_core.text.encoder import TextEncoder, TextStates
from lcv_core.text.prompt import DEFAULT_NEGATIVE_PROMPT
from lcv_core.video_io import read_video

NEGATIVE = "blurred"
LONG = ["long", "--segments", 2, "--handover", "latents"]
# Options of a job, and how many of its own prompts it has.
UNGUIDED = {
    "guidance 1": (["t2v", "-p", "a ball", "--guidance", 1], 1),
    "distilled": (["t2v", "-p", "a ball", "--schedule", "distilled"], 1),
    "long, one prompt": ([*LONG, "-p", "a ball", "--guidance", 1], 1),
    "long, a prompt per segment": ([*LONG, "-p", "a ball", "-p", "a star", "--schedule", "distilled"], 2),
}


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that went through the encoder."""
    seen: list[str] = []
    encode = TextEncoder.encode

    def watched(self: TextEncoder, prompts: Any) -> TextStates:
        seen.extend(prompts)
        return encode(self, prompts)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextEncoder, "encode", watched)
    return seen


def latents(model: Path, options: list[Any], name: str) -> Tensor:
    made(*options, "-n", NEGATIVE, "-m", model, "--steps", 2, "--seed", 1, "-o", name)
    return load_file(name)["latents"]


@pytest.mark.parametrize("case", UNGUIDED)
def test_without_guidance_the_negative_prompt_is_not_encoded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[str], case: str
) -> None:
    options, prompts = UNGUIDED[case]
    got = latents(tiny_checkpoint, options, "a.safetensors")
    assert len(encoded) == prompts and NEGATIVE not in encoded
    encoded.clear()
    monkeypatch.setattr(load, "is_guided", lambda job: True)
    assert got.equal(latents(tiny_checkpoint, options, "b.safetensors"))
    assert len(encoded) == prompts + 1  # the oracle did encode it


def test_with_guidance_it_is(tiny_checkpoint: Path, encoded: list[str]) -> None:
    guided = ["t2v", "-p", "a ball", "--schedule", "distilled", "--guidance", 3]
    first = latents(tiny_checkpoint, guided, "a.safetensors")
    assert encoded == ["a ball", NEGATIVE]
    encoded.clear()
    made(*guided, "-m", tiny_checkpoint, "--steps", 2, "--seed", 1, "-o", "b.safetensors")
    assert encoded == ["a ball", DEFAULT_NEGATIVE_PROMPT]
    assert not first.equal(load_file("b.safetensors")["latents"])


def test_refining_reads_no_negative_prompt(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    command = ["refine", clip(Path("clip.mp4"), 5), "-p", "a ball", "-m", tiny_checkpoint, "--steps", 1, "--seed", 1]
    made(*command, "-o", "a.mp4")
    assert encoded == ["a ball"]
    monkeypatch.setattr(load, "is_guided", lambda job: True)
    made(*command, "-o", "b.mp4")
    assert encoded[1:] == ["a ball", DEFAULT_NEGATIVE_PROMPT]
    assert read_video("a.mp4").equal(read_video("b.mp4"))
