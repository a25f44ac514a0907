"""A job: everything that decides what a run computes, as plain data that travels inside its output.

Nothing here imports torch, so that a wrong option is told at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from lcv_core import __version__
from lcv_core.errors import InputError
from lcv_core.files import require_file
from lcv_core.names import (
    DEFAULT_HANDOVER,
    CachePlace,
    CacheStorage,
    CfgMode,
    CfgScope,
    Compile,
    Fit,
    Handover,
    Joint,
    Posterior,
    Precision,
    RefineAttention,
    Schedule,
    Streaming,
    Task,
    TimestepPrecision,
    Weights,
)
from lcv_core.partial import fingerprint
from lcv_core.shapes import SIZE_MULTIPLE, TIME_FACTOR, check_cond_frames, check_frames, check_size

FORMAT = 1
MAX_SEED = 2**64 - 1
TILE_MULTIPLE = 32  # a tile and its stride of three quarters are whole latent cells

Keep = Literal["all", "new"]
TimeMappingOrAuto = Literal["auto", "stretch", "exact"]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, 16 hex digits."""
    require_file(path, "a")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _unchanged(name: str, sha256: str) -> Path:
    """The path, checked to hold what it held when the job was first run."""
    path = Path(name)
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise InputError(f"the job read {path}, which is not there{where}; put it back to repeat the job")
    if file_hash(path) != sha256:
        raise InputError(f"{path} is not the file the job was made with (its content has changed)")
    return path


@dataclass(frozen=True)
class InputFile:
    """A file the job reads: its path as the user gave it, and the hash of its content."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path | None) -> Self | None:
        return None if path is None else cls(str(path), file_hash(path))

    def resolve(self) -> Path:
        return _unchanged(self.path, self.sha256)


@dataclass(frozen=True)
class Lora:
    """An adapter file of the user's, with its strength."""

    path: str
    strength: float
    sha256: str

    def resolve(self) -> Path:
        return _unchanged(self.path, self.sha256)


