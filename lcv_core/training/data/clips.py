"""Clips by number: a seed and an index give the same scene, caption and start everywhere, in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcv_core.names import TimeMapping
from lcv_core.refinement import frames_after
from lcv_core.training.data.grammar import HeldBack, Scene, caption, draw_scene
from lcv_core.training.data.render import clip_times, refined_times, render

LATEST = 12.0  # seconds into a scene at which a clip may begin: ten continuations and more


@dataclass(frozen=True)
class Clip:
    """A scene from `times[0]` on. frames uint8 [F, H, W, 3], times fp64 [F] in seconds."""

    scene: Scene
    caption: str
    frames: Tensor
    times: Tensor


def clip_generator(seed: int, index: int) -> torch.Generator:
    """A stream of its own for each clip."""
    digest = hashlib.sha256(f"clip/{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def describe_clip(
    seed: int, index: int, *, held_back: HeldBack = "exclude", late: float = 0.0, **fixed: str
) -> tuple[Scene, str, float]:
    """Scene, caption and start in seconds, without rendering.

    late: the share of clips that begin up to LATEST seconds into their scene, where a motion may wrap; the others begin
    at 0 and do not. fixed: attributes that are given.
    """
    generator = clip_generator(seed, index)
    scene = draw_scene(generator, held_back=held_back, **fixed)
    text = caption(scene, generator)
    is_late, when = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return scene, text, when * LATEST if is_late < late else 0.0


def sample_clip(
    seed: int,
    index: int,
    *,
    num_frames: int = 17,
    height: int = 64,
    width: int = 96,
    frame_rate: float = 15.0,
    held_back: HeldBack = "exclude",
    late: float = 0.0,
    **fixed: str,
) -> Clip:
    """Clip number `index` of a seed; options as in `describe_clip`."""
    scene, text, start = describe_clip(seed, index, held_back=held_back, late=late, **fixed)
    times = clip_times(num_frames, frame_rate, start=start)
    return Clip(scene, text, render(scene, times, height, width), times)


def refined_clip(
    clip: Clip, *, scale: int = 2, spatial_only: bool = False, time_mapping: TimeMapping = "exact"
) -> Clip:
    """The ground truth of refining a clip: its scene rendered anew, `scale` times as large, at the refiner's times."""
    frames, height, width, _ = clip.frames.shape
    times = refined_times(clip.times, frames_after(frames, spatial_only=spatial_only, time_mapping=time_mapping))
    return Clip(clip.scene, clip.caption, render(clip.scene, times, scale * height, scale * width), times)


def sample_batch(
    seed: int,
    indices: Sequence[int],
    *,
    num_frames: int = 17,
    height: int = 64,
    width: int = 96,
    frame_rate: float = 15.0,
    held_back: HeldBack = "exclude",
    late: float = 0.0,
) -> tuple[Tensor, list[Clip]]:
    """Frames uint8 [B, F, H, W, 3] of clips by number, and the clips (their frames are views of these)."""
    frames = torch.empty(len(indices), num_frames, height, width, 3, dtype=torch.uint8)
    clips = []
    for i, index in enumerate(indices):
        scene, text, start = describe_clip(seed, index, held_back=held_back, late=late)
        times = clip_times(num_frames, frame_rate, start=start)
        frames[i] = render(scene, times, height, width)
        clips.append(Clip(scene, text, frames[i], times))
    return frames, clips
