"""Run a ComfyUI checkout in a clean interpreter: `python -S launch.py --site FOLDER ... MAIN.PY ARGUMENTS ...`.

Under `-S` no `.pth` file is read, so packages of an editable install cannot be imported: the pack has to find its own,
as after `git clone` into custom_nodes. `--install FOLDER` makes a folder importable, as an editable install does;
`--without NAME` makes a package unknown to imports, as where it is not installed.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import os
import runpy
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class TorchvisionOperators:
    """Import hook that defines the two operators torchvision registers fakes for, where its own library cannot load.

    torchvision built for CUDA fails at import next to torch built for the CPU. Nothing calls these operators here.
    A hook, because ComfyUI wants to be the first to import torch.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            define_missing_operators()
        return None


class NotInstalled(PathFinder):
    """The finder of installed packages, blind to those of `names`."""

    names: frozenset[str] = frozenset()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in cls.names else super().find_spec(fullname, path, target)


def define_missing_operators() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or []:
        for library in Path(folder).glob("_C.*"):
            try:
                torch.ops.load_library(str(library))
            except (ImportError, OSError):
                continue
            return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    TorchvisionOperators.library = library  # type: ignore[attr-defined]  # definitions die with their library


def exit_with_parent() -> None:
    """End the process when stdin closes: a killed test run leaves no server behind."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--site", action="append", default=[], help="folder of installed packages")
    parser.add_argument("--install", action="append", default=[], help="folder to make importable, after all others")
    parser.add_argument("--without", action="append", default=[], help="package that is not to be found")
    parser.add_argument("main", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    threading.Thread(target=exit_with_parent, daemon=True).start()
    # The folder of this file goes: its `server` is not ComfyUI's.
    sys.path[0] = str(options.main.parent)
    sys.path += options.site + options.install
    sys.argv = [str(options.main), *options.arguments]
    NotInstalled.names = frozenset(options.without)
    sys.meta_path[sys.meta_path.index(PathFinder)] = NotInstalled
    sys.meta_path.insert(0, TorchvisionOperators())
    builtins.exit = sys.exit  # missing under -S
    os.chdir(options.main.parent)
    runpy.run_path(str(options.main), run_name="__main__")


if __name__ == "__main__":
    main()
