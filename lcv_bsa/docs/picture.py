"""Draws selection.svg: a grid cut into blocks, one query block with its kept key blocks, and the block mask.

The selection is a real one, of tokens that look like something moving across the frames: python docs/picture.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lcv_bsa import BlockLayout, BlockSelection, select_blocks

GRID, BLOCK, KEEP = (12, 16, 24), (4, 4, 4), 1 / 8
QUERY = (1, 1, 2)  # the block whose row is shown
TOKEN, GAP, LEFT, TOP = 9, 34, 12, 58
INK, LINE, GREY, BLUE, ORANGE = "#333333", "#c8c8c8", "#9a9a9a", "#2f6fb5", "#f0a13c"


def moving_tokens() -> Tensor:
    """[1, 1, S, 64]: waves over positions that move two rows and three columns every four latents."""
    T, H, W = GRID
    t, h, w = torch.meshgrid(torch.arange(T), torch.arange(H), torch.arange(W), indexing="ij")
    places = torch.stack([h - 0.5 * t, w - 0.75 * t, 0.35 * t], -1).view(-1, 3)
    generator = torch.Generator().manual_seed(3)
    waves = torch.randn(32, 3, generator=generator) * 0.35
    angles = places.float() @ waves.T
    return torch.cat([angles.sin(), angles.cos()], -1)[None, None]


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", line: float = 1) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="{line:g}"/>'
    )


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">{words}</text>'


def frames(kept: set[int], query: int, layout: BlockLayout) -> list[str]:
    """A panel for each step of blocks in time: tokens as thin lines, blocks as thick ones."""
    (bt, bh, bw), (t, h, w) = layout.block_grid, layout.block
    width, height = bw * w * TOKEN, bh * h * TOKEN
    parts: list[str] = []
    for step in range(bt):
        x, y = LEFT, TOP + step * (height + GAP)
        parts.append(text(x, y - 7, f"latents {step * t} to {step * t + t - 1}"))
        for row in range(bh):
            for column in range(bw):
                block = (step * bh + row) * bw + column
                fill = BLUE if block == query else ORANGE if block in kept else "white"
                parts.append(
                    rectangle(x + column * w * TOKEN, y + row * h * TOKEN, w * TOKEN, h * TOKEN, fill, INK, 1.5)
                )
        lines = [f"M{x + i * TOKEN} {y}v{height}" for i in range(1, bw * w)]
        lines += [f"M{x} {y + i * TOKEN}h{width}" for i in range(1, bh * h)]
        parts.append(f'<path d="{"".join(lines)}" stroke="{LINE}" stroke-width="0.5" fill="none"/>')
    return parts


def mask(selection: BlockSelection, query: int, x: float, size: float) -> list[str]:
    """Rows are query blocks, columns key blocks."""
    kept, cell = selection.to_mask()[0, 0], size / selection.layout_k.num_blocks
    parts = [rectangle(x, TOP, size, size, "white", INK, 1.5)]
    for fill, is_query in ((GREY, False), (ORANGE, True)):
        places = [(row, column) for row, column in kept.nonzero().tolist() if (row == query) == is_query]
        c = f"{cell:.1f}"
        cells = "".join(f"M{x + column * cell:.1f} {TOP + row * cell:.1f}h{c}v{c}h-{c}z" for row, column in places)
        parts.append(f'<path d="{cells}" fill="{fill}"/>')
    parts.append(rectangle(x, TOP + query * cell - 0.5, size, cell + 1, "none", BLUE, 1.5))
    parts.append(text(x, TOP - 7, "block mask: 72 query blocks by 72 key blocks"))
    return parts


def picture() -> str:
    layout = BlockLayout(GRID, BLOCK)
    tokens = moving_tokens()
    selection = select_blocks(tokens, tokens, GRID, GRID, BLOCK, keep=KEEP)
    _, bh, bw = layout.block_grid
    query = (QUERY[0] * bh + QUERY[1]) * bw + QUERY[2]
    kept = set(selection.indices[0, 0, query].tolist())
    panel = GRID[2] * TOKEN
    height = layout.block_grid[0] * (GRID[1] * TOKEN + GAP) - GAP
    x = LEFT + panel + 48
    parts = frames(kept, query, layout) + mask(selection, query, x, height)
    parts.append(text(LEFT, 22, "A grid of 12x16x24 tokens in 4x4x4 blocks.", 15))
    y = TOP + height + 24
    itself = ", itself among them" if query in kept else ""
    names = (
        "a query block",
        f"its {len(kept)} key blocks of {layout.num_blocks}{itself}",
        "those of the other query blocks",
    )
    for place, fill, words in zip((0, 135, 430), (BLUE, ORANGE, GREY), names):
        parts.append(rectangle(LEFT + place, y - 11, 13, 13, fill, INK))
        parts.append(text(LEFT + place + 20, y, words))
    size = f'width="{x + height + LEFT:g}" height="{y + 14:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).resolve().parent / "selection.svg").write_text(picture(), encoding="utf-8")
