"""The forward kernels, with pointers and with TMA descriptors, run by Triton's interpreter, against the reference."""

import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

import triton  # noqa: TID251  a kernel of this file calls the helper under test
import triton.language as tl  # noqa: TID251

from lcv_bsa.backends.triton import descriptors
from lcv_bsa.backends.triton.common import block_origin
from lcv_bsa.reference import reference_attention
from lcv_bsa.selection import BlockSelection
from lcv_bsa.testing import random_qkv, random_selection

Triple = tuple[int, int, int]
Inputs = tuple[Tensor, Tensor, Tensor, BlockSelection]
Forward = Callable[[Tensor, Tensor, Tensor, BlockSelection, float], tuple[Tensor, Tensor]]
SCALE = 0.11  # no power of two: scaling a rounded operand would show

FORWARDS = {name: import_module(f"lcv_bsa.backends.triton.{name}").forward for name in ("forward", "forward_tma")}
CASES: dict[str, dict[str, Any]] = {
    "full blocks": {"grid_q": (4, 4, 4), "top_k": 2},
    "partial blocks": {"grid_q": (3, 6, 7)},
    "6x7x9 of 64": {"grid_q": (6, 7, 9), "block_q": (4, 4, 4), "top_k": 2},
    "keys of another grid": {"grid_q": (5, 6, 3), "grid_k": (3, 4, 9), "block_k": (4, 2, 4)},
    "odd head dim, fewer kv heads, two samples": {
        "grid_q": (2, 5, 4), "heads": 2, "kv_heads": 1, "batch": 2, "head_dim": 40,
    },
    "head dim 128": {"grid_q": (2, 4, 8), "head_dim": 128},
    "tiles cut w": {"grid_q": (1, 4, 4), "grid_k": (1, 2, 150), "block_k": (1, 1, 128)},
    "tiles cut t and h": {"grid_q": (3, 10, 8), "block_q": (4, 8, 8), "block_k": (2, 16, 8)},
}  # fmt: skip

both_forwards = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())


def make(
    *, grid_q: Triple, grid_k: Triple | None = None, block_q: Triple = (2, 4, 4), block_k: Triple | None = None,
    top_k: int | None = None, dtype: torch.dtype = torch.float32, batch: int = 1, heads: int = 1,
    kv_heads: int | None = None, head_dim: int = 32,
) -> Inputs:  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(
        grid_q, grid_k, generator=draws, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    selection = random_selection(
        grid_q, grid_k, generator=draws, block_q=block_q, block_k=block_k, batch=batch, heads=heads, top_k=top_k
    )
    return q, k, v, selection


def error(found: tuple[Tensor, Tensor], inputs: Inputs) -> float:
    """Largest difference from the fp64 reference on the same rounded inputs, over the largest value."""
    q, k, v, selection = inputs
    exact = reference_attention(q.double(), k.double(), v.double(), selection, scale=SCALE)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))


@both_forwards
@pytest.mark.parametrize("case", CASES)
def test_fp32(forward: Forward, case: str) -> None:
    inputs = make(**CASES[case])
    assert error(forward(*inputs, SCALE), inputs) <= 1e-5


@both_forwards
def test_fp16(forward: Forward) -> None:
    inputs = make(grid_q=(3, 6, 7), dtype=torch.float16)
    assert error(forward(*inputs, SCALE), inputs) <= 1e-3


@both_forwards
@pytest.mark.parametrize("std", [16.0, 256.0])
def test_large_logits(forward: Forward, std: float) -> None:
    """Logits of that deviation. 256 * 4 has an ulp of 1.2e-4 in fp32."""
    q, k, v, selection = make(grid_q=(3, 6, 4))
    inputs = q * (std / (SCALE * 32**0.5)), k, v, selection
    assert error(forward(*inputs, SCALE), inputs) <= 1e-4


