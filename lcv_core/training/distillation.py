"""The arithmetic of distillation: guidance in one forward, and many steps of the teacher in one.

With v = x0 - noise and x_t = (1 - t) x0 + t noise, sampling follows dx = -v dt from t = 1 to 0.

Guidance (Meng et al. 2023, first stage): the student without guidance learns the guided velocity of the teacher.

Steps: a consistency model (Song et al. 2023) carries every point of a trajectory to one place; here to the end of the
segment that the point is in, the next level of the schedule it is sampled with (Heek et al. 2024, Wang et al. 2024).
To 0, as in the original, would be right for one step alone. Sampling goes on by Euler steps without new noise, and
along straight lines to the end of its trajectory a state spreads too far: Gaussian data of unit variance come out of 16
such steps with 1.5 times their standard deviation, of segments that end where the steps do with their own.

The levels are the 50 of the distilled schedule, 1 = t_0 > t_1 > ... > t_50 = 0. From x at t = t_i a step of the teacher
leads to x' = x + (t - s) u(x, t) at s = t_{i+1}, and the segment ends at e <= s. The student's f(x, t) = x + (t - e)
v(x, t) is to be what the target network says of x', f'(x', s) = x' + (s - e) v'(x', s). Divided by t - e:

    v(x, t) = ((t - s) u(x, t) + (s - e) v'(x', s)) / (t - e)

the mean of the velocities of the way, each weighted with its length; for s = e it is the teacher's. As a velocity it
has the same size at every level, whereas f itself changes by little where the shifted levels lie close together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcv_core import schedule as schedules
from lcv_core.guidance import cfg_zero
from lcv_core.schedule import DISTILL_GRID

# (latents [B, C, T, h, w], t [B]) -> velocity of the same shape
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Levels:
    """By index of a level of the distilled grid: t, the next one, and the end of its segment, fp32 [50] each."""

    level: Tensor
    following: Tensor
    end: Tensor

    def index(self, u: Tensor) -> Tensor:
        """Numbers of levels, int64, for u uniform in [0, 1).

        Half of them are spread evenly. Half are shared out by the length of the segments, in which an error of velocity
        becomes one of the result: at shift 12 the last of 16 steps goes half the way, and has 4 of the 50 levels.
        """
        length = torch.zeros_like(self.level)
        for end in self.end.unique():
            inside = self.end == end
            length[inside] = (self.level[inside].max() - end) / inside.sum()
        share = 0.5 / len(length) + 0.5 * length
        return torch.searchsorted(share.cumsum(0), u, right=True).clamp(max=len(length) - 1)


def levels(num_steps: int, flow_shift: float) -> Levels:
    """The grid in segments that end where the steps of `schedule.distilled(num_steps)` do."""
    grid = schedules.distilled(DISTILL_GRID, flow_shift=flow_shift)
    steps = schedules.distilled(num_steps, flow_shift=flow_shift)
    end = torch.stack([steps[steps < t].max() for t in grid[:-1]])
    return Levels(grid[:-1], grid[1:], end)


def guided(cond: Tensor, uncond: Tensor, guidance_scale: float, num_cond_latents: int) -> Tensor:
    """The velocity that guidance makes of two; its scale is taken from the noise frames, as by the pipelines."""
    return cfg_zero(cond, uncond, guidance_scale, scale_from=slice(num_cond_latents, None))


@torch.no_grad()
def consistent_velocity(
    teacher: Velocity, target: Velocity, x: Tensor, index: Tensor, grid: Levels, num_cond_latents: int = 0
) -> Tensor:
    """The velocity that the student is to have at x [B, C, T, h, w] and level number `index` [B].

    target: the network that is asked at the neighbour: a running average of the student, or itself. Condition frames
    stay as they are on the way.
    """
    t, s, end = (values.to(x)[index] for values in (grid.level, grid.following, grid.end))
    first = teacher(x, t)
    step, rest = (length.view(-1, 1, 1, 1, 1) for length in (t - s, s - end))
    if not bool(rest.any()):
        return first
    moved = torch.cat([x[:, :, :num_cond_latents], (x + step * first)[:, :, num_cond_latents:]], dim=2)
    return (step * first + rest * target(moved, s)) / (step + rest)


def pseudo_huber(squares: Tensor, c: float) -> Tensor:
    """sqrt(m + c^2) - c of mean squares m >= 0 (Song and Dhariwal 2023): m / 2c below c^2, sqrt(m) far above."""
    return torch.sqrt(squares + c * c) - c
