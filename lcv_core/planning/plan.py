"""The plan of a job: stage by stage the bytes of weights, activations and KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lcv_core.config import DiTConfig, TextConfig, VAEConfig
from lcv_core.errors import InputError
from lcv_core.planning.job import ITEMSIZE, SCALE_ITEMSIZE, SMALL_ITEMSIZE, Job, Refine
from lcv_core.planning.sampling import Sampling
from lcv_core.planning.sparse import Device
from lcv_core.planning.text import largest_text_weight, text_bytes, text_parameters
from lcv_core.planning.transformer import (
    FP32,
    AdapterName,
    adapter_bytes,
    dit_parameters,
    matrix_rows,
    outer_parameters,
    stored_adapter_bytes,
)
from lcv_core.planning.vae import decode_bytes, decoder_state_bytes, encode_bytes, vae_parameters
from lcv_core.shapes import SPACE_FACTOR, latent_shape, num_latents, num_pixel_frames
from lcv_core.vae.model import decoder_reach

_GAPS = 64 * 256  # bytes: of the alignment of up to 64 tensors in one buffer (offload.layout)
_STAGED = 2  # blocks in system memory on their way from disk: one that is read, one that is copied
STREAM_SLOTS = 2  # blocks on the device where they are streamed: the one that computes, and the next on its way


@dataclass(frozen=True)
class Stage:
    """Bytes that a stage needs on the device it runs on; `total` is its peak.

    ram: bytes of system memory that it needs besides, where the device is a GPU: blocks that wait for their turn, a KV
        cache kept there, text that is encoded there, a finished clip.
    """

    name: str
    weights: int
    activations: int
    kv_cache: int = 0
    ram: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.besides_weights

    @property
    def besides_weights(self) -> int:
        """What cannot be kept elsewhere."""
        return self.activations + self.kv_cache


@dataclass(frozen=True)
class Models:
    """The configurations of a checkpoint's parts. dit_weights: real bytes of the transformer; None: by the job's
    weight dtype."""

    dit: DiTConfig
    vae: VAEConfig
    text: TextConfig
    dit_weights: int | None = None

    def transformer_weights(self, job: Job) -> int:
        if self.dit_weights is not None:
            return self.dit_weights
        matrices, rest = dit_parameters(self.dit)
        itemsize = ITEMSIZE[job.weight_dtype]
        scales = matrix_rows(self.dit) * SCALE_ITEMSIZE.get(job.weight_dtype, 0)
        return math.ceil(matrices * itemsize) + scales + rest * math.ceil(max(itemsize, SMALL_ITEMSIZE))

    def outside_blocks(self, job: Job) -> int:
        """Bytes of the transformer that never wait: the embedders and the final layer."""
        return outer_parameters(self.dit) * math.ceil(max(ITEMSIZE[job.weight_dtype], SMALL_ITEMSIZE))

    def block(self, job: Job) -> int:
        """Bytes of one of its blocks, where it is streamed: the gaps between its tensors counted."""
        return math.ceil((self.transformer_weights(job) - self.outside_blocks(job)) / self.dit.depth) + _GAPS

    def resident_blocks(self, job: Job) -> int:
        """Whole blocks that stay on the device with streaming."""
        return 0 if job.stream == "off" else min(job.resident // self.block(job), self.dit.depth)

    def transformer_on_device(self, job: Job) -> int:
        """Bytes of the transformer on the device while it runs, and between two runs."""
        if job.stream == "off":
            return self.transformer_weights(job)
        resident = self.resident_blocks(job) * self.block(job)
        slots = min(self.dit.depth, STREAM_SLOTS) * self.block(job)
        return min(self.transformer_weights(job), self.outside_blocks(job) + resident + slots)

    def transformer_in_ram(self, job: Job) -> int:
        """Bytes of system memory that streaming takes: the blocks that wait, or those that are read from disk."""
        if job.stream == "off" or job.device == "cpu":
            return 0
        waiting = self.dit.depth - self.resident_blocks(job)
        return self.block(job) * (waiting if job.stream == "ram" else _STAGED)

    def ram(self, job: Job, others: int) -> int:
        """Bytes of system memory of a stage that has `others` there beside the transformer, or of loading this."""
        running = self.transformer_in_ram(job) + others + self.adapters_in_ram(job)
        if job.stream != "ram" or job.device == "cpu":
            return running
        return max(running, self.block(job) * (self.dit.depth + 1))  # all are there, and one is copied to its place

    def adapters_in_ram(self, job: Job) -> int:
        """Bytes of the adapters as stored, which stay in system memory; on a CPU they are counted where they work."""
        if job.device == "cpu" or not job.together or job.adapters != "runtime":
            return 0
        names: list[AdapterName] = ["distill"] if job.schedule == "distilled" and not job.refine_only else []
        if job.refine is not None:
            names.append("refinement")
        return job.extra_weights + sum(stored_adapter_bytes(self.dit, name) for name in names)

    def vae_weights(self, job: Job) -> int:
        return vae_parameters(self.vae) * ITEMSIZE[job.vae_dtype]


@dataclass(frozen=True)
class Plan:
    """What a job needs. Stages follow one another, and each needs its own part of the model alone."""

    job: Job
    models: Models
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> int:
        """Of the stage that needs most."""
        return max(stage.total for stage in self.stages)

    @property
    def weights(self) -> int:
        """All parts together, adapters not counted: what is needed where none of them is ever put away."""
        text = text_parameters(self.models.text) * ITEMSIZE[self.job.text_dtype]
        return self.models.transformer_weights(self.job) + text + self.models.vae_weights(self.job)

    def stage(self, name: str) -> Stage:
        """InputError where the job has no such stage."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise InputError(f"this job has no stage {name!r}; it has: {names}")


