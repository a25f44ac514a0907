"""One transformer block: self-attention with the condition rule, cross-attention, SwiGLU; adaLN per latent frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_bsa import block_sparse_attention, select_blocks
from lcv_core.config import BSAConfig, DiTConfig
from lcv_core.dit import lean
from lcv_core.dit.attention import EIGHT_BITS, Attend
from lcv_core.dit.embed import in_fp32, modulate
from lcv_core.dit.frames import Frames
from lcv_core.dit.kernels import Kernels
from lcv_core.dit.kv_cache import KV, CachedLayer, KVCache
from lcv_core.dit.rope import apply_rope
from lcv_core.layers import upcast


@dataclass(frozen=True)
class Lean:
    """What blocks need to run without a backward pass, writing over what they are given.

    frames: which frames share a timestep. room: k and v [B, n_c * S + N, H, D] that all layers share, a layer's own
    behind those of a KV cache; None: they stay where the layer made them. compiled: what runs `lean.run_tensors`.
    """

    kernels: Kernels
    frames: Frames
    room: KV | None = None
    compiled: Callable[..., None] | None = None


def make_room(x: Tensor, tokens: int, num_heads: int) -> KV:
    """`Lean.room` for `tokens` keys of a stream like x [B, N, C].

    Each head's tokens are neighbours, which a CPU's attention is a tenth faster with than with those of q, k and v
    side by side; a GPU's does not mind, so there it takes a cache to be worth the copy of v.
    """
    k, v = x.new_empty(2, x.shape[0], num_heads, tokens, x.shape[2] // num_heads).transpose(2, 3)
    return k, v


@dataclass(frozen=True)
class Sequence3D:
    """How the tokens of one forward pass lie: shared by all blocks.

    grid: (T, h, w) of all keys, cached condition frames included.
    num_cond_latents: leading frames of that grid that are condition.
    cached: the condition frames come from a KV cache and are not among the tokens passed in.
    rope: the rope table of `grid`.
    text_bias: added to the scores of cross-attention, [1, 1, 1, L]; None adds nothing.
    lean: None where a backward pass needs what would be written over.
    """

    grid: tuple[int, int, int]
    num_cond_latents: int
    cached: bool
    rope: Tensor
    attend: Attend
    bsa: BSAConfig | None
    text_bias: Tensor | None = None
    lean: Lean | None = None

    @property
    def frame_tokens(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def num_cond_tokens(self) -> int:
        """Condition tokens among the tokens passed in."""
        return 0 if self.cached else self.num_cond_latents * self.frame_tokens


def self_attend(q: Tensor, k: Tensor, v: Tensor, seq: Sequence3D) -> Tensor:
    """Dense or block sparse attention over whole frames; q and k [B, H, frames * S, D] are rotated already.

    Keys of a single frame are attended to densely, whatever `seq.bsa` says: cached and uncached conditions then agree.
    """
    frames_q, frames_k = q.shape[2] // seq.frame_tokens, k.shape[2] // seq.frame_tokens
    if seq.bsa is None or frames_k == 1:
        return seq.attend(q, k, v)
    sparsity = seq.bsa.sparsity
    selection = select_blocks(
        q, k, (frames_q, *seq.grid[1:]), (frames_k, *seq.grid[1:]), seq.bsa.block_q, block_k=seq.bsa.block_k,
        keep=None if sparsity is None else 1.0 - sparsity, cdf_threshold=seq.bsa.cdf_threshold,
    )  # fmt: skip
    return block_sparse_attention(q, k, v, selection, backend=EIGHT_BITS if seq.bsa.eight_bits else "auto")


class SelfAttention(nn.Module):
    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = ops.Linear(config.hidden_size, 3 * config.hidden_size, **factory)
        self.q_norm = ops.RMSNorm(config.head_dim, eps=1e-6, **factory)
        self.k_norm = ops.RMSNorm(config.head_dim, eps=1e-6, **factory)
        self.proj = ops.Linear(config.hidden_size, config.hidden_size, **factory)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3C] -> q, k, v, views of [B, N, H, D]."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence3D) -> Tensor:
        """q [B, N, H, D] over k and v -> [B, N, C], before `proj`."""
        out = self_attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seq)
        return out.transpose(1, 2).flatten(2)

    def forward(
        self, x: Tensor, seq: Sequence3D, cache: CachedLayer | None = None, keep: KVCache | None = None
    ) -> Tensor:
        """x [B, N, C]. `cache` is prepended to keys and values; this layer's own are appended to `keep`."""
        q, k, v = (y.transpose(1, 2) for y in self.split(self.qkv(x)))  # [B, H, N, D]
        own = seq.rope[seq.rope.shape[0] - x.shape[1] :]  # tokens sit after the cached condition
        q, k = apply_rope(self.q_norm(q), own), apply_rope(self.k_norm(k), own)
        if keep is not None:
            keep.append(k.transpose(1, 2), v.transpose(1, 2))
        if cache is not None:
            before = cache.read(k)
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        n = seq.num_cond_tokens
        if n == 0:
            out = self_attend(q, k, v, seq)
        else:
            cond = self_attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], seq)  # condition sees condition alone
            out = torch.cat([cond, self_attend(q[:, :, n:], k, v, seq)], dim=2)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_linear = ops.Linear(config.hidden_size, config.hidden_size, **factory)
        self.kv_linear = ops.Linear(config.hidden_size, 2 * config.hidden_size, **factory)
        self.q_norm = ops.RMSNorm(config.head_dim, eps=1e-6, **factory)
        self.k_norm = ops.RMSNorm(config.head_dim, eps=1e-6, **factory)
        self.proj = ops.Linear(config.hidden_size, config.hidden_size, **factory)

    def keys(self, text: Tensor | Sequence[Tensor]) -> list[KV]:
        """k and v [B, H, L, D] of text [B, L, C]; or of each sample where text is one [1, L_b, C] for each."""
        return [self._keys(rows) for rows in ([text] if isinstance(text, Tensor) else text)]

    def _keys(self, text: Tensor) -> KV:
        k, v = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.k_norm(k), v

    def read(self, x: Tensor, keys: list[KV], attend: Attend, bias: Tensor | None, kernels: Kernels | None) -> Tensor:
        """What tokens x [B, n, C] read from the text. kernels: None keeps a gradient."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1))
        if kernels is None:
            q = self.q_norm(q)
        else:
            kernels.norm_rope(q, self.q_norm, None, q)
        q = q.transpose(1, 2)  # [B, H, n, D]
        if len(keys) == 1:
            out = attend(q, *keys[0]) if bias is None else attend(q, *keys[0], bias)
        else:
            out = torch.cat([attend(q[b : b + 1], k, v) for b, (k, v) in enumerate(keys)])
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, text: Tensor | Sequence[Tensor], attend: Attend, bias: Tensor | None = None) -> Tensor:
        """x [B, N, C]; text [B, L, C], or one [1, L_b, C] for each sample where the lengths differ.

        bias: of the scores, [1, 1, 1, L], for an `attend` that takes one.
        """
        return self.read(x, self.keys(text), attend, bias, None)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_dim
        self.w1 = ops.Linear(hidden, ffn, bias=False, **factory)
        self.w2 = ops.Linear(ffn, hidden, bias=False, **factory)
        self.w3 = ops.Linear(hidden, ffn, bias=False, **factory)

    def forward(self, x: Tensor, kernels: Kernels | None = None) -> Tensor:
        """x [B, n, C]. kernels: None keeps a gradient."""
        h = self.w1(x)
        if kernels is None:
            return self.w2(F.silu(h) * self.w3(x))
        return self.w2(kernels.swiglu_(h, self.w3(x)))


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in fp32, rounded to x's dtype; the gate [B, T, 1, C] is per latent frame."""
    update = (upcast(update).unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
    return (upcast(x) + update).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: DiTConfig, ops: Any, **factory: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(config.adaln_tembed_dim, 6 * hidden, **factory))
        self.mod_norm_attn = ops.LayerNorm(hidden, eps=1e-6, elementwise_affine=False, **factory)
        self.mod_norm_ffn = ops.LayerNorm(hidden, eps=1e-6, elementwise_affine=False, **factory)
        self.pre_crs_attn_norm = ops.LayerNorm(hidden, eps=1e-6, **factory)
        self.attn = SelfAttention(config, ops, **factory)
        self.cross_attn = CrossAttention(config, ops, **factory)
        self.ffn = FeedForward(config, ops, **factory)

    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        text: Tensor | Sequence[Tensor] | None,
        seq: Sequence3D,
        cache: CachedLayer | None = None,
        keep: KVCache | None = None,
    ) -> Tensor:
        """x [B, N, C], tau fp32 [B, T, A]; text None skips cross-attention (a KV cache is built without it).

        With `seq.lean` x is written over, and tau is [1, R, A], of the distinct timesteps.
        """
        if seq.lean is not None:
            return lean.run_block(self, x, tau, text, seq, seq.lean, cache, keep)
        silu, linear = self.adaLN_modulation
        modulation = in_fp32(linear, silu(tau)).unsqueeze(2)  # [B, T, 1, 6C]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = gated_add(x, gate1, self.attn(modulate(x, self.mod_norm_attn, shift1, scale1), seq, cache, keep))
        if text is not None:
            x = self._cross(x, text, seq)
        return gated_add(x, gate2, self.ffn(modulate(x, self.mod_norm_ffn, shift2, scale2)))

    def _cross(self, x: Tensor, text: Tensor | Sequence[Tensor], seq: Sequence3D) -> Tensor:
        """Noise tokens read the text; condition tokens get exactly nothing, not even proj's bias."""
        n = seq.num_cond_tokens
        noise = x[:, n:]
        normed = in_fp32(self.pre_crs_attn_norm, noise).to(x.dtype)
        noise = noise + self.cross_attn(normed, text, seq.attend, seq.text_bias)
        return noise if n == 0 else torch.cat([x[:, :n], noise], dim=1)
