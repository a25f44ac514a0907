"""Where ComfyUI keeps models and outputs, and what of it a LongCat-Video node can use."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import folder_paths

from lcv_core.errors import InputError
from lcv_core.miniature import miniature
from lcv_core.weights.checkpoint import ADAPTER_NAMES, Checkpoint, locate, open_checkpoint

FOLDER = "longcat_video"  # models/longcat_video: official checkpoint folders
MINIATURE = "miniature (built in)"
AUTO, NONE = "auto", "none"
Stamp = tuple[str, int, int]  # name, bytes, time of change
_GGUF = ".gguf"
_VAE_MARKS = ("wan_2.1_vae", "wan2.1_vae", "wan2_1_vae", "longcat_video_vae")
_TEXT_MARKS = ("umt5",)
TITLES = {"vae": "VAE", "text_encoder": "text encoder"}  # of the parts of a checkpoint
_READ = (".safetensors", ".gguf", ".json", ".model", ".pth")  # endings of what a checkpoint is read from


def register() -> None:
    """Tell ComfyUI of models/longcat_video."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))  # noqa: PTH118


def checkpoints() -> list[str]:
    """What the loader offers: official folders, transformer files (those named LongCat first), the miniature."""
    files = [*folder_paths.get_filename_list("diffusion_models"), *_gguf_files()]
    files.sort(key=lambda name: ("longcat" not in name.lower(), name.lower()))
    return [MINIATURE, *_folders(), *dict.fromkeys(files)]


def _folders() -> list[str]:
    """Folders under models/longcat_video that hold a transformer."""
    found = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        if root.is_dir():
            found |= {f"{path.name}/": path for path in sorted(root.iterdir()) if _is_shown(path)}
    return sorted(found)


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".") and locate(path)[1] is not None


def _gguf_files() -> list[str]:
    """ComfyUI's own lists leave GGUF files out."""
    found = []
    for root in map(Path, folder_paths.get_folder_paths("diffusion_models")):
        if root.is_dir():
            found += [str(path.relative_to(root)) for path in sorted(root.rglob(f"*{_GGUF}"))]
    return found


def _inside(roots: list[str], name: object, what: str, *, folder: bool = False) -> Path:
    """The file, or folder, `name` under one of `roots`; InputError for a name that is absent or leads out of them."""
    for root in map(Path, roots if isinstance(name, str) else ()):
        path = root / str(name)
        if not _is_there(path, folder):
            continue
        if root.resolve() in path.resolve().parents:
            return path
        parts = Path(str(name)).parts
        if parts and ".." not in parts and not Path(str(name)).is_absolute():
            return path  # a link that the user made
    raise InputError(f"{what} {name!r} is not there; choose one of the list, or reload the page if it was just added")


def _is_there(path: Path, folder: bool) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:  # longer than a name can be
        return False


def _file(category: str, name: object, what: str) -> Path:
    return _inside(folder_paths.get_folder_paths(category), name, what)


def find_checkpoint(name: str) -> Path:
    """The path of a name that `checkpoints` gave."""
    if name == MINIATURE:
        return miniature()
    if isinstance(name, str) and name.endswith("/"):
        return _inside(folder_paths.get_folder_paths(FOLDER), name.rstrip("/"), "checkpoint", folder=True)
    return _file("diffusion_models", name, "checkpoint")


def open_model(name: str, vae: str = AUTO, text_encoder: str = AUTO) -> Checkpoint:
    """A checkpoint, its parts and its adapters. vae, text_encoder: a file's name, "auto" (beside the checkpoint, else
    the file whose name says so) or "none". Raises CheckpointError or InputError, saying what to do."""
    path = find_checkpoint(name)
    found = open_checkpoint(path)
    parts = {}
    if vae != NONE and (vae != AUTO or found.vae is None):
        parts["vae"] = _part("vae", "vae", vae, _VAE_MARKS)
    if text_encoder != NONE and (text_encoder != AUTO or found.text_encoder is None):
        parts["text_encoder"] = _part("text_encoder", "text_encoders", text_encoder, _TEXT_MARKS)
    parts = {key: value for key, value in parts.items() if value is not None}
    return _with_known_adapters(open_checkpoint(path, **parts) if parts else found)


def _part(part: str, category: str, name: str, marks: tuple[str, ...]) -> Path | None:
    """A named file, or the first whose name has one of the marks; None when there is none."""
    if name == AUTO:
        names = folder_paths.get_filename_list(category)
        found = next((known for known in names if any(mark in known.lower() for mark in marks)), None)
        if found is None:
            return None
        name = found
    return _file(category, name, TITLES[part])


def _with_known_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """With the adapters that lie in models/loras rather than beside the checkpoint."""
    found = dict(checkpoint.adapters)
    for kind in ADAPTER_NAMES:
        path = None if kind in found else _known_adapter(kind)
        if path is not None:
            found[kind] = path
    return dataclasses.replace(checkpoint, adapters=found)


def vaes() -> list[str]:
    return [AUTO, NONE, *folder_paths.get_filename_list("vae")]


def text_encoders() -> list[str]:
    return [AUTO, NONE, *folder_paths.get_filename_list("text_encoders")]


def loras() -> list[str]:
    return list(folder_paths.get_filename_list("loras"))


def find_lora(name: str) -> Path:
    return _file("loras", name, "LoRA")


def _known_adapter(kind: str) -> Path | None:
    """The "distill" or "refinement" adapter among models/loras, by its published names."""
    for candidate in loras():
        if any(mark in candidate.lower() for mark in ADAPTER_NAMES[kind]):
            return _file("loras", candidate, "LoRA")
    return None


def stamp(value: object) -> list[Stamp] | None:
    """The files behind a node's input that names a model: other numbers, other model. None for every other input."""
    if not isinstance(value, str) or not value or "\n" in value:
        return None
    if value == MINIATURE or value.endswith("/"):
        try:
            return _stamps(find_checkpoint(value))
        except InputError:
            return None
    found = (folder_paths.get_full_path(category, value) for category in folder_paths.folder_names_and_paths)
    return [_stat(Path(path)) for path in found if path] or None


def stamp_model(name: str, vae: str, text_encoder: str) -> list[Stamp] | None:
    """All files that `open_model` chooses; None where there is no such model."""
    try:
        found = open_model(name, vae, text_encoder)
    except InputError:
        return None
    parts = (found.path, found.dit, found.vae, found.text_encoder, found.tokenizer, *found.adapters.values())
    return [stamp for path in parts if path for stamp in _stamps(path)]


def _stamps(path: Path) -> list[Stamp]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [_stat(file) for file in files if file.suffix in _READ and file.is_file()]


def _stat(path: Path) -> Stamp:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def work_folder() -> Path:
    """Where unfinished long jobs keep their segments."""
    return Path(folder_paths.get_output_directory()) / "longcat_video_segments"
