"""The DiT: its tensors, its fp32 islands, the condition rule, the KV cache, sparse attention and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DIT, make_dit, randn, text
from torch import Tensor, nn

from lcv_core import layers, schedule
from lcv_core.config import BSAConfig
from lcv_core.dit.embed import log_parts, modulate, num_pads_as_one
from lcv_core.dit.kv_cache import KVCache
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError

# Section 1.3 of the specification, in full.
TOP = {
    "x_embedder.proj.weight": (4096, 16, 1, 2, 2),
    "x_embedder.proj.bias": (4096,),
    "t_embedder.mlp.0.weight": (512, 256),
    "t_embedder.mlp.0.bias": (512,),
    "t_embedder.mlp.2.weight": (512, 512),
    "t_embedder.mlp.2.bias": (512,),
    "y_embedder.y_proj.0.weight": (4096, 4096),
    "y_embedder.y_proj.0.bias": (4096,),
    "y_embedder.y_proj.2.weight": (4096, 4096),
    "y_embedder.y_proj.2.bias": (4096,),
    "final_layer.linear.weight": (64, 4096),
    "final_layer.linear.bias": (64,),
    "final_layer.adaLN_modulation.1.weight": (8192, 512),
    "final_layer.adaLN_modulation.1.bias": (8192,),
}
BLOCK = {
    "adaLN_modulation.1.weight": (24576, 512),
    "adaLN_modulation.1.bias": (24576,),
    "pre_crs_attn_norm.weight": (4096,),
    "pre_crs_attn_norm.bias": (4096,),
    "attn.qkv.weight": (12288, 4096),
    "attn.qkv.bias": (12288,),
    "attn.q_norm.weight": (128,),
    "attn.k_norm.weight": (128,),
    "attn.proj.weight": (4096, 4096),
    "attn.proj.bias": (4096,),
    "cross_attn.q_linear.weight": (4096, 4096),
    "cross_attn.q_linear.bias": (4096,),
    "cross_attn.kv_linear.weight": (8192, 4096),
    "cross_attn.kv_linear.bias": (8192,),
    "cross_attn.proj.weight": (4096, 4096),
    "cross_attn.proj.bias": (4096,),
    "cross_attn.q_norm.weight": (128,),
    "cross_attn.k_norm.weight": (128,),
    "ffn.w1.weight": (11008, 4096),
    "ffn.w3.weight": (11008, 4096),
    "ffn.w2.weight": (4096, 11008),
}
TABLE = TOP | {f"blocks.{n}.{name}": shape for n in range(48) for name, shape in BLOCK.items()}
BF16_ROUNDING = 2.0**-8  # the largest relative error of one rounding to bf16, with room for ties


def test_the_full_size_model_has_the_tensors_of_the_checkpoint() -> None:
    dit = LongCatDiT(device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()} == TABLE
    assert len(TABLE) == 1022
    assert sum(p.numel() for p in dit.parameters()) == 13_581_071_424
    assert not list(dit.buffers())
    assert {p.device.type for p in dit.parameters()} == {"meta"}


class Recorder:
    """A namespace of layers that remembers what was built from it."""

    def __init__(self, source: Any = layers) -> None:
        self.source = source
        self.made: dict[str, list[nn.Module]] = {}

    def __getattr__(self, name: str) -> Callable[..., nn.Module]:
        def make(*args: Any, **options: Any) -> nn.Module:
            layer = getattr(self.source, name)(*args, **options)
            self.made.setdefault(name, []).append(layer)
            return layer

        return make


def test_every_layer_with_weights_comes_from_operations() -> None:
    recorder = Recorder()
    dit = LongCatDiT(DIT, operations=recorder)
    made = {id(layer) for kind in recorder.made.values() for layer in kind}
    for name, module in dit.named_modules():
        if list(module.parameters(recurse=False)) or isinstance(module, nn.LayerNorm):
            assert id(module) in made, name
    depth = DIT.depth
    counts = {name: len(kind) for name, kind in recorder.made.items()}
    assert counts == {"Conv3d": 1, "Linear": 6 + 9 * depth, "RMSNorm": 4 * depth, "LayerNorm": 3 * depth + 1}


def run(
    dit: LongCatDiT, *, frames: int = 3, cond: int = 0, seed: int = 0, t: float = 700.0, batch: int = 1, **options: Any
) -> Tensor:
    dtype = torch.float64 if dit.dtype == torch.float64 else torch.float32
    timestep = torch.full((batch, frames), t, dtype=dtype)
    timestep[:, :cond] = 0
    states = text(batch)
    x = randn(batch, 16, frames, 4, 6, seed=seed, dtype=dtype)
    return dit(x, timestep, states.states.to(dtype), states.mask, num_cond_latents=cond, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cond", [0, 1])
def test_plain_torch_nn_does_as_operations(dtype: torch.dtype, cond: int) -> None:
    """The fp32 islands mix fp32 activations with bf16 weights, which plain layers do not do by themselves."""
    ours, plain = make_dit(dtype), make_dit(dtype, operations=nn)
    assert type(plain.blocks[0].pre_crs_attn_norm) is nn.LayerNorm
    got, expected = run(plain, cond=cond), run(ours, cond=cond)
    assert got.dtype == expected.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() <= (1e-5 if dtype == torch.float32 else 2e-2)


def island_layers(dit: LongCatDiT) -> dict[str, nn.Module]:
    names = ["t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.adaLN_modulation.1", "final_layer.linear"]
    names += [f"blocks.{n}.adaLN_modulation.1" for n in range(DIT.depth)]
    names += [f"blocks.{n}.{norm}" for n in range(DIT.depth) for norm in ("mod_norm_attn", "mod_norm_ffn")]
    names += [f"blocks.{n}.pre_crs_attn_norm" for n in range(DIT.depth)] + ["final_layer.norm_final"]
    return {name: dit.get_submodule(name) for name in names}


@pytest.mark.parametrize("operations", [None, nn], ids=["layers", "torch.nn"])
def test_fp32_islands_see_and_give_fp32(operations: Any) -> None:
    dit = make_dit(torch.bfloat16, operations=operations)
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, layer in island_layers(dit).items():
        layer.register_forward_hook(lambda _m, x, y, name=name: seen.update({name: (x[0].dtype, y.dtype)}))
    outside: dict[str, torch.dtype] = {}
    for name in ("blocks.0.attn.qkv", "blocks.0.cross_attn.q_linear", "blocks.1.ffn.w1", "y_embedder.y_proj.0"):
        dit.get_submodule(name).register_forward_hook(lambda _m, x, y, name=name: outside.update({name: y.dtype}))
    output = run(dit)
    assert output.dtype == torch.float32
    assert seen == dict.fromkeys(island_layers(dit), (torch.float32, torch.float32))
    assert set(outside.values()) == {torch.bfloat16}


def test_the_islands_use_the_stored_weights() -> None:
    """fp32 activations times weights rounded to bf16: an fp64 computation of that agrees to fp32 precision."""
    dit = make_dit(torch.bfloat16)
    taken: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in island_layers(dit).items():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _m, x, y, name=name: taken.update({name: (x[0], y)}))
    run(dit)
    for name, (x, y) in taken.items():
        layer = dit.get_submodule(name)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())  # type: ignore[operator, union-attr]
        assert (y - exact).abs().max() <= 1e-5 * exact.abs().max(), name


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """`got` (bf16) is `exact` (fp64) up to one rounding of the result."""
    assert got.dtype == torch.bfloat16
    error = (got.double() - exact).abs()
    assert (error <= BF16_ROUNDING * exact.abs() + 2e-6 * exact.abs().max()).all()


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.double(), x.shape[-1:], eps=1e-6)


def spread(vector: Tensor, tokens: int) -> Tensor:
    """Per frame [B, T, C] -> per token [B, N, C]."""
    return vector.repeat_interleave(tokens // vector.shape[1], dim=1)


def test_modulation_gates_and_residuals_are_fp32_in_a_bf16_block() -> None:
    """Inputs and outputs of a bf16 block's parts against fp64: rounded once, at the end of each part."""
    dit = make_dit(torch.bfloat16)
    block: Any = dit.blocks[1]
    seen: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, *, before: bool = False) -> None:
        if before:
            module.register_forward_pre_hook(lambda _m, x: seen.update({name: x[0].clone(), name + ".tau": x[1]}))
        else:
            module.register_forward_hook(lambda _m, x, y: seen.update({name + ".in": x[0], name + ".out": y}))

    record("block", block, before=True)
    block.register_forward_hook(lambda _m, _x, y: seen.update({"block.out": y}))
    for name in ("attn", "cross_attn", "ffn", "pre_crs_attn_norm"):
        record(name, getattr(block, name))
    run(dit)

    x, linear = seen["block"], block.adaLN_modulation[1]
    modulation = F.linear(F.silu(seen["block.tau"].double()), linear.weight.double(), linear.bias.double())
    sh1, sc1, g1, sh2, sc2, g2 = (spread(m, x.shape[1]) for m in modulation.chunk(6, dim=-1))
    assert_rounded_once(seen["attn.in"], layer_norm(x) * (1 + sc1) + sh1)
    # The residual after self-attention: what the cross-attention's norm is given, fp32 of the bf16 sum.
    after_attention = seen["pre_crs_attn_norm.in"]
    assert_rounded_once(after_attention.bfloat16(), x.double() + g1 * seen["attn.out"].double())
    assert torch.equal(after_attention.bfloat16().float(), after_attention)
    norm = block.pre_crs_attn_norm
    normed = layer_norm(after_attention) * norm.weight.double() + norm.bias.double()
    assert_rounded_once(seen["cross_attn.in"], normed)
    # Cross-attention is added in bf16.
    middle = after_attention.bfloat16() + seen["cross_attn.out"]
    assert_rounded_once(seen["ffn.in"], layer_norm(middle) * (1 + sc2) + sh2)
    assert_rounded_once(seen["block.out"], middle.double() + g2 * seen["ffn.out"].double())


