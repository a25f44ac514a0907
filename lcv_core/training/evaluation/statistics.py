"""How sure a number is: intervals of proportions and means, and whether a paired difference is by chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Z95 = 1.959964  # of the normal distribution, two-sided 95%
_EXACT = 12  # up to so many differences every choice of signs is looked at
_FLIPS = 20_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval (not a number where one observation tells nothing of it) from `count` of them."""

    value: float
    low: float
    high: float
    count: int


def proportion(successes: int, count: int) -> Estimate:
    """The share of successes, with the binomial interval of Wilson (1927), which holds for few of them too."""
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share, z2 = successes / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == count else middle + half
    return Estimate(share, low, high, count)


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with the normal interval of its standard error."""
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    middle = math.fsum(values) / count
    if count == 1 or not math.isfinite(middle):
        return Estimate(middle, math.nan, math.nan, count)
    variance = math.fsum((v - middle) ** 2 for v in values) / (count - 1)
    half = Z95 * math.sqrt(variance / count)
    return Estimate(middle, middle - half, middle + half, count)


def paired_p_value(differences: Sequence[float], *, seed: int = 0) -> float:
    """Probability of a mean difference at least as far from 0, were each difference's sign a coin's: the two-sided
    sign-flip test (Fisher 1935). Exact for up to 12 differences, else from 20,000 choices of signs."""
    count = len(differences)
    if count == 0:
        return 1.0
    d = torch.tensor(differences, dtype=torch.float64)
    observed = float(d.sum().abs()) - 1e-12 * (1 + float(d.abs().sum()))
    if count <= _EXACT:
        signs = torch.tensor([*itertools.product((-1.0, 1.0), repeat=count)], dtype=torch.float64)
        return float(((signs @ d).abs() >= observed).double().mean())
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for _ in range(0, _FLIPS, 1000):
        signs = torch.randint(0, 2, (1000, count), generator=generator).double() * 2 - 1
        extreme += int(((signs @ d).abs() >= observed).sum())
    return (extreme + 1) / (_FLIPS + 1)
