"""The refinement expert's input: a clip upsampled in space and time, padded to whole blocks, as a stream of frames.

One pass turns F frames into F' (2F in the official "stretch", 2F - 1 with exact doubling, F when only space is
refined). Condition and noise latents each come in groups of four, so the clip is padded at both ends by repeating its
first and last frame; `RefinePlan` holds that arithmetic. Frames are made on demand, so memory does not grow with F'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.names import TimeMapping, check_name
from lcv_core.shapes import REFINE_LATENT_GROUP, TIME_FACTOR, ceil_to, num_pixel_frames
from lcv_core.vae.model import frame_chunks


@dataclass(frozen=True)
class RefinePlan:
    """Frame and latent counts of one refine pass.

    frames_in: F of the stage-1 clip. frames_out: F' after upsampling in time.
    cond_frames: c leading frames of the output that are given in high resolution (0: none).
    cond_latents, noise_latents: n_c and n_n, multiples of 4. front, back: repeated frames at the ends. Where nothing is
        given (c = 0) the encoder takes 3 frames less than that, for its first latent frame is one pixel frame.
    """

    frames_in: int
    frames_out: int
    cond_frames: int
    cond_latents: int
    noise_latents: int
    front: int
    back: int

    @property
    def latents(self) -> int:
        return self.cond_latents + self.noise_latents

    @property
    def frames_encoded(self) -> int:
        """Pixel frames that the VAE takes in and gives back: 4k+1."""
        return num_pixel_frames(self.latents)

    @property
    def cond_frames_encoded(self) -> int:
        return num_pixel_frames(self.cond_latents)


def frames_after(frames_in: int, *, spatial_only: bool, time_mapping: TimeMapping) -> int:
    """F' of F stage-1 frames."""
    check_name("time_mapping", time_mapping, TimeMapping)
    if spatial_only:
        return frames_in
    return 2 * frames_in if time_mapping == "stretch" else 2 * frames_in - 1


def plan_refine(
    frames_in: int, cond_frames: int = 0, *, spatial_only: bool = False, time_mapping: TimeMapping = "stretch"
) -> RefinePlan:
    """The padding rule of the released pipeline: both parts of the latent clip are multiples of 4 frames.

    Where nothing is given and the released rule would have the VAE drop frames of the clip itself (F' mod 16 of 14, 15
    or 0), four more latents make room for them.
    """
    if frames_in < 1:
        raise InputError("the clip to refine has no frames")
    out = frames_after(frames_in, spatial_only=spatial_only, time_mapping=time_mapping)
    c = cond_frames
    if not 0 <= c < out:
        raise InputError(f"num_cond_frames must be in [0, {out - 1}] for {out} refined frames, got {c}")
    group = REFINE_LATENT_GROUP
    n_c = ceil_to(1 + math.ceil((c - 1) / TIME_FACTOR), group) if c else 0
    front = num_pixel_frames(n_c) - c if c else 0
    alone = 0 if c else TIME_FACTOR - 1  # the first latent of all is one pixel frame
    n_n = ceil_to(math.ceil((out - c + alone) / TIME_FACTOR), group)
    return RefinePlan(frames_in, out, c, n_c, n_n, front, TIME_FACTOR * n_n - (out - c))


def upsampled_frames(clip: Tensor, size: tuple[int, int], frames_out: int) -> Iterator[Tensor]:
    """Stage-1 frames [F, h, w, 3] uint8 or float in [0, 1] -> F' frames fp32 [3, H, W] in [-1, 1].

    Space bilinear, then time linear, both with corners aligned (the first and last frames are kept): the official
    interpolation, in fp32. With F' = 2F - 1 every other frame is a source frame.
    """
    frames_in = clip.shape[0]
    scale = (frames_in - 1) / (frames_out - 1) if frames_out > 1 else 0.0
    recent: dict[int, Tensor] = {}

    def source(i: int) -> Tensor:
        if i not in recent:
            for old in [k for k in recent if k < i - 1]:
                del recent[old]
            frame = clip[i].float() / 255.0 if clip.dtype == torch.uint8 else clip[i].float()
            frame = frame.permute(2, 0, 1).unsqueeze(0)
            recent[i] = F.interpolate(frame, size=size, mode="bilinear", align_corners=True).squeeze(0)
        return recent[i]

    for i in range(frames_out):
        # The position in fp32, as the library's interpolation computes it.
        position = float(torch.tensor(scale, dtype=torch.float32) * i)
        low = min(int(position), frames_in - 1)
        high, weight = min(low + 1, frames_in - 1), position - low
        frame = source(low) if weight == 0.0 else source(low) * (1.0 - weight) + source(high) * weight
        yield frame * 2.0 - 1.0


def padded_frames(clip: Tensor, size: tuple[int, int], plan: RefinePlan) -> Iterator[Tensor]:
    """The upsampled clip, its first frame repeated `front` times before and its last after: `frames_encoded` in all."""
    emitted = 0
    frame: Tensor | None = None
    for i, frame in enumerate(upsampled_frames(clip, size, plan.frames_out)):
        for _ in range(plan.front + 1 if i == 0 else 1):
            if emitted < plan.frames_encoded:
                yield frame
                emitted += 1
    assert frame is not None
    while emitted < plan.frames_encoded:
        yield frame
        emitted += 1


def chunked(frames: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    """Single frames [3, H, W] -> the encoder's chunks [1, 3, 1 then 4, H, W]."""
    for start, stop in frame_chunks(total):
        yield torch.stack([next(frames) for _ in range(stop - start)], dim=1).unsqueeze(0)


def mix(latents: Tensor, noise: Tensor, t_thresh: float) -> Tensor:
    """(1 - t_thresh) * z + t_thresh * noise: where the refine schedule starts."""
    return (1.0 - t_thresh) * latents + t_thresh * noise


def crossfade(old: Tensor, new: Tensor) -> Tensor:
    """Two versions [n, H, W, 3] of the same frames -> a linear fade from the old to the new one."""
    n = old.shape[0]
    weight = (torch.arange(1, n + 1, dtype=torch.float32) / (n + 1)).view(-1, 1, 1, 1)
    return old * (1.0 - weight) + new * weight


@dataclass(frozen=True)
class Window:
    """Stage-1 frames [start, stop) refined in one pass; `overlap` of them were in the window before."""

    start: int
    stop: int
    overlap: int


def plan_windows(total: int, window: int, overlap: int) -> list[Window]:
    """Windows of at most `window` frames over `total`, each sharing `overlap` frames with the one before."""
    if not 0 <= overlap < window:
        raise InputError(f"window overlap must be in [0, {window - 1}], got {overlap}")
    windows = [Window(0, min(window, total), 0)]
    while windows[-1].stop < total:
        start = windows[-1].stop - overlap
        windows.append(Window(start, min(start + window, total), overlap))
    return windows
