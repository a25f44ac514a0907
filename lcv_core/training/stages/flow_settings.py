"""What a recipe says about flow matching: the sections `model`, `data`, `objective` and `samples`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lcv_core.shapes import num_latents
from lcv_core.training.data.cache import LatentOptions, Precision
from lcv_core.training.data.folder import FolderClips, FolderSection
from lcv_core.training.data.sources import ClipSource, Joined, ProceduralClips
from lcv_core.training.losses import shift_for
from lcv_core.training.strict import check_keys, need

TASKS = ("t2i", "t2v", "i2v", "continue")  # from the cheapest on


@dataclass(frozen=True)
class ModelSection:
    """checkpoint: folder of the VAE, the text encoder and its tokenizer; vae, text_encoder, tokenizer name others.

    start: "random", "checkpoint" for the transformer in that folder, or another checkpoint folder to take it from.
    config: fields of `DiTConfig` for a random start, as in an official dit/config.json. native: fields of `Native` for
    what comes out; default: of the data.
    """

    checkpoint: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    start: str = "random"
    config: Mapping[str, Any] = field(default_factory=dict)
    native: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSection:
    """procedural or folder: where clips come from. also: rendered clips of other sizes beside them; a micro-batch has
    one size, each as often as clips have it. cache: folder of the latents and text states computed from them.

    latents: how they are computed. texts: the dtype of text states on disk.
    """

    procedural: ProceduralClips | None = None
    folder: FolderSection | None = None
    also: tuple[ProceduralClips, ...] = ()
    cache: Path = Path("outputs/cache")
    latents: LatentOptions = field(default_factory=LatentOptions)
    texts: Precision = "fp32"

    def source(self, on_bad_data: Literal["stop", "skip"]) -> ClipSource:
        need(
            (self.procedural is None) != (self.folder is None),
            "data must have either procedural (clips rendered here) or folder (your own videos)",
        )
        main = self.procedural if self.folder is None else FolderClips(self.folder, on_bad_data)
        assert main is not None
        return Joined((main, *self.also)) if self.also else main

    @property
    def num_frames(self) -> int:
        clips = self.procedural or self.folder
        assert clips is not None
        return clips.num_frames


@dataclass(frozen=True)
class Objective:
    """mixture: weights of the tasks "t2i", "t2v", "i2v", "continue". cond_latents: condition frames of a continuation;
    a micro-batch draws one of the counts.

    text_dropout: share of samples whose text is no prompt, the unconditional branch of guidance. no_prompt: the texts
        that stand for that, such as the usual negative prompt; a micro-batch draws one.
    flow_shift: of the timesteps; "auto" grows with the number of noise tokens (`losses.shift_for`).
    weight_mean, weight_std, weight_floor: of the loss weight over timesteps (`losses.timestep_weight`).
    cond_noise: condition frames get independent noise of levels uniform in [0, cond_noise].
    """

    mixture: Mapping[str, float] = field(default_factory=lambda: {"t2v": 1.0})
    cond_latents: tuple[int, ...] = (4,)
    text_dropout: float = 0.1
    no_prompt: tuple[str, ...] = ("",)
    flow_shift: float | Literal["auto"] = "auto"
    weight_mean: float = 0.0
    weight_std: float = 1.0
    weight_floor: float = 0.1
    cond_noise: float = 0.05

    def __post_init__(self) -> None:
        check_keys(self.mixture, TASKS, "objective.mixture")
        need(
            all(w >= 0 for w in self.mixture.values()) and sum(self.mixture.values()) > 0,
            f"objective.mixture must have weights, not all 0, got {dict(self.mixture)}",
        )
        for name in ("text_dropout", "weight_floor", "cond_noise"):
            value = getattr(self, name)
            need(0 <= value <= 1, f"objective.{name} must be in [0, 1], got {value:g}")
        need(bool(self.no_prompt), "objective.no_prompt must have a text; the empty one is ''")
        need(self.weight_std > 0, f"objective.weight_std must be above 0, got {self.weight_std:g}")
        need(self.flow_shift == "auto" or self.flow_shift > 0, "objective.flow_shift must be above 0, or auto")

    def check_frames(self, num_frames: int) -> None:
        """InputError unless every task of the mixture can be cut from clips of so many frames."""
        T = num_latents(num_frames)
        moving = [task for task in TASKS[1:] if self.mixture.get(task)]
        need(T > 1 or not moving, f"{' and '.join(moving)} need clips of at least 5 frames, num_frames is {num_frames}")
        if self.mixture.get("continue"):
            fits = bool(self.cond_latents) and all(1 <= n < T for n in self.cond_latents)
            need(
                fits,
                f"objective.cond_latents must be in [1, {T - 1}] for clips of {num_frames} frames ({T} latents), got"
                f" {list(self.cond_latents)}",
            )

    def shift(self, noise_tokens: int) -> float:
        return shift_for(noise_tokens) if self.flow_shift == "auto" else self.flow_shift

    def task(self, position: float) -> str:
        """The task at a position in [0, 1) of the mixture laid out in the order of TASKS."""
        total, before = sum(self.mixture.values()), 0.0
        chosen = [task for task in TASKS if self.mixture.get(task)]
        for task in chosen:
            before += self.mixture[task] / total
            if position < before:
                return task
        return chosen[-1]


@dataclass(frozen=True)
class SamplesSection:
    """What is shown: `prompts`, or the first `count` clips' captions, in num_steps steps; i2v and continuations begin
    as those clips do, which are shown above them."""

    prompts: tuple[str, ...] = ()
    count: int = 4
    num_steps: int = 20
    guidance_scale: float = 4.0
    seed: int = 0
