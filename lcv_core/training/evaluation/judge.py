"""What a clip shows, measured from its frames by plain image processing: the ground truth's own words, or none.

Everything but the texture is measured at `BASE_HEIGHT` rows, whatever the clip's size. The background is the most
common colour, the object whatever differs from it. The object is found again in each frame on a torus (`render.py`),
its outline is compared with drawn ones, and its path with the kinds of motion. None means that nothing fits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_core.training.data.grammar import OBJECTS, parse
from lcv_core.training.data.render import (
    BACKGROUND_VALUES,
    BASE_HEIGHT,
    COLOUR_VALUES,
    RADII,
    TEXTURE_PERIOD,
    outline_distance,
    pale_value,
    torus_offsets,
)
from lcv_core.training.evaluation.metrics import unit_frames


@dataclass(frozen=True)
class Verdict:
    """value: one of the attribute's values, or None if nothing fits. confidence: in [0, 1], 0 where it might as well be
    another value."""

    value: str | None
    confidence: float


# Objects. Differences are in 8-bit steps of colour, lengths in frame heights.
_FAINT = 40.0  # a difference to the background that is no object
_MASK = (0.16, 0.36)  # of the strongest difference, that of a pale half: outside, inside
_OUTLINE = (0.25, 0.75)  # of the plain colour's difference: as far from the edge on both sides
_LEAST_AREA = 0.008  # less than half of the smallest object
_MOST_AREA = 0.6
_LEAST_SEEN = 0.7  # share of the frames that must show the object
_LEAST_LIKENESS = 0.6
_SHAPE_FRAMES = 5
_DRAWN_EDGE = 2.0  # pixels over which drawn outlines fade, as smoothed ones do
_SCALES = (0.92, 1.0, 1.08)
_SYMMETRY = {"ball": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5}
_ANGLE_STEP = math.radians(12)
_SIZE_LIMIT = math.sqrt(RADII["small"] * RADII["large"])

_FAR_BACKGROUND, _FAR_COLOUR = 60.0, 60.0  # farther from every colour than this is none of them
_LEAST_OPAQUE, _LEAST_OPAQUE_PALE = 0.6, 0.85  # how much of a blurred thin ring is itself, not background
_LEAST_PLAIN = 0.15  # share of the object that must have its plain colour

# Motions
_LEAST_FRAMES = 5
_LEAST_WAY = 0.10  # the diagonal of the box around a path
_WORST_FIT = 0.4  # rms distance from the best kind of motion, of that from standing still
_LEAST_GROWTH = 0.09  # log of the radius, over the clip's length
_LEAST_TURN = math.radians(40)
_LEAST_CONTRAST = 12.0  # of the pale half; a third of its difference in colour
_LEAST_SWEEP = math.radians(100)

# Textures
_LEAST_LIGHT = 6.0  # rms
_TEXTURE_FRAMES = 6
_STRIPES_SHARE = 0.7
_WAVES = {"stripes": (90.0,), "checks": (45.0, 135.0), "dots": (90.0, 30.0, 150.0)}  # degrees


@dataclass(frozen=True)
class Track:
    """The object through the clip, at BASE_HEIGHT rows.

    frames: 8-bit steps fp32 [F, H, W, 3]. background: [F, 3]. distance: from it, of each pixel, [F, H, W]. mask: the
    object, pale half and all, somewhat too large, [F, H, W] in [0, 1]. x, y: its centre, unwrapped, fp64 [F]. radius:
    of a disc of the mask's area, [F]. seen: bool [F], whether there is an object of a sensible size.
    """

    frames: Tensor
    background: Tensor
    distance: Tensor
    mask: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    seen: Tensor

    @property
    def found(self) -> bool:
        return float(self.seen.double().mean()) >= _LEAST_SEEN


def measure(frames: Tensor) -> dict[str, Verdict]:
    """Every attribute of a clip [F, H, W, 3], uint8 or float in [0, 1], by name.

    The texture is measured from twice BASE_HEIGHT on, where it is all there. Motion is None below 5 frames; it takes a
    second to be sure.
    """
    full = unit_frames(frames) * 255.0
    track = _track(_resized(full, BASE_HEIGHT))
    has_texture = full.shape[1] >= 2 * BASE_HEIGHT
    if not track.found:
        names = ("colour", "object", "size", "motion", *(["texture"] if has_texture else []))
        return {"background": _background(track)} | dict.fromkeys(names, Verdict(None, 0.0))
    turning = _turning(track)
    colour = _colour(track)
    thing, radius = _object(track, turning, colour.value)
    verdicts = {
        "background": _background(track),
        "colour": colour,
        "object": thing,
        "size": _size(radius),
        "motion": _motion(track, turning, thing.value),
    }
    if has_texture:
        spins = verdicts["motion"].value == "spins"
        verdicts["texture"] = _texture(full, track, turning.angle if spins else torch.zeros(len(full)))
    return verdicts


def find(frames: Tensor) -> Track:
    """Where the object is in a clip [F, H, W, 3], uint8 or float in [0, 1]."""
    return _track(_resized(unit_frames(frames) * 255.0, BASE_HEIGHT))


def score(frames: Tensor, attributes: Mapping[str, str]) -> dict[str, float]:
    """How well a clip shows what is asked for, by attribute: above 0.5 if it does, 1 without any doubt.

    attributes: those to judge, `Scene.attributes` or `parse(prompt)`; others are not judged, nor is a texture at the
    base resolution, which cannot show it.
    """
    scores = {}
    for name, verdict in measure(frames).items():
        if name in attributes:
            sign = 1.0 if verdict.value == attributes[name] else -1.0
            scores[name] = 0.0 if verdict.value is None else 0.5 + 0.5 * sign * verdict.confidence
    return scores


def reward(frames: Tensor, prompt: str) -> float:
    """Mean `score` of what a prompt of the grammar names, in [0, 1]; 0 if it names nothing."""
    scores = score(frames, parse(prompt))
    return sum(scores.values()) / len(scores) if scores else 0.0


# Finding the object


def _resized(frames: Tensor, rows: int) -> Tensor:
    """Frames [F, H, W, 3] by area to `rows` rows."""
    height, width = frames.shape[1:3]
    if height == rows:
        return frames
    size = (rows, round(width * rows / height))
    mode = "area" if height > rows else "bilinear"
    return F.interpolate(frames.permute(0, 3, 1, 2), size=size, mode=mode).permute(0, 2, 3, 1)


def _smoothed(image: Tensor, middle: float) -> Tensor:
    """[N, H, W] by three pixels both ways, of weight `middle` and half of the rest; edges repeated."""
    x = F.pad(image.unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1)
    side = (1 - middle) / 2
    x = x[:, 1:-1] * middle + (x[:, :-2] + x[:, 2:]) * side
    return x[:, :, 1:-1] * middle + (x[:, :, :-2] + x[:, :, 2:]) * side


def _track(frames: Tensor) -> Track:
    count, height, width, _ = frames.shape
    background = frames.flatten(1, 2).median(dim=1).values
    # Of the smoothed difference, not the difference's smoothed length: noise has a length everywhere.
    difference = (frames - background.view(-1, 1, 1, 3)).permute(0, 3, 1, 2).flatten(0, 1)
    distance = _smoothed(difference, 0.5).view(count, 3, height, width).square().sum(1).sqrt()
    brightest = distance.flatten().topk(max(1, distance.numel() // 100)).values
    strength = max(float(brightest.median()), _FAINT)
    mask = _ramp(distance / strength, _MASK)
    pixel = 1.0 / height
    x, y = _circular_mean(mask, 2, pixel), _circular_mean(mask, 1, pixel)
    # The circular mean is off for what is not symmetric, and for a speck elsewhere: the mean around it, twice.
    for _ in range(2):
        area = mask.sum(dim=(1, 2)).double() * pixel**2
        reach = 2.2 * torch.sqrt(area / math.pi).clamp(min=0.05)
        dx, dy = torus_offsets(width, pixel, x).double(), torus_offsets(height, pixel, y).double()
        near = (dx.unsqueeze(1) ** 2 + dy.unsqueeze(2) ** 2).sqrt() < reach.view(-1, 1, 1)
        weight = mask.double() * near
        total = weight.sum(dim=(1, 2)).clamp(min=1e-6)
        x = x + (weight * dx.unsqueeze(1)).sum(dim=(1, 2)) / total
        y = y + (weight * dy.unsqueeze(2)).sum(dim=(1, 2)) / total
        mask = mask * near
    area = mask.sum(dim=(1, 2)).double() * pixel**2
    seen = (area > _LEAST_AREA) & (area < _MOST_AREA)
    radius = torch.sqrt(area.clamp(min=1e-6) / math.pi)
    return Track(frames, background, distance, mask, _unwrapped(x, width * pixel), _unwrapped(y, 1.0), radius, seen)


def _ramp(share: Tensor, limits: tuple[float, float]) -> Tensor:
    """0 up to the lower limit, 1 from the upper one on."""
    low, high = limits
    return ((share - low) / (high - low)).clamp(0.0, 1.0)


def _circular_mean(mask: Tensor, axis: int, pixel: float) -> Tensor:
    """The mask's mean place along an axis that closes on itself, fp64 [F]."""
    size = mask.shape[axis]
    profile = mask.double().sum(dim=3 - axis)
    phase = 2 * math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size
    angle = torch.atan2((profile * phase.sin()).sum(1), (profile * phase.cos()).sum(1)) % (2 * math.pi)
    return (angle / (2 * math.pi) - 0.5) * size * pixel


