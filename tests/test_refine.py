"""The refine pass: padding arithmetic, upsampling, windows, and long refinement with its joints and resumption."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import components, make_dit, pictures, randn, seeded, text
from torch import Tensor

from lcv_core import refinement
from lcv_core.config import BSAConfig
from lcv_core.denoise import StepInfo
from lcv_core.errors import InputError
from lcv_core.partial import SegmentStore
from lcv_core.pipelines import Components, Segment, long_refine_segments, refine_video
from lcv_core.pipelines.long_video import segment_generator
from lcv_core.refinement import crossfade, frames_after, padded_frames, plan_refine, plan_windows, upsampled_frames
from lcv_core.vae.tiling import Tiling

# F, c, spatial only -> F', n_c, front, n_n, back, latents encoded, frames decoded (specification 7.6).
TABLE = [
    (93, 0, False, 186, 0, 0, 48, 6, 48, 189),
    (93, 1, False, 186, 4, 12, 48, 7, 52, 205),
    (93, 26, False, 186, 8, 3, 40, 0, 48, 189),
    (93, 0, True, 93, 0, 0, 24, 3, 24, 93),
    (93, 1, True, 93, 4, 12, 24, 4, 28, 109),
    (93, 13, True, 93, 4, 0, 20, 0, 24, 93),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_padding_table(row: tuple[int, ...]) -> None:
    frames, c, spatial, out, n_c, front, n_n, back, latents, decoded = row
    plan = plan_refine(frames, c, spatial_only=bool(spatial))
    assert (plan.frames_out, plan.cond_latents, plan.front, plan.noise_latents, plan.back) == (
        out,
        n_c,
        front,
        n_n,
        back,
    )
    assert (plan.latents, plan.frames_encoded) == (latents, decoded)


@given(st.integers(1, 400), st.integers(0, 60), st.booleans(), st.sampled_from(["stretch", "exact"]))
def test_padding_invariants(frames: int, c: int, spatial: bool, mapping: Any) -> None:
    out = frames_after(frames, spatial_only=spatial, time_mapping=mapping)
    if c >= out:
        with pytest.raises(InputError, match="num_cond_frames must be in"):
            plan_refine(frames, c, spatial_only=spatial, time_mapping=mapping)
        return
    plan = plan_refine(frames, c, spatial_only=spatial, time_mapping=mapping)
    assert plan.frames_out == out == (frames if spatial else 2 * frames - (mapping == "exact"))
    assert plan.cond_latents % 4 == 0 and plan.noise_latents % 4 == 0 and plan.noise_latents > 0
    assert (plan.cond_latents > 0) == (c > 0)
    assert plan.front >= 0 and plan.back >= 0
    assert plan.front + out + plan.back == plan.frames_encoded + (0 if c else 3)
    # Every frame of the clip is encoded and decoded, and the given ones fill the condition latents exactly.
    assert plan.frames_encoded >= plan.front + out
    assert plan.front + c == (plan.cond_frames_encoded if c else 0)
    # No more padding than the groups of four need.
    assert plan.back <= 15 + (0 if c else 3) and plan.front <= 15


def test_plan_errors() -> None:
    with pytest.raises(InputError, match="no frames"):
        plan_refine(0)
    with pytest.raises(InputError, match=r"in \[0, 9\] for 10 refined frames, got -1"):
        plan_refine(5, -1)
    with pytest.raises(InputError, match='time_mapping must be "stretch" or "exact"'):
        plan_refine(5, time_mapping="double")  # type: ignore[arg-type]


def upsample(clip: Tensor, size: tuple[int, int], out: int) -> Tensor:
    return torch.stack(list(upsampled_frames(clip, size, out)), dim=1)


@pytest.mark.parametrize(("frames", "out"), [(1, 1), (1, 2), (2, 4), (9, 18), (9, 17), (9, 9), (31, 62), (93, 186)])
def test_upsampling_is_the_librarys(frames: int, out: int) -> None:
    clip = pictures(frames, 6, 8)
    pixels = (clip.float() / 255).permute(3, 0, 1, 2).unsqueeze(0)
    space = F.interpolate(pixels, size=(frames, 16, 24), mode="trilinear", align_corners=True)
    expected = F.interpolate(space, size=(out, 16, 24), mode="trilinear", align_corners=True) * 2 - 1
    got = upsample(clip, (16, 24), out)
    assert got.dtype == torch.float32 and got.shape == expected[0].shape
    assert (got - expected[0]).abs().max() <= 2e-6


@given(st.integers(1, 120))
def test_exact_mapping_keeps_every_source_frame(frames: int) -> None:
    clip = pictures(frames, 2, 3)
    got = upsample(clip, (4, 4), 2 * frames - 1)
    sources = F.interpolate((clip.float() / 255).permute(0, 3, 1, 2), size=(4, 4), mode="bilinear", align_corners=True)
    sources = sources * 2 - 1
    assert torch.equal(got[:, ::2], sources.transpose(0, 1))
    between = (sources[:-1] + sources[1:]) / 2
    assert torch.allclose(got[:, 1::2], between.transpose(0, 1), atol=1e-6)


def test_uint8_and_float_clips_are_one() -> None:
    clip = pictures(5)
    assert torch.equal(upsample(clip, (64, 64), 10), upsample(clip.float() / 255, (64, 64), 10))


def test_upsampling_asks_for_each_frame_once_in_order() -> None:
    asked: list[int] = []

    class Clip:
        shape, dtype = (9, 4, 4, 3), torch.uint8

        def __getitem__(self, i: int) -> Tensor:
            asked.append(i)
            return pictures(9, 4, 4)[i]

    list(upsampled_frames(Clip(), (8, 8), 18))  # type: ignore[arg-type]
    assert asked == list(range(9))


@given(st.integers(1, 40), st.integers(0, 12), st.booleans())
def test_padded_frames(frames: int, c: int, spatial: bool) -> None:
    if c >= frames * (1 if spatial else 2):
        return
    plan = plan_refine(frames, c, spatial_only=spatial)
    clip = pictures(frames, 2, 2)
    got = torch.stack(list(padded_frames(clip, (2, 2), plan)), dim=1)
    assert got.shape[1] == plan.frames_encoded
    inner = upsample(clip, (2, 2), plan.frames_out)
    stop = plan.front + plan.frames_out
    assert torch.equal(got[:, plan.front : stop], inner)
    assert (got[:, : plan.front] == inner[:, :1]).all()
    assert (got[:, stop:] == inner[:, -1:]).all()


def test_mix() -> None:
    z, noise = randn(2, 3), randn(2, 3, seed=1)
    assert torch.equal(refinement.mix(z, noise, 1.0), noise)
    assert torch.allclose(refinement.mix(z, noise, 0.25), 0.75 * z + 0.25 * noise)


def test_crossfade() -> None:
    old, new = torch.zeros(3, 2, 2, 3), torch.ones(3, 2, 2, 3)
    assert torch.allclose(crossfade(old, new)[:, 0, 0, 0], torch.tensor([0.25, 0.5, 0.75]))
    assert torch.allclose(crossfade(new, new), new)


@given(st.integers(1, 600), st.integers(2, 93), st.integers(0, 46))
def test_windows_cover_the_clip(total: int, window: int, overlap: int) -> None:
    if overlap >= window:
        return
    windows = plan_windows(total, window, overlap)
    assert windows[0].start == 0 and windows[0].overlap == 0 and windows[-1].stop == total
    for before, after in pairwise(windows):
        assert after.overlap == overlap and after.start == before.stop - overlap
        assert before.stop - before.start == window
    fresh = [i for w in windows for i in range(w.start + w.overlap, w.stop)]
    assert fresh == list(range(total))


def test_windows_of_the_released_script() -> None:
    windows = plan_windows(93 + 80 * 11, 93, 13)
    assert [(w.start, w.stop) for w in windows] == [(80 * j, 80 * j + 93) for j in range(12)]


@pytest.fixture(scope="module")
def c() -> Components:
    return components()


def refine(c: Components, frames: Any, **changes: Any) -> Tensor:
    options = {"text": text(), "size": (32, 48), "num_steps": 10, "generator": seeded(7)} | changes
    return refine_video(c, frames=frames, **options)


@pytest.mark.parametrize("frames", [1, 5, 7, 8])
def test_every_frame_of_the_clip_comes_back(c: Components, frames: int) -> None:
    """8 frames make 16, of which the padding rule of the released pipeline would lose 3 in the VAE."""
    clip = pictures(frames)
    assert refine(c, clip, refine_steps=1).shape == (1, 2 * frames, 32, 48, 3)
    assert refine(c, clip, refine_steps=1, time_mapping="exact").shape == (1, 2 * frames - 1, 32, 48, 3)
    assert refine(c, clip, refine_steps=1, spatial_only=True).shape == (1, frames, 32, 48, 3)


def test_default_size_and_height_and_width(c: Components) -> None:
    """Twice the native side, in whole sparse blocks."""
    got = refine(c, pictures(1), size=None, refine_steps=1, output="latents")
    assert got.shape[3:] == (8, 8) or got.shape[3:] == (8, 16)
    assert refine(c, pictures(1), size=None, height=48, width=32, refine_steps=1).shape[2:4] == (48, 32)


def test_image_and_video_conditions(c: Components) -> None:
    clip, image, video = pictures(9), pictures(1, seed=11), pictures(6, seed=12)
    plain = refine(c, clip, output="latents")
    with_image = refine(c, clip, image=image, output="latents")
    with_video = refine(c, clip, video=video, output="latents")
    assert plain.shape[2] == 8 and with_image.shape[2] == 12 and with_video.shape[2] == 8
    frames = refine(c, clip, image=image)
    assert frames.shape == (1, 18, 32, 48, 3)
    # The condition latents are the clean encoding of the condition, front-padded by its own first frame.
    vae = c.need_vae()
    for latents, material, repeats in ((with_image, image, 12), (with_video, video, 7)):
        padded = torch.cat([material[:1].expand(repeats, -1, -1, -1), material]).float() / 127.5 - 1
        clean = vae.normalize(vae.encode(padded.permute(3, 0, 1, 2).unsqueeze(0))[0])
        assert torch.allclose(latents[:, :, :4], clean, atol=1e-6)
    # Only the last frames of a longer video count.
    more = torch.cat([pictures(4, seed=13), video])
    assert torch.equal(refine(c, clip, video=more, num_cond_frames=6, output="latents"), with_video)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": True, "video": True}, "not both"),
        ({"num_cond_frames": 3}, "no image or video"),
        ({"image": True, "num_cond_frames": 2}, "an image is one condition frame"),
        ({"video": True, "num_cond_frames": 7}, "has 6 frames but num_cond_frames is 7"),
        ({"t_thresh": 0.0}, "t_thresh must be in"),
        ({"t_thresh": 1.5}, "t_thresh must be in"),
        ({"size": (40, 48)}, "multiple of 16"),
        ({"noise": torch.zeros(1, 16, 2, 4, 6)}, "noise must be"),
        ({"text": text(2)}, "one prompt"),
        ({"output": "video"}, "output must be"),
        ({"time_mapping": "half"}, "time_mapping must be"),
        ({"posterior": "mean"}, "posterior must be"),
    ],
)
def test_refine_errors(c: Components, options: dict[str, Any], words: str) -> None:
    material = {"image": pictures(1), "video": pictures(6)}
    options = {k: material[k] if v is True else v for k, v in options.items()}
    with pytest.raises(InputError, match=words):
        refine(c, pictures(5), **options)


def test_refine_runs_the_sparse_attention_on_any_size(c: Components) -> None:
    clip = pictures(5)
    dense = refine(c, clip, output="latents", size=(48, 80))
    sparse = refine(c, clip, output="latents", size=(48, 80), bsa=BSAConfig(sparsity=0.5))
    whole = refine(c, clip, output="latents", size=(48, 80), bsa=BSAConfig(sparsity=0.0))
    assert (whole - dense).abs().max() <= 1e-3
    assert (sparse - dense).abs().max() > 1e-2


def test_the_generator_decides(c: Components) -> None:
    clip = pictures(5)
    for posterior in ("mode", "sample"):
        first, second = (refine(c, clip, posterior=posterior, output="latents") for _ in range(2))
        assert torch.equal(first, second)
        other = refine(c, clip, posterior=posterior, output="latents", generator=seeded(8))
        assert not torch.equal(first, other)


def test_guidance(c: Components) -> None:
    clip = pictures(5)
    plain = refine(c, clip, output="latents")
    assert torch.equal(refine(c, clip, output="latents", negative_text=text(seed=9)), plain)  # off unless asked for
    guided = refine(c, clip, output="latents", negative_text=text(seed=9), guidance_scale=3.0)
    assert (guided - plain).abs().max() > 1e-2
    with pytest.raises(InputError, match="needs a negative_text"):
        refine(c, clip, guidance_scale=3.0)


def test_tiling_encodes_and_decodes_the_same_number_of_frames() -> None:
    c = components(tiling=Tiling(64, 32))
    assert refine(c, pictures(5), refine_steps=1, size=(64, 128)).shape == (1, 10, 64, 128, 3)


TOTAL, WINDOW, OVERLAP = 11, 5, 2  # windows [0, 5), [3, 8), [6, 11)
CLIP = pictures(TOTAL, 16, 32)


def windows_of(c: Components, clip: Tensor, **changes: Any) -> list[Segment]:
    options: dict[str, Any] = {
        "text": text(), "total_frames": len(clip), "window": WINDOW, "overlap": OVERLAP, "size": (16, 32),
        "refine_steps": 2, "seed": 5,
    } | changes  # fmt: skip
    return list(long_refine_segments(c, read=lambda a, b: clip[a:b], **options))


def joined(segments: list[Segment]) -> Tensor:
    return torch.cat([s.frames for s in segments])


@pytest.fixture(scope="module", params=["blend", "cut"])
def finished(request: pytest.FixtureRequest, c: Components, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("segments")
    segments = windows_of(c, CLIP, joint=request.param, store=SegmentStore(folder, "k"))
    return Finished(request.param, segments, folder)


@dataclass
class Finished:
    """A whole run and the store it has left."""

    joint: str
    segments: list[Segment]
    folder: Path

    def interrupted(self, target: Path, done: int) -> SegmentStore:
        """The store as it was after `done` windows."""
        store = SegmentStore(target, "k")
        for index in range(done):
            shutil.copy(self.folder / store.path(index).name, target)
        return store


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 2 * TOTAL - 1), ({"time_mapping": "stretch"}, 2 * TOTAL), ({"spatial_only": True}, TOTAL)],
)
def test_long_length(c: Components, options: dict[str, Any], expected: int) -> None:
    segments = windows_of(c, CLIP, **options | {"refine_steps": 1})
    assert [s.index for s in segments] == [0, 1, 2]
    assert joined(segments).shape == (expected, 16, 32, 3)


def test_one_window_is_the_plain_pass(c: Components) -> None:
    clip = CLIP[:5]
    (segment,) = windows_of(c, clip)
    alone = refine(c, clip, size=(16, 32), refine_steps=2, time_mapping="exact", generator=segment_generator(5, 0))
    assert torch.equal(segment.frames, alone[0])


def by_hand(c: Components, clip: Tensor, **first: Tensor) -> tuple[list[Tensor], int]:
    """Each window's own frames, refined one after the other; frames shared by two windows."""
    shared = 2 * OVERLAP - 1
    out: list[Tensor] = []
    for j, w in enumerate(plan_windows(len(clip), WINDOW, OVERLAP)):
        condition = {"video": out[-1][-shared:], "num_cond_frames": shared} if j else first
        options = {"size": (16, 32), "refine_steps": 2, "time_mapping": "exact", "generator": segment_generator(5, j)}
        out.append(refine(c, clip[w.start : w.stop], **options, **condition)[0])
    return out, shared


