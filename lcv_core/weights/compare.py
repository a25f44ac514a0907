"""How far the velocity of one set of weights is from that of another, on random latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.quantised import is_large

TIMESTEPS = (900.0, 500.0, 100.0)
_LATENTS = (3, 8, 12)  # frames, height, width: 72 tokens
_TEXT = 16  # tokens
_SEED = 0


@dataclass(frozen=True)
class Comparison:
    """relative_error: RMS of the difference over RMS of the velocity. psnr: dB, of its range, infinite when equal."""

    relative_error: float
    psnr: float


def compare_velocities(
    before: str | Path, after: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype
) -> Comparison:
    """Both transformers in `dtype` on the same small random latents and text at three timesteps, one after the other:
    of each the weights are in memory once. Quantised weights stay so in memory."""
    velocities = [_velocities(path, torch.device(device), dtype) for path in (before, after)]
    difference = velocities[1] - velocities[0]
    rms, own = difference.square().mean().sqrt().item(), velocities[0].square().mean().sqrt().item()
    spread = (velocities[0].max() - velocities[0].min()).item()
    return Comparison(rms / own, math.inf if rms == 0 else 20 * math.log10(spread / rms))


@torch.no_grad()
def _velocities(path: str | Path, device: torch.device, dtype: torch.dtype) -> Tensor:
    """fp64 [timesteps, C, T, H, W], on the CPU."""
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.dit_tensors
    quantised = any(any(tensors.kinds(name)) for name in tensors.keys() if is_large(name))  # noqa: SIM118
    dit = checkpoint.load_dit(device=device, dtype=dtype, weights="stored" if quantised else "plain")
    g = torch.Generator().manual_seed(_SEED)
    latents = torch.randn(1, dit.config.in_channels, *_LATENTS, generator=g).to(device)
    text = torch.randn(1, _TEXT, dit.config.caption_channels, generator=g).to(device)
    steps = [dit(latents, torch.tensor([t], device=device), text).double().cpu() for t in TIMESTEPS]
    return torch.cat(steps)
