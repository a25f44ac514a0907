"""What is asked for in an evaluation: scenes of combinations that training never saw, by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lcv_core.training.data.clips import Clip, describe_clip
from lcv_core.training.data.grammar import Scene, held_back_combinations, parse
from lcv_core.training.data.render import clip_times, render
from lcv_core.training.randomness import generator, seed_of


@dataclass(frozen=True)
class Case:
    """Case number `index` of a seed. named: what the prompt names of the scene, by attribute; only that is judged."""

    seed: int
    index: int
    scene: Scene
    prompt: str

    @property
    def named(self) -> dict[str, str]:
        return parse(self.prompt)

    def noise(self, task: str) -> torch.Generator:
        """The random numbers of this case in a task, whatever else is made with it."""
        return generator(self.seed, "evaluation", task, self.index)

    def noise_seed(self, task: str) -> int:
        return seed_of(self.seed, "evaluation", task, self.index)

    def clip(self, num_frames: int, height: int, width: int, frame_rate: float) -> Clip:
        """The scene as the renderer shows it, from its beginning."""
        times = clip_times(num_frames, frame_rate)
        return Clip(self.scene, self.prompt, render(self.scene, times, height, width), times)


def make_cases(seed: int, indices: Sequence[int]) -> list[Case]:
    """Cases by number. Every held-back combination comes once before any comes again, in an order drawn by the seed."""
    combinations = sorted(held_back_combinations())
    order = torch.randperm(len(combinations), generator=generator(seed, "evaluation", "order")).tolist()
    cases = []
    for index in indices:
        thing, colour, motion = combinations[order[index % len(order)]]
        # Scenes are numbered by seed and index as training clips are; that their combinations are held back keeps them
        # apart.
        scene, prompt, _ = describe_clip(seed, index, held_back="only", object=thing, colour=colour, motion=motion)
        cases.append(Case(seed, index, scene, prompt))
    return cases
