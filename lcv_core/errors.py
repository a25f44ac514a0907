"""Errors whose message is written for the person who made the request."""

from __future__ import annotations

import sys


class InputError(ValueError):
    """The request cannot be carried out as it stands; the message says what to do instead."""


class CheckpointError(InputError):
    """A weights file or folder is missing, damaged, or not what it was taken for."""


class NumericalError(RuntimeError):
    """A tensor stopped being finite; the message names the step."""


class OutOfMemory(Exception):
    """Memory ran out, and there was nothing left to go on with. The message has the plan and what to change."""


_HOST = ("can't allocate memory", "DefaultCPUAllocator", "Cannot allocate memory")
_DEVICE = ("CUDA out of memory", "CUDA error: out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the device's or the system's."""
    if is_out_of_host_memory(error):
        return True
    torch = sys.modules.get("torch")  # not worth importing for an error that it did not raise
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether it was the system's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _HOST)
