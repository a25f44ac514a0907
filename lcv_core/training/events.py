"""What a training run tells whoever started it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["note", "progress", "step", "metrics", "saved", "samples", "nan", "exported"]


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    kind: "note": `message` alone. "progress": `done` of `total` of the preparation called `message`. "step": an
        optimizer step is done (`done` of `total`). "metrics": `values` were logged. "saved", "samples", "exported":
        `path` was written. "nan": a step was skipped, `message` says why.
    """

    kind: Kind
    message: str = ""
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    path: Path | None = None


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of a run that nobody watches."""
