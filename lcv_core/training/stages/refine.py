"""The refinement expert: an adapter that turns a clip upsampled and mixed with noise into one of the high resolution.

From the latents z of the upsampled clip and x0 of the wanted one, with t_thresh = T and the pipeline's
x_T = (1 - T) z + T noise (`refinement.mix`), states lie on the straight line

    x_t = x0 + (x_T - x0) t / T,   t in [0, T]

and sampling, dx = -v dt with t from T to 0, ends in x0 for the constant velocity v = (x0 - x_T) / T (the report's
formula, in the sign of the network). For T = 1 that is x0 - noise; for 0.5 it is (x0 - noise) + (x0 - z), what the
model does anyway and the difference that is to be made. The network is told 1000 t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcv_core import schedule as schedules
from lcv_core.denoise import denoise
from lcv_core.pipelines.base import Components, draw_noise
from lcv_core.pipelines.refine import decode_refined
from lcv_core.refinement import RefinePlan, mix
from lcv_core.schedule import NUM_TRAIN_TIMESTEPS, shift_sigmas
from lcv_core.text.encoder import TextStates
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.data.batches import CachedClips, choose, draw_bucket, pad_text, shuffled
from lcv_core.training.data.cache import Item, LatentCache, Workers, fill_latents, fill_texts
from lcv_core.training.data.pairs import Kind, OneSide
from lcv_core.training.events import OnEvent
from lcv_core.training.losses import noisy_condition, per_frame, spread_uniform, velocity_errors
from lcv_core.training.randomness import generator, seed_of
from lcv_core.training.recipe import Recipe
from lcv_core.training.stage import Batch, Place
from lcv_core.training.stages.lora import AdapterSection, say_memory, write_adapter
from lcv_core.training.stages.refine_settings import DataSection, Objective, SamplesSection
from lcv_core.training.strict import need, read_section
from lcv_core.vae.model import WanVAE
from lcv_core.vae.tiling import Tiling

LORA_FILE = "refinement_lora.safetensors"


def refine_pair(wanted: Tensor, given: Tensor, noise: Tensor, t: Tensor, t_thresh: float) -> tuple[Tensor, Tensor]:
    """(x_t, velocity) of latents [B, C, T, h, w] at t [B] in [0, t_thresh]."""
    start = mix(given, noise, t_thresh)
    return wanted + (start - wanted) * per_frame(t / t_thresh, wanted), (wanted - start) / t_thresh


def refine_levels(u: Tensor, t_thresh: float, flow_shift: float) -> Tensor:
    """Levels in [0, t_thresh) for u uniform in [0, 1), as densely as the refine schedule has its steps: the shifted
    schedule's part below t_thresh, whose unshifted values are uniform up to s with shift(s) = t_thresh."""
    highest = t_thresh / (flow_shift - (flow_shift - 1) * t_thresh)
    return shift_sigmas(u * highest, flow_shift).clamp(max=t_thresh)


@dataclass(frozen=True)
class _Cached:
    """A kind with its cached pairs. places: where what is given of a clip lies, by its part and position."""

    kind: Kind
    plan: RefinePlan
    given: LatentCache
    wanted: CachedClips
    places: Mapping[tuple[int, int], Item]

    def pair(self, item: Item) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Latents [C, T, h, w] of both sides, and the posterior's spread where it was kept."""
        given = self.given.latents(self.places[item.part, item.position])
        return {"given": given, "wanted": self.wanted.latents.latents(item)}