@pytest.mark.parametrize("case", ["partial blocks", "odd head dim, fewer kv heads, two samples"])
def test_descriptors_and_pointers_agree_to_the_bit(case: str) -> None:
    inputs = make(**CASES[case])
    first, second, third = (FORWARDS[name](*inputs, SCALE) for name in ("forward", "forward_tma", "forward_tma"))
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, b) and torch.equal(b, c)


@both_forwards
def test_rows_without_keys(forward: Forward) -> None:
    """o = 0 and lse = -inf there, the other rows as ever."""
    q, k, v, selection = make(grid_q=(2, 8, 8), top_k=2)
    o, lse = forward(q, k, v, selection, SCALE)
    counts = selection.counts.clone()
    counts[..., 1] = 0
    emptied = BlockSelection(
        selection.indices, counts, selection.grid_q, selection.grid_k, selection.block_q, selection.block_k
    )
    got_o, got_lse = forward(q, k, v, emptied, SCALE)
    rows = torch.zeros(2, 8, 8, dtype=torch.bool)
    rows[:, :4, 4:] = True  # the tokens of query block 1
    rows = rows.flatten()
    assert (got_o[:, :, rows] == 0).all() and (got_lse[:, :, rows] == -torch.inf).all()
    assert torch.equal(got_o[:, :, ~rows], o[:, :, ~rows]) and torch.equal(got_lse[:, :, ~rows], lse[:, :, ~rows])


