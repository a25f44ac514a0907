"""The memory plan of a job on this machine."""

from __future__ import annotations

from typing import Any

from .native import native_of


def describe_job(
    model: Any, *, width: int, height: int, num_frames: int, num_cond_frames: int, batch_size: int, sparsity: float
) -> str:
    """The plan as text; 0 stands for the model's own sizes and counts."""
    from lcv_core import planning

    native = native_of(model)
    raise NotImplementedError((planning, native))
