"""The objectives as pure functions; t = 0 is clean and t = 1 is noise, as in `lcv_core.schedule`.

The technical report (arXiv 2510.22200) gives the objective, "logit-normal-like" loss weights and a timestep shift that
grows with the number of noise tokens, but neither of the two formulas; those here are derived in the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.layers import upcast
from lcv_core.schedule import FLOW_SHIFT

OFFICIAL_TOKENS = 24 * 30 * 52  # of a clip of 93 frames at 480x832, which the released model runs with FLOW_SHIFT
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def per_frame(t: Tensor, latents: Tensor) -> Tensor:
    """t [B], or [B, T] per latent frame -> [B, 1, 1 or T, 1, 1], to go with latents [B, C, T, h, w]."""
    if t.shape not in ((latents.shape[0],), (latents.shape[0], latents.shape[2])):
        raise InputError(f"t must be [B] or [B, T] for latents {list(latents.shape)}, got {list(t.shape)}")
    return t.reshape(t.shape[0], 1, -1, 1, 1).to(latents.dtype)


def flow_pair(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, v) of flow matching: x_t = (1 - t) x0 + t noise, v = x0 - noise (the report's section 3; LongCat's sign).

    x0, noise: [B, C, T, h, w]. t: [B], or [B, T] per latent frame, in [0, 1].
    """
    t = per_frame(t, x0)
    return (1 - t) * x0 + t * noise, x0 - noise


def noisy_condition(x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Condition frames with a little noise each, (1 - level) x0 + level noise; the network is told t = 0 all the same.

    The report's remedy against colour drift in continuations, "independent per-frame noise" after diffusion forcing
    (Chen et al. 2024). level: [B, n_c].
    """
    return flow_pair(x0, noise, level)[0]


def velocity_errors(velocity: Tensor, target: Tensor, num_cond_latents: int = 0) -> Tensor:
    """Mean squared error of each sample over its noise frames alone, fp32 [B]; the first `num_cond_latents` frames of
    [B, C, T, h, w] are condition and count for nothing."""
    error = upcast(velocity)[:, :, num_cond_latents:] - upcast(target)[:, :, num_cond_latents:]
    return error.square().flatten(1).mean(dim=1)


def logit_normal_density(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Density on (0, 1) of sigmoid(z), z ~ N(mean, std^2); 0 at the ends."""
    inner = u.clamp(1e-12, 1 - 1e-12) if u.dtype == torch.float64 else u.clamp(1e-6, 1 - 1e-6)
    z = (torch.logit(inner) - mean) / std
    return torch.exp(-0.5 * z.square()) / (std * math.sqrt(2 * math.pi) * inner * (1 - inner))


def timestep_weight(u: Tensor, *, mean: float = 0.0, std: float = 1.0, floor: float = 0.1) -> Tensor:
    """Loss weight of a uniformly drawn u in (0, 1), before the timestep shift; its mean over u is 1.

    Esser et al. 2024 draw u from a logit-normal distribution. The report draws it uniformly and weights "logit-normal
    like": with the density p as the weight the expected gradient is the same, E_uniform[p(u) g(u)] =
    E_logit-normal[g(u)], and as p integrates to 1 so does the weight. p vanishes at the ends, where every sampler
    begins, so a part `floor` of the weight is spread evenly: floor + (1 - floor) p(u).
    """
    return floor + (1 - floor) * logit_normal_density(u, mean, std)


def spread_uniform(offset: float, indices: Sequence[int]) -> Tensor:
    """Uniform in [0, 1), fp32: frac(offset + index * golden ratio).

    With an offset drawn uniformly each value is uniform; together they cover the interval evenly in any run of
    consecutive indices (the additive recurrence of the golden ratio), which takes much of the noise of the timesteps
    out of a step's loss and gradient.
    """
    values = (offset + torch.tensor(list(indices), dtype=torch.float64) * GOLDEN_RATIO) % 1.0
    return values.float().clamp(max=1 - 2**-24)


def shift_for(noise_tokens: int) -> float:
    """The timestep shift for so many noise tokens: 12 sqrt(tokens / 37440), in [1, 12].

    Noise hides an image of n times the tokens less well; Esser et al. 2024 (section 5.3.2) undo that with a shift
    proportional to sqrt(n). The report shifts more for higher resolution and length without a formula. This one passes
    through the released model's 12 at 93 frames of 480x832 (37,440 tokens), stays there beyond it, as its inference
    does at 720p, and does not fall below 1, where nothing is shifted.
    """
    return min(max(FLOW_SHIFT * math.sqrt(noise_tokens / OFFICIAL_TOKENS), 1.0), FLOW_SHIFT)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per latent value, fp32 [B] (Kingma and Welling 2013, appendix B)."""
    mean, logvar = upcast(mean), upcast(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(dim=1)


def gaussian_log_prob(value: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Log density of `value` [N, ...] under independent normals of these means and one spread per sample [N], as the
    mean over a sample's numbers: [N]. In the dtype of its arguments."""
    spread = per_sample(spread, value)
    log = -((value - mean) / spread).square() / 2 - spread.log() - 0.5 * math.log(2 * math.pi)
    return log.flatten(1).mean(dim=1)


def gaussian_divergence(mean: Tensor, other: Tensor, spread: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two such normals of the same spread, as the mean over a sample's numbers: [N]."""
    return ((mean - other) / per_sample(spread, mean)).square().flatten(1).mean(dim=1) / 2


def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """-mean(weight * advantage * exp(log_prob - old_log_prob)), each [N].

    old_log_prob: what the samples had under the policy that drew them. One update per rollout makes it the same number,
    and the loss's value says nothing; its gradient is that of the expected reward. Nothing has to be clipped then.
    """
    return -(weight * advantage * torch.exp(log_prob - old_log_prob)).mean()


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] for x [N, ...], in its dtype."""
    return value.to(x).view(-1, *[1] * (x.ndim - 1))
