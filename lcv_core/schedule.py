"""Noise schedules: sigmas in (0, 1], shifted, descending, ending in 0; and the Euler step.

The formulas are those of the released scheduler configuration (flow matching Euler, shift 12, no dynamic shifting):
sigma = shift * s / (1 + (shift - 1) * s), timestep = 1000 * sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcv_core.errors import InputError

FLOW_SHIFT = 12.0
NUM_TRAIN_TIMESTEPS = 1000.0
TAIL_START = 0.5
TAIL_STEPS = 10
DISTILL_GRID = 50


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise InputError(f"num_steps must be at least 1, got {num_steps}")


def shift_sigmas(s: Tensor, flow_shift: float = FLOW_SHIFT) -> Tensor:
    """flow_shift * s / (1 + (flow_shift - 1) * s) in fp32; values above 1 move the steps towards high noise."""
    if flow_shift <= 0:
        raise InputError(f"flow_shift must be positive, got {flow_shift}; the released model uses {FLOW_SHIFT:g}")
    return (flow_shift * s / (1 + (flow_shift - 1) * s)).clamp(max=1.0)  # rounding may give 1.0000001 for s = 1


def _end_in_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def base(num_steps: int = 50, *, flow_shift: float = FLOW_SHIFT) -> Tensor:
    """The base model's schedule: num_steps + 1 sigmas, fp32."""
    _check_steps(num_steps)
    return _end_in_zero(shift_sigmas(torch.linspace(1.0, 0.001, num_steps, dtype=torch.float32), flow_shift))


def distilled(num_steps: int = 16, *, flow_shift: float = FLOW_SHIFT) -> Tensor:
    """The distilled model's schedule: every (50 / num_steps)-th of 50 equal levels; trained for 16 steps."""
    _check_steps(num_steps)
    if num_steps > DISTILL_GRID:
        raise InputError(
            f"the distilled schedule has at most {DISTILL_GRID} steps, got {num_steps}; 16 is what it was trained for"
        )
    grid = torch.linspace(1.0, 1.0 / DISTILL_GRID, DISTILL_GRID, dtype=torch.float32)
    index = torch.arange(num_steps) * DISTILL_GRID // num_steps
    return _end_in_zero(shift_sigmas(grid[index], flow_shift))


def with_tail(sigmas: Tensor, *, start: float = TAIL_START, num_steps: int = TAIL_STEPS) -> Tensor:
    """Continuation's uniform tail: what lies above `start`, then num_steps equal steps from there to 0.

    For base(50) that makes 56 steps; the official code calls it enhance_hf.
    """
    _check_steps(num_steps)
    if not 0.0 < start <= 1.0:
        raise InputError(f"the tail must start in (0, 1], got {start}")
    tail = torch.linspace(start, 0.0, num_steps + 1, dtype=torch.float32).to(sigmas)
    return torch.cat([sigmas[sigmas > start], tail])


def refine(num_steps: int = 50, t_thresh: float = 0.5, *, flow_shift: float = FLOW_SHIFT) -> Tensor:
    """The refinement expert's schedule: t_thresh, then what base(num_steps) has below it (50 steps: 5 remain).

    `refine_exact` asks for a number of refine steps directly.
    """
    if not 0.0 < t_thresh <= 1.0:
        raise InputError(f"t_thresh must be in (0, 1], got {t_thresh}; the released refiner uses 0.5")
    sigmas = base(num_steps, flow_shift=flow_shift)
    return torch.cat([sigmas.new_tensor([t_thresh]), sigmas[sigmas < t_thresh]])


def refine_exact(refine_steps: int, t_thresh: float = 0.5, *, flow_shift: float = FLOW_SHIFT) -> Tensor:
    """The refine schedule with exactly `refine_steps` steps, from the shortest base schedule that has as many."""
    _check_steps(refine_steps)
    for num_steps in range(1, 2000):
        sigmas = refine(num_steps, t_thresh, flow_shift=flow_shift)
        if len(sigmas) - 1 == refine_steps:
            return sigmas
    raise InputError(f"no refine schedule has {refine_steps} steps at t_thresh {t_thresh}; ask for fewer")


def euler_step(latents: Tensor, model_output: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """x + (sigma_next - sigma) * m, where m = noise - x0 is the *negated* velocity of the network."""
    return latents + (sigma_next - sigma) * model_output
