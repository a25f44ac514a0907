"""Adapters: every dialect equals the merged weights, and none leaves a trace."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import CheckpointError, InputError
from lcv_core.weights.init import lora_state
from lcv_core.weights.keymaps import FASTVIDEO_DIT, WAN_DIT, Rule, sources
from lcv_core.weights.lora import load_lora

CONFIG = DiTConfig(hidden_size=64, depth=2, num_heads=4, caption_channels=32, adaln_tembed_dim=32)
State = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]  # module -> (down [r, i], up [o, r])

TARGETS = [f"blocks.{n}.{m}" for n in (0, 1) for m in ("attn.qkv", "attn.proj", "cross_attn.q_linear",
           "cross_attn.kv_linear", "cross_attn.proj", "ffn.w1", "ffn.w2", "ffn.w3", "adaLN_modulation.1")]  # fmt: skip
TARGETS += ["final_layer.adaLN_modulation.1", "final_layer.linear", "t_embedder.mlp.0", "y_embedder.y_proj.2"]


def make_dit(dtype: torch.dtype = torch.float64, seed: int = 0) -> LongCatDiT:
    torch.manual_seed(seed)
    model = LongCatDiT(CONFIG, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def run(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 2, 4, 6, generator=g, dtype=torch.float64).to(dtype)
    text = torch.randn(2, 5, 32, generator=g, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        return model(latents, torch.tensor([700.0, 300.0]), text)


def random_pairs(model: nn.Module, targets: list[str] = TARGETS, seed: int = 0, rank: int = 4) -> Pairs:
    """Ranks differ from target to target."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for k, name in enumerate(targets):
        o, i = model.get_submodule(name).weight.shape  # type: ignore[union-attr]
        r = rank + k % 3
        pairs[name] = torch.randn(r, i, generator=g) / i**0.5, torch.randn(o, r, generator=g) * 0.1
    return pairs


