"""Compiled blocks: one graph without breaks for all blocks, steps, branches and texts, and the same numbers.

The backend "eager" runs what was traced as it stands, so nothing may differ by a bit; a compiler rounds elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import made, refused
from tiny_models import make_dit, randn, text
from torch import Tensor, nn

from lcv_core import schedule
from lcv_core.config import BSAConfig
from lcv_core.denoise import Guidance, denoise
from lcv_core.dit import compiled
from lcv_core.dit.frames import share_timesteps
from lcv_core.dit.kernels import TORCH, WHOLE, resolve_kernels
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.rope import rope_table
from lcv_core.errors import InputError
from lcv_core.layers import LayerNorm, RMSNorm
from lcv_core.quant import layers as quantised
from lcv_core.quant.formats import quantise
from lcv_core.weights.lora import load_lora

BSA = BSAConfig(sparsity=0.5, block_q=(1, 2, 2), block_k=(1, 2, 2))


class Graphs:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def forward(dit: LongCatDiT, *, length: int = 6, time: float = 500.0, **options: Any) -> Tensor:
    states = text(length=length)
    frames = 3 - (options["num_cond_latents"] if "kv_cache" in options else 0)
    with torch.no_grad():
        return dit(randn(1, 16, frames, 4, 6), torch.tensor([time]), states.states, states.mask, **options)


def same(dit: LongCatDiT, graphs: Graphs, calls: list[dict[str, Any]], kernels: str = "whole") -> None:
    """The calls give, bit for bit, what they give uncompiled."""
    dit.set_kernels(kernels)
    expected = [forward(dit, **call) for call in calls]
    dit.set_compile("blocks", backend=graphs)
    for call, plain in zip(calls, expected, strict=True):
        assert torch.equal(forward(dit, **call), plain)


@pytest.mark.parametrize("kernels", ["torch", "whole"])
def test_one_graph_for_blocks_steps_and_texts(graphs: Graphs, kernels: str) -> None:
    calls = [{}, {"time": 300.0}, {"length": 20}, {"length": 33, "time": 100.0}]
    same(make_dit(depth=3), graphs, calls, kernels)
    assert graphs.count == 1


def test_in_half_precision(graphs: Graphs) -> None:
    same(make_dit(torch.bfloat16, depth=3), graphs, [{}, {"time": 300.0, "length": 20}])
    assert graphs.count == 1


def test_two_graphs_for_a_long_video(graphs: Graphs) -> None:
    """A first segment without, the others with a KV cache, guided, whatever the prompts; conditions that are bf16's."""
    dit = make_dit(depth=3)
    start = randn(1, 16, 3, 4, 6)

    def segments() -> list[Tensor]:
        made = []
        for index, length in enumerate((6, 20, 33)):
            made.append(
                denoise(
                    dit, start, schedule.base(3), text=text(length=length), num_cond_latents=min(index, 1),
                    guidance=Guidance(4.0, text(length=length + 4, seed=9)), use_kv_cache=True,
                )
            )  # fmt: skip
        return made

    dit.set_kernels("whole")
    expected = segments()
    dit.set_compile("blocks", backend=graphs)
    assert all(torch.equal(got, plain) for got, plain in zip(segments(), expected, strict=True))
    assert graphs.count == 2


def test_condition_frames_without_a_cache(graphs: Graphs) -> None:
    same(make_dit(depth=3), graphs, [{"num_cond_latents": 1}, {"num_cond_latents": 1, "time": 300.0}])
    assert graphs.count == 1


@pytest.mark.parametrize("bsa", [BSA, BSAConfig(0.5, (1, 2, 2), (1, 2, 2), cdf_threshold=0.5)])
def test_block_sparse_attention(graphs: Graphs, bsa: BSAConfig) -> None:
    same(make_dit(depth=3), graphs, [{"bsa": bsa}, {"bsa": bsa, "time": 300.0}])
    assert graphs.count == 1


@pytest.mark.parametrize(
    ("kind", "matmul"), [("int8", "weight-only"), ("int8", "int8"), ("fp8", "weight-only"), ("Q8_0", "weight-only"),
                         ("Q5_K", "weight-only"), ("Q4_K", "weight-only")],
)  # fmt: skip
def test_quantised_layers(graphs: Graphs, kind: str, matmul: Any) -> None:
    dit = make_dit(operations=quantised, hidden_size=256)
    for name, layer in dit.named_modules():
        if isinstance(layer, quantised.Linear) and name.startswith("blocks") and "adaLN" not in name:
            layer.hold([quantise(kind, layer.weight)], matmul)
    same(dit, graphs, [{}, {"time": 300.0, "length": 20}])
    assert graphs.count == 1


def test_adapters(graphs: Graphs) -> None:
    """On every layer of every block; taken off, the graph without them is used again."""
    dit = make_dit(depth=3)
    adapter = {}
    for name, layer in dit.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("blocks"):
            adapter[f"{name}.lora_A.weight"] = randn(4, layer.in_features, seed=5) / 8
            adapter[f"{name}.lora_B.weight"] = randn(layer.out_features, 4, seed=6) / 8
    plain = forward(dit)
    with load_lora(dit, adapter):
        same(dit, graphs, [{}, {"time": 300.0, "length": 20}])
        assert graphs.count == 1
        assert not torch.allclose(forward(dit), plain, atol=1e-2)
    assert torch.allclose(forward(dit), plain, atol=1e-4)
    assert graphs.count == 2


