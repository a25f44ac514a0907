"""LongCat-Video as a native MODEL: ComfyUI's configuration and BaseModel around the transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention as comfy_attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from lcv_core.config import BSAConfig, DiTConfig, Native, VAEConfig
from lcv_core.errors import InputError
from lcv_core.planning import Device, Sampling, sparse_kernels
from lcv_core.text.encoder import fit_text
from lcv_core.weights.assemble import load_strictly
from lcv_core.weights.checkpoint import Checkpoint

from . import quantised
from .network import BSA_OPTION, CACHE_OPTION, WEIGHTS_OPTION, NativeDiT, hold_cache

WEIGHT_DTYPES = (
    "default", "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", *quantised.FORMS,
)  # fmt: skip
_STORED = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e4m3fn_fast": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
_COMPUTE = [torch.bfloat16, torch.float32]
CHECKPOINT = "lcv_checkpoint"  # attachment: the Checkpoint that a MODEL was loaded from
# What a layer's weight may be there as besides itself: brought in from system memory, cast, patched by a LoRA.
WEIGHT_COPIES = 3
_LOST = 1.1  # by the allocator of a GPU, which leaves gaps


class Config(comfy.supported_models_base.BASE):
    """What ComfyUI asks a model family."""

    unet_config: dict[str, Any] = {}  # noqa: RUF012  (ComfyUI's class attributes)
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
    latent_format = comfy.latent_formats.Wan21
    supported_inference_dtypes = _COMPUTE
    custom_operations = comfy.ops.manual_cast  # fp32 islands call bf16 layers with fp32 activations

    def inpaint_model(self) -> bool:
        return False


class LongCatVideo(comfy.model_base.BaseModel):
    """Condition frames are the leading latent frames whose noise mask is 0: they get timestep 0 and stay unchanged."""

    def __init__(self, config: Config, device: Any) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=NativeDiT)
        # Of the sampling run in progress:
        self.num_cond_latents = 0
        self.conditions_differ = False  # among the samples of a batch
        self.bsa: BSAConfig | None = None
        self.cached = True  # condition frames are

    def memory_required(self, input_shape: Sequence[int], *args: Any, **kwargs: Any) -> float:
        """Bytes that sampling latents [B, C, T, h, w] takes besides the weights, the KV cache of the run counted.

        ComfyUI asks before it loads a model, and again before it puts both branches of guidance into one forward.
        """
        if len(input_shape) != 5:
            return super().memory_required(input_shape, *args, **kwargs)
        network, (B, _, T, h, w) = self.diffusion_model, input_shape
        run = Sampling(
            (T, h, w), batch=B, num_cond_latents=min(self.num_cond_latents, T - 1),
            cached=self.cached, conditions=B if self.conditions_differ else 1, itemsize=network.compute_dtype.itemsize,
            bsa=self.bsa, weight_copies=WEIGHT_COPIES, device=planned_device(), sparse=sparse_kernels(planned_device()),
            cache_storage=network.cache_storage, cache_place=network.cache_place,
        )  # fmt: skip
        need = run.activations(network.config) * _LOST + run.kv_cache(network.config)
        return max(need, super().memory_required(input_shape, *args, **kwargs)) if writes_scores() else need

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        noise, context = kwargs["noise"], kwargs.get("cross_attn")
        if noise.ndim != 5:
            raise InputError(f"LongCat-Video makes video latents [B, C, T, H, W], got {list(noise.shape)}")
        if context is not None:
            states, mask = fit_text(context, kwargs.get("attention_mask"))
            _check_channels(states, self.diffusion_model.config)
            out["c_crossattn"] = comfy.conds.CONDRegular(states)
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        self.num_cond_latents = leading_zeros(kwargs.get("denoise_mask"), noise.shape[2])
        out["num_cond_latents"] = comfy.conds.CONDConstant(self.num_cond_latents)
        return out

    def process_timestep(self, timestep: Tensor, *, x: Tensor, num_cond_latents: int = 0, **kwargs: Any) -> Tensor:
        if not num_cond_latents:
            return timestep
        per_frame = timestep[:, None].repeat(1, x.shape[2])
        per_frame[:, :num_cond_latents] = 0.0
        return per_frame

    def scale_latent_inpaint(self, *, sigma: Tensor, noise: Tensor, latent_image: Tensor, **kwargs: Any) -> Tensor:
        out = super().scale_latent_inpaint(sigma=sigma, noise=noise, latent_image=latent_image, **kwargs)
        n_c = self.num_cond_latents
        return torch.cat([latent_image[:, :, :n_c], out[:, :, n_c:]], dim=2) if n_c else out

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        options = {**(transformer_options or {}), WEIGHTS_OPTION: weights_key(self.current_patcher)}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)


def planned_device() -> Device:
    """What the planner calls the device that ComfyUI computes on."""
    management = comfy.model_management
    return "cpu" if management.is_device_cpu(management.get_torch_device()) else "gpu"


def writes_scores() -> bool:
    """Whether the attention that ComfyUI has chosen keeps scores in memory, in pieces as large as there is room for."""
    chosen = comfy_attention.optimized_attention
    return chosen in (
        comfy_attention.attention_basic,
        comfy_attention.attention_split,
        comfy_attention.attention_sub_quad,
    )


def know_conditions(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Any = None,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """A wrapper of ComfyUI's type "outer_sample": what `memory_required` has to know of a run before it begins."""
    model = executor.class_obj.model_patcher.model
    if noise.ndim == 5 and denoise_mask is not None:
        mask = comfy.utils.reshape_mask(denoise_mask, noise.shape)
        model.num_cond_latents = n_c = leading_zeros(mask, noise.shape[2])
        cond = latent_image[:, :, :n_c]
        model.conditions_differ = not torch.equal(cond, cond[:1].expand_as(cond))
    options = executor.class_obj.model_options.get("transformer_options", {})
    model.bsa, model.cached = options.get(BSA_OPTION), options.get(CACHE_OPTION, True)
    try:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    finally:
        model.num_cond_latents, model.conditions_differ, model.bsa, model.cached = 0, False, None, True


