"""GGUF's block formats in torch, on any device: blocks as raw bytes [n, bytes of a block] to fp32 [n, elements].

The layouts are llama.cpp's (ggml-common.h). What comes out is what the `gguf` package's numpy code gives, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SUPER = 256  # elements of a block of a K type
SUB = 32  # elements that share a scale and a minimum in Q4_K and Q5_K
SIZES = {  # kind -> elements, bytes of a block
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (SUPER, 144), "Q5_K": (SUPER, 176), "Q6_K": (SUPER, 210),
}  # fmt: skip


def dequantise_blocks(kind: str, blocks: Tensor) -> Tensor:
    """uint8 [n, bytes] of whole blocks of a kind of SIZES -> fp32 [n, elements]."""
    return _KINDS[kind](blocks)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block, as fp32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(x: Tensor, shifts: range) -> Tensor:
    """uint8 [n, g, w] -> [n, g, shifts, w]: each byte shifted right by so many bits."""
    return x.unsqueeze(2) >> torch.tensor(shifts, dtype=torch.uint8, device=x.device).view(1, 1, -1, 1)


def _nibbles(x: Tensor, width: int) -> Tensor:
    """uint8 [n, k * width] -> [n, 2 * k * width]: of each run of `width` bytes the low halves, then the high ones."""
    return (_shifted(x.view(len(x), -1, width), range(0, 8, 4)) & 15).view(len(x), -1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Bit i of four bytes as 16 or 0, for each i: uint8 [n, 32]."""
    bits = blocks[:, at : at + 4].unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (bits.view(len(blocks), SUB) & 1) << 4


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:].contiguous(), 16).to(torch.int8) - 8).float()


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:].contiguous(), 16).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:].contiguous(), 16) | _fifth_bits(b, 2)
    return _half(b, 0) * (q.to(torch.int8) - 16).float()


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:].contiguous(), 16) | _fifth_bits(b, 4)
    return _half(b, 0) * q.float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K: eight scales and eight minima of six bits, uint8 [n, 8] each.

    Bytes 0-3 and 4-7 hold the first four of either, and in their two upper bits those of the last four, whose lower
    four bits share bytes 8-11.
    """
    d, m, both = packed.view(len(packed), 3, 4).unbind(1)
    scales = torch.cat([d & 63, (both & 15) | ((d >> 2) & 48)], dim=1)
    return scales, torch.cat([m & 63, (both >> 4) | ((m >> 2) & 48)], dim=1)


def pack_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """The inverse of `unpack_scales`."""
    d = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    m = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    return torch.cat([d, m, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], dim=1)


def _scaled(b: Tensor, q: Tensor) -> Tensor:
    """d * scale * q - dmin * minimum for q [n, 8, 32]."""
    scales, minima = unpack_scales(b[:, 4:16].contiguous())
    d, low = _half(b, 0) * scales.float(), _half(b, 2) * minima.float()
    return (d.unsqueeze(2) * q.float() - low.unsqueeze(2)).view(len(b), SUPER)


def _q4_k(b: Tensor) -> Tensor:
    return _scaled(b, _nibbles(b[:, 16:].contiguous(), 32).view(len(b), 8, SUB))


def _q5_k(b: Tensor) -> Tensor:
    high = _shifted(b[:, 16:48].contiguous().view(len(b), 1, SUB), range(8)).view(len(b), 8, SUB) & 1
    return _scaled(b, _nibbles(b[:, 48:].contiguous(), 32).view(len(b), 8, SUB) | (high << 4))


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].contiguous(), 64)
    high = (_shifted(b[:, 128:192].contiguous().view(len(b), 2, SUB), range(0, 8, 2)) & 3).view(len(b), SUPER)
    q = ((low | (high << 4)).to(torch.int8) - 32).float().view(len(b), 16, 16)
    d = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()
    return (d.unsqueeze(2) * q).view(len(b), SUPER)


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
