"""Bytes of the transformer: weights, adapters, KV cache, and the activations of one forward.

Activations are counted at the moments of `dit/lean.py` at which most is alive; `forward_moments` names them and says
what is held. The tests hold these counts against the tensors that are really alive. Triton's kernels need less.
"""

from __future__ import annotations

import math
from typing import Literal

from lcv_core.config import BSAConfig, DiTConfig
from lcv_core.dit.pieces import elements_step, layer_step
from lcv_core.planning.sparse import Device, Grid, SparseKernels, place_bytes, sparse_bytes

AdapterName = Literal["distill", "refinement"]

RANK = 128  # of the official adapters
_TIMESTEPS = 2  # distinct ones in a forward: of noise and of condition frames
FP32 = 4  # bytes
_ROUNDING = 4 << 20  # bytes by which a GPU's allocator rounds up what is alive at once


def dit_parameters(config: DiTConfig) -> tuple[int, int]:
    """(matrices of attention and feed-forward, everything else): the first are what fp8 stores in one byte."""
    C, A, F, D = config.hidden_size, config.adaln_tembed_dim, config.ffn_dim, config.head_dim
    matrices = 8 * C * C + 3 * C * F
    # adaLN, the biases of self- and cross-attention, the norm before the latter, q and k norms
    others = 6 * C * (A + 1) + 8 * C + 2 * C + 4 * D
    return config.depth * matrices, config.depth * others + outer_parameters(config)


def outer_parameters(config: DiTConfig) -> int:
    """Weights outside the blocks: the embedders and the final layer."""
    C, A, patch = config.hidden_size, config.adaln_tembed_dim, math.prod(config.patch_size)
    head = patch * config.out_channels
    return (
        C * (config.in_channels * patch + 1)
        + A * (config.frequency_embedding_size + 1) + A * (A + 1)
        + C * (config.caption_channels + 1) + C * (C + 1)
        + head * (C + 1) + 2 * C * (A + 1)
    )  # fmt: skip


def matrix_rows(config: DiTConfig) -> int:
    """Rows (output channels) of the matrices of attention and feed-forward."""
    return config.depth * (9 * config.hidden_size + 2 * config.ffn_dim)


def largest_weight(config: DiTConfig) -> int:
    """Elements of the largest weight of a block."""
    return config.hidden_size * max(3 * config.hidden_size, config.ffn_dim, 6 * config.adaln_tembed_dim)


def adapter_bytes(config: DiTConfig, name: AdapterName, itemsize: int) -> int:
    """An official adapter at run time. Layers with several parts keep their down matrices twice, joined and apart."""
    return sum(
        count * RANK * (parts * inputs * (2 if parts > 1 else 1) + outputs) * (FP32 if island else itemsize)
        for count, parts, inputs, outputs, island in _adapted_layers(config, name)
    )


def stored_adapter_bytes(config: DiTConfig, name: AdapterName) -> int:
    """An official adapter as it is stored, in fp32, and kept in system memory for the next time."""
    layers = _adapted_layers(config, name)
    return sum(count * RANK * (parts * inputs + outputs) * FP32 for count, parts, inputs, outputs, _ in layers)


def _adapted_layers(config: DiTConfig, name: AdapterName) -> list[tuple[int, int, int, int, bool]]:
    """(how many, parts, inputs, outputs, whether in an fp32 island) of the layers that an official adapter has."""
    C, A, F, D = config.hidden_size, config.adaln_tembed_dim, config.ffn_dim, config.depth
    layers = [(D, 3, C, 3 * C), (D, 2, C, 2 * C), (2 * D, 1, C, C), (2 * D, 1, C, F), (D, 1, F, C)]
    islands: list[tuple[int, int, int, int]] = []
    if name == "refinement":
        head = math.prod(config.patch_size) * config.out_channels
        islands = [(D, 6, A, 6 * C), (1, 2, A, 2 * C), (1, 1, C, head)]
    return [(*layer, False) for layer in layers] + [(*layer, True) for layer in islands]


def kv_cache_bytes(config: DiTConfig, grid: Grid, num_cond_latents: int, itemsize: int = 2) -> int:
    """k and v of every layer for the condition frames, batch 1: n_c * S * C * 2 * itemsize * depth.

    grid: tokens (T, h, w) of any clip of that size; its T does not matter. 13 frames of 480x832 are 4 latents of
    30 x 52 tokens: 4.91 GB in bf16.
    """
    return num_cond_latents * grid[1] * grid[2] * config.hidden_size * 2 * itemsize * config.depth


def forward_bytes(
    config: DiTConfig,
    grid: Grid,
    *,
    batch: int = 1,
    num_cond_latents: int = 0,
    cached: bool = False,
    text_length: int = 512,
    itemsize: int = 2,
    bsa: BSAConfig | None = None,
    adapters: bool = False,
    device: Device = "gpu",
    sparse: SparseKernels = "gather",
) -> int:
    """Most bytes alive at once in a forward, besides weights, inputs and KV cache; see `forward_moments`."""
    moments = forward_moments(
        config, grid, batch=batch, num_cond_latents=num_cond_latents, cached=cached, text_length=text_length,
        itemsize=itemsize, bsa=bsa, adapters=adapters, device=device, sparse=sparse,
    )  # fmt: skip
    return max(moments.values())


