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


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), _like(self.bias, input))


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), _like(self.bias, input))


class Conv3d(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), _like(self.bias, input))


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
