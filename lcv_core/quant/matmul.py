"""Multiplying in eight bits: activations are quantised token by token, weights have a scale for each output channel.

y[t, o] = scale_x[t] * scale_w[o] * sum_i x8[t, i] * w8[o, i]. The sum is exact in int8 (in int32: 11,008 terms of at
most 127 * 127) and that of the tensor cores in fp8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lcv_core.quant.formats import Quantised, in_dtype, scales_of, to_kind

TOKENS = 4096  # multiplied at once: the sums of a chunk are in 32 bits
_FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply fp8
_FP8_MULTIPLE = 16  # both sides of a weight
_INT_MULTIPLE, _INT_TOKENS = 8, 17  # what a GPU's int8 matmul needs: both sides of a weight, rows of activations


def fp8_refusal(device: torch.device) -> str | None:
    """Why fp8 matrices cannot be multiplied on a device; None where they can."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the model is on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        name, have = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"it needs a GPU of compute capability 8.9 or more, {name} has {have}"
    return None


def shape_refusal(q: Quantised, matmul: str) -> str | None:
    """Why this weight cannot be multiplied as "int8" or "fp8"; None where it can."""
    if q.kind != matmul:
        return f"the weight is {q.kind}"
    if matmul == "fp8" and (q.rows % _FP8_MULTIPLE or q.columns % _FP8_MULTIPLE):
        return f"its sides {q.rows} and {q.columns} are not both multiples of {_FP8_MULTIPLE}"
    return None


def weight_only_matmul(x: Tensor, parts: Sequence[Quantised]) -> Tensor:
    """x W^T of x [n, columns] in its dtype, the rows of W in order; never the whole of W is there in it."""
    out = x.new_empty(x.shape[0], sum(q.rows for q in parts))
    for a, b, rows in in_dtype(parts, x.dtype):
        torch.mm(x, rows.t(), out=out[:, a:b])
    return out


def int8_matmul(x: Tensor, q: Quantised) -> Tensor:
    """x [n, columns] times an int8 weight: [n, rows] in x's dtype. The scales are multiplied in fp32."""
    assert q.scale is not None
    rows = q.scale

    def multiply(wide: Tensor) -> Tensor:
        scale = scales_of(wide, "int8")
        return _integer(to_kind(wide / scale, "int8"), q.data).float().mul_(scale).mul_(rows)

    return _in_pieces(x, q.rows, multiply)


def _in_pieces(x: Tensor, rows: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, rows] in x's dtype: `multiply` of x in fp32, some tokens at a time."""
    out = x.new_empty(x.shape[0], rows)
    for here, tokens in zip(out.split(TOKENS), x.split(TOKENS), strict=True):
        here.copy_(multiply(tokens.float()))
    return out


def _integer(a: Tensor, b: Tensor) -> Tensor:
    """int8 a [n, k] times int8 b [m, k] transposed, exactly: int32 [n, m], or fp64 where torch has no integer one."""
    n, k = a.shape
    if a.device.type == "cpu":
        return torch.ops.aten._int_mm(a, b.t())
    if a.device.type == "cuda" and not (k % _INT_MULTIPLE or b.shape[0] % _INT_MULTIPLE):
        if n >= _INT_TOKENS:
            return torch.ops.aten._int_mm(a, b.t())
        return torch.ops.aten._int_mm(torch.cat([a, a.new_zeros(_INT_TOKENS - n, k)]), b.t())[:n]
    return exact_integer(a, b)


def exact_integer(a: Tensor, b: Tensor) -> Tensor:
    """The same in fp64, in which every sum of so few whole numbers is exact."""
    return a.double() @ b.double().t()


def fp8_matmul(x: Tensor, q: Quantised) -> Tensor:
    """x [n, columns] times an fp8 weight: [n, rows] in x's dtype, by way of bf16."""
    assert q.scale is not None
    columns = q.scale[None]

    def multiply(wide: Tensor) -> Tensor:
        scale = scales_of(wide, "fp8")
        return torch.ops.aten._scaled_mm(
            to_kind(wide / scale, "fp8"), q.data.t(), scale, columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _in_pieces(x, q.rows, multiply)
