"""The one denoising loop of every task: latents, conditioning and sigmas in, latents out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.dit.kv_cache import KVCache
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.step_cache import StepCache, check_budget
from lcv_core.errors import InputError, NumericalError
from lcv_core.guidance import cfg_zero
from lcv_core.names import CfgMode, CfgScope, check_name
from lcv_core.schedule import NUM_TRAIN_TIMESTEPS, euler_step
from lcv_core.text.encoder import TextStates

log = logging.getLogger("lcv_core")


@dataclass(frozen=True)
class StepInfo:
    """What `on_step` gets after each step. Raising from the callback stops the run.

    step: 1..num_steps. sigma: the level the step started from. latents [B, C, T, h, w]: after the step.
    denoised: the network's present estimate of the clean latents, same shape, for previews.
    reused: the step cache gave its velocity.
    """

    step: int
    num_steps: int
    sigma: float
    latents: Tensor
    denoised: Tensor
    reused: bool = False


OnStep = Callable[[StepInfo], None]


class Progress(Protocol):
    """Where a run leaves its latents between steps, so that an interrupted one can go on (see `partial.py`).

    state: what else the run has to know then, JSON; saved with the latents and there again after `load`.
    """

    state: dict[str, Any]

    def load(self, latents: Tensor) -> tuple[int, Tensor]: ...

    def save(self, step: int, latents: Tensor) -> None: ...

    def tick(self, step: int, latents: Tensor) -> None: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: off unless scale > 1.

    negative: text states of the unconditional branch.
    interval: sigmas (lowest, highest), both included, of the steps that are guided; the others run the conditional
        branch alone (Kynkäänniemi et al. 2024, arXiv 2404.07724).
    scope: latent frames the CFG-Zero scale is computed over: "noise" frames, or "all" that the network was given,
        condition frames included, as the official code does when it runs without a KV cache.
    mode: two "sequential" forwards (less memory) or one "batched".
    """

    scale: float = 1.0
    negative: TextStates | None = None
    scope: CfgScope = "noise"
    mode: CfgMode = "sequential"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_name("cfg_scope", self.scope, CfgScope)
        check_name("cfg_mode", self.mode, CfgMode)
        check_interval(self.interval)
        if self.active and self.negative is None:
            raise InputError(f"guidance_scale {self.scale:g} needs a negative text; pass one or set guidance_scale=1")

    @property
    def active(self) -> bool:
        return self.scale > 1.0

    def guides(self, sigma: float) -> bool:
        """Whether a step that starts from this sigma is guided."""
        low, high = self.interval
        return self.active and low <= sigma <= high


def check_interval(interval: Sequence[float]) -> None:
    """InputError unless these are two sigmas, the lower first."""
    low, high = interval
    if not 0.0 <= low < high <= 1.0:
        raise InputError(
            f"cfg_interval must be two sigmas, 0 <= low < high <= 1, got {low:g} and {high:g}; try 0.2 0.9"
        )


