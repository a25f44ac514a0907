"""What a checkpoint is made of, as frozen dataclasses that read the official JSON files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lcv_core.errors import CheckpointError, InputError
from lcv_core.names import TimestepPrecision, check_name
from lcv_core.shapes import check_frames, check_size

# Per-channel statistics of the Wan 2.1 latent space: what the DiT sees is (z - mean) / std.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError when it is missing, damaged or not an object."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, expected a JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected an object with the config's keys")
    return data


def _known_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `data` that `cls` has a field for, lists as tuples. Unknown keys are ignored on purpose."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _need_counts(config: Any, what: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _need(_is_count(value), f"{what}: {name} must be a positive integer, got {value!r}")


def _freeze(config: Any, *names: str) -> None:
    """Lists as tuples. What is no list becomes a tuple of one, for the check of the length to find."""
    for name in names:
        value = getattr(config, name)
        object.__setattr__(config, name, tuple(value) if isinstance(value, list | tuple) else (value,))


@dataclass(frozen=True)
class BSAConfig:
    """Block sparse attention: which key blocks each query block keeps.

    sparsity: part of the key blocks dropped by top-k, in [0, 1); None leaves the choice to `cdf_threshold` alone.
    block_q, block_k: block shapes in tokens (time, height, width).
    cdf_threshold: in (0, 1]; keep the most probable blocks whose cumulative probability stays within it.
        With both given the larger count wins.
    eight_bits: q.k in int8 and p.v in fp8, on Hopper GPUs and newer; inference only. Part of a run, not of a model: a
        checkpoint's configuration neither has nor gets it.
    """

    sparsity: float | None = 0.9375
    block_q: tuple[int, int, int] = (4, 4, 4)
    block_k: tuple[int, int, int] = (4, 4, 4)
    cdf_threshold: float | None = None
    eight_bits: bool = False

    def __post_init__(self) -> None:
        _freeze(self, "block_q", "block_k")
        _need(
            self.sparsity is not None or self.cdf_threshold is not None,
            "BSAConfig needs sparsity, cdf_threshold or both",
        )
        s, cdf = self.sparsity, self.cdf_threshold
        if s is not None:
            _need(_is_number(s) and 0.0 <= s < 1.0, f"BSA sparsity must be in [0, 1), got {s!r}")
        if cdf is not None:
            _need(_is_number(cdf) and 0.0 < cdf <= 1.0, f"BSA cdf_threshold must be in (0, 1], got {cdf!r}")
        for name in ("block_q", "block_k"):
            block = getattr(self, name)
            _need(
                len(block) == 3 and all(map(_is_count, block)),
                f"BSA {name} must be three positive token counts (time, height, width), got {block}",
            )

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """From the `bsa_params` entry of an official dit/config.json."""
        return cls(
            sparsity=params.get("sparsity"),
            cdf_threshold=params.get("cdf_threshold"),
            block_q=params.get("chunk_3d_shape_q", (4, 4, 4)),
            block_k=params.get("chunk_3d_shape_k", (4, 4, 4)),
        )

    def to_params(self) -> dict[str, Any]:
        """The inverse of `from_params`."""
        params: dict[str, Any] = {
            "sparsity": self.sparsity,
            "chunk_3d_shape_q": list(self.block_q),
            "chunk_3d_shape_k": list(self.block_k),
        }
        if self.cdf_threshold is not None:
            params["cdf_threshold"] = self.cdf_threshold
        return params


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer, field names as in the official dit/config.json; defaults are LongCat-Video 13.6B.

    timestep_precision: "model" rounds timesteps to the dtype of the weights, as the official model does (in bf16 only
        44 of the 50 base timesteps stay distinct); "fp32" keeps them exact. Not part of the official file.
    """

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 4096
    depth: int = 48
    num_heads: int = 32
    caption_channels: int = 4096
    mlp_ratio: float = 4
    adaln_tembed_dim: int = 512
    frequency_embedding_size: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_tokens_zero_pad: bool = True
    bsa: BSAConfig = field(default_factory=BSAConfig)
    timestep_precision: TimestepPrecision = "model"

    def __post_init__(self) -> None:
        _need_counts(
            self, "DiT config", "in_channels", "out_channels", "hidden_size", "depth", "num_heads", "caption_channels",
            "adaln_tembed_dim", "frequency_embedding_size",
        )  # fmt: skip
        _freeze(self, "patch_size")
        _need(
            _is_number(self.mlp_ratio) and self.mlp_ratio > 0,
            f"DiT config: mlp_ratio must be a positive number, got {self.mlp_ratio!r}",
        )
        _need(
            isinstance(self.text_tokens_zero_pad, bool),
            f"DiT config: text_tokens_zero_pad must be true or false, got {self.text_tokens_zero_pad!r}",
        )
        _need(
            len(self.patch_size) == 3 and self.patch_size[0] == 1 and all(map(_is_count, self.patch_size)),
            f"DiT config: patch_size must be [1, p, p] (no patching in time), got {list(self.patch_size)}",
        )
        _need(
            self.hidden_size % self.num_heads == 0,
            f"DiT config: hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}",
        )
        _need(
            self.head_dim % 8 == 0,
            f"DiT config: head_dim {self.head_dim} (hidden_size / num_heads) must be a multiple of 8 for 3-D rope",
        )
        _need(self.frequency_embedding_size % 2 == 0, "DiT config: frequency_embedding_size must be even")
        check_name("timestep_precision", self.timestep_precision, TimestepPrecision)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """SwiGLU width: two thirds of hidden * mlp_ratio, rounded up to a multiple of 256 (4096 * 4 -> 11008)."""
        width = int(2 * int(self.hidden_size * self.mlp_ratio) / 3)
        return (width + 255) // 256 * 256

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From an official config object; unknown keys are ignored, another model's config is refused."""
        name = str(data.get("_class_name", "LongCatVideoTransformer3DModel"))
        if "Avatar" in name or "audio_window" in data or "audio_dim" in data:
            raise CheckpointError("this is a LongCat-Video-Avatar config; only the base LongCat-Video is supported")
        missing = [key for key in ("hidden_size", "depth", "num_heads") if key not in data]
        if missing or not name.startswith("LongCat"):
            raise CheckpointError(
                f"not a LongCat-Video DiT config (_class_name {name!r}, missing keys: {missing or 'none'});"
                " expected the dit/config.json of a LongCat-Video checkpoint"
            )
        kwargs = _known_fields(cls, data)
        kwargs.pop("bsa", None)
        if params := data.get("bsa_params"):
            _need(isinstance(params, Mapping), f"DiT config: bsa_params must be an object, got {params!r}")
            kwargs["bsa"] = BSAConfig.from_params(params)
        return cls(**kwargs)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """From an official dit/config.json."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """The official config object (`timestep_precision` is written only when it is not the official one)."""
        data: dict[str, Any] = {"_class_name": "LongCatVideoTransformer3DModel"}
        for f in dataclasses.fields(self):
            if f.name not in ("bsa", "timestep_precision"):
                value = getattr(self, f.name)
                data[f.name] = list(value) if isinstance(value, tuple) else value
        data |= {"enable_bsa": False, "bsa_params": self.bsa.to_params(), "cp_split_hw": None}
        if self.timestep_precision != "model":
            data["timestep_precision"] = self.timestep_precision
        return data


@dataclass(frozen=True)
class VAEConfig:
    """The Wan 2.1 causal video VAE, field names as in the official vae/config.json (the spelling included)."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    def __post_init__(self) -> None:
        _freeze(self, "dim_mult", "temperal_downsample", "latents_mean", "latents_std")
        _need_counts(self, "VAE config", "base_dim", "z_dim", "num_res_blocks")
        _need(self.base_dim % 2 == 0, f"VAE config: base_dim must be even, got {self.base_dim}")
        _need(
            len(self.dim_mult) == 4
            and all(map(_is_count, self.dim_mult))
            and self.temperal_downsample == (False, True, True),
            "VAE config: only the Wan 2.1 layout is supported (four stages, temperal_downsample [false, true, true]);"
            f" got dim_mult {list(self.dim_mult)}, temperal_downsample {list(self.temperal_downsample)}",
        )
        _need(
            len(self.latents_mean) == len(self.latents_std) == self.z_dim,
            f"VAE config: latents_mean and latents_std need z_dim = {self.z_dim} entries each",
        )
        _need(
            all(map(_is_number, self.latents_mean)) and all(_is_number(std) and std > 0 for std in self.latents_std),
            "VAE config: latents_mean must be numbers and latents_std positive numbers",
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        name = data.get("_class_name", "AutoencoderKLWan")
        if name != "AutoencoderKLWan":
            raise CheckpointError(f"expected a Wan 2.1 VAE config (_class_name AutoencoderKLWan), got {name}")
        if data.get("attn_scales"):
            raise CheckpointError(f"VAE config: attn_scales {data['attn_scales']} is not supported, expected []")
        return cls(**_known_fields(cls, data))

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """From an official vae/config.json."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0} | data


@dataclass(frozen=True)
class TextConfig:
    """The umT5 encoder, field names as in a transformers `UMT5Config`; defaults are umT5-XXL."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _need_counts(
            self, "text config", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
            "relative_attention_num_buckets", "relative_attention_max_distance",
        )  # fmt: skip
        _need(
            _is_number(self.layer_norm_epsilon) and self.layer_norm_epsilon > 0,
            f"text config: layer_norm_epsilon must be a positive number, got {self.layer_norm_epsilon!r}",
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        kind = data.get("model_type", "umt5")
        if kind != "umt5":
            raise CheckpointError(f"expected a umT5 text encoder config (model_type umt5), got {kind!r}")
        return cls(**_known_fields(cls, data))

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """From a text_encoder/config.json."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        extra = {
            "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True, "tie_word_embeddings": False, "dropout_rate": 0.0,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        }  # fmt: skip
        return extra | dataclasses.asdict(self)


@dataclass(frozen=True)
class Native:
    """The job a checkpoint was made for: what a pipeline or the command line does when it is not told otherwise.

    The defaults are those of LongCat-Video; a checkpoint of another scale states its own under "native" in
    model_index.json. Sizes in pixels; num_frames counts condition frames too.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 93
    num_cond_frames: int = 13
    frame_rate: float = 15.0

    def __post_init__(self) -> None:
        _need_counts(self, "native sizes", "height", "width", "num_frames", "num_cond_frames")
        check_size(self.height, self.width)
        check_frames(self.num_frames)
        check_frames(self.num_cond_frames, name="num_cond_frames")
        _need(
            _is_number(self.frame_rate) and self.frame_rate > 0,
            f"native sizes: frame_rate must be a positive number, got {self.frame_rate!r}",
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**_known_fields(cls, data))


LONGCAT_VIDEO = DiTConfig()
WAN_VAE = VAEConfig()
UMT5_XXL = TextConfig()
