"""Transformers with quantised weights: as their file has them, or quantised while they are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import gguf
import pytest
import torch
from cli_helpers import lcv, made, refused
from safetensors.torch import save_file
from test_gguf import flat_patch, type_of, write
from torch import Tensor, UntypedStorage

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import CheckpointError, InputError
from lcv_core.live_bytes import LiveBytes
from lcv_core.names import Weights
from lcv_core.planning import Job, make_plan
from lcv_core.quant import formats
from lcv_core.quant.formats import dequantise, quantise
from lcv_core.quant.layers import Linear
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint
from lcv_core.weights.init import dit_state, lora_state
from lcv_core.weights.keymaps import WAN_DIT, sources
from lcv_core.weights.lora import load_lora
from lcv_core.weights.quantised import is_large

# Rows of 256 and 768: what the K types need.
CONFIG = DiTConfig(hidden_size=256, depth=2, num_heads=4, caption_channels=32, adaln_tembed_dim=32)
KINDS = {"fp8": "fp8", "int8": "int8", "q8_0": "Q8_0", "q5_k": "Q5_K", "q4_k": "Q4_K"}
SENSITIVE = ("adaLN_modulation", "embedder", "final_layer", "norm")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dit_state(CONFIG, 3)


@pytest.fixture(scope="module")
def plain(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "dit.safetensors"
    save_file(state, path)
    return path


def model_of(state: dict[str, Tensor]) -> LongCatDiT:
    model = LongCatDiT(CONFIG, device="meta")
    model.load_state_dict(state, assign=True)
    return model.eval()


@torch.no_grad()
def run(model: LongCatDiT) -> Tensor:
    g = torch.Generator().manual_seed(5)
    latents = torch.randn(1, CONFIG.in_channels, 2, 4, 6, generator=g)
    return model(latents, torch.tensor([500.0]), torch.randn(1, 5, CONFIG.caption_channels, generator=g))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def linears(model: LongCatDiT) -> dict[str, Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def load(path: Path, weights: Weights, **where: Any) -> LongCatDiT:
    return open_checkpoint(path).load_dit(weights=weights, **{"dtype": torch.float32} | where)


LIMITS = {"fp8": 0.05, "int8": 0.015, "q8_0": 0.012, "q5_k": 0.06, "q4_k": 0.13}


@pytest.mark.parametrize("form", KINDS)
def test_quantised_while_it_is_read(plain: Path, state: dict[str, Tensor], form: Weights) -> None:
    model = load(plain, form)
    kind = KINDS[form]
    expected = {k: dequantise(quantise(kind, v)) if is_large(k) else v for k, v in state.items()}
    assert relative(run(model), run(model_of(expected))) < 2e-6
    assert 1e-3 < relative(run(model), run(model_of(state))) < LIMITS[form]
    for name, layer in linears(model).items():
        sensitive = any(part in name for part in SENSITIVE)
        assert [q.kind for q in layer.held] == ([] if sensitive else [kind]), name
    assert sum(bool(layer.held) for layer in linears(model).values()) == 8 * CONFIG.depth
    half = load(plain, form, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and relative(run(half), run(model)) < 3e-2


def test_the_layers_that_are_quantised(state: dict[str, Tensor]) -> None:
    large = [name for name in state if is_large(name)]
    assert len(large) == 8 * CONFIG.depth
    assert not any(part in name for name in large for part in SENSITIVE)


def test_multiplied_in_eight_bits(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lcv_core"):
        dynamic = load(plain, "int8-matmul")
    assert not caplog.records
    assert {layer.matmul for layer in linears(dynamic).values() if layer.held} == {"int8"}
    error = relative(run(dynamic), run(load(plain, "int8")))
    assert 1e-3 < error < 0.02
    with caplog.at_level(logging.WARNING, "lcv_core"):
        fp8 = load(plain, "fp8-matmul")  # not on a CPU: said, and weight-only
    assert "not multiplied in fp8 but in the dtype of the activations: it needs a CUDA GPU" in caplog.text
    assert run(fp8).equal(run(load(plain, "fp8")))


class _Real(LiveBytes):
    """Without what is on the meta device."""

    def _add(self, storage: UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._add(storage)


def test_at_most_one_weight_is_plain_at_a_time(
    plain: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "PIECE", 8 * CONFIG.hidden_size)
    for form in ("int8", "q8_0"):
        with _Real() as live:
            model = load(plain, form)
        result = sum(t.nbytes for t in model.state_dict().values())
        largest = max(t.nbytes for t in state.values())
        assert result < 0.45 * sum(t.nbytes for t in state.values())
        assert live.peak < result + 1.2 * largest


@pytest.mark.parametrize("form", ["fp8", "int8", "q4_k"])
def test_adapters(plain: Path, form: Weights) -> None:
    model = load(plain, form)
    before = run(model)
    adapter = lora_state({k: tuple(v.shape) for k, v in model_of(dit_state(CONFIG, 3)).state_dict().items()},
                         "refinement_lora", rank=4, seed=1)  # fmt: skip
    dequantised = model_of(
        {k: dequantise(quantise(KINDS[form], v)) if is_large(k) else v for k, v in dit_state(CONFIG, 3).items()}
    )
    with load_lora(model, adapter) as handle, load_lora(dequantised, adapter, mode="merged"):
        assert handle.report.unmatched == ()
        assert relative(run(model), run(dequantised)) < 1e-5
        assert relative(run(model), before) > 1e-3
    assert run(model).equal(before)


@pytest.mark.parametrize("form", KINDS)
def test_the_planner_counts_these_bytes(plain: Path, form: Any) -> None:
    model = load(plain, form, dtype=torch.bfloat16)
    planned = make_plan(Job(weight_dtype=form), CONFIG).stage("sampling").weights
    assert planned == sum(t.nbytes for t in model.state_dict().values())


# files that are quantised


def int8_file(state: dict[str, Tensor], path: Path) -> Path:
    """The official layout; it also has the text embedder in int8."""
    stored = {}
    for name, tensor in state.items():
        if is_large(name) or "y_proj.2.weight" in name:
            scale = tensor.abs().amax(1) / 127
            stored |= {f"{name}_int8": (tensor / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}
        else:
            stored[name] = tensor.clone()
    save_file(stored, path)
    return path


def fp8_file(state: dict[str, Tensor], path: Path) -> Path:
    """Kijai's layout: separate q, k, v under other names, one scale for each."""
    stored = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in state.items():
        for source, slot in sources(name, WAN_DIT):
            rows = tensor.shape[0] // slot.parts
            part = tensor[slot.part * rows : (slot.part + 1) * rows].clone()
            if is_large(name):
                part *= slot.part + 1  # so that their scales differ
                scale = part.abs().max() / 448
                stored |= {source: (part / scale).to(torch.float8_e4m3fn)}
                stored[source.replace(".weight", ".scale_weight")] = scale / (slot.part + 1)
            else:
                stored[source] = part
    save_file(stored, path)
    return path


