"""The Triton kernels that choose key blocks and invert a selection, run by Triton's interpreter, against loops."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU here: these are the interpreter's tests", allow_module_level=True)

from lcv_bsa.backends.triton import inverse, selecting
from lcv_bsa.backends.triton.backward import longest_keys_first
from lcv_bsa.layout import BlockLayout, to_blocks, token_counts
from lcv_bsa.precision import true_fp32
from lcv_bsa.selection import BlockSelection
from lcv_bsa.testing import random_selection

LARGEST = torch.finfo(torch.float32).max


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def naive_top_k(scores: Tensor, count: int) -> list[list[int]]:
    """Ascending ids of the largest of each row; NaN with -inf; ties to the lower id."""
    rows = scores.nan_to_num(-LARGEST, LARGEST, -LARGEST).tolist()
    return [sorted(sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:count]) for row in rows]


def whole_numbers(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: their sums, means over powers of two and products are exact in any order."""
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def naive_means(x: Tensor, layout: BlockLayout) -> Tensor:
    """fp64 block means."""
    return to_blocks(x.double(), layout).sum(3) / token_counts(layout, x.device)[:, None]


def draw_scores(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    scores = torch.randn(shape, generator=generator)
    if kind == "ties":
        return scores.mul(2).round()
    if kind == "specials":
        values = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, LARGEST, -LARGEST, 1e-45, -1e-45, 1.0]
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]
    if kind == "zeros":
        return torch.where(scores > 0, 0.0, -0.0)
    if kind == "neighbours":  # one bit apart
        return (torch.arange(shape[1]) % 7 + 0x3F800000).to(torch.int32).view(torch.float32).expand(shape).contiguous()
    return scores


@pytest.mark.parametrize("kind", ["normal", "ties", "specials", "zeros", "neighbours"])
@pytest.mark.parametrize(("num_k", "count"), [(1, 1), (8, 8), (37, 11), (100, 99)])
def test_top_k(generator: torch.Generator, kind: str, num_k: int, count: int) -> None:
    scores = draw_scores(kind, (3, num_k), generator)
    indices = torch.full((3, count), -1, dtype=torch.int32)
    selecting.top_k_ids(scores, indices)
    assert indices.tolist() == naive_top_k(scores, count)


def test_top_k_of_a_long_row(generator: torch.Generator) -> None:
    """2640 key blocks, as at 720p, a row of 4096 to the kernel."""
    scores = torch.randn(2, 2640, generator=generator)
    indices = torch.full((2, 165), -1, dtype=torch.int32)
    selecting.top_k_ids(scores, indices)
    assert indices.tolist() == naive_top_k(scores, 165)


