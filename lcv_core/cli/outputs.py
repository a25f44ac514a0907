"""Where a job's result goes: a video file, a folder of PNG frames, or latents; and what unfinished work is there."""

from __future__ import annotations

import dataclasses
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from safetensors import SafetensorError, safe_open

from lcv_core.cli.job import Job
from lcv_core.errors import InputError
from lcv_core.files import (
    SETTINGS_KEY,
    VIDEO_FORMATS,
    prepare_target,
    remove_leftovers,
    require_file,
    settings_from_json,
    settings_to_json,
)
from lcv_core.partial import read_note, save_atomic

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["video", "png", "latents"]

PARTIAL = ".partial.safetensors"
SEGMENTS = ".segments"
# In the settings of an output beside the job: what ran otherwise than the job says, since memory had run out.
CHANGED = "changed_while_running"
Changes = list[dict[str, Any]]


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
        from lcv_core.image_io import PngSequenceWriter
        from lcv_core.video_io import VideoWriter

        if self.kind == "png":
            return PngSequenceWriter(path or self.path, metadata=self.metadata)
        return VideoWriter(path or self.path, frame_rate=self.frame_rate, crf=self.crf, metadata=self.metadata)

    def write_latents(self, latents: Tensor) -> None:
        """Normalised latents fp32 [B, C, T, h, w] under "latents", the job in the file's metadata."""
        save_atomic(self.path, {"latents": latents}, {SETTINGS_KEY: settings_to_json(self.metadata)})

    def of(self, job: Job, index: int) -> Target:
        """The target of output `index` of a job, carrying the job that makes it alone."""
        path = numbered(self.path, index, job.total)
        return dataclasses.replace(self, path=path, metadata=job.video(index).to_metadata())

    def note(self, changes: Changes) -> bool:
        """Put what ran otherwise than the job says into the metadata; whether that is news."""
        if not changes or self.metadata.get(CHANGED) == changes:
            return False
        self.metadata[CHANGED] = list(changes)
        return True

    def note_again(self) -> None:
        """The metadata as they are now into a finished output that was begun with others."""
        from lcv_core.image_io import rewrite_sequence_metadata
        from lcv_core.video_io import rewrite_metadata

        if self.kind == "video":
            rewrite_metadata(self.path, self.metadata)
        elif self.kind == "png":
            rewrite_sequence_metadata(self.path, self.metadata)

    @property
    def partial(self) -> Path:
        return beside(self.path, PARTIAL)

    @property
    def segments(self) -> Path:
        return beside(self.path, SEGMENTS)

    def tidy(self) -> None:
        """Remove what an earlier run of this output left when it was killed."""
        remove_leftovers(self.path)
        remove_leftovers(self.partial)


def numbered(path: Path, index: int, total: int) -> Path:
    """The path of one of several outputs: name-1.mp4, name-2.mp4, ..."""
    return path if total == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")


def beside(path: Path, suffix: str) -> Path:
    """A name next to an output for unfinished work."""
    return path.with_name(path.name + suffix)


