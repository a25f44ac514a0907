"""Sampling by ComfyUI's own machinery: its guider, sampler, previews and memory, with LongCat-Video's arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.denoise import Guidance, OnStep, Progress, StepInfo
from lcv_core.errors import InputError, NumericalError
from lcv_core.guidance import cfg_zero
from lcv_core.text.encoder import TextStates

from .native import require_longcat
from .network import BSA_OPTION, CACHE_OPTION
from .text import Conditioning, conditioning_of

log = logging.getLogger("lcv_core")

Latent = dict[str, Any]  # ComfyUI's LATENT


class CFGZeroGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance with the optimised scale of CFG-Zero*, over the noise frames, on velocities.

    ComfyUI's own CFGZeroStar node rescales denoised latents, which is another formula. At scale 1 there is no
    unconditional branch.
    """

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        options = {**(model_options or {}), "sampler_cfg_function": self._combine}
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds.get("negative"), self.conds.get("positive"), self.cfg,
            model_options=options, seed=seed,
        )  # fmt: skip

    def _combine(self, args: Mapping[str, Any]) -> Tensor:
        """ComfyUI takes x - denoised; with denoised = x + sigma * velocity that is -sigma * velocity."""
        x = args["input"]
        sigma = args["sigma"].view(-1, *[1] * (x.ndim - 1))
        cond, uncond = ((args[name] - x) / sigma for name in ("cond_denoised", "uncond_denoised"))
        noise_frames = slice(self.inner_model.num_cond_latents, None)
        return -sigma * cfg_zero(cond, uncond, args["cond_scale"], scale_from=noise_frames)


def make_guider(model: Any, positive: Conditioning, negative: Conditioning | None, scale: float) -> CFGZeroGuider:
    """A GUIDER. InputError for another model, an empty positive, or guidance without a negative."""
    require_longcat(model)
    if not positive:
        raise InputError("the positive conditioning is empty; connect a text encode node")
    if scale > 1.0 and not negative:
        raise InputError(f"guidance_scale {scale:g} needs a negative conditioning; connect one or set it to 1")
    guider = CFGZeroGuider(model)
    if scale > 1.0:
        guider.set_conds(positive, negative)
    else:
        guider.inner_set_conds({"positive": positive})
    guider.set_cfg(max(scale, 1.0))
    return guider


def with_bsa(model: Any, bsa: BSAConfig | None) -> Any:
    """A clone of a LongCat-Video MODEL whose self-attention is block sparse with these settings; None: dense."""
    require_longcat(model)
    if bsa is not None:
        tell_of_triton(model.load_device)
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[BSA_OPTION] = bsa
    return clone


def without_cache(model: Any) -> Any:
    """A clone of a LongCat-Video MODEL that computes condition frames in every step and takes no memory for them."""
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[CACHE_OPTION] = False
    return clone


def tell_of_triton(device: torch.device) -> None:
    """Say once, in the log, what makes block sparse attention fast on this card and is not there."""
    if device.type == "cuda" and find_spec("triton") is None:
        _warn_no_triton()


@cache
def _warn_no_triton() -> None:
    log.warning(
        "block sparse attention runs without Triton, much slower than it could: pip install triton (on Windows: pip"
        " install triton-windows)"
    )


def bsa_of(model: Any) -> BSAConfig | None:
    return model.model_options.get("transformer_options", {}).get(BSA_OPTION)


def condition_mask(latents: Tensor, num_cond_latents: int) -> Tensor:
    """A noise mask [B, 1, T, h, w] that keeps the leading frames."""
    mask = latents.new_ones(latents.shape[0], 1, *latents.shape[2:], dtype=torch.float32)
    mask[:, :, :num_cond_latents] = 0.0
    return mask


Watch = Callable[[int, int, Tensor, Tensor], None]  # step from 0, steps, denoised, latents


