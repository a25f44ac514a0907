"""Adapters (LoRA) on a model: added at run time by hooks, or merged into the weights; either way taken off exactly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core.errors import InputError
from lcv_core.weights.assemble import some
from lcv_core.weights.lora_read import Delta, LoraReport, linear_layers, prepare, read_lora
from lcv_core.weights.tensors import StateDict, TensorSource, TensorStore

log = logging.getLogger("lcv_core")

Mode = Literal["runtime", "merged"]


class LoraHandle:
    """An adapter on a model. Several stack, and each is removed for itself, in any order. Also a context manager."""

    def __init__(self, report: LoraReport, mode: Mode, strength: float) -> None:
        self.report = report
        self.mode: Mode = mode
        self.strength = strength
        self._hooks: list[Any] = []
        self._merged: list[nn.Module] = []

    @property
    def active(self) -> bool:
        return bool(self._hooks or self._merged)

    def set_strength(self, strength: float) -> None:
        """Change the strength in place; 0 is the base model. Merged weights are worked out anew from the originals."""
        if not self.active:
            raise InputError(f"{self.report.name} was removed; load it again")
        self.strength = float(strength)
        for layer in self._merged:
            _apply(layer)

    def remove(self) -> None:
        """Take the adapter off: with no other on a layer, that layer is bit for bit as before. Twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._merged:
            _unmerge(layer, self)
        self._hooks, self._merged = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory, as stored: `load_lora` puts it on any model of the shapes it was read for, any number of
    times. Whoever it is on shares these tensors."""

    deltas: Mapping[str, list[Delta]]
    report: LoraReport


def read_adapter(dit: nn.Module, store: TensorStore, name: str) -> Adapter:
    """Read an adapter for a model and log the targets that it has no place for. Raises as `load_lora`."""
    deltas, report = read_lora(dit, store, name)
    if report.unmatched:
        log.warning("%s: %d targets are not in the model: %s", name, len(report.unmatched), some(report.unmatched))
    return Adapter(deltas, report)


def load_lora(
    dit: nn.Module,
    adapter: str | Path | Mapping[str, Tensor] | Adapter,
    strength: float = 1.0,
    *,
    mode: Mode = "runtime",
) -> LoraHandle:
    """Put an adapter on the model: y = base(x) + strength * scale * (x down^T) up^T for each of its target layers.

    adapter: a safetensors file (or folder with one) or its tensors, in any dialect of `lora_keys`, or what
        `read_adapter` gave. Ranks may differ between targets. scale is alpha_scale as stored (official files), else
        alpha / rank, else 1.
    mode: "runtime" hooks the layers and leaves weights and names alone; the branch runs in the dtype and on the device
        of the layer's input, so it follows the model when it moves and is fp32 inside the fp32 islands. "merged"
        changes the weights (computed in fp32) and keeps the originals of the touched layers in CPU memory.
    Raises InputError when no target is in the model, a shape differs, or the adapter is of the Avatar model or of a
    kind other than LoRA. Targets that have no place are listed in `report.unmatched` and logged.
    """
    if mode not in ("runtime", "merged"):
        raise InputError(f'mode must be "runtime" or "merged", got {mode!r}')
    if isinstance(adapter, Mapping):
        tensors = {key: tensor.detach() for key, tensor in adapter.items()}
        adapter = read_adapter(dit, StateDict(tensors), "the adapter")
    elif not isinstance(adapter, Adapter):
        adapter = read_adapter(dit, TensorSource.open(adapter), Path(adapter).name)
    layers = linear_layers(dit)
    if mode == "merged":
        _check_mergeable({target: layers[target] for target in adapter.deltas})
    handle = LoraHandle(adapter.report, mode, float(strength))
    for target, parts in adapter.deltas.items():
        layer = layers[target]
        if mode == "runtime":
            handle._hooks.append(layer.register_forward_hook(_Branch(handle, parts)))
        else:
            _merge(layer, handle, parts)
            handle._merged.append(layer)
    return handle


class _Branch:
    """The forward hook of one layer."""

    def __init__(self, handle: LoraHandle, deltas: list[Delta]) -> None:
        self.handle = handle
        self.deltas = sorted(deltas, key=lambda delta: delta.row)
        self._ready: tuple[torch.device, torch.dtype, list[Delta], Tensor | None] | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        strength = self.handle.strength
        if strength == 0.0:
            return output
        x = args[0]
        deltas, down = self._prepared(x.device, x.dtype)
        ranks = [0 if delta.down is None else delta.down.shape[0] for delta in deltas]
        z = None if down is None else F.linear(x, down).split([rank for rank in ranks if rank], dim=-1)
        low_rank = iter(z or ())
        pieces = [_rows(delta, x, next(low_rank) if rank else x) for delta, rank in zip(deltas, ranks, strict=True)]
        return torch.add(output, _spread(pieces, deltas, output), alpha=strength)

    def _prepared(self, device: torch.device, dtype: torch.dtype) -> tuple[list[Delta], Tensor | None]:
        """The deltas for this device and dtype, and all their down matrices as one: one GEMM instead of n."""
        if self._ready is None or self._ready[0] != device or self._ready[1] != dtype:
            # Tensors made in inference mode could not be used in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                deltas = [prepare(delta, device, dtype) for delta in self.deltas]
                downs = [delta.down for delta in deltas if delta.down is not None]
                down = torch.cat(downs) if len(downs) > 1 else downs[0] if downs else None
            self._ready = (device, dtype, deltas, down)
        return self._ready[2], self._ready[3]


def _rows(delta: Delta, x: Tensor, z: Tensor) -> Tensor:
    """What the delta adds to its rows of the output: [..., rows]."""
    if delta.up is None:
        assert delta.bias is not None
        return delta.bias.expand(*x.shape[:-1], -1)
    return F.linear(z, delta.up, delta.bias)


def _spread(pieces: list[Tensor], deltas: list[Delta], output: Tensor) -> Tensor:
    """Pieces at their rows of the full width; side by side they are simply concatenated."""
    width, stop = output.shape[-1], 0
    for delta in deltas:
        stop = delta.row + delta.rows if delta.row == stop else -1
    if stop == width:
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)).to(output.dtype)
    total = torch.zeros_like(output)
    for piece, delta in zip(pieces, deltas, strict=True):
        total[..., delta.row : delta.row + delta.rows] += piece
    return total


@dataclass
class _Original:
    """A merged layer's own weights (CPU) and what is merged into it, in the order of loading."""

    weight: Tensor
    bias: Tensor | None
    merged: list[tuple[LoraHandle, list[Delta]]] = field(default_factory=list)


