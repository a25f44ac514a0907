"""Block sparse attention on any video MODEL, and what it saves and costs there."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from lcv_bsa.adapters.comfyui import SparseOverride, make_sparse
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.dit.attention import EIGHT_BITS, check_eight_bits
from lcv_core.errors import InputError

from .native import LongCatVideo, leading_zeros
from .sampling import Latent, StepBar, make_guider, run_guider, tell_of_triton, with_bsa
from .schedule import sigmas_of
from .text import Conditioning

OVERRIDE = "optimized_attention_override"  # transformer_options: what ComfyUI calls in place of its attention
BLOCKS = {"4 x 4 x 4": (4, 4, 4), "2 x 8 x 4": (2, 8, 4), "4 x 8 x 4": (4, 8, 4), "4 x 8 x 8": (4, 8, 8)}


def sparse_model(
    model: Any, sparsity: float, block: str = "4 x 4 x 4", min_tokens: int = 4096, eight_bits: bool = False
) -> Any:
    """A clone of a MODEL with block sparse self-attention in place of any that it had; sparsity 0 makes it dense.

    LongCat-Video knows its condition frames; for another model every self-attention over the whole video's tokens is
    sparse. eight_bits: see BSAConfig. InputError where the token grid of a model is not known, and where eight bits
    cannot be multiplied.
    """
    if block not in BLOCKS:
        raise InputError(f"unknown block {block!r}; there are: {', '.join(BLOCKS)}")
    bsa = None
    if sparsity:
        bsa = BSAConfig(sparsity, BLOCKS[block], BLOCKS[block], eight_bits=eight_bits)  # validates
        if eight_bits:
            check_eight_bits(model.load_device, torch.bfloat16, 128)
    if isinstance(model.model, LongCatVideo):
        return with_bsa(model, bsa)
    model = _dense(model)
    if bsa is None:
        return model
    patch = getattr(model.model.diffusion_model, "patch_size", None)
    if not isinstance(patch, (tuple, list)) or len(patch) != 3:
        raise InputError(
            f"the token grid of {type(model.model).__name__} is not known; block sparse attention works with"
            " LongCat-Video, Wan and other video models whose transformer has a patch_size of three"
        )
    tell_of_triton(model.load_device)
    return make_sparse(
        model, keep=1.0 - sparsity, block=BLOCKS[block], min_tokens=min_tokens,
        backend=EIGHT_BITS if eight_bits else "auto",
    )  # fmt: skip


def _dense(model: Any) -> Any:
    """A clone of another video MODEL without the block sparse attention that it may have."""
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    override = options.pop(OVERRIDE, None)
    while isinstance(override, SparseOverride):
        override = override.previous
    if override is not None:
        options[OVERRIDE] = override
    return clone


@dataclass(frozen=True)
class Comparison:
    """One sampling run, dense and sparse. psnr: decibels, of pixels where a VAE was given, else of latents."""

    dense: Latent
    sparse: Latent
    seconds_dense: float
    seconds_sparse: float
    psnr: float
    measured_on: str

    def __str__(self) -> str:
        ratio = self.seconds_dense / max(self.seconds_sparse, 1e-9)
        faster = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
        psnr = "identical" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB"
        return (
            f"dense {self.seconds_dense:.2f} s, sparse {self.seconds_sparse:.2f} s: {faster}\n"
            f"PSNR of the {self.measured_on} against dense, same seed: {psnr}"
        )


def compare(
    model: Any, positive: Conditioning, negative: Conditioning | None, latent: Latent, *, vae: Any, sparsity: float,
    block: str, min_tokens: int, num_steps: int, guidance_scale: float, seed: int,
) -> Comparison:  # fmt: skip
    """Sample dense, then sparse, with the same seed; each timed over its steps, after one that is not counted.

    InputError where the VAE is for other latents than the model's.
    """
    channels, theirs = getattr(vae, "latent_channels", None), model.model.latent_format.latent_channels
    if vae is not None and channels != theirs:
        raise InputError(f"this VAE is for {channels} channels, the model's latents have {theirs}; connect its own VAE")
    bar = StepBar(model, 2 * (num_steps + 1))
    runs = []
    for offset, patched in ((0, model), (num_steps + 1, sparse_model(model, sparsity, block, min_tokens))):
        guider = _guider(patched, positive, negative, guidance_scale)
        sigmas = _sigmas(patched, num_steps)
        _sample(guider, latent, sigmas[:2], seed, bar, offset)  # loading, autotuning, compilation
        runs.append(_sample(guider, latent, sigmas, seed, bar, offset + 1))
    (dense, before), (sparse, after) = runs
    if vae is None:
        return Comparison(dense, sparse, before, after, psnr(dense["samples"], sparse["samples"]), "latents")
    pixels = [vae.decode(made["samples"]) for made in (dense, sparse)]
    return Comparison(dense, sparse, before, after, psnr(pixels[0], pixels[1], peak=1.0), "frames")


def _guider(model: Any, positive: Conditioning, negative: Conditioning | None, scale: float) -> Any:
    if isinstance(model.model, LongCatVideo):
        return make_guider(model, positive, negative, scale)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative if negative is not None else positive)
    guider.set_cfg(scale if negative is not None else 1.0)
    return guider


def _sigmas(model: Any, num_steps: int) -> Tensor:
    if isinstance(model.model, LongCatVideo):
        return sigmas_of(model, "base", num_steps)
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", num_steps)


def _sample(guider: Any, latent: Latent, sigmas: Tensor, seed: int, bar: StepBar, offset: int) -> tuple[Latent, float]:
    samples = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
    mask = latent.get("noise_mask")
    if mask is not None:
        leading_zeros(comfy.utils.reshape_mask(mask.float(), samples.shape), samples.shape[2])  # validates
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    out = run_guider(
        guider, noise, samples, sigmas, mask=mask, seed=seed,
        watch=lambda step, _, denoised, __: bar.show(offset + step + 1, denoised),
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"samples": out}, time.perf_counter() - start


def psnr(a: Tensor, b: Tensor, peak: float | None = None) -> float:
    """Peak signal to noise ratio in decibels; peak None takes the range of `a`."""
    error = (a.double() - b.double()).square().mean().item()
    span = peak if peak is not None else (a.max() - a.min()).item()
    return math.inf if error == 0 else 10.0 * math.log10(span * span / error)
