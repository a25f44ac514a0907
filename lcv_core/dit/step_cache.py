"""Step caching: where the network would say nearly what it said before, its first block alone is run.

The first block's output tells how far the input has moved since the last step that was computed in full; what all other
blocks added then is reused (first block cache; TeaCache, arXiv 2411.19108, puts the same question to the timestep's
embedding). Those methods take a threshold of that movement, which means another thing in every model. Here the budget
is one of the result: the relative L2 error of the velocity that is integrated, guidance included.

How much error a movement brings is learned in the run itself. In each step computed in full it is known what reuse
would have given, at the cost of one more final layer: `gain` = that error / the movement it had. A later step is reused
where gain * movement <= budget, with the larger of the last two gains. That is an estimate from the run's own last
measurement, not a proof; `benchmarks/step_cache.csv` has what was kept on the miniature.

What it adds up to: the latents are moved by d_sigma * velocity in each step, so to first order all reuse together
changes the result by at most budget * sum of |d_sigma| * |velocity| over the reused steps: a budget of 0.05 is 5% of
the way that the latents make in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.layers import upcast

# The first steps decide what is shown where, and the gain has to be measured once; the last is what is seen.
FIRST_STEPS, LAST_STEPS = 3, 1
_GAINS = 2  # measurements that count
_TOKENS = 4096  # of a sample that are compared, up to twice as many: more would not change a mean over them


def check_budget(budget: float) -> None:
    """InputError unless it is a relative error; 0 means no step caching."""
    if not (math.isfinite(budget) and 0 <= budget < 1):
        raise InputError(f"step_cache must be from 0 (off) to below 1, a relative error of the velocity; got {budget}")


class Branch:
    """What one branch of guidance remembers of the last step computed in full.

    Two tensors: what the blocks after the first added [B, N, C], and the first block's output at some tokens in fp32;
    375 MB a branch at 93 frames of 480x832 in bf16.
    would: the velocity that reuse would have given in a step computed in full, as the network returns it.
    """

    def __init__(self, ask: Callable[[float], bool]) -> None:
        self._ask = ask
        self._added: Tensor | None = None
        self._seen: Tensor | None = None
        self.would: Tensor | None = None

    @property
    def ready(self) -> bool:
        return self._added is not None

    def reuse(self, x: Tensor, num_cond_tokens: int, head: Callable[[Tensor], Tensor]) -> bool:
        """Whether the blocks after the first are left out; then what they added is in x, which is written over.

        x [B, N, C]: the stream after the first block. Its condition tokens, the first, never change and do not count.
        head: from the stream to the velocity.
        """
        seen, self.would = _some(x, num_cond_tokens), None
        if self._added is None or self._seen is None or self._added.shape != x.shape:
            self._added, self._seen = x.clone(), seen
            return False
        if self._ask(_distance(seen, self._seen)):
            x.add_(self._added)
            return True
        self.would = head(self._added.add_(x))
        self._added.copy_(x)
        self._seen = seen
        return False

    def keep(self, x: Tensor) -> None:
        """x [B, N, C]: the stream after the last block."""
        assert self._added is not None
        torch.sub(x, self._added, out=self._added)


class StepCache:
    """Decides for one run which steps are computed in full; keeps a `Branch` for each branch of guidance.

    All branches of a step are reused or none is, by the movement of the first: guidance takes differences of branches,
    in which errors of the same step cancel. A batch is one decision, by the sample that moved most.

    budget: relative L2 error of a step's velocity, in (0, 1). num_steps: of the whole run. gains: of an earlier part of
        the run (`state`).
    """

    def __init__(self, budget: float, num_steps: int, gains: Sequence[float] = ()) -> None:
        check_budget(budget)
        self.budget, self.num_steps = budget, num_steps
        self.gains = list(gains)[-_GAINS:]
        self.reused: list[int] = []  # steps, from 0
        self._branches: dict[str, Branch] = {}
        self._step, self._open, self._decision, self._movement = 0, True, False, 0.0

    @property
    def state(self) -> dict[str, Any]:
        """What a run that goes on from the last step computed in full has to know, as JSON."""
        return {"gains": self.gains}

    def begin(self, step: int, names: Sequence[str]) -> None:
        """Before the forwards of a step (from 0) that runs these branches. Other ones than before start afresh."""
        if list(self._branches) != list(names):
            self._branches = {name: Branch(self._ask) for name in names}
        self._step, self._open, self._decision, self._movement = step, True, False, 0.0

    def branch(self, name: str) -> Branch:
        return self._branches[name]

    def _ask(self, movement: float) -> bool:
        if self._open:  # the step's first branch
            self._open, self._movement = False, movement
            allowed = FIRST_STEPS <= self._step < self.num_steps - LAST_STEPS and bool(self.gains)
            ready = all(branch.ready for branch in self._branches.values())
            self._decision = allowed and ready and max(self.gains) * movement <= self.budget
        return self._decision

    def end(self, velocity: Tensor, combine: Callable[[Mapping[str, Tensor]], Tensor]) -> bool:
        """After a step with this velocity [B, C, T, h, w]; whether it was reused.

        combine: from the branches' velocities to what is integrated.
        """
        if self._decision:
            self.reused.append(self._step)
            return True
        would = {name: branch.would for name, branch in self._branches.items() if branch.would is not None}
        if len(would) == len(self._branches) and self._movement > 0:
            error = _distance(combine(would), velocity)
            self.gains = [*self.gains, error / self._movement][-_GAINS:]
        for branch in self._branches.values():
            branch.would = None
        return False


def _some(x: Tensor, first: int) -> Tensor:
    """Tokens from `first` on, evenly spread: a copy, fp32 [B, n, C]."""
    stride = max(1, (x.shape[1] - first) // _TOKENS)
    return upcast(x[:, first::stride]).clone()


def _distance(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference| of the sample that differs most."""
    norms = [y.flatten(1).norm(dim=1) for y in (x - reference, reference)]
    return (norms[0] / norms[1].clamp_min(torch.finfo(norms[1].dtype).tiny)).max().item()