def make_plan(
    job: Job,
    dit: DiTConfig | None = None,
    vae: VAEConfig | None = None,
    text: TextConfig | None = None,
    *,
    dit_weights: int | None = None,
) -> Plan:
    """Peak bytes of every stage, from configurations alone; the default ones are LongCat-Video's.

    Stages, in this order: "text encode"; "VAE encode" where frames are given; "sampling"; "VAE decode"; and with
    `job.refine` the last three again, named "refine ...". Never less than what is alive at once; how much more is
    tested. Not counted: what the libraries of a GPU need for themselves, and what their allocator loses.
    dit_weights: real bytes of the transformer's weights, where they are known.
    Raises InputError for sizes that the model cannot make.
    """
    models = Models(dit or DiTConfig(), vae or VAEConfig(), text or TextConfig(), dit_weights)
    return plan_with(models, job)


def plan_with(models: Models, job: Job) -> Plan:
    """`make_plan` for models that are known."""
    stages = [_text_stage(models, job), *([] if job.refine_only else _clip_stages(models, job))]
    if job.refine is not None:
        stages += _refine_stages(models, job, job.refine)
    return Plan(job, models, tuple(stages))


def _text_stage(models: Models, job: Job) -> Stage:
    """Activations in fp32, for which weights are cast layer by layer, as ComfyUI does; others take less."""
    place: Device = "cpu" if job.text_device == "cpu" else job.device
    alive = text_bytes(models.text, batch=job.batch_size, itemsize=FP32, device=place)
    cast = max(1, job.weight_copies) * largest_text_weight(models.text) * FP32
    weights = text_parameters(models.text) * ITEMSIZE[job.text_dtype]
    if job.text_device == "cpu" and job.device != "cpu":
        return Stage("text encode", 0, 0, ram=weights + alive + cast)
    return Stage("text encode", weights, alive + cast)


def _clip_stages(models: Models, job: Job) -> Iterator[Stage]:
    _, T, h, w = latent_shape(job.num_frames, job.height, job.width)
    n_c = num_latents(job.num_cond_frames) if job.num_cond_frames else 0
    if job.encoded_latents:
        yield _encode_stage(models, job, "VAE encode", (job.encoded_latents, h, w), job.conditions)
    run = Sampling(
        (T, h, w), batch=job.samples, num_cond_latents=n_c, conditions=job.conditions, bsa=job.bsa,
        itemsize=ITEMSIZE[job.compute_dtype], weight_copies=job.copies, device=job.device, cached=job.kv_cache,
        cache_storage=job.cache_storage, cache_place=job.cache_place, sparse=job.sparse_kernels,
    )  # fmt: skip
    stage = _sampling_stage(models, job, "sampling", run, "distill" if job.schedule == "distilled" else None)
    yield _with_decoder(models, job, stage, (h, w)) if job.decoder_waits else stage
    yield _decode_stage(models, job, "VAE decode", (T, h, w), job.batch_size)


