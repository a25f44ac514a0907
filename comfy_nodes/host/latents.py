"""ComfyUI's LATENT: samples un-normalised, the noise mask 0 on condition frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.image_io import as_frames, resize_frames
from lcv_core.names import Fit
from lcv_core.pipelines.base import to_pixels
from lcv_core.shapes import bucket, check_cond_frames, check_size, latent_shape, num_latents, size_for_area

from .sampling import Latent, condition_mask
from .vae import check_vae, host_vae

SIZES = ("as typed", "picture's aspect, same area", "480p bucket", "720p bucket")


def start_latent(
    vae: Any, *, height: int, width: int, num_frames: int, batch_size: int, size: str, fit: Fit, num_cond_frames: int,
    image: Any = None, video: Any = None,
) -> tuple[Latent, int, int]:  # fmt: skip
    """(LATENT, width, height). An image is one condition frame, a video its last num_cond_frames."""
    check_vae(vae)
    frames = _condition(image, video, num_frames, num_cond_frames)
    if frames is not None:
        height, width = _size(size, height, width, *frames.shape[1:3])
    check_size(height, width)
    shape = latent_shape(num_frames, height, width, channels=vae.latent_channels)
    samples = torch.zeros(batch_size, *shape)
    if frames is None:
        return {"samples": samples}, width, height
    count = num_latents(frames.shape[0])
    mean, _ = host_vae(vae).encode(to_pixels(resize_frames(frames, height, width, fit=fit)))
    samples[:, :, :count] = mean.to(samples)
    return {"samples": samples, "noise_mask": condition_mask(samples, count)}, width, height


def _condition(image: Any, video: Any, num_frames: int, num_cond_frames: int) -> Tensor | None:
    """The frames [n, H, W, 3] that the video begins with; None for text to video."""
    if image is not None and video is not None:
        raise InputError("connect an image or a video, not both")
    if image is not None:
        if num_frames < 5:
            raise InputError(f"num_frames counts the image too, so it must be at least 5, got {num_frames}")
        return as_frames(image)[:1]
    if video is None:
        return None
    clip = as_frames(video)
    check_cond_frames(num_cond_frames, num_frames, clip.shape[0])
    return clip[-num_cond_frames:]


def _size(name: str, height: int, width: int, picture_height: int, picture_width: int) -> tuple[int, int]:
    if name == SIZES[1]:
        return size_for_area(height * width, picture_height, picture_width)
    if name == SIZES[2]:
        return bucket("480p", picture_height, picture_width)
    if name == SIZES[3]:
        return bucket("720p", picture_height, picture_width)
    return height, width


def tail_latents(latent: Latent, num_cond_frames: int) -> Tensor:
    """The last latents that stand for `num_cond_frames` frames, [B, C, n, h, w]."""
    samples, count = latent["samples"], num_latents(num_cond_frames)
    if samples.ndim != 5 or samples.shape[2] < count:
        have = samples.shape[2] if samples.ndim == 5 else 0
        raise InputError(f"the latents have {have} frames, {num_cond_frames} condition frames need {count}")
    return samples[:, :, -count:]
