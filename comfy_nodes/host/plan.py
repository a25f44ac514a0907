"""The memory plan of a job on this machine, with the weights as they are and the memory that ComfyUI can give it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from lcv_core.config import BSAConfig, Native, TextConfig, VAEConfig
from lcv_core.pipelines.base import refined_size
from lcv_core.planning import Job, Plan, Refine, Stage, advice, make_plan, size_text, verdict
from lcv_core.planning.job import ITEMSIZE
from lcv_core.shapes import latent_shape, token_grid
from lcv_core.weights.checkpoint import Checkpoint, open_text_encoder, open_vae

from .native import WEIGHT_COPIES, checkpoint_of, native_of, planned_device, require_longcat, writes_scores
from .sampling import bsa_of

_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8_e4m3fn", torch.float8_e5m2: "fp8_e5m2",
}  # fmt: skip


def describe_job(
    model: Any, *, width: int, height: int, num_frames: int, num_cond_frames: int, batch_size: int, sparsity: float
) -> str:
    """The plan as text: what every stage needs and whether it fits, and which settings would.

    0 stands for the model's own sizes and counts, sparsity 0 for what is set on the model. InputError for sizes that it
    cannot make.
    """
    native = native_of(model)
    num_frames = num_frames or native.num_frames
    given = num_cond_frames or (native.num_cond_frames if native.num_cond_frames < num_frames else 0)
    height, width = height or native.height, width or native.width
    job = replace(
        _kept(model), height=height, width=width, num_frames=num_frames, num_cond_frames=given, batch_size=batch_size,
        bsa=BSAConfig(sparsity=sparsity) if sparsity else bsa_of(model), refine=_refine(native, height, width),
    )  # fmt: skip
    plan, memory = _plan(model, job), Memory.of(model)
    others = {}
    if given and not num_cond_frames:
        others["sampling from text alone"] = _plan(model, replace(job, num_cond_frames=0)).stage("sampling")
    if num_frames <= native.num_frames:
        others["refine sampling of a longer video"] = _plan(model, _longer(job)).stage("refine sampling")
    parts = (_heading(plan), _stages(plan, memory, others), _settings(plan, memory))
    return "\n\n".join("\n".join(lines) for lines in parts)


@dataclass(frozen=True)
class Memory:
    """Bytes of the device that ComfyUI samples on, and of system memory. free: for this job, what ComfyUI itself has
    there and would put away counted as free."""

    name: str
    total: int
    free: int
    ram: int

    @classmethod
    def of(cls, model: Any) -> Memory:
        management, cpu = comfy.model_management, torch.device("cpu")
        device, ram = management.get_torch_device(), management.get_total_memory(cpu)
        free = management.get_free_memory(device)
        if planned_device() == "cpu":
            # The loader has put the weights there already.
            return cls("system memory", ram, int(free + model.model_size()), ram)
        ours = sum(loaded.loaded_size() for loaded in management.loaded_models() if loaded.load_device == device)
        free = max(0, free + ours - management.extra_reserved_memory())
        name = management.get_torch_device_name(device).split(" : ")[0]  # behind it is the allocator's
        return cls(name, management.get_total_memory(device), int(free), ram)


def _kept(model: Any) -> Job:
    """How ComfyUI keeps weights and activations of this MODEL and of what belongs to it."""
    management, network = comfy.model_management, require_longcat(model).diffusion_model
    vae_dtype = management.vae_dtype(management.vae_device(), [torch.bfloat16, torch.float16, torch.float32])
    layer = network.blocks[0].ffn.w1
    kind = getattr(layer, "kind", None)  # of a quantised weight, whose dtype says nothing
    weight = _DTYPES.get(layer.weight.dtype, "bf16") if kind is None else kind.lower()
    return Job(
        weight_dtype=weight if weight in ITEMSIZE else "q8_0", compute_dtype=_DTYPES[network.compute_dtype],
        vae_dtype=_DTYPES[vae_dtype], adapters="merged", weight_copies=WEIGHT_COPIES, device=planned_device(),
        cache_storage=network.cache_storage, cache_place=network.cache_place,
    )  # fmt: skip


def _refine(native: Native, height: int, width: int) -> Refine:
    """As the Refine node does it when it is told nothing."""
    size = refined_size(native, height, width)
    return Refine(*size, window=native.num_frames, overlap=native.num_cond_frames)


def _longer(job: Job) -> Job:
    """A job whose refinement takes two windows as long as the clip is now."""
    assert job.refine is not None
    window, overlap = job.num_frames, min(job.refine.overlap, job.num_frames // 2)
    return replace(job, num_frames=window + 4, refine=replace(job.refine, window=window, overlap=overlap))


def _plan(model: Any, job: Job) -> Plan:
    vae, text = _part_configs(checkpoint_of(model))
    if text != TextConfig():
        job = replace(job, text_dtype="fp32")  # small encoders are kept as they are stored
    return make_plan(job, require_longcat(model).diffusion_model.config, vae, text, dit_weights=model.model_size())


def _part_configs(checkpoint: Checkpoint | None) -> tuple[VAEConfig, TextConfig]:
    """Of the VAE and text encoder beside the transformer; where there are none, of Wan 2.1's and umT5-XXL."""
    vae = None if checkpoint is None or checkpoint.vae is None else open_vae(checkpoint.vae)[0]
    text = None if checkpoint is None or checkpoint.text_encoder is None else open_text_encoder(checkpoint.text_encoder)
    return vae or VAEConfig(), text[0] if text else TextConfig()


def _heading(plan: Plan) -> Iterator[str]:
    job, config = plan.job, plan.models.dit
    latents = latent_shape(job.num_frames, job.height, job.width)[1:]
    tokens = " x ".join(map(str, token_grid(latents, config.patch_size)))
    videos = "" if job.batch_size == 1 else f", {job.batch_size} videos at once"
    yield f"{job.width} x {job.height}, {job.num_frames} frames{videos}: {latents[0]} latent frames, {tokens} tokens"


def _stages(plan: Plan, memory: Memory, others: dict[str, Stage]) -> Iterator[str]:
    """A line for each stage, and one for each other way to do one."""
    yield f"{memory.name}: {size_text(memory.total)}, {size_text(memory.free)} of it free for this job"
    for stage in plan.stages:
        given = f" from {plan.job.num_cond_frames} given frames" if stage.name == "sampling" and stage.kv_cache else ""
        yield _stage(stage.name + given, stage, plan, memory)
    for name, stage in others.items():
        yield _stage(name, stage, plan, memory)


def _stage(name: str, stage: Stage, plan: Plan, memory: Memory) -> str:
    parts = {"weights": stage.weights, "activations": stage.activations, "KV cache": stage.kv_cache}
    listed = ", ".join(f"{part} {size_text(size)}" for part, size in parts.items() if size)
    return f"{name}: {size_text(stage.total)} ({listed}), {verdict(stage, memory.free, plan.job.device)}"


def _settings(plan: Plan, memory: Memory) -> Iterator[str]:
    yield "Settings:"
    yield from advice(plan, memory.free, memory.ram)
    if plan.job.device == "gpu" and plan.peak > memory.free:
        yield "ComfyUI moves weights that do not fit to system memory by itself: slower, the result is the same."
    if any("decode" in stage.name and stage.total > memory.free for stage in plan.stages):
        yield "VAE Decode (Tiled) in place of VAE Decode needs the least."
    if writes_scores():
        yield (
            "The attention that ComfyUI runs here needs more than that, as much as is free; start it with"
            " --use-pytorch-cross-attention"
        )
