"""A transformer from one form into another, tensor by tensor: read, converted, measured, written, forgotten."""

from __future__ import annotations

import csv
import errno
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lcv_core.config import read_json
from lcv_core.errors import CheckpointError, InputError
from lcv_core.files import prepare_target, remove_leftovers, replace_folder, replacing, temporary_path, write_error
from lcv_core.names import check_name
from lcv_core.quant.formats import BY_ROW, Quantised, dequantise, kind_for, quantise, spans, stack
from lcv_core.weights.assemble import Assembly
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint
from lcv_core.weights.infer import infer_dit_config
from lcv_core.weights.quantised import KINDS, is_large
from lcv_core.weights.stream import NAMES, Slot, write_gguf, write_safetensors
from lcv_core.weights.tensors import TensorSource
from lcv_core.weights.write import write_json

log = logging.getLogger("lcv_core")

Form = Literal["bf16", "fp8", "int8", "q8_0", "q5_k", "q4_k"]
Rest = Literal["bf16", "source"]
Device = torch.device | str

SHARD_BYTES = 10_000_000_000
STEM = "diffusion_pytorch_model"
ARCHITECTURE = "longcat_video"
_GGUF_FILE_TYPES = {"bf16": 32, "q8_0": 7, "q5_k": 16, "q4_k": 14}  # general.file_type, as llama.cpp numbers them
_BESIDE = ("vae", "text_encoder", "tokenizer", "lora", "scheduler", "model_index.json")
_OTHER_FILES = (".pt", ".pth", ".ckpt", ".bin", ".sft", ".csv", ".json")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Row:
    """What became of a weight. error: RMS of the difference over RMS of the weight. note: where it is not as asked."""

    name: str
    shape: tuple[int, ...]
    source: str
    kind: str
    nbytes: int
    error: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All weights in the order of the file. source_bytes, nbytes: of the tensors before and after."""

    target: Path
    rows: tuple[Row, ...]
    source_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def worst(self) -> list[Row]:
        return sorted(self.rows, key=lambda row: -row.error)

    def write_csv(self, path: Path) -> None:
        """All of them, worst first; InputError where it cannot be written."""
        try:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["name", "shape", "source", "kind", "bytes", "relative_error", "note"])
                for row in self.worst:
                    shape = "x".join(map(str, row.shape))
                    writer.writerow([row.name, shape, row.source, row.kind, row.nbytes, f"{row.error:.6g}", row.note])
        except OSError as error:
            raise write_error(path, error) from None


@dataclass(frozen=True)
class _Item:
    """One weight: quantised in `kind`, or plain in `dtype`."""

    name: str
    shape: tuple[int, ...]
    kind: str | None
    dtype: torch.dtype
    note: str = ""

    @property
    def slots(self) -> list[Slot]:
        """The tensors that it is in a file. int8 has the official names, fp8 those of ComfyUI's scaled files."""
        module, rows = self.name.removesuffix(".weight"), self.shape[0] if self.shape else 1
        if self.kind is None:
            return [Slot(self.name, NAMES[self.dtype], self.shape)]
        if self.kind == "int8":
            return [Slot(f"{module}.weight_int8", "I8", self.shape), Slot(f"{module}.weight_scale", "F32", (rows,))]
        if self.kind == "fp8":
            return [Slot(self.name, "F8_E4M3", self.shape), Slot(f"{module}.scale_weight", "F32", (rows, 1))]
        return [Slot(self.name, self.kind, self.shape)]


