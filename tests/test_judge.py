"""The judge against the renderer's ground truth, clean and as generated video looks; metrics against their formulas."""

from __future__ import annotations

import dataclasses
import io
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.training.data.clips import Clip, refined_clip, sample_clip
from lcv_core.training.data.grammar import ATTRIBUTES, COLOURS, MOTIONS, Scene
from lcv_core.training.data.render import clip_times, path, render
from lcv_core.training.evaluation.judge import find, measure, reward, score
from lcv_core.training.evaluation.metrics import psnr, seam_jump, ssim

BASE = tuple(name for name in ATTRIBUTES if name != "texture")


def degraded(frames: Tensor, seed: int) -> Tensor:
    """Frames as a generator gives them: bent by up to a pixel or two, blurred (sigma 1 pixel), off in colour, noisy,
    and quantised in blocks (JPEG at quality 40)."""
    generator = torch.Generator().manual_seed(seed)
    count, height, width, _ = frames.shape
    images = frames.permute(0, 3, 1, 2).float()
    bend = F.interpolate(
        torch.randn(1, 2, 4, 6, generator=generator), size=(height, width), mode="bicubic", align_corners=True
    )
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([(x + 0.6 * bend[0, 0] + 0.5) / width, (y + 0.6 * bend[0, 1] + 0.5) / height], dim=-1) * 2 - 1
    images = F.grid_sample(images, at.expand(count, -1, -1, -1), padding_mode="border", align_corners=False)
    kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")
    images = F.conv2d(F.conv2d(images, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    images = images + 8.0 * torch.randn(1, 3, 1, 1, generator=generator).clamp(-1.5, 1.5)
    images = images + 5.0 * torch.randn(images.shape, generator=generator)
    compressed = []
    for image in images.clamp(0, 255).round().byte().permute(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, "JPEG", quality=40, subsampling=0)
        compressed.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(compressed)


def wrong(clips: list[Clip]) -> dict[str, list[str]]:
    """Clips that are judged to be something else, by attribute."""
    found: dict[str, list[str]] = defaultdict(list)
    for clip in clips:
        for name, verdict in measure(clip.frames).items():
            if verdict.value != getattr(clip.scene, name):
                found[name].append(f"{clip.scene}: {verdict}")
    return found


def clips_of_every_motion(seed: int, count: int, *, late: float = 0.3) -> list[Clip]:
    return [sample_clip(seed, i, held_back="any", late=late, motion=MOTIONS[i % 10]) for i in range(count)]


def test_clean_clips_are_judged_right():
    assert not wrong(clips_of_every_motion(100, 80))


def test_degraded_clips_are_judged_right():
    clips = [dataclasses.replace(c, frames=degraded(c.frames, i)) for i, c in enumerate(clips_of_every_motion(101, 50))]
    for name, clips_judged_wrong in wrong(clips).items():
        assert len(clips_judged_wrong) <= 1, (name, clips_judged_wrong)  # 98%


def test_refined_clips_are_judged_right():
    clips = [refined_clip(clip) for clip in clips_of_every_motion(102, 20)]
    assert not wrong(clips)
    blurred = [dataclasses.replace(clip, frames=degraded(clip.frames, i)) for i, clip in enumerate(clips[:10])]
    assert not wrong(blurred)


def test_floats_and_bytes_are_judged_alike():
    clip = sample_clip(3, 0)
    assert measure(clip.frames.float() / 255).keys() == {*BASE}
    for name, verdict in measure(clip.frames.float() / 255).items():
        assert verdict.value == measure(clip.frames)[name].value


def test_another_colour_or_motion_is_wrong():
    for i, (colour, motion) in enumerate(zip(COLOURS * 2, MOTIONS * 2, strict=False)):
        clip = sample_clip(4, i, held_back="any", colour=colour, motion=motion)
        others = {"colour": COLOURS[(i + 1) % 8], "motion": MOTIONS[(i + 3) % 10]}
        scores = score(clip.frames, clip.scene.attributes | others)
        assert scores["colour"] < 0.5 and scores["motion"] < 0.5
        assert all(scores[name] > 0.5 for name in ("object", "size", "background"))


def test_only_what_a_prompt_names_is_judged():
    clip = sample_clip(5, 0, held_back="any", object="ball", colour="red", motion="moves left", background="black")
    assert score(clip.frames, {"colour": "red"}).keys() == {"colour"}
    right = reward(clip.frames, "a red ball moves left")
    half = reward(clip.frames, "a blue ball moves left")
    assert right > 0.8 > half > 0.4
    assert reward(clip.frames, "a cat") == 0.0
    assert "texture" not in score(clip.frames, clip.scene.attributes)  # the base resolution cannot show it


@pytest.mark.parametrize("height", [64, 128])
def test_where_nothing_is_to_be_seen_nothing_is_judged(height: int):
    generator = torch.Generator().manual_seed(0)
    size = (17, height, height * 3 // 2, 3)
    blank = torch.full(size, 96, dtype=torch.uint8)
    noisy = (100 + 8 * torch.randn(size, generator=generator)).clamp(0, 255).byte()
    random = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    for frames in (blank, noisy, random):
        verdicts = measure(frames)
        assert all(verdicts[name].value is None for name in verdicts if name != "background")
        assert score(frames, {"object": "ball", "motion": "stays still"}) == {"object": 0.0, "motion": 0.0}
    assert measure(blank)["background"].value == "grey"


def test_an_object_that_vanishes_is_not_found():
    clip = sample_clip(6, 0, background="black")
    half_gone = clip.frames.clone()
    half_gone[8:] = half_gone[:1, :1, :1]
    assert measure(half_gone)["object"].value is None


def test_two_objects_are_none_of_them():
    a, b = (Scene(thing, "white", "small", "stays still", "black", u=u) for thing, u in (("ball", 0.1), ("star", 0.9)))
    frames = torch.maximum(*(render(x, clip_times(17, 15.0), 64, 96) for x in (a, b)))
    assert measure(frames)["object"].value is None


def test_a_path_that_is_no_named_motion_is_none_of_them():
    """To and fro: neither left nor right."""
    clip = render(Scene("ball", "red", "small", "moves left", "black", u=0.5), clip_times(9, 15.0), 64, 96)
    assert measure(torch.cat([clip, clip.flip(0)]))["motion"].value is None


def test_a_ball_that_turns_without_a_pale_half_stays_still_and_a_square_spins():
    """What turns in place is judged by what can be seen."""
    for thing, expected in (("ball", "stays still"), ("square", "spins")):
        turning = Scene(thing, "white", "large", "spins", "black", rate=0.5)
        frames = render(turning, clip_times(17, 15.0), 64, 96)
        frames = torch.where(frames > 60, torch.full_like(frames, 212), frames)
        assert measure(frames)["motion"].value == expected


def test_the_track_is_the_path():
    for motion in ("moves right", "bounces", "circles"):
        clip = sample_clip(7, 1, held_back="any", motion=motion, object="ball", late=1.0)
        truth, track = path(clip.scene, clip.times, 1.5), find(clip.frames)
        for found, true in ((track.x, truth.x), (track.y, truth.y)):
            assert torch.allclose(found - found[0], true - true[0], atol=0.01)


# Metrics


def test_psnr_is_its_formula():
    a = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, a) == math.inf
    black, white = torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    assert psnr(black, white) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(InputError, match="different shapes"):
        psnr(a, a[:1])


def test_ssim_is_its_formula():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(1, 11, 11, 3, generator=generator, dtype=torch.float64).float() for _ in range(2))
    # One window alone, written out.
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for x, y in zip(a[0].double().numpy().transpose(2, 0, 1), b[0].double().numpy().transpose(2, 0, 1)):
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy, cov = (
            (window * (x - mx) ** 2).sum(),
            (window * (y - my) ** 2).sum(),
            (window * (x - mx) * (y - my)).sum(),
        )
        values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)
    # Shifted light, without structure: the luminance term alone.
    flat = torch.full((1, 16, 16, 3), 0.25)
    assert ssim(flat, flat * 2) == pytest.approx((2 * 0.125 + 1e-4) / (0.0625 + 0.25 + 1e-4), abs=1e-6)
    with pytest.raises(InputError, match="at least 11"):
        ssim(a[:, :10], b[:, :10])


