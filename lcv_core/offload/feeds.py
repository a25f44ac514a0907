"""Where the blocks come from: buffers in system memory, or a thread that reads them from files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.offload.lanes import Lanes, host_memory, warn_pageable
from lcv_core.offload.layout import Layout, Sockets

log = logging.getLogger("lcv_core")

THREAD = "lcv-stream"  # begins the name of the thread that reads


class Source(Protocol):
    """Who knows what is in the blocks."""

    def read(self, block: int, name: str, out: Tensor) -> None:
        """The tensor `name` of a block into `out`, contiguous in system memory. Any thread may ask, one at a time."""
        ...


class Feed(Protocol):
    """Brings blocks to the device."""

    def keep(self, block: int, layout: Layout, source: Source) -> None:
        """Make ready to bring a block whose tensors `source` has now."""
        ...

    def bring(self, block: int, memory: Tensor, after: Any) -> Future[Any]:
        """Fill `memory` with a block once the event `after` has come; the event after which it is there.

        What goes wrong is raised by the future's `result`.
        """
        ...

    def close(self) -> None:
        """Give up what is on its way; nothing can be brought after that. No thread is left."""
        ...


class Loaded:
    """A Source for blocks that are in memory already."""

    def __init__(self, sockets: Sequence[Sockets]) -> None:
        self._sockets = sockets

    def read(self, block: int, name: str, out: Tensor) -> None:
        out.copy_(self._sockets[block].tensors()[name].detach())


class FromMemory:
    """Every block in a buffer of system memory of its own, locked in place where the device profits."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._buffers: dict[int, Tensor] = {}
        self._pins: list[object] = []
        self._pinning = True

    def keep(self, block: int, layout: Layout, source: Source) -> None:
        """Read a block into memory."""
        buffer = host_memory(layout.nbytes)
        fill(source, block, layout, buffer)
        self._buffers[block] = buffer
        if self._pinning:  # where one failed the others would too, each with a warning
            pin = _pinned(self._lanes, buffer)
            self._pinning = pin is not None
            self._pins.append(pin)

    def bring(self, block: int, memory: Tensor, after: Any) -> Future[Any]:
        buffer = self._buffers[block]
        sent: Future[Any] = Future()
        sent.set_result(self._lanes.copy(memory[: buffer.numel()], buffer, after))
        return sent

    def close(self) -> None:
        self._buffers.clear()
        self._pins.clear()


@dataclass
class _Staging:
    """A buffer on the way from a file to the device. busy: the event after its last copy."""

    buffer: Tensor
    pin: object | None
    busy: Any = None


class FromFiles:
    """One thread reads: straight into memory that is system memory, else by way of two buffers, so that one is read
    into while the other is copied from."""

    def __init__(self, lanes: Lanes, source: Source, layouts: Sequence[Layout]) -> None:
        self._lanes, self._source, self._layouts = lanes, source, layouts
        self._stop = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        self._staging: list[_Staging] = []
        self._turn = 0
        if not lanes.is_host:
            size = max((layout.nbytes for layout in layouts), default=0)
            for _ in range(2):
                buffer = host_memory(size)
                self._staging.append(_Staging(buffer, _pinned(lanes, buffer)))

    def keep(self, block: int, layout: Layout, source: Source) -> None:
        pass  # it is in its file

    def bring(self, block: int, memory: Tensor, after: Any) -> Future[Any]:
        return self._thread.submit(self._bring, block, memory, after)

    def _bring(self, block: int, memory: Tensor, after: Any) -> Any:
        layout = self._layouts[block]
        if not self._staging:
            self._lanes.finish(after)
            self._fill(block, layout, memory)
            return self._lanes.mark()
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % len(self._staging)
        if staging.busy is not None:
            self._lanes.finish(staging.busy)
        self._fill(block, layout, staging.buffer)
        staging.busy = self._lanes.copy(memory[: layout.nbytes], staging.buffer[: layout.nbytes], after)
        return staging.busy

    def _fill(self, block: int, layout: Layout, buffer: Tensor) -> None:
        for name, out in layout.views(buffer).items():
            if self._stop:
                raise InputError("streaming was stopped while a block was read")
            self._source.read(block, name, out)

    def close(self) -> None:
        self._stop = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        for staging in self._staging:  # not freed under a copy
            if staging.busy is not None:
                self._lanes.finish(staging.busy)
        self._staging.clear()


def fill(source: Source, block: int, layout: Layout, buffer: Tensor) -> None:
    """A whole block into a buffer of system memory."""
    for name, out in layout.views(buffer).items():
        source.read(block, name, out)


def _pinned(lanes: Lanes, buffer: Tensor) -> object | None:
    """What keeps a buffer locked; where the device refuses, a warning and None: it serves all the same."""
    try:
        return lanes.pin(buffer)
    except (RuntimeError, MemoryError, OSError) as error:
        warn_pageable(buffer.numel(), str(error).splitlines()[0] if str(error) else type(error).__name__)
        return None
