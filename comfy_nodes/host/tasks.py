"""Each job of a node as one call: `lcv_core`'s pipelines on ComfyUI's objects, with one progress bar."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.denoise import StepInfo
from lcv_core.errors import InputError
from lcv_core.image_io import resize_frames
from lcv_core.names import Fit, Handover, Schedule
from lcv_core.partial import SegmentStore
from lcv_core.pipelines import continue_video, long_refine_segments, long_video_segments
from lcv_core.pipelines.base import REFINE_DEFAULT_STEPS, Run, decode_latents, draw_noise
from lcv_core.pipelines.continuation import continue_from_latents
from lcv_core.pipelines.long_video import Segment
from lcv_core.pipelines.refine import refine_sigmas
from lcv_core.refinement import plan_windows
from lcv_core.shapes import SPACE_FACTOR, check_cond_frames, num_latents

from . import paths
from .components import HostComponents, components, need_adapter
from .latents import frames_of, samples_of, tail_latents
from .native import leading_zeros, require_longcat
from .preview import show_segment
from .sampling import Latent, StepBar, bsa_of, make_guider, run_guider
from .text import Conditioning, text_states

log = logging.getLogger("lcv_core")

# What a node asks of a run; None stands for the schedule's own.
Options = dict[str, Any]


def _run(schedule: Schedule, num_steps: int | None, guidance_scale: float | None) -> Run:
    return Run.of(
        num_steps=num_steps, guidance_scale=guidance_scale, schedule=schedule, cfg_scope="noise",
        cfg_mode="sequential", output="latents", on_step=None, progress=None,
    )  # fmt: skip


def _check_distilled(c: HostComponents, schedule: Schedule) -> None:
    """The distilled schedule needs its LoRA: the checkpoint's, or one that the user has put on the model."""
    if schedule == "distilled" and not c.model.patches:
        need_adapter(c, "distill")


def sample_latent(
    model: Any, positive: Conditioning, negative: Conditioning | None, latent: Latent, *, seed: int,
    schedule: Schedule, num_steps: int | None, guidance_scale: float | None, sigmas: Tensor | None,
) -> Latent:  # fmt: skip
    """Sample a LATENT; the frames that its noise mask keeps are its condition. sigmas win over the schedule."""
    c = components(model, positive=positive, negative=negative)
    _check_distilled(c, schedule)
    samples = samples_of(latent)
    mask = latent.get("noise_mask")
    mask = None if mask is None else comfy.utils.reshape_mask(mask.float(), samples.shape)
    n_c = leading_zeros(mask, samples.shape[2])
    run = _run(schedule, num_steps, guidance_scale)
    if sigmas is None:
        sigmas = run.sigmas(c.flow_shift, uniform_tail=n_c > 1)
    noise = draw_noise(samples.shape, torch.Generator().manual_seed(seed))
    bar = StepBar(model, len(sigmas) - 1)
    with run.adapter(c):
        guider = make_guider(c.active, positive, negative, run.guidance_scale)
        out = run_guider(
            guider, noise, samples, sigmas, mask=mask, seed=seed,
            watch=lambda step, _, denoised, __: bar.show(step + 1, denoised),
        )  # fmt: skip
    return {**{k: v for k, v in latent.items() if k != "noise_mask"}, "samples": out}


@dataclass(frozen=True)
class Continued:
    """frames: the video and what was added to it, [F, H, W, 3]. new: the added frames. latent: the new segment,
    condition included."""

    frames: Tensor
    new: Tensor
    latent: Latent


