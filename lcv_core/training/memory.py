"""What a step of adapter training takes, before it is taken: the step is run on tensors without values."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.rope import rope_table
from lcv_core.live_bytes import LiveBytes
from lcv_core.shapes import token_grid
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.optimizers import repeated_blocks, trained
from lcv_core.weights.lora_keys import AdapterFile, official_targets

GB = 1e9
_FP32 = 4  # bytes


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a training step on one device, unsharded.

    frozen: the transformer's weights. learning: the adapter, its gradients, Adam's two moments and the average, fp32.
    kept: what the forward pass leaves for the backward pass, the inputs of all blocks where they are recomputed.
    working: the most that is alive beyond that while a block is computed.
    """

    frozen: int
    learning: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        return self.frozen + self.learning + self.kept + self.working

    def __str__(self) -> str:
        parts = (("frozen weights", self.frozen), ("adapter and optimizer", self.learning),
                 ("block inputs", self.kept), ("inside a block", self.working))  # fmt: skip
        return f"{self.total / GB:.1f} GB (" + ", ".join(f"{what} {n / GB:.1f}" for what, n in parts) + ")"


@functools.lru_cache(maxsize=16)
def step_bytes(
    config: DiTConfig,
    latents: tuple[int, int, int, int],
    *,
    file: AdapterFile,
    rank: int,
    text_length: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    average: bool = False,
    recompute: bool = True,
) -> StepBytes:
    """Of training the adapter `file` on clips whose latents are (B, T, h, w), with attention that keeps no logits.

    average: an average of the adapter is kept. What the attention or a matrix product needs inside itself is not seen.
    """
    # Not 1 and 2: nothing flows back through the first block's input.
    two, three = (
        _activations(replace(config, depth=n), latents, file, rank, text_length, dtype, recompute) for n in (2, 3)
    )
    block = three - two
    weights = LongCatDiT(config, device="meta", dtype=dtype)
    parameters = 0
    for target, parts in official_targets(file, config.depth).items():
        layer: Any = weights.get_submodule(target)
        parameters += rank * (parts * layer.in_features + layer.out_features)
    return StepBytes(
        frozen=sum(p.nbytes for p in weights.parameters()),
        learning=parameters * _FP32 * (5 if average else 4),
        kept=config.depth * block,
        working=two - 2 * block,
    )


def _activations(
    config: DiTConfig,
    latents: tuple[int, int, int, int],
    file: AdapterFile,
    rank: int,
    text_length: int,
    dtype: torch.dtype,
    recompute: bool,
) -> int:
    """Most bytes alive at once in a forward and backward pass, the gradients of the adapter not counted."""
    dit = LongCatDiT(config, device="meta", dtype=dtype)
    model = AdaptedDiT(dit, official_targets(file, config.depth), rank=rank, generator=torch.Generator())
    return _peak(model, latents, text_length, recompute)


def whole_step_bytes(
    config: DiTConfig,
    latents: tuple[int, int, int, int],
    *,
    text_length: int = 512,
    dtype: torch.dtype = torch.float32,
    average: bool = True,
    recompute: bool = False,
) -> StepBytes:
    """As `step_bytes`, of training the whole transformer, computing in `dtype`; everything that learns is fp32."""
    two, three = (_whole(replace(config, depth=n), latents, text_length, dtype, recompute) for n in (2, 3))
    block = three - two
    weights = LongCatDiT(config, device="meta", dtype=torch.float32)
    learning = sum(p.nbytes for p in weights.parameters()) * (5 if average else 4)
    return StepBytes(frozen=0, learning=learning, kept=config.depth * block, working=two - 2 * block)


def _whole(
    config: DiTConfig, latents: tuple[int, int, int, int], text_length: int, dtype: torch.dtype, recompute: bool
) -> int:
    model = LongCatDiT(config, device="meta", dtype=torch.float32)
    model.compute_dtype = dtype
    return _peak(model, latents, text_length, recompute)


def _peak(model: LongCatDiT, latents: tuple[int, int, int, int], text_length: int, recompute: bool) -> int:
    """Most bytes alive at once in a forward and backward pass; what learns has its gradients already."""
    config, dtype = model.config, model.dtype
    model.set_attention(_Attention.apply)
    for p in trained(model).values():
        p.grad = torch.zeros_like(p)
    if recompute:
        for block in repeated_blocks(model).values():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    B, T, h, w = latents
    x = torch.empty(B, config.in_channels, T, h, w, device="meta")
    text = torch.empty(B, text_length, config.caption_channels, device="meta", dtype=dtype)
    timestep = torch.empty(B, T, device="meta")
    rope_table(token_grid((T, h, w), config.patch_size), config.head_dim, x.device)  # outlives the step
    with LiveBytes() as live:
        out = model(x, timestep, text, torch.empty(B, text_length, device="meta"))
        out.square().mean().backward()
    return live.peak


class _Attention(torch.autograd.Function):
    """What exact attention without logits keeps: its inputs, its result, and a statistic of each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors
        return torch.empty_like(saved[0]), torch.empty_like(saved[1]), torch.empty_like(saved[2])
