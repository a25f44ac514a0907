"""Video <-> latent <-> token grid: the only place that knows about //8, //4, +1 and the aspect buckets."""

from __future__ import annotations

import math
from typing import Literal

from lcv_core.errors import InputError

TIME_FACTOR = 4  # pixel frames per latent frame, after the first
SPACE_FACTOR = 8  # pixels per latent cell
SIZE_MULTIPLE = 16  # pixels per token: SPACE_FACTOR times the patch
REFINE_MULTIPLE = 64  # a 4x4 block of tokens, in pixels
REFINE_LATENT_GROUP = 4  # condition and noise latents of a refine pass come in whole blocks of time

Size = tuple[int, int]  # (height, width)

# Official aspect buckets: nominal height/width -> (height, width), by (resolution, multiple of pixels).
# From the specification of the released pipeline; ties go to the one listed first.
_BUCKETS_TEXT: dict[tuple[str, int], str] = {
    ("480p", 16): """0.26 320x1216, 0.31 352x1120, 0.38 384x1024, 0.43 416x960, 0.52 448x864, 0.58 480x832,
        0.67 512x768, 0.74 544x736, 0.86 576x672, 0.95 608x640, 1.05 640x608, 1.17 672x576, 1.29 704x544, 1.35 736x544,
        1.50 768x512, 1.67 800x480, 1.73 832x480, 2.00 896x448, 2.31 960x416, 2.58 992x384, 2.75 1056x384,
        3.09 1088x352, 3.70 1184x320, 3.80 1216x320, 3.90 1248x320, 4.00 1280x320""",
    ("480p", 64): """0.26 320x1216, 0.38 384x1024, 0.50 448x896, 0.67 512x768, 0.82 576x704, 1.00 640x640,
        1.22 704x576, 1.50 768x512, 1.86 832x448, 2.00 896x448, 2.50 960x384, 2.83 1088x384, 3.60 1152x320,
        3.80 1216x320, 4.00 1280x320""",
    ("480p", 128): """0.25 256x1024, 0.38 384x1024, 0.43 384x896, 0.57 512x896, 0.67 512x768, 1.00 640x640,
        1.50 768x512, 1.75 896x512, 2.33 896x384, 2.67 1024x384, 4.00 1024x256""",
    ("480p", 256): """0.25 256x1024, 0.33 256x768, 0.50 256x512, 0.67 512x768, 1.00 512x512, 1.50 768x512,
        2.00 512x256, 3.00 768x256, 4.00 1024x256""",
    ("720p", 16): """0.25 480x1920, 0.29 512x1792, 0.32 544x1696, 0.36 576x1600, 0.40 608x1504, 0.49 672x1376,
        0.54 704x1312, 0.59 736x1248, 0.69 800x1152, 0.74 832x1120, 0.82 864x1056, 0.88 896x1024, 0.94 928x992,
        1.00 960x960, 1.07 992x928, 1.14 1024x896, 1.22 1056x864, 1.31 1088x832, 1.35 1120x832, 1.44 1152x800,
        1.70 1248x736, 2.00 1344x672, 2.05 1376x672, 2.47 1504x608, 2.53 1536x608, 2.83 1632x576, 3.06 1664x544,
        3.12 1696x544, 3.62 1856x512, 3.93 1888x480, 4.00 1920x480""",
    ("720p", 64): """0.22 448x2048, 0.29 512x1792, 0.36 576x1600, 0.45 640x1408, 0.55 704x1280, 0.63 768x1216,
        0.76 832x1088, 0.88 896x1024, 1.00 960x960, 1.14 1024x896, 1.31 1088x832, 1.50 1152x768, 1.58 1216x768,
        1.82 1280x704, 1.91 1344x704, 2.20 1408x640, 2.30 1472x640, 2.67 1536x576, 2.89 1664x576, 3.62 1856x512,
        3.75 1920x512""",
    ("720p", 128): """0.20 384x1920, 0.27 512x1920, 0.33 512x1536, 0.42 640x1536, 0.50 640x1280, 0.60 768x1280,
        0.67 768x1152, 0.78 896x1152, 1.00 1024x1024, 1.29 1152x896, 1.50 1152x768, 1.67 1280x768, 2.00 1280x640,
        2.40 1536x640, 3.00 1536x512, 3.75 1920x512, 5.00 1920x384""",
    ("720p", 256): """0.33 512x1536, 0.60 768x1280, 1.00 1024x1024, 1.67 1280x768, 3.00 1536x512""",
}


def _parse(text: str) -> tuple[tuple[float, Size], ...]:
    entries = []
    for entry in text.split(","):
        key, size = entry.split()
        height, width = size.split("x")
        entries.append((float(key), (int(height), int(width))))
    return tuple(entries)


BUCKETS = {key: _parse(text) for key, text in _BUCKETS_TEXT.items()}
BUCKETS |= {(resolution, 32): BUCKETS[resolution, 16] for resolution in ("480p", "720p")}


