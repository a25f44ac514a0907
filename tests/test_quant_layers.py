"""Layers that hold quantised weights: against the dequantised weight in fp64, and against exact integers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core.errors import InputError
from lcv_core.live_bytes import LiveBytes
from lcv_core.quant import formats, layers, matmul
from lcv_core.quant.formats import QUANTISABLE, Quantised, dequantise, quantise
from lcv_core.weights.lora import load_lora

ROWS, COLUMNS = 96, 512


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(kind: str, rows: int = ROWS, columns: int = COLUMNS, seed: int = 1) -> Quantised:
    return quantise(kind, randn(rows, columns, seed=seed) * torch.linspace(0.01, 0.1, rows)[:, None])


def layer(*weights: Quantised, how: layers.Matmul = "weight-only", bias: bool = True) -> layers.Linear:
    rows = sum(q.rows for q in weights)
    made = layers.Linear(weights[0].columns, rows, bias=bias, device="meta")
    made.bias = nn.Parameter(randn(rows, seed=2)) if bias else None
    made.hold(weights, how)
    return made.requires_grad_(False)


def exact(x: Tensor, held: layers.Linear) -> Tensor:
    """With the dequantised weight, in fp64."""
    whole = torch.cat([dequantise(q) for q in held.held]).double()
    return F.linear(x.double(), whole, None if held.bias is None else held.bias.double())


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_weight_only_computes_in_the_dtype_of_its_input(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = layer(weight(kind))
    x = randn(2, 5, COLUMNS)
    for piece in (1 << 22, 7 * COLUMNS):
        monkeypatch.setattr(formats, "PIECE", piece)
        for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
            y = held(x.to(dtype))
            assert y.dtype == dtype and y.shape == (2, 5, ROWS)
            assert relative(y, exact(x.to(dtype), held)) < limit


def test_it_is_the_plain_layer_until_it_holds_something() -> None:
    plain = layers.Linear(8, 4)
    x = randn(3, 8)
    assert plain(x).equal(F.linear(x, plain.weight, plain.bias)) and plain.held == []
    assert set(plain.state_dict()) == {"weight", "bias"}
    plain.hold([quantise("int8", torch.ones(4, 8))])
    assert plain.weight is None and set(plain.state_dict()) == {"bias", "pieces.0.data", "pieces.0.scale"}
    assert "int8, weight-only" in repr(plain)


def test_rows_of_different_scales_and_kinds() -> None:
    parts = [weight("int8", 32, seed=3), weight("int8", 32, seed=4), weight("Q4_K", 16), weight("Q8_0", 16)]
    held = layer(*parts)
    assert [(q.kind, q.rows) for q in held.held] == [("int8", 64), ("Q4_K", 16), ("Q8_0", 16)]
    x = randn(4, COLUMNS)
    assert relative(held(x), exact(x, held)) < 1e-6
    assert relative(held(x)[:, 32:64], exact(x, layer(parts[1], bias=False)) + held.bias[32:64]) < 1e-6


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_no_full_copy_of_the_weight_in_fp32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE", 16 * COLUMNS)
    held = layer(weight(kind, 1024), bias=False)
    x = randn(1, COLUMNS)
    with LiveBytes() as live:
        held(x)
    assert live.peak < 0.25 * 1024 * COLUMNS * 4


def test_casts_leave_the_quantised_weight_alone() -> None:
    for kind in QUANTISABLE:
        held = layer(weight(kind))
        before = copy.deepcopy(held)
        held.to(torch.bfloat16)
        assert held.bias.dtype == torch.bfloat16
        for old, new in zip(before.held, held.held, strict=True):
            assert old.data.dtype == new.data.dtype and dequantise(old).equal(dequantise(new))
        assert held.to("meta").held[0].data.is_meta


# eight bits by eight bits


def test_int8_is_the_exact_integer_product_with_both_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "TOKENS", 8)
    held = layer(weight("int8"), how="int8")
    (q,) = held.held
    assert q.scale is not None
    x = randn(3, 7, COLUMNS) * torch.linspace(0.1, 30, 7)[:, None]
    x[0, 0] = 0
    scale = x.abs().amax(-1, keepdim=True) / 127
    whole = (x / scale.clamp_min(1e-30)).round().to(torch.int64)
    product = whole @ q.data.to(torch.int64).t()  # exact
    expected = product.double() * scale.double() * q.scale.double() + held.bias.double()
    got = held(x)
    assert relative(got, expected) < 1e-6 and got[0, 0].equal(held.bias)
    error = relative(got, exact(x, held))
    assert 1e-3 < error < 1.2e-2  # what rounding the activations costs
    assert relative(held(x.bfloat16()), exact(x.bfloat16(), held)) < 1.5e-2


def test_integer_products_agree_to_the_last_bit() -> None:
    g = torch.Generator().manual_seed(0)
    for n, k, m in ((1, 11008, 16), (33, 64, 7)):
        a, b = (torch.randint(-127, 128, (rows, k), generator=g).to(torch.int8) for rows in (n, m))
        a[0], b[0] = 127, 127  # the largest sum there is
        expected = a.to(torch.int64) @ b.to(torch.int64).t()
        assert matmul._integer(a, b).to(torch.int64).equal(expected)
        assert matmul.exact_integer(a, b).to(torch.int64).equal(expected)


def test_fp8_is_the_product_of_what_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "TOKENS", 16)
    held = layer(weight("fp8"), how="fp8")
    (q,) = held.held
    x = randn(2, 24, COLUMNS) * torch.linspace(0.1, 30, 24)[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 448
    x8 = (x / scale).to(torch.float8_e4m3fn).double() * scale.double()
    expected = x8 @ dequantise(q).double().t() + held.bias.double()
    got = held(x)
    assert got.dtype == torch.float32 and relative(got, expected) < 3e-3  # its result is in bf16
    assert 1e-2 < relative(got, exact(x, held)) < 4e-2
    half = held(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.equal(held(x.bfloat16().float()).bfloat16())


def test_what_cannot_be_multiplied_is_refused() -> None:
    with pytest.raises(InputError, match=r'cannot be multiplied as "int8": the weight is Q8_0; use "weight-only"'):
        layer(weight("Q8_0"), how="int8")
    with pytest.raises(InputError, match="sides 20 and 512 are not both multiples of 16"):
        layer(weight("fp8", 20), how="fp8")
    with pytest.raises(InputError, match=r"the weight is \[96, 512\], expected \[96, 256\]"):
        layers.Linear(256, 96).hold([weight("int8")])
    assert "CUDA" in str(matmul.fp8_refusal(torch.device("cpu")))


@pytest.mark.parametrize("capability, fine", [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_which_gpus_multiply_fp8(capability: tuple[int, int], fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    refusal = matmul.fp8_refusal(torch.device("cuda"))
    assert (refusal is None) == fine
    assert fine or "needs a GPU of compute capability 8.9 or more, a card has 8.6" in str(refusal)


# gradients and adapters


@pytest.mark.parametrize("kind, how", [("Q5_K", "weight-only"), ("int8", "int8"), ("fp8", "fp8")])
def test_gradients_reach_the_input(kind: str, how: layers.Matmul, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE", 7 * COLUMNS)
    held = layer(weight(kind), how=how)
    held.bias.requires_grad_(True)
    x = randn(2, 16, COLUMNS).requires_grad_(True)
    up = randn(2, 16, ROWS, seed=9)
    (held(x) * up).sum().backward()
    whole = torch.cat([dequantise(q) for q in held.held])
    assert x.grad is not None and torch.allclose(x.grad, up @ whole, rtol=1e-4, atol=1e-5)
    assert held.bias.grad is not None and torch.allclose(held.bias.grad, up.sum((0, 1)), rtol=1e-4, atol=1e-5)


class _Model(nn.Module):
    def __init__(self, held: layers.Linear) -> None:
        super().__init__()
        self.proj = held

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@pytest.mark.parametrize("kind", QUANTISABLE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_adapters_add_to_a_quantised_layer(kind: str, dynamic: bool) -> None:
    if dynamic and kind not in ("int8", "fp8"):
        return
    how: layers.Matmul = kind if dynamic else "weight-only"  # type: ignore[assignment]
    model = _Model(layer(weight(kind), how=how))
    x = randn(4, COLUMNS)
    before = model(x)
    down, up = randn(3, COLUMNS, seed=5), randn(ROWS, 3, seed=6)
    adapter = {"proj.lora_A.weight": down, "proj.lora_B.weight": up}
    handle = load_lora(model, adapter, 0.5)
    assert relative(model(x) - before, 0.5 * x @ down.t() @ up.t()) < 1e-5
    handle.remove()
    assert model(x).equal(before)
    with pytest.raises(InputError, match='its weight is quantised or not loaded; use mode="runtime"'):
        load_lora(model, adapter, mode="merged")
