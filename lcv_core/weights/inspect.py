"""What a checkpoint is, what it can do and what it needs, from headers alone: 54 GB are not read to be described."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lcv_core.config import DiTConfig, Native
from lcv_core.errors import CheckpointError
from lcv_core.miniature import find_model
from lcv_core.shapes import (
    BUCKETS,
    REFINE_LATENT_GROUP,
    REFINE_MULTIPLE,
    SIZE_MULTIPLE,
    TIME_FACTOR,
    bucket,
    ceil_to,
    latent_shape,
    num_latents,
    size_for_area,
    token_grid,
)
from lcv_core.weights.assemble import Assembly
from lcv_core.weights.checkpoint import Checkpoint, locate, open_checkpoint, open_text_encoder, open_vae
from lcv_core.weights.lora_keys import group
from lcv_core.weights.recognise import TITLES, kind_of, title
from lcv_core.weights.tensors import StateDict, TensorSource, TensorStore, dtype_name

Kind = Literal["official folder", "single file", "lora", "vae", "text encoder", "avatar", "unknown"]

_NEEDS = {
    "t2v": (),
    "i2v": (),
    "continue": (),
    "long": (),
    "refine": ("refinement",),
    "distilled": ("distill",),
}
_PURPOSE = {
    "dit": "every task",
    "vae": "turning latents into video, and images and clips into conditions",
    "text_encoder": "reading prompts",
    "tokenizer": "reading prompts",
    "refinement": "refine (720p): lora/refinement_lora.safetensors",
    "distill": "distilled sampling in 16 steps: lora/cfg_step_lora.safetensors",
}
_BF16 = 2  # bytes


@dataclass(frozen=True)
class Part:
    """One model on disk. dtypes: bytes of tensors by dtype or GGUF type, as stored. parameters: without scales."""

    name: str
    path: Path
    file_bytes: int
    parameters: int
    dtypes: dict[str, int]

    @property
    def bf16_bytes(self) -> int:
        return self.parameters * _BF16

    @property
    def stored_bytes(self) -> int:
        return sum(self.dtypes.values())


@dataclass(frozen=True)
class Adapter:
    """An adapter file. targets: modules it changes, by the names in the file; ranks: the different ones, ascending."""

    name: str
    path: Path
    file_bytes: int
    dialect: str
    targets: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes a task takes besides the weights, one sample, at the size the model is made for.

    kv_cache: of a continuation: n_c * S * C * 2 tensors * 2 bytes * depth (n_c condition latents of S tokens each).
    text_to_video, refine: activations, tokens * (12 C + 2 F) * 2 bytes with F the feed-forward width: the residual, two
        fp32 intermediates (2 units each) of modulation and gate, modulated input, q, k, v, rotated q and k, attention
        output, and the two feed-forward halves. A rough upper bound for unchunked layers; classifier-free guidance in
        one batch doubles it. refine: twice the frames at 2.25 times the area, as 480p is refined to 720p.
    """

    kv_cache: int
    text_to_video: int
    refine: int


