"""Tiny random models, texts and pictures that the tests of the core share."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lcv_core.config import DiTConfig, Native, VAEConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.pipelines import Components
from lcv_core.text.encoder import TextStates
from lcv_core.vae.model import WanVAE

DIT = DiTConfig(hidden_size=64, depth=2, num_heads=4, caption_channels=32, adaln_tembed_dim=32)
VAE = VAEConfig(base_dim=4)
NATIVE = Native(height=32, width=48, num_frames=9, num_cond_frames=5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def make_dit(dtype: torch.dtype = torch.float32, *, operations: Any = None, **changes: Any) -> LongCatDiT:
    """Random weights of a size that leaves no path of the network unheard; the same ones at every call."""
    dit = LongCatDiT(replace(DIT, **changes), operations=operations)
    g = seeded(1)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            p.normal_(std=0.5 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5, generator=g)
            if "norm.weight" in name:
                p.abs_().add_(0.5)
    return dit.to(dtype).eval().requires_grad_(False)


def make_vae(dtype: torch.dtype = torch.float32, *, operations: Any = None, config: VAEConfig = VAE) -> WanVAE:
    """Random weights that give pixels of moderate size, few of them clamped."""
    vae = WanVAE(config, operations=operations)
    g = seeded(2)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if name.endswith("gamma"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=g))
            else:
                p.normal_(std=0.1 if p.ndim == 1 else 0.8 / p[0].numel() ** 0.5, generator=g)
    return vae.to(dtype).eval().requires_grad_(False)


def text(batch: int = 1, *, length: int = 6, seed: int = 3) -> TextStates:
    """Entry b has its last b + 1 rows masked."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for b in range(batch):
        mask[b, length - 1 - b :] = 0
    return TextStates(randn(batch, length, 32, seed=seed), mask)


def pictures(count: int, height: int = 32, width: int = 48, *, seed: int = 4) -> Tensor:
    """uint8 [count, height, width, 3]."""
    return torch.randint(0, 256, (count, height, width, 3), generator=seeded(seed), dtype=torch.uint8)


class FakeTextEncoder:
    """States that depend on the prompt alone; remembers what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def encode(self, prompts: str | Sequence[str]) -> TextStates:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.prompts += prompts
        states = [randn(6, 32, seed=zlib.crc32(prompt.encode())) for prompt in prompts]
        return TextStates(torch.stack(states), torch.tensor([[1, 1, 1, 1, 0, 0]] * len(prompts)))


def components(**changes: Any) -> Components:
    """A tiny model whose native job is 9 frames of 32x48, 5 of them a continuation's condition."""
    return Components(**{"dit": make_dit(), "vae": make_vae(), "native": NATIVE} | changes)
