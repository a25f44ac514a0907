"""When frames are on the screen: exact frame rates, repaired timestamps, resampling by time. Knows no video library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TypeVar

from lcv_core.errors import InputError

T = TypeVar("T")

_LONGEST_GAP = 60  # a jump of the timestamps beyond this many seconds is a reset of the clock, not a still picture


def exact_rate(frame_rate: float | Fraction) -> Fraction:
    """The frame rate that is meant, as a fraction: 29.97 is 30000/1001, 15.0 is 15. InputError outside [0.01, 1000]."""
    if not (math.isfinite(frame_rate) and 0.01 <= frame_rate <= 1000):
        raise InputError(f"frame_rate must be from 0.01 to 1000 frames per second, got {frame_rate}")
    whole = round(frame_rate * 1.001)
    if whole and abs(frame_rate - whole / 1.001) < 2e-3 and abs(frame_rate - round(frame_rate)) > 1e-6:
        return Fraction(whole * 1000, 1001)
    return Fraction(frame_rate).limit_denominator(1001)


def rounding_slack(tick: Fraction, rate: Fraction | None) -> Fraction:
    """How far a container's rounding may have moved its timestamps, in seconds; never a quarter of a frame.

    tick: the unit of the timestamps. Matroska and FLV count milliseconds, GIF hundredths of a second.
    """
    slack = min(max(tick / 2, Fraction(1, 1000)), Fraction(1, 200))
    return min(slack, 1 / (4 * rate)) if rate else slack


def screen_times(
    frames: Iterable[tuple[Fraction | None, Fraction | None, T]], *, origin: Fraction, rate: Fraction | None
) -> Iterator[tuple[Fraction, Fraction, T]]:
    """(timestamp, duration, frame) in presentation order -> (comes on the screen, leaves it, frame), in seconds.

    origin: the timestamp that is time 0. rate: the nominal frame rate, for frames without a timestamp and a last frame
    without a duration. Timestamps that jump back, or forward by more than a minute, are continued as if the jump were
    one frame.
    """
    step = 1 / rate if rate else Fraction(1, 25)
    shift = -origin
    shown: tuple[Fraction, Fraction | None, T] | None = None
    for stamp, duration, frame in frames:
        time = None if stamp is None else stamp + shift
        if shown is not None:
            begin = shown[0]
            if time is None or not begin <= time <= begin + _LONGEST_GAP:
                shift += 0 if time is None else begin + step - time
                time = begin + step
            yield begin, time, shown[2]
        shown = (Fraction(0) if time is None else time, duration, frame)
    if shown is not None:
        begin, duration, frame = shown
        yield begin, begin + (duration or step), frame


def resample(
    shown: Iterable[tuple[Fraction, Fraction, T]], *, rate: Fraction | None, start: Fraction, slack: Fraction
) -> Iterator[T]:
    """The frame on the screen at start, start + 1 / rate, start + 2 / rate, ...; with no rate, each frame once.

    slack: a frame counts as on the screen this much before its time, see `rounding_slack`.
    """
    index = 0
    for begin, end, frame in shown:
        if rate is None:
            if begin >= start or end > start + slack:
                yield frame
        else:
            while start + index / rate + slack < end:
                yield frame
                index += 1
