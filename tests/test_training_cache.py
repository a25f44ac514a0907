"""Cached latents and text states: computed once, read back as they were; a user's folder and what is wrong in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_vae, pictures
from torch import Tensor
from training_toys import Heard

from lcv_core.errors import InputError
from lcv_core.pipelines.base import to_pixels
from lcv_core.training.data import cache as cache_module
from lcv_core.training.data.cache import LatentCache, LatentOptions, Workers, encode_rows, fill_latents, fill_texts
from lcv_core.training.data.clips import sample_clip
from lcv_core.training.data.folder import FolderClips, FolderSection
from lcv_core.training.data.grammar import parse
from lcv_core.training.data.sources import Joined, Part, ProceduralClips, SourceClip
from lcv_core.training.events import ignore
from lcv_core.video_io import write_video
from lcv_core.weights.checkpoint import open_checkpoint

SMALL: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 48}
VAE = make_vae()


class CountingVAE:
    """The VAE, and how many clips it was given."""

    def __init__(self) -> None:
        self.config, self.normalize, self.clips = VAE.config, VAE.normalize, 0

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.clips += len(pixels)
        return VAE.encode(pixels)


def fill(source: Any, folder: Path, vae: Any = VAE, **changes: Any) -> LatentCache:
    options = LatentOptions(**{k: changes.pop(k) for k in ("posterior", "compute", "store", "batch") if k in changes})
    settings = {"on_bad_data": "stop", "on_event": ignore, **changes}
    return fill_latents(source, vae, "vae", folder, options, **settings)


def test_latents_are_the_means_of_the_clips(tmp_path: Path) -> None:
    source = ProceduralClips(count=5, **SMALL)
    cache = fill(source, tmp_path, batch=2)
    assert len(cache) == 5 and set(cache.buckets) == {(2, 4, 6)}
    for item, clip in zip(cache.items(), source.read(0), strict=True):
        mean, _ = VAE.encode(to_pixels(clip.frames))
        found, spread = cache.latents(item)
        assert item.name == clip.name and spread is None
        assert torch.allclose(found, VAE.normalize(mean)[0], atol=1e-5)
        assert clip.name.split()[1] == str(item.position)
        assert len(source.captions(item.part, item.position)) == len({*source.captions(item.part, item.position)}) > 1


def test_the_posterior_is_kept_where_it_is_sampled(tmp_path: Path) -> None:
    source = ProceduralClips(count=2, **SMALL)
    cache = fill(source, tmp_path, posterior="sample", store="bf16")
    item = next(cache.items())
    mean, logvar = VAE.encode(to_pixels(next(source.read(0)).frames))
    found, spread = cache.latents(item)
    assert spread is not None
    expected = VAE.normalize(mean + torch.exp(0.5 * logvar))[0] - VAE.normalize(mean)[0]
    assert torch.allclose(spread, expected, rtol=2e-2, atol=1e-4)
    assert torch.allclose(found, VAE.normalize(mean)[0], rtol=1e-2, atol=1e-2) and found.dtype == torch.float32


def test_the_encoder_may_compute_in_bf16_which_is_another_cache(tmp_path: Path) -> None:
    source = ProceduralClips(count=2, **SMALL)
    exact, coarse = (next(fill(source, tmp_path, compute=dtype).items()) for dtype in ("fp32", "bf16"))
    assert exact.file != coarse.file and VAE.dtype == torch.float32
    (a, _), (b, _) = fill(source, tmp_path).latents(exact), fill(source, tmp_path, compute="bf16").latents(coarse)
    assert not torch.equal(a, b)
    assert (a - b).norm() < 0.05 * a.norm()


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    heard, vae = Heard(), CountingVAE()
    fill(ProceduralClips(count=4, part=2, **SMALL), tmp_path, vae, on_event=heard)
    assert [(e.done, e.total) for e in heard.events] == [(0, 2), (1, 2), (2, 2)] and vae.clips == 4
    assert (
        len(fill(ProceduralClips(count=6, part=2, **SMALL), tmp_path, vae)) == 6 and vae.clips == 6
    )  # the first four are there
    fill(ProceduralClips(count=6, captions_per_clip=2, part=2, **SMALL), tmp_path, vae)
    assert vae.clips == 6
    for other in ({"seed": 1}, {"height": 64}, {"late": 0.5}):
        before = vae.clips
        fill(ProceduralClips(**{"count": 2, **SMALL, **other}), tmp_path, vae)
        assert vae.clips == before + 2, other
    before = vae.clips
    fill_latents(
        ProceduralClips(count=2, **SMALL), vae, "another vae", tmp_path, LatentOptions(), on_bad_data="stop",
        on_event=ignore,
    )  # type: ignore[arg-type]  # fmt: skip
    assert vae.clips == before + 2


def test_motions_are_shown_in_turn_and_are_other_clips(tmp_path: Path) -> None:
    motions = ("spins", "circles", "spins")
    source, vae = ProceduralClips(count=6, part=3, motions=motions, **SMALL), CountingVAE()
    for index in range(2):
        for position, clip in enumerate(source.read(index)):
            number = 3 * index + position
            same = sample_clip(0, number, motion=motions[number % 3], num_frames=5, height=32, width=48)
            assert torch.equal(clip.frames, same.frames)
            assert {parse(text)["motion"] for text in source.captions(index, position)} == {same.scene.motion}
    fill(source, tmp_path, vae)
    fill(ProceduralClips(count=6, part=3, **SMALL), tmp_path, vae)
    assert vae.clips == 12
    with pytest.raises(InputError, match="rolls"):
        ProceduralClips(motions=("rolls",))


def test_joined_sources_keep_their_clips_and_captions(tmp_path: Path) -> None:
    first, second = ProceduralClips(count=3, part=2, **SMALL), ProceduralClips(count=2, seed=1, **SMALL)
    both = Joined((first, second))
    assert [part.identity for part in both.parts()] == [part.identity for s in (first, second) for part in s.parts()]
    assert [clip.name for index in range(3) for clip in both.read(index)] == [f"clip {n}" for n in (0, 1, 2, 0, 1)]
    assert both.captions(1, 0) == first.captions(1, 0) and both.captions(2, 1) == second.captions(0, 1)
    with pytest.raises(IndexError):
        both.captions(3, 0)


def test_an_interrupted_cache_is_gone_on_with(tmp_path: Path) -> None:
    source, vae = ProceduralClips(count=4, part=1, **SMALL), CountingVAE()

    def stop(event: Any) -> None:
        if event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(source, tmp_path, vae, on_event=stop)
    assert not list(tmp_path.rglob("*.part")) and vae.clips == 2
    assert len(fill(source, tmp_path, vae)) == 4 and vae.clips == 4


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, first, second = ProceduralClips(count=5, part=1, **SMALL), CountingVAE(), CountingVAE()
    monkeypatch.setattr(cache_module.time, "sleep", lambda _: fill(source, tmp_path, second, workers=Workers(1, 2)))
    assert len(fill(source, tmp_path, first, workers=Workers(0, 2))) == 5  # waits for the other's
    assert (first.clips, second.clips) == (3, 2)


class BadSource:
    """The second of three videos cannot be read."""

    frame_rate = 15.0

    def parts(self) -> list[Part]:
        return [Part(name, {"video": name}) for name in ("a", "b", "c")]

    def read(self, index: int) -> Iterator[SourceClip]:
        if index == 1:
            raise InputError("b.mp4 is damaged")
        yield SourceClip("abc"[index], pictures(5))

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        return ("abc"[index],)


def test_bad_data_stops_or_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"b\.mp4 is damaged"):
        fill(BadSource(), tmp_path)
    for _ in range(2):  # it is remembered, not read again, and still said
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lcv_core"):
            cache = fill(BadSource(), tmp_path, on_bad_data="skip")
        assert [item.name for item in cache.items()] == ["a", "c"] and cache.bad == ["b.mp4 is damaged"]
        assert "left out: b.mp4 is damaged" in caplog.text
    assert [BadSource().captions(i.part, i.position) for i in cache.items()] == [("a",), ("c",)]
    with pytest.raises(InputError, match=r"b\.mp4 is damaged"):
        fill(BadSource(), tmp_path)


def test_texts_are_the_encoders_states(tmp_path: Path, tiny_checkpoint: Path) -> None:
    encoder = open_checkpoint(tiny_checkpoint).load_text_encoder()
    captions = ["a red ball moves left", "a  star &amp; a ring", "a red ball moves left", "a ring"]
    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return encoder

    cache = fill_texts(captions, load, "key", tmp_path, on_event=ignore)
    for caption in ["", *captions]:
        whole = encoder.encode(caption)
        assert whole.mask is not None
        length = int(whole.mask.sum())
        rows = cache.rows(caption)
        assert rows.shape == (length, whole.states.shape[2])
        assert torch.allclose(rows, whole.states[0, :length], atol=1e-5), caption
    fill_texts(captions, load, "key", tmp_path, on_event=ignore)
    assert len(loads) == 1
    fill_texts(captions, load, "another key", tmp_path, on_event=ignore)
    assert len(loads) == 2


def test_texts_of_many_batches_keep_their_order(tmp_path: Path, tiny_checkpoint: Path) -> None:
    encoder = open_checkpoint(tiny_checkpoint).load_text_encoder()
    prompts = [f"a ball {'moves ' * (i % 5)}{i}" for i in range(70)]
    rows = encode_rows(encoder, prompts)
    assert torch.allclose(rows[65], encode_rows(encoder, [prompts[65]])[0], atol=1e-5)


def video(path: Path, frames: int = 12, *, height: int = 48, width: int = 64, frame_rate: float = 15.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, pictures(1, height, width).expand(frames, -1, -1, -1), frame_rate=frame_rate)
    return path


def captioned(path: Path, text: str, **options: Any) -> Path:
    video(path, **options).with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def section(path: Path, **changes: Any) -> FolderSection:
    return FolderSection(path, **{**SMALL, "frame_rate": 15.0, **changes})


def test_a_folder_of_videos(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    captioned(clips / "a.mp4", "a ball\n moves ")
    captioned(clips / "sub/b.mp4", "a ring", frame_rate=30.0, frames=20)
    captioned(clips / "tall.mp4", "a star", height=64, width=48)
    (clips / "notes.md").write_text("no video")
    source = FolderClips(section(clips, height=None, width=None, area_of=(32, 48)), "stop")
    cache = fill(source, tmp_path / "cache")
    assert {size: [i.name for i in items] for size, items in cache.buckets.items()} == {
        (2, 4, 6): ["a.mp4", "sub/b.mp4"], (2, 6, 4): ["tall.mp4"],
    }  # fmt: skip
    assert source.captions(0, 0) == ("a ball moves",)


def test_all_that_a_video_holds(tmp_path: Path) -> None:
    captioned(tmp_path / "long.mp4", "a ball", frames=18)
    source = FolderClips(section(tmp_path, take="all"), "stop")
    assert [clip.name for clip in source.read(0)] == [
        "long.mp4",
        "long.mp4 from 0.333333 s",
        "long.mp4 from 0.666667 s",
    ]
    assert all(clip.frames.shape == (5, 32, 48, 3) for clip in source.read(0))


def test_captions_in_a_table(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4"), captioned(tmp_path / "b.mp4", "beside it")
    (tmp_path / "captions.csv").write_text('file,caption\na.mp4,"a ball, red"\na.mp4,another wording\n')
    source = FolderClips(section(tmp_path), "stop")
    assert [source.captions(i, 0) for i in range(2)] == [("a ball, red", "another wording"), ("beside it",)]


def test_what_is_wrong_with_captions_is_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captioned(tmp_path / "good.mp4", "a ball"), video(tmp_path / "none.mp4"), captioned(tmp_path / "empty.mp4", " \n")
    (tmp_path / "captions.csv").write_text("file,caption\ngone.mp4,a ring\n")
    with pytest.raises(InputError) as error:
        FolderClips(section(tmp_path), "stop")
    for words in ("3 problems", "none.mp4 has no caption", "empty.mp4 has no caption", "'gone.mp4' in line 2"):
        assert words in str(error.value)
    with caplog.at_level(logging.WARNING, "lcv_core"):
        assert len(FolderClips(section(tmp_path), "skip").parts()) == 1
    assert "none.mp4" in caplog.text
    (tmp_path / "captions.csv").write_text("name,text\n")
    with pytest.raises(InputError, match="must have the columns file and caption"):
        FolderClips(section(tmp_path), "skip")


def test_what_is_wrong_with_videos_is_said_when_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    captioned(folder / "a-short.mp4", "a ball", frames=3)
    captioned(folder / "b-tiny.mp4", "a ball", height=16, width=16)
    captioned(folder / "c-cut.mp4", "a ball").write_bytes(b"no video at all")
    captioned(folder / "d-good.mp4", "a ball")
    cache = fill(FolderClips(section(folder), "skip"), tmp_path / "cache", on_bad_data="skip")
    assert [item.name for item in cache.items()] == ["d-good.mp4"]
    assert ["only 3 frames" in cache.bad[0], "only 16x16 pixels" in cache.bad[1], "c-cut.mp4" in cache.bad[2]] == [
        True
    ] * 3
    for name in ("a-short", "b-tiny", "c-cut"):
        (folder / f"{name}.mp4").unlink()
    assert len(fill(FolderClips(section(folder), "stop"), tmp_path / "cache")) == 1
    (folder / "d-good.mp4").unlink()
    with pytest.raises(InputError, match="has no video with a caption"):
        FolderClips(section(folder), "skip")
    with pytest.raises(InputError, match="is not a folder"):
        FolderClips(section(tmp_path / "nowhere"), "skip")


def test_a_changed_video_is_encoded_again(tmp_path: Path) -> None:
    file, vae = captioned(tmp_path / "clips/a.mp4", "a ball"), CountingVAE()
    for expected in (1, 1):
        fill(FolderClips(section(file.parent), "stop"), tmp_path / "cache", vae)
        assert vae.clips == expected
    captioned(file, "a ball", frames=14)
    fill(FolderClips(section(file.parent), "stop"), tmp_path / "cache", vae)
    assert vae.clips == 2