def _unwrapped(values: Tensor, period: float) -> Tensor:
    """Steps by the shortest way round."""
    steps = (values[1:] - values[:-1] + period / 2) % period - period / 2
    return torch.cat([values[:1], values[:1] + steps.cumsum(0)])


@dataclass(frozen=True)
class Patch:
    """A window around the object in some frames: rows [N, P, 1] and columns [N, 1, P] on the torus, and the way from
    the object's centre to them, y [N, P, 1] and x [N, 1, P]."""

    frame: Tensor
    rows: Tensor
    columns: Tensor
    x: Tensor
    y: Tensor

    def of(self, images: Tensor) -> Tensor:
        """From images of all frames [F, H, W, ...]."""
        return images[self.frame, self.rows, self.columns]


def _patch(track: Track, at: Tensor, height: int, width: int) -> Patch:
    """The window around the object in the frames `at`, for images of this size."""
    largest = float(track.radius[track.seen].max())
    half = min(math.ceil(1.75 * largest * height) + 2, height // 2 - 1, width // 2 - 1)
    around = torch.arange(-half, half + 1)

    def axis(size: int, place: Tensor) -> tuple[Tensor, Tensor]:
        middle = (place * height + size / 2).floor().long()
        index = (middle.unsqueeze(1) + around) % size
        return index, torus_offsets(size, 1.0 / height, place).gather(1, index)

    rows, y = axis(height, track.y[at])
    columns, x = axis(width, track.x[at])
    return Patch(at.view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1), x.unsqueeze(1), y.unsqueeze(2))


