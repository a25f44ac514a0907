"""Whether a clip shows what its prompt names, by the judge that evaluation uses too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lcv_core.training.data.grammar import parse
from lcv_core.training.evaluation.judge import score


@dataclass(frozen=True)
class Shown:
    """Mean score of those of the attributes that the prompt names: above 0.5 where the clip shows them, 1 without any
    doubt; 0 when it names none of them."""

    attributes: tuple[str, ...]

    def __call__(self, frames: Tensor, prompt: str) -> float:
        return self.of(score(frames, parse(prompt)))

    def of(self, scores: Mapping[str, float]) -> float:
        """From the scores of all attributes that a prompt names."""
        found = [scores[name] for name in self.attributes if name in scores]
        return sum(found) / len(found) if found else 0.0

    @staticmethod
    def together(rewards: Mapping[str, Shown], frames: Tensor, prompt: str) -> dict[str, float]:
        """Several of them from one measurement of the clip, by their names."""
        if not rewards:
            return {}
        scores = score(frames, parse(prompt))
        return {name: reward.of(scores) for name, reward in rewards.items()}
