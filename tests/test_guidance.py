"""CFG-Zero* against its formula, sample by sample in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import made, refused
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import components, make_dit, randn, text
from torch import Tensor

from lcv_core import schedule
from lcv_core.denoise import Guidance, denoise
from lcv_core.errors import InputError
from lcv_core.guidance import cfg_zero
from lcv_core.pipelines import text_to_video


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


# The interval of guided steps


SIGMAS = schedule.base(6)
LEVELS = SIGMAS.tolist()


def counted(guidance: Guidance, **options: Any) -> tuple[Tensor, list[int]]:
    """The latents, and the samples of each forward of the network."""
    dit, batches = make_dit(), []
    dit.x_embedder.register_forward_hook(lambda _m, x, _y: batches.append(x[0].shape[0]))
    return denoise(dit, randn(1, 16, 3, 4, 6), SIGMAS, text=text(), guidance=guidance, **options), batches


@pytest.mark.parametrize("cond", [{}, {"num_cond_latents": 1}, {"num_cond_latents": 1, "use_kv_cache": True}])
def test_steps_outside_the_interval_run_one_branch(cond: dict[str, Any]) -> None:
    """Step by step what a guided and an unguided run give; both ends of the interval belong to it."""
    between = (LEVELS[4], LEVELS[2])
    cached = [1] if cond.get("use_kv_cache") else []
    results = {}
    for mode, forwards in (("sequential", [1, 1]), ("batched", [2])):
        guidance = Guidance(4.0, text(seed=9), mode=mode, interval=between)  # type: ignore[arg-type]
        results[mode], batches = counted(guidance, **cond)
        assert batches == cached + [1, 1] + 3 * forwards + [1]
    assert (results["sequential"] - results["batched"]).abs().max() <= 1e-4
    x, dit = randn(1, 16, 3, 4, 6), make_dit()
    for step in range(6):
        guidance = Guidance(4.0, text(seed=9)) if 2 <= step <= 4 else None
        pair = SIGMAS[step : step + 2]
        x = denoise(dit, x, pair, text=text(), guidance=guidance, **cond)
    assert torch.equal(results["sequential"], x)


def test_the_whole_interval_is_guidance_everywhere() -> None:
    plain, forwards = counted(Guidance(4.0, text(seed=9)))
    assert len(forwards) == 12
    assert torch.equal(counted(Guidance(4.0, text(seed=9), interval=(0.0, 1.0)))[0], plain)
    never, forwards = counted(Guidance(4.0, text(seed=9), interval=(0.0, 0.01)))
    assert len(forwards) == 6
    assert torch.equal(never, counted(Guidance())[0])


@pytest.mark.parametrize("interval", [(0.9, 0.2), (-0.1, 0.5), (0.5, 1.5), (0.5, 0.5), (float("nan"), 1.0)])
def test_intervals_that_are_none(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="cfg_interval must be two sigmas, 0 <= low < high <= 1"):
        Guidance(4.0, text(seed=9), interval=interval)
    with pytest.raises(InputError, match="cfg_interval must be two sigmas"):
        text_to_video(components(), text=text(), guidance_scale=1.0, cfg_interval=interval)


def test_an_interval_on_the_command_line(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["t2v", "-m", tiny_checkpoint, "-p", "x", "--steps", 2, "--seed", 1, "--frames", 5]
    call += ["--height", 32, "--width", 32]
    for name, more in {
        "whole": [], "same": ["--cfg-interval", 0, 1], "none": ["--cfg-interval", 0, 0.001], "off": ["-g", 1],
    }.items():  # fmt: skip
        made(*call, *more, "-o", f"{name}.safetensors")
    whole, same, none, off = (load_file(f"{name}.safetensors")["latents"] for name in ("whole", "same", "none", "off"))
    assert torch.equal(whole, same) and torch.equal(none, off) and not torch.equal(whole, off)
    assert "try 0.2 0.9" in refused(*call, "--cfg-interval", 0.9, 0.2)
