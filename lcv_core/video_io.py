"""Video files through PyAV: probing, reading by timestamps, writing H.264 with the settings inside, joining segments.

Frames are channels-last RGB: uint8 [F, H, W, 3], or float [F, H, W, 3] in [0, 1] where frames are written.
Times are in seconds, counted from the first frame of a file.
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
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.frame_times import exact_rate, resample, rounding_slack, screen_times
from lcv_core.image_io import (
    SETTINGS_KEY,
    VIDEO_FORMATS,
    check_writable,
    frames_to_uint8,
    read_png_metadata,
    read_sequence_metadata,
    replacing,
    require_file,
    resize_frames,
    settings_from_json,
    settings_to_json,
    temporary_path,
    turn_picture,
    write_error,
)
from lcv_core.names import Fit

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Stamped = tuple[Fraction | None, Fraction | None, VideoFrame]  # time and duration in seconds, where known

# FFmpeg's numbers, the same in every PyAV from 14 on (its enums are not).
_BT601, _BT709, _UNSPECIFIED = 5, 1, 2
_TV_RANGE, _FULL_RANGE = 1, 2
_ATTACHED_PIC = 0x400
# Bicubic, accurate rounding, full chroma on both sides: the default fast path darkens saturated colours by 3 levels.
_SWS_FLAGS = 0x4 | 0x40000 | 0x2000 | 0x4000

_ENCODER_THREADS = 4  # x264's output depends on the number of threads, so it may not follow the machine
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
        rate = _stream_rate(stream)
        if stream.duration and stream.time_base:
            duration = float(stream.duration * _fraction(stream.time_base))
        else:
            length = cast("InputContainer", stream.container).duration  # microseconds
            duration = length / 1e6 if length else None
        num_frames = stream.frames or (round(duration * rate) if duration and rate else None)
        return VideoInfo(Path(path), width, height, float(rate) if rate else None, duration, num_frames)


@contextmanager
def _open_container(path: str | Path) -> Iterator[InputContainer]:
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
def _open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream that is not a cover picture."""
    with _open_container(path) as container:
        for stream in container.streams.video:
            disposition = getattr(stream, "disposition", 0)  # PyAV >= 14.1
            if not int(getattr(disposition, "value", disposition)) & _ATTACHED_PIC:
                stream.thread_type = "AUTO"
                yield container, stream
                return
        raise InputError(f"{path} has no video stream; pass a file with pictures in it")


def _fraction(value: Any) -> Fraction:
    """PyAV's rational number, whichever type this version has for it."""
    return Fraction(value.numerator, value.denominator)


def _stream_rate(stream: VideoStream) -> Fraction | None:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return _fraction(rate) if rate else None


def _decode(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[Stamped]:
    """The frames of a stream in presentation order. InputError at damage, unless it is before the first frame."""
    tick = _fraction(stream.time_base) if stream.time_base else Fraction(0)
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
        container, stream = files.enter_context(_open_video(path))
        frames = _decode(container, stream, path)
        first = next(frames, None)
        if first is None:
            raise InputError(f"{path} holds no frame that can be decoded; export it again as MP4")
        origin, frames = first[0], chain([first], frames)
        if start >= _SEEK_FROM and origin is not None and stream.time_base:
            container, late_stream = files.enter_context(_open_video(path))
            with suppress(FFmpegError, InputError):  # a file that cannot seek is decoded from its beginning
                container.seek(math.floor((origin + start) / _fraction(stream.time_base)), stream=late_stream)
                late = _decode(container, late_stream, path)
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
        rate = _stream_rate(stream)
        slack = rounding_slack(_fraction(stream.time_base) if stream.time_base else Fraction(0), rate)
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


def _reformat(
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
        interpolation=_SWS_FLAGS,
    )


def _to_rgb(frame: VideoFrame, reformatter: VideoReformatter, path: Path) -> Tensor:
    """A decoded frame as uint8 RGB [H, W, 3], full range, upright.

    Frames that do not name their colour matrix are BT.709 from 1280x720 on and BT.601 below, as players take them.
    """
    matrix = frame.colorspace
    if matrix == _UNSPECIFIED:
        matrix = _BT709 if frame.height > 576 or frame.width >= 1280 else _BT601
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    ranges = (_FULL_RANGE if full else _TV_RANGE, _FULL_RANGE)
    try:
        picture = _reformat(reformatter, frame, "rgb24", matrix=matrix, ranges=ranges).to_ndarray()
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
    with _open_container(path) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}  # Matroska writes them in capitals
    return settings_from_json(tags[SETTINGS_KEY], path) if SETTINGS_KEY in tags else None


