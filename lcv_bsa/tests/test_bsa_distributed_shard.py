"""Who holds which tokens and which key blocks, against loops. One process."""

import pytest
import torch
from bsa_distributed_cases import CASES, placed_by_loop

from lcv_bsa.distributed import Shard
from lcv_bsa.distributed.owners import split_by_owner
from lcv_bsa.layout import BlockLayout, token_blocks


@pytest.mark.parametrize("axis", ["T", "H", "W"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_shard_against_loops(num_ranks: int, axis: str) -> None:
    shard = Shard((7, 9, 10), (2, 4, 3), num_ranks, axis)
    token = torch.arange(7 * 9 * 10).view(1, 1, -1)
    slabs = [shard.cut(token, rank) for rank in range(num_ranks)]
    assert torch.equal(placed_by_loop(slabs, shard), token)
    assert torch.equal(shard.join(slabs), token)
    sizes = [stop - start for start, stop in map(shard.span, range(num_ranks))]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    cpu = torch.device("cpu")
    for rank, slab in enumerate(slabs):
        of_whole = token_blocks(BlockLayout(shard.grid, shard.block), cpu)[slab.flatten()]
        owner, local = shard.locate(of_whole.to(torch.int32))
        assert (owner == rank).all()
        assert torch.equal(local.long(), token_blocks(shard.local(rank), cpu))


def test_the_axis_with_most_blocks_is_cut() -> None:
    assert Shard((8, 30, 52), (4, 4, 4), 2).axis == "W"
    assert Shard((8, 30, 52), (4, 4, 16), 2).axis == "H"
    assert Shard((8, 8, 8), (4, 4, 4), 2).axis == "T"


def test_a_shard_refuses() -> None:
    with pytest.raises(ValueError, match=r"num_ranks must be 1\.\.2 \(the blocks along axis T\), got 3"):
        Shard((8, 30, 52), (4, 4, 4), 3, "T")
    with pytest.raises(ValueError, match=r"axis must be 'T', 'H', 'W' or None, got 'D'"):
        Shard((8, 30, 52), (4, 4, 4), 3, "D")
    with pytest.raises(ValueError, match=r"block must be three positive ints"):
        Shard((8, 30, 52), (4, 4), 3)  # type: ignore[arg-type]


def test_split_by_owner_against_loops() -> None:
    """Every row's own ids, ascending and padded with the last; 0 where it has none; None where no row has any."""
    case = CASES["condition keys"]
    sel, shard_k = case.selection(), case.shards(3)[1]
    first_only = CASES["keys of one rank"]
    parts = split_by_owner(first_only.selection(), first_only.shards(3)[1])
    assert [part is None for part in parts] == [False, True, True]
    owner, local = (x.tolist() for x in shard_k.locate(torch.arange(sel.layout_k.num_blocks, dtype=torch.int32)))
    for rank, part in enumerate(split_by_owner(sel, shard_k)):
        assert part is not None and part.layout_k == shard_k.local(rank)
        rows = zip(sel.indices.flatten(0, 2).tolist(), sel.counts.flatten().tolist())
        own = [[local[i] for i in ids[:count] if owner[i] == rank] for ids, count in rows]
        width = max(map(len, own))
        assert part.counts.flatten().tolist() == [len(ids) for ids in own]
        assert part.indices.flatten(0, 2).tolist() == [ids + (ids or [0])[-1:] * (width - len(ids)) for ids in own]
