"""Quantised weights as data: the kinds there are, how each is made from numbers, and how it becomes numbers again.

Kinds are "fp8" (e4m3), "fp8_e5m2" and "int8", which have one scale for each row (output channel), and GGUF's block
formats by their own names ("Q8_0", "Q4_K", ...), which hold theirs inside. Rows are independent of each other in all
of them: a weight can be cut along its rows, and quantised weights stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.quant import fit
from lcv_core.quant.blocks import SIZES, dequantise_blocks

PIECE = 1 << 22  # elements that are in fp32 at once
BY_ROW = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
_FITS = {"Q8_0": fit.q8_0, "Q5_K": fit.q5_k, "Q4_K": fit.q4_k}
QUANTISABLE = (*LARGEST, *_FITS)


@dataclass(frozen=True)
class Quantised:
    """Rows of a weight.

    data: [rows, columns] in the dtype of a kind of BY_ROW, or uint8 [rows, bytes of a row's blocks].
    scale: fp32 [rows]; None for block formats.
    """

    kind: str
    columns: int
    data: Tensor
    scale: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row, scales included."""
    if kind in BY_ROW:
        return columns + 4
    elements, width = SIZES[kind]
    return columns // elements * width


def kind_for(kind: str, columns: int) -> str | None:
    """The kind that rows of so many elements can have: `kind`, Q8_0 where a K type's 256 do not divide them, None
    where its 32 do not either."""
    for candidate in (kind, "Q8_0"):
        if candidate in BY_ROW or columns % SIZES[candidate][0] == 0:
            return candidate
    return None


def quantise(kind: str, weight: Tensor) -> Quantised:
    """A weight [rows, columns] of any float dtype in a kind of QUANTISABLE, worked out in fp32 piece by piece.

    fp8: round(w / scale) with scale = max |row| / 448; int8 the same with 127. Q8_0, Q5_K, Q4_K: see `fit`.
    Raises InputError for values that are not finite, and for rows that the blocks do not divide.
    """
    rows, columns = weight.shape
    if kind in _FITS and columns % SIZES[kind][0]:
        other = kind_for(kind, columns) or "int8"
        raise InputError(f"rows of {columns} do not fill {kind} blocks of {SIZES[kind][0]}; use {other}")
    width, dtype = (columns, BY_ROW[kind]) if kind in BY_ROW else (row_bytes(kind, columns), torch.uint8)
    data = torch.empty(rows, width, dtype=dtype, device=weight.device)
    scale = torch.empty(rows, device=weight.device) if kind in BY_ROW else None
    for a, b in spans(rows, columns):
        data[a:b], part = _quantise_piece(kind, weight[a:b].float())
        if scale is not None and part is not None:
            scale[a:b] = part
    return Quantised(kind, columns, data, scale)


def spans(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows [a, b) that are PIECE elements at most, or one row."""
    step = max(1, PIECE // columns)
    return ((a, min(a + step, rows)) for a in range(0, rows, step))


def in_dtype(parts: Sequence[Quantised], dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, rows [a, b) of the weight) piece by piece; never the whole of it is there in `dtype`."""
    start = 0
    for q in parts:
        for a, b in spans(q.rows, q.columns):
            yield start + a, start + b, dequantise(q, a, b).to(dtype)
        start += q.rows


def _quantise_piece(kind: str, w: Tensor) -> tuple[Tensor, Tensor | None]:
    """Data and scale of rows in fp32."""
    if not torch.isfinite(w).all():
        raise InputError("the weight holds values that are not finite; download the model again")
    if kind in _FITS:
        elements, _ = SIZES[kind]
        return _FITS[kind](w.reshape(-1, elements)).view(len(w), -1), None
    scale = scales_of(w, kind)
    return to_kind(w / scale, kind), scale[:, 0]


def to_kind(x: Tensor, kind: str) -> Tensor:
    """Scaled fp32 values in the dtype of "fp8" or "int8": to the nearest, even numbers from the middle."""
    x = x.clamp(-LARGEST[kind], LARGEST[kind])  # fp8 has no infinity: what is too large would be NaN
    return (x.round() if kind == "int8" else x).to(BY_ROW[kind])


def scales_of(x: Tensor, kind: str) -> Tensor:
    """The scale of each row of fp32 [rows, columns] in "fp8" or "int8": [rows, 1].

    A row of zeros, or of numbers whose scale fp32 cannot hold, gets the smallest scale there is.
    """
    return (x.abs().amax(dim=1, keepdim=True) / LARGEST[kind]).clamp_min(torch.finfo(torch.float32).tiny)


def dequantise(q: Quantised, first: int = 0, last: int | None = None) -> Tensor:
    """Rows [first, last) in fp32."""
    data = q.data[first:last]
    if q.scale is not None:
        return data.float() * q.scale[first:last, None]
    _, width = SIZES[q.kind]
    return dequantise_blocks(q.kind, data.reshape(-1, width)).view(len(data), q.columns)


def stack(parts: Sequence[Quantised]) -> Quantised:
    """Rows below rows, all of one kind."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    data = torch.cat([part.data.view(torch.uint8) for part in parts]).view(parts[0].data.dtype)  # fp8 has no cat
    return Quantised(parts[0].kind, parts[0].columns, data, torch.cat(scales) if scales else None)


def merge(parts: Sequence[Quantised]) -> list[Quantised]:
    """The same rows in as few pieces as their kinds allow."""
    merged: list[list[Quantised]] = []
    for part in parts:
        if merged and merged[-1][0].kind == part.kind:
            merged[-1].append(part)
        else:
            merged.append([part])
    return [stack(same) for same in merged]
