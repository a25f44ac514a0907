"""Descriptions of checkpoints, without reading their weights: real-size ones are sparse files here."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcv_core.config import LONGCAT_VIDEO, UMT5_XXL, WAN_VAE, DiTConfig, Native
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import CheckpointError
from lcv_core.text.encoder import build_text_model
from lcv_core.vae.model import WanVAE
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.init import init_checkpoint
from lcv_core.weights.inspect import estimate_memory, inspect_checkpoint

Shapes = dict[str, tuple[int, ...]]
ALL_TASKS = ("t2v", "i2v", "continue", "long", "refine", "distilled")
SIZES = {"F32": 4, "BF16": 2}


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def sparse_file(path: Path, shapes: Shapes, dtype: str = "F32") -> None:
    """A valid safetensors file of that size that takes no space on disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    data = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    os.truncate(path, 8 + len(data) + offset)


def sparse_shards(folder: Path, stem: str, shapes: Shapes, count: int) -> None:
    names = list(shapes)
    shards = [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{count:05d}.safetensors"
        sparse_file(folder / file, {name: shapes[name] for name in shard})
        weight_map |= dict.fromkeys(shard, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def official_lora(targets: dict[str, tuple[int, int, int]]) -> Shapes:
    """target -> (parts, in, out), rank 128, in the official dialect."""
    shapes: Shapes = {}
    for target, (n, i, o) in targets.items():
        name = "___lorahyphen___".join(["lora", *target.split(".")])
        ups = ["lora_up.weight"] if n == 1 else [f"lora_up.blocks.{k}.weight" for k in range(n)]
        shapes |= {f"{name}.lora_down.weight": (128 * n, i), f"{name}.alpha_scale": ()}
        shapes |= {f"{name}.{up}": (o // n, 128) for up in ups}
    return shapes


def cfg_step_targets() -> dict[str, tuple[int, int, int]]:
    block = {
        "attn.qkv": (3, 4096, 12288), "attn.proj": (1, 4096, 4096), "cross_attn.q_linear": (1, 4096, 4096),
        "cross_attn.kv_linear": (2, 4096, 8192), "ffn.w1": (1, 4096, 11008), "ffn.w2": (1, 11008, 4096),
        "ffn.w3": (1, 4096, 11008),
    }  # fmt: skip
    return {f"blocks.{n}.{target}": facts for n in range(48) for target, facts in block.items()}


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official repository, 80 GB by its headers, a few hundred kilobytes on disk."""
    root = tmp_path_factory.mktemp("real")
    probe = root / "probe"
    probe.touch()
    os.truncate(probe, 2**36)
    if probe.stat().st_blocks > 1000:
        pytest.skip("this file system has no sparse files, so a real-size checkpoint would take 80 GB")
    probe.unlink()
    sparse_shards(root / "dit", "diffusion_pytorch_model", shapes_of(LongCatDiT(LONGCAT_VIDEO, device="meta")), 6)
    sparse_shards(root / "text_encoder", "model", shapes_of(build_text_model(UMT5_XXL, device="meta")), 5)
    sparse_file(root / "vae" / "diffusion_pytorch_model.safetensors", shapes_of(WanVAE(WAN_VAE, device="meta")))
    for folder, config in (("dit", LONGCAT_VIDEO), ("text_encoder", UMT5_XXL), ("vae", WAN_VAE)):
        (root / folder / "config.json").write_text(json.dumps(config.to_dict()))
    sparse_file(root / "lora" / "cfg_step_lora.safetensors", official_lora(cfg_step_targets()))
    (root / "tokenizer").mkdir()
    (root / "model_index.json").write_text('{"model_name": "LongCat-Video"}')
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("inspect") / "tiny", preset="tiny")


def test_the_real_thing_in_seconds(real_size: Path) -> None:
    start = time.perf_counter()
    info = inspect_checkpoint(real_size)
    assert time.perf_counter() - start < 10
    assert (info.kind, info.config, info.native, info.flow_shift) == ("official folder", LONGCAT_VIDEO, Native(), 12.0)
    parts = {part.name: part for part in info.parts}
    assert {name: part.parameters for name, part in parts.items()} == {
        "dit": 13_581_071_424,
        "vae": 126_892_531,
        "text_encoder": 5_680_910_336,
    }
    assert info.parameters == 13_581_071_424 + 126_892_531 + 5_680_910_336
    assert parts["dit"].dtypes == {"float32": 4 * 13_581_071_424}
    assert parts["dit"].stored_bytes == 2 * parts["dit"].bf16_bytes < parts["dit"].file_bytes
    (adapter,) = info.adapters
    assert (adapter.name, adapter.dialect, adapter.ranks, len(adapter.targets)) == ("distill", "official", (128,), 336)
    assert set(info.missing) == {"refinement"} and "refinement_lora" in info.missing["refinement"]
    assert info.tasks == tuple(task for task in ALL_TASKS if task != "refine")


def test_real_size_model_opens_on_meta(real_size: Path) -> None:
    start = time.perf_counter()
    checkpoint = open_checkpoint(real_size)
    assert checkpoint.dit_config == LONGCAT_VIDEO and checkpoint.missing == ()
    assert len(list(checkpoint.dit_tensors.keys())) == 1022
    with torch.device("meta"):
        assert shapes_of(LongCatDiT(checkpoint.dit_config)) == {
            name: checkpoint.dit_tensors.shape(name)
            for name in checkpoint.dit_tensors.keys()  # noqa: SIM118
        }
    assert checkpoint.load_dit(device="meta", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert len(checkpoint.fingerprint()) == 16
    assert time.perf_counter() - start < 30


def test_memory_of_the_released_model() -> None:
    """The numbers of the specification's tables: 6240 tokens of condition, 37,440 and 168,960 tokens."""
    memory = estimate_memory(LONGCAT_VIDEO, Native())
    unit = (12 * 4096 + 2 * 11008) * 2
    assert memory.kv_cache == 6240 * 4096 * 2 * 2 * 48 == 4_907_335_680
    assert memory.text_to_video == 37_440 * unit
    assert memory.refine == 168_960 * unit


def test_tiny_folder_can_do_everything(tiny: Path) -> None:
    info = inspect_checkpoint(tiny)
    assert info.tasks == ALL_TASKS and info.missing == {}
    assert info.native.num_frames == 9
    assert info.memory is not None and info.memory.kv_cache == 2 * 6 * 64 * 2 * 2 * 2
    assert sum(part.file_bytes for part in info.parts) < sum(
        file.stat().st_size for file in tiny.rglob("*.*") if file.is_file()
    )


def test_what_is_missing_and_what_for(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    shutil.rmtree(copy / "lora")
    shutil.rmtree(copy / "text_encoder")
    info = inspect_checkpoint(copy)
    assert info.tasks == () and set(info.missing) == {"text_encoder", "refinement", "distill"}
    assert info.missing["text_encoder"] == "reading prompts"
    info = inspect_checkpoint(copy, text_encoder=tiny / "text_encoder")
    assert info.tasks == ("t2v", "i2v", "continue", "long")
    shutil.rmtree(copy / "dit")
    info = inspect_checkpoint(copy)
    assert info.config is None and info.memory is None and "dit" in info.missing and info.tasks == ()


def test_single_files(tiny: Path, tmp_path: Path) -> None:
    state = {k: v.bfloat16() for f in sorted((tiny / "dit").glob("*.safetensors")) for k, v in load_file(f).items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    info = inspect_checkpoint(path)
    assert info.kind == "single file" and info.config == DiTConfig.from_json(tiny / "dit" / "config.json")
    assert info.parts[0].dtypes == {"bfloat16": info.parts[0].bf16_bytes}
    assert {"vae", "text_encoder", "tokenizer"} <= set(info.missing)


def test_things_that_are_not_a_model_are_described(tiny: Path, tmp_path: Path) -> None:
    lora = inspect_checkpoint(tiny / "lora" / "refinement_lora.safetensors")
    assert lora.kind == "lora" and lora.adapters[0].ranks == (4,) and lora.tasks == ()
    vae = inspect_checkpoint(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    assert vae.kind == "vae" and vae.parts[0].parameters == vae.parameters
    torch.save(load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors"), tmp_path / "vae.pth")
    assert inspect_checkpoint(tmp_path / "vae.pth").parts[0].parameters == vae.parameters
    assert inspect_checkpoint(tiny / "text_encoder").kind == "text encoder"
    save_file({"blocks.0.audio_cross_attn.proj.weight": torch.zeros(2)}, tmp_path / "avatar.safetensors")
    avatar = inspect_checkpoint(tmp_path / "avatar.safetensors")
    assert avatar.kind == "avatar" and "Avatar" in avatar.summary
    save_file({"a.double_blocks.0.b": torch.zeros(2)}, tmp_path / "flux.safetensors")
    other = inspect_checkpoint(tmp_path / "flux.safetensors")
    assert other.kind == "unknown" and "Flux" in other.summary


def test_damage_is_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nowhere")
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(vae, vae.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="cut short: 100 bytes are missing"):
        inspect_checkpoint(copy)