def _spread(seen: Tensor, count: int) -> Tensor:
    """At most `count` of the frames that show the object, evenly."""
    at = seen.nonzero().flatten()
    return at[torch.linspace(0, len(at) - 1, min(count, len(at))).round().long()]


# Attributes of single frames


def _background(track: Track) -> Verdict:
    value = track.background.median(dim=0).values
    return _nearest(value, BACKGROUND_VALUES, _FAR_BACKGROUND)


def _nearest(value: Tensor, values: Mapping[str, tuple[int, int, int]], far: float) -> Verdict:
    distances = {name: float((value - torch.tensor(v)).norm()) for name, v in values.items()}
    best, second = sorted(distances, key=lambda name: distances[name])[:2]
    if distances[best] > far:
        return Verdict(None, 0.0)
    return Verdict(best, (distances[second] - distances[best]) / (distances[second] + distances[best]))


def _colour(track: Track) -> Verdict:
    """Votes of the object's inner pixels, each smoothed within the object over a texture's period."""
    patch = _patch(track, track.seen.nonzero().flatten(), *track.mask.shape[1:])
    mask = patch.of(track.mask)
    third = 1 / 3
    inner = _smoothed(mask, third)
    channels = [_smoothed(channel * mask, third) for channel in patch.of(track.frames).unbind(-1)]
    # The innermost pixels of every frame: all of a disc's, those on the middle line of a thin ring.
    share = mask.sum(dim=(1, 2)).mean() / 4
    limit = inner.flatten(1).topk(max(1, int(share)), dim=1).values[:, -1].clamp(max=0.9).view(-1, 1, 1)
    pixels = (torch.stack(channels, dim=-1) / inner.clamp(min=1e-3).unsqueeze(-1))[inner >= limit]
    back = track.background.median(dim=0).values
    names = [*COLOUR_VALUES]
    plain = torch.tensor([*COLOUR_VALUES.values()], dtype=torch.float32)
    pale = torch.stack([pale_value(name) for name in names])
    shades = torch.cat([_shades(plain, back, _LEAST_OPAQUE), _shades(pale, back, _LEAST_OPAQUE_PALE)])  # [16, n, 3]
    distance, index = torch.cdist(pixels, shades.flatten(0, 1)).min(dim=1)
    index = index[distance < _FAR_COLOUR] // shades.shape[1]
    white = names.index("white")
    index[index == len(names) + white] = white  # its pale half is a grey, and so is white that blur has thinned
    votes = torch.bincount(index, minlength=2 * len(names))[: len(names)].float()
    best = int(votes.argmax())
    if votes[best] < _LEAST_PLAIN * len(pixels):
        return Verdict(None, 0.0)
    return Verdict(names[best], float((2 * votes[best] / votes.sum() - 1).clamp(min=0.0)))


