"""Which latent frames share a timestep: what adaLN makes of a timestep is then made once and broadcast over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Tokens start..stop - 1 of one sample, all of whose frames have the distinct timestep `row`."""

    sample: int
    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class Frames:
    """Where each distinct timestep is used.

    rows: int32 [B, T], for each latent frame which of the distinct timesteps it has. frame_tokens: of a frame.
    spans: the same as runs of tokens, sample by sample, in order.
    """

    rows: Tensor
    frame_tokens: int
    spans: tuple[Span, ...]

    def within(self, start: int, stop: int) -> Iterator[Span]:
        """The spans of tokens start..stop - 1, counted from `start`."""
        for sample, first, last, row in self.spans:
            if first < stop and last > start:
                yield Span(sample, max(first, start) - start, min(last, stop) - start, row)


def share_timesteps(timestep: Tensor, frame_tokens: int) -> tuple[Tensor, Frames]:
    """The distinct values of timestep [B, T], ascending [R], and where they are used.

    In most steps R is 1, or 2 with condition frames. Waits for the device once.
    """
    distinct, rows = torch.unique(timestep, return_inverse=True)
    return distinct, Frames(rows.to(torch.int32), frame_tokens, tuple(_spans(rows.tolist(), frame_tokens)))


def _spans(rows: list[list[int]], frame_tokens: int) -> Iterator[Span]:
    for sample, frames in enumerate(rows):
        start = 0
        for row, run in groupby(frames):
            stop = start + len(list(run)) * frame_tokens
            yield Span(sample, start, stop, row)
            start = stop
