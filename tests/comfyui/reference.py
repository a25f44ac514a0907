"""The same jobs by `lcv_core` alone, with its own denoise loop: what graphs are compared with."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lcv_core import open_checkpoint
from lcv_core.pipelines.base import Components


@lru_cache(maxsize=4)
def components(folder: Path) -> Components:
    """All of a checkpoint, in fp32."""
    checkpoint = open_checkpoint(folder)
    return Components(
        dit=checkpoint.load_dit(dtype=torch.float32),
        vae=checkpoint.load_vae(dtype=torch.float32),
        text_encoder=checkpoint.load_text_encoder(dtype=torch.float32),
        adapters=checkpoint.adapters,
        native=checkpoint.native,
        flow_shift=checkpoint.flow_shift,
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalised(c: Components, latents: Tensor) -> Tensor:
    """Latents as ComfyUI keeps them -> as the pipelines do."""
    return c.need_vae().normalize(latents)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to an absolute tolerance; `expected` must say something (finite, not constant)."""
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all() and expected.float().std() > 5 * tolerance
    error = (found.float() - expected.float()).abs().max().item()
    assert error <= tolerance, f"off by {error:.3g}"


def assert_differs(found: Tensor, other: Tensor, least: float = 1e-3) -> None:
    """Not the same to a tolerance: what was changed has an effect."""
    assert found.shape == other.shape
    error = (found.float() - other.float()).abs().max().item()
    assert error >= least, f"differs by {error:.3g} only"
