"""The training loop, the same for every stage: one process or many (DDP, FSDP2) by way of accelerate.

No autocast and no mixed precision of accelerate's: what is computed in bf16 is written out in the stage.
A step's micro-batches are dealt out to the processes and every sample is a function of its place, so the number of
processes changes nothing but rounding, and a resumed run repeats the uninterrupted one to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lcv_core.errors import InputError, NumericalError
from lcv_core.files import prepare_target, replace_folder, temporary_path, write_error
from lcv_core.training.checkpoints import Checkpoints, Named, SavedState, restore, whole
from lcv_core.training.ema import EMA
from lcv_core.training.events import Event, OnEvent, ignore
from lcv_core.training.logs import CURVES_FILE, METRICS_FILE, MetricLog, draw_curves
from lcv_core.training.optimizers import (
    build_optimizers,
    load_optimizer_state,
    optimizer_state,
    repeated_blocks,
    set_step,
    trained,
)
from lcv_core.training.randomness import seed_of
from lcv_core.training.recipe import Recipe
from lcv_core.training.sheets import write_sheet
from lcv_core.training.stage import Batch, Place, Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 20  # steps without a finite loss in a row: then nothing will come of it
MODEL_FOLDER = "model"  # of a run: what came out, in the official layout
_NEEDS = ("accelerate", "tensorboard", "matplotlib")
_DRAW_EVERY = 120.0  # seconds between pictures of the curves
_AHEAD = 2  # batches prepared by a thread while an accelerator computes

# What a resumed run may not change, and what changes nothing that is computed.
_FIXED = ("stage", "model", "optimizer")
_FREE = (
    "steps", "checkpoint_every", "keep", "sample_every", "log_every", "on_bad_data", "on_nan", "samples",
    "export_precision", "compile", "recompute",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the optimizer steps done, and whether they are all of the recipe's."""

    step: int
    finished: bool


