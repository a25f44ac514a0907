"""What a person sees while a job runs: bars with time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from lcv_core.denoise import StepInfo

T = TypeVar("T")
LOG_EVERY = 10.0  # seconds between lines where there is no terminal


def clock(seconds: float) -> str:
    """A time to wait, for people: 0:07, 12:40, 3:05:00; at least a second."""
    minutes, seconds = divmod(max(1, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass
class _Bar:
    """One thing that is counted. since: what was done when it `started`; ends: when it should be finished; reused:
    steps that the step cache gave.
    """

    total: int
    started: float
    since: int
    done: int
    said: float
    reused: int = 0
    ends: float | None = None
    task: TaskID | None = None

    def left(self, now: float) -> float | None:
        """Seconds to the end; None while nothing tells."""
        if self.done >= self.total:
            return 0.0
        return None if self.ends is None else max(0.0, self.ends - now)


class _TimeLeft(ProgressColumn):
    """Rich's own column looks back 30 seconds, which a step of a big model outlasts."""

    def __init__(self, left: Callable[[TaskID], float | None]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        seconds = None if task.finished else self._left(task.id)
        return Text("" if task.finished else "-:-- left" if seconds is None else f"{clock(seconds)} left")


class Reporter:
    """Speaks on stderr, so that stdout stays clean for what a command returns."""

    def __init__(self, console: Console | None = None, *, now: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True)
        self._live, self._now = self.console.is_terminal, now
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), _TimeLeft(self._left_of), console=self.console,
        )  # fmt: skip
        self._bars: dict[str, _Bar] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bars inside the block."""
        if not self._live:
            yield
            return
        with self._progress:
            yield

    def say(self, message: str) -> None:
        # Not as markup: paths may hold brackets. Not wrapped: paths are copied from the screen.
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def start(self, label: str, total: int, *, done: int = 0) -> None:
        """Begin to count the thing called `label`, of which `done` were done earlier."""
        now = self._now()
        task = self._bars[label].task if label in self._bars else None
        self._bars[label] = _Bar(total, now, done, done, now, task=task)
        if self._live and task is None:
            self._bars[label].task = self._progress.add_task(label, total=total, completed=done)
        elif self._live and task is not None:
            self._progress.reset(task, total=total, completed=done)

    def advance(self, label: str, done: int, total: int, *, quiet: bool = False) -> None:
        """`done` of `total` of the thing called `label`. quiet: no line of its own in a log."""
        if label not in self._bars:
            self.start(label, total, done=done)
        bar, now = self._bars[label], self._now()
        bar.done = done
        if done > bar.since:
            bar.ends = now + (now - bar.started) / (done - bar.since) * (total - done)
        if bar.task is not None:
            self._progress.update(bar.task, completed=done)
        elif not quiet and (done == total or now - bar.said >= LOG_EVERY):
            bar.said = now
            left = bar.left(now)
            self.say(f"{label}: {done}/{total}" + (f", {clock(left)} left" if left else ""))

    def drop(self, label: str) -> None:
        """Take a bar away whose thing is done."""
        bar = self._bars.pop(label, None)
        if bar is not None and bar.task is not None:
            self._progress.remove_task(bar.task)

    def left(self, label: str) -> str:
        """ ", 3:20 left" for the thing called `label`, or nothing while nothing tells."""
        seconds = self._bars[label].left(self._now()) if label in self._bars else None
        return f", {clock(seconds)} left" if seconds else ""

    def on_step(self, info: StepInfo, label: str = "Denoising") -> None:
        self.advance(label, info.step, info.num_steps)
        bar = self._bars[label]
        bar.reused += info.reused
        if info.step == info.num_steps and bar.reused:
            self.say(f"{label}: {bar.reused} of {info.num_steps - bar.since} steps were reused by the step cache")

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield the items and show how many are done."""
        self.start(label, total)
        for done, item in enumerate(items, start=1):
            yield item
            self.advance(label, done, total)

    def _left_of(self, task: TaskID) -> float | None:
        return next((bar.left(self._now()) for bar in self._bars.values() if bar.task == task), None)
