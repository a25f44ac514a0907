"""The official implementation, imported from a checkout that the user names, on our weights.

Nothing of it is here. Where a package that it needs is missing, as little as its transformer asks of it stands in: of
`diffusers` two base classes that the computation does not touch, of `flash_attn` its two functions by way of PyTorch's
scaled_dot_product_attention. `notes` says what stood in; its VAE needs the real diffusers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from parts import Absent, Inputs, Job, Part, work_of
from torch import Tensor, nn

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT

notes: list[str] = []


def load(path: Path) -> None:
    """Make the checkout importable. Raises Absent where there is none, or it cannot be imported."""
    if not (path / "longcat_video" / "modules").is_dir():
        raise Absent(f"{path} is no checkout of the official repository: it has no longcat_video/modules")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    with standing_in():
        _module("longcat_video_dit")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"longcat_video.modules.{name}")
    except Exception as error:  # it imports much, which fails in many ways
        raise Absent(f"longcat_video.modules.{name} cannot be imported ({type(error).__name__}: {error})") from None


@contextmanager
def standing_in() -> Iterator[None]:
    """What is not installed is there inside the block, and no longer: other libraries ask for these packages too."""
    put = {name: module for name, module in _stand_ins().items() if name not in sys.modules}
    sys.modules.update(put)
    try:
        yield
    finally:
        for name in put:
            del sys.modules[name]


@lru_cache(maxsize=1)
def _stand_ins() -> dict[str, ModuleType]:
    found: dict[str, dict[str, Any]] = {}
    if importlib.util.find_spec("diffusers") is None:
        notes.append("diffusers' two base classes stood in for")
        found |= {
            "diffusers": {},
            "diffusers.configuration_utils": {"ConfigMixin": object, "register_to_config": lambda init: init},
            "diffusers.models": {},
            "diffusers.models.modeling_utils": {"ModelMixin": nn.Module},
        }
    if importlib.util.find_spec("flash_attn") is None:
        notes.append("flash-attn stood in for by scaled_dot_product_attention")
        found["flash_attn"] = {"flash_attn_func": _dense, "flash_attn_varlen_func": _packed}
    return {name: _as_package(name, contents) for name, contents in found.items()}


def _as_package(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    module.__path__ = []
    return module


def _dense(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None) -> Tensor:
    """q, k, v [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    """q, k, v [S, H, D] of one sample."""
    if len(cu_seqlens_q) != 2:
        raise NotImplementedError("one sample at a time")
    return _dense(q[None], k[None], v[None])[0]


def _in_place(run: Callable[[], object]) -> Callable[[], object]:
    """A run during which the stand-ins are there: attention imports its package when it is called."""

    def standing() -> object:
        with standing_in():
            return run()

    return standing


def build(ours: LongCatDiT, device: torch.device, dtype: torch.dtype) -> Any:
    """The official transformer with our model's weights. Raises Absent."""
    config = ours.config
    if device.type == "cpu" and dtype != torch.float32:
        raise Absent("its fp32 islands are CUDA autocast regions, so that on a CPU it runs in fp32 alone")
    bsa = config.bsa
    with torch.device("meta"):
        model = _module("longcat_video_dit").LongCatVideoTransformer3DModel(
            in_channels=config.in_channels, out_channels=config.out_channels, hidden_size=config.hidden_size,
            depth=config.depth, num_heads=config.num_heads, caption_channels=config.caption_channels,
            mlp_ratio=int(config.mlp_ratio), adaln_tembed_dim=config.adaln_tembed_dim,
            frequency_embedding_size=config.frequency_embedding_size, patch_size=config.patch_size,
            enable_flashattn2=True, cp_split_hw=[1, 1], text_tokens_zero_pad=config.text_tokens_zero_pad,
            bsa_params={
                "sparsity": bsa.sparsity, "chunk_3d_shape_q": list(bsa.block_q), "chunk_3d_shape_k": list(bsa.block_k),
            },
        )  # fmt: skip
    model.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def vae(config: Any, state: dict[str, Tensor]) -> Any:
    """The official VAE with our weights. Raises Absent."""
    module = _module("autoencoder_kl_wan")
    with torch.device("meta"):
        model = module.AutoencoderKLWan(base_dim=config.base_dim)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


class Official:
    """The parts of the official transformer on one job: the counterpart of `parts.Ours`."""

    name = "official"

    def __init__(self, model: Any, config: DiTConfig, job: Job, inputs: Inputs) -> None:
        self.model, self.job, self.inputs, self.config = model, job, inputs, config
        self.rows = inputs.mask.shape[1]
        if job.sparse:
            self._can_be_sparse()
        (model.enable_bsa if job.sparse else model.disable_bsa)()

    def _can_be_sparse(self) -> None:
        """Raises Absent."""
        if self.inputs.latents.device.type != "cuda":
            raise Absent("its block sparse attention is a Triton kernel, which needs a GPU")
        parts = zip(self.job.grid, self.config.bsa.block_q, strict=True)
        if any(size % block for size, block in parts):
            raise Absent(f"its block sparse attention takes grids that {self.config.bsa.block_q} divides")

    def forward(self, **more: Any) -> Tensor:
        i = self.inputs
        with standing_in():
            return self.model(i.latents, i.timestep, i.text.unsqueeze(1), i.mask, **more)

    def parts(self) -> dict[str, Part]:
        itemsize = self.inputs.text.dtype.itemsize
        work = work_of(self.config, self.job, itemsize, self.rows)
        with standing_in():
            runs = self.cached_runs() if self.job.cached else self.block_runs() | {"step": self.forward}
        return {name: Part(_in_place(run), *work.get(name, (0.0, 0.0, 0.0))) for name, run in runs.items()}

    def cached_runs(self) -> dict[str, Callable[[], object]]:
        i, n_c = self.inputs, self.job.cached
        still = torch.zeros(1, n_c, device=i.timestep.device)

        def cache() -> Any:
            return self.model(i.cond, still, i.text.unsqueeze(1), None, return_kv=True, skip_crs_attn=True)[1]

        with torch.inference_mode():
            kept = cache()
        return {"cache": cache, "step": lambda: self.forward(num_cond_latents=n_c, kv_cache_dict=kept)}

    def block_runs(self) -> dict[str, Callable[[], object]]:
        block, i, grid, config = self.model.blocks[0], self.inputs, self.job.grid, self.config
        blocks = _module("blocks")
        attn, dtype, device = block.attn, i.text.dtype, i.text.device
        g = torch.Generator(device).manual_seed(1)
        N, C, T = self.job.tokens, config.hidden_size, grid[0]
        with torch.inference_mode():
            x = torch.randn(1, N, C, generator=g, device=device).to(dtype)
            text = torch.randn(1, self.rows, C, generator=g, device=device).to(dtype)
            tau = torch.randn(1, T, config.adaln_tembed_dim, generator=g, device=device)
            shift, scale, gate = self._modulation(block, tau)[:3]
            m = blocks.modulate_fp32(block.mod_norm_attn, x.view(1, T, -1, C), shift, scale).view(1, N, C)
            shape = (1, N, 3, config.num_heads, config.head_dim)
            q, k, v = attn.qkv(m).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
            rotated = attn.rope_3d(attn.q_norm(q), attn.k_norm(k), grid)
            out = attn._process_attn(*rotated, v, grid).transpose(1, 2).reshape(1, N, C)

        def gated() -> Tensor:
            with torch.autocast("cuda", torch.float32, enabled=device.type == "cuda"):
                added = x + (gate * out.view(1, T, -1, C)).view(1, -1, C)
            return added.to(dtype)

        return {
            "adaLN": lambda: self._modulation(block, tau),
            "norm + modulate": lambda: blocks.modulate_fp32(block.mod_norm_attn, x.view(1, T, -1, C), shift, scale),
            "qkv": lambda: attn.qkv(m),
            "norm + rope": lambda: attn.rope_3d(attn.q_norm(q), attn.k_norm(k), grid),
            "attention": lambda: attn._process_attn(*rotated, v, grid),
            "proj": lambda: attn.proj(out),
            "gate": gated,
            "cross": lambda: x + block.cross_attn(block.pre_crs_attn_norm(x), text, [self.rows], shape=grid),
            "ffn": lambda: block.ffn(m),
            "block": lambda: block(x, text, tau, [self.rows], grid),
        }

    def _modulation(self, block: Any, tau: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.float32, enabled=tau.device.type == "cuda"):
            return block.adaLN_modulation(tau).unsqueeze(2).chunk(6, dim=-1)
