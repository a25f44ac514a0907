"""ComfyUI's LATENT: samples un-normalised, the noise mask 0 on condition frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.image_io import as_frames, resize_frames
from lcv_core.names import Fit
from lcv_core.pipelines.base import native_size, to_pixels
from lcv_core.shapes import check_cond_frames, check_size, latent_shape, num_latents

from .native import native_of
from .sampling import Latent, condition_mask
from .vae import check_vae, host_vae

_CHANNELS = 16  # of the Wan 2.1 VAE's latents


def start_latent(
    model: Any, vae: Any, *, height: int, width: int, num_frames: int, num_cond_frames: int, batch_size: int, fit: Fit,
    image: Any = None, video: Any = None,
) -> tuple[Latent, int, int]:  # fmt: skip
    """(LATENT, width, height). An image is one condition frame, a video its last num_cond_frames. 0 stands for the
    model's own sizes and counts; with a picture, for the size that suits its aspect."""
    check_vae(vae)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    native = native_of(model)
    num_frames, num_cond_frames = num_frames or native.num_frames, num_cond_frames or native.num_cond_frames
    frames = _condition(image, video, num_frames, num_cond_frames)
    own = (native.height, native.width) if frames is None else native_size(native, *frames.shape[1:3])
    height, width = height or own[0], width or own[1]
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
        return frames_of(image)[:1]
    if video is None:
        return None
    clip = frames_of(video)
    check_cond_frames(num_cond_frames, num_frames, clip.shape[0])
    return clip[-num_cond_frames:]


def frames_of(images: Any) -> Tensor:
    """ComfyUI's IMAGE as frames [F, H, W, 3]: uint8 again where it came from 8 bits, else float in [0, 1].

    A picture is then resized as the command line and the official model resize the file that it came from.
    """
    frames = as_frames(images)
    if frames.dtype == torch.uint8:
        return frames
    levels = []
    for frame in frames:  # one at a time: no second copy of a long clip
        level = (frame * 255.0).round().to(torch.uint8)
        if not torch.equal(frame, level.float() / 255.0):
            return frames
        levels.append(level)
    return torch.stack(levels)


def samples_of(latent: Latent) -> Tensor:
    """A LATENT's samples [B, 16, T, h, w]; InputError when it is no video's of this model, or not finite."""
    samples = latent["samples"]
    if samples.ndim != 5:
        raise InputError(f"the latent is {samples.ndim}-dimensional, a video's has 5; use LongCat-Video Latent")
    if samples.shape[1] != _CHANNELS:
        raise InputError(
            f"the latent has {samples.shape[1]} channels, LongCat-Video's have {_CHANNELS}; use LongCat-Video Latent"
        )
    if not samples.shape[0]:
        raise InputError("the latent holds no video; make one with a batch_size of at least 1")
    if not torch.isfinite(samples).all():
        raise InputError("the latent has NaN or infinite values; make it again, what it came from went wrong")
    return samples


def tail_latents(latent: Latent, num_cond_frames: int) -> Tensor:
    """The last latents that stand for `num_cond_frames` frames, [1, 16, n, h, w]."""
    samples, count = samples_of(latent), num_latents(num_cond_frames)
    if samples.shape[0] > 1:
        raise InputError(f"the latent holds {samples.shape[0]} videos; choose one with Latent From Batch")
    if samples.shape[2] < count:
        raise InputError(f"the latent has {samples.shape[2]} frames, {num_cond_frames} condition frames need {count}")
    return samples[:, :, -count:]
