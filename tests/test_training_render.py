"""The renderer against geometry and mechanics, and clips by number."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_core.training.data.clips import clip_generator, describe_clip, refined_clip, sample_batch, sample_clip
from lcv_core.training.data.grammar import MOTIONS, OBJECTS, TEXTURES, Scene, draw_scene
from lcv_core.training.data.render import (
    BACKGROUND_VALUES,
    COLOUR_VALUES,
    FIRST_WINDOW,
    GRAVITY,
    RADII,
    RING_INNER,
    RING_OUTER,
    SQUARE_HALF,
    STAR_INNER,
    STAR_RADIUS,
    TRIANGLE_RADIUS,
    clip_times,
    path,
    refined_times,
    render,
)

AREAS = {
    "ball": math.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": 3 * math.sqrt(3) / 4 * TRIANGLE_RADIUS**2,
    "star": 5 * STAR_RADIUS**2 * STAR_INNER * math.sin(math.pi / 5),
    "ring": math.pi * (RING_OUTER**2 - RING_INNER**2),
}  # of radius 1


def scene(**values: object) -> Scene:
    base = Scene("ball", "red", "large", "stays still", "black")
    return dataclasses.replace(base, **values)


def drawn(seed: int, **fixed: str) -> Scene:
    return draw_scene(torch.Generator().manual_seed(seed), held_back="any", **fixed)


def coverage(frames: Tensor, of: Scene) -> Tensor:
    """How much of each pixel the plain object covers, [F, H, W], from the red channel."""
    back, colour = BACKGROUND_VALUES[of.background][0] + of.dark, COLOUR_VALUES[of.colour][0] + of.light
    return (frames[..., 0].double() - back) / (colour - back)


@pytest.mark.parametrize("thing", OBJECTS)
@pytest.mark.parametrize("size", RADII)
@pytest.mark.parametrize("height", [64, 128])
def test_area_is_that_of_the_figure(thing: str, size: str, height: int):
    for u, v in ((0.5, 0.5), (0.123, 0.77), (0.9, 0.31)):  # wherever it falls between pixels
        of = scene(object=thing, size=size, u=u, v=v)
        found = float(coverage(render(of, torch.zeros(1), height, height * 3 // 2), of).sum()) / height**2
        assert found == pytest.approx(AREAS[thing] * RADII[size] ** 2, rel=0.02)


@pytest.mark.parametrize("thing", OBJECTS)
def test_a_turned_object_keeps_its_area(thing: str):
    of = scene(object=thing, motion="spins", phase=0.05)
    frames = render(of, clip_times(9, 15.0), 256, 384)
    inside = (coverage(frames, of) > 0.5).double().sum(dim=(1, 2)) / 256**2  # the pale half is redder still
    assert inside.tolist() == pytest.approx([AREAS[thing] * RADII["large"] ** 2] * 9, rel=0.02)  # whole pixels


def test_a_star_has_five_points_and_one_is_up():
    of = scene(object="star", colour="white")
    frame = coverage(render(of, torch.zeros(1), 256, 256), of)[0]
    y, x = torch.meshgrid(*[(torch.arange(256.0) + 0.5) / 256 - 0.5] * 2, indexing="ij")
    where = path(of, torch.zeros(1), 1.0)
    dx, dy = x - float(where.x), y - float(where.y)
    # What lies farther out than three quarters is five tips, at 72 degrees from each other.
    tips = (frame > 0.5) & (torch.hypot(dx, dy) > 0.75 * STAR_RADIUS * RADII["large"])
    around = torch.rad2deg(torch.atan2(-dy, dx))[tips] % 360
    for k in range(5):
        centre = (90 + 72 * k) % 360
        near = (around - centre + 180) % 360 - 180
        assert near[near.abs() < 36].abs().max() < 15
        assert near[near.abs() < 36].mean().abs() < 1


def test_colours_are_the_named_ones():
    for colour in COLOUR_VALUES:
        of = scene(colour=colour, background="brown", light=3.0, dark=-2.0)
        frame = render(of, torch.zeros(1), 64, 96)[0]
        assert frame[32, 48].tolist() == [v + 3 for v in COLOUR_VALUES[colour]]
        assert frame[0, 0].tolist() == [v - 2 for v in BACKGROUND_VALUES["brown"]]


@pytest.mark.parametrize("motion", MOTIONS)
def test_twice_as_fine_is_the_same_scene(motion: str):
    """Every other refined frame, averaged over 2 x 2 pixels, is the base frame, but for corners within a pixel."""
    for seed in range(3):
        of = drawn(seed, motion=motion, texture="none")
        times = clip_times(9, 15.0, start=2.0)
        base = render(of, times, 64, 96).double()
        fine = render(of, refined_times(times, 17), 128, 192).double()[::2]
        down = F.avg_pool2d(fine.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        difference = (down - base).abs()
        assert difference.mean() < 0.1
        # The corners of a star are finer than a pixel.
        assert (difference.amax(dim=-1) > 16).double().mean() < 2e-3


def test_a_textures_light_is_even_and_shows_at_twice_the_base_size():
    for texture in TEXTURES[1:]:
        textured = scene(texture=texture, colour="green", background="grey")
        plain = dataclasses.replace(textured, texture="none")
        times = torch.zeros(1)
        assert torch.equal(render(textured, times, 64, 96), render(plain, times, 64, 96))
        at = coverage(render(plain, times, 128, 192), plain)[0] > 0.99
        difference = (render(textured, times, 128, 192).float() - render(plain, times, 128, 192).float())[0][at]
        assert difference.mean().abs() < 1.5
        assert 25 < difference.std() < 45


def test_textures_travel_with_the_object():
    """Moved by whole pixels, the clip is the same picture moved."""
    for texture in TEXTURES[1:]:
        of = scene(motion="moves right", texture=texture, speed=0.375, size="small")
        frames = render(of, torch.tensor([0.0, 1 / 12], dtype=torch.float64), 128, 192)  # 48 pixels a second
        difference = (frames[1].int() - torch.roll(frames[0], 4, dims=1).int()).abs()
        assert difference.max() <= 1  # rounding


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("aspect", [1.5, 1.0])
def test_nothing_touches_the_edge_in_the_first_window(motion: str, aspect: float):
    for seed in range(8):
        of = drawn(seed, motion=motion)
        frames = render(of, clip_times(17, 15.0), 64, round(64 * aspect)).int()
        for edge in (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]):
            assert (edge - frames[:1, :1, 0]).abs().max() <= 1


@pytest.mark.parametrize("motion", ["moves left", "moves right", "moves up", "moves down"])
def test_a_straight_motion_goes_on_round_the_torus(motion: str):
    of = drawn(1, motion=motion, background="black", colour="white")
    times = clip_times(150, 15.0)
    where = path(of, times, 1.5)
    sign, along, across = {
        "moves left": (-1, where.x, where.y), "moves right": (1, where.x, where.y),
        "moves up": (-1, where.y, where.x), "moves down": (1, where.y, where.x),
    }[motion]  # fmt: skip
    steps = sign * (along[1:] - along[:-1])
    assert (steps > 0.25 / 15).all() and (steps < 0.46 / 15).all()
    assert across.unique().numel() == 1
    area = coverage(render(of, times, 64, 96), of).sum(dim=(1, 2))
    assert area.min() > 0.97 * area.max()  # all of it stays in view


def test_a_bounce_is_a_parabola_under_one_gravity():
    of = drawn(2, motion="bounces")
    step = 1e-3
    y = path(of, clip_times(3000, 1 / step), 1.5).y
    bend = (y[2:] - 2 * y[1:-1] + y[:-2]) / step**2
    flying = bend.abs() < 100  # not on the ground
    assert flying.double().mean() > 0.99
    assert torch.allclose(bend[flying], torch.full_like(bend[flying], GRAVITY), atol=1e-3)
    ground = 0.5 - (y.max() + RADII[of.size] * of.scale * {"ball": 1.0}.get(of.object, 0.0))
    assert 0.2 < float(y.max() - y.min()) < 0.4 and float(ground) > 0


def test_circles_and_spins_turn_steadily():
    times = clip_times(60, 15.0)
    of = drawn(3, motion="circles")
    where = path(of, times, 1.5)
    z = torch.complex(where.x, where.y)
    period = 1 / of.rate
    opposite = path(of, times + period / 2, 1.5)
    centre = (z + torch.complex(opposite.x, opposite.y)) / 2
    assert torch.allclose(centre, centre[:1].expand_as(centre), atol=1e-12)
    assert torch.allclose((z - centre).abs(), (z - centre).abs()[:1].expand(60), atol=1e-12)
    spinning = drawn(3, motion="spins")
    turn = path(spinning, times, 1.5).angle
    per_frame = 2 * math.pi * spinning.rate * spinning.turn / 15
    assert torch.allclose(turn[1:] - turn[:-1], torch.full((59,), per_frame, dtype=torch.float64))
    assert abs(per_frame) < math.pi / 5  # half of what a star's symmetry would hide


@pytest.mark.parametrize(("motion", "sign"), [("grows", 1), ("shrinks", -1)])
def test_growth_is_steady_and_springs_back(motion: str, sign: int):
    for seed in range(5):
        log_radius = path(drawn(seed, motion=motion), clip_times(170, 15.0), 1.5).radius.log()
        steps = sign * (log_radius[1:] - log_radius[:-1])
        first = steps[: round(FIRST_WINDOW * 15)]
        assert (first > 0).all() and float(first.std()) < 1e-9 and float(first.sum()) > 0.3
        assert float((steps > 0).double().mean()) > 0.8  # in ten seconds, but for the springs
        assert float(log_radius.max() - log_radius.min()) < 0.51


def test_times_of_refined_frames_are_those_of_the_official_upsampling():
    times = clip_times(17, 15.0, start=3.0)
    exact, stretched = refined_times(times, 33), refined_times(times, 34)
    assert torch.allclose(exact[::2], times) and torch.allclose(exact[1::2], times[:-1] + 1 / 30)
    position = torch.arange(34, dtype=torch.float64) * (16 / 33)  # in source frames, as refinement.upsampled_frames
    assert torch.allclose(stretched, 3.0 + position / 15)
    assert refined_times(times[:1], 1).tolist() == [3.0]


def test_clips_by_number_in_any_order():
    frames, clips = sample_batch(5, [7, 2, 7], num_frames=5, late=0.5)
    for i, index in enumerate((7, 2, 7)):
        one = sample_clip(5, index, num_frames=5, late=0.5)
        assert torch.equal(one.frames, frames[i]) and torch.equal(one.frames, clips[i].frames)
        assert (one.scene, one.caption) == (clips[i].scene, clips[i].caption)
        assert torch.equal(one.frames, render(one.scene, one.times, 64, 96))
    assert describe_clip(5, 7) != describe_clip(6, 7)
    assert clip_generator(5, 7).initial_seed() != clip_generator(7, 5).initial_seed()


def test_late_clips_are_the_share_that_was_asked_for():
    starts = [describe_clip(0, i, late=0.3)[2] for i in range(400)]
    assert 0.2 < sum(start > 0 for start in starts) / 400 < 0.4
    assert max(starts) > 10
    assert not any(describe_clip(0, i)[2] for i in range(50))


def test_a_refined_clip_is_the_scene_at_twice_the_size_and_rate():
    clip = sample_clip(1, 0, num_frames=9, late=1.0)
    fine = refined_clip(clip)
    assert fine.frames.shape == (17, 128, 192, 3)
    assert (fine.scene, fine.caption) == (clip.scene, clip.caption)
    assert torch.allclose(fine.times[::2], clip.times)
    assert refined_clip(clip, time_mapping="stretch").frames.shape == (18, 128, 192, 3)
    assert refined_clip(clip, spatial_only=True).frames.shape == (9, 128, 192, 3)
