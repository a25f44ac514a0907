"""Random checkpoints in the official folder layout: small enough for any machine, real enough for every code path."""

from __future__ import annotations

import dataclasses
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lcv_core.config import DiTConfig, Native, TextConfig, VAEConfig
from lcv_core.errors import InputError
from lcv_core.files import replace_folder, temporary_path
from lcv_core.text.vocabulary import padded_vocab_size, write_tokenizer
from lcv_core.weights.lora_keys import OFFICIAL_SCALE, AdapterFile, official_names, official_targets
from lcv_core.weights.write import write_json, write_sharded, write_tensors

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Preset:
    """The configs of a checkpoint family member. The text vocabulary is set to that of the built-in tokenizer."""

    dit: DiTConfig
    vae: VAEConfig
    text: TextConfig
    native: Native
    lora_rank: int = 4


PRESETS: dict[str, Preset] = {
    # One minute of CPU makes a clip: what the demos, the workflows and the trained miniature use.
    "mini": Preset(
        dit=DiTConfig(hidden_size=192, depth=6, num_heads=6, caption_channels=128, adaln_tembed_dim=96),
        vae=VAEConfig(base_dim=16),
        text=TextConfig(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
        native=Native(height=96, width=160, num_frames=33, num_cond_frames=13, frame_rate=15.0),
    ),
    # Seconds, for tests.
    "tiny": Preset(
        dit=DiTConfig(hidden_size=64, depth=2, num_heads=4, caption_channels=32, adaln_tembed_dim=32),
        vae=VAEConfig(base_dim=4),
        text=TextConfig(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        native=Native(height=32, width=48, num_frames=9, num_cond_frames=5, frame_rate=15.0),
    ),
}

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 12.0,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "time_shift_type": "linear",
}

_LORA_UP_STD = 1e-2  # visible in the output, far from taking it over
_SILU_GAIN = 1.67  # SiLU passes on 0.36 of the second moment of a unit normal; 1 / sqrt(0.36)

_SHARDS = 2


def init_checkpoint(folder: str | Path, preset: str = "mini", *, seed: int = 0, overwrite: bool = False) -> Path:
    """Write a random-weight fp32 checkpoint of a preset, in the official layout, and return its folder.

    The same seed writes the same bytes on every machine. The folder appears complete or not at all. InputError for an
    unknown preset, and for a folder that already holds something: with overwrite an earlier checkpoint (recognised by
    its model_index.json) is replaced, anything else is still left alone.
    """
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    folder = Path(folder).expanduser().resolve()
    _check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_path(folder)
    try:
        partial.mkdir()
        _write(partial, PRESETS[preset], seed)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder for the checkpoint")
    if not overwrite:
        raise InputError(f"{folder} is not empty; choose another folder, or ask for overwrite")
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} is not a checkpoint (no model_index.json), so it is not overwritten; empty it first"
        )


def _write(folder: Path, preset: Preset, seed: int) -> None:
    text_config = dataclasses.replace(preset.text, vocab_size=padded_vocab_size())
    dit = dit_state(preset.dit, seed)
    write_json(
        folder / "model_index.json", {"model_name": "LongCat-Video", "native": dataclasses.asdict(preset.native)}
    )
    write_json(folder / "dit" / "config.json", preset.dit.to_dict())
    write_sharded(folder / "dit", "diffusion_pytorch_model", dit, _SHARDS)
    write_json(folder / "text_encoder" / "config.json", text_config.to_dict())
    write_sharded(folder / "text_encoder", "model", text_state(text_config, seed), _SHARDS)
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "vae" / "config.json", preset.vae.to_dict())
    write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae_state(preset.vae, seed))
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    shapes = {name: tuple(t.shape) for name, t in dit.items()}
    for name in get_args(AdapterFile):
        state = lora_state(shapes, name, rank=preset.lora_rank, seed=seed)
        write_tensors(folder / "lora" / f"{name}.safetensors", state)


def dit_state(config: DiTConfig, seed: int = 0) -> State:
    """Random DiT weights, fp32. Small modulation keeps the residual stream, and so the velocity, near unit scale."""
    from lcv_core.dit.model import LongCatDiT

    def gain(name: str) -> float:
        if "cross_attn.proj" in name:
            return 8.0  # zeroed pads take part in the text attention and water its average down to almost nothing
        return 0.5 if "adaLN_modulation" in name or name.startswith("final_layer.linear") else 1.0

    return _random_state(_shapes(LongCatDiT(config, device="meta", dtype=torch.float32)), f"dit/{seed}", gain)


