"""`make_sparse` and the processors against stand-in models; HunyuanVideo and LTX are in test_bsa_adapters_joint.py."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bsa_adapter_hosts import (
    GRID,
    Attend,
    Attention,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
    latent,
)
from torch import Tensor, nn

from lcv_bsa import reference_attention, select_blocks
from lcv_bsa.adapters.diffusers import SparseOptions, SparseWanAttnProcessor, make_sparse

TOKENS = 5 * 6 * 7
BLOCK = (2, 2, 3)


@pytest.fixture
def generator() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture
def wan(generator: torch.Generator) -> WanTransformer3DModel:
    return WanTransformer3DModel()


@pytest.fixture
def inputs(generator: torch.Generator) -> dict[str, Tensor]:
    text = torch.randn(2, 9, 16, generator=generator)
    return {"hidden_states": latent(generator), "timestep": torch.tensor([700.0, 300.0]), "encoder_hidden_states": text}


def oracle(grid: tuple[int, int, int], keep: float, block: tuple[int, int, int] = BLOCK) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        selection = select_blocks(q, k, grid, grid, block, keep=keep)
        return reference_attention(q.double(), k.double(), v.double(), selection)[0].to(q.dtype)

    return attend


def with_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    o = model(**inputs)
    return [o, *torch.autograd.grad(o.square().sum(), list(model.parameters()))]


def test_all_kept_equals_dense(wan: WanTransformer3DModel, inputs: dict[str, Tensor]) -> None:
    expected = with_gradients(wan, inputs)
    with make_sparse(wan, keep=1.0) as handle:
        assert handle.layers == 2
        torch.testing.assert_close(with_gradients(wan, inputs), expected, rtol=1e-4, atol=1e-5)


def test_sparse_equals_the_reference(wan: WanTransformer3DModel, inputs: dict[str, Tensor]) -> None:
    with make_sparse(wan, keep=0.25, block=BLOCK):
        got = with_gradients(wan, inputs)
    dense = wan(**inputs)
    for block in wan.blocks:
        block.attn1.processor.attend = oracle(GRID, 0.25)
    torch.testing.assert_close(got, with_gradients(wan, inputs), rtol=1e-4, atol=1e-5)
    assert (got[0] - dense).abs().max() > 1e-2


def test_the_grid_is_that_of_each_call(
    wan: WanTransformer3DModel, inputs: dict[str, Tensor], generator: torch.Generator
) -> None:
    turned = (GRID[0], GRID[2], GRID[1])  # as many tokens, another grid
    with make_sparse(wan, keep=0.25, block=BLOCK):
        wan(**inputs)
        inputs["hidden_states"] = latent(generator, turned)
        got = wan(**inputs)
    for block in wan.blocks:
        block.attn1.processor.attend = oracle(turned, 0.25)
    torch.testing.assert_close(got, wan(**inputs), rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_model_knows_its_own_grid(
    wan: WanTransformer3DModel, inputs: dict[str, Tensor], generator: torch.Generator
) -> None:
    other = {**inputs, "hidden_states": latent(generator, (GRID[0], GRID[2], GRID[1]))}
    with make_sparse(wan, keep=0.25, block=BLOCK):
        expected = wan(**other)
        wan(**inputs)
        copied = copy.deepcopy(wan)
        assert torch.equal(copied(**other), expected)


def test_remove_restores_the_very_processors(wan: WanTransformer3DModel, inputs: dict[str, Tensor]) -> None:
    before = [attention.processor for block in wan.blocks for attention in (block.attn1, block.attn2)]
    expected = wan(**inputs)
    handle = make_sparse(wan)
    assert [block.attn2.processor for block in wan.blocks] == before[1::2]
    assert not any(block.attn1.processor in before for block in wan.blocks)
    handle.remove()
    handle.remove()
    with pytest.raises(RuntimeError, match="inside"), make_sparse(wan):
        raise RuntimeError("inside")
    assert [attention.processor for block in wan.blocks for attention in (block.attn1, block.attn2)] == before
    assert not wan._forward_pre_hooks
    assert torch.equal(wan(**inputs), expected)


@pytest.mark.parametrize(
    ("options", "dense_calls"),
    [
        ({"dense_blocks": (1,)}, [0, 1]),
        ({"dense_above": 699.0}, [1, 1]),
        ({"dense_above": 700.0}, [0, 0]),
        ({"min_tokens": TOKENS + 1}, [1, 1]),
        ({"min_tokens": TOKENS}, [0, 0]),
    ],
)
def test_what_stays_dense(
    wan: WanTransformer3DModel, inputs: dict[str, Tensor], options: dict[str, Any], dense_calls: list[int]
) -> None:
    before = [block.attn1.processor for block in wan.blocks]
    with make_sparse(wan, keep=0.1, **options):
        wan(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    assert [processor.calls for processor in before] == dense_calls


class Widening(nn.Module):
    """A norm whose result is fp32, as autocast makes it on some devices."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_wide_norms_in_half_precision(generator: torch.Generator) -> None:
    attn = Attention(None).bfloat16()
    attn.norm_q, attn.norm_k = Widening(), Widening()
    x = torch.randn(1, TOKENS, 16, generator=generator).bfloat16()
    assert SparseWanAttnProcessor(GRID)(attn, x).dtype == torch.bfloat16


