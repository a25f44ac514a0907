"""Blocks in turn: the same numbers wherever they wait, in an order that no device can turn into a race."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any, Literal

import pytest
import torch
from offload_fakes import FakeLanes
from tiny_models import make_dit, randn
from torch import Tensor, UntypedStorage, nn

from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.live_bytes import LiveBytes
from lcv_core.offload.feeds import THREAD, FromMemory, Loaded
from lcv_core.offload.lanes import CpuLanes, Lanes
from lcv_core.offload.layout import ALIGNMENT, Layout, Sockets
from lcv_core.offload.turns import BlocksInTurn, blocks_within

DEPTH = 5
PLACES: tuple[Literal["ram", "disk"], ...] = ("ram", "disk")


@torch.no_grad()
def run(dit: LongCatDiT) -> Tensor:
    return dit(randn(1, 16, 2, 4, 6, seed=5), torch.tensor([500.0]), randn(1, 5, 32, seed=6))


class Files:
    """A source of blocks that are elsewhere; remembers what was read, and fails when told to."""

    def __init__(self, dit: LongCatDiT) -> None:
        self._source = Loaded([Sockets(block) for block in dit.blocks])
        self.read_blocks: list[int] = []
        self.fail_in: int | None = None

    def read(self, block: int, name: str, out: Tensor) -> None:
        if self.fail_in == block:
            raise OSError("the disk is gone")
        if self.read_blocks[-1:] != [block]:
            self.read_blocks.append(block)
        self._source.read(block, name, out)


def watched(turns: BlocksInTurn, lanes: FakeLanes) -> BlocksInTurn:
    """Every turn says to the lanes that the block is read."""

    class Watched:
        def __iter__(self) -> Iterator[nn.Module]:
            for block in turns:
                lanes.use(next(block.parameters()))
                yield block

        close = turns.close

    return Watched()  # type: ignore[return-value]


def streamed(lanes: Lanes, place: Literal["ram", "disk"], **options: int) -> tuple[LongCatDiT, BlocksInTurn, Files]:
    dit, files = make_dit(depth=DEPTH), Files(make_dit(depth=DEPTH))
    turns = BlocksInTurn(list(dit.blocks), lanes, place, files if place == "disk" else None, **options)
    dit.set_streaming(turns)
    return dit, turns, files


def streamed_and_watched(
    when: Literal["early", "late"], place: Literal["ram", "disk"], **options: int
) -> tuple[Tensor, FakeLanes, LongCatDiT, BlocksInTurn]:
    """What is expected, and the model on a device with two lanes, each use of a block checked."""
    expected, lanes = run(make_dit(depth=DEPTH)), FakeLanes(when)
    dit, turns, _ = streamed(lanes, place, **options)
    dit.set_streaming(watched(turns, lanes))
    return expected, lanes, dit, turns


def settle(turns: BlocksInTurn) -> None:
    """Wait until nothing is being read."""
    wait([slot.coming for slot in turns._slots if slot.coming is not None], timeout=60)


class _Real(LiveBytes):
    """Without what is on the meta device."""

    def _add(self, storage: UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._add(storage)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize(("slots", "resident"), [(1, 0), (2, 0), (3, 0), (2, 2), (2, 4), (9, 0), (2, 9)])
def test_numbers_and_order_on_a_device_with_two_lanes(
    place: Literal["ram", "disk"], when: Literal["early", "late"], slots: int, resident: int
) -> None:
    expected, lanes, dit, turns = streamed_and_watched(when, place, slots=slots, resident=resident)
    for _ in range(3):
        assert run(dit).equal(expected)
    settle(turns)
    turns.close()
    assert not lanes.waiting
    lanes.check()
    resident = min(resident, DEPTH)
    assert turns.resident == resident
    assert len(lanes.memories) == resident + min(slots, DEPTH - resident)
    copies = len(lanes.lanes["copy"])
    rest = DEPTH - resident
    if rest > slots:  # each block once for each pass, and those that were to begin the next one
        assert copies == resident + 3 * rest + slots
    else:  # all have a place of their own, and keep it
        assert copies == DEPTH


def test_the_check_of_the_order_would_find_a_race() -> None:
    for forget in ("wait", "free"):
        lanes = FakeLanes("early")
        if forget == "wait":
            lanes.wait = lambda event: None  # type: ignore[method-assign]
        else:
            first = lanes.mark()
            lanes.mark = lambda first=first: first  # type: ignore[method-assign]
        dit, turns, _ = streamed(lanes, "ram")
        dit.set_streaming(watched(turns, lanes))
        run(dit)
        with pytest.raises(AssertionError, match=r"does not wait|may run while"):
            lanes.check()


@pytest.mark.parametrize("place", PLACES)
def test_the_next_block_sets_out_before_the_present_one_has_computed(place: Literal["ram", "disk"]) -> None:
    lanes = FakeLanes("early")
    _, turns, _ = streamed(lanes, place, slots=2)
    for index, block in enumerate(turns):
        if place == "disk":  # the thread gets there
            while len(lanes.lanes["copy"]) < index + 2:
                pass
        sent = lanes.lanes["copy"][index + 1]
        assert sent.after[0].index <= index  # it waits for no more than the block before this one
        lanes.use(next(block.parameters()))
    turns.close()


def test_a_buffer_between_disk_and_device_is_not_read_into_before_it_was_copied() -> None:
    """Copies that are late: were a buffer filled again before, its block would be another's."""
    lanes = FakeLanes("late")
    dit, turns, files = streamed(lanes, "disk", slots=3)
    assert run(dit).equal(run(make_dit(depth=DEPTH)))
    turns.close()
    assert len({address for address, _ in lanes.staged}) == 2
    assert files.read_blocks[: DEPTH + 3] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert lanes.pinned == [max(Layout.of(b).nbytes for b in make_dit().blocks)] * 2


