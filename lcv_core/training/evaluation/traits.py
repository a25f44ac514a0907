"""What may drift as a video goes on: numbers of a clip, whatever it was asked to show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcv_core.training.evaluation.judge import find
from lcv_core.training.evaluation.metrics import unit_frames
from lcv_core.training.rewards.pictures import edge_steepness


def clip_traits(frames: Tensor) -> dict[str, Any]:
    """Of a clip [F, H, W, 3]: "colour" of the object and "background", 8-bit [3] each, "radius" of the object in frame
    heights (None for all that needs an object where there is none), and "sharpness" in [0, 1]."""
    track = find(frames)
    found: dict[str, Any] = {
        "background": track.background.median(dim=0).values.tolist(),
        "sharpness": float(edge_steepness(unit_frames(frames)).mean()),
        "colour": None,
        "radius": None,
    }
    if track.found:
        inner = ((track.mask - 0.5).clamp(min=0.0) * track.seen.view(-1, 1, 1)).unsqueeze(-1)
        found["colour"] = ((track.frames * inner).sum(dim=(0, 1, 2)) / inner.sum().clamp(min=1e-6)).tolist()
        found["radius"] = float(track.radius[track.seen].median())
    return found


def colour_distance(a: list[float] | None, b: list[float] | None) -> float | None:
    """Root mean square over the channels, in 8-bit steps."""
    if a is None or b is None:
        return None
    return float((torch.tensor(a) - torch.tensor(b)).square().mean().sqrt())
