"""What is around a convolution of the VAE, in one pass each where kernels for it run: bias, residual, doubling of size.

PyTorch adds the bias of a convolution in a pass of its own, which on an H200 takes three times as long as it need.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.vae.choice import vae_kernels

_FEW_CHANNELS = 8  # what tensor cores take at least: fewer are convolved as if there were none
# Channels of Hopper's convolutions come in multiples of it; others run on Ampere's. Of 96 channels at 704x1280 in bf16
# an H200 needs 6.2 ms, of 128, a quarter of them zeros, 4.1 ms.
_MULTIPLE = 64


def padded_channels(channels: int) -> int:
    """What tensor cores are best given for so many channels in 16 bits, the others being zeros."""
    return max(_FEW_CHANNELS, channels + (-channels % _MULTIPLE if channels > _MULTIPLE else 0))


def wide_channels(conv: Any, x: Tensor) -> int:
    """How many channels conv should best be given of x [N, C, ..., H, W], zeros behind the C; C where it is to be C."""
    C = x.shape[1]
    if C <= _MULTIPLE or x.dtype not in (torch.float16, torch.bfloat16) or not _takes(conv, x):
        return C
    return padded_channels(C) if _has_such_kernels(x.device) else C


@lru_cache(maxsize=16)
def _has_such_kernels(device: torch.device) -> bool:
    """Hopper and newer; elsewhere more channels are only more work."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def convolve(conv: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """conv(x), plus a residual. x [N, C, ..., H, W], channels last or not; C may be `wide_channels`."""
    kernels = vae_kernels(x.device)
    if kernels is None or not _takes(conv, x):
        y = conv(x)
        return y if residual is None else y + residual
    y = _without_bias(conv, x)
    if not _is_last(y) or not _fits(residual, y):
        return _added(y, conv.bias, residual)
    return y if conv.bias is None and residual is None else kernels.add_bias_(y, conv.bias, residual)


def doubled(upsample: nn.Module, x: Tensor) -> Tensor:
    """x [N, C, H, W] at twice the height and width, each pixel four times."""
    kernels = vae_kernels(x.device)
    if kernels is None or _needs_gradient(x) or x.numel() == 0 or not _is_last(x):
        return upsample(x)
    return kernels.doubled(x)


def _takes(conv: Any, x: Tensor) -> bool:
    """A layer of ours with nothing hooked to it, without a gradient; a host's layer may do as it likes.

    It has to be the same for an input and for that input padded to `wide_channels`.
    """
    if type(conv) not in (layers.Conv2d, layers.Conv3d) or "forward" in vars(conv):
        return False
    if conv._forward_hooks or conv._forward_pre_hooks:
        return False
    if conv.padding_mode != "zeros" or conv.groups != 1 or conv.weight.device != x.device:
        return False
    plain = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0
    return plain and not _needs_gradient(x, conv.weight, conv.bias)


def _fits(residual: Tensor | None, y: Tensor) -> bool:
    """Whether the kernel can add it to y."""
    if residual is None:
        return True
    return residual.dtype == y.dtype and _is_last(residual) and not _needs_gradient(residual)


def _without_bias(conv: Any, x: Tensor) -> Tensor:
    weight = conv.weight.to(x.dtype)
    if x.shape[1] < _FEW_CHANNELS:  # zeros add nothing, and let tensor cores do the rest
        x = _padded(x, _FEW_CHANNELS - x.shape[1])
    if x.shape[1] > conv.in_channels:
        weight = _padded(weight, x.shape[1] - conv.in_channels)
    return conv.convolved(x, weight, None)


def _padded(x: Tensor, missing: int) -> Tensor:
    """Zero channels behind those of x [N, C, ...]; channels last."""
    wide = F.pad(x.movedim(1, -1), (0, missing))
    return wide.movedim(-1, 1)


def _added(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        y = y.add_(bias.to(y.dtype).view(-1, *(1,) * (y.ndim - 2)))
    return y if residual is None else y + residual


def _is_last(x: Tensor) -> bool:
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=layout)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
