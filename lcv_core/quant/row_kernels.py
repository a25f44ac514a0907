"""Activations in eight bits, and sums of eight bits back to numbers, in Triton: each reads and writes a tensor once.

PyTorch's own passes go over the activations seven times in fp32. On an H200 they took as long as fp8 saves: a layer of
4,096 to 12,288 channels needed 6.5 ms for 37,440 tokens, with bf16 weights 4.7 ms. `formats.scales_of` and `to_kind`
say what is computed; on the same numbers the results are the same to the last bit.
"""

# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_core.quant.formats import BY_ROW, LARGEST

_ELEMENTS = 32  # of a thread at most, in fp32
# Wider rows are read twice, a part at a time: the second time they come from the L2 cache. Held whole, rows of 11,008
# took 2.6 times what the memory does on an H200.
_WHOLE_ROW, _PART = 8192, 2048
_TINY = torch.finfo(torch.float32).tiny
_TO_WHOLE = 12582912.0  # 1.5 * 2^23: fp32 has no fractions there, so adding it rounds, even numbers from the middle


@triton.jit
def _in_units(v, s, TO_WHOLE: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr):
    """v / s within what eight bits hold, rounded to whole numbers if WHOLE."""
    v = tl.div_rn(v, tl.zeros_like(v) + s)
    v = tl.minimum(tl.maximum(v, -LARGEST), LARGEST)
    if WHOLE:
        v = (v + TO_WHOLE) - TO_WHOLE
    return v


@triton.jit
def quantise_rows_kernel(
    x, data, scale, columns, stride, TINY: tl.constexpr, TO_WHOLE: tl.constexpr, LARGEST: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: scale = max |x| / LARGEST, data = x / scale, rounded to whole numbers if WHOLE. data is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < columns
    v = tl.load(x + row * stride + channels, mask=inside, other=0.0).to(tl.float32)
    s = tl.maximum(tl.div_rn(tl.max(tl.abs(v), 0), LARGEST), TINY)
    tl.store(scale + row, s)
    v = _in_units(v, s, TO_WHOLE, LARGEST, WHOLE)
    tl.store(data + row * columns + channels, v.to(data.dtype.element_ty), mask=inside)


@triton.jit
def quantise_wide_rows_kernel(
    x, data, scale, columns, stride, TINY: tl.constexpr, TO_WHOLE: tl.constexpr, LARGEST: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`quantise_rows_kernel`, BLOCK columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    x += row * stride
    peaks = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        v = tl.load(x + first + channels, mask=first + channels < columns, other=0.0)
        peaks = tl.maximum(peaks, tl.abs(v.to(tl.float32)))
    s = tl.maximum(tl.div_rn(tl.max(peaks, 0), LARGEST), TINY)
    tl.store(scale + row, s)
    for first in range(0, columns, BLOCK):
        inside = first + channels < columns
        v = tl.load(x + first + channels, mask=inside, other=0.0).to(tl.float32)
        v = _in_units(v, s, TO_WHOLE, LARGEST, WHOLE)
        tl.store(data + row * columns + first + channels, v.to(data.dtype.element_ty), mask=inside)


@triton.jit
def scale_sums_kernel(
    sums, row_scale, column_scale, bias, out, columns, stride, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """A part of a row: sums * its scale * those of the columns, plus the bias if there is one, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < columns
    v = tl.load(sums + row * columns + channels, mask=inside, other=0).to(tl.float32)
    v = v * tl.load(row_scale + row) * tl.load(column_scale + channels, mask=inside, other=0.0)
    if BIAS:
        v += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * stride + channels, v.to(out.dtype.element_ty), mask=inside)


def quantise_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x [n, columns] with neighbouring columns -> (data [n, columns] of "fp8" or "int8", scale fp32 [n, 1])."""
    n, columns = x.shape
    data = torch.empty(n, columns, dtype=BY_ROW[kind], device=x.device)
    scale = torch.empty(n, 1, device=x.device)
    whole = columns <= _WHOLE_ROW
    kernel, block = (quantise_rows_kernel, triton.next_power_of_2(columns)) if whole else (
        quantise_wide_rows_kernel, _PART
    )  # fmt: skip
    kernel[(n,)](
        x, data, scale, columns, x.stride(0), TINY=_TINY, TO_WHOLE=_TO_WHOLE, LARGEST=LARGEST[kind],
        WHOLE=kind == "int8", BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return data, scale


def scale_sums(sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [n, m] = sums int32 [n, m] * row_scale [n, 1] * column_scale [m] + bias [m]; neighbouring columns in both."""
    n, m = sums.shape
    block = min(triton.next_power_of_2(m), 4096)
    scale_sums_kernel[(n, triton.cdiv(m, block))](
        sums, row_scale, column_scale, column_scale if bias is None else bias, out, m, out.stride(0),
        BIAS=bias is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def _warps(block: int) -> int:
    """Four up to 4,096 elements, then as many as keep a thread's share."""
    return max(4, min(16, block // (32 * _ELEMENTS)))