def bucket(resolution: Literal["480p", "720p"], height: int, width: int, *, multiple: int = SIZE_MULTIPLE) -> Size:
    """The official bucket (height, width) whose nominal aspect is nearest to height/width; first listed wins ties."""
    table = BUCKETS.get((resolution, multiple))
    if table is None:
        known = ", ".join(f"{r} with multiple {m}" for r, m in sorted(BUCKETS))
        raise InputError(f"no aspect buckets for {resolution} with multiple {multiple}; there are: {known}")
    aspect = height / width
    return min(table, key=lambda entry: abs(entry[0] - aspect))[1]


def size_for_area(area: int, height: int, width: int, *, multiple: int = SIZE_MULTIPLE) -> Size:
    """The size on the `multiple` grid with about `area` pixels whose aspect is nearest to height/width.

    What `bucket` is for the two official areas, for a checkpoint of any other scale (the miniature).
    """
    aspect = height / width
    best: tuple[float, Size] | None = None
    for h in range(multiple, 4 * math.isqrt(area) + multiple, multiple):
        w = max(multiple, round(h / aspect / multiple) * multiple)
        # A size off by 10% in area costs as much as one off by 10% in aspect.
        cost = abs(math.log(h / w / aspect)) + abs(math.log(h * w / area))
        if best is None or cost < best[0] - 1e-12:
            best = (cost, (h, w))
    assert best is not None
    return best[1]


def num_latents(num_frames: int) -> int:
    """Latent frames of a clip of 4k+1 pixel frames: 1 + (F - 1) / 4."""
    if num_frames < 1 or (num_frames - 1) % TIME_FACTOR:
        raise InputError(frames_message("num_frames", num_frames))
    return 1 + (num_frames - 1) // TIME_FACTOR


def num_pixel_frames(latents: int) -> int:
    """Pixel frames that decode from `latents` latent frames: 1 + 4 (T - 1)."""
    return 1 + TIME_FACTOR * (latents - 1)


def frames_message(name: str, frames: int) -> str:
    """The sentence for a frame count off the 4k+1 grid."""
    if frames < 1:
        return f"{name} must be 4k+1 and at least 1, got {frames}; try 1 or 5"
    low = floor_frames(frames)
    return f"{name} must be 4k+1, got {frames}; try {low} or {low + TIME_FACTOR}"


def floor_frames(frames: int) -> int:
    """The largest 4k+1 that is at most `frames` (at least 1)."""
    return max(1, (frames - 1) // TIME_FACTOR * TIME_FACTOR + 1)


def check_frames(num_frames: int, *, name: str = "num_frames") -> None:
    """InputError unless num_frames is 4k+1 with k >= 0."""
    if num_frames < 1 or (num_frames - 1) % TIME_FACTOR:
        raise InputError(frames_message(name, num_frames))


def check_size(height: int, width: int, *, multiple: int = SIZE_MULTIPLE) -> None:
    """InputError unless both sides are positive multiples of `multiple` pixels."""
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            low = max(multiple, value // multiple * multiple)
            raise InputError(f"{name} must be a multiple of {multiple}, got {value}; try {low} or {low + multiple}")


def check_cond_frames(num_cond_frames: int, num_frames: int, available: int) -> None:
    """InputError unless a continuation of `num_frames` frames can start from `num_cond_frames` of `available`."""
    if num_cond_frames < 1:
        raise InputError(f"num_cond_frames must be at least 1, got {num_cond_frames}; the released model uses 13")
    check_frames(num_cond_frames, name="num_cond_frames")
    check_frames(num_frames)
    if num_cond_frames >= num_frames:
        raise InputError(
            f"num_frames ({num_frames}) counts the {num_cond_frames} condition frames too, so nothing would be new;"
            f" ask for at least {num_cond_frames + TIME_FACTOR} frames or use fewer condition frames"
        )
    if available < num_cond_frames:
        hint = f"use num_cond_frames={floor_frames(available)} or a longer clip" if available else "give a longer clip"
        raise InputError(f"the clip has {available} frames but num_cond_frames is {num_cond_frames}; {hint}")


def latent_shape(num_frames: int, height: int, width: int, *, channels: int = 16) -> tuple[int, int, int, int]:
    """(channels, T, h, w) of the latent of a clip in pixels."""
    return channels, num_latents(num_frames), height // SPACE_FACTOR, width // SPACE_FACTOR


def token_grid(latents: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(T, h, w) token grid of a latent grid."""
    for name, size, p in zip(("frames", "height", "width"), latents, patch, strict=True):
        if size % p:
            raise InputError(f"latent {name} must be a multiple of the patch {p}, got {size}; pixels: {p * 8}")
    return latents[0] // patch[0], latents[1] // patch[1], latents[2] // patch[2]


def ceil_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
