"""Long video: lengths, what a segment hands to the next, prompts per segment, and going on after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FakeTextEncoder, components, make_dit, make_vae, pictures, text
from torch import Tensor

from lcv_core.denoise import StepInfo
from lcv_core.errors import InputError
from lcv_core.partial import SegmentStore
from lcv_core.pipelines import (
    Components,
    Segment,
    continue_video,
    image_to_video,
    long_video,
    long_video_segments,
    text_to_video,
)
from lcv_core.pipelines.base import StreamingDecoder, decode_latents
from lcv_core.pipelines.long_video import segment_generator
from lcv_core.vae.layers import StreamState
from lcv_core.vae.tiling import Tiling

F, C = 9, 5  # frames and condition frames of a segment: the tiny model's native job
HANDOVERS = ["frames", "official", "latents"]
OPTIONS: dict[str, Any] = {
    "num_steps": 2, "guidance_scale": 1.0, "uniform_tail": False, "num_segments": 3, "seed": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def c() -> Components:
    return components(text_encoder=FakeTextEncoder())


def segments(c: Components, **changes: Any) -> list[Segment]:
    return list(long_video_segments(c, **{"text": text()} | OPTIONS | changes))


def joined(parts: list[Segment]) -> Tensor:
    return torch.cat([part.frames for part in parts])


@pytest.mark.parametrize("handover", HANDOVERS)
@pytest.mark.parametrize("start", ["text", "image", "clip"])
def test_lengths(c: Components, handover: str, start: str) -> None:
    """F + (n - 1)(F - C) frames, or n (F - C) behind a clip of one's own."""
    begin = {"text": {}, "image": {"image": pictures(1)[0]}, "clip": {"frames": pictures(7)}}[start]
    options: dict[str, Any] = OPTIONS | {"handover": handover, "num_steps": 1} | begin
    parts = segments(c, **options)
    assert [(p.index, p.total) for p in parts] == [(0, 3), (1, 3), (2, 3)]
    first = F - C if start == "clip" else F
    assert [len(p.frames) for p in parts] == [first, F - C, F - C]
    assert all(p.frames.shape[1:] == (32, 48, 3) and p.latents.shape == (1, 16, 3, 4, 6) for p in parts)
    assert all(p.frames.min() >= 0 and p.frames.max() <= 1 for p in parts)
    whole = long_video(c, text=text(), **options)
    assert torch.equal(whole[0], joined(parts))
    latents = long_video(c, text=text(), output="latents", **options)
    counts = [1 if start == "clip" else 3, 1, 1]
    assert torch.equal(latents, torch.cat([p.latents[:, :, -n:] for p, n in zip(parts, counts)], dim=2))


def test_the_segments_are_the_tasks_by_hand(c: Components) -> None:
    """With "frames": text to video, then continuations of the float frames, each with its segment's random numbers."""
    parts = segments(c, handover="frames")
    options = {"text": text(), "num_steps": 2, "guidance_scale": 1.0}
    frames = text_to_video(c, **options, generator=segment_generator(4, 0))[0]
    assert torch.equal(parts[0].frames, frames)
    for index in (1, 2):
        again = continue_video(
            c, frames=frames, uniform_tail=False, generator=segment_generator(4, index), **options
        )[0]  # fmt: skip
        assert torch.allclose(parts[index].frames, again[C:], atol=1e-6)
        frames = again


def test_the_official_handover_goes_through_uint8(c: Components) -> None:
    """Truncated, not rounded: the specification's 7.7 and its remark 31."""
    parts = segments(c, handover="official", num_segments=2)
    first = segments(c, num_segments=1)[0]
    assert torch.equal(parts[0].frames, first.frames)
    options = {"text": text(), "num_steps": 2, "guidance_scale": 1.0, "uniform_tail": False}
    quantised = (first.frames * 255).to(torch.uint8)
    by_hand = continue_video(c, frames=quantised, generator=segment_generator(4, 1), **options)[0]
    assert torch.allclose(parts[1].frames, by_hand[C:], atol=1e-6)
    rounded = continue_video(c, frames=(first.frames * 255).round().to(torch.uint8), generator=segment_generator(4, 1),
                             **options)[0]  # fmt: skip
    assert not torch.allclose(parts[1].frames, rounded[C:], atol=1e-6)


