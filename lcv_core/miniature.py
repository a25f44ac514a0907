"""The trained miniature that comes with the package: LongCat-Video small enough for any CPU.

It knows what `lcv_core.training.data` renders, one coloured object on a plain background, and was trained on that by
the recipes `mini/*` (docs/miniature). It is the model where none is named.
"""

from __future__ import annotations

from pathlib import Path

MINIATURE = "mini"
_FOLDER = Path(__file__).resolve().parent / "assets" / MINIATURE


def miniature() -> Path:
    """Its folder, in the official layout."""
    return _FOLDER


def find_model(name: str | Path) -> Path:
    """The path of a model that a user named: "mini" is the miniature, unless something of that name lies here."""
    path = Path(name)
    return miniature() if str(name) == MINIATURE and not path.exists() else path