def run_guider(
    guider: Any, noise: Tensor, latent_image: Tensor, sigmas: Tensor, *, mask: Tensor | None, seed: int, watch: Watch
) -> Tensor:
    """Euler steps over `sigmas`; latents in and out as ComfyUI keeps them (un-normalised)."""
    sampler = comfy.samplers.ksampler("euler")
    samples = guider.sample(
        noise, latent_image, sampler, sigmas, denoise_mask=mask, callback=watch_callback(watch),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip
    if not torch.isfinite(samples).all():
        raise NumericalError(
            "sampling produced NaN or infinite values; try a weight dtype of bf16 or fp32, another attention, and check"
            " LoRAs and their strengths"
        )
    return samples.to(comfy.model_management.intermediate_device())


def watch_callback(watch: Watch) -> Callable[[int, Tensor, Tensor, int], None]:
    """ComfyUI's callback order (step, denoised, latents, steps) as ours."""

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        watch(step, total, x0, x)

    return callback


class StepBar:
    """A node's progress bar over several sampling runs, with a preview of the one that runs now."""

    def __init__(self, model: Any, total_steps: int) -> None:
        self.total, self.done = max(1, total_steps), 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._bar = comfy.utils.ProgressBar(self.total)

    def show(self, step: int, denoised: Tensor | None = None) -> None:
        """`step` steps of all are done. Raises ComfyUI's interrupt where the user asked for it."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if self._previewer is not None and denoised is not None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", denoised)
        self._bar.update_absolute(min(step, self.total), self.total, preview)


def denoise_in_host(
    model: Any,
    latents: Tensor,
    sigmas: Tensor,
    *,
    text: TextStates,
    guidance: Guidance | None = None,
    num_cond_latents: int = 0,
    use_kv_cache: bool = True,
    bsa: BSAConfig | None = None,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
) -> Tensor:
    """`lcv_core.denoise.denoise` with ComfyUI's sampler: normalised start latents in, normalised latents out.

    positive, negative: CONDITIONINGs in place of the text states, with all that other nodes put into them.
    """
    guidance = guidance or Guidance()
    if negative is None and guidance.negative is not None:
        negative = conditioning_of(guidance.negative)
    if bsa is not None:
        model = with_bsa(model, bsa)
    if not use_kv_cache:
        model = without_cache(model)
    inner = require_longcat(model)
    done, x = progress.load(latents) if progress else (0, latents)
    if done >= len(sigmas) - 1:
        return x
    guider = make_guider(model, positive or conditioning_of(text), negative, guidance.scale)
    start, n_c = float(sigmas[done]), num_cond_latents
    # ComfyUI starts from start * noise + (1 - start) * latent_image: all of x comes in as noise, divided by start.
    image = torch.zeros_like(x)
    image[:, :, :n_c] = x[:, :, :n_c]
    total = len(sigmas) - 1

    reached = done, x

    def watch(step: int, _: int, denoised: Tensor, now: Tensor) -> None:
        nonlocal reached
        # The callback comes before the step's update: `now` has seen `done + step` steps. ComfyUI keeps condition
        # frames clean for the model alone, in its own state they wander off.
        now = torch.cat([x[:, :, :n_c].to(now), now[:, :, n_c:]], dim=2)
        reached = done + step, now
        if progress and step:
            progress.tick(*reached)
        if on_step:
            on_step(StepInfo(done + step + 1, total, float(sigmas[done + step]), now, denoised))

    try:
        out = run_guider(
            guider, x / start, inner.latent_format.process_out(image), sigmas[done:],
            mask=condition_mask(x, n_c) if n_c else None, seed=0, watch=watch,
        )  # fmt: skip
    except BaseException:
        # An interrupt, an out-of-memory error: what was computed is kept.
        if progress and reached[0] > done:
            progress.save(*reached)
        raise
    out = inner.latent_format.process_in(out)
    out[:, :, :n_c] = x[:, :, :n_c].to(out)
    if progress:
        progress.save(total, out)
    return out
