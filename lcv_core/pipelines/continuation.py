"""Video continuation: the last frames of a clip are the clean first latent frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lcv_core.denoise import OnStep, Progress
from lcv_core.errors import InputError
from lcv_core.image_io import as_frames
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
    prepare_frames,
    put_condition,
    start_noise,
)
from lcv_core.shapes import check_cond_frames, check_frames, check_size, num_latents


def continue_video(
    c: Components,
    *,
    text: Text,
    frames: Any,
    negative_text: Text | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_cond_frames: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    schedule: Schedule = "base",
    uniform_tail: bool = True,
    use_kv_cache: bool = True,
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
    """Continue a clip; returns what `text_to_video` does: num_frames frames, the re-decoded condition ones included.

    frames: [F, H, W, 3] uint8 or float in [0, 1] at the model's frame rate; only the last num_cond_frames are used.
    num_frames: 4k+1, condition frames included. num_cond_frames: 4k+1, below num_frames; the released model's is 13.
    uniform_tail: end the base schedule in ten equal steps from 0.5 (the official enhance_hf); the distilled schedule
        has none.
    use_kv_cache: run the condition frames once instead of in every step: exact, and the guidance scale then covers
        the noise frames only. cfg_scope "all" matters without the cache alone.
    cfg_interval, step_cache: as in `text_to_video`.
    """
    run = Run.of(
        num_steps=num_steps, guidance_scale=guidance_scale, schedule=schedule, cfg_scope=cfg_scope, cfg_mode=cfg_mode,
        output=output, on_step=on_step, progress=progress, cfg_interval=cfg_interval, step_cache=step_cache,
    )  # fmt: skip
    cond_frames = c.native.num_cond_frames if num_cond_frames is None else num_cond_frames
    clip = as_frames(frames)
    check_cond_frames(cond_frames, c.native.num_frames if num_frames is None else num_frames, clip.shape[0])
    clip = clip[-cond_frames:]  # the rest of a long clip is never converted or uploaded
    h, w = native_size(c.native, *clip.shape[1:3])
    h, w = height or h, width or w
    check_size(h, w)
    return continue_from_latents(
        c, text=text, negative_text=negative_text, run=run, size=(h, w), num_frames=num_frames,
        cond=lambda: encode_frames(
            c, prepare_frames(clip, h, w, fit), posterior=posterior, generator=for_conditions(generator, 1)
        ),
        num_cond_latents=num_latents(cond_frames), uniform_tail=uniform_tail, use_kv_cache=use_kv_cache,
        num_videos_per_prompt=num_videos_per_prompt, noise=noise, generator=generator,
    )  # fmt: skip


def continue_from_latents(
    c: Components,
    *,
    text: Text,
    negative_text: Text | None,
    run: Run,
    size: tuple[int, int],
    num_frames: int | None,
    cond: Callable[[], Tensor],
    num_cond_latents: int,
    uniform_tail: bool = True,
    use_kv_cache: bool = True,
    num_videos_per_prompt: int = 1,
    noise: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """`continue_video` from condition latents: `cond()` gives them, normalised [1 or B, C, n_c, h, w].

    It is called after the noise is drawn, the official order of random numbers.
    """
    sigmas = run.sigmas(c.flow_shift, uniform_tail=uniform_tail)
    total = c.native.num_frames if num_frames is None else num_frames
    check_frames(total)
    if not 0 < num_cond_latents < num_latents(total):
        raise InputError(f"{num_cond_latents} condition latents leave nothing to make of {num_latents(total)}")
    prompts = encode_text(c, text)
    states = prompts.repeat(num_videos_per_prompt)
    x = start_noise(c, states.batch, total, *size, noise, generator)
    guide = guidance(c, run, negative_text, states.batch, prompts.batch)
    x = put_condition(x, cond())
    with run.adapter(c):
        latents = run.denoise(
            c, x, sigmas, text=states, guidance=guide, num_cond_latents=num_cond_latents, use_kv_cache=use_kv_cache
        )
    return finish(c, latents, run.output)
