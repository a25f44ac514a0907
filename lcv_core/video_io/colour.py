"""Colour conversion between a video's YUV and full-range RGB."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from av.video.reformatter import VideoReformatter

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

    Stamped = tuple[Fraction | None, Fraction | None, VideoFrame]  # time and duration in seconds, where known

# FFmpeg's numbers, the same in every PyAV from 14 on (its enums are not).
BT601, BT709, UNSPECIFIED = 5, 1, 2
TV_RANGE, FULL_RANGE = 1, 2
# Bicubic, accurate rounding, full chroma on both sides: the default fast path darkens saturated colours by 3 levels.
SWS_FLAGS = 0x4 | 0x40000 | 0x2000 | 0x4000


def reformat(
    reformatter: VideoReformatter, frame: VideoFrame, pixel_format: str, *, matrix: int, ranges: tuple[int, int]
) -> VideoFrame:
    """The frame in another pixel format; ranges: of the source and of the result."""
    return reformatter.reformat(
        frame,
        format=pixel_format,
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=ranges[0],
        dst_color_range=ranges[1],
        interpolation=SWS_FLAGS,
    )
