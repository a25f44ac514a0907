"""Kernels that are tried on a device against PyTorch before they are used there."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from types import ModuleType

import torch

log = logging.getLogger("lcv_core")


def may_run(device: torch.device) -> bool:
    """Whether Triton's kernels come into question; not for a compiler, which fuses PyTorch's passes by itself."""
    return (
        device.type == "cuda" and not torch.compiler.is_compiling() and importlib.util.find_spec("triton") is not None
    )


def proven(
    load: Callable[[], ModuleType], check: Callable[[ModuleType, torch.device], str | None], device: torch.device,
    instead: str,
) -> ModuleType | None:  # fmt: skip
    """The module, where it can be imported and `check` finds nothing wrong; else None, and a warning that says why.

    instead: what is done without it, as a sentence.
    """
    module: ModuleType | None = None
    try:
        module = load()
        reason = check(module, device)
    except Exception as error:  # without a C compiler, or with a Triton for another driver, it fails in many ways
        reason = f"they fail on {device} ({type(error).__name__}: {error})"
    if reason is None:
        return module
    log.warning("%s, which is slower; Triton's kernels: %s", instead, reason)
    return None