def test_bf16_arithmetic_would_be_noticed() -> None:
    """The yardstick above is finer than what modulation in bf16 gives."""
    x, shift, scale = randn(1, 8, 64).bfloat16(), randn(1, 1, 1, 64, seed=1), randn(1, 1, 1, 64, seed=2)
    exact = layer_norm(x) * (1 + scale.double()[0]) + shift.double()[0]
    assert_rounded_once(modulate(x, layers.LayerNorm(64, eps=1e-6, elementwise_affine=False), shift, scale), exact)
    coarse = F.layer_norm(x, (64,), eps=1e-6) * (1 + scale[0].bfloat16()) + shift[0].bfloat16()
    with pytest.raises(AssertionError):
        assert_rounded_once(coarse, exact)


def test_qk_norm_and_rope_have_fp32_statistics() -> None:
    norm = layers.RMSNorm(16, eps=1e-6, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(1 + randn(16).bfloat16() / 8)
    x = 8 * randn(2, 4, 50, 16, seed=1).bfloat16()
    scaled = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    # The statistics in fp32, rounded to bf16, then the weight in bf16: two roundings, in that order.
    expected = scaled.float().bfloat16() * norm.weight
    assert (norm(x) != expected).float().mean() <= 0.01  # near-ties of the first rounding
    assert_rounded_once(norm(x), expected.double())


def test_timesteps_round_to_the_dtype_of_the_weights() -> None:
    """bf16 knows only multiples of 4 above 512. Part of the released behaviour, with a way out."""
    rounded, exact = (make_dit(torch.bfloat16, timestep_precision=p) for p in ("model", "fp32"))
    assert torch.equal(run(rounded, t=999.0), run(rounded, t=1000.0))
    assert not torch.equal(run(rounded, t=996.0), run(rounded, t=1000.0))
    assert not torch.equal(run(exact, t=999.0), run(exact, t=1000.0))
    for precision in ("model", "fp32"):  # fp32 weights round nothing either way
        dit = make_dit(timestep_precision=precision)
        assert not torch.equal(run(dit, t=999.0), run(dit, t=1000.0))


def test_44_of_50_base_timesteps_stay_apart_in_bf16() -> None:
    timesteps = schedule.base(50)[:-1] * 1000
    for precision, expected in (("model", 44), ("fp32", 50)):
        dit = make_dit(torch.bfloat16, timestep_precision=precision)
        tau = dit.t_embedder(dit._per_frame(timesteps, 1).flatten())
        assert len(tau.unique(dim=0)) == expected


def hidden_states(dit: LongCatDiT, tokens: int) -> list[Tensor]:
    """Filled by each forward: copies of the first `tokens` tokens behind every block."""
    states: list[Tensor] = []
    for block in dit.blocks:
        block.register_forward_hook(lambda _m, _x, y: states.append(y[:, :tokens].clone()))
    return states


@pytest.mark.parametrize("bsa", [None, BSAConfig(sparsity=0.5, block_q=(2, 2, 2), block_k=(2, 2, 2))])
@pytest.mark.parametrize("cond", [1, 2])
def test_condition_tokens_see_neither_noise_nor_text_nor_time(cond: int, bsa: BSAConfig | None) -> None:
    dit = make_dit()
    states = hidden_states(dit, cond * 6)
    x = randn(1, 16, 4, 4, 6)
    timestep = torch.tensor([[0.0] * cond + [700.0] * (4 - cond)])

    def forward(x: Tensor = x, timestep: Tensor = timestep, seed: int = 3) -> tuple[list[Tensor], Tensor]:
        states.clear()
        out = dit(x, timestep, text(seed=seed).states, text().mask, num_cond_latents=cond, bsa=bsa)
        return list(states), out

    expected, output = forward()
    other_noise = torch.cat([x[:, :, :cond], randn(1, 16, 4 - cond, 4, 6, seed=9)], dim=2)
    other_time = torch.where(timestep > 0, 300.0, 0.0)
    for changed in (forward(other_noise), forward(timestep=other_time), forward(seed=8)):
        for got, before in zip(changed[0], expected, strict=True):
            assert (got - before).abs().max() <= 1e-6
        assert (changed[1][:, :, :cond] - output[:, :, :cond]).abs().max() <= 1e-5
        assert (changed[1][:, :, cond:] - output[:, :, cond:]).abs().max() > 1e-2
    # The other way round the condition is seen, by every noise frame.
    seen = (forward(torch.cat([x[:, :, :cond] + 1, x[:, :, cond:]], dim=2))[1] - output)[:, :, cond:]
    assert (seen.abs().amax(dim=(0, 1, 3, 4)) > 1e-2).all()


def test_condition_tokens_get_nothing_from_cross_attention() -> None:
    """Not even its bias: a cross-attention that is nothing but a large bias leaves them as they are."""
    plain, biased = make_dit(), make_dit()
    for block in biased.blocks:
        block.cross_attn.proj.weight.zero_()
        block.cross_attn.proj.bias.fill_(100.0)
    before, after = hidden_states(plain, 6), hidden_states(biased, 6)
    run(plain, cond=1)
    run(biased, cond=1)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    queries: list[int] = []
    plain.blocks[0].cross_attn.register_forward_hook(lambda _m, x, _y: queries.append(x[0].shape[1]))
    run(plain, frames=3, cond=1)
    run(plain, frames=3, cond=0)
    assert queries == [12, 18]


def cached_and_whole(
    dit: LongCatDiT, *, batch: int = 1, cache_batch: int = 1, cond: int = 2, bsa: BSAConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The noise frames' prediction with a cache and without."""
    x = randn(batch, 16, 4, 4, 6)
    if cache_batch == 1:
        x[:, :, :cond] = x[:1, :, :cond]
    timestep = torch.full((batch, 4), 700.0)
    timestep[:, :cond] = 0
    states = text(batch)
    whole = dit(x, timestep, states.states, states.mask, num_cond_latents=cond, bsa=bsa)[:, :, cond:]
    cache = dit.build_kv_cache(x[:cache_batch, :, :cond], bsa)
    cached = dit(
        x[:, :, cond:], timestep[:, cond:], states.states, states.mask, num_cond_latents=cond, kv_cache=cache, bsa=bsa
    )
    return cached, whole


@pytest.mark.parametrize(("batch", "cache_batch"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("cond", [1, 3])
def test_the_cache_changes_nothing(batch: int, cache_batch: int, cond: int) -> None:
    """In fp64: in fp32 the order of sums, which differs from processor to processor, is all that would be seen."""
    cached, whole = cached_and_whole(make_dit(torch.float64), batch=batch, cache_batch=cache_batch, cond=cond)
    assert whole.dtype == torch.float64
    assert (cached - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("cond", [1, 2])
def test_the_cache_changes_nothing_with_sparse_attention(cond: int) -> None:
    """Condition frames select their blocks among themselves both times; a single frame is dense both times."""
    bsa = BSAConfig(sparsity=0.5, block_q=(1, 2, 2), block_k=(1, 2, 2))
    cached, whole = cached_and_whole(make_dit(), cond=cond, bsa=bsa)
    assert (cached - whole).abs().max() <= 1e-5
    dense, _ = cached_and_whole(make_dit(), cond=cond)
    assert (cached - dense).abs().max() > 1e-3


def test_the_cache_holds_in_bf16() -> None:
    cached, whole = cached_and_whole(make_dit(torch.bfloat16))
    assert (cached - whole).norm() / whole.norm() <= 2e-2


def test_the_cache_holds_keys_and_values_alone() -> None:
    """2 * n_c * S * C values a layer (4.91 GB for the released model's 13 frames), not a view into something larger."""
    cache = make_dit().build_kv_cache(randn(1, 16, 2, 4, 6))
    assert len(cache) == DIT.depth
    for k, v in cache:
        assert k.shape == v.shape == (1, DIT.num_heads, 2 * 6, DIT.head_dim)
        assert k.untyped_storage().nbytes() + v.untyped_storage().nbytes() == 2 * 12 * DIT.hidden_size * 4


def test_the_cache_is_of_the_condition_alone() -> None:
    """It is built without text; a text embedder that fails is not noticed."""
    dit = make_dit()
    dit.y_embedder.register_forward_hook(lambda *_: pytest.fail("the cache read the text"))
    for block in dit.blocks:
        block.cross_attn.register_forward_hook(lambda *_: pytest.fail("the cache ran cross-attention"))
    assert len(dit.build_kv_cache(randn(1, 16, 2, 4, 6))) == DIT.depth


SMALL_BLOCKS = {"block_q": (2, 2, 2), "block_k": (2, 2, 2)}


@pytest.mark.parametrize("grid", [(3, 4, 6), (5, 10, 6), (2, 6, 14)])
def test_sparsity_0_is_dense_on_any_grid(grid: tuple[int, int, int]) -> None:
    """Blocks of 4x4x4 tokens that no side of the grid is a multiple of."""
    dit = make_dit()
    x, t, states = randn(1, 16, *grid), torch.tensor([500.0]), text()
    dense = dit(x, t, states.states, states.mask)
    whole = dit(x, t, states.states, states.mask, bsa=BSAConfig(sparsity=0.0))
    sparse = dit(x, t, states.states, states.mask, bsa=BSAConfig(sparsity=0.75, **SMALL_BLOCKS))
    assert (whole - dense).abs().max() <= 1e-4
    assert torch.isfinite(sparse).all() and (sparse - dense).abs().max() > 1e-2


def test_one_frame_is_dense() -> None:
    dit = make_dit()
    x, t, states = randn(1, 16, 1, 8, 8), torch.tensor([500.0]), text()
    sparse = dit(x, t, states.states, bsa=BSAConfig(sparsity=0.9, **SMALL_BLOCKS))
    assert torch.equal(sparse, dit(x, t, states.states))


@pytest.mark.parametrize("patched", [False, True])
def test_text_padding(patched: bool) -> None:
    """With zero padding, pads stay in as equal rows and what stood in them does not matter; without, they are gone."""
    dit = make_dit(text_tokens_zero_pad=not patched)
    x, t = randn(1, 16, 2, 4, 6), torch.tensor([500.0])
    states = text()
    mask = states.mask
    assert mask is not None
    other = torch.where(mask.bool().unsqueeze(-1), states.states, 7.0)
    assert torch.allclose(dit(x, t, states.states, mask), dit(x, t, other, mask), atol=1e-5)
    shorter = dit(x, t, states.states[:, :-1])
    difference = (dit(x, t, states.states, mask) - shorter).abs().max()
    assert difference <= 1e-5 if patched else difference > 1e-3


def padded(dtype: torch.dtype, lengths: tuple[int, ...], total: int) -> tuple[Tensor, Tensor]:
    """Text states [B, total, 32] with something in their pads, and the mask."""
    mask = torch.zeros(len(lengths), total, dtype=torch.int64)
    for b, length in enumerate(lengths):
        mask[b, :length] = 1
    return randn(len(lengths), total, 32, seed=6, dtype=torch.float64).to(dtype), mask


def every_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that takes no bias, as a host's: every pad is there."""
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(("lengths", "total", "read"), [((9, 3), 512, 16), ((0, 1), 40, 8), ((30, 34), 40, 40)])
def test_one_row_stands_for_all_pads(
    dtype: torch.dtype, tolerance: float, lengths: tuple[int, ...], total: int, read: int
) -> None:
    """Outputs and gradients, relative to their size; `read` rows are what cross-attention is given."""
    states, mask = padded(dtype, lengths, total)
    x, t = randn(2, 16, 2, 4, 6), torch.tensor([500.0, 300.0])
    rows: list[int] = []
    results = []
    for attend in ("sdpa", every_row):
        dit = make_dit(dtype).requires_grad_(True)
        dit.set_attention(attend)
        dit.blocks[0].cross_attn.kv_linear.register_forward_hook(lambda _m, x, _y: rows.append(x[0].shape[1]))
        out = dit(x.to(torch.float64 if dtype == torch.float64 else torch.float32), t, states, mask)
        out.square().mean().backward()
        results.append((out.detach(), {name: p.grad for name, p in dit.named_parameters()}))
    assert rows == [read, total]
    (short, grads), (long, expected) = results
    assert (short - long).norm() <= tolerance * long.norm()
    for name, grad in expected.items():
        assert grad is not None and grads[name] is not None
        if grad.norm() > 1e-6:  # kv_linear's bias shifts all scores alike, so its gradient is rounding
            assert (grads[name] - grad).norm() <= 10 * tolerance * grad.norm(), name


def test_pads_weigh_what_they_are_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for count in (1, 2, 3, 100, 505, 511):
            parts = torch.tensor(log_parts(count, dtype), dtype=dtype)
            assert len(parts) == num_pads_as_one(dtype)
            assert parts.double().exp().sum().item() == pytest.approx(count, rel=1e-3), (dtype, count)


def test_pads_that_are_not_at_the_end_are_read() -> None:
    dit = make_dit()
    states, mask = padded(torch.float32, (5, 20), 64)
    mask[:, 2] = 0
    x, t = randn(2, 16, 2, 4, 6), torch.tensor([500.0, 300.0])
    got = dit(x, t, states, mask)
    dit.set_attention(every_row)
    assert torch.allclose(got, dit(x, t, states, mask), atol=1e-5)


def test_samples_of_a_batch_do_not_meet() -> None:
    for zero_pad in (True, False):
        dit = make_dit(torch.float64, text_tokens_zero_pad=zero_pad)
        x, t, states = randn(2, 16, 2, 4, 6), torch.tensor([500.0, 200.0]), text(2)
        assert states.mask is not None
        both = dit(x, t, states.states, states.mask)
        for b in range(2):
            alone = dit(x[b : b + 1], t[b : b + 1], states.states[b : b + 1], states.mask[b : b + 1])
            assert (both[b : b + 1] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": torch.zeros(1, 8, 2, 4, 6)}, "latents must be"),
        ({"latents": torch.zeros(1, 16, 2, 5, 6)}, "latent height must be a multiple of the patch 2, got 5"),
        ({"timestep": torch.zeros(3)}, "timestep must be"),
        ({"text": torch.zeros(1, 4, 31)}, "text must be"),
        ({"text": torch.zeros(2, 4, 32)}, "text must be"),
        ({"text_mask": torch.ones(1, 5)}, "text_mask must be"),
        ({"num_cond_latents": 2}, "num_cond_latents must be in"),
        ({"num_cond_latents": -1}, "num_cond_latents must be in"),
        ({"num_cond_latents": 1, "kv_cache": KVCache()}, "kv_cache must hold"),
        ({"num_cond_latents": 0, "kv_cache": "built"}, "kv_cache must hold"),
        ({"num_cond_latents": 2, "kv_cache": "built"}, "kv_cache must hold"),
        ({"num_cond_latents": 1, "kv_cache": "built for 3"}, "kv_cache has batch 3"),
    ],
)
def test_wrong_inputs(changes: dict[str, Any], words: str) -> None:
    dit = make_dit()
    if isinstance(cache := changes.get("kv_cache"), str):
        changes = changes | {"kv_cache": dit.build_kv_cache(torch.zeros(3 if "3" in cache else 1, 16, 1, 4, 6))}
    inputs = {"latents": torch.zeros(1, 16, 2, 4, 6), "timestep": torch.zeros(1), "text": torch.zeros(1, 4, 32)}
    with pytest.raises(InputError, match=words):
        dit(**inputs | changes)


def test_a_cache_needs_frames() -> None:
    with pytest.raises(InputError, match="cond_latents must be"):
        make_dit().build_kv_cache(torch.zeros(1, 16, 0, 4, 6))


@pytest.mark.parametrize("bsa", [None, BSAConfig(sparsity=0.5, block_q=(1, 2, 2), block_k=(1, 2, 2))])
def test_gradients(bsa: BSAConfig | None) -> None:
    """Backward against central differences in fp64, along one direction in each parameter."""
    dit = make_dit(torch.float64).requires_grad_(True)
    weight = randn(1, 16, 3, 4, 6, seed=5, dtype=torch.float64)

    def loss() -> Tensor:
        return (run(dit, cond=1, bsa=bsa) * weight).sum()

    assert run(dit).dtype == torch.float64
    loss().backward()
    eps = 1e-6
    for k, (name, p) in enumerate(dit.named_parameters()):
        assert p.grad is not None, name
        direction = randn(*p.shape, seed=100 + k, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            p += eps * direction
            above = loss()
            p -= 2 * eps * direction
            below = loss()
            p += eps * direction
        expected = ((above - below) / (2 * eps)).item()
        got = (p.grad * direction).sum().item()
        assert got == pytest.approx(expected, rel=1e-5, abs=2e-6), name
        assert p.grad.abs().max() > 0 or "cross_attn.k" in name, name
