"""What the trainer asks of a stage: the network that learns, its batches, its loss, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where in a run a batch is: optimizer step and micro-batch within it, both from 0, and the samples' indices in the
    global batch. Everything random in a batch is drawn from (recipe seed, step, micro, index), so that a resumed run
    and a run on several processes see what an uninterrupted one on one process sees."""

    step: int
    micro: int
    indices: Sequence[int]


class Stage(Protocol):
    """A stage of training. Its constructor takes the recipe, reads frozen parts, and checks those and the data.

    model: the trained network; its parameters that require gradients are optimised and are in fp32. What else it needs
        the stage keeps itself.
    A stage may have `prepare(self, device: torch.device, on_event: OnEvent) -> None`, for long work before the first
    step (filling a cache); it is called on every process, and reports "progress" events. And it may have
    `explore(self, model: nn.Module, batches: list[Batch]) -> list[Batch]`, for what a step has to know of all its
    batches before the loss of any (the rewards of what the model makes): called once a step with this process's batches
    on their device, it gives them back with what it found.
    """

    model: nn.Module

    def batch(self, place: Place) -> Batch:
        """Samples with all their noise and timesteps, on the CPU: the same place gives the same batch.

        Draw with `randomness.generator(recipe.seed, ..., place.step, index)`; what changes between the phases of a
        recipe is in `recipe.at(place.step)`. "names", where it is there, says what the samples are called in errors.
        On a GPU a thread of its own calls this.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The mean loss over a batch, and metrics to log (floats or detached scalars). `model` is `self.model` as the
        trainer has wrapped it, and is called as a module. The batch is on its device. Draws nothing."""
        ...

    def samples(self, model: nn.Module) -> dict[str, Tensor]:
        """Pictures of how far it is: by name, frames uint8 [N, F, H, W, 3], N clips below each other. May be empty.
        `model` is the network itself, with averaged weights, in eval mode; no gradients are recorded."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into the new checkpoint folder `folder`, in the official layout. `model` is a copy of
        the network on the CPU, whole, with averaged weights. Called on the main process alone."""
        ...
