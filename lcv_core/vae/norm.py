"""The VAE's norm; and norm + SiLU + earlier frames in one pass, where a kernel for it runs and is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lcv_core.vae.choice import vae_kernels

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


def norm_silu_behind(norm: RMSNorm, x: Tensor, history: Tensor | None, wide: int | None = None) -> Tensor | None:
    """silu(norm(x)) of x [B, C, T, H, W] behind two frames [B, C, 2, H, W], zeros without them: [B, C, 2 + T, H, W].

    wide: channels of the result, C unless said otherwise; zeros behind the C. None where PyTorch has to do it.
    """
    kernels = vae_kernels(x.device)
    if kernels is None or not _takes(norm, x) or x.shape[1] > kernels.MOST_CHANNELS:
        return None
    C = x.shape[1]
    joined = kernels.norm_silu_behind(x, norm.gamma, norm.scale, FLOOR, 2, wide)
    if history is None:
        joined[:, :, :2].zero_()
    else:
        joined[:, :C, :2].copy_(history)
        joined[:, C:, :2].zero_()
    return joined


def _takes(norm: RMSNorm, x: Tensor) -> bool:
    """Nothing that needs a gradient or calls a hook, for the kernel has neither; nor fp64, which is for checks."""
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or norm.gamma.requires_grad)
    if needs_gradient or norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return False
    plain = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0
    return plain and norm.gamma.device == x.device and x.is_contiguous(memory_format=torch.channels_last_3d)
