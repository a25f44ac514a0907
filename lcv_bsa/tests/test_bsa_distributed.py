"""Rings of gloo processes against one process. The processes run once and do every case; each test reads its part."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from bsa_distributed_cases import (
    CASES,
    ONE_RANK_CASE,
    RULES,
    SELECTION_CASE,
    TRITON_CASE,
    Case,
    few_values,
    placed_by_loop,
)
from bsa_distributed_worker import NUM_PROCESSES, main
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from lcv_bsa import BlockSelection, reference_attention, select_blocks
from lcv_bsa.testing import run_with_gradients

DEADLINE_S = 120
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
RANKS = (2, 3)


class Outcome:
    """What the ranks of a mesh gave. `of` fails the test with the traceback of a rank that failed."""

    def __init__(self, folder: Path) -> None:
        self._found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_PROCESSES)]

    def of(self, num_ranks: int, name: str) -> list[Any]:
        failed = [text for found in self._found for key, text in found.items() if isinstance(text, str)]
        results = [found.get((num_ranks, name)) for found in self._found[:num_ranks]]
        if failed and any(x is None or isinstance(x, str) for x in results):
            pytest.fail("a process failed:\n" + "\n".join(failed), pytrace=False)
        return results

    def of_second_ring(self, name: str) -> list[Any]:
        """Of global ranks 2 and 3, whose ranks in their ring are 0 and 1."""
        return [found.get((2, name)) for found in self._found[2:]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("ranks")
    # the server imports torch once, each process is a fork of it
    mp.get_context("forkserver").set_forkserver_preload(["torch", "lcv_bsa.distributed"])
    started = start_processes(main, (str(folder),), NUM_PROCESSES, join=False, start_method="forkserver")
    assert started is not None
    deadline = time.monotonic() + DEADLINE_S
    while not started.join(timeout=1):
        if time.monotonic() > deadline:
            for pid in started.pids():
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"the processes took more than {DEADLINE_S} s", pytrace=False)
    return Outcome(folder)


def by_reference(selection: BlockSelection) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda q, k, v: reference_attention(q, k, v, selection)


def one_process(case: Case) -> list[Tensor]:
    """o, lse, dq, dk, dv by the reference, computed in fp64 from the case's own rounded tensors."""
    q, k, v, do, dlse = (x.double() for x in case.tensors())
    selection = case.selection()
    return list(run_with_gradients(by_reference(selection), q, k, v, do, dlse))


def joined(results: list[list[Tensor]], case: Case) -> list[Tensor]:
    shard_q, shard_k = case.shards(len(results))
    shards = (shard_q, shard_q, shard_q, shard_k, shard_k)
    return [placed_by_loop(list(slabs), shard) for slabs, shard in zip(zip(*results), shards)]


