"""The block's Triton kernels, run by Triton's interpreter, against plain PyTorch; and compiled for a GPU not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import randn
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.dit.frames import Frames, share_timesteps
from lcv_core.dit.kernels import _triton, check_kernels, plain
from lcv_core.dit.rope import rope_table

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter computes bf16 wrongly without saying so; fp16 takes the same way through the kernels.
DTYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
AOT = Path(__file__).parents[1] / "benchmarks" / "aot.py"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels, with nothing to fall back to."""
    from lcv_core.dit.kernels import fused

    monkeypatch.setattr(fused, "plain", SimpleNamespace(is_plain=plain.is_plain))
    return fused


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def frames_of(timesteps: list[list[float]], frame_tokens: int) -> tuple[int, Frames]:
    distinct, frames = share_timesteps(torch.tensor(timesteps, device=DEVICE), frame_tokens)
    return len(distinct), frames


CASES = {"one timestep": [[5.0, 5.0, 5.0]], "apart": [[0.0, 5.0, 7.0], [0.0, 0.0, 9.0]]}


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("C", [64, 80])
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (3, 10)])
def test_modulate_and_gate(fused: Any, case: str, C: int, dtype: torch.dtype, start: int, stop: int) -> None:
    count, frames = frames_of(CASES[case], 4)
    norm = layers.LayerNorm(C, eps=1e-6, elementwise_affine=False)
    x, update = (make(len(CASES[case]), 12, C, seed=s, dtype=dtype) for s in (0, 1))
    # As adaLN gives them: views of one tensor.
    shift, scale, gate = make(count, 3 * C, seed=2).chunk(3, dim=-1)
    got = fused.modulate(x[:, start:stop], norm, shift, scale, frames, start)
    expected = plain.modulate(x.double()[:, start:stop], norm, shift.double(), scale.double(), frames, start)
    assert got.dtype == dtype and relative(got, expected) <= TOLERANCE[dtype]
    written, exact = x.clone(), x.double()
    fused.gated_add_(written[:, start:stop], gate, update[:, start:stop], frames, start)
    plain.gated_add_(exact[:, start:stop], gate.double(), update.double()[:, start:stop], frames, start)
    assert relative(written, exact) <= TOLERANCE[dtype]
    assert torch.equal(written[:, :start], x[:, :start]) and torch.equal(written[:, stop:], x[:, stop:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(fused: Any, dtype: torch.dtype) -> None:
    norm = layers.LayerNorm(80, eps=1e-6, device=DEVICE).to(dtype).requires_grad_(False)
    norm.weight.normal_(generator=None)
    norm.bias.normal_(generator=None)
    x = make(2, 9, 80, seed=0, dtype=dtype)[:, 2:]
    assert relative(fused.layer_norm(x, norm), plain.layer_norm(x.double(), norm.double())) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "D"), [(4, 16), (3, 40)])
@pytest.mark.parametrize("rotated", [True, False])
def test_norm_and_rope(fused: Any, heads: int, D: int, rotated: bool, dtype: torch.dtype) -> None:
    """In place in q of q, k and v, and into a tensor whose heads are apart."""
    norm = layers.RMSNorm(D, eps=1e-6, device=DEVICE).to(dtype).requires_grad_(False)
    norm.weight.copy_(1 + make(D, seed=4) / 8)
    rope = rope_table((2, 2, 3), D, DEVICE) if rotated else None
    qkv = make(2, 12, 3, heads, D, seed=0, dtype=dtype)
    expected = torch.empty_like(qkv[:, :, 0])
    plain.norm_rope(qkv[:, :, 0], norm, rope, expected)
    out = torch.full((2, heads, 12, D), torch.nan, dtype=dtype, device=DEVICE).transpose(1, 2)
    fused.norm_rope(qkv[:, :, 0], norm, rope, out)
    others = qkv[:, :, 1:].clone()
    fused.norm_rope(qkv[:, :, 0], norm, rope, qkv[:, :, 0])
    assert torch.equal(qkv[:, :, 0], out) and torch.equal(qkv[:, :, 1:], others)
    assert relative(out, expected) <= TOLERANCE[dtype] / 2
    if dtype == torch.float16 and not rotated:  # rounded where the model rounds: but for near-ties the same numbers
        assert (out != expected).float().mean() <= 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(fused: Any, dtype: torch.dtype) -> None:
    x, gate = (8 * make(3, 5, 1030, seed=s, dtype=dtype) for s in (0, 1))  # more than one program, the last not full
    expected = nn.functional.silu(x.double()) * gate.double()
    rounded = nn.functional.silu(x) * gate
    got = fused.swiglu_(x, gate)
    assert got is x and relative(x, expected) <= TOLERANCE[dtype]
    if dtype == torch.float16:  # rounded where the model rounds: but for near-ties the same numbers
        assert (x != rounded).float().mean() <= 0.01


def test_kernels_are_proven_before_they_are_chosen(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_kernels(_triton(), DEVICE) is None
    monkeypatch.setattr(fused, "gated_add_", lambda x, gate, update, frames: x.add_(update))
    assert check_kernels(_triton(), DEVICE) == f"they are wrong on {DEVICE}: gate"


def test_what_is_not_plain_is_left_to_pytorch() -> None:
    """A hook is called; fp64 is computed in fp64; a host's norm is called as a module."""
    from lcv_core.dit.kernels import fused

    _, frames = frames_of([[5.0, 5.0]], 4)
    x, shift, scale = make(1, 8, 64, seed=0), make(1, 64, seed=1), make(1, 64, seed=2)
    norm, called = layers.LayerNorm(64, eps=1e-6, elementwise_affine=False), []
    norm.register_forward_hook(lambda *_: called.append(1))
    fused.modulate(x, norm, shift, scale, frames)
    assert called
    wide = fused.modulate(x.double(), norm, shift.double(), scale.double(), frames)
    assert wide.dtype == torch.float64

    class Doubled(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    heads = make(1, 8, 4, 16, seed=3)
    out = torch.empty_like(heads)
    fused.norm_rope(heads, Doubled(16, eps=1e-6, device=DEVICE).requires_grad_(False), None, out)
    assert relative(out, 2 * nn.functional.rms_norm(heads, (16,), eps=1e-6)) <= 1e-6


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels carry ptxas for Linux alone")
def test_the_kernels_compile_without_spills(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(AOT), "--arch", "sm_90", "--out", str(tmp_path / "aot.csv"), "--gate"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "aot.csv").read_text().splitlines()) == 16
