"""The real diffusers models, tiny and random, where diffusers is installed (it is no dependency of the tests)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lcv_bsa.adapters.diffusers import make_sparse

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install diffusers to run these")

HIDDEN = {"hidden_states": (2, 4, 6, 16, 20), "encoder_hidden_states": (2, 9, 16)}
TOKENS = 6 * 8 * 10
SMALL = {"num_attention_heads": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}


def wan() -> tuple[Any, dict[str, Any]]:
    config = dict(SMALL, attention_head_dim=24, text_dim=16, freq_dim=16, ffn_dim=32)
    return diffusers.WanTransformer3DModel(**config), {}


def wan_vace() -> tuple[Any, dict[str, Any]]:
    config = dict(SMALL, attention_head_dim=24, text_dim=16, freq_dim=16, ffn_dim=32, vace_layers=[0, 1])
    model = diffusers.WanVACETransformer3DModel(**config, vace_in_channels=6)
    return model, {"control_hidden_states": torch.randn(2, 6, 6, 16, 20)}


def ltx() -> tuple[Any, dict[str, Any]]:
    model = diffusers.LTXVideoTransformer3DModel(
        **SMALL, attention_head_dim=16, cross_attention_dim=32, caption_channels=16
    )
    grid = {"num_frames": 6, "height": 8, "width": 10}
    return model, {"hidden_states": torch.randn(2, TOKENS, 4), "encoder_attention_mask": torch.ones(2, 9), **grid}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    widths = {"attention_head_dim": 16, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)}
    model = diffusers.HunyuanVideoTransformer3DModel(
        **{**SMALL, "num_layers": 1}, num_single_layers=1, num_refiner_layers=1, guidance_embeds=False, **widths
    )
    mask = (torch.arange(9) < torch.tensor([[5], [7]])).float()
    return model, {"encoder_attention_mask": mask, "pooled_projections": torch.randn(2, 8)}


def run(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    o = model(**inputs).sample
    used = [p for p in model.parameters() if p.ndim > 1]
    grads = torch.autograd.grad(o.square().mean(), used, allow_unused=True)
    return o, [g for g in grads if g is not None]


def processors(model: Any) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


@pytest.mark.parametrize("build", [wan, wan_vace, ltx, hunyuan_video])
def test_real_model(build: Any) -> None:
    torch.manual_seed(0)
    model, own = build()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    inputs = {name: torch.randn(shape) for name, shape in HIDDEN.items()}
    inputs = {**inputs, "timestep": torch.tensor([500, 400]), **own}
    before = processors(model)
    dense, dense_grads = run(model, inputs)
    with make_sparse(model, keep=1.0):
        full, full_grads = run(model, inputs)
    torch.testing.assert_close(full, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full_grads, dense_grads, rtol=1e-3, atol=1e-6)
    with make_sparse(model, keep=0.25):
        sparse, sparse_grads = run(model, inputs)
        model.enable_gradient_checkpointing()
        _, recomputed = run(model, inputs)
        model.disable_gradient_checkpointing()
    assert (sparse - dense).abs().max() > 1e-2
    assert all(torch.equal(a, b) for a, b in zip(sparse_grads, recomputed, strict=True))
    assert all(a is b for a, b in zip(processors(model), before, strict=True))
    assert torch.equal(model(**inputs).sample, dense)