def _refine_stages(models: Models, job: Job, refine: Refine) -> Iterator[Stage]:
    """Of the kind of window that needs most to be sampled."""
    size = refine.height // SPACE_FACTOR, refine.width // SPACE_FACTOR
    windows = refine.windows(job.num_frames)
    latents = (max(window.latents for window in windows), *size)
    runs = [
        Sampling(
            (window.latents, *size), num_cond_latents=window.cond_latents, cached=refine.kv_cache, bsa=refine.bsa,
            itemsize=ITEMSIZE[job.compute_dtype], weight_copies=job.copies, device=job.device,
            cache_storage=job.cache_storage, cache_place=job.cache_place, sparse=job.sparse_kernels,
        )
        for window in windows
    ]  # fmt: skip
    yield _encode_stage(models, job, "refine VAE encode", latents, 1)
    samplings = [_sampling_stage(models, job, "refine sampling", run, "refinement") for run in runs]
    yield max(samplings, key=lambda stage: stage.total)
    yield _decode_stage(models, job, "refine VAE decode", latents, 1)


def _sampling_stage(models: Models, job: Job, name: str, run: Sampling, adapter: AdapterName | None) -> Stage:
    weights = models.transformer_on_device(job) + (models.vae_weights(job) if job.together else 0)
    if adapter is not None and job.adapters == "runtime":
        weights += adapter_bytes(models.dit, adapter, run.itemsize)
        run = replace(run, adapters=True)
    if job.extra_weights:
        weights += job.extra_weights
        run = replace(run, adapters=True)
    kept = run.kv_cache_kept(models.dit) if job.cache_place == "cpu" and job.device != "cpu" else 0
    return Stage(name, weights, run.activations(models.dit), run.kv_cache(models.dit), models.ram(job, kept))


def _with_decoder(models: Models, job: Job, stage: Stage, size: tuple[int, int]) -> Stage:
    """And what waits for the clip's latents meanwhile: the decoder's state, and the latents it can be made of anew."""
    state = decoder_state_bytes(models.vae, size, itemsize=ITEMSIZE[job.vae_dtype], tiling=job.tiling)
    waits = job.batch_size * (state + _seen_bytes(models.vae, decoder_reach(models.vae), size))
    if job.device == "cpu":
        return replace(stage, activations=stage.activations + waits)
    return replace(stage, ram=stage.ram + waits)


def _seen_bytes(vae: VAEConfig, frames: int, size: tuple[int, int]) -> int:
    return vae.z_dim * frames * math.prod(size) * FP32


def _encode_stage(models: Models, job: Job, name: str, latents: tuple[int, int, int], batch: int) -> Stage:
    alive = encode_bytes(
        models.vae, latents, batch=batch, itemsize=ITEMSIZE[job.vae_dtype], tiling=job.tiling, how=job.convolutions
    )
    return _vae_stage(models, job, name, alive, _pixel_bytes(latents, batch), whole=True)


def _decode_stage(models: Models, job: Job, name: str, latents: tuple[int, int, int], batch: int) -> Stage:
    alive = decode_bytes(
        models.vae, latents, batch=batch, itemsize=ITEMSIZE[job.vae_dtype], tiling=job.tiling, how=job.convolutions
    )
    waits = 0  # latents that the decoder can be made of anew, in system memory
    if job.together:
        frames, reach = latents[0], decoder_reach(models.vae)
        alive += batch * _seen_bytes(models.vae, 2 * frames, latents[1:])  # the clip's, and un-normalised
        kept = reach if job.decoder_waits else min(frames, reach)
        waits = batch * _seen_bytes(models.vae, kept, latents[1:])
    if job.device == "cpu":
        alive, waits = alive + waits, 0
    stage = _vae_stage(models, job, name, alive, _pixel_bytes(latents, batch), whole=job.keeps_frames)
    return replace(stage, ram=stage.ram + waits)


def _vae_stage(models: Models, job: Job, name: str, alive: int, pixels: int, *, whole: bool) -> Stage:
    """pixels: of the clip in fp32. whole: together with other parts it still is in system memory at once."""
    weights = models.vae_weights(job)
    if not job.together:
        return Stage(name, weights, alive + pixels)
    weights += models.transformer_on_device(job) + job.extra_weights
    # Pixels of other ranges, the picture that is resized, and what is handed to the next clip: copies of parts.
    clip = 2 * pixels if whole else 0
    if job.device == "cpu":
        return Stage(name, weights, alive + clip)
    return Stage(name, weights, alive, ram=models.ram(job, clip))


def _pixel_bytes(latents: tuple[int, int, int], batch: int) -> int:
    """The whole clip in fp32: some hosts have it on the device."""
    T, h, w = latents
    return batch * 3 * num_pixel_frames(T) * math.prod((h, w)) * SPACE_FACTOR**2 * FP32