def test_long_is_windows_conditioned_on_the_one_before(c: Components, finished: Finished) -> None:
    parts, n = by_hand(c, CLIP)
    expected = parts[0]
    for part in parts[1:]:
        fade = crossfade(expected[-n:], part[:n]) if finished.joint == "blend" else expected[-n:]
        expected = torch.cat([expected[:-n], fade, part[n:]])
    assert torch.allclose(joined(finished.segments), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_condition_is_the_first_windows(c: Components, kind: str) -> None:
    condition = {kind: pictures(1 if kind == "image" else 3, 16, 32, seed=21)}
    parts, n = by_hand(c, CLIP[:8], **condition)
    got = joined(windows_of(c, CLIP[:8], joint="cut", **condition))
    assert torch.allclose(got, torch.cat([parts[0], parts[1][n:]]), atol=1e-5)
    assert not torch.allclose(got[:6], joined(windows_of(c, CLIP[:5]))[:6], atol=1e-3)


def test_blend_and_cut_differ_in_the_shared_frames_alone(c: Components) -> None:
    blend, cut = (joined(windows_of(c, CLIP[:8], joint=joint)) for joint in ("blend", "cut"))
    differs = (blend != cut).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert differs == [6, 7, 8]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resuming_gives_the_same_frames(c: Components, finished: Finished, tmp_path: Path, done: int) -> None:
    store = finished.interrupted(tmp_path / "store", done)
    rest = windows_of(c, CLIP, joint=finished.joint, store=store, done=done)
    assert [s.index for s in rest] == list(range(done, 3))
    for segment in rest:
        assert torch.equal(segment.frames, finished.segments[segment.index].frames)


def test_finished_windows_are_not_made_again(c: Components, finished: Finished, tmp_path: Path) -> None:
    """A caller that lost its file gets all of them again, none of them refined anew."""
    store = finished.interrupted(tmp_path / "store", 3)
    again = windows_of(c, CLIP, joint=finished.joint, store=store, on_step=fail_on_step)
    assert torch.equal(joined(again), joined(finished.segments))


def fail_on_step(*_: object) -> None:
    raise AssertionError("nothing was to be computed")


def test_resuming_inside_a_window(c: Components, finished: Finished, tmp_path: Path) -> None:
    store = finished.interrupted(tmp_path / "store", 1)

    def stop(_index: int, _info: StepInfo) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        windows_of(c, CLIP, joint=finished.joint, store=store, done=1, on_step=stop)
    steps: list[tuple[int, int]] = []
    rest = windows_of(
        c, CLIP, joint=finished.joint, store=store, done=1, on_step=lambda i, info: steps.append((i, info.step))
    )
    assert steps == [(1, 2), (2, 1), (2, 2)]
    assert torch.equal(joined(rest), joined(finished.segments[1:]))


def test_an_unreadable_window_is_made_again(c: Components, finished: Finished, tmp_path: Path) -> None:
    """With the condition it had: the frames that the caller gets once more are those of before."""
    store = finished.interrupted(tmp_path / "store", 3)
    store.path(1).write_bytes(b"broken")
    rest = windows_of(c, CLIP, joint=finished.joint, store=store, done=2)
    assert [s.index for s in rest] == [1, 2]
    assert torch.equal(joined(rest), joined(finished.segments[1:]))


def test_one_prompt_per_window(c: Components) -> None:
    several = text(2)
    first, second = windows_of(c, CLIP[:8], text=several)
    same = windows_of(c, CLIP[:8], text=several.select(0))
    assert torch.equal(first.latents, same[0].latents)
    assert not torch.equal(second.latents, same[1].latents)
    with pytest.raises(InputError, match="2 prompts for 3 windows"):
        windows_of(c, CLIP, text=several)


def test_frames_are_read_a_window_at_a_time(c: Components) -> None:
    asked = []

    def read(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return CLIP[start:stop]

    for number, _ in enumerate(
        long_refine_segments(
            c, text=text(), read=read, total_frames=TOTAL, window=WINDOW, overlap=OVERLAP, size=(16, 32), refine_steps=1
        )
    ):
        assert len(asked) == number + 1
    assert asked == [(0, 5), (3, 8), (6, 11)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlap": 0}, "window overlap must be in"),
        ({"overlap": 3}, "window overlap must be in"),
        ({"total_frames": 0}, "no frames"),
        ({"joint": "mix"}, 'joint must be "blend" or "cut"'),
        ({"image": pictures(1), "video": pictures(1)}, "not both"),
        ({"time_mapping": "half"}, "time_mapping"),
        ({"video": pictures(20), "num_cond_frames": 20}, "num_cond_frames must be in"),
    ],
)
def test_long_errors_come_before_any_work(options: dict[str, Any], words: str) -> None:
    def read(_start: int, _stop: int) -> Tensor:
        raise AssertionError("nothing may be read before the request is checked")

    with pytest.raises(InputError, match=words):
        long_refine_segments(
            components(), **{"text": text(), "read": read, "total_frames": TOTAL, "window": WINDOW, "overlap": OVERLAP}
            | options,
        )  # fmt: skip


def test_the_refinement_adapter_is_on_during_the_pass_alone() -> None:
    """It changes the result and leaves the weights as they were, also when the pass fails."""
    dit = make_dit()
    adapter = {
        "lora___lorahyphen___final_layer___lorahyphen___linear.lora_down.weight": randn(4, 64),
        "lora___lorahyphen___final_layer___lorahyphen___linear.lora_up.weight": randn(64, 4, seed=1),
    }
    clip = pictures(5)
    plain = refine(components(dit=dit), clip, output="latents")
    adapted = components(dit=dit, adapters={"refinement": adapter})
    assert not torch.allclose(refine(adapted, clip, output="latents"), plain, atol=1e-2)

    def fail(_info: StepInfo) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        refine(adapted, clip, on_step=fail)
    assert torch.equal(refine(components(dit=dit), clip, output="latents"), plain)
