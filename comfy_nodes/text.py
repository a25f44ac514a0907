"""Prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .host.text import encode_prompt


class LongCatVideoTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoTextEncode",
            display_name="LongCat-Video Text Encode",
            category=inputs.CATEGORY,
            description="Encodes a prompt exactly as the model was trained: cleaned, at most 512 tokens, with the exact"
            " mask and without prompt weighting.",
            inputs=[
                io.Clip.Input("clip", tooltip="From the LongCat-Video Loader, or a CLIPLoader of type wan."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True,
                    tooltip="English or Chinese. Describe subject, motion, scene, camera and style; 80 to 200 words"
                    " work best.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        return io.NodeOutput(encode_prompt(clip, text))
