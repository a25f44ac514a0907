"""Making a video longer."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .host.tasks import continue_clip


class LongCatVideoContinue(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoContinue",
            display_name="LongCat-Video Continue",
            category=inputs.CATEGORY,
            description="Goes on from the last frames of a video. Connect the video, or the latent it was decoded from"
            " (no loss by decoding and encoding again), or both: then the latent is continued and the video comes first"
            " in the result.",
            inputs=[
                inputs.model(),
                inputs.vae(),
                inputs.positive(),
                inputs.num_frames("Frames of the new segment, its condition frames included,"),
                inputs.num_cond_frames(),
                inputs.width(),
                inputs.height(),
                inputs.seed(),
                inputs.schedule(),
                inputs.num_steps(),
                inputs.guidance_scale(),
                inputs.fit(),
                inputs.vae_tile(),
                inputs.negative(),
                io.Image.Input("video", optional=True, tooltip="Frames at the model's rate, 15 fps."),
                io.Latent.Input("latent", optional=True, tooltip="The latent of the video, from a LongCat-Video node."),
            ],
            outputs=[
                io.Image.Output("video_out", display_name="video", tooltip="The video and what was added to it."),
                io.Image.Output("new", display_name="new frames", tooltip="What was added, alone."),
                io.Latent.Output("latent_out", display_name="latent", tooltip="The new segment, condition included."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, num_frames: int, num_cond_frames: int, width: int, height: int) -> bool | str:
        return inputs.problem(num_frames=num_frames, num_cond_frames=num_cond_frames, width=width, height=height)

    @classmethod
    def execute(
        cls, model: Any, vae: Any, positive: Any, num_frames: int, num_cond_frames: int, width: int, height: int,
        seed: int, schedule: Any, num_steps: int, guidance_scale: float, fit: Any, vae_tile: int, negative: Any = None,
        video: Any = None, latent: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        made = continue_clip(
            model, vae, positive, negative, video=video, latent=latent, num_frames=num_frames,
            num_cond_frames=num_cond_frames, width=width or None, height=height or None, schedule=schedule,
            num_steps=inputs.or_none(num_steps), guidance_scale=inputs.or_none(guidance_scale), seed=seed, fit=fit,
            tile=vae_tile,
        )  # fmt: skip
        return io.NodeOutput(made.frames, made.new, made.latent)
