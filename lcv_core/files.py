"""Files as targets and sources: checks before long work, errors that say what to do, all-or-nothing writing, and the
settings that travel inside outputs."""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcv_core.errors import InputError

SETTINGS_KEY = "lcv"
VIDEO_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # extension of a written video -> FFmpeg's muxer


def require_file(path: str | Path, expected: str) -> Path:
    """`path` when it is a readable file with something in it, else InputError. `expected`: "an image", "a video"."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected {expected} file")
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path of {expected} file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read by this user; change its permissions")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes), expected {expected} file; export or download it again")
    return path


def settings_to_json(metadata: dict[str, Any]) -> str:
    """Settings as one line of JSON, in readable UTF-8 where the text allows it."""
    try:
        text = json.dumps(metadata, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair in a prompt
        return json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings to store cannot be written as JSON ({error})") from None
    return text


def settings_from_json(text: str, path: Path) -> dict[str, Any]:
    """The inverse of `settings_to_json`; InputError names the file they were found in."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"the settings stored in {path} are damaged ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"the settings stored in {path} are damaged (not an object)")
    return data


def check_writable(path: str | Path) -> Path:
    """`path`, once it is sure that a result can go there; to be called before any long work.

    Creates the folder. Allowed are .mp4, .mov, .mkv and .png files, and for PNG sequences a name without extension or
    a folder that exists. Raises InputError otherwise, or when the folder does not take new files.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    if path.is_dir() and (suffix in VIDEO_FORMATS or suffix == ".png"):
        raise InputError(f"{path} is a folder; choose the name of a file")
    if not (suffix in VIDEO_FORMATS or suffix in ("", ".png") or path.is_dir()):
        raise InputError(
            f"{path} has the unknown extension {suffix}; use .mp4, .mov or .mkv, .png for one picture,"
            " or a name without extension for a folder of PNG files"
        )
    if not suffix and path.is_file():
        raise InputError(f"{path} is a file without extension; use .mp4, .mov or .mkv, or name a folder for PNG files")
    prepare_target(path / "frame" if path.is_dir() else path)
    return path


def prepare_target(path: str | Path) -> Path:
    """`path`, after its folder was created and shown to take new files; InputError otherwise."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise write_error(path, error) from None
    return path


def write_error(path: Path, error: OSError) -> InputError:
    """What a failed write means for the person who asked for `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(
            f"no room left on the disk for {path}; what was finished before it is kept, free some space and run again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{path} cannot be written: no permission in {path.parent}; choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return InputError(f"{path} cannot be written: part of its path is a file, not a folder; choose another folder")
    return InputError(f"{path} cannot be written ({error.strerror or error}); choose another folder")


def temporary_path(path: Path) -> Path:
    """A new hidden name beside `path`, on the same disk, so that a rename publishes the finished work at once."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs left beside `path` under names of `temporary_path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name[:100])}.{'[0-9a-f]' * 8}.part"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well and is removed when it does not."""
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Move the folder `new` to `folder`; what was there goes by way of a name beside it, so that it can be put back."""
    if not folder.exists():
        new.rename(folder)
        return
    old = temporary_path(folder)
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)
