"""What an unfinished job leaves on disk: the latents between two steps, and the finished segments of a long one."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcv_core.config import read_json
from lcv_core.errors import InputError

log = logging.getLogger("lcv_core")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short hash of JSON-able settings: two runs with the same one compute the same thing."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_atomic(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that it is either the old one, the new one or absent, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=dict(metadata))
    temporary.replace(path)


class PartialRun:
    """The unfinished latents of one job in one file; a `denoise.Progress`.

    key: `fingerprint` of the job's settings; a file of another job is ignored.
    every: seconds between saves while it runs (it is saved in any case when the run is interrupted).
    """

    def __init__(self, path: str | Path, key: str, *, every: float = 120.0) -> None:
        self.path, self.key, self.every = Path(path), key, every
        self._saved_at = time.monotonic()

    def load(self, latents: Tensor) -> tuple[int, Tensor]:
        """(steps done, latents after them); (0, latents) when there is nothing to resume."""
        if not self.path.is_file():
            return 0, latents
        try:
            with safe_open(self.path, "pt") as file:
                metadata, saved = file.metadata() or {}, file.get_tensor("latents")
        except (SafetensorError, OSError) as error:
            log.warning("ignoring the unreadable partial run %s (%s)", self.path, error)
            return 0, latents
        if metadata.get("key") != self.key or saved.shape != latents.shape:
            log.warning("%s belongs to a run with other settings; starting afresh", self.path)
            return 0, latents
        step = int(metadata["step"])
        log.info("resuming after step %d from %s", step, self.path)
        return step, saved.to(latents)

    def save(self, step: int, latents: Tensor) -> None:
        save_atomic(self.path, {"latents": latents.to(torch.float32)}, {"key": self.key, "step": str(step)})
        self._saved_at = time.monotonic()

    def tick(self, step: int, latents: Tensor) -> None:
        """Save when the last save is `every` seconds old."""
        if time.monotonic() - self._saved_at >= self.every:
            self.save(step, latents)

    def clear(self) -> None:
        """The output is written: forget the latents."""
        self.path.unlink(missing_ok=True)


class SegmentStore:
    """The finished segments of a long job, as latents, in one folder; an interrupted job goes on from them.

    key: `fingerprint` of the job's settings. A folder that holds another job is refused, so that nothing is lost.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        job = self.folder / "job.json"
        if job.is_file():
            found = read_json(job).get("key")
            if found != key:
                raise InputError(
                    f"{self.folder} holds the segments of a job with other settings; repeat that job's settings to"
                    " finish it, or delete the folder or name another one"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        job.write_text(json.dumps({"key": key}))

    def path(self, index: int, suffix: str = ".safetensors") -> Path:
        """Where segment `index` (from 0) keeps its file of this kind."""
        return self.folder / f"segment_{index:04d}{suffix}"

    def load(self, index: int) -> Tensor | None:
        """The segment's latents fp32 [1, C, T, h, w]; None when it is not finished."""
        path = self.path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor("latents")
        except (SafetensorError, OSError) as error:
            log.warning("segment %d is unreadable and will be made again (%s)", index + 1, error)
            return None

    def save(self, index: int, latents: Tensor) -> None:
        save_atomic(self.path(index), {"latents": latents.to(torch.float32)}, {"key": self.key})
        self.progress(index).clear()

    def progress(self, index: int) -> PartialRun:
        """Where the segment keeps its latents between steps."""
        return PartialRun(self.path(index, ".partial.safetensors"), f"{self.key}-{index}")

    def finished(self) -> int:
        """Segments finished without a gap, from the first."""
        count = 0
        while self.path(count).is_file():
            count += 1
        return count
