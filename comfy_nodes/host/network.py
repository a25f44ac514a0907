"""LongCat-Video's transformer as ComfyUI calls it: `lcv_core`'s own, built from ComfyUI's layers."""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import comfy.patcher_extension
import torch
from torch import Tensor

from lcv_core.config import BSAConfig, DiTConfig
from lcv_core.denoise import model_output
from lcv_core.dit.attention import BackendUnavailable, check_attention
from lcv_core.dit.kv_cache import KVCache
from lcv_core.dit.model import LongCatDiT

from .cache import ConditionCache

log = logging.getLogger("lcv_core")

BSA_OPTION = "lcv_bsa"  # transformer_options: a BSAConfig, or None for dense
CACHE_OPTION = "lcv_cache"  # transformer_options: False computes condition frames in every step; absent is True
WEIGHTS_OPTION = "lcv_weights"  # transformer_options: what tells one set of patched weights from another


class NativeDiT(LongCatDiT):
    """The transformer with ComfyUI's calling convention and sign (noise - x0).

    compute_dtype: of the activations; ComfyUI's layers cast their weights to it. cache: see `hold_cache`.
    """

    def __init__(
        self, *, config: DiTConfig, compute_dtype: torch.dtype, dtype: torch.dtype, device: Any, operations: Any,
        **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(config, operations=operations, device=device, dtype=dtype)
        self.compute_dtype = compute_dtype
        self.patch_size = config.patch_size  # other packs read the token grid off this name
        self.cache: ConditionCache | None = None

    def forward(  # type: ignore[override]  # ComfyUI's signature, not the parent's
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x [B, C, T, H, W]; timestep [B] or [B, T] in [0, 1000]; context [B, L, C_text] -> noise - x0, x's shape."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(self._predict, self, wrappers).execute(
            x, timestep, context, control, options, **kwargs
        )

    def _predict(
        self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, transformer_options: dict[str, Any],
        num_cond_latents: int = 0, attention_mask: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        n_c, bsa = num_cond_latents, transformer_options.get(BSA_OPTION)
        self.set_attention(partial(_attend, transformer_options))
        run = partial(LongCatDiT.forward, self, text=context, text_mask=attention_mask, num_cond_latents=n_c, bsa=bsa)
        if n_c == 0 or self.cache is None or not transformer_options.get(CACHE_OPTION, True):
            velocity = run(x, timestep)
        else:
            key = (transformer_options.get(WEIGHTS_OPTION), bsa)
            cache = self.cache.get(x[:, :, :n_c], key, partial(self._build, bsa))
            noise = run(x[:, :, n_c:], timestep[:, n_c:], kv_cache=cache)
            velocity = torch.cat([torch.zeros_like(x[:, :, :n_c], dtype=noise.dtype), noise], dim=2)
        return model_output(velocity)

    def _build(self, bsa: BSAConfig | None, cond: Tensor) -> KVCache:
        return self.build_kv_cache(cond, bsa)


def _attend(options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ComfyUI's chosen attention on [B, H, S, D]; its overrides apply."""
    function = _proven(comfy_attention.optimized_attention, q.device, q.dtype, q.shape[-1])
    return _call(function, q, k, v, transformer_options=options)


def _call(function: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return function(q, k, v, heads=q.shape[1], skip_reshape=True, skip_output_reshape=True, **kwargs)


@lru_cache(maxsize=16)
def _proven(function: Any, device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
    """The attention function, if it is right for fewer queries than keys, as condition frames need; else PyTorch's."""
    try:
        check_attention(partial(_call, function), device, dtype, head_dim, tolerance=1e-1)
    except BackendUnavailable as error:
        log.warning("the chosen attention is not used for LongCat-Video: %s; PyTorch's is used instead", error)
        return comfy_attention.attention_pytorch
    return function


def hold_cache(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of ComfyUI's type "outer_sample": condition frames are computed once in a run, and forgotten after."""
    model = executor.class_obj.model_patcher.model
    network = model.diffusion_model
    outer, network.cache = network.cache, ConditionCache()
    try:
        return executor(*args, **kwargs)
    finally:
        network.cache = outer
        model.num_cond_latents = 0
