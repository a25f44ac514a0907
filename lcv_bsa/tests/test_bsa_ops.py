"""The operators as PyTorch sees them: opcheck, torch.compile in one graph, dynamic shapes, export, meta."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lcv_bsa import BlockSelection, block_sparse_attention, bsa_3d, select_blocks
from lcv_bsa.testing import random_qkv, random_selection

GEOMETRY = [4, 4, 6, 3, 5, 4, 2, 4, 4, 2, 2, 4]  # grid_q, grid_k, block_q, block_k
SIZES = {"batch": 2, "heads": 2}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], BlockSelection]:
    g = torch.Generator().manual_seed(0)
    grid_q, grid_k, block_q, block_k = (tuple(GEOMETRY[i : i + 3]) for i in range(0, 12, 3))
    q, k, v = random_qkv(grid_q, grid_k, generator=g, kv_heads=1, dtype=dtype, **SIZES)
    sel = random_selection(grid_q, grid_k, generator=g, block_q=block_q, block_k=block_k, **SIZES)
    return [x.requires_grad_() for x in (q, k, v)], sel


def test_attention_passes_opcheck() -> None:
    (q, k, v), sel = inputs()
    options = (sel.indices, sel.counts, False, GEOMETRY, 0.3, "cpu")
    torch.library.opcheck(torch.ops.lcv_bsa.attention.default, (q, k, v, *options))
    o, lse = torch.ops.lcv_bsa.attention(q, k, v, *options)
    given = (torch.randn_like(o), torch.randn_like(lse), q, k, v, o, lse)
    torch.library.opcheck(torch.ops.lcv_bsa.attention_backward.default, (*(x.detach() for x in given), *options))


@pytest.mark.parametrize("strided", [False, True])
def test_outputs_lie_in_memory_as_the_inputs(strided: bool) -> None:
    """[B, S, H, D] memory stays so; opcheck above compares the fake's strides with these."""
    (q, k, v), sel = inputs()
    if strided:
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
        torch.library.opcheck(
            torch.ops.lcv_bsa.attention.default, (q, k, v, sel.indices, sel.counts, False, GEOMETRY, 0.3, "cpu")
        )
    o = block_sparse_attention(q, k, v, sel, backend="cpu")
    assert o.stride() == q.stride()


@pytest.mark.parametrize("cdf_threshold", [None, 0.4])
def test_select_passes_opcheck(cdf_threshold: float | None) -> None:
    (q, k, _), _ = inputs()
    torch.library.opcheck(
        torch.ops.lcv_bsa.select.default, (q.detach(), k.detach(), GEOMETRY, 2, cdf_threshold, 0.3, "auto")
    )


def both_gradients(f: Callable[..., Tensor], compiled: Callable[..., Tensor], *args: Tensor) -> None:
    """The compiled call gives the eager one's values and gradients."""
    leaves = [x for x in args if isinstance(x, Tensor)]
    expected, found = f(*args), compiled(*args)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiles_as_one_graph() -> None:
    (q, k, v), sel = inputs()

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bsa_3d(q * 2, k, v, (4, 4, 6), (3, 5, 4), block_q=(2, 4, 4), block_k=(2, 2, 4), keep=0.4) + 1

    def given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = block_sparse_attention(q, k, v, sel, return_lse=True)
        return o * lse[..., None]

    both_gradients(whole, torch.compile(whole, fullgraph=True, backend="aot_eager"), q, k, v)
    both_gradients(given, torch.compile(given, fullgraph=True, backend="aot_eager"), q, k, v)


def test_compiles_where_the_count_depends_on_values() -> None:
    (q, k, v), _ = inputs()

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sel = select_blocks(q, k, (4, 4, 6), (3, 5, 4), (2, 4, 4), block_k=(2, 2, 4), cdf_threshold=0.4)
        return block_sparse_attention(q, k, v, sel)

    both_gradients(whole, torch.compile(whole, fullgraph=True, backend="aot_eager"), q, k, v)


def test_dynamic_grids_share_a_graph() -> None:
    """Grids that change from call to call: after the first two no further graph is compiled."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def whole(q: Tensor, k: Tensor, v: Tensor, T: int, H: int, W: int) -> Tensor:
        return bsa_3d(q, k, v, (T, H, W), keep=0.3)

    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend=count)
    seen = []
    for i, grid in enumerate([(4, 8, 8), (3, 7, 9), (5, 9, 6), (8, 10, 5)]):
        x = random_qkv(grid, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(compiled(*x, *grid), whole(*x, *grid))
        seen.append(graphs)
    assert seen[-1] == seen[1] <= 2


class Video(torch.nn.Module):
    """Self-attention over a video [B, H, T, h, w, D] whose size is not known when it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2, 4)
        return bsa_3d(tokens, tokens, tokens, tuple(x.shape[2:5]), block_q=(2, 4, 4), keep=0.5).unflatten(
            2, x.shape[2:5]
        )


def test_exports_with_dynamic_sizes() -> None:
    x = torch.randn(1, 2, 4, 8, 6, 16, generator=torch.Generator().manual_seed(0))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(Video(), (x,), dynamic_shapes={"x": {2: auto, 3: auto, 4: auto}})
    for shape in ((1, 2, 4, 8, 6, 16), (1, 2, 5, 7, 9, 16)):
        y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(program.module()(y), Video()(y))


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (
        torch.empty(2, 32, 37440, 128, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)
    )
    o, lse = bsa_3d(q, k, v, (24, 30, 52), return_lse=True)
    assert o.shape == q.shape and o.dtype == q.dtype and o.device.type == "meta"
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    o.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


@pytest.mark.slow
def test_inductor_compiles() -> None:
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler for torch.compile's default backend on a CPU")
    (q, k, v), _ = inputs()

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bsa_3d(q * 2, k, v, (4, 4, 6), (3, 5, 4), block_q=(2, 4, 4), block_k=(2, 2, 4), keep=0.4) + 1

    both_gradients(whole, torch.compile(whole, fullgraph=True), q, k, v)


@pytest.mark.parametrize("backend", ["triton", "triton_tma", "reference"])
def test_named_backends_compile_as_one_graph(backend: str) -> None:
    if backend != "reference":
        pytest.importorskip("triton", reason="triton is not installed; pip install triton to run its kernels")
    x = random_qkv((4, 4, 8), generator=torch.Generator().manual_seed(0), head_dim=32)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bsa_3d(q, k, v, (4, 4, 8), keep=0.5, backend=backend)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), whole(*x), rtol=0, atol=0)
