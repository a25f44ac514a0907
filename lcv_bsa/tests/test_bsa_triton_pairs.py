"""Two query blocks per program: the merged lists against Python sets, the kernel against the fp64 reference."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

from lcv_bsa.backends.triton import pairs
from lcv_bsa.reference import reference_attention
from lcv_bsa.selection import BlockSelection
from lcv_bsa.testing import random_qkv, random_selection

Triple = tuple[int, int, int]
SCALE = 0.11


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def with_counts(selection: BlockSelection, counts: torch.Tensor) -> BlockSelection:
    return BlockSelection(
        selection.indices, counts, selection.grid_q, selection.grid_k, selection.block_q, selection.block_k
    )


@pytest.mark.parametrize("grid", [(4, 12, 20), (4, 12, 24)], ids=["odd", "even"])
@pytest.mark.parametrize("top_k", [None, 1, 7])
def test_lists_are_merged(grid: Triple, top_k: int | None) -> None:
    selection = random_selection(grid, generator=seeded(), batch=2, heads=3, top_k=top_k)
    counts = selection.counts.clone()
    counts[0, 0, 1] = counts[0, 1, 2] = counts[0, 1, 3] = 0
    selection = with_counts(selection, counts)
    union, numbers = pairs.pair_lists(selection)
    blocks = selection.layout_q.num_blocks
    for b, h, pair in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange((blocks + 1) // 2)).tolist():
        kept: dict[int, int] = {}
        for half in range(min(2, blocks - 2 * pair)):
            row = selection.indices[b, h, 2 * pair + half]
            for i in row[: counts[b, h, 2 * pair + half]].tolist():
                kept[i] = kept.get(i, 0) + half + 1
        expected = [i * 4 + bits for i, bits in sorted(kept.items())]
        assert numbers[b, h, pair] == len(expected)
        assert union[b, h, pair].tolist() == expected + [0] * (union.shape[-1] - len(expected))


CASES = {
    "odd number of partial blocks": {"grid": (2, 9, 4)},
    "larger key blocks": {"grid": (4, 5, 8), "block_k": (4, 8, 4)},
    "fp16": {"grid": (2, 6, 8), "dtype": torch.float16, "most": 1e-3},
    "large logits": {"grid": (2, 6, 8), "std": 256.0, "most": 1e-4},
}


@pytest.mark.parametrize("case", CASES)
def test_values(case: str) -> None:
    check(**CASES[case])


def check(
    grid: Triple, *, block_k: Triple | None = None, dtype: torch.dtype = torch.float32, most: float = 1e-5,
    std: float = 0.6,
) -> None:  # fmt: skip
    q, k, v = random_qkv(grid, generator=seeded(), heads=2, kv_heads=1, head_dim=32, dtype=dtype)
    q = q * (std / (SCALE * 32**0.5))
    selection = random_selection(grid, generator=seeded(), heads=2, block_q=(2, 4, 4), block_k=block_k)
    exact = reference_attention(q.double(), k.double(), v.double(), selection, scale=SCALE)
    for found, truth in zip(pairs.forward(q, k, v, selection, SCALE), exact):
        assert (found.double() - truth).abs().max() <= most * truth.abs().max()


def test_rows_without_keys_and_token_major_memory() -> None:
    """Block 1 keeps nothing, its neighbour 0 keeps what it kept; [B, S, H, D] in gives [B, S, H, D] out."""
    grid = (2, 4, 12)
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in random_qkv(grid, generator=seeded(), batch=2, heads=2, head_dim=32)
    )
    selection = random_selection(grid, generator=seeded(), block_q=(2, 4, 4), batch=2, heads=2, top_k=2)
    counts = selection.counts.clone()
    counts[:, :, 1] = 0
    o, lse = pairs.forward(q, k, v, with_counts(selection, counts), SCALE)
    exact_o, exact_lse = reference_attention(q.double(), k.double(), v.double(), selection, scale=SCALE)
    empty = torch.zeros(grid, dtype=torch.bool)
    empty[:, :, 4:8] = True
    empty = empty.flatten()
    assert (o[:, :, empty] == 0).all() and (lse[:, :, empty] == -torch.inf).all()
    assert (o - exact_o)[:, :, ~empty].abs().max() <= 1e-5 and (lse - exact_lse)[:, :, ~empty].abs().max() <= 1e-5
    assert o.transpose(1, 2).is_contiguous()


def test_refusals() -> None:
    q, k, v = random_qkv((4, 8, 8), generator=seeded(), head_dim=32)
    small, large = (random_selection((4, 8, 8), generator=seeded(), block_q=b) for b in ((4, 4, 4), (4, 8, 4)))
    assert pairs.refusal(q, k, v, small) is None
    assert "up to 64 tokens and head dims up to 128, got 128 and 32" in (pairs.refusal(q, k, v, large) or "")
