"""The Wan 2.1 video VAE: 4x in time, 8x in space, causal. Attribute names are those of the diffusers checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.config import VAEConfig
from lcv_core.errors import InputError
from lcv_core.shapes import SPACE_FACTOR, TIME_FACTOR, num_latents, num_pixel_frames
from lcv_core.vae.layers import (
    Downsample,
    MidBlock,
    ResidualBlock,
    RMSNorm,
    StreamState,
    Upsample,
    causal_conv,
    channels_last,
    conv3,
    norm_silu_conv,
)


class Encoder(nn.Module):
    """pixels [B, 3, F, H, W] -> [B, 2 * z_dim, T, H/8, W/8]."""

    def __init__(self, config: VAEConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = conv3(ops, 3, dims[0], **factory)
        blocks: list[nn.Module] = []
        for i, (dim_in, dim_out) in enumerate(pairwise(dims)):
            widths = [dim_in] + [dim_out] * config.num_res_blocks
            blocks += [ResidualBlock(a, b, ops, **factory) for a, b in pairwise(widths)]
            if i < len(config.temperal_downsample):
                blocks.append(Downsample(dim_out, ops, temporal=config.temperal_downsample[i], **factory))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(dims[-1], ops, **factory)
        self.norm_out = RMSNorm(dims[-1], 3, **factory)
        self.conv_out = conv3(ops, dims[-1], 2 * config.z_dim, **factory)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = causal_conv(self.conv_in, x, state)
        for block in self.down_blocks:
            x = block(x, state)
        x = self.mid_block(x, state)
        return norm_silu_conv(self.norm_out, self.conv_out, x, state)


class UpBlock(nn.Module):
    def __init__(
        self, dim_in: int, dim_out: int, config: VAEConfig, ops: Any, *, upsample: str, **factory: Any
    ) -> None:
        super().__init__()
        widths = [dim_in] + [dim_out] * (config.num_res_blocks + 1)
        self.resnets = nn.ModuleList(ResidualBlock(a, b, ops, **factory) for a, b in pairwise(widths))
        self.upsamplers = None
        if upsample != "none":
            self.upsamplers = nn.ModuleList([Upsample(dim_out, ops, temporal=upsample == "3d", **factory)])

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, state)
        return x if self.upsamplers is None else self.upsamplers[0](x, state)


class Decoder(nn.Module):
    """[B, z_dim, T, h, w] -> pixels [B, 3, F, 8h, 8w]."""

    def __init__(self, config: VAEConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        kinds = ["3d" if temporal else "2d" for temporal in reversed(config.temperal_downsample)] + ["none"]
        self.conv_in = conv3(ops, config.z_dim, dims[0], **factory)
        self.mid_block = MidBlock(dims[0], ops, **factory)
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(kinds):
            dim_in = dims[i] if i == 0 else dims[i] // 2  # an upsampler before it has halved the channels
            self.up_blocks.append(UpBlock(dim_in, dims[i + 1], config, ops, upsample=kind, **factory))
        self.norm_out = RMSNorm(dims[-1], 3, **factory)
        self.conv_out = conv3(ops, dims[-1], 3, **factory)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = causal_conv(self.conv_in, x, state)
        x = self.mid_block(x, state)
        for block in self.up_blocks:
            x = block(x, state)
        return norm_silu_conv(self.norm_out, self.conv_out, x, state)


def decoder_reach(config: VAEConfig) -> int:
    """How many latent frames before a latent frame have a part in its pixels and in the decoder's state behind it.

    Each causal convolution looks two frames back, of which there are 1, 2 or 4 to a latent frame.
    """
    convolutions, rate, reach = 1 + 4, 1, Fraction(0)  # conv_in and the middle; the rate is of frames to a latent
    for doubles_time in (*reversed(config.temperal_downsample), False):
        convolutions += 2 * (config.num_res_blocks + 1) + doubles_time
        reach += Fraction(2 * convolutions, rate)
        convolutions, rate = 0, rate * (2 if doubles_time else 1)
    return math.ceil(reach + Fraction(2, rate))  # conv_out


class WanVAE(nn.Module):
    """Pixels in [-1, 1] <-> latents. `encode` and `decode` take and give un-normalised latents, as the network does;
    the DiT works on `normalize(latent)`.

    operations: namespace with Conv2d and Conv3d; default `lcv_core.layers`.
    """

    def __init__(
        self,
        config: VAEConfig | None = None,
        *,
        operations: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        ops = layers if operations is None else operations
        factory = {"device": device, "dtype": dtype}
        self.encoder = Encoder(config, ops, **factory)
        self.quant_conv = ops.Conv3d(2 * config.z_dim, 2 * config.z_dim, kernel_size=1, **factory)
        self.post_quant_conv = ops.Conv3d(config.z_dim, config.z_dim, kernel_size=1, **factory)
        self.decoder = Decoder(config, ops, **factory)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.post_quant_conv.weight.device

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        mean, std = (like.new_tensor(x).view(shape) for x in (self.config.latents_mean, self.config.latents_std))
        return mean, std

    def normalize(self, latent: Tensor) -> Tensor:
        """(z - mean) / std per channel: what the DiT sees."""
        mean, std = self._statistics(latent)
        return (latent - mean) / std

    def denormalize(self, latent: Tensor) -> Tensor:
        """z * std + mean per channel: what `decode` takes."""
        mean, std = self._statistics(latent)
        return latent * std + mean

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, F, H, W] in [-1, 1], F = 4k+1, H and W multiples of 8 -> (mean, logvar), fp32
        [B, z_dim, 1 + (F-1)/4, H/8, W/8] each, logvar clamped to [-30, 20]."""
        check_pixels(pixels)
        chunks = (pixels[:, :, a:b] for a, b in frame_chunks(pixels.shape[2]))
        out: Tensor | None = None
        for i, moments in enumerate(self.encode_stream(chunks)):
            if out is None:
                out = moments.new_empty(*moments.shape[:2], num_latents(pixels.shape[2]), *moments.shape[3:])
            out[:, :, i : i + 1] = moments
        assert out is not None
        return split_moments(out)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """un-normalised latent [B, z_dim, T, h, w] -> pixels fp32 [B, 3, 4T-3, 8h, 8w], clamped to [-1, 1]."""
        check_latent(latent, self.config.z_dim)
        B, _, T, h, w = latent.shape
        out: Tensor | None = None
        done = 0
        for pixels in self.decode_stream(latent):
            if out is None:
                out = pixels.new_empty(B, 3, num_pixel_frames(T), h * SPACE_FACTOR, w * SPACE_FACTOR)
            out[:, :, done : done + pixels.shape[2]] = pixels
            done += pixels.shape[2]
        assert out is not None
        return out

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """One latent frame's moments (mean | logvar unclamped), fp32 [B, 2 * z_dim, 1, h, w], per chunk of pixels.

        The first chunk is one frame, every later one four (see `frame_chunks`). Memory does not grow with the clip.
        """
        state: StreamState = {}
        for i, chunk in enumerate(chunks):
            if chunk.shape[2] != (TIME_FACTOR if i else 1):
                raise InputError(f"chunk {i} must have {TIME_FACTOR if i else 1} frames, got {chunk.shape[2]}")
            with torch.no_grad():
                moments = self.quant_conv(self.encoder(channels_last(chunk.to(self.device, self.dtype)), state))
            yield moments.float()

    def decode_stream(self, latent: Tensor | Iterable[Tensor], state: StreamState | None = None) -> Iterator[Tensor]:
        """Pixels fp32 [B, 3, 1 then 4, H, W] in [-1, 1] per latent frame [B, z_dim, 1, h, w] (un-normalised).

        Takes a whole latent [B, z_dim, T, h, w] or any iterable of its frames; memory does not grow with T. A `state`
        dict of the caller's lets a later call go on where this one ended.
        """
        frames = latent.split(1, dim=2) if isinstance(latent, Tensor) else latent
        state = {} if state is None else state
        for frame in frames:
            with torch.no_grad():
                pixels = self.decode_step(frame, state)
            yield pixels

    def decode_step(self, frame: Tensor, state: StreamState) -> Tensor:
        """The next latent frame of the clip that `state` belongs to -> its pixels, fp32, clamped."""
        x = self.post_quant_conv(channels_last(frame.to(self.device, self.dtype)))
        return self.decoder(x, state).float().clamp(-1.0, 1.0)


def frame_chunks(num_frames: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks that the encoder takes: frame 0 alone, then groups of four."""
    yield 0, 1
    for start in range(1, num_frames, TIME_FACTOR):
        yield start, start + TIME_FACTOR


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 2 * z_dim, ...] -> (mean, logvar clamped to [-30, 20])."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def check_pixels(pixels: Tensor) -> None:
    """InputError unless pixels is [B, 3, 4k+1, 8h, 8w]."""
    if pixels.dim() != 5 or pixels.shape[1] != 3:
        raise InputError(f"pixels must be [B, 3, F, H, W], got {list(pixels.shape)}")
    num_latents(pixels.shape[2])
    if pixels.shape[3] % SPACE_FACTOR or pixels.shape[4] % SPACE_FACTOR:
        raise InputError(f"pixel height and width must be multiples of {SPACE_FACTOR}, got {list(pixels.shape[3:])}")


def check_latent(latent: Tensor, z_dim: int) -> None:
    """InputError unless latent is [B, z_dim, T >= 1, h, w]."""
    if latent.dim() != 5 or latent.shape[1] != z_dim or latent.shape[2] < 1:
        raise InputError(f"latent must be [B, {z_dim}, T, h, w], got {list(latent.shape)}")
