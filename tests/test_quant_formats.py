"""Formats of quantised weights against the `gguf` package, brute force and plain rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.quant import fit, formats
from lcv_core.quant.blocks import SIZES, dequantise_blocks, pack_scales, unpack_scales
from lcv_core.quant.formats import QUANTISABLE, Quantised, dequantise, kind_for, merge, quantise, row_bytes, stack

K_TYPES = {"Q4_K": (fit.q4_k, 15), "Q5_K": (fit.q5_k, 31)}


def type_of(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind]


def by_package(kind: str, blocks: Tensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), type_of(kind)))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def numbers(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights of several distributions."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=g) * 0.02
    if name == "uniform":
        return torch.rand(rows, columns, generator=g) - 0.5
    if name == "heavy":  # a few large ones, as trained weights have them
        return normal * (1 + 4 * (torch.rand(rows, columns, generator=g) < 0.01))
    if name == "shifted":
        return normal + 0.05
    return normal


# GGUF to numbers


@pytest.mark.parametrize("kind", SIZES)
def test_dequantising_is_the_packages_bit_for_bit(kind: str) -> None:
    elements, width = SIZES[kind]
    assert gguf.GGML_QUANT_SIZES[type_of(kind)] == (elements, width)
    raw = np.random.default_rng(0).integers(0, 256, (999, width), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales: infinities and NaN among them
        expected = gguf.dequantize(raw, type_of(kind))
    got = dequantise_blocks(kind, torch.from_numpy(raw)).numpy()
    assert np.isfinite(got).mean() > 0.9
    assert np.array_equal(got, expected, equal_nan=True)


def test_packed_scales_come_out_as_they_went_in() -> None:
    g = torch.Generator().manual_seed(0)
    scales, minima = torch.randint(0, 64, (2, 500, 8), generator=g).to(torch.uint8)
    packed = pack_scales(scales, minima)
    assert packed.shape == (500, 12)
    got = unpack_scales(packed)
    assert got[0].equal(scales) and got[1].equal(minima)


# numbers to GGUF


def test_q8_0_is_the_packages_bit_for_bit() -> None:
    x = torch.cat([numbers("normal", 50, 256), numbers("heavy", 50, 256), torch.zeros(2, 256)])
    x[0, :64] = torch.arange(64) * 0.5 - 16  # halves, which are rounded away from zero
    expected = torch.from_numpy(gguf.quantize(x.numpy(), type_of("Q8_0")))
    assert quantise("Q8_0", x).data.equal(expected)


def rounded(x: Tensor, levels: int) -> Tensor:
    """What plain rounding makes of 256s: the range of each 32 cut into equal steps, six bits for these."""
    x = x.view(-1, 8, 32)
    low = -x.amin(2, keepdim=True).clamp_max(0)
    step = (x.amax(2, keepdim=True) + low) / levels
    d, dmin = ((v.amax(1, keepdim=True) / 63).half().float() for v in (step, low))
    step, low = d * (step / d).round(), dmin * (low / dmin).round().nan_to_num()
    return (((x + low) / step).round().clamp(0, levels) * step - low).view(-1, 256)


@pytest.mark.parametrize("name, q4, q5", [("normal", 0.0700, 0.0346), ("uniform", 0.0536, 0.0265),
                                          ("heavy", 0.0793, 0.0391), ("shifted", 0.0300, 0.0146)])  # fmt: skip
def test_the_search_beats_plain_rounding(name: str, q4: float, q5: float) -> None:
    x = numbers(name, 256, 256)
    for (kind, (make, levels)), limit in zip(K_TYPES.items(), (q4, q5), strict=True):
        error, plain = relative(by_package(kind, make(x)), x), relative(rounded(x, levels), x)
        assert error < limit
        assert error < 0.92 * plain


@pytest.mark.parametrize("kind", K_TYPES)
def test_what_the_format_can_hold_is_held(kind: str) -> None:
    """Blocks made of whole numbers come back as they were, up to the rounding of d and dmin."""
    make, levels = K_TYPES[kind]
    g = torch.Generator().manual_seed(1)
    q = torch.randint(0, levels + 1, (64, 8, 32), generator=g)
    q[:, :, 0], q[:, :, 1] = 0, levels  # the whole range is used
    scale, low = torch.randint(32, 64, (2, 64, 8, 1), generator=g)
    scale[:, 0], low[:, 0] = 63, 63
    x = (scale * q * 2.0**-9 - low * 2.0**-6).view(64, 256)
    assert relative(by_package(kind, make(x)), x) < 1e-3


@pytest.mark.parametrize("kind", K_TYPES)
def test_blocks_that_are_not_usual(kind: str) -> None:
    make, _ = K_TYPES[kind]
    x = torch.zeros(7, 256)
    x[1] = 0.25  # one value
    x[2] = -0.25
    x[3, 5] = 3.0  # one value among zeros
    x[4] = torch.linspace(-1, 1, 256)
    x[5] = torch.linspace(1, 2, 256)  # far from zero on one side
    x[6] = torch.linspace(-2, -1, 256)
    got = by_package(kind, make(x))
    assert torch.isfinite(got).all()
    assert got[0].equal(x[0])
    for row, limit in ((1, 0.02), (2, 0.02), (3, 0.02), (4, 0.04), (5, 0.04), (6, 0.02)):
        assert (got[row] - x[row]).abs().max() <= limit * x[row].abs().max(), row


# one scale for each row


def test_fp8_takes_the_nearest_number_there_is() -> None:
    x = numbers("heavy", 9, 300)
    q = quantise("fp8", x)
    assert q.scale is not None and q.data.dtype == torch.float8_e4m3fn
    assert torch.allclose(q.scale, x.abs().amax(1) / 448, rtol=1e-6)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[torch.isfinite(every)]
    scaled = x.double() / q.scale.double()[:, None]
    nearest = (scaled[..., None] - every).abs().amin(-1)
    assert ((scaled - q.data.double()).abs() <= nearest + 1e-4).all()
    assert relative(dequantise(q), x) < 0.027


def test_int8_is_half_a_step_off_at_most() -> None:
    x = numbers("normal", 9, 300)
    q = quantise("int8", x)
    assert q.scale is not None and q.data.dtype == torch.int8
    assert ((dequantise(q) - x).abs() <= q.scale[:, None] * 0.5001).all()
    assert q.data.abs().amax(1).eq(127).all()
    assert relative(dequantise(q), x) < 0.008


ERRORS = {"fp8": 0.027, "int8": 0.0085, "Q8_0": 0.0056, "Q5_K": 0.0346, "Q4_K": 0.0700}


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_all_kinds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers("normal", 40, 512, seed=3)
    q = quantise(kind, x)
    assert (q.rows, q.columns, q.nbytes) == (40, 512, 40 * row_bytes(kind, 512))
    whole = dequantise(q)
    assert whole.shape == x.shape and whole.dtype == torch.float32
    assert 0.2 * ERRORS[kind] < relative(whole, x) < ERRORS[kind]
    assert dequantise(q, 7, 19).equal(whole[7:19])
    # Rows do not know of each other, however they are cut.
    monkeypatch.setattr(formats, "PIECE", 3 * 512)
    monkeypatch.setattr(fit, "_PIECE", 2 * 256)
    assert dequantise(quantise(kind, x)).equal(whole)
    halves = quantise(kind, x[:13]), quantise(kind, x[13:])
    assert dequantise(stack(halves)).equal(whole)
    assert [part.rows for part in merge(halves)] == [40]
    # From bf16 it is the same as from the same numbers in fp32.
    assert dequantise(quantise(kind, x.bfloat16())).equal(dequantise(quantise(kind, x.bfloat16().float())))


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_rows_of_zeros_stay_zero(kind: str) -> None:
    x = numbers("normal", 3, 256)
    x[1] = 0
    got = dequantise(quantise(kind, x))
    assert got[1].eq(0).all() and torch.isfinite(got).all()


def test_rows_are_merged_by_kind_alone_in_their_order() -> None:
    x = numbers("normal", 12, 256)
    parts = [quantise(kind, x[3 * i : 3 * i + 3]) for i, kind in enumerate(("Q4_K", "Q4_K", "int8", "Q4_K"))]
    merged = merge(parts)
    assert [(q.kind, q.rows) for q in merged] == [("Q4_K", 6), ("int8", 3), ("Q4_K", 3)]
    assert torch.cat([dequantise(q) for q in merged]).equal(torch.cat([dequantise(q) for q in parts]))


@pytest.mark.parametrize("kind", QUANTISABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(kind: str, value: float) -> None:
    x = torch.zeros(2, 256)
    x[1, 3] = value
    with pytest.raises(InputError, match="not finite"):
        quantise(kind, x)


def test_rows_that_blocks_do_not_divide() -> None:
    assert [kind_for("Q4_K", n) for n in (512, 288, 100)] == ["Q4_K", "Q8_0", None]
    assert [kind_for("fp8", n) for n in (512, 288, 100)] == ["fp8", "fp8", "fp8"]
    with pytest.raises(InputError, match=r"rows of 288 do not fill Q5_K blocks of 256; use Q8_0"):
        quantise("Q5_K", torch.zeros(2, 288))
    with pytest.raises(InputError, match=r"rows of 100 do not fill Q8_0 blocks of 32; use int8"):
        quantise("Q8_0", torch.zeros(2, 100))


def test_one_number_of_a_row_is_a_row() -> None:
    q = Quantised("int8", 2, torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([0.5, 2.0]))
    assert dequantise(q).tolist() == [[0.5, -1.0], [6.0, 8.0]]