class RefineStage:
    """The stage of this module."""

    model: AdaptedDiT

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.section = read_section(AdapterSection, recipe.model, "model")
        self.data = read_section(DataSection, recipe.data, "data")
        self.shown = read_section(SamplesSection, recipe.samples, "samples")
        self._objectives = [read_section(Objective, phase.recipe.objective, "objective") for phase in recipe.plan]
        sections = [read_section(DataSection, phase.recipe.data, "data") for phase in recipe.plan]
        need(all(data == self.data for data in sections), "data is one for all phases of the refine stage")
        self._pairs = self.data.pairs(recipe.on_bad_data)
        self._plans = [kind.plan(p.frames_in) for kind, p in zip(self.data.kinds, self._pairs, strict=True)]
        self.checkpoint = self.section.open()
        self.model = self.section.build(self.checkpoint, "refinement_lora", recipe)
        self._cached: list[_Cached] = []
        self._vae: WanVAE | None = None

    def prepare(self, device: torch.device, on_event: OnEvent) -> None:
        """Say what it takes, then fill the caches."""
        from accelerate import PartialState

        data, state = self.data, PartialState()
        height, width = data.pixels()
        size = (self.recipe.micro_size, max(plan.latents for plan in self._plans), height // 8, width // 8)
        say_memory(self.recipe, self.model, size, "refinement_lora", device, on_event)
        workers = Workers(state.process_index, state.num_processes)
        prints = self.checkpoint.part_fingerprints()
        self._vae = vae = self.checkpoint.load_vae(device=device, dtype=torch.float32).requires_grad_(False)
        vae_key = f"{prints['vae']}-{seed_of(str(vae.config))}"
        tile = data.latents.tile
        c = Components(self.model, vae, tiling=Tiling(tile, tile * 3 // 4) if tile else None)
        captions: list[str] = []
        caches: list[tuple[LatentCache, LatentCache, OneSide]] = []
        for kind, pairs in zip(data.kinds, self._pairs, strict=True):
            sides = [OneSide(side, pairs, kind, data.flaws, c) for side in ("given", "wanted")]
            given, wanted = (
                fill_latents(
                    side, vae, vae_key, data.cache, data.latents, on_bad_data=self.recipe.on_bad_data,
                    on_event=on_event, workers=workers,
                )
                for side in sides
            )  # fmt: skip
            caches.append((given, wanted, sides[1]))
            captions += [text for item in wanted.items() for text in pairs.captions(item.part, item.position)]
        texts = fill_texts(
            captions, lambda: self.checkpoint.load_text_encoder(device=device),
            f"{prints['text_encoder']}-{prints['tokenizer']}", data.cache, store=data.texts, on_event=on_event,
            workers=workers,
        )  # fmt: skip
        self._cached = [
            _Cached(kind, plan, given, CachedClips(source, wanted, texts), _places(given))
            for kind, plan, (given, wanted, source) in zip(data.kinds, self._plans, caches, strict=True)
        ]

    def batch(self, place: Place) -> Batch:
        phase, seed = self.recipe.phase_index(place.step), self.recipe.seed
        recipe, objective = self.recipe.plan[phase].recipe, self._objectives[phase]
        # Evenly over a step's micro-batches and, as these may be few, over the steps.
        offset = float(spread_uniform(0.0, [place.step])) + place.micro / recipe.num_micros
        cached = self._cached[_position(self.data.shares(), offset % 1.0)]
        g = generator(seed, "micro", place.step, place.micro)
        _, items = draw_bucket(cached.wanted.latents, g)
        first = place.step * recipe.batch_size
        chosen = [items[shuffled(seed, len(items), first + index)] for index in place.indices]
        samples = [
            self._sample(cached, objective, item, generator(seed, "sample", place.step, index))
            for item, index in zip(chosen, place.indices, strict=True)
        ]
        shared = torch.rand(1, generator=generator(seed, "t", place.step), dtype=torch.float64).item()
        u, shift = spread_uniform(shared, place.indices), objective.flow_shift or self.checkpoint.flow_shift
        text, mask = pad_text([sample.pop("text") for sample in samples])
        return {
            "phase": phase,
            "kind": cached.kind.name,
            "num_cond_latents": cached.plan.cond_latents,
            "names": [item.name for item in chosen],
            **{name: torch.stack([sample[name] for sample in samples]) for name in samples[0]},
            "t": refine_levels(u, objective.t_thresh, shift),
            "text": text,
            "text_mask": mask,
        }

    def _sample(self, cached: _Cached, objective: Objective, item: Item, g: torch.Generator) -> dict[str, Tensor]:
        """One pair with everything random about it; the draws come in the same order for every kind."""
        caption = choose(cached.wanted.captions(item), g)
        dropped = torch.rand(1, generator=g).item() < objective.text_dropout
        sides: dict[str, Tensor] = {}
        for side, (latents, spread) in cached.pair(item).items():
            draws = torch.randn(latents.shape, generator=g)
            sides[side] = latents if spread is None else latents + spread * draws
        levels = objective.cond_noise * torch.rand(cached.plan.latents, generator=g)
        return sides | {
            "noise": torch.randn(sides["wanted"].shape, generator=g),
            "levels": levels[: cached.plan.cond_latents],
            "text": cached.wanted.texts.rows("" if dropped else caption),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        objective, n_c, wanted = self._objectives[batch["phase"]], batch["num_cond_latents"], batch["wanted"]
        x, target = refine_pair(wanted, batch["given"], batch["noise"], batch["t"], objective.t_thresh)
        timestep = (NUM_TRAIN_TIMESTEPS * batch["t"])[:, None].repeat(1, x.shape[2])
        if n_c:
            cond = noisy_condition(wanted[:, :, :n_c], batch["noise"][:, :, :n_c], batch["levels"])
            x = torch.cat([cond, x[:, :, n_c:]], dim=2)
            timestep[:, :n_c] = 0.0
        velocity = model(
            x, timestep, batch["text"], batch["text_mask"], num_cond_latents=n_c,
            bsa=objective.bsa(self.model.config.bsa),
        )  # fmt: skip
        loss = velocity_errors(velocity, target, n_c).mean()
        return loss, {f"loss_{batch['kind']}": loss.detach()}

    @torch.no_grad()
    def samples(self, model: nn.Module) -> dict[str, Tensor]:
        assert isinstance(model, AdaptedDiT)
        cached, objective = self._cached[0], self._objectives[-1]
        items = [item for item, _ in zip(cached.wanted.latents.items(), range(self.shown.count), strict=False)]
        shift = objective.flow_shift or self.checkpoint.flow_shift
        sigmas = schedules.refine_exact(self.shown.refine_steps, objective.t_thresh, flow_shift=shift)
        c, n_c = Components(model, self._vae), cached.plan.cond_latents
        rows: list[Tensor] = []
        for number, item in enumerate(items):
            given, wanted = (latents for latents, _ in cached.pair(item).values())
            noise = draw_noise((1, *given.shape), generator(self.shown.seed, "shown", number))
            x = mix(given.unsqueeze(0), noise, objective.t_thresh)
            x[:, :, :n_c] = wanted[:, :n_c]
            text = TextStates(*pad_text([cached.wanted.texts.rows(cached.wanted.captions(item)[0])]))
            made = denoise(
                model, x, sigmas, text=text, num_cond_latents=n_c, bsa=objective.bsa(model.config.bsa)
            )  # fmt: skip
            clips = [given.unsqueeze(0), made, wanted.unsqueeze(0)]
            rows += [decode_refined(c, latents, cached.plan)[0] for latents in clips]
        return {cached.kind.name: (torch.stack(rows) * 255).round().to(torch.uint8)} if rows else {}

    def export(self, model: nn.Module, folder: Path) -> None:
        """lora/refinement_lora.safetensors, in the dialect of the official file."""
        write_adapter(model, folder / "lora" / LORA_FILE, self.recipe)


def _places(cache: LatentCache) -> dict[tuple[int, int], Item]:
    return {(item.part, item.position): item for item in cache.items()}


def _position(shares: Sequence[float], position: float) -> int:
    """Which of the shares, laid out one after another in [0, 1), a position is in."""
    before = 0.0
    for number, share in enumerate(shares):
        before += share
        if position < before:
            return number
    return len(shares) - 1