@pytest.mark.parametrize(("grid", "block"), [((4, 4, 8), (4, 4, 4)), ((3, 3, 4), (2, 2, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_block_means(
    generator: torch.Generator, grid: tuple[int, int, int], block: tuple[int, int, int], dtype: torch.dtype
) -> None:
    layout = BlockLayout(grid, block)
    x = torch.randn(2, layout.num_tokens, 1, 24, generator=generator).to(dtype).transpose(1, 2)
    means = selecting.block_means(x, layout)
    assert means.dtype == torch.float32
    assert (means - naive_means(x, layout)).abs().max() <= 3e-7


def test_block_means_of_any_strides_and_many_tiles(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout((4, 4, 4), (4, 4, 2))
    x = torch.randn(24, 64, 2, 1, generator=generator).permute(3, 2, 1, 0)  # channels slowest
    whole = selecting.block_means(x, layout)
    monkeypatch.setattr(selecting, "_MEANS_TILE", 32 * 4)  # four slots at a time
    for means in (whole, selecting.block_means(x, layout)):
        assert (means - naive_means(x, layout)).abs().max() <= 3e-7


def test_block_means_past_two_billion_elements() -> None:
    """The third head lies 2**31 elements after the first: addresses are 64-bit. Untouched memory costs nothing."""
    layout, step = BlockLayout((2, 2, 2), (2, 2, 2)), 2**30
    memory = torch.empty(2 * step + 128, dtype=torch.float16)
    for head in range(3):
        memory[head * step : head * step + 128] = head
    x = memory.as_strided((1, 3, 8, 16), (0, step, 16, 1))
    assert selecting.block_means(x, layout)[0, :, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_select_agrees_with_loops(generator: torch.Generator, dtype: torch.dtype) -> None:
    """Whole numbers, so that equal scores tie exactly; two query heads to a key head; grids and blocks of their own."""
    layout_q, layout_k = BlockLayout((1, 4, 2), (1, 2, 2)), BlockLayout((3, 4, 2), (2, 2, 2))
    q = whole_numbers(generator, (2, 2, 8, 8), dtype)
    k = whole_numbers(generator, (2, 1, 24, 8), dtype)
    selection = selecting.triton_select(q, k, layout_q, layout_k, least=2)
    scores = naive_means(q, layout_q) @ naive_means(k, layout_k).mT  # [2, 2, 2, 4]
    assert selection.indices.flatten(0, 2).tolist() == naive_top_k(scores.flatten(0, 2), 2)
    assert (selection.counts == 2).all()
    assert selection.uniform
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert (selection.layout_q, selection.layout_k) == (layout_q, layout_k)


@pytest.mark.parametrize("scores_at_once", [1 << 23, 4 * 6 * 2, 4 * 6, 3 * 6, 1])
def test_slices_of_scores(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, scores_at_once: int) -> None:
    """All heads at once, two, one, three rows of one, one row."""
    monkeypatch.setattr(selecting, "_SCORES_AT_ONCE", scores_at_once)
    mean_q, mean_k = whole_numbers(generator, (3, 4, 8)), whole_numbers(generator, (3, 6, 8))
    indices = torch.full((3, 4, 2), -1, dtype=torch.int32)
    selecting._select_rows(mean_q, mean_k, indices)
    assert indices.flatten(0, 1).tolist() == naive_top_k((mean_q @ mean_k.mT).flatten(0, 1), 2)


def test_select_writes_every_entry_and_the_same_twice(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = BlockLayout((1, 4, 5), (1, 2, 2))
    q, k = torch.randn(2, 1, 1, 20, 16, generator=generator)
    first = selecting.triton_select(q, k, layout, layout, least=5)
    empty = torch.empty
    fill = {torch.int32: -1, torch.float32: float("nan")}
    monkeypatch.setattr(torch, "empty", lambda *s, dtype, **o: empty(*s, dtype=dtype, **o).fill_(fill[dtype]))
    second = selecting.triton_select(q, k, layout, layout, least=5)
    assert torch.equal(first.indices, second.indices)


def test_select_leaves_autocast_and_gradients_out(generator: torch.Generator) -> None:
    layout = BlockLayout((1, 4, 4), (1, 2, 2))
    q, k = torch.randn(2, 1, 1, 16, 16, generator=generator)
    expected = selecting.triton_select(q, k, layout, layout, least=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = selecting.triton_select(q.requires_grad_(), k.requires_grad_(), layout, layout, least=2)
    assert torch.equal(got.indices, expected.indices)


def test_tf32_is_off_for_scores_alone() -> None:
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision to look at; it has from 2.9")
    try:
        torch.set_float32_matmul_precision("high")
        with true_fp32(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 8, 16)
    assert selecting.refusal(q) is None
    assert "got torch.float64" in (selecting.refusal(q.double()) or "")
    assert "no bf16" in (selecting.refusal(q.bfloat16()) or "")
    monkeypatch.setattr(selecting, "interpreted", lambda: False)
    assert "needs a GPU" in (selecting.refusal(q) or "")


def naive_inverse(selection: BlockSelection) -> tuple[list[list[int]], list[int]]:
    """Offsets of each head, and rows."""
    indices, counts = selection.indices.flatten(0, 1).tolist(), selection.counts.flatten(0, 1).tolist()
    offsets, rows = [], []
    for head, kept in zip(indices, counts):
        offsets.append([len(rows)])
        for key in range(selection.layout_k.num_blocks):
            rows += [query for query, (row, n) in enumerate(zip(head, kept)) if key in row[:n]]
            offsets[-1].append(len(rows))
    return offsets, rows


def assert_inverse(selection: BlockSelection) -> None:
    got = inverse.inverse_selection(selection)
    offsets, rows = naive_inverse(selection)
    assert got.offsets.dtype == got.rows.dtype == torch.int32
    assert got.offsets.shape[:2] == selection.indices.shape[:2]
    assert got.offsets.flatten(0, 1).tolist() == offsets
    assert got.rows[: len(rows)].tolist() == rows
    if selection.uniform:
        assert len(got.rows) == len(rows)


@pytest.mark.parametrize("top_k", [None, 2])
def test_inverse(generator: torch.Generator, top_k: int | None) -> None:
    assert_inverse(
        random_selection((3, 2, 4), (4, 2, 3), block_q=(2, 2, 2), generator=generator, batch=2, heads=2, top_k=top_k)
    )


def test_inverse_of_many_query_blocks(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More query blocks than one word has bits and one step takes, and more ids than one step takes."""
    monkeypatch.setattr(inverse, "_QUERIES_AT_ONCE", 32)
    monkeypatch.setattr(inverse, "_IDS_AT_ONCE", 2)
    assert_inverse(random_selection((5, 4, 2), (1, 1, 4), block_q=(1, 1, 1), block_k=(1, 1, 1), generator=generator))


def test_inverse_of_rows_that_keep_nothing(generator: torch.Generator) -> None:
    """As ring attention makes them; whatever their entries hold does not count."""
    selection = random_selection((2, 4, 4), block_q=(2, 2, 2), generator=generator, top_k=2)
    counts = torch.tensor([0, 2, 1, 0], dtype=torch.int32).view(1, 1, 4)
    assert_inverse(replace(selection, counts=counts, uniform=False))
    assert_inverse(replace(selection, counts=torch.zeros_like(counts), uniform=False))


def test_inverse_refuses_more_pairs_than_offsets_can_count(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = random_selection((2, 4, 4), block_q=(2, 2, 2), generator=generator, top_k=2)
    monkeypatch.setattr(inverse, "_MOST_PAIRS", 7)
    with pytest.raises(ValueError, match=r"up to 7 kept pairs, got 8"):
        inverse.inverse_selection(selection)
    fewer = torch.tensor([1, 2, 1, 2], dtype=torch.int32).view(1, 1, 4)
    assert_inverse(replace(selection, counts=fewer, uniform=False))


def test_longest_keys_first(generator: torch.Generator) -> None:
    pairs = torch.randint(0, 40, (2, 3, 50), generator=generator)
    pairs[0, 0, :6] = torch.tensor([0, 1, 2, 3, 4, 1023])
    ends = pairs.flatten().cumsum(0).view(2, 3, 50)
    offsets = torch.cat([ends[..., :1] - pairs[..., :1], ends], -1).to(torch.int32)
    expected = [
        sorted(range(50), key=lambda j, row=row: (-row[j].bit_length(), j)) for row in pairs.flatten(0, 1).tolist()
    ]
    order = longest_keys_first(offsets, 3)
    assert order.dtype == torch.int32
    assert order.flatten(0, 1).tolist() == expected
