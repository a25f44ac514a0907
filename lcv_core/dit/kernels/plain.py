"""Norms, rope and gates in plain PyTorch, a few tokens at a time: no fp32 copy of a whole sequence is ever alive.

The formulas are those of `embed.modulate`, `rope.apply_rope`, `layers.RMSNorm` and `block.gated_add`, which training
uses and the tests hold these against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.dit.embed import in_fp32
from lcv_core.dit.frames import Frames
from lcv_core.dit.pieces import by_elements
from lcv_core.layers import upcast


def is_plain(norm: nn.Module) -> bool:
    """Whether calling the norm is nothing but F.layer_norm with its weights as they are: no hook, no host's patch."""
    ours = type(norm) in (nn.LayerNorm, layers.LayerNorm)
    bare = isinstance(norm, nn.LayerNorm) and norm.weight is None
    hooked = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
    return (ours or bare) and not hooked


def modulate(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor, frames: Frames, start: int = 0) -> Tensor:
    """LN(x) * (1 + scale) + shift in fp32, rounded to x's dtype; contiguous, which a matmul is faster with.

    x [B, n, C]: the tokens of the sequence from `start` on. shift, scale: fp32 [R, C], of the distinct timesteps.
    """
    out, gain = torch.empty_like(x, memory_format=torch.contiguous_format), 1 + scale
    for sample, first, last, row in frames.within(start, start + x.shape[1]):
        for i, j in by_elements(last - first, x.shape[2], x.device, first):
            out[sample, i:j] = _layer_norm(x[sample, i:j], norm, gain[row], shift[row])
    return out


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """The norm with weights of its own in fp32, rounded to x's dtype. x [B, n, C]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    plain = is_plain(norm) and isinstance(norm.weight, Tensor)
    weight, bias = (upcast(norm.weight), upcast(norm.bias)) if plain else (None, None)  # type: ignore[arg-type]
    for sample in range(x.shape[0]):
        for i, j in by_elements(x.shape[1], x.shape[2], x.device):
            h = x[sample, i:j]
            out[sample, i:j] = in_fp32(norm, h) if weight is None else _layer_norm(h, norm, weight, bias)
    return out


def _layer_norm(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LN(x) * weight + bias of x [n, C] in fp32 or x's dtype; weight and bias [C] are not the norm's own business."""
    if not is_plain(norm):
        h = in_fp32(norm, x)
        return h * weight if bias is None else torch.addcmul(bias, h, weight)
    if x.device.type != "cpu":
        x = upcast(x)
    if torch.finfo(x.dtype).bits > 32:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    # A CPU's kernel takes half precision with fp32 weights, computes in fp32 and rounds once.
    assert isinstance(norm, nn.LayerNorm)
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def gated_add_(x: Tensor, gate: Tensor, update: Tensor, frames: Frames, start: int = 0) -> None:
    """x += gate * update in fp32, rounded to x's dtype. x, update [B, n, C] from token `start` on; gate fp32 [R, C]."""
    for sample, first, last, row in frames.within(start, start + x.shape[1]):
        for i, j in by_elements(last - first, x.shape[2], x.device, first):
            # Computed in the widest dtype of the three: fp32 for x in half precision.
            x[sample, i:j].addcmul_(update[sample, i:j], gate[row])


def norm_rope(x: Tensor, norm: nn.Module, rope: Tensor | None, out: Tensor) -> None:
    """RMS norm of each head, then rope in fp32 by the table's rows (complex [n, D / 2]; None: no rope), into `out`.

    x, out [B, n, H, D] of any strides, perhaps the same tensor.
    """
    B, n, H, D = x.shape
    for sample in range(B):
        for i, j in by_elements(n, H * D, x.device):
            out[sample, i:j] = _norm_rope(x[sample, i:j], norm, None if rope is None else rope[i:j, None])


def swiglu_(x: Tensor, gate: Tensor) -> Tensor:
    """SiLU(x), rounded, times `gate`, written over x and given back. One shape, any."""
    return F.silu(x, inplace=True).mul_(gate)


def _norm_rope(x: Tensor, norm: nn.Module, rope: Tensor | None) -> Tensor:
    h = norm(x)
    if rope is None:
        return h
    if not rope.is_complex():
        rope = torch.view_as_complex(rope)
    h = upcast(h).contiguous()
    torch.view_as_complex(h.unflatten(-1, (-1, 2))).mul_(rope)
    return h
