"""LongCat-Video: the model, its pipelines and the command line.

The public names below are imported when they are first used, so that `import lcv_core` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcv_core.config import LONGCAT_VIDEO, BSAConfig, DiTConfig, Native, TextConfig, VAEConfig
    from lcv_core.dit.model import LongCatDiT
    from lcv_core.errors import CheckpointError, InputError, NumericalError
    from lcv_core.pipelines.base import Components
    from lcv_core.text.encoder import TextEncoder, TextStates
    from lcv_core.vae.model import WanVAE
    from lcv_core.vae.tiling import Tiling
    from lcv_core.weights.checkpoint import open_checkpoint
    from lcv_core.weights.lora import load_lora

__version__ = "0.1.0"

_HOMES = {
    "lcv_core.config": ("LONGCAT_VIDEO", "BSAConfig", "DiTConfig", "Native", "TextConfig", "VAEConfig"),
    "lcv_core.dit.model": ("LongCatDiT",),
    "lcv_core.errors": ("CheckpointError", "InputError", "NumericalError"),
    "lcv_core.pipelines.base": ("Components",),
    "lcv_core.text.encoder": ("TextEncoder", "TextStates"),
    "lcv_core.vae.model": ("WanVAE",),
    "lcv_core.vae.tiling": ("Tiling",),
    "lcv_core.weights.checkpoint": ("open_checkpoint",),
    "lcv_core.weights.lora": ("load_lora",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LONGCAT_VIDEO",
    "BSAConfig",
    "CheckpointError",
    "Components",
    "DiTConfig",
    "InputError",
    "LongCatDiT",
    "Native",
    "NumericalError",
    "TextConfig",
    "TextEncoder",
    "TextStates",
    "Tiling",
    "VAEConfig",
    "WanVAE",
    "load_lora",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value