@pytest.mark.parametrize("stop_at", range(DEPTH))
@pytest.mark.parametrize("place", PLACES)
def test_a_pass_that_ends_early_leaves_the_next_one_right(place: Literal["ram", "disk"], stop_at: int) -> None:
    lanes = FakeLanes("late")
    dit, turns, _ = streamed(lanes, place)
    expected = run(make_dit(depth=DEPTH))
    held = iter(watched(turns, lanes))  # as in a traceback, it is still there when the next pass begins
    for _ in range(stop_at + 1):
        next(held)
    dit.set_streaming(watched(turns, lanes))
    assert run(dit).equal(expected)
    turns.close()
    lanes.check()


def test_on_a_cpu_blocks_are_read_where_they_are_used_and_few_are_in_memory() -> None:
    whole = make_dit(depth=DEPTH)
    block = Layout.of(whole.blocks[0]).nbytes
    dit = make_dit(depth=DEPTH)
    files = Files(whole)
    with _Real() as live:
        turns = BlocksInTurn(list(dit.blocks), CpuLanes(), "disk", files, slots=2)
        dit.set_streaming(turns)
        assert turns.nbytes == 2 * block
        result = run(dit)
    assert result.equal(run(whole))
    with _Real() as activations:
        run(whole)
    assert live.peak <= 2 * block + activations.peak + 5 * 4096  # each in pages of its own
    turns.close()


def test_out_of_turn_a_block_is_not_there() -> None:
    dit, turns, _ = streamed(FakeLanes(), "ram", resident=1)
    for i, block in enumerate(turns):
        there = [not next(b.parameters()).is_meta for b in dit.blocks]
        assert there == [j in (0, i) for j in range(DEPTH)]
        assert not next(block.parameters()).requires_grad
    shapes = {name: p.shape for name, p in make_dit(depth=DEPTH).named_parameters()}
    assert {name: p.shape for name, p in dit.named_parameters()} == shapes


def test_tensors_are_aligned_and_blocks_may_differ() -> None:
    block = make_dit().blocks[0]
    layout = Layout.of(block)
    assert all(place.start % ALIGNMENT == 0 for place in layout.places)
    assert layout.nbytes >= sum(p.nbytes for p in block.parameters())
    views = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    assert {n: (v.shape, v.dtype) for n, v in views.items()} == {
        n: (p.shape, p.dtype) for n, p in block.named_parameters()
    }
    for value, view in enumerate(views.values()):
        view.fill_(value)
    assert all((view == value).all() for value, view in enumerate(views.values()))  # none lies over another
    lanes = FakeLanes()
    mixed = make_dit(depth=3)
    mixed.blocks[1].bfloat16()
    expected = run(mixed)
    turns = BlocksInTurn(list(mixed.blocks), lanes, "ram")
    mixed.set_streaming(turns)
    assert run(mixed).equal(expected)


def test_as_many_leading_blocks_as_fit() -> None:
    blocks = list(make_dit(depth=3).blocks)
    one = Layout.of(blocks[0]).nbytes
    assert [blocks_within(blocks, n) for n in (0, one - 1, one, 3 * one - 1, 3 * one, 9 * one)] == [0, 0, 1, 2, 3, 3]


def test_no_gradient_is_kept() -> None:
    dit, _, _ = streamed(CpuLanes(), "ram")
    latents = randn(1, 16, 2, 4, 6).requires_grad_()
    with pytest.raises(InputError, match='streaming="off"'):
        dit(latents, torch.tensor([500.0]), randn(1, 5, 32))


