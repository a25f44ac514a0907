"""A training run as a YAML file: read strictly, checked whole before anything starts.

A recipe may build on another (`extends: other.yaml`, beside it): mappings are merged, everything else is replaced. It
may go through phases, each of which changes some keys for a number of steps; `Recipe.at` gives what holds at a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from lcv_core.errors import InputError
from lcv_core.training.strict import check_keys, need, read_section

Section = Mapping[str, Any]

# What a phase may change: nothing that would change the shape of the network or of the optimizer's state.
PHASE_KEYS = (
    "steps", "batch_size", "micro_batch_size", "lr", "warmup", "lr_schedule", "lr_end", "weight_decay", "grad_clip",
    "data", "objective",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) of a run and the recipe that holds for them."""

    start: int
    stop: int
    recipe: Recipe


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and when it saves and shows something.

    stage: which stage of training (`lcv_core.training.stages`).
    steps: optimizer steps; with phases, their sum.
    batch_size: samples per step, over all processes. micro_batch_size: samples at a time on one process (None: all);
        a step's micro-batches are shared out among the processes, so that the result does not depend on their number.
    optimizer: "adamw" (Loshchilov and Hutter 2017), or "muon" (Jordan et al. 2024) for the matrices of the repeated
        blocks with AdamW for the rest; both take the same lr. Weight decay leaves biases and norms alone.
    lr: constant as published, or falling to lr * lr_end at the end of the run (of the phase) as a "cosine" or
        "linear"ly, after a linear rise over `warmup` steps.
    grad_clip: largest gradient norm; 0 does not clip. ema_decay: of the average that is sampled and exported; 0: none.
    precision: "bf16" computes in bf16 and keeps the weights, their gradients and the optimizer in fp32. Layers of
        `lcv_core.layers` cast their weights to what they are given, so a stage casts its inputs (`compute_dtype`).
    compile: "blocks" compiles each repeated block. recompute: "blocks" computes them twice instead of keeping what is
        inside them for the backward pass.
    checkpoint_every, sample_every, log_every: in steps; 0: at the end alone (samples: never). keep: checkpoints kept.
    on_bad_data, on_nan: "stop" with an error, or "skip" it and say so.
    export_precision: of the weights that come out.
    model, data, objective, samples: read by the stage.
    phases: overrides of some keys, one after another; each names its `steps`.
    """

    stage: str
    batch_size: int
    steps: int = 0
    micro_batch_size: int | None = None
    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    warmup: int = 0
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    lr_end: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["none", "blocks"] = "none"
    recompute: Literal["none", "blocks"] = "none"
    checkpoint_every: int = 1000
    keep: int = 2
    sample_every: int = 0
    log_every: int = 10
    on_bad_data: Literal["stop", "skip"] = "stop"
    on_nan: Literal["stop", "skip"] = "stop"
    export_precision: Literal["fp32", "bf16"] = "fp32"
    model: Section = field(default_factory=dict)
    data: Section = field(default_factory=dict)
    objective: Section = field(default_factory=dict)
    samples: Section = field(default_factory=dict)
    phases: tuple[Section, ...] = ()

    def __post_init__(self) -> None:
        if self.phases:
            self._check_phases()
        for name in ("steps", "batch_size", "keep", "log_every"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "warmup", "checkpoint_every", "sample_every"):
            need(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip"):
            need(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name):g}")
        need(self.lr > 0, f"lr must be above 0, got {self.lr:g}; 1e-4 is the report's")
        need(0 <= self.lr_end <= 1, f"lr_end is a part of lr, in [0, 1], got {self.lr_end:g}")
        need(self.eps > 0, f"eps must be above 0, got {self.eps:g}")
        need(all(0 <= b < 1 for b in self.betas), f"betas must be in [0, 1), got {list(self.betas)}")
        need(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay:g}; 0.999 is usual, 0 is off")
        micro = self.micro_size
        need(
            1 <= micro <= self.batch_size and self.batch_size % micro == 0,
            f"batch_size {self.batch_size} must be a multiple of micro_batch_size, got {micro};"
            f" try {_largest_divisor(self.batch_size, micro)}",
        )

    def _check_phases(self) -> None:
        for index, phase in enumerate(self.phases):
            check_keys(phase, PHASE_KEYS, f"phases[{index}]")
            need(
                type(phase.get("steps")) is int and phase["steps"] >= 1,
                f"phases[{index}].steps must be at least 1, got {phase.get('steps')!r}",
            )
        total = sum(phase["steps"] for phase in self.phases)
        need(
            self.steps in (0, total),
            f"steps is {self.steps}, the phases have {total} together; leave steps out of a recipe with phases",
        )
        object.__setattr__(self, "steps", total)

    @property
    def micro_size(self) -> int:
        """Samples of a micro-batch."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def num_micros(self) -> int:
        """Micro-batches of a step, over all processes."""
        return self.batch_size // self.micro_size

    @property
    def compute_dtype(self) -> Any:
        """The torch dtype that a stage casts the inputs of its network to."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]

    @cached_property
    def plan(self) -> tuple[Phase, ...]:
        """The phases in order, each with the whole recipe that holds in it; one for a recipe without."""
        if not self.phases:
            return (Phase(0, self.steps, self),)
        plan, start = [], 0
        base = dataclasses.replace(self, phases=())
        for index, changes in enumerate(self.phases):
            merged = merge(base.to_dict(), changes)
            recipe = _described(f"phases[{index}]", merged)
            plan.append(Phase(start, start + recipe.steps, recipe))
            start += recipe.steps
        return tuple(plan)

    def phase_index(self, step: int) -> int:
        """Which phase a step (from 0) is in; the last one after the end."""
        return next((i for i, phase in enumerate(self.plan) if step < phase.stop), len(self.plan) - 1)

    def phase_at(self, step: int) -> Phase:
        return self.plan[self.phase_index(step)]

    def at(self, step: int) -> Recipe:
        """What holds at a step (from 0)."""
        return self.phase_at(step).recipe

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        phase = self.phase_at(step)
        recipe, done = phase.recipe, step - phase.start
        if done < recipe.warmup:
            return recipe.lr * (done + 1) / (recipe.warmup + 1)
        part = min(1.0, (done - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
        fall = {"constant": 0.0, "linear": part, "cosine": 0.5 - 0.5 * math.cos(math.pi * part)}[recipe.lr_schedule]
        return recipe.lr * (1 - (1 - recipe.lr_end) * fall)

    def with_steps(self, steps: int) -> Recipe:
        """The recipe for a run of another length: phases beyond it are left out, the last one is cut or prolonged."""
        if not self.phases:
            return dataclasses.replace(self, steps=steps)
        need(steps >= 1, f"steps must be at least 1, got {steps}")
        last = self.phase_index(steps - 1)
        cut = {**self.phases[last], "steps": steps - self.plan[last].start}
        return dataclasses.replace(self, steps=0, phases=(*self.phases[:last], cut))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON-able data; `Recipe.from_dict` reads it back."""
        data = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if self.phases:
            data["steps"] = 0
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """From plain data, strictly: InputError for unknown keys and for values out of range."""
        return read_section(cls, data, "")


