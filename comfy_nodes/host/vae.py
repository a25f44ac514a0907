"""The Wan 2.1 VAE as a native VAE, and any ComfyUI VAE of that kind as the pipelines use one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

from lcv_core.config import VAEConfig
from lcv_core.errors import InputError
from lcv_core.shapes import floor_frames
from lcv_core.vae.layers import StreamState
from lcv_core.vae.model import WanVAE
from lcv_core.weights.checkpoint import Checkpoint

log = logging.getLogger("lcv_core")

_DECODED = nn.Identity()  # in a decoder's state: the one piece has been decoded
_FULL_WIDTH = 96  # of the VAE that ComfyUI's memory estimates are for


class NativeVAE(nn.Module):
    """`lcv_core`'s VAE with the two calls that ComfyUI makes: it decodes by latent frame, so memory does not grow."""

    def __init__(self, wan: WanVAE) -> None:
        super().__init__()
        self.wan = wan

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, F, H, W] in [-1, 1] -> the posterior's mean, un-normalised. Frames beyond 4k+1 are dropped."""
        frames = floor_frames(pixels.shape[2])
        if frames != pixels.shape[2]:
            log.warning("the VAE takes 4k+1 frames: %d of %d are encoded", frames, pixels.shape[2])
        return self.wan.encode(pixels[:, :, :frames])[0]

    def decode(self, latent: Tensor, **_: Any) -> Tensor:
        return self.wan.decode(latent)


def load_vae(checkpoint: Checkpoint) -> Any:
    """The checkpoint's VAE as ComfyUI's VAE object: stock decode and encode nodes, tiled too, work with it."""
    wan = checkpoint.load_vae().requires_grad_(False)
    with _in_place_of_wan(NativeVAE(wan)):
        vae = comfy.sd.VAE(sd=_marks(wan.config))
    share = wan.config.base_dim / _FULL_WIDTH
    vae.memory_used_encode = _scaled(vae.memory_used_encode, share)
    vae.memory_used_decode = _scaled(vae.memory_used_decode, share)
    return vae


def _marks(config: VAEConfig) -> dict[str, Tensor]:
    """The names by which ComfyUI knows a Wan 2.1 VAE, without weights."""
    shapes = {
        "decoder.middle.0.residual.0.gamma": (config.base_dim * config.dim_mult[-1], 1, 1, 1),
        "decoder.head.0.gamma": (config.base_dim, 1, 1, 1),
        "encoder.conv1.weight": (config.base_dim, 3, 3, 3, 3),
        "decoder.head.2.weight": (3, config.base_dim, 3, 3, 3),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@contextlib.contextmanager
def _in_place_of_wan(module: NativeVAE) -> Iterator[None]:
    """Inside, ComfyUI's VAE object builds itself around `module`; all else about it is ComfyUI's own.

    The object has no argument for a module, and cores before 0.4 know one width only.
    """
    original = comfy.ldm.wan.vae.WanVAE
    load = module.load_state_dict
    # The marks are no weights; ours are loaded.
    module.load_state_dict = lambda *_, **__: nn.modules.module._IncompatibleKeys([], [])  # type: ignore[method-assign]
    comfy.ldm.wan.vae.WanVAE = lambda **_: module
    try:
        yield
    finally:
        comfy.ldm.wan.vae.WanVAE = original
        module.load_state_dict = load  # type: ignore[method-assign]


def _scaled(estimate: Any, share: float) -> Any:
    return lambda shape, dtype: estimate(shape, dtype) * share


def vae_config(vae: Any) -> VAEConfig:
    """Width and statistics of a VAE: the checkpoint's own, or Wan 2.1's."""
    module = getattr(vae, "first_stage_model", None)
    return module.wan.config if isinstance(module, NativeVAE) else VAEConfig()


def check_vae(vae: Any) -> None:
    """InputError unless this is a Wan 2.1 VAE."""
    if vae is None:
        raise InputError("there is no VAE; connect the LongCat-Video Loader's VAE, or a VAELoader with wan_2.1_vae")
    if getattr(vae, "latent_channels", None) != 16 or getattr(vae, "latent_dim", None) != 3:
        raise InputError(
            "this VAE is not the Wan 2.1 video VAE that LongCat-Video uses; connect the LongCat-Video Loader's VAE, or"
            " a VAELoader with wan_2.1_vae"
        )


def host_vae(vae: Any) -> Any:
    """A ComfyUI VAE as the pipelines call one, its weights where they are to be used."""
    check_vae(vae)
    module = vae.first_stage_model
    if not isinstance(module, NativeVAE):
        return StockVAE(vae)
    # The decoder streams by latent frame: one frame's activations are what it needs.
    comfy.model_management.load_models_gpu([vae.patcher])
    return module.wan


class StockVAE:
    """Another pack's or ComfyUI's own Wan 2.1 VAE. It gives means alone, and decodes clips whole."""

    decodes_whole = True

    def __init__(self, vae: Any) -> None:
        self._vae, self.config = vae, VAEConfig()
        self.device = torch.device("cpu")

    normalize, denormalize, _statistics = WanVAE.normalize, WanVAE.denormalize, WanVAE._statistics

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `WanVAE.encode`; the log-variance is the smallest, so that a sample is the mean."""
        clips = [self._vae.encode((clip.permute(1, 2, 3, 0) + 1.0) / 2.0) for clip in pixels]
        mean = torch.cat(clips).float()
        return mean, torch.full_like(mean, -30.0)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        moments = torch.cat(self.encode(torch.cat(list(chunks), dim=2)), dim=1)
        yield from moments.split(1, dim=2)

    def decode_stream(self, latent: Tensor | Iterable[Tensor], state: StreamState | None = None) -> Iterator[Tensor]:
        """As `WanVAE.decode_stream`, in one piece. InputError where a clip is to be decoded in several."""
        if state:
            raise InputError("this VAE cannot decode a video in several pieces; decode it whole")
        whole = latent if isinstance(latent, Tensor) else torch.cat(list(latent), dim=2)
        if state is not None:
            state[_DECODED] = whole[:, :, :1]
        frames = self._vae.decode(whole).float()
        pixels = frames.permute(0, 4, 1, 2, 3) * 2.0 - 1.0
        yield pixels[:, :, :1]
        yield from pixels[:, :, 1:].split(4, dim=2)
