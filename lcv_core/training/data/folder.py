"""A folder of videos with captions as a source of clips: NAME.txt beside NAME.mp4, or one captions.csv."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcv_core.config import Native
from lcv_core.errors import InputError
from lcv_core.names import Fit
from lcv_core.pipelines.base import native_size
from lcv_core.shapes import check_frames, check_size
from lcv_core.training.data.sources import Part, SourceClip
from lcv_core.training.strict import need
from lcv_core.video_io import probe_video, read_video

log = logging.getLogger("lcv_core")

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
CAPTIONS_FILE = "captions.csv"


@dataclass(frozen=True)
class FolderSection:
    """How a folder becomes clips.

    path: searched with its subfolders. num_frames, frame_rate: of a clip, by the videos' timestamps. height, width:
        pixels; left out, each video gets the size nearest to its aspect with about the area of `area_of`, [height,
        width]: the official 480p buckets for 480x832.
    take: the "first" num_frames of a video, or "all" that it holds, one clip after another.
    fit: how a picture meets a size of another aspect. max_upscale: videos that need more are bad data.
    """

    path: Path
    num_frames: int = 93
    frame_rate: float = 15.0
    height: int | None = None
    width: int | None = None
    area_of: tuple[int, int] = (480, 832)
    take: Literal["first", "all"] = "first"
    fit: Fit = "crop"
    max_upscale: float = 2.0

    def __post_init__(self) -> None:
        check_frames(self.num_frames)
        need((self.height is None) == (self.width is None), "data.folder needs height and width, or neither")
        check_size(*self.area_of)
        if self.height is not None and self.width is not None:
            check_size(self.height, self.width)
        need(self.frame_rate > 0, f"data.folder.frame_rate must be above 0, got {self.frame_rate:g}")
        need(self.max_upscale >= 1, f"data.folder.max_upscale must be at least 1, got {self.max_upscale:g}")


class FolderClips:
    """A `ClipSource` over a folder; a part is a video.

    on_bad_data: "stop" raises an InputError that lists what is wrong with captions; "skip" warns and leaves the videos
    out. What is wrong inside a video shows when it is read.
    """

    def __init__(self, section: FolderSection, on_bad_data: Literal["stop", "skip"]) -> None:
        self.section = section
        self._videos, problems = _scan(section.path)
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            if on_bad_data == "stop":
                raise InputError(f"{len(problems)} problems in {section.path}:\n{listed}{more}")
            log.warning("%d problems in %s, left out:\n%s%s", len(problems), section.path, listed, more)
        if not self._videos:
            raise InputError(
                f"{section.path} has no video with a caption; put NAME.txt beside NAME.mp4, or write {CAPTIONS_FILE}"
                " with the columns file and caption"
            )

    @property
    def frame_rate(self) -> float:
        return self.section.frame_rate

    def parts(self) -> list[Part]:
        how = {k: str(v) for k, v in vars(self.section).items() if k != "path"}
        parts = []
        for video, _ in self._videos:
            stat = video.stat()
            name = video.relative_to(self.section.path).as_posix()
            parts.append(Part(name, {"video": name, "bytes": stat.st_size, "time": stat.st_mtime_ns, "how": how}))
        return parts

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        return self._videos[index][1]

    def read(self, index: int) -> Iterator[SourceClip]:
        section, (video, _) = self.section, self._videos[index]
        name = video.relative_to(section.path).as_posix()
        size = self._size(video)
        length = section.num_frames / section.frame_rate
        first = read_video(
            video, frame_rate=section.frame_rate, num_frames=section.num_frames, size=size, fit=section.fit
        )
        yield SourceClip(name, first)
        start = length
        while section.take == "all":
            try:
                frames = read_video(
                    video, frame_rate=section.frame_rate, start=start, num_frames=section.num_frames, size=size,
                    fit=section.fit,
                )  # fmt: skip
            except InputError:  # the rest is too short
                return
            yield SourceClip(f"{name} from {start:g} s", frames)
            start += length

    def _size(self, video: Path) -> tuple[int, int]:
        section, info = self.section, probe_video(video)
        if section.height is not None and section.width is not None:
            size = (section.height, section.width)
        else:
            height, width = section.area_of
            size = native_size(Native(height=height, width=width), info.height, info.width)
        scale = max(size[0] / info.height, size[1] / info.width)
        if scale > section.max_upscale:
            raise InputError(
                f"{video} has only {info.width}x{info.height} pixels, {size[1]}x{size[0]} are trained; leave it out or"
                f" raise data.folder.max_upscale above {section.max_upscale:g}"
            )
        return size


Videos = list[tuple[Path, tuple[str, ...]]]


def _scan(folder: Path) -> tuple[Videos, list[str]]:
    """The videos that have captions, and what is wrong with the others."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; data.folder.path names a folder of videos")
    table = folder / CAPTIONS_FILE
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    listed, problems = _read_table(table, folder) if table.is_file() else ({}, [])
    videos: Videos = []
    for file in files:
        texts = listed.get(file) or _caption_beside(file)
        if texts:
            videos.append((file, texts))
        else:
            where = f"{file.stem}.txt beside it" if not listed else f"a row in {CAPTIONS_FILE}, no {file.stem}.txt"
            problems.append(f"{file.relative_to(folder)} has no caption (no {where})")
    return videos, problems


def _caption_beside(video: Path) -> tuple[str, ...]:
    file = video.with_suffix(".txt")
    if not file.is_file():
        return ()
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; save it as UTF-8") from None
    return (text,) if text else ()


def _read_table(table: Path, folder: Path) -> tuple[dict[Path, tuple[str, ...]], list[str]]:
    """Captions by video, several rows for several wordings; and the rows that are wrong."""
    captions: dict[Path, tuple[str, ...]] = {}
    problems = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                raise InputError(f"{table} must have the columns file and caption, got {rows.fieldnames}")
            for row in rows:
                video, text = folder / (row["file"] or ""), " ".join((row["caption"] or "").split())
                if not video.is_file():
                    problems.append(f"{row['file']!r} in line {rows.line_num} of {CAPTIONS_FILE} does not exist")
                elif text:
                    captions[video] = (*captions.get(video, ()), text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a CSV file in UTF-8 ({error})") from None
    return captions, problems
