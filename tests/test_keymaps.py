"""Names of other packagings against the models' own."""

from __future__ import annotations

import pytest

from lcv_core.config import DiTConfig, TextConfig, VAEConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.text.encoder import build_text_model
from lcv_core.vae.model import WanVAE
from lcv_core.weights.keymaps import (
    FASTVIDEO_DIT,
    WAN_DIT,
    WAN_UMT5,
    WAN_VAE,
    Rule,
    common_prefix,
    original_name,
    rename,
    sources,
)

TINY_DIT = DiTConfig(hidden_size=64, depth=2, num_heads=4, caption_channels=32, adaln_tembed_dim=32)


def _conv(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _residual(name: str, i: int, o: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.residual.0.gamma": (i, 1, 1, 1), f"{name}.residual.3.gamma": (o, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", o, i, 3, 3, 3) | _conv(f"{name}.residual.6", o, o, 3, 3, 3)
    return shapes | (_conv(f"{name}.shortcut", o, i, 1, 1, 1) if i != o else {})


def _middle(name: str, c: int) -> dict[str, tuple[int, ...]]:
    attention = {f"{name}.1.norm.gamma": (c, 1, 1)}
    attention |= _conv(f"{name}.1.to_qkv", 3 * c, c, 1, 1) | _conv(f"{name}.1.proj", c, c, 1, 1)
    return _residual(f"{name}.0", c, c) | attention | _residual(f"{name}.2", c, c)


def original_vae(base: int = 96, z: int = 16) -> dict[str, tuple[int, ...]]:
    """The 194 tensors of the original Wan 2.1 VAE, written from the description of its architecture."""
    dims = [base, 2 * base, 4 * base, 4 * base]
    top = 4 * base
    shapes = _conv("conv1", 2 * z, 2 * z, 1, 1, 1) | _conv("conv2", z, z, 1, 1, 1)
    shapes |= _conv("encoder.conv1", base, 3, 3, 3, 3)
    k, width = 0, base
    for stage, dim in enumerate(dims):
        for i in (width, dim):
            shapes |= _residual(f"encoder.downsamples.{k}", i, dim)
            k += 1
        width = dim
        if stage < 3:
            shapes |= _conv(f"encoder.downsamples.{k}.resample.1", dim, dim, 3, 3)
            if stage > 0:
                shapes |= _conv(f"encoder.downsamples.{k}.time_conv", dim, dim, 3, 1, 1)
            k += 1
    shapes |= _middle("encoder.middle", top) | _conv("encoder.head.2", 2 * z, top, 3, 3, 3)
    shapes |= {"encoder.head.0.gamma": (top, 1, 1, 1), "decoder.head.0.gamma": (base, 1, 1, 1)}
    shapes |= _conv("decoder.conv1", top, z, 3, 3, 3) | _middle("decoder.middle", top)
    k, width = 0, top
    for stage, dim in enumerate(reversed(dims)):
        for i in (width, dim, dim):
            shapes |= _residual(f"decoder.upsamples.{k}", i, dim)
            k += 1
        if stage < 3:
            width = dim // 2
            shapes |= _conv(f"decoder.upsamples.{k}.resample.1", width, dim, 3, 3)
            if stage < 2:
                shapes |= _conv(f"decoder.upsamples.{k}.time_conv", 2 * dim, dim, 3, 1, 1)
            k += 1
    return shapes | _conv("decoder.head.2", 3, base, 3, 3, 3)


def wan_dit(config: DiTConfig) -> dict[str, str]:
    """Module names of a Wan-style file -> the official module that their tensors are (part of)."""
    names = {
        "patch_embedding": "x_embedder.proj",
        "text_embedding.0": "y_embedder.y_proj.0",
        "text_embedding.2": "y_embedder.y_proj.2",
        "time_embedding.mlp.0": "t_embedder.mlp.0",
        "time_embedding.mlp.2": "t_embedder.mlp.2",
        "head.head": "final_layer.linear",
        "head.modulation.1": "final_layer.adaLN_modulation.1",
    }
    for n in range(config.depth):
        b = f"blocks.{n}"
        names |= {f"{b}.modulation.1": f"{b}.adaLN_modulation.1", f"{b}.norm3": f"{b}.pre_crs_attn_norm"}
        names |= {f"{b}.ffn.{w}": f"{b}.ffn.{w}" for w in ("w1", "w2", "w3")}
        names |= {f"{b}.self_attn.{x}": f"{b}.attn.qkv" for x in "qkv"}
        names |= {f"{b}.self_attn.o": f"{b}.attn.proj", f"{b}.cross_attn.o": f"{b}.cross_attn.proj"}
        names |= {f"{b}.cross_attn.q": f"{b}.cross_attn.q_linear"}
        names |= {f"{b}.cross_attn.{x}": f"{b}.cross_attn.kv_linear" for x in "kv"}
        names |= {f"{b}.self_attn.norm_{x}": f"{b}.attn.{x}_norm" for x in "qk"}
        names |= {f"{b}.cross_attn.norm_{x}": f"{b}.cross_attn.{x}_norm" for x in "qk"}
    return names


def test_vae_map_is_a_bijection_of_194_equal_shapes() -> None:
    original = original_vae()
    diffusers = {name: tuple(t.shape) for name, t in WanVAE(VAEConfig(), device="meta").state_dict().items()}
    slots = {name: rename(name, WAN_VAE) for name in original}
    assert len(original) == len(diffusers) == 194
    assert sum(_count(shape) for shape in original.values()) == 126_892_531
    assert {slot.name: original[name] for name, slot in slots.items() if slot} == diffusers
    assert {original_name(name, WAN_VAE) for name in diffusers} == set(original)
    for name, slot in slots.items():
        assert slot is not None and slot.parts == 1
        assert original_name(slot.name, WAN_VAE) == name
        assert rename(slot.name, WAN_VAE) in (None, slot), "a name of one naming must not be taken for the other's"


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def test_umt5_map_covers_the_encoder_both_ways() -> None:
    config = TextConfig(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    names = set(build_text_model(config, device="meta").state_dict())
    originals = {original_name(name, WAN_UMT5) for name in names}
    assert None not in originals and len(originals) == len(names)
    assert "blocks.1.pos_embedding.embedding.weight" in originals and "blocks.0.ffn.gate.0.weight" in originals
    assert {slot.name for o in originals if o and (slot := rename(o, WAN_UMT5))} == names


@pytest.mark.parametrize("rules", [WAN_DIT, FASTVIDEO_DIT], ids=["wan", "fastvideo"])
def test_dit_maps_cover_every_tensor_once(rules: tuple[Rule, ...]) -> None:
    for name in LongCatDiT(TINY_DIT, device="meta").state_dict():
        pieces = sources(name, rules)
        parts = 3 if ".attn.qkv." in name else 2 if ".kv_linear." in name else 1
        assert [(slot.part, slot.parts) for _, slot in pieces] == [(k, parts) for k in range(parts)], name
        for source, slot in pieces:
            assert rename(source, rules) == slot


def test_wan_style_names_by_hand() -> None:
    expected = wan_dit(TINY_DIT)
    official = {name.rpartition(".")[0] for name in LongCatDiT(TINY_DIT, device="meta").state_dict()}
    assert set(expected.values()) == official
    for source, target in expected.items():
        slot = rename(f"{source}.weight", WAN_DIT)
        assert slot is not None and slot.name == f"{target}.weight"
    assert rename("blocks.1.self_attn.v.bias", WAN_DIT) == ("blocks.1.attn.qkv.bias", 2, 3)
    assert rename("blocks.1.cross_attn.k.bias", WAN_DIT) == ("blocks.1.cross_attn.kv_linear.bias", 0, 2)


@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight", "time_projection.1.weight", "blocks.x.norm3.weight", "head"])
def test_unknown_names_are_not_guessed(name: str) -> None:
    assert rename(name, WAN_DIT) is None


def test_prefix_counts_only_when_all_names_have_it() -> None:
    assert common_prefix(["model.diffusion_model.a.b", "model.diffusion_model.c", "scaled_fp8"]) == (
        "model.diffusion_model."
    )
    assert common_prefix(["diffusion_model.a.b", "vae.c"]) == ""
