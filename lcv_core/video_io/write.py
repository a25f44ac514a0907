"""Writing video: H.264 with the settings inside, and joining segments without encoding them again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.files import (
    SETTINGS_KEY,
    VIDEO_FORMATS,
    check_writable,
    replacing,
    settings_to_json,
    temporary_path,
    write_error,
)
from lcv_core.image_io import frames_to_uint8
from lcv_core.video_io.colour import BT709, FULL_RANGE, TV_RANGE, reformat
from lcv_core.video_io.read import as_fraction, open_video, stream_rate
from lcv_core.video_io.times import exact_rate

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Stamped = tuple[Fraction | None, Fraction | None, VideoFrame]  # time and duration in seconds, where known

_ENCODER_THREADS = 4  # x264's output depends on the number of threads, so it may not follow the machine


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
        ranges = (FULL_RANGE, TV_RANGE)
        frame = reformat(self._reformatter, frame, self._pixel_format, matrix=BT709, ranges=ranges)
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
        context.color_range = TV_RANGE
        context.colorspace = context.color_primaries = context.color_trc = BT709
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
            with open_video(part) as (source, stream):
                target = target or output.add_stream_from_template(stream)
                offset = done
                for packet in source.demux(stream):
                    if packet.size == 0:  # the demuxer's end mark
                        continue
                    if packet.pts is None or packet.is_corrupt:
                        raise InputError(f"{part} is cut off or was not written as MP4 here; write it again")
                    shown = round(packet.pts * as_fraction(packet.time_base) * rate)
                    packet.stream, packet.time_base = target, 1 / rate
                    packet.pts, packet.dts, packet.duration = offset + shown, done - delay, 1
                    output.mux(packet)
                    done += 1
                if done - offset != stream.frames:
                    raise InputError(f"{part} has {done - offset} of {stream.frames} frames; write it again")


def rewrite_metadata(path: str | Path, metadata: dict[str, Any]) -> None:
    """Other settings into a finished video; its frames and their times stay, nothing is encoded again."""
    path = _video_target(path)
    with (
        replacing(path) as temporary,
        _open_output(temporary, path, metadata) as output,
        open_video(path) as (source, stream),
    ):
        target = output.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:  # not the demuxer's end mark
                packet.stream = target
                output.mux(packet)


def _joint_timing(parts: list[Path]) -> tuple[Fraction, int]:
    """The frame rate of all parts, and by how many frames decoding runs ahead of display in any of them."""
    names = ("codec", "width", "height", "pixel format", "frame rate", "encoder settings")
    expected, rate, delay = None, Fraction(1), 0
    for part in parts:
        with open_video(part) as (source, stream):
            form = _encoding(stream)
            expected = expected or form
            if form != expected:
                different = ", ".join(name for name, a, b in zip(names, form, expected) if a != b)
                raise InputError(f"{part} differs from {parts[0]} in {different}; write all parts alike")
            rate = stream_rate(stream) or rate
            first = next(source.demux(stream))
            if first.dts is None or not stream.frames:
                raise InputError(f"{part} is cut off or was not written as MP4 here; write it again")
            delay = max(delay, -round(first.dts * as_fraction(first.time_base) * rate))
    return rate, delay


def _encoding(stream: VideoStream) -> tuple[object, ...]:
    """What must be equal for two streams to be one."""
    context = stream.codec_context
    return (context.name, context.width, context.height, context.pix_fmt, stream_rate(stream), context.extradata)
