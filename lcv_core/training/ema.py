"""The exponential moving average of the trained parameters: what is sampled and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """average <- decay * average + (1 - decay) * parameter, after each optimizer step.

    params: the trained parameters by name, whole or sharded; the averages live where they do, in fp32.
    decay: approached from below, min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten (the
        rule of TensorFlow's ExponentialMovingAverage); 0 keeps no average, and the parameters stand in for it.
    """

    def __init__(self, params: Mapping[str, Tensor], decay: float) -> None:
        self.params, self.decay = dict(params), decay
        self.average = {name: p.detach().clone() for name, p in self.params.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(self.params[name].detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters have the averages' values; afterwards their own, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            kept = self.params[name].detach().clone()
            self.params[name].copy_(average)
            average.copy_(kept)
