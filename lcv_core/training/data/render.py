"""Scenes as frames: anti-aliased, and the same at every size and frame rate.

Lengths are in frame heights, times in seconds, x to the right and y down from the middle of the frame. A pixel's
coverage is its distance to the outline, so a scene at twice the size and rate is the ground truth of refinement.

Motions go on for ever, so that any second of a long continuation looks like any other:

- A straight motion leaves through one edge while it enters through the opposite one: the frame is a torus. All of the
  object stays in view, it never turns round, and the next frames follow from the last few.
- "grows" and "shrinks" change the size at a steady relative rate for 1.5 s, then spring back in 0.2 s.
- "bounces" is a parabola between the bottom edge and an apex, under one gravity, without loss.
- "spins" and "circles" turn steadily, about 0.6 times a second; "spins" also gives the object a pale half, without
  which nobody could see a ball or a ring spin.

In the first second (`FIRST_WINDOW`) nothing wraps or springs back.

A texture is finer than the base resolution resolves: it adds and subtracts the same amount of light, and fades out
between 1/128 and 1/64 of the frame's height per pixel, where the plain colour is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcv_core.training.data.grammar import Scene

RENDERER_VERSION = 1  # of what a scene looks like, captions and chance included; rendered data are kept under it
BASE_HEIGHT = 64  # pixels; textures are invisible here, and clear from twice this on
FIRST_WINDOW = 1.1  # seconds without a wrap: 17 frames at 15 a second

COLOUR_VALUES = {
    "red": (212, 44, 44), "green": (44, 176, 60), "blue": (44, 84, 212), "yellow": (212, 196, 44),
    "orange": (212, 120, 40), "purple": (150, 52, 204), "cyan": (44, 200, 208), "white": (212, 212, 212),
}  # fmt: skip
BACKGROUND_VALUES = {
    "black": (8, 8, 8), "grey": (96, 96, 96), "dark blue": (16, 24, 80), "dark green": (14, 64, 28),
    "brown": (92, 58, 34),
}  # fmt: skip
RADII = {"small": 0.14, "large": 0.24}  # of the ball

TEXTURE_PERIOD = 3 / 64  # 3 pixels at the base resolution, 6 at twice that
TEXTURE_LIGHT = 40.0  # of 255, up and down

_DOT_SHARE, _DOT_LEVEL = 0.4, -0.013  # of the area; where three waves that meet at 60 degrees exceed this

# Half sides, outer radii and so on, of the ball's radius: figures of about equal area, the pointed ones somewhat less.
SQUARE_HALF = 0.886
TRIANGLE_RADIUS = 1.4  # of the circle through its corners
STAR_RADIUS = 1.4
STAR_INNER = 0.45  # radius of the inner corners, of the outer
RING_OUTER, RING_INNER = 1.05, 0.58

# How far each reaches from its centre: sideways, up, down.
_EXTENTS = {
    "ball": (1.0, 1.0, 1.0),
    "square": (SQUARE_HALF, SQUARE_HALF, SQUARE_HALF),
    "triangle": (TRIANGLE_RADIUS * math.cos(math.pi / 6), TRIANGLE_RADIUS, TRIANGLE_RADIUS / 2),
    "star": (
        STAR_RADIUS * math.cos(math.pi / 10),
        STAR_RADIUS,
        STAR_RADIUS * math.cos(math.pi / 5),
    ),
    "ring": (RING_OUTER, RING_OUTER, RING_OUTER),
}
_FARTHEST = {"ball": 1.0, "square": SQUARE_HALF * math.sqrt(2), "triangle": 1.4, "star": 1.4, "ring": RING_OUTER}

_DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
_MARGIN = 0.02  # between the object and the frame's edge

GRAVITY = 3.6  # frame heights / s^2
_BOUNCE_HEIGHTS = (0.22, 0.36)
_CIRCLE_RADII = (0.15, 0.22)
GROW_TIME, SPRING_TIME = 1.5, 0.2
GROW_RANGE = 0.25  # of log radius, to both sides

_PALE = 0.55  # how much of white is in the pale half of what spins


@dataclass(frozen=True)
class Path:
    """Where the object is at each time, fp64 [F]: its centre, the radius a ball would have, its angle in radians
    (clockwise)."""

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor


def clip_times(num_frames: int, frame_rate: float, *, start: float = 0.0) -> Tensor:
    """Seconds of each frame, fp64 [F]."""
    return start + torch.arange(num_frames, dtype=torch.float64) / frame_rate


def refined_times(times: Tensor, frames_out: int) -> Tensor:
    """Seconds of the refined frames: as many steps of one length from the first source frame to the last.

    The official upsampling in time keeps the ends. With 2F - 1 frames every other is a source frame.
    """
    steps = torch.arange(frames_out, dtype=torch.float64) / max(frames_out - 1, 1)
    return times[0] + (times[-1] - times[0]) * steps


def path(scene: Scene, times: Tensor, aspect: float) -> Path:
    """The scene's motion in a frame of `aspect` = width / height."""
    t = times.double()
    radius = torch.full_like(t, RADII[scene.size] * scene.scale)
    angle = torch.zeros_like(t)
    if scene.motion in ("grows", "shrinks"):
        radius = radius * torch.exp(_log_growth(scene, t))
    elif scene.motion == "spins":
        angle = 2 * math.pi * (scene.phase + scene.turn * scene.rate * t)
    x, y = _centre(scene, t, aspect)
    return Path(x, y, radius, angle)


