"""A job of the command line as the planner sees it, and the settings that the plan chooses for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcv_core.cli.job import Job
from lcv_core.config import BSAConfig, DiTConfig, Native, TextConfig, VAEConfig
from lcv_core.pipelines.base import REFINE_DEFAULT_STEPS, SCHEDULE_DEFAULTS, native_size, refined_size
from lcv_core.planning import Job as PlannedJob
from lcv_core.planning import Refine
from lcv_core.planning.choose import QUALITY, Choice, Planner
from lcv_core.planning.machine import Machine
from lcv_core.planning.plan import Models
from lcv_core.planning.seconds import Work
from lcv_core.planning.settings import Settings, sentence
from lcv_core.refinement import plan_windows
from lcv_core.schedule import base, refine, with_tail
from lcv_core.shapes import TIME_FACTOR, floor_frames
from lcv_core.weights.checkpoint import Checkpoint, open_text_encoder, open_vae

_DTYPES: dict[torch.dtype, Any] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_GB = 1e9  # bytes; of the Job's `resident`, which is in bytes in Settings
# The Job's fields by the names of Settings that are called otherwise there.
_FIELDS = {"cache_storage": "kv_cache_storage", "cache_place": "kv_cache_place"}


@dataclass(frozen=True)
class Known:
    """What is known of a checkpoint without its weights. stored_bytes: of a transformer that is quantised in its file;
    None: it is not. The default is LongCat-Video as released."""

    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    native: Native = dataclasses.field(default_factory=Native)
    stored_bytes: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Known:
        vae = open_vae(checkpoint.require("vae"))[0]
        text = open_text_encoder(checkpoint.require("text_encoder"))[0]
        return cls(checkpoint.dit_config, vae, text, checkpoint.native, _stored_bytes(checkpoint))


def _stored_bytes(checkpoint: Checkpoint) -> int | None:
    """Bytes of the transformer's files where its weights are quantised in them."""
    tensors, path = checkpoint.dit_tensors, checkpoint.require("dit")
    if not any(kind for name in tensors.keys() for kind in tensors.kinds(name)):  # noqa: SIM118
        return None
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def make_planner(
    job: Job, known: Known, machine: Machine, *, dtype: torch.dtype, source: tuple[int, int] | None = None,
    source_frames: int | None = None, free: frozenset[str] = frozenset(), sparse: Any = None,
) -> Planner:  # fmt: skip
    """source, source_frames: (height, width) and frames of the picture or clip that the job starts from. free: fields
    of the job that may be chosen; the others are fixed as the job has them. sparse: see `planning.Job`."""
    name = _DTYPES[dtype]
    quantised = job.weights == "stored" and known.stored_bytes is not None
    models = Models(known.dit, known.vae, known.text, known.stored_bytes if quantised else None)
    planned = PlannedJob(
        compute_dtype=name, text_dtype=name, vae_dtype=name, weight_dtype="int8" if quantised else name,
        device=machine.device, together=True, keeps_frames=job.by_segments, kv_cache=job.kv_cache, sparse=sparse,
        extra_weights=_lora_bytes(job),
        bsa=bsa_of(job, known.dit) if job.attention == "bsa" else None, **_shape(job, known, source, source_frames),
    )  # fmt: skip
    forms = QUALITY if known.stored_bytes is None else ("plain", "stored")
    if known.stored_bytes is not None and not quantised:
        models = dataclasses.replace(models, dit_weights=None)
    return Planner(planned, models, machine, _work(job, known, source_frames), _fixed(job, free), forms)


def bsa_of(job: Job, config: DiTConfig) -> BSAConfig:
    """Block sparse attention as the model has it, and what the job says of it."""
    sparsity = config.bsa.sparsity if job.sparsity is None else job.sparsity
    return dataclasses.replace(config.bsa, sparsity=sparsity, eight_bits=job.sparse_8bit)


def _fixed(job: Job, free: frozenset[str]) -> dict[str, Any]:
    """The settings that stay, by the names of Settings."""
    now = dataclasses.asdict(settings_of(job))
    del now["text_device"]
    return {name: value for name, value in now.items() if _FIELDS.get(name, name) not in free}


def _lora_bytes(job: Job) -> int:
    return sum(Path(lora.path).stat().st_size for lora in job.loras if Path(lora.path).is_file())


