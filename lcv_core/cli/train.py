"""`lcv train`: a recipe in, a run out; what there is to see while it goes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lcv_core.cli.errors import Stopped
from lcv_core.cli.options import MACHINE, option
from lcv_core.training.recipe import load_recipe, shipped_recipes

if TYPE_CHECKING:
    from lcv_core.cli.progress import Reporter
    from lcv_core.training.events import Event
    from lcv_core.training.recipe import Recipe
    from lcv_core.training.trainer import Trainer

SAY_EVERY = 10.0  # seconds between lines with metrics
TRAINING = "Training"
RUN = "Run"  # panel of options


def list_recipes() -> str:
    """The shipped recipes with the first line of each, for the help."""
    lines = ["[bold]Recipes[/bold]"]
    for name, path in shipped_recipes().items():
        with path.open(encoding="utf-8") as file:
            title = file.readline()
        lines.append(f"  {name}: {title.lstrip('# ').strip()}" if title.startswith("#") else f"  {name}")
    return "\n\n".join(lines)


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.")],
    out: Annotated[
        Path | None, option("--out", "-o", panel=RUN, help="Folder of the run. Default: outputs/RECIPE.")
    ] = None,
    steps: Annotated[
        int | None, option("--steps", panel=RUN, min=1, help="Of the whole run, instead of the recipe's.")
    ] = None,
    changes: Annotated[
        list[str] | None, option("--set", panel=RUN, help="KEY=VALUE in the recipe, model.depth=6. Repeatable.")
    ] = None,
    export: Annotated[
        bool, option("--export", panel=RUN, help="Write the model of the latest checkpoint, train nothing.")
    ] = False,
    device: Annotated[Literal["auto", "cpu"], option("--device", panel=MACHINE, help="auto: GPUs there are.")] = "auto",
    processes: Annotated[
        int, option("--processes", panel=MACHINE, min=1, help="Share each step; on a CPU one per core is fastest.")
    ] = 1,
) -> None:
    """Train a part of the model, or an adapter. A stopped run goes on where it was.

    Several GPUs: --processes 8, or accelerate launch -m lcv_core train RECIPE. The model is in RUN/model, metrics and
    samples beside it.
    """
    settings = load_recipe(recipe, changes or [])
    settings = settings if steps is None else settings.with_steps(steps)
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        start_processes(processes, device)
    # Before torch is loaded: threads that wait spinning make a step up to ten times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from lcv_core.cli.progress import Reporter
    from lcv_core.training.stages import build_stage
    from lcv_core.training.trainer import Trainer

    folder = out or Path("outputs") / Path(recipe).with_suffix("")
    show = _Show(Reporter())
    trainer = Trainer(build_stage(settings), settings, folder, device=device, on_event=show)
    if trainer.is_main:
        show.reporter.say(_summary(trainer, settings))
    if export:
        trainer.export()
        return
    with show.reporter.running(), _stopping(trainer, show.reporter):
        outcome = trainer.run()
    if not outcome.finished:
        kept = f"stopped at step {outcome.step} of {settings.steps}, kept in {folder}"
        raise Stopped(f"{kept}; the same command goes on from there")


def _summary(trainer: Trainer, recipe: Recipe) -> str:
    """What is going to run, before it does."""
    import torch

    learning, total = trainer.num_parameters()
    acc = trainer.accelerator
    device = f"{torch.get_num_threads()} CPU threads" if acc.device.type == "cpu" else str(acc.device)
    where = f"{acc.num_processes} processes, {device} each" if acc.num_processes > 1 else device
    return (
        f"stage {recipe.stage}: {learning:,} of {total:,} parameters learn in {recipe.precision} on {where};"
        f" {recipe.steps} steps of {recipe.batch_size} samples, {recipe.micro_size} at a time, into {trainer.out}"
    )


def start_processes(count: int, device: str) -> None:
    """Become the launcher of `count` processes that run this same command, each with its share of the cores."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    os.execve(sys.executable, [*launcher, "-m", "lcv_core", *sys.argv[1:]], environment)


class _Show:
    """Turns events into bars and lines."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter, self._said = reporter, 0.0

    def __call__(self, event: Event) -> None:
        if event.kind == "progress":
            self.reporter.advance(event.message, event.done, event.total)
        elif event.kind == "step":
            self.reporter.advance(TRAINING, event.done, event.total, quiet=True)
        elif event.kind == "metrics":
            self._metrics(event)
        elif event.kind == "note":
            self.reporter.say(event.message)
        elif event.kind == "nan":
            self.reporter.say(f"warning: {event.message}")
        elif event.kind == "exported":
            self.reporter.say(f"wrote {event.path}")

    def _metrics(self, event: Event) -> None:
        if event.done < event.total and time.monotonic() - self._said < SAY_EVERY:
            return
        self._said = time.monotonic()
        shown = {name: value for name, value in event.values.items() if name not in ("step", "seconds", "skipped")}
        values = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.reporter.say(f"step {event.done}/{event.total}: {values}{self.reporter.left(TRAINING)}")


@contextmanager
def _stopping(trainer: Trainer, reporter: Reporter) -> Iterator[None]:
    """Inside the block the first Ctrl-C ends the run after its present step, a second one at once."""

    def handle(number: int, frame: Any) -> None:
        if not trainer.training or trainer.stopping:
            raise KeyboardInterrupt
        trainer.stop()
        reporter.say("stopping after this step; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
