"""Blocks in turn: a few places on the device that all blocks pass through, each on its way before its turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lcv_core.errors import InputError
from lcv_core.offload.feeds import Feed, FromFiles, FromMemory, Loaded, Source, fill
from lcv_core.offload.lanes import Lanes, host_memory
from lcv_core.offload.layout import Layout, Sockets


@dataclass
class _Slot:
    """Memory for one block. free: the event after which it may be written over. coming: of the block it is for."""

    memory: Tensor
    free: Any
    block: int | None = None
    coming: Future[Any] | None = None


class BlocksInTurn:
    """The blocks of a model, each of which is on the device while it is its turn; for `LongCatDiT.set_streaming`.

    blocks: as modules; with `source` their tensors may be on the meta device, without it they are where the blocks are
        read from, and are taken away from them.
    place: "ram" keeps all blocks in system memory, "disk" reads each from `source` by a thread when its turn nears.
    slots: blocks that have a place on the device beside the resident ones; all but one of them are on their way while
        that one computes. resident: leading blocks that stay.

    After the last block the first ones set out again, for the next step. One forward at a time.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        lanes: Lanes,
        place: Literal["ram", "disk"],
        source: Source | None = None,
        *,
        slots: int = 2,
        resident: int = 0,
    ) -> None:
        if slots < 1 or resident < 0:
            raise InputError(f"streaming needs at least 1 slot and 0 resident blocks, got {slots} and {resident}")
        self._blocks, self._lanes = list(blocks), lanes
        self._sockets = [Sockets(block) for block in self._blocks]
        layouts = [sockets.layout for sockets in self._sockets]
        self._first = min(resident, len(self._blocks))
        source = Loaded(self._sockets) if source is None else source
        self._keep_resident(source)
        self._feed: Feed | None = self._make_feed(place, source, layouts)
        self._wanted_slots = slots
        self._slots = self._make_slots()

    def _make_slots(self) -> list[_Slot]:
        streamed = [sockets.layout for sockets in self._sockets[self._first :]]
        size = max((layout.nbytes for layout in streamed), default=0)
        count = min(self._wanted_slots, len(streamed))
        return [_Slot(self._lanes.memory(size), self._lanes.mark()) for _ in range(count)]

    @property
    def resident(self) -> int:
        """Leading blocks that stay on the device."""
        return self._first

    @property
    def nbytes(self) -> int:
        """Bytes on the device: of the slots and of the resident blocks."""
        return sum(slot.memory.nbytes for slot in self._slots) + sum(
            sockets.layout.nbytes for sockets in self._sockets[: self._first]
        )

    def _keep_resident(self, source: Source) -> None:
        for index, sockets in enumerate(self._sockets[: self._first]):
            memory = self._lanes.memory(sockets.layout.nbytes)
            if self._lanes.is_host:
                fill(source, index, sockets.layout, memory)
            else:
                host = host_memory(sockets.layout.nbytes)
                fill(source, index, sockets.layout, host)
                self._lanes.finish(self._lanes.copy(memory, host, self._lanes.mark()))
            sockets.give(sockets.layout.views(memory))

    def free_resident(self) -> None:
        """From the next forward on the resident blocks wait like the others; their memory on the device is free.

        From system memory: as much of it is needed for them. One that is not there is raised as what it is, and what
        was freed by then stays so.
        """
        if self._feed is None:
            raise InputError("the blocks are no longer streamed: close was called; load the model again")
        loaded, room = Loaded(self._sockets), max((slot.memory.nbytes for slot in self._slots), default=0)
        for index in reversed(range(self._first)):
            sockets = self._sockets[index]
            self._feed.keep(index, sockets.layout, loaded)
            sockets.take_away()
            self._first = index
            if sockets.layout.nbytes > room or len(self._slots) < min(self._wanted_slots, len(self._blocks) - index):
                self._settle_slots()
                self._slots = []  # before the new ones are made
                self._slots = self._make_slots()
                room = self._slots[0].memory.nbytes

    def _settle_slots(self) -> None:
        """Wait for what is copied to the slots, so that neither end of a copy is freed under it."""
        for slot in self._slots:
            coming = slot.coming
            if coming is not None and coming.done() and coming.exception() is None:
                self._lanes.finish(coming.result())

    def _make_feed(self, place: str, source: Source, layouts: Sequence[Layout]) -> Feed:
        if place == "disk":
            for sockets in self._sockets[self._first :]:
                sockets.take_away()
            return FromFiles(self._lanes, source, layouts)
        feed = FromMemory(self._lanes)
        for index in range(self._first, len(self._blocks)):
            feed.keep(index, layouts[index], source)
            self._sockets[index].take_away()  # now, so that only one block is in memory twice
        return feed

    def __iter__(self) -> Iterator[nn.Module]:
        """Each block when it is ready; it is no longer so when the next one is asked for.

        Raises what went wrong while a block was brought, such as CheckpointError where its file has changed.
        """
        if self._feed is None:
            raise InputError("the blocks are no longer streamed: close was called; load the model again")
        for slot in self._slots:  # an earlier pass may have ended anywhere
            slot.free = self._lanes.mark()
            if slot.coming is not None and slot.coming.done() and slot.coming.exception() is not None:
                slot.block = slot.coming = None  # try again
        self._want(self._first)
        for index, block in enumerate(self._blocks):
            if index < self._first:
                yield block
                continue
            slot = self._arrived(index)
            sockets = self._sockets[index]
            sockets.give(sockets.layout.views(slot.memory))
            try:
                yield block
            finally:
                sockets.take_away()
                slot.free = self._lanes.mark()
            self._want(index + 1)

    def _want(self, first: int) -> None:
        """Send for the block `first` and those after it, around the end, as many as there are slots."""
        assert self._feed is not None
        count = len(self._blocks) - self._first
        wanted = [self._first + (first - self._first + i) % count for i in range(len(self._slots))]
        there = {slot.block for slot in self._slots}
        spare = [slot for slot in self._slots if slot.block not in wanted]
        for block in wanted:
            if block not in there:
                slot = spare.pop(0)
                slot.block, slot.coming = block, self._feed.bring(block, slot.memory, slot.free)

    def _arrived(self, block: int) -> _Slot:
        slot = next(slot for slot in self._slots if slot.block == block)
        assert slot.coming is not None
        try:
            self._lanes.wait(slot.coming.result())
        except BaseException:
            slot.block = None  # so that a later pass tries again
            raise
        return slot

    def close(self) -> None:
        """Stop reading ahead and free what was for it; the model cannot be run after that. Twice does no harm."""
        if self._feed is not None:
            feed, self._feed = self._feed, None
            self._settle_slots()
            feed.close()
            self._slots.clear()


def blocks_within(blocks: Sequence[nn.Module], nbytes: int) -> int:
    """How many leading blocks fit into so many bytes."""
    count, used = 0, 0
    for block in blocks:
        used += Layout.of(block).nbytes
        if used > nbytes:
            break
        count += 1
    return count
