"""A block without a backward pass: the sums of `Block.forward` in little memory and with few passes over it.

The stream of tokens is written over. At most five activations of all tokens are alive: the stream, q, k and v, and what
attention gives. Linear layers are called as modules, so that adapters, hooks and a host's patches work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from lcv_core.dit.embed import in_fp32
from lcv_core.dit.kv_cache import CachedLayer, KVCache
from lcv_core.dit.pieces import by_layer

if TYPE_CHECKING:
    from lcv_core.dit.block import Block, Lean, SelfAttention, Sequence3D


class Adaln(NamedTuple):
    """Of one norm, attention or feed-forward: fp32 [R, C] each, of the distinct timesteps."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def run_block(
    block: Block,
    x: Tensor,
    tau: Tensor,
    text: Tensor | Sequence[Tensor] | None,
    seq: Sequence3D,
    lean: Lean,
    cache: CachedLayer | None,
    keep: KVCache | None,
) -> Tensor:
    """x [B, N, C], written over; tau fp32 [1, R, A], of the distinct timesteps."""
    if cache is not None and lean.room is not None:
        before = lean.room[0].shape[1] - x.shape[1]
        cache.copy_to(*(y[:, :before] for y in lean.room))
    if lean.compiled is None or keep is not None or _is_hooked(block.attn):
        run_tensors(block, x, tau, text, seq, lean, cache, keep)
    else:
        lean.compiled(block, x, tau, text, seq, lean)
    return x


def run_tensors(
    block: Block,
    x: Tensor,
    tau: Tensor,
    text: Tensor | Sequence[Tensor] | None,
    seq: Sequence3D,
    lean: Lean,
    cache: CachedLayer | None = None,
    keep: KVCache | None = None,
) -> None:
    """What of a block is tensors alone, and may be compiled: what a cache holds lies in `lean.room` already."""
    silu, linear = block.adaLN_modulation
    shift1, scale1, gate1, shift2, scale2, gate2 = in_fp32(linear, silu(tau))[0].chunk(6, dim=-1)
    _self_attention(block, x, Adaln(shift1, scale1, gate1), seq, lean, cache, keep)
    if text is not None:
        _cross_attention(block, x, text, seq, lean)
    _feed_forward(block, x, Adaln(shift2, scale2, gate2), lean)


def _self_attention(
    block: Block, x: Tensor, ada: Adaln, seq: Sequence3D, lean: Lean, cache: CachedLayer | None, keep: KVCache | None
) -> None:
    attn, kernels, frames = block.attn, lean.kernels, lean.frames
    if _is_hooked(attn):  # who looks at the module wants to see it called
        m = kernels.modulate(x, block.mod_norm_attn, ada.shift, ada.scale, frames)
        kernels.gated_add_(x, ada.gate, attn(m, seq, cache, keep), frames)
        return
    project = _projected if lean.room is None else _projected_apart
    q, k, v = project(block, x, ada, seq, lean)
    if keep is not None:
        keep.append(k, v)
    n = seq.num_cond_tokens
    if n:
        out = attn.attend(q[:, :n], k[:, :n], v[:, :n], seq)  # condition sees condition alone
        kernels.gated_add_(x[:, :n], ada.gate, attn.proj(out), frames)
        del out
    out = attn.attend(q[:, n:], k, v, seq)
    del q, k, v
    kernels.gated_add_(x[:, n:], ada.gate, attn.proj(out), frames, n)


def _projected(block: Block, x: Tensor, ada: Adaln, seq: Sequence3D, lean: Lean) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normalised and rotated where they are, and v: views of one tensor, [B, N, H, D] each."""
    attn = block.attn
    qkv = attn.qkv(lean.kernels.modulate(x, block.mod_norm_attn, ada.shift, ada.scale, lean.frames))
    q, k, v = attn.split(qkv)
    lean.kernels.norm_rope(q, attn.q_norm, seq.rope, q)
    lean.kernels.norm_rope(k, attn.k_norm, seq.rope, k)
    return q, k, v


def _projected_apart(block: Block, x: Tensor, ada: Adaln, seq: Sequence3D, lean: Lean) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, N, H, D]; k and v in the room that all layers share, behind what a cache has: [B, n_c * S + N, H, D]."""
    assert lean.room is not None
    k, v = lean.room
    N = x.shape[1]
    first = k.shape[1] - N  # the tokens sit after the cached condition
    q = k.new_empty(k.shape[0], N, *k.shape[2:])  # attention gives its result as q lies: ready for `proj`
    own = k[:, first:], v[:, first:]
    for i, j in by_layer(N, block.attn.qkv, x.device):
        m = lean.kernels.modulate(x[:, i:j], block.mod_norm_attn, ada.shift, ada.scale, lean.frames, i)
        _spread(block.attn, m, seq.rope[first + i : first + j], lean, q[:, i:j], own[0][:, i:j], own[1][:, i:j])
        del m  # before the next piece's is made
    return q, k, v


def _spread(attn: SelfAttention, m: Tensor, rope: Tensor, lean: Lean, q: Tensor, k: Tensor, v: Tensor) -> None:
    """What a piece m [B, n, C] has as q, k and v, normalised and rotated, to where it belongs."""
    own_q, own_k, own_v = attn.split(attn.qkv(m))
    lean.kernels.norm_rope(own_q, attn.q_norm, rope, q)
    lean.kernels.norm_rope(own_k, attn.k_norm, rope, k)
    v.copy_(own_v)


def _cross_attention(block: Block, x: Tensor, text: Tensor | Sequence[Tensor], seq: Sequence3D, lean: Lean) -> None:
    """Noise tokens read the text; condition tokens stay as they are."""
    cross, norm, noise = block.cross_attn, block.pre_crs_attn_norm, x[:, seq.num_cond_tokens :]
    if _is_hooked(cross):
        noise.add_(cross(lean.kernels.layer_norm(noise, norm), text, seq.attend, seq.text_bias))
        return
    keys = cross.keys(text)
    for i, j in by_layer(noise.shape[1], cross.q_linear, x.device):
        part = noise[:, i:j]
        part.add_(cross.read(lean.kernels.layer_norm(part, norm), keys, seq.attend, seq.text_bias, lean.kernels))


def _feed_forward(block: Block, x: Tensor, ada: Adaln, lean: Lean) -> None:
    for i, j in by_layer(x.shape[1], block.ffn.w1, x.device):
        part = x[:, i:j]
        m = lean.kernels.modulate(part, block.mod_norm_ffn, ada.shift, ada.scale, lean.frames, i)
        update = block.ffn(m) if _is_hooked(block.ffn) else block.ffn(m, lean.kernels)
        lean.kernels.gated_add_(part, ada.gate, update, lean.frames, i)
        del m, update  # before the next piece's is made


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
