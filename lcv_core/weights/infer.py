"""Configurations read off tensor shapes: for single files without a config.json, and to check one that is there."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from lcv_core.config import DiTConfig, TextConfig, VAEConfig
from lcv_core.errors import CheckpointError, InputError
from lcv_core.weights.assemble import Assembly


def _block_count(names: Any, prefix: str) -> int:
    """1 + the highest N of `<prefix>N.`; 0 when there is none."""
    numbers = (name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def dit_facts(tensors: Assembly) -> dict[str, Any]:
    """The DiTConfig fields, and `ffn_dim`, that the shapes of these tensors (official names) tell."""
    facts: dict[str, Any] = {"depth": _block_count(tensors.keys(), "blocks.")}

    def shape(name: str, dims: int) -> tuple[int, ...] | None:
        return tensors.shape(name) if name in tensors and len(tensors.shape(name)) == dims else None

    if patch := shape("x_embedder.proj.weight", 5):
        facts |= {"hidden_size": patch[0], "in_channels": patch[1], "patch_size": patch[2:]}
        if (head := shape("blocks.0.attn.q_norm.weight", 1)) and head[0]:
            facts["num_heads"] = patch[0] // head[0]
        if (final := shape("final_layer.linear.weight", 2)) and math.prod(patch[2:]):
            facts["out_channels"] = final[0] // math.prod(patch[2:])
    if text := shape("y_embedder.y_proj.0.weight", 2):
        facts["caption_channels"] = text[1]
    if time := shape("t_embedder.mlp.0.weight", 2):
        facts |= {"adaln_tembed_dim": time[0], "frequency_embedding_size": time[1]}
    if ffn := shape("blocks.0.ffn.w1.weight", 2):
        facts["ffn_dim"] = ffn[0]
    return facts


def infer_dit_config(tensors: Assembly, what: str) -> DiTConfig:
    """The config of a file without one. What shapes cannot tell (zero padding of text, BSA) is as released."""
    facts = dit_facts(tensors)
    ffn_dim = facts.pop("ffn_dim", None)
    absent = {f.name for f in dataclasses.fields(DiTConfig)} - facts.keys()
    absent -= {"mlp_ratio", "text_tokens_zero_pad", "bsa", "timestep_precision"}
    if absent or ffn_dim is None or not facts["depth"]:
        raise CheckpointError(
            f"{what} is incomplete: {', '.join(sorted(absent)) or 'the blocks'} cannot be read off its tensors;"
            " download it again, or give the whole folder if it is one shard of several"
        )
    try:
        config = DiTConfig(**facts)
        if config.ffn_dim != ffn_dim:
            config = dataclasses.replace(config, mlp_ratio=1.5 * ffn_dim / config.hidden_size)
    except InputError as error:
        raise CheckpointError(f"{what}: {error}") from None
    return config


def check_dit_config(config: DiTConfig, tensors: Assembly, config_path: Path) -> None:
    """CheckpointError naming the field, when the config says something else than the tensors."""
    for name, value in dit_facts(tensors).items():
        stated = getattr(config, name)
        if stated != value:
            field = "mlp_ratio (feed-forward width)" if name == "ffn_dim" else name
            raise CheckpointError(
                f"{config_path} says {field} = {_plain(stated)}, but the tensors beside it have {_plain(value)};"
                " the config and the weights are of different models"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def infer_vae_config(tensors: Assembly, what: str, stated: VAEConfig | None = None) -> VAEConfig:
    """base_dim and z_dim from the shapes (diffusers names); CheckpointError when `stated` disagrees."""
    try:
        base_dim, z_dim = tensors.shape("encoder.conv_in.weight")[0], tensors.shape("post_quant_conv.weight")[0]
    except (KeyError, IndexError):
        raise CheckpointError(f"{what} is not a whole Wan 2.1 VAE; download it again") from None
    if stated is not None:
        for name, value in (("base_dim", base_dim), ("z_dim", z_dim)):
            if getattr(stated, name) != value:
                raise CheckpointError(f"{what}: its config says {name} = {getattr(stated, name)}, the tensors {value}")
        return stated
    try:
        return VAEConfig(base_dim=base_dim, z_dim=z_dim)
    except InputError as error:
        raise CheckpointError(f"{what}: {error}") from None


def infer_text_config(tensors: Assembly, what: str) -> TextConfig:
    """From a single umT5 file (transformers names)."""
    layer = "encoder.block.0.layer"
    try:
        vocab_size, d_model = tensors.shape("shared.weight")
        buckets, heads = tensors.shape(f"{layer}.0.SelfAttention.relative_attention_bias.weight")
        inner = tensors.shape(f"{layer}.0.SelfAttention.q.weight")[0]
        d_ff = tensors.shape(f"{layer}.1.DenseReluDense.wi_0.weight")[0]
    except (KeyError, ValueError):
        raise CheckpointError(f"{what} is not a whole umT5 encoder; download it again") from None
    layers = _block_count(tensors.keys(), "encoder.block.")
    return TextConfig(vocab_size, d_model, inner // heads, d_ff, layers, heads, buckets)
