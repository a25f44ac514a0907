"""Writing what a stage trained, in the official layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lcv_core.weights.write import write_json, write_tensors

Precision = Literal["fp32", "bf16"]


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """A config.json, its folder made."""
    write_json(path, config)


def in_precision(state: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """A state dict's tensors in `precision`."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return {name: tensor.detach().to(dtype) for name, tensor in state.items()}


def write_weights(path: Path, state: Mapping[str, Tensor], precision: Precision) -> None:
    """A safetensors file of a state dict, its folder made; fp32 tensors in `precision`."""
    write_tensors(path, in_precision(state, precision))


def copy_part(source: Path, target: Path) -> None:
    """Copy a part of a checkpoint, a file or a folder, by hard links where the disk allows them: weights are never
    changed in place."""
    files = [source] if source.is_file() else [p for p in sorted(source.iterdir()) if p.is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)
