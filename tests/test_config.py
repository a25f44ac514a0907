"""Configurations: what is read, what is refused and how, and that nothing is lost on the way out and in again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lcv_core.config import (
    LONGCAT_VIDEO,
    UMT5_XXL,
    WAN_VAE,
    BSAConfig,
    DiTConfig,
    Native,
    TextConfig,
    VAEConfig,
    read_json,
)
from lcv_core.errors import CheckpointError, InputError

# The released dit/config.json, key for key (section 1.2 of the specification).
OFFICIAL_DIT: dict[str, Any] = {
    "_class_name": "LongCatVideoTransformer3DModel", "_diffusers_version": "0.32.0",
    "in_channels": 16, "out_channels": 16, "hidden_size": 4096, "depth": 48, "num_heads": 32, "caption_channels": 4096,
    "cp_split_hw": None, "mlp_ratio": 4, "adaln_tembed_dim": 512, "frequency_embedding_size": 256,
    "patch_size": [1, 2, 2], "enable_flashattn2": True, "enable_flashattn3": False, "enable_xformers": False,
    "enable_bsa": False, "text_tokens_zero_pad": True,
    "bsa_params": {"sparsity": 0.9375, "chunk_3d_shape_q": [4, 4, 4], "chunk_3d_shape_k": [4, 4, 4]},
}  # fmt: skip
TINY: dict[str, Any] = {"hidden_size": 64, "depth": 2, "num_heads": 4}


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def test_the_official_config_is_the_preset() -> None:
    assert DiTConfig.from_dict(OFFICIAL_DIT) == LONGCAT_VIDEO
    assert LONGCAT_VIDEO.head_dim == 128
    assert LONGCAT_VIDEO.ffn_dim == 11008


@pytest.mark.parametrize(("hidden", "ratio", "expected"), [(4096, 4, 11008), (64, 4, 256), (128, 4, 512), (96, 8, 512)])
def test_ffn_width(hidden: int, ratio: float, expected: int) -> None:
    assert DiTConfig(hidden_size=hidden, num_heads=hidden // 16, mlp_ratio=ratio).ffn_dim == expected


def test_what_the_config_says_wins_over_the_preset() -> None:
    data = OFFICIAL_DIT | {"text_tokens_zero_pad": False, "bsa_params": {"sparsity": 0.5, "cdf_threshold": 0.9}}
    config = DiTConfig.from_dict(data)
    assert config.text_tokens_zero_pad is False
    assert config.bsa == BSAConfig(sparsity=0.5, cdf_threshold=0.9)


@pytest.mark.parametrize("cls", [DiTConfig, VAEConfig, TextConfig])
def test_unknown_keys_are_ignored(cls: Any) -> None:
    data = TINY | {"model_max_length": 512, "architectures": ["X"], "attn_scales": []}
    assert cls.from_dict(data) == cls.from_dict(TINY)


CHANGED = [
    DiTConfig(
        hidden_size=96, depth=3, num_heads=6, caption_channels=40, mlp_ratio=2.5, adaln_tembed_dim=24,
        frequency_embedding_size=64, patch_size=(1, 1, 1), text_tokens_zero_pad=False, timestep_precision="fp32",
        bsa=BSAConfig(sparsity=None, block_q=(2, 4, 8), block_k=(1, 2, 3), cdf_threshold=0.4),
    ),
    VAEConfig(base_dim=6, z_dim=2, dim_mult=(1, 1, 2, 3), num_res_blocks=1, latents_mean=(0, 1), latents_std=(1, 2)),
    TextConfig(vocab_size=9, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, layer_norm_epsilon=1e-5),
]  # fmt: skip


@pytest.mark.parametrize("config", [LONGCAT_VIDEO, WAN_VAE, UMT5_XXL, *CHANGED], ids=lambda c: type(c).__name__)
def test_round_trip_through_json(config: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert type(config).from_json(path) == config
    assert type(config).from_dict(config.to_dict()) == config


def test_the_official_dialect_is_written() -> None:
    written = LONGCAT_VIDEO.to_dict()
    assert {key: written[key] for key in OFFICIAL_DIT.keys() & written.keys()} == {
        key: OFFICIAL_DIT[key] for key in OFFICIAL_DIT.keys() & written.keys()
    }
    assert "timestep_precision" not in written  # not an official key: only written when it is not the official one
    assert dataclasses.replace(LONGCAT_VIDEO, timestep_precision="fp32").to_dict()["timestep_precision"] == "fp32"


@pytest.mark.parametrize(
    ("cls", "data", "words"),
    [
        (DiTConfig, OFFICIAL_DIT | {"_class_name": "LongCatVideoAvatarTransformer3DModel"}, "Avatar"),
        (DiTConfig, OFFICIAL_DIT | {"audio_window": 5}, "Avatar"),
        (DiTConfig, {"_class_name": "WanTransformer3DModel", "num_layers": 40}, "WanTransformer3DModel"),
        (DiTConfig, TINY | {"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
        (DiTConfig, TINY | {"_class_name": None}, "not a LongCat-Video DiT config"),
        (DiTConfig, {"hidden_size": 64}, "missing keys: ['depth', 'num_heads']"),
        (VAEConfig, {"_class_name": "AutoencoderKLCosmos"}, "AutoencoderKLCosmos"),
        (VAEConfig, {"attn_scales": [1.0]}, "attn_scales"),
        (TextConfig, {"model_type": "t5"}, "umt5"),
    ],
)
def test_another_models_config_is_refused(cls: Any, data: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        cls.from_dict(data)
    assert words in one_sentence(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0), ("hidden_size", "64"), ("hidden_size", True), ("hidden_size", None), ("hidden_size", 66),
        ("hidden_size", 48), ("depth", 2.0), ("num_heads", -4), ("num_heads", 5), ("in_channels", []),
        ("frequency_embedding_size", 255), ("mlp_ratio", "4"), ("mlp_ratio", 0), ("mlp_ratio", float("nan")),
        ("patch_size", 2), ("patch_size", [2, 2]), ("patch_size", [2, 2, 2]), ("patch_size", [1, 2, "2"]),
        ("patch_size", [1, 0, 2]), ("text_tokens_zero_pad", "yes"), ("timestep_precision", "bf16"),
        ("bsa_params", [0.9]), ("bsa_params", {"chunk_3d_shape_q": [4, 4, 4]}), ("bsa_params", {"sparsity": 1.0}),
        ("bsa_params", {"sparsity": "0.9"}), ("bsa_params", {"sparsity": -0.1}),
        ("bsa_params", {"cdf_threshold": 0.0}), ("bsa_params", {"sparsity": 0.5, "cdf_threshold": 1.5}),
        ("bsa_params", {"sparsity": 0.5, "chunk_3d_shape_q": 4}),
        ("bsa_params", {"sparsity": 0.5, "chunk_3d_shape_k": [4, 4, 0]}),
    ],
)  # fmt: skip
def test_bad_dit_values(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        DiTConfig.from_dict(TINY | {key: value})
    names = {key} | (set(value) if isinstance(value, dict) else set())
    message = one_sentence(error)
    words = names | {"num_heads", "head_dim", "block_q", "block_k", "BSAConfig"}
    assert any(word in message for word in words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_dim", 5), ("base_dim", "96"), ("base_dim", 0), ("z_dim", 8), ("z_dim", None), ("num_res_blocks", 0),
        ("dim_mult", [1, 2, 4]), ("dim_mult", 4), ("dim_mult", [1, 2, 4, "x"]),
        ("temperal_downsample", [True, True, True]), ("latents_mean", None), ("latents_mean", ["a"] * 16),
        ("latents_std", [0.0] * 16), ("latents_std", [1.0] * 15),
    ],
)  # fmt: skip
def test_bad_vae_values(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        VAEConfig.from_dict({key: value})
    message = one_sentence(error)
    assert message.startswith("VAE config") and (key in message or "z_dim" in message)


@pytest.mark.parametrize(("key", "value"), [("d_model", "x"), ("num_layers", 0), ("layer_norm_epsilon", 0)])
def test_bad_text_values(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        TextConfig.from_dict({key: value})
    assert key in one_sentence(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [("height", 100), ("width", "x"), ("num_frames", 92), ("num_cond_frames", 12), ("frame_rate", 0)],
)
def test_bad_native_values(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        Native.from_dict({key: value})
    assert key in one_sentence(error)


def test_native_defaults_are_the_released_models() -> None:
    native = Native.from_dict({"model_name": "LongCat-Video"})
    assert dataclasses.astuple(native) == (480, 832, 93, 13, 15.0)


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not valid JSON"), ("[1]", "holds a list"), (None, "does not exist")]
)
def test_read_json_errors(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_json(path)
    assert words in one_sentence(error)
    with pytest.raises(CheckpointError, match="folder"):
        read_json(tmp_path)