def test_hooked_attention_is_run_as_it_is(graphs: Graphs) -> None:
    """With its KV cache, which the module itself prepends."""
    dit = make_dit(depth=2)
    cache, called = dit.build_kv_cache(randn(1, 16, 1, 4, 6, seed=8)), []
    dit.blocks[0].get_submodule("attn").register_forward_hook(lambda *_: called.append(1))
    same(dit, graphs, [{"num_cond_latents": 1, "kv_cache": cache}])
    assert len(called) == 2 and graphs.count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_a_compiler_makes_of_it(backend: str, graphs: Graphs) -> None:
    """Through functionalisation, which has to keep the writes over the stream and the room; and in machine code."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    dit = make_dit(depth=2)
    cache = dit.build_kv_cache(randn(1, 16, 1, 4, 6, seed=8))
    calls: list[dict[str, Any]] = [{}, {"time": 300.0}, {"num_cond_latents": 1, "kv_cache": cache}]
    expected = [forward(dit, **call) for call in calls]
    dit.set_compile("blocks", backend=backend)
    for call, plain in zip(calls, expected, strict=True):
        assert (forward(dit, **call) - plain).norm() <= 1e-5 * plain.norm()


def test_training_is_not_compiled(graphs: Graphs) -> None:
    dit = make_dit(depth=2)
    dit.set_compile("blocks", backend=graphs)
    dit.requires_grad_(True)
    states = text()
    dit(randn(1, 16, 3, 4, 6), torch.tensor([500.0]), states.states, states.mask).sum().backward()
    assert graphs.count == 0


_UNTRACEABLE = """
import torch
from test_compile import Graphs, forward, make_dit
from torch.nn.functional import scaled_dot_product_attention

def attend(q, k, v):
    torch._dynamo.graph_break()
    return scaled_dot_product_attention(q, k, v)

dit = make_dit(depth=2)
dit.set_compile("blocks", backend=Graphs())
dit.set_attention(attend)
forward(dit)
"""


def test_what_cannot_be_traced_says_so() -> None:
    """In a process of its own: torch stays in the way of every later call there, and tensors live longer for it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", _UNTRACEABLE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert re.search(r"InputError: the blocks cannot be compiled here \(.*\); run them without compiling", done.stderr)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "fast"])
def test_modes_that_are_none(mode: str) -> None:
    with pytest.raises(InputError, match="the mode of compiling must be one of default, max-autotune-no-cudagraphs"):
        make_dit().set_compile("blocks", mode=mode)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda _name: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler; install g\+\+"):
        make_dit().set_compile("blocks")
    make_dit().set_compile("off")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="pip install triton"):
        compiled.check_compiler(torch.device("cuda"))
    with pytest.raises(InputError, match="compile must be"):
        make_dit().set_compile("all")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [False, True])
def test_whole_kernels_are_the_plain_ones(dtype: torch.dtype, apart: bool) -> None:
    """One timestep for all, or one for each frame of each sample; a part of the sequence."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    times = torch.arange(6.0).view(2, 3) if apart else torch.full((2, 3), 5.0)
    distinct, frames = share_timesteps(times, 8)
    shift, scale, gate = (randn(len(distinct), 64, seed=s).to(wide) for s in (1, 2, 3))
    x, update, start = randn(2, 12, 64).to(dtype), randn(2, 12, 64, seed=5).to(dtype), 5
    bare, norm = LayerNorm(64, eps=1e-6, elementwise_affine=False), LayerNorm(64, eps=1e-6).to(dtype)
    heads, rms = randn(2, 12, 4, 16).to(dtype), RMSNorm(16, eps=1e-6).to(dtype)
    table = rope_table((1, 3, 4), 16, torch.device("cpu"))

    def made_by(kernels: Any) -> list[Tensor]:
        added, rotated, normed = x.clone(), heads.clone(), heads.clone()
        kernels.gated_add_(added, gate, update, frames, start)
        kernels.norm_rope(rotated, rms, table, rotated)
        kernels.norm_rope(normed, rms, None, normed)
        return [
            kernels.modulate(x, bare, shift, scale, frames, start),
            kernels.layer_norm(x, norm),
            added,
            rotated,
            normed,
        ]

    with torch.no_grad():
        for got, expected in zip(made_by(WHOLE), made_by(TORCH), strict=True):
            assert got.dtype == dtype and got.is_contiguous()
            assert torch.allclose(got.double(), expected.double(), rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_kernels_of_compiled_blocks() -> None:
    cpu = torch.device("cpu")
    assert resolve_kernels("auto", cpu).name == "torch"
    assert resolve_kernels("auto", cpu, compiled=True).name == resolve_kernels("whole", cpu).name == "whole"
    assert resolve_kernels("torch", cpu, compiled=True).name == "torch"


def test_on_the_command_line(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(LongCatDiT, "set_compile", lambda _self, what: seen.append(what))
    call = ["t2v", "-m", tiny_checkpoint, "-p", "x", "--steps", 1, "--seed", 1, "--frames", 5]
    call += ["--height", 32, "--width", 32, "-g", 1]
    made(*call, "--compile", "blocks", "-o", "a.safetensors")
    assert seen == ["blocks"]
    monkeypatch.setattr(compiled.shutil, "which", lambda _name: None)
    assert "install g++" in refused(*call, "--compile", "blocks", "-o", "b.safetensors")
