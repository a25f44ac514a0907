"""Reading video: what a file says about itself, and its frames by timestamps.

Frames are uint8 [H, W, 3], full-range RGB. Times are in seconds, counted from the first frame of a file.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.files import SETTINGS_KEY, require_file, settings_from_json
from lcv_core.image_io import read_png_metadata, read_sequence_metadata, resize_frames, turn_picture
from lcv_core.names import Fit
from lcv_core.video_io.colour import BT601, BT709, FULL_RANGE, TV_RANGE, UNSPECIFIED, reformat
from lcv_core.video_io.times import exact_rate, resample, rounding_slack, screen_times

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Stamped = tuple[Fraction | None, Fraction | None, VideoFrame]  # time and duration in seconds, where known

_ATTACHED_PIC = 0x400  # FFmpeg's disposition flag of cover pictures
_SEEK_FROM = 2.0  # seconds; below this, decoding from the first frame is quicker than seeking


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself; None where it does not say.

    width, height: pixels as displayed, rotation applied. frame_rate: the average, per second. duration: seconds.
    num_frames: from the header, or estimated from duration and frame rate.
    """

    path: Path
    width: int
    height: int
    frame_rate: float | None
    duration: float | None
    num_frames: int | None


def probe_video(path: str | Path) -> VideoInfo:
    """The facts of a video, after decoding its first frame. InputError when there is no video to decode in it."""
    with _decoding(path, Fraction(0)) as (stream, _, frames):
        frame = next(frames)[2]
        width, height = frame.width, frame.height
        if _display_matrix(frame)[1]:  # turned by a quarter
            width, height = height, width
        rate = stream_rate(stream)
        if stream.duration and stream.time_base:
            duration = float(stream.duration * as_fraction(stream.time_base))
        else:
            length = cast("InputContainer", stream.container).duration  # microseconds
            duration = length / 1e6 if length else None
        num_frames = stream.frames or (round(duration * rate) if duration and rate else None)
        return VideoInfo(Path(path), width, height, float(rate) if rate else None, duration, num_frames)


@contextmanager
def open_container(path: str | Path) -> Iterator[InputContainer]:
    path = require_file(path, "a video")
    name = str(path.absolute())  # absolute, so that no file name is taken for a protocol such as concat:
    try:
        try:
            container = av.open(name)
        except UnicodeDecodeError:  # title tags in another encoding; PyAV 19 reads them without being told
            container = av.open(name, metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} is damaged, cut off or not a video ({reason}); export or download it again as MP4"
        ) from None
    with container:
        if container.format.name == "tty":  # FFmpeg draws any .txt file as a terminal
            raise InputError(f"{path} is a text file, not a video")
        yield container


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream that is not a cover picture."""
    with open_container(path) as container:
        for stream in container.streams.video:
            disposition = getattr(stream, "disposition", 0)  # PyAV >= 14.1
            if not int(getattr(disposition, "value", disposition)) & _ATTACHED_PIC:
                stream.thread_type = "AUTO"
                yield container, stream
                return
        raise InputError(f"{path} has no video stream; pass a file with pictures in it")


def as_fraction(value: Any) -> Fraction:
    """PyAV's rational number, whichever type this version has for it."""
    return Fraction(value.numerator, value.denominator)


def stream_rate(stream: VideoStream) -> Fraction | None:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return as_fraction(rate) if rate else None


