"""Block sparse attention as a model patch, and a measurement of it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import inputs
from .host.sparse import BLOCKS, compare, sparse_model


def _sparsity() -> io.Float.Input:
    return io.Float.Input(
        "sparsity", default=0.875, min=0.0, max=0.99, step=0.0125, display_mode=io.NumberDisplay.slider,
        tooltip="Part of the attention blocks left out: 0.875 keeps one in eight. LongCat's refiner was trained at"
        " 0.9375; models that were not trained with it want less. 0 is dense.",
    )  # fmt: skip


def _block() -> io.Combo.Input:
    return io.Combo.Input(
        "block", options=list(BLOCKS), default=next(iter(BLOCKS)),
        tooltip="Tokens (time x height x width) that are kept or left out together. Larger is faster, smaller follows"
        " detail better.",
    )  # fmt: skip


def _min_tokens() -> io.Int.Input:
    return io.Int.Input(
        "min_tokens", default=4096, min=0, max=1_000_000,
        tooltip="Other models: shorter sequences stay dense. Unused by LongCat-Video.",
    )  # fmt: skip


class LongCatVideoSparseAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoSparseAttention",
            display_name="Block Sparse Attention",
            category=inputs.CATEGORY,
            description="Makes a video model's self-attention block sparse: faster, at some cost in detail. Works with"
            " LongCat-Video, Wan and other models whose token grid is known. On NVIDIA cards it needs Triton"
            " (pip install triton, on Windows triton-windows); without it a slower PyTorch version runs.",
            inputs=[
                io.Model.Input("model", tooltip="LongCat-Video, Wan, or another video model."),
                _sparsity(),
                _block(),
                _min_tokens(),
                io.Boolean.Input(
                    "eight_bits", default=False, optional=True,
                    tooltip="Multiply in int8 and fp8: a third faster on Hopper GPUs and newer, with little noise.",
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, sparsity: float, block: str, min_tokens: int, eight_bits: bool = False
    ) -> io.NodeOutput:
        return io.NodeOutput(sparse_model(model, sparsity, block, min_tokens, eight_bits))


class LongCatVideoSparseReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoSparseReport",
            display_name="Block Sparse Attention: Measure",
            category=inputs.CATEGORY,
            description="Samples dense and sparse with the same seed, and says how much faster it is and how far the"
            " result is from the dense one (PSNR: above 30 dB is hard to see).",
            inputs=[
                io.Model.Input("model", tooltip="The model without block sparse attention."),
                inputs.positive(),
                io.Latent.Input("latent"),
                _sparsity(),
                _block(),
                _min_tokens(),
                io.Int.Input("num_steps", default=8, min=1, max=200, tooltip="Steps of each of the two runs."),
                io.Float.Input("guidance_scale", default=1.0, min=1.0, max=30.0, step=0.1, tooltip="Of both runs."),
                inputs.seed(),
                inputs.negative(),
                io.Vae.Input("vae", optional=True, tooltip="Connected: PSNR of frames. Otherwise of latents."),
            ],
            outputs=[
                io.String.Output("report", display_name="report"),
                io.Latent.Output("dense", display_name="dense"),
                io.Latent.Output("sparse", display_name="sparse"),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent: Any, sparsity: float, block: str, min_tokens: int, num_steps: int,
        guidance_scale: float, seed: int, negative: Any = None, vae: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        made = compare(
            model, positive, negative, latent, vae=vae, sparsity=sparsity, block=block, min_tokens=min_tokens,
            num_steps=num_steps, guidance_scale=guidance_scale, seed=seed,
        )  # fmt: skip
        return io.NodeOutput(str(made), made.dense, made.sparse, ui=ui.PreviewText(str(made)))