def _shades(colours: Tensor, back: Tensor, least: float) -> Tensor:
    """Colours [n, 3] from as thinned by the background as blur makes them to a little too strong, [n, 5, 3]."""
    share = torch.linspace(least, 1.08, 5).view(1, -1, 1)
    return back + share * (colours.unsqueeze(1) - back)


def _object(track: Track, turning: Turning, colour: str | None) -> tuple[Verdict, float]:
    """The object whose outline fits best, and its radius in frame heights. colour: the object's, if known."""
    at = _spread(track.seen, _SHAPE_FRAMES)
    height, width = track.mask.shape[1:]
    patch = _patch(track, at, height, width)
    mask = _ramp(patch.of(track.distance) / _plain_difference(track, turning, colour), _OUTLINE) * (
        patch.of(track.mask) > 0
    )
    area = mask.sum(dim=(1, 2)).clamp(min=1.0) / height**2
    of_disc = torch.sqrt(area / math.pi) * torch.tensor(_SCALES).unsqueeze(1)  # [scales, N]
    likeness, radii = {}, {}
    for thing in OBJECTS:
        radius = of_disc * math.sqrt(math.pi / _unit_area(thing))
        symmetry = _SYMMETRY[thing]
        steps = max(1, round(2 * math.pi / symmetry / _ANGLE_STEP)) if symmetry else 1
        fits = []
        for step in range(steps):
            x, y = patch.x, patch.y
            if step:
                cos, sin = (f(2 * math.pi / symmetry * step / steps) for f in (math.cos, math.sin))
                x, y = cos * x + sin * y, cos * y - sin * x
            distance = outline_distance(thing, x, y, radius.unsqueeze(-1).unsqueeze(-1))
            drawn = _ramp((0.5 - distance * (height / _DRAWN_EDGE)).clamp(0.0, 1.0), _OUTLINE)  # [scales, N, P, P]
            both = torch.minimum(mask, drawn).sum(dim=(2, 3))
            fits.append(both / torch.maximum(mask, drawn).sum(dim=(2, 3)))
        best = torch.cat(fits).max(dim=0)
        likeness[thing] = float(best.values.mean())
        chosen = radius.repeat(steps, 1).gather(0, best.indices.unsqueeze(0))
        radii[thing] = float(chosen.log().mean().exp())
    best, second = sorted(likeness, key=lambda thing: -likeness[thing])[:2]
    if likeness[best] < _LEAST_LIKENESS:
        return Verdict(None, 0.0), radii[best]
    return Verdict(best, min(1.0, 4 * (likeness[best] - likeness[second]))), radii[best]


