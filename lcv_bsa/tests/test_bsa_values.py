"""The backends that a CPU runs at full speed: real grids, drawn shapes, logits of any size, outputs made of NaN."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcv_bsa import BlockSelection, block_sparse_attention, reference_attention, select_blocks
from lcv_bsa.layout import token_blocks
from lcv_bsa.testing import Results, largest_errors, random_qkv, random_selection, run_with_gradients


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attend(sel: BlockSelection, **options: float) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, v: block_sparse_attention(q, k, v, sel, backend="cpu", return_lse=True, **options)


def both(q: Tensor, k: Tensor, v: Tensor, sel: BlockSelection, scale: float) -> tuple[Results, Results]:
    do, dlse = torch.randn(q.shape, generator=seeded(1)).to(q.dtype), torch.randn(q.shape[:3], generator=seeded(2))
    exact = run_with_gradients(
        lambda *x: reference_attention(*x, sel, scale=scale), *(x.double() for x in (q, k, v, do)), dlse
    )
    return run_with_gradients(attend(sel, scale=scale), q, k, v, do, dlse), exact


axis = st.integers(1, 9)
grid = st.tuples(st.integers(1, 5), axis, axis)
block = st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3)


@given(
    grid_q=grid, grid_k=grid, block_q=block, block_k=block, batch=st.integers(1, 2), kv_heads=st.integers(1, 2),
    group=st.integers(1, 3), head_dim=st.sampled_from([1, 8, 24, 40]), seed=st.integers(0, 99),
    small=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_drawn_shapes(grid_q, grid_k, block_q, block_k, batch, kv_heads, group, head_dim, seed, small) -> None:  # type: ignore[no-untyped-def]
    sizes = {"batch": batch, "heads": kv_heads * group}
    q, k, v = random_qkv(grid_q, grid_k, generator=seeded(seed), kv_heads=kv_heads, head_dim=head_dim, **sizes)
    sel = random_selection(grid_q, grid_k, generator=seeded(seed), block_q=block_q, block_k=block_k, **sizes)
    # with the larger scale the logits may pass what their exponential alone could bear
    assert max(largest_errors(*both(q, k, v, sel, 0.3 if small else 4.0)).values()) <= 1e-5


@pytest.mark.parametrize("backend", ["cpu"])
def test_the_480p_grid(backend: str) -> None:
    """24x30x52 tokens in blocks of 4x4x4: 30 and 52 leave partial blocks. A dense reference would need 11 GB, so six
    query blocks are attended naively, one by one, and only they pass a gradient."""
    grid, scale = (24, 30, 52), 0.2
    q, k, v = (x.requires_grad_() for x in random_qkv(grid, generator=seeded(), head_dim=32))
    sel = select_blocks(q, k, grid, grid, keep=0.0625)
    assert sel.indices.shape == (1, 1, 6 * 8 * 13, 39)
    of_token = token_blocks(sel.layout_q, torch.device("cpu"))
    blocks = [0, 12, 103, 311, 520, 623]  # 12, 103 and 623 are partial
    rows = torch.cat([(of_token == i).nonzero()[:, 0] for i in blocks])
    do, dlse = torch.randn(len(rows), 32, generator=seeded(1)), torch.randn(len(rows), generator=seeded(2))

    def naive(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for i in blocks:
            keys = torch.isin(of_token, sel.indices[0, 0, i])
            logits = q[0, 0, of_token == i] @ k[0, 0, keys].mT * scale
            parts.append((logits.softmax(-1) @ v[0, 0, keys], logits.logsumexp(-1)))
        o, lse = zip(*parts)
        return torch.cat(o), torch.cat(lse)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = block_sparse_attention(q, k, v, sel, scale=scale, backend=backend, return_lse=True)
        return o[0, 0, rows], lse[0, 0, rows]

    exact = run_with_gradients(naive, q.double(), k.double(), v.double(), do.double(), dlse)
    assert max(largest_errors(run_with_gradients(ours, q, k, v, do, dlse), exact).values()) <= 1e-5


@pytest.mark.parametrize("std", [1.0, 16.0, 256.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errs_no_more_than_twice_dense_sdpa(dtype: torch.dtype, std: float) -> None:
    """Every block kept, so that SDPA computes the same; logits of that standard deviation. Norms of the errors."""
    grid, scale = (4, 8, 8), 0.11  # not a power of two: a product with it in half precision would round
    q, k, v = random_qkv(grid, generator=seeded(), heads=2, head_dim=64, dtype=dtype)
    q, k = (x * (std / (scale * 8)) ** 0.5 for x in (q, k))  # q.k of 64 channels has a deviation of 8
    assert 0.8 * std <= (q.float() @ k.float().mT * scale).std() <= 1.2 * std
    sel = random_selection(grid, generator=seeded(), heads=2, top_k=4)
    do, dlse = torch.randn(q.shape, generator=seeded(1)).to(dtype), torch.zeros(q.shape[:3])
    wide = [x.double() for x in (q, k, v, do)]
    exact = run_with_gradients(lambda *x: reference_attention(*x, sel, scale=scale), *wide, dlse)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # what scaled_dot_product_attention calls on a CPU, with the lse that it keeps for itself
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        assert torch.equal(o, F.scaled_dot_product_attention(q, k, v, scale=scale))
        return o, lse + 0 * q.sum(-1)  # it has no gradient of its own

    found, dense = (run_with_gradients(f, q, k, v, do, dlse) for f in (attend(sel, scale=scale), sdpa))
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype]
    for name, ours, theirs, truth in zip(Results._fields, found, dense, exact):
        mine, other = ((x.double() - truth).norm() for x in (ours, theirs))
        assert mine <= 2 * other + 1e-12, f"{name}: {mine:.3e} against SDPA's {other:.3e}"


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an implementation takes uninitialised holds NaN."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: object, **kwargs: object) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-(2**31))

        return poison

    q, k, v = random_qkv((6, 7, 9), generator=seeded(), heads=2, kv_heads=1)
    sel = random_selection((6, 7, 9), generator=seeded(), heads=2)
    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(new_empty))
    assert max(largest_errors(*both(q, k, v, sel, 0.3)).values()) <= 1e-5


def test_a_row_without_keys_gives_zero_and_no_gradient() -> None:
    """Only ring attention makes such rows: the keys of a step may lie on another rank."""
    grid = (4, 8, 8)
    q, k, v = random_qkv(grid, generator=seeded())
    sel = replace(random_selection(grid, generator=seeded(), top_k=2), uniform=False)
    sel.counts[0, 0, 1] = 0
    found = run_with_gradients(attend(sel), q, k, v, torch.ones_like(q), torch.zeros(q.shape[:3]))
    rows = token_blocks(sel.layout_q, torch.device("cpu")) == 1
    assert (found.o[:, :, rows] == 0).all() and (found.lse[:, :, rows] == -torch.inf).all()
    assert (found.dq[:, :, rows] == 0).all()
    kept = random_selection(grid, generator=seeded(), top_k=2)
    masked = torch.ones_like(q).masked_fill(rows[:, None], 0)
    full = run_with_gradients(attend(kept), q, k, v, masked, torch.zeros(q.shape[:3]))
    for name in ("dk", "dv"):
        torch.testing.assert_close(getattr(found, name), getattr(full, name), msg=name)
