"""CFG-Zero* against its formula, sample by sample in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import randn
from torch import Tensor

from lcv_core.denoise import Guidance
from lcv_core.errors import InputError
from lcv_core.guidance import cfg_zero


def naive(cond: Tensor, uncond: Tensor, g: float, frames: list[int]) -> Tensor:
    out = torch.empty_like(cond, dtype=torch.float64)
    for b in range(cond.shape[0]):
        dot = norm = 0.0
        for t in frames:
            for c, u in zip(cond[b, :, t].flatten().tolist(), uncond[b, :, t].flatten().tolist()):
                dot, norm = dot + c * u, norm + u * u
        s = dot / (norm + 1e-8)
        out[b] = s * uncond[b].double() + g * (cond[b].double() - s * uncond[b].double())
    return out


@given(st.integers(1, 3), st.floats(1.0, 12.0), st.integers(0, 3), st.integers(0, 99))
def test_formula(batch: int, g: float, first: int, seed: int) -> None:
    cond = randn(batch, 2, 4, 2, 3, seed=seed)
    uncond = 0.5 * cond + randn(batch, 2, 4, 2, 3, seed=seed + 1000)
    got = cfg_zero(cond, uncond, g, scale_from=slice(first, None))
    assert got.dtype == torch.float32
    expected = naive(cond, uncond, g, list(range(first, 4)))
    assert (got - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
    if first == 0:
        assert torch.equal(got, cfg_zero(cond, uncond, g))


def test_every_sample_has_its_own_scale() -> None:
    cond, uncond = randn(3, 2, 4, 2, 2), randn(3, 2, 4, 2, 2, seed=1)
    together = cfg_zero(cond, uncond, 4.0)
    alone = torch.cat([cfg_zero(cond[b : b + 1], uncond[b : b + 1], 4.0) for b in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_scale_from_is_felt_everywhere() -> None:
    cond, uncond = randn(1, 2, 4, 2, 2), randn(1, 2, 4, 2, 2, seed=1)
    differing = cfg_zero(cond, uncond, 4.0) - cfg_zero(cond, uncond, 4.0, scale_from=slice(1, None))
    assert (differing.abs().amax(dim=(0, 1, 3, 4)) > 1e-4).all()


def test_equal_branches_are_left_alone() -> None:
    v = randn(2, 2, 3, 2, 2)
    assert torch.allclose(cfg_zero(v, v, 7.0), v, atol=1e-5)
    zero = torch.zeros_like(v)
    assert torch.equal(cfg_zero(v, zero, 4.0), 4.0 * v)  # no division by zero


def test_guidance_names_are_checked() -> None:
    with pytest.raises(InputError, match='cfg_scope must be "noise" or "all"'):
        Guidance(scope="some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match='cfg_mode must be "sequential" or "batched"'):
        Guidance(mode="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="guidance_scale 4 needs a negative text"):
        Guidance(4.0)
    assert not Guidance(1.0).active
    assert not Guidance(0.5).active
