"""Tiny random Wan 2.1 files under their own tensor names: another video model for tests of what works with any."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcv_core.config import VAEConfig
from lcv_core.weights.init import vae_state
from lcv_core.weights.keymaps import WAN_VAE, original_name

from . import graphs
from .api import Client
from .graphs import Graph, Link
from .server import Core

State = dict[str, Tensor]

# ComfyUI reads the width and the number of blocks off the file; heads of 128 and text of 4096 channels are fixed.
DIM, FFN, BLOCKS, TEXT = 128, 64, 2, 4096
TRANSFORMER, VAE = "wan2.1_t2v_1.3B_fp16.safetensors", "wan_2.1_vae.safetensors"  # as the shipped workflow names them


def transformer_state(without: str = "") -> State:
    """A text-to-video transformer with one head. without: the attention ("self_attn", "cross_attn") that adds nothing
    to what goes through the blocks."""
    g = torch.Generator().manual_seed(0)
    state: State = {}

    def linear(name: str, columns: int, rows: int, gain: float = 1.0) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=g) * gain / columns**0.5
        state[f"{name}.bias"] = torch.zeros(rows)

    state["patch_embedding.weight"] = torch.randn(DIM, 16, 1, 2, 2, generator=g) / 8
    state["patch_embedding.bias"] = torch.zeros(DIM)
    for name, width in (("text_embedding", TEXT), ("time_embedding", 256)):
        linear(f"{name}.0", width, DIM)
        linear(f"{name}.2", DIM, DIM)
    linear("time_projection.1", DIM, 6 * DIM)
    for i in range(BLOCKS):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                silent = part == "o" and attention == without
                linear(f"{block}.{attention}.{part}", DIM, DIM, gain=0.0 if silent else 2.0)
            for norm in ("norm_q", "norm_k"):
                state[f"{block}.{attention}.{norm}.weight"] = torch.ones(DIM)
        state |= {f"{block}.norm3.weight": torch.ones(DIM), f"{block}.norm3.bias": torch.zeros(DIM)}
        linear(f"{block}.ffn.0", DIM, FFN)
        linear(f"{block}.ffn.2", FFN, DIM)
        state[f"{block}.modulation"] = torch.randn(1, 6, DIM, generator=g) / DIM**0.5
    linear("head.head", DIM, 64)
    state["head.modulation"] = torch.randn(1, 2, DIM, generator=g) / DIM**0.5
    return state


def image_transformer_state() -> State:
    """As much of a Stable Diffusion 3 transformer as ComfyUI needs to know it; the rest it makes up."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "joint_blocks.0.context_block.attn.qkv.weight": (192, 64), "x_embedder.proj.weight": (64, 16, 2, 2),
        "final_layer.linear.weight": (64, 64), "context_embedder.weight": (64, 4096), "pos_embed": (1, 64, 64),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def vae_file_state(core: Core) -> State:
    """A Wan 2.1 VAE under its original names: four channels wide where ComfyUI reads the width off the file."""
    narrow = core.version > (0, 3, 64)
    state = vae_state(VAEConfig(base_dim=4 if narrow else 96))
    return {original_name(name, WAN_VAE) or name: tensor for name, tensor in state.items()}


def put_transformer(comfy: Client, name: str = TRANSFORMER, state: State | None = None) -> Path:
    path = graphs.model_file(comfy, "diffusion_models", name)
    save_file(state or transformer_state(), path)
    return path


def put_vae(comfy: Client, name: str = VAE) -> Path:
    path = graphs.model_file(comfy, "vae", name)
    save_file(vae_file_state(comfy.server.core), path)
    return path


class Wan(Graph):
    """A graph that begins with a tiny Wan model and a prompt; its text encoder is the test pack's."""

    def __init__(self, name: str = TRANSFORMER, prompt: str = graphs.PROMPT) -> None:
        super().__init__()
        self.model = self.add("UNETLoader", unet_name=name, weight_dtype="default")[0]
        self.clip = self.add("TestTextEncoder", kind="umt5xxl", channels=TEXT)[0]
        self.positive = self.add("CLIPTextEncode", clip=self.clip, text=prompt)[0]

    def latent(self, *, width: int, height: int, length: int) -> Link:
        return self.add("EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1)[0]

    def sparse(self, model: Link | None = None, **changes: object) -> Link:
        inputs = {"sparsity": 0.5, "block": "4 x 4 x 4", "min_tokens": 0}
        return self.add("LongCatVideoSparseAttention", model=model or self.model, **inputs | changes)[0]

    def sample(self, latent: Link, *, model: Link | None = None, **changes: object) -> Link:
        """Stock KSampler, without guidance."""
        inputs = {
            "seed": graphs.SEED, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "denoise": 1.0, "positive": self.positive, "negative": self.positive,
        }  # fmt: skip
        return self.add("KSampler", model=model or self.model, latent_image=latent, **inputs | changes)[0]