_ORIGINALS: WeakKeyDictionary[nn.Module, _Original] = WeakKeyDictionary()


def _check_mergeable(layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype.itemsize < 2 or weight.is_meta:
            kind = "quantised or not loaded" if weight is None else f"stored as {weight.dtype} on {weight.device}"
            raise InputError(f'cannot merge into {name}: its weight is {kind}; use mode="runtime"')


def _merge(layer: Any, handle: LoraHandle, deltas: list[Delta]) -> None:
    if layer not in _ORIGINALS:
        bias = layer.bias
        _ORIGINALS[layer] = _Original(
            layer.weight.detach().to("cpu", copy=True), None if bias is None else bias.detach().to("cpu", copy=True)
        )
    _ORIGINALS[layer].merged.append((handle, deltas))
    _apply(layer)


def _unmerge(layer: nn.Module, handle: LoraHandle) -> None:
    original = _ORIGINALS[layer]
    original.merged = [(other, deltas) for other, deltas in original.merged if other is not handle]
    _apply(layer)
    if not original.merged:
        del _ORIGINALS[layer]


@torch.no_grad()
def _apply(layer: Any) -> None:
    """Write original + all merged deltas into the layer. From the original each time, so nothing accumulates."""
    original = _ORIGINALS[layer]
    weight = _sum(original.weight, original.merged, layer.weight.device, _weight_delta)
    layer.weight.copy_(weight)
    if original.bias is not None:
        layer.bias.copy_(_sum(original.bias, original.merged, layer.bias.device, _bias_delta))


def _sum(base: Tensor, merged: list[tuple[LoraHandle, list[Delta]]], device: torch.device, delta_of: Any) -> Tensor:
    changes = [(handle.strength, delta) for handle, deltas in merged if handle.strength for delta in deltas]
    if not changes:
        return base
    total = base.to(device=device, dtype=torch.promote_types(base.dtype, torch.float32), copy=True)
    for strength, delta in changes:
        change = delta_of(prepare(delta, device, total.dtype))
        if change is not None:
            total[delta.row : delta.row + delta.rows] += strength * change
    return total


def _weight_delta(delta: Delta) -> Tensor | None:
    return delta.up if delta.up is None or delta.down is None else delta.up @ delta.down


def _bias_delta(delta: Delta) -> Tensor | None:
    return delta.bias
