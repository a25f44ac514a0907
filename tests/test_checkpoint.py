"""Checkpoints on disk: found, loaded strictly, and refused with a reason."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcv_core.config import DiTConfig, Native
from lcv_core.errors import CheckpointError
from lcv_core.weights.checkpoint import open_checkpoint, open_vae
from lcv_core.weights.init import init_checkpoint
from lcv_core.weights.keymaps import FASTVIDEO_DIT, WAN_DIT, WAN_UMT5, WAN_VAE, Rule, original_name, sources

State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", preset="tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def dit_state(folder: Path) -> State:
    return {k: v for file in sorted((folder / "dit").glob("*.safetensors")) for k, v in load_file(file).items()}


def in_dialect(state: State, rules: tuple[Rule, ...]) -> State:
    """The same weights under the names of `rules`, fused ones cut into their parts."""
    out = {}
    for name, tensor in state.items():
        for source, slot in sources(name, rules):
            out[source] = tensor.chunk(slot.parts)[slot.part].clone()
    return out


def single(path: Path, state: State) -> Path:
    save_file(state, path)
    return path


def same(model: torch.nn.Module, state: State, dtype: torch.dtype | None = None) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.to(dtype or tensor.dtype)), name


def test_official_folder(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.missing == () and checkpoint.flow_shift == 12.0
    assert checkpoint.native == Native(height=32, width=48, num_frames=9, num_cond_frames=5)
    assert {k: v.name for k, v in checkpoint.adapters.items()} == {
        "distill": "cfg_step_lora.safetensors",
        "refinement": "refinement_lora.safetensors",
    }
    dit = checkpoint.load_dit()
    same(dit, dit_state(tiny))
    assert not dit.training
    same(checkpoint.load_vae(), load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors"))
    states = checkpoint.load_text_encoder().encode("a red ball").states
    assert states.shape == (1, 512, 32) and states.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tiny: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(tiny)
    same(checkpoint.load_dit(dtype=dtype), dit_state(tiny), dtype)
    assert {p.dtype for p in checkpoint.load_vae(dtype=dtype).parameters()} == {dtype}
    assert checkpoint.load_text_encoder(dtype=dtype).dtype == dtype


def test_stored_half_precision_stays_half(tiny: Path, tmp_path: Path) -> None:
    state = {k: v.bfloat16() for k, v in dit_state(tiny).items()}
    same(open_checkpoint(single(tmp_path / "m.safetensors", state)).load_dit(), state)


def test_dit_subfolder_knows_its_siblings(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny / "dit")
    assert checkpoint.missing == () and checkpoint.native.height == 32
    assert checkpoint.fingerprint() == open_checkpoint(tiny).fingerprint()


def test_missing_parts_and_overrides(copy: Path, tiny: Path) -> None:
    shutil.rmtree(copy / "vae")
    shutil.rmtree(copy / "tokenizer")
    checkpoint = open_checkpoint(copy)
    assert checkpoint.missing == ("vae", "tokenizer")
    with pytest.raises(CheckpointError, match=r"has no vae.*name one with vae="):
        checkpoint.load_vae()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        checkpoint.load_text_encoder()
    file = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    checkpoint = open_checkpoint(copy, vae=file, tokenizer=tiny / "tokenizer" / "tokenizer.json")
    assert checkpoint.missing == () and checkpoint.tokenizer == tiny / "tokenizer"
    same(checkpoint.load_vae(), load_file(file))
    with pytest.raises(CheckpointError, match=r"vae: .*nowhere does not exist"):
        open_checkpoint(copy, vae=copy / "nowhere")


def test_config_is_read_off_a_single_file(tiny: Path, tmp_path: Path) -> None:
    file = single(tmp_path / "model.safetensors", dit_state(tiny))
    checkpoint = open_checkpoint(file)
    assert checkpoint.dit_config == DiTConfig.from_json(tiny / "dit" / "config.json")
    assert checkpoint.missing == ("vae", "text_encoder", "tokenizer")
    same(checkpoint.load_dit(), dit_state(tiny))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("rules", [None, WAN_DIT, FASTVIDEO_DIT], ids=["official", "wan", "fastvideo"])
def test_other_packagings_load_the_same_weights(
    tiny: Path, tmp_path: Path, rules: tuple[Rule, ...] | None, prefix: str
) -> None:
    state = dit_state(tiny)
    renamed = state if rules is None else in_dialect(state, rules)
    file = single(tmp_path / "m.safetensors", {prefix + name: t for name, t in renamed.items()})
    same(open_checkpoint(file).load_dit(), state)


def test_fastvideo_folder(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    single(folder / "model.safetensors", in_dialect(dit_state(tiny), FASTVIDEO_DIT))
    config = json.loads((tiny / "dit" / "config.json").read_text())
    config |= {"_class_name": "LongCatTransformer3DModel", "num_attention_heads": config.pop("num_heads")}
    (folder / "config.json").write_text(json.dumps(config))
    same(open_checkpoint(tmp_path).load_dit(), dit_state(tiny))


def test_names_without_a_place_are_listed(tiny: Path, tmp_path: Path) -> None:
    state = in_dialect(dit_state(tiny), WAN_DIT)
    part = state.pop("blocks.0.self_attn.k.weight")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight is made of 3 equal parts"):
        open_checkpoint(single(tmp_path / "a.safetensors", state))
    state |= {"blocks.0.self_attn.k.weight": part, "blocks.0.mystery.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"1 tensors whose place.*blocks\.0\.mystery"):
        open_checkpoint(single(tmp_path / "b.safetensors", state))


def test_mismatch_lists_missing_unexpected_and_shapes(copy: Path) -> None:
    for file in (copy / "dit").glob("*.safetensors*"):
        state = load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
        state.pop("blocks.1.ffn.w2.weight", None)
        if "blocks.0.attn.proj.bias" in state:
            state["blocks.0.attn.proj.bias"] = torch.zeros(3)
            state["blocks.0.extra.weight"] = torch.zeros(3)
        if state:
            save_file(state, file)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(copy).load_dit()
    text = str(error.value)
    assert "1 missing: blocks.1.ffn.w2.weight" in text
    assert "1 unexpected: blocks.0.extra.weight" in text
    assert "1 of another shape: blocks.0.attn.proj.bias (expected [64], got [3])" in text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depth", 3, "depth = 3, but the tensors beside it have 2"),
        ("num_heads", 2, "num_heads = 2, but .* have 4"),
        ("hidden_size", 96, "hidden_size = 96, but .* have 64"),
        ("caption_channels", 48, "caption_channels = 48, but .* have 32"),
        ("mlp_ratio", 8, r"mlp_ratio \(feed-forward width\) = 512, but .* have 256"),
    ],
)
def test_config_that_disagrees_with_the_tensors(copy: Path, field: str, value: int, message: str) -> None:
    path = copy / "dit" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def test_config_missing_or_of_another_model(copy: Path) -> None:
    path = copy / "dit" / "config.json"
    path.write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    with pytest.raises(CheckpointError, match="not a LongCat-Video DiT config"):
        open_checkpoint(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(copy)


def test_shards_missing_or_of_another_download(copy: Path) -> None:
    first, second = sorted((copy / "dit").glob("*.safetensors"))
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of 2 shards.*{second.name}"):
        open_checkpoint(copy)
    save_file({"other.weight": torch.zeros(1)}, second)
    with pytest.raises(CheckpointError, match=f"{second.name} lacks tensor .* the index"):
        open_checkpoint(copy)
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match="one shard of several"):
        open_checkpoint(second)
    index = copy / "dit" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../" + first.name}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(copy)
    index.unlink()
    open_checkpoint(copy)  # all files of the folder together, no index needed
    shutil.copy(first, first.with_name("again.safetensors"))
    with pytest.raises(CheckpointError, match=r"is in both .* and"):
        open_checkpoint(copy)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a LongCat-Video checkpoint: expected dit/"):
        open_checkpoint(tmp_path)
    (tmp_path / "dit").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("avatar", {"blocks.0.audio_cross_attn.q_linear.weight": 1, "x_embedder.proj.weight": 1}, "Avatar"),
        ("lora", {"diffusion_model.blocks.0.attn.qkv.lora_A.weight": 1}, "looks like a LoRA adapter"),
        ("wan", {"blocks.0.ffn.0.weight": 1, "patch_embedding.weight": 1}, "looks like a Wan video model"),
        ("hunyuan", {"txt_in.individual_token_refiner.blocks.0.a.weight": 1}, "looks like a HunyuanVideo model"),
        ("sd", {"model.diffusion_model.input_blocks.0.a": 1, "x.output_blocks.0.a": 1}, "Stable Diffusion"),
        ("other", {"weight": 1}, "looks like an unknown kind of model"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, name: str, state: dict[str, int], message: str) -> None:
    path = single(tmp_path / f"{name}.safetensors", {key: torch.zeros(n) for key, n in state.items()})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_parts_taken_for_each_other(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a LongCat-Video transformer: it looks like the Wan 2\.1 VAE"):
        open_checkpoint(tiny / "vae")
    with pytest.raises(CheckpointError, match="looks like a LoRA adapter"):
        open_checkpoint(tiny / "lora" / "cfg_step_lora.safetensors")
    checkpoint = open_checkpoint(tiny, vae=tiny / "dit", text_encoder=tiny / "vae")
    with pytest.raises(CheckpointError, match=r"not a Wan 2\.1 VAE: it looks like LongCat-Video transformer"):
        checkpoint.load_vae()
    with pytest.raises(CheckpointError, match="not the umT5 text encoder: it looks like the Wan"):
        checkpoint.load_text_encoder()


def test_avatar_config_is_refused(copy: Path) -> None:
    path = copy / "dit" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"audio_window": 5}))
    with pytest.raises(CheckpointError, match="Avatar"):
        open_checkpoint(copy)


def _vae_state(tiny: Path, *, original: bool) -> tuple[State, State]:
    state = load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    return state, {(original_name(k, WAN_VAE) or "") if original else k: v for k, v in state.items()}


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_vae_files(tiny: Path, tmp_path: Path, suffix: str, original: bool) -> None:
    expected, state = _vae_state(tiny, original=original)
    path = tmp_path / f"Wan2.1_VAE{suffix}"
    write: Callable[[State, Path], None] = save_file if suffix == ".safetensors" else torch.save
    write(state, path)
    vae = open_checkpoint(tiny, vae=path).load_vae(dtype=torch.float32)
    same(vae, expected)
    assert vae.config.base_dim == 4
    video = torch.randn(1, 3, 5, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        assert torch.equal(vae.encode(video)[0], open_checkpoint(tiny).load_vae().encode(video)[0])


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.target,)


def test_a_malicious_pickle_does_not_run(tmp_path: Path, tiny: Path) -> None:
    mark = tmp_path / "it ran"
    plain, zipped = tmp_path / "plain.pth", tmp_path / "zipped.pth"
    plain.write_bytes(pickle.dumps({"a": _Bomb(mark)}))
    torch.save({"encoder.conv1.weight": torch.zeros(1), "a": _Bomb(mark)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(CheckpointError, match=r"cannot be read safely.*safetensors"):
            open_vae(path)
        moved = path.with_suffix(".safetensors")
        shutil.copy(path, moved)
        for opened in (open_checkpoint, open_vae):
            with pytest.raises(CheckpointError, match="pickle"):
                opened(moved)
    assert not mark.exists()
    pickle.loads(plain.read_bytes())
    assert mark.exists(), "the payload works, it just was not run"


def test_text_encoder_files(tiny: Path, tmp_path: Path) -> None:
    state = {k: v for f in sorted((tiny / "text_encoder").glob("*.safetensors")) for k, v in load_file(f).items()}
    expected = open_checkpoint(tiny).load_text_encoder().encode("a cat").states
    originals = {original_name(k, WAN_UMT5) or "": v for k, v in state.items()}
    embedding = state["shared.weight"].clone()
    files = {
        "wan": originals,
        "comfy": state | {"encoder.embed_tokens.weight": embedding, "spiece_model": torch.zeros(5, dtype=torch.uint8)},
        "tied": {k: v for k, v in state.items() if k != "shared.weight"} | {"encoder.embed_tokens.weight": embedding},
    }
    for name, tensors in files.items():
        path = single(tmp_path / f"{name}.safetensors", tensors)
        encoder = open_checkpoint(tiny, text_encoder=path).load_text_encoder()
        assert torch.equal(encoder.encode("a cat").states, expected), name


def _quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1).clamp_min(1e-8) / 127
    return (weight / scale[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def test_int8_module_dequantises_to_its_formula(tiny: Path, tmp_path: Path) -> None:
    stored, expected = {}, {}
    for name, tensor in dit_state(tiny).items():
        if name.endswith(".weight") and tensor.dim() == 2 and name != "final_layer.linear.weight":
            q, scale = _quantise_int8(tensor)
            stored |= {f"{name}_int8": q, f"{name}_scale": scale}
            expected[name] = q.float() * scale[:, None]
        else:
            stored[name] = expected[name] = tensor.bfloat16()
    checkpoint = open_checkpoint(single(tmp_path / "quantized_model.safetensors", stored))
    same(checkpoint.load_dit(), expected, torch.bfloat16)  # bf16 unless asked otherwise
    same(checkpoint.load_dit(dtype=torch.float32), expected, torch.float32)
    del stored["blocks.0.ffn.w1.weight_scale"]
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        open_checkpoint(single(tmp_path / "broken.safetensors", stored))


@pytest.mark.parametrize("rules", [None, WAN_DIT], ids=["official", "wan"])
def test_scaled_fp8(tiny: Path, tmp_path: Path, rules: tuple[Rule, ...] | None) -> None:
    state = dit_state(tiny)
    named = state if rules is None else in_dialect(state, rules)
    stored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in named.items():
        if name.endswith(".weight") and tensor.dim() == 2:
            scale = (tensor.abs().max() / 448).reshape(1)
            stored |= {name: (tensor / scale).to(torch.float8_e4m3fn)}
            stored |= {name.replace(".weight", ".scale_weight"): scale}
        else:
            stored[name] = tensor
    path = single(tmp_path / "m_fp8_scaled.safetensors", {f"diffusion_model.{k}": v for k, v in stored.items()})
    path = path if rules is None else single(path, stored)
    loaded = open_checkpoint(path).load_dit(dtype=torch.float32).state_dict()
    for name, tensor in state.items():
        error = (loaded[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-9)
        assert error < 0.04, f"{name}: {error:.3f}"


def test_plain_fp8_loads_as_bf16(tiny: Path, tmp_path: Path) -> None:
    state = {k: v.to(torch.float8_e4m3fn) for k, v in dit_state(tiny).items()}
    model = open_checkpoint(single(tmp_path / "m.safetensors", state)).load_dit()
    same(model, {k: v.bfloat16() for k, v in state.items()})


def test_fingerprint_follows_content_not_names(copy: Path, tiny: Path) -> None:
    print_before = open_checkpoint(copy).fingerprint()
    assert print_before == open_checkpoint(tiny).fingerprint() and len(print_before) == 16
    int(print_before, 16)
    file = sorted((copy / "dit").glob("*.safetensors"))[0]
    state = load_file(file)
    save_file({name: tensor * 1.5 for name, tensor in state.items()}, file)
    assert open_checkpoint(copy).fingerprint() != print_before