@both_forwards
def test_only_tokens_are_read_and_all_outputs_written(forward: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN before, between and behind the tokens of every sample and head, and in memory that nobody wrote."""
    q, k, v, selection = make(grid_q=(3, 6, 5), batch=2, heads=2, top_k=1)
    guarded = []
    for x in (q, k, v):
        memory = torch.full((2, 2, x.shape[2] + 80, 32), torch.nan)
        guarded.append(memory[:, :, 40:-40].copy_(x))
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    assert error(forward(*guarded, selection, SCALE), (q, k, v, selection)) <= 1e-5  # type: ignore[call-arg]


@both_forwards
@pytest.mark.parametrize("order", ["BSHD", "packed BS3HD"])
def test_other_memory_orders_need_no_copy(forward: Forward, order: str) -> None:
    q, k, v, selection = make(grid_q=(3, 4, 5), batch=2, heads=2, top_k=1)
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
    moved = [x.transpose(1, 2) for x in packed.unbind(2)]
    if order == "BSHD":
        moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in moved]
    assert all(descriptors.describable(x) is x for x in moved)
    o, lse = forward(*moved, selection, SCALE)  # type: ignore[call-arg]
    expected_o, expected_lse = forward(q, k, v, selection, SCALE)
    assert torch.equal(o, expected_o) and torch.equal(lse, expected_lse)
    assert o.transpose(1, 2).is_contiguous() and lse.is_contiguous()


@both_forwards
def test_strides_that_descriptors_cannot_have(forward: Forward) -> None:
    """Expanded heads, channels apart, and a base 2 bytes off a multiple of 16."""
    q, k, v, selection = make(grid_q=(2, 4, 8), heads=2, dtype=torch.float16)
    k = k[:, :1].expand(-1, 2, -1, -1)
    v = torch.stack([v, v], -1)[..., 0]
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert not any(descriptors.is_describable(x) for x in (k, v, shifted))
    inputs = shifted, k, v, selection
    assert error(forward(*inputs, SCALE), inputs) <= 1e-3


@both_forwards
def test_tokens_more_than_two_to_the_31_elements_apart(forward: Forward) -> None:
    """Addresses are 64 bits wide. The memory between the tokens is never touched, so there need not be any."""
    q, k, v, selection = make(grid_q=(2, 4, 8), head_dim=64, dtype=torch.float16)
    apart = (1 << 31) // 40 // 64 * 64
    memory = torch.empty(64 * apart, dtype=torch.float16)
    far = [memory.as_strided(x.shape, (64 * apart, 64 * apart, apart, 1), 64 * i) for i, x in enumerate((q, k, v))]
    for a, b in zip(far, (q, k, v)):
        a.copy_(b)
    for found, expected in zip(forward(*far, selection, SCALE), forward(q, k, v, selection, SCALE)):  # type: ignore
        assert torch.equal(found, expected)


@triton.jit
def origin_kernel(first, blocks_hw, blocks_w, out):
    block = first + tl.arange(0, 1024)
    a, b, c = block_origin(block, blocks_hw, blocks_w, 4, 2, 8)  # pyright: ignore[reportArgumentType]
    tl.store(out + 3 * tl.arange(0, 1024), a)
    tl.store(out + 3 * tl.arange(0, 1024) + 1, b)
    tl.store(out + 3 * tl.arange(0, 1024) + 2, c)


@pytest.mark.parametrize(("blocks_h", "blocks_w"), [(1, 1), (7, 7), (11, 20), (40, 47), (83, 1), (1023, 1021)])
@pytest.mark.parametrize("first", [0, 50_000, (1 << 20) - 1024])
def test_block_origins_are_exact(first: int, blocks_h: int, blocks_w: int) -> None:
    """Up to the largest block number that is taken. 47 * (1 / 47) is less than 1 in fp32."""
    found = torch.empty(1024, 3, dtype=torch.int32)
    origin_kernel[(1,)](first, blocks_h * blocks_w, blocks_w, found)
    block = torch.arange(first, first + 1024)
    layer, line = block // (blocks_h * blocks_w), block // blocks_w % blocks_h
    assert torch.equal(found.long(), torch.stack([layer * 4, line * 2, block % blocks_w * 8], 1))


def test_descriptors_of_a_tensor_of_more_than_two_to_the_31_elements() -> None:
    grid = (48, 48, 80)
    x = torch.empty(4, 32, 48 * 48 * 80, 128, dtype=torch.bfloat16, device="meta")
    d = descriptors.describe(x, grid, (4, 4, 4))
    assert d.shape == [128, *grid, 128] and d.block_shape == [1, 4, 4, 4, 128]
    last = sum((n - 1) * s for n, s in zip(d.shape, d.strides))
    assert last == x.numel() - 1 > 1 << 31
    token_major = torch.empty(1, 48 * 48 * 80, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert descriptors.describe(token_major, grid, (4, 4, 4)).strides == [128, 48 * 80 * 4096, 80 * 4096, 4096, 1]


@pytest.mark.parametrize(
    ("block", "tokens", "box"),
    [
        ((4, 4, 4), 64, (4, 4, 4)),
        ((8, 8, 8), 64, (1, 8, 8)),
        ((4, 16, 16), 64, (1, 4, 16)),
        ((1, 2, 256), 64, (1, 1, 64)),
    ],
)
def test_boxes(block: Triple, tokens: int, box: Triple) -> None:
    assert descriptors.box_of(block, tokens) == box


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_q": (3, 4, 4)}, "block_q must be powers of two"),
        ({"block_k": (2, 2, 2)}, "block_k must be powers of two with 16 tokens or more"),
        ({"head_dim": 36, "dtype": torch.float16}, "multiple of 16 bytes, got D = 36"),
        ({"dtype": torch.float64}, "no fp64"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    assert descriptors.tma_refusal(*make(grid_q=(2, 4, 4))) is None
    assert reason in (descriptors.tma_refusal(*make(grid_q=(2, 4, 4), **change)) or "")


def test_rows_are_worked_on_longest_first() -> None:
    """By the power of two; equals keep their order."""
    order = import_module("lcv_bsa.backends.triton.forward").longest_rows_first
    counts = torch.tensor([[[3, 9, 0, 2, 8, 1, 15]]], dtype=torch.int32)
    assert order(counts).tolist() == [[[1, 4, 6, 0, 3, 5, 2]]] and order(counts).dtype == torch.int32
