"""GRPO for flow matching: an adapter learns from rewards of what the model makes of prompts (`policy.py`).

A sample of a step's batch is a prompt with its group. What the network makes of it, and the rewards of that, are found
by `explore` before the gradients of a step; one update per rollout, so nothing is clipped. The group shares its start
noise and everything up to the critical step, so the gradient takes one forward per prompt, not per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lcv_core import schedule as schedules
from lcv_core.errors import InputError
from lcv_core.files import require_file
from lcv_core.guidance import cfg_zero
from lcv_core.pipelines import text_to_video
from lcv_core.pipelines.base import Components, decode_latents
from lcv_core.schedule import NUM_TRAIN_TIMESTEPS
from lcv_core.shapes import latent_shape
from lcv_core.text.encoder import TextEncoder, TextStates
from lcv_core.text.prompt import clean_prompt
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.data.batches import pad_text
from lcv_core.training.data.cache import encode_rows
from lcv_core.training.data.clips import describe_clip
from lcv_core.training.events import Event, OnEvent
from lcv_core.training.policy import LARGEST_SPREAD, LEVEL, Rollout, advantages, grpo_loss, rollout
from lcv_core.training.randomness import generator
from lcv_core.training.recipe import Recipe
from lcv_core.training.rewards import give_rewards, load_reward
from lcv_core.training.stage import Batch, Place
from lcv_core.training.stages.lora import AdapterSection, say_memory, write_adapter
from lcv_core.training.strict import need, read_section
from lcv_core.weights.checkpoint import Checkpoint
from lcv_core.weights.lora_keys import AdapterFile

LORA_FILE = "grpo_lora.safetensors"
TARGETS: AdapterFile = "cfg_step_lora"  # linears of self-attention, cross-attention and feed-forward: the report's


@dataclass(frozen=True)
class DataSection:
    """prompts: a text file with one in each line; None makes them up of the procedural clips' grammar, held-back
    combinations left out. num_frames, height, width: of the clips; None is the checkpoint's own."""

    prompts: Path | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Objective:
    """rewards: weights by name (see `training.rewards`); each has its own advantages, which are summed.

    group_size: samples per prompt. num_steps: of the base schedule; one of the first `critical_steps` is random.
    level, largest_spread: of its noise. guidance_scale, negative_prompt: of sampling; the guided velocity is the
    policy, and 1 takes half the time. flow_shift: None is the checkpoint's.
    """

    rewards: Mapping[str, float]
    group_size: int = 4
    num_steps: int = 16
    critical_steps: int = 6
    level: float = LEVEL
    largest_spread: float = LARGEST_SPREAD
    guidance_scale: float = 4.0
    negative_prompt: str = ""
    flow_shift: float | None = None
    policy_weight: float = 1.0
    kl_weight: float = 3e-4

    def __post_init__(self) -> None:
        need(bool(self.rewards), "objective.rewards names no reward; {motion: 1.0} for example")
        need(self.group_size >= 2, f"objective.group_size must be at least 2 to compare, got {self.group_size}")
        need(
            1 <= self.critical_steps < self.num_steps,
            f"objective.critical_steps must be in [1, {self.num_steps - 1}] for {self.num_steps} steps,"
            f" got {self.critical_steps}",
        )
        need(self.level > 0 and self.largest_spread > 0, "objective.level and largest_spread must be above 0")
        need(self.kl_weight >= 0, f"objective.kl_weight must not be negative, got {self.kl_weight:g}")


@dataclass(frozen=True)
class SamplesSection:
    """count: prompts that are shown, of held-back combinations or the first of the file."""

    count: int = 4


