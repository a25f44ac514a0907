"""Writing weights files tensor by tensor: the header first, from what is to come, then each tensor as it is made."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lcv_core.quant.blocks import SIZES
from lcv_core.weights.gguf import MAGIC, ORIGINAL_SHAPE
from lcv_core.weights.tensors import DTYPES

GGUF_TYPES = {  # ggml's numbers of the types
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "BF16": 30,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 32
_VERSION = 3
_MOST_DIMS = 4  # of ggml
_U32, _I32, _TEXT, _ARRAY = 4, 5, 8, 9  # metadata types


@dataclass(frozen=True)
class Slot:
    """A tensor that is to be written. kind: dtype by its safetensors name, or GGUF type."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        elements, width = SIZES.get(self.kind) or (1, DTYPES[self.kind].itemsize)
        return math.prod(self.shape) // elements * width


Write = Callable[[Path, Sequence[Slot], Iterator[Tensor], Mapping[str, Any]], None]


def write_safetensors(
    path: Path, slots: Sequence[Slot], tensors: Iterator[Tensor], metadata: Mapping[str, Any]
) -> None:
    """The next tensors of `tensors`, one for each slot, as a safetensors file. metadata: text by name."""
    header: dict[str, Any] = {"__metadata__": {key: str(value) for key, value in metadata.items()}}
    start = 0
    for slot in slots:
        stop = start + slot.nbytes
        header[slot.name] = {"dtype": slot.kind, "shape": list(slot.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for slot in slots:
            _write(file, slot, next(tensors))


def write_gguf(path: Path, slots: Sequence[Slot], tensors: Iterator[Tensor], metadata: Mapping[str, Any]) -> None:
    """The same as a GGUF file. metadata: text and whole numbers by name.

    A tensor of more dimensions than ggml has gets one row for each of its first, and its shape goes into the metadata
    under the name that ComfyUI's packers have for it.
    """
    pairs = [_pair(key, value) for key, value in metadata.items()]
    pairs += [_pair(f"{ORIGINAL_SHAPE}{slot.name}", list(slot.shape)) for slot in slots if len(slot.shape) > _MOST_DIMS]
    infos, start = [], 0
    for slot in slots:
        shape = slot.shape if len(slot.shape) <= _MOST_DIMS else (slot.shape[0], math.prod(slot.shape[1:]))
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos.append(_text(slot.name) + dims + struct.pack("<IQ", GGUF_TYPES[slot.kind], start))
        start += slot.nbytes + -slot.nbytes % _ALIGNMENT
    head = MAGIC + struct.pack("<IQQ", _VERSION, len(slots), len(pairs)) + b"".join(pairs + infos)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        for slot in slots:
            _write(file, slot, next(tensors))
            file.write(bytes(-slot.nbytes % _ALIGNMENT))


def _write(file: BinaryIO, slot: Slot, tensor: Tensor) -> None:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() != slot.nbytes:
        raise ValueError(f"{slot.name} has {raw.numel()} bytes, the header says {slot.nbytes}")
    file.write(raw.numpy().data)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pair(key: str, value: str | int | list[int]) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _TEXT) + _text(value)
    if isinstance(value, int):
        return _text(key) + struct.pack("<II", _U32, value)
    return _text(key) + struct.pack(f"<IIQ{len(value)}i", _ARRAY, _I32, len(value), *value)