def continue_clip(
    model: Any, vae: Any, positive: Conditioning, negative: Conditioning | None, *, video: Any, latent: Latent | None,
    num_frames: int, num_cond_frames: int, width: int | None, height: int | None, schedule: Schedule,
    num_steps: int | None, guidance_scale: float | None, seed: int, fit: Fit, tile: int,
) -> Continued:  # fmt: skip
    """Add num_frames - num_cond_frames frames to a video, from its frames or from the latents it was decoded from.

    0 stands for the model's own counts.
    """
    if video is None and latent is None:
        raise InputError("connect a video, or the latent of one")
    c = components(model, vae=vae, positive=positive, negative=negative, tile=tile)
    _check_distilled(c, schedule)
    clip = None if video is None else frames_of(video)
    num_frames, num_cond_frames = num_frames or c.native.num_frames, num_cond_frames or c.native.num_cond_frames
    run = _run(schedule, num_steps, guidance_scale)
    bar = StepBar(model, len(run.sigmas(c.flow_shift, uniform_tail=True)) - 1)
    options: Options = {
        "text": text_states(positive), "negative_text": _states(negative, run), "num_frames": num_frames,
        "generator": torch.Generator().manual_seed(seed),
    }  # fmt: skip
    if latent is not None:
        made = _from_latents(c, latent, num_cond_frames, run, bar, options)
    else:
        made = continue_video(
            c, frames=clip, num_cond_frames=num_cond_frames, height=height, width=width, schedule=schedule,
            num_steps=num_steps, guidance_scale=guidance_scale, fit=fit, output="latents",
            on_step=lambda info: bar.show(info.step, info.denoised), **options,
        )  # fmt: skip
    new = decode_latents(c, made)[0, num_cond_frames:]
    source = new[:0] if clip is None else resize_frames(clip, *new.shape[1:3], fit=fit)
    source = source.float() / 255.0 if source.dtype == torch.uint8 else source.float()
    raw = c.model.model.latent_format.process_out(made)
    return Continued(torch.cat([source, new]), new, {"samples": raw})


def _from_latents(
    c: HostComponents, latent: Latent, num_cond_frames: int, run: Run, bar: StepBar, options: Options
) -> Tensor:
    check_cond_frames(num_cond_frames, options["num_frames"], num_cond_frames)
    cond = c.model.model.latent_format.process_in(tail_latents(latent, num_cond_frames))
    run = Run.of(
        num_steps=run.num_steps, guidance_scale=run.guidance_scale, schedule=run.schedule, cfg_scope=run.cfg_scope,
        cfg_mode=run.cfg_mode, output="latents", on_step=lambda info: bar.show(info.step, info.denoised), progress=None,
    )  # fmt: skip
    size = (cond.shape[3] * SPACE_FACTOR, cond.shape[4] * SPACE_FACTOR)
    return continue_from_latents(
        c, run=run, size=size, cond=lambda: cond, num_cond_latents=num_latents(num_cond_frames), **options
    )


def _states(conditioning: Conditioning | None, run: Run) -> Any:
    """The negative's states where guidance needs them."""
    if not run.guidance_scale > 1.0:
        return None
    if not conditioning:
        raise InputError(
            f"guidance_scale {run.guidance_scale:g} needs a negative conditioning; connect one or set it to 1"
        )
    return text_states(conditioning)


