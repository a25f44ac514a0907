"""Norm + modulate, norm + rope, gated add, SwiGLU without fp32 copies of the sequence, by name of who computes them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lcv_core import layers
from lcv_core.dit.frames import share_timesteps
from lcv_core.dit.kernels import plain, whole
from lcv_core.errors import InputError

log = logging.getLogger("lcv_core")

NAMES = ("auto", "torch", "triton", "whole")


@dataclass(frozen=True)
class Kernels:
    """See `plain` for what each does; all write over what they are given or give a new tensor, none has a gradient."""

    name: str
    modulate: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    gated_add_: Callable[..., None]
    norm_rope: Callable[..., None]
    swiglu_: Callable[[Tensor, Tensor], Tensor]


TORCH = Kernels("torch", plain.modulate, plain.layer_norm, plain.gated_add_, plain.norm_rope, plain.swiglu_)
WHOLE = Kernels("whole", whole.modulate, whole.layer_norm, whole.gated_add_, whole.norm_rope, plain.swiglu_)


@lru_cache(maxsize=16)
def resolve_kernels(name: str, device: torch.device, *, compiled: bool = False) -> Kernels:
    """The kernels called `name` on this device. InputError for an unknown name, or where they cannot run, with why.

    compiled: they are to be compiled; "auto" then takes "whole" where it would take "torch".
    """
    if name not in NAMES:
        raise InputError(f'unknown kernels "{name}"; there are: {", ".join(NAMES)}')
    if name in ("torch", "whole"):
        return TORCH if name == "torch" else WHOLE
    reason = _refusal(device)
    if name == "auto":
        chosen = _triton() if reason is None else WHOLE if compiled else TORCH
        log.info('kernels "auto" chose %s on %s%s', chosen.name, device, "" if reason is None else f" ({reason})")
        return chosen
    if reason is not None:
        raise InputError(f'kernels "triton" are not usable: {reason}; "torch" always are')
    return _triton()


def _refusal(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; try `pip install triton`"
    if device.type != "cuda":
        return f"they need a GPU, the model is on {device}"
    try:
        return check_kernels(_triton(), device)
    except Exception as error:  # without a C compiler, or with a Triton for another driver, it fails in many ways
        return f"they fail on {device} ({type(error).__name__}: {error})"


def check_kernels(kernels: Kernels, device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
    """Which of the kernels differ from plain PyTorch on a few tokens; None where none does."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    x, update, heads = draw(2, 6, 64), draw(2, 6, 64), draw(2, 6, 2, 32)
    shift, scale, gate = draw(2, 3 * 64).float().chunk(3, dim=-1)
    _, frames = share_timesteps(torch.tensor([[0.0, 5.0], [5.0, 5.0]], device=device), 3)
    bare, norm = layers.LayerNorm(64, elementwise_affine=False), layers.RMSNorm(32, eps=1e-6).to(device, dtype)
    angles = torch.linspace(0, 3, 6 * 16).view(6, 16)
    rope = torch.complex(angles.cos(), angles.sin()).to(device)

    def made(by: Kernels) -> dict[str, Tensor]:
        added, rotated = x.clone(), heads.clone()
        by.gated_add_(added, gate, update, frames)
        by.norm_rope(heads, norm, rope, rotated)
        modulated, gated = by.modulate(x, bare, shift, scale, frames), by.swiglu_(x.clone(), update)
        return {"norm + modulate": modulated, "gate": added, "norm + rope": rotated, "SwiGLU": gated}

    with torch.no_grad():
        got, expected = made(kernels), made(TORCH)
    wrong = [name for name, y in got.items() if not torch.allclose(y, expected[name], rtol=1e-2, atol=1e-2)]
    return f"they are wrong on {device}: {', '.join(wrong)}" if wrong else None


def _triton() -> Kernels:
    from lcv_core.dit.kernels import fused

    return Kernels("triton", fused.modulate, fused.layer_norm, fused.gated_add_, fused.norm_rope, fused.swiglu_)
