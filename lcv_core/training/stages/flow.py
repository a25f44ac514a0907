"""Flow matching for the transformer: image, text-to-video, image-to-video and continuation as one objective.

The tasks differ in how many leading latent frames are condition: none, one or several, and an image is a clip of one
latent frame. Condition frames are clean but for a little noise, their timestep is 0, and the loss leaves them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcv_core import schedule as schedules
from lcv_core.config import DiTConfig, Native
from lcv_core.denoise import Guidance, denoise
from lcv_core.dit.model import LongCatDiT
from lcv_core.pipelines.base import Components, decode_latents, put_condition
from lcv_core.schedule import NUM_TRAIN_TIMESTEPS, shift_sigmas
from lcv_core.shapes import latent_shape, num_latents, num_pixel_frames, token_grid
from lcv_core.text.encoder import TextStates
from lcv_core.training.data.batches import CachedClips, choose, draw_bucket, pad_text, shuffled
from lcv_core.training.data.cache import Item, Workers, fill_latents, fill_texts
from lcv_core.training.events import Event, OnEvent
from lcv_core.training.export import copy_part, in_precision
from lcv_core.training.losses import flow_pair, noisy_condition, spread_uniform, timestep_weight, velocity_errors
from lcv_core.training.memory import GB, whole_step_bytes
from lcv_core.training.randomness import generator, seed_of
from lcv_core.training.recipe import Recipe
from lcv_core.training.stage import Batch, Place
from lcv_core.training.stages.flow_settings import TASKS, DataSection, ModelSection, Objective, SamplesSection
from lcv_core.training.strict import check_keys, need, read_section
from lcv_core.vae.model import WanVAE
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint, open_text_encoder, open_vae
from lcv_core.weights.init import SCHEDULER_CONFIG, dit_state
from lcv_core.weights.write import write_json, write_sharded

_USUAL_TEXT = 64  # rows that cross-attention reads of usual captions, see `pads_as_one`
_SHARD_BYTES = 10 << 30  # of an exported file, as in the official checkpoint


class FlowStage:
    """The stage of this module."""

    model: LongCatDiT

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.section = section = read_section(ModelSection, recipe.model, "model")
        self.shown = read_section(SamplesSection, recipe.samples, "samples")
        self._objectives = [read_section(Objective, p.recipe.objective, "objective") for p in recipe.plan]
        self._sections = [read_section(DataSection, p.recipe.data, "data") for p in recipe.plan]
        self._sources = [data.source(recipe.on_bad_data) for data in self._sections]
        for objective, data in zip(self._objectives, self._sections, strict=True):
            objective.check_frames(data.num_frames)
        self.checkpoint = open_checkpoint(
            section.checkpoint, vae=section.vae, text_encoder=section.text_encoder, tokenizer=section.tokenizer
        )
        for part in ("vae", "text_encoder", "tokenizer"):
            self.checkpoint.require(part)
        self.config = self._dit_config()
        self.native = self._native()
        self._data: list[CachedClips] = []  # by phase
        self._vae: WanVAE | None = None
        self.model = self._start()

    def _dit_config(self) -> DiTConfig:
        if self._started_from is not None:
            need(not self.section.config, "model.config is for a random start; leave it out")
            return self._started_from.dit_config
        vae, _ = open_vae(self.checkpoint.require("vae"))
        text, _ = open_text_encoder(self.checkpoint.require("text_encoder"))
        given = {"caption_channels": text.d_model, "in_channels": vae.z_dim, "out_channels": vae.z_dim}
        known = {f.name for f in dataclasses.fields(DiTConfig)} - {*given, "bsa"} | {"bsa_params"}
        check_keys(self.section.config, known, "model.config")
        return DiTConfig.from_dict({"_class_name": "LongCatVideo", **given, **self.section.config})

    @property
    def _started_from(self) -> Checkpoint | None:
        start = self.section.start
        if start == "random":
            return None
        return self.checkpoint if start == "checkpoint" else open_checkpoint(start)

    def _native(self) -> Native:
        started, data = self._started_from, self._sections[-1]
        if self.section.native:
            return read_section(Native, self.section.native, "model.native")
        if started is not None:
            return started.native
        if data.procedural is not None:
            height, width, rate = data.procedural.height, data.procedural.width, data.procedural.frame_rate
        else:
            assert data.folder is not None
            height, width = data.folder.height or data.folder.area_of[0], data.folder.width or data.folder.area_of[1]
            rate = data.folder.frame_rate
        T = num_latents(data.num_frames)
        cond = min(max(self._objectives[-1].cond_latents, default=1), max(T - 1, 1))
        return Native(height, width, data.num_frames, num_pixel_frames(cond), rate)

    def _start(self) -> LongCatDiT:
        if self._started_from is not None:
            model = self._started_from.load_dit(dtype=torch.float32)
        else:
            model = LongCatDiT(self.config, device="meta", dtype=torch.float32)
            model.load_state_dict(initial_state(self.config, self.recipe.seed), assign=True)
        # Exact timesteps are what is learnt; inference in bf16 rounds them as the config says.
        model.config = dataclasses.replace(self.config, timestep_precision="fp32")
        model.compute_dtype = None if self.recipe.precision == "fp32" else self.recipe.compute_dtype
        model._no_split_modules = ["Block"]  # type: ignore[assignment]  # what accelerate shards one by one
        return model.train().requires_grad_(True)

    @property
    def flow_shift(self) -> float:
        """Of what comes out: the last phase's, at the native size."""
        native = self.native
        _, *size = latent_shape(native.num_frames, native.height, native.width)
        return self._objectives[-1].shift(_tokens((size[0], size[1], size[2]), self.config))

    def prepare(self, device: torch.device, on_event: OnEvent) -> None:
        """Fill the caches."""
        from accelerate import PartialState

        self._say_memory(on_event)
        state = PartialState()
        workers = Workers(state.process_index, state.num_processes)
        prints = self.checkpoint.part_fingerprints()
        self._vae = vae = self.checkpoint.load_vae(device=device, dtype=torch.float32).requires_grad_(False)
        vae_key = f"{prints['vae']}-{seed_of(str(vae.config))}"
        text_key = f"{prints['text_encoder']}-{prints['tokenizer']}"

        def encoder() -> Any:
            return self.checkpoint.load_text_encoder(device=device)

        for i, (data, source) in enumerate(zip(self._sections, self._sources, strict=True)):
            if data in self._sections[:i]:
                self._data.append(self._data[self._sections.index(data)])
                continue
            latents = fill_latents(
                source, vae, vae_key, data.cache, data.latents, on_bad_data=self.recipe.on_bad_data, on_event=on_event,
                workers=workers,
            )  # fmt: skip
            captions = [text for item in latents.items() for text in source.captions(item.part, item.position)]
            further = [text for objective in self._objectives for text in objective.no_prompt]
            texts = fill_texts(
                [*self.shown.prompts, *further, *captions], encoder, text_key, data.cache, store=data.texts,
                on_event=on_event, workers=workers,
            )  # fmt: skip
            self._data.append(CachedClips(source, latents, texts))
            on_event(Event("note", f"{len(latents)} clips with {len(set(captions))} captions"))

    def _say_memory(self, on_event: OnEvent) -> None:
        if type(self.model) is not LongCatDiT:  # an adapter on it says its own
            return
        recipe, size = self.recipe, latent_shape(self.native.num_frames, self.native.height, self.native.width)[1:]
        step = whole_step_bytes(
            self.config, (recipe.micro_size, *size), text_length=_USUAL_TEXT, dtype=recipe.compute_dtype,
            average=recipe.ema_decay > 0, recompute=recipe.recompute == "blocks",
        )  # fmt: skip
        on_event(
            Event(
                "note",
                f"a step takes about {step.total / GB:.2g} GB: weights, gradients, optimizer and average"
                f" {step.learning / GB:.2g}, {recipe.micro_size} samples {(step.kept + step.working) / GB:.2g}",
            )
        )

    def batch(self, place: Place) -> Batch:
        phase, seed = self.recipe.phase_index(place.step), self.recipe.seed
        recipe, objective, data = self.recipe.plan[phase].recipe, self._objectives[phase], self._data[phase]
        offset = torch.rand(1, generator=generator(seed, "task", place.step)).item()
        task = objective.task((offset + place.micro) / recipe.num_micros % 1.0)
        g = generator(seed, "micro", place.step, place.micro)
        size, items = draw_bucket(data.latents, g)
        frames = 1 if task == "t2i" else size[0]
        task = task if frames > 1 else "t2i"  # a picture among clips
        # A clip that is short among the others keeps a frame to make.
        cond = min({"i2v": 1, "continue": choose(objective.cond_latents, g)}.get(task, 0), frames - 1)
        no_prompt = choose(objective.no_prompt, g)
        first = place.step * recipe.batch_size
        chosen = [items[shuffled(seed, len(items), first + index)] for index in place.indices]
        samples = [
            self._sample(data, objective, item, frames, cond, no_prompt, generator(seed, "sample", place.step, index))
            for item, index in zip(chosen, place.indices, strict=True)
        ]
        shared = torch.rand(1, generator=generator(seed, "t", place.step), dtype=torch.float64).item()
        u = spread_uniform(shared, place.indices)
        text, mask = pad_text([sample["text"] for sample in samples])
        noise_tokens = _tokens((frames - cond, *size[1:]), self.config)
        return {
            "task": task,
            "num_cond_latents": cond,
            "names": [item.name for item in chosen],
            "latents": torch.stack([sample["latents"] for sample in samples]),
            "noise": torch.stack([sample["noise"] for sample in samples]),
            "levels": torch.stack([sample["levels"] for sample in samples]),
            "t": shift_sigmas(u, objective.shift(noise_tokens)),
            "weight": timestep_weight(
                u, mean=objective.weight_mean, std=objective.weight_std, floor=objective.weight_floor
            ),
            "text": text,
            "text_mask": mask,
        }

    def _sample(
        self, data: CachedClips, objective: Objective, item: Item, frames: int, cond: int, no_prompt: str,
        g: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One clip with everything random about it; the draws come in the same order for every task."""
        captions = data.captions(item)
        caption = choose(captions, g)
        dropped = torch.rand(1, generator=g).item() < objective.text_dropout
        latents, spread = data.latents.latents(item)
        if spread is not None:
            latents = latents + spread * torch.randn(latents.shape, generator=g)
        levels = objective.cond_noise * torch.rand(latents.shape[1], generator=g)
        noise = torch.randn(latents.shape, generator=g)
        return {
            "latents": latents[:, :frames],
            "noise": noise[:, :frames],
            "levels": levels[:cond],
            "text": data.texts.rows(no_prompt if dropped else caption),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        x0, noise, t, n_c = batch["latents"], batch["noise"], batch["t"], batch["num_cond_latents"]
        x, target = flow_pair(x0, noise, t)
        timestep = (NUM_TRAIN_TIMESTEPS * t)[:, None].repeat(1, x0.shape[2])
        if n_c:
            cond = noisy_condition(x0[:, :, :n_c], noise[:, :, :n_c], batch["levels"])
            x = torch.cat([cond, x[:, :, n_c:]], dim=2)
            timestep[:, :n_c] = 0.0
        velocity = model(x, timestep, batch["text"], batch["text_mask"], num_cond_latents=n_c)
        errors = velocity_errors(velocity, target, n_c)
        loss = (batch["weight"] * errors).mean()
        return loss, {f"loss_{batch['task']}": loss.detach(), "mse": errors.detach().mean()}

    @torch.no_grad()
    def samples(self, model: nn.Module) -> dict[str, Tensor]:
        assert isinstance(model, LongCatDiT)
        data, objective, shown = self._data[-1], self._objectives[-1], self.shown
        items = [item for item, _ in zip(data.latents.items(), range(shown.count), strict=False)]
        size = data.latents.size(items[0])
        items = [item for item in items if data.latents.size(item) == size]
        captions = [data.captions(item)[0] for item in items]
        clips = torch.stack([data.latents.latents(item)[0] for item in items])
        found = {}
        for task in TASKS:
            if not objective.mixture.get(task):
                continue
            prompts = list(shown.prompts) if task in ("t2i", "t2v") and shown.prompts else captions
            cond = {"i2v": 1, "continue": max(objective.cond_latents)}.get(task, 0)
            frames = 1 if task == "t2i" else size[0]
            made = self._make(model, prompts, clips[:, :, :cond], (frames, *size[1:]))
            found[task] = torch.stack([clips, made], dim=1).flatten(0, 1) if cond else made
        components = Components(dit=model, vae=self._vae)
        return {task: _to_bytes(decode_latents(components, latents)) for task, latents in found.items()}

    def _make(self, model: LongCatDiT, prompts: Sequence[str], cond: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Latents [N, C, T, h, w] of prompts, from condition latents [N, C, n_c, h, w]."""
        texts, n_c = self._data[-1].texts, cond.shape[2]
        noise = torch.stack(
            [
                torch.randn(self.config.in_channels, *size, generator=generator(self.shown.seed, "shown", i))
                for i in range(len(prompts))
            ]
        )
        shift = self._objectives[-1].shift(_tokens((size[0] - n_c, *size[1:]), self.config))
        text = TextStates(*pad_text([texts.rows(prompt) for prompt in prompts]))
        empty = TextStates(*pad_text([texts.rows("")] * len(prompts)))
        return denoise(
            model,
            put_condition(noise, cond) if n_c else noise,
            schedules.base(self.shown.num_steps, flow_shift=shift),
            text=text,
            guidance=Guidance(self.shown.guidance_scale, empty),
            num_cond_latents=n_c,
        ).cpu()

    def export(self, model: nn.Module, folder: Path) -> None:
        """dit/, scheduler/ and model_index.json, and the other parts as they were, so that the folder is complete."""
        state = in_precision(model.state_dict(), self.recipe.export_precision)
        total = sum(t.nbytes for t in state.values())
        write_json(folder / "dit" / "config.json", self.config.to_dict())
        write_sharded(folder / "dit", "diffusion_pytorch_model", state, -(-total // _SHARD_BYTES))
        index = {"model_name": "LongCat-Video", "native": dataclasses.asdict(self.native)}
        write_json(folder / "model_index.json", index)
        scheduler = SCHEDULER_CONFIG | {"shift": round(self.flow_shift, 4)}
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        for part in ("vae", "text_encoder", "tokenizer"):
            copy_part(self.checkpoint.require(part), folder / part)


def initial_state(config: DiTConfig, seed: int) -> dict[str, Tensor]:
    """Random weights to train from: blocks that change nothing yet and an output of 0 (adaLN-Zero, Peebles and Xie
    2023), everything else with standard deviation 1 / sqrt(fan_in)."""
    state = dit_state(config, seed)
    for name, tensor in state.items():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or ".cross_attn.proj" in name:
            tensor.zero_()
    return state


def _tokens(latents: tuple[int, int, int], config: DiTConfig) -> int:
    T, h, w = token_grid(latents, config.patch_size)
    return T * h * w


def _to_bytes(frames: Tensor) -> Tensor:
    return (frames * 255).round().to(torch.uint8)
