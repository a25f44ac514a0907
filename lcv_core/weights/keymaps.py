"""Names of the same weights in the files of other packagers, as tables, and the small functions that apply them.

A rule is a pair of templates: `{n}` stands for a number, `{rest}` for whatever is left. A name must match a template
from end to end, and at most one rule of a table matches it. Rules whose target is part k of p name one piece of a
fused weight: rows k/p to (k+1)/p of it.

Where the tables are from. The VAE and umT5 maps are those of the published files. FASTVIDEO_DIT follows the parameter
mapping of FastVideo's LongCat configuration, and its separate to_q/to_k/to_v are, by its own conversion, the row
thirds (halves) of the fused weights. WAN_DIT follows the module names that Kijai's WanVideoWrapper builds for a model
of width 4096; no header of the published single file has been seen, and the spelling `time_embedding.mlp.{n}` is
inferred from the timestep embedder that module shares with the official code. A name no rule knows is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple


class Rule(NamedTuple):
    """source and target are templates; the source holds rows part/parts of the target."""

    source: str
    target: str
    part: int = 0
    parts: int = 1


class Slot(NamedTuple):
    """Where a tensor belongs: rows part/parts of the tensor (or module) `name`."""

    name: str
    part: int = 0
    parts: int = 1


_PLACEHOLDERS = {"{n}": r"(?P<n>\d+)", "{rest}": r"(?P<rest>.+)"}

_ENDS = ("encoder", "decoder")
_RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.{rest}", "conv1.{rest}"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.{rest}", "conv2.{rest}"),
    ("shortcut.{rest}", "conv_shortcut.{rest}"),
)
_RESAMPLE = (("resample.1.{rest}", "resample.1.{rest}"), ("time_conv.{rest}", "time_conv.{rest}"))
# The decoder is a flat list of 15: three residual blocks and an upsampler per stage, none after the last.
_RESIDUAL_BLOCKS = (
    *((f"{end}.middle.{2 * i}", f"{end}.mid_block.resnets.{i}") for end in _ENDS for i in (0, 1)),
    ("encoder.downsamples.{n}", "encoder.down_blocks.{n}"),
    *((f"decoder.upsamples.{k}", f"decoder.up_blocks.{k // 4}.resnets.{k % 4}") for k in range(15) if k % 4 < 3),
)
_RESAMPLE_BLOCKS = (
    ("encoder.downsamples.{n}", "encoder.down_blocks.{n}"),
    *((f"decoder.upsamples.{k}", f"decoder.up_blocks.{k // 4}.upsamplers.0") for k in (3, 7, 11)),
)

WAN_VAE: tuple[Rule, ...] = (
    Rule("conv1.{rest}", "quant_conv.{rest}"),
    Rule("conv2.{rest}", "post_quant_conv.{rest}"),
    *(Rule(f"{end}.conv1.{{rest}}", f"{end}.conv_in.{{rest}}") for end in _ENDS),
    *(Rule(f"{end}.head.0.gamma", f"{end}.norm_out.gamma") for end in _ENDS),
    *(Rule(f"{end}.head.2.{{rest}}", f"{end}.conv_out.{{rest}}") for end in _ENDS),
    *(Rule(f"{end}.middle.1.{{rest}}", f"{end}.mid_block.attentions.0.{{rest}}") for end in _ENDS),
    *(Rule(f"{a}.{x}", f"{b}.{y}") for a, b in _RESIDUAL_BLOCKS for x, y in _RESIDUAL),
    *(Rule(f"{a}.{x}", f"{b}.{y}") for a, b in _RESAMPLE_BLOCKS for x, y in _RESAMPLE),
)
"""Original Wan 2.1 (`Wan2.1_VAE.pth`, ComfyUI, Kijai) -> diffusers; a bijection of the 194 tensors, shapes equal."""

_T5 = "encoder.block.{n}.layer"
WAN_UMT5: tuple[Rule, ...] = (
    Rule("token_embedding.weight", "shared.weight"),
    Rule("blocks.{n}.norm1.weight", f"{_T5}.0.layer_norm.weight"),
    *(Rule(f"blocks.{{n}}.attn.{x}.weight", f"{_T5}.0.SelfAttention.{x}.weight") for x in "qkvo"),
    Rule("blocks.{n}.pos_embedding.embedding.weight", f"{_T5}.0.SelfAttention.relative_attention_bias.weight"),
    Rule("blocks.{n}.norm2.weight", f"{_T5}.1.layer_norm.weight"),
    Rule("blocks.{n}.ffn.gate.0.weight", f"{_T5}.1.DenseReluDense.wi_0.weight"),
    Rule("blocks.{n}.ffn.fc1.weight", f"{_T5}.1.DenseReluDense.wi_1.weight"),
    Rule("blocks.{n}.ffn.fc2.weight", f"{_T5}.1.DenseReluDense.wo.weight"),
    Rule("norm.weight", "encoder.final_layer_norm.weight"),
)
"""Wan's own umT5 names (`models_t5_umt5-xxl-enc-bf16.pth`, Kijai) -> transformers."""


