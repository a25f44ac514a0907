"""Triton kernels of activations in eight bits, by Triton's interpreter: against PyTorch's passes, to the last bit."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcv_core.quant import matmul
from lcv_core.quant.formats import scales_of, to_kind

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

from lcv_core.quant import row_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rounded_before(x: Tensor) -> Tensor:
    """Numbers that fp8 holds, but for the row's power of two: Triton's interpreter rounds the others wrongly, 126 to
    64."""
    x8 = to_kind(x.float() / scales_of(x.float(), "fp8"), "fp8").float()
    return (x8 * (2.0 ** (torch.arange(len(x), device=x.device) % 7 - 5))[:, None]).to(x.dtype)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [64, 100, 11_010])
def test_rows_are_quantised_as_pytorch_does_it(kind: str, dtype: torch.dtype, columns: int) -> None:
    """Rows of any scale, of zeros, with ties between whole numbers, and cut from a wider tensor."""
    x = (randn(9, columns + 6) * torch.logspace(-4, 3, 9, device=DEVICE)[:, None]).to(dtype)[:, 2 : columns + 2]
    x[3] = 0
    if kind == "int8":
        x[4] = torch.arange(columns, device=DEVICE).to(dtype) % 32 + 0.5
        x[4, 0] = 127
    elif DEVICE.type == "cpu":
        x = rounded_before(x)
    data, scale = row_kernels.quantise_rows(x, kind)
    wide = x.float().cpu()  # a GPU's PyTorch divides by a number as it multiplies by its reciprocal
    expected = scales_of(wide, kind)
    assert scale.cpu().equal(expected)
    assert data.float().cpu().equal(to_kind(wide / expected, kind).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_sums_are_scaled(dtype: torch.dtype, biased: bool) -> None:
    sums = torch.randint(-(1 << 27), 1 << 27, (5, 100), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    sums = sums.to(DEVICE)
    rows, columns = randn(5, 1, seed=2).abs() * 1e-6, randn(100, seed=3).abs()
    bias = randn(100, seed=4).to(dtype) if biased else None
    out = torch.full((5, 104), torch.nan, dtype=dtype, device=DEVICE)
    row_kernels.scale_sums(sums, rows, columns, bias, out[:, :100])
    expected = sums.double() * rows.double() * columns.double() + (0 if bias is None else bias.double())
    error = (out[:, :100].double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-4) and out[:, 100:].isnan().all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_multiply_the_same_with_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "TOKENS", 8)
    from test_quant_layers import COLUMNS, layer, weight

    held = layer(weight(kind), how=kind).to(DEVICE)  # type: ignore[arg-type]
    x = randn(2, 10, COLUMNS) * torch.linspace(0.1, 30, 10, device=DEVICE)[:, None]
    if kind == "fp8" and DEVICE.type == "cpu":
        x = rounded_before(x.view(20, COLUMNS)).view(x.shape)
    monkeypatch.setattr(matmul, "row_kernels", lambda device: None)
    expected = held(x)
    used: list[int] = []

    def quantise_rows(*args: Any) -> tuple[Tensor, Tensor]:
        used.append(1)
        return row_kernels.quantise_rows(*args)

    kernels = SimpleNamespace(quantise_rows=quantise_rows, scale_sums=row_kernels.scale_sums)
    monkeypatch.setattr(matmul, "row_kernels", lambda device: kernels)
    torch.testing.assert_close(held(x), expected, rtol=1e-5, atol=1e-5)
    assert len(used) == 3


def test_they_are_proven_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul.check_row_kernels(row_kernels, DEVICE) is None
    monkeypatch.setattr(matmul, "fp8_refusal", lambda device: None)
    wrong = SimpleNamespace(
        quantise_rows=lambda x, kind: (torch.zeros_like(x), x[:, :1].float()), scale_sums=lambda *args: None
    )
    reason = matmul.check_row_kernels(wrong, DEVICE)  # type: ignore[arg-type]
    assert reason == f"they are wrong on {DEVICE}: quantising to int8, quantising to fp8, scaling sums"


def test_a_cpu_and_a_compiler_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_proven_kernels", lambda device: row_kernels)
    assert matmul.row_kernels(torch.device("cpu")) is None
    assert matmul.row_kernels(torch.device("cuda")) is row_kernels
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert matmul.row_kernels(torch.device("cuda")) is None
