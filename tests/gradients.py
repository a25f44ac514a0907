"""Gradients of whole networks against central differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tiny_models import seeded
from torch import Tensor


def check_gradients(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, step: float = 1e-5, tolerance: float = 1e-6
) -> None:
    """In fp64: along a direction through each parameter, autograd and (loss(+h) - loss(-h)) / 2h agree.

    The direction is the gradient's and a random one together, so that something is to be seen and nothing left out.
    loss: of the parameters as they are, the same at every call. tolerance: relative to the largest slope; the smallest
    slope must be above it by far, or the check would not see its parameter.
    """
    gradients = torch.autograd.grad(loss(), parameters)
    expected, found = [], []
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        assert parameter.dtype == torch.float64
        direction = torch.randn(parameter.shape, generator=seeded(i), dtype=torch.float64)
        direction = direction / direction.norm() + gradient / gradient.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                before = parameter.clone()
                parameter += sign * step * direction
                ends.append(float(loss()))
                parameter.copy_(before)
        expected.append((ends[0] - ends[1]) / (2 * step))
        found.append(float((gradient * direction).sum()))
    largest = max(map(abs, expected))
    assert min(map(abs, expected)) > 100 * tolerance * largest, "a slope too small to be seen"
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert abs(a - b) <= tolerance * largest, f"parameter {i}: slope {a:.9g}, gradient {b:.9g}"