def decode(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[Stamped]:
    """The frames of a stream in presentation order. InputError at damage, unless it is before the first frame."""
    tick = as_fraction(stream.time_base) if stream.time_base else Fraction(0)
    count, whole = 0, True
    try:
        for packet in container.demux(stream):
            if packet.size:
                whole = not packet.is_corrupt
            elif not whole:  # only the last packet may tell: broadcasts are full of damage that decoders hide
                raise InputError(f"{path} is cut off after {count} frames; download or export it again")
            try:
                frames = packet.decode()
            except FFmpegError:
                if count == 0:  # recordings may begin in the middle of a group of pictures
                    continue
                raise
            for frame in frames:
                count += 1
                time = frame.pts * tick if frame.pts is not None and tick else None
                duration = getattr(frame, "duration", None)  # PyAV >= 14.4
                yield time, duration * tick if duration else None, frame
    except FFmpegError as error:
        raise InputError(
            f"{path} is damaged or cut off after {count} frames ({error.strerror}); export it again"
        ) from None


@contextmanager
def _decoding(path: str | Path, start: Fraction) -> Iterator[tuple[VideoStream, Fraction, Iterator[Stamped]]]:
    """The stream, the time of its first frame on the file's clock, and its frames.

    The frames begin with the first, or with a keyframe at or before `start` where the file can be seeked.
    """
    path = Path(path)
    with ExitStack() as files:
        container, stream = files.enter_context(open_video(path))
        frames = decode(container, stream, path)
        first = next(frames, None)
        if first is None:
            raise InputError(f"{path} holds no frame that can be decoded; export it again as MP4")
        origin, frames = first[0], chain([first], frames)
        if start >= _SEEK_FROM and origin is not None and stream.time_base:
            container, late_stream = files.enter_context(open_video(path))
            with suppress(FFmpegError, InputError):  # a file that cannot seek is decoded from its beginning
                container.seek(math.floor((origin + start) / as_fraction(stream.time_base)), stream=late_stream)
                late = decode(container, late_stream, path)
                keyframe = next(late, None)
                if keyframe is not None and keyframe[0] is not None and keyframe[0] <= origin + start:
                    frames = chain([keyframe], late)
        yield stream, origin or Fraction(0), frames


def _frames_on_grid(path: str | Path, *, frame_rate: float | None, start: float) -> Iterator[VideoFrame]:
    """The frames of `iter_video` as PyAV has them; a frame shown twice is the same object twice."""
    if not (math.isfinite(start) and start >= 0):
        raise InputError(f"start must be a time in seconds, 0 or later, got {start}")
    grid = None if frame_rate is None else exact_rate(frame_rate)
    offset = Fraction(start).limit_denominator(1_000_000)
    with _decoding(path, offset) as (stream, origin, frames):
        rate = stream_rate(stream)
        slack = rounding_slack(as_fraction(stream.time_base) if stream.time_base else Fraction(0), rate)
        shown = screen_times(frames, origin=origin, rate=rate)
        frame = None
        for frame in resample(shown, rate=grid, start=offset, slack=slack):
            yield frame
    if frame is None:
        raise InputError(f"{path} ends before start = {start:g} s; choose an earlier start")


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """How the frame is to be turned, as `turn_picture` takes it."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV up to 18 fails on side data it does not know; then the angle has to do
        turn = round(frame.rotation / 90) % 4  # quarter turns, counterclockwise
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[turn]
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(np.int64).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return 0, 1 if b > 0 else -1, 1 if c > 0 else -1, 0
    return -1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1


def _to_rgb(frame: VideoFrame, reformatter: VideoReformatter, path: Path) -> Tensor:
    """A decoded frame as uint8 RGB [H, W, 3], full range, upright.

    Frames that do not name their colour matrix are BT.709 from 1280x720 on and BT.601 below, as players take them.
    """
    matrix = frame.colorspace
    if matrix == UNSPECIFIED:
        matrix = BT709 if frame.height > 576 or frame.width >= 1280 else BT601
    full = frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj")
    ranges = (FULL_RANGE if full else TV_RANGE, FULL_RANGE)
    try:
        picture = reformat(reformatter, frame, "rgb24", matrix=matrix, ranges=ranges).to_ndarray()
    except (FFmpegError, ValueError) as error:
        raise InputError(
            f"{path} has {frame.format.name} pixels, which cannot be converted ({error}); export it as H.264 in MP4"
        ) from None
    picture = turn_picture(picture, _display_matrix(frame))
    return torch.from_numpy(np.require(picture, requirements=["C", "W"]))


def _in_rgb(frames: Iterable[VideoFrame], path: str | Path) -> Iterator[Tensor]:
    """`_to_rgb` of each frame; the same object again gives the same tensor again."""
    reformatter = VideoReformatter()
    previous: VideoFrame | None = None
    picture = torch.empty(0)
    for frame in frames:
        if frame is not previous:
            picture = _to_rgb(frame, reformatter, Path(path))
            previous = frame
        yield picture


def iter_video(path: str | Path, *, frame_rate: float | None = None, start: float = 0.0) -> Iterator[Tensor]:
    """The frames of a video in presentation order, each uint8 [H, W, 3], full-range RGB, rotation applied.

    frame_rate: with a number, output i is the frame that is on the screen at start + i / frame_rate seconds, by the
        timestamps, so that variable frame rates keep their pace; frames are left out or repeated (a repeated frame is
        the same tensor). None yields every frame once, from the one on the screen at `start` on.
    start: seconds after the first frame.
    Memory does not grow with the video. InputError when the file is missing, damaged, has no video or ends before
    `start`; HDR is not tone-mapped and interlaced video not deinterlaced.
    """
    yield from _in_rgb(_frames_on_grid(path, frame_rate=frame_rate, start=start), path)


def read_video(
    path: str | Path,
    *,
    frame_rate: float | None = None,
    start: float = 0.0,
    num_frames: int | None = None,
    which: Literal["first", "last", "all"] = "first",
    size: tuple[int, int] | None = None,
    fit: Fit = "stretch",
) -> Tensor:
    """Frames of a video, uint8 [F, H, W, 3]; time and colour as in `iter_video`.

    num_frames, which: the first or the last so many frames from `start` on; None, or "all", reads every frame. No more
        than `num_frames` frames are held in memory.
    size: (height, width) to resize each frame to as it is read, `fit` as in `resize_frames`.
    InputError as `iter_video`, and when the video has fewer frames than asked for.
    """
    if which not in ("first", "last", "all"):
        raise InputError(f'which must be "first", "last" or "all", got {which!r}')
    if which == "all" and num_frames is not None:
        raise InputError('num_frames goes with which="first" or which="last"; leave it out to read all frames')
    if num_frames is not None and num_frames < 1:
        raise InputError(f"num_frames must be at least 1, got {num_frames}")
    frames = _frames_on_grid(path, frame_rate=frame_rate, start=start)
    # Of the last frames the decoder's own are kept: half the memory of RGB, and only what is returned is converted.
    chosen = deque(frames, maxlen=num_frames) if which == "last" else islice(frames, num_frames)
    pictures = []
    for picture in _in_rgb(chosen, path):
        pictures.append(picture if size is None else resize_frames(picture[None], *size, fit=fit)[0])
    if num_frames is not None and len(pictures) < num_frames:
        rate = "its own frame rate" if frame_rate is None else f"{frame_rate:g} frames per second"
        where = f" from {start:g} s on" if start else ""
        raise InputError(
            f"{path} has only {len(pictures)} frames at {rate}{where}, {num_frames} are needed; use a longer video,"
            f" or ask for at most {len(pictures)}"
        )
    if len({picture.shape for picture in pictures}) > 1:
        raise InputError(f"{path} changes its picture size on the way; pass size to bring all frames to one")
    return torch.stack(pictures)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The settings stored in a video, a PNG or a folder of PNGs that this package wrote; None when there are none.

    InputError when the file is missing or cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return read_sequence_metadata(path)
    with require_file(path, "a video or PNG").open("rb") as file:
        if file.read(8) == b"\x89PNG\r\n\x1a\n":
            return read_png_metadata(path)
    with open_container(path) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}  # Matroska writes them in capitals
    return settings_from_json(tags[SETTINGS_KEY], path) if SETTINGS_KEY in tags else None


def count_frames(path: str | Path, *, frame_rate: float | None = None) -> int:
    """How many frames `iter_video` gives, found by decoding without converting colours."""
    return sum(1 for _ in _frames_on_grid(path, frame_rate=frame_rate, start=0.0))