def _described(where: str, data: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.from_dict(data)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _largest_divisor(number: int, limit: int) -> int:
    return next((d for d in range(min(max(limit, 1), number), 0, -1) if number % d == 0), 1)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def shipped_recipes() -> dict[str, Path]:
    """The recipes of this package by name ("mini/flow")."""
    folder = Path(str(resources.files("lcv_core.training"))) / "recipes"
    found = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a shipped one; InputError that lists those."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name).removesuffix(".yaml") in shipped:
        return shipped[str(name).removesuffix(".yaml")]
    raise InputError(f"there is no recipe {name}; name a YAML file, or one of: {', '.join(shipped)}")


def load_recipe(name: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or of that name among the shipped ones, with changes like "lr=1e-3", "model.depth=6".

    InputError names the file for everything that is wrong in it.
    """
    path = find_recipe(name)
    data = _read_yaml(path, [])
    for change in changes:
        data = merge(data, _parse_change(change))
    return _described(str(path), data)


def _read_yaml(path: Path, seen: list[Path]) -> dict[str, Any]:
    yaml = _yaml()
    path = path.resolve()
    if path in seen:
        raise InputError(f"{path} extends itself, by way of {' and '.join(p.name for p in seen)}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {seen[-1] if seen else 'the recipe'} extends it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold the keys of a recipe, such as stage and steps; got {data!r}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise InputError(f"{path}: extends must name one YAML file beside it, got {parent!r}")
    return merge(_read_yaml(path.parent / parent, [*seen, path]), data)


def _parse_change(change: str) -> dict[str, Any]:
    key, separator, text = change.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"a change must be KEY=VALUE, such as lr=1e-3 or model.depth=6, got {change!r}")
    yaml = _yaml()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"the value of {key} is not valid YAML: {text!r}") from None
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise InputError("recipes are YAML files; install what training needs: pip install '.[train]'") from None
    return yaml
