"""What a set of tensors is, by the names in it: enough to load it, or to say what was picked by mistake."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lcv_core.weights.keymaps import DIT_DIALECTS, common_prefix

Kind = Literal["dit", "avatar", "lora", "vae", "text_encoder", "other"]

AVATAR_MARKS = ("audio_cross_attn", "audio_proj", "audio_adaLN_modulation", "audio_modulation")
LORA_MARKS = (".lora_", "___lorahyphen___", ".lora.", ".hada_", ".lokr_", ".dora_scale")
# Tensors of a umT5 encoder under the names of transformers, Wan and llama.cpp.
TEXT_MARKS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "blocks.0.pos_embedding.embedding.weight",
    "enc.blk.0.attn_rel_b.weight",
}

# All of these parts of names present (tried in order) -> what to call it.
_OTHERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("blocks.0.ffn.0.weight", "patch_embedding.weight"), "a Wan video model"),
    (("condition_embedder.", "patch_embedding.weight"), "a Wan video model"),
    (("blocks.0.ffn.net.0.proj.weight",), "a Wan video model"),
    (("individual_token_refiner",), "a HunyuanVideo model"),
    (("double_blocks.",), "a Flux or HunyuanVideo model"),
    (("single_transformer_blocks.",), "a Flux model"),
    (("joint_blocks.",), "a Stable Diffusion 3 model"),
    (("adaln_single.",), "an LTX-Video or PixArt model"),
    (("transformer_blocks.", "caption_projection"), "an LTX-Video or PixArt model"),
    (("transformer_blocks.0.norm1.linear",), "a CogVideoX or similar transformer"),
    (("input_blocks.", "output_blocks."), "a Stable Diffusion model"),
    (("down_blocks.", "up_blocks.", "time_embedding."), "a Stable Diffusion model"),
    (("encoder.downsamples.0.downsamples.",), "a Wan 2.2 VAE (this model uses the Wan 2.1 VAE)"),
    (("encoder.down.0.", "decoder.up.0."), "an image VAE"),
    (("encoder.down_blocks.0.resnets.",), "an image VAE"),
    (("text_model.encoder.layers.",), "a CLIP text encoder"),
    (("model.layers.0.self_attn.",), "a language model"),
    (("blk.0.attn_q",), "a language model"),
)
# Modules that only another model's adapter has.
_LORA_OTHERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("double_blocks",), "a Flux or HunyuanVideo"),
    (("single_transformer_blocks",), "a Flux"),
    (("ffn.0", "ffn.2"), "a Wan"),
    (("ffn_0", "ffn_2"), "a Wan"),
    (("ffn.net.0",), "a Wan"),
    (("lora_te",), "a Stable Diffusion"),
    (("down_blocks",), "a Stable Diffusion"),
    (("input_blocks",), "a Stable Diffusion"),
    (("joint_blocks",), "a Stable Diffusion 3"),
    (("transformer_blocks",), "another transformer's (LTX-Video, Qwen-Image, CogVideoX or similar)"),
    (("self_attn.q_proj",), "a language model"),
)
TITLES: dict[Kind, str] = {
    "dit": "LongCat-Video transformer weights",
    "avatar": "an audio-driven model such as LongCat-Video-Avatar; only the base LongCat-Video is supported",
    "lora": "a LoRA adapter, not a model; give it as an adapter on top of the base model",
    "vae": "the Wan 2.1 VAE, not the transformer",
    "text_encoder": "the umT5 text encoder, not the transformer",
}


def _any(names: list[str], part: str) -> bool:
    return any(part in name for name in names)


def has_avatar_names(names: Iterable[str]) -> bool:
    return any(mark in name for name in names for mark in AVATAR_MARKS)


def dit_dialect(names: Iterable[str]) -> tuple[str, str] | None:
    """(dialect, prefix) of a LongCat-Video transformer's names; None when they are not that."""
    names = list(names)
    prefix = common_prefix(names)
    bare = {name.removeprefix(prefix) for name in names}
    # The gated feed-forward w1/w2/w3 is what tells a Wan-style LongCat from Wan; a shard may lack either.
    for dialect, (mark, _) in DIT_DIALECTS.items():
        if mark in bare and any(name.startswith(("blocks.0.ffn.w1.", "blocks.0.ffn.w3.")) for name in bare):
            return dialect, prefix
    return None


def kind_of(names: Iterable[str]) -> Kind:
    """What the names belong to."""
    names = list(names)
    if any(mark in name for name in names for mark in LORA_MARKS):
        return "lora"
    if has_avatar_names(names):
        return "avatar"
    if dit_dialect(names) is not None:
        return "dit"
    known = set(names)
    if {"decoder.conv_in.weight", "decoder.norm_out.gamma"} <= known or "decoder.middle.0.residual.0.gamma" in known:
        return "vae"
    if known & TEXT_MARKS:
        return "text_encoder"
    return "other"


def title(names: Iterable[str]) -> str:
    """A noun phrase for an error message: what these tensors look like."""
    names = list(names)
    kind = kind_of(names)
    if kind != "other":
        return TITLES[kind]
    if any(name.startswith(f"{p}blocks.") and ".ffn.w" in name for name in names for p in ("", *_prefixes(names))):
        return "part of a LongCat-Video transformer: one shard of several; give the folder that holds them all"
    return next((what for marks, what in _OTHERS if all(_any(names, m) for m in marks)), "an unknown kind of model")


def _prefixes(names: list[str]) -> tuple[str, ...]:
    prefix = common_prefix(names)
    return (prefix,) if prefix else ()


def lora_title(names: Iterable[str]) -> str:
    """Whose adapter these names look like, ready for `it looks like ...`; "" when nothing is recognised."""
    names = list(names)
    found = next((what for marks, what in _LORA_OTHERS if all(_any(names, m) for m in marks)), None)
    return f"{found} adapter" if found else ""
