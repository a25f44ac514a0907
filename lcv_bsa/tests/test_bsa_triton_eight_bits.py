"""q.k in int8 and p.v in fp8: by Triton's interpreter against an emulation in PyTorch, on a GPU against fp64."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

from lcv_bsa import block_sparse_attention
from lcv_bsa.backends.triton import eight_bits, moments
from lcv_bsa.layout import BlockLayout, from_blocks, to_blocks
from lcv_bsa.reference import reference_attention
from lcv_bsa.selection import BlockSelection
from lcv_bsa.testing import random_qkv, random_selection

Triple = tuple[int, int, int]
SCALE = 0.11
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def make(grid: Triple, block: Triple, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor, BlockSelection]:
    """Channels of k and of v that lie off, fewer heads of both than of q, rows that keep different numbers."""
    draws = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(grid, generator=draws, batch=2, heads=4, kv_heads=2, head_dim=head_dim)
    k[..., :3] += 5
    v[..., 2:5] -= 2
    return q, k, v, random_selection(grid, generator=draws, block_q=block, batch=2, heads=4)


def in_blocks(x: Tensor, layout: BlockLayout) -> Tensor:
    """x less nothing, in int8 with a scale for each block, and back: fp64 [B, H, S, D]."""
    blocks = to_blocks(x, layout)
    scales = blocks.abs().amax((-1, -2), keepdim=True) / 127
    return from_blocks((blocks / scales + 0.5).floor().double() * scales, layout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, which a GPU has no need of")
@pytest.mark.parametrize("head_dim", [32, 48])
@pytest.mark.parametrize(
    ("grid", "block"),
    [((4, 8, 8), (4, 4, 4)), ((3, 6, 4), (2, 4, 4)), ((5, 6, 9), (4, 4, 4)), ((8, 8, 8), (4, 8, 4))],
    ids=["whole", "small", "partial", "large"],
)
def test_equals_the_emulation(monkeypatch: pytest.MonkeyPatch, grid: Triple, block: Triple, head_dim: int) -> None:
    """fp64 attention over q and k from int8; v and p stay wide here, for the interpreter rounds to fp8 wrongly."""
    monkeypatch.setattr(eight_bits, "_HEADS_AT_ONCE", 1)
    q, k, v, selection = make(grid, block, head_dim)
    mean = moments.moments(k)[0][:, :, None]  # in another order of summing, rounding would fall otherwise
    of_q, of_k = in_blocks(q, selection.layout_q), in_blocks(k - mean, selection.layout_k)
    o, lse = reference_attention(of_q, of_k, v.double(), selection, scale=SCALE)
    lse += SCALE * (q.double() * mean.double().repeat_interleave(2, 1)).sum(-1)
    found_o, found_lse = eight_bits.forward(q, k, v, selection, SCALE, dtype=torch.float32)
    assert (found_o - o).abs().max() <= 2e-5 * o.abs().max()
    assert (found_lse - lse).abs().max() <= 2e-5 * lse.abs().max()


def test_moments() -> None:
    x = torch.randn(2, 3, 2500, 24, generator=torch.Generator().manual_seed(0)) + 3
    x = x.cuda() if torch.cuda.is_available() else x
    mean, reach = moments.moments(x)
    torch.testing.assert_close(mean, x.mean(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reach, (x - mean[:, :, None]).abs().amax(2), rtol=1e-5, atol=1e-5)


def test_values_fill_the_range_of_fp8() -> None:
    _, k, v, selection = make((5, 6, 9), (4, 4, 4))
    k, v = (x.cuda() if torch.cuda.is_available() else x for x in (k, v))
    packed = eight_bits.pack(k, v, selection.layout_k, torch.float8_e4m3fn)
    assert packed.keys.abs().amax() == 127
    largest = packed.values.float().abs().amax((2, 4))  # of each channel
    assert (largest <= 448).all() and (largest >= 224).all()


def test_a_row_without_keys() -> None:
    """o is 0, not the mean of v."""
    q, k, v, selection = make((4, 8, 8), (4, 4, 4))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, selection = (x.to(device) for x in (q, k, v, selection))
    selection.counts[0, 1, 0] = 0
    dtype = torch.float8_e4m3fn if GPU else torch.float32
    if torch.cuda.is_available() and not GPU:
        pytest.skip("needs compute capability 9.0 or more")
    o, lse = eight_bits.forward(q, k, v, selection, SCALE, dtype=dtype)
    empty = to_blocks(o, selection.layout_q)[0, 1, 0]
    assert (empty == 0).all() and lse.isneginf().any() and o.abs().amax() > 1


KINDS = {"normal": 3.9e-2, "sharp": 4.1e-2, "moved": 3.9e-2, "outliers": 4.9e-2}


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_what_the_docstring_says(kind: str) -> None:
    """Relative to fp64, emulated; dense bf16 SDPA has 2e-3."""
    layout = BlockLayout((8, 8, 32), (4, 4, 4))
    q, k, v = random_qkv(layout.grid, generator=torch.Generator().manual_seed(0), head_dim=128, dtype=torch.bfloat16)
    q, k = vary(q, k, kind)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    centred = k.float() - k.float().mean(2, keepdim=True)
    s = in_blocks(q.float(), layout) @ in_blocks(centred, layout).mT * q.shape[-1] ** -0.5
    p = (s - s.amax(-1, keepdim=True)).exp() * 448
    mean = v.float().mean(2, keepdim=True)
    v_scale = (v.float() - mean).abs().amax(2, keepdim=True) / 448
    v8 = ((v.float() - mean) / v_scale).to(torch.float8_e4m3fn).double() * v_scale
    o = p.float().to(torch.float8_e4m3fn).double() @ v8 / p.sum(-1, keepdim=True) + mean
    error = ((o - exact).norm() / exact.norm()).item()
    assert 0.95 * KINDS[kind] <= error <= 1.05 * KINDS[kind]


def vary(q: Tensor, k: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "sharp":
        return 2 * q, 2 * k
    if kind == "moved":
        k[..., :4] += 10
    if kind == "outliers":
        q[..., :4] *= 2
        k[..., :4] *= 8
    return q, k


def test_refusals() -> None:
    q, k, v, selection = make((4, 8, 8), (4, 4, 4))
    if not torch.cuda.is_available():
        assert "interpreter rounds to fp8 wrongly" in (eight_bits.refusal(q, k, v, selection) or "")
    with pytest.raises(ValueError, match="triton_int8_fp8"):
        block_sparse_attention(q, k, v, selection, backend="triton_int8_fp8")


@pytest.mark.skipif(not GPU, reason="fp8 products need a GPU of compute capability 9.0 or more")
@pytest.mark.parametrize("grid", [(8, 16, 16), (6, 14, 10)], ids=["whole", "partial"])
def test_on_a_gpu(grid: Triple) -> None:
    draws = torch.Generator().manual_seed(0)
    q, k, v = (x.cuda() for x in random_qkv(grid, generator=draws, heads=4, head_dim=128, dtype=torch.bfloat16))
    selection = random_selection(grid, generator=draws, block_q=(4, 4, 4), heads=4).to("cuda")
    o, lse = block_sparse_attention(q, k, v, selection, backend="triton_int8_fp8", return_lse=True)
    wide = (x.double().cpu() for x in (q, k, v))
    exact, exact_lse = block_sparse_attention(*wide, selection.to("cpu"), backend="cpu", return_lse=True)
    assert (o.cpu() - exact).norm() <= 6e-2 * exact.norm()
    assert (lse.cpu() - exact_lse).abs().max() <= 2e-2
