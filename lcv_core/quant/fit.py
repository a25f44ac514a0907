"""Making GGUF blocks: fp32 [n, elements] to raw bytes [n, bytes of a block].

Q8_0 is llama.cpp's formula, bit for bit. For the K types the format leaves a choice: x ~ d * scale * q - dmin * minimum
with one d and dmin (fp16) for 256 elements, a scale and a minimum of six bits for each 32, and q of four or five bits.
The choice here is a search for the least squared error, in three steps:

1. each 32 alone: from several scales and minima, the nearest q and linear regression for these, by turns;
2. d and dmin cover the largest scale and minimum; for each 32 the six-bit numbers next to the rounded ones are tried;
3. with all whole numbers fixed, d and dmin follow by linear regression over the 256, and step 2 is repeated; the better
   of before and after stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcv_core.quant.blocks import SUB, SUPER, pack_scales

SIX_BITS = 63
# Where the search of each 32 starts. More starts bring less than 0.4 % of the error; these bring 11 % over rounding.
_LOWS = (1.05, 1.0, 0.93)  # times the smallest value
_WIDTHS = (-0.9, 0.0, 0.9)  # added to the number of steps between the smallest and the largest value
_REGRESSIONS = 2
_NEAR = (-1, 0, 1)
_PIECE = 1 << 19  # elements searched at once


def q8_0(x: Tensor) -> Tensor:
    """fp32 [n, 32] -> uint8 [n, 34]."""
    d = x.abs().amax(dim=1, keepdim=True) / 127
    scaled = x * torch.where(d == 0, 0.0, 1 / d)
    size = scaled.abs()
    whole = size.floor()
    rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())  # halves away from zero
    return torch.cat([d.half().view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)], dim=1)


def q4_k(x: Tensor) -> Tensor:
    """fp32 [n, 256] -> uint8 [n, 144]."""
    k = _search(x, 15)
    q = k.q.view(-1, 4, 2, SUB)
    return torch.cat([k.head, (q[:, :, 0] | (q[:, :, 1] << 4)).flatten(1)], dim=1)


def q5_k(x: Tensor) -> Tensor:
    """fp32 [n, 256] -> uint8 [n, 176]."""
    k = _search(x, 31)
    low, high = (k.q & 15).view(-1, 4, 2, SUB), k.q >> 4
    places = torch.arange(8, dtype=torch.uint8, device=x.device).view(1, 8, 1)
    fifth = (high << places).sum(dim=1, dtype=torch.uint8)
    return torch.cat([k.head, fifth, (low[:, :, 0] | (low[:, :, 1] << 4)).flatten(1)], dim=1)


class _Found(NamedTuple):
    """head: d, dmin and the packed scales and minima, uint8 [n, 16]. q: uint8 [n, 8, 32]."""

    head: Tensor
    q: Tensor


def _search(x: Tensor, levels: int) -> _Found:
    found = [_search_piece(piece.view(-1, SUPER // SUB, SUB), levels) for piece in x.split(_PIECE // SUPER)]
    return _Found(torch.cat([f.head for f in found]), torch.cat([f.q for f in found]))


def _search_piece(x: Tensor, levels: int) -> _Found:
    """x [n, 8, 32]."""
    scale, low = _fit_each(x, levels)
    d, dmin = _half(scale.amax(dim=1, keepdim=True) / SIX_BITS), _half(low.amax(dim=1, keepdim=True) / SIX_BITS)
    best = _six_bits(x, scale, low, d, dmin, levels)
    refit = _refit(x, best, d, dmin)
    again = _six_bits(x, scale, low, *refit, levels)
    better = again.error.sum(dim=1, keepdim=True) < best.error.sum(dim=1, keepdim=True)  # [n, 1, 1]
    d, dmin = (torch.where(better, new, old)[:, 0] for new, old in zip(refit, (d, dmin), strict=True))
    whole, minima, q = (torch.where(better, a, b).to(torch.uint8) for a, b in zip(again[:3], best[:3], strict=True))
    head = torch.cat([d.half().view(torch.uint8), dmin.half().view(torch.uint8)], dim=1)
    return _Found(torch.cat([head, pack_scales(whole[..., 0], minima[..., 0])], dim=1), q)


def _fit_each(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(scale, minimum) >= 0 of least squared error of each 32: x ~ scale * q - minimum. fp32 [n, 8, 1] each."""
    lowest, highest = x.amin(dim=2, keepdim=True).clamp_max(0), x.amax(dim=2, keepdim=True)
    best = scale_of = low_of = torch.full_like(lowest, torch.inf)
    for part in _LOWS:
        for width in _WIDTHS:
            low = -part * lowest
            scale = (highest + low).clamp_min(0) / (levels + width)
            for _ in range(_REGRESSIONS):
                scale, low = _regress(x, _levels(x, scale, low, levels))
            error = (x - _apply(_levels(x, scale, low, levels), scale, low)).square().sum(dim=2, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            scale_of, low_of = torch.where(better, scale, scale_of), torch.where(better, low, low_of)
    return scale_of, low_of


def _levels(x: Tensor, scale: Tensor, low: Tensor, levels: int) -> Tensor:
    """The whole numbers 0..levels, as fp32, that come nearest."""
    return ((x + low) * torch.where(scale > 0, 1 / scale, 0.0)).round_().clamp_(0, levels)


def _apply(q: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return scale * q - low


def _regress(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The line of least squares through (q, x), where its minimum would be negative the one through the origin."""
    q1, q2 = q.sum(dim=2, keepdim=True), q.square().sum(dim=2, keepdim=True)
    x1, xq = x.sum(dim=2, keepdim=True), (x * q).sum(dim=2, keepdim=True)
    return _line(float(x.shape[2]), q1, q2, x1, xq)


def _line(ones: Tensor | float, q1: Tensor, q2: Tensor, x1: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
    """(s, m) >= 0 that minimise sum (s * a - m * b - x)^2, given the sums of bb, ab, aa, xb and xa.

    Where the best of all is outside, or not one point, it is on the edge: m = 0, or for negative x s = 0.
    """
    det = ones * q2 - q1 * q1
    inside = det > 1e-6 * ones * q2
    scale, low = (ones * xq - x1 * q1) / det, (q1 * xq - q2 * x1) / det
    inside &= (scale >= 0) & (low >= 0)
    alone = torch.where(q2 > 0, xq / q2, 0.0).clamp_min(0)
    negative = (x1 < 0) & (alone == 0)
    edge_low = torch.where(negative & (torch.as_tensor(ones) > 0), -x1 / ones, 0.0)
    return torch.where(inside, scale, alone), torch.where(inside, low, edge_low)


class _Whole(NamedTuple):
    """Six-bit scale and minimum [n, 8, 1], q [n, 8, 32], all as fp32, and the squared error [n, 8, 1]."""

    scale: Tensor
    low: Tensor
    q: Tensor
    error: Tensor


def _six_bits(x: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor, levels: int) -> _Whole:
    """The best of the numbers near scale / d and minimum / dmin; d, dmin [n, 1, 1]."""
    near_scale = (scale * torch.where(d > 0, 1 / d, 0.0)).round()
    near_low = (low * torch.where(dmin > 0, 1 / dmin, 0.0)).round()
    best: _Whole | None = None
    for a in _NEAR:
        for b in _NEAR:
            whole, minima = (near_scale + a).clamp(0, SIX_BITS), (near_low + b).clamp(0, SIX_BITS)
            s, m = d * whole, dmin * minima
            q = _levels(x, s, m, levels)
            new = _Whole(whole, minima, q, (x - _apply(q, s, m)).square().sum(dim=2, keepdim=True))
            best = new if best is None else _better(new, best)
    assert best is not None
    return best


def _better(new: _Whole, old: _Whole) -> _Whole:
    wins = new.error < old.error
    return _Whole(*(torch.where(wins, a, b) for a, b in zip(new, old, strict=True)))


def _refit(x: Tensor, found: _Whole, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """d and dmin, as fp16 holds them, of least squared error over the 256 for fixed whole numbers."""
    a, b = (found.scale * found.q).flatten(1), found.low.expand_as(x).flatten(1)
    flat = x.flatten(1)
    sums = [(u * v).sum(dim=1).view(-1, 1, 1) for u, v in ((b, b), (a, b), (a, a), (flat, b), (flat, a))]
    new_d, new_dmin = _line(*sums)
    usable = (new_d > 0) & torch.isfinite(new_d) & torch.isfinite(new_dmin)
    return torch.where(usable, _half(new_d), d), torch.where(usable, _half(new_dmin), dmin)


def _half(x: Tensor) -> Tensor:
    return x.half().float()