def _unfused(prefix: str, names: str, target: str) -> tuple[Rule, ...]:
    """`names` are the letters in row order of one fused projection; prefix.format(letter) is the separate one."""
    return tuple(
        Rule(f"{prefix.replace('*', letter)}.{{rest}}", f"{target}.{{rest}}", k, len(names))
        for k, letter in enumerate(names)
    )


_B = "blocks.{n}"
_FFN = tuple(Rule(f"{_B}.ffn.{w}.{{rest}}", f"{_B}.ffn.{w}.{{rest}}") for w in ("w1", "w2", "w3"))

FASTVIDEO_DIT: tuple[Rule, ...] = (
    Rule("patch_embed.{rest}", "x_embedder.{rest}"),
    Rule("time_embedder.linear_1.{rest}", "t_embedder.mlp.0.{rest}"),
    Rule("time_embedder.linear_2.{rest}", "t_embedder.mlp.2.{rest}"),
    Rule("caption_embedder.linear_1.{rest}", "y_embedder.y_proj.0.{rest}"),
    Rule("caption_embedder.linear_2.{rest}", "y_embedder.y_proj.2.{rest}"),
    Rule(f"{_B}.adaln_linear_1.{{rest}}", f"{_B}.adaLN_modulation.1.{{rest}}"),
    Rule(f"{_B}.norm_cross.{{rest}}", f"{_B}.pre_crs_attn_norm.{{rest}}"),
    *_unfused(f"{_B}.self_attn.to_*", "qkv", f"{_B}.attn.qkv"),
    Rule(f"{_B}.self_attn.to_out.{{rest}}", f"{_B}.attn.proj.{{rest}}"),
    Rule(f"{_B}.self_attn.q_norm.{{rest}}", f"{_B}.attn.q_norm.{{rest}}"),
    Rule(f"{_B}.self_attn.k_norm.{{rest}}", f"{_B}.attn.k_norm.{{rest}}"),
    Rule(f"{_B}.cross_attn.to_q.{{rest}}", f"{_B}.cross_attn.q_linear.{{rest}}"),
    *_unfused(f"{_B}.cross_attn.to_*", "kv", f"{_B}.cross_attn.kv_linear"),
    Rule(f"{_B}.cross_attn.to_out.{{rest}}", f"{_B}.cross_attn.proj.{{rest}}"),
    Rule(f"{_B}.cross_attn.q_norm.{{rest}}", f"{_B}.cross_attn.q_norm.{{rest}}"),
    Rule(f"{_B}.cross_attn.k_norm.{{rest}}", f"{_B}.cross_attn.k_norm.{{rest}}"),
    *_FFN,
    Rule("final_layer.adaln_linear.{rest}", "final_layer.adaLN_modulation.1.{rest}"),
    Rule("final_layer.proj.{rest}", "final_layer.linear.{rest}"),
)
"""FastVideo's diffusers-style conversions -> official names."""

