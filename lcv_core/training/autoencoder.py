"""The VAE in training: streams that are differentiable, the loss, the weights it begins with, its latents' statistics.

A clip goes through in two pieces, frame 0 alone and the rest at once: every layer sees what it sees when the rest
comes in groups of four (`WanVAE.encode`, `decode`), for a causal layer keeps of a group all that the next one needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.config import VAEConfig
from lcv_core.training.strict import need
from lcv_core.vae.layers import Downsample, StreamState, Upsample
from lcv_core.vae.model import WanVAE, split_moments

LOGVAR = -9.0  # of an untrained posterior: a standard deviation of 0.01
BRIGHT = 3.0  # an untrained network's first latents are the colours times this, of about unit scale
SILU_GAIN = 1.67  # SiLU passes on 0.36 of the second moment of a unit normal
CONSTANT = 4.0  # what channel 3 of an untrained network holds everywhere, so that norms keep brightness


@dataclass(frozen=True)
class Objective:
    """Weights. l1, l2: of the absolute and the squared error of pixels in [-1, 1]. edges: of the absolute error of the
    differences of neighbours, across and down. kl: of the posterior's divergence from the unit normal, per latent.
    anchor: of the squared distance of the posterior's mean to that of the VAE which training began with, in standard
    deviations; not of "refined" material, whose textures are what is to be added."""

    l1: float = 1.0
    l2: float = 4.0
    edges: float = 0.5
    kl: float = 1e-4
    anchor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "edges", "kl", "anchor"):
            need(getattr(self, name) >= 0, f"objective.{name} must not be negative, got {getattr(self, name):g}")
        need(self.l1 + self.l2 > 0, "objective: l1 or l2 must be above 0")


class Conv3d(layers.Conv3d):
    """On a CPU with channels last, where torch takes oneDNN's 3-D convolution: a third faster, forward and backward,
    than by time taps."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return super().forward(input)
        weight = self.weight.to(input.dtype).contiguous(memory_format=torch.channels_last_3d)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        x = input.contiguous(memory_format=torch.channels_last_3d)
        return F.conv3d(x, weight, bias, self.stride, self.padding)


class Layers:
    """The VAE's `operations` in training."""

    Conv2d = layers.Conv2d
    Conv3d = Conv3d


class Autoencoder(nn.Module):
    """A VAE with the streams that inference takes, but differentiable."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae = WanVAE(config, operations=Layers)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pixels [B, 3, F, H, W] in [-1, 1], noise [B, z_dim, T, H/8, W/8] -> (decoded [B, 3, F, H, W], unclamped;
        posterior mean and logvar [B, z_dim, T, H/8, W/8]), fp32."""
        mean, logvar = self.encode(pixels)
        latent = mean + torch.exp(0.5 * logvar) * noise
        decoded = self.decode(latent.to(pixels.dtype))
        if pixels.shape[2] == 1:
            # Layers that join frames have no part in a picture. Several processes need a gradient of theirs even so.
            idle = (m.time_conv for m in self.modules() if isinstance(m, Downsample | Upsample))
            decoded = decoded + 0.0 * sum(p.sum() for m in idle if m is not None for p in m.parameters())
        return decoded, mean, logvar

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, logvar) as `WanVAE.encode` gives them."""
        state: StreamState = {}
        moments = [self.vae.quant_conv(self.vae.encoder(part, state)) for part in _pieces(pixels)]
        return split_moments(layers.upcast(torch.cat(moments, dim=2)))

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels as `WanVAE.decode` gives them, but for the clamp."""
        state: StreamState = {}
        parts = [self.vae.decoder(self.vae.post_quant_conv(part), state) for part in _pieces(latent)]
        return layers.upcast(torch.cat(parts, dim=2))


def _pieces(clip: Tensor) -> list[Tensor]:
    """Frame 0, and the others if there are any, of [B, C, F, H, W]."""
    return [clip[:, :, :1], clip[:, :, 1:]] if clip.shape[2] > 1 else [clip]


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) = (mean^2 + var - 1 - logvar) / 2 in nats, mean over the latents."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def autoencoding_loss(
    decoded: Tensor, pixels: Tensor, mean: Tensor, logvar: Tensor, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of `objective`, and its terms by name. All [B, C, F, H, W]."""
    error = decoded - pixels
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    terms = {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "edges": across.abs().mean() + down.abs().mean(),
        "kl": kl_divergence(mean, logvar),
    }
    loss = sum((getattr(objective, name) * term for name, term in terms.items()), error.new_zeros(()))
    return loss, {name: term.detach() for name, term in terms.items()}


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise in dB of pixels in [-1, 1]."""
    return 10.0 * math.log10(4.0 / max(float((a - b).square().mean()), 1e-12))


