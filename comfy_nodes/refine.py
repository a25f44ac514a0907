"""Refinement: 480p at 15 fps to 720p at 30 fps."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from lcv_core.errors import InputError

from . import inputs
from .host import paths
from .host.preview import graph_key
from .host.tasks import refine_clip

_MODES = ("space and time", "space only")


class LongCatVideoRefine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoRefine",
            display_name="LongCat-Video Refine",
            category=inputs.CATEGORY,
            description="Twice the resolution and twice the frame rate: upsamples, pads, and runs the refinement expert"
            " in windows. Its LoRA and block sparse attention are switched on inside and off after.",
            inputs=[
                inputs.model(),
                inputs.vae(),
                inputs.positive(),
                io.Image.Input("frames", tooltip="The video to refine, at the model's rate (15 fps)."),
                inputs.seed(),
                io.Combo.Input(
                    "mode", options=list(_MODES), default=_MODES[0],
                    tooltip="space and time doubles the frame rate too.",
                ),
                io.Int.Input("refine_steps", default=0, min=0, max=50, tooltip="0: the five of the released schedule."),
                io.Float.Input(
                    "t_thresh", default=0.5, min=0.01, max=1.0, step=0.01,
                    tooltip="How much noise the upsampled video is mixed with: more changes more. 0.5 is as trained.",
                ),
                io.Float.Input(
                    "sparsity", default=-1.0, min=-1.0, max=0.99, step=0.0125,
                    tooltip="Part of the attention blocks left out. -1: as the model was trained, 0.9375 for the"
                    " released one. 0 is dense.",
                ),
                io.Combo.Input(
                    "refine_lora", options=[paths.AUTO, paths.NONE, *paths.loras()], default=paths.AUTO,
                    tooltip="auto: refinement_lora of the checkpoint or of models/loras. none: it is in the model.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=4096, step=16, tooltip="0: the 720p bucket of the video's aspect."
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=4096, step=16, tooltip="0: the 720p bucket of the video's aspect."
                ),
                io.Int.Input(
                    "window", default=0, min=0, max=4001,
                    tooltip="Source frames refined at once; longer videos go in windows. Fewer need less memory. 0: the"
                    " model's own (93).",
                ),
                io.Int.Input(
                    "overlap", default=0, min=0, max=1001,
                    tooltip="Source frames that two windows share. 0: the model's own (13).",
                ),
                inputs.fit(),
                inputs.vae_tile(),
                io.Image.Input(
                    "image", optional=True, tooltip="The first frame in high resolution, kept as it is."
                ),
                io.Image.Input(
                    "video", optional=True,
                    tooltip="High-resolution frames that the refined video goes on from (continuation).",
                ),
            ],
            outputs=[io.Image.Output("refined", display_name="frames"), io.Float.Output("fps", display_name="fps")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, refine_lora: str, **_: Any) -> Any:
        return paths.stamp(refine_lora)  # the loader knows of those that "auto" takes

    @classmethod
    def execute(
        cls, model: Any, vae: Any, positive: Any, frames: Any, seed: int, mode: str, refine_steps: int,
        t_thresh: float, sparsity: float, refine_lora: str, width: int, height: int, window: int, overlap: int,
        fit: Any, vae_tile: int, image: Any = None, video: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        if mode not in _MODES:
            raise InputError(f"unknown mode {mode!r}; there are: {', '.join(_MODES)}")
        spatial_only = mode == _MODES[1]
        rate = 15.0 if spatial_only else 30.0
        node_id = cls.hidden.unique_id
        refined = refine_clip(
            model, vae, positive, frames=frames, image=image, video=video, lora=refine_lora, sparsity=sparsity,
            refine_steps=refine_steps or None, t_thresh=t_thresh, spatial_only=spatial_only,
            width=width or None, height=height or None, window=window, overlap=overlap, seed=seed, fit=fit,
            tile=vae_tile, job_key=graph_key(cls.hidden.prompt, node_id, frames, image, video),
            node_id=node_id, frame_rate=rate,
        )  # fmt: skip
        return io.NodeOutput(refined, rate)
