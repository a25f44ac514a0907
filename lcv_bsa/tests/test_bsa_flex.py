"""FlexAttention as a backend, against the reference."""

import shutil

import pytest
import torch

from lcv_bsa import block_sparse_attention, reference_attention
from lcv_bsa.testing import random_qkv, random_selection, run_with_gradients

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("g++", "clang++")), reason="no C++ compiler: FlexAttention cannot be compiled"
)
CASES = {
    "full": {"grid_q": (4, 8, 4)},
    "partial, grouped heads": {"grid_q": (6, 7, 9), "heads": 4, "kv_heads": 2},
    "other keys": {"grid_q": (5, 6, 3), "grid_k": (3, 4, 9), "block_q": (2, 4, 4), "block_k": (4, 2, 2), "batch": 2},
}


def make(grid_q, grid_k=None, block_q=(4, 4, 4), block_k=None, batch=1, heads=2, kv_heads=None):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(grid_q, grid_k, generator=g, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=16)
    blocks = {"block_q": block_q, "block_k": block_k}
    return q, k, v, random_selection(grid_q, grid_k, generator=g, batch=batch, heads=heads, **blocks)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", ["other keys", "partial, grouped heads"])
def test_values(case: str) -> None:
    q, k, v, sel = make(**CASES[case])
    o = block_sparse_attention(q, k, v, sel, scale=0.3, backend="flex")
    torch.testing.assert_close(o, reference_attention(q, k, v, sel, scale=0.3)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no gradients on a CPU; no CUDA GPU here")
@pytest.mark.parametrize("case", CASES)
def test_gradients_on_a_gpu(case: str) -> None:
    q, k, v, sel = make(**CASES[case])
    g = torch.Generator().manual_seed(1)
    do, dlse = torch.randn(q.shape, generator=g), torch.randn(q.shape[:3], generator=g)
    exact = run_with_gradients(lambda *x: reference_attention(*x, sel), *(x.double() for x in (q, k, v, do)), dlse)
    on_gpu = [x.cuda() for x in (q, k, v, do, dlse)]
    found = run_with_gradients(
        lambda *x: block_sparse_attention(*x, sel.to("cuda"), backend="flex", return_lse=True), *on_gpu
    )
    for name, ours, truth in zip(found._fields, found, exact):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=1e-5, msg=name)


def test_refusals() -> None:
    q, k, v, sel = make(**CASES["full"])
    with pytest.raises(ValueError, match="'flex' is not available here: on a CPU it has no gradients"):
        block_sparse_attention(q.requires_grad_(), k, v, sel, backend="flex")
    with pytest.raises(ValueError, match="it has no fp64"):
        block_sparse_attention(q.detach().double(), k.double(), v.double(), sel, backend="flex")
    if any(shutil.which(c) for c in ("g++", "clang++")):
        with pytest.raises(ValueError, match="gives no lse on a CPU"):
            block_sparse_attention(q.detach(), k, v, sel, backend="flex", return_lse=True)
    q, k, v, sel = make((3, 6, 5), block_q=(3, 3, 5))
    with pytest.raises(ValueError, match="a power of two of tokens, 16 or more, got query blocks of 45"):
        block_sparse_attention(q, k, v, sel, backend="flex")
