"""Multiplying in eight bits: activations are quantised token by token, weights have a scale for each output channel.

y[t, o] = scale_x[t] * scale_w[o] * sum_i x8[t, i] * w8[o, i]. The sum is exact in int8 (in int32: 11,008 terms of at
most 127 * 127) and that of the tensor cores in fp8. On a GPU with Triton `row_kernels` quantise and scale, elsewhere
PyTorch's passes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from lcv_core.proven import may_run, proven
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


def int8_matmul(x: Tensor, q: Quantised, bias: Tensor | None = None) -> Tensor:
    """x [n, columns] times an int8 weight, plus a bias [rows]: [n, rows] in x's dtype. Scales and bias in fp32."""
    assert q.scale is not None
    kernels = row_kernels(x.device)
    out = x.new_empty(x.shape[0], q.rows)
    for here, tokens in _pieces(out, x):
        data, scale = _quantised(tokens, "int8", kernels)
        sums = _integer(data, q.data)
        if kernels is not None and sums.dtype == torch.int32:
            kernels.scale_sums(sums, scale, q.scale, bias, here)
            continue
        y = sums.float().mul_(scale).mul_(q.scale)
        here.copy_(y if bias is None else y.add_(bias.float()))
    return out


def fp8_matmul(x: Tensor, q: Quantised, bias: Tensor | None = None) -> Tensor:
    """x [n, columns] times an fp8 weight, plus a bias [rows]: [n, rows] in x's dtype, by way of bf16."""
    assert q.scale is not None
    kernels, columns = row_kernels(x.device), q.scale[None]
    bias = None if bias is None else bias.to(torch.bfloat16)
    out = x.new_empty(x.shape[0], q.rows)
    how = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    # A copy of the result would be an eighth of the time; a compiler has no use for a given place.
    in_place = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    for here, tokens in _pieces(out, x):
        data, scale = _quantised(tokens, "fp8", kernels)
        operands = data, q.data.t(), scale, columns, bias
        if in_place:
            torch.ops.aten._scaled_mm.out(*operands, **how, out=here)
        else:
            here.copy_(torch.ops.aten._scaled_mm(*operands, **how))
    return out


def _pieces(out: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both, some tokens at a time."""
    return zip(out.split(TOKENS), x.split(TOKENS), strict=True)


def _quantised(x: Tensor, kind: str, kernels: ModuleType | None) -> tuple[Tensor, Tensor]:
    """Rows in "int8" or "fp8" and their scales [n, 1]."""
    if kernels is not None and x.stride(-1) == 1:
        return kernels.quantise_rows(x, kind)
    wide = x.float()
    scale = scales_of(wide, kind)
    return to_kind(wide / scale, kind), scale


def row_kernels(device: torch.device) -> ModuleType | None:
    """Triton's kernels where they run and are right; None elsewhere, and for a compiler, which fuses the passes."""
    return _proven_kernels(device) if may_run(device) else None


@lru_cache(maxsize=16)
def _proven_kernels(device: torch.device) -> ModuleType | None:
    return proven(_load, check_row_kernels, device, "activations are quantised by PyTorch")


def _load() -> ModuleType:
    from lcv_core.quant import row_kernels

    return row_kernels


def check_row_kernels(kernels: ModuleType, device: torch.device) -> str | None:
    """Which of the kernels differ from PyTorch's passes on a few tokens; None where none does."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=g).mul_(torch.logspace(-3, 2, 5)[:, None]).to(device, torch.float16)
    wrong = []
    for kind in ("int8", *(("fp8",) if fp8_refusal(device) is None else ())):
        got, expected = kernels.quantise_rows(x, kind), _quantised(x, kind, None)
        step = 0.125 if kind == "fp8" else 0.0  # fp8 may round another way, by a step; int8 is the same
        if not all(torch.allclose(a.float(), b.float(), rtol=step) for a, b in zip(got, expected, strict=True)):
            wrong.append(f"quantising to {kind}")
    sums, out = torch.arange(5 * 48, device=device, dtype=torch.int32).view(5, 48), torch.empty_like(x)
    rows, columns = torch.logspace(-3, 0, 5, device=device)[:, None], torch.linspace(0.5, 1.5, 48, device=device)
    kernels.scale_sums(sums, rows, columns, columns, out)
    if not torch.allclose(out.float(), sums.float() * rows * columns + columns, rtol=1e-2, atol=1e-2):
        wrong.append("scaling sums")
    return f"they are wrong on {device}: {', '.join(wrong)}" if wrong else None


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
