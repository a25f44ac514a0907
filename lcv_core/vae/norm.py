"""The VAE's norm; and norm + SiLU + earlier frames in one pass, where a kernel for it runs and is right."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("lcv_core")

FLOOR = 1e-24  # of the squared norm


class RMSNorm(nn.Module):
    """x / ||x|| over channels * sqrt(dim) * gamma; gamma is (C, 1, 1, 1) for video, (C, 1, 1) for images."""

    def __init__(self, dim: int, spatial_dims: int, **factory: Any) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims, **factory))

    def forward(self, x: Tensor) -> Tensor:
        # F.normalize with its 1e-12 floor, written out: the library's strided norm is 10x slower on a CPU.
        h = x.float() if x.dtype == torch.float16 else x  # in fp16 squares overflow from 256 on and the floor is 0
        inverse = torch.rsqrt(h.square().sum(dim=1, keepdim=True).clamp_min(FLOOR))
        return (h * inverse).to(x.dtype) * (self.scale * self.gamma.to(x.dtype))


def norm_silu_behind(norm: RMSNorm, x: Tensor, history: Tensor | None) -> Tensor | None:
    """silu(norm(x)) of x [B, C, T, H, W] behind two frames [B, C, 2, H, W], zeros without them: [B, C, 2 + T, H, W].

    None where PyTorch has to do it.
    """
    kernels = norm_kernels(x.device)
    if kernels is None or not _takes(norm, x) or x.shape[1] > kernels.MOST_CHANNELS:
        return None
    joined = kernels.norm_silu_behind(x, norm.gamma, norm.scale, FLOOR, 2)
    if history is None:
        joined[:, :, :2].zero_()
    else:
        joined[:, :, :2].copy_(history)
    return joined


def _takes(norm: RMSNorm, x: Tensor) -> bool:
    """Nothing that needs a gradient or calls a hook, for the kernel has neither; nor fp64, which is for checks."""
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or norm.gamma.requires_grad)
    if needs_gradient or norm._forward_hooks or norm._forward_pre_hooks or norm.gamma.device != x.device:
        return False
    plain = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0
    return plain and x.is_contiguous(memory_format=torch.channels_last_3d)


def norm_kernels(device: torch.device) -> ModuleType | None:
    """Triton's kernels where they run and are right; None elsewhere, and for a compiler, which fuses the passes."""
    if device.type != "cuda" or torch.compiler.is_compiling() or importlib.util.find_spec("triton") is None:
        return None
    return _proven_kernels(device)


@lru_cache(maxsize=16)
def _proven_kernels(device: torch.device) -> ModuleType | None:
    try:
        from lcv_core.vae import kernels

        reason = check_kernels(kernels, device)
    except Exception as error:  # without a C compiler, or with a Triton for another driver, it fails in many ways
        kernels, reason = None, f"they fail on {device} ({type(error).__name__}: {error})"
    if reason is not None:
        log.warning("the VAE's norms are computed by PyTorch, which is slower; Triton's kernels: %s", reason)
        return None
    return kernels


@torch.no_grad()
def check_kernels(kernels: ModuleType, device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
    """Which of the kernels differ from PyTorch's passes on a few pixels; None where none does."""
    g = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, 3).to(device, dtype)
    norm.gamma.copy_(1 + torch.randn(norm.gamma.shape, generator=g) / 8)
    x = torch.randn(2, 3, 5, 7, 24, generator=g).to(device, dtype).permute(0, 4, 1, 2, 3)
    got = kernels.norm_silu_behind(x, norm.gamma, norm.scale, FLOOR, 2)[:, :, 2:]
    if not torch.allclose(got, F.silu(norm(x)), rtol=1e-2, atol=1e-2):
        return f"they are wrong on {device}: norm + SiLU"
    return None