class GRPOStage:
    """The stage of this module."""

    model: AdaptedDiT

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._objectives = [read_section(Objective, p.recipe.objective, "objective") for p in recipe.plan]
        self.data = read_section(DataSection, recipe.data, "data")
        for phase in recipe.plan:
            need(phase.recipe.data == recipe.data, "data may not change between the phases of a GRPO recipe")
        self.shown = read_section(SamplesSection, recipe.samples, "samples")
        section = read_section(AdapterSection, recipe.model, "model")
        for name in {name for objective in self._objectives for name in objective.rewards}:
            load_reward(name)
        self._prompts = None if self.data.prompts is None else _read_prompts(self.data.prompts)
        self.checkpoint = checkpoint = section.open()
        native = checkpoint.native
        self.size = (
            self.data.num_frames or native.num_frames, self.data.height or native.height,
            self.data.width or native.width,
        )  # fmt: skip
        self.shape = latent_shape(*self.size, channels=checkpoint.dit_config.in_channels)
        self._texts = _Texts(checkpoint)
        self._vae = checkpoint.load_vae(dtype=recipe.compute_dtype).requires_grad_(False)
        self.model = section.build(checkpoint, TARGETS, recipe)

    def _sigmas(self, objective: Objective) -> Tensor:
        shift = self.checkpoint.flow_shift if objective.flow_shift is None else objective.flow_shift
        return schedules.base(objective.num_steps, flow_shift=shift)

    def prepare(self, device: torch.device, on_event: OnEvent) -> None:
        """Say what a step takes. Where the prompts are known, encode them all and let the text encoder go."""
        guided = any(objective.guidance_scale > 1.0 for objective in self._objectives)
        batch = self.recipe.micro_size * (2 if guided else 1)
        say_memory(self.recipe, self.model, (batch, *self.shape[1:]), TARGETS, device, on_event)
        self._vae.to(device)
        if self._prompts is not None:
            negatives = [objective.negative_prompt for objective in self._objectives]
            self._texts.encode_all([*negatives, *self._prompts], device, on_event)

    def batch(self, place: Place) -> Batch:
        objective, shape = self._objectives[self.recipe.phase_index(place.step)], self.shape
        prompts, noise, step_noise, critical = [], [], [], []
        for index in place.indices:
            g = generator(self.recipe.seed, "grpo", place.step, index)
            prompts.append(self._prompt(place.step, index))
            critical.append(int(torch.randint(0, objective.critical_steps, (1,), generator=g)))
            noise.append(torch.randn(shape, generator=g))
            step_noise.append(torch.randn(objective.group_size, *shape, generator=g))
        text, negative = self._texts(prompts), self._texts([objective.negative_prompt])
        return {
            "objective": objective, "names": prompts, "noise": torch.stack(noise),
            "step_noise": torch.stack(step_noise), "critical": torch.tensor(critical), "text": text.states,
            "mask": text.mask, "negative": negative.states, "negative_mask": negative.mask,
        }  # fmt: skip

    def _prompt(self, step: int, index: int) -> str:
        number = step * self.recipe.at(step).batch_size + index
        if self._prompts is None:
            return describe_clip(self.recipe.seed, number, held_back="exclude")[1]
        round_, place = divmod(number, len(self._prompts))
        order = torch.randperm(len(self._prompts), generator=generator(self.recipe.seed, "prompts", round_))
        return self._prompts[int(order[place])]

    def explore(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        """Sample every prompt's group, reward what comes out, and compare it: adds "found" and "advantage"."""
        rewards: list[dict[str, Tensor]] = []  # [P, G] by name, for each batch
        for batch in batches:
            batch["found"] = found = self._roll_out(model, batch)
            rewards.append(self._rewards(found.latents, batch["names"], batch["objective"].rewards))
        sizes = [len(batch["names"]) for batch in batches]
        objective: Objective = batches[0]["objective"]
        total = torch.zeros(sum(sizes), objective.group_size)
        for name, weight in objective.rewards.items():
            # Over all groups of the step, those of the other processes too.
            total += weight * advantages(torch.cat([found[name] for found in rewards]), self._vae.device)
        for batch, found, advantage in zip(batches, rewards, total.split(sizes), strict=True):
            batch["advantage"] = advantage.to(batch["noise"].device)
            batch["values"] = {f"reward_{name}": float(value.mean()) for name, value in found.items()}
            batch["values"] |= {f"std_{name}": float(value.std(dim=1).mean()) for name, value in found.items()}
        return batches

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        if "advantage" not in batch:
            (batch,) = self.explore(model, [batch])
        found: Rollout = batch["found"]
        prompts = torch.arange(len(found.before), device=found.before.device)
        velocity = self._velocity(model, batch, found.before, found.sigma, prompts)
        with torch.no_grad(), self.model.using(None):
            reference = self._velocity(model, batch, found.before, found.sigma, prompts)
        objective: Objective = batch["objective"]
        loss, values = grpo_loss(
            velocity, reference, found, batch["advantage"], policy_weight=objective.policy_weight,
            kl_weight=objective.kl_weight,
        )  # fmt: skip
        return loss, batch["values"] | values

    def _roll_out(self, model: nn.Module, batch: Batch) -> Rollout:
        def predict(x: Tensor, sigma: float, prompts: Tensor) -> Tensor:
            return self._velocity(model, batch, x, x.new_full((len(x),), sigma), prompts)

        objective: Objective = batch["objective"]
        return rollout(
            predict, batch["noise"], batch["step_noise"], batch["critical"], self._sigmas(objective),
            level=objective.level, largest=objective.largest_spread,
        )  # fmt: skip

    def _velocity(self, model: nn.Module, batch: Batch, x: Tensor, sigma: Tensor, prompts: Tensor) -> Tensor:
        """The guided velocity of latents [N, ...], each with the sigma and the prompt of its own, fp32."""
        timestep = (sigma * NUM_TRAIN_TIMESTEPS).unsqueeze(1).expand(-1, x.shape[2])
        text, mask, scale = batch["text"][prompts], batch["mask"][prompts], batch["objective"].guidance_scale
        if not scale > 1.0:
            return model(x, timestep, text, mask)
        # In one forward: what wraps the network for several processes expects one before a backward pass.
        negative, negative_mask = batch["negative"].expand_as(text), batch["negative_mask"].expand_as(mask)
        both = [torch.cat(pair) for pair in ((x, x), (timestep, timestep), (text, negative), (mask, negative_mask))]
        cond, uncond = model(*both).chunk(2)
        return cfg_zero(cond, uncond, scale)

    def _rewards(self, latents: Tensor, prompts: Sequence[str], names: Iterable[str]) -> dict[str, Tensor]:
        """[P, G, ...] latents -> rewards [P, G] by name."""
        rows: list[list[dict[str, float]]] = []
        parts = Components(self.model, self._vae)
        for group, prompt in zip(latents, prompts, strict=True):
            clips = decode_latents(parts, group)
            rows.append([give_rewards(names, clip, prompt) for clip in clips])
        return {name: torch.tensor([[cell[name] for cell in row] for row in rows]) for name in names}

    @torch.no_grad()
    def samples(self, model: nn.Module) -> dict[str, Tensor]:
        """Clips of the same prompts and noise every time, sampled as in training."""
        count, objective = self.shown.count, self._objectives[-1]
        if count < 1 or not isinstance(model, AdaptedDiT):
            return {}
        if self._prompts is None:
            prompts = [describe_clip(self.recipe.seed, i, held_back="only")[1] for i in range(count)]
        else:
            prompts = self._prompts[:count]
        num_frames, height, width = self.size
        shift = objective.flow_shift
        parts = Components(model, self._vae, flow_shift=self.checkpoint.flow_shift if shift is None else shift)
        clips = text_to_video(
            parts, text=self._texts(prompts), negative_text=self._texts([objective.negative_prompt]),
            height=height, width=width, num_frames=num_frames, num_steps=objective.num_steps,
            guidance_scale=objective.guidance_scale,
            generator=[generator(self.recipe.seed, "samples", i) for i in range(len(prompts))],
        )  # fmt: skip
        return {"clips": (clips * 255.0).round().to(torch.uint8)}

    def export(self, model: nn.Module, folder: Path) -> None:
        """lora/grpo_lora.safetensors, in the dialect of the official files; `--lora` takes it."""
        write_adapter(model, folder / "lora" / LORA_FILE, self.recipe)


class _Texts:
    """Text states of prompts, on the CPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._encoder: TextEncoder | None = checkpoint.load_text_encoder()
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> TextStates:
        return TextStates(*pad_text([self._rows(prompt) for prompt in prompts]))

    def _rows(self, prompt: str) -> Tensor:
        """One by one, so that a prompt's states do not depend on those beside it."""
        if prompt in self._known:
            return self._known[prompt]
        assert self._encoder is not None
        return encode_rows(self._encoder, [clean_prompt(prompt)])[0]

    def encode_all(self, prompts: Sequence[str], device: torch.device, on_event: OnEvent) -> None:
        """Keep the states of all these prompts, encoded on `device`, and nothing else."""
        if self._encoder is not None:
            self._encoder.model.to(device)  # type: ignore[arg-type]
            for done, prompt in enumerate(prompts, start=1):
                self._known[prompt] = self._rows(prompt)
                on_event(Event("progress", "reading the prompts", done, len(prompts)))
        self._encoder = None


def _read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = require_file(path, "a prompts").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; data.prompts names a file with a prompt in each line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    need(bool(prompts), f"{path} has no prompts; it should have one in each line")
    return prompts
