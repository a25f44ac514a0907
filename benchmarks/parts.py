"""The transformer's parts, ours: each made ready to run on inputs of a job's real size, with what it has to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from cases import TEXT_TOKENS, block_flops, kept_keys, lean_sequence
from torch import Tensor

from lcv_core import layers
from lcv_core.config import DiTConfig
from lcv_core.dit import lean
from lcv_core.dit.embed import in_fp32, num_pads_as_one, unpatchify
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.pieces import by_layer
from lcv_core.quant import layers as quant_layers
from lcv_core.quant.formats import quantise
from lcv_core.quant.matmul import fp8_refusal
from lcv_core.weights.quantised import is_large

Grid = tuple[int, int, int]
PROMPT_TOKENS = 128  # of 512 that are not padding; the model sees padding too, see lcv_core.dit.embed.pads_as_one
PLAIN = "plain"
ALL_EIGHT = "fp8-all"  # matrices in fp8, and attention with q.k in int8 and p.v in fp8: block sparse attention alone
FORMS = ("fp8-matmul", ALL_EIGHT, "int8-matmul")


class Absent(Exception):
    """What cannot be measured here; the text is the reason."""


@dataclass(frozen=True)
class Job:
    """One forward of the transformer.

    grid: tokens (T, h, w) of all keys; the first `cached` latent frames of them come from a KV cache.
    """

    name: str
    grid: Grid
    sparse: bool = False
    cached: int = 0

    @property
    def passed(self) -> Grid:
        """The tokens passed in."""
        return self.grid[0] - self.cached, *self.grid[1:]

    @property
    def tokens(self) -> int:
        return prod(self.passed)

    def keys(self, config: DiTConfig) -> float:
        return kept_keys(config, self.grid) if self.sparse else prod(self.grid)

    def latents(self, config: DiTConfig, frames: int) -> tuple[int, int, int, int]:
        _, ph, pw = config.patch_size
        return config.in_channels, frames, self.grid[1] * ph, self.grid[2] * pw


@dataclass(frozen=True)
class Part:
    """matmul, attention: multiplications and additions of a run. moved: bytes read and written at the least."""

    run: Callable[[], object]
    matmul: float = 0.0
    attention: float = 0.0
    moved: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """Of one job, the same for both sides: latents fp32, timesteps of the passed frames, text and its mask."""

    latents: Tensor
    cond: Tensor | None
    timestep: Tensor
    text: Tensor
    mask: Tensor

    @classmethod
    def of(cls, config: DiTConfig, job: Job, device: torch.device, dtype: torch.dtype) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        frames = job.passed[0]
        draw: dict[str, Any] = {"generator": g, "device": device}
        cond = torch.randn(1, *job.latents(config, job.cached), **draw) if job.cached else None
        mask = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64, device=device)
        mask[:, :PROMPT_TOKENS] = 1
        return cls(
            torch.randn(1, *job.latents(config, frames), **draw), cond, torch.full((1, frames), 500.0, device=device),
            torch.randn(1, TEXT_TOKENS, config.caption_channels, **draw).to(dtype), mask,
        )  # fmt: skip


def work_of(config: DiTConfig, job: Job, itemsize: int, rows: int) -> dict[str, tuple[float, float, float]]:
    """(matmul, attention, moved) of each part of one block, and of both ends; rows: of the text that are read."""
    N, C, F, A, L = job.tokens, config.hidden_size, config.ffn_dim, config.adaln_tembed_dim, rows
    x, keys = N * C * itemsize, job.keys(config)
    sides = prod(config.patch_size) * N * C * 2
    whole = block_flops(config, N, keys, L)
    attending = 4 * N * C * (keys + L)
    weights = (8 * C * C + 3 * C * F + 6 * C * A) * itemsize
    return {
        "adaLN": (2 * A * 6 * C, 0, 6 * C * A * itemsize),
        "norm + modulate": (0, 0, 2 * x),
        "qkv": (6 * N * C * C, 0, 4 * x + 3 * C * C * itemsize),
        "norm + rope": (0, 0, 4 * x),
        "attention": (0, 4 * N * C * keys, 4 * x),
        "proj": (2 * N * C * C, 0, 2 * x + C * C * itemsize),
        "gate": (0, 0, 3 * x),
        "cross": (4 * N * C * C + 4 * L * C * C, 4 * N * C * L, 3 * x + 4 * C * C * itemsize),
        "ffn": (6 * N * C * F, 0, 2 * x + 3 * C * F * itemsize),
        "block": (whole - attending, attending, 2 * x + weights),
        "embed": (sides * config.in_channels + 2 * L * C * (config.caption_channels + C), 0, x),
        "final": (sides * config.out_channels, 0, x),
    }


def build(config: DiTConfig, device: torch.device, dtype: torch.dtype, *, operations: Any = layers) -> LongCatDiT:
    """Random weights, the same for the same configuration."""
    torch.manual_seed(0)
    model = LongCatDiT(config, operations=operations, device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def build_quantised(config: DiTConfig, device: torch.device, dtype: torch.dtype, form: str) -> LongCatDiT:
    """`build` with its large matrices in eight bits, which are multiplied as such. Raises Absent."""
    matmul = "int8" if form == "int8-matmul" else "fp8"
    refusal = fp8_refusal(device) if matmul == "fp8" else None
    if refusal is not None:
        raise Absent(refusal)
    model = build(config, device, dtype, operations=quant_layers)
    for name, module in model.named_modules():
        if is_large(f"{name}.weight") and isinstance(module, quant_layers.Linear):
            module.hold([quantise(matmul, module.weight.detach())], matmul)
    return model


class Ours:
    """The parts of a model with few blocks, on one job."""

    name = "ours"

    def __init__(self, model: LongCatDiT, job: Job, inputs: Inputs, form: str = PLAIN) -> None:
        self.model, self.job, self.inputs, self.config = model, job, inputs, model.config
        self.bsa = self.config.bsa if job.sparse else None
        if form == ALL_EIGHT:  # a dense job keeps all blocks
            self.bsa = replace(self.bsa or replace(self.config.bsa, sparsity=0.0), eight_bits=True)
        # What cross-attention reads of the text: one row or two may stand for all pads.
        read = model._rows_to_read(inputs.mask)
        self.rows = read if read == TEXT_TOKENS else read + num_pads_as_one(model.dtype)

    def forward(self) -> Tensor:
        i = self.inputs
        return self.model(i.latents, i.timestep, i.text, i.mask, bsa=self.bsa)

    def parts(self) -> dict[str, Part]:
        work = work_of(self.config, self.job, self.model.dtype.itemsize, self.rows)
        runs = self.cached_runs() if self.job.cached else self.block_runs() | self.end_runs()
        return {name: Part(run, *work.get(name, (0.0, 0.0, 0.0))) for name, run in runs.items()}

    def cached_runs(self) -> dict[str, Callable[[], object]]:
        i, model, n_c = self.inputs, self.model, self.job.cached
        assert i.cond is not None
        with torch.inference_mode():
            cache = model.build_kv_cache(i.cond, self.bsa)
        return {
            "cache": lambda: model.build_kv_cache(i.cond, self.bsa) if i.cond is not None else None,
            "step": lambda: model(i.latents, i.timestep, i.text, i.mask, n_c, cache, self.bsa),
        }

    def end_runs(self) -> dict[str, Callable[[], object]]:
        i, model, config = self.inputs, self.model, self.config
        _, tau, _, seq = self._block_inputs()
        x = torch.zeros(1, self.job.tokens, config.hidden_size, device=model.device, dtype=model.dtype)

        def embed() -> None:
            model.x_embedder(i.latents.to(model.dtype))
            model.t_embedder(i.timestep[0, :1])
            model._embed_text(i.text, i.mask)

        def final() -> Tensor:
            return unpatchify(model.final_layer(x, tau, seq.lean), self.job.grid, config.patch_size)

        return {"embed": embed, "final": final, "step": self.forward}

    def _block_inputs(self) -> tuple[Tensor, Tensor, Tensor | list[Tensor], Any]:
        model, config = self.model, self.config
        where, dtype = model.device, model.dtype
        attend = model._attend(where)
        seq = lean_sequence(config, self.job.grid, where, dtype, attend, self.bsa)
        g = torch.Generator(where).manual_seed(1)
        with torch.inference_mode():
            tau = model.t_embedder(self.inputs.timestep[0, :1]).unsqueeze(0)
            text, bias = model._embed_text(self.inputs.text, self.inputs.mask)
        x = torch.randn(1, self.job.tokens, config.hidden_size, generator=g, device=where).to(dtype)
        return x, tau, text, replace(seq, text_bias=bias)

    def block_runs(self) -> dict[str, Callable[[], object]]:
        block: Any = self.model.blocks[0]
        x, tau, text, seq = self._block_inputs()
        attn, kernels, frames = block.attn, seq.lean.kernels, seq.lean.frames
        silu, linear = block.adaLN_modulation
        with torch.inference_mode():
            shift, scale, gate = in_fp32(linear, silu(tau))[0].chunk(6, dim=-1)[:3]
            m = kernels.modulate(x, block.mod_norm_attn, shift, scale, frames)
            q, k, v = lean._projected(block, x, lean.Adaln(shift, scale, gate), seq, replace(seq.lean, room=None))
            out = attn.attend(q, k, v, seq)

        def norm_rope() -> None:
            kernels.norm_rope(q, attn.q_norm, seq.rope, q)
            kernels.norm_rope(k, attn.k_norm, seq.rope, k)

        def ffn() -> None:
            for i, j in by_layer(m.shape[1], block.ffn.w1, m.device):
                block.ffn(m[:, i:j], kernels)

        return {
            "adaLN": lambda: in_fp32(linear, silu(tau)),
            "norm + modulate": lambda: kernels.modulate(x, block.mod_norm_attn, shift, scale, frames),
            "qkv": lambda: attn.qkv(m),
            "norm + rope": norm_rope,
            "attention": lambda: attn.attend(q, k, v, seq),
            "proj": lambda: attn.proj(out),
            "gate": lambda: kernels.gated_add_(x, gate, out, frames),
            "cross": lambda: lean._cross_attention(block, x, text, seq, seq.lean),
            "ffn": ffn,
            "block": lambda: block(x, tau, text, seq),
        }
