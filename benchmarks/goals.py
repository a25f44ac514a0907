"""What a measured number is to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """value: None where it was not measured, and `why` says why not. A bound that is None does not count."""

    text: str
    value: float | None
    least: float | None = None
    most: float | None = None
    unit: str = ""
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "unknown"
        low = self.least is None or self.value >= self.least
        high = self.most is None or self.value <= self.most
        return "met" if low and high else "NOT MET"

    def __str__(self) -> str:
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.least), ("<=", self.most)) if bound is not None]
        value = "not measured" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        why = f" ({self.why})" if self.why else ""
        return f"{self.verdict:8} {self.text}: {value}, goal {' and '.join(bounds)}{why}"


def print_goals(goals: Sequence[Goal]) -> None:
    print("goals:")
    for goal in goals:
        print(f"  {goal}")
