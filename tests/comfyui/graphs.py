"""API prompts, built node by node; and the tiny checkpoint and pictures that they name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcv_core.weights.init import init_checkpoint

from .api import Client, Json, Prompt, Result
from .launch import define_missing_operators

Link = list[Json]  # [node id, output]

TINY = "tiny/"
MINIATURE = "miniature (built in)"
PROMPT = "a red ball moves left on a black background"
NEGATIVE = "blurred, static"
HEIGHT, WIDTH, FRAMES, COND_FRAMES = 32, 48, 9, 5  # the tiny checkpoint's own
STEPS, SEED = 3, 7


class Node:
    """A node of a graph; `node[i]` links to its output i."""

    def __init__(self, node_id: str) -> None:
        self.id = node_id

    def __getitem__(self, output: int) -> Link:
        return [self.id, output]


class Graph:
    """A prompt that grows node by node. `prompt` is what the server takes."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}

    def add(self, class_type: str, **inputs: Json) -> Node:
        """A node; its inputs are values or links. Inputs that are None stay unconnected."""
        node = Node(str(len(self.prompt) + 1))
        given = {name: value for name, value in inputs.items() if value is not None}
        self.prompt[node.id] = {"class_type": class_type, "inputs": given}
        return node

    def change(self, node: Node, **inputs: Json) -> None:
        """Set inputs of a node that is there."""
        self.prompt[node.id]["inputs"].update(inputs)

    def save(self, latent: Link) -> str:
        """Save a LATENT; returns the id by which `Client.latents` finds it."""
        return self.add("SaveLatent", samples=latent, filename_prefix="latents/test").id

    def save_images(self, images: Link) -> str:
        """Save IMAGEs as PNG; returns the id by which `frames` finds them."""
        return self.add("SaveImage", images=images, filename_prefix="test").id

    def images(self, name: str | None) -> Link | None:
        """A picture, or the frames of an animated one, from the input folder."""
        return None if name is None else self.add("LoadImage", image=name)[0]


