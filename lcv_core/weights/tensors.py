"""Lazy reading of safetensors: headers when opened, one tensor at a time after that. GGUF files join in (`gguf.py`).

The format: eight bytes of header length (little endian), a JSON object {name: {dtype, shape, data_offsets}}, the data.
Everything that can be wrong with a download is told apart here, in one sentence each.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from lcv_core.config import read_json
from lcv_core.errors import CheckpointError
from lcv_core.weights.data_file import Stamp, read_exactly
from lcv_core.weights.gguf import GGUFFile, is_gguf

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_CHUNK = 1 << 20  # elements that are read before they are cast

# First bytes of things that are saved under a model's name.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights; run `git lfs pull` or download the file"),
    (b"<", "is a web page, not the weights; the download needs a log-in or the address is wrong"),
    (b"PK\x03\x04", "is a PyTorch pickle; unpickling can run code, so only safetensors is read: convert it"),
    (b"\x80", "is a Python pickle; unpickling can run code, so only safetensors is read: convert it"),
)


class TensorStore(Protocol):
    """What a loader needs of a set of named tensors, wherever they are."""

    def keys(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: data bytes start to stop, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """One safetensors file. CheckpointError when it is missing, cut short, damaged or something else."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise CheckpointError(f"{self.path} is a folder, expected a .safetensors file")
        try:
            with self.path.open("rb") as file:
                self.stamp = Stamp.of(os.fstat(file.fileno()))
                self.size = self.stamp.size
                self.header = _read_header(self.path, file.read(8), self.size, file)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} does not exist") from None
        except PermissionError:
            raise CheckpointError(f"{self.path} cannot be read: permission denied") from None
        self.data_start = 8 + len(self.header)
        self.metadata, self.entries = _parse_header(self.path, self.header)
        _check_sizes(self.path, self.entries, self.size - self.data_start)

    def keys(self) -> Iterable[str]:
        return self.entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives when none is asked for."""
        return self.entries[name].dtype

    def storage(self, name: str) -> tuple[str, int]:
        """(dtype, bytes) as stored."""
        entry = self.entries[name]
        return dtype_name(entry.dtype), entry.stop - entry.start

    def read(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its own memory; None leaves it on the CPU, in the dtype of the file. "meta" reads nothing."""
        entry = self.entries[name]
        if device is not None and torch.device(device).type == "meta":
            return torch.empty(entry.shape, dtype=dtype or entry.dtype, device="meta")
        raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        self.read_bytes(name, raw)
        return raw.view(entry.dtype).reshape(entry.shape).to(device=device, dtype=dtype)

    def read_bytes(self, name: str, out: Tensor) -> None:
        """The bytes of a tensor as stored into uint8 of as many, contiguous on the CPU."""
        self._read(out, self.entries[name].start)

    def read_into(self, name: str, out: Tensor) -> None:
        """A tensor into a contiguous one on the CPU, in its dtype; of what is cast, little is in memory twice."""
        entry = self.entries[name]
        if out.dtype == entry.dtype:
            self.read_bytes(name, out.view(-1).view(torch.uint8))
            return
        size, flat = entry.dtype.itemsize, out.view(-1)
        room = torch.empty(min(_CHUNK, flat.numel()) * size, dtype=torch.uint8)
        for first in range(0, flat.numel(), _CHUNK):
            part = flat[first : first + _CHUNK]
            raw = room[: part.numel() * size]
            self._read(raw, entry.start + first * size)
            part.copy_(raw.view(entry.dtype))

    def _read(self, raw: Tensor, start: int) -> None:
        read_exactly(self.path, self.stamp, self.data_start + start, raw.numpy().data)


def open_file(path: str | Path) -> TensorFile | GGUFFile:
    """One file, by what is in it: GGUF, else safetensors."""
    path = Path(path)
    return GGUFFile(path) if is_gguf(path) else TensorFile(path)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_header(path: Path, first: bytes, size: int, file: BinaryIO) -> bytes:
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); download it again")
    for magic, message in _IMPOSTORS:
        # A header length may begin with any byte, so a short magic counts only where a length would be absurd.
        if first.startswith(magic[:8]) and int.from_bytes(first, "little") > MAX_HEADER:
            raise CheckpointError(f"{path} {message}")
    length = int.from_bytes(first, "little")
    if size < 8 or length > MAX_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file (its header length makes no sense); download it again")
    if length > size - 8:
        raise CheckpointError(f"{path} is cut short: {size} bytes, not even its header is whole; download it again")
    return file.read(length)


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    try:
        data = json.loads(header.decode("utf-8"))
        metadata = data.pop("__metadata__", None) or {}
        entries = {name: _entry(path, name, value) for name, value in data.items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:120]
        raise CheckpointError(f"{path} has a damaged header ({reason}); download it again") from None
    return metadata, entries


