"""From an adapter's tensors to the deltas of a model's layers, checked against the shapes of that model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lcv_core.errors import InputError
from lcv_core.weights.assemble import some
from lcv_core.weights.keymaps import Slot
from lcv_core.weights.lora_keys import Entry, aliases, group
from lcv_core.weights.recognise import has_avatar_names, lora_title, title
from lcv_core.weights.tensors import TensorStore


@dataclass(frozen=True)
class Delta:
    """Rows `row` to `row + rows` of a layer's weight change by scale * up @ down, or scale * up where down is None.

    up [rows, r] (or [rows, in]), down [r, in]; bias: [rows], or None.
    """

    row: int
    rows: int
    up: Tensor | None
    down: Tensor | None
    scale: float = 1.0
    bias: Tensor | None = None


@dataclass(frozen=True)
class LoraReport:
    """What became of an adapter file: module names of the model that it changes, targets it has no place for.

    ranks: the different ranks in it, ascending. dialect: see lora_keys; "/wan" or "/fastvideo" names foreign modules.
    """

    name: str
    dialect: str
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass
class _Reading:
    store: TensorStore
    name: str
    hint: str
    deltas: dict[str, list[Delta]] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that an adapter can change: whatever has in_features and out_features, quantised kinds included."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
    }


def read_lora(model: nn.Module, store: TensorStore, name: str) -> tuple[dict[str, list[Delta]], LoraReport]:
    """Deltas by module name of `model`, and the report. InputError when the adapter is not for this model."""
    names = list(store.keys())
    if has_avatar_names(names):
        raise InputError(
            f"{name} is an adapter of LongCat-Video-Avatar (it has audio targets); only the base model's fit"
        )
    grouped = group(names)
    if not grouped.entries:
        raise InputError(f"{name} is not a LoRA adapter: it looks like {title(names)}")
    layers = linear_layers(model)
    table = aliases(layers)
    hint = lora_title(names)
    reading = _Reading(store, name, hint)
    unmatched = list(grouped.stray)
    namings = set()
    for entry in grouped.entries.values():
        slot, naming = table.get(entry.module, (None, ""))
        if slot is None or (entry.diff_b and getattr(layers[slot.name], "bias", None) is None):
            unmatched.append(entry.module)
            continue
        namings.add(naming)
        _read_entry(reading, entry, slot, layers[slot.name])
    if not reading.deltas:
        looks = f"; it looks like {hint}" if hint else ""
        raise InputError(f"{name} is not for this model: it has no layer of {some(unmatched)}{looks}")
    foreign = "".join(f"/{naming}" for naming in sorted(namings - {"official"}))
    report = LoraReport(
        name, grouped.dialect + foreign, tuple(reading.deltas), tuple(unmatched), tuple(sorted(reading.ranks))
    )
    return reading.deltas, report


def _read_entry(reading: _Reading, entry: Entry, slot: Slot, layer: Any) -> None:
    if bool(entry.down) != bool(entry.ups):
        raise InputError(f"{reading.name} has only one half of the pair for {entry.module}; download it again")
    rows = layer.out_features // slot.parts
    start = slot.part * rows
    deltas = reading.deltas.setdefault(slot.name, [])
    if entry.down:
        deltas.extend(_low_rank(reading, entry, start, rows, layer.in_features))
    if entry.diff or entry.diff_b:
        up = None if entry.diff is None else _shaped(reading, entry, entry.diff, (rows, layer.in_features))
        bias = None if entry.diff_b is None else _shaped(reading, entry, entry.diff_b, (rows,))
        deltas.append(Delta(start, rows, up, None, bias=bias))
    if not deltas:  # an alpha alone changes nothing
        del reading.deltas[slot.name]


def _low_rank(reading: _Reading, entry: Entry, start: int, rows: int, in_features: int) -> list[Delta]:
    parts = len(entry.ups)
    if sorted(entry.ups) != list(range(parts)):
        raise InputError(f"{reading.name} lacks a part of {entry.module}: it has parts {sorted(entry.ups)}")
    assert entry.down is not None
    stacked = reading.store.shape(entry.down)[0]
    rank = stacked // parts
    _expect(reading, entry, "down", reading.store.shape(entry.down), (rank * parts, in_features))
    down = reading.store.read(entry.down)
    scale = _scale(reading.store, entry, rank)
    reading.ranks.add(rank)
    size = rows // parts
    return [
        Delta(
            start + k * size, size, _shaped(reading, entry, name, (size, rank)), down[k * rank : (k + 1) * rank], scale
        )
        for k, name in sorted(entry.ups.items())
    ]


def _scale(store: TensorStore, entry: Entry, rank: int) -> float:
    """alpha_scale as it is; else alpha / rank; 1 when the file has neither (alpha = rank)."""
    if entry.alpha_scale:
        return float(store.read(entry.alpha_scale).float().mean())
    return float(store.read(entry.alpha).float().mean()) / rank if entry.alpha else 1.0


def _shaped(reading: _Reading, entry: Entry, tensor: str, shape: tuple[int, ...]) -> Tensor:
    _expect(
        reading, entry, tensor.rpartition(entry.module)[2].strip(".") or "delta", reading.store.shape(tensor), shape
    )
    return reading.store.read(tensor)


def _expect(reading: _Reading, entry: Entry, what: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        looks = f" (it looks like {reading.hint})" if reading.hint else ""
        raise InputError(
            f"{reading.name} was made for a model of another size{looks}: {what} of {entry.module} should be"
            f" {list(expected)}, got {list(got)}"
        )


def prepare(delta: Delta, device: torch.device, dtype: torch.dtype) -> Delta:
    """The delta where and how a layer computes, its scale folded into `up` (in fp32 before the cast)."""

    def move(tensor: Tensor | None, scale: float = 1.0) -> Tensor | None:
        if tensor is None:
            return None
        if scale != 1.0:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale
        return tensor.to(device=device, dtype=dtype)

    return Delta(delta.row, delta.rows, move(delta.up, delta.scale), move(delta.down), 1.0, move(delta.bias))
