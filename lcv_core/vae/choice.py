"""Whether the VAE's Triton kernels are used on a device: where they run, and are right there."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from lcv_core.proven import may_run, proven


def vae_kernels(device: torch.device) -> ModuleType | None:
    """Triton's kernels where they run and are right; None elsewhere, and for a compiler, which fuses the passes."""
    return _proven_kernels(device) if may_run(device) else None


@lru_cache(maxsize=16)
def _proven_kernels(device: torch.device) -> ModuleType | None:
    return proven(_load, check_kernels, device, "the VAE's norms are computed by PyTorch")


def _load() -> ModuleType:
    from lcv_core.vae import kernels

    return kernels


@torch.no_grad()
def check_kernels(kernels: ModuleType, device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
    """Which of the kernels differ from PyTorch's passes on a few pixels; None where none does."""
    from lcv_core.vae.norm import FLOOR, RMSNorm

    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    norm, x, bias = RMSNorm(24, 3).to(device, dtype), draw(2, 3, 5, 7, 24).permute(0, 4, 1, 2, 3), draw(24)
    norm.gamma.copy_(1 + draw(24, 1, 1, 1) / 8)
    frames = x[0].transpose(0, 1)  # [3, 24, 5, 7]
    added = kernels.add_bias_(x.clone(), bias, x)
    pairs = {
        "norm + SiLU": (
            kernels.norm_silu_behind(x, norm.gamma, norm.scale, FLOOR, 2)[:, :, 2:], torch.nn.functional.silu(norm(x))
        ),
        "bias": (added, 2 * x + bias.view(-1, 1, 1, 1)),
        "doubling": (kernels.doubled(frames), frames.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    }  # fmt: skip
    wrong = [name for name, (got, expected) in pairs.items() if not torch.allclose(got, expected, rtol=1e-2, atol=1e-2)]
    return f"they are wrong on {device}: {', '.join(wrong)}" if wrong else None
