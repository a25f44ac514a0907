"""Refinement: a finished clip at twice the resolution and, unless only space is refined, twice the frame rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcv_core import schedule as schedules
from lcv_core.config import BSAConfig
from lcv_core.denoise import OnStep, Progress
from lcv_core.errors import InputError
from lcv_core.image_io import as_frames, resize_frames
from lcv_core.names import CfgMode, CfgScope, Fit, Output, Posterior, TimeMapping
from lcv_core.pipelines.base import (
    REFINE_DEFAULT_STEPS,
    Components,
    Generators,
    Run,
    Text,
    decode_latents,
    draw_noise,
    encode_frames,
    encode_text,
    guidance,
    pick_posterior,
    refined_size,
    to_pixels,
    with_less,
)
from lcv_core.refinement import (
    RefinePlan,
    chunked,
    mix,
    padded_frames,
    plan_refine,
)
from lcv_core.shapes import check_size
from lcv_core.vae.model import split_moments
from lcv_core.vae.tiling import encode_tiled


def refine_video(
    c: Components,
    *,
    text: Text,
    frames: Any,
    negative_text: Text | None = None,
    image: Any = None,
    video: Any = None,
    num_cond_frames: int | None = None,
    t_thresh: float = 0.5,
    num_steps: int = REFINE_DEFAULT_STEPS,
    refine_steps: int | None = None,
    spatial_only: bool = False,
    time_mapping: TimeMapping = "stretch",
    size: tuple[int, int] | None = None,
    height: int | None = None,
    width: int | None = None,
    bsa: BSAConfig | None = None,
    guidance_scale: float = 1.0,
    cfg_scope: CfgScope = "noise",
    cfg_mode: CfgMode = "sequential",
    noise: Tensor | None = None,
    generator: Generators = None,
    fit: Fit = "stretch",
    posterior: Posterior = "mode",
    output: Output = "frames",
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Refine one clip: frames fp32 [1, F', H, W, 3] in [0, 1], or the normalised latents fp32 [1, C, n_c + n_n, h, w].

    frames: the stage-1 clip [F, h, w, 3] uint8 or float in [0, 1], any F >= 1.
    image, video: high-resolution condition, the clip's first frame or its first frames (then `video`'s last
        num_cond_frames are used); num_cond_frames is derived from them when not given (1; or what the clip's windows
        share: 26 frames, 13 with spatial_only).
    t_thresh: noise level that the upsampled clip is mixed up to, in (0, 1].
    num_steps: steps of the base schedule that the part below t_thresh is taken from (50: 5 steps);
        refine_steps asks for that number itself.
    time_mapping: "stretch" gives 2F frames as the official pipeline, "exact" 2F - 1 of which every other one is at a
        source frame's time.
    size: (height, width), multiples of 16; or height and width each. The default is the 720p bucket (twice the native
        side for a smaller model).
    bsa: block sparse attention; None is dense.
    guidance_scale: the expert was trained without guidance, so 1; above 1 it needs a negative_text.
    """
    run = Run.of(
        num_steps=num_steps, guidance_scale=guidance_scale, schedule="base", cfg_scope=cfg_scope, cfg_mode=cfg_mode,
        output=output, on_step=on_step, progress=progress,
    )  # fmt: skip
    clip = as_frames(frames)
    sigmas = refine_sigmas(c, t_thresh, run.num_steps, refine_steps)
    H, W = size or refined_size(c.native, *clip.shape[1:3])
    H, W = height or H, width or W
    check_size(H, W)
    count = condition_count(image, video, num_cond_frames, spatial_only=spatial_only)
    plan = plan_refine(clip.shape[0], count, spatial_only=spatial_only, time_mapping=time_mapping)
    states = encode_text(c, text)
    if states.batch != 1:
        raise InputError(f"refine_video takes one prompt for its one clip, got {states.batch}")
    guide = guidance(c, run, negative_text, batch=1)
    start = draw_noise((1, c.dit.config.in_channels, plan.latents, H // 8, W // 8), generator)
    if noise is not None:
        if noise.shape != start.shape:
            raise InputError(f"noise must be {list(start.shape)}, got {list(noise.shape)}")
        start = noise.float()
    x = mix(_encode_clip(c, clip, (H, W), plan, posterior, generator), start, t_thresh)
    if plan.cond_latents:
        cond = _condition(image if video is None else video, plan, (H, W), fit)
        x[:, :, : plan.cond_latents] = encode_frames(c, cond, posterior=posterior, generator=generator)
    with c.adapter("refinement"):
        latents = c.denoise(
            x, sigmas, text=states, guidance=guide, num_cond_latents=plan.cond_latents, bsa=bsa,
            on_step=run.on_step, progress=run.progress,
        )  # fmt: skip
    return latents.cpu() if output == "latents" else decode_refined(c, latents, plan)


def decode_refined(c: Components, latents: Tensor, plan: RefinePlan) -> Tensor:
    """The plan's latents -> frames fp32 [1, F', H, W, 3] in [0, 1] without the padding."""
    return decode_latents(c, latents)[:, plan.front : plan.front + plan.frames_out]


def refine_sigmas(c: Components, t_thresh: float, num_steps: int, refine_steps: int | None) -> Tensor:
    """The refine schedule by the length of its base schedule, or by its own."""
    if refine_steps is not None:
        return schedules.refine_exact(refine_steps, t_thresh, flow_shift=c.flow_shift)
    return schedules.refine(num_steps, t_thresh, flow_shift=c.flow_shift)


def condition_count(image: Any, video: Any, num_cond_frames: int | None, *, spatial_only: bool) -> int:
    """How many leading output frames are given; InputError where the material and the count contradict each other."""
    if image is not None and video is not None:
        raise InputError("give an image or a video as the refine condition, not both")
    if image is None and video is None:
        if num_cond_frames:
            raise InputError(f"num_cond_frames is {num_cond_frames} but there is no image or video to take them from")
        return 0
    if image is not None:
        if num_cond_frames not in (None, 0, 1):
            raise InputError(f"an image is one condition frame, got num_cond_frames={num_cond_frames}")
        return 1
    available = as_frames(video).shape[0]
    count = num_cond_frames or min(available, 13 if spatial_only else 26)
    if not 0 < count <= available:
        raise InputError(f"the condition video has {available} frames but num_cond_frames is {count}")
    return count


def _encode_clip(
    c: Components, clip: Tensor, size: tuple[int, int], plan: RefinePlan, posterior: Posterior, generator: Generators
) -> Tensor:
    """The padded, upsampled clip through the VAE, frame group by frame group: normalised latents [1, C, T, h, w]."""
    vae = c.need_vae()

    def encode() -> tuple[Tensor, Tensor]:
        if c.tiling:
            pixels = torch.stack(list(padded_frames(clip, size, plan)), dim=1).unsqueeze(0)
            mean, logvar = encode_tiled(vae, pixels, c.tiling)
            return mean.cpu(), logvar.cpu()
        chunks = chunked(padded_frames(clip, size, plan), plan.frames_encoded)
        return split_moments(torch.cat([m.cpu() for m in vae.encode_stream(chunks)], dim=2))

    mean, logvar = with_less(c, "VAE encode", encode)
    return vae.normalize(pick_posterior(mean, logvar, posterior, generator))


def _condition(material: Any, plan: RefinePlan, size: tuple[int, int], fit: Fit) -> Tensor:
    """The last c high-resolution frames, the first repeated up to whole latents: pixels [1, 3, 4 n_c - 3, H, W]."""
    frames = resize_frames(as_frames(material)[-plan.cond_frames :], *size, fit=fit)
    return to_pixels(torch.cat([frames[:1].expand(plan.front, -1, -1, -1), frames]))