def _video_target(path: str | Path) -> Path:
    """`path` when a video can be written there."""
    if Path(path).suffix.lower() not in VIDEO_FORMATS:
        raise InputError(f"{path} must end in .mp4, .mov or .mkv")
    return check_writable(path)


def _open_output(temporary: Path, path: Path, metadata: dict[str, Any] | None) -> OutputContainer:
    """The container for `path` under its temporary name, set to write the same bytes every time."""
    options = {"fflags": "+bitexact"}
    muxer = VIDEO_FORMATS[path.suffix.lower()]
    if muxer != "matroska":
        options["movflags"] = "+faststart+use_metadata_tags"
    container = av.open(str(temporary.absolute()), "w", format=muxer, container_options=options)
    if metadata is not None:
        text = settings_to_json(metadata)
        container.metadata.update({SETTINGS_KEY: text, "comment": text})  # the comment is what players show
    return container


class VideoWriter:
    """H.264 video written frame by frame; a context manager. Memory does not grow with the video.

    The file is written under a hidden temporary name beside the target and renamed by `close`, so that the final name
    never holds a broken file; leaving the block by an exception drops it (`abort`). The same frames give the same
    bytes. Colours are BT.709, limited range, tagged so. "yuv420p" needs even sizes: an odd picture gets its last
    column or row twice.

    path: .mp4, .mov or .mkv. crf: 0 (lossless but for the colour conversion) to 51. metadata: settings, stored as JSON
    under the keys "lcv" and "comment". pixel_format: "yuv420p" plays everywhere, "yuv444p" keeps full colour detail.
    Every method raises InputError when the request or the disk does not allow it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        frame_rate: float | Fraction,
        crf: float = 18,
        metadata: dict[str, Any] | None = None,
        pixel_format: Literal["yuv420p", "yuv444p"] = "yuv420p",
    ) -> None:
        if not 0 <= crf <= 51:
            raise InputError(f"crf must be from 0 (best) to 51, got {crf}")
        if pixel_format not in ("yuv420p", "yuv444p"):
            raise InputError(f'pixel_format must be "yuv420p" or "yuv444p", got {pixel_format!r}')
        self._rate = exact_rate(frame_rate)
        if metadata is not None:
            settings_to_json(metadata)  # fail before the work, not at its end
        self.path = _video_target(path)
        self.num_frames = 0
        # x264's macroblock tree reads memory it never wrote (AVX-512, widths like 480): other bytes on every run.
        self._options = {"crf": f"{crf:g}", "mbtree": "0"}
        self._metadata = metadata
        self._pixel_format = pixel_format
        self._temporary = temporary_path(self.path)
        self._reformatter = VideoReformatter()
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._size = (0, 0)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append frames [F, H, W, 3] or one [H, W, 3], uint8 or float in [0, 1]; all of one size."""
        if self._closed:
            raise InputError(f"{self.path} is finished; open a new writer to write more frames")
        try:
            for frame in frames_to_uint8(frames):
                self._encode(frame.numpy())
        except (FFmpegError, OSError) as error:
            self.abort()
            raise _encoder_error(self.path, error) from error

    def _encode(self, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        if self._container is None or self._stream is None:
            self._size = (height, width)
            self._container = _open_output(self._temporary, self.path, self._metadata)
            self._stream = self._add_stream(self._container)
        if (height, width) != self._size:
            raise InputError(
                f"{self.path} has frames of {self._size[1]}x{self._size[0]}, got one of {width}x{height};"
                " resize it before writing"
            )
        if self._pixel_format == "yuv420p" and (height % 2 or width % 2):
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        ranges = (_FULL_RANGE, _TV_RANGE)
        frame = _reformat(self._reformatter, frame, self._pixel_format, matrix=_BT709, ranges=ranges)
        frame.pts, frame.time_base = self.num_frames, 1 / self._rate
        self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        height, width = self._size
        stream = container.add_stream("libx264", rate=self._rate, options=self._options)
        even = 2 if self._pixel_format == "yuv420p" else 1
        stream.width, stream.height = width + width % even, height + height % even
        stream.pix_fmt = self._pixel_format
        context = stream.codec_context
        context.time_base = 1 / self._rate
        context.thread_count = _ENCODER_THREADS
        context.thread_type = "FRAME"
        context.color_range = _TV_RANGE
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        return stream

    def close(self) -> None:
        """Finish the file and give it its name. Raises InputError when no frame was written."""
        if self._closed:
            return
        try:
            if self._container is None or self._stream is None:
                raise InputError(f"no frames were written to {self.path}")
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None
            self._temporary.replace(self.path)
        except (FFmpegError, OSError) as error:
            raise _encoder_error(self.path, error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop the unfinished file; an earlier one under the final name stays. Does nothing after `close`."""
        if not self._closed:
            self._closed = True
            if self._container is not None:
                with suppress(FFmpegError, OSError):
                    self._container.close()
            self._temporary.unlink(missing_ok=True)


def _encoder_error(path: Path, error: Exception) -> InputError:
    if isinstance(error, OSError):
        return write_error(path, error)
    return InputError(f"{path} cannot be encoded ({error}); choose another size or pixel format")


def write_video(
    path: str | Path,
    frames: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    *,
    frame_rate: float | Fraction,
    crf: float = 18,
    metadata: dict[str, Any] | None = None,
    pixel_format: Literal["yuv420p", "yuv444p"] = "yuv420p",
) -> None:
    """Frames [F, H, W, 3], or an iterable of frames or chunks of frames, as an H.264 file; see `VideoWriter`."""
    with VideoWriter(path, frame_rate=frame_rate, crf=crf, metadata=metadata, pixel_format=pixel_format) as writer:
        for chunk in frames:
            writer.write(chunk)


def concat_videos(paths: Iterable[str | Path], out: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Joins .mp4 or .mov segments that `VideoWriter` wrote with equal settings, without encoding them again.

    The result decodes to exactly the frames of the parts in order, at an even frame rate across the joints. Memory
    does not grow with the parts; the file gets its name when it is complete. InputError when parts differ in size,
    frame rate or encoding, or one is cut off.
    """
    parts = [Path(path) for path in paths]
    if not parts:
        raise InputError("concat_videos needs at least one part, got none")
    path = _video_target(out)
    rate, delay = _joint_timing(parts)
    with replacing(path) as temporary, _open_output(temporary, path, metadata) as output:
        target: VideoStream | None = None
        done = 0
        for part in parts:
            with _open_video(part) as (source, stream):
                target = target or output.add_stream_from_template(stream)
                offset = done
                for packet in source.demux(stream):
                    if packet.size == 0:  # the demuxer's end mark
                        continue
                    if packet.pts is None or packet.is_corrupt:
                        raise InputError(f"{part} is cut off or was not written as MP4 here; write it again")
                    shown = round(packet.pts * _fraction(packet.time_base) * rate)
                    packet.stream, packet.time_base = target, 1 / rate
                    packet.pts, packet.dts, packet.duration = offset + shown, done - delay, 1
                    output.mux(packet)
                    done += 1
                if done - offset != stream.frames:
                    raise InputError(f"{part} has {done - offset} of {stream.frames} frames; write it again")


def _joint_timing(parts: list[Path]) -> tuple[Fraction, int]:
    """The frame rate of all parts, and by how many frames decoding runs ahead of display in any of them."""
    names = ("codec", "width", "height", "pixel format", "frame rate", "encoder settings")
    expected, rate, delay = None, Fraction(1), 0
    for part in parts:
        with _open_video(part) as (source, stream):
            form = _encoding(stream)
            expected = expected or form
            if form != expected:
                different = ", ".join(name for name, a, b in zip(names, form, expected) if a != b)
                raise InputError(f"{part} differs from {parts[0]} in {different}; write all parts alike")
            rate = _stream_rate(stream) or rate
            first = next(source.demux(stream))
            if first.dts is None or not stream.frames:
                raise InputError(f"{part} is cut off or was not written as MP4 here; write it again")
            delay = max(delay, -round(first.dts * _fraction(first.time_base) * rate))
    return rate, delay


def _encoding(stream: VideoStream) -> tuple[object, ...]:
    """What must be equal for two streams to be one."""
    context = stream.codec_context
    return (context.name, context.width, context.height, context.pix_fmt, _stream_rate(stream), context.extradata)


def count_frames(path: str | Path, *, frame_rate: float | None = None) -> int:
    """How many frames `iter_video` gives, found by decoding without converting colours."""
    return sum(1 for _ in _frames_on_grid(path, frame_rate=frame_rate, start=0.0))