WAN_DIT: tuple[Rule, ...] = (
    Rule("patch_embedding.{rest}", "x_embedder.proj.{rest}"),
    Rule("time_embedding.mlp.{n}.{rest}", "t_embedder.mlp.{n}.{rest}"),
    Rule("text_embedding.{n}.{rest}", "y_embedder.y_proj.{n}.{rest}"),
    Rule(f"{_B}.modulation.1.{{rest}}", f"{_B}.adaLN_modulation.1.{{rest}}"),
    Rule(f"{_B}.norm3.{{rest}}", f"{_B}.pre_crs_attn_norm.{{rest}}"),
    *_unfused(f"{_B}.self_attn.*", "qkv", f"{_B}.attn.qkv"),
    Rule(f"{_B}.self_attn.o.{{rest}}", f"{_B}.attn.proj.{{rest}}"),
    Rule(f"{_B}.self_attn.norm_q.{{rest}}", f"{_B}.attn.q_norm.{{rest}}"),
    Rule(f"{_B}.self_attn.norm_k.{{rest}}", f"{_B}.attn.k_norm.{{rest}}"),
    Rule(f"{_B}.cross_attn.q.{{rest}}", f"{_B}.cross_attn.q_linear.{{rest}}"),
    *_unfused(f"{_B}.cross_attn.*", "kv", f"{_B}.cross_attn.kv_linear"),
    Rule(f"{_B}.cross_attn.o.{{rest}}", f"{_B}.cross_attn.proj.{{rest}}"),
    Rule(f"{_B}.cross_attn.norm_q.{{rest}}", f"{_B}.cross_attn.q_norm.{{rest}}"),
    Rule(f"{_B}.cross_attn.norm_k.{{rest}}", f"{_B}.cross_attn.k_norm.{{rest}}"),
    *_FFN,
    Rule("head.head.{rest}", "final_layer.linear.{rest}"),
    Rule("head.modulation.1.{rest}", "final_layer.adaLN_modulation.1.{rest}"),
)
"""Kijai's single file, Wan-style -> official names."""

DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")

# A name that only files of that dialect have -> the dialect's table (None: official names, no map needed).
DIT_DIALECTS: dict[str, tuple[str, tuple[Rule, ...] | None]] = {
    "official": ("x_embedder.proj.weight", None),
    "wan": ("patch_embedding.weight", WAN_DIT),
    "fastvideo": ("patch_embed.proj.weight", FASTVIDEO_DIT),
}


@cache
def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for placeholder, group in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape(placeholder), group)
    return re.compile(pattern)


def _move(name: str, template: str, onto: str) -> str | None:
    match = _compile(template).fullmatch(name)
    return None if match is None else onto.format(**match.groupdict())


def rename(name: str, rules: Sequence[Rule]) -> Slot | None:
    """Where the tensor `name` belongs in the target naming; None when no rule knows it."""
    for rule in rules:
        if (target := _move(name, rule.source, rule.target)) is not None:
            return Slot(target, rule.part, rule.parts)
    return None


def sources(name: str, rules: Sequence[Rule]) -> list[tuple[str, Slot]]:
    """The inverse: the source names that make up `name` of the target naming, each with the rows it holds."""
    found = ((_move(name, rule.target, rule.source), Slot(name, rule.part, rule.parts)) for rule in rules)
    return [(source, slot) for source, slot in found if source is not None]


def original_name(name: str, rules: Sequence[Rule]) -> str | None:
    """The inverse of `rename` for a table without fused weights; None when no rule knows the name."""
    found = sources(name, rules)
    return found[0][0] if len(found) == 1 else None


def common_prefix(names: Iterable[str], prefixes: Sequence[str] = DIT_PREFIXES) -> str:
    """The one of `prefixes` that every name starts with, or "". Names without a dot (markers) do not count."""
    dotted = [name for name in names if "." in name]
    return next((p for p in prefixes if dotted and all(name.startswith(p) for name in dotted)), "")
