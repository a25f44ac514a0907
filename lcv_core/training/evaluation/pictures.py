"""Contact sheets with captions: what was asked for, and what the clip shows instead where it shows something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lcv_core.files import replacing
from lcv_core.training.sheets import contact_sheet

_TEXT, _WRONG, _PAPER = (230, 230, 230), (255, 130, 110), (32, 32, 32)
_SIZE, _LINE = 12, 16  # pixels


def strip(rows: Sequence[Tensor], caption: str, wrong: Mapping[str, str]) -> Image.Image:
    """One case: a line of text, then its clips, uint8 [F, H, W, 3] each, below each other.

    wrong: what the clip shows by attribute, of those that are not as asked for.
    """
    pictures = [Image.fromarray(contact_sheet(frames.cpu().unsqueeze(0)).numpy()) for frames in rows]
    width = max(picture.width for picture in pictures)
    image = Image.new("RGB", (width, _LINE + sum(picture.height for picture in pictures)), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_SIZE)
    draw.text((4, 1), caption, fill=_TEXT, font=font)
    if wrong:
        shown = ", ".join(f"{name}: {value}" for name, value in wrong.items())
        draw.text((12 + draw.textlength(caption, font=font), 1), f"shows {shown}", fill=_WRONG, font=font)
    top = _LINE
    for picture in pictures:
        image.paste(picture, (0, top))
        top += picture.height
    return image


def write_strip(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def write_sheet(path: Path, strips: Sequence[Path]) -> None:
    """The strips below each other as one PNG."""
    images = [Image.open(strip) for strip in strips]
    sheet = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), _PAPER)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    write_strip(path, sheet)


def to_uint8(frames: Tensor) -> Tensor:
    """Frames as they are looked at, uint8 of the same shape."""
    if frames.dtype == torch.uint8:
        return frames
    return (frames.float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
