"""What a job needs, before it starts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import inputs
from .host.plan import describe_job


class LongCatVideoPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoPlan",
            display_name="LongCat-Video Memory Planner",
            category=inputs.CATEGORY,
            description="Estimates the memory that a job needs, stage by stage, and says which settings fit this card."
            " Nothing is computed.",
            inputs=[
                inputs.model(),
                inputs.width(),
                inputs.height(),
                inputs.num_frames("Frames, those of an image or video condition included,"),
                inputs.num_cond_frames(),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once."),
                io.Float.Input(
                    "sparsity", default=0.0, min=0.0, max=0.99, step=0.0125,
                    tooltip="Of block sparse attention; 0 is dense.",
                ),
            ],
            outputs=[io.String.Output("report", display_name="report")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, num_frames: int, num_cond_frames: int, width: int, height: int) -> bool | str:
        return inputs.problem(num_frames=num_frames, num_cond_frames=num_cond_frames, width=width, height=height)

    @classmethod
    def execute(
        cls, model: Any, width: int, height: int, num_frames: int, num_cond_frames: int, batch_size: int,
        sparsity: float,
    ) -> io.NodeOutput:  # fmt: skip
        report = describe_job(
            model, width=width, height=height, num_frames=num_frames, num_cond_frames=num_cond_frames,
            batch_size=batch_size, sparsity=sparsity,
        )  # fmt: skip
        return io.NodeOutput(report, ui=ui.PreviewText(report))
