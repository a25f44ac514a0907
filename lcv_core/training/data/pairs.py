"""Pairs to learn refinement from: a clip as the refiner is given it, and as it is to be.

The low-resolution clip goes the way of a generated one: flaws, the VAE there and back, then `lcv_core.refinement`'s
upsampling and padding. What is wanted has as many frames, at the same times and with the same padding, so its first
latents are those of the condition: the VAE is causal. Both are sources of clips for the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_core.names import TimeMapping
from lcv_core.pipelines.base import Components, decode_latents, encode_frames, to_frames, to_pixels
from lcv_core.refinement import RefinePlan, padded_frames, plan_refine
from lcv_core.training.data.clips import refined_clip, sample_clip
from lcv_core.training.data.folder import FolderClips
from lcv_core.training.data.sources import Part, ProceduralClips, SourceClip
from lcv_core.training.randomness import generator
from lcv_core.training.strict import need

_VERSION = 1  # of what this file makes of clips


@dataclass(frozen=True)
class Kind:
    """A kind of refine pass. share: how often it is trained, relative to the others. cond_frames: how many frames are
    given in high resolution: 1 is an image, more are the end of a window refined before, 0 none."""

    share: float = 1.0
    spatial_only: bool = False
    time_mapping: TimeMapping = "stretch"
    cond_frames: int = 0

    def __post_init__(self) -> None:
        need(self.share > 0, f"share must be above 0, got {self.share:g}; leave the kind out instead")
        need(self.cond_frames >= 0, f"cond_frames must not be negative, got {self.cond_frames}")

    @property
    def name(self) -> str:
        what = "space" if self.spatial_only else self.time_mapping
        return f"{what}_{self.cond_frames}" if self.cond_frames else what

    def plan(self, frames_in: int) -> RefinePlan:
        return plan_refine(frames_in, self.cond_frames, spatial_only=self.spatial_only, time_mapping=self.time_mapping)


@dataclass(frozen=True)
class Flaws:
    """What may be wrong with a low-resolution clip, so that the refiner takes generated ones.

    clean: share of the clips that go through the VAE alone. blur: largest standard deviation in pixels. noise: of the
    values in [0, 1]. latent_noise: of the normalised latents between the VAE's two halves. All uniform from 0 on.
    """

    clean: float = 0.3
    blur: float = 0.6
    noise: float = 0.01
    latent_noise: float = 0.1

    def __post_init__(self) -> None:
        need(0 <= self.clean <= 1, f"flaws.clean is a share, in [0, 1], got {self.clean:g}")
        for name in ("blur", "noise", "latent_noise"):
            need(getattr(self, name) >= 0, f"flaws.{name} must not be negative, got {getattr(self, name):g}")


class Pair(NamedTuple):
    """low: uint8 [F, h, w, 3], F = 4k+1. high: uint8 [F', H, W, 3] at the times of the refined frames."""

    name: str
    low: Tensor
    high: Tensor


class PairSource(Protocol):
    """Pairs with captions, in parts, as a `ClipSource` has clips."""

    @property
    def frames_in(self) -> int:
        """Of the low-resolution clips."""
        ...

    def parts(self) -> Sequence[Part]: ...

    def read(self, index: int) -> Iterator[Pair]: ...

    def captions(self, index: int, position: int) -> tuple[str, ...]: ...

    @property
    def frame_rate(self) -> float:
        """Of the high-resolution clips."""
        ...


@dataclass(frozen=True)
class ProceduralPairs:
    """Rendered clips, and their scenes rendered anew at the refiner's times, `scale` times as large."""

    clips: ProceduralClips
    kind: Kind
    scale: int = 2

    @property
    def frames_in(self) -> int:
        return self.clips.num_frames

    @property
    def frame_rate(self) -> float:
        return self.clips.frame_rate * (1 if self.kind.spatial_only else 2)

    def parts(self) -> list[Part]:
        return [Part(part.name, {**part.identity, "scale": self.scale}) for part in self.clips.parts()]

    def read(self, index: int) -> Iterator[Pair]:
        of = self.clips
        identity = of.parts()[index].identity
        for number in range(identity["from"], identity["to"]):
            low = sample_clip(
                of.seed, number, num_frames=of.num_frames, height=of.height, width=of.width, frame_rate=of.frame_rate,
                held_back=of.held_back, late=of.late,
            )  # fmt: skip
            high = refined_clip(
                low, scale=self.scale, spatial_only=self.kind.spatial_only, time_mapping=self.kind.time_mapping
            )
            yield Pair(f"clip {number}", low.frames, high.frames)

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        return self.clips.captions(index, position)


@dataclass(frozen=True)
class FolderPairs:
    """High-resolution videos, and what is left of them at the lower rate and 1 / `scale` of the size.

    frames_in: of the low-resolution clips. The videos are read at the refined frame rate; where a low frame's time lies
    between two of theirs, the nearer one is it.
    """

    clips: FolderClips
    kind: Kind
    frames_in: int
    scale: int = 2

    def __post_init__(self) -> None:
        section = self.clips.section
        need(
            section.num_frames >= self._span,
            f"data.folder.num_frames is {section.num_frames}, refining {self.frames_in} frames takes {self._span}",
        )
        for name, side in (("height", section.height), ("width", section.width)):
            fits = side is None or side % (16 * self.scale) == 0
            need(fits, f"data.folder.{name} must be a multiple of {16 * self.scale}, got {side}")

    @property
    def _span(self) -> int:
        """Frames of a video that a pair takes. Where only space is refined, both sides leave out every other one."""
        return 2 * self.frames_in - 1 if self.kind.spatial_only else self.kind.plan(self.frames_in).frames_out

    @property
    def frame_rate(self) -> float:
        return self.clips.frame_rate

    def parts(self) -> list[Part]:
        extra = {"scale": self.scale, "frames_in": self.frames_in}
        return [Part(part.name, {**part.identity, **extra}) for part in self.clips.parts()]

    def read(self, index: int) -> Iterator[Pair]:
        for clip in self.clips.read(index):
            frames = clip.frames[: self._span]
            low = frames[torch.linspace(0, self._span - 1, self.frames_in).round().long()]
            yield Pair(clip.name, shrunk(low, self.scale), low if self.kind.spatial_only else frames)

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        return self.clips.captions(index, position)


def shrunk(frames: Tensor, scale: int) -> Tensor:
    """uint8 [F, H, W, 3] -> [F, H / scale, W / scale, 3], each pixel the mean of those it covers."""
    means = F.avg_pool2d(frames.permute(0, 3, 1, 2).float(), scale)
    return means.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def blur(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian, in space, edges repeated. [F, H, W, 3]"""
    reach = int(3 * sigma + 0.5)
    if reach == 0:
        return frames
    at = torch.arange(-reach, reach + 1, dtype=torch.float32)
    window = torch.exp(-at.square() / (2 * sigma * sigma))
    window = (window / window.sum()).view(1, 1, -1).expand(3, 1, -1)
    x = F.pad(frames.permute(0, 3, 1, 2), (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, window.unsqueeze(2), groups=3), window.unsqueeze(3), groups=3)
    return x.permute(0, 2, 3, 1)


def generated_look(c: Components, frames: Tensor, flaws: Flaws, g: torch.Generator) -> Tensor:
    """uint8 [F, H, W, 3], F = 4k+1 -> fp32 in [0, 1]: as a clip looks that came out of the VAE's decoder."""
    clean, *amounts = torch.rand(4, generator=g).tolist()
    sigma, noise, latent_noise = (
        0.0 if clean < flaws.clean else amount * most
        for amount, most in zip(amounts, (flaws.blur, flaws.noise, flaws.latent_noise), strict=True)
    )
    values = blur(frames.float() / 255.0, sigma)
    values = values + noise * torch.randn(values.shape, generator=g)
    latents = encode_frames(c, to_pixels(values.clamp(0.0, 1.0)))
    latents = latents + latent_noise * torch.randn(latents.shape, generator=g)
    return decode_latents(c, latents)[0]


def refiner_frames(clip: Tensor, size: tuple[int, int], plan: RefinePlan) -> Tensor:
    """A clip upsampled and padded as in `pipelines.refine`: fp32 [frames_encoded, H, W, 3] in [0, 1]."""
    return to_frames(torch.stack(list(padded_frames(clip, size, plan)), dim=1).unsqueeze(0))[0]


@dataclass(frozen=True)
class OneSide:
    """A `ClipSource` of what is given or of what is wanted, its frames fp32 in [0, 1] and ready for the VAE's encoder.

    c: with the VAE.
    """

    side: Literal["given", "wanted"]
    pairs: PairSource
    kind: Kind
    flaws: Flaws
    c: Components = field(repr=False)

    @property
    def frame_rate(self) -> float:
        return self.pairs.frame_rate

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        return self.pairs.captions(index, position)

    def parts(self) -> list[Part]:
        how: dict[str, Any] = {k: v for k, v in dataclasses.asdict(self.kind).items() if k != "share"}
        how |= {"side": self.side, "version": _VERSION}
        if self.side == "given":
            how["flaws"] = dataclasses.asdict(self.flaws)
        return [Part(part.name, {**part.identity, "refine": how}) for part in self.pairs.parts()]

    def read(self, index: int) -> Iterator[SourceClip]:
        plan, part = self.kind.plan(self.pairs.frames_in), self.pairs.parts()[index]
        for pair in self.pairs.read(index):
            size = (int(pair.high.shape[1]), int(pair.high.shape[2]))
            if self.side == "wanted":
                clip = pair.high  # of its own size and length: padded alone
            else:
                clip = generated_look(self.c, pair.low, self.flaws, generator("flaws", _seed(part.identity), pair.name))
            yield SourceClip(pair.name, refiner_frames(clip, size, plan))


def _seed(identity: Mapping[str, Any]) -> int:
    """Of procedural clips; videos are told apart by their names."""
    return int(identity.get("procedural", {}).get("seed", 0))
