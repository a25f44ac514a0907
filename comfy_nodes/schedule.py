"""Sigmas and guidance for SamplerCustomAdvanced and its kin."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .host.sampling import make_guider
from .host.schedule import SCHEDULES, sigmas_of


class LongCatVideoScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoScheduler",
            display_name="LongCat-Video Scheduler",
            category=inputs.CATEGORY,
            description="The official noise schedules, with the model's shift (12, or what ModelSamplingSD3 sets).",
            inputs=[
                inputs.model(),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default="base",
                    tooltip="base: text and image to video. base with tail: continuation, ends in ten equal steps."
                    " distilled: with the distillation LoRA and guidance 1. refine: starts at t_thresh.",
                ),
                inputs.num_steps(),
                io.Float.Input(
                    "t_thresh", default=0.5, min=0.01, max=1.0, step=0.01,
                    tooltip="Noise level that refine starts from; unused by the others.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, schedule: str, num_steps: int, t_thresh: float) -> io.NodeOutput:
        return io.NodeOutput(sigmas_of(model, schedule, num_steps or None, t_thresh))


class LongCatVideoGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoGuider",
            display_name="LongCat-Video Guider (CFG-Zero)",
            category=inputs.CATEGORY,
            description="Guidance as LongCat-Video was released with: CFG-Zero* on velocities, over the new frames. The"
            " stock CFGGuider and the CFGZeroStar node compute something else.",
            inputs=[
                inputs.model(),
                inputs.positive(),
                inputs.negative(),
                io.Float.Input(
                    "guidance_scale", default=4.0, min=1.0, max=30.0, step=0.1,
                    tooltip="How strongly the prompt is followed; 1 switches guidance off and halves the time.",
                ),
            ],
            outputs=[io.Guider.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, positive: Any, guidance_scale: float, negative: Any = None) -> io.NodeOutput:
        return io.NodeOutput(make_guider(model, positive, negative, guidance_scale))
