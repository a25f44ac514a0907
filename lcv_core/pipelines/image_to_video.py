"""Image to video: the image is the clean first latent frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcv_core.denoise import OnStep, Progress
from lcv_core.errors import InputError
from lcv_core.image_io import as_frames, resize_frames
from lcv_core.names import CfgMode, CfgScope, Fit, Output, Posterior, Schedule
from lcv_core.pipelines.base import (
    WHOLE,
    Components,
    Generators,
    Interval,
    Run,
    Text,
    encode_frames,
    encode_text,
    finish,
    for_conditions,
    guidance,
    native_size,
    put_condition,
    start_noise,
    to_pixels,
)
from lcv_core.shapes import check_size


def image_to_video(
    c: Components,
    *,
    text: Text,
    image: Any,
    negative_text: Text | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    schedule: Schedule = "base",
    num_videos_per_prompt: int = 1,
    noise: Tensor | None = None,
    generator: Generators = None,
    fit: Fit = "stretch",
    posterior: Posterior = "mode",
    cfg_scope: CfgScope = "noise",
    cfg_mode: CfgMode = "sequential",
    cfg_interval: Interval = WHOLE,
    step_cache: float = 0.0,
    output: Output = "frames",
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """A video that starts on the image; returns what `text_to_video` does, the image's frame included.

    image: [H, W, 3] (or a PIL image), uint8 or float in [0, 1]; [B, H, W, 3] gives each prompt its own.
    height, width: default to the aspect bucket of the image at the checkpoint's native scale.
    fit: how the image meets that size: "stretch" as the official pipeline, "crop" or "pad".
    cfg_scope: "all" takes the guidance scale over the image's frame too, as the official pipeline does.
    cfg_interval, step_cache: as in `text_to_video`.
    """
    run = Run.of(
        num_steps=num_steps, guidance_scale=guidance_scale, schedule=schedule, cfg_scope=cfg_scope, cfg_mode=cfg_mode,
        output=output, on_step=on_step, progress=progress, cfg_interval=cfg_interval, step_cache=step_cache,
    )  # fmt: skip
    sigmas = run.sigmas(c.flow_shift)
    images = as_frames(image)
    h, w = native_size(c.native, *images.shape[1:3])
    h, w = height or h, width or w
    check_size(h, w)
    frames = c.native.num_frames if num_frames is None else num_frames
    if frames < 5:
        raise InputError(f"num_frames counts the image too, so it must be at least 5, got {frames}")
    prompts = encode_text(c, text)
    states = prompts.repeat(num_videos_per_prompt)
    if images.shape[0] not in (1, prompts.batch, states.batch):
        raise InputError(f"{images.shape[0]} images for {prompts.batch} prompts; give one, or one per prompt")
    x = start_noise(c, states.batch, frames, h, w, noise, generator)
    guide = guidance(c, run, negative_text, states.batch, prompts.batch)
    stills = to_pixels(resize_frames(images, h, w, fit=fit)).transpose(0, 2)  # [images, 3, 1, H, W]
    # Each image is drawn and encoded once however many videos it makes; the noise was drawn first, as officially.
    cond = encode_frames(c, stills, posterior=posterior, generator=for_conditions(generator, images.shape[0]))
    x = put_condition(x, cond.repeat_interleave(states.batch // images.shape[0], dim=0))
    with run.adapter(c):
        latents = run.denoise(
            c, x, sigmas, text=states, guidance=guide, num_cond_latents=1,
            use_kv_cache=run.cfg_scope == "noise" or not guide.active,
        )  # fmt: skip
    return finish(c, latents, run.output)