def _plain_difference(track: Track, turning: Turning, colour: str | None) -> float:
    """How far the object's colour is from the background, or its pale half where it has one that is nearer."""
    if colour is None:
        return float(track.distance[track.mask > 0.0].median())
    back = track.background.median(dim=0).values
    values = [torch.tensor(COLOUR_VALUES[colour])]
    if turning.contrast >= _LEAST_CONTRAST:
        values.append(pale_value(colour))
    return min(float((value - back).norm()) for value in values)


@functools.cache
def _unit_area(thing: str) -> float:
    """Area of an object of radius 1."""
    at = (torch.arange(160) - 79.5) / 50
    inside = outline_distance(thing, at.view(1, 1, -1), at.view(1, -1, 1), torch.ones(1, 1, 1)) < 0
    return float(inside.sum()) / 50**2


def _size(radius: float) -> Verdict:
    size = "small" if radius < _SIZE_LIMIT else "large"
    between = math.log(RADII["large"] / _SIZE_LIMIT)
    return Verdict(size, min(1.0, abs(math.log(radius / _SIZE_LIMIT)) / between))


# Motion


@dataclass(frozen=True)
class Turning:
    """angle: direction of the pale half's opposite, unwrapped, radians [F]. contrast: how pale it is, in 8-bit steps.
    outline: the angle of the outline's n-fold symmetry, by object, [F]."""

    angle: Tensor
    contrast: float
    outline: dict[str, Tensor]


def _turning(track: Track) -> Turning:
    count, height, width, _ = track.frames.shape
    patch = _patch(track, torch.arange(count), height, width)
    frames, mask, x, y = patch.of(track.frames), patch.of(track.mask), patch.x, patch.y
    total = mask.sum(dim=(1, 2)).clamp(min=1e-3)
    inner = (mask - 0.5).clamp(min=0.0) * 2
    weight = inner / inner.sum(dim=(1, 2), keepdim=True).clamp(min=1e-3)
    mean = (frames * weight.unsqueeze(-1)).sum(dim=(1, 2))
    offset = (frames - mean.view(-1, 1, 1, 3)) * weight.unsqueeze(-1)
    # The colour's slope across the object, [F, 3, 2]; its strongest direction in colour is pale against plain.
    slope = torch.stack([(offset * x.unsqueeze(-1)).sum(dim=(1, 2)), (offset * y.unsqueeze(-1)).sum(dim=(1, 2))], dim=2)
    axis = torch.linalg.svd(slope.permute(1, 0, 2).flatten(1), full_matrices=False).U[:, 0]
    axis = axis * (1.0 if float(axis.sum()) >= 0 else -1.0)  # pale is brighter
    slope = (slope * axis.view(1, 3, 1)).sum(dim=1)
    away = (weight * (x * x + y * y).sqrt()).sum(dim=(1, 2))
    contrast = slope.norm(dim=1) / away.clamp(min=1e-3)
    angle = _unwrapped(torch.atan2(-slope[:, 1], -slope[:, 0]).double(), 2 * math.pi)
    outline = {}
    around = torch.atan2(y.expand_as(mask), x.expand_as(mask))
    far = mask * (x * x + y * y)
    for thing, n in _SYMMETRY.items():
        if n:
            c, s = (far * (n * around).cos()).sum(dim=(1, 2)), (far * (n * around).sin()).sum(dim=(1, 2))
            outline[thing] = _unwrapped(torch.atan2(s, c).double() / n, 2 * math.pi / n)
    return Turning(angle, float((contrast * (total > 1)).median()), outline)


