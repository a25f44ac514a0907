"""The Triton kernels themselves, run by Triton's interpreter on the CPU, against the fp64 reference."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

from lcv_bsa import block_sparse_attention
from lcv_bsa.reference import reference_attention
from lcv_bsa.selection import BlockSelection
from lcv_bsa.testing import Results, random_qkv, random_selection, run_with_gradients

Triple = tuple[int, int, int]

CASES: dict[str, dict] = {
    "full blocks": {"grid_q": (4, 8, 4)},
    "partial blocks and an odd head dim": {"grid_q": (5, 6, 7), "head_dim": 40},
    "keys of another grid": {"grid_q": (5, 6, 3), "grid_k": (3, 4, 9), "block_q": (2, 4, 4), "block_k": (4, 2, 2)},
    "one token": {"grid_q": (1, 1, 1), "block_q": (1, 1, 1)},
    "grouped heads, two samples": {"grid_q": (4, 4, 8), "heads": 2, "kv_heads": 1, "batch": 2},
    "blocks larger than a tile": {"grid_q": (4, 8, 4), "block_q": (4, 8, 4), "block_k": (4, 8, 4)},
}


@pytest.fixture(autouse=True)
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make(
    generator: torch.Generator, *, grid_q: Triple, grid_k: Triple | None = None, block_q: Triple = (4, 4, 4),
    block_k: Triple | None = None, heads: int = 1, kv_heads: int | None = None, batch: int = 1, head_dim: int = 32,
    dtype: torch.dtype = torch.float32, std: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockSelection]:  # fmt: skip
    q, k, v = random_qkv(
        grid_q, grid_k, generator=generator, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    selection = random_selection(
        grid_q, grid_k, generator=generator, block_q=block_q, block_k=block_k, batch=batch, heads=heads
    )
    return q * std, k, v, selection


def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: BlockSelection) -> tuple[Results, Results]:
    """The kernels' results, and the reference's in fp64 on the same rounded inputs."""
    generator = torch.Generator().manual_seed(1)
    do, dlse = torch.randn(q.shape, generator=generator), torch.randn(q.shape[:3], generator=generator)
    scale = 0.11  # no power of two: scaling a rounded operand would show

    def kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_sparse_attention(q, k, v, selection, scale=scale, backend="triton", return_lse=True)

    got = run_with_gradients(kernels, q, k, v, do.to(q.dtype).float(), dlse)
    exact = run_with_gradients(
        lambda q, k, v: reference_attention(q, k, v, selection, scale=scale),
        q.double(), k.double(), v.double(), do.to(q.dtype), dlse,
    )  # fmt: skip
    return got, exact


def errors(got: Results, exact: Results) -> dict[str, float]:
    """Largest difference of each result over the largest value of the exact one."""
    pairs = zip(Results._fields, got, exact)
    return {n: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for n, a, b in pairs}


@pytest.mark.parametrize("case", CASES)
def test_fp32(generator: torch.Generator, case: str) -> None:
    assert max(errors(*both(*make(generator, **CASES[case]))).values()) <= 1e-5


@pytest.mark.parametrize("case", ["full blocks", "partial blocks and an odd head dim"])
def test_fp16(generator: torch.Generator, case: str) -> None:
    assert max(errors(*both(*make(generator, dtype=torch.float16, **CASES[case]))).values()) <= 4e-3


def test_large_logits(generator: torch.Generator) -> None:
    """Logits far apart (std in the hundreds): nothing overflows, and the scale is applied in fp32."""
    got, exact = both(*make(generator, grid_q=(4, 4, 8), std=256.0))
    assert max(errors(got, exact).values()) <= 1e-4


def test_two_runs_agree_to_the_bit(generator: torch.Generator) -> None:
    inputs = make(generator, grid_q=(4, 6, 8), heads=2, kv_heads=1)
    for first, second in zip(both(*inputs)[0], both(*inputs)[0]):
        assert torch.equal(first, second)


def test_strides_are_walked(generator: torch.Generator) -> None:
    """[B, S, H, D] memory is read as it is."""
    q, k, v, selection = make(generator, grid_q=(4, 4, 6), heads=2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    for a, b in zip(both(q, k, v, selection)[0], both(*strided, selection)[0]):
        assert torch.equal(a, b)


def test_every_output_is_written(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN instead of whatever memory held."""
    for make_empty in (torch.empty, torch.empty_like):

        def filled(*args: Any, make_empty: Callable[..., torch.Tensor] = make_empty, **options: Any) -> torch.Tensor:
            out = make_empty(*args, **options)
            return out.fill_(torch.nan if out.is_floating_point() else -1)

        monkeypatch.setattr(torch, make_empty.__name__, filled)
    got, exact = both(*make(generator, grid_q=(5, 6, 7)))
    assert max(errors(got, exact).values()) <= 1e-5


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "fp64"), (torch.bfloat16, "bf16")])
def test_refused_dtypes(generator: torch.Generator, dtype: torch.dtype, reason: str) -> None:
    q, k, v, selection = make(generator, grid_q=(4, 4, 4), dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        block_sparse_attention(q, k, v, selection, backend="triton")
