"""Stand-ins for what the adapters meet: models with the attributes, signatures and class names of diffusers' own.

Their processors are written apart from the adapters': rotary positions by complex numbers, attention as told.
"""

from collections.abc import Callable
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
GRID, PATCH = (5, 6, 7), (1, 2, 2)
HEADS, HEAD_DIM, WIDTH = 2, 8, 16


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, D], dense."""
    return F.scaled_dot_product_attention(q, k, v)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of x [..., D] turned by angles [..., D / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    doubled = angles.repeat_interleave(2, -1)
    return doubled.cos(), doubled.sin()


class Attention(nn.Module):
    """Projections, norms and a processor. joint: None, or "dual" or "single", as HunyuanVideo's streams."""

    def __init__(self, processor: Any, *, joint: str | None = None) -> None:
        super().__init__()
        self.heads = HEADS
        norm = HEAD_DIM if joint else WIDTH
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(norm), nn.RMSNorm(norm)
        self.add_q_proj: Any = None
        self.to_add_out: Any = None
        if joint == "dual":
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.norm_added_q, self.norm_added_k = nn.RMSNorm(norm), nn.RMSNorm(norm)
            self.to_add_out = nn.Linear(WIDTH, WIDTH)
        if joint != "single":
            self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])
        for name, parameter in self.named_parameters():
            if "norm" in name:  # not the ones they begin with: norms must not be interchangeable
                nn.init.uniform_(parameter, 0.5, 2.0)
        self.processor: Any = processor

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(self, *args, **kwargs)


class WanAttnProcessor:
    """The dense one. angles are found from cos and sin [1, S, 1, D]."""

    _parallel_config = None

    def __init__(self, attend: Attend = sdpa) -> None:
        self.attend = attend
        self.calls = 0

    def __call__(
        self, attn: Attention, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, rotary: Any = None
    ) -> Tensor:
        self.calls += 1
        source = x if context is None else context
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (y.unflatten(2, (HEADS, -1)) for y in (q, k, v))
        if rotary is not None:
            angles = torch.atan2(rotary[1], rotary[0])[..., ::2]
            q, k = turned(q, angles), turned(k, angles)
        o = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attn.to_out[0](o.transpose(1, 2).flatten(2))


class LTXVideoAttnProcessor(WanAttnProcessor):
    """LTX turns before it splits the heads: cos and sin [B, S, C]."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        rotary = None
        if image_rotary_emb is not None:
            rotary = [x.unflatten(2, (HEADS, -1)) for x in image_rotary_emb]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)


class HunyuanVideoAttnProcessor2_0:
    """The dense one; attend gets the mask too. cos and sin [S, D], of the video alone."""

    _parallel_config = None

    def __init__(self, attend: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any,
    ) -> tuple[Tensor, Tensor]:
        angles = torch.atan2(image_rotary_emb[1], image_rotary_emb[0])[None, :, None, ::2]
        q, k, v = (
            f(hidden_states).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = (turned(n(x).transpose(1, 2), angles).transpose(1, 2) for n, x in ((attn.norm_q, q), (attn.norm_k, k)))
        added = attn.add_q_proj is not None
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if added else (attn.to_q, attn.to_k, attn.to_v)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        tq, tk, tv = (f(encoder_hidden_states).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in text)
        joined = [torch.cat(pair, 2) for pair in ((q, norms[0](tq)), (k, norms[1](tk)), (v, tv))]
        o = self.attend(*joined, attention_mask).transpose(1, 2).flatten(2)
        video, text_o = o.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return (attn.to_out[0](video), attn.to_add_out(text_o)) if added else (video, text_o)


def angles_of(tokens: int) -> Tensor:
    """[S, D / 2]."""
    return torch.arange(tokens)[:, None] * 0.3 ** torch.arange(HEAD_DIM // 2)


class WanBlock(nn.Module):
    def __init__(self, processor: type = WanAttnProcessor) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(processor()), Attention(processor())

    def forward(self, x: Tensor, text: Tensor, rotary: Any) -> Tensor:
        x = x + self.attn1(x, None, None, rotary)
        return x + self.attn2(x, text, None, None)


class WanTransformer3DModel(nn.Module):
    """Latent [B, 4, F, H, W] -> tokens [B, S, WIDTH], two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=PATCH)
        self.patch_embedding = nn.Conv3d(4, WIDTH, PATCH, PATCH)
        self.blocks: Any = nn.ModuleList(WanBlock() for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.patch_embedding(hidden_states).flatten(2).mT
        rotary = tuple(part[None, :, None] for part in cos_sin(angles_of(x.shape[1])))
        for block in self.blocks:
            x = block(x, encoder_hidden_states, rotary)
        return x


class LTXVideoTransformer3DModel(nn.Module):
    """Tokens [B, S, WIDTH] and the grid they are told -> tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks: Any = nn.ModuleList([WanBlock(LTXVideoAttnProcessor)])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        rotary = tuple(x.repeat(len(hidden_states), 1, HEADS) for x in cos_sin(angles_of(hidden_states.shape[1])))
        return self.transformer_blocks[0](hidden_states, encoder_hidden_states, rotary)


class HunyuanVideoTransformer3DModel(nn.Module):
    """Latent, text [B, L, WIDTH] and a mask, bool [B, 1, 1, S + L] -> (video, text), one block of either stream."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=PATCH[1], patch_size_t=PATCH[0])
        self.patch_embedding = nn.Conv3d(4, WIDTH, PATCH, PATCH)
        self.transformer_blocks: Any = nn.ModuleList([nn.Module()])
        self.single_transformer_blocks: Any = nn.ModuleList([nn.Module()])
        for blocks, joint in ((self.transformer_blocks, "dual"), (self.single_transformer_blocks, "single")):
            blocks[0].attn = Attention(HunyuanVideoAttnProcessor2_0(), joint=joint)

    def forward(self, hidden_states: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embedding(hidden_states).flatten(2).mT
        rotary = cos_sin(angles_of(x.shape[1]))
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            x, text = block.attn(
                hidden_states=x, encoder_hidden_states=text, attention_mask=mask, image_rotary_emb=rotary
            )
        return x, text


def latent(generator: torch.Generator, grid: tuple[int, int, int] = GRID) -> Tensor:
    """[2, 4, F, H, W] that gives this grid of tokens."""
    assert prod(PATCH) == 4
    return torch.randn(2, 4, *(n * p for n, p in zip(grid, PATCH)), generator=generator)