def _log_growth(scene: Scene, t: Tensor) -> Tensor:
    """Log of radius over its middle: a ramp of GROW_TIME, then back within SPRING_TIME."""
    slack = GROW_TIME - FIRST_WINDOW
    at = (t + scene.phase * slack) % (GROW_TIME + SPRING_TIME)
    up = torch.where(at < GROW_TIME, at / GROW_TIME, 1 - (at - GROW_TIME) / SPRING_TIME)
    ramp = GROW_RANGE * (2 * up - 1)
    return ramp if scene.motion == "grows" else -ramp


def _centre(scene: Scene, t: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    largest = RADII[scene.size] * scene.scale
    if scene.motion in ("grows", "shrinks"):
        largest *= math.exp(GROW_RANGE)
    side, above, below = (largest * e for e in _EXTENTS[scene.object])
    if scene.motion == "spins":
        side = above = below = largest * _FARTHEST[scene.object]
    # The centre's room: [left, right] x [top, bottom].
    right = aspect / 2 - side - _MARGIN
    top, bottom = -0.5 + above + _MARGIN, 0.5 - below - _MARGIN
    x = torch.full_like(t, _between(-right, right, scene.u))
    y = torch.full_like(t, _between(top, bottom, scene.v))
    if scene.motion in _DIRECTIONS:
        right_, down = _DIRECTIONS[scene.motion]
        speed = min(scene.speed, ((2 * right) if right_ else (bottom - top)) / FIRST_WINDOW)
        way = speed * FIRST_WINDOW
        if right_:
            x = _from(-right, right, way, right_, scene.u) + right_ * speed * t
        else:
            y = _from(top, bottom, way, down, scene.v) + down * speed * t
    elif scene.motion == "bounces":
        height = min(_between(*_BOUNCE_HEIGHTS, scene.reach), bottom - top)
        at = (scene.phase + t / math.sqrt(8 * height / GRAVITY)) % 1.0
        y = bottom - height * 4 * at * (1 - at)
    elif scene.motion == "circles":
        reach = min(_between(*_CIRCLE_RADII, scene.reach), (bottom - top) / 2)
        turn = 2 * math.pi * (scene.phase + scene.turn * scene.rate * t)
        x = _between(-right + reach, right - reach, scene.u) + reach * torch.cos(turn)
        y = _between(top + reach, bottom - reach, scene.v) + reach * torch.sin(turn)
    return x, y


def _between(low: float, high: float, x: float) -> float:
    """A place in [low, high], its middle if there is no room."""
    return low + (high - low) * x if high > low else (low + high) / 2


def _from(low: float, high: float, way: float, direction: int, x: float) -> float:
    """A start in [low, high] from which `way` in a direction stays inside."""
    return _between(low, high - way, x) if direction > 0 else _between(low + way, high, x)


def render(scene: Scene, times: Tensor, height: int, width: int, *, texture: float | None = None) -> Tensor:
    """Frames uint8 [F, H, W, 3] at `times` (seconds, [F]).

    texture: its strength in [0, 1]; by default what a pixel of this size resolves, nothing at BASE_HEIGHT.
    """
    pixel = 1.0 / height
    at = path(scene, times, width / height)
    radius = at.radius.float().view(-1, 1, 1)
    x = torus_offsets(width, pixel, at.x).unsqueeze(1)  # [F, 1, W]
    y = torus_offsets(height, pixel, at.y).unsqueeze(2)  # [F, H, 1]
    if scene.motion == "spins":
        cos, sin = (f(at.angle).float().view(-1, 1, 1) for f in (torch.cos, torch.sin))
        x, y = cos * x + sin * y, cos * y - sin * x
    inside = _coverage(outline_distance(scene.object, x, y, radius), pixel)

    colour = torch.tensor(COLOUR_VALUES[scene.colour], dtype=torch.float32) + scene.light
    back = torch.tensor(BACKGROUND_VALUES[scene.background], dtype=torch.float32) + scene.dark
    pale_half = None
    if scene.motion == "spins":
        pale_half = (_coverage(-x, pixel), pale_value(scene.colour) - torch.tensor(COLOUR_VALUES[scene.colour]))
    strength = texture_strength(height) if texture is None else texture
    light = None
    if scene.texture != "none" and strength > 0:
        light = _texture(scene.texture, x, y, pixel) * (TEXTURE_LIGHT * strength)

    frames = torch.empty(len(times), height, width, 3, dtype=torch.uint8)
    for channel in range(3):
        value: Tensor | float = float(colour[channel] - back[channel])
        if pale_half is not None:
            value = value + pale_half[0] * float(pale_half[1][channel])
        if light is not None:
            value = value + light
        frames[..., channel] = (inside * value + float(back[channel])).round_().clamp_(0, 255)
    return frames


def render_batch(
    scenes: Sequence[Scene], times: Sequence[Tensor], height: int, width: int, *, texture: float | None = None
) -> Tensor:
    """Clips of equally many frames, uint8 [B, F, H, W, 3]."""
    return torch.stack([render(s, t, height, width, texture=texture) for s, t in zip(scenes, times, strict=True)])


def texture_strength(height: int) -> float:
    """How much of a texture pixels of this size show: 0 up to BASE_HEIGHT rows, all from twice that on."""
    return min(max(math.log2(height / BASE_HEIGHT), 0.0), 1.0)


def pale_value(colour: str) -> Tensor:
    """The colour of the pale half of what spins, [3] in [0, 255]: more than half way to white; of white, a grey."""
    if colour == "white":
        return torch.full((3,), 150.0)
    value = torch.tensor(COLOUR_VALUES[colour], dtype=torch.float32)
    return value + _PALE * (255.0 - value)


def torus_offsets(size: int, pixel: float, centre: Tensor) -> Tensor:
    """Pixel centres [size] minus `centre` [F], by the shortest way over the edges, fp32 [F, size]."""
    period = size * pixel
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * pixel - period / 2
    return ((centres - centre.double().unsqueeze(1) + period / 2) % period - period / 2).float()


def _coverage(distance: Tensor, pixel: float) -> Tensor:
    """How much of a pixel lies on the negative side of an edge."""
    return (0.5 - distance / pixel).clamp_(0.0, 1.0)


def outline_distance(thing: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside, exact next to the edges and a bound elsewhere. [F, H, W]"""
    if thing == "ball":
        return torch.sqrt(x * x + y * y) - radius
    if thing == "ring":
        middle, half = (RING_OUTER + RING_INNER) / 2, (RING_OUTER - RING_INNER) / 2
        return (torch.sqrt(x * x + y * y) - radius * middle).abs_() - radius * half
    if thing == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * SQUARE_HALF
    if thing == "triangle":
        sides = x.abs() * math.cos(math.pi / 6) - y * 0.5
        return torch.maximum(sides, y.expand_as(sides)) - radius * (TRIANGLE_RADIUS / 2)
    return _star_distance(x, y, radius * STAR_RADIUS)


def _star_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Five points, one up. Two mirrorings bring every point next to the right half of the top one."""
    x, y = torch.broadcast_tensors(x.abs(), -y)  # y up
    # The line between the top point and the next is 54 degrees from the x axis; what lies below it goes above.
    normal = (-math.sin(0.3 * math.pi), math.cos(0.3 * math.pi))
    for _ in range(2):
        below = (x * normal[0] + y * normal[1]).clamp_(max=0.0).mul_(2.0)
        x, y = (x - below * normal[0]).abs_(), y - below * normal[1]
    # From the top corner (0, 1) to the inner corner at 36 degrees.
    edge = (STAR_INNER * math.sin(math.pi / 5), STAR_INNER * math.cos(math.pi / 5) - 1)
    length = math.hypot(*edge)
    return x * (-edge[1] / length) + (y - radius) * (edge[0] / length)


def _texture(texture: str, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Light in [-1, 1.2] with mean 0, its waves TEXTURE_PERIOD long: along y, along both diagonals, or in three
    directions. [F, H, W]"""
    k = 2 * math.pi / TEXTURE_PERIOD
    if texture == "stripes":
        return _square_wave(k * y, k * pixel)
    if texture == "checks":
        k /= math.sqrt(2)
        return _square_wave(k * x, k * pixel) * _square_wave(k * y, k * pixel)
    h = math.sqrt(3) / 2
    waves = torch.cos(k * y) + torch.cos(k * (h * x - y / 2)) + torch.cos(k * (h * x + y / 2))
    slope = 1.55 * k * pixel  # of the waves' sum at a dot's edge
    return ((waves - _DOT_LEVEL) / slope + 0.5).clamp_(0.0, 1.0) * 2 - 2 * _DOT_SHARE


def _square_wave(phase: Tensor, step: float) -> Tensor:
    """sin(phase) made square, its edges as wide as a pixel, which is `step` of phase."""
    return (torch.sin(phase) * (2 / step)).clamp_(-1.0, 1.0)
