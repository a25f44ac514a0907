"""Bytes of a sampling run besides the model's own weights: its largest forward, what the loop holds, the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcv_core.config import BSAConfig, DiTConfig
from lcv_core.names import CachePlace, CacheStorage
from lcv_core.planning.sparse import Device, SparseKernels
from lcv_core.planning.transformer import FP32, forward_bytes, kv_cache_bytes, largest_weight
from lcv_core.shapes import token_grid
from lcv_core.text.encoder import MAX_LENGTH

# fp32 latents between two forwards: noise, image and mask, the state before and after a step, both branches, a preview.
_LATENTS = 8
# Of a KV cache in system memory: the present layer, the one on its way, and the last, which its stream still holds.
_LAYERS_ON_THE_WAY = 3


@dataclass(frozen=True)
class Sampling:
    """One run of the sampler.

    latents: (T, h, w) of the clip. batch: samples of one forward; with both branches of guidance in one, all of them.
    num_cond_latents: leading latent frames that are given. cached: they are held as a KV cache.
    conditions: how many of the batch differ in them.
    itemsize: bytes of the dtype it computes in.
    adapters: an adapter works beside the weights, not in them.
    weight_copies: copies of a layer's weight, in fp32, that are alive while the layer runs: what is cast, and what a
        host patches or brings in from elsewhere.
    cache_storage, cache_place: how and where the KV cache is kept. One in system memory has two or three layers on
        the device.
    sparse: what block sparse attention runs on.
    """

    latents: tuple[int, int, int]
    batch: int = 1
    num_cond_latents: int = 0
    cached: bool = True
    conditions: int = 1
    text_length: int = MAX_LENGTH
    itemsize: int = 2
    bsa: BSAConfig | None = None
    adapters: bool = False
    weight_copies: int = 0
    device: Device = "gpu"
    cache_storage: CacheStorage = "model"
    cache_place: CachePlace = "device"
    sparse: SparseKernels = "gather"

    @property
    def holds_cache(self) -> bool:
        return self.cached and self.num_cond_latents > 0

    def kv_cache(self, config: DiTConfig) -> int:
        """Bytes of the KV cache on the device; 0 without condition frames."""
        whole = self.kv_cache_kept(config)
        if self.cache_place == "device" or self.device == "cpu":
            return whole
        layers = min(config.depth, _LAYERS_ON_THE_WAY)
        return math.ceil(whole * layers / config.depth)

    def kv_cache_kept(self, config: DiTConfig) -> int:
        """Bytes of the KV cache wherever it is kept; 0 without condition frames."""
        if not self.holds_cache:
            return 0
        grid = token_grid(self.latents, config.patch_size)
        itemsize = 1 if self.cache_storage == "fp8" else self.itemsize
        scales = 2 * config.depth * config.num_heads * FP32 if self.cache_storage == "fp8" else 0
        return self.conditions * (kv_cache_bytes(config, grid, self.num_cond_latents, itemsize) + scales)

    def activations(self, config: DiTConfig) -> int:
        """Most bytes alive at once besides weights and KV cache. InputError where the patches do not divide the latents
        or the condition frames are all there is."""
        grid = token_grid(self.latents, config.patch_size)
        n_c = self.num_cond_latents
        forward = self._forward(config, grid[0] - (n_c if self.cached else 0), grid, self.batch, n_c, self.text_length)
        if self.holds_cache:
            forward = max(forward, self._forward(config, n_c, grid, self.conditions, 0, 0))  # the cache is made
        latents = self.batch * config.in_channels * math.prod(self.latents) * FP32
        text = 2 * self.batch * self.text_length * config.caption_channels * FP32  # of both branches
        return forward + _LATENTS * latents + text + self.weight_copies * largest_weight(config) * FP32

    def _forward(
        self, config: DiTConfig, frames: int, grid: tuple[int, int, int], batch: int, n_c: int, text_length: int
    ) -> int:
        return forward_bytes(
            config, (frames, *grid[1:]), batch=batch, num_cond_latents=n_c, cached=self.holds_cache and n_c > 0,
            text_length=text_length, itemsize=self.itemsize, bsa=self.bsa, adapters=self.adapters, device=self.device,
            sparse=self.sparse,
        )  # fmt: skip
