"""Distillation into one adapter, by the formulas of `distillation.py`: first guidance, then steps.

"guidance": the student without guidance learns the velocity of the model with it. "consistency": from there on, or
from any adapter, it learns to take the steps of the distilled schedule. Clips, tasks and captions are those of flow
matching. Both write lora/cfg_step_lora; the second starts from the file of the first, and its file has both in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcv_core import schedule as schedules
from lcv_core.denoise import denoise
from lcv_core.dit.model import LongCatDiT
from lcv_core.pipelines.base import draw_noise, put_condition
from lcv_core.schedule import DISTILL_GRID, NUM_TRAIN_TIMESTEPS, shift_sigmas
from lcv_core.text.encoder import TextStates
from lcv_core.text.prompt import clean_prompt
from lcv_core.training.adapters import BranchName
from lcv_core.training.data.batches import pad_text
from lcv_core.training.data.cache import encode_rows
from lcv_core.training.distillation import consistent_velocity, guided, levels, pseudo_huber
from lcv_core.training.events import OnEvent
from lcv_core.training.losses import flow_pair, noisy_condition, spread_uniform, velocity_errors
from lcv_core.training.randomness import generator
from lcv_core.training.recipe import Recipe
from lcv_core.training.stage import Batch, Place
from lcv_core.training.stages.lora import LoRAStage
from lcv_core.training.strict import need, read_section


@dataclass(frozen=True)
class Distillation:
    """The keys of `objective` beyond those of flow matching. flow_shift there is that of the checkpoint unless given.

    guidance_scale: of the teacher; 4 for guidance, and 1 for consistency, whose teacher has absorbed it.
        negative_prompt: what guidance leads away from; one for all.
    num_steps: the steps of the distilled schedule that consistency leads along; phases may go on to fewer.
    average_decay: of the running average of the student that is asked at the neighbouring level; 0 asks itself.
    distance: of velocities, "l2" (their mean square) or "pseudo_huber" with `huber_c`, in units of velocity.
    """

    method: Literal["guidance", "consistency"]
    guidance_scale: float | None = None
    negative_prompt: str = ""
    num_steps: int = 16
    average_decay: float = 0.95
    distance: Literal["l2", "pseudo_huber"] = "l2"
    huber_c: float = 0.03

    def __post_init__(self) -> None:
        need(self.scale >= 1, f"objective.guidance_scale must be at least 1, got {self.scale:g}")
        need(
            1 <= self.num_steps <= DISTILL_GRID,
            f"objective.num_steps must be in [1, {DISTILL_GRID}], got {self.num_steps}",
        )
        need(0 <= self.average_decay < 1, f"objective.average_decay must be in [0, 1), got {self.average_decay:g}")
        need(self.huber_c > 0, f"objective.huber_c must be above 0, got {self.huber_c:g}")

    @property
    def scale(self) -> float:
        """Of the teacher's guidance."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        return 4.0 if self.method == "guidance" else 1.0

    def mean(self, errors: Tensor) -> Tensor:
        """Mean squared errors [B] as distances [B]."""
        return errors if self.distance == "l2" else pseudo_huber(errors, self.huber_c)