def _motion(track: Track, turning: Turning, thing: str | None) -> Verdict:
    at = track.seen.nonzero().flatten()
    if len(at) < _LEAST_FRAMES:
        return Verdict(None, 0.0)
    place = torch.stack([track.x[at], track.y[at]])
    way = float((place.amax(dim=1) - place.amin(dim=1)).norm())
    if way >= _LEAST_WAY:
        return _moving(place, at.double() / (len(track.seen) - 1))
    # In place. Growth and turn over the whole clip, from the typical step: one that springs back is no typical one.
    lag = max(1, len(at) // 5)
    log_radius = track.radius[at].log()
    growth = float((log_radius[lag:] - log_radius[:-lag]).median()) * (len(at) - 1) / lag
    turn = _turn(turning.angle[at]) if turning.contrast >= _LEAST_CONTRAST else 0.0
    if turn == 0.0 and thing in turning.outline:
        turn = _turn(turning.outline[thing][at])
    calm = [way / _LEAST_WAY, abs(growth) / _LEAST_GROWTH, abs(turn) / _LEAST_TURN]
    if calm[2] >= 1.0:
        return Verdict("spins", 1 - 1 / calm[2])
    if calm[1] >= 1.0:
        return Verdict("grows" if growth > 0 else "shrinks", 1 - 1 / calm[1])
    return Verdict("stays still", 1 - max(calm))


def _turn(angle: Tensor) -> float:
    """Turn over a clip, radians; 0 if it goes to and fro."""
    steps = angle[1:] - angle[:-1]
    typical = float(steps.median())
    same = float((steps.sign() == math.copysign(1.0, typical)).double().mean())
    return typical * len(steps) if same >= 0.75 else 0.0


def _moving(place: Tensor, time: Tensor) -> Verdict:
    """The kind of motion nearest to a path [2, F] at times in [0, 1]."""
    x, y = place
    still_x, still_y = x - x.mean(), y - y.mean()
    centred = time - time.mean()
    errors: dict[str, float] = {}

    def rms(*errors_by_axis: Tensor) -> float:
        return math.sqrt(sum(float(e.square().mean()) for e in errors_by_axis))

    still = rms(still_x, still_y)
    slope_x, slope_y = (float((e * centred).sum() / centred.square().sum()) for e in (still_x, still_y))
    errors["moves right" if slope_x > 0 else "moves left"] = rms(still_x - slope_x * centred, still_y)
    errors["moves down" if slope_y > 0 else "moves up"] = rms(still_x, still_y - slope_y * centred)
    errors["bounces"] = rms(still_x, _bounce_error(y, time))
    errors["circles"] = rms(_circle_error(x, y, time))
    best, second = sorted(errors, key=lambda name: errors[name])[:2]
    if errors[best] > _WORST_FIT * still:
        return Verdict(None, 0.0)
    return Verdict(best, 1 - errors[best] / errors[second])


def _bounce_error(y: Tensor, time: Tensor) -> Tensor:
    """What the best of many parabolic bounces leaves of a height: each 0.35 to 1.1 clips long."""
    period = torch.linspace(0.35, 1.1, 31, dtype=torch.float64).view(-1, 1, 1)
    phase = (torch.arange(32, dtype=torch.float64) / 32).view(1, -1, 1)
    at = (time / period + phase) % 1.0
    arc = (-4 * at * (1 - at)).flatten(0, 1)  # y is down, so an arc goes to negative y
    arc = arc - arc.mean(dim=1, keepdim=True)
    centred = y - y.mean()
    height = ((arc * centred).sum(dim=1) / arc.square().sum(dim=1)).clamp(min=0.0)
    errors = centred - height.unsqueeze(1) * arc
    return errors[errors.square().sum(dim=1).argmin()]


def _circle_error(x: Tensor, y: Tensor, time: Tensor) -> Tensor:
    """Distance of a path from the steady motion on the circle that fits it best (least squares, Kasa 1976); large if
    that circle is too small or too little of it is passed."""
    ones = torch.ones_like(x)
    a, b, c = torch.linalg.lstsq(torch.stack([2 * x, 2 * y, ones], dim=1), (x * x + y * y).unsqueeze(1)).solution
    radius = torch.sqrt((c + a * a + b * b).clamp(min=0.0))
    angle = _unwrapped(torch.atan2(y - b, x - a), 2 * math.pi)
    centred = time - time.mean()
    slope = ((angle - angle.mean()) * centred).sum() / centred.square().sum()
    if float(slope.abs() * (time[-1] - time[0])) < _LEAST_SWEEP or not 0.05 < float(radius) < 0.5:
        return torch.full_like(x, 1e3)
    steady = angle.mean() + slope * centred
    return torch.hypot(x - a - radius * steady.cos(), y - b - radius * steady.sin())


# Texture


def _texture(full: Tensor, track: Track, angle: Tensor) -> Verdict:
    """Waves of the texture's length inside the object, fitted in the directions of each texture.

    angle: the object's own, [F].
    """
    at = _spread(track.seen, _TEXTURE_FRAMES)
    height, width = full.shape[1:3]
    patch = _patch(track, at, height, width)
    inner = _smoothed(track.mask[at], 1 / 3)
    inner = F.interpolate(inner.unsqueeze(1), size=(height, width), mode="bilinear", align_corners=False).squeeze(1)
    weight = ((inner - 0.75) * 4).clamp(0.0, 1.0)[torch.arange(len(at)).view(-1, 1, 1), patch.rows, patch.columns]
    light = _without_slow(patch.of(full).mean(dim=-1), weight, TEXTURE_PERIOD * height)
    cos, sin = (f(angle[at]).float().view(-1, 1, 1) for f in (torch.cos, torch.sin))
    x, y = cos * patch.x + sin * patch.y, cos * patch.y - sin * patch.x
    total = float((weight * light.square()).sum())
    explained = {
        name: max(_explained(light, weight, x, y, directions, k) for k in (0.94, 1.0, 1.06))
        for name, directions in _WAVES.items()
    }
    most = max(explained.values())
    strength = math.sqrt(most / max(float(weight.sum()), 1.0))
    if strength < _LEAST_LIGHT or most < 0.2 * total:
        return Verdict("none", 1 - min(1.0, strength / _LEAST_LIGHT))
    stripes, checks, dots = (explained[name] for name in ("stripes", "checks", "dots"))
    if checks > max(stripes, dots):
        return Verdict("checks", 1 - max(stripes, dots) / checks)
    # Stripes are one of the three waves of dots: all of what these explain, or a third.
    share = stripes / dots
    if share > _STRIPES_SHARE:
        return Verdict("stripes", (share - _STRIPES_SHARE) / (1 - _STRIPES_SHARE))
    return Verdict("dots", 1 - max(share - 1 / 3, 0.0) / (_STRIPES_SHARE - 1 / 3))


def _without_slow(light: Tensor, weight: Tensor, period: float) -> Tensor:
    """[N, H, W] minus its mean over about a period (in pixels), where there is weight."""
    sigma = 0.45 * period
    reach = math.ceil(2.5 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))

    def blurred(image: Tensor) -> Tensor:
        image = F.conv2d(image.unsqueeze(1), kernel.view(1, 1, -1, 1), padding=(reach, 0))
        return F.conv2d(image, kernel.view(1, 1, 1, -1), padding=(0, reach)).squeeze(1)

    return (light - blurred(light * weight) / blurred(weight).clamp(min=1e-6)) * (weight > 0)


def _explained(
    light: Tensor, weight: Tensor, x: Tensor, y: Tensor, directions: tuple[float, ...], scale: float
) -> float:
    """Weighted sum of squares of `light` [N, H, W] that waves in these directions (degrees from x) explain."""
    k = 2 * math.pi / TEXTURE_PERIOD * scale
    waves = []
    for direction in directions:
        phase = k * (math.cos(math.radians(direction)) * x + math.sin(math.radians(direction)) * y)
        waves += [phase.cos(), phase.sin()]
    basis = torch.stack(torch.broadcast_tensors(*waves), dim=1).flatten(2).double()  # [N, 2 waves, H W]
    weighted = basis * weight.flatten(1).unsqueeze(1)
    normal = weighted @ basis.transpose(1, 2) + 1e-3 * torch.eye(basis.shape[1], dtype=torch.float64)
    right = weighted @ light.flatten(1).unsqueeze(2).double()
    return float((right * torch.linalg.solve(normal, right)).sum())
