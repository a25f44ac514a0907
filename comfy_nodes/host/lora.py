"""Adapter files of every dialect as ComfyUI weight patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy.weight_adapter.lora import LoRAAdapter

from lcv_core.weights.assemble import some
from lcv_core.weights.lora import Adapter
from lcv_core.weights.lora_read import Delta, LoraReport, read_lora
from lcv_core.weights.tensors import TensorSource

from .native import require_longcat

Patches = dict[Any, Any]

_APPLIED = "lcv_loras"  # attachment: paths of the adapters on a MODEL


def apply_lora(
    model: Any, path: Path, strength: float = 1.0, *, adapter: Adapter | None = None
) -> tuple[Any, LoraReport]:
    """A clone of a LongCat-Video MODEL with the adapter, and what of it was found. adapter: what is in the file, where
    it was read already; the clone's patches share its tensors.

    InputError where nothing of the file is for this model. ComfyUI patches, offloads and undoes it like its own.
    """
    network = require_longcat(model).diffusion_model
    if adapter is None:
        adapter = Adapter(*read_lora(network, TensorSource.open(path), path.name))
    clone = model.clone()
    for patches in _rounds(adapter.deltas):
        clone.add_patches(patches, strength)
    clone.set_attachments(_APPLIED, (*applied_loras(model), path.resolve()))
    return clone, adapter.report


def applied_loras(model: Any) -> tuple[Path, ...]:
    """The files that `apply_lora` has put on a MODEL."""
    return model.get_attachment(_APPLIED) or ()


def describe(report: LoraReport) -> str:
    """One line for the user: how much of the file fits, and what does not."""
    text = f"{report.name}: {len(report.matched)} layers, {report.dialect} names"
    if report.unmatched:
        text += f"; not in this model: {some(report.unmatched)}"
    return text


def _rounds(deltas: Mapping[str, list[Delta]]) -> list[Patches]:
    """Patches by weight and rows. ComfyUI keeps one patch a key and call, so a second delta of the same rows goes into
    a call of its own."""
    rounds: list[Patches] = []
    for target, parts in deltas.items():
        for delta in parts:
            for key, patch in _patches(target, delta).items():
                place = next((r for r in rounds if key not in r), None)
                if place is None:
                    rounds.append(place := {})
                place[key] = patch
    return rounds


def _patches(target: str, delta: Delta) -> Patches:
    """One delta as ComfyUI's patches: rows `row` to `row + rows` along dim 0 of a weight or bias."""
    found: Patches = {}
    offset = (0, delta.row, delta.rows)
    name = f"diffusion_model.{target}"
    if delta.up is not None and delta.down is not None:
        rank = delta.down.shape[0]
        # ComfyUI scales by alpha / rank.
        found[(f"{name}.weight", offset)] = LoRAAdapter(
            set(), (delta.up, delta.down, delta.scale * rank, None, None, None)
        )
    elif delta.up is not None:
        found[(f"{name}.weight", offset)] = ("diff", (delta.up * delta.scale,))
    if delta.bias is not None:
        found[(f"{name}.bias", offset)] = ("diff", (delta.bias,))
    return found
