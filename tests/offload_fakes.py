"""A device that is not there: two lanes on the CPU whose order of work is written down, checked and pushed around."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass
class Event:
    """A point in a lane: all work before number `index` of it."""

    lane: Literal["compute", "copy"]
    index: int


@dataclass
class Work:
    """What a lane does, and what of the other lane comes before it."""

    kind: str  # "copy" or "use"
    memory: int  # number of the piece of device memory that it writes or reads
    after: list[Event] = field(default_factory=list)


class FakeLanes:
    """`when`: copies are carried out "early", as soon as they are asked for, or "late", when someone waits for them.

    Device memory is full of NaN bytes at first. `use(tensor)` says that the computation reads a tensor; `check()` then
    shows that in any order two lanes could run in, each read sees the copy before it and no copy disturbs a read.
    """

    is_host = False

    def __init__(self, when: Literal["early", "late"] = "late") -> None:
        self.when = when
        self.lanes: dict[str, list[Work]] = {"compute": [], "copy": []}
        self.memories: list[tuple[int, int]] = []
        self.pinned: list[int] = []
        self.staged: list[tuple[int, int]] = []  # (address of the source, number of the copy)
        self._held: list[Tensor] = []
        self._waits: list[Event] = []  # of the compute lane, for its next work
        self._queue: list[Callable[[], Any]] = []  # copies asked for and not carried out: the last of the lane
        self._lock = threading.RLock()

    def memory(self, nbytes: int) -> Tensor:
        memory = torch.full((nbytes,), 255, dtype=torch.uint8)
        self.memories.append((memory.data_ptr(), memory.data_ptr() + nbytes))
        self._held.append(memory)
        return memory

    def _number(self, tensor: Tensor) -> int:
        return next(i for i, (a, b) in enumerate(self.memories) if a <= tensor.data_ptr() < b)

    def pin(self, buffer: Tensor) -> object | None:
        self.pinned.append(buffer.numel())
        return buffer

    def mark(self) -> Event:
        with self._lock:
            return Event("compute", len(self.lanes["compute"]))

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        assert after.lane == "compute"
        with self._lock:
            self.lanes["copy"].append(Work("copy", self._number(target), [after]))
            self.staged.append((source.data_ptr(), len(self.lanes["copy"])))
            self._queue.append(lambda: target.copy_(source))
            if self.when == "early":
                self._run(len(self.lanes["copy"]))
            return Event("copy", len(self.lanes["copy"]))

    @property
    def waiting(self) -> int:
        """Copies that were asked for and not carried out."""
        return len(self._queue)

    def _run(self, index: int) -> None:
        """Carry out the copies before number `index`."""
        with self._lock:
            while self._queue and len(self.lanes["copy"]) - len(self._queue) < index:
                self._queue.pop(0)()

    def wait(self, event: Event) -> None:
        with self._lock:
            self._waits.append(event)
            self._run(event.index)

    def finish(self, event: Event) -> None:
        if event.lane == "copy":
            self._run(event.index)
            if threading.current_thread() is threading.main_thread():
                self._waits.append(event)  # what it asks to be computed from now on comes later too

    def use(self, tensor: Tensor) -> None:
        with self._lock:
            self.lanes["compute"].append(Work("use", self._number(tensor), list(self._waits)))

    def check(self) -> None:
        """Each memory's copies and reads are ordered, whatever the two lanes' speeds are."""
        copies, uses = self.lanes["copy"], self.lanes["compute"]
        for u, use in enumerate(uses):
            before = [
                c for c, copy in enumerate(copies) if copy.memory == use.memory and not _precedes(uses, u, copies, c)
            ]
            seen = max((event.index for event in use.after if event.lane == "copy"), default=0)
            ready = [c for c in before if c < seen]
            assert ready, f"read {u} of memory {use.memory} does not wait for its copy"
            assert before == ready, f"copies {before} to memory {use.memory} may run while read {u} does"


def _precedes(uses: list[Work], u: int, copies: list[Work], c: int) -> bool:
    """Whether copy c waits, by itself or by one before it in its lane, for what comes after read u."""
    return any(event.index > u for copy in copies[: c + 1] for event in copy.after if event.lane == "compute")