def assert_equals_one_process(results: list[list[Tensor]], case: Case) -> None:
    found, expected = joined(results, case), one_process(case)
    if case.dtype == torch.bfloat16:
        assert_as_good_as_rounding(found, expected, case)
        return
    for x, y in zip(found, expected):
        assert x.dtype == case.dtype
        torch.testing.assert_close(x.double(), y, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


def assert_as_good_as_rounding(found: list[Tensor], expected: list[Tensor], case: Case) -> None:
    """Within 2x of the error that one process makes in this dtype; lse is fp32."""
    assert [x.dtype for x in found] == [case.dtype, torch.float32, case.dtype, case.dtype, case.dtype]
    q, k, v, do, dlse = case.tensors()
    selection = case.selection()
    alone = run_with_gradients(by_reference(selection), q, k, v, do, dlse)
    for x, y, z in zip(found, alone, expected):
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-6


@pytest.mark.parametrize("way", ["ring", "ulysses"])
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(outcome: Outcome, name: str, num_ranks: int, way: str) -> None:
    """o, lse, dq, dk, dv, with gradients through both outputs."""
    assert_equals_one_process(outcome.of(num_ranks, f"{way}, {name}"), CASES[name])


@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_one_rank_is_a_mesh_too(outcome: Outcome, way: str) -> None:
    assert_equals_one_process(outcome.of(1, f"{way}, {ONE_RANK_CASE}"), CASES[ONE_RANK_CASE])


def test_ring_of_triton_kernels(outcome: Outcome) -> None:
    """They meet rows that keep none of the keys that have come."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_equals_one_process(outcome.of(3, "ring, triton"), TRITON_CASE)


@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_ranks_of_the_mesh_are_not_global_ranks(outcome: Outcome, way: str) -> None:
    name = "uneven, partial, gqa"
    outcome.of(2, f"{way}, {name}")
    assert_equals_one_process(outcome.of_second_ring(f"{way}, {name}"), CASES[name])


@pytest.mark.parametrize("values", ["real", "tied"])
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", RULES)
def test_selection_is_the_rows_of_one_process(outcome: Outcome, name: str, num_ranks: int, values: str) -> None:
    """Bit for bit where scores are exact, whatever order a product is summed in; among real ones no two are near."""
    case, rule = SELECTION_CASE, RULES[name]
    q, k, *_ = (few_values(x) if values == "tied" else x for x in case.tensors())
    alone = select_blocks(q, k, case.grid_q, case.grid_k, case.block_q, block_k=case.block_k, **rule)
    found = outcome.of(num_ranks, f"select, {name}, {values}")
    shard_q = case.shards(num_ranks)[0].of_blocks
    assert torch.equal(placed_by_loop([counts for _, counts in found], shard_q), alone.counts)
    # in cdf mode a rank's rows may be padded less far
    width = alone.indices.shape[-1]
    padded = [torch.cat([i, i[..., -1:].expand(*i.shape[:3], width - i.shape[3])], -1) for i, _ in found]
    assert torch.equal(placed_by_loop(padded, shard_q), alone.indices)
    assert alone.counts.min() >= rule.get("min_blocks", 1)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_whole_tensors_in_and_out(outcome: Outcome, num_ranks: int) -> None:
    """scatter, select, attend, gather: every rank has the whole o, and the ranks' gradients add up to the whole."""
    case = CASES["condition keys"]
    q, k, v, do, dlse = case.tensors()
    selection = select_blocks(q, k, case.grid_q, case.grid_k, case.block_q, block_k=case.block_k, keep=0.5)
    alone = run_with_gradients(by_reference(selection), q, k, v, do, torch.zeros_like(dlse))
    results = outcome.of(num_ranks, "whole")
    for way in zip(*results):
        for o, *_ in way:
            torch.testing.assert_close(o, alone.o, rtol=1e-10, atol=1e-10)
        for i, expected in enumerate((alone.dq, alone.dk, alone.dv), 1):
            total = torch.stack([rank[i] for rank in way]).sum(0)
            torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_gather_of_vectors(outcome: Outcome, num_ranks: int) -> None:
    expected = CASES["uneven, partial, gqa"].tensors()[4]
    assert all(torch.equal(x, expected) for x in outcome.of(num_ranks, "vectors"))


def test_errors_name_expected_and_got(outcome: Outcome) -> None:
    for rank, found in enumerate(outcome.of(3, "errors")):
        local = 3 * (4, 4, 1)[rank] * 5
        tokens = f"3*{(4, 4, 1)[rank]}*5 = {local}"
        assert found == {
            "another size": "mesh must have the shard's 2 ranks, got 3",
            "two dimensions": "mesh must have one dimension, got 2; take one of its dimensions, such as mesh['cp']",
            "not in the mesh": f"mesh must hold this process, global rank {rank}, got ranks [0]"
            if rank
            else f"x must be [B, H, 3*9*5 = 135, ...], got {[2, 2, local, 8]}",
            "tokens of k": f"k must have {tokens} tokens, got {2 * local}",
            "tokens to select": f"k must have {tokens} tokens, got {2 * local}",
            "v unlike k": f"v must be as k, {[2, 2, local, 8]} torch.float64 cpu, "
            f"got {[2, 2, local, 4]} torch.float64 cpu",
            "whole selection": f"q must have 3*9*5 = 135 tokens, got {local}",
            "local selection": "selection must have grid_q (3, 9, 5) in blocks of (2, 2, 4), "
            f"got (3, {(4, 4, 1)[rank]}, 5) in blocks of (2, 2, 4)",
            "heads of selection": "selection must be for B, H = [2, 3] as q, got [2, 6]",
            "reference": found["reference"],
            "no such backend": found["no such backend"],
            "scale": "scale must be finite and > 0, got 0.0",
            "heads": "mesh must have a size that divides the 1 heads of q (1), got 3",
            "no rule": "selection, or one of top_k, keep, cdf_threshold, must be given, got none",
            "rule and selection": "top_k must be None where a selection is given, got 1",
            "scattered twice": f"x must be [B, H, 3*9*5 = 135, ...], got {[2, 2, local, 8]}",
            "gathered twice": f"x must be [B, H, {tokens}, ...], got {[2, 2, 135, 8]}",
        }
        # which backends there are depends on the machine
        assert found["reference"].startswith("backend of a ring must be one of auto, cpu")
        assert found["reference"].endswith("got 'reference'")
        assert found["no such backend"].startswith("backend 'fast' is not available here")