def _shape(job: Job, known: Known, source: tuple[int, int] | None, frames: int | None) -> dict[str, Any]:
    """Sizes and counts."""
    native = known.native
    own = (native.height, native.width) if source is None else native_size(native, *source)
    if job.task == "refine":
        return _refined(job, known, own if source is None else source, frames)
    given = {"t2v": 0, "i2v": 1}.get(job.task, job.num_cond_frames or native.num_cond_frames)
    if job.task == "long" and job.segments == 1 and job.clip is None:
        given = 0 if job.image is None else 1
    return {
        "height": job.height or own[0], "width": job.width or own[1], "num_frames": job.num_frames or native.num_frames,
        "num_cond_frames": given, "guidance": job.cfg_mode if is_guided(job) else "off", "schedule": job.schedule,
        **_handed_over(job, given),
    }  # fmt: skip


def _handed_over(job: Job, given: int) -> dict[str, Any]:
    """Where segments hand over latents, only what the first starts from is encoded."""
    if job.task != "long" or job.handover != "latents":
        return {}
    first = given if job.clip is not None else 0 if job.image is None else 1
    return {"encoded_frames": first, "decoder_waits": job.segments > 1}


def _refined(job: Job, known: Known, source: tuple[int, int], frames: int | None) -> dict[str, Any]:
    native = known.native
    height, width = refined_size(native, *source)
    window = job.window or native.num_frames
    total = window if frames is None else frames
    # A condition makes the first window like those that go on from another.
    several = total > window or job.image is not None or job.cond_video is not None
    count = floor_frames(min(total, window) - 1) + TIME_FACTOR if min(total, window) > 1 else 1
    bsa = bsa_of(job, known.dit) if job.refine_attention == "sparse" else None
    refine = Refine(
        job.height or height, job.width or width, window=min(window, total),
        overlap=min(native.num_cond_frames, window // 2) if several else 0, spatial_only=job.spatial_only, bsa=bsa,
    )  # fmt: skip
    return {
        "num_frames": count + TIME_FACTOR if several else count, "refine": refine, "refine_only": True,
        "guidance": "off",
    }  # fmt: skip


def is_guided(job: Job) -> bool:
    """Whether the job reads its negative prompt. Refining does not: its expert was trained without guidance."""
    scale = SCHEDULE_DEFAULTS[job.schedule][1] if job.guidance_scale is None else job.guidance_scale
    return job.task != "refine" and scale > 1.0


def _work(job: Job, known: Known, frames: int | None) -> Work:
    steps = job.num_steps or SCHEDULE_DEFAULTS[job.schedule][0]
    prompts = len(job.prompts) + is_guided(job)
    if job.task == "refine":
        window = job.window or known.native.num_frames
        overlap = min(known.native.num_cond_frames, window // 2)
        windows = len(plan_windows(window if frames is None else frames, window, overlap))
        levels = refine(job.num_steps or REFINE_DEFAULT_STEPS, job.t_thresh)
        return Work(refine_steps=job.refine_steps or len(levels) - 1, prompts=prompts, windows=windows)
    if job.task in ("continue", "long") and job.uniform_tail and job.schedule == "base":
        steps = len(with_tail(base(steps))) - 1
    return Work(steps, prompts=prompts, clips=job.segments if job.task == "long" else job.total)


def with_settings(job: Job, settings: Settings) -> Job:
    """The job with what was chosen in its fields."""
    values = as_fields(dataclasses.asdict(settings))
    del values["text_device"]
    if settings.window is None:
        del values["window"]
    return dataclasses.replace(job, **values)


def as_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name as the fields of a Job, which has none for the text's device."""
    values = {_FIELDS.get(name, name): value for name, value in settings.items()}
    return values | ({"resident": values["resident"] / _GB} if "resident" in values else {})


def settings_of(job: Job) -> Settings:
    """What the job has in its fields."""
    names = [f.name for f in dataclasses.fields(Settings) if f.name != "text_device"]
    values: dict[str, Any] = {name: getattr(job, _FIELDS.get(name, name)) for name in names}
    values["resident"] = round(job.resident * _GB)
    return Settings(**values)


def chosen_line(choice: Choice, fixed: Mapping[str, Any]) -> str | None:
    """What a plan chose that is not what happens anyway, in one line; None where that is nothing."""
    first = Settings(**{"cfg_mode": choice.settings.cfg_mode, **fixed})
    changes = choice.settings.changed_from(first)
    resident = changes.pop("resident", 0)
    parts = [f"to fit into memory: {sentence(changes)}"] if changes else []
    parts += [f"for speed: {sentence({'resident': resident})}"] if resident else []
    return f"{'; '.join(parts)} (--memory given leaves that to you)" if parts else None
