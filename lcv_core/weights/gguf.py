"""Lazy reading of GGUF: headers when opened, one tensor at a time after that, dequantised piece by piece.

The format (little endian): "GGUF", version, number of tensors, number of metadata entries; the metadata; per tensor its
name, dimensions (innermost first), type and offset; then, aligned, the data. The header is read here, so that damage is
told apart in one sentence each; what the blocks of a type mean is the `gguf` package's business.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from lcv_core.config import LONGCAT_VIDEO
from lcv_core.errors import CheckpointError
from lcv_core.weights.data_file import Stamp, read_exactly
from lcv_core.weights.keymaps import Rule

if TYPE_CHECKING:
    from lcv_core.weights.tensors import TensorSource

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes; a vocabulary of 256k words takes 10 million
MAX_DIMS = 8  # ggml itself has four; packers for ComfyUI write five for video models
# Packers reshape what llama.cpp's tools refuse, and say under this key what it was.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
CHUNK = 1 << 20  # elements dequantised at once; a multiple of every block size (256 at most)
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_KEPT = 64  # array entries; longer ones are vocabularies, which nothing here reads

_E, _T5 = "enc.blk.{n}", "encoder.block.{n}.layer"
T5_ENCODER: tuple[Rule, ...] = (
    Rule("token_embd.weight", "shared.weight"),
    Rule(f"{_E}.attn_norm.weight", f"{_T5}.0.layer_norm.weight"),
    *(Rule(f"{_E}.attn_{x}.weight", f"{_T5}.0.SelfAttention.{x}.weight") for x in "qkvo"),
    Rule(f"{_E}.attn_rel_b.weight", f"{_T5}.0.SelfAttention.relative_attention_bias.weight"),
    Rule(f"{_E}.ffn_norm.weight", f"{_T5}.1.layer_norm.weight"),
    Rule(f"{_E}.ffn_gate.weight", f"{_T5}.1.DenseReluDense.wi_0.weight"),
    Rule(f"{_E}.ffn_up.weight", f"{_T5}.1.DenseReluDense.wi_1.weight"),
    Rule(f"{_E}.ffn_down.weight", f"{_T5}.1.DenseReluDense.wo.weight"),
    Rule("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
)
"""llama.cpp's names of a T5 encoder -> transformers; after llama.cpp's own table of T5 tensor names."""


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor of a file: data bytes start to stop, counted from the end of the header.

    kind: the type's name ("Q8_0"). shape: outermost dimension first, as torch has it.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """One GGUF file, with the interface of `TensorFile`.

    Raises CheckpointError when it is missing, cut short or damaged, when a type cannot be read, or without the `gguf`
    package.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _package(self.path)
        with self.path.open("rb") as file:
            self.stamp = Stamp.of(os.fstat(file.fileno()))
            self.size = self.stamp.size
            reader = _Reader(self.path, file, self.size)
            self.metadata, self.entries = _parse(reader)
            alignment = _alignment(self.path, self.metadata)
            self.data_start = -(-reader.position // alignment) * alignment
            file.seek(8)
            self.header = file.read(reader.position - 8)
        _check_data(self.path, self.entries, self.size - self.data_start, alignment)
        self._dtype = _common_dtype(self.entries)

    def keys(self) -> Iterable[str]:
        return self.entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """One for the whole file: packers keep norms and biases in F32 whatever the weights are in."""
        return self._dtype

    def storage(self, name: str) -> tuple[str, int]:
        """Type and bytes as stored."""
        entry = self.entries[name]
        return entry.kind, entry.stop - entry.start

    def read(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """See `TensorFile.read`. Pieces are dequantised in fp32 and rounded, so a tensor is never twice in memory."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=dtype or self._dtype, device=device)
        if out.device.type != "meta":
            self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """The same into a contiguous tensor, in its dtype."""
        entry = self.entries[name]
        pieces = out.view(-1).split(CHUNK)
        mode = torch.is_inference_mode_enabled()  # of this thread alone; what it makes can be written to in it alone

        def fill(i: int) -> None:
            with torch.inference_mode(mode):
                self._fill(pieces[i], entry, i * CHUNK)

        # numpy lets go of the interpreter lock, and one core would take minutes for a model.
        with ThreadPoolExecutor(max(1, min(len(pieces), os.cpu_count() or 1))) as pool:
            list(pool.map(fill, range(len(pieces))))

    def blocks(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """The bytes of a tensor as stored, uint8 [rows, bytes of a row]; "meta" reads nothing."""
        entry = self.entries[name]
        shape = math.prod(entry.shape[:-1]), -1
        if device is not None and torch.device(device).type == "meta":
            return torch.empty(entry.stop - entry.start, dtype=torch.uint8, device="meta").view(shape)
        raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        self.read_bytes(name, raw)
        return raw.view(shape).to(device=device)

    def read_bytes(self, name: str, out: Tensor) -> None:
        """The bytes of a tensor as stored into uint8 of as many, contiguous on the CPU."""
        self._read_into(out.view(-1).numpy().data, self.entries[name].start)

    def _fill(self, out: Tensor, entry: GGUFEntry, first: int) -> None:
        """The elements of `entry` from number `first` on into `out`."""
        elements, width = _block(entry.kind)
        raw = bytearray(len(out) // elements * width)
        self._read_into(raw, entry.start + first // elements * width)
        out.copy_(_dequantise(entry.kind, raw).to(out.dtype))

    def _read_into(self, raw: bytearray | memoryview, start: int) -> None:
        """Fill `raw` with the data from `start` on."""
        read_exactly(self.path, self.stamp, self.data_start + start, memoryview(raw))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def restore_patch(source: TensorSource, name: str) -> None:
    """Give the patch embedding `name` [C, in, 1, p, p] of a GGUF file its five dimensions back, where it has fewer.

    Known forms: the 1 left out [C, in, p, p], both channels in one [C * in, 1, p, p], and one row per output channel
    [C, in * p * p]. p is the released model's; C is the length of the bias.
    """
    bias = f"{name.removesuffix('weight')}bias"
    home = next((file for file in source.files if name in file.entries), None)
    if not isinstance(home, GGUFFile) or len(home.shape(name)) == 5 or bias not in source:
        return
    stored, patch = home.shape(name), LONGCAT_VIDEO.patch_size
    width = math.prod(source.shape(bias))
    channels, rest = divmod(math.prod(stored), max(1, width * math.prod(patch)))
    if rest or not channels or (len(stored) == 4 and stored[2:] != patch[1:]):
        raise CheckpointError(
            f"{home.path} stores {name} as {list(stored)}, which does not unfold to"
            f" [{width}, channels, {', '.join(map(str, patch))}]; use another conversion of the model"
        )
    home.entries[name] = replace(home.entries[name], shape=(width, channels, *patch))


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path} is a GGUF file; to read it, `pip install gguf`") from None
    return gguf


def _block(kind: str) -> tuple[int, int]:
    """(elements, bytes) of one block of a type."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def _dequantise(kind: str, raw: bytearray) -> Tensor:
    """The elements of whole blocks, flat: floats as they are, everything else fp32."""
    if kind in FLOATS:
        return torch.frombuffer(raw, dtype=FLOATS[kind])
    import gguf
    import numpy as np

    _, width = _block(kind)
    blocks = np.frombuffer(raw, dtype=np.uint8).reshape(-1, width)
    return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])).flatten()


