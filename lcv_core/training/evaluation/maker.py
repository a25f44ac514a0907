"""Where the clips of an evaluation come from: a checkpoint's pipelines, several cases at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lcv_core.config import BSAConfig, Native
from lcv_core.names import Handover, RefineAttention, Schedule
from lcv_core.pipelines import image_to_video, refine_video, text_to_video
from lcv_core.pipelines.base import (
    Components,
    Run,
    StreamingDecoder,
    decode_latents,
    encode_frames,
    to_pixels,
)
from lcv_core.pipelines.continuation import continue_from_latents
from lcv_core.pipelines.long_video import segment_generator
from lcv_core.shapes import num_latents
from lcv_core.text.encoder import TextStates
from lcv_core.training.evaluation.cases import Case
from lcv_core.weights.lora import load_lora


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled. adapter: an adapter of the user's that is on the model meanwhile."""

    schedule: Schedule = "base"
    num_steps: int = 50
    guidance_scale: float = 4.0
    adapter: Path | None = None


class Maker(Protocol):
    """Makes the clips of cases. Frames are float [.., F, H, W, 3] in [0, 1] on the CPU; the same case gives the same
    clip whatever it is made together with."""

    native: Native

    def from_text(self, cases: Sequence[Case], sampling: Sampling) -> Tensor:
        """[B, F, H, W, 3]."""
        ...

    def from_images(self, cases: Sequence[Case], images: Tensor, sampling: Sampling) -> Tensor:
        """images: uint8 [B, H, W, 3] -> [B, F, H, W, 3], the image's frame included."""
        ...

    def long(self, cases: Sequence[Case], sampling: Sampling, *, segments: int, handover: Handover) -> Iterator[Tensor]:
        """The new frames [B, F, H, W, 3] of one segment after the other."""
        ...

    def refined(self, case: Case, frames: Tensor, attention: RefineAttention) -> Tensor:
        """frames [F, H, W, 3], uint8 or float -> [2 F, 2 H, 2 W, 3]."""
        ...


class CheckpointMaker:
    """The pipelines over the parts of a checkpoint.

    components: with a text encoder. negative_prompt: of guidance. sparse: what "sparse" refinement computes with;
    default: the model's own settings (bsa_params of its config).
    """

    def __init__(self, components: Components, *, negative_prompt: str = "", sparse: BSAConfig | None = None) -> None:
        self.c, self.native, self.negative_prompt = components, components.native, negative_prompt
        self.sparse = sparse or components.dit.config.bsa

    def from_text(self, cases: Sequence[Case], sampling: Sampling) -> Tensor:
        with self._adapter(sampling):
            return text_to_video(
                self.c, text=self._texts(cases), generator=[case.noise("text") for case in cases],
                **self._options(sampling),
            )  # fmt: skip

    def from_images(self, cases: Sequence[Case], images: Tensor, sampling: Sampling) -> Tensor:
        with self._adapter(sampling):
            return image_to_video(
                self.c, text=self._texts(cases), image=images, generator=[case.noise("image") for case in cases],
                **self._options(sampling),
            )  # fmt: skip

    def long(self, cases: Sequence[Case], sampling: Sampling, *, segments: int, handover: Handover) -> Iterator[Tensor]:
        """As `long_video_segments` does it, for several videos together."""
        options = self._options(sampling)
        run = Run.of(
            num_steps=sampling.num_steps, guidance_scale=sampling.guidance_scale, schedule=sampling.schedule,
            cfg_scope="noise", cfg_mode="batched", output="latents", on_step=None, progress=None,
        )  # fmt: skip
        texts, seeds = self._texts(cases), [case.noise_seed("long") for case in cases]
        hand = _Handover(self.c, handover)
        with self._adapter(sampling):
            for index in range(segments):
                generators = [segment_generator(seed, index) for seed in seeds]
                if index == 0:
                    yield hand.first(
                        text_to_video(self.c, text=texts, generator=generators, output="latents", **options)
                    )
                    continue
                latents = continue_from_latents(
                    self.c, text=texts, negative_text=options["negative_text"], run=run,
                    size=(self.native.height, self.native.width), num_frames=None, cond=hand.condition,
                    num_cond_latents=hand.count, generator=generators,
                )  # fmt: skip
                yield hand.later(latents)

    def refined(self, case: Case, frames: Tensor, attention: RefineAttention) -> Tensor:
        height, width = frames.shape[1:3]
        return refine_video(
            self.c, text=self._texts([case]), frames=frames, size=(2 * height, 2 * width),
            bsa=self.sparse if attention == "sparse" else None, generator=case.noise("refine"),
        )[0]  # fmt: skip

    def _texts(self, cases: Sequence[Case]) -> TextStates:
        """One by one, so that a prompt's states do not depend on those beside it."""
        assert self.c.text_encoder is not None
        states = [self.c.text_encoder.encode([case.prompt]) for case in cases]
        together = states[0]
        for other in states[1:]:
            together = together.concat(other)
        return together

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        return {
            "schedule": sampling.schedule, "num_steps": sampling.num_steps, "guidance_scale": sampling.guidance_scale,
            "negative_text": self.negative_prompt if sampling.guidance_scale > 1 else None, "cfg_mode": "batched",
        }  # fmt: skip

    def _adapter(self, sampling: Sampling) -> Any:
        return nullcontext() if sampling.adapter is None else load_lora(self.c.dit, sampling.adapter)


class _Handover:
    """What the hand-overs of `pipelines.long_video` do, for a batch of videos."""

    def __init__(self, c: Components, name: Handover) -> None:
        self.c, self.name = c, name
        self.frames = c.native.num_cond_frames
        self.count = num_latents(self.frames)
        self._decoder = StreamingDecoder(c)
        self._tail = torch.empty(0)

    def first(self, latents: Tensor) -> Tensor:
        return self._keep(latents, self._decoder.push(latents) if self.name == "latents" else None)

    def later(self, latents: Tensor) -> Tensor:
        if self.name == "latents":
            return self._keep(latents, self._decoder.push(latents[:, :, self.count :]))
        return self._keep(latents, None)[:, self.frames :]

    def _keep(self, latents: Tensor, frames: Tensor | None) -> Tensor:
        if frames is None:
            frames = decode_latents(self.c, latents)
            self._tail = frames[:, -self.frames :].clone()
        else:
            self._tail = latents[:, :, -self.count :].clone()
        return frames

    def condition(self) -> Tensor:
        """Condition latents [B, C, n_c, h, w] of the next segment."""
        if self.name == "latents":
            return self._tail
        tail = (self._tail * 255.0).to(torch.uint8) if self.name == "official" else self._tail
        return encode_frames(self.c, torch.cat([to_pixels(frames) for frames in tail]))
