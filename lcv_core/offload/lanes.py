"""What a device does for streaming: memory on it, copies beside the computation, and waiting for one another.

Two lanes run side by side: what is computed (the current stream) and what is copied (a stream of its own). An event is
a point in one lane that the other can wait for. On a CPU both lanes are the calling thread and events mean nothing.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from lcv_core.errors import InputError

log = logging.getLogger("lcv_core")

_PAGE = 4096


class Lanes(Protocol):
    """A device. `is_host`: its memory is system memory, so that files can be read straight into it."""

    is_host: bool

    def memory(self, nbytes: int) -> Tensor:
        """Bytes on the device, uint8."""
        ...

    def pin(self, buffer: Tensor) -> object | None:
        """Lock a buffer of system memory in place, as long as what is returned lives; None where that failed, which
        costs speed alone."""
        ...

    def mark(self) -> Any:
        """An event after everything that is computed up to now."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy from system memory to the device once `after` has come; the event after it. Any thread may ask."""
        ...

    def wait(self, event: Any) -> None:
        """What is computed from now on comes after the event."""
        ...

    def finish(self, event: Any) -> None:
        """The calling thread waits for the event."""
        ...


def check_device(device: torch.device) -> None:
    """InputError for a device that has no streams to copy on."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(f'streaming needs a CUDA device or the CPU, got "{device}"; use streaming="off"')


def lanes_of(device: torch.device) -> Lanes:
    """InputError as `check_device`."""
    check_device(device)
    return CpuLanes() if device.type == "cpu" else CudaLanes(device)


def host_memory(nbytes: int) -> Tensor:
    """Bytes of system memory, uint8, in pages of their own, as locking needs; not bound to the mode of autograd that
    happens to be on."""
    with torch.inference_mode(False):
        memory = torch.empty(nbytes + 2 * _PAGE, dtype=torch.uint8)
        first = -memory.data_ptr() % _PAGE
        return memory[first : first + nbytes]


class CpuLanes:
    """One after the other."""

    is_host = True

    def memory(self, nbytes: int) -> Tensor:
        return host_memory(nbytes)

    def pin(self, buffer: Tensor) -> object | None:
        return buffer

    def mark(self) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> None:
        target.copy_(source)

    def wait(self, event: Any) -> None:
        pass

    def finish(self, event: Any) -> None:
        pass


class CudaLanes:
    """A CUDA device, with a stream for the copies."""

    is_host = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def memory(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        memory.record_stream(self._stream)  # given back, it is not handed out again before the last copy is over
        return memory

    def pin(self, buffer: Tensor) -> object | None:
        return Pinned.of(buffer, self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class Pinned:
    """Page-locked memory, unlocked when this goes.

    The memory is allocated first and registered then: what PyTorch allocates as pinned it rounds up to a power of two,
    which for blocks of 0.55 GB would nearly double a model.
    """

    def __init__(self, buffer: Tensor, device: torch.device) -> None:
        # The finalizer holds the buffer, so that it is not freed while it is locked.
        weakref.finalize(self, _unregister, buffer, device)

    @classmethod
    def of(cls, buffer: Tensor, device: torch.device) -> Pinned | None:
        """None, and a warning, where the system locks no more memory."""
        if buffer.numel() == 0:
            return None
        with torch.cuda.device(device):
            cudart: Any = torch.cuda.cudart()
            error = int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
            if error == 0:
                return cls(buffer, device)
            _forget_error(device)
        warn_pageable(buffer.numel(), f"CUDA error {error}")
        return None


def warn_pageable(nbytes: int, why: str) -> None:
    log.warning(
        "%.2f GB of system memory could not be pinned (%s): streaming goes on from pageable memory, which is slower;"
        " free memory, raise the limit of locked memory (ulimit -l), or stream from disk",
        nbytes / 1e9,
        why,
    )


def _unregister(buffer: Tensor, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError):  # an error of earlier work is not ours to tell
        torch.cuda.synchronize(device)  # a copy may still be reading it
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(buffer.data_ptr())


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the last error, and the next kernel would be blamed for it; the check after one clears it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)