@dataclass(frozen=True)
class Job:
    """What is computed, without where it goes. Fields are None where the checkpoint's native value is meant.

    stream, resident: where the transformer's blocks wait, and GB of them that stay on the device; the same numbers.
    model_hash: of the transformer. part_hashes: of whatever else of the checkpoint decides the numbers.
    """

    task: Task
    model: str
    prompts: list[str]
    seed: int
    model_hash: str = ""
    part_hashes: dict[str, str] = field(default_factory=dict)
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
    handover: Handover = DEFAULT_HANDOVER
    keep: Keep = "all"
    fit: Fit = "crop"
    posterior: Posterior = "mode"
    cfg_scope: CfgScope = "noise"
    cfg_mode: CfgMode = "sequential"
    cfg_interval: list[float] | None = None
    step_cache: float = 0.0
    t_thresh: float = 0.5
    refine_steps: int | None = None
    spatial_only: bool = False
    time_mapping: TimeMappingOrAuto = "auto"
    joint: Joint = "blend"
    window: int | None = None
    attention: str = "auto"
    sparsity: float | None = None
    sparse_8bit: bool = False
    refine_attention: RefineAttention = "sparse"
    dtype: Precision = "auto"
    weights: Weights = "plain"
    stream: Streaming = "off"
    resident: float = 0.0
    kv_cache_storage: CacheStorage = "model"
    kv_cache_place: CachePlace = "device"
    kernels: str = "auto"
    timestep_precision: TimestepPrecision = "model"
    compile: Compile = "off"
    tile: int = 0
    frame_rate: float | None = None
    crf: float | None = None

    @property
    def by_segments(self) -> bool:
        """Whether it is made and resumed segment by segment; else it is one clip, or several."""
        return self.task in ("long", "refine")

    @property
    def total(self) -> int:
        """How many outputs it makes."""
        return 1 if self.by_segments else len(self.prompts) * self.num_videos

    @property
    def segments(self) -> int:
        """Segments of a long video."""
        return len(self.prompts) if self.num_segments is None else self.num_segments

    @property
    def interval(self) -> tuple[float, float]:
        """Sigmas of the steps that are guided: all where none are named."""
        if self.cfg_interval is None:
            return 0.0, 1.0
        if len(self.cfg_interval) != 2:
            raise InputError(f"--cfg-interval takes two sigmas, got {self.cfg_interval}; try 0.2 0.9")
        low, high = self.cfg_interval
        return low, high

    def video(self, index: int) -> Self:
        """The job that makes output `index` alone."""
        if self.total == 1:
            return self
        prompt = self.prompts[index // self.num_videos]
        return dataclasses.replace(self, prompts=[prompt], seed=self.seed + index, num_videos=1)

    def check(self) -> None:
        """InputError for what is wrong whatever the model and the files are."""
        if not self.prompts:
            raise InputError("there is no prompt; give one with --prompt (-p), it may be empty")
        if not 0 <= self.seed <= self.seed + self.total - 1 <= MAX_SEED:
            raise InputError(f"--seed must be from 0 to {MAX_SEED}, got {self.seed}")
        self._check_sizes()
        self._check_numbers()
        if self.task == "long" and len(self.prompts) not in (1, self.segments):
            raise InputError(f"{len(self.prompts)} prompts for {self.segments} segments; give one, or one per segment")

    def _check_sizes(self) -> None:
        check_size(
            SIZE_MULTIPLE if self.height is None else self.height, SIZE_MULTIPLE if self.width is None else self.width
        )
        if self.num_frames is not None:
            check_frames(self.num_frames)
            if self.task == "i2v" and self.num_frames == 1:
                raise InputError("--frames counts the picture too, so it must be at least 5, got 1")
        if self.num_cond_frames is None:
            return
        if self.task == "refine":
            if self.num_cond_frames < 1 or self.cond_video is None:
                raise InputError("--cond-frames counts frames of --video: it must be at least 1 and needs --video")
        else:
            enough = self.num_cond_frames + TIME_FACTOR
            check_cond_frames(self.num_cond_frames, enough if self.num_frames is None else self.num_frames, enough)

    def _check_numbers(self) -> None:
        for name, value, low in (
            ("--steps", self.num_steps, 1), ("--steps", self.refine_steps, 1), ("--segments", self.num_segments, 1),
            ("--num-videos", self.num_videos, 1), ("--window", self.window, 5), ("--guidance", self.guidance_scale, 0),
        ):  # fmt: skip
            if value is not None and not (math.isfinite(value) and value >= low):
                raise InputError(f"{name} must be at least {low}, got {value}")
        if not 0.0 < self.t_thresh <= 1.0:
            raise InputError(f"--t-thresh must be in (0, 1], got {self.t_thresh}; the released refiner uses 0.5")
        if self.sparsity is not None:
            if not 0 <= self.sparsity < 1:
                raise InputError(f"--sparsity must be from 0 to below 1, got {self.sparsity}; try 0.875")
            if self.attention != "bsa" and (self.task != "refine" or self.refine_attention == "dense"):
                raise InputError("--sparsity is of block sparse attention; ask for that with --attention bsa")
        if self.sparse_8bit and self.attention != "bsa" and (self.task != "refine" or self.refine_attention == "dense"):
            raise InputError("--sparse-8bit is of block sparse attention; ask for that with --attention bsa")
        if not 0 <= self.step_cache < 1:
            raise InputError(
                f"--step-cache is a relative error of the velocity, from 0 (off) to below 1, got {self.step_cache};"
                " try 0.05"
            )
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise InputError(f"--cfg-interval takes two sigmas, 0 <= low < high <= 1, got {low} {high}; try 0.2 0.9")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise InputError(f"--crf must be from 0 (best) to 51, got {self.crf}")
        if self.frame_rate is not None and not 0.1 <= self.frame_rate <= 1000:
            raise InputError(f"--frame-rate must be from 0.1 to 1000, got {self.frame_rate}")
        if not 0 <= self.resident < math.inf:
            raise InputError(f"--resident must be 0 or more GB, got {self.resident}")
        if self.tile < 0 or self.tile % TILE_MULTIPLE:
            near = max(1, round(self.tile / TILE_MULTIPLE)) * TILE_MULTIPLE
            raise InputError(f"--tile must be a multiple of {TILE_MULTIPLE}, got {self.tile}; try {near}")
        for lora in self.loras:
            if not math.isfinite(lora.strength):
                raise InputError(f"the strength of --lora {lora.path} must be a number, got {lora.strength}")

    def to_metadata(self) -> dict[str, Any]:
        """What goes into the container: `Job.from_metadata` gives the job back."""
        return {"format": FORMAT, "version": __version__, "job": dataclasses.asdict(self)}

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any], source: Path) -> Self:
        """The job in a file's metadata; InputError when there is none, it is damaged or of a later format."""
        stored = data.get("job")
        if not isinstance(stored, Mapping) or data.get("format") != FORMAT:
            raise InputError(f"{source} holds no job this version can repeat (its format is {data.get('format')!r})")
        try:
            values = _typed(cls, stored)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source} holds a damaged job ({error}); it cannot be repeated") from None
        return cls(**values)

    def key(self) -> str:
        """Identifies unfinished work of this job: same key, same numbers."""
        places = {"stream", "resident", "kv_cache_place"}  # the same numbers wherever things wait
        ignored = {"frame_rate", "crf", "keep", "model", "vae", "text_encoder", "tokenizer"} | places
        data = {k: v for k, v in dataclasses.asdict(self).items() if k not in ignored}
        for name in ("image", "clip", "cond_video"):  # what they hold counts, not where they are
            data[name] = data[name] and data[name]["sha256"]
        data["loras"] = [(lora.sha256, lora.strength) for lora in self.loras]
        return fingerprint(data)

    def output_key(self) -> str:
        """Identifies the finished output of this job."""
        return fingerprint({"key": self.key(), "frame_rate": self.frame_rate, "crf": self.crf, "keep": self.keep})


def _typed(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from JSON, each of its declared type; unknown names are left out."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    missing = [
        name
        for name, f in fields.items()
        if f.default is f.default_factory is dataclasses.MISSING and name not in stored
    ]
    if missing:
        raise KeyError(f"it lacks {', '.join(missing)}")
    return {name: _value(name, stored[name], hints[name]) for name in fields if name in stored}


def _value(name: str, value: Any, hint: Any) -> Any:
    """JSON as the type `hint`; ValueError when it is another."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in options:
            return None
        return _value(name, value, next(option for option in options if option is not type(None)))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return hint(**_typed(hint, value))
    if origin is list and isinstance(value, list):
        return [_value(name, item, options[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(name, item, options[1]) for key, item in value.items()}
    if origin is Literal:
        fits = value in options
    elif hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"{name} is {value!r}")
    return value