def test_seam_jump_is_one_where_nothing_jumps():
    clip = sample_clip(8, 0, num_frames=33, motion="moves left", held_back="any").frames
    assert seam_jump(clip, [13, 25]) == pytest.approx(1.0, abs=0.1)


def test_seam_jump_measures_the_jump():
    """Brightness that goes up by 2 a frame, and by 6 over each joint."""
    level = torch.tensor([0, 2, 4, 10, 12, 14, 20, 22], dtype=torch.float32) / 255
    frames = level.view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    assert seam_jump(frames, [3, 6]) == pytest.approx(3.0, rel=1e-5)
    assert seam_jump(frames, [3]) == pytest.approx(6 / (16 / 6), rel=1e-5)
    still = torch.full((8, 4, 4, 3), 100, dtype=torch.uint8)
    assert seam_jump(still, [4]) == 1.0
    jumping = torch.cat([still, still + 50])
    assert seam_jump(jumping, [8]) == pytest.approx(50 / 0.25)
    for joints in ([], [0], [16], [*range(1, 16)]):
        with pytest.raises(InputError, match="joints must be"):
            seam_jump(jumping, joints)


def test_frames_of_another_layout_are_refused():
    with pytest.raises(InputError, match=r"\[F, H, W, 3\]"):
        measure(torch.zeros(3, 17, 64, 96))
