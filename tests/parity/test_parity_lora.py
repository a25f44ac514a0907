"""A LoRA in the official key dialect against the official model's output with it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from golden_vectors import golden, relative
from torch import Tensor

from lcv_core.dit.model import LongCatDiT
from lcv_core.weights.lora import load_lora


def forward(dit: LongCatDiT, cases: dict[str, Tensor]) -> Tensor:
    return dit(cases["in.x"], cases["in.t1"], cases["in.y"], cases["in.mask"])


@pytest.mark.parametrize("mode", ["runtime", "merged"])
def test_the_adapter_on_the_model(
    dit: LongCatDiT, cases: dict[str, Tensor], mode: Literal["runtime", "merged"]
) -> None:
    before = forward(dit, cases)
    handle = load_lora(dit, golden("lora"), mode=mode)
    assert not handle.report.unmatched
    got, expected = forward(dit, cases), cases["out.e"]
    assert (got - expected).abs().max() <= 1e-4
    assert relative(got, expected) <= (1e-5 if mode == "runtime" else 1e-4)
    assert (got - before).abs().max() > 1e-2  # the adapter does something
    handle.remove()
    assert torch.equal(forward(dit, cases), before)
    assert (before - cases["out.e_off"]).abs().max() <= 1e-4


def test_half_the_strength_is_neither(dit: LongCatDiT, cases: dict[str, Tensor]) -> None:
    """alpha_scale is applied once: at strength 0.5 the output is no longer the official one."""
    with load_lora(dit, golden("lora"), 0.5):
        halved = forward(dit, cases)
    assert (halved - cases["out.e"]).abs().max() > 1e-2
    assert (halved - cases["out.e_off"]).abs().max() > 1e-2


def test_every_target_of_the_refinement_adapter_is_found(dit: LongCatDiT) -> None:
    handle = load_lora(dit, golden("lora"))
    parts = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "ffn.w1", "ffn.w2", "ffn.w3",
             "adaLN_modulation.1")  # fmt: skip
    expected = {f"blocks.{n}.{part}" for n in range(2) for part in parts}
    assert set(handle.report.matched) == expected | {"final_layer.linear", "final_layer.adaLN_modulation.1"}
