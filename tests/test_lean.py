"""A block without a backward pass does the sums of the one that training uses, in the memory that it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import make_dit, randn, text
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.config import BSAConfig
from lcv_core.dit import model, pieces
from lcv_core.dit.embed import modulate
from lcv_core.dit.frames import Span, share_timesteps
from lcv_core.dit.kernels import plain, resolve_kernels
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.rope import apply_rope, rope_table
from lcv_core.errors import InputError
from lcv_core.live_bytes import LiveBytes

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = tuple(TOLERANCE)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few tokens, which no span of tokens is a multiple of."""
    monkeypatch.setattr(pieces, "_ELEMENTS_ON_CPU", 5 * 64)
    monkeypatch.setattr(pieces, "_LEAST_ON_CPU", 7)
    monkeypatch.setattr(pieces, "_PIECES_ON_CPU", pieces._PIECES_ON_GPU)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def with_gradients(dit: LongCatDiT, run: Callable[[], Tensor]) -> Tensor:
    """What training computes."""
    dit.requires_grad_(True)
    try:
        return run().detach()
    finally:
        dit.requires_grad_(False)


def times(batch: int, frames: int, cond: int, *, apart: bool) -> Tensor:
    """[B, T]: 0 for condition frames; the rest of a sample shares a time, or with `apart` each frame has its own."""
    t = torch.full((batch, frames), 700.0) + 100 * torch.arange(batch)[:, None]
    if apart:
        t += 8 * torch.arange(frames)
    t[:, :cond] = 0
    return t


