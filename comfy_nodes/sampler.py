"""The sampler with everything in it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .host.tasks import sample_latent


class LongCatVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoSampler",
            display_name="LongCat-Video Sampler",
            category=inputs.CATEGORY,
            description="Text, image or video to video, by the latent that comes in: the official schedule (with its"
            " tail for continuation), CFG-Zero guidance, condition frames computed once, and the distillation LoRA"
            " where the schedule is the distilled one.",
            inputs=[
                inputs.model(),
                inputs.positive(),
                io.Latent.Input("latent", tooltip="From LongCat-Video Latent."),
                inputs.seed(),
                inputs.schedule(),
                inputs.num_steps(),
                inputs.guidance_scale(),
                inputs.negative(),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Used in place of the schedule and its steps."),
            ],
            outputs=[io.Latent.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent: Any, seed: int, schedule: Any, num_steps: int, guidance_scale: float,
        negative: Any = None, sigmas: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(
            sample_latent(
                model, positive, negative, latent, seed=seed, schedule=schedule, num_steps=inputs.or_none(num_steps),
                guidance_scale=inputs.or_none(guidance_scale), sigmas=sigmas,
            )
        )  # fmt: skip