def forward_moments(
    config: DiTConfig,
    grid: Grid,
    *,
    batch: int,
    num_cond_latents: int,
    cached: bool,
    text_length: int,
    itemsize: int,
    bsa: BSAConfig | None,
    adapters: bool,
    device: Device,
    sparse: SparseKernels = "gather",
) -> dict[str, int]:
    """Bytes alive at the moments that may be the peak.

    grid: tokens passed in; with `cached` the condition frames are not among them. batch: twice the samples when
    guidance is batched. itemsize: bytes of the dtype it computes in. adapters: adapters work at run time, not merged.
    sparse: what block sparse attention runs on.
    """
    C, D, T = config.hidden_size, config.head_dim, grid[0]
    tokens, frame = math.prod(grid), grid[1] * grid[2]
    all_keys = tokens + (num_cond_latents * frame if cached else 0)
    x = batch * tokens * C * itemsize  # one activation of all tokens
    half = itemsize < FP32
    text = batch * text_length * C * itemsize
    # Condition frames among the tokens: attended to by themselves, passed by in cross-attention.
    cond = 0 if cached else x * num_cond_latents // T
    noise = x - cond
    where = "cpu" if device == "cpu" else "cuda"
    # One piece of the sequence on its way through a wide layer; that many tokens of one sample in a norm.
    step = layer_step(tokens, where)
    piece, hidden = batch * step * C * itemsize, batch * step * config.ffn_dim * itemsize
    normed = elements_step(C, where) * C
    modulation = _TIMESTEPS * 6 * C * FP32
    # Keys and values of all layers go through one room: `dit.model._wants_room`.
    apart = cached or device == "cpu" or adapters
    room = 2 * batch * all_keys * C * itemsize if apart else 0
    always = all_keys * D * FP32 + text + _TIMESTEPS * config.adaln_tembed_dim * FP32 + modulation + room
    always += 8 * batch * T  # which frame has which timestep
    always += 0 if device == "cpu" else _ROUNDING

    def linear(output: int, parts: int = 1) -> int:
        """A layer's output; the branch of an adapter adds its pieces, their join and the sum."""
        return output * (4 if parts > 1 else 3) + output * RANK // C if adapters else output

    def layer_norm(tokens: int) -> int:
        """What becomes of tokens, and what is made of a piece of them: its result; on a GPU in fp32, from a copy."""
        piece = min(normed, tokens * C)
        work = piece * itemsize + 2 * piece // C * FP32 if device == "cpu" else 2 * piece * FP32
        return batch * tokens * C * itemsize + work

    def rms_norm(tokens: int) -> int:
        """Of q or k, in place: fp32 copy, its square and the statistics; in fp32 two products."""
        piece = min(normed, tokens * C)
        return (2 * piece + (piece // D if half else 0)) * FP32

    def text_norm(output: int) -> int:
        """Of the text's k at once: fp32 copy and its square or the product; or product, its rounding, the result."""
        size = output * FP32 // itemsize
        squares = 2 * size + size // D
        return max(squares, size + 2 * output) if half else squares

    passed_tokens = layer_step(tokens - (0 if cached else num_cond_latents * frame), where)
    passed = batch * passed_tokens * C * itemsize  # a piece of the noise tokens, which read the text
    attending = 2 * x if apart else 4 * x  # block input and q; without a room k and v are beside it
    projected = piece + linear(3 * piece, parts=3) if apart else x + linear(3 * x, parts=3)
    moments = {
        "text": 3 * text + (batch * text_length * config.caption_channels * itemsize if half else 0),
        "adaLN": x + (6 * C * config.adaln_tembed_dim * FP32 if half else 0) + modulation,
        "modulation": x + layer_norm(step if apart else tokens),
        "qkv": (2 * x if apart else x) + projected,
        "qk norm": attending + (4 * piece if apart else 0) + rms_norm(step if apart else tokens),
        "attention": attending + noise + noise // (D * itemsize) * FP32,  # and the sum of exponentials of each row
        "condition": 0 if cached else attending + cond + linear(cond),
        "proj": x + noise + linear(noise),
        "cross text": x + max(linear(2 * text, parts=2), 2 * text + text_norm(text)),
        "cross query": x + 3 * text + passed + max(linear(passed), passed + rms_norm(passed_tokens)),
        "cross": x + 3 * text + 2 * passed + max(passed, linear(passed)),
        "feed-forward": x + piece + hidden + max(linear(hidden), linear(piece)),
    }
    if bsa is not None:
        n_c, heads = num_cond_latents, batch * config.num_heads
        frames, all_frames = (T, T + n_c) if cached else (T - n_c, T)
        grids: tuple[Grid, Grid] = (frames, *grid[1:]), (all_frames, *grid[1:])
        if sparse == "gather":
            always += place_bytes(bsa, *grids, heads=heads)
        if n_c and sparse == "gather":
            always += place_bytes(bsa, (n_c, *grid[1:]), (n_c, *grid[1:]), heads=heads)
        inside = sparse_bytes(bsa, *grids, heads=heads, head_dim=D, itemsize=itemsize, device=device, kernels=sparse)
        moments["sparse"] = attending + inside
    return {name: always + alive for name, alive in moments.items()}
