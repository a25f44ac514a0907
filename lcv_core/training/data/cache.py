"""Latents and text states, computed once: safetensors files named by what made them, read lazily.

A file's name is the hash of the clips in it, the VAE (or the text encoder) and how it was used. So an interrupted
cache is gone on with, a larger data set computes what is new, and a change of either model never meets old files.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.partial import fingerprint, save_atomic
from lcv_core.pipelines.base import to_pixels
from lcv_core.text.encoder import TextEncoder
from lcv_core.text.prompt import clean_prompt, tokenize
from lcv_core.training.data.sources import ClipSource
from lcv_core.training.events import Event, OnEvent
from lcv_core.vae.model import WanVAE
from lcv_core.vae.tiling import Tiling, encode_tiled

log = logging.getLogger("lcv_core")

_VERSION = 1  # of the files' contents
_TEXTS = 512  # captions per file
_OPEN_FILES = 256

Posterior = Literal["mode", "sample"]
Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workers:
    """Which process this is of how many: they share the work of filling a cache."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class LatentOptions:
    """posterior: "mode" keeps the VAE's mean, "sample" its spread too, so that training draws from the posterior.
    compute: the encoder's dtype. store: dtype on disk. batch: clips encoded at a time. tile: side in pixels of the
    tiles it works in; 0 is whole."""

    posterior: Posterior = "mode"
    compute: Precision = "fp32"
    store: Precision = "fp32"
    batch: int = 8
    tile: int = 0


@dataclass(frozen=True)
class Item:
    """A cached clip: row `row` of a file, clip `position` of part `part` of its source."""

    file: Path
    row: int
    name: str
    part: int
    position: int


def fill_latents(
    source: ClipSource,
    vae: WanVAE,
    vae_key: str,
    folder: Path,
    options: LatentOptions,
    *,
    on_bad_data: Literal["stop", "skip"],
    on_event: OnEvent,
    workers: Workers = Workers(),
) -> LatentCache:
    """Encode what is not there yet, and open it all.

    vae_key: fingerprint of the VAE. InputError for a clip that cannot be used, where bad data stops; where it is
    skipped, a warning names it, and again each time the cache is opened.
    """
    parts = source.parts()
    how = {"version": _VERSION, "vae": vae_key, "posterior": options.posterior, "store": options.store}
    if options.compute != "fp32":
        how["compute"] = options.compute
        vae = copy.deepcopy(vae).to(_DTYPES[options.compute])
    files = [folder / "latents" / f"{fingerprint({**how, 'clips': part.identity})}.safetensors" for part in parts]

    def make(index: int) -> None:
        _encode_part(source, index, vae, files[index], options, on_bad_data)

    _fill(files, make, "encoding clips", on_event, workers)
    return LatentCache(files, on_bad_data)


def _fill(files: Sequence[Path], make: Callable[[int], None], label: str, on_event: OnEvent, workers: Workers) -> None:
    """Make the missing files, each process its share, and wait until all are there."""
    missing = {index for index, file in enumerate(files) if not file.is_file()}

    def tell() -> None:
        done = sum(file.is_file() for file in files)  # by all processes
        on_event(Event("progress", label, done=done, total=len(files)))

    if missing:
        tell()
    # Shares of all files, not of the missing ones: processes do not look at the same moment.
    for index in range(workers.index, len(files), workers.count):
        if index in missing:
            make(index)
            missing.discard(index)
            tell()
    while missing:  # the others are at it; a barrier would time out
        time.sleep(0.5)
        missing = {index for index in missing if not files[index].is_file()}
        tell()


@torch.no_grad()
def _encode_part(
    source: ClipSource, index: int, vae: WanVAE, file: Path, options: LatentOptions, on_bad_data: str
) -> None:
    names: list[str] = []
    waiting: list[Tensor] = []
    encoded: list[Tensor] = []
    bad = ""

    def flush() -> None:
        if waiting:
            encoded.append(_encode(vae, torch.cat(waiting), options))
            waiting.clear()

    try:
        for clip in source.read(index):
            names.append(clip.name)
            waiting.append(to_pixels(clip.frames))
            if len(waiting) == options.batch:
                flush()
    except InputError as error:
        if on_bad_data == "stop":
            raise
        bad = str(error)
    flush()
    tensors: dict[str, Tensor] = {}
    if encoded:
        stacked = torch.cat(encoded).to(_DTYPES[options.store])
        tensors = dict(zip(("latents", "spread"), stacked.split(vae.config.z_dim, dim=1)))
    save_atomic(file, tensors, {"names": json.dumps(names), "bad": bad})


