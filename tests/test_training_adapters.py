"""Trainable adapters: what is trained is what the loaders read, and the frozen model stays frozen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import check_gradients
from safetensors.torch import load_file
from tiny_models import make_dit, randn, seeded, text
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.optimizers import repeated_blocks, trained
from lcv_core.training.trainer import skeleton
from lcv_core.weights.init import lora_state
from lcv_core.weights.lora import load_lora
from lcv_core.weights.lora_keys import AdapterFile, official_names, official_targets
from lcv_core.weights.lora_read import read_lora
from lcv_core.weights.tensors import TensorSource

FILES: tuple[AdapterFile, ...] = ("cfg_step_lora", "refinement_lora")


def adapted(file: AdapterFile = "cfg_step_lora", of: torch.dtype = torch.float32, **options: Any) -> AdaptedDiT:
    """An adapter of rank 3 on the tiny model in the dtype `of`."""
    options = {"rank": 3, "generator": seeded(5)} | options
    return AdaptedDiT(make_dit(of), official_targets(file, 2), **options)


def stir(model: AdaptedDiT, seed: int = 6) -> AdaptedDiT:
    """As if it had learnt."""
    g = seeded(seed)
    with torch.no_grad():
        for p in trained(model).values():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def run(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two samples with a condition frame each."""
    states, timestep = text(2), torch.tensor([[0.0, 700, 700], [0, 300, 300]], dtype=dtype)
    x = randn(2, 16, 3, 4, 6, dtype=dtype)
    return model(x, timestep, states.states.to(dtype), states.mask, num_cond_latents=1)


@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_nothing_changes_before_the_first_step(file: AdapterFile) -> None:
    model, plain = adapted(file), make_dit()
    assert torch.equal(run(model), run(plain))
    for name, p in trained(model).items():
        assert p.dtype == torch.float32 and (name.endswith(".up") == (not p.any())), name


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_exported_file_gives_the_same_outputs(tmp_path: Path, file: AdapterFile, dtype: torch.dtype) -> None:
    model, plain = stir(adapted(file, dtype)), make_dit(dtype)
    path = model.export(tmp_path / "lora" / f"{file}.safetensors")
    expected = run(model)
    assert (expected - run(plain)).abs().max() > 1e-2, "the adapter has to be visible"
    with load_lora(plain, path) as handle:
        assert (handle.report.dialect, handle.report.ranks, handle.report.unmatched) == ("official", (3,), ())
        assert torch.equal(run(plain), expected)
    again = adapted(file, dtype, generator=seeded(9))
    again.load(path)
    assert torch.equal(run(again), expected)
    with model.using(None):
        assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("file", FILES)
def test_names_and_shapes_are_the_official_ones(tmp_path: Path, file: AdapterFile) -> None:
    model = stir(adapted(file))
    shapes = {name: tuple(t.shape) for name, t in make_dit().state_dict().items()}
    official = lora_state(shapes, file, rank=3)
    state = load_file(model.export(tmp_path / "a.safetensors"))
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in official.items()}
    assert {float(v) for k, v in state.items() if k.endswith("alpha_scale")} == {0.5}
    half = load_file(model.export(tmp_path / "b.safetensors", torch.bfloat16))
    assert {v.dtype for v in half.values()} == {torch.bfloat16}
    assert all(torch.equal(v, state[k].bfloat16()) for k, v in half.items())


def test_the_host_gets_the_trained_numbers(tmp_path: Path) -> None:
    """What ComfyUI's patches are made of are the deltas that `read_lora` gives."""
    model = stir(adapted("refinement_lora"))
    path = model.export(tmp_path / "a.safetensors")
    deltas, _ = read_lora(make_dit(), TensorSource.open(path), "a")
    assert deltas.keys() == official_targets("refinement_lora", 2).keys()
    for target, parts in deltas.items():
        down, up = (model.get_parameter(f"{target}.branches.trained.{name}") for name in ("down", "up"))
        assert torch.equal(torch.cat([d.down for d in parts if d.down is not None]), down)
        assert torch.equal(torch.cat([d.up for d in parts if d.up is not None]), up)
        assert {d.scale for d in parts} == {0.5}


