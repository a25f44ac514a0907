"""Whether the VAE's Triton kernels are used on a device: where they run, and are right there."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger("lcv_core")


def vae_kernels(device: torch.device) -> ModuleType | None:
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
