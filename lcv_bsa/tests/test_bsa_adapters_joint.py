"""HunyuanVideo: sparse among video tokens, dense wherever text takes part."""

import pytest
import torch
from bsa_adapter_hosts import GRID, HunyuanVideoTransformer3DModel, angles_of, cos_sin, latent
from torch import Tensor

from lcv_bsa import select_blocks
from lcv_bsa.adapters.diffusers import SparseHunyuanVideoAttnProcessor, make_sparse
from lcv_bsa.adapters.joint import joint_attention, text_lengths_of
from lcv_bsa.adapters.options import SparseOptions
from lcv_bsa.reference import token_mask

S, L, BLOCK = 5 * 6 * 7, 70, (2, 2, 3)
OPTIONS = SparseOptions(BLOCK, keep=0.25)


@pytest.fixture
def generator() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


def joint_oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, keep: float = 0.25) -> Tensor:
    """q, k, v [B, H, S + L, D], mask [B, 1, 1, S + L]: one masked softmax in fp64."""
    selection = select_blocks(q[:, :, :S], k[:, :, :S], GRID, GRID, BLOCK, keep=keep)
    seen = mask.expand(*q.shape[:3], S + L).clone()
    seen[:, :, :S, :S] &= token_mask(selection)
    logits = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v.double()).to(q.dtype)


def key_mask(*lengths: int) -> Tensor:
    return (torch.arange(S + L) < S + torch.tensor(lengths)[:, None])[:, None, None]


@pytest.mark.parametrize("lengths", [(L, L), (9, 9), (65, 1), (0, 64)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_joint_attention(lengths: tuple[int, int], backend: str, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, S + L, 2, 8, generator=generator, requires_grad=True) for _ in range(3))
    do = torch.randn(2, S + L, 2, 8, generator=generator)
    options = SparseOptions(BLOCK, keep=0.25, backend=backend)
    o = joint_attention(q, k, v, GRID, text_lengths=lengths, options=options)
    expected = joint_oracle(*(x.transpose(1, 2) for x in (q, k, v)), key_mask(*lengths)).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    grads, expected_grads = (torch.autograd.grad(x, (q, k, v), do) for x in (o, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_large_logits_merge_without_overflow(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, S + L, 1, 8, generator=generator) for _ in range(3))
    q = q * 200
    o = joint_attention(q, k, v, GRID, text_lengths=[L], options=OPTIONS)
    expected = joint_oracle(*(x.transpose(1, 2) for x in (q, k, v)), key_mask(L)).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_both_streams_of_the_model(keep: float, generator: torch.Generator) -> None:
    model = HunyuanVideoTransformer3DModel()
    text = torch.randn(2, L, 16, generator=generator)
    calls = [(latent(generator), text, key_mask(*lengths)) for lengths in ((L, 20), (33, 1))]
    with make_sparse(model, keep=keep, block=BLOCK) as handle:
        assert handle.layers == 2
        got = [model(*call) for call in calls]
    if keep < 1:
        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            blocks[0].attn.processor.attend = joint_oracle
    torch.testing.assert_close(got, [model(*call) for call in calls], rtol=1e-4, atol=1e-5)


def test_each_mask_is_read(generator: torch.Generator) -> None:
    model = HunyuanVideoTransformer3DModel()
    x, text, mask = latent(generator), torch.randn(2, L, 16, generator=generator), key_mask(9, 9)
    with make_sparse(model, keep=1.0):
        model(x, text, mask)
        mask.copy_(key_mask(L, 1))  # the same tensor, another mask
        got = model(x, text, mask)
    torch.testing.assert_close(got, model(x, text, mask), rtol=1e-4, atol=1e-5)

    attn = model.transformer_blocks[0].attn
    alone = SparseHunyuanVideoAttnProcessor(GRID, options=SparseOptions(keep=1.0))
    tokens, rotary = torch.randn(2, S, 16, generator=generator), cos_sin(angles_of(S))
    for lengths in ((9, 9), (L, 1)):
        inputs = tokens, text, key_mask(*lengths), rotary
        torch.testing.assert_close(alone(attn, *inputs), attn(*inputs), rtol=1e-4, atol=1e-5)


def test_text_lengths() -> None:
    sizes = {"batch": 2, "tokens": S, "text_tokens": L}
    assert text_lengths_of(None, **sizes) == [L, L]
    assert text_lengths_of(key_mask(3, 0), **sizes) == [3, 0]
    with pytest.raises(ValueError, match=r"attention_mask must be bool \[2, 1, 1, 280\], got torch.float32"):
        text_lengths_of(key_mask(3, 0).float(), **sizes)
    with pytest.raises(ValueError, match=r"got torch.bool \[1, 1, 1, 280\]"):
        text_lengths_of(key_mask(3), **sizes)
    hidden_video, hole = key_mask(3, -1), key_mask(3, 3)
    hole[0, ..., S] = False
    for mask in (hidden_video, hole):
        with pytest.raises(ValueError, match="all video tokens and the first text tokens"):
            text_lengths_of(mask, **sizes)


def test_refused_calls() -> None:
    model = HunyuanVideoTransformer3DModel()
    attn, x = model.transformer_blocks[0].attn, torch.zeros(1, S, 16)
    with pytest.raises(ValueError, match="encoder_hidden_states must be the text tokens, got None"):
        SparseHunyuanVideoAttnProcessor(GRID)(attn, x)
    with pytest.raises(ValueError, match=r"hidden_states must have 5\*6\*8 = 240 tokens, got 210"):
        SparseHunyuanVideoAttnProcessor((5, 6, 8))(attn, x, x)
