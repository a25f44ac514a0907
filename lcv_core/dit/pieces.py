"""How the tokens of a sequence are cut where little of it shall be worked on at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of a norm, rope or gate: 1 MB in fp32 stays in a core's own cache; a GPU wants enough to be busy (32 MB).
_ELEMENTS_ON_CPU, _ELEMENTS_ON_GPU = 1 << 18, 1 << 23
# A layer whose output is wide runs on this many pieces of the sequence: a quarter of the feed-forward's two hidden
# activations (2.7 widths each) is less than what attention holds anyway, so smaller pieces would save nothing. A CPU's
# matmuls lose 4% of a block's time on quarters (fp32, 2,340 tokens), and memory is dearer on a GPU.
_PIECES_ON_CPU, _PIECES_ON_GPU = 2, 4
_PIECES_OF_REMOTE = 2
# Fewer tokens at once would cost speed: the weights are read, and perhaps cast, for each piece.
_LEAST_ON_CPU, _LEAST_ON_GPU = 512, 4096


def by_elements(tokens: int, width: int, device: torch.device, start: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of `tokens` tokens of `width` elements, from `start` on, for elementwise work."""
    step = elements_step(width, device)
    for first in range(start, start + tokens, step):
        yield first, min(first + step, start + tokens)


def elements_step(width: int, device: torch.device | str) -> int:
    """Tokens of `width` elements in a piece."""
    return max(1, (_ELEMENTS_ON_CPU if torch.device(device).type == "cpu" else _ELEMENTS_ON_GPU) // width)


def by_layer(tokens: int, layer: Any, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of `tokens` tokens that a wide layer runs on."""
    step = layer_step(tokens, device, remote=_is_remote(layer, device))
    for start in range(0, tokens, step):
        yield start, min(start + step, tokens)


def layer_step(tokens: int, device: torch.device | str, *, remote: bool = False) -> int:
    """Tokens of a piece. remote: the layer's weight lives elsewhere and is brought in for each piece."""
    least = _LEAST_ON_CPU if torch.device(device).type == "cpu" else _LEAST_ON_GPU
    pieces = _PIECES_OF_REMOTE if remote else layer_pieces(device)
    return min(tokens, max(-(-tokens // pieces), least))


def layer_pieces(device: torch.device | str) -> int:
    """How many pieces a long sequence is cut into, for a layer whose weight is at hand."""
    return _PIECES_ON_CPU if torch.device(device).type == "cpu" else _PIECES_ON_GPU


def _is_remote(layer: Any, device: torch.device) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.device != device
