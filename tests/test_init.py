"""Random checkpoints: complete, consistent, reproducible, loadable, and lively enough to look at."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lcv_core.config import DiTConfig, Native, TextConfig, VAEConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.text.encoder import TextEncoder, build_text_model, load_tokenizer
from lcv_core.vae.model import WanVAE
from lcv_core.weights import init
from lcv_core.weights.init import PRESETS, SCHEDULER_CONFIG, init_checkpoint, lora_state

HYPHEN = "___lorahyphen___"
FILES = {
    "model_index.json",
    "dit/config.json",
    "dit/diffusion_pytorch_model-00001-of-00002.safetensors",
    "dit/diffusion_pytorch_model-00002-of-00002.safetensors",
    "dit/diffusion_pytorch_model.safetensors.index.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "lora/cfg_step_lora.safetensors",
    "lora/refinement_lora.safetensors",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return init_checkpoint(tmp_path_factory.mktemp("init") / "new" / "tiny", "tiny")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    (index,) = folder.glob("*.index.json")
    files = sorted(set(read(index)["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def full_size_shapes() -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in LongCatDiT(DiTConfig(), device="meta").state_dict().items()}


def test_layout(checkpoint):
    assert set(contents(checkpoint)) == FILES
    assert [p.name for p in checkpoint.parent.iterdir()] == ["tiny"]  # no temporary folder is left
    assert len({p.stat().st_mode for p in checkpoint.rglob("*.*") if p.is_file()}) == 1  # weights as readable as JSON
    index = read(checkpoint / "model_index.json")
    assert index["model_name"] == "LongCat-Video"
    assert Native.from_dict(index["native"]) == PRESETS["tiny"].native == Native(32, 48, 9, 5, 15.0)
    scheduler = read(checkpoint / "scheduler" / "scheduler_config.json")
    assert scheduler == SCHEDULER_CONFIG
    assert (scheduler["shift"], scheduler["num_train_timesteps"]) == (12.0, 1000)


def test_presets():
    mini, tiny = PRESETS["mini"], PRESETS["tiny"]
    assert (mini.dit.head_dim, mini.dit.depth, tiny.dit.head_dim, tiny.dit.depth) == (32, 6, 16, 2)
    assert mini.native == Native(96, 160, 33, 13, 15.0)
    for preset in PRESETS.values():
        assert preset.text.d_model == preset.dit.caption_channels
        native = preset.native
        assert native.num_frames % 4 == native.num_cond_frames % 4 == 1
        assert native.height % 16 == native.width % 16 == 0


@pytest.mark.parametrize("part", ["dit", "text_encoder"])
def test_index_is_complete_and_consistent(checkpoint, part):
    (path,) = (checkpoint / part).glob("*.index.json")
    index = read(path)
    found, total = {}, 0
    for file in (checkpoint / part).glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert list(f.keys())
            for name in f.keys():  # noqa: SIM118
                found[name] = file.name
                tensor = f.get_tensor(name)
                assert tensor.dtype == torch.float32
                total += tensor.nbytes
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == total
    assert len(set(found.values())) == 2


def test_strict_load_into_the_models(checkpoint):
    dit_config = DiTConfig.from_json(checkpoint / "dit" / "config.json")
    assert dit_config == PRESETS["tiny"].dit
    dit = LongCatDiT(dit_config, device="meta", dtype=torch.float32)
    dit.load_state_dict(sharded(checkpoint / "dit"), strict=True, assign=True)
    vae_config = VAEConfig.from_json(checkpoint / "vae" / "config.json")
    assert vae_config == PRESETS["tiny"].vae
    vae = WanVAE(vae_config, device="meta")
    vae.load_state_dict(load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors"), strict=True, assign=True)
    text_config = TextConfig.from_json(checkpoint / "text_encoder" / "config.json")
    text = build_text_model(text_config, dtype=torch.float32)
    text.load_state_dict(sharded(checkpoint / "text_encoder"), strict=True, assign=True)
    for model in (dit, vae, text):
        assert all(torch.isfinite(p).all() and not p.is_meta for p in model.parameters())


def test_prompts_fit_the_text_encoder(checkpoint):
    config = TextConfig.from_json(checkpoint / "text_encoder" / "config.json")
    model = build_text_model(config, dtype=torch.float32)
    model.load_state_dict(sharded(checkpoint / "text_encoder"), strict=True, assign=True)
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    assert len(tokenizer) <= config.vocab_size  # type: ignore[arg-type]
    text = TextEncoder(model, tokenizer).encode(["a red ball", "一只猫 🎬"])
    assert torch.isfinite(text.states).all()
    assert 0.3 < text.states.std() < 3


def test_seed_decides_every_byte(checkpoint, tmp_path):
    first = contents(checkpoint)
    assert contents(init_checkpoint(tmp_path / "same", "tiny", seed=0)) == first
    other = contents(init_checkpoint(tmp_path / "other", "tiny", seed=1))
    differs = {name for name in first if first[name] != other[name]}
    assert differs == {name for name in FILES if name.endswith(".safetensors")}


def test_weights_are_pinned():
    """Exact values: a checkpoint of a seed is the same on every machine and stays so."""
    values = init._uniform("pin", (2, 2), 1.0)
    assert values.flatten().tolist() == [
        1.3667500019073486,
        0.2413911074399948,
        1.4468802213668823,
        -1.1878530979156494,
    ]
    wide = init._uniform("wide", (200, 200), 0.25)
    assert abs(wide.std().item() - 0.25) < 2e-3 and abs(wide.mean().item()) < 5e-3


def test_random_model_makes_finite_varied_frames(checkpoint):
    """A few Euler steps from noise, decoded: pixels vary in space and time, and the prompt matters."""
    dit = LongCatDiT(DiTConfig.from_json(checkpoint / "dit" / "config.json"), device="meta", dtype=torch.float32)
    dit.load_state_dict(sharded(checkpoint / "dit"), assign=True)
    vae = WanVAE(VAEConfig.from_json(checkpoint / "vae" / "config.json"), device="meta")
    vae.load_state_dict(load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors"), assign=True)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 3, 4, 6, generator=g)
    mask = torch.zeros(1, 512, dtype=torch.int64)
    mask[:, :8] = 1
    videos = []
    with torch.no_grad():
        for _ in range(2):
            text, x = torch.randn(1, 512, 32, generator=g), noise
            for sigma in (1.0, 0.75, 0.5, 0.25):
                velocity = dit(x, torch.tensor([1000 * sigma]), text, mask)
                assert 0.2 < velocity.std() < 2
                x = x + 0.25 * velocity
            assert 0.5 < x.std() < 2
            videos.append(vae.decode(vae.denormalize(x)))
        mean, logvar = vae.encode(videos[0])
    for video in videos:
        assert torch.isfinite(video).all() and video.abs().max() <= 1
        assert video.std(dim=(3, 4)).min() > 0.03  # each channel of each frame
        assert video.std(dim=2).mean() > 0.03
        assert (video.abs() == 1).float().mean() < 0.1
    assert (videos[0] - videos[1]).abs().mean() > 1e-3
    assert 0.1 < vae.normalize(mean).std() < 3 and abs(vae.normalize(mean).mean()) < 1
    assert logvar.max() < -4


def test_mini_decodes_to_varied_frames():
    preset = PRESETS["mini"]
    vae = WanVAE(preset.vae, device="meta")
    vae.load_state_dict(init.vae_state(preset.vae), strict=True, assign=True)
    latent = torch.randn(1, 16, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    video = vae.decode(vae.denormalize(latent))
    assert video.std(dim=(3, 4)).min() > 0.05 and (video.abs() == 1).float().mean() < 0.1


@pytest.mark.parametrize("name, block, final", [("cfg_step_lora", 24, 0), ("refinement_lora", 32, 7)])
def test_lora_files(checkpoint, name, block, final):
    state = load_file(checkpoint / "lora" / f"{name}.safetensors")
    assert len(state) == 2 * block + final
    assert all(key.startswith(f"lora{HYPHEN}") and t.dtype == torch.float32 for key, t in state.items())
    dit = {k: tuple(t.shape) for k, t in sharded(checkpoint / "dit").items()}
    targets: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        target, _, suffix = key.removeprefix(f"lora{HYPHEN}").replace(HYPHEN, "|").partition(".")
        targets.setdefault(target.replace("|", "."), {})[suffix] = tensor
    fused = {"qkv": 3, "kv_linear": 2}
    for target, tensors in targets.items():
        out_features, in_features = dit[f"{target}.weight"]
        n = fused.get(target.rsplit(".", 1)[1], 1)
        if "adaLN_modulation" in target:
            n = 2 if target.startswith("final_layer") else 6
        assert tensors.pop("lora_down.weight").shape == (n * 4, in_features)
        alpha_scale = tensors.pop("alpha_scale")
        assert alpha_scale.shape == () and alpha_scale.item() == 0.5
        names = ["lora_up.weight"] if n == 1 else [f"lora_up.blocks.{k}.weight" for k in range(n)]
        assert sorted(tensors) == names
        for up in tensors.values():
            assert up.shape == (out_features // n, 4) and 1e-3 < up.std() < 2e-2
    kinds = {target.split(".", 2)[2] for target in targets if target.startswith("blocks.")}
    common = {"attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "ffn.w1", "ffn.w2", "ffn.w3"}
    assert kinds == common | ({"adaLN_modulation.1"} if final else set())
    assert any(target.startswith("final_layer") for target in targets) == bool(final)


@pytest.mark.parametrize(
    "name, keys, parameters", [("cfg_step_lora", 1152, 630_718_464), ("refinement_lora", 1543, 802_299_904)]
)
def test_lora_of_the_full_model_has_the_official_counts(name, keys, parameters):
    state = lora_state(full_size_shapes(), name, rank=1)
    assert len(state) == keys
    assert sum(t.numel() for t in state.values() if t.ndim == 2) * 128 == parameters


def test_refuses_unknown_preset(tmp_path):
    with pytest.raises(InputError, match=r"'huge'.*mini, tiny"):
        init_checkpoint(tmp_path / "x", "huge")
    assert not (tmp_path / "x").exists()


def test_refuses_to_overwrite_unasked(checkpoint):
    before = contents(checkpoint)
    with pytest.raises(InputError, match="not empty"):
        init_checkpoint(checkpoint, "tiny", seed=1)
    assert contents(checkpoint) == before


def test_overwrites_a_checkpoint_and_nothing_else(tmp_path):
    folder = init_checkpoint(tmp_path / "ck", "tiny")
    (folder / "dit" / "stale.safetensors").touch()
    first = contents(folder)
    init_checkpoint(folder, "tiny", seed=1, overwrite=True)
    assert set(contents(folder)) == FILES and contents(folder) != first
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").touch()
    with pytest.raises(InputError, match="not a checkpoint"):
        init_checkpoint(photos, "tiny", overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        init_checkpoint(photos / "cat.png", "tiny", overwrite=True)
    assert (photos / "cat.png").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"ck", "photos"}


def test_an_empty_folder_may_be_used(tmp_path):
    assert set(contents(init_checkpoint(tmp_path, "tiny"))) == FILES


def test_a_failure_leaves_everything_as_it_was(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    folder = init_checkpoint(tmp_path / "ck", "tiny")
    before = contents(folder)
    monkeypatch.setattr(init, "vae_state", fail)
    with pytest.raises(OSError, match="disk full"):
        init_checkpoint(folder, "tiny", seed=1, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        init_checkpoint(tmp_path / "fresh", "tiny")
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_tokenizer_ids_are_those_of_umt5(checkpoint):
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    special = read(checkpoint / "tokenizer" / "special_tokens_map.json")
    assert special == {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<s>", "<unk>"]) == [0, 1, 2, 3]  # type: ignore[attr-defined]
    assert tokenizer("A red ball")["input_ids"][-1] == 1
    assert len(tokenizer) <= 2048  # type: ignore[arg-type]
