"""The KV cache: keys and values of condition frames, which neither noise nor text nor time changes.

Keys are kept after rope: condition frames come first, so their positions are the same in every forward. One entry
serves all samples whose condition it is, both branches of guidance among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.names import CachePlace, CacheStorage, check_name

KV = tuple[Tensor, Tensor]  # k (after k_norm and rope) and v, [B, H, n_c * S, D]

FP8 = torch.float8_e4m3fn
_TOKENS = 1024  # of fp8 that are in fp32 at once


class Stored(NamedTuple):
    """k or v of one layer, [B, n, H, D]; in fp8 with the scale of each head, fp32 [B, 1, H, 1]."""

    values: Tensor
    scale: Tensor | None

    def to(self, device: torch.device) -> Stored:
        scale = None if self.scale is None else self.scale.to(device, non_blocking=True)
        return Stored(self.values.to(device, non_blocking=True), scale)

    def copy_to(self, out: Tensor) -> None:
        """Into out [r * B, n, H, D], entry b to samples b, B + b, ...: so the branches of guidance lie in a batch."""
        batch = self.values.shape[0]
        for first in range(0, out.shape[0], batch):
            if self.scale is None:
                out[first : first + batch].copy_(self.values)
                continue
            for i in range(0, out.shape[1], _TOKENS):
                part = self.values[:, i : i + _TOKENS].float().mul_(self.scale)
                out[first : first + batch, i : i + _TOKENS].copy_(part)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


def store(x: Tensor, storage: CacheStorage, place: CachePlace) -> Stored:
    """x [B, n, H, D] of any strides as it is kept. fp8: the largest value of a head becomes 448, e4m3's largest."""
    scale = None
    if storage == "fp8":
        scale = x.abs().amax(dim=(1, 3), keepdim=True).float().clamp_(min=1e-12) / torch.finfo(FP8).max
        x = _in_fp8(x, scale)
    else:
        x = x.clone(memory_format=torch.contiguous_format)  # a view would keep alive what it is of
    return Stored(x, scale) if place == "device" else Stored(_on_cpu(x), None if scale is None else _on_cpu(scale))


def _in_fp8(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    for i in range(0, x.shape[1], _TOKENS):
        out[:, i : i + _TOKENS] = (x[:, i : i + _TOKENS].float() / scale).to(FP8)
    return out


def _on_cpu(x: Tensor) -> Tensor:
    """In system memory; from a GPU into pinned memory, which alone is copied while something else is computed."""
    if x.device.type == "cpu":
        return x
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return pinned.copy_(x)


class KVCache(Sequence[KV]):
    """Keys and values of every layer, appended layer by layer as they are made.

    storage: "model" keeps them in the dtype they are computed in, "fp8" in e4m3 with a scale for each head: half the
        memory, a relative error of about 2.6% in each value. place: "cpu" keeps them in system memory, pinned where
        there is a GPU; each layer's are brought in while the layer before computes.
    """

    def __init__(self, storage: CacheStorage = "model", place: CachePlace = "device") -> None:
        check_name("kv_cache storage", storage, CacheStorage)
        check_name("kv_cache place", place, CachePlace)
        self.storage: CacheStorage = storage
        self.place: CachePlace = place
        self._layers: list[tuple[Stored, Stored]] = []
        self._dtype = torch.float32
        self._incoming: _Incoming | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """The next layer's k (after rope) and v, [B, n, H, D]."""
        self._dtype = k.dtype
        self._layers.append((store(k, self.storage, self.place), store(v, self.storage, self.place)))

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> KV:  # type: ignore[override]  # a layer, never a slice
        """(k, v) of a layer where they are kept, in the dtype they were made in: [B, H, n, D] each."""
        k, v = (self._whole(stored) for stored in self._layers[layer])
        return k.transpose(1, 2), v.transpose(1, 2)

    def _whole(self, stored: Stored) -> Tensor:
        if stored.scale is None:
            return stored.values
        out = torch.empty(stored.values.shape, dtype=self._dtype, device=stored.values.device)
        stored.copy_to(out)
        return out

    @property
    def batch(self) -> int:
        """Conditions that are kept; 0 before the first layer."""
        return self._layers[0][0].values.shape[0] if self._layers else 0

    @property
    def num_tokens(self) -> int:
        return self._layers[0][0].values.shape[1] if self._layers else 0

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._layers)

    def layer(self, index: int) -> CachedLayer:
        return CachedLayer(self, index)

    def copy_to(self, layer: int, k: Tensor, v: Tensor) -> None:
        """A layer's keys and values into k and v [r * B, n, H, D], r samples for each condition."""
        kept = self._layers[layer]
        if kept[0].values.device != k.device:
            kept = self._brought_in(layer, k.device)
        for stored, out in zip(kept, (k, v)):
            stored.copy_to(out)

    def _brought_in(self, layer: int, device: torch.device) -> tuple[Stored, Stored]:
        if device.type != "cuda":
            k, v = self._layers[layer]
            return k.to(device), v.to(device)
        if self._incoming is None or self._incoming.device != device:
            self._incoming = _Incoming(self._layers, device)
        return self._incoming.take(layer)


class _Incoming:
    """Layers on their way to a GPU: the next one is copied on a stream of its own while the present one computes."""

    def __init__(self, layers: list[tuple[Stored, Stored]], device: torch.device) -> None:
        self.device = device
        self._layers = layers
        self._stream = torch.cuda.Stream(device)
        self._next: tuple[int, tuple[Stored, Stored], torch.cuda.Event] | None = None

    def take(self, layer: int) -> tuple[Stored, Stored]:
        """The layer, once it has arrived; the one after it sets out, after the last the first for the next forward."""
        coming = self._next if self._next is not None and self._next[0] == layer else self._send(layer)
        _, arrived, event = coming
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for stored in arrived:
            for x in stored:
                if x is not None:  # made on the other stream: not to be handed out again before this one has read it
                    x.record_stream(current)
        self._next = self._send((layer + 1) % len(self._layers))
        return arrived

    def _send(self, layer: int) -> tuple[int, tuple[Stored, Stored], torch.cuda.Event]:
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            k, v = self._layers[layer]
            on_device = k.to(self.device), v.to(self.device)
            event.record(self._stream)
        return layer, on_device, event


@dataclass(frozen=True)
class CachedLayer:
    """One layer of a cache, as a block is given it."""

    cache: KVCache
    index: int

    def copy_to(self, k: Tensor, v: Tensor) -> None:
        """Into k and v [B, n, H, D] of a batch."""
        self.cache.copy_to(self.index, k, v)

    def read(self, like: Tensor) -> KV:
        """k and v [B, H, n, D] for the samples of like [B, H, N, D], in its dtype and on its device."""
        B, H, _, D = like.shape
        k, v = like.new_empty(2, B, self.cache.num_tokens, H, D)
        self.copy_to(k, v)
        return k.transpose(1, 2), v.transpose(1, 2)


def check_cache(cache: KVCache, *, depth: int, tokens: int, batch: int, num_cond_latents: int) -> None:
    """InputError where the cache is not of `tokens` condition tokens in `depth` layers, or not for this batch."""
    if num_cond_latents < 1 or len(cache) != depth or cache.num_tokens != tokens:
        raise InputError(
            f"kv_cache must hold {depth} layers of {tokens} tokens for num_cond_latents={num_cond_latents},"
            f" got {len(cache)} layers of {cache.num_tokens}"
        )
    if batch % cache.batch:
        raise InputError(f"kv_cache has batch {cache.batch}, expected a divisor of the samples' {batch}")
