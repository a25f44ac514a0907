"""Golden vectors: outputs of the official implementation at a tiny size (see golden/README.md)."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcv_core.config import DiTConfig, VAEConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.vae.model import WanVAE

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def make_dit(dtype: torch.dtype = torch.float32, **changes: object) -> LongCatDiT:
    config = DiTConfig.from_json(GOLDEN / "dit_config.json")
    if changes:
        config = dataclasses.replace(config, **changes)
    dit = LongCatDiT(config)
    dit.load_state_dict(golden("dit_weights"))
    return dit.to(dtype).eval().requires_grad_(False)


def make_vae() -> WanVAE:
    vae = WanVAE(VAEConfig(base_dim=4))
    vae.load_state_dict({k[2:]: v for k, v in golden("vae").items() if k.startswith("w.")})
    return vae.eval().requires_grad_(False)


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