class _Reader:
    """The header's values in order; CheckpointError at the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self._file = file

    def take(self, count: int) -> bytes:
        self._advance(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, 1)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(self.path, "a name in it is not text") from None

    def value(self, kind: int) -> Any:
        """A metadata value; None for an array that nothing here needs."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        raise _damaged(self.path, f"metadata of unknown type {kind}")

    def _array(self, kind: int, count: int) -> list[Any] | None:
        if kind in _SCALARS and count > _LONGEST_KEPT:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING and count > _LONGEST_KEPT:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _SCALARS or kind == _STRING:
            return [self.value(kind) for _ in range(count)]
        else:
            raise _damaged(self.path, f"metadata of unknown type {kind}")
        return None

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > MAX_HEADER:
            raise _damaged(self.path, f"it would be longer than {MAX_HEADER} bytes")
        if self.position > self.size:
            raise CheckpointError(
                f"{self.path} is cut short: {self.size} bytes, not even its GGUF header is whole; download it again"
            )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} has a damaged GGUF header ({reason}); download it again")


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, GGUFEntry]]:
    path = reader.path
    reader.skip(len(MAGIC))
    version = reader.number("I")
    if version not in VERSIONS:
        kind = "a big-endian GGUF file" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise CheckpointError(f"{path} is {kind}; only little-endian versions 2 and 3 are supported")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(pairs):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a GGUF model; join them with `llama-gguf-split --merge`"
        )
    if not tensors:
        raise CheckpointError(f"{path} is a GGUF file without tensors; download it again")
    entries: dict[str, GGUFEntry] = {}
    for _ in range(tensors):
        name = reader.text()
        if name in entries:
            raise _damaged(path, f"two tensors are called {name}")
        entries[name] = _entry(reader, name, metadata)
    return metadata, entries


def _entry(reader: _Reader, name: str, metadata: dict[str, Any]) -> GGUFEntry:
    count = reader.number("I")
    if count > MAX_DIMS:
        raise _damaged(reader.path, f"tensor {name} has {count} dimensions")
    shape = tuple(reader.number("Q") for _ in range(count))[::-1]
    kind, start = _kind(reader.path, name, reader.number("I")), reader.number("Q")
    elements, width = _block(kind)
    row = shape[-1] if shape else 1
    if row % elements:
        raise _damaged(reader.path, f"rows of {row} do not fill the {kind} blocks of tensor {name}")
    size = math.prod(shape)
    original = metadata.get(f"{ORIGINAL_SHAPE}{name}")
    if isinstance(original, list) and all(isinstance(n, int) and n > 0 for n in original):
        if math.prod(original) != size:
            raise _damaged(reader.path, f"tensor {name} is {list(shape)}, its original shape {original}")
        shape = tuple(original)
    return GGUFEntry(kind, shape, start, start + size // elements * width)


def _kind(path: Path, name: str, number: int) -> str:
    """The name of a tensor type; CheckpointError for one that the installed package cannot dequantise."""
    import gguf
    import numpy as np

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise CheckpointError(
            f"{path}: tensor {name} has type {number}, which the gguf package does not know; `pip install -U gguf`"
        ) from None
    try:
        if kind.name not in FLOATS:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: tensor {name} has type {kind.name}, which cannot be read; use a Q8_0, Q6_K or Q4_K file"
        ) from None
    return kind.name


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(path, f"alignment {alignment!r}")
    return alignment


def _check_data(path: Path, entries: dict[str, GGUFEntry], available: int, alignment: int) -> None:
    for name, entry in entries.items():
        if entry.start % alignment:
            raise _damaged(path, f"tensor {name} starts off the alignment of {alignment}")
    missing = max(entry.stop for entry in entries.values()) - available
    if missing > 0:
        raise CheckpointError(f"{path} is cut short: {missing} bytes are missing; download it again")


def _common_dtype(entries: dict[str, GGUFEntry]) -> torch.dtype:
    """The dtype of most elements; quantised types read as bf16."""
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts[entry.kind] += math.prod(entry.shape)
    return FLOATS.get(counts.most_common(1)[0][0], torch.bfloat16)
