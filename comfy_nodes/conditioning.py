"""Start latents: empty, or begun with an image's or a video's frames."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .host.latents import start_latent

_UNCONNECTED = object()  # what comes in over a link is None when inputs are validated


class LongCatVideoLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoLatent",
            display_name="LongCat-Video Latent",
            category=inputs.CATEGORY,
            description="The latent to sample: empty for text to video, begun with an image for image to video, begun"
            " with the last frames of a video for continuation. Works with every sampler, stock ones included.",
            inputs=[
                inputs.model(),
                inputs.vae(),
                inputs.width(),
                inputs.height(),
                inputs.num_frames("Frames, the image's or video's included,"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once."),
                inputs.fit(),
                inputs.num_cond_frames(),
                io.Image.Input("image", optional=True, tooltip="The first frame of the video."),
                io.Image.Input(
                    "video", optional=True, tooltip="Frames at the model's rate (15 fps); the last num_cond_frames of"
                    " them begin the new video.",
                ),
            ],
            outputs=[
                io.Latent.Output(),
                io.Int.Output("width_out", display_name="width"),
                io.Int.Output("height_out", display_name="height"),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, num_frames: int, width: int, height: int, num_cond_frames: int, video: Any = _UNCONNECTED
    ) -> bool | str:
        used = None if video is _UNCONNECTED else num_cond_frames
        return inputs.problem(num_frames=num_frames, width=width, height=height, num_cond_frames=used)

    @classmethod
    def execute(
        cls, model: Any, vae: Any, width: int, height: int, num_frames: int, batch_size: int, fit: Any,
        num_cond_frames: int, image: Any = None, video: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(
            *start_latent(
                model, vae, height=height, width=width, num_frames=num_frames, batch_size=batch_size, fit=fit,
                num_cond_frames=num_cond_frames, image=image, video=video,
            )
        )  # fmt: skip
