"""A workflow's picture in the template browser: its graph, or frames of the video that it makes before the graph."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

CARD = (640, 360)
BACKGROUND, BORDER = (24, 24, 27), (235, 235, 240)
# Frames lie like cards of a hand: each so much further to the right and down.
FRAME_WIDTH, STEP, EDGE = 360, (130, 56), 2
# What is left of the graph's light behind them.
DIMMED = 0.45


def graph_card(graph: bytes) -> Image.Image:
    """The picture of a graph (a PNG file), fitted into the card."""
    image = Image.open(io.BytesIO(graph)).convert("RGB")
    image.thumbnail(CARD)
    card = Image.new("RGB", CARD, BACKGROUND)
    card.paste(image, ((CARD[0] - image.width) // 2, (CARD[1] - image.height) // 2))
    return card


def frames_card(graph: bytes, frames: Sequence[Image.Image]) -> Image.Image:
    """Frames of the result, the first at the upper left, the last in front, over the dimmed graph."""
    card = graph_card(graph).point(lambda light: light * DIMMED)
    framed = [_framed(frame) for frame in frames]
    width = framed[-1].width + STEP[0] * (len(framed) - 1)
    height = framed[-1].height + STEP[1] * (len(framed) - 1)
    left, top = (CARD[0] - width) // 2, (CARD[1] - height) // 2
    for index, frame in enumerate(framed):
        card.paste(frame, (left + index * STEP[0], top + index * STEP[1]))
    return card


def _framed(frame: Image.Image) -> Image.Image:
    """With a thin border; upright ones no taller than the others are wide enough for."""
    room = (FRAME_WIDTH, CARD[1] - 2 * STEP[1] - 4 * EDGE)
    scale = min(room[0] / frame.width, room[1] / frame.height)
    size = (round(frame.width * scale), round(frame.height * scale))
    bordered = Image.new("RGB", (size[0] + 2 * EDGE, size[1] + 2 * EDGE), BORDER)
    bordered.paste(frame.convert("RGB").resize(size, Image.Resampling.LANCZOS), (EDGE, EDGE))
    return bordered
