"""Writing the files of a checkpoint in the official layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A JSON file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_tensors(path: Path, state: State) -> None:
    """A safetensors file, its folder made."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    # Not save_file: its files are readable by their owner alone, whatever the umask says.
    path.write_bytes(save({name: t.detach().contiguous() for name, t in state.items()}, metadata={"format": "pt"}))


def write_sharded(folder: Path, stem: str, state: State, shards: int) -> None:
    """Consecutive tensors in so many files of about equal size, and the index that says which is where; a single file
    has no index."""
    if shards == 1:
        write_tensors(folder / f"{stem}.safetensors", state)
        return
    total = sum(t.nbytes for t in state.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    weight_map: dict[str, str] = {}
    before = 0
    for name, tensor in state.items():
        shard = before * shards // total
        parts[shard][name] = tensor
        weight_map[name] = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        before += tensor.nbytes
    for i, part in enumerate(parts):
        write_tensors(folder / f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors", part)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
