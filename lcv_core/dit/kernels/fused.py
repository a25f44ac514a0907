"""Norm + modulate, norm + rope, gated add, SwiGLU in Triton: each reads and writes a tensor once, in fp32 in between.

`plain` says what each computes and is what the tests hold these against.
"""

# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.dit.frames import Frames
from lcv_core.dit.kernels import plain
from lcv_core.layers import upcast

# Channels that a program holds at once: 4096 are 32 registers of each of 128 threads.
_CHANNELS = 4096
_HEAD_CHANNELS = 2048  # the same of norm + rope: two loads of 16 bytes a thread
_ELEMENTS = 2048  # the same of SwiGLU, of each of its two tensors


@triton.jit
def norm_modulate_kernel(
    x, shift, gain, rows, out, C, tokens, start, frame_tokens, frames, stride_b, stride_n, eps,
    MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token: LN(x) * gain + shift. MODULATED: gain and shift [R, C] by the row of the token's frame; else [C].

    x of strides (stride_b, stride_n, 1), out contiguous. `start`: the sequence's token that is the first of x.
    """
    token = tl.program_id(0)
    sample, n = token // tokens, token % tokens
    source = x + sample.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n
    row = 0
    if MODULATED:
        row = tl.load(rows + sample * frames + (start + n) // frame_tokens)
    channels = tl.arange(0, BLOCK)
    inside = channels < C
    h = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(h) / C
    centred = tl.where(inside, h - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / C + eps)
    g = tl.load(gain + row * C + channels, mask=inside, other=0.0)
    s = tl.load(shift + row * C + channels, mask=inside, other=0.0)
    y = centred * scale * g + s
    tl.store(out + token.to(tl.int64) * C + channels, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_add_kernel(
    x, gate, update, rows, C, tokens, start, frame_tokens, frames, stride_b, stride_n, update_b, update_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token: x += gate * update, the gate [R, C] by the row of the token's frame."""
    token = tl.program_id(0)
    sample, n = token // tokens, token % tokens
    row = tl.load(rows + sample * frames + (start + n) // frame_tokens)
    target = x + sample.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n
    source = update + sample.to(tl.int64) * update_b + n.to(tl.int64) * update_n
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < C
    h = tl.load(target + channels, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * C + channels, mask=inside, other=0.0)
    tl.store(target + channels, (h + g * u).to(x.dtype.element_ty), mask=inside)


@triton.jit
def norm_rope_kernel(
    x, weight, rope, out, tokens, heads, x_b, x_n, x_h, out_b, out_n, out_h, eps,
    ROPE: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads of a token: RMS norm, rounded, times the weight, rounded again (the model's order), then rotated in fp32.

    A head is read and written whole, 16 bytes a thread, and parted into pairs of neighbours in registers: reading even
    and odd channels apart took 17 times as long as the memory does on an H200. rope: (cos, sin) [tokens, D / 2, 2].
    """
    token = tl.program_id(0)
    sample, n = token // tokens, token % tokens
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    channels = tl.arange(0, BLOCK_D)
    real = channels < D
    inside = (h < heads) & real[None, :]
    source = x + sample.to(tl.int64) * x_b + n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + channels[None, :]
    y = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
    w = tl.load(weight + channels, mask=real, other=0.0).to(tl.float32)[None, :]
    if HALF:
        # products of two 16-bit numbers are exact in fp32, so one rounding more is that of the model's multiply
        y = (y.to(x.dtype.element_ty).to(tl.float32) * w).to(x.dtype.element_ty).to(tl.float32)
    else:
        y *= w
    if ROPE:
        angle = tl.load(rope + n.to(tl.int64) * D + channels, mask=real, other=0.0)
        cos, sin = tl.split(tl.reshape(angle, (1, BLOCK_D // 2, 2)))
        a, b = tl.split(tl.reshape(y, (BLOCK_H, BLOCK_D // 2, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_H, BLOCK_D))
    target = out + sample.to(tl.int64) * out_b + n.to(tl.int64) * out_n + h.to(tl.int64) * out_h + channels[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(x, gate, count, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """x = SiLU(x) * gate; SiLU is rounded before it is multiplied, as the model does."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    h = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    h = h / (1.0 + tl.exp(-h))
    if HALF:
        h = h.to(x.dtype.element_ty).to(tl.float32)
    tl.store(x + place, (h * g).to(x.dtype.element_ty), mask=inside)


def modulate(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor, frames: Frames, start: int = 0) -> Tensor:
    """See `plain.modulate`."""
    if not _takes(x) or not plain.is_plain(norm):
        return plain.modulate(x, norm, shift, scale, frames, start)
    return _norm(x, norm, (1 + scale).contiguous(), shift.contiguous(), frames, start)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """See `plain.layer_norm`."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not _takes(x) or not plain.is_plain(norm) or weight is None or bias is None:
        return plain.layer_norm(x, norm)
    return _norm(x, norm, upcast(weight), upcast(bias), None, 0)


def _norm(x: Tensor, norm: Any, gain: Tensor, shift: Tensor, frames: Frames | None, start: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    B, n, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, frame_tokens, count = (gain, 1, 1) if frames is None else (frames.rows, *_frames(frames))
    norm_modulate_kernel[(B * n,)](
        x, shift, gain, rows, out, C, n, start, frame_tokens, count, x.stride(0), x.stride(1), norm.eps,
        MODULATED=frames is not None, BLOCK=triton.next_power_of_2(C), num_warps=_warps(C),
    )  # fmt: skip
    return out


def gated_add_(x: Tensor, gate: Tensor, update: Tensor, frames: Frames, start: int = 0) -> None:
    """See `plain.gated_add_`."""
    if not _takes(x) or x.stride(-1) != 1 or update.stride(-1) != 1:
        return plain.gated_add_(x, gate, update, frames, start)
    B, n, C = x.shape
    block = min(triton.next_power_of_2(C), _CHANNELS)
    gated_add_kernel[(B * n, triton.cdiv(C, block))](
        x, gate.contiguous(), update, frames.rows, C, n, start, *_frames(frames), x.stride(0), x.stride(1),
        update.stride(0), update.stride(1), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return None


def norm_rope(x: Tensor, norm: nn.Module, rope: Tensor | None, out: Tensor) -> None:
    """See `plain.norm_rope`; the norm has to be one of ours or of PyTorch's in fp32, others are called as modules."""
    B, n, H, D = x.shape
    weight = getattr(norm, "weight", None)
    if not _takes(x) or not _is_ours(norm, x) or weight is None or x.stride(-1) != 1 or out.stride(-1) != 1:
        return plain.norm_rope(x, norm, rope, out)
    block = triton.next_power_of_2(D)
    heads = min(triton.next_power_of_2(H), max(1, _HEAD_CHANNELS // block))
    table = x if rope is None else torch.view_as_real(rope) if rope.is_complex() else rope
    if not table.is_contiguous() and rope is not None:
        table = table.contiguous()
    norm_rope_kernel[(B * n, triton.cdiv(H, heads))](
        x, weight.to(x.dtype), table, out, n, H, *x.stride()[:3], *out.stride()[:3], norm.eps or 0.0,
        ROPE=rope is not None, HALF=x.dtype.itemsize == 2, D=D, BLOCK_H=heads, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return None


def swiglu_(x: Tensor, gate: Tensor) -> Tensor:
    """See `plain.swiglu_`."""
    if not _takes(x) or gate.dtype != x.dtype or not (x.is_contiguous() and gate.is_contiguous()):
        return plain.swiglu_(x, gate)
    count = x.numel()
    swiglu_kernel[(triton.cdiv(count, _ELEMENTS),)](
        x, gate, count, HALF=x.dtype.itemsize == 2, BLOCK=_ELEMENTS, num_warps=4
    )
    return x


def _takes(x: Tensor) -> bool:
    """fp64, for checks of gradients and the like, is not worth kernels."""
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0


def _is_ours(norm: nn.Module, x: Tensor) -> bool:
    """Whether the norm rounds as the kernel does, and nothing is hooked to it."""
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return False
    return type(norm) is layers.RMSNorm or (type(norm) is nn.RMSNorm and x.dtype == torch.float32)


def _frames(frames: Frames) -> tuple[int, int]:
    return frames.frame_tokens, frames.rows.shape[1]


def _warps(channels: int) -> int:
    """At most 16 elements a thread and tensor in a warp of 32, which leaves registers for loads on their way."""
    return max(1, min(8, triton.next_power_of_2(channels) // 512))
