"""What turns latents, timesteps and text states into tokens, and tokens back into latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lcv_core.config import DiTConfig
from lcv_core.dit.pieces import by_layer
from lcv_core.layers import upcast

if TYPE_CHECKING:
    from lcv_core.dit.block import Lean


class PatchEmbed(nn.Module):
    """latents [B, C, T, H, W] -> tokens [B, T*h*w, hidden] in (T, h, w) raster order."""

    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = ops.Conv3d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        return rearrange(self.proj(latents), "b c t h w -> b (t h w) c")


def timestep_sinusoid(timestep: Tensor, width: int) -> Tensor:
    """[n] in [0, 1000] -> fp32 [n, width], cosines first, base 10000 (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbed(nn.Module):
    """timestep [n] -> fp32 [n, adaln_tembed_dim]. An fp32 island."""

    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.width, dim = config.frequency_embedding_size, config.adaln_tembed_dim
        self.mlp = nn.Sequential(ops.Linear(self.width, dim, **factory), nn.SiLU(), ops.Linear(dim, dim, **factory))

    def forward(self, timestep: Tensor) -> Tensor:
        # An fp64 model (gradient checks) computes in fp64; every other one in fp32, whatever its weights are stored in.
        dtype = torch.float64 if timestep.dtype == torch.float64 else torch.float32
        h = in_fp32(self.mlp[0], timestep_sinusoid(timestep, self.width).to(dtype))
        return in_fp32(self.mlp[2], self.mlp[1](h))


class CaptionEmbed(nn.Module):
    """text states [B, L, caption_channels] -> [B, L, hidden]."""

    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.y_proj = nn.Sequential(
            ops.Linear(config.caption_channels, config.hidden_size, **factory),
            nn.GELU(approximate="tanh"),
            ops.Linear(config.hidden_size, config.hidden_size, **factory),
        )

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text)


def pads_as_one(text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows [B, L, C] followed by `count` zero rows, as cross-attention sees them, in fewer rows: [B, L + n, C] and the
    bias of their scores [1, 1, 1, L + n].

    Equal keys have equal scores s and values, and count * exp(s) = exp(s + log(count)): one row stands for all of them.
    In half precision, which holds log(count) too coarsely, two rows do, for its bulk and for what rounding left of it.
    """
    parts = log_parts(count, text.dtype)
    bias = text.new_zeros(text.shape[1] + len(parts))
    bias[text.shape[1] :] = torch.tensor(parts, dtype=text.dtype)
    return torch.cat([text, text.new_zeros(text.shape[0], len(parts), text.shape[2])], dim=1), bias[None, None, None]


def log_parts(count: int, dtype: torch.dtype) -> list[float]:
    """Numbers that `dtype` holds whose exponentials add up to `count`, to the accuracy of a sum in it."""
    if torch.finfo(dtype).bits >= 32:
        return [math.log(count)]
    first = torch.tensor(math.log(count), dtype=dtype)
    if first.double() > math.log(count):  # rounded up
        first = torch.nextafter(first, first.new_tensor(0.0))
    rest = count - math.exp(first.item())
    return [first.item(), math.log(rest) if rest > 0 else torch.finfo(dtype).min]


def num_pads_as_one(dtype: torch.dtype) -> int:
    """How many rows `pads_as_one` adds."""
    return 1 if torch.finfo(dtype).bits >= 32 else 2


def in_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of an fp32 island: fp32 activations, the stored (perhaps bf16-rounded) weights, fp32 out.

    Layers of lcv_core.layers and of hosts follow the dtype of their input; a plain torch.nn layer has to be told.
    """
    x = upcast(x)
    if type(layer) in (nn.Linear, nn.LayerNorm) and any(p.dtype != x.dtype for p in layer.parameters()):
        # functional_call keeps the layer's hooks (adapters) working.
        widened = {name: p.to(x.dtype) for name, p in layer.named_parameters()}
        return torch.func.functional_call(layer, widened, (x,))
    return layer(x)


def modulate(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift in fp32, rounded to x's dtype. x [B, N, C]; shift, scale [B, T, 1, C] per frame."""
    frames = shift.shape[1]
    h = in_fp32(norm, x).unflatten(1, (frames, -1))  # [B, T, S, C]
    return (h * (1 + scale) + shift).flatten(1, 2).to(x.dtype)


class FinalLayer(nn.Module):
    """tokens [B, N, hidden] -> fp32 [B, N, prod(patch) * out_channels]; the linear is an fp32 island."""

    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm_final = ops.LayerNorm(hidden, eps=1e-6, elementwise_affine=False, **factory)
        self.linear = ops.Linear(hidden, math.prod(config.patch_size) * config.out_channels, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(config.adaln_tembed_dim, 2 * hidden, **factory))

    def forward(self, x: Tensor, tau: Tensor, lean: Lean | None = None) -> Tensor:
        """tau [B, T, A]; with `lean`, which keeps no gradient, [1, R, A] of the distinct timesteps."""
        silu, linear = self.adaLN_modulation
        modulation = in_fp32(linear, silu(tau))
        if lean is not None:
            shift, scale = modulation[0].chunk(2, dim=-1)  # [R, C]
            return self._by_pieces(x, shift, scale, lean)
        shift, scale = modulation.unsqueeze(2).chunk(2, dim=-1)  # [B, T, 1, C]
        return in_fp32(self.linear, modulate(x, self.norm_final, shift, scale))

    def _by_pieces(self, x: Tensor, shift: Tensor, scale: Tensor, lean: Lean) -> Tensor:
        """No fp32 copy of all tokens is alive: their linear layer computes in fp32."""
        made = []
        for i, j in by_layer(x.shape[1], self.linear, x.device):
            m = lean.kernels.modulate(x[:, i:j], self.norm_final, shift, scale, lean.frames, i)
            made.append(in_fp32(self.linear, m))
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)  # 64 channels: a copy of them is nothing


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """[B, T*h*w, pt*ph*pw*C] with C fastest -> [B, C, T, H, W]."""
    (T, h, w), (pt, ph, pw) = grid, patch
    pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
    return rearrange(tokens, pattern, t=T, h=h, w=w, pt=pt, ph=ph, pw=pw)
