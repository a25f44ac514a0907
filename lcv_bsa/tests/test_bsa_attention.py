"""The reference against PyTorch's own attention, and every backend against the reference."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lcv_bsa.backends as backends
import lcv_bsa.backends.chunks as chunks
import lcv_bsa.backends.gather as gather
from lcv_bsa import (
    BlockSelection,
    available_backends,
    block_sparse_attention,
    bsa_3d,
    reference_attention,
    select_blocks,
)
from lcv_bsa.layout import Triple, token_blocks
from lcv_bsa.testing import Results, random_qkv, random_selection, run_with_gradients

# grid_q, grid_k, block_q, block_k, batch, heads, kv_heads, top_k (None: counts vary)
CASES = {
    "full": ((4, 4, 8), (4, 4, 8), (2, 4, 4), (2, 4, 4), 1, 2, 2, 2),
    "varied counts": ((4, 4, 8), (4, 4, 8), (2, 4, 4), (2, 4, 4), 2, 2, 2, None),
    "partial": ((3, 7, 5), (3, 7, 5), (2, 4, 4), (2, 4, 4), 2, 2, 1, 2),
    "partial, varied, gqa": ((5, 3, 6), (3, 7, 5), (4, 2, 4), (2, 4, 2), 2, 6, 2, None),
    "6x7x9": ((6, 7, 9), (6, 7, 9), (4, 4, 4), (4, 4, 4), 1, 1, 1, 3),
    "one token": ((1, 1, 1), (2, 3, 4), (4, 4, 4), (2, 2, 2), 1, 2, 1, 3),
    "one block": ((2, 3, 4), (1, 1, 1), (2, 2, 2), (4, 4, 4), 1, 1, 1, 1),
}
Case = tuple[Triple, Triple, Triple, Triple, int, int, int, int | None]
BACKENDS = ["cpu"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], BlockSelection]:
    """q, k, v, do, dlse and a selection."""
    grid_q, grid_k, block_q, block_k, batch, heads, kv_heads, top_k = case
    sizes = {"batch": batch, "heads": heads}
    g = seeded()
    q, k, v = random_qkv(grid_q, grid_k, generator=g, kv_heads=kv_heads, dtype=dtype, **sizes)
    do = torch.randn(q.shape, generator=g, dtype=torch.float64).to(dtype)
    dlse = torch.randn(q.shape[:3], generator=g, dtype=torch.float64)
    sel = random_selection(grid_q, grid_k, generator=g, block_q=block_q, block_k=block_k, top_k=top_k, **sizes)
    return [q, k, v, do, dlse], sel


def named(backend: str, sel: BlockSelection, **kwargs: float) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, v: block_sparse_attention(q, k, v, sel, backend=backend, return_lse=True, **kwargs)


def token_mask_by_loop(sel: BlockSelection) -> Tensor:
    """[B, H, Sq, Skv] pair by pair of blocks."""
    of_q, of_k = (token_blocks(x, torch.device("cpu")) for x in (sel.layout_q, sel.layout_k))
    B, H, Nq, _ = sel.indices.shape
    mask = torch.zeros(B, H, len(of_q), len(of_k), dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for i in range(Nq):
                for j in sel.indices[b, h, i, : sel.counts[b, h, i]].tolist():
                    mask[b, h] |= (of_q == i)[:, None] & (of_k == j)
    return mask


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_agrees_with_masked_sdpa(case: Case) -> None:
    (q, k, v, do, _), sel = make(case, torch.float64)
    mask = token_mask_by_loop(sel)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        G = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
        weights = (q @ k.mT * 0.3).exp() * mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3), weights.sum(-1).log()

    dlse = torch.zeros(q.shape[:3], dtype=torch.float64)
    expected = run_with_gradients(sdpa, q, k, v, do, dlse)
    found = run_with_gradients(lambda *x: reference_attention(*x, sel, scale=0.3), q, k, v, do, dlse)
    for name in Results._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backend_agrees_with_reference(
    case: Case, dtype: torch.dtype, tolerance: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_LOGITS_AT_ONCE_CPU", 5 * 32 * 32)  # several chunks, the last of them short
    (q, k, v, do, dlse), sel = make(case, dtype)
    wide = [x.double() for x in (q, k, v)]
    expected = run_with_gradients(lambda *x: reference_attention(*x, sel), *wide, do.double(), dlse)
    found = run_with_gradients(named(backend, sel), q, k, v, do, dlse)
    assert [x.dtype for x in found] == [dtype] * 5
    for name in Results._fields:
        ours, truth = getattr(found, name).double(), getattr(expected, name)
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 16.0])
def test_half_precision_errs_no_more_than_twice_dense_sdpa(std: float, dtype: torch.dtype, backend: str) -> None:
    """Every block kept, so that SDPA computes the same thing; logits of standard deviation near `std`."""
    scale = 0.11  # not a power of two: a product with it in half precision would round
    grid, block = (4, 8, 8), (4, 4, 4)
    q, k, v = random_qkv(grid, generator=seeded(), heads=2, head_dim=64, dtype=dtype)
    q = q * std**0.5
    k = k * std**0.5
    do = torch.randn(q.shape, generator=seeded(1)).to(dtype)
    dlse = torch.zeros(q.shape[:3])
    sel = random_selection(grid, generator=seeded(), block_q=block, heads=2, top_k=4)
    wide = [x.double() for x in (q, k, v, do)]
    truth = run_with_gradients(lambda *x: reference_attention(*x, sel, scale=scale), *wide, dlse)
    found = run_with_gradients(named(backend, sel, scale=scale), q, k, v, do, dlse)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lse = (q.float() @ k.float().mT * scale).logsumexp(-1)
        return F.scaled_dot_product_attention(q, k, v, scale=scale), lse

    dense = run_with_gradients(sdpa, q, k, v, do, dlse)
    assert found.o.dtype == found.dq.dtype == found.dk.dtype == found.dv.dtype == dtype
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.lse.double(), truth.lse, rtol=1e-5, atol=1e-5)
    for name in ("o", "dq", "dk", "dv"):
        ours, theirs = ((getattr(x, name).double() - getattr(truth, name)).norm() for x in (found, dense))
        assert ours <= 2 * theirs, f"{name}: {ours:.3e} against SDPA's {theirs:.3e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [(2, 4, 4), (3, 4, 5)])
def test_all_blocks_kept_is_dense_attention(block: Triple, backend: str) -> None:
    q, k, v = random_qkv((4, 4, 8), generator=seeded(), batch=2, heads=3)
    o = bsa_3d(q, k, v, (4, 4, 8), block_q=block, keep=1.0, backend=backend)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_lse(backend: str) -> None:
    (q, k, v, _, _), sel = make(((1, 3, 3), (3, 2, 3), (1, 2, 2), (2, 2, 2), 1, 2, 1, None), torch.float64)
    q, k, v = (x[..., :4].clone().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(named(backend, sel, scale=0.7), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_and_empty_slots_stay_finite(backend: str) -> None:
    (q, k, v, do, dlse), sel = make(CASES["partial"], torch.float32)
    # all logits far below zero: a padded key of zeros, were it let in, would take the whole softmax
    q, k = q.abs() * 100, -k.abs() * 100
    expected = run_with_gradients(lambda *x: reference_attention(*x, sel), *(x.double() for x in (q, k, v, do)), dlse)
    found = run_with_gradients(named(backend, sel), q, k, v, do, dlse)
    torch.testing.assert_close(found.o.double(), expected.o, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=1e-5, atol=1e-2)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_outside_the_selection_do_not_matter(backend: str) -> None:
    (q, k, v, _, _), sel = make(CASES["full"], torch.float32)
    rows = torch.zeros_like(sel.to_mask())
    rows[..., 1] = True
    sel = BlockSelection.from_mask(rows, grid_q=sel.grid_q, grid_k=sel.grid_k, block_q=sel.block_q, block_k=sel.block_k)
    o = block_sparse_attention(q, k, v, sel, backend=backend)
    outside = token_blocks(sel.layout_k, torch.device("cpu")) != 1
    k[:, :, outside], v[:, :, outside] = torch.nan, torch.nan
    assert torch.equal(block_sparse_attention(q, k, v, sel, backend=backend), o)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    (q, k, v, do, dlse), sel = make(CASES["partial, varied, gqa"], torch.float32)
    strided = [x.mT.contiguous().mT for x in (q, k)] + [v.transpose(1, 2).contiguous().transpose(1, 2)]
    assert not any(x.is_contiguous() for x in strided)
    first = run_with_gradients(named(backend, sel), q, k, v, do, dlse)
    second = run_with_gradients(named(backend, sel), *strided, do.mT.contiguous().mT, dlse)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_run_gives_the_same_bits(backend: str) -> None:
    (q, k, v, do, dlse), sel = make(CASES["partial, varied, gqa"], torch.float32)
    first, second = (run_with_gradients(named(backend, sel), q, k, v, do, dlse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_precision(backend: str) -> None:
    (q, k, v, do, dlse), sel = make(CASES["full"], torch.float32)
    plain = run_with_gradients(named(backend, sel), q, k, v, do, dlse)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run_with_gradients(named(backend, sel), q, k, v, do, dlse)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast))


def test_bsa_3d_is_select_then_attend_in_both_layouts() -> None:
    grid_q, grid_k, blocks = (3, 4, 5), (4, 4, 6), {"block_q": (2, 2, 4), "block_k": (2, 4, 2)}
    q, k, v = random_qkv(grid_q, grid_k, generator=seeded(), batch=2, heads=4, kv_heads=2)
    sel = select_blocks(q, k, grid_q, grid_k, (2, 2, 4), block_k=(2, 4, 2), keep=0.4, scale=0.2)
    expected, expected_lse = reference_attention(q, k, v, sel, scale=0.2)
    o, lse = bsa_3d(q, k, v, grid_q, grid_k, keep=0.4, scale=0.2, return_lse=True, **blocks)  # type: ignore[arg-type]
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)
    swapped = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    o2, lse2 = bsa_3d(*swapped, grid_q, grid_k, keep=0.4, scale=0.2, return_lse=True, layout="bshd", **blocks)  # type: ignore[arg-type]
    assert torch.equal(o2, o.transpose(1, 2)) and torch.equal(lse2, lse)


def test_forward_memory_stays_far_below_dense() -> None:
    """The largest tensor a forward makes, against the dense logits of the same call."""
    grid = (8, 32, 32)
    q, k, v = random_qkv(grid, generator=seeded(), head_dim=16)
    sel = random_selection(grid, generator=seeded(), top_k=8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        gather.forward(q, k, v, sel, 0.25)  # inside the operator nothing can be watched
    assert q.numel() <= largest <= q.shape[2] ** 2 // 64


def test_auto_logs_its_choice(caplog: pytest.LogCaptureFixture) -> None:
    (q, k, v, _, _), sel = make(CASES["full"], torch.float32)
    with caplog.at_level(logging.DEBUG, logger="lcv_bsa"):
        o = block_sparse_attention(q, k, v, sel)
    assert "chose cpu" in caplog.text
    assert torch.equal(o, block_sparse_attention(q, k, v, sel, backend="cpu"))


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v, _, _), sel = make(CASES["full"], torch.float32)

    def missing() -> backends.Backend:
        raise ImportError("No module named 'kernels'")

    picky = backends.Backend(reference_attention, lambda q, k, v, sel: f"needs head_dim 64, got {q.shape[-1]}")
    monkeypatch.setitem(backends._LOADERS, "missing", missing)
    monkeypatch.setitem(backends._LOADERS, "picky", lambda: picky)
    reasons = {"missing": "No module named 'kernels'", "picky": "needs head_dim 64, got 16", "fast": "no backend has"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"backend '{name}' .*{reason}.*; available: auto, cpu, .*reference"):
            block_sparse_attention(q, k, v, sel, backend=name)
    assert {"cpu", "reference"} <= set(available_backends(q, k, v, sel)) <= set(backends._LOADERS) - {"missing", "fast"}
    monkeypatch.setitem(backends._AUTO, "cpu", ("missing", "picky", "reference"))
    torch.testing.assert_close(block_sparse_attention(q, k, v, sel), reference_attention(q, k, v, sel)[0])
    monkeypatch.setitem(backends._AUTO, "cpu", ("missing",))
    with pytest.raises(ValueError, match="'auto' found none"):
        block_sparse_attention(q, k, v, sel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must have 4 dimensions \(.*\), got \[2, 128, 16\]"),
        (lambda q, k, v: (q, k[0], v), r"k must have 4 dimensions"),
        (lambda q, k, v: (q[:, :, 1:], k, v), r"q must have 4\*4\*8 = 128 tokens, got 127"),
        (lambda q, k, v: (q, k[:, :, 1:], v), r"k must have 4\*4\*8 = 128 tokens, got 127"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), r"v must be as k, \[1, 2, 128, 16\] torch.float32 cpu, got \[1, 2, 127"),
        (lambda q, k, v: (q, k, v.half()), r"v must be as k, .* got \[1, 2, 128, 16\] torch.float16"),
        (lambda q, k, v: (q, k.double(), v.double()), r"k must be torch.float32 on cpu as q, got torch.float64"),
        (lambda q, k, v: (q.int(), k, v), r"q must be fp16, bf16, fp32 or fp64, got torch.int32"),
        (lambda q, k, v: (q, k[..., 1:], v), r"k must have B = 1 and D = 16 as q, got B = 1 and D = 15"),
        (lambda q, k, v: (q, torch.cat([k, k]), v), r"k must have B = 1 and D = 16 as q, got B = 2 and D = 16"),
        (lambda q, k, v: (q, torch.cat([k, k], 1)[:, :3], v), r"heads of q must be a multiple of k's, got 2 and 3"),
        (lambda q, k, v: (q[:, :0], k, v), r"q and k must not be empty, got \[1, 0, 128, 16\]"),
        (lambda q, k, v: (q[:, :1], k[:, :1], v[:, :1]), r"sel must be for B, H = \[1, 1\] as q, got \[1, 2\]"),
    ],
)
def test_attention_refuses(change: Callable[..., tuple[Tensor, Tensor, Tensor]], message: str) -> None:
    (q, k, v, _, _), sel = make(CASES["full"], torch.float32)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*change(q, k, v), sel)


def test_other_refusals() -> None:
    (q, k, v, _, _), sel = make(CASES["full"], torch.float32)
    with pytest.raises(ValueError, match="scale must be finite and > 0, got 0"):
        block_sparse_attention(q, k, v, sel, scale=0)
    with pytest.raises(ValueError, match="sel must be on cpu as q, got meta"):
        block_sparse_attention(q, k, v, sel.to("meta"))
    with pytest.raises(ValueError, match="layout must be 'bhsd' or 'bshd', got 'sbhd'"):
        bsa_3d(q, k, v, (4, 4, 8), layout="sbhd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"block_q must be three positive ints"):
        bsa_3d(q, k, v, (4, 4, 8), block_q=(4, 4))
    with pytest.raises(ValueError, match=r"v must have 4 dimensions"):
        bsa_3d(q, k, v[0], (4, 4, 8), layout="bshd")
