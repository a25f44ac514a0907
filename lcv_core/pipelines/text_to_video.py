"""Text to video."""

from __future__ import annotations

from torch import Tensor

from lcv_core.denoise import OnStep, Progress
from lcv_core.names import CfgMode, CfgScope, Output, Schedule
from lcv_core.pipelines.base import (
    WHOLE,
    Components,
    Generators,
    Interval,
    Run,
    Text,
    encode_text,
    finish,
    guidance,
    start_noise,
)


def text_to_video(
    c: Components,
    *,
    text: Text,
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
    cfg_scope: CfgScope = "noise",
    cfg_mode: CfgMode = "sequential",
    cfg_interval: Interval = WHOLE,
    step_cache: float = 0.0,
    output: Output = "frames",
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """A video for each prompt: frames fp32 [B, F, H, W, 3] in [0, 1], or normalised latents fp32 [B, C, T, h, w].

    text: prompt, list of prompts, or TextStates; B = prompts * num_videos_per_prompt.
    negative_text: the same; one for all or one per prompt. With a text encoder the default is the empty prompt.
    height, width: pixels, multiples of 16. num_frames: 4k+1. Defaults are the checkpoint's native ones.
    num_steps, guidance_scale: default to 50 and 4.0 with the "base" schedule, 16 and 1.0 with "distilled".
    noise: [B, C, T, h, w] start noise; otherwise drawn from `generator` (one, or one per video).
    cfg_scope: "noise" and "all" mean the same here, there being no condition frames.
    cfg_interval: sigmas (low, high) of the steps that are guided; the others run without the negative text, in half
        the time. step_cache: relative error of the velocity for which a step reuses an earlier one; 0 is off.
    """
    run = Run.of(
        num_steps=num_steps, guidance_scale=guidance_scale, schedule=schedule, cfg_scope=cfg_scope, cfg_mode=cfg_mode,
        output=output, on_step=on_step, progress=progress, cfg_interval=cfg_interval, step_cache=step_cache,
    )  # fmt: skip
    sigmas = run.sigmas(c.flow_shift)
    if run.output == "frames":
        c.need_vae()  # before the run rather than after it
    native = c.native
    frames = native.num_frames if num_frames is None else num_frames
    prompts = encode_text(c, text)
    states = prompts.repeat(num_videos_per_prompt)
    x = start_noise(c, states.batch, frames, height or native.height, width or native.width, noise, generator)
    guide = guidance(c, run, negative_text, states.batch, prompts.batch)
    with run.adapter(c):
        latents = run.denoise(c, x, sigmas, text=states, guidance=guide)
    return finish(c, latents, run.output)
