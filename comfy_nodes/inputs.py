"""The inputs that several nodes share, each with its tooltip, default and range in one place."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from lcv_core.errors import InputError
from lcv_core.names import Fit, Schedule
from lcv_core.shapes import SIZE_MULTIPLE, check_cond_frames, check_frames, check_size

CATEGORY = "LongCat-Video"
MAX_SEED = 0xFFFFFFFFFFFFFFFF
MAX_SIZE, MAX_FRAMES, MAX_COND_FRAMES = 4096, 4001, 1001


def model() -> io.Model.Input:
    return io.Model.Input("model", tooltip="LongCat-Video, from the LongCat-Video Loader.")


def vae() -> io.Vae.Input:
    return io.Vae.Input("vae", tooltip="The Wan 2.1 VAE, from the LongCat-Video Loader or a Load VAE node.")


def positive() -> io.Conditioning.Input:
    return io.Conditioning.Input("positive", tooltip="What to show. From LongCat-Video Text Encode.")


def negative() -> io.Conditioning.Input:
    return io.Conditioning.Input(
        "negative", optional=True,
        tooltip="What to avoid. Needed only when guidance is above 1; the distilled schedule runs without.",
    )  # fmt: skip


def width() -> io.Int.Input:
    return io.Int.Input(
        "width", default=0, min=0, max=MAX_SIZE, step=SIZE_MULTIPLE,
        tooltip="Pixels, a multiple of 16. 0: the model's own (832), or what suits the connected picture.",
    )  # fmt: skip


def height() -> io.Int.Input:
    return io.Int.Input(
        "height", default=0, min=0, max=MAX_SIZE, step=SIZE_MULTIPLE,
        tooltip="Pixels, a multiple of 16. 0: the model's own (480), or what suits the connected picture.",
    )  # fmt: skip


def num_frames(counts: str) -> io.Int.Input:
    return io.Int.Input(
        "num_frames", default=0, min=0, max=MAX_FRAMES,
        tooltip=f"{counts} 4k+1: 5, 9, ... 93. 0: the model's own (93, 6.2 seconds).",
    )  # fmt: skip


def num_cond_frames() -> io.Int.Input:
    return io.Int.Input(
        "num_cond_frames", default=0, min=0, max=MAX_COND_FRAMES,
        tooltip="Last frames of the video that the new part starts from, 4k+1. 0: the model's own (13).",
    )  # fmt: skip


def seed() -> io.Int.Input:
    return io.Int.Input(
        "seed", default=0, min=0, max=MAX_SEED, control_after_generate=True,
        tooltip="Starting noise. The same seed gives the same video, here and on the command line.",
    )  # fmt: skip


def schedule() -> io.Combo.Input:
    return io.Combo.Input(
        "schedule", options=list(get_args(Schedule)), default="base",
        tooltip="base: 50 steps with guidance. distilled: 16 steps without, with the distillation LoRA of the"
        " checkpoint switched on inside.",
    )  # fmt: skip


def num_steps() -> io.Int.Input:
    return io.Int.Input(
        "num_steps", default=0, min=0, max=1000, tooltip="0: the schedule's own number (base 50, distilled 16)."
    )


def guidance_scale() -> io.Float.Input:
    return io.Float.Input(
        "guidance_scale", default=0.0, min=0.0, max=30.0, step=0.1,
        tooltip="How strongly the prompt is followed. 0: the schedule's own (base 4, distilled 1). 1 switches guidance"
        " off and halves the time.",
    )  # fmt: skip


def fit() -> io.Combo.Input:
    return io.Combo.Input(
        "fit", options=list(get_args(Fit)), default="crop",
        tooltip="How a picture of another aspect meets the size: crop its edges, stretch it (as the official code"
        " does), or pad it with black.",
    )  # fmt: skip


def vae_tile() -> io.Int.Input:
    return io.Int.Input(
        "vae_tile", default=0, min=0, max=1024, step=64,
        tooltip="Decode and encode in tiles of this many pixels, for small cards; 0: whole frames.",
    )  # fmt: skip


def or_none(value: float) -> Any:
    """0 stands for "the schedule's own"."""
    return value or None


def problem(
    *, num_frames: Any = None, num_cond_frames: Any = None, width: Any = None, height: Any = None
) -> bool | str:
    """What `validate_inputs` returns: True, or a sentence. Values that come in over a link are None here, and are
    checked when the node runs; 0 stands for the model's own. Ranges too: ComfyUI leaves those of inputs that a node
    validates itself to the node."""
    try:
        check_range("num_frames", num_frames, MAX_FRAMES)
        check_range("num_cond_frames", num_cond_frames, MAX_COND_FRAMES)
        check_range("width", width, MAX_SIZE)
        check_range("height", height, MAX_SIZE)
        if num_frames:
            check_frames(num_frames)
        if num_cond_frames:
            check_frames(num_cond_frames, name="num_cond_frames")
            if num_frames:
                check_cond_frames(num_cond_frames, num_frames, num_cond_frames)
        check_size(height or SIZE_MULTIPLE, width or SIZE_MULTIPLE)
    except InputError as error:
        return str(error)
    return True


def check_range(name: str, value: Any, most: int) -> None:
    """InputError unless 0 <= value <= most; None passes."""
    if value is not None and not 0 <= value <= most:
        raise InputError(f"{name} must be from 0 to {most}, got {value}")