def _entry(path: Path, name: str, value: dict[str, Any]) -> Entry:
    dtype = DTYPES.get(value["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name} has dtype {value['dtype']}, which is not supported")
    shape = tuple(int(n) for n in value["shape"])
    start, stop = (int(n) for n in value["data_offsets"])
    if min((*shape, start), default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} does not fill its bytes")
    return Entry(dtype, shape, start, stop)


def _check_sizes(path: Path, entries: dict[str, Entry], available: int) -> None:
    expected = max((entry.stop for entry in entries.values()), default=0)
    if expected > available:
        raise CheckpointError(f"{path} is cut short: {expected - available} bytes are missing; download it again")
    if expected < available:
        raise CheckpointError(f"{path} has {available - expected} bytes after its last tensor; download it again")


class TensorSource:
    """The tensors of one or many safetensors files, or of a GGUF file, as one set.

    `TensorSource.open(path)` takes a file, or a folder: the shards of its index when there is one, else every
    safetensors file in it, else its one GGUF file. CheckpointError names the shard that is missing or the tensor that
    is not where the index says.
    """

    def __init__(self, files: Iterable[TensorFile | GGUFFile]) -> None:
        self.files = tuple(files)
        self._home: dict[str, TensorFile | GGUFFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self._home:
                    raise CheckpointError(
                        f"tensor {name} is in both {self._home[name].path} and {file.path.name};"
                        " keep one model per folder, or pass the file itself"
                    )
                self._home[name] = file

    @classmethod
    def open(cls, path: str | Path) -> TensorSource:
        path = Path(path)
        if not path.is_dir():
            return cls([open_file(path)])
        indexes = sorted(path.glob("*.safetensors.index.json"))
        if len(indexes) > 1:
            names = ", ".join(index.name for index in indexes)
            raise CheckpointError(f"{path} has {len(indexes)} index files ({names}); keep one model per folder")
        if indexes:
            return cls._open_index(path, indexes[0])
        files = sorted(path.glob("*.safetensors"))
        if not files:
            files = sorted(path.glob("*.gguf"))
            if len(files) > 1:  # the same model in several sizes, as these are published
                names = ", ".join(file.name for file in files)
                raise CheckpointError(f"{path} has {len(files)} GGUF files ({names}); name one of them instead")
        if not files:
            raise CheckpointError(f"{path} holds no .safetensors or .gguf file")
        return cls(open_file(file) for file in files)

    @classmethod
    def _open_index(cls, folder: Path, index: Path) -> TensorSource:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; download it again")
        shards = sorted(set(weight_map.values()))
        # An index is data from outside: it may name files beside it, nothing else.
        strange = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
        if strange:
            raise CheckpointError(f"{index} names a file outside its folder: {strange[0]!r}")
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise CheckpointError(
                f"{folder} lacks {len(absent)} of {len(shards)} shards ({', '.join(absent[:8])}); download them"
            )
        source = cls(TensorFile(folder / shard) for shard in shards)
        for name, shard in weight_map.items():
            home = source._home.get(name)
            if home is None or home.path.name != shard:
                raise CheckpointError(
                    f"{folder / shard} lacks tensor {name} that {index.name} says is in it;"
                    " the shards and the index are of different downloads: download both again"
                )
        return source

    @property
    def stamps(self) -> tuple[tuple[Path, Stamp], ...]:
        """The files, and what tells whether they are still the same."""
        return tuple((file.path, file.stamp) for file in self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(file.size - file.data_start for file in self.files)

    def keys(self) -> Iterable[str]:
        return self._home.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._home[name].dtype(name)

    def storage(self, name: str) -> tuple[str, int]:
        """(dtype or GGUF type, bytes) as stored."""
        return self._home[name].storage(name)

    def read(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """See `TensorFile.read`."""
        return self._home[name].read(name, device, dtype)

    def read_into(self, name: str, out: Tensor) -> None:
        """A tensor into a contiguous one on the CPU, in its dtype."""
        self._home[name].read_into(name, out)

    def read_bytes(self, name: str, out: Tensor) -> None:
        """The bytes of a tensor as stored into uint8 of as many, contiguous on the CPU."""
        self._home[name].read_bytes(name, out)

    def blocks(self, name: str, device: torch.device | str | None = None) -> Tensor | None:
        """The bytes of a tensor of a GGUF file, see `GGUFFile.blocks`; None for one of a safetensors file."""
        home = self._home[name]
        return home.blocks(name, device) if isinstance(home, GGUFFile) else None


class StateDict:
    """Tensors already in memory (or memory-mapped by torch.load) under the interface of TensorSource."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[name].to(device=device, dtype=dtype)
