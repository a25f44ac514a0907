"""Where a job's result goes: a video file, a folder of PNG frames, or latents; whole or segment by segment."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.files import check_writable, settings_to_json
from lcv_core.image_io import PngSequenceWriter, read_image
from lcv_core.partial import SegmentStore, save_atomic
from lcv_core.video_io import VIDEO_FORMATS, VideoWriter, concat_videos

Kind = Literal["video", "png", "latents"]


class FrameWriter(Protocol):
    def write(self, frames: Tensor) -> None: ...


@dataclass(frozen=True)
class Target:
    """A checked place for a result."""

    path: Path
    kind: Kind
    frame_rate: float
    crf: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def writer(self, path: Path | None = None) -> AbstractContextManager[FrameWriter]:
        """A writer of frames [F, H, W, 3] to the target, or to another place of the same kind."""
        if self.kind == "png":
            return PngSequenceWriter(path or self.path, metadata=self.metadata)
        return VideoWriter(path or self.path, frame_rate=self.frame_rate, crf=self.crf, metadata=self.metadata)

    def numbered(self, index: int, total: int) -> Target:
        """The target of one of several videos: name-1.mp4, name-2.mp4, ..."""
        if total == 1:
            return self
        path = self.path.with_name(f"{self.path.stem}-{index + 1}{self.path.suffix}")
        return Target(path, self.kind, self.frame_rate, self.crf, self.metadata)

    def beside(self, suffix: str) -> Path:
        """A name next to the target for unfinished work."""
        return self.path.with_name(self.path.name + suffix)


def kind_of(path: Path) -> Kind:
    """By the suffix; a name without one is a folder of PNG frames."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_FORMATS:
        return "video"
    if suffix == ".safetensors":
        return "latents"
    if suffix == "" or path.is_dir():
        return "png"
    raise InputError(
        f"cannot write {suffix} files; use {path.with_suffix('.mp4').name} for video, {path.with_suffix('').name} for"
        f" a folder of PNG frames, or {path.with_suffix('.safetensors').name} for latents"
    )


def next_free(task: str) -> Path:
    """outputs/TASK-0001.mp4, or the first number that is not taken."""
    folder, number = Path("outputs"), 1
    while (path := folder / f"{task}-{number:04d}.mp4").exists():
        number += 1
    return path


def check_target(path: Path, *, overwrite: bool, total: int = 1) -> Kind:
    """The kind of an output path that can be written to, before any long work starts."""
    kind = kind_of(path)
    names = [Target(path, kind, 1.0, 0.0).numbered(i, total).path for i in range(total)]
    for name in names:
        taken = any(name.iterdir()) if name.is_dir() else name.exists()
        if taken and not overwrite:
            raise InputError(f"{name} exists; add --overwrite to replace it, or choose another --output")
    check_writable(path)
    return kind


def write_latents(target: Target, latents: Tensor) -> None:
    """Normalised latents fp32 [B, C, T, h, w] under "latents", the job in the file's metadata."""
    save_atomic(target.path, {"latents": latents}, {"lcv": settings_to_json(target.metadata)})


def read_latents_metadata(path: Path) -> str | None:
    """The job's JSON in a latents file."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("lcv")


class SegmentSink:
    """Writes a long result segment by segment into the store's folder, and joins the pieces at the end.

    A segment counts as written once its file has its final name, so a killed run leaves whole pieces only. The pieces
    are joined by copying streams (video) or files (PNG): nothing is encoded twice and memory stays flat.
    """

    def __init__(self, target: Target, store: SegmentStore) -> None:
        self.target, self.store = target, store

    @property
    def source(self) -> Path:
        """The piece before the first segment: the clip that is continued."""
        return self.store.folder / f"source{self._suffix}"

    @property
    def _suffix(self) -> str:
        return {"video": self.target.path.suffix, "png": "", "latents": ".latents"}[self.target.kind]

    def piece(self, index: int) -> Path:
        return self.store.path(index, self._suffix)

    def written(self) -> int:
        """Segments written without a gap, from the first."""
        count = 0
        while self.piece(count).exists():
            count += 1
        return count

    def write(self, piece: Path, chunks: Iterable[Tensor]) -> None:
        """Frames [F, H, W, 3] by chunks into one piece."""
        with self.target.writer(piece) as writer:
            for frames in chunks:
                writer.write(frames)

    def write_latents(self, piece: Path, latents: Tensor) -> None:
        save_atomic(piece, {"latents": latents}, {})

    def join(self, total: int) -> None:
        """Make the target from the source, where there is one, and segments 0..total-1; then remove the store."""
        pieces = [self.source] * self.source.exists() + [self.piece(i) for i in range(total)]
        if self.target.kind == "video":
            concat_videos(pieces, self.target.path, metadata=self.target.metadata)
        elif self.target.kind == "png":
            with self.target.writer() as writer:
                for piece in pieces:
                    for frame in sorted(piece.glob("*.png")):
                        writer.write(read_image(frame).unsqueeze(0))
        else:
            write_latents(self.target, torch.cat([_latents(piece) for piece in pieces], dim=2))
        shutil.rmtree(self.store.folder, ignore_errors=True)


def _latents(path: Path) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")
