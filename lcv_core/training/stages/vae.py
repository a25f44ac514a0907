"""The video VAE: reconstruction and KL on the Wan 2.1 architecture, causal and streaming as inference runs it.

It learns from crops around the object and whole frames of both sizes that the models work at, and from what the refiner
is given (`vae_settings.Material`). It begins as a plain reduction (`autoencoder.initialise`), or as a checkpoint. Then
models that know the checkpoint's latents go on working: an anchor holds those of what they have seen where they were.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from lcv_core.config import VAEConfig
from lcv_core.refinement import upsampled_frames
from lcv_core.shapes import SPACE_FACTOR, num_latents
from lcv_core.training.autoencoder import (
    Autoencoder,
    Objective,
    autoencoding_loss,
    initialise,
    latent_statistics,
    psnr,
    to_frames,
    to_pixels,
)
from lcv_core.training.data.clips import LATEST, refined_clip, sample_clip
from lcv_core.training.data.grammar import Scene, draw_scene
from lcv_core.training.data.render import FIRST_WINDOW, clip_times, path, render
from lcv_core.training.events import OnEvent
from lcv_core.training.export import in_precision
from lcv_core.training.randomness import generator
from lcv_core.training.recipe import Recipe
from lcv_core.training.stage import Batch, Place
from lcv_core.training.stages.vae_settings import DataSection, Material, ModelSection, SamplesSection
from lcv_core.training.strict import need, read_section
from lcv_core.vae.model import WanVAE
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.write import write_json, write_tensors

BASE_DIM = 16
ROOM = 1.3  # a crop's centre is at most this many radii off the object's


class VAEStage:
    """The stage of this module."""

    model: Autoencoder

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.data = [read_section(DataSection, phase.recipe.data, "data") for phase in recipe.plan]
        self.objectives = [read_section(Objective, phase.recipe.objective, "objective") for phase in recipe.plan]
        self.shown = read_section(SamplesSection, recipe.samples, "samples")
        section = read_section(ModelSection, recipe.model, "model")
        self._first = _loaded(section.checkpoint) if section.checkpoint else None  # the VAE that it began with
        if self._first is None:
            self.model = Autoencoder(VAEConfig(base_dim=section.base_dim or BASE_DIM))
            initialise(self.model.vae, generator(recipe.seed, "start"))
        else:
            self.model = Autoencoder(self._first.config)
            self.model.vae.load_state_dict(self._first.state_dict())
        anchored = any(objective.anchor for objective in self.objectives)
        need(not anchored or self._first is not None, "objective.anchor needs model.checkpoint: what to hold on to")

    def prepare(self, device: torch.device, on_event: OnEvent) -> None:
        """Nothing long: what the anchor is held against goes to the device."""
        if self._first is not None:
            self._first.to(device)

    def _phase(self, step: int) -> int:
        return self.recipe.plan.index(self.recipe.phase_at(step))

    def batch(self, place: Place) -> Batch:
        """frames uint8 [B, F, h, w, 3] and the posterior's noise [B, z_dim, T, h/8, w/8]."""
        seed, phase = self.recipe.seed, self._phase(place.step)
        data = self.data[phase]
        shares = torch.tensor([kind.share for kind in data.material])
        chosen = torch.multinomial(shares, 1, generator=generator(seed, "material", place.step))
        kind = data.material[int(chosen)]
        frames, noise, names = [], [], []
        for index in place.indices:
            draws = generator(seed, "clip", place.step, index)
            scene = draw_scene(draws, held_back="exclude", **kind.fixed(place.step * self.recipe.batch_size + index))
            frames.append(_material(scene, kind, data, draws))
            _, height, width, _ = frames[-1].shape
            shape = (self.z_dim, num_latents(kind.num_frames), height // SPACE_FACTOR, width // SPACE_FACTOR)
            noise.append(torch.randn(shape, generator=draws))
            names.append(f"{kind.source} {scene.colour} {scene.object}")
        return {
            "frames": torch.stack(frames), "noise": torch.stack(noise), "names": names,
            "objective": self.objectives[phase], "anchored": kind.source != "refined",
        }  # fmt: skip

    @property
    def z_dim(self) -> int:
        return self.model.vae.config.z_dim

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        pixels = to_pixels(batch["frames"])
        decoded, mean, logvar = model(pixels.to(self.recipe.compute_dtype), batch["noise"])
        objective = batch["objective"]
        loss, terms = autoencoding_loss(decoded, pixels, mean, logvar, objective)
        metrics = {name: float(term) for name, term in terms.items()}
        if objective.anchor and batch["anchored"]:
            moved = self._moved(pixels, mean)
            loss = loss + objective.anchor * moved
            metrics["anchor"] = float(moved.detach())
        return loss, metrics | {"psnr": psnr(decoded.detach().clamp(-1.0, 1.0), pixels)}

    def _moved(self, pixels: Tensor, mean: Tensor) -> Tensor:
        """Mean square of how far the latents have gone from the first VAE's, in its standard deviations."""
        assert self._first is not None
        with torch.no_grad():
            before, _ = self._first.encode(pixels)
        std = torch.tensor(self._first.config.latents_std, device=mean.device).view(1, -1, 1, 1, 1)
        return ((mean - before) / std).square().mean()

    def samples(self, model: nn.Module) -> dict[str, Tensor]:
        """Held-back clips of both sizes, each above its reconstruction from the posterior's mean."""
        assert isinstance(model, Autoencoder)
        data, shown = self.data[-1], {}
        for source, clips in _clips(data, self.recipe.seed + 1, self.shown.count, held_back=True).items():
            rows = []
            for frames in clips:
                mean, _ = model.vae.encode(to_pixels(frames.unsqueeze(0)))
                rows += [frames, to_frames(model.vae.decode(mean))[0]]
            shown[source] = torch.stack(rows)
        return shown

    def export(self, model: nn.Module, folder: Path) -> None:
        """vae/, with the mean and standard deviation of the latents that the exported weights give; those of the
        checkpoint, if there was one."""
        assert isinstance(model, Autoencoder)
        vae = model.vae
        state = in_precision(vae.state_dict(), self.recipe.export_precision)
        vae.load_state_dict(state)
        config = vae.config
        if self._first is None:
            clips = _clips(self.data[-1], self.recipe.seed + 2, self.data[-1].statistics, held_back=False)
            mean, std = latent_statistics(vae, (frames for kind in clips.values() for frames in kind))
            config = dataclasses.replace(config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
        write_json(folder / "vae" / "config.json", config.to_dict())
        write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", state)


def _loaded(path: Path) -> WanVAE:
    checkpoint = open_checkpoint(path)
    checkpoint.require("vae")
    return checkpoint.load_vae(dtype=torch.float32).requires_grad_(False)


def _material(scene: Scene, kind: Material, data: DataSection, draws: torch.Generator) -> Tensor:
    """A clip of a scene, uint8 [F, h, w, 3]: cropped, if the kind says so, to a window that moves with nothing."""
    when, is_late, is_astray, x, y = torch.rand(5, generator=draws, dtype=torch.float64).tolist()
    start = when * (LATEST if is_late < data.late else FIRST_WINDOW / 4)
    height, width = data.size(kind)
    rate = data.frame_rate * (1 if kind.source == "base" else 2)
    times = clip_times(kind.num_frames, rate, start=start)
    if kind.source == "upsampled":
        few = render(
            scene, clip_times((kind.num_frames + 1) // 2, data.frame_rate, start=start), data.height, data.width
        )
        enlarged = torch.stack(list(upsampled_frames(few, (height, width), kind.num_frames)), dim=1)
        frames = to_frames(enlarged.unsqueeze(0))[0]
    else:
        frames = render(scene, times, height, width)
    if not kind.height:
        return frames
    top, left = y * height, x * width
    if is_astray >= data.astray:
        aspect = width / height
        at = path(scene, times[kind.num_frames // 2 :][:1], aspect)
        room = ROOM * float(at.radius)
        # A straight motion leaves at one side and enters at the other.
        left = ((float(at.x) + aspect / 2) % aspect + (2 * x - 1) * room) * height
        top = ((float(at.y) + 0.5) % 1.0 + (2 * y - 1) * room) * height
    row = round(min(max(top - kind.height / 2, 0), height - kind.height))
    column = round(min(max(left - kind.width / 2, 0), width - kind.width))
    return frames[:, row : row + kind.height, column : column + kind.width]


def _clips(data: DataSection, seed: int, count: int, *, held_back: bool) -> dict[str, list[Tensor]]:
    """Whole clips of 17 frames by source: base ones, and what they refine to."""
    base = [
        sample_clip(
            seed, i, height=data.height, width=data.width, frame_rate=data.frame_rate, late=0.3,
            held_back="only" if held_back else "exclude",
        )
        for i in range(count)
    ]  # fmt: skip
    half = [dataclasses.replace(clip, frames=clip.frames[:9], times=clip.times[:9]) for clip in base]
    return {"base": [clip.frames for clip in base], "refined": [refined_clip(clip).frames for clip in half]}
