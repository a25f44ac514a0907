"""LongCat-Video's diffusion transformer. Attribute names are the official checkpoint's names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.config import BSAConfig, DiTConfig
from lcv_core.dit.attention import BACKENDS, Attend, check_eight_bits, resolve_backend, takes_bias
from lcv_core.dit.block import Block, Lean, Sequence3D, make_room
from lcv_core.dit.compiled import Backend, CompiledBlocks, check_compiler
from lcv_core.dit.embed import (
    CaptionEmbed,
    FinalLayer,
    PatchEmbed,
    TimestepEmbed,
    num_pads_as_one,
    pads_as_one,
    unpatchify,
)
from lcv_core.dit.frames import share_timesteps
from lcv_core.dit.kernels import resolve_kernels
from lcv_core.dit.kv_cache import KVCache, check_cache
from lcv_core.dit.rope import rope_table
from lcv_core.dit.step_cache import Branch
from lcv_core.errors import InputError
from lcv_core.names import CachePlace, CacheStorage, Compile, check_name
from lcv_core.shapes import ceil_to, token_grid

log = logging.getLogger("lcv_core")


class BlocksInTurn(Protocol):
    """Blocks that are there while it is their turn: `lcv_core.offload.turns`."""

    def __iter__(self) -> Iterator[nn.Module]: ...
    def free_resident(self) -> None: ...
    def close(self) -> None: ...


class LongCatDiT(nn.Module):
    """Predicts the velocity x0 - noise of noisy latents.

    operations: namespace with Linear, Conv3d, LayerNorm and RMSNorm, each of which computes in the dtype of its
        input; default `lcv_core.layers`.
    device, dtype: where and how the parameters are made ("meta" for lazy loading).
    compute_dtype: of the activations; None: that of the parameters. Training in bf16 keeps fp32 parameters, which every
        layer casts to what it is given; the fp32 islands then see them unrounded.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        config: DiTConfig | None = None,
        *,
        operations: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or DiTConfig()
        ops = layers if operations is None else operations
        factory = {"device": device, "dtype": dtype}
        self.x_embedder = PatchEmbed(config, ops, **factory)
        self.t_embedder = TimestepEmbed(config, ops, **factory)
        self.y_embedder = CaptionEmbed(config, ops, **factory)
        self.blocks = nn.ModuleList(Block(config, ops, **factory) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, ops, **factory)
        self._attention: str | Attend = "sdpa"
        self._kernels = "auto"
        self._compiled: CompiledBlocks | None = None
        self._cache_storage: CacheStorage = "model"
        self._cache_place: CachePlace = "device"
        self._in_turn: BlocksInTurn | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: unless one was set, that of the patch embedding, which no quantisation touches."""
        return self.compute_dtype or self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    def set_attention(self, backend: str | Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Choose the attention backend by name (see `lcv_core.dit.attention`), or give a function for q, k, v.

        Raises InputError at once when the backend cannot be used on the model's device and dtype.
        """
        if isinstance(backend, str) and (backend not in BACKENDS or self.device.type != "meta"):
            resolve_backend(backend, device=self.device, dtype=self.dtype, head_dim=self.config.head_dim)
        self._attention = backend

    def set_kernels(self, name: str) -> None:
        """Choose by name what computes norms, rope and gates where no gradient is needed (see `lcv_core.dit.kernels`).

        Raises InputError at once when they cannot be used on the model's device.
        """
        resolve_kernels(name, self.device)
        self._kernels = name

    def set_compile(self, what: Compile, *, mode: str | None = None, backend: Backend = "inductor") -> None:
        """Whether "blocks" go through torch.compile where no gradient is needed, or nothing does: "off".

        mode, backend: see `lcv_core.dit.compiled`. The first forward of each shape takes a minute or so longer. Raises
        InputError at once where there is no compiler for the model's device.
        """
        check_name("compile", what, Compile)
        if what == "blocks":
            check_compiler(self.device, mode, backend)
        self._compiled = CompiledBlocks(mode, backend) if what == "blocks" else None

    def set_kv_cache(self, *, storage: CacheStorage = "model", place: CachePlace = "device") -> None:
        """How `build_kv_cache` keeps keys and values from now on: see `KVCache`. Raises InputError for other names."""
        KVCache(storage, place)
        self._cache_storage, self._cache_place = storage, place

    @property
    def cache_storage(self) -> CacheStorage:
        """How `build_kv_cache` keeps keys and values."""
        return self._cache_storage

    @property
    def cache_place(self) -> CachePlace:
        """Where `build_kv_cache` keeps them."""
        return self._cache_place

    def set_streaming(self, in_turn: BlocksInTurn | None) -> None:
        """Take the blocks from what makes each of them ready for its turn, once for every forward; None: all of them
        are ready. No gradient is kept with it."""
        self._in_turn = in_turn

    def free_resident_blocks(self) -> None:
        """Of a streamed model also the blocks that stay on the device come to it in turn from now on."""
        if self._in_turn is not None:
            self._in_turn.free_resident()

    def stop_streaming(self) -> None:
        """End the thread that reads ahead, if there is one; a streamed model cannot be run after that."""
        if self._in_turn is not None:
            self._in_turn.close()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        num_cond_latents: int = 0,
        kv_cache: KVCache | None = None,
        bsa: BSAConfig | None = None,
        step_cache: Branch | None = None,
    ) -> Tensor:
        """Velocity, fp32 [B, out_channels, T, H, W], of latents [B, in_channels, T, H, W].

        timestep: [B], or [B, T] per latent frame, in [0, 1000]; condition frames have 0.
        text: encoder states [B, L, caption_channels] (or [B, 1, L, caption_channels]); text_mask [B, L], 0 at padding.
        num_cond_latents: leading clean frames; they attend to themselves alone and read no text. With kv_cache
            (from `build_kv_cache`) they are not in `latents`, and timestep covers the noise frames only.
        bsa: block sparse self-attention with these settings; None is dense.
        step_cache: decides whether the blocks after the first are run or what they added before is reused.
        """
        self._validate(latents, timestep, text, text_mask, num_cond_latents, kv_cache)
        states, bias = self._embed_text(text.to(latents.device), text_mask)
        return self._run(
            latents, timestep, states, num_cond_latents, kv_cache, bsa, text_bias=bias, step_cache=step_cache
        )

    @torch.no_grad()
    def build_kv_cache(self, cond_latents: Tensor, bsa: BSAConfig | None = None) -> KVCache:
        """k (after rope) and v of every layer, of clean condition latents [B, C, n_c, H, W].

        Condition tokens see neither noise nor text, so the cache holds for every step, prompt and CFG branch. bsa: as
        in the forwards that will use it. How it is kept: `set_kv_cache`.
        """
        if cond_latents.dim() != 5 or cond_latents.shape[1] != self.config.in_channels or cond_latents.shape[2] < 1:
            raise InputError(
                f"cond_latents must be [B, {self.config.in_channels}, T >= 1, H, W], got {list(cond_latents.shape)}"
            )
        cache = KVCache(self._cache_storage, self._cache_place)
        zeros = torch.zeros(cond_latents.shape[0], device=cond_latents.device)
        self._run(cond_latents, zeros, None, 0, None, bsa, keep=cache)
        return cache

    def _run(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | Sequence[Tensor] | None,
        num_cond_latents: int,
        kv_cache: KVCache | None,
        bsa: BSAConfig | None,
        keep: KVCache | None = None,
        text_bias: Tensor | None = None,
        step_cache: Branch | None = None,
    ) -> Tensor:
        config = self.config
        x = self.x_embedder(latents.to(self.dtype))
        grid = token_grid((latents.shape[2], latents.shape[3], latents.shape[4]), config.patch_size)
        seq = self._sequence(grid, num_cond_latents, kv_cache is not None, bsa, x, text_bias)
        timestep = self._per_frame(timestep.to(latents.device), grid[0])
        if self._keeps_gradients(x, text):
            if self._in_turn is not None:
                raise InputError('a streamed model keeps no gradients; load it with streaming="off", or use no_grad')
            if step_cache is not None:
                raise InputError("step caching writes over what a backward pass needs; run it in torch.no_grad()")
            tau = self.t_embedder(timestep.flatten()).unflatten(0, (-1, grid[0]))
        else:
            x = x.contiguous()  # it is what all blocks write to
            tau, seq = self._lean(x, timestep, seq, kv_cache)

        def head(x: Tensor) -> Tensor:
            return unpatchify(self.final_layer(x, tau, seq.lean), grid, config.patch_size)

        for i, block in enumerate(self._blocks_in_turn()):
            x = block(x, tau, text, seq, None if kv_cache is None else kv_cache.layer(i), keep)
            if i == 0 and step_cache is not None and step_cache.reuse(x, seq.num_cond_tokens, head):
                break  # no other block is asked for
        else:
            if step_cache is not None:
                step_cache.keep(x)
        return head(x)

    def _blocks_in_turn(self) -> Iterable[nn.Module]:
        return self.blocks if self._in_turn is None else self._in_turn

    def _keeps_gradients(self, x: Tensor, text: Tensor | Sequence[Tensor] | None) -> bool:
        """Whether a backward pass may follow. Tensors without data go its way too: they have no timesteps to share."""
        if x.is_meta:
            return True
        given = [] if text is None else [text] if isinstance(text, Tensor) else list(text)
        learns = any(t.requires_grad for t in (x, *given)) or any(p.requires_grad for p in self.parameters())
        return torch.is_grad_enabled() and learns

    def _lean(
        self, x: Tensor, timestep: Tensor, seq: Sequence3D, kv_cache: KVCache | None
    ) -> tuple[Tensor, Sequence3D]:
        """tau [1, R, A] of the distinct timesteps, and the sequence with what blocks need to write over x [B, N, C]."""
        distinct, frames = share_timesteps(timestep, seq.frame_tokens)
        room = None
        if _wants_room(x, kv_cache, self.blocks[0]):
            room = make_room(x, seq.rope.shape[0], self.config.num_heads)
        kernels = resolve_kernels(self._kernels, x.device, compiled=self._compiled is not None)
        lean = Lean(kernels, frames, room, self._compiled)
        return self.t_embedder(distinct).unsqueeze(0), replace(seq, lean=lean)

    def _sequence(
        self,
        grid: tuple[int, int, int],
        num_cond_latents: int,
        cached: bool,
        bsa: BSAConfig | None,
        x: Tensor,
        text_bias: Tensor | None,
    ) -> Sequence3D:
        if cached:
            grid = (grid[0] + num_cond_latents, *grid[1:])
        if self._attention == "bsa" and bsa is None:
            bsa = self.config.bsa
        if bsa is not None and bsa.eight_bits:
            check_eight_bits(x.device, self.dtype, self.config.head_dim)
        rope = rope_table(grid, self.config.head_dim, x.device)
        return Sequence3D(grid, num_cond_latents, cached, rope, self._attend(x.device), bsa, text_bias)

    def _attend(self, device: torch.device) -> Attend:
        if not isinstance(self._attention, str):
            return self._attention
        return resolve_backend(self._attention, device=device, dtype=self.dtype, head_dim=self.config.head_dim)

    def _per_frame(self, timestep: Tensor, frames: int) -> Tensor:
        """[B] or [B, T] -> [B, T], as the network sees them."""
        if self.config.timestep_precision == "model":
            # The released model feeds bf16 timesteps: multiples of 4 above 512. Part of its behaviour.
            timestep = timestep.to(self.dtype)
        return timestep[:, None].expand(-1, frames) if timestep.dim() == 1 else timestep

    def _embed_text(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor | list[Tensor], Tensor | None]:
        """Project the text; with zero padding pads become zero rows that stay in, otherwise pads are dropped.

        Also the bias of the scores of cross-attention, where one row stands for many pads.
        """
        if text.dim() == 4:
            text = text.squeeze(1)
        if mask is None:
            return self.y_embedder(text.to(self.dtype)), None
        mask = mask.to(text.device)
        length = self._rows_to_read(mask)
        y = self.y_embedder(text[:, :length].to(self.dtype))
        if not self.config.text_tokens_zero_pad:
            return [rows[keep.bool()].unsqueeze(0) for rows, keep in zip(y, mask, strict=True)], None
        y = y * mask[:, :length].to(y.dtype).unsqueeze(-1)
        return (y, None) if length == mask.shape[1] else pads_as_one(y, mask.shape[1] - length)

    def _rows_to_read(self, mask: Tensor) -> int:
        """How many rows of the text [B, L] have to be computed: all, unless what follows is pads of every sample and
        the attention takes a bias with which one of them stands for all."""
        total = mask.shape[1]
        if not self.config.text_tokens_zero_pad or not takes_bias(self._attend(mask.device)):
            return total
        used = (mask != 0).any(dim=0).nonzero()
        longest = int(used.max()) + 1 if len(used) else 0
        added = num_pads_as_one(self.dtype)
        rows = ceil_to(longest + added, 8)  # whole vectors, and few different lengths to compile for
        return rows - added if rows < total else total

    def _validate(
        self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None, n_c: int, cache: KVCache | None
    ) -> None:
        config = self.config
        if latents.dim() != 5 or latents.shape[1] != config.in_channels:
            raise InputError(f"latents must be [B, {config.in_channels}, T, H, W], got {list(latents.shape)}")
        B, T = latents.shape[0], latents.shape[2]
        if timestep.shape not in ((B,), (B, T)):
            raise InputError(f"timestep must be [{B}] or [{B}, {T}], got {list(timestep.shape)}")
        rows = text.squeeze(1) if text.dim() == 4 and text.shape[1] == 1 else text
        if rows.dim() != 3 or rows.shape[0] != B or rows.shape[2] != config.caption_channels:
            raise InputError(f"text must be [{B}, L, {config.caption_channels}], got {list(text.shape)}")
        if mask is not None and mask.shape != rows.shape[:2]:
            raise InputError(f"text_mask must be {list(rows.shape[:2])}, got {list(mask.shape)}")
        if mask is not None and not config.text_tokens_zero_pad and not mask.bool().any(dim=1).all():
            raise InputError("text_mask hides every token of a sample; keep at least its eos token")
        if cache is None:
            if not 0 <= n_c < T:
                raise InputError(f"num_cond_latents must be in [0, {T - 1}] for {T} latent frames, got {n_c}")
            return
        tokens = n_c * (latents.shape[3] // config.patch_size[1]) * (latents.shape[4] // config.patch_size[2])
        check_cache(cache, depth=config.depth, tokens=tokens, batch=B, num_cond_latents=n_c)


def _wants_room(x: Tensor, cache: KVCache | None, block: nn.Module) -> bool:
    """Whether keys and values shall lie apart from what the layer made: see `make_room`. Also where an adapter works
    beside it: of all tokens at once its branch would take twelve activations, piece by piece it takes three."""
    return cache is not None or x.device.type == "cpu" or bool(block.get_submodule("attn.qkv")._forward_hooks)
