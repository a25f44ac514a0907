"""The DiT against the official model's outputs: forwards, intermediates, KV cache, sparse attention, bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden_vectors import golden, relative
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.rope import apply_rope, rope_angles, rope_table

MODULE = 1e-5
END_TO_END = 1e-4

Run = Callable[[LongCatDiT, dict[str, Tensor]], Tensor]


def per_frame(timestep: Tensor, frames: int, num_cond: int) -> Tensor:
    """[B] -> [B, T] with the condition frames at 0."""
    out = timestep[:, None].repeat(1, frames)
    out[:, :num_cond] = 0
    return out


def plain(dit: LongCatDiT, c: dict[str, Tensor], *, num_cond: int = 0, mask: bool = True) -> Tensor:
    timestep = per_frame(c["in.t1"], 5, num_cond) if num_cond else c["in.t1"]
    return dit(c["in.x"], timestep, c["in.y"], c["in.mask"] if mask else None, num_cond_latents=num_cond)


def sparse(dit: LongCatDiT, c: dict[str, Tensor], bsa: BSAConfig | None, num_cond: int = 0) -> Tensor:
    timestep = per_frame(torch.tensor([500.0]), 8, num_cond)
    text, mask = c["in.y"][:1], c["in.mask"][:1]
    return dit(c["in.xb"], timestep, text, mask, num_cond_latents=num_cond, bsa=bsa)


def cached(dit: LongCatDiT, c: dict[str, Tensor]) -> Tensor:
    cache = dit.build_kv_cache(c["in.cond"])
    return dit(c["in.xs"][:, :, 4:], c["in.t1"], c["in.y"], c["in.mask"], num_cond_latents=4, kv_cache=cache)


def uncached(dit: LongCatDiT, c: dict[str, Tensor]) -> Tensor:
    x = torch.cat([c["in.cond"].expand(2, -1, -1, -1, -1), c["in.xs"][:, :, 4:]], dim=2)
    return dit(x, per_frame(c["in.t1"], 5, 4), c["in.y"], c["in.mask"], num_cond_latents=4)[:, :, 4:]


CASES: dict[str, Run] = {
    "a": plain,
    "a1": lambda dit, c: plain(dit, c, mask=False),
    "b": lambda dit, c: plain(dit, c, num_cond=1),
    "b4": lambda dit, c: plain(dit, c, num_cond=4),
    "c": cached,
    "c_nocache": uncached,
    "d": lambda dit, c: sparse(dit, c, BSAConfig(sparsity=0.75)),
    "d_cond4": lambda dit, c: sparse(dit, c, BSAConfig(sparsity=0.5), num_cond=4),
    "d_sparsity0": lambda dit, c: sparse(dit, c, BSAConfig(sparsity=0.0)),
    "d_dense": lambda dit, c: sparse(dit, c, None),
    "d_cdf0.6": lambda dit, c: sparse(dit, c, BSAConfig(sparsity=None, cdf_threshold=0.6)),
}


@pytest.mark.parametrize("case", CASES)
def test_forward(dit: LongCatDiT, cases: dict[str, Tensor], case: str) -> None:
    got, expected = CASES[case](dit, cases), cases[f"out.{case}"]
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= END_TO_END
    assert relative(got, expected) <= MODULE


@pytest.mark.parametrize("case", CASES)
def test_forward_bf16(build_dit: Callable[..., LongCatDiT], cases: dict[str, Tensor], case: str) -> None:
    got, expected = CASES[case](build_dit(torch.bfloat16), cases), golden("dit_cases_bf16")[f"out.{case}"]
    assert got.dtype == torch.float32
    assert relative(got, expected) <= 2e-2


def test_without_zero_padding(build_dit: Callable[..., LongCatDiT], cases: dict[str, Tensor]) -> None:
    got = plain(build_dit(text_tokens_zero_pad=False), cases)
    assert (got - cases["out.zp_false"]).abs().max() <= END_TO_END
    assert (got - cases["out.a"]).abs().max() > 0.1  # the two rules must not be confused


def test_kv_cache_tensors(dit: LongCatDiT, cases: dict[str, Tensor]) -> None:
    """The official cache has keys before rope; ours have their positions, which are the first of any clip."""
    cache = dit.build_kv_cache(cases["in.cond"])
    assert len(cache) == dit.config.depth
    T, h, w = cases["in.cond"].shape[2:]
    table = rope_table((T, h // 2, w // 2), dit.config.head_dim, torch.device("cpu"))
    for layer, (k, v) in enumerate(cache):
        assert relative(k, apply_rope(cases[f"out.c_cache.{layer}.k"], table)) <= MODULE
        assert relative(v, cases[f"out.c_cache.{layer}.v"]) <= MODULE


def test_rope_angles(cases: dict[str, Tensor]) -> None:
    got = rope_angles((5, 2, 3), 16).repeat_interleave(2, dim=-1)
    assert (got - cases["out.rope_angles_5x2x3"]).abs().max() <= 1e-6


def test_intermediates(dit: LongCatDiT, cases: dict[str, Tensor]) -> None:
    names = ["x_embedder", "t_embedder", "y_embedder", "blocks.0.adaLN_modulation", "blocks.0.attn",
             "blocks.0.cross_attn", "blocks.0.ffn", "blocks.0", "blocks.1", "final_layer"]  # fmt: skip
    seen: dict[str, Tensor] = {}
    for name in names:
        module = dit.get_submodule(f"{name}.1" if name.endswith("adaLN_modulation") else name)
        # A copy: blocks write over what they are given.
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.clone()}))
    plain(dit, cases, num_cond=1)
    _, frames = per_frame(cases["in.t1"], 5, 1).flatten().unique(return_inverse=True)
    for name in names:
        got, expected = seen[name], cases[f"out.inter.{name}"]
        if name in ("t_embedder", "blocks.0.adaLN_modulation"):  # ours are made once per distinct timestep
            got = got.flatten(0, -2)[frames]
        if name == "y_embedder":  # the official module returns it with the pads zeroed
            got = (got * cases["in.mask"].unsqueeze(-1)).unsqueeze(1) if _zeroed(expected, cases) else got.unsqueeze(1)
        if name == "blocks.0.cross_attn":  # ours speaks of noise tokens alone; condition tokens get exactly nothing
            assert expected[:, :6].abs().max() == 0
            expected = expected[:, 6:]
        assert relative(got.reshape(expected.shape), expected) <= MODULE, name


def _zeroed(text: Tensor, cases: dict[str, Tensor]) -> bool:
    return bool((text.squeeze(1)[cases["in.mask"] == 0] == 0).all())