def kind_of(path: Path) -> Kind:
    """By the suffix; a name without one is a folder of PNG frames. InputError for what cannot be written."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_FORMATS or suffix == ".safetensors":
        if path.is_dir():
            raise InputError(f"{path} is a folder; choose the name of a file")
        return "video" if suffix in VIDEO_FORMATS else "latents"
    if path.is_dir():
        return "png"
    if suffix == "":
        if path.exists():
            raise InputError(f"{path} is a file without extension; add .mp4, or name a folder for PNG frames")
        return "png"
    stem = path.with_suffix("").name
    raise InputError(
        f"cannot write {suffix} files; use {stem}.mp4 for video, {stem} for a folder of PNG frames, or"
        f" {stem}.safetensors for latents"
    )


def check_place(path: Path, job: Job) -> Path:
    """An output path that a job can be written to, whatever is there by now; InputError before any long work."""
    path = path.expanduser()
    if path.name in ("", ".."):
        path = path.resolve()
    kind = kind_of(path)
    if kind == "latents" and job.task == "refine":
        raise InputError("refine writes video or PNG frames, not latents; choose FILE.mp4 or a folder")
    if kind == "latents" and job.task == "long" and job.handover != "latents":
        raise InputError("separate segments have no common latents; write video or PNG, or use --handover latents")
    prepare_target(numbered(path, 0, job.total))
    return path


def next_free(job: Job, *, any_seed: bool, free: frozenset[str] = frozenset()) -> Path:
    """outputs/TASK-0001.mp4 or the first number that is not taken, or where unfinished work of this job waits."""
    folder, number = Path("outputs"), 1
    while True:
        path = folder / f"{job.task}-{number:04d}.mp4"
        names = [numbered(path, i, job.total) for i in range(job.total)]
        exist = [name.exists() for name in names]
        seed = unfinished_seed(job, path, free)
        if seed is not None and not all(exist) and (any_seed or seed == job.seed):
            return path
        work = [beside(name, suffix) for name in names for suffix in (PARTIAL, SEGMENTS)]
        if not path.exists() and not any(exist) and not any(file.exists() for file in work):
            return path
        number += 1


def unfinished_seed(job: Job, path: Path, free: frozenset[str] = frozenset()) -> int | None:
    """The seed of unfinished work at an output path that differs from this job in nothing else but `free` fields."""
    found = _unfinished(job, path, free)
    return None if found is None else found[0].seed - found[1]


def unfinished_job(job: Job, path: Path, free: frozenset[str]) -> Job | None:
    """Unfinished work of this job at an output path, whatever its `free` fields."""
    found = _unfinished(job, path, free)
    return found[0] if found is not None and found[0].seed - found[1] == job.seed else None


def _unfinished(job: Job, path: Path, free: frozenset[str]) -> tuple[Job, int] | None:
    """Unfinished work that differs from this job in seed and `free` fields alone, and which output it is of."""
    same = {name: getattr(job, name) for name in free}
    for index in range(job.total):
        place = numbered(path, index, job.total)
        found = _job_in(beside(place, SEGMENTS if job.by_segments else PARTIAL))
        if found is None and job.total > 1:
            found = _finished_job(place)
        if found is not None and dataclasses.replace(found, seed=0, **same).key() == _without_seed(job, index):
            return found, index
    return None


def _without_seed(job: Job, index: int) -> str:
    return dataclasses.replace(job.video(index), seed=0).key()


def _job_in(work: Path) -> Job | None:
    note = read_note(work)
    try:
        return Job.from_metadata(json.loads(note), work) if note else None
    except ValueError:  # InputError too: whatever it is, it is not this job
        return None


def unfinished_changes(work: Path, job: Job) -> Changes:
    """What ran otherwise than the job says in unfinished work of this job."""
    found, note = _job_in(work), read_note(work)
    return changes_in(json.loads(note)) if note and found is not None and found.key() == job.key() else []


def changes_in(settings: Any) -> Changes:
    """The changes in an output's settings, those that can be read."""
    found = settings.get(CHANGED) if isinstance(settings, dict) else None
    return [change for change in found if _is_change(change)] if isinstance(found, list) else []


def _is_change(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), dict) for name in ("from", "to"))


def changed_line(settings: Any, file: Path) -> str | None:
    """For who repeats an output: what it was made with in the end; None where that is what its job says."""
    parts = [
        f"{name} {change['from'].get(name)} became {value} in {change.get('stage')} {change.get('where', '')}".rstrip()
        for change in changes_in(settings)
        for name, value in change["to"].items()
    ]
    if not parts:
        return None
    return f"{file} ran out of memory while it was made ({'; '.join(parts)}); it is repeated as it was begun"


def _finished_job(path: Path) -> Job | None:
    try:
        return Job.from_metadata(read_settings(path), path) if path.exists() else None
    except InputError:
        return None


def finished_outputs(job: Job, path: Path) -> set[int]:
    """Which of several outputs are there already, made by this very job."""
    if job.total == 1:
        return set()
    found = {i: _finished_job(numbered(path, i, job.total)) for i in range(job.total)}
    return {i for i, other in found.items() if other and other.output_key() == job.video(i).output_key()}


def check_free(job: Job, path: Path, *, overwrite: bool) -> set[int]:
    """The outputs to make; InputError when there is something at one of their names that is not of this job."""
    finished = finished_outputs(job, path)
    if len(finished) == job.total:
        finished = set()  # nothing is unfinished, so this is not a resumed run
    todo = set(range(job.total)) - finished
    for index in sorted(todo):
        place = numbered(path, index, job.total)
        taken = any(place.iterdir()) if place.is_dir() else place.exists()
        if taken and not overwrite:
            raise InputError(f"{place} exists; add --overwrite to replace it, or choose another --output")
    return todo


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in an output: video, latents, PNG, or a folder of PNGs. InputError where there are none."""
    from lcv_core.video_io import read_metadata

    if file.suffix == ".safetensors" and not file.is_dir():
        data = _latents_settings(file)
    else:
        data = read_metadata(file)
        if data is None and file.suffix == ".png":  # of a sequence the first frame has them
            data = read_metadata(file.parent)
    if data is None:
        raise InputError(f"{file} carries no settings; only files made by lcv do")
    return data


def _latents_settings(file: Path) -> dict[str, Any] | None:
    try:
        with safe_open(require_file(file, "a latents"), "np") as tensors:
            text = (tensors.metadata() or {}).get(SETTINGS_KEY)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or not a safetensors file ({error})") from None
    return settings_from_json(text, file) if text else None
