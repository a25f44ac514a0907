"""Whole runs against the official pipelines: latents within 1e-4 in fp32, every random tensor given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from golden_vectors import golden
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.pipelines import Components, continue_video, image_to_video, refine_video, text_to_video
from lcv_core.refinement import padded_frames, plan_refine
from lcv_core.text.encoder import TextStates
from lcv_core.vae.model import WanVAE

END_TO_END = 1e-4
BSA = BSAConfig(sparsity=0.5)


@pytest.fixture
def c(dit: LongCatDiT, vae: WanVAE) -> Components:
    return Components(dit=dit, vae=vae)


@pytest.fixture
def g() -> dict[str, Tensor]:
    return golden("pipelines")


def texts(g: dict[str, Tensor]) -> dict[str, TextStates]:
    return {
        "text": TextStates(g["in.pos"], g["in.pos_mask"]),
        "negative_text": TextStates(g["in.neg"], g["in.neg_mask"]),
    }


def t2v(c: Components, g: dict[str, Tensor], **changes: Any) -> Tensor:
    options = {"height": 32, "width": 48, "num_frames": 9, "num_steps": 5, "noise": g["t2v.in.noise"]} | changes
    return text_to_video(c, **texts(g), **options)


def i2v(c: Components, g: dict[str, Tensor], **changes: Any) -> Tensor:
    options = {"num_frames": 9, "num_steps": 5, "noise": g["i2v.in.noise"], "height": 32, "width": 48,
               "cfg_scope": "all", "output": "latents"} | changes  # fmt: skip
    return image_to_video(c, **texts(g), image=g["i2v.in.image"], **options)


def vc(c: Components, g: dict[str, Tensor], **changes: Any) -> Tensor:
    options = {"num_frames": 21, "num_cond_frames": 13, "num_steps": 10, "noise": g["vc.in.noise"], "height": 32,
               "width": 48, "output": "latents"} | changes  # fmt: skip
    return continue_video(c, **texts(g), frames=g["vc.in.video"], **options)


def refine(c: Components, g: dict[str, Tensor], case: str, frames: int = 9, **changes: Any) -> Tensor:
    return refine_video(
        c, text=texts(g)["text"], frames=g["vc.in.video"][:frames], size=(64, 128), output="latents",
        noise=g[f"{case}.in.noise"], **changes,
    )  # fmt: skip


CASES: dict[str, Callable[[Components, dict[str, Tensor]], Tensor]] = {
    "t2v": partial(t2v, output="latents"),
    "t2v_distill": partial(t2v, output="latents", schedule="distilled", num_steps=4, guidance_scale=1.0),
    "i2v": i2v,
    "vc_cache": vc,
    "vc_nocache": partial(vc, use_kv_cache=False, cfg_scope="all"),
    "vc_cache_cfg1": partial(vc, guidance_scale=1.0),
    "vc_distill": partial(vc, schedule="distilled", num_steps=4),
    "refine_t2v_bsa": partial(refine, case="refine_t2v_bsa", bsa=BSA),
    "refine_t2v_dense": partial(refine, case="refine_t2v_dense"),
    "refine_spatial_dense": partial(refine, case="refine_spatial_dense", spatial_only=True),
    "refine_i2v_bsa": lambda c, g: refine(c, g, "refine_i2v_bsa", image=g["refine_i2v.in.image"], bsa=BSA),
    "refine_vc_bsa": lambda c, g: refine(
        c, g, "refine_vc_bsa", 17, video=g["refine_vc.in.video"], num_cond_frames=10, bsa=BSA
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_latents(c: Components, g: dict[str, Tensor], case: str) -> None:
    got, expected = CASES[case](c, g), g[f"{case}.out.latents"]
    assert (got - expected).abs().max() <= END_TO_END


def test_video(c: Components, g: dict[str, Tensor]) -> None:
    assert (t2v(c, g) - g["t2v.out.video"]).abs().max() <= END_TO_END


@pytest.mark.parametrize("case", ["t2v", "i2v", "vc_cache", "vc_nocache"])
def test_batched_guidance_is_the_same(c: Components, g: dict[str, Tensor], case: str) -> None:
    batched = {
        "t2v": partial(t2v, output="latents"), "i2v": i2v, "vc_cache": vc,
        "vc_nocache": partial(vc, use_kv_cache=False, cfg_scope="all"),
    }[case](c, g, cfg_mode="batched")  # fmt: skip
    assert (batched - g[f"{case}.out.latents"]).abs().max() <= END_TO_END


@pytest.mark.parametrize(("case", "frames", "cond"), [("refine_t2v_dense", 9, 0), ("refine_vc_bsa", 17, 10)])
def test_upsampled_clip(g: dict[str, Tensor], case: str, frames: int, cond: int) -> None:
    expected = g[f"{case}.mid.upsampled"].float()
    plan = plan_refine(frames, cond)
    got = torch.stack(list(padded_frames(g["vc.in.video"][:frames], (64, 128), plan)), dim=1).unsqueeze(0)
    assert (got - expected[:, :, : got.shape[2]]).abs().max() <= 1e-3  # the vector is stored in fp16
    assert expected.shape[2] - got.shape[2] == (0 if cond else 3)  # frames that the encoder drops
