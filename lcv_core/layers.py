"""The default `operations`: torch.nn layers with weights that compute in the dtype of their input.

The model's fp32 islands call a bf16 layer with an fp32 activation, so the weight has to follow the input, as the
official model does under autocast(float32). Hosts such as ComfyUI bring layer sets with the same behaviour; a plain
`torch.nn` is accepted wherever weights and activations share one dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _like(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


def upcast(x: Tensor) -> Tensor:
    """fp32 for half precision; fp32 and fp64 stay as they are, so that a model in fp64 is fp64 throughout."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# PyTorch tells from the strides how a tensor lies in memory, and flattening or parting a dimension of length one sets a
# stride that says "channels first" to it: every layer behind would copy. Hence two ways in the two functions below.


def frame_by_frame(x: Tensor) -> Tensor:
    """x [B, C, T, H, W] -> [B * T, C, H, W]; a view, and channels last, where they are last in x."""
    return x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def joined_frames(frames: Tensor, batch: int) -> Tensor:
    """The inverse of `frame_by_frame` for B = batch, a view."""
    return frames.unsqueeze(2) if len(frames) == batch else frames.unflatten(0, (batch, -1)).transpose(1, 2)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), _like(self.bias, input))


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self.convolved(input, self.weight.to(input.dtype), _like(self.bias, input))

    def convolved(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With a weight and a bias in input's dtype in place of its own."""
        return self._conv_forward(input, weight, bias)


class Conv3d(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self.convolved(input, self.weight.to(input.dtype), _like(self.bias, input))

    def convolved(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With a weight and a bias in input's dtype in place of its own."""
        if input.device.type == "cpu" and self.padding[0] == 0 and self.groups == 1 and not self._unusual():
            return self._by_time_taps(input, weight, bias)
        return self._conv_forward(input, weight, bias)

    def _unusual(self) -> bool:
        return self.padding_mode != "zeros" or isinstance(self.padding, str) or any(d != 1 for d in self.dilation)

    def _by_time_taps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same sum as a 2-D convolution per tap of the kernel in time, channels last: up to 10x faster on a CPU,
        where torch has only a reference 3-D convolution."""
        taps, stride = self.kernel_size[0], self.stride[0]
        frames = (x.shape[2] - taps) // stride + 1
        out: Tensor | None = None
        for tap in range(taps):
            seen = frame_by_frame(x[:, :, tap : tap + stride * (frames - 1) + 1 : stride])
            seen = seen.contiguous(memory_format=torch.channels_last)  # a view already, behind another convolution
            kernel = weight[:, :, tap].contiguous(memory_format=torch.channels_last)
            part = F.conv2d(seen, kernel, bias if tap == 0 else None, self.stride[1:], self.padding[1:])
            out = part if out is None else out.add_(part)
        assert out is not None
        return joined_frames(out, x.shape[0])


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _like(self.weight, input), _like(self.bias, input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Statistics in fp32, the weight multiply in the dtype of the input: the order of the official q/k norm."""

    def forward(self, x: Tensor) -> Tensor:
        h = upcast(x)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + (self.eps or 0.0))
        return h.to(x.dtype) * self.weight.to(x.dtype)