def vae_state(config: VAEConfig, seed: int = 0) -> State:
    """Random VAE weights, fp32: latents of unit scale decode to varied pixels inside [-1, 1], and pixels to such
    latents."""
    from lcv_core.vae.model import WanVAE

    def gain(name: str) -> float:
        if "conv_out" in name:
            return 0.4 * _SILU_GAIN  # most pixels stay clear of the clamp
        if ".conv1." in name:
            return _SILU_GAIN
        # Residual branches at half strength: the trunk keeps a spatial trace of the latents through all the blocks.
        return 0.5 * _SILU_GAIN if ".conv2." in name else 1.0

    state = _random_state(_shapes(WanVAE(config, device="meta")), f"vae/{seed}", gain)
    # The last encoder layer is (mean, logvar). Latents are normalised with the statistics of the trained VAE, so its
    # mean has to have them; a small variance makes sampling the posterior close to taking its mode.
    z = config.z_dim
    weight, bias = state["quant_conv.weight"], state["quant_conv.bias"]
    weight[:z] *= torch.tensor(config.latents_std).view(-1, *[1] * (weight.ndim - 1))
    weight[z:] *= 0.1
    bias[:z] = torch.tensor(config.latents_mean)
    bias[z:] = -6.0
    return state


def text_state(config: TextConfig, seed: int = 0) -> State:
    """Random umT5 encoder weights, fp32, scaled as T5 initialises them (attention is unscaled, so q is small)."""
    from lcv_core.text.encoder import build_text_model

    def gain(name: str) -> float:
        if name == "shared.weight":
            return math.sqrt(config.d_model)  # an embedding: unit variance, whatever its width
        if name.endswith("relative_attention_bias.weight"):
            return math.sqrt(config.num_heads)  # unit variance too, so that positions matter to a random model
        return 1 / math.sqrt(config.d_kv) if ".q." in name else 1.0

    return _random_state(_shapes(build_text_model(config, dtype=torch.float32)), f"text/{seed}", gain)


def lora_state(dit_shapes: Shapes, name: AdapterFile, *, rank: int = 4, seed: int = 0) -> State:
    """A random adapter for DiT weights of these shapes, in the dialect of the official files, fp32.

    name: "cfg_step_lora" (24 tensors a block) or "refinement_lora" (32 a block and 7 for the final layer).
    """
    depth = 1 + max(int(key.split(".")[1]) for key in dit_shapes if key.startswith("blocks."))
    state: State = {}
    for target, parts in official_targets(name, depth).items():
        out_features, in_features = dit_shapes[f"{target}.weight"]
        down, ups, scale = official_names(target, parts)
        salt = f"{name}/{seed}/{target}"
        state[down] = _uniform(f"{salt}/down", (parts * rank, in_features), 1 / math.sqrt(in_features))
        for k, up in enumerate(ups):
            state[up] = _uniform(f"{salt}/up{k}", (out_features // parts, rank), _LORA_UP_STD)
        state[scale] = torch.tensor(OFFICIAL_SCALE)
    return state


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _random_state(shapes: Shapes, salt: str, gain: Callable[[str], float]) -> State:
    """Biases 0, norm weights 1, everything else random with standard deviation gain(name) / sqrt(fan_in)."""
    state: State = {}
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            state[name] = torch.zeros(shape)
        elif name.endswith(".gamma") or len(shape) == 1:
            state[name] = torch.ones(shape)
        else:
            state[name] = _uniform(f"{salt}/{name}", shape, gain(name) / math.sqrt(math.prod(shape[1:])))
    return state


def _uniform(salt: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Uniform around 0 with a standard deviation, from a stream of its own.

    Not normal: torch's randn goes through log and cos, whose last bits depend on the processor; rand is 24 random bits
    and one exact scaling. A stream per tensor keeps every tensor the same when others come or go.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(salt.encode()))
    return (torch.rand(shape, generator=generator) * 2 - 1) * (std * math.sqrt(3.0))
