"""Raster order against block order, by the formula of each token's block and slot."""

from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcv_bsa.layout import (
    BlockLayout,
    Triple,
    block_means,
    block_order,
    from_blocks,
    slot_mask,
    to_blocks,
    token_blocks,
    token_counts,
)

CPU = torch.device("cpu")
triples = st.tuples(*[st.integers(1, 9)] * 3)
blocks = st.tuples(*[st.integers(1, 5)] * 3)


def places(layout: BlockLayout) -> list[tuple[int, int]]:
    """(block, slot) of each token in raster order, one token at a time."""
    (T, H, W), (t, h, w) = layout.grid, layout.block
    rows, columns = (H + h - 1) // h, (W + w - 1) // w
    return [
        (((a // t) * rows + b // h) * columns + c // w, ((a % t) * h + b % h) * w + c % w)
        for a, b, c in product(range(T), range(H), range(W))
    ]


@settings(max_examples=60, deadline=None)
@given(triples, blocks)
@example((6, 7, 9), (4, 4, 4))
@example((1, 1, 1), (4, 4, 4))
@example((1, 1, 1), (1, 1, 1))
@example((8, 4, 8), (4, 4, 4))
def test_every_token_lies_where_the_formula_says(grid: Triple, block: Triple) -> None:
    layout = BlockLayout(grid, block)
    expected = places(layout)
    x = torch.arange(1, layout.num_tokens + 1, dtype=torch.float32).view(1, 1, -1, 1)
    y = to_blocks(x, layout)

    found = {(i, j): int(y[0, 0, i, j, 0]) for i, j in product(range(layout.num_blocks), range(layout.block_size))}
    assert {place: value for place, value in found.items() if value} == {p: n + 1 for n, p in enumerate(expected)}
    assert torch.equal(from_blocks(y, layout), x)
    assert torch.equal(slot_mask(layout, CPU), y[0, 0, :, :, 0] > 0)
    assert token_blocks(layout, CPU).tolist() == [i for i, _ in expected]
    assert token_counts(layout, CPU).tolist() == [sum(i == b for b, _ in expected) for i in range(layout.num_blocks)]


@settings(max_examples=60, deadline=None)
@given(triples, blocks)
@example((6, 7, 9), (4, 4, 4))
@example((1, 1, 1), (4, 4, 4))
def test_block_order_sorts_by_block_then_slot(grid: Triple, block: Triple) -> None:
    layout = BlockLayout(grid, block)
    expected = places(layout)
    order = block_order(layout, CPU)
    assert [expected[i] for i in order.tolist()] == sorted(expected)
    assert sorted(order.tolist()) == list(range(layout.num_tokens))


@pytest.mark.parametrize(("dtype", "statistics"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_means_are_over_real_tokens_in_high_precision(dtype: torch.dtype, statistics: torch.dtype) -> None:
    layout = BlockLayout((5, 6, 7), (4, 4, 4))
    x = (torch.randn(2, 3, layout.num_tokens, 8, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    means = block_means(x, layout)
    assert means.dtype == statistics
    which = token_blocks(layout, CPU)
    for i in range(layout.num_blocks):
        torch.testing.assert_close(means[:, :, i], x[:, :, which == i].to(statistics).mean(2))


def test_blocks_of_a_strided_view_and_their_gradient() -> None:
    layout = BlockLayout((3, 5, 4), (2, 4, 4))
    x = torch.randn(2, layout.num_tokens, 3, 6, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        return from_blocks(to_blocks(x.transpose(1, 2), layout) * 3, layout)

    assert torch.equal(there_and_back(x), x.transpose(1, 2) * 3)
    assert torch.equal(torch.autograd.grad(there_and_back(x).sum(), x)[0], torch.full_like(x, 3))


def test_a_cached_index_made_in_inference_mode_serves_training() -> None:
    layout = BlockLayout((3, 3, 5), (2, 2, 2))
    with torch.inference_mode():
        indices = [f(layout, CPU) for f in (block_order, token_blocks, token_counts, slot_mask)]
    assert not any(index.is_inference() for index in indices)
    x = torch.ones(layout.num_tokens, requires_grad=True)
    x[block_order(layout, CPU)].square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("grid", [(4, 4), (0, 4, 4), (4, -1, 4), (4, 4, 4.0), 4])
def test_a_bad_grid_is_named(grid: object) -> None:
    with pytest.raises(ValueError, match=r"grid must be three positive ints"):
        BlockLayout(grid, (4, 4, 4))  # type: ignore[arg-type]
