"""A job: everything that decides what a run computes, as plain data that travels inside its output."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from lcv_core import __version__
from lcv_core.errors import InputError
from lcv_core.names import (
    CfgMode,
    CfgScope,
    Fit,
    Handover,
    Joint,
    Posterior,
    Precision,
    RefineAttention,
    Schedule,
    Task,
    TimestepPrecision,
)
from lcv_core.partial import fingerprint

FORMAT = 1


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, 16 hex digits."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class InputFile:
    """A file the job reads: its path as the user gave it, and the hash of its content."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path | None) -> Self | None:
        return None if path is None else cls(str(path), file_hash(path))

    def resolve(self) -> Path:
        """The path, checked to hold what it held when the job was first run."""
        path = Path(self.path)
        if not path.is_file():
            raise InputError(f"the job read {path}, which is not there; put it back to repeat the job")
        if file_hash(path) != self.sha256:
            raise InputError(f"{path} is not the file the job was made with (its content has changed)")
        return path


@dataclass(frozen=True)
class Lora:
    path: str
    strength: float
    sha256: str


@dataclass(frozen=True)
class Job:
    """What is computed, without where it goes. Fields are None where the checkpoint's native value is meant."""

    task: Task
    model: str
    model_hash: str
    prompts: list[str]
    seed: int
    negative_prompt: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    loras: list[Lora] = field(default_factory=list)
    image: InputFile | None = None
    clip: InputFile | None = None
    cond_video: InputFile | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_cond_frames: int | None = None
    num_segments: int | None = None
    num_videos: int = 1
    num_steps: int | None = None
    guidance_scale: float | None = None
    schedule: Schedule = "base"
    uniform_tail: bool = True
    kv_cache: bool = True
    handover: Handover = "frames"
    keep: Literal["all", "new"] = "all"
    fit: Fit = "crop"
    posterior: Posterior = "mode"
    cfg_scope: CfgScope = "noise"
    cfg_mode: CfgMode = "sequential"
    t_thresh: float = 0.5
    refine_steps: int | None = None
    spatial_only: bool = False
    time_mapping: Literal["auto", "stretch", "exact"] = "auto"
    joint: Joint = "blend"
    window: int | None = None
    attention: str = "auto"
    refine_attention: RefineAttention = "sparse"
    dtype: Precision = "auto"
    timestep_precision: TimestepPrecision = "model"
    tile: int = 0
    frame_rate: float | None = None
    crf: float | None = None

    def to_metadata(self) -> dict[str, Any]:
        """What goes into the container: `Job.from_metadata` gives the job back."""
        return {"format": FORMAT, "version": __version__, "job": dataclasses.asdict(self)}

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any], source: Path) -> Self:
        """The job in a file's metadata; InputError when there is none or it is of a later format."""
        job = data.get("job")
        if not isinstance(job, Mapping) or data.get("format") != FORMAT:
            raise InputError(f"{source} holds no job this version can repeat (its format is {data.get('format')!r})")
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in job.items() if k in known}
        for name in ("image", "clip", "cond_video"):
            values[name] = InputFile(**values[name]) if values.get(name) else None
        values["loras"] = [Lora(**entry) for entry in values.get("loras", [])]
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"{source} holds an incomplete job: {error}") from None

    def key(self) -> str:
        """Identifies unfinished work of this job: same key, same numbers."""
        ignored = {"frame_rate", "crf", "keep", "model", "vae", "text_encoder", "tokenizer"}
        data = {k: v for k, v in dataclasses.asdict(self).items() if k not in ignored}
        return fingerprint(data)
