"""The state of a run on disk: safetensors and a JSON file in one folder, there whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcv_core.config import read_json
from lcv_core.errors import CheckpointError
from lcv_core.files import temporary_path, write_error

SIDECAR = "checkpoint.json"
SHARD_BYTES = 2 << 30  # also what is held in host memory at a time

Named = Iterable[tuple[str, Tensor]]
_STEP_FOLDER = re.compile(r"step-(\d{8})")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of any placement, whole and on the CPU. Collective where it is sharded."""
    full = getattr(tensor, "full_tensor", None)  # DTensor
    return (full() if full is not None else tensor).detach().cpu().contiguous()


class Checkpoints:
    """The checkpoints of a run, `step-00001000/` and so on in one folder.

    keep: how many stay; older ones are removed once a newer one is complete.
    writes: whether this process writes; the others only take part in gathering what is sharded.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, writes: bool = True) -> None:
        self.folder, self.keep, self.writes = Path(folder), keep, writes

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if _STEP_FOLDER.fullmatch(path.name))
        return sorted(path for path in found if (path / SIDECAR).is_file())

    def latest(self) -> Path | None:
        found = self.all()
        return found[-1] if found else None

    def save(self, step: int, groups: Mapping[str, Named], note: Mapping[str, Any]) -> Path:
        """Write the named tensors of each group and a note; returns the new checkpoint's folder.

        Whatever goes wrong, earlier checkpoints stay as they are. InputError when the disk does not take it.
        """
        target = self.folder / f"step-{step:08d}"
        writer = _Writer(temporary_path(target), self.writes)
        try:
            files = {group: writer.write_group(group, tensors) for group, tensors in groups.items()}
            writer.write(SIDECAR, json.dumps({"step": step, "files": files, **note}, indent=1).encode())
            if writer.error is None and self.writes:
                if target.exists():  # of a run that was repeated from an earlier step
                    shutil.rmtree(target)
                writer.folder.rename(target)
                _sync(self.folder)
            elif writer.error is not None:
                raise writer.error
        except OSError as error:
            raise write_error(target, error) from error
        finally:
            shutil.rmtree(writer.folder, ignore_errors=True)
        if self.writes:
            self._prune(target)
        return target

    def _prune(self, newest: Path) -> None:
        for old in self.all()[: -self.keep]:
            if old != newest:
                shutil.rmtree(old, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what killed runs left half written."""
        for path in self.folder.glob(".step-*.part"):
            shutil.rmtree(path, ignore_errors=True)


class _Writer:
    """Files in a folder that appears when the first is written.

    The first failure is kept and nothing more is written; gathering goes on, because the other processes take part.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder, self._writes = folder, writes
        self.error: OSError | None = None

    def write_group(self, group: str, tensors: Named) -> list[str]:
        """Files of about SHARD_BYTES; tensors are gathered one at a time, on every process in the same order."""
        files: list[str] = []
        shard: dict[str, Tensor] = {}

        def flush() -> None:
            from safetensors.torch import save

            files.append(f"{group}-{len(files) + 1:05d}.safetensors")
            # Not save_file: its files are readable by their owner alone, whatever the umask says.
            self.write(files[-1], save(shard, metadata={"format": "pt"}))
            shard.clear()

        for name, tensor in tensors:
            value = whole(tensor)
            if self._writes and self.error is None:
                shard[name] = value
                if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
                    flush()
        if shard:
            flush()
        return files

    def write(self, name: str, data: bytes) -> None:
        if not self._writes or self.error is not None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / name, data)
        except OSError as error:
            self.error = error


class SavedState:
    """One checkpoint on disk; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note = read_json(folder / SIDECAR)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.note["step"])

    def tensors(self, group: str) -> Iterator[tuple[str, Tensor]]:
        """The named tensors of a group, on the CPU. CheckpointError for a damaged or missing file."""
        for name in self.note["files"].get(group, []):
            try:
                with safe_open(self.folder / name, "pt") as file:
                    for key in file.keys():  # noqa: SIM118  (not a mapping)
                        yield key, file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.folder / name} is damaged or missing ({error}); delete {self.folder}, so that the run goes"
                    " on from the checkpoint before it"
                ) from None


@torch.no_grad()
def restore(targets: Mapping[str, Tensor], saved: Named, what: str) -> None:
    """Copy saved tensors into parameters or averages of the same names, sharded as those are. Collective.

    CheckpointError that says what is missing, unexpected or of another shape.
    """
    waiting = dict(targets)
    for name, value in saved:
        target = waiting.pop(name, None)
        if target is None or target.shape != value.shape:
            now = "nothing" if target is None else list(target.shape)
            raise CheckpointError(
                f"{what}: {name} is {list(value.shape)}, this recipe has {now}; the checkpoint is of another model"
            )
        target.copy_(like(value, target))
    if waiting:
        raise CheckpointError(f"{what} lacks {', '.join(list(waiting)[:5])}; the checkpoint is of another model")


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor placed as `target` is: on its device, sharded over its mesh."""
    value = value.to(target.device)
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, target.placements)  # type: ignore[attr-defined]


def _write(path: Path, data: bytes) -> None:
    """Write and flush to the disk: a checkpoint that is there must survive a power cut."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and renames need no flush
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
