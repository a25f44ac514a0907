"""What build.py makes of a graph's picture and frames of a result."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from workflows.source.thumbnails import CARD, frames_card, graph_card

GREY = (120, 130, 140)


@pytest.fixture
def graph() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1600, 900), GREY).save(file, "PNG")
    return file.getvalue()


def at(card: Image.Image, x: float, y: float) -> tuple[int, ...]:
    pixel = card.getpixel((round(x * (CARD[0] - 1)), round(y * (CARD[1] - 1))))
    assert isinstance(pixel, tuple)
    return pixel


def test_a_graph_alone_is_as_light_as_it_is(graph: bytes) -> None:
    card = graph_card(graph)
    assert card.size == CARD
    assert at(card, 0.5, 0.5) == at(card, 0, 0) == GREY


@pytest.mark.parametrize("size", [(160, 96), (832, 480), (480, 832), (64, 64)])
def test_frames_lie_over_a_dimmed_graph(graph: bytes, size: tuple[int, int]) -> None:
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    card = frames_card(graph, [Image.new("RGB", size, colour) for colour in (red, green, blue)])
    assert card.size == CARD
    assert max(at(card, 1, 0)) < min(GREY)
    counts = {colour: count for count, colour in card.getcolors(CARD[0] * CARD[1]) or []}
    assert counts[red] and counts[green]  # none is hidden
    assert counts[blue] > counts[red] and counts[blue] > CARD[0] * CARD[1] * 0.08  # the last is whole, and large
    across = [x for x in range(CARD[0]) if card.getpixel((x, CARD[1] // 2)) in (red, green, blue)]
    assert across[0] > 2 and across[-1] < CARD[0] - 3  # nothing is cut off
