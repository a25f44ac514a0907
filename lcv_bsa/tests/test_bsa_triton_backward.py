"""The Triton backwards, run by Triton's interpreter on the CPU, against fp64 autograd through the reference."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

from lcv_bsa import ops
from lcv_bsa.backends.triton import backward_fused, backward_tma
from lcv_bsa.backends.triton.backward import backward as pointer_backward
from lcv_bsa.backends.triton.backward import longest_keys_first
from lcv_bsa.reference import reference_attention
from lcv_bsa.selection import BlockSelection
from lcv_bsa.testing import random_qkv, random_selection, run_with_gradients

Gradients = tuple[Tensor, Tensor, Tensor]

SCALE = 0.11  # no power of two: scaling a rounded operand would show

BACKWARDS: dict[str, Callable[..., Gradients]] = {
    "pointer": pointer_backward,
    "tma": backward_tma.backward,
    "fused": partial(backward_fused.walked_backward, walk="fused"),
    "fused_tma": partial(backward_fused.walked_backward, walk="fused_tma"),
}
DETERMINISTIC = ["pointer", "tma"]

CASES: dict[str, dict] = {
    "partial blocks": {"grid": (3, 5, 6), "block": (2, 4, 4), "top_k": 2},
    "other blocks and grid of keys": {
        "grid": (5, 6, 3),
        "grid_k": (3, 4, 9),
        "block": (2, 4, 4),
        "block_k": (4, 2, 2),
        "top_k": 2,
    },
    "grouped heads, two samples": {"grid": (2, 4, 6), "block": (2, 4, 4), "heads": 2, "kv_heads": 1, "batch": 2},
    "blocks larger than a tile": {"grid": (4, 6, 7), "block": (4, 8, 4), "block_k": (2, 8, 8)},
}
POINTER_CASES: dict[str, dict] = {
    "odd head dim and blocks": {"grid": (3, 6, 4), "block": (3, 5, 2), "head_dim": 42},
    "one token": {"grid": (1, 1, 1), "block": (1, 1, 1)},
    "256 channels": {"grid": (4, 4, 4), "head_dim": 256},
}


@dataclass(frozen=True)
class Problem:
    """Inputs of a backward, o and lse from fp64, and the exact gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    do: Tensor
    dlse: Tensor
    selection: BlockSelection
    exact: Gradients

    def run(self, name: str) -> Gradients:
        rest = (self.o, self.lse, self.do, self.dlse, self.selection, SCALE)
        return BACKWARDS[name](self.q, self.k, self.v, *rest)

    def error(self, got: Gradients) -> float:
        """Largest difference over the largest value, of the worst of dq, dk, dv."""
        return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, self.exact))


