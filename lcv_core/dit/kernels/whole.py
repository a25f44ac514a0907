"""Norms, rope and gates of whole tensors, for a compiler to fuse: eagerly each makes fp32 copies of what it is given.

The same formulas as `plain`, without its pieces, which a compiler would unroll one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lcv_core.dit.embed import in_fp32
from lcv_core.dit.frames import Frames
from lcv_core.layers import upcast


def modulate(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor, frames: Frames, start: int = 0) -> Tensor:
    """See `plain.modulate`."""
    gain, moved = (_of_tokens(m, x, frames, start) for m in (1 + scale, shift))
    return (in_fp32(norm, x) * gain + moved).to(x.dtype).contiguous()


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """See `plain.layer_norm`."""
    return in_fp32(norm, x).to(x.dtype).contiguous()


def gated_add_(x: Tensor, gate: Tensor, update: Tensor, frames: Frames, start: int = 0) -> None:
    """See `plain.gated_add_`."""
    x.copy_(upcast(x) + upcast(update) * _of_tokens(gate, x, frames, start))


def norm_rope(x: Tensor, norm: nn.Module, rope: Tensor | None, out: Tensor) -> None:
    """See `plain.norm_rope`. The table may also be real, [n, D / 2, 2]: compilers do not know complex numbers."""
    h = norm(x)
    if rope is not None:
        h = upcast(h)
        cos, sin = (torch.view_as_real(rope) if rope.is_complex() else rope)[:, None].unbind(-1)  # [n, 1, D / 2] each
        a, b = h.unflatten(-1, (-1, 2)).unbind(-1)
        h = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    out.copy_(h)


def _of_tokens(rows: Tensor, x: Tensor, frames: Frames, start: int) -> Tensor:
    """rows fp32 [R, C] of the distinct timesteps -> what broadcasts over x [B, n, C], the tokens from `start` on."""
    if rows.shape[0] == 1:
        return rows
    token = torch.arange(start, start + x.shape[1], device=x.device)
    return rows[frames.rows[:, token // frames.frame_tokens].long()]
