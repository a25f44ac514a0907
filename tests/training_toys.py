"""A stage that learns in milliseconds, and the recipes that the tests of the trainer run it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcv_core.training.events import Event, OnEvent, ignore
from lcv_core.training.randomness import generator
from lcv_core.training.recipe import Recipe
from lcv_core.training.stage import Batch, Place
from lcv_core.training.trainer import Trainer


class ToyNetwork(nn.Module):
    """A perceptron with a repeated block."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])
        self.last = nn.Linear(16, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(std=0.3, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class ToyStage:
    """Learns the sum of four numbers and the product of the first two. broken: steps whose loss is NaN."""

    def __init__(self, recipe: Recipe, broken: tuple[int, ...] = ()) -> None:
        self.recipe, self.broken = recipe, broken
        self.model = ToyNetwork()
        self.seen: list[Place] = []

    def batch(self, place: Place) -> Batch:
        self.seen.append(place)
        draws = [torch.randn(4, generator=generator(self.recipe.seed, place.step, i)) for i in place.indices]
        x = torch.stack(draws)
        y = torch.stack([x.sum(dim=1), x[:, 0] * x[:, 1]], dim=1)
        if place.step in self.broken:
            y = y * torch.nan
        return {"x": x, "y": y, "names": [f"sample {i}" for i in place.indices]}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        return loss, {"mse": loss.detach()}

    def samples(self, model: nn.Module) -> dict[str, Tensor]:
        return {"grey": torch.full((2, 3, 8, 12, 3), 128, dtype=torch.uint8)}

    def export(self, model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "toy.pt")


def toy_recipe(**changes: Any) -> Recipe:
    settings = {"steps": 12, "batch_size": 16, "micro_batch_size": 4, "lr": 1e-2, "ema_decay": 0.9, "log_every": 4}
    return Recipe(**{"stage": "toy", **settings, **changes})


def toy_trainer(out: Path, *, broken: tuple[int, ...] = (), on_event: OnEvent = ignore, **changes: Any) -> Trainer:
    recipe = toy_recipe(**changes)
    return Trainer(ToyStage(recipe, broken), recipe, out, device="cpu", on_event=on_event)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything a run carries from step to step."""
    from lcv_core.training.optimizers import optimizer_state

    state = {name: p.detach().clone() for name, p in trainer._params.items()}
    state |= {f"average of {name}": value.clone() for name, value in trainer._ema.average.items()}
    optimizer = optimizer_state(trainer._optimizers, trainer._params)
    return state | {name: value.clone() for name, value in optimizer}


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def messages(self, kind: str) -> list[str]:
        return [event.message for event in self.events if event.kind == kind]
