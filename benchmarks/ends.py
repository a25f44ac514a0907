"""What is before and after the transformer: the VAE on real frame sizes, the text encoder at real width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import official
import torch
from cases import TEXT_TOKENS, meta_flops
from parts import PLAIN, Absent, Part
from torch import Tensor

from lcv_core.config import TextConfig, VAEConfig
from lcv_core.shapes import SPACE_FACTOR, TIME_FACTOR
from lcv_core.text.encoder import build_text_model
from lcv_core.vae.layers import channels_last_
from lcv_core.vae.model import WanVAE

# (what, direction, latent frames of the whole clip, pixels)
CLIPS = (
    ("480p93", "encode", 24, (480, 832)),
    ("480p93", "decode", 24, (480, 832)),
    ("720p189", "encode", 48, (704, 1280)),
    ("720p189", "decode", 48, (704, 1280)),
)
# A clip is streamed, the first latent frame and then one like the other: two lengths tell what each costs.
FEW, MORE = 1, 3
VOCABULARY = 1024  # rows of the embedding, of which a prompt looks up 512 whatever their number


def vae_rows(bench: Any, config: VAEConfig, tiny: bool) -> None:
    c = bench.clocks
    torch.manual_seed(0)
    vae = WanVAE(config, device=c.device, dtype=c.dtype).eval().requires_grad_(False)
    channels_last_(vae)
    sides: dict[str, Any] = {"ours": vae}
    if bench.args.official is not None:
        try:
            official.load(bench.args.official)
            sides["official"] = official.vae(config, vae.state_dict())
        except Absent as why:
            bench.absent(why, stage="VAE", side="official")
    for name, direction, latents, size in CLIPS:
        size = (32, 48) if tiny else size
        for side, model in sides.items():
            cells = {"stage": "VAE", "job": name, "form": PLAIN, "side": side, "shape": f"{size[0]}x{size[1]}"}
            found: dict[int, float | None] = {}
            for count in (FEW, MORE):
                part = _vae_part(model, side, config, direction, count, size, c.device, c.dtype)
                found[count] = bench.measure(part, part=f"{direction} of {count} latents", **cells)
            few, more = found[FEW], found[MORE]
            if few is not None and more is not None:
                whole = few + (latents - FEW) * (more - few) / (MORE - FEW)
                note = f"{MORE} of {latents} latent frames"
                bench.add(part=direction, ms=f"{whole:.5g}", extrapolated=note, **cells)


def _vae_part(
    model: Any, side: str, config: VAEConfig, direction: str, count: int, size: tuple[int, int], device: torch.device,
    dtype: torch.dtype,
) -> Part:  # fmt: skip
    h, w = (n // SPACE_FACTOR for n in size)
    frames = 1 + TIME_FACTOR * (count - 1)
    shape = (1, 3, frames, *size) if direction == "encode" else (1, config.z_dim, count, h, w)
    method = WanVAE.encode if direction == "encode" else WanVAE.decode
    flops = meta_flops(config, lambda meta: method(meta, torch.empty(shape, device="meta")))
    data = torch.randn(shape, device=device, dtype=dtype).clamp_(-1, 1)
    if side == "official":
        run: Callable[[], object] = lambda: getattr(model, direction)(data)  # noqa: E731  (typed, and short)
    elif direction == "encode":
        run = lambda: model.encode(data)  # noqa: E731
    else:
        run = lambda: _drop(model.decode_stream(data))  # noqa: E731  (as pipelines do: frames leave as they come)
    return Part(run, matmul=flops)


def _drop(frames: Any) -> None:
    for _ in frames:
        pass


def text_rows(bench: Any, config: TextConfig, tiny: bool) -> None:
    """One prompt of 512 tokens through the first layers; the official pipeline runs the same transformers module."""
    c = bench.clocks
    layers = config.num_layers
    counts = (1, 2) if tiny else (2, 4)
    found: dict[int, float | None] = {}
    cells = {"stage": "text", "job": "prompt", "form": PLAIN, "side": "ours", "shape": f"1x{TEXT_TOKENS}"}
    for count in counts:
        few = dataclasses.replace(config, num_layers=count, vocab_size=VOCABULARY)
        part = _text_part(few, c.device, c.dtype)
        found[count] = bench.measure(part, part=f"{count} layers", **cells)
        del part
        bench.free()
    less, more = (found[count] for count in counts)
    if less is not None and more is not None:
        whole = less + (layers - counts[0]) * (more - less) / (counts[1] - counts[0])
        bench.add(part="encode", ms=f"{whole:.5g}", extrapolated=f"{counts[1]} of {layers} layers", **cells)


def _text_part(config: TextConfig, device: torch.device, dtype: torch.dtype) -> Part:
    model = build_text_model(config, dtype=dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02, generator=generator)
    ids = torch.randint(4, VOCABULARY, (1, TEXT_TOKENS), generator=generator, device=device)
    mask = torch.ones_like(ids)
    L, C, inner = TEXT_TOKENS, config.d_model, config.num_heads * config.d_kv
    matmul = config.num_layers * (8 * L * C * inner + 6 * L * C * config.d_ff)
    attention = config.num_layers * 4.0 * L * L * inner
    weights = sum(x.nbytes for x in model.parameters())

    def run() -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return Part(run, matmul, attention, weights)
