"""Sample grids: clips below each other, their frames from left to right, as one PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lcv_core.files import replacing

GAP = 2  # pixels between pictures
WIDEST = 2400  # pixels; of longer clips some frames are left out


def contact_sheet(clips: Tensor, *, background: int = 32) -> Tensor:
    """uint8 [N, F, H, W, 3] -> one picture uint8 [N * (H + GAP) + GAP, columns * (W + GAP) + GAP, 3].

    Where not all frames fit, those shown are evenly spaced, the first and the last among them.
    """
    N, F, H, W, _ = clips.shape
    columns = max(1, min(F, (WIDEST - GAP) // (W + GAP)))
    chosen = torch.linspace(0, F - 1, columns).round().long()
    sheet = torch.full((N * (H + GAP) + GAP, columns * (W + GAP) + GAP, 3), background, dtype=torch.uint8)
    for row in range(N):
        for column, frame in enumerate(chosen.tolist()):
            top, left = GAP + row * (H + GAP), GAP + column * (W + GAP)
            sheet[top : top + H, left : left + W] = clips[row, frame]
    return sheet


def write_sheet(path: Path, clips: Tensor) -> Path:
    """Write `contact_sheet(clips)` as PNG, whole or not at all; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(contact_sheet(clips.cpu()).numpy())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
    return path