@pytest.mark.parametrize("start", ["text", "clip"])
def test_the_latent_handover_is_one_decode(c: Components, start: str) -> None:
    begin = {"frames": pictures(7)} if start == "clip" else {}
    parts = segments(c, handover="latents", **begin)
    for before, after in pairwise(parts):
        assert torch.equal(after.latents[:, :, :2], before.latents[:, :, -2:])
    whole = torch.cat([parts[0].latents, *(p.latents[:, :, 2:] for p in parts[1:])], dim=2)
    frames = decode_latents(c, whole)[0]
    assert torch.equal(joined(parts), frames[C:] if start == "clip" else frames)


def test_latents_are_handed_over_where_nothing_is_said(c: Components) -> None:
    unsaid = segments(c)
    for handover in HANDOVERS:
        made = segments(c, handover=handover)
        assert torch.equal(made[0].latents, unsaid[0].latents)
        assert torch.equal(made[1].latents, unsaid[1].latents) == (handover == "latents")


class WholeVAE:
    """A VAE as another program's may be: what it decodes it decodes at once. It counts how often."""

    decodes_whole = True

    def __init__(self) -> None:
        self.vae, self.decoded = make_vae(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def decode_stream(self, latent: Tensor, state: StreamState) -> Iterator[Tensor]:
        assert not state
        self.decoded += 1
        yield from self.vae.decode_stream(latent, state)


@pytest.mark.parametrize("given", [{}, {"handover": "latents"}], ids=["unsaid", "named"])
def test_a_vae_that_decodes_whole_is_refused_before_anything_is_computed(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FakeTextEncoder()
    c = components(vae=WholeVAE(), text_encoder=encoder)

    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("it was sampled")

    monkeypatch.setattr(c, "denoise", never)
    with pytest.raises(InputError, match=r'own VAE .* or the hand-over "frames"'):
        segments(c, text=["a", "b"], num_segments=None, **given)
    assert encoder.prompts == []


def test_a_vae_that_decodes_whole_serves_one_segment_and_the_other_hand_overs(c: Components) -> None:
    vae = WholeVAE()
    whole = components(vae=vae)
    for options in ({"num_segments": 1}, {"num_segments": 1, "frames": pictures(7)}, {"handover": "frames"}):
        made, known = segments(whole, **options), segments(c, **options)
        assert torch.allclose(joined(made), joined(known), atol=1e-6)
    assert vae.decoded == 1 + 1 + 3


def test_the_decoder_is_off_the_device_while_a_segment_is_sampled(
    c: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    rest, sample, push = StreamingDecoder.rest, Components.denoise, StreamingDecoder.push

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: (seen.append(name), call(*given, **named))[1]

    monkeypatch.setattr(StreamingDecoder, "rest", noted("rest", rest))
    monkeypatch.setattr(StreamingDecoder, "push", noted("decode", push))
    monkeypatch.setattr(Components, "denoise", noted("sample", sample))
    segments(c)
    assert seen == ["sample", "decode", "rest", "sample", "decode", "rest", "sample", "decode"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tile", [0, 32])
def test_the_decoders_state_waits_in_system_memory(tile: int) -> None:
    c = components(
        dit=make_dit().cuda(), vae=make_vae().cuda(), tiling=Tiling(tile, tile * 3 // 4) if tile else None
    )  # fmt: skip
    latents = torch.randn(1, 16, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, decoder = decode_latents(c, latents), StreamingDecoder(c)
    frames = [decoder.push(latents[:, :, :3])]
    decoder.rest()
    states = [decoder._state, *(each.state for each in decoder._tiles)]
    assert {tensor.device.type for state in states for tensor in state.values()} == {"cpu"}
    frames.append(decoder.push(latents[:, :, 3:]))
    assert {tensor.device.type for state in states for tensor in state.values()} == {"cuda"}
    assert torch.equal(torch.cat(frames, dim=1), whole)


def test_an_image_starts_as_image_to_video_does(c: Components) -> None:
    image = pictures(1)[0]
    parts = segments(c, image=image, num_segments=1)
    alone = image_to_video(
        c, text=text(), image=image, num_steps=2, guidance_scale=1.0, generator=segment_generator(4, 0)
    )
    assert torch.equal(parts[0].frames, alone[0])


def test_a_clip_is_continued(c: Components) -> None:
    clip = pictures(7)
    parts = segments(c, frames=clip, num_segments=1)
    alone = continue_video(
        c, text=text(), frames=clip, num_steps=2, guidance_scale=1.0, uniform_tail=False,
        generator=segment_generator(4, 0),
    )  # fmt: skip
    assert torch.equal(parts[0].frames, alone[0, C:])


def test_each_segment_has_its_own_random_numbers(c: Components) -> None:
    draws = [torch.randn(4, generator=segment_generator(seed, i)) for seed in (0, 1) for i in range(4)]
    assert len(torch.stack(draws).unique(dim=0)) == 8
    # The first segment is the plain task with the same seed.
    assert torch.equal(draws[4], torch.randn(4, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(segments(c, seed=1, num_segments=1)[0].latents, segments(c, num_segments=1)[0].latents)


def test_one_prompt_for_each_segment(c: Components) -> None:
    """Changing the prompt of a segment changes it and what follows, nothing before."""
    prompts = ["a cat", "it jumps", "it sleeps"]
    parts = segments(c, text=prompts, num_segments=None)
    assert len(parts) == 3
    for changed in range(3):
        others = [*prompts[:changed], "rain", *prompts[changed + 1 :]]
        now = segments(c, text=others, num_segments=None)
        same = [torch.equal(a.latents, b.latents) for a, b in zip(parts, now)]
        assert same == [index < changed for index in range(3)]
    single = segments(c, text="a cat")
    assert torch.equal(single[0].latents, parts[0].latents) and not torch.equal(single[1].latents, parts[1].latents)


def test_the_prompts_reach_their_segments() -> None:
    """What the network is given as text in each segment."""
    encoder, dit = FakeTextEncoder(), make_dit()
    c = components(dit=dit, text_encoder=encoder)
    seen: list[Tensor] = []
    dit.y_embedder.register_forward_hook(lambda _m, x, _y: seen.append(x[0]))
    prompts, negatives = ["a", "b", "c"], ["x", "y", "z"]
    segments(c, text=prompts, negative_text=negatives, guidance_scale=4.0, num_steps=1)
    order = [p for pair in zip(negatives, prompts) for p in pair]
    assert torch.equal(torch.cat(seen), encoder.encode(order).states)
    seen.clear()
    segments(c, text=prompts, guidance_scale=4.0, num_steps=1)
    assert torch.equal(torch.cat(seen), encoder.encode(["", "a", "", "b", "", "c"]).states)


def test_the_schedule_and_its_tail_reach_every_segment(c: Components) -> None:
    steps: list[tuple[int, int]] = []
    segments(c, uniform_tail=True, num_segments=2, on_step=lambda index, info: steps.append((index, info.num_steps)))
    assert steps == [(0, 2)] * 2 + [(1, 11)] * 11  # base(2) has one sigma above 0.5
    steps.clear()
    segments(c, schedule="distilled", num_steps=3, num_segments=2, uniform_tail=True,
             on_step=lambda index, info: steps.append((index, info.step)))  # fmt: skip
    assert steps == [(i, s) for i in range(2) for s in (1, 2, 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": text(2)}, "2 prompts for 3 segments; give one, or one per segment"),
        ({"guidance_scale": 4.0, "negative_text": text(2)}, "2 negative prompts for 3 segments"),
        ({"guidance_scale": 4.0}, "guidance needs a negative_text"),
        ({"num_segments": 0}, "num_segments must be at least 1"),
        ({"handover": "pixels"}, 'handover must be "frames", "official" or "latents"'),
        ({"posterior": "mean"}, "posterior must be"),
        ({"fit": "cover"}, "fit must be"),
        ({"schedule": "fast"}, "schedule must be"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"image": pictures(1), "frames": pictures(7)}, "not both"),
        ({"image": pictures(2)}, "starts from one image, got 2"),
        ({"frames": pictures(4)}, "the clip has 4 frames but num_cond_frames is 5"),
        ({"num_cond_frames": 9}, "nothing would be new"),
        ({"num_frames": 10}, r"num_frames must be 4k\+1"),
        ({"height": 40}, "height must be a multiple of 16"),
        ({"text": "a cat"}, "no text encoder"),
    ],
)
def test_everything_is_checked_before_the_first_segment(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        long_video_segments(components(), **{"text": text()} | OPTIONS | options)
    with pytest.raises(InputError, match="needs a VAE"):
        long_video_segments(components(vae=None), **{"text": text()} | OPTIONS)
    with pytest.raises(InputError, match="output must be"):
        long_video(components(), text=text(), output="video", **OPTIONS)  # type: ignore[arg-type]


@dataclass
class Finished:
    """A whole run, its options and the store it has left."""

    options: dict[str, Any]
    segments: list[Segment]
    folder: Path

    def interrupted(self, target: Path, done: int) -> SegmentStore:
        """The store as it was after `done` segments."""
        store = SegmentStore(target, "k")
        for index in range(done):
            shutil.copy(self.folder / store.path(index).name, target)
        return store


STARTS: list[dict[str, Any]] = [{}, {"frames": pictures(7)}]


@pytest.fixture(scope="module", params=[(h, s) for h in HANDOVERS for s in (0, 1)], ids=str)
def finished(request: pytest.FixtureRequest, c: Components, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    handover, start = request.param
    options = {"handover": handover, "posterior": "sample"} | STARTS[start]
    folder = tmp_path_factory.mktemp("segments")
    return Finished(options, segments(c, store=SegmentStore(folder, "k"), **options), folder)


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resuming_between_segments(c: Components, finished: Finished, tmp_path: Path, done: int) -> None:
    steps: list[int] = []
    rest = segments(
        c, store=finished.interrupted(tmp_path / "s", done), done=done,
        on_step=lambda index, _info: steps.append(index), **finished.options,
    )  # fmt: skip
    assert [s.index for s in rest] == list(range(done, 3))
    assert sorted(set(steps)) == list(range(done, 3))
    for segment in rest:
        assert torch.equal(segment.frames, finished.segments[segment.index].frames)
        assert torch.equal(segment.latents, finished.segments[segment.index].latents)


def test_a_caller_that_lost_its_file_gets_every_segment_without_a_step(
    c: Components, finished: Finished, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("nothing was to be computed")

    again = segments(c, store=finished.interrupted(tmp_path / "s", 3), on_step=fail, **finished.options)
    assert torch.equal(joined(again), joined(finished.segments))


@pytest.mark.parametrize("inside", [0, 1, 2])
def test_resuming_inside_a_segment(c: Components, finished: Finished, tmp_path: Path, inside: int) -> None:
    store = finished.interrupted(tmp_path / "s", inside)

    def stop(_index: int, _info: StepInfo) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segments(c, store=store, done=inside, on_step=stop, **finished.options)
    assert store.finished() == inside
    steps: list[tuple[int, int]] = []
    rest = segments(
        c, store=store, done=inside, on_step=lambda index, info: steps.append((index, info.step)), **finished.options
    )
    assert steps == [(inside, 2)] + [(index, step) for index in range(inside + 1, 3) for step in (1, 2)]
    assert torch.equal(joined(rest), joined(finished.segments[inside:]))


def test_a_stopped_consumer_loses_nothing(c: Components, tmp_path: Path) -> None:
    """A segment is in the store before its frames are handed out."""
    store = SegmentStore(tmp_path, "k")
    run = long_video_segments(c, text=text(), store=store, **OPTIONS)
    first = next(run)
    assert store.finished() == 1
    run.close()
    rest = segments(c, store=store, done=1)
    assert torch.equal(joined([first, *rest]), joined(segments(c)))
