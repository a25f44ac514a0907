"""Long and interactive video."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from lcv_core.errors import InputError
from lcv_core.names import DEFAULT_HANDOVER, Handover
from lcv_core.text.prompt import DEFAULT_NEGATIVE_PROMPT

from . import inputs
from .host.preview import graph_key
from .host.tasks import make_long, split_prompts

_MAX_SEGMENTS = 1000


class LongCatVideoLong(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoLong",
            display_name="LongCat-Video Long / Interactive Video",
            category=inputs.CATEGORY,
            description="A video of several segments, each going on from the one before: a prompt per segment, or one"
            " prompt for all. Each segment is shown when it is finished. Interrupted jobs go on where they stopped when"
            " the same graph is queued again.",
            inputs=[
                inputs.model(),
                inputs.vae(),
                io.Clip.Input("clip", tooltip="From the LongCat-Video Loader, or a CLIPLoader of type wan."),
                io.String.Input(
                    "prompts", multiline=True, default="", tooltip="One prompt per line, one line per segment."
                ),
                io.String.Input(
                    "negative_prompt", multiline=True, default=DEFAULT_NEGATIVE_PROMPT,
                    tooltip="What to avoid; used when guidance is above 1.",
                ),
                io.Int.Input(
                    "num_segments", default=0, min=0, max=_MAX_SEGMENTS,
                    tooltip="0: one per prompt. Above that there must be one prompt, which all segments share.",
                ),
                inputs.width(),
                inputs.height(),
                inputs.num_frames("Frames of a segment, condition frames included,"),
                inputs.num_cond_frames(),
                io.Float.Input(
                    "frame_rate", default=15.0, min=1.0, max=120.0, step=0.01,
                    tooltip="Frames per second, for the previews and the timeline; the model makes 15.",
                ),
                inputs.seed(),
                inputs.schedule(),
                inputs.num_steps(),
                inputs.guidance_scale(),
                io.Combo.Input(
                    "handover", options=list(get_args(Handover)), default=DEFAULT_HANDOVER,
                    tooltip="What a segment sees of the one before. latents: the latents themselves, which keeps"
                    " objects and motion best. frames: decoded frames, encoded again; for a VAE other than the"
                    " Loader's. official: the same through 8-bit frames.",
                ),
                inputs.fit(),
                inputs.vae_tile(),
                io.Image.Input("image", optional=True, tooltip="Start from this picture."),
                io.Image.Input("video", optional=True, tooltip="Go on from this video; it is not in the result."),
            ],
            outputs=[io.Image.Output("frames", display_name="frames"), io.Float.Output("fps", display_name="fps")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, prompts: str, num_segments: int, num_frames: int, num_cond_frames: int, width: int, height: int
    ) -> bool | str:
        if isinstance(prompts, str):
            try:
                inputs.check_range("num_segments", num_segments, _MAX_SEGMENTS)
                lines = split_prompts(prompts)
            except InputError as error:
                return str(error)
            if isinstance(num_segments, int) and num_segments and len(lines) not in (1, num_segments):
                return f"num_segments is {num_segments} but there are {len(lines)} prompts; set it to 0 or write one"
        return inputs.problem(num_frames=num_frames, num_cond_frames=num_cond_frames, width=width, height=height)

    @classmethod
    def execute(
        cls, model: Any, vae: Any, clip: Any, prompts: str, negative_prompt: str, num_segments: int, width: int,
        height: int, num_frames: int, num_cond_frames: int, frame_rate: float, seed: int, schedule: Any,
        num_steps: int, guidance_scale: float, handover: Any, fit: Any, vae_tile: int, image: Any = None,
        video: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        node_id = cls.hidden.unique_id
        frames = make_long(
            model, vae, clip, prompts=prompts, negative_prompt=negative_prompt, num_segments=num_segments, image=image,
            video=video, width=width or None, height=height or None, num_frames=num_frames,
            num_cond_frames=num_cond_frames, frame_rate=frame_rate, schedule=schedule,
            num_steps=inputs.or_none(num_steps),
            guidance_scale=inputs.or_none(guidance_scale), handover=handover, seed=seed, fit=fit, tile=vae_tile,
            job_key=graph_key(cls.hidden.prompt, node_id, image, video), node_id=node_id,
        )  # fmt: skip
        return io.NodeOutput(frames, frame_rate)