@dataclass
class _Predictor:
    """velocity(latents, sigma, step) with text, condition frames, caches and guidance filled in."""

    dit: LongCatDiT
    text: TextStates
    guidance: Guidance
    num_cond_latents: int
    bsa: BSAConfig | None
    cache: KVCache | None
    steps: StepCache | None = None
    _texts: dict[str, TextStates] = field(default_factory=dict)

    def __call__(self, latents: Tensor, sigma: float, step: int) -> tuple[Tensor, bool]:
        """Velocity of the noise frames, fp32 [B, C, T - n_c, h, w], and whether the step cache gave it."""
        x = latents[:, :, self.num_cond_latents - self._given :]
        names = self._branches(sigma)
        if self.steps is not None:
            self.steps.begin(step, names)
        velocity = self._combine({name: self._forward(x, sigma, name) for name in names})
        return velocity, self.steps is not None and self.steps.end(velocity, self._combine)

    @property
    def _given(self) -> int:
        """Condition frames among the network's inputs and outputs."""
        return 0 if self.cache is not None else self.num_cond_latents

    def _branches(self, sigma: float) -> Sequence[str]:
        """The forwards of a step, in order."""
        if not self.guidance.guides(sigma):
            return ("cond",)
        return ("both",) if self.guidance.mode == "batched" else ("uncond", "cond")

    def _combine(self, made: Mapping[str, Tensor]) -> Tensor:
        """The velocity of the noise frames from those that the branches gave."""
        if len(made) == 1 and "cond" in made:
            return made["cond"][:, :, self._given :]
        uncond, cond = made["both"].chunk(2) if "both" in made else (made["uncond"], made["cond"])
        g = self.guidance
        scale_from = slice(self._given, None) if g.scope == "noise" else slice(None)
        return cfg_zero(cond, uncond, g.scale, scale_from=scale_from)[:, :, self._given :]

    def _forward(self, x: Tensor, sigma: float, name: str) -> Tensor:
        if name == "both":
            x = torch.cat([x, x])
        text, cache = self._text(name), self.cache
        timestep = x.new_full((x.shape[0], x.shape[2]), sigma * NUM_TRAIN_TIMESTEPS)
        if cache is None:
            timestep[:, : self.num_cond_latents] = 0.0  # condition frames are clean
        options: dict[str, Any] = {} if self.steps is None else {"step_cache": self.steps.branch(name)}
        return self.dit(
            x, timestep, text.states, text.mask, num_cond_latents=self.num_cond_latents, kv_cache=cache, bsa=self.bsa,
            **options,
        )  # fmt: skip

    def _text(self, name: str) -> TextStates:
        if name == "cond":
            return self.text
        assert self.guidance.negative is not None
        if name == "uncond":
            return self.guidance.negative
        if name not in self._texts:
            self._texts[name] = self.guidance.negative.concat(self.text)
        return self._texts[name]


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
    step_cache: float = 0.0,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Integrate dx/dsigma = -velocity over `sigmas` with Euler steps; returns fp32 [B, C, T, h, w].

    latents: start noise (normalised latent space) whose first `num_cond_latents` frames are clean condition frames;
        these stay as they are.
    sigmas: descending, ending in 0 (see `schedule`).
    use_kv_cache: run the condition frames once instead of in every step; exact.
    step_cache: relative error of a step's velocity for which it is made from an earlier step's (`dit.step_cache`);
        0 computes all in full. A run that goes on from `progress` begins with the last step computed in full, so that
        it makes the same as one in one go.
    Raises NumericalError naming the step when a prediction is not finite.
    """
    check_budget(step_cache)
    device = dit.device
    x = latents.to(device, torch.float32, copy=True)
    text = text.to(device)
    guidance = guidance or Guidance()
    if guidance.negative is not None:
        guidance = replace(guidance, negative=guidance.negative.to(device))
    n_c = num_cond_latents
    cache = _shared_cache(dit, x[:, :, :n_c], bsa) if use_kv_cache and n_c else None
    done, x = progress.load(x) if progress else (0, x)
    num_steps, resumed = len(sigmas) - 1, done
    steps = (
        StepCache(step_cache, num_steps, progress.state.get("gains", ()) if progress else ()) if step_cache else None
    )
    predict = _Predictor(dit, text, guidance, n_c, bsa, cache, steps)
    levels: Sequence[float] = sigmas.tolist()
    kept = _Kept(done, x, steps)
    try:
        for step in range(resumed, num_steps):
            velocity, reused = predict(x, levels[step], step)
            _check_finite(velocity, step, num_steps, levels[step])
            noise_frames = x[:, :, n_c:]
            denoised = torch.cat([x[:, :, :n_c], noise_frames + levels[step] * velocity], dim=2)
            stepped = euler_step(noise_frames, model_output(velocity), sigmas[step].to(x), sigmas[step + 1].to(x))
            before, x, done = x, torch.cat([x[:, :, :n_c], stepped], dim=2), step + 1
            kept.after(before, x, done, reused=reused)
            if progress:
                kept.hand_to(progress.tick, progress)
            if on_step:
                on_step(StepInfo(done, num_steps, levels[step], x, denoised, reused))
    except BaseException:
        # Ctrl-C, a full disk in a callback, an out-of-memory error: what was computed is kept.
        if progress and kept.step > resumed:
            kept.hand_to(progress.save, progress)
        raise
    if steps is not None:
        log.info("step cache: %d of %d steps were reused", len(steps.reused), num_steps - resumed)
    if progress:
        progress.save(num_steps, x)
    return x


@dataclass
class _Kept:
    """From where an interrupted run goes on: from its last step, with a step cache from the last computed in full.

    That step is computed in full again, so the cache need not be kept, only what it knew after the step.
    """

    step: int
    latents: Tensor
    cache: StepCache | None
    state: dict[str, Any] = field(default_factory=dict)

    def after(self, before: Tensor, latents: Tensor, done: int, *, reused: bool) -> None:
        """`done` steps have led to these latents, the last of them from `before`."""
        if self.cache is None:
            self.step, self.latents = done, latents
        elif not reused:
            self.step, self.latents, self.state = done - 1, before, self.cache.state

    def hand_to(self, save: Callable[[int, Tensor], None], progress: Progress) -> None:
        if self.cache is not None:
            progress.state = self.state
        save(self.step, self.latents)


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