def test_made_in_inference_mode_it_runs_outside_and_the_other_way_round() -> None:
    expected = run(make_dit(depth=DEPTH))
    with torch.inference_mode():
        dit, turns, _ = streamed(CpuLanes(), "disk")
    assert run(dit).equal(expected)
    with torch.inference_mode():
        assert run(dit).equal(expected)
    assert run(dit).equal(expected)
    turns.close()


def test_what_fails_while_a_block_is_read_is_raised_where_it_is_needed_and_tried_again() -> None:
    dit, turns, files = streamed(CpuLanes(), "disk")
    expected = run(make_dit(depth=DEPTH))
    assert run(dit).equal(expected)
    for block in (0, 3):
        files.fail_in = block
        run_fails(dit)
        files.fail_in = None
        settle(turns)
        assert run(dit).equal(expected)
    turns.close()


def run_fails(dit: LongCatDiT) -> None:
    """Within two passes: the blocks of the first may have set out before."""
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(2):
            run(dit)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def test_closed_no_thread_is_left_and_it_says_so() -> None:
    before = reading_threads()
    dit, turns, _ = streamed(CpuLanes(), "disk")
    run(dit)
    assert len(reading_threads()) == len(before) + 1
    dit.stop_streaming()
    dit.stop_streaming()
    assert reading_threads() == before and turns.nbytes == 0
    with pytest.raises(InputError, match="load the model again"):
        run(dit)


def test_a_model_that_is_forgotten_takes_its_thread_along() -> None:
    before = reading_threads()
    dit, turns, _ = streamed(CpuLanes(), "disk")
    run(dit)
    (thread,) = (thread for thread in reading_threads() if thread not in before)
    del dit, turns
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize("options", [{"slots": 0}, {"resident": -1}])
def test_impossible_numbers(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1 slot"):
        streamed(CpuLanes(), "ram", **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize(("slots", "resident"), [(1, 1), (2, 2), (2, 4), (3, 3), (2, 9)])
def test_resident_blocks_can_be_given_up_between_two_forwards(
    place: Literal["ram", "disk"], when: Literal["early", "late"], slots: int, resident: int
) -> None:
    expected, lanes, dit, turns = streamed_and_watched(when, place, slots=slots, resident=resident)
    assert run(dit).equal(expected)
    whole = turns.nbytes
    turns.free_resident()
    assert turns.resident == 0
    size = turns._sockets[0].layout.nbytes
    assert turns.nbytes == slots * size < whole
    for _ in range(2):
        assert run(dit).equal(expected)
    turns.free_resident()  # twice does no harm
    assert run(dit).equal(expected)
    settle(turns)
    turns.close()
    assert not lanes.waiting
    lanes.check()
    with pytest.raises(InputError, match="close was called"):
        turns.free_resident()


@pytest.mark.parametrize("place", PLACES)
def test_after_a_forward_that_failed_too(place: Literal["ram", "disk"]) -> None:
    expected = run(make_dit(depth=DEPTH))
    dit, turns, _ = streamed(FakeLanes("late"), place, resident=2)
    for stop_at in range(DEPTH):
        for index, _block in enumerate(turns):
            if index == stop_at:
                break
    turns.free_resident()
    assert run(dit).equal(expected)


def test_the_memory_of_resident_blocks_is_free_after_that() -> None:
    lanes = FakeLanes()
    dit, turns, _ = streamed(lanes, "disk", resident=3)
    lanes._held.clear()
    held = [weakref.ref(next(block.parameters())) for block in list(dit.blocks)[:3]]
    turns.free_resident()
    gc.collect()
    assert not any(ref() is not None for ref in held)
    assert all(p.is_meta for block in dit.blocks for p in block.parameters())


def test_system_memory_that_runs_out_while_they_are_given_up_leaves_the_rest_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run(make_dit(depth=DEPTH))
    dit, turns, _ = streamed(FakeLanes(), "ram", resident=3)
    feed, kept = turns._feed, []
    assert isinstance(feed, FromMemory)
    keep = feed.keep

    def failing(block: int, *args: Any) -> None:
        if len(kept) == 1:
            raise MemoryError("no memory")
        kept.append(block)
        keep(block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(feed, "keep", failing)
        with pytest.raises(MemoryError):
            turns.free_resident()
    assert (kept, turns.resident) == ([2], 2)
    assert run(dit).equal(expected)
    turns.free_resident()
    assert turns.resident == 0 and run(dit).equal(expected)