def test_official_int8_stays_as_it_is(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = int8_file(state, tmp_path / "int8.safetensors")
    model = load(path, "stored")
    assert relative(run(model), run(load(path, "plain"))) < 2e-6
    stored = open_checkpoint(path).dit_tensors.store
    (q,) = model.blocks[1].ffn.w2.held  # type: ignore[union-attr]
    assert q.data.equal(stored.read("blocks.1.ffn.w2.weight_int8"))
    assert not model.y_embedder.y_proj[2].held  # type: ignore[union-attr]
    # Asked for in the kind it has, it is not quantised again.
    assert run(load(path, "int8")).equal(run(model))
    assert relative(run(load(path, "int8-matmul")), run(model)) < 0.02
    assert load(path, "stored", dtype=None).dtype == torch.float32  # as the rest is stored


def test_separate_scales_of_fused_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = fp8_file(state, tmp_path / "fp8.safetensors")
    model = load(path, "stored")
    (q,) = model.blocks[0].attn.qkv.held  # type: ignore[union-attr]
    assert (q.kind, q.rows) == ("fp8", 3 * CONFIG.hidden_size) and q.scale is not None
    assert len(q.scale.unique()) == 3
    assert relative(run(model), run(load(path, "plain"))) < 2e-6
    assert relative(run(model), run(model_of(state))) < LIMITS["fp8"]
    assert run(load(path, "fp8")).equal(run(model))


def test_plain_fp8_has_scales_of_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "fp8.safetensors"
    save_file({k: v.to(torch.float8_e5m2 if "ffn" in k else torch.float8_e4m3fn) for k, v in state.items()}, path)
    model = load(path, "stored")
    kinds = {q.kind for layer in linears(model).values() for q in layer.held}
    assert kinds == {"fp8", "fp8_e5m2"}
    assert relative(run(model), run(load(path, "plain"))) < 2e-6


def gguf_file(state: dict[str, Tensor], path: Path, kinds: dict[str, str]) -> Path:
    """Kijai's names; `kinds` has types by a part of the name, F32 is the rest's."""
    foreign = {}
    for name, tensor in state.items():
        for source, slot in sources(name, WAN_DIT):
            rows = tensor.shape[0] // slot.parts
            foreign[source] = tensor[slot.part * rows : (slot.part + 1) * rows]

    def kind(name: str, tensor: Tensor) -> str:
        return next((k for part, k in kinds.items() if part in name and tensor.dim() == 2), "F32")

    return write(path, flat_patch(foreign), kind)


def test_gguf_stays_as_it_is_with_types_that_differ_inside_a_fused_weight(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    kinds = {"self_attn.v.weight": "Q8_0", "self_attn.": "Q4_0", "cross_attn": "Q5_1", "ffn": "Q5_0", "text": "Q8_0"}
    path = gguf_file(state, tmp_path / "a.gguf", kinds)
    model = load(path, "stored")
    held = model.blocks[0].attn.qkv.held  # type: ignore[union-attr]
    assert [(q.kind, q.rows) for q in held] == [("Q4_0", 512), ("Q8_0", 256)]
    assert relative(run(model), run(load(path, "plain"))) < 2e-6
    raw = gguf.quantize(state["blocks.0.attn.qkv.weight"][512:].numpy(), type_of("Q8_0"))
    assert held[1].data.equal(torch.from_numpy(raw))
    # Into another form by way of fp32.
    assert relative(run(load(path, "int8")), run(model)) < 0.03
    assert load(path, "stored", device="meta").blocks[0].ffn.w1.held[0].data.is_meta  # type: ignore[union-attr]


def test_types_that_only_the_package_reads_become_plain(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = gguf_file(state, tmp_path / "a.gguf", {"self_attn": "F16", "cross_attn": "BF16", "ffn": "Q8_0"})
    with caplog.at_level(logging.WARNING, "lcv_core"):
        model = load(path, "stored")
    assert "weights=stored: 10 of the weights stay plain: blocks.0.attn.qkv.weight" in caplog.text
    assert relative(run(model), run(load(path, "plain"))) < 2e-6
    assert relative(run(load(path, "q8_0")), run(model)) < 0.02


# what is said


def test_what_is_not_quantised_cannot_stay_so(plain: Path) -> None:
    with pytest.raises(InputError, match=r"keeps what is quantised, but .*dit.safetensors is not; use fp8, int8"):
        load(plain, "stored")
    with pytest.raises(InputError, match='weights must be "plain", "stored", '):
        load(plain, "q3_k")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="leave out operations"):
        open_checkpoint(plain).load_dit(weights="fp8", operations=torch.nn)


def test_rows_that_do_not_fill_the_blocks(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lcv_core"):
        model = open_checkpoint(tiny_checkpoint).load_dit(weights="q4_k")
    assert "weights=q4_k: 14 of the weights are in Q8_0, as their rows need it" in caplog.text
    assert {q.kind for layer in linears(model).values() for q in layer.held} == {"Q8_0", "Q4_K"}


def test_files_that_do_not_fit_and_values_that_are_not_numbers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    broken = dict(state)
    del broken["blocks.1.ffn.w2.weight"]
    save_file(broken, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: blocks.1.ffn.w2.weight"):
        load(tmp_path / "a.safetensors", "int8")
    broken = state | {"blocks.1.ffn.w2.weight": torch.full_like(state["blocks.1.ffn.w2.weight"], torch.nan)}
    save_file(broken, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks.1.ffn.w2.weight: .* not finite"):
        load(tmp_path / "b.safetensors", "q4_k")


# the command line


def test_the_command_line_samples_with_quantised_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    job = ("t2v", "-m", tiny_checkpoint, "-p", "a red ball", "--steps", 2, "--seed", 1)
    files = {}
    for weights in ("plain", "int8", "int8-matmul"):
        files[weights] = tmp_path / f"{weights}.safetensors"
        made(*job, "--weights", weights, "-o", files[weights])
    content = {weights: file.read_bytes() for weights, file in files.items()}
    assert len(set(content.values())) == 3
    made("rerun", files["int8"], "-o", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == content["int8"]


def test_the_command_line_refuses_before_anything_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    job = ("t2v", "-m", tiny_checkpoint, "-p", "a red ball", "-o", tmp_path / "a.mp4", "--weights")
    assert "--weights stored keeps what is quantised" in refused(*job, "stored")
    assert lcv(*job, "q3_k").code == 2
    assert set(get_args(Weights)) > set(KINDS) and isinstance(open_checkpoint(tiny_checkpoint), Checkpoint)
