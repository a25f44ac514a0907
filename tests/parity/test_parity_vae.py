"""The VAE against the official one's outputs, and the promises of streaming and tiling."""

from __future__ import annotations

import torch
from golden_vectors import golden, relative
from torch import Tensor

from lcv_core.vae.model import WanVAE
from lcv_core.vae.tiling import Tiling, decode_tiled, encode_tiled

END_TO_END = 1e-4


def test_encode(vae: WanVAE) -> None:
    g = golden("vae")
    mean, logvar = vae.encode(g["in.px"])
    assert (mean - g["out.mean"]).abs().max() <= END_TO_END
    assert (logvar - g["out.logvar"]).abs().max() <= END_TO_END


def test_decode(vae: WanVAE) -> None:
    g = golden("vae")
    pixels = vae.decode(g["out.mean"])
    assert (pixels - g["out.dec_of_mean"]).abs().max() <= END_TO_END
    assert relative(pixels, g["out.dec_of_mean"]) <= 1e-5


def test_streaming_yields_one_then_four_frames(vae: WanVAE) -> None:
    latent = golden("vae")["out.mean"]
    parts = list(vae.decode_stream(latent[:, :, i : i + 1] for i in range(latent.shape[2])))
    assert [p.shape[2] for p in parts] == [1, 4, 4]
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(latent))


def test_batch_equals_single(vae: WanVAE) -> None:
    g = golden("vae")
    other = g["in.px"].flip(2)
    mean, _ = vae.encode(torch.cat([g["in.px"], other]))
    assert (mean[:1] - vae.encode(g["in.px"])[0]).abs().max() <= 1e-5
    assert (mean[1:] - vae.encode(other)[0]).abs().max() <= 1e-5


def test_one_tile_is_the_untiled_result(vae: WanVAE) -> None:
    g = golden("vae")
    assert torch.equal(decode_tiled(vae, g["out.mean"]), vae.decode(g["out.mean"]))
    mean, logvar = encode_tiled(vae, g["in.px"])
    assert torch.equal(mean, vae.encode(g["in.px"])[0])
    assert torch.equal(logvar, vae.encode(g["in.px"])[1])


def test_tiles_agree_with_the_untiled_result(vae: WanVAE) -> None:
    """Far from tile borders a tile sees all that matters; blending keeps the rest close and inside [-1, 1]."""
    latent = torch.randn(1, 16, 2, 16, 24, generator=torch.Generator().manual_seed(3))
    whole, tiled = vae.decode(latent), decode_tiled(vae, latent, Tiling(96, 64))
    assert tiled.shape == whole.shape
    assert tiled.abs().max() <= 1.0
    assert _psnr(tiled, whole) > 30.0
    assert not torch.equal(tiled, whole)


def _psnr(a: Tensor, b: Tensor) -> float:
    return (10 * torch.log10(4.0 / (a - b).square().mean())).item()
