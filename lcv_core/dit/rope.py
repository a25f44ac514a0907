"""Rotary position embedding over the (time, height, width) token grid."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lcv_core.layers import upcast

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of (time, height, width): the two spatial axes take 2 * (D // 6) each, time the rest (128: 44|42|42)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_angles(grid: tuple[int, int, int], head_dim: int, device: torch.device | None = None) -> Tensor:
    """Angles in radians, fp32 [T*h*w, head_dim // 2]; channels 2i and 2i+1 of a head share angle i.

    Positions are integers from 0 on each axis; the time origin is the first latent frame, condition frames included.
    """
    per_axis = []
    for length, dim in zip(grid, axis_dims(head_dim), strict=True):
        # On the CPU first, so that every device gets the same bits.
        frequencies = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        per_axis.append(torch.outer(torch.arange(length, dtype=torch.float32), frequencies))
    time, height, width = per_axis
    T, h, w = grid
    angles = torch.cat(
        [
            time[:, None, None].expand(T, h, w, -1),
            height[None, :, None].expand(T, h, w, -1),
            width[None, None, :].expand(T, h, w, -1),
        ],
        dim=-1,
    )
    return angles.reshape(T * h * w, head_dim // 2).to(device)


@lru_cache(maxsize=4)
def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """cos + i sin of the angles, complex64 [T*h*w, head_dim // 2]; one table shared by all layers and steps."""
    with torch.inference_mode(False):  # a table first made in inference mode has to serve training too
        angles = rope_angles(grid, head_dim)
        return torch.complex(angles.cos(), angles.sin()).to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [B, H, N, D] by the table's N rows in fp32; the result has x's dtype."""
    h = upcast(x)
    a, b = h[..., 0::2], h[..., 1::2]
    cos, sin = table.real.to(h.dtype), table.imag.to(h.dtype)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
