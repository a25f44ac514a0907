"""Prompts that were encoded before: the same bits without the encoder, and no harm from a damaged cache."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import copy_model, made, refused
from safetensors.torch import load_file, save_file

from lcv_core.text import encoder as encoders
from lcv_core.text.cache import CachedEncoder, TextCache
from lcv_core.text.encoder import TextEncoder, TextStates
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint

PROMPTS = ["a red ball", "", "a  red   ball", "two green stars"]  # the third is the first, once it is cleaned


def same(a: TextStates, b: TextStates) -> bool:
    assert a.mask is not None and b.mask is not None
    return a.states.dtype == b.states.dtype and a.states.equal(b.states) and a.mask.equal(b.mask)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The encoders that were loaded."""
    seen: list[weakref.ref[Any]] = []
    load = Checkpoint.load_text_encoder

    def watched(self: Checkpoint, **options: Any) -> TextEncoder:
        encoder = load(self, **options)
        seen.append(weakref.ref(encoder.model))
        return encoder

    monkeypatch.setattr(Checkpoint, "load_text_encoder", watched)
    return seen


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_bits_of_the_encoder_with_one_load_for_all_and_none_the_second_time(
    tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype | None, loads: list[weakref.ref[Any]]
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    plain = checkpoint.load_text_encoder(dtype=dtype)
    expected = [plain.encode([prompt]) for prompt in PROMPTS]
    loads.clear()
    cached = checkpoint.cached_text_encoder(dtype=dtype, cache=tmp_path / "cache")
    together = cached.encode(PROMPTS)
    assert all(same(together.select(i), states) for i, states in enumerate(expected))
    assert len(loads) == 1 and loads[0]() is None  # freed without waiting for the garbage collector
    assert all(same(cached.encode(prompt), states) for prompt, states in zip(PROMPTS, expected))
    later = checkpoint.cached_text_encoder(dtype=dtype, cache=tmp_path / "cache")
    assert later.knows(PROMPTS) and not later.knows(["new"])
    assert same(later.encode(PROMPTS), together) and len(loads) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 3
    later.encode("new")
    assert len(loads) == 2


def test_in_memory_without_a_folder(tiny_checkpoint: Path, loads: list[weakref.ref[Any]]) -> None:
    cached = open_checkpoint(tiny_checkpoint).cached_text_encoder()
    assert same(cached.encode("x"), cached.encode("x")) and len(loads) == 1


def test_another_encoder_tokenizer_or_dtype_has_entries_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def path(model: Path, **options: Any) -> Path | None:
        return open_checkpoint(model).cached_text_encoder(cache=tmp_path / "cache", **options).cache.path("x")

    other_weights = copy_model(tiny_checkpoint, tmp_path / "weights")
    file = next((other_weights / "text_encoder").glob("*.safetensors"))
    tensors = load_file(file)
    file.unlink()
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    other_tokens = copy_model(tiny_checkpoint, tmp_path / "tokens")
    settings = other_tokens / "tokenizer" / "tokenizer_config.json"
    text = settings.read_text()
    settings.unlink()
    settings.write_text(text + "\n")
    paths = [
        path(tiny_checkpoint),
        path(other_weights),
        path(other_tokens),
        path(tiny_checkpoint, dtype=torch.bfloat16),
    ]
    assert len(set(paths)) == 4
    assert path(tiny_checkpoint, dtype=torch.float32) == paths[0]  # which it is stored in


class _Counting:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompts: str | Sequence[str]) -> TextStates:
        self.asked += prompts
        return TextStates(torch.full((1, 2, 3), float(len(prompts[0]))), torch.tensor([[1, 0]]))


def damage_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # of a number, where no header tells
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b"\xff" * 400), damage_bits,
        lambda path: save_file({"other": torch.ones(2)}, path),
    ],
    ids=["empty", "cut", "noise", "bits", "other"],
)  # fmt: skip
def test_a_damaged_entry_is_passed_over_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    encoder = _Counting()
    first = CachedEncoder(lambda: encoder, TextCache("m", tmp_path)).encode("abc")
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING, "lcv_core"):
        again = CachedEncoder(lambda: encoder, TextCache("m", tmp_path)).encode("abc")
    assert same(first, again) and encoder.asked == ["abc", "abc"]
    assert f"ignoring the damaged {path.name} in the text cache" in caplog.text
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "file"
    place.write_text("not a folder")
    with caplog.at_level(logging.WARNING, "lcv_core"):
        states = CachedEncoder(_Counting, TextCache("m", place)).encode(["abc", "de"])
    assert states.batch == 2 and "the text cache is not written" in caplog.text


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcv_core.text.cache._IN_MEMORY", 2)
    encoder = _Counting()
    cached = CachedEncoder(lambda: encoder, TextCache("m"))
    cached.encode(["a", "bb", "ccc"])
    assert cached.knows(["bb", "ccc"]) and not cached.knows(["a"])


def test_the_command_line_reads_no_encoder_the_second_time(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["t2v", "-m", tiny_checkpoint, "-p", "a red ball", "--steps", 1, "--seed", 1]
    cache = ["--text-cache", tmp_path / "cache"]
    made(*command, "-o", tmp_path / "plain.safetensors")
    made(*command, *cache, "-o", tmp_path / "first.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "build_text_model", None)
        made(*command, *cache, "-o", tmp_path / "second.safetensors")
        made("rerun", tmp_path / "first.safetensors", *cache, "-o", tmp_path / "third.safetensors")
    latents = [load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("plain", "first", "second", "third")]
    assert all(latents[0].equal(other) for other in latents[1:])
    gc.collect()
    (tmp_path / "file").write_text("")
    says = refused(*command, "--text-cache", tmp_path / "file", "-o", tmp_path / "x.safetensors")
    assert "part of its path is a file" in says