class LongCat(Graph):
    """A graph that begins with the loader and both prompts."""

    def __init__(
        self, checkpoint: str = TINY, *, prompt: str = PROMPT, negative: str = NEGATIVE, weight_dtype: str = "default"
    ) -> None:
        super().__init__()
        self.loader = self.load(checkpoint, weight_dtype)
        self.model, self.clip, self.vae = self.loader[0], self.loader[1], self.loader[2]
        self.positive = self.encode(prompt)
        self.negative = self.encode(negative)

    def load(self, checkpoint: str, weight_dtype: str = "default") -> Node:
        """MODEL, CLIP and VAE of a checkpoint."""
        inputs = {"checkpoint": checkpoint, "weight_dtype": weight_dtype, "vae": "auto", "text_encoder": "auto"}
        return self.add("LongCatVideoLoader", **inputs)

    def encode(self, prompt: str) -> Link:
        return self.add("LongCatVideoTextEncode", clip=self.clip, text=prompt)[0]

    def latent(self, **changes: Json) -> Link:
        """LongCat-Video Latent: empty unless `image` or `video` is given."""
        inputs = {
            "width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "batch_size": 1, "fit": "crop",
            "num_cond_frames": COND_FRAMES,
        }  # fmt: skip
        return self.add("LongCatVideoLatent", model=self.model, vae=self.vae, **inputs | changes)[0]

    def sample(self, latent: Link, *, model: Link | None = None, **changes: Json) -> Link:
        """The all-in-one sampler."""
        inputs = {
            "positive": self.positive, "negative": self.negative, "seed": SEED, "schedule": "base", "num_steps": STEPS,
            "guidance_scale": 0.0,
        }  # fmt: skip
        return self.add("LongCatVideoSampler", model=model or self.model, latent=latent, **inputs | changes)[0]

    def continued(self, **changes: Json) -> Node:
        inputs = {
            "positive": self.positive, "negative": self.negative, "num_frames": FRAMES + 4,
            "num_cond_frames": COND_FRAMES, "width": WIDTH, "height": HEIGHT, "seed": SEED, "schedule": "base",
            "num_steps": STEPS, "guidance_scale": 0.0, "fit": "crop", "vae_tile": 0,
        }  # fmt: skip
        return self.add("LongCatVideoContinue", model=self.model, vae=self.vae, **inputs | changes)

    def long(self, prompts: Sequence[str], **changes: Json) -> Node:
        inputs = {
            "prompts": "\n".join(prompts), "negative_prompt": NEGATIVE, "num_segments": 0, "width": WIDTH,
            "height": HEIGHT, "num_frames": FRAMES, "num_cond_frames": COND_FRAMES, "frame_rate": 15.0, "seed": SEED,
            "schedule": "base", "num_steps": STEPS, "guidance_scale": 0.0, "handover": "latents", "fit": "crop",
            "vae_tile": 0,
        }  # fmt: skip
        return self.add("LongCatVideoLong", model=self.model, vae=self.vae, clip=self.clip, **inputs | changes)

    def refined(self, frames: Link, **changes: Json) -> Node:
        inputs = {
            "positive": self.positive, "seed": SEED, "mode": "space and time", "refine_steps": 2, "t_thresh": 0.5,
            "sparsity": 0.0, "refine_lora": "auto", "width": 0, "height": 0, "window": 0, "overlap": 0, "fit": "crop",
            "vae_tile": 0,
        }  # fmt: skip
        return self.add("LongCatVideoRefine", model=self.model, vae=self.vae, frames=frames, **inputs | changes)

    def sigmas(self, model: Link | None = None, **changes: Json) -> Link:
        inputs = {"schedule": "base", "num_steps": STEPS, "t_thresh": 0.5}
        return self.add("LongCatVideoScheduler", model=model or self.model, **inputs | changes)[0]

    def guider(self, model: Link | None = None, *, guidance_scale: float = 4.0) -> Link:
        texts = {"positive": self.positive, "negative": self.negative}
        return self.add("LongCatVideoGuider", model=model or self.model, guidance_scale=guidance_scale, **texts)[0]

    def sample_custom(self, guider: Link, sigmas: Link, latent: Link, *, sampler: str = "euler") -> Link:
        """Stock SamplerCustomAdvanced."""
        noise = self.add("RandomNoise", noise_seed=SEED)[0]
        select = self.add("KSamplerSelect", sampler_name=sampler)[0]
        parts = {"noise": noise, "guider": guider, "sampler": select, "sigmas": sigmas, "latent_image": latent}
        return self.add("SamplerCustomAdvanced", **parts)[0]


def tiny_checkpoint(comfy: Client) -> Path:
    """The tiny checkpoint in the server's models folder, by the name TINY."""
    if not hasattr(torch.ops.torchvision, "nms"):
        define_missing_operators()  # transformers imports torchvision, in this process too
    folder = comfy.server.run / "models" / "longcat_video" / TINY.rstrip("/")
    return folder if folder.exists() else init_checkpoint(folder, "tiny")


def model_file(comfy: Client, kind: str, name: str) -> Path:
    """Where a model file of that kind lies on the server; its folder is made."""
    path = comfy.server.run / "models" / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def noise_frames(count: int, *, height: int = HEIGHT, width: int = WIDTH, seed: int = 4) -> Tensor:
    """uint8 [count, height, width, 3]: smooth enough to survive a resize, different in every frame."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 6, generator=g)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine.permute(0, 2, 3, 1) * 255).to(torch.uint8)


def put_frames(comfy: Client, frames: Tensor, name: str) -> str:
    """Frames uint8 [F, H, W, 3] as an animated PNG in the input folder: a stock LoadImage gives them, exactly."""
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    path = comfy.server.run / "input" / f"{name}.png"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=67)
    return path.name


def frames(comfy: Client, result: Result, node: str) -> Tensor:
    """What a stock SaveImage node saved: uint8 [F, H, W, 3]."""
    pictures = [Image.open(io.BytesIO(comfy.view(file))) for file in result.outputs[node]["images"]]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
