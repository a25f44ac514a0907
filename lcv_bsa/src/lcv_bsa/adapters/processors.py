"""Attention processors for diffusers' Wan, LTX-Video and HunyuanVideo (structure of diffusers 0.35 to 0.42).

Each stands in for the model's own processor, with its signature, and differs in the attention alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lcv_bsa.adapters.grid import check_tokens
from lcv_bsa.adapters.joint import joint_attention, text_lengths_of
from lcv_bsa.adapters.options import SparseOptions
from lcv_bsa.layout import Triple, as_triple

Processor = Callable[..., Any]
Rotary = tuple[Tensor, Tensor]


@dataclass
class ModelCall:
    """What one call of the model knows and its processors share."""

    grid: Triple | None = None
    dense: bool = False
    # the mask of the call and its text lengths: reading them waits for the device, so once for all blocks
    mask: Tensor | None = None
    text_lengths: list[int] = field(default_factory=list)


class SparseAttnProcessor:
    """What the three processors share.

    grid: (T, H, W) of the tokens, or a ModelCall that is told it before each call of the model. dense: the processor of
    calls that stay dense; needed where options.min_tokens is not 0. Raises ValueError.
    """

    # diffusers writes here when context parallelism is switched on
    _parallel_config: Any = None

    def __init__(
        self,
        grid: Sequence[int] | ModelCall,
        *,
        options: SparseOptions | None = None,
        dense: Processor | None = None,
    ) -> None:
        self.call = grid if isinstance(grid, ModelCall) else ModelCall(as_triple("grid", grid))
        self.options = SparseOptions() if options is None else options
        self.dense = dense
        if dense is None and self.options.min_tokens:
            raise ValueError(f"dense must be a processor where min_tokens is {self.options.min_tokens}, got None")

    def _grid(self) -> Triple:
        if self._parallel_config is not None:
            raise ValueError("context parallelism is not supported, got a model with it on; switch it off or go dense")
        if self.call.grid is None:
            raise ValueError("the grid is not known before the model was called, got a call of its attention alone")
        return self.call.grid

    def _dense(self, grid: Triple) -> Processor | None:
        """The dense processor where this call is its."""
        return self.dense if self.call.dense or prod(grid) < self.options.min_tokens else None

    def _self_attention(self, q: Tensor, k: Tensor, v: Tensor, grid: Triple) -> Tensor:
        """q, k, v [B, S, H, D] -> [B, S, H * D]. Under autocast the rotated q and k are fp32 where v is not."""
        return self.options.attend(q.to(v.dtype), k.to(v.dtype), v, grid, layout="bshd")[0].flatten(2)


class SparseWanAttnProcessor(SparseAttnProcessor):
    """For `attn1`, the self attention, of Wan's blocks. Raises ValueError for cross attention and masks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C] in raster order of the grid -> [B, S, C]."""
        grid = self._grid()
        if dense := self._dense(grid):
            return dense(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        _check_self_attention(hidden_states, encoder_hidden_states, attention_mask, grid)
        q, k, v = _projected(attn, hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        return _out(attn, self._self_attention(q, k, v, grid))


class SparseLTXAttnProcessor(SparseAttnProcessor):
    """For `attn1`, the self attention, of LTX-Video's blocks. Raises ValueError for cross attention and masks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C] in raster order of the grid -> [B, S, C]."""
        grid = self._grid()
        if dense := self._dense(grid):
            return dense(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        _check_self_attention(hidden_states, encoder_hidden_states, attention_mask, grid)
        q, k, v = _projected(attn, hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = rotate(q, *image_rotary_emb), rotate(k, *image_rotary_emb)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        return _out(attn, self._self_attention(q, k, v, grid))


class SparseHunyuanVideoAttnProcessor(SparseAttnProcessor):
    """For `attn` of HunyuanVideo's dual and single stream blocks: attention among video tokens is sparse, attention
    from or to text is dense. Raises ValueError for a mask that hides more than the end of the text.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, S, C] of the video in raster order, encoder_hidden_states [B, L, C] of the text -> both."""
        grid = self._grid()
        if dense := self._dense(grid):
            return dense(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be the text tokens, got None")
        check_tokens("hidden_states", hidden_states.shape[1], grid)
        tokens, text_tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]
        q, k, v = _video_heads(attn, hidden_states, image_rotary_emb)
        text_q, text_k, text_v = _text_heads(attn, encoder_hidden_states)
        q, k, v = (torch.cat([x, text], 1).to(v.dtype) for x, text in ((q, text_q), (k, text_k), (v, text_v)))
        lengths = self._text_lengths(attention_mask, len(q), tokens, text_tokens)
        o = joint_attention(q, k, v, grid, text_lengths=lengths, options=self.options).flatten(2)
        video, text = o[:, :tokens], o[:, tokens:]
        # single stream blocks project both together, later
        if getattr(attn, "to_out", None) is not None:
            video = _out(attn, video)
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text

    def _text_lengths(self, mask: Tensor | None, batch: int, tokens: int, text_tokens: int) -> list[int]:
        if mask is None or self.call.mask is not mask:
            self.call.text_lengths = text_lengths_of(mask, batch=batch, tokens=tokens, text_tokens=text_tokens)
            self.call.mask = mask
        return self.call.text_lengths


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs (Su et al., RoFormer, arXiv 2104.09864), in cos's dtype, back to x's.

    x: [B, S, ...]. cos, sin: fp32 as a rule, each pair's value twice, of a shape that broadcasts to x's.
    """
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], -1).flatten(-2).to(x.dtype)


def _check_self_attention(x: Tensor, context: Tensor | None, mask: Tensor | None, grid: Triple) -> None:
    if context is not None:
        raise ValueError("encoder_hidden_states must be None, got cross attention; leave it its own processor")
    if mask is not None:
        raise ValueError("attention_mask must be None in sparse self attention, got a mask; leave this model dense")
    check_tokens("hidden_states", x.shape[1], grid)


def _projected(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(x).chunk(3, -1)
        return q, k, v
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def _video_heads(attn: Any, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in _projected(attn, x))
    q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
    if rotary is not None:
        cos, sin = (x[None, :, None].to(q.device) for x in rotary)  # [S, D] -> [1, S, 1, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def _text_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dual stream blocks have projections of their own for text, single stream blocks share the video's."""
    if attn.add_q_proj is None:
        return _video_heads(attn, x, None)
    projected = attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in projected)
    return _normed(attn.norm_added_q, q), _normed(attn.norm_added_k, k), v


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _out(attn: Any, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))
