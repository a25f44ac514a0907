"""Classifier-free guidance with the optimised scale of CFG-Zero* (Fan et al. 2025), as LongCat-Video uses it."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8


def cfg_zero(cond: Tensor, uncond: Tensor, guidance_scale: float, *, scale_from: slice = slice(None)) -> Tensor:
    """s * uncond + g * (cond - s * uncond) with s = <cond, uncond> / (|uncond|^2 + 1e-8) per sample.

    cond, uncond: velocities, fp32 [B, C, T, H, W]. scale_from: the latent frames that s is computed over.
    """
    c, u = cond[:, :, scale_from].flatten(1), uncond[:, :, scale_from].flatten(1)
    s = (c * u).sum(dim=1) / (torch.square(u).sum(dim=1) + EPS)
    scaled = s.view(-1, 1, 1, 1, 1) * uncond
    return scaled + guidance_scale * (cond - scaled)