def _encode(vae: WanVAE, pixels: Tensor, options: LatentOptions) -> Tensor:
    """Pixels [B, 3, F, H, W] -> normalised latents fp32 [B, C, T, h, w]; with the posterior's spread [B, 2C, ...]."""
    if options.tile:
        mean, logvar = encode_tiled(vae, pixels, Tiling(options.tile, options.tile * 3 // 4))
    else:
        mean, logvar = vae.encode(pixels)
    latents = vae.normalize(mean)
    if options.posterior == "mode":
        return latents.cpu()
    # Normalising shifts and scales; a standard deviation is only scaled.
    zero = torch.zeros_like(mean)
    spread = vae.normalize(torch.exp(0.5 * logvar)) - vae.normalize(zero)
    return torch.cat([latents, spread], dim=1).cpu()


@lru_cache(maxsize=_OPEN_FILES)
def _opened(file: Path) -> Any:
    return safe_open(file, "pt")


class LatentCache:
    """The cached clips, read from disk one at a time.

    buckets: the items by latent size (T, h, w), in the order of the source. bad: what could not be used, by name.
    """

    def __init__(self, files: Sequence[Path], on_bad_data: Literal["stop", "skip"]) -> None:
        self.buckets: dict[tuple[int, int, int], list[Item]] = {}
        self.bad: list[str] = []
        for part, file in enumerate(files):
            self._add(part, file)
        if self.bad and on_bad_data == "stop":
            raise InputError(self.bad[0])
        for reason in self.bad:
            log.warning("left out: %s", reason)
        if not self.buckets:
            raise InputError("no clip can be used; the warnings above say why")

    def _add(self, part: int, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            names = json.loads(metadata["names"])
            if metadata.get("bad"):
                self.bad.append(metadata["bad"])
            if names:
                _, _, T, h, w = opened.get_slice("latents").get_shape()
                items = self.buckets.setdefault((T, h, w), [])
                items += [Item(file, row, name, part, row) for row, name in enumerate(names)]

    def __len__(self) -> int:
        return sum(len(items) for items in self.buckets.values())

    def items(self) -> Iterator[Item]:
        for items in self.buckets.values():
            yield from items

    def size(self, item: Item) -> tuple[int, int, int]:
        """(T, h, w) of its latents."""
        _, _, T, h, w = _opened(item.file).get_slice("latents").get_shape()
        return T, h, w

    def latents(self, item: Item) -> tuple[Tensor, Tensor | None]:
        """Normalised latents fp32 [C, T, h, w] and the posterior's spread, where that was kept."""
        file = _opened(item.file)
        spread = file.get_slice("spread")[item.row].float() if "spread" in file.keys() else None  # noqa: SIM118
        return file.get_slice("latents")[item.row].float(), spread


def fill_texts(
    captions: Iterable[str],
    encoder: Callable[[], TextEncoder],
    encoder_key: str,
    folder: Path,
    *,
    store: Precision = "fp32",
    on_event: OnEvent,
    workers: Workers = Workers(),
) -> TextCache:
    """Encode the captions that are not there yet, the empty one among them, and open them all.

    encoder: loads the text encoder; called when something is missing. encoder_key: its fingerprint.
    """
    cleaned = list(dict.fromkeys(["", *map(clean_prompt, captions)]))
    groups = [cleaned[i : i + _TEXTS] for i in range(0, len(cleaned), _TEXTS)]
    how = {"version": _VERSION, "text encoder": encoder_key, "store": store}
    files = [folder / "texts" / f"{fingerprint({**how, 'captions': group})}.safetensors" for group in groups]
    loaded: list[TextEncoder] = []

    def make(index: int) -> None:
        if not loaded:
            loaded.append(encoder())
        rows = encode_rows(loaded[0], groups[index])
        ends = torch.tensor([len(r) for r in rows]).cumsum(0)
        save_atomic(files[index], {"rows": torch.cat(rows).to(_DTYPES[store]), "ends": ends}, {})

    _fill(files, make, "encoding captions", on_event, workers)
    return TextCache(dict(zip(files, groups, strict=True)))


@torch.no_grad()
def encode_rows(encoder: TextEncoder, prompts: Sequence[str]) -> list[Tensor]:
    """The states [L, C] of the real tokens of each cleaned prompt, on the CPU.

    Padding goes only as far as the longest prompt of the batch: it is masked inside the encoder, and what the DiT reads
    beyond the text is zero whatever stood there.
    """
    rows: list[Tensor] = []
    for start in range(0, len(prompts), 64):
        ids, mask = tokenize(encoder.tokenizer, prompts[start : start + 64], encoder.max_length)
        lengths = mask.sum(dim=1).tolist()
        ids, mask = (x[:, : max(lengths)].to(encoder.device) for x in (ids, mask))
        states = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state.cpu()
        rows += [states[i, :length] for i, length in enumerate(lengths)]
    return rows


class TextCache:
    """The states of captions by their text, real tokens alone."""

    def __init__(self, groups: Mapping[Path, Sequence[str]]) -> None:
        self._where = {text: (file, i) for file, group in groups.items() for i, text in enumerate(group)}
        self._ends: dict[Path, list[int]] = {}

    def rows(self, caption: str) -> Tensor:
        """[L, C] fp32."""
        path, index = self._where[clean_prompt(caption)]
        file = _opened(path)
        if path not in self._ends:
            self._ends[path] = file.get_tensor("ends").tolist()
        ends = self._ends[path]
        return file.get_slice("rows")[ends[index - 1] if index else 0 : ends[index]].float()
