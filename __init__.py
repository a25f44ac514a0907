"""The ComfyUI door of the LongCat-Video node pack. Importing it does nothing; ComfyUI calls `comfy_entrypoint`."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./comfy_nodes/web"

_ROOT = Path(__file__).resolve().parent


def _find_packages() -> None:
    """Make `lcv_core` and `lcv_bsa` importable from this folder where they are not installed.

    ImportError where other packages, or other versions of them, have these names: there can be one of each.
    """
    for name, folder in (("lcv_core", _ROOT), ("lcv_bsa", _ROOT / "lcv_bsa" / "src")):
        # Without an origin it is a namespace that some folder of the same name made by accident.
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            sys.path.append(str(folder))
            sys.modules.pop(name, None)
            importlib.invalidate_caches()
        elif (ours := _version(folder / name / "__init__.py")) and _version(Path(spec.origin)) != ours:
            raise ImportError(
                f"{spec.origin} is not the {name} {ours} of this node pack: remove it, or update both (it came by pip"
                " install longcat-video-nodes, or with another node pack)"
            )


def _version(init: Path) -> str | None:
    """What a package says of itself, without importing it."""
    if not init.is_file():
        return None
    found = re.search(r'^__version__ = "(.+)"$', init.read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1]


async def comfy_entrypoint() -> Any:
    """The extension with this pack's nodes."""
    _find_packages()
    from .comfy_nodes import LongCatVideoExtension

    return LongCatVideoExtension()
