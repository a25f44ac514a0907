"""What a person sees while a job runs: bars with time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from lcv_core.denoise import StepInfo

T = TypeVar("T")
LOG_EVERY = 10.0  # seconds between lines where there is no terminal


class Reporter:
    """Speaks on stderr, so that stdout stays clean for what a command returns."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeLeft(), console=self.console, transient=False,
        )  # fmt: skip
        self._tasks: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bars inside the block."""
        if not self._live:
            yield
            return
        with self._bars:
            yield

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False)

    def advance(self, label: str, done: int, total: int) -> None:
        """`done` of `total` of the thing called `label`."""
        now = time.monotonic()
        first = label not in self._started
        started = self._started.setdefault(label, now)
        if self._live:
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total)
            self._bars.update(self._tasks[label], completed=done)  # type: ignore[arg-type]
        elif done == total or now - self._said.get(label, started) >= LOG_EVERY:
            self._said[label] = now
            seconds = (now - started) / max(done - 1, 1) * (total - done)
            self.say(f"{label}: {done}/{total}" + ("" if first or done == total else f", {seconds:.0f} s left"))

    def on_step(self, info: StepInfo, label: str = "Denoising") -> None:
        self.advance(label, info.step, info.num_steps)

    def on_segment_step(self, index: int, info: StepInfo, total: int) -> None:
        self.advance(f"Segment {index + 1} of {total}", info.step, info.num_steps)

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield the items and show how many are done."""
        for done, item in enumerate(items, start=1):
            yield item
            self.advance(label, done, total)
