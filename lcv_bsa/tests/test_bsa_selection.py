"""Selection against a loop over scores in double precision, and against its own other forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lcv_bsa.choosing as choosing
from lcv_bsa import BlockLayout, BlockSelection, select_blocks
from lcv_bsa.choosing import kept_blocks
from lcv_bsa.layout import token_blocks
from lcv_bsa.testing import random_qkv, random_selection

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_scores(q: Tensor, k: Tensor, layout_q: BlockLayout, layout_k: BlockLayout) -> Tensor:
    """[B, H, Nq, Nk] from one mean and one dot product at a time."""
    B, H, G = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    of_q, of_k = token_blocks(layout_q, CPU), token_blocks(layout_k, CPU)
    scores = torch.empty(B, H, layout_q.num_blocks, layout_k.num_blocks, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(layout_q.num_blocks):
                for j in range(layout_k.num_blocks):
                    mean_q = q[b, h, of_q == i].double().mean(0)
                    mean_k = k[b, h // G, of_k == j].double().mean(0)
                    scores[b, h, i, j] = mean_q.dot(mean_k)
    return scores


def naive_rows(scores: Tensor, least: int, threshold: float | None, scale: float) -> list[list[int]]:
    """The kept ids of each row, ascending."""
    kept = []
    for row in scores.flatten(0, 2).tolist():
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        weights = [math.exp((row[j] - row[order[0]]) * scale) for j in order]
        count, total = 0, 0.0
        for weight in weights:
            total += weight / sum(weights)
            count += threshold is not None and total <= threshold
        kept.append(sorted(order[: max(count, least)]))
    return kept


def rows_of(sel: BlockSelection) -> list[list[int]]:
    """The valid entries of each row."""
    return [r[:n] for r, n in zip(sel.indices.flatten(0, 2).tolist(), sel.counts.flatten().tolist())]


@pytest.mark.parametrize(
    ("given_counts", "least", "threshold"),
    [
        ({"top_k": 3}, 3, None),
        ({"keep": 0.26}, 2, None),
        ({"top_k": 2, "keep": 0.5}, 4, None),
        ({"top_k": 5, "keep": 0.5}, 5, None),
        ({"keep": 0.01}, 1, None),
        ({"keep": 0.01, "min_blocks": 3}, 3, None),
        ({"top_k": 8, "min_blocks": 99}, 8, None),
        ({"cdf_threshold": 0.6}, 1, 0.6),
        ({"cdf_threshold": 0.01}, 1, 0.01),
        ({"cdf_threshold": 0.01, "min_blocks": 2}, 2, 0.01),
        ({"cdf_threshold": 0.7, "keep": 0.5}, 4, 0.7),
        ({"cdf_threshold": 1.0}, 8, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_select_agrees_with_loops(
    given_counts: dict[str, float], least: int, threshold: float | None, dtype: torch.dtype
) -> None:
    grid_q, grid_k, block_q, block_k = (3, 5, 4), (7, 4, 6), (4, 4, 4), (2, 4, 4)
    layout_q, layout_k = BlockLayout(grid_q, block_q), BlockLayout(grid_k, block_k)
    q, k, _ = random_qkv(grid_q, grid_k, generator=seeded(), batch=2, heads=4, kv_heads=2, head_dim=8, dtype=dtype)
    sel = select_blocks(q * 3, k * 3, grid_q, grid_k, block_q, block_k=block_k, scale=0.9, **given_counts)  # type: ignore[arg-type]
    scores = naive_scores(q * 3, k * 3, layout_q, layout_k)
    assert rows_of(sel) == naive_rows(scores, least, threshold, 0.9)


def test_slices_of_rows_join_to_the_same_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (8, 8, 8)
    q, k, _ = random_qkv(grid, generator=seeded(), heads=2)
    whole = select_blocks(q, k, grid, grid, (2, 2, 4), cdf_threshold=0.5, top_k=2)
    monkeypatch.setattr(choosing, "_SCORES_AT_ONCE", 3 * 2 * 32)
    parts = select_blocks(q, k, grid, grid, (2, 2, 4), cdf_threshold=0.5, top_k=2)
    assert whole.counts.unique().numel() > 1
    assert torch.equal(whole.indices, parts.indices) and torch.equal(whole.counts, parts.counts)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(["keep", "sparsity"]))
@settings(max_examples=300, deadline=None)
def test_kept_blocks_is_exact_where_the_share_is_a_fraction(num_blocks: int, part: int, way: str) -> None:
    part = min(part, num_blocks)
    share = part / num_blocks if way == "keep" else 1 - (num_blocks - part) / num_blocks
    assert kept_blocks(share, num_blocks) == part


@pytest.mark.parametrize(
    ("keep", "num_blocks", "expected"),
    [(1 - 0.9, 10, 1), (0.0625, 2640, 165), (0.0625, 1320, 82), (1 - 0.9375, 624, 39), (0.0625, 15, 0), (1.0, 7, 7)],
)
def test_kept_blocks_at_the_models_shapes(keep: float, num_blocks: int, expected: int) -> None:
    assert kept_blocks(keep, num_blocks) == expected


@pytest.mark.parametrize("cdf_threshold", [None, 0.52])
def test_ties_go_to_the_lower_block(cdf_threshold: float | None) -> None:
    grid = (2, 2, 32)
    q = torch.ones(1, 1, 128, 4)
    k = torch.ones(1, 1, 128, 4)
    k.view(2, 2, 32, 4)[:, :, 20:22] = 2  # block 10 stands out, all others tie
    sel = select_blocks(q, k, grid, grid, (2, 2, 2), top_k=4, cdf_threshold=cdf_threshold, scale=1e-6)
    count = 4 if cdf_threshold is None else 8
    expected = [*range(count - 1), 10]
    assert rows_of(sel) == [expected] * 16


@pytest.mark.parametrize("cdf_threshold", [None, 0.7])
def test_nan_and_inf_scores_rank_and_do_not_crash(cdf_threshold: float | None) -> None:
    grid = (1, 1, 6)
    q = torch.ones(1, 1, 6, 1)
    k = torch.tensor([torch.nan, 1.0, torch.inf, 2.0, -torch.inf, 0.5]).view(1, 1, 6, 1)
    sel = select_blocks(q, k, grid, grid, (1, 1, 1), top_k=3, cdf_threshold=cdf_threshold)
    assert rows_of(sel) == [[1, 2, 3]] * 6
    broken = select_blocks(q * torch.nan, k, grid, grid, (1, 1, 1), top_k=3, cdf_threshold=cdf_threshold)
    assert all(row == sorted(set(row)) and 3 <= len(row) <= 6 for row in rows_of(broken))


def test_close_bf16_scores_are_told_apart_under_autocast() -> None:
    grid = (1, 1, 64)
    q = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)
    k = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)
    k[0, 0, 41, 3] = 1 + 2**-7  # moves a score of 8 by 2**-7; bf16 steps are 2**-4 there
    with torch.autocast("cpu", torch.bfloat16):
        sel = select_blocks(q, k, grid, grid, (1, 1, 1), top_k=1)
    assert rows_of(sel) == [[41]] * 64


def test_nothing_is_differentiated() -> None:
    q, k, _ = (x.requires_grad_() for x in random_qkv((4, 4, 4), generator=seeded()))
    sel = select_blocks(q, k, (4, 4, 4), (4, 4, 4), (2, 2, 2), top_k=2)
    assert not sel.indices.requires_grad and sel.indices.dtype == sel.counts.dtype == torch.int32


def test_mask_and_indices_are_inverse_and_padding_repeats_the_last() -> None:
    sel = random_selection((4, 5, 6), (6, 4, 4), generator=seeded(), block_q=(2, 2, 2), batch=2, heads=3)
    assert sel.counts.unique().numel() > 1
    mask = sel.to_mask()
    assert torch.equal(mask.sum(-1, dtype=torch.int32), sel.counts)
    for row, kept, count in zip(sel.indices.flatten(0, 2), mask.flatten(0, 2), sel.counts.flatten()):
        ids = kept.nonzero().flatten()
        assert row[:count].tolist() == ids.tolist()
        assert (row[count:] == ids[-1]).all()
    places = {"grid_q": sel.grid_q, "grid_k": sel.grid_k, "block_q": sel.block_q, "block_k": sel.block_k}
    assert sel.density == pytest.approx(mask.double().mean().item())
    wild = sel.indices.long().clone()
    wild[torch.arange(wild.shape[-1]) >= sel.counts[..., None]] = -7
    for other in (BlockSelection.from_mask(mask, **places), BlockSelection.from_indices(wild, sel.counts, **places)):
        assert torch.equal(other.indices, sel.indices) and torch.equal(other.counts, sel.counts)
        assert not other.uniform


def test_uniform_is_known_when_counts_are_not_given() -> None:
    indices = torch.tensor([0, 2]).expand(1, 1, 8, 2)
    sel = BlockSelection.from_indices(indices, grid_q=(2, 2, 2), grid_k=(2, 2, 1), block_q=(1, 1, 1))
    assert sel.uniform and (sel.counts == 2).all()
    assert sel.to("cpu").uniform


@pytest.mark.parametrize("top_k", [None, 3])
def test_inverse_lists_the_query_blocks_of_each_key_block(top_k: int | None) -> None:
    sel = random_selection((4, 5, 6), (6, 4, 4), generator=seeded(), block_q=(2, 2, 2), batch=2, heads=3, top_k=top_k)
    inverse, mask = sel.inverse(), sel.to_mask()
    assert inverse.offsets.dtype == inverse.rows.dtype == torch.int32
    assert inverse.offsets[0, 0, 0] == 0 and inverse.offsets[-1, -1, -1] == len(inverse.rows)
    for b in range(2):
        for h in range(3):
            for j in range(sel.layout_k.num_blocks):
                start, end = inverse.offsets[b, h, j : j + 2].tolist()
                assert inverse.rows[start:end].tolist() == mask[b, h, :, j].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("indices", "counts", "message"),
    [
        ([[0, 4]], [2], r"indices must be 0..3 \(the key blocks\), got 0..4"),
        ([[-1, 2]], [2], r"indices must be 0..3 \(the key blocks\), got -1..2"),
        ([[2**32, 2**32 + 1]], [2], r"indices must be 0..3 .*, got 4294967296"),
        ([[2, 1]], [2], r"unsorted or repeated"),
        ([[2, 2]], [2], r"unsorted or repeated"),
        ([[2, 3]], [0], r"counts must be 1..2 \(K\), got 0..0"),
        ([[2, 3]], [3], r"counts must be 1..2 \(K\), got 3..3"),
        ([[0, 1, 2, 3, 3]], [4], r"K must be 1..4 \(the key blocks\), got 5"),
        ([[0, 1], [0, 1]], [2, 2], r"indices must be \[B, H, Nq, K\] with Nq = 1, got \[1, 1, 2, 2\]"),
        ([[0, 1]], [2, 2], r"counts must be \[B, H, Nq\] = \[1, 1, 1\], got \[1, 1, 2\]"),
        ([[0.0, 1.0]], [2], r"indices must be integers \[B, H, Nq, K\], got torch.float32"),
        ([[0, 1]], [2.0], r"counts must be integers, got torch.float32"),
    ],
)
def test_from_indices_refuses(indices: list[list[int]], counts: list[int], message: str) -> None:
    given_indices, given_counts = torch.tensor(indices)[None, None], torch.tensor(counts)[None, None]
    with pytest.raises(ValueError, match=message):
        BlockSelection.from_indices(given_indices, given_counts, grid_q=(1, 1, 1), grid_k=(1, 2, 2), block_q=(1, 1, 1))


def test_from_mask_refuses() -> None:
    mask = torch.tensor([[True, False], [False, False]])[None, None]
    with pytest.raises(ValueError, match="at least one key block per query block"):
        BlockSelection.from_mask(mask, grid_q=(1, 1, 2), grid_k=(1, 1, 2), block_q=(1, 1, 1))
    with pytest.raises(ValueError, match=r"mask must be bool \[B, H, 2, 3\], got torch.bool \[1, 1, 2, 2\]"):
        BlockSelection.from_mask(mask, grid_q=(1, 1, 2), grid_k=(1, 1, 3), block_q=(1, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0; keep is 1 - sparsity"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\], got 1.5"),
        ({"keep": math.nan}, r"keep must be in \(0, 1\], got nan"),
        ({"keep": None}, r"one of top_k, keep and cdf_threshold must be given"),
        ({"cdf_threshold": 1.1}, r"cdf_threshold must be in \(0, 1\], got 1.1"),
        ({"top_k": 0}, r"top_k must be an int >= 1, got 0"),
        ({"top_k": 2.0}, r"top_k must be an int >= 1, got 2.0"),
        ({"top_k": 2}, r"top_k must be 1..1 \(the key blocks\), got 2"),
        ({"min_blocks": 0}, r"min_blocks must be an int >= 1, got 0"),
        ({"scale": math.inf}, r"scale must be finite and > 0, got inf"),
        ({"scale": -1.0}, r"scale must be finite and > 0, got -1.0"),
        ({"block": (4, 4)}, r"block must be three positive ints \(T, H, W\), got \(4, 4\)"),
        ({"block_k": (4, 0, 4)}, r"block_k must be three positive ints"),
        ({"grid_q": (2, 2, 3)}, r"q must have 2\*2\*3 = 12 tokens, got 8"),
        ({"grid_k": (2, 1, 2)}, r"k must have 2\*1\*2 = 4 tokens, got 8"),
    ],
)
def test_select_refuses(change: dict[str, object], message: str) -> None:
    q, k, _ = random_qkv((2, 2, 2), generator=seeded())
    arguments: dict[str, object] = {"grid_q": (2, 2, 2), "grid_k": (2, 2, 2), "keep": 0.5}
    with pytest.raises(ValueError, match=message):
        select_blocks(q, k, **(arguments | change))  # type: ignore[arg-type]


def test_selection_backends_by_name() -> None:
    grid = (4, 4, 8)
    q, k, _ = random_qkv(grid, generator=seeded(), dtype=torch.float64)
    same = [select_blocks(q, k, grid, grid, top_k=1, backend=name).indices for name in ("auto", "torch")]  # type: ignore[arg-type]
    assert torch.equal(*same)
    with pytest.raises(ValueError, match="backend of a selection must be one of auto, torch, triton, got 'cpu'"):
        select_blocks(q, k, grid, grid, top_k=1, backend="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot select here: it has no cdf_threshold; available: auto, torch"):
        select_blocks(q, k, grid, grid, cdf_threshold=0.5, backend="triton")
    with pytest.raises(ValueError, match=r"cannot select here: it (takes fp16, bf16 and fp32|needs Triton)"):
        select_blocks(q, k, grid, grid, top_k=1, backend="triton")
