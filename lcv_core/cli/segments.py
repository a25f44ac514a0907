"""A long result on its way: one piece per segment on disk, joined when the last is there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lcv_core.cli.outputs import Target
from lcv_core.image_io import read_image
from lcv_core.partial import SegmentStore, fingerprint, save_atomic
from lcv_core.video_io import concat_videos


class SegmentSink:
    """Writes a long result segment by segment into the store's folder, and joins the pieces at the end.

    A segment counts as written once its file has its final name, so a killed run leaves whole pieces only. Video is
    joined by copying streams: nothing is encoded twice. Memory does not grow with the number of segments.
    """

    def __init__(self, target: Target, store: SegmentStore) -> None:
        self.target, self.store = target, store
        # Pieces of another quality or frame rate would not join; the latents in the store serve any.
        form = fingerprint({"kind": target.kind, "frame_rate": target.frame_rate, "crf": target.crf})
        self.folder = store.folder / f"pieces-{form}"

    @property
    def source(self) -> Path:
        """The piece before the first segment: the clip that is continued."""
        return self.folder / f"source{self._suffix}"

    @property
    def _suffix(self) -> str:
        return {"video": ".mp4", "png": "", "latents": ".latents"}[self.target.kind]

    def piece(self, index: int) -> Path:
        return self.folder / f"{index:04d}{self._suffix}"

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

    def join(self, total: int, *, with_source: bool) -> None:
        """Make the target from the source, where it is asked for, and segments 0..total-1; then remove the store."""
        pieces = [self.source] * with_source + [self.piece(i) for i in range(total)]
        if self.target.kind == "video":
            concat_videos(pieces, self.target.path, metadata=self.target.metadata)
        elif self.target.kind == "png":
            with self.target.writer() as writer:
                for piece in pieces:
                    for frame in sorted(piece.glob("*.png")):
                        writer.write(read_image(frame).unsqueeze(0))
        else:
            self.target.write_latents(torch.cat([_latents(piece) for piece in pieces], dim=2))
        self.store.remove()


def _latents(path: Path) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")
