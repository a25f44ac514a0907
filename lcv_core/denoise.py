"""The one denoising loop of every task: latents, conditioning and sigmas in, latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.dit.kv_cache import KVCache
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError, NumericalError
from lcv_core.guidance import cfg_zero
from lcv_core.names import CfgMode, CfgScope, check_name
from lcv_core.schedule import NUM_TRAIN_TIMESTEPS, euler_step
from lcv_core.text.encoder import TextStates


@dataclass(frozen=True)
class StepInfo:
    """What `on_step` gets after each step. Raising from the callback stops the run.

    step: 1..num_steps. sigma: the level the step started from. latents [B, C, T, h, w]: after the step.
    denoised: the network's present estimate of the clean latents, same shape, for previews.
    """

    step: int
    num_steps: int
    sigma: float
    latents: Tensor
    denoised: Tensor


OnStep = Callable[[StepInfo], None]


class Progress(Protocol):
    """Where a run leaves its latents between steps, so that an interrupted one can go on (see `partial.py`)."""

    def load(self, latents: Tensor) -> tuple[int, Tensor]: ...

    def save(self, step: int, latents: Tensor) -> None: ...

    def tick(self, step: int, latents: Tensor) -> None: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: off unless scale > 1.

    negative: text states of the unconditional branch.
    scope: latent frames the CFG-Zero scale is computed over: "noise" frames, or "all" that the network was given,
        condition frames included, as the official code does when it runs without a KV cache.
    mode: two "sequential" forwards (less memory) or one "batched".
    """

    scale: float = 1.0
    negative: TextStates | None = None
    scope: CfgScope = "noise"
    mode: CfgMode = "sequential"

    def __post_init__(self) -> None:
        check_name("cfg_scope", self.scope, CfgScope)
        check_name("cfg_mode", self.mode, CfgMode)
        if self.active and self.negative is None:
            raise InputError(f"guidance_scale {self.scale:g} needs a negative text; pass one or set guidance_scale=1")

    @property
    def active(self) -> bool:
        return self.scale > 1.0


@dataclass
class _Predictor:
    """velocity(latents, timestep) with text, condition frames, cache and guidance filled in."""

    dit: LongCatDiT
    text: TextStates
    guidance: Guidance
    num_cond_latents: int
    bsa: BSAConfig | None
    cache: KVCache | None
    _batched: TextStates | None = field(default=None)

    def __call__(self, latents: Tensor, sigma: float) -> Tensor:
        """Velocity of the noise frames, fp32 [B, C, T - n_c, h, w]."""
        n_c, g = self.num_cond_latents, self.guidance
        skip = 0 if self.cache is not None else n_c  # condition frames among the network's outputs
        x = latents[:, :, n_c - skip :]
        if not g.active:
            return self._forward(x, sigma, self.text, self.cache)[:, :, skip:]
        uncond, cond = self._batch(x, sigma) if g.mode == "batched" else self._pair(x, sigma)
        scale_from = slice(skip, None) if g.scope == "noise" else slice(None)
        return cfg_zero(cond, uncond, g.scale, scale_from=scale_from)[:, :, skip:]

    def _pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        assert self.guidance.negative is not None
        uncond = self._forward(x, sigma, self.guidance.negative, self.cache)
        return uncond, self._forward(x, sigma, self.text, self.cache)

    def _batch(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        if self._batched is None:
            assert self.guidance.negative is not None
            self._batched = self.guidance.negative.concat(self.text)
        uncond, cond = self._forward(torch.cat([x, x]), sigma, self._batched, self.cache).chunk(2)
        return uncond, cond

    def _forward(self, x: Tensor, sigma: float, text: TextStates, cache: KVCache | None) -> Tensor:
        timestep = x.new_full((x.shape[0], x.shape[2]), sigma * NUM_TRAIN_TIMESTEPS)
        if cache is None:
            timestep[:, : self.num_cond_latents] = 0.0  # condition frames are clean
        return self.dit(
            x, timestep, text.states, text.mask, num_cond_latents=self.num_cond_latents, kv_cache=cache, bsa=self.bsa
        )


@torch.no_grad()
def denoise(
    dit: LongCatDiT,
    latents: Tensor,
    sigmas: Tensor,
    *,
    text: TextStates,
    guidance: Guidance | None = None,
    num_cond_latents: int = 0,
    use_kv_cache: bool = False,
    bsa: BSAConfig | None = None,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Integrate dx/dsigma = -velocity over `sigmas` with Euler steps; returns fp32 [B, C, T, h, w].

    latents: start noise (normalised latent space) whose first `num_cond_latents` frames are clean condition frames;
        these stay as they are.
    sigmas: descending, ending in 0 (see `schedule`).
    use_kv_cache: run the condition frames once instead of in every step; exact.
    Raises NumericalError naming the step when a prediction is not finite.
    """
    device = dit.device
    x = latents.to(device, torch.float32, copy=True)
    text = text.to(device)
    guidance = guidance or Guidance()
    if guidance.negative is not None:
        guidance = Guidance(guidance.scale, guidance.negative.to(device), guidance.scope, guidance.mode)
    n_c = num_cond_latents
    cache = _shared_cache(dit, x[:, :, :n_c], bsa) if use_kv_cache and n_c else None
    predict = _Predictor(dit, text, guidance, n_c, bsa, cache)
    done, x = progress.load(x) if progress else (0, x)
    num_steps, resumed = len(sigmas) - 1, done
    levels: Sequence[float] = sigmas.tolist()
    try:
        for step in range(resumed, num_steps):
            velocity = predict(x, levels[step])
            _check_finite(velocity, step, num_steps, levels[step])
            noise_frames = x[:, :, n_c:]
            denoised = torch.cat([x[:, :, :n_c], noise_frames + levels[step] * velocity], dim=2)
            stepped = euler_step(noise_frames, model_output(velocity), sigmas[step].to(x), sigmas[step + 1].to(x))
            x, done = torch.cat([x[:, :, :n_c], stepped], dim=2), step + 1
            if progress:
                progress.tick(done, x)
            if on_step:
                on_step(StepInfo(done, num_steps, levels[step], x, denoised))
    except BaseException:
        # Ctrl-C, a full disk in a callback, an out-of-memory error: what was computed is kept.
        if progress and done > resumed:
            progress.save(done, x)
        raise
    if progress:
        progress.save(num_steps, x)
    return x


def model_output(velocity: Tensor) -> Tensor:
    """The network predicts x0 - noise; schedulers (and ComfyUI) integrate noise - x0. This is where the sign flips."""
    return -velocity


def _shared_cache(dit: LongCatDiT, cond: Tensor, bsa: BSAConfig | None) -> KVCache:
    """The KV cache of the condition frames [B, C, n_c, h, w]; one entry for all where they are the same."""
    same = torch.equal(cond, cond[:1].expand_as(cond))
    return dit.build_kv_cache(cond[:1] if same else cond, bsa)


def _check_finite(velocity: Tensor, step: int, num_steps: int, sigma: float) -> None:
    if not torch.isfinite(velocity).all():
        raise NumericalError(
            f"step {step + 1} of {num_steps} (sigma {sigma:.4f}) produced NaN or infinite values; stopped there."
            " Try bf16 or fp32 instead of fp16, another attention backend, and check adapters and their strengths"
        )
