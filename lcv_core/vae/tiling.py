"""Spatial tiling: encode and decode frames larger than memory allows, tile by tile, cross-faded over the overlaps.

Each tile is a clip of its own with its own temporal state, so tiled decoding streams over latent frames like the
untiled one and memory does not grow with the number of frames. Tile and stride follow the released VAE (256 and 192
pixels); unlike there the result is clamped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.shapes import SPACE_FACTOR
from lcv_core.vae.layers import StreamState
from lcv_core.vae.model import WanVAE, check_latent, check_pixels, frame_chunks, split_moments


@dataclass(frozen=True)
class Tiling:
    """Tile side and stride in pixels, multiples of 8; the overlap is tile - stride."""

    tile: int = 256
    stride: int = 192

    def __post_init__(self) -> None:
        if self.tile % SPACE_FACTOR or self.stride % SPACE_FACTOR or not 0 < self.stride <= self.tile:
            raise InputError(
                f"tiling needs multiples of {SPACE_FACTOR} with 0 < stride <= tile, got tile {self.tile},"
                f" stride {self.stride}"
            )

    def spans(self, length: int) -> list[tuple[int, int]]:
        """(start, stop) in latent cells covering `length` cells; the last tile ends at the border."""
        tile, stride = self.tile // SPACE_FACTOR, self.stride // SPACE_FACTOR
        if length <= tile:
            return [(0, length)]
        starts = range(0, length - tile + stride, stride)
        return [(min(s, length - tile), min(s, length - tile) + tile) for s in starts]


def blend_weights(spans: list[tuple[int, int]], scale: int) -> list[Tensor]:
    """Per span a weight for each of its cells * scale: linear ramps over the overlaps, 1 in sum at each position."""
    total = torch.zeros(spans[-1][1] * scale)
    ramps = []
    for i, (start, stop) in enumerate(spans):
        n = (stop - start) * scale
        ramp = torch.ones(n)
        if i > 0:
            overlap = (spans[i - 1][1] - start) * scale
            ramp[:overlap] = torch.minimum(ramp[:overlap], (torch.arange(overlap) + 0.5) / max(overlap, 1))
        if i + 1 < len(spans):
            overlap = (stop - spans[i + 1][0]) * scale
            fade = (overlap - torch.arange(overlap) - 0.5) / max(overlap, 1)
            ramp[n - overlap :] = torch.minimum(ramp[n - overlap :], fade)
        ramps.append(ramp)
        total[start * scale : stop * scale] += ramp
    return [ramp / total[a * scale : b * scale] for ramp, (a, b) in zip(ramps, spans, strict=True)]


@dataclass
class Tile:
    """One tile's place, its blending weight and its temporal state."""

    rows: tuple[int, int]  # latent cells
    cols: tuple[int, int]
    weight: Tensor  # [rows * scale, cols * scale]
    state: StreamState


def _tiles(height: int, width: int, tiling: Tiling, scale: int, device: torch.device) -> list[Tile]:
    rows, cols = tiling.spans(height), tiling.spans(width)
    row_weights, col_weights = blend_weights(rows, scale), blend_weights(cols, scale)
    return [
        Tile(r, c, torch.outer(wr, wc).to(device), {})
        for r, wr in zip(rows, row_weights, strict=True)
        for c, wc in zip(cols, col_weights, strict=True)
    ]


def decode_stream_tiled(
    vae: WanVAE, latent: Tensor | Iterable[Tensor], tiling: Tiling | None = None, tiles: list[Tile] | None = None
) -> Iterator[Tensor]:
    """`WanVAE.decode_stream` by tiles: pixels fp32 [B, 3, 1 then 4, H, W] in [-1, 1] per latent frame.

    A `tiles` list of the caller's (empty at the start) lets a later call go on where this one ended.
    """
    tiling = tiling or Tiling()
    s = SPACE_FACTOR
    tiles = [] if tiles is None else tiles
    for frame in latent.split(1, dim=2) if isinstance(latent, Tensor) else latent:
        h, w = frame.shape[3:]
        if not tiles:
            tiles += _tiles(h, w, tiling, s, vae.device)
        out: Tensor | None = None
        for tile in tiles:
            (r0, r1), (c0, c1) = tile.rows, tile.cols
            with torch.no_grad():
                pixels = vae.decode_step(frame[..., r0:r1, c0:c1], tile.state)
            if out is None:
                out = pixels.new_zeros(*pixels.shape[:3], h * s, w * s)
            out[..., r0 * s : r1 * s, c0 * s : c1 * s] += pixels * tile.weight
        assert out is not None
        yield out.clamp_(-1.0, 1.0)


def decode_tiled(vae: WanVAE, latent: Tensor, tiling: Tiling | None = None) -> Tensor:
    """`WanVAE.decode` by tiles."""
    check_latent(latent, vae.config.z_dim)
    return torch.cat(list(decode_stream_tiled(vae, latent, tiling)), dim=2)


@torch.no_grad()
def encode_tiled(vae: WanVAE, pixels: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """`WanVAE.encode` by tiles: (mean, logvar), fp32."""
    check_pixels(pixels)
    tiling, s = tiling or Tiling(), SPACE_FACTOR
    h, w = pixels.shape[3] // s, pixels.shape[4] // s
    out: Tensor | None = None
    for tile in _tiles(h, w, tiling, 1, vae.device):
        (r0, r1), (c0, c1) = tile.rows, tile.cols
        part = pixels[..., r0 * s : r1 * s, c0 * s : c1 * s]
        moments = torch.cat(list(vae.encode_stream(part[:, :, a:b] for a, b in frame_chunks(part.shape[2]))), dim=2)
        if out is None:
            out = moments.new_zeros(*moments.shape[:3], h, w)
        out[..., r0:r1, c0:c1] += moments * tile.weight
    assert out is not None
    return split_moments(out)
