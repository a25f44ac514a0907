"""How long the stages of a job may take: an estimate, to compare settings with and to plan a day by.

A stage takes the longest of what goes on at once, its operations over the rate at which they are done and the bytes
that are moved meanwhile over the bandwidth of what they pass through; and first the reading of its weights from disk.
The rate is the machine's peak times a share. Of the transformer's on a GPU it is 0.6: by this count the technical
report (arXiv 2510.22200: 50 steps at 480x832x93 in 341.5 s on one H800) reaches 0.62. The others are rounded
measurements of this repository, on a CPU and, of the VAE on a GPU, on an H200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcv_core.dit.pieces import layer_pieces
from lcv_core.planning.job import ITEMSIZE, Job
from lcv_core.planning.machine import Machine
from lcv_core.planning.plan import Models, Stage
from lcv_core.planning.text import text_parameters
from lcv_core.planning.vae import decode_flops, encode_flops
from lcv_core.shapes import SPACE_FACTOR, latent_shape, num_latents, token_grid
from lcv_core.text.encoder import MAX_LENGTH

_SHARE = {("gpu", "transformer"): 0.6, ("gpu", "vae"): 0.35, ("cpu", "transformer"): 0.8, ("cpu", "vae"): 0.5}
_STORED = 2  # bytes of a weight in the released files


@dataclass(frozen=True)
class Work:
    """How often the stages are done: denoising steps of the clip and of its refinement, prompts, clips (segments
    counted), and windows of the refinement."""

    steps: int = 50
    refine_steps: int = 5
    prompts: int = 2
    clips: int = 1
    windows: int = 1


def stage_seconds(stage: Stage, models: Models, job: Job, machine: Machine, work: Work) -> float:
    """Of all times that a stage of the plan is done."""
    if stage.name == "text encode":
        return _text(models, job, machine, work)
    refine = stage.name.startswith("refine ")
    times = work.windows if refine else work.clips
    if stage.name == "VAE encode" and job.encoded_frames is not None:
        times = 1  # before the first clip; the others are given latents
    latents = _latents(job, refine=refine)
    if "VAE" in stage.name:
        return times * _vae(stage.name, models, job, machine, latents)
    return _load(models, job, machine) + times * _sampling(models, job, machine, work, latents, refine=refine)


def _latents(job: Job, *, refine: bool) -> tuple[int, int, int]:
    if not refine:
        _, T, h, w = latent_shape(job.num_frames, job.height, job.width)
        return T, h, w
    assert job.refine is not None
    T = max(window.latents for window in job.refine.windows(job.num_frames))
    return T, job.refine.height // SPACE_FACTOR, job.refine.width // SPACE_FACTOR


def _text(models: Models, job: Job, machine: Machine, work: Work) -> float:
    config = models.text
    parameters = text_parameters(config)
    operations = 2.0 * (parameters - config.vocab_size * config.d_model) * MAX_LENGTH * work.prompts
    # A CPU beside a GPU is taken for one of 0.3 TFLOPS, which eight cores have.
    rate = 0.3e12 if job.text_device == "cpu" and machine.device == "gpu" else machine.speed.flops
    return operations / (rate * _SHARE[machine.device, "transformer"]) + parameters * _STORED / machine.speed.disk


def _vae(name: str, models: Models, job: Job, machine: Machine, latents: tuple[int, int, int]) -> float:
    count = encode_flops if name.endswith("encode") else decode_flops
    if name == "VAE encode":
        latents = (job.encoded_latents, *latents[1:])
    return count(models.vae, latents, job.tiling) / (machine.speed.flops * _SHARE[machine.device, "vae"])


def _load(models: Models, job: Job, machine: Machine) -> float:
    """Reading the transformer, whatever it becomes in memory; once for the sampling of a clip and of its refinement."""
    if job.stream == "disk":  # those that stay on the device; the others are read meanwhile
        return models.resident_blocks(job) * models.block(job) / machine.speed.disk
    whole = models.transformer_weights(job) / ITEMSIZE[job.weight_dtype] * _STORED
    return float(whole) / machine.speed.disk


def _sampling(
    models: Models, job: Job, machine: Machine, work: Work, latents: tuple[int, int, int], *, refine: bool
) -> float:
    config, speed = models.dit, machine.speed
    T, h, w = token_grid(latents, config.patch_size)
    cond = 0 if refine or not job.num_cond_frames else num_latents(job.num_cond_frames)
    tokens = (T - (cond if job.kv_cache else 0)) * h * w
    bsa = job.refine.bsa if refine and job.refine is not None else job.bsa
    kept = 1.0 if bsa is None or bsa.sparsity is None else 1.0 - bsa.sparsity
    matrices = config.depth * (8 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_dim)
    keys = T * h * w * kept + MAX_LENGTH
    operations = tokens * (2.0 * matrices + 4.0 * keys * config.hidden_size * config.depth)
    batch, branches = (1, 1) if refine else (job.batch_size, 1 if job.guidance == "off" else 2)
    forwards = (work.refine_steps if refine else work.steps) * branches * batch
    computing = operations / (speed.flops * _SHARE[machine.device, "transformer"])
    if job.copies:
        # A quantised weight is read and written out in bf16 for each piece of the sequence.
        pieces = layer_pieces("cpu" if machine.device == "cpu" else "cuda")
        computing += pieces * matrices * (ITEMSIZE[job.weight_dtype] + 2 * _STORED) / speed.memory
    moved = models.block(job) * (config.depth - models.resident_blocks(job)) if job.stream != "off" else 0
    moving = moved / (speed.disk if job.stream == "disk" else speed.link)
    if job.cache_place == "cpu" and machine.device == "gpu" and cond and job.kv_cache:
        moving += 4.0 * cond * h * w * config.hidden_size * config.depth / speed.link
    return forwards * math.fsum([max(computing, moving)])
