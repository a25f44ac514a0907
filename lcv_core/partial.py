"""What an unfinished job leaves on disk: the latents between two steps, and the finished segments of a long one."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lcv_core.config import read_json
from lcv_core.errors import InputError
from lcv_core.files import replacing, write_error

if TYPE_CHECKING:  # the command line looks for unfinished work before it pays for torch
    from torch import Tensor

log = logging.getLogger("lcv_core")

OnResume = Callable[[int, Path], None]
Note = str | Callable[[], str]

_JOB_FILE = "job.json"


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short hash of JSON-able settings: two runs with the same one compute the same thing."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_atomic(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that it is either the old one, the new one or absent, never half of one.

    InputError when the disk does not take it.
    """
    from safetensors.torch import save

    # Not save_file: its files are readable by their owner alone, whatever the umask says.
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=dict(metadata))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_note(path: Path) -> str | None:
    """The note in unfinished work, a partial run's file or a segments folder; None when there is none to read."""
    try:
        if path.is_dir():
            note = read_json(path / _JOB_FILE).get("note")
            return note if isinstance(note, str) else None
        if path.is_file():
            with safe_open(path, "np") as file:
                return (file.metadata() or {}).get("note")
    except (InputError, SafetensorError, OSError):
        return None
    return None


class PartialRun:
    """The unfinished latents of one job in one file; a `denoise.Progress`.

    key: `fingerprint` of the job's settings; a file of another job is not resumed, and replaced at the first save.
    note: text stored beside the latents, for `read_note`; or what gives it when they are saved.
    every: seconds between saves while it runs (it is saved in any case when the run is interrupted).
    on_resume: called with the steps already done and the file when there is something to go on from.
    state: JSON that is saved beside the latents; after `load` of unfinished work, what was saved with it.
    """

    def __init__(
        self, path: str | Path, key: str, *, note: Note = "", every: float = 120.0, on_resume: OnResume | None = None
    ) -> None:
        self.path, self.key, self.note, self.every, self.on_resume = Path(path), key, note, every, on_resume
        self.state: dict[str, Any] = {}
        self._saved_at = time.monotonic()

    def load(self, latents: Tensor) -> tuple[int, Tensor]:
        """(steps done, latents after them); (0, latents) when there is nothing to resume."""
        if not self.path.is_file():
            return 0, latents
        try:
            with safe_open(self.path, "pt") as file:
                metadata, saved = file.metadata() or {}, file.get_tensor("latents")
            step, state = int(metadata.get("step", "")), json.loads(metadata.get("state", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("ignoring the unreadable partial run %s (%s)", self.path, error)
            return 0, latents
        if metadata.get("key") != self.key or saved.shape != latents.shape:
            log.warning("%s belongs to a run with other settings; starting afresh", self.path)
            return 0, latents
        self.state = state
        if self.on_resume:
            self.on_resume(step, self.path)
        return step, saved.to(latents)

    def save(self, step: int, latents: Tensor) -> None:
        note = self.note if isinstance(self.note, str) else self.note()
        metadata = {"key": self.key, "step": str(step), "note": note}
        if self.state:
            metadata["state"] = json.dumps(self.state)
        save_atomic(self.path, {"latents": latents.float()}, metadata)
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

    key: `fingerprint` of the job's settings. A folder that holds another job's segments, or anything that is not a
    job's, is refused, so that nothing is lost; with overwrite another job's are discarded. note, on_resume: as in
    `PartialRun`.
    """

    def __init__(
        self,
        folder: str | Path,
        key: str,
        *,
        note: Note = "",
        overwrite: bool = False,
        on_resume: OnResume | None = None,
    ) -> None:
        self.folder, self.key, self.on_resume = Path(folder), key, on_resume
        job = self.folder / _JOB_FILE
        if self._holds_other_work():
            if not (overwrite and job.is_file()):
                raise InputError(
                    f"{self.folder} holds the segments of a job with other settings; repeat that job's command to"
                    " finish it, or delete the folder or choose another output"
                )
            log.warning("discarding %s, the unfinished work of another job", self.folder)
            self.remove()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        self.write_note(note if isinstance(note, str) else note())

    def write_note(self, note: str) -> None:
        """Replace the note."""
        with replacing(self.folder / _JOB_FILE) as temporary:
            temporary.write_text(json.dumps({"key": self.key, "note": note}), encoding="utf-8")

    def _holds_other_work(self) -> bool:
        try:
            if self._is_empty():
                return False
        except OSError as error:
            raise write_error(self.folder, error) from error
        try:
            return read_json(self.folder / _JOB_FILE).get("key") != self.key
        except InputError:
            return True

    def _is_empty(self) -> bool:
        """Whether no work is in the folder, or no folder there."""
        if not self.folder.exists():
            return True
        return all(path.name == _JOB_FILE or _is_leftover(path) for path in self.folder.iterdir())

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
        save_atomic(self.path(index), {"latents": latents.float()}, {"key": self.key})
        self.progress(index).clear()

    def progress(self, index: int) -> PartialRun:
        """Where the segment keeps its latents between steps."""
        path = self.path(index, ".partial.safetensors")
        return PartialRun(path, f"{self.key}-{index}", on_resume=self.on_resume)

    def finished(self) -> int:
        """Segments finished without a gap, from the first; one that a power cut left unreadable is a gap."""
        count = 0
        while _is_readable(self.path(count)):
            count += 1
        return count

    def remove(self) -> None:
        """Delete the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Delete the folder when no work is in it."""
        if self._is_empty():
            self.remove()


def _is_leftover(path: Path) -> bool:
    """A temporary file of a killed run (see `files.temporary_path`)."""
    return path.name.startswith(".") and path.suffix == ".part"


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            return "latents" in file.keys()  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError):
        return False