def make(
    *, grid: tuple[int, int, int], grid_k: tuple[int, int, int] | None = None, block: tuple[int, int, int] = (4, 4, 4),
    block_k: tuple[int, int, int] | None = None, heads: int = 1, kv_heads: int | None = None, batch: int = 1,
    head_dim: int = 32, top_k: int | None = None, dtype: torch.dtype = torch.float32, logit_std: float = 1.0,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(
        grid, grid_k, generator=generator, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    q = q * (logit_std / (head_dim**0.5 * SCALE))
    selection = random_selection(
        grid, grid_k, generator=generator, block_q=block, block_k=block_k, batch=batch, heads=heads, top_k=top_k
    )
    do = torch.randn(q.shape, generator=generator).to(dtype)
    dlse = torch.randn(q.shape[:3], generator=generator)
    return solved(q, k, v, do, dlse, selection)


def solved(q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection) -> Problem:
    attend = partial(reference_attention, selection=selection, scale=SCALE)
    o, lse, *exact = run_with_gradients(attend, q.double(), k.double(), v.double(), do, dlse)
    return Problem(q, k, v, o.to(q.dtype), lse.float(), do, dlse, selection, (exact[0], exact[1], exact[2]))


@pytest.mark.parametrize(("case", "name"), [*product(CASES, BACKWARDS), *product(POINTER_CASES, ["pointer", "fused"])])
def test_fp32(case: str, name: str) -> None:
    problem = make(**(CASES | POINTER_CASES)[case])
    assert problem.error(problem.run(name)) <= 1e-5


@pytest.mark.parametrize("name", BACKWARDS)
@pytest.mark.parametrize("logit_std", [1.0, 16.0, 256.0])
def test_fp16_at_any_size_of_logits(logit_std: float, name: str) -> None:
    """A K scaled beforehand and rounded would be off by ten times as much at 256. Slots of partial blocks, whose logits
    are 0, would overflow where all of a row's are far below."""
    problem = make(grid=(2, 5, 6), block=(2, 4, 4), top_k=1, dtype=torch.float16, logit_std=logit_std)
    assert problem.error(problem.run(name)) <= 1e-2


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_two_runs_agree_to_the_bit(name: str) -> None:
    problem = make(grid=(2, 4, 6), block=(2, 4, 4), heads=2, kv_heads=1, top_k=1)
    for first, second in zip(problem.run(name), problem.run(name)):
        assert torch.equal(first, second)


def test_descriptors_and_pointers_agree() -> None:
    problem = make(grid=(2, 5, 6), block=(2, 4, 4), dtype=torch.float16)
    for a, b in zip(problem.run("pointer"), problem.run("tma")):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["fused", "fused_tma"])
def test_fused_and_two_kernels_agree(name: str) -> None:
    problem = make(grid=(2, 5, 6), block=(2, 4, 4))
    for a, b in zip(problem.run("pointer"), problem.run(name)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_memory_order_is_kept(name: str) -> None:
    """[B, S, H, D]: one descriptor cannot hold two samples of two heads of it."""
    plain = make(grid=(2, 4, 4), block=(2, 4, 4), heads=2, batch=2)
    tensors = (plain.q, plain.k, plain.v, plain.o, plain.do)
    q, k, v, o, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    strided = replace(plain, q=q, k=k, v=v, o=o, do=do)
    for x, a, b in zip((q, k, v), strided.run(name), plain.run(name)):
        assert a.stride() == x.stride() != b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradients_of_any_strides(name: str) -> None:
    """What autograd hands over after a sum is one number expanded."""
    plain = make(grid=(2, 4, 6), block=(2, 4, 4))
    do, dlse = torch.tensor(0.7).expand_as(plain.do), torch.tensor(-0.4).expand_as(plain.dlse)
    problem = solved(plain.q, plain.k, plain.v, do, dlse, plain.selection)
    assert problem.do.stride() == (0, 0, 0, 0) and problem.dlse.stride() == (0, 0, 0)
    assert problem.error(problem.run(name)) <= 1e-5


@pytest.mark.parametrize("name", BACKWARDS)
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Floats start as NaN instead of whatever memory held."""

    def poisoned(make_empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **options: object) -> Tensor:
            x = make_empty(*args, **options)
            return x.fill_(float("nan")) if x.dtype.is_floating_point else x

        return empty

    problem = make(grid=(2, 4, 7), block=(2, 4, 4), top_k=1)
    for function in ("empty", "empty_like"):
        monkeypatch.setattr(torch, function, poisoned(getattr(torch, function)))
    assert problem.error(problem.run(name)) <= 1e-5


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_parts_of_the_keys_add_up(name: str) -> None:
    """Ring attention: each part has o and lse of all keys, and rows of it may keep no key block."""
    whole = make(grid=(2, 4, 8), grid_k=(2, 4, 12), block=(2, 4, 4), heads=2, kv_heads=1)
    mask = whole.selection.to_mask()
    sums = [torch.zeros_like(x) for x in whole.exact]
    empty_rows = 0
    for keys in ([0, 2], [1]):
        part = torch.zeros_like(mask)
        part[..., keys] = mask[..., keys]
        empty_rows += int((~part.any(-1)).sum())
        for total, gradient in zip(sums, replace(whole, selection=maybe_empty(part, whole.selection)).run(name)):
            total += gradient
    assert empty_rows > 0
    assert whole.error((sums[0], sums[1], sums[2])) <= 1e-5


def maybe_empty(mask: Tensor, like: BlockSelection) -> BlockSelection:
    """A selection of the mask's pairs; rows without any have a count of 0, which only `lcv_bsa.distributed` makes."""
    counts = mask.sum(-1, dtype=torch.int32)
    order = mask.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    last = order.gather(-1, (counts[..., None].long() - 1).clamp(min=0))
    indices = torch.where(torch.arange(mask.shape[-1]) < counts[..., None], order, last)
    return replace(like, indices=indices, counts=counts, uniform=False)


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_row_without_any_key_has_no_gradient(name: str) -> None:
    problem = make(grid=(2, 4, 8), block=(2, 4, 4), top_k=2)
    mask = problem.selection.to_mask()
    mask[:, :, 0] = False
    first = torch.arange(problem.q.shape[2]) % 8 < 4  # tokens of query block 0
    lse, o = problem.lse.clone(), problem.o.clone()
    lse[:, :, first], o[:, :, first] = -torch.inf, 0.0
    dq, dk, dv = replace(problem, lse=lse, o=o, selection=maybe_empty(mask, problem.selection)).run(name)
    assert (dq[:, :, first] == 0).all() and (dq[:, :, ~first] != 0).any()
    alone = problem.do.clone(), problem.dlse.clone()
    alone[0][:, :, first], alone[1][:, :, first] = 0, 0
    exact = solved(problem.q, problem.k, problem.v, *alone, problem.selection)
    assert exact.error((dq, dk, dv)) <= 1e-5


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_addresses_past_two_billion(name: str) -> None:
    """Three heads 2 ** 30 elements apart: the last begins at 2 ** 31, where int32 has ended."""
    near = make(grid=(2, 4, 4), block=(2, 4, 4), heads=3, head_dim=16, dtype=torch.float16)
    try:
        memory = torch.empty((2 << 30) + 4 * near.q[0, 0].numel(), dtype=torch.float16)  # its pages stay untouched
    except RuntimeError as error:
        pytest.skip(f"no room for 4 GB of addresses: {error}")
    tensors = []
    for i, x in enumerate((near.q, near.k, near.v, near.do)):
        far = memory[i * x[0, 0].numel() :].as_strided(x.shape, (3 << 30, 1 << 30, 16, 1))
        tensors.append(far.copy_(x))
    q, k, v, do = tensors
    for a, b in zip(replace(near, q=q, k=k, v=v, do=do).run(name), near.run(name)):
        assert torch.equal(a, b)


def test_as_an_operator() -> None:
    problem = make(grid=(2, 4, 6), block=(2, 4, 4))
    inputs = (problem.q, problem.k, problem.v, problem.o, problem.lse, problem.do, problem.dlse, problem.selection)
    assert problem.error(ops.backward(*inputs, scale=SCALE, kernels="triton")) <= 1e-5


def test_popular_keys_come_first() -> None:
    """By the power of two of the pairs of a group of heads, the most first; ascending where it is the same."""
    columns = torch.tensor([[1, 9, 0, 3, 15, 2], [1, 0, 0, 0, 1, 6]], dtype=torch.int32)
    ends = columns.flatten().cumsum(0, dtype=torch.int32).view(1, 2, 6)
    offsets = torch.cat([torch.tensor([[[0], [30]]]), ends], -1).to(torch.int32)
    # in sum 2, 9, 0, 3, 16, 8
    assert longest_keys_first(offsets, 1).tolist() == [[[4, 1, 5, 0, 3, 2]]]
    assert longest_keys_first(offsets, 2).tolist() == [[[1, 4, 3, 5, 0, 2], [5, 0, 4, 1, 2, 3]]]