@torch.no_grad()
def test_starts_from_a_file_of_other_dialects_and_scales() -> None:
    """Layers of one part in the plain dialect, with alpha; those of more in the official one, which alone has parts."""
    plain, state = make_dit(), dict(stir(adapted()).adapter_state())
    for k, (target, parts) in enumerate(official_targets("cfg_step_lora", 2).items()):
        down, ups, scale = official_names(target, parts)
        state[scale] = torch.tensor(0.3)
        if parts == 1:
            state = {name: t for name, t in state.items() if name not in (down, *ups, scale)}
            o, i = plain.get_parameter(f"{target}.weight").shape
            state[f"diffusion_model.{target}.lora_A.weight"] = randn(3, i, seed=k)
            state[f"diffusion_model.{target}.lora_B.weight"] = randn(o, 3, seed=k + 50) * 0.1
            state[f"diffusion_model.{target}.alpha"] = torch.tensor(0.9)
    model = adapted()
    model.load(state)
    with load_lora(plain, state):
        assert torch.equal(run(model), run(plain))
    with load_lora(plain, model.adapter_state()):
        assert torch.equal(run(model), run(plain))


def test_files_that_do_not_fit_are_refused() -> None:
    model = adapted()
    with pytest.raises(InputError, match="rank 2, the recipe 3; set rank to 2"):
        model.load(adapted(rank=2).adapter_state())
    with pytest.raises(InputError, match=r"also changes .*final_layer"):
        model.load(adapted("refinement_lora").adapter_state())
    with pytest.raises(InputError, match=r"lacks .*adaLN"):
        adapted("refinement_lora").load(model.adapter_state())
    whole = {}
    for target in official_targets("cfg_step_lora", 2):
        o, i = make_dit().get_parameter(f"{target}.weight").shape
        whole |= {f"{target}.lora_A.weight": randn(3, i), f"{target}.lora_B.weight": randn(o, 3)}
    with pytest.raises(InputError, match=r"qkv as 3 pairs"):
        model.load(whole)


@pytest.mark.parametrize("file", FILES)
def test_gradients_against_differences(file: AdapterFile) -> None:
    model = stir(adapted(file, torch.float64, dtype=torch.float64))
    weight = randn(2, 16, 3, 4, 6, seed=8, dtype=torch.float64)
    check_gradients(lambda: (run(model, torch.float64) * weight).sum(), list(trained(model).values()))


def test_only_the_branches_learn_and_are_kept() -> None:
    model, plain = stir(adapted("refinement_lora")), make_dit()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    for name, p in plain.named_parameters():
        module, _, leaf = name.rpartition(".")
        home = f"{module}.base.{leaf}" if module in model.adapted else name
        assert torch.equal(model.get_parameter(home), p) and model.get_parameter(home).grad is None
    assert model.state_dict().keys() == trained(model).keys()
    model.keep("fixed")
    assert model.state_dict().keys() == trained(model).keys()
    copied = skeleton(model)
    assert {p.device.type for p in copied.parameters()} == {"meta"}
    copied.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert isinstance(copied, AdaptedDiT)
    exported = copied.adapter_state()
    assert all(torch.equal(value, exported[name]) for name, value in model.adapter_state().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        copied.load_state_dict({}, strict=True)


@torch.no_grad()
def test_branches_that_stay_and_that_follow() -> None:
    model = stir(adapted())
    first = run(model)
    model.keep("average")
    model.keep("fixed")
    before = copy.deepcopy(model.adapter_state())
    stir(model, seed=7)
    after = model.adapter_state()
    for branch in ("average", "fixed"):
        with model.using(branch):
            assert torch.equal(run(model), first)
    assert not torch.equal(run(model), first)
    model.update_average(0.75)
    mixed = adapted()
    mixed.load({name: 0.75 * old + 0.25 * after[name] for name, old in before.items()})
    with model.using("average"):
        torch.testing.assert_close(run(model), run(mixed), rtol=1e-4, atol=1e-5)
    kept = {name for name in model.state_dict() if ".average." in name}
    assert len(kept) == len(trained(model)), "a checkpoint has to hold the average"
    with model.using("fixed"):
        assert torch.equal(run(model), first)


def test_recomputing_blocks_changes_no_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recompute in (False, True):
        model = stir(adapted("refinement_lora"))
        if recompute:
            for block in repeated_blocks(model).values():
                forward = block.forward
                block.forward = lambda *a, f=forward: checkpoint(f, *a, use_reentrant=False)  # type: ignore[assignment]
        out = run(model)
        with model.using(None), torch.no_grad():
            run(model)  # a teacher in between; the recomputation comes later
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in trained(model).items()})
    assert len(repeated_blocks(model)) == 2
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name
