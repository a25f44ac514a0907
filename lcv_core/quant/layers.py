"""Layers that may hold a quantised weight: an `operations` namespace as `LongCatDiT` takes it.

All are those of `lcv_core.layers` until `Linear.hold` is called; which layers it is called on is decided where weights
are loaded (`lcv_core.weights.quantised`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.errors import InputError
from lcv_core.layers import Conv2d, Conv3d, LayerNorm, RMSNorm
from lcv_core.quant.formats import Quantised, in_dtype, merge
from lcv_core.quant.matmul import fp8_matmul, int8_matmul, shape_refusal, weight_only_matmul

__all__ = ["Conv2d", "Conv3d", "LayerNorm", "Linear", "Matmul", "RMSNorm"]

Matmul = Literal["weight-only", "int8", "fp8"]


class Rows(nn.Module):
    """Some rows of a weight as buffers `data` and `scale`: they move with the model, and no cast changes them."""

    def __init__(self, q: Quantised) -> None:
        super().__init__()
        self.kind, self.columns = q.kind, q.columns
        self.register_buffer("data", q.data)
        self.register_buffer("scale", q.scale)

    @property
    def quantised(self) -> Quantised:
        data, scale = self._buffers["data"], self._buffers["scale"]
        assert data is not None
        return Quantised(self.kind, self.columns, data, scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rows:
        for name, old in self._buffers.items():
            if old is not None:
                new = fn(old)
                self._buffers[name] = new if new.dtype == old.dtype else old.to(new.device)
        return self


class Linear(layers.Linear):
    """y = x W^T + b in the dtype of x. With a quantised weight, `weight` is None and `pieces` has its rows.

    matmul: "weight-only" makes pieces of the weight in x's dtype (by way of fp32) and never the whole of it; "int8" and
    "fp8" quantise x token by token and multiply eight bits with eight bits. Gradients reach x, not the weight, and are
    those of "weight-only".
    """

    pieces: nn.ModuleList | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.register_module("pieces", None)
        self.matmul: Matmul = "weight-only"

    def hold(self, weight: Sequence[Quantised], matmul: Matmul = "weight-only") -> None:
        """Take a quantised weight, its rows in order, in place of `weight`. InputError where it does not fit, or cannot
        be multiplied that way."""
        weight = merge(weight)
        shape = sum(q.rows for q in weight), *{q.columns for q in weight}
        expected = self.out_features, self.in_features
        if shape != expected:
            raise InputError(f"the weight is {list(shape)}, expected {list(expected)}")
        refused = [why for q in weight if matmul != "weight-only" and (why := shape_refusal(q, matmul))]
        if refused:
            raise InputError(f'the weight cannot be multiplied as "{matmul}": {refused[0]}; use "weight-only"')
        self.register_parameter("weight", None)
        self.pieces, self.matmul = nn.ModuleList(Rows(q) for q in weight), matmul

    def extra_repr(self) -> str:
        kinds = "" if self.pieces is None else f", {'+'.join(q.kind for q in self.held)}, {self.matmul}"
        return super().extra_repr() + kinds

    @property
    def held(self) -> list[Quantised]:
        """The quantised weight in pieces of rows; empty for a plain one."""
        return [] if self.pieces is None else [rows.quantised for rows in self.pieces if isinstance(rows, Rows)]

    def forward(self, input: Tensor) -> Tensor:
        if self.pieces is None:
            return super().forward(input)
        if input.requires_grad and torch.is_grad_enabled():
            return _Multiply.apply(input, self.bias, self)  # type: ignore[return-value]
        return self._multiply(input, self.bias)

    def _multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        x = input.reshape(-1, self.in_features)
        if self.matmul == "weight-only":
            out = weight_only_matmul(x, self.held)
            if bias is not None:
                out += bias.to(out.dtype)
        else:
            multiply, held = int8_matmul if self.matmul == "int8" else fp8_matmul, self.held
            biases = [None] * len(held) if bias is None else bias.split([q.rows for q in held])
            parts = [multiply(x, q, own) for q, own in zip(held, biases, strict=True)]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out.view(*input.shape[:-1], self.out_features)


class _Multiply(torch.autograd.Function):
    """Keeps the quantised weight for the backward pass, not what it was multiplied as."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: Linear) -> Tensor:
        ctx.layer = layer
        return layer._multiply(input, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        layer: Linear = ctx.layer
        grad = grads[0].reshape(-1, layer.out_features)
        out = grad.new_zeros(grad.shape[0], layer.in_features)
        for a, b, rows in in_dtype(layer.held, grad.dtype):
            out.addmm_(grad[:, a:b], rows)
        bias = grad.sum(dim=0).to(layer.bias.dtype) if layer.bias is not None and ctx.needs_input_grad[1] else None
        return out.view(*grads[0].shape[:-1], layer.in_features), bias, None