def leading_zeros(mask: Tensor | None, frames: int) -> int:
    """How many leading latent frames a noise mask [B, C, T, h, w] keeps whole; InputError if it keeps all."""
    if mask is None:
        return 0
    noisy = (mask != 0).transpose(0, 2).flatten(1).any(dim=1)
    count = int(torch.cumprod((~noisy).int(), dim=0).sum())
    if count == frames:
        raise InputError("the noise mask keeps every latent frame, so there is nothing to sample; ask for more frames")
    return count


def weights_key(patcher: Any) -> Any:
    """Equal as long as the patched weights are: the patches' id, and the strengths of the hooks active right now."""
    hooks = getattr(patcher, "current_hooks", None)
    active = () if hooks is None else tuple((id(hook), hook.strength) for hook in hooks.hooks)
    return getattr(patcher, "patches_uuid", None), active


def _check_channels(states: Tensor, config: DiTConfig) -> None:
    if states.shape[2] != config.caption_channels:
        raise InputError(
            f"the conditioning has {states.shape[2]} channels, this model takes {config.caption_channels}; encode the"
            " prompt with the CLIP of the same checkpoint (umT5-XXL for LongCat-Video)"
        )


def latent_format(vae: VAEConfig | None) -> Any:
    """ComfyUI's Wan 2.1 latent format, with the statistics of the checkpoint's own VAE."""
    wan = comfy.latent_formats.Wan21()
    if vae is not None:
        shape = (1, -1, 1, 1, 1)
        wan.latents_mean = torch.tensor(vae.latents_mean).view(shape)
        wan.latents_std = torch.tensor(vae.latents_std).view(shape)
    return wan


def load_model(checkpoint: Checkpoint, *, weight_dtype: str = "default", vae: VAEConfig | None = None) -> Any:
    """The checkpoint's transformer as a ModelPatcher. Raises CheckpointError, or InputError for an unknown dtype."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise InputError(f'unknown weight dtype "{weight_dtype}"; there are: {", ".join(WEIGHT_DTYPES)}')
    management, tensors = comfy.model_management, checkpoint.dit_tensors
    device = management.get_torch_device()
    parameters = sum(math.prod(tensors.shape(name)) for name in tensors.keys())  # noqa: SIM118
    stored = tensors.dtype("x_embedder.proj.weight")
    chosen = _STORED.get(weight_dtype)
    form = quantised.form_for(weight_dtype, tensors)
    base = (
        chosen
        if chosen is not None and chosen.itemsize > 1
        else management.unet_dtype(model_params=parameters, supported_dtypes=list(_COMPUTE), weight_dtype=stored)
    )
    compute = management.unet_manual_cast(base, device, list(_COMPUTE)) or base
    config = Config({"dtype": base, "compute_dtype": compute, "config": checkpoint.dit_config})
    config.manual_cast_dtype = None if compute == base else compute
    config.sampling_settings = {"shift": checkpoint.flow_shift, "multiplier": 1000.0}
    config.latent_format = latent_format(vae)
    if weight_dtype == "fp8_e4m3fn_fast":
        config.custom_operations = comfy.ops.fp8_ops
    elif form is not None:
        config.custom_operations = quantised.Operations
    model = LongCatVideo(config, device="meta")
    network = model.diffusion_model
    plain = _Stored(tensors, base, chosen)
    if form is None:
        load_strictly(network, plain, what=str(checkpoint.dit), device="cpu")
    else:
        quantised.load(network, tensors, plain, form, what=str(checkpoint.dit))
    network.requires_grad_(False)
    if hasattr(management, "archive_model_dtypes"):
        management.archive_model_dtypes(network)  # the first time was before fp8 weights came in
    offload = management.unet_offload_device()
    model.device = offload
    model.to(offload)
    make = quantised.Patcher
    if form is None:
        make = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = make(model, load_device=device, offload_device=offload)
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "lcv_kv_cache", hold_cache)
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "lcv_conditions", know_conditions)
    patcher.set_attachments(CHECKPOINT, checkpoint)
    return patcher


class _Stored:
    """Tensors as they are kept in memory: the blocks' big matrices in fp8 where that was chosen, the rest in `base`."""

    def __init__(self, tensors: Any, base: torch.dtype, chosen: torch.dtype | None) -> None:
        self._tensors, self._base = tensors, base
        self._small = chosen if chosen is not None and chosen.itemsize == 1 else base
        self.keys, self.shape, self.dtype = tensors.keys, tensors.shape, tensors.dtype

    def read(self, name: str, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        small = name.endswith(".weight") and any(part in name for part in (".attn.", ".cross_attn.", ".ffn."))
        small = small and "norm" not in name
        return self._tensors.read(name, device, self._small if small else self._base)


def checkpoint_of(model: Any) -> Checkpoint | None:
    """What our loader read this MODEL from; None when something else made it."""
    return model.get_attachment(CHECKPOINT)


def native_of(model: Any) -> Native:
    """The job that a LongCat-Video MODEL was made for; InputError for another model."""
    require_longcat(model)
    checkpoint = checkpoint_of(model)
    return Native() if checkpoint is None else checkpoint.native


def require_longcat(model: Any) -> Any:
    """The LongCatVideo inside a MODEL; InputError that says what to do when it is another model's."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, LongCatVideo):
        name = type(inner).__name__
        raise InputError(f"this node needs a LongCat-Video model, got {name}; connect the LongCat-Video Loader's MODEL")
    return inner
