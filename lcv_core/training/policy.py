"""Sampling as a policy: flow matching with one random step, whose probability is known, and advantages of its rewards.

The network's velocity is x0 - noise, and time runs from sigma 1 down to 0, so that the flow is dx = v d(1 - sigma).
With x = (1 - sigma) x0 + sigma noise the score of the marginal is -(x - (1 - sigma) v) / sigma, and for any diffusion
coefficient g the reverse-time equation

    dx = [v - g^2 / (2 sigma) (x - (1 - sigma) v)] d(1 - sigma) + g dW

has the marginals of the flow (Song et al. 2021; Liu et al. 2025, "Flow-GRPO", write it for noise - x0 and negative time
steps). LongCat-Video takes g = a sqrt(sigma / (1 - sigma)) with a = 1, which is without bound at sigma = 1, and
truncates the noise that a step of length d adds: its standard deviation, here `spread` = g sqrt(d), is at most 0.45,
and the drift has the same truncated g.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from lcv_core.training.losses import gaussian_divergence, gaussian_log_prob, per_sample, policy_loss

LEVEL = 1.0
LARGEST_SPREAD = 0.45
_LEAST_STD = 1e-6  # of the rewards of a group; below it all its samples are as good

Predict = Callable[[Tensor, float, Tensor], Tensor]
"""(latents [N, ...], sigma, which prompt each is of [N]) -> velocities [N, ...] in fp32."""


def step_spread(sigma: Tensor, sigma_next: Tensor, *, level: float = LEVEL, largest: float = LARGEST_SPREAD) -> Tensor:
    """Standard deviation of the noise in a step from `sigma` to `sigma_next`, of their shape."""
    return (level * torch.sqrt(sigma * (sigma - sigma_next) / (1 - sigma).clamp(min=1e-12))).clamp(max=largest)


def step_mean(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, spread: Tensor) -> Tensor:
    """Mean of the random step from x [N, ...]; the sigmas and the spread are [N]. Spread 0 is the Euler step."""
    sigma, sigma_next, spread = (per_sample(value, x) for value in (sigma, sigma_next, spread))
    noise = x - (1 - sigma) * velocity  # what the network takes for the noise in x, times sigma
    return x + (sigma - sigma_next) * velocity - spread.square() / (2 * sigma) * noise


def step_weight(sigma: Tensor, sigma_next: Tensor, spread: Tensor) -> Tensor:
    """The policy's weight of a step; the divergence has its square.

    A step's mean moves by d + spread^2 (1 - sigma) / (2 sigma) per unit of velocity, so the gradient of its log
    probability is that over the spread, times the noise that was drawn, and early and late steps would count
    differently. The weight makes the factor 3/2 in all of them. Where the noise is not truncated it is the report's
    sqrt(sigma / (d (1 - sigma))), which at sigma = 1 is infinite.
    """
    moved = sigma - sigma_next + spread.square() * (1 - sigma) / (2 * sigma)
    return 1.5 * spread / moved


@dataclass(frozen=True)
class Rollout:
    """What came of P prompts with G samples each.

    before: latents at the critical step [P, ...], the same for all samples of a prompt. after: the samples' latents
    after it [P, G, ...]. latents: clean [P, G, ...]. sigma, sigma_next, spread: of the critical step, fp32 [P].
    """

    before: Tensor
    after: Tensor
    latents: Tensor
    sigma: Tensor
    sigma_next: Tensor
    spread: Tensor


@torch.no_grad()
def rollout(
    predict: Predict, noise: Tensor, step_noise: Tensor, critical: Tensor, sigmas: Tensor, *, level: float = LEVEL,
    largest: float = LARGEST_SPREAD,
) -> Rollout:  # fmt: skip
    """Sample each prompt's group: Euler steps, but for one random step per prompt.

    noise: start noise [P, ...] that a group shares. step_noise: [P, G, ...] of the random step. critical: which step
    that is, int64 [P]. sigmas: descending, ending in 0. Up to its critical step a group is one sample and is computed
    once; every step is one call of `predict`, whatever the critical steps are.
    """
    P, G = step_noise.shape[:2]
    sigmas = sigmas.to(noise)
    critical = critical.to(noise.device)
    sigma, sigma_next = sigmas[critical], sigmas[critical + 1]
    spread = step_spread(sigma, sigma_next, level=level, largest=largest)
    x = noise.unsqueeze(1).expand_as(step_noise).clone()  # [P, G, ...]
    before, after = torch.empty_like(noise), torch.empty_like(step_noise)
    levels = sigmas.tolist()
    for step in range(len(levels) - 1):
        together = critical >= step  # [P]; the others have come apart
        rows = (~together.unsqueeze(1)).expand(P, G).clone()
        rows[:, 0] = True
        prompt, sample = rows.nonzero(as_tuple=True)
        now = x[prompt, sample]
        velocity = predict(now, levels[step], prompt)
        moved = now + (levels[step] - levels[step + 1]) * velocity
        of_one = together[prompt]
        x[prompt[~of_one], sample[~of_one]] = moved[~of_one]
        x[prompt[of_one]] = moved[of_one].unsqueeze(1).expand(-1, G, *noise.shape[1:])
        for p in (critical == step).nonzero().flatten().tolist():
            row = int(((prompt == p) & (sample == 0)).nonzero())
            before[p] = now[row]
            mean = step_mean(
                now[row : row + 1], velocity[row : row + 1], sigma[p : p + 1], sigma_next[p : p + 1], spread[p : p + 1]
            )
            after[p] = x[p] = mean + spread[p] * step_noise[p]
    return Rollout(before, after, x, sigma, sigma_next, spread)


def advantages(rewards: Tensor, device: torch.device | None = None) -> Tensor:
    """Rewards [P, G] -> (reward - the group's mean) / the largest standard deviation of any group, fp32 [P, G].

    The largest, so that a group whose samples are all about as good counts for little (the report's "max group std").
    It is taken over the groups of all processes, which exchange it on `device`.
    """
    rewards = rewards.double()
    largest = rewards.std(dim=1, correction=0).max()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        largest = largest.to(device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        largest = largest.to(rewards.device)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return (centred / largest if float(largest) > _LEAST_STD else torch.zeros_like(centred)).float()


def grpo_loss(
    velocity: Tensor, reference: Tensor, found: Rollout, advantage: Tensor, *, policy_weight: float, kl_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss of P prompts with G samples each, and its parts.

    velocity, reference: of the trained and of the frozen network at `found.before`, fp32 [P, ...]. advantage: [P, G].
    With `step_weight` the gradients are -(3/2) advantage * noise and (9/4) (velocity - reference) per number of a
    sample, times the weights and the gradient of the velocity (LongCat-Video report, section on GRPO).
    """
    G = advantage.shape[1]
    sigma, sigma_next, spread = found.sigma, found.sigma_next, found.spread
    mean = step_mean(found.before, velocity, sigma, sigma_next, spread)
    other = step_mean(found.before, reference, sigma, sigma_next, spread)
    weight = step_weight(sigma, sigma_next, spread)
    after = found.after.flatten(0, 1)
    log_prob = gaussian_log_prob(after, mean.repeat_interleave(G, dim=0), spread.repeat_interleave(G))
    policy = policy_loss(log_prob, log_prob.detach(), advantage.flatten(), weight.repeat_interleave(G))
    divergence = gaussian_divergence(mean, other, spread)
    kl = (weight.square() * divergence).mean()
    values = {"kl": float(divergence.detach().mean()), "kl_weighted": float(kl.detach())}
    return policy_weight * policy + kl_weight * kl, values