@torch.no_grad()
def latent_statistics(vae: WanVAE, clips: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) fp64 [z_dim] of the posterior means of clips uint8 [F, H, W, 3], each latent frame
    counted alike."""
    total = square = torch.zeros(vae.config.z_dim, dtype=torch.float64)
    count = 0
    for frames in clips:
        mean, _ = vae.encode(to_pixels(frames.unsqueeze(0)))
        latents = mean[0].flatten(1).double()  # [z_dim, T*h*w]
        area = mean.shape[3] * mean.shape[4]
        total = total + latents.sum(dim=1) / area
        square = square + latents.square().sum(dim=1) / area
        count += mean.shape[2]
    average = total / count
    return average, (square / count - average.square()).clamp_min(1e-12).sqrt()


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] -> fp32 [B, 3, F, H, W] in [-1, 1], channels last in memory."""
    return (frames.float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3)


def to_frames(pixels: Tensor) -> Tensor:
    """The inverse of `to_pixels`."""
    return ((pixels.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


# The start


@torch.no_grad()
def initialise(vae: WanVAE, draws: torch.Generator) -> None:
    """Weights of an untrained VAE, in place.

    Colour goes down and up again in channels 0 to 2 of every level and CONSTANT in channel 3, by averages of 2x2 pixels
    and bilinear kernels; the other channels hold random mixtures. Kernels see the present frame alone, so that the
    clip's first frame, which has none before it, is no exception. Residual branches end in zeros.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _random_layer(name, module, draws)
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25  # of the pixels that a downsampled one stands for
    linear = torch.tensor([0.25, 0.5, 0.25])
    bilinear = torch.outer(linear, linear)  # after each pixel was repeated
    one, here = torch.ones(1, 1, 1), torch.zeros(3, 3, 3)
    here[2, 1, 1] = 1.0
    for half, kernel in ((vae.encoder, average), (vae.decoder, bilinear)):
        resamples = []
        for name, module in half.named_modules():
            if name == "conv_in":
                _carry(module, here, range(3))
                module.get_parameter("weight")[3] = 0.0
                module.get_parameter("bias")[3] = CONSTANT
            elif name.endswith("conv_shortcut"):
                _carry(module, one, range(4))
            elif name.endswith("resample.1"):
                _carry(module, kernel, range(4))
                resamples.append(module)
        # In the end SiLU(u) - SiLU(-u) = u reads the colours exactly: the last change of size makes their negatives.
        for channel in range(3):
            resamples[-1].weight[4 + channel] = -resamples[-1].weight[channel]
        _read_out(half.conv_out, here)
    _identity(vae.quant_conv)
    _identity(vae.post_quant_conv)
    z_dim = vae.config.z_dim
    vae.encoder.conv_out.get_parameter("weight")[3:z_dim] *= 2.0  # norms leave little of the mixtures beside CONSTANT
    weight, bias = vae.quant_conv.get_parameter("weight"), vae.quant_conv.get_parameter("bias")
    weight[:z_dim] *= BRIGHT
    weight[z_dim:] *= 0.1
    bias[z_dim:] = LOGVAR
    vae.post_quant_conv.get_parameter("weight").div_(BRIGHT)


def _random_layer(name: str, layer: nn.Conv2d | nn.Conv3d, draws: torch.Generator) -> None:
    """Unit gain of the present frame; what ends a residual branch, zero; frames doubled or averaged in time."""
    weight = layer.weight
    weight.zero_()
    assert layer.bias is not None
    layer.bias.zero_()
    leaf = name.rpartition(".")[2]
    if leaf == "time_conv":
        same = torch.eye(weight.shape[1])
        if weight.shape[0] == weight.shape[1]:
            weight[:, :, 1:, 0, 0] = 0.5 * same.unsqueeze(2)  # of [last, even, odd]
        else:
            weight[:, :, 2, 0, 0] = torch.cat([same, same])  # of [.., .., now], for the even and the odd frames
    elif leaf not in ("conv2", "proj"):
        seen = weight[:, :, -1] if weight.ndim == 5 else weight
        gain = SILU_GAIN if leaf == "conv1" else 1.0
        std = gain / math.sqrt(seen[0].numel())
        seen.copy_(torch.randn(seen.shape, generator=draws) * std)


def _carry(layer: nn.Module, kernel: Tensor, channels: Sequence[int]) -> None:
    """Make a convolution pass these channels through `kernel`, unmixed; the others see them too."""
    weight = layer.get_parameter("weight")
    for channel in channels:
        weight[channel] = 0.0
        weight[channel, channel] = kernel


def _read_out(conv_out: nn.Module, here: Tensor) -> None:
    """Outputs 0 to 2 of a half's last layer are the colours that its norm and SiLU are given."""
    weight = conv_out.get_parameter("weight")
    dim = weight.shape[1]
    scale = math.sqrt((dim + CONSTANT**2) / dim)  # the norm divides by about this
    for channel in range(3):
        weight[channel] = 0.0
        weight[channel, channel] = scale * here
        weight[channel, 4 + channel] = -scale * here


def _identity(conv: nn.Module) -> None:
    """A 1x1x1 convolution that changes nothing."""
    weight = conv.get_parameter("weight")
    weight.copy_(torch.eye(len(weight)).view_as(weight))