class DistillStage(LoRAStage):
    """The stage of this module."""

    exported = "cfg_step_lora.safetensors"
    own = tuple(Distillation.__dataclass_fields__)

    def __init__(self, recipe: Recipe) -> None:
        self._distillations = [_distillation(phase.recipe.objective) for phase in recipe.plan]
        methods = {distillation.method for distillation in self._distillations}
        need(len(methods) == 1, "objective.method is one for all phases; make two recipes, the second with the adapter")
        super().__init__(recipe)
        self.teacher: BranchName | None = None  # the model without an adapter
        if self._distillations[0].method == "consistency":
            if self.adapter.adapter is not None:
                self.adapted.keep("fixed", self.recipe.compute_dtype)
                self.teacher = "fixed"
            if any(distillation.average_decay for distillation in self._distillations):
                self.adapted.keep("average")
        self._negative: Mapping[str, Tensor] = {}

    def prepare(self, device: torch.device, on_event: OnEvent) -> None:
        super().prepare(device, on_event)
        prompts = sorted({clean_prompt(distillation.negative_prompt) for distillation in self._distillations})
        encoder = self.checkpoint.load_text_encoder(device=device)
        self._negative = dict(zip(prompts, encode_rows(encoder, prompts), strict=True))

    def batch(self, place: Place) -> Batch:
        phase = self.recipe.phase_index(place.step)
        distillation, batch = self._distillations[phase], super().batch(place)
        rows = self._negative[clean_prompt(distillation.negative_prompt)]
        negative, mask = pad_text([rows])
        batch |= {"step": place.step, "phase": phase, "negative": negative, "negative_mask": mask}
        shift, drawn = self._shift(phase), spread_uniform(self._offset(place.step), place.indices)
        if distillation.method == "guidance":
            return batch | {"t": shift_sigmas(drawn, shift)}
        grid = levels(distillation.num_steps, shift)
        index = grid.index(drawn)
        return batch | {"index": index, "t": grid.level[index]}

    def _offset(self, step: int) -> float:
        return torch.rand(1, generator=generator(self.recipe.seed, "t", step), dtype=torch.float64).item()

    def _shift(self, phase: int) -> float:
        shift = self._objectives[phase].flow_shift
        return self.checkpoint.flow_shift if shift == "auto" else shift

    def explore(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        """Once a step: the average follows what the last one learnt."""
        decay = self._distillations[batches[0]["phase"]].average_decay
        if decay and batches[0]["step"] and "average" in self.adapted.kept:
            self.adapted.update_average(decay)
        return batches

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        distillation, n_c = self._distillations[batch["phase"]], batch["num_cond_latents"]
        x0, noise = batch["latents"], batch["noise"]
        x, _ = flow_pair(x0, noise, batch["t"])
        if n_c:
            cond = noisy_condition(x0[:, :, :n_c], noise[:, :, :n_c], batch["levels"])
            x = torch.cat([cond, x[:, :, n_c:]], dim=2)
        target = self._target(distillation, batch, x)
        errors = velocity_errors(_velocity(model, batch, x, batch["t"]), target, n_c)
        loss = (batch["weight"] * distillation.mean(errors)).mean()
        return loss, {f"loss_{batch['task']}": loss.detach(), "mse": errors.detach().mean()}

    @torch.no_grad()
    def _target(self, distillation: Distillation, batch: Batch, x: Tensor) -> Tensor:
        """The velocity to learn at x. The teachers run on the network itself, not on the trainer's wrapping of it."""
        model, n_c = self.adapted, batch["num_cond_latents"]

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            with model.using(self.teacher):
                cond = _velocity(model, batch, x, t)
                if not distillation.scale > 1:
                    return cond
                return guided(cond, _velocity(model, batch, x, t, "negative"), distillation.scale, n_c)

        if distillation.method == "guidance":
            return teacher(x, batch["t"])

        def neighbour(x: Tensor, t: Tensor) -> Tensor:
            with model.using("average" if distillation.average_decay else "trained"):
                return _velocity(model, batch, x, t)

        grid = levels(distillation.num_steps, self._shift(batch["phase"]))
        return consistent_velocity(teacher, neighbour, x, batch["index"], grid, n_c)

    def _make(self, model: LongCatDiT, prompts: Sequence[str], cond: Tensor, size: tuple[int, int, int]) -> Tensor:
        """As sampling is meant to be: without guidance, in the distilled steps where those were learnt."""
        distillation, shift, n_c = self._distillations[-1], self._shift(-1), cond.shape[2]
        if distillation.method == "consistency":
            sigmas = schedules.distilled(distillation.num_steps, flow_shift=shift)
        else:
            sigmas = schedules.base(self.shown.num_steps, flow_shift=shift)
        draws = [generator(self.shown.seed, "shown", i) for i in range(len(prompts))]
        noise = draw_noise((len(prompts), self.config.in_channels, *size), draws)
        text = TextStates(*pad_text([self._data[-1].texts.rows(prompt) for prompt in prompts]))
        start = put_condition(noise, cond) if n_c else noise
        return denoise(model, start, sigmas, text=text, num_cond_latents=n_c).cpu()


def _distillation(objective: Mapping[str, Any]) -> Distillation:
    own = {key: value for key, value in objective.items() if key in DistillStage.own}
    return read_section(Distillation, own, "objective")


def _velocity(
    model: nn.Module, batch: Batch, x: Tensor, t: Tensor, text: Literal["text", "negative"] = "text"
) -> Tensor:
    """fp32 [B, C, T, h, w] at t [B]; condition frames have timestep 0."""
    n_c, B = batch["num_cond_latents"], x.shape[0]
    timestep = (NUM_TRAIN_TIMESTEPS * t)[:, None].repeat(1, x.shape[2])
    timestep[:, :n_c] = 0.0
    states, mask = batch[text], batch[f"{text}_mask"]
    return model(x, timestep, states.expand(B, -1, -1), mask.expand(B, -1), num_cond_latents=n_c)