class Trainer:
    """One run: a stage, its recipe and the folder that holds its checkpoints, metrics, samples and result.

    device: "auto" (a GPU where there is one) or "cpu". on_event: told what happens, on the main process alone.
    training, stopping: whether the loop is running, and whether it was asked to end.
    A folder that holds checkpoints is gone on with. InputError for a recipe that this machine or the folder's earlier
    run does not fit.
    """

    def __init__(
        self, stage: Stage, recipe: Recipe, out: str | Path, *, device: str = "auto", on_event: OnEvent = ignore
    ) -> None:
        self.stage, self.recipe, self.out = stage, recipe, Path(out)
        self.accelerator = make_accelerator(device)
        self.is_main = self.accelerator.is_main_process
        self._on_event = on_event if self.is_main else ignore
        self._deal_out()
        prepare_target(self.out / METRICS_FILE)
        self._skeleton = skeleton(stage.model)
        self._optimizers = build_optimizers(stage.model, recipe)
        _check_masters(stage.model)
        _rewrite_blocks(stage.model, recipe)
        self.model, *wrapped = self.accelerator.prepare(stage.model, *self._optimizers)
        self._optimizers = [optimizer.optimizer for optimizer in wrapped]
        self._plain: nn.Module = self.accelerator.unwrap_model(self.model)
        self._params = trained(self._plain)
        self._ema = EMA(self._params, recipe.ema_decay)
        self._checkpoints = Checkpoints(self.out / "checkpoints", keep=recipe.keep, writes=self.is_main)
        self.step = 0
        self.training = self.stopping = False
        self._skipped, self._drawn = 0, -math.inf
        self._resume()

    def _deal_out(self) -> None:
        """InputError unless every process gets as many micro-batches as every other."""
        world = self.accelerator.num_processes
        for phase in self.recipe.plan:
            recipe = phase.recipe
            if recipe.num_micros % world:
                raise InputError(
                    f"batch_size {recipe.batch_size} in micro-batches of {recipe.micro_size} makes {recipe.num_micros},"
                    f" which {world} processes cannot share evenly; set micro_batch_size so that batch_size /"
                    f" micro_batch_size is a multiple of {world}"
                )

    def num_parameters(self) -> tuple[int, int]:
        """Those that are trained, and all."""
        return sum(p.numel() for p in self._params.values()), sum(p.numel() for p in self._plain.parameters())

    def stop(self) -> None:
        """Ask a run in progress to save and end after the present step; may be called from a signal handler."""
        self.stopping = True

    def run(self) -> Outcome:
        """Train to the recipe's last step, save, and export the result to OUT/model.

        After `stop` it saves and returns early. NumericalError when the loss is not finite and the recipe says to stop,
        or when it stays so; InputError when the disk is full. Both leave checkpoints to go on from.
        """
        prepare = getattr(self.stage, "prepare", None)
        if prepare is not None:
            prepare(self.accelerator.device, self._on_event)
        log = MetricLog(self.out, self.step) if self.is_main else None
        try:
            self._loop(log)
        finally:
            self.training = False
            if log is not None:
                log.close()
        finished = self.step >= self.recipe.steps
        if finished:
            self.export()
        return Outcome(self.step, finished)

    def _loop(self, log: MetricLog | None) -> None:
        recipe, window, stopping = self.recipe, _Window(), False
        started, before = time.perf_counter(), 0.0 if log is None else log.seconds
        self.training = True
        with contextlib.closing(self._batches()) as batches:
            while self.step < recipe.steps and not stopping:
                began = time.perf_counter()
                values, stopping = self._train_step(batches)
                window.add(values, time.perf_counter() - began, recipe.at(self.step).batch_size)
                self.step += 1
                last = stopping or self.step == recipe.steps
                self._say("step", done=self.step, total=recipe.steps)
                if last or self.step % recipe.log_every == 0:
                    self._log(log, window, before + time.perf_counter() - started)
                if last or _due(self.step, recipe.checkpoint_every):
                    self.save()
                    self._draw_curves(always=last)
                if recipe.sample_every and (self.step == recipe.steps or _due(self.step, recipe.sample_every)):
                    self.sample()

    def _places(self, step: int) -> list[Place]:
        """This process's micro-batches of a step. Neighbours run at the same time on different processes."""
        recipe = self.recipe.at(step)
        world, rank, size = self.accelerator.num_processes, self.accelerator.process_index, recipe.micro_size
        return [
            Place(step, micro, range(micro * size, (micro + 1) * size))
            for micro in range(rank, recipe.num_micros, world)
        ]

    def _batches(self) -> Generator[Batch, None, None]:
        """The batches from the present step on; on an accelerator a thread prepares them ahead of time."""
        places = (place for step in range(self.step, self.recipe.steps) for place in self._places(step))
        if self.accelerator.device.type == "cpu":
            yield from map(self.stage.batch, places)
            return
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1) as pool:
            try:
                for place in places:
                    waiting.append(pool.submit(self.stage.batch, place))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _train_step(self, batches: Iterator[Batch]) -> tuple[dict[str, list[float]], bool]:
        """One optimizer step: the values of its metrics, and whether some process was asked to stop."""
        step, recipe, acc = self.step, self.recipe.at(self.step), self.accelerator
        lr = self.recipe.lr_at(step)
        set_step(self._optimizers, recipe, lr)
        # A stage's loss draws nothing; should some layer do so all the same, it draws by step and process.
        torch.manual_seed(seed_of(recipe.seed, "global", step, acc.process_index))
        micros = self._gradients(batches, recipe.num_micros // acc.num_processes)
        norm = float(whole(self._clip(recipe.grad_clip or math.inf)))
        mine = torch.stack([micro.loss for micro in micros]).mean()
        flags = torch.stack([mine, mine.new_tensor(float(self.stopping))])
        total, stops = self._sum(flags).tolist()
        loss = total / acc.num_processes
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(loss, norm, [m for m in micros if not math.isfinite(m.loss)])
            return {"lr": [lr], "skipped": [1.0]}, stops > 0
        for optimizer in self._optimizers:
            optimizer.step()
        self._ema.update(step)
        self._skipped = 0
        found = {"loss": [float(m.loss) for m in micros], "grad_norm": [norm], "lr": [lr], "skipped": [0.0]}
        for micro in micros:
            for name, value in micro.values.items():
                found.setdefault(name, []).append(float(value))
        return found, stops > 0

    def _clip(self, largest: float) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(list(self._params.values()), largest)
        assert norm is not None
        return norm

    def _sum(self, value: Tensor) -> Tensor:
        """Over the processes."""
        total = self.accelerator.reduce(value, "sum")
        assert isinstance(total, Tensor)
        return total

    def _gradients(self, batches: Iterator[Batch], count: int) -> list[_Micro]:
        """The mean gradient over this process's micro-batches, and over the processes with the last of them."""
        self.model.train()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        micros = []
        parts: Iterator[Batch] = (_to_device(next(batches), self.accelerator.device) for _ in range(count))
        explore = getattr(self.stage, "explore", None)
        if explore is not None:
            parts = iter(explore(self.model, list(parts)))
        for i, batch in enumerate(parts):
            with contextlib.nullcontext() if i == count - 1 else self.accelerator.no_sync(self.model):
                loss, values = self.stage.loss(self.model, batch)
                self.accelerator.backward(loss / count)
            micros.append(_Micro(loss.detach().float(), values, batch.get("names", ())))
        return micros

    def _not_finite(self, loss: float, norm: float, bad: list[_Micro]) -> None:
        """Leave the step out, or stop, as the recipe says."""
        self._skipped += 1
        names = [str(name) for micro in bad for name in micro.names][:8]
        where = f" (samples {', '.join(names)})" if names else ""
        what = f"step {self.step + 1}: loss {loss:g}, gradient norm {norm:g}{where}"
        if self.recipe.on_nan == "stop" or self._skipped >= MAX_SKIPPED:
            self.save()  # as it was before the step
            many = f"; {self._skipped} steps in a row" if self._skipped > 1 else ""
            raise NumericalError(
                f"{what}{many}. The weights before it are saved; lower lr or grad_clip, use precision: fp32, or let"
                " on_nan: skip leave such steps out"
            )
        self._say("nan", f"{what}; the step is left out")

    def _log(self, log: MetricLog | None, window: _Window, seconds: float) -> None:
        row = {"step": float(self.step), **window.means(self.accelerator), "seconds": seconds}
        window.clear()
        if log is not None:
            log.write(row)
            self._say("metrics", done=self.step, total=self.recipe.steps, values=row)

    def _draw_curves(self, *, always: bool) -> None:
        if self.is_main and (always or time.monotonic() - self._drawn > _DRAW_EVERY):
            draw_curves(self.out / METRICS_FILE, self.out / CURVES_FILE)
            self._drawn = time.monotonic()

    def _state(self) -> dict[str, Mapping[str, Tensor]]:
        stored = self._plain.state_dict().keys()
        buffers = {name: buffer for name, buffer in self._plain.named_buffers() if name in stored}
        return {"weights": {**self._params, **buffers}, "average": self._ema.average}

    def save(self) -> Path:
        """Write a checkpoint of the present step. InputError when the disk does not take it; older ones are intact."""
        state = self._state()
        groups: dict[str, Named] = {name: tensors.items() for name, tensors in state.items()}
        groups["optimizer"] = optimizer_state(self._optimizers, self._params)
        note = {"recipe": self.recipe.to_dict(), "processes": self.accelerator.num_processes}
        path, error = None, None
        try:
            path = self._checkpoints.save(self.step, groups, note)
        except InputError as failure:
            error = failure
        failed = self._sum(torch.tensor(float(error is not None), device=self.accelerator.device))
        if error is not None:
            raise error
        if float(failed):
            raise InputError("the main process could not write the checkpoint; see its message")
        assert path is not None
        self._say("saved", done=self.step, path=path)
        return path

    def _resume(self) -> None:
        latest = self._checkpoints.latest()
        if self.is_main:
            self._checkpoints.remove_leftovers()
        if latest is None:
            return
        saved = SavedState(latest)
        self._compare(saved)
        self._load(saved)
        self._say("note", f"going on from step {self.step} ({latest})")

    def _compare(self, saved: SavedState) -> None:
        """What the earlier part of the run was made with against the recipe now."""
        then, now = saved.note.get("recipe", {}), self.recipe.to_dict()
        changed = [key for key in now if then.get(key) != now[key]]
        fixed = [key for key in changed if key in _FIXED]
        if fixed:
            raise InputError(
                f"{self.out} holds a run with another {' and '.join(fixed)}; choose another folder, or put back what"
                f" {saved.folder / 'checkpoint.json'} says"
            )
        if saved.step > self.recipe.steps:
            raise InputError(f"{self.out} is at step {saved.step} already, beyond steps: {self.recipe.steps}")
        new = [key for key in changed if key not in _FREE]
        if new:
            self._say("note", f"from here on with another {', '.join(new)}")

    def _load(self, saved: SavedState) -> None:
        state = self._state()
        restore(state["weights"], saved.tensors("weights"), str(saved.folder))
        if self._ema.decay and saved.note["files"].get("average"):
            restore(self._ema.average, saved.tensors("average"), str(saved.folder))
        else:
            self._ema = EMA(self._params, self._ema.decay)
        load_optimizer_state(self._optimizers, self._params, saved.tensors("optimizer"))
        self.step = saved.step

    @torch.no_grad()
    def sample(self) -> None:
        """Write the stage's pictures, made with the averaged weights, to OUT/samples."""
        self.model.eval()
        with self._ema.applied():
            clips = self.stage.samples(self._plain)
        self.model.train()
        if not self.is_main:
            return
        for name, frames in clips.items():
            path = self.out / "samples" / f"{name}-{self.step:08d}.png"
            try:
                write_sheet(path, frames)
            except OSError as error:
                raise write_error(path, error) from error
            self._say("samples", done=self.step, path=path)

    def export(self, folder: str | Path | None = None) -> Path:
        """Write the averaged weights as the stage's part of a checkpoint folder; default: OUT/model."""
        target = self.out / MODEL_FOLDER if folder is None else Path(folder)
        state: dict[str, Tensor] = {}
        for name, tensor in {**self._plain.state_dict(), **self._ema.average}.items():
            value = whole(tensor)
            if self.is_main:
                state[name] = value
        if self.is_main:
            self._skeleton.load_state_dict(state, strict=True, assign=True)
            self._write_model(target)
            self._skeleton.to("meta")
        self.accelerator.wait_for_everyone()
        self._say("exported", done=self.step, path=target)
        return target

    def _write_model(self, target: Path) -> None:
        partial = temporary_path(target)
        try:
            partial.mkdir(parents=True)
            self.stage.export(self._skeleton.eval(), partial)
            replace_folder(partial, target)
        except OSError as error:
            raise write_error(target, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _say(self, kind: Any, message: str = "", **details: Any) -> None:
        self._on_event(Event(kind, message, **details))


@dataclass(frozen=True)
class _Micro:
    """What a micro-batch gave: its loss, its metrics, and what its samples are called."""

    loss: Tensor
    values: Mapping[str, Any]
    names: Sequence[Any]


class _Window:
    """Metrics between two rows of the log."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._seconds, self._samples = 0.0, 0

    def add(self, values: Mapping[str, list[float]], seconds: float, samples: int) -> None:
        for name, found in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + sum(found), count + len(found))
        self._seconds += seconds
        self._samples += samples

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Of every process together."""
        from accelerate.utils import gather_object

        sums: dict[str, tuple[float, int]] = {}
        for part in gather_object([self._sums]):
            for name, (total, count) in part.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = (before[0] + total, before[1] + count)
        means = {name: total / count for name, (total, count) in sums.items()}
        if self._seconds:
            means["samples_per_s"] = self._samples / self._seconds
        return means


def make_accelerator(device: str = "auto") -> Accelerator:
    """accelerate's view of this process and the others, without mixed precision. InputError where it is missing."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"training needs {' and '.join(missing)}; install what it needs: pip install '.[train]'")
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no", cpu=device == "cpu", step_scheduler_with_optimizer=False)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and stored buffers have shapes but no values, without copying any.

    What comes out of a run is loaded into it, whole, however the trained module itself is sharded.
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    stored = model.state_dict(keep_vars=True)
    memo |= {id(b): torch.empty_like(b, device="meta") for n, b in model.named_buffers() if n in stored}
    return copy.deepcopy(model, memo)


def _check_masters(model: nn.Module) -> None:
    for name, p in trained(model).items():
        if p.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} is in {p.dtype}; parameters that are trained are kept in fp32 (bf16 computes)")


def _rewrite_blocks(model: nn.Module, recipe: Recipe) -> None:
    """Recompute and compile the repeated blocks, in place."""
    for block in repeated_blocks(model).values():
        if recipe.recompute == "blocks":
            from torch.utils.checkpoint import checkpoint

            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if recipe.compile == "blocks":
            block.compile()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value