def merged(pairs: Pairs, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> LongCatDiT:
    """The oracle: the model with up @ down written into its weights."""
    model = make_dit(dtype)
    for name, (down, up) in pairs.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data += (scale * up.double() @ down.double()).to(dtype)
    return model


def named(pairs: Pairs, prefix: str, down: str, up: str) -> State:
    state = {f"{prefix}{m}.{down}.weight": d for m, (d, _) in pairs.items()}
    return state | {f"{prefix}{m}.{up}.weight": u for m, (_, u) in pairs.items()}


def kohya(pairs: Pairs, alpha: float) -> State:
    state = {}
    for module, (down, up) in pairs.items():
        name = "lora_unet_" + module.replace(".", "_")
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        state[f"{name}.alpha"] = torch.tensor(alpha * down.shape[0])
    return state


def split(pairs: Pairs, rules: tuple[Rule, ...]) -> Pairs:
    """The same change for separate q, k, v: the rows of up, each with the whole down."""
    out = {}
    for module, (down, up) in pairs.items():
        for source, slot in sources(f"{module}.weight", rules):
            out[source.removesuffix(".weight")] = down.clone(), up.chunk(slot.parts)[slot.part].clone()
    return out


DIALECTS: dict[str, tuple[str, Callable[[Pairs], State]]] = {
    "comfyui A/B": ("comfyui", lambda p: named(p, "diffusion_model.", "lora_A", "lora_B")),
    "comfyui down/up": ("comfyui", lambda p: named(p, "model.diffusion_model.", "lora_down", "lora_up")),
    "diffusers": ("diffusers", lambda p: named(p, "transformer.", "lora_A", "lora_B")),
    "peft": ("peft", lambda p: named(p, "base_model.model.", "lora_A", "lora_B")),
    "peft default": ("peft", lambda p: named(p, "base_model.model.", "lora_A.default", "lora_B.default")),
    "plain": ("plain", lambda p: named(p, "", "lora_A", "lora_B")),
    "kohya": ("kohya", lambda p: kohya(p, 1.0)),
    "kohya wan": ("kohya/wan", lambda p: kohya(split(p, WAN_DIT), 1.0)),
    "kijai": ("comfyui/wan", lambda p: named(split(p, WAN_DIT), "diffusion_model.", "lora_down", "lora_up")),
    "fastvideo": ("plain/fastvideo", lambda p: named(split(p, FASTVIDEO_DIT), "", "lora_A", "lora_B")),
}


@pytest.mark.parametrize("mode", ["runtime", "merged"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_equals_the_merged_weights(dialect: str, mode: str) -> None:
    name, write = DIALECTS[dialect]
    model = make_dit()
    before, pairs = run(model), random_pairs(model)
    handle = load_lora(model, write(pairs), mode=mode)  # type: ignore[arg-type]
    assert handle.report.dialect == name
    assert set(handle.report.matched) == set(TARGETS) and handle.report.unmatched == ()
    assert handle.report.ranks == (4, 5, 6)
    assert torch.allclose(run(model), run(merged(pairs)), rtol=1e-10, atol=1e-10)
    assert (run(model) - before).abs().max() > 1e-2, "the adapter has to be visible for this test to mean something"
    handle.remove()
    assert torch.equal(run(model), before)


def official_as_pairs(state: State) -> Pairs:
    """Full-size products of a block-diagonal file, by the formula: rows of part k are up_k @ down[k r : (k + 1) r]."""
    modules: dict[str, State] = {}
    for key, tensor in state.items():
        module, _, leaf = key.removeprefix("lora___lorahyphen___").replace("___lorahyphen___", ".").partition(".lora_")
        modules.setdefault(module.removesuffix(".alpha_scale"), {})[leaf] = tensor
    pairs = {}
    for module, tensors in modules.items():
        down = tensors.pop("down.weight")
        tensors.pop("", None)
        ups = [tensors[key] for key in sorted(tensors)]
        pairs[module] = down, torch.block_diag(*ups)
    return pairs


@pytest.mark.parametrize("mode", ["runtime", "merged"])
@pytest.mark.parametrize("file", ["cfg_step_lora", "refinement_lora"])
def test_official_dialect_block_diagonal_parts(tmp_path: Path, file: str, mode: str) -> None:
    model = make_dit()
    state = lora_state({k: tuple(v.shape) for k, v in model.state_dict().items()}, file, rank=3, seed=5)
    save_file(state, tmp_path / f"{file}.safetensors")
    pairs = official_as_pairs(state)
    assert len(pairs) == (14 if file == "cfg_step_lora" else 18)
    before = run(model)
    with load_lora(model, tmp_path / f"{file}.safetensors", 0.7, mode=mode) as handle:  # type: ignore[arg-type]
        assert (handle.report.dialect, handle.report.ranks) == ("official", (3,))
        assert torch.allclose(run(model), run(merged(pairs, 0.7 * 0.5)), rtol=1e-8, atol=1e-8)
    assert torch.equal(run(model), before)
    without = {key: value for key, value in state.items() if not key.endswith("alpha_scale")}
    with load_lora(model, without):
        assert torch.allclose(run(model), run(merged(pairs)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", ["runtime", "merged"])
def test_alpha_strength_and_zero(mode: str) -> None:
    model = make_dit()
    before, pairs = run(model), random_pairs(model)
    handle = load_lora(model, kohya(pairs, 0.25), 2.0, mode=mode)  # type: ignore[arg-type]
    for strength in (2.0, -1.0, 0.3):
        handle.set_strength(strength)
        assert torch.allclose(run(model), run(merged(pairs, 0.25 * strength)), rtol=1e-10, atol=1e-10)
    handle.set_strength(0.0)
    assert torch.equal(run(model), before)
    handle.remove()
    handle.remove()
    with pytest.raises(InputError, match="was removed"):
        handle.set_strength(1.0)


@pytest.mark.parametrize("modes", [("runtime",) * 3, ("merged",) * 3, ("runtime", "merged", "runtime")])
def test_stacking_and_removal_in_any_order(modes: tuple[str, ...]) -> None:
    model = make_dit(torch.float32)
    before = run(model, torch.float32)
    files = [named(random_pairs(model, TARGETS[k:12], seed=k), "", "lora_A", "lora_B") for k in range(3)]

    def load(k: int) -> object:
        return load_lora(model, files[k], 0.5 + k, mode=modes[k])  # type: ignore[arg-type]

    alone = []
    for k in range(3):
        with load(k):  # type: ignore[attr-defined]
            alone.append(run(model, torch.float32))
    for order in itertools.permutations(range(3)):
        handles = [load(k) for k in range(3)]
        for k in order[:2]:
            handles[k].remove()  # type: ignore[attr-defined]
        assert torch.equal(run(model, torch.float32), alone[order[2]])
        handles[order[2]].remove()  # type: ignore[attr-defined]
        assert torch.equal(run(model, torch.float32), before)


@pytest.mark.parametrize("mode", ["runtime", "merged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_exact_restore(dtype: torch.dtype, mode: str) -> None:
    model = make_dit(dtype)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, run(model, dtype)
    pairs = random_pairs(model)
    exact = run(merged(pairs))
    handle = load_lora(model, named(pairs, "", "lora_A", "lora_B"), mode=mode)  # type: ignore[arg-type]
    assert model.state_dict().keys() == state.keys()
    changed = run(model, dtype).double()
    assert (changed - exact).norm() / exact.norm() < 0.05
    assert (before.double() - exact).norm() / exact.norm() > 0.2
    handle.remove()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, dtype), before)


def test_fp32_island_of_a_bf16_model_runs_in_fp32() -> None:
    model = make_dit(torch.bfloat16)
    pairs = random_pairs(model, ["final_layer.linear"])
    down, up = pairs["final_layer.linear"]
    layer = model.final_layer.linear
    x = torch.randn(3, 64)
    base = layer(x)
    load_lora(model, named(pairs, "", "lora_A", "lora_B"))
    out = layer(x)
    assert out.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert torch.allclose(out - base, F.linear(F.linear(x, down), up), atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_runtime_branch_follows_the_model() -> None:
    model = make_dit(torch.float32)
    pairs = random_pairs(model)
    load_lora(model, named(pairs, "", "lora_A", "lora_B"))
    run(model, torch.float32)
    assert torch.allclose(run(model.double()), run(merged(pairs)), rtol=1e-5, atol=1e-5)


def test_hooks_made_in_inference_mode_allow_training_after() -> None:
    model = make_dit(torch.float32)
    load_lora(model, named(random_pairs(model), "", "lora_A", "lora_B"))
    layer = model.get_submodule("blocks.0.attn.qkv")
    with torch.inference_mode():
        layer(torch.randn(1, 3, 64))
    x = torch.randn(1, 3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_hooks_compile_without_a_graph_break() -> None:
    layer = nn.ModuleDict({"qkv": nn.Linear(8, 12)})
    pairs = {"qkv": (torch.randn(2, 8), torch.randn(12, 2))}
    load_lora(layer, named(pairs, "", "lora_A", "lora_B"))
    x = torch.randn(3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer["qkv"], backend="eager", fullgraph=True)
    outputs = [compiled(x) for _ in range(2)]  # the first call makes the branch's weights, the second has them
    assert all(torch.allclose(out, layer["qkv"](x), atol=1e-6) for out in outputs)


@pytest.mark.parametrize("mode", ["runtime", "merged"])
def test_full_deltas_and_single_rows_of_a_fused_weight(mode: str) -> None:
    model = make_dit()
    before = run(model)
    g = torch.Generator().manual_seed(3)
    diff, bias = torch.randn(64, 64, generator=g) * 0.1, torch.randn(64, generator=g) * 0.1
    down, up = torch.randn(4, 64, generator=g) * 0.1, torch.randn(64, 4, generator=g) * 0.1
    oracle = make_dit()
    proj, qkv = oracle.get_submodule("blocks.0.attn.proj"), oracle.get_submodule("blocks.1.attn.qkv")
    proj.weight.data += 0.5 * diff  # type: ignore[operator]
    proj.bias.data += 0.5 * bias  # type: ignore[operator]
    qkv.weight.data[64:128] += 0.5 * up.double() @ down.double()  # type: ignore[index]
    qkv.bias.data[128:] += 0.5 * bias  # type: ignore[index]
    state = {
        "diffusion_model.blocks.0.self_attn.o.diff": diff,
        "diffusion_model.blocks.0.self_attn.o.diff_b": bias,
        "diffusion_model.blocks.1.self_attn.k.lora_A.weight": down,
        "diffusion_model.blocks.1.self_attn.k.lora_B.weight": up,
        "diffusion_model.blocks.1.self_attn.v.diff_b": bias,
    }
    with load_lora(model, state, 0.5, mode=mode):  # type: ignore[arg-type]
        assert torch.allclose(run(model), run(oracle), rtol=1e-9, atol=1e-9)
    assert torch.equal(run(model), before)


def test_partial_match_is_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = make_dit()
    state = named(random_pairs(model, TARGETS[:3]), "", "lora_A", "lora_B")
    state |= {
        "blocks.7.attn.qkv.lora_A.weight": torch.zeros(2, 64),
        "blocks.7.attn.qkv.lora_B.weight": torch.zeros(192, 2),
    }
    state |= {"x_embedder.proj.diff": torch.zeros(64, 16, 1, 2, 2), "step": torch.zeros(1)}
    with caplog.at_level(logging.WARNING, logger="lcv_core"):
        report = load_lora(model, state).report
    assert set(report.matched) == set(TARGETS[:3])
    assert set(report.unmatched) == {"blocks.7.attn.qkv", "x_embedder.proj", "step"}
    assert "3 targets are not in the model" in caplog.text and "blocks.7.attn.qkv" in caplog.text


FOREIGN = {
    "flux": ("transformer.single_transformer_blocks.0.attn.to_q", "looks like a Flux adapter"),
    "hunyuan": ("diffusion_model.double_blocks.0.img_attn_qkv", "looks like a Flux or HunyuanVideo adapter"),
    "sd": ("lora_te_text_model_encoder_layers_0_mlp_fc1", "looks like a Stable Diffusion adapter"),
    "ltx": ("transformer.transformer_blocks.0.attn1.to_q", "another transformer's"),
    "unknown": ("something.else", "has no layer of something.else"),
}


@pytest.mark.parametrize("model_name", FOREIGN)
def test_adapters_of_other_models_are_refused(model_name: str) -> None:
    module, message = FOREIGN[model_name]
    state = {f"{module}.lora_down.weight": torch.zeros(2, 8), f"{module}.lora_up.weight": torch.zeros(8, 2)}
    with pytest.raises(InputError, match=f"is not for this model: .*{message}"):
        load_lora(make_dit(), state)


def test_wrong_size_names_target_expected_and_got() -> None:
    down, up = torch.zeros(4, 5120), torch.zeros(5120, 4)
    state = named(
        {"blocks.0.self_attn.q": (down, up), "blocks.0.ffn.0": (down, up)}, "diffusion_model.", "lora_A", "lora_B"
    )
    state |= named({"blocks.0.ffn.2": (down, up)}, "diffusion_model.", "lora_A", "lora_B")
    with pytest.raises(
        InputError, match=r"another size.*a Wan adapter.*down of blocks.0.self_attn.q.*\[4, 64\], got \[4, 5120\]"
    ):
        load_lora(make_dit(), state)
    state = named({"blocks.0.attn.qkv": (torch.zeros(4, 64), torch.zeros(60, 4))}, "", "lora_A", "lora_B")
    with pytest.raises(InputError, match=r"blocks.0.attn.qkv should be \[192, 4\], got \[60, 4\]"):
        load_lora(make_dit(), state)


def test_half_a_pair_missing_parts_and_other_formats() -> None:
    model = make_dit()
    with pytest.raises(InputError, match="only one half"):
        load_lora(model, {"blocks.0.ffn.w1.lora_A.weight": torch.zeros(4, 64)})
    name = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___qkv"
    state = {f"{name}.lora_down.weight": torch.zeros(6, 64), f"{name}.lora_up.blocks.0.weight": torch.zeros(64, 2)}
    state[f"{name}.lora_up.blocks.2.weight"] = torch.zeros(64, 2)
    with pytest.raises(InputError, match=r"lacks a part of blocks.0.attn.qkv: it has parts \[0, 2\]"):
        load_lora(model, state)
    for key, form in (("dora_scale", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr")):
        with pytest.raises(InputError, match=form):
            load_lora(model, {f"blocks.0.ffn.w1.{key}": torch.zeros(1)})
    with pytest.raises(InputError, match="is not a LoRA adapter: it looks like LongCat-Video transformer"):
        load_lora(model, model.state_dict())
    with pytest.raises(InputError, match="Avatar"):
        load_lora(model, {"diffusion_model.blocks.0.audio_cross_attn.proj.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(InputError, match='"runtime" or "merged"'):
        load_lora(model, {}, mode="fused")  # type: ignore[arg-type]


def test_a_refused_adapter_leaves_no_trace() -> None:
    model = make_dit()
    before, pairs = run(model), random_pairs(model)
    down, up = pairs[TARGETS[-1]]
    pairs[TARGETS[-1]] = down, up[:-1]
    for mode in ("runtime", "merged"):
        with pytest.raises(InputError, match="another size"):
            load_lora(model, named(pairs, "", "lora_A", "lora_B"), mode=mode)
    assert torch.equal(run(model), before)


def test_files(tmp_path: Path) -> None:
    model = make_dit()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_lora(model, tmp_path / "nowhere.safetensors")
    path = tmp_path / "mine.safetensors"
    save_file({k: v.bfloat16() for k, v in named(random_pairs(model), "", "lora_A", "lora_B").items()}, path)
    assert load_lora(model, path).report.name == "mine.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        load_lora(model, path)


def test_merging_needs_plain_weights() -> None:
    model = make_dit(torch.float32)
    state = named(random_pairs(model, TARGETS[:1]), "", "lora_A", "lora_B")
    model.blocks[0].attn.qkv.to(torch.float8_e4m3fn)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r'cannot merge into blocks\.0\.attn\.qkv.*mode="runtime"'):
        load_lora(model, state, mode="merged")