def test_fused_projections(generator: torch.Generator) -> None:
    attn = Attention(None)
    x = torch.randn(1, TOKENS, 16, generator=generator)
    expected = SparseWanAttnProcessor(GRID)(attn, x)
    attn.to_qkv = nn.Linear(16, 48)
    attn.fused_projections = True
    with torch.no_grad():
        attn.to_qkv.weight.copy_(torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]))
        attn.to_qkv.bias.copy_(torch.cat([attn.to_q.bias, attn.to_k.bias, attn.to_v.bias]))
        attn.to_q.weight.zero_()
    torch.testing.assert_close(SparseWanAttnProcessor(GRID)(attn, x), expected)


def test_refused_models(wan: WanTransformer3DModel) -> None:
    with pytest.raises(ValueError, match=r"one of WanTransformer3DModel, .*, got Linear"):
        make_sparse(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"dense_blocks must be 0\.\.1 .*, got 2"):
        make_sparse(wan, dense_blocks=(0, 2))
    wan.blocks[1].attn1.processor._parallel_config = SimpleNamespace()
    with pytest.raises(ValueError, match="context parallelism"):
        make_sparse(wan)
    make_sparse(wan, dense_blocks=(1,)).remove()
    with make_sparse(wan, dense_blocks=(1,)), pytest.raises(ValueError, match="got SparseWanAttnProcessor"):
        make_sparse(wan, dense_blocks=(1,))
    assert not wan._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep must be in"),
        ({"keep": None}, "one of top_k, keep and cdf_threshold"),
        ({"top_k": 0}, "top_k must be an int >= 1, got 0"),
        ({"cdf_threshold": 2.0}, "cdf_threshold must be in"),
        ({"block": (4, 4)}, "block must be three positive ints"),
        ({"min_tokens": -1}, "min_tokens must be an int >= 0, got -1"),
    ],
)
def test_refused_options(wan: WanTransformer3DModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sparse(wan, **options)
    assert type(wan.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_large_top_k_is_an_option() -> None:
    assert SparseOptions(top_k=500, keep=None).top_k == 500


def test_refused_calls(wan: WanTransformer3DModel, inputs: dict[str, Tensor]) -> None:
    attn, x = Attention(None), torch.zeros(1, TOKENS, 16)
    with pytest.raises(ValueError, match=r"hidden_states must have 5\*6\*8 = 240 tokens, got 210"):
        SparseWanAttnProcessor((5, 6, 8))(attn, x)
    with pytest.raises(ValueError, match="got cross attention"):
        SparseWanAttnProcessor(GRID)(attn, x, x)
    with pytest.raises(ValueError, match="got a mask"):
        SparseWanAttnProcessor(GRID)(attn, x, None, torch.ones(1, 1, 1, TOKENS, dtype=torch.bool))
    with pytest.raises(ValueError, match="dense must be a processor"):
        SparseWanAttnProcessor(GRID, options=SparseOptions(min_tokens=1))
    with make_sparse(wan, dense_above=500.0):
        with pytest.raises(ValueError, match="before the model was called"):
            wan.blocks[0].attn1(x)
        with pytest.raises(ValueError, match=r"hidden_states must be \[B, C, F, H, W\], got \[4, 10, 12, 14\]"):
            wan(**{**inputs, "hidden_states": torch.zeros(4, 10, 12, 14)})
        with pytest.raises(ValueError, match="timestep must be given"):
            wan(**{**inputs, "timestep": None})
        wan.blocks[0].attn1.processor._parallel_config = SimpleNamespace()
        with pytest.raises(ValueError, match="context parallelism"):
            wan(**inputs)


def test_ltx_is_told_its_grid(generator: torch.Generator) -> None:
    model = LTXVideoTransformer3DModel()
    x, text = torch.randn(2, TOKENS, 16, generator=generator), torch.randn(2, 9, 16, generator=generator)
    timestep = torch.zeros(2)
    T, H, W = GRID
    with make_sparse(model, keep=0.25, block=BLOCK):
        got = model(x, text, timestep, None, T, H, W)
        assert torch.equal(model(x, text, timestep, num_frames=T, height=H, width=W), got)
        with pytest.raises(ValueError, match=r"num_frames, height and width alone, got .*None"):
            model(x, text, timestep)
        with pytest.raises(ValueError, match=r"5\*6\*6 = 180 tokens, got 210"):
            model(x, text, timestep, None, T, H, W - 1)
    model.transformer_blocks[0].attn1.processor.attend = oracle(GRID, 0.25)
    torch.testing.assert_close(got, model(x, text, timestep), rtol=1e-4, atol=1e-5)