def split_prompts(text: str) -> list[str]:
    """One prompt per line; empty lines do not count. InputError when there is none."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError("there is no prompt; write one per line, one line per segment")
    return prompts


def make_long(
    model: Any, vae: Any, clip: Any, *, prompts: str, negative_prompt: str, num_segments: int, image: Any, video: Any,
    width: int | None, height: int | None, num_frames: int, num_cond_frames: int, frame_rate: float,
    schedule: Schedule, num_steps: int | None, guidance_scale: float | None, handover: Handover, seed: int, fit: Fit,
    tile: int, job_key: str, node_id: str | None,
) -> Tensor:  # fmt: skip
    """A video of several segments, [F, H, W, 3]: one per prompt, or num_segments of one prompt.

    Finished segments are kept under the output folder until the last is made: the same graph queued again goes on
    from them. job_key: identifies the graph.
    """
    lines = split_prompts(prompts)
    image, video = (None if frames is None else frames_of(frames) for frames in (image, video))
    c = components(model, vae=vae, clip=clip, tile=tile)
    _check_distilled(c, schedule)
    total = num_segments or len(lines)
    run = _run(schedule, num_steps, guidance_scale)
    first = len(run.sigmas(c.flow_shift, uniform_tail=video is not None)) - 1
    rest = len(run.sigmas(c.flow_shift, uniform_tail=True)) - 1
    steps = [first] + [rest] * (total - 1)
    bar = StepBar(model, sum(steps))
    store = SegmentStore(paths.work_folder() / job_key, job_key)

    def on_step(index: int, info: StepInfo) -> None:
        bar.show(sum(steps[:index]) + info.step, info.denoised)

    with _empty_removed(store):
        segments = long_video_segments(
            c, text=lines, num_segments=num_segments or None, image=image, frames=video, negative_text=negative_prompt,
            height=height, width=width, num_frames=num_frames or None, num_cond_frames=num_cond_frames or None,
            num_steps=num_steps, guidance_scale=guidance_scale, schedule=schedule, handover=handover, seed=seed,
            fit=fit, store=store, on_step=on_step,
        )  # fmt: skip
        return _collect(segments, store, node_id, frame_rate)


def _collect(segments: Iterator[Segment], store: SegmentStore, node_id: str | None, frame_rate: float) -> Tensor:
    """The frames of all segments, each shown when it is finished; the stored work is removed at the end."""
    frames = []
    for segment in segments:
        frames.append(segment.frames)
        show_segment(node_id, segment.index, segment.frames, frame_rate)
    store.remove()
    return torch.cat(frames)


@contextlib.contextmanager
def _empty_removed(store: SegmentStore) -> Iterator[None]:
    """A job that fails before its first segment leaves no folder behind."""
    try:
        yield
    except BaseException:
        store.remove_if_empty()
        raise


def refine_clip(
    model: Any, vae: Any, positive: Conditioning, *, frames: Any, image: Any, video: Any, lora: str, sparsity: float,
    refine_steps: int | None, t_thresh: float, spatial_only: bool,
    width: int | None, height: int | None, window: int, overlap: int, seed: int, fit: Fit, tile: int, job_key: str,
    node_id: str | None, frame_rate: float,
) -> Tensor:  # fmt: skip
    """A clip at twice the resolution (and frame rate), [F', H, W, 3], window by window; refine_steps None: the five
    of the released schedule.

    The refinement LoRA and block sparse attention are on inside and off after. Finished windows are kept as in
    `make_long`.
    """
    clip = frames_of(frames)
    image, video = (None if frames is None else frames_of(frames) for frames in (image, video))
    c = components(model, vae=vae, positive=positive, adapters=_refinement(lora), tile=tile)
    if lora != paths.NONE:
        need_adapter(c, "refinement")
    own = require_longcat(model).diffusion_model.config.bsa
    given = bsa_of(model)
    eight_bits = given is not None and given.eight_bits  # of a Sparse Attention node before this one
    bsa = own if sparsity < 0 else BSAConfig(sparsity=sparsity) if sparsity > 0 else None
    bsa = None if bsa is None else replace(bsa, eight_bits=eight_bits)
    window = window or c.native.num_frames
    if window < 2:
        raise InputError(f"window must be at least 2 frames, or 0 for the model's own, got {window}")
    overlap = min(overlap or c.native.num_cond_frames, window // 2)
    windows = plan_windows(clip.shape[0], window, overlap)
    steps = len(refine_sigmas(c, t_thresh, REFINE_DEFAULT_STEPS, refine_steps)) - 1
    bar = StepBar(model, steps * len(windows))
    store = SegmentStore(paths.work_folder() / job_key, job_key)

    def on_step(index: int, info: StepInfo) -> None:
        bar.show(steps * index + info.step, info.denoised)

    with _empty_removed(store):
        segments = long_refine_segments(
            c, text=text_states(positive), read=lambda start, stop: clip[start:stop], total_frames=clip.shape[0],
            window=window, overlap=overlap, image=image, video=video, spatial_only=spatial_only,
            time_mapping="stretch" if len(windows) == 1 else "exact", seed=seed, store=store, on_step=on_step,
            t_thresh=t_thresh, refine_steps=refine_steps, height=height, width=width, bsa=bsa, fit=fit,
        )  # fmt: skip
        return _collect(segments, store, node_id, frame_rate)


def _refinement(lora: str) -> dict[str, Path] | None:
    """The adapters of a refine job; None: those of the checkpoint."""
    if lora == paths.AUTO:
        return None
    return {} if lora == paths.NONE else {"refinement": paths.find_lora(lora)}
