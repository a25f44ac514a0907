"""Building blocks of the Wan 2.1 causal video VAE, with the state that lets a clip stream through in chunks.

Every causal layer keeps what it needs of earlier chunks in a `StreamState`, so a clip encoded or decoded chunk by
chunk equals the clip in one piece and memory does not grow with its length.

Channels lie last in memory from the first layer to the last (`channels_last`): convolutions of a GPU's tensor cores and
of a CPU take them so, and in any other layout each of them would copy what it is given and what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core.layers import frame_by_frame, joined_frames
from lcv_core.vae.convolve import convolve, doubled, wide_channels
from lcv_core.vae.norm import RMSNorm, norm_silu_behind

StreamState = dict[nn.Module, Tensor]
"""Layer -> last input frames [B, C, 1..2, H, W]. Empty at the start of a clip; one per clip (and per tile)."""


def channels_last(x: Tensor) -> Tensor:
    """x [B, C, T, H, W] or [N, C, H, W] with its channels last in memory; others as they are."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return x if layout is None else x.contiguous(memory_format=layout)


def channels_last_(model: nn.Module) -> None:
    """Weights of convolutions too: otherwise a GPU's library copies each of them whenever it is used."""
    for weight in model.parameters():
        weight.data = channels_last(weight.data)


def two_zero_frames(x: Tensor) -> Tensor:
    """[B, C, 2, H, W] in the memory layout of x [B, C, T, H, W], so that joining the two keeps it."""
    zeros = torch.zeros_like(x[:, :, :1])
    return join_frames(zeros, zeros)


def join_frames(before: Tensor, after: Tensor) -> Tensor:
    """Concatenation in time. With channels last it is a plain copy once channels are put last."""
    if after.stride(1) == 1:
        parts = [x.permute(0, 2, 3, 4, 1) for x in (before, after)]
        return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)
    return torch.cat([before, after], dim=2)


def causal_conv(conv: nn.Module, x: Tensor, state: StreamState) -> Tensor:
    """A 3x3x3 convolution that sees the two frames before this chunk: earlier chunks' or, at the start, zeros.

    `conv` pads in space alone; time comes from the state.
    """
    history = state.get(conv)
    x = join_frames(two_zero_frames(x) if history is None else history, x)  # what was given is alive no longer
    return _conv_joined(conv, x, state, None)


def norm_silu_conv(
    norm: RMSNorm, conv: nn.Module, x: Tensor, state: StreamState, residual: Tensor | None = None
) -> Tensor:
    """causal_conv(conv, silu(norm(x)), state), plus a residual."""
    joined = norm_silu_behind(norm, x, state.get(conv), wide_channels(conv, x))
    if joined is not None:
        return _conv_joined(conv, joined, state, residual)
    y = causal_conv(conv, F.silu(norm(x)), state)
    return y if residual is None else y + residual  # what was convolved is alive no longer


def _conv_joined(conv: Any, x: Tensor, state: StreamState, residual: Tensor | None) -> Tensor:
    """The convolution of x [B, C, 2 + T, H, W], whose last two frames the next chunk needs; zero channels it may do
    without."""
    state[conv] = x[:, : conv.in_channels, -2:].clone()  # a view would keep the whole chunk alive
    return convolve(conv, x, residual)


def conv3(ops: Any, dim_in: int, dim_out: int, **factory: Any) -> nn.Module:
    """The convolution of `causal_conv`."""
    return ops.Conv3d(dim_in, dim_out, kernel_size=3, padding=(0, 1, 1), **factory)


class ResidualBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim_in, 3, **factory)
        self.conv1 = conv3(ops, dim_in, dim_out, **factory)
        self.norm2 = RMSNorm(dim_out, 3, **factory)
        self.conv2 = conv3(ops, dim_out, dim_out, **factory)
        self.conv_shortcut = ops.Conv3d(dim_in, dim_out, kernel_size=1, **factory) if dim_in != dim_out else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x, state)
        if self.conv_shortcut is None:
            return norm_silu_conv(self.norm2, self.conv2, h, state, x)
        h = norm_silu_conv(self.norm2, self.conv2, h, state)
        return convolve(self.conv_shortcut, x, h)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, dim: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2, **factory)
        self.to_qkv = ops.Conv2d(dim, 3 * dim, kernel_size=1, **factory)
        self.proj = ops.Conv2d(dim, dim, kernel_size=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        frames = frame_by_frame(x)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)  # [B*T, 1, H*W, 3C]
        h = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        h = self.proj(h.reshape(len(frames), *frames.shape[2:], -1).permute(0, 3, 1, 2))
        return x + joined_frames(h, x.shape[0])


class MidBlock(nn.Module):
    def __init__(self, dim: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim, dim, ops, **factory) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(dim, ops, **factory)])

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = self.resnets[0](x, state)
        return self.resnets[1](self.attentions[0](x), state)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of x [B, C, T, H, W]."""
    return joined_frames(layer(frame_by_frame(x)), x.shape[0])


class Downsample(nn.Module):
    """Halves space, and time too with `temporal`."""

    def __init__(self, dim: int, ops: Any, *, temporal: bool, **factory: Any) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(dim, dim, 3, stride=2, **factory))
        self.time_conv = ops.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1), **factory) if temporal else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        pad, conv = self.resample
        x = per_frame(lambda frames: convolve(conv, pad(frames)), x)
        if self.time_conv is None:
            return x
        last = state.get(self)
        state[self] = x[:, :, -1:].clone()
        # The first frame of a clip passes through; later frames are merged in pairs behind the frame before them.
        return x if last is None else convolve(self.time_conv, join_frames(last, x))


class Upsample(nn.Module):
    """Doubles space (halving channels), and time too with `temporal`."""

    def __init__(self, dim: int, ops: Any, *, temporal: bool, **factory: Any) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), ops.Conv2d(dim, dim // 2, 3, padding=1, **factory)
        )
        self.time_conv = ops.Conv3d(dim, 2 * dim, (3, 1, 1), **factory) if temporal else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(x, state)
        larger, conv = self.resample
        return per_frame(lambda frames: convolve(conv, doubled(larger, frames)), x)

    def _double_time(self, x: Tensor, state: StreamState) -> Tensor:
        """Chunk 0 stays single and leaves no trace: the history of chunk 1 is zeros."""
        history = state.get(self)
        if history is None:
            state[self] = two_zero_frames(x)
            return x
        assert self.time_conv is not None
        padded = join_frames(history, x)
        state[self] = padded[:, :, -2:].clone()
        both = convolve(self.time_conv, padded).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]: even and odd frames
        return both.permute(0, 3, 1, 4, 5, 2).contiguous().flatten(1, 2).permute(0, 4, 1, 2, 3)  # channels last
