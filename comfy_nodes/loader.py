"""Loading LongCat-Video and its LoRAs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import inputs
from .host import paths
from .host.loading import load_parts
from .host.lora import apply_lora, describe
from .host.native import WEIGHT_DTYPES


class LongCatVideoLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoLoader",
            display_name="LongCat-Video Loader",
            category=inputs.CATEGORY,
            description="Loads LongCat-Video as an ordinary MODEL, CLIP and VAE. Takes the official folder (in"
            " models/longcat_video), a single safetensors or GGUF file (in models/diffusion_models), or the small"
            " built-in model, which needs no download.",
            inputs=[
                io.Combo.Input(
                    "checkpoint", options=paths.checkpoints(), default=paths.MINIATURE,
                    tooltip="Folders ending in / are official checkpoints in models/longcat_video, the others files in"
                    " models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=list(WEIGHT_DTYPES), default="default",
                    tooltip="How the weights are kept. default: as ComfyUI judges best, quantised files as they are."
                    " fp8, int8 and q8_0 halve the memory of bf16, q5_k and q4_k take a third; sensitive layers stay as"
                    " they are.",
                ),
                io.Combo.Input(
                    "vae", options=paths.vaes(), default=paths.AUTO,
                    tooltip="auto: the checkpoint's own, else a Wan 2.1 VAE in models/vae.",
                ),
                io.Combo.Input(
                    "text_encoder", options=paths.text_encoders(), default=paths.AUTO,
                    tooltip="auto: the checkpoint's own, else a umT5-XXL file in models/text_encoders. none: connect"
                    " another node's CLIP instead.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, vae: str, text_encoder: str, **_: Any) -> Any:
        return paths.stamp_model(checkpoint, vae, text_encoder)

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str, vae: str, text_encoder: str) -> io.NodeOutput:
        return io.NodeOutput(*load_parts(checkpoint, weight_dtype, vae, text_encoder))


class LongCatVideoLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoLoraLoader",
            display_name="LongCat-Video LoRA Loader",
            category=inputs.CATEGORY,
            description="Adds a LoRA of any dialect: official files, ComfyUI, diffusers, PEFT, kohya, Wan-style names."
            " A file that fits nothing is an error, a partial fit is listed.",
            inputs=[
                inputs.model(),
                io.Combo.Input("lora_name", options=paths.loras(), tooltip="A file in models/loras."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip="1 is as trained."),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> Any:
        return paths.stamp(lora_name)

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        patched, report = apply_lora(model, paths.find_lora(lora_name), strength)
        text = describe(report)
        return io.NodeOutput(patched, text, ui=ui.PreviewText(text))
