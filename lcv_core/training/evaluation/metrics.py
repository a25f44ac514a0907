"""Frames against frames: fidelity, and how visible the joints of a continued clip are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcv_core.errors import InputError

_SSIM_SIGMA, _SSIM_SIZE = 1.5, 11
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
_STILL = 0.25 / 255  # mean change per frame below which a clip counts as still: rounding and noise


def unit_frames(frames: Tensor) -> Tensor:
    """Frames [F, H, W, 3], uint8 or float in [0, 1] -> fp32 in [0, 1]. InputError for other shapes."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"frames must be [F, H, W, 3], got {[*frames.shape]}")
    return frames.float() / 255.0 if frames.dtype == torch.uint8 else frames.float()


def psnr(frames: Tensor, reference: Tensor) -> float:
    """10 log10(1 / MSE) in dB over all of a clip, for values in [0, 1]; inf if equal."""
    a, b = _pair(frames, reference)
    return float(-10.0 * torch.log10((a.double() - b.double()).square().mean()))


def ssim(frames: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames, channels and every place where its 11 x 11 Gaussian
    window (sigma 1.5) fits. InputError for frames smaller than the window."""
    a, b = (x.permute(0, 3, 1, 2).double() for x in _pair(frames, reference))
    if min(a.shape[-2:]) < _SSIM_SIZE:
        raise InputError(f"ssim needs frames of at least {_SSIM_SIZE} pixels on each side, got {[*a.shape[-2:]]}")
    at = torch.arange(_SSIM_SIZE, dtype=torch.float64) - _SSIM_SIZE // 2
    window = torch.exp(-at.square() / (2 * _SSIM_SIGMA**2))
    weights = (window / window.sum()).tolist()

    def mean(x: Tensor) -> Tensor:  # in slices: convolutions in fp64 take ten times as long
        for axis in (-2, -1):
            size = x.shape[axis] - _SSIM_SIZE + 1
            total = torch.zeros_like(x.narrow(axis, 0, size))
            for i, weight in enumerate(weights):
                total.add_(x.narrow(axis, i, size), alpha=weight)
            x = total
        return x

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = _SSIM_K1**2, _SSIM_K2**2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(value.mean())


def seam_jump(frames: Tensor, joints: Sequence[int]) -> float:
    """How much more changes across the joints than between other neighbours: 1 if a joint cannot be told.

    joints: indices of the frames that begin a new segment. The mean absolute difference to the frame before, over the
    joints, divided by the same over all other frames; what is below the rounding of a still clip counts as that.
    """
    frames = unit_frames(frames)
    if not joints or any(not 0 < j < len(frames) for j in joints) or len({*joints}) >= len(frames) - 1:
        raise InputError(f"joints must be in [1, {len(frames) - 1}] and leave other frames, got {[*joints]}")
    change = (frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3))
    at_joint = torch.zeros(len(change), dtype=torch.bool)
    at_joint[[j - 1 for j in joints]] = True
    return max(float(change[at_joint].mean()), _STILL) / max(float(change[~at_joint].mean()), _STILL)


def _pair(frames: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if frames.shape != reference.shape:
        raise InputError(f"clips of different shapes: {[*frames.shape]} and {[*reference.shape]}")
    return unit_frames(frames), unit_frames(reference)
