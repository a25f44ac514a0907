"""Norm + modulate, norm + rope and gated add without fp32 copies of the sequence, by name of what computes them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lcv_core.dit.kernels import plain
from lcv_core.errors import InputError

log = logging.getLogger("lcv_core")

NAMES = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Kernels:
    """See `plain` for what each does; all write over what they are given or give a new tensor, none has a gradient."""

    name: str
    modulate: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    gated_add_: Callable[..., None]
    norm_rope: Callable[..., None]


TORCH = Kernels("torch", plain.modulate, plain.layer_norm, plain.gated_add_, plain.norm_rope)


@lru_cache(maxsize=16)
def resolve_kernels(name: str, device: torch.device) -> Kernels:
    """The kernels called `name` on this device. InputError for an unknown name, or where they cannot run, with why."""
    if name not in NAMES:
        raise InputError(f'unknown kernels "{name}"; there are: {", ".join(NAMES)}')
    if name == "torch":
        return TORCH
    reason = _refusal(device)
    if name == "auto":
        chosen = _triton() if reason is None else TORCH
        log.info('kernels "auto" chose %s on %s%s', chosen.name, device, "" if reason is None else f" ({reason})")
        return chosen
    if reason is not None:
        raise InputError(f'kernels "triton" are not usable: {reason}; "torch" always are')
    return _triton()


def _refusal(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; try `pip install triton`"
    return None if device.type == "cuda" else f"they need a GPU, the model is on {device}"


def _triton() -> Kernels:
    from lcv_core.dit.kernels import fused

    return Kernels("triton", fused.modulate, fused.layer_norm, fused.gated_add_, fused.norm_rope)
