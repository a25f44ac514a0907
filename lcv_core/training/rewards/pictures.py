"""Rewards that look at the pictures alone."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_CONTRAST = 0.05  # of a frame's range of values; below it there is nothing to be sharp
_STEEPEST = 0.005  # share of the neighbours whose difference counts


def sharpness(frames: Tensor, prompt: str) -> float:
    """How steep the steepest edges are: 1 where neighbours differ as much as anything in the frame does.

    The mean difference over the steepest half percent of neighbouring pixels, divided by the frame's range (between its
    half percents of darkest and brightest values), in each frame's strongest channel. 0 for a frame of one colour.
    """
    del prompt
    return float(edge_steepness(frames).mean())


def edge_steepness(frames: Tensor) -> Tensor:
    """`sharpness` of each frame [F, H, W, 3], in [0, 1]: [F]."""
    x = frames.float().permute(0, 3, 1, 2)  # [F, 3, H, W]
    down, right = (x[:, :, 1:] - x[:, :, :-1]).abs().flatten(2), (x[..., 1:] - x[..., :-1]).abs().flatten(2)
    steps = torch.cat([down, right], dim=2)
    steepest = steps.topk(max(1, round(_STEEPEST * steps.shape[2])), dim=2).values.mean(dim=2)  # [F, 3]
    values = x.flatten(2).sort(dim=2).values
    edge = max(1, round(_STEEPEST * values.shape[2]))
    contrast = values[..., -edge:].mean(dim=2) - values[..., :edge].mean(dim=2)  # [F, 3]
    best = contrast.argmax(dim=1, keepdim=True)
    steepest, contrast = steepest.gather(1, best).squeeze(1), contrast.gather(1, best).squeeze(1)
    return torch.where(contrast < _LEAST_CONTRAST, 0.0, steepest / contrast.clamp(min=1e-6)).clamp(0.0, 1.0)
