"""An adapter of one's own on a model: flow matching on one's videos, with everything but the adapter frozen.

It is the flow stage with another network, so the same data, tasks and objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcv_core.errors import InputError
from lcv_core.shapes import latent_shape
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.events import Event, OnEvent
from lcv_core.training.memory import GB, step_bytes
from lcv_core.training.randomness import generator
from lcv_core.training.recipe import Recipe
from lcv_core.training.stages.flow import FlowStage
from lcv_core.training.stages.flow_settings import DataSection
from lcv_core.training.strict import need, read_section
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint
from lcv_core.weights.lora_keys import OFFICIAL_RANK, OFFICIAL_SCALE, AdapterFile, official_targets

LORA_FILE = "user_lora.safetensors"


@dataclass(frozen=True)
class AdapterSection:
    """The section `model` of the stages that train an adapter.

    checkpoint: folder of the model; vae, text_encoder, tokenizer name others. rank, scale: of the adapter, scale =
    alpha / rank. adapter: the file of one to start from.
    """

    checkpoint: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    rank: int = OFFICIAL_RANK
    scale: float = OFFICIAL_SCALE
    adapter: Path | None = None

    def __post_init__(self) -> None:
        need(self.rank >= 1, f"model.rank must be at least 1, got {self.rank}")
        need(self.scale > 0, f"model.scale must be above 0, got {self.scale:g}; the official files have 0.5")

    @property
    def parts(self) -> dict[str, Path]:
        """The parts that are elsewhere."""
        found = {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer")}
        return {name: path for name, path in found.items() if path is not None}

    def open(self) -> Checkpoint:
        """The checkpoint, with all its parts."""
        checkpoint = open_checkpoint(self.checkpoint, **self.parts)
        for part in ("dit", "vae", "text_encoder", "tokenizer"):
            checkpoint.require(part)
        return checkpoint

    def build(self, checkpoint: Checkpoint, file: AdapterFile, recipe: Recipe) -> AdaptedDiT:
        """The frozen transformer, in the dtype it computes in, with an adapter on the targets of `file`."""
        dit = checkpoint.load_dit(dtype=recipe.compute_dtype)
        # Exact timesteps are what is learnt; inference in bf16 rounds them as the config says.
        dit.config = dataclasses.replace(dit.config, timestep_precision="fp32")
        model = AdaptedDiT(
            dit, official_targets(file, dit.config.depth), rank=self.rank, scale=self.scale,
            generator=generator(recipe.seed, "adapter"),
        )  # fmt: skip
        if self.adapter is not None:
            model.load(self.adapter)
        model._no_split_modules = ["Block"]  # type: ignore[assignment]  # what accelerate shards one by one
        return model


def flow_recipe(recipe: Recipe, section: AdapterSection, own: Collection[str] = ()) -> Recipe:
    """What of a recipe the flow stage reads. own: keys of the objective that are not its."""

    def rest(objective: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in objective.items() if key not in own}

    phases = tuple(
        {**phase, "objective": rest(phase["objective"])} if "objective" in phase else phase for phase in recipe.phases
    )
    model = {"checkpoint": section.checkpoint, "start": "checkpoint", **section.parts}
    return dataclasses.replace(recipe, model=model, objective=rest(recipe.objective), phases=phases)


class LoRAStage(FlowStage):
    """The stage of this module."""

    file: AdapterFile = "cfg_step_lora"  # whose targets the adapter has
    exported: str = LORA_FILE
    own: tuple[str, ...] = ()  # keys of the objective beyond those of flow matching

    def __init__(self, recipe: Recipe) -> None:
        self.adapter = read_section(AdapterSection, recipe.model, "model")
        super().__init__(flow_recipe(recipe, self.adapter, self.own))
        self.recipe = recipe

    def _start(self) -> AdaptedDiT:
        return self.adapter.build(self.checkpoint, self.file, self.recipe)

    @property
    def adapted(self) -> AdaptedDiT:
        assert isinstance(self.model, AdaptedDiT)
        return self.model

    def prepare(self, device: torch.device, on_event: OnEvent) -> None:
        """Say what it takes, then fill the caches."""
        recipe, data = self.recipe, max(self._sections, key=_volume)
        _, T, h, w = latent_shape(data.num_frames, *_pixels(data))
        say_memory(recipe, self.adapted, (recipe.micro_size, T, h, w), self.file, device, on_event)
        super().prepare(device, on_event)

    def export(self, model: nn.Module, folder: Path) -> None:
        """lora/ with the adapter, in the dialect of the official files."""
        write_adapter(model, folder / "lora" / self.exported, self.recipe)


def _pixels(data: DataSection) -> tuple[int, int]:
    """(height, width) of the clips, of a typical one where they differ."""
    if data.folder is not None:
        return data.folder.height or data.folder.area_of[0], data.folder.width or data.folder.area_of[1]
    assert data.procedural is not None
    return data.procedural.height, data.procedural.width


def _volume(data: DataSection) -> int:
    height, width = _pixels(data)
    return data.num_frames * height * width


def write_adapter(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """The trained adapter as a file, in the recipe's export precision."""
    assert isinstance(model, AdaptedDiT)
    model.export(path, {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.export_precision])


def say_memory(
    recipe: Recipe, model: AdaptedDiT, latents: tuple[int, int, int, int], file: AdapterFile, device: torch.device,
    on_event: OnEvent,
) -> None:  # fmt: skip
    """A note on what a step takes, unsharded; InputError where one GPU alone has not even that much."""
    step = step_bytes(
        model.config, latents, file=file, rank=model.rank, dtype=model.dtype, average=recipe.ema_decay > 0,
        recompute=recipe.recompute == "blocks",
    )  # fmt: skip
    on_event(Event("note", f"a step with latents {list(latents)} takes about {step}"))
    if device.type != "cuda" or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if step.total > total:
        raise InputError(
            f"a step takes about {step.total / GB:.0f} GB, this GPU has {total / GB:.0f}; use recompute: blocks, a"
            " smaller micro_batch_size, fewer or smaller frames, a lower model.rank, or several GPUs"
        )