@dataclass
class _Job:
    checkpoint: Checkpoint
    target: Path
    form: Form
    items: list[_Item]
    device: Device
    on_tensor: Callable[[int, int], None] | None
    rows: list[Row] = field(default_factory=list)

    @property
    def tensors(self) -> Assembly:
        return self.checkpoint.dit_tensors

    @property
    def source(self) -> TensorSource:
        store = self.tensors.store
        assert isinstance(store, TensorSource)
        return store

    @property
    def gguf(self) -> bool:
        if _is_file(self.target):
            return self.target.suffix == ".gguf"
        return self.form in KINDS and KINDS[self.form] not in BY_ROW

    @property
    def brings(self) -> bool:
        """Whether the other parts of a checkpoint go along."""
        return not _is_file(self.target) and (self.checkpoint.path / "vae").is_dir()

    @property
    def metadata(self) -> dict[str, Any]:
        if not self.gguf:
            return {"format": "pt", "weights": self.form}
        return {
            "general.architecture": ARCHITECTURE, "general.quantization_version": 2,
            "general.file_type": _GGUF_FILE_TYPES[self.form],
        }  # fmt: skip

    def slots(self) -> list[Slot]:
        return [slot for item in self.items for slot in item.slots]


def convert(
    source: str | Path,
    target: str | Path,
    form: Form,
    *,
    rest: Rest = "bf16",
    overwrite: bool = False,
    device: Device = "cpu",
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the transformer of a checkpoint in another form, all or nothing, and say how far each weight is off.

    source: what `open_checkpoint` takes: a folder or file in any dialect, quantised or not. Weights that have the kind
        already are copied bit for bit.
    target: FILE.safetensors (bf16, fp8, int8); FILE.gguf (bf16, q8_0, q5_k, q4_k); or a folder, which gets config.json,
        safetensors in shards of `shard_bytes` with an index, or one GGUF file. Where the source is a folder with all
        parts, the new folder has them too: other parts as hard links where the disk allows, else copied.
    rest: dtype of what is not quantised: "bf16", in which the released model runs, or that of the source. GGUF files
        have norms and biases in fp32.
    device: where it is computed; the search of the K types gains from a GPU. on_tensor: (weights done, weights in all).
    Memory: one weight as it is read, and a piece of it in work. InputError and CheckpointError name what to do about a
    target that exists, a disk that is or gets full, and a source that is damaged or changes meanwhile.
    """
    check_name("the form", form, Form)
    check_name("rest", rest, Rest)
    checkpoint, target = open_checkpoint(source), Path(target).expanduser()
    checkpoint.require("dit")
    _check_suffix(target, form)
    job = _Job(checkpoint, target, form, [], device, on_tensor)
    job.items = _plan(job.tensors, form, rest, gguf=job.gguf)
    if _is_file(target) and infer_dit_config(job.tensors, str(source)) != checkpoint.dit_config:
        raise InputError(f"the config of {source} says more than a single file can; name a folder instead of {target}")
    _check_target(job, overwrite)
    prepare_target(target)
    _check_room(job)
    stamps = _stamps(job.source)
    remove_leftovers(target)
    try:
        if _is_file(target):
            with replacing(target) as temporary:
                _write_file(job, temporary)
                _check_unchanged(stamps)
        else:
            _write_folder(job, shard_bytes, stamps)
    except OSError as error:
        raise _failed(target, error) from None
    return Report(target, tuple(job.rows), job.source.nbytes)


def _is_file(target: Path) -> bool:
    return target.suffix in (".safetensors", ".gguf")


def _check_suffix(target: Path, form: Form) -> None:
    k_type = form in KINDS and KINDS[form] not in BY_ROW
    if target.suffix == ".gguf" and form in ("fp8", "int8"):
        raise InputError(f"GGUF has no {form}; name a .safetensors file or a folder, or convert to q8_0")
    if target.suffix == ".safetensors" and k_type:
        raise InputError(f"{form} is written as GGUF; name a .gguf file or a folder")
    if target.suffix in _OTHER_FILES:
        raise InputError(f"{target.suffix} files are not written; use .safetensors, .gguf or a folder")


def _plan(tensors: Assembly, form: Form, rest: Rest, *, gguf: bool) -> list[_Item]:
    items = []
    for name in tensors.keys():  # noqa: SIM118
        shape = tensors.shape(name)
        plain = torch.bfloat16 if rest == "bf16" or form == "bf16" else _source_dtype(tensors, name)
        if gguf and len(shape) < 2:
            plain = torch.float32
        kind, note = None, ""
        if form in KINDS and is_large(name):
            columns = tensors.shape(name)[1]
            kind = kind_for(KINDS[form], columns)
            note = "" if kind == KINDS[form] else f"rows of {columns} do not fill {KINDS[form]} blocks"
        items.append(_Item(name, shape, kind, plain, note))
    return items


def _source_dtype(tensors: Assembly, name: str) -> torch.dtype:
    """That of a plain weight; bf16 for a quantised one."""
    if any(tensors.kinds(name)) or any(piece.scale for piece in tensors.pieces[name]):
        return torch.bfloat16
    return tensors.dtype(name)


def _check_target(job: _Job, overwrite: bool) -> None:
    target = job.target
    places = {file.path.resolve() for file in job.source.files}
    if any(target.resolve() in (place, *place.parents) for place in places):
        raise InputError(f"{target} is where the source is; choose another place")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{target} exists; choose another place, or ask for overwrite")
    if _is_file(target) != target.is_file():
        raise InputError(f"{target} is a {'folder' if target.is_dir() else 'file'}; choose another place")
    if target.is_dir() and not any((target / name).is_file() for name in ("config.json", "model_index.json")):
        raise InputError(f"{target} is not a checkpoint, so it is not overwritten; empty it first")


def _check_room(job: _Job) -> None:
    needed = sum(slot.nbytes for slot in job.slots())
    if job.brings and job.checkpoint.path.stat().st_dev != job.target.parent.stat().st_dev:
        files = [file for name in _BESIDE for file in (job.checkpoint.path / name).rglob("*")]
        needed += sum(file.stat().st_size for file in files)  # copied, as another disk takes no links
    free = shutil.disk_usage(job.target.parent).free
    if needed > free:
        raise InputError(
            f"{job.target} takes {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; free some space, or"
            " choose another place"
        )


def _failed(target: Path, error: OSError) -> InputError:
    if error.errno in _FULL:
        return InputError(f"no room left on the disk for {target}; nothing was kept, free some space and convert again")
    return write_error(target, error)


def _stamps(source: TensorSource) -> dict[Path, tuple[int, int]]:
    return {file.path: _stamp(file.path) for file in source.files}


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (-1, -1)
    return stat.st_size, stat.st_mtime_ns


def _check_unchanged(stamps: dict[Path, tuple[int, int]]) -> None:
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise CheckpointError(f"{path} changed while it was converted; nothing was written, convert it again")


def _write_file(
    job: _Job, path: Path, slots: list[Slot] | None = None, tensors: Iterator[Tensor] | None = None
) -> None:
    write = write_gguf if job.gguf else write_safetensors
    try:
        write(path, job.slots() if slots is None else slots, _stream(job) if tensors is None else tensors, job.metadata)
    except OSError as error:
        raise _failed(job.target, error) from None


def _write_folder(job: _Job, shard_bytes: int, stamps: dict[Path, tuple[int, int]]) -> None:
    target = job.target
    new = temporary_path(target)
    try:
        dit = new / "dit" if job.brings else new
        dit.mkdir(parents=True)
        _write_config(job.checkpoint, dit / "config.json")
        _write_shards(job, dit, shard_bytes)
        if job.brings:
            _bring(job.checkpoint.path, new)
        _check_unchanged(stamps)
        replace_folder(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_config(checkpoint: Checkpoint, path: Path) -> None:
    """The source's own, with what it has that we do not read; from the shapes where it has none."""
    source = checkpoint.require("dit") / "config.json"
    write_json(path, read_json(source) if source.is_file() else checkpoint.dit_config.to_dict())


def _write_shards(job: _Job, folder: Path, shard_bytes: int) -> None:
    tensors = _stream(job)
    if job.gguf:
        _write_file(job, folder / f"{STEM}.gguf", tensors=tensors)
        return
    shards: list[list[Slot]] = [[]]
    for item in job.items:
        slots = item.slots  # a weight and its scale stay together
        if shards[-1] and sum(slot.nbytes for slot in (*shards[-1], *slots)) > shard_bytes:
            shards.append([])
        shards[-1] += slots
    if len(shards) == 1:
        _write_file(job, folder / f"{STEM}.safetensors", shards[0], tensors)
        return
    names = [f"{STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, slots in zip(names, shards, strict=True):
        _write_file(job, folder / name, slots, tensors)
    total = sum(slot.nbytes for slot in job.slots())
    weight_map = {slot.name: name for name, slots in zip(names, shards, strict=True) for slot in slots}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{STEM}.safetensors.index.json", index)


def _bring(source: Path, target: Path) -> None:
    """The other parts of a checkpoint: hard links, or copies where there can be none."""
    for name in _BESIDE:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, target / name, copy_function=_link)
        elif path.is_file():
            _link(path, target / name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _stream(job: _Job) -> Iterator[Tensor]:
    """The tensors of all slots in order; adds a row for each weight."""
    for done, item in enumerate(job.items, start=1):
        try:
            values, error = _quantised(job, item) if item.kind else _plain(job, item)
        except OSError as failure:
            raise CheckpointError(
                f"the source cannot be read ({failure.strerror or failure}); nothing was written"
            ) from None
        size = sum(slot.nbytes for slot in item.slots)
        kind = item.kind or NAMES[item.dtype]
        job.rows.append(Row(item.name, item.shape, _stored(job.tensors, item.name), kind, size, error, item.note))
        yield from values
        del values
        if job.on_tensor is not None:
            job.on_tensor(done, len(job.items))


def _stored(tensors: Assembly, name: str) -> str:
    store = tensors.store
    assert isinstance(store, TensorSource)
    return "+".join(dict.fromkeys(kind or store.storage(piece.source)[0] for kind, piece in
                                  zip(tensors.kinds(name), tensors.pieces[name], strict=True)))  # fmt: skip


def _quantised(job: _Job, item: _Item) -> tuple[list[Tensor], float]:
    parts, sums = [], Counter[str]()
    assert item.kind is not None
    for i, stored in enumerate(job.tensors.kinds(item.name)):
        if stored == item.kind:
            parts.append(job.tensors.quantised(item.name, i, job.device))
            continue
        weight = job.tensors.read_part(item.name, i, job.device)
        try:
            parts.append(quantise(item.kind, weight))
        except InputError as error:
            raise CheckpointError(f"{item.name}: {error}") from None
        _add_error(sums, weight, parts[-1])
    q = stack(parts)
    scale = [] if q.scale is None else [q.scale]
    return [q.data, *scale], _relative(sums)


def _plain(job: _Job, item: _Item) -> tuple[list[Tensor], float]:
    sums, parts = Counter[str](), []
    for i in range(len(job.tensors.pieces[item.name])):
        weight = job.tensors.read_part(item.name, i)
        parts.append(weight.to(item.dtype))
        _add_error(sums, weight, parts[-1])
    return [parts[0] if len(parts) == 1 else torch.cat(parts)], _relative(sums)


def _add_error(sums: Counter[str], weight: Tensor, other: Tensor | Quantised) -> None:
    """Add the squares of a weight, and of its difference from what it became, piece by piece."""
    flat = weight.reshape(len(weight), -1) if weight.dim() > 1 else weight.reshape(1, -1)
    for a, b in spans(*flat.shape):
        now = dequantise(other, a, b) if isinstance(other, Quantised) else other.reshape(flat.shape)[a:b].float()
        before = flat[a:b].float()
        sums["weight"] += _squares(before)  # type: ignore[assignment]
        sums["error"] += _squares(now - before)  # type: ignore[assignment]


def _squares(x: Tensor) -> float:
    """Their sum, added in fp64 without a copy in it."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def _relative(sums: Counter[str]) -> float:
    return math.sqrt(sums["error"] / sums["weight"]) if sums["weight"] else 0.0