@pytest.fixture(params=["room", "no room"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values apart, as on a CPU, and where qkv made them, as on a GPU."""
    monkeypatch.setattr(model, "_wants_room", lambda _x, cache, _block: cache is not None or request.param == "room")


@pytest.mark.usefixtures("small_pieces", "room")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("cond", [0, 2])
@pytest.mark.parametrize("bsa", [None, BSAConfig(sparsity=0.5, block_q=(1, 2, 2), block_k=(1, 2, 2))])
def test_a_forward(dtype: torch.dtype, cond: int, apart: bool, bsa: BSAConfig | None) -> None:
    if bsa is not None and dtype == torch.bfloat16:
        pytest.skip("near-ties of rounded keys choose other blocks")
    dit, states = make_dit(dtype), text(2)
    x = randn(2, 16, 4, 4, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    t = times(2, 4, cond, apart=apart).to(x.dtype)

    def run() -> Tensor:
        return dit(x, t, states.states.to(x.dtype), states.mask, num_cond_latents=cond, bsa=bsa)

    got, expected = run(), with_gradients(dit, run)
    assert relative(got, expected) <= TOLERANCE[dtype]
    if apart:  # the test can see a timestep that lands on another frame
        t[:, -2:] = t[:, -2:].flip(1)
        assert relative(run(), expected) > 2 * TOLERANCE[dtype]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "conditions"), [(1, 1), (2, 1), (4, 2)])
def test_a_forward_with_a_cache(dtype: torch.dtype, batch: int, conditions: int) -> None:
    """Conditions b of a batch are those of samples b, conditions + b, ...: of the branches of guidance."""
    dit, states, cond = make_dit(dtype), text(batch), 2
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = randn(conditions, 16, cond, 4, 6, seed=8, dtype=wide)
    noise = randn(batch, 16, 2, 4, 6, dtype=wide)
    x = torch.cat([given.repeat(batch // conditions, 1, 1, 1, 1), noise], dim=2)
    t, words = times(batch, 4, cond, apart=True).to(wide), states.states.to(wide)
    whole = dit(x, t, words, states.mask, num_cond_latents=cond)[:, :, cond:]
    cache = dit.build_kv_cache(given)
    assert cache.batch == conditions

    def run() -> Tensor:
        return dit(noise, t[:, cond:], words, states.mask, num_cond_latents=cond, kv_cache=cache)

    assert relative(run(), whole) <= TOLERANCE[dtype]
    assert relative(with_gradients(dit, run), whole) <= TOLERANCE[dtype]


def test_the_final_layer_and_blocks_are_in_pieces(small_pieces: None) -> None:
    """What the other tests rely on: at these sizes the sequence is cut."""
    assert len(list(pieces.by_elements(24, 64, CPU))) == 5
    assert list(pieces.by_layer(24, nn.Linear(2, 2), CPU)) == [(0, 7), (7, 14), (14, 21), (21, 24)]
    assert len(list(pieces.by_layer(24, nn.Linear(2, 2, device="meta"), CPU))) == 2  # brought in for each piece


def test_timesteps_are_shared() -> None:
    t = torch.tensor([[0.0, 700.0, 700.0], [0.0, 0.0, 300.0]])
    distinct, frames = share_timesteps(t, 6)
    assert distinct.tolist() == [0.0, 300.0, 700.0]
    assert frames.rows.tolist() == [[0, 2, 2], [0, 0, 1]]
    assert frames.spans == (Span(0, 0, 6, 0), Span(0, 6, 18, 2), Span(1, 0, 12, 0), Span(1, 12, 18, 1))
    assert list(frames.within(4, 13)) == [Span(0, 0, 2, 0), Span(0, 2, 9, 2), Span(1, 0, 8, 0), Span(1, 8, 9, 1)]


def test_adaln_runs_once_per_distinct_timestep() -> None:
    dit, states = make_dit(), text(2)
    rows: dict[str, int] = {}
    for name in ("t_embedder.mlp.0", "blocks.1.adaLN_modulation.1", "final_layer.adaLN_modulation.1"):
        layer = dit.get_submodule(name)
        layer.register_forward_hook(lambda _m, x, _y, name=name: rows.update({name: x[0].flatten(0, -2).shape[0]}))
    x = randn(2, 16, 5, 4, 6)
    dit(x, torch.full((2, 5), 500.0), states.states, states.mask)
    assert set(rows.values()) == {1}
    dit(x, times(2, 5, 2, apart=False), states.states, states.mask, num_cond_latents=2)
    assert set(rows.values()) == {3}  # 0, and one for each sample


@pytest.mark.parametrize("name", ["attn", "cross_attn", "ffn", "mod_norm_attn", "pre_crs_attn_norm"])
def test_a_module_with_a_hook_is_called(name: str) -> None:
    """And what the hook gives counts."""
    dit, states, called = make_dit(), text(), []

    def run() -> Tensor:
        return dit(randn(1, 16, 2, 4, 6), torch.tensor([500.0]), states.states, states.mask)

    def twice(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        called.append(name)
        return 2 * out

    before = run()
    handle = dit.blocks[0].get_submodule(name).register_forward_hook(twice)
    hooked = run()
    expected = with_gradients(dit, run)
    handle.remove()
    assert len(called) == 2
    assert relative(hooked, expected) <= 1e-5 < relative(hooked, before)


def test_what_the_caller_gave_is_not_written_to() -> None:
    dit, states = make_dit(), text()
    x, t = randn(1, 16, 2, 4, 6), torch.tensor([500.0])
    assert states.mask is not None
    given = [x, t, states.states, states.mask]
    before = [g.clone() for g in given]
    first = dit(x, t, states.states, states.mask)
    assert torch.equal(first, dit(x, t, states.states, states.mask))
    assert all(torch.equal(a, b) for a, b in zip(given, before))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulate_and_gate(dtype: torch.dtype) -> None:
    """Piece by piece as in one go, rounded once."""
    norm = layers.LayerNorm(64, eps=1e-6, elementwise_affine=False)
    _, frames = share_timesteps(times(2, 3, 1, apart=True), 8)
    x, update = randn(2, 24, 64).to(dtype), randn(2, 24, 64, seed=5).to(dtype)
    shift, scale, gate = (randn(5, 64, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    per_frame = [m[frames.rows.long()].unsqueeze(2) for m in (shift, scale, gate)]  # [B, T, 1, C]
    exact = modulate(x.double(), norm, per_frame[0], per_frame[1])
    gated = (x.double().unflatten(1, (3, -1)) + per_frame[2] * update.double().unflatten(1, (3, -1))).flatten(1, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for start, stop in ((0, 24), (5, 17)):
        part = x[:, start:stop]
        got = plain.modulate(part, norm, shift.to(wide), scale.to(wide), frames, start)
        assert got.dtype == dtype
        assert_rounded(got, exact[:, start:stop])
        written = x.clone()
        plain.gated_add_(written[:, start:stop], gate.to(wide), update[:, start:stop], frames, start)
        assert_rounded(written[:, start:stop], gated[:, start:stop])
        assert torch.equal(written[:, :start], x[:, :start]) and torch.equal(written[:, stop:], x[:, stop:])


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """`got` is `exact` up to the rounding of its dtype and of sums in fp32."""
    ulp = torch.finfo(got.dtype).eps
    fp32 = 0 if got.dtype == torch.float64 else 2e-6
    assert ((got.double() - exact).abs() <= ulp * exact.abs() + (fp32 or 1e-14) * exact.abs().max()).all()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [layers.RMSNorm, nn.RMSNorm])
def test_norm_and_rope(dtype: torch.dtype, kind: type[nn.RMSNorm]) -> None:
    """In place on a view of q, k and v, and into another tensor."""
    norm = kind(16, eps=1e-6).to(dtype).requires_grad_(False)
    norm.weight.copy_(1 + randn(16) / 8)
    table = rope_table((2, 3, 4), 16, CPU)
    qkv = randn(2, 24, 3, 4, 16).to(dtype)
    expected = apply_rope(norm(qkv[:, :, 1]).transpose(1, 2), table).transpose(1, 2)
    out = torch.full_like(qkv[:, :, 0], torch.nan)
    plain.norm_rope(qkv[:, :, 1], norm, table, out)
    assert relative(out, expected) <= TOLERANCE[dtype] / 2
    normed = norm(qkv[:, :, 0])
    q, k, v = qkv.unbind(2)
    others = v.clone()
    plain.norm_rope(k, norm, table, k)
    plain.norm_rope(q, norm, None, q)
    assert torch.equal(k, out) and torch.equal(v, others) and torch.equal(q, normed)


def test_kernels_by_name(caplog: pytest.LogCaptureFixture) -> None:
    dit = make_dit()
    with pytest.raises(InputError, match='unknown kernels "fast"; there are: auto, torch, triton'):
        dit.set_kernels("fast")
    with pytest.raises(InputError, match=r'kernels "triton" are not usable: .*; "torch" always are'):
        dit.set_kernels("triton")
    resolve_kernels.cache_clear()
    with caplog.at_level("INFO", logger="lcv_core"):
        assert resolve_kernels("auto", CPU).name == "torch"
    assert 'kernels "auto" chose torch on cpu' in caplog.text


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(("cut", "most"), [(pieces._PIECES_ON_GPU, 5.2), (pieces._PIECES_ON_CPU, 6.3)])
def test_five_activations_are_alive(cut: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream, q, k, v and what attention gives: so it is for long sequences, beside which pieces are small. A CPU's
    halves of the feed-forward are one more."""
    monkeypatch.setattr(pieces, "_ELEMENTS_ON_CPU", 1 << 14)
    monkeypatch.setattr(pieces, "_PIECES_ON_CPU", cut)
    dit = make_dit(hidden_size=192, num_heads=6, depth=1)
    x, t, words = randn(1, 16, 9, 40, 48), torch.tensor([500.0]), text()
    rope_table((9, 20, 24), 32, CPU)
    with LiveBytes() as live:
        dit(x, t, words.states, words.mask)
    activation = 9 * 20 * 24 * 192 * 4
    assert 5 * activation <= live.peak <= most * activation  # beside them small things, small as this model is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_in_fp8(dtype: torch.dtype) -> None:
    """Half of bf16's bytes; the error of a value is that of three bits of mantissa, a scale for each head."""
    dit, states = make_dit(dtype), text()
    given, noise = randn(1, 16, 2, 4, 6, seed=8), randn(1, 16, 2, 4, 6)
    caches = [exact := dit.build_kv_cache(given)]
    dit.set_kv_cache(storage="fp8")
    caches.append(fp8 := dit.build_kv_cache(given))
    scales = 2 * dit.config.depth * dit.config.num_heads * 4
    assert fp8.nbytes - scales == exact.nbytes // dtype.itemsize
    for kept, rounded in zip(exact, fp8):
        for a, b in zip(kept, rounded):
            assert b.dtype == dtype and a.shape == b.shape
            assert 1e-3 < relative(b, a) <= 0.03
    a, b = (
        dit(noise, torch.tensor([500.0]), states.states, states.mask, num_cond_latents=2, kv_cache=cache)
        for cache in caches
    )
    assert 1e-4 < relative(b, a) <= 0.05


def test_a_cache_in_system_memory() -> None:
    """Without a GPU it is where it would be anyway."""
    dit, states = make_dit(), text()
    given, noise = randn(1, 16, 2, 4, 6, seed=8), randn(1, 16, 2, 4, 6)
    made = []
    for place in ("device", "cpu"):
        dit.set_kv_cache(place=place)  # type: ignore[arg-type]
        cache = dit.build_kv_cache(given)
        assert cache.place == place
        made.append(dit(noise, torch.tensor([500.0]), states.states, num_cond_latents=2, kv_cache=cache))
    assert torch.equal(*made)


def test_wrong_names_of_a_cache() -> None:
    for wrong in ({"storage": "fp4"}, {"place": "disk"}):
        with pytest.raises(InputError, match="kv_cache"):
            make_dit().set_kv_cache(**wrong)  # type: ignore[arg-type]