@dataclass(frozen=True)
class Inspection:
    """Everything a person asks about a checkpoint.

    summary: one phrase, what it is. missing: what is absent -> what it is for. tasks: those it can do as it is.
    config, memory: None when there is no usable transformer.
    """

    path: Path
    kind: Kind
    summary: str
    config: DiTConfig | None = None
    native: Native = field(default_factory=Native)
    flow_shift: float | None = None
    parts: tuple[Part, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    memory: Memory | None = None

    @property
    def parameters(self) -> int:
        """Of all parts together."""
        return sum(part.parameters for part in self.parts)


def inspect_checkpoint(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Inspection:
    """Describe a checkpoint folder or any weights file; overrides as in `open_checkpoint`.

    What is recognised but cannot be used (an adapter, a VAE, an Avatar or another model) is described, not refused.
    Raises CheckpointError when files are missing or damaged, or config and weights disagree.
    """
    path = find_model(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix == ".pth":
        return _lone_vae(path)
    root, dit = locate(path)
    if dit is not None:
        source = TensorSource.open(dit)
        kind = kind_of(source)
        if kind == "lora":
            adapter = _adapter("adapter", dit)
            return Inspection(path, "lora", f"LoRA adapter, {adapter.dialect} names", adapters=(adapter,))
        if kind == "avatar":
            return Inspection(path, "avatar", TITLES["avatar"], parts=(_part("dit", dit, source),))
        if kind == "vae":
            return _lone_vae(dit)
        if kind == "text_encoder":
            return Inspection(path, "text encoder", "umT5 text encoder", parts=(_part("text_encoder", dit, source),))
        if kind == "other":
            return Inspection(path, "unknown", title(source), parts=(_part("dit", dit, source),))
    checkpoint = open_checkpoint(path, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    return _describe(checkpoint, "single file" if root is None else "official folder")


def _describe(checkpoint: Checkpoint, kind: Kind) -> Inspection:
    parts = []
    if checkpoint.dit is not None:
        parts.append(_part("dit", checkpoint.dit, checkpoint.dit_tensors))
    if checkpoint.vae is not None:
        parts.append(_part("vae", checkpoint.vae, open_vae(checkpoint.vae)[1]))
    if checkpoint.text_encoder is not None:
        parts.append(_part("text_encoder", checkpoint.text_encoder, open_text_encoder(checkpoint.text_encoder)[1]))
    absent = (*checkpoint.missing, *(name for name in ("refinement", "distill") if name not in checkpoint.adapters))
    whole = not checkpoint.missing
    config = None if checkpoint.dit is None else checkpoint.dit_config
    return Inspection(
        path=checkpoint.path,
        kind=kind,
        summary="LongCat-Video checkpoint" if config else "LongCat-Video checkpoint without its transformer",
        config=config,
        native=checkpoint.native,
        flow_shift=checkpoint.flow_shift,
        parts=tuple(parts),
        adapters=tuple(_adapter(name, file) for name, file in checkpoint.adapters.items()),
        missing={name: _PURPOSE[name] for name in absent},
        tasks=tuple(task for task, needs in _NEEDS.items() if whole and not set(needs) & set(absent)),
        memory=None if config is None else estimate_memory(config, checkpoint.native),
    )


def estimate_memory(config: DiTConfig, native: Native) -> Memory:
    """See `Memory` for what is counted and the formulas."""
    latents, per_frame = _tokens(config, native.num_frames, native.height, native.width)
    cond = num_latents(native.num_cond_frames)
    height, width = _refined_size(native)
    refined = num_latents(ceil_to(2 * native.num_frames - 1, TIME_FACTOR) + 1)
    _, refine_per_frame = _tokens(config, native.num_frames, height, width)
    unit = (12 * config.hidden_size + 2 * config.ffn_dim) * _BF16
    return Memory(
        kv_cache=cond * per_frame * config.hidden_size * 2 * _BF16 * config.depth,
        text_to_video=latents * per_frame * unit,
        refine=ceil_to(refined, REFINE_LATENT_GROUP) * refine_per_frame * unit,
    )


def _refined_size(native: Native) -> tuple[int, int]:
    """The 720p bucket of a 480p model; for one of another scale a size of the same proportion to its own."""
    height, width = native.height, native.width
    if (height, width) in {size for _, size in BUCKETS["480p", SIZE_MULTIPLE]}:
        return bucket("720p", height, width, multiple=REFINE_MULTIPLE)
    return size_for_area(height * width * 9 // 4, height, width, multiple=REFINE_MULTIPLE)


def _tokens(config: DiTConfig, num_frames: int, height: int, width: int) -> tuple[int, int]:
    """(latent frames, tokens per latent frame)."""
    frames, rows, columns = token_grid(latent_shape(num_frames, height, width)[1:], config.patch_size)
    return frames, rows * columns


def _lone_vae(path: Path) -> Inspection:
    tensors = open_vae(path)[1]
    return Inspection(path, "vae", "Wan 2.1 VAE", parts=(_part("vae", path, tensors),))


def _part(name: str, path: Path, tensors: TensorStore) -> Part:
    store = tensors.store if isinstance(tensors, Assembly) else tensors
    dtypes: dict[str, int] = {}
    for key in store.keys():  # noqa: SIM118  (a store is not a mapping)
        dtype, size = _storage(store, key)
        dtypes[dtype] = dtypes.get(dtype, 0) + size
    parameters = sum(math.prod(tensors.shape(key)) for key in tensors.keys())  # noqa: SIM118
    return Part(name, path, _file_bytes(path, store), parameters, dtypes)


def _storage(store: TensorStore, name: str) -> tuple[str, int]:
    """(dtype, bytes) of a tensor as stored."""
    if isinstance(store, TensorSource):
        return store.storage(name)
    dtype = store.dtype(name)
    return dtype_name(dtype), math.prod(store.shape(name)) * dtype.itemsize


def _file_bytes(path: Path, store: TensorStore) -> int:
    if isinstance(store, StateDict):
        return path.stat().st_size
    return sum(file.size for file in store.files) if isinstance(store, TensorSource) else 0


def _adapter(name: str, path: Path) -> Adapter:
    source = TensorSource.open(path)
    grouped = group(source)
    ranks = {source.shape(entry.down)[0] // max(1, len(entry.ups)) for entry in grouped.entries.values() if entry.down}
    size = _file_bytes(path, source)
    return Adapter(name, path, size, grouped.dialect, tuple(grouped.entries), tuple(sorted(ranks)))
