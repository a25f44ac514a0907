"""A node pack of the old kind, beside ours in the tests: one node that takes time, reports it and shows pictures."""

from __future__ import annotations

import time
from typing import Any

import comfy.utils  # pyright: ignore[reportMissingImports]
from PIL import Image


class Steps:
    CATEGORY = "tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = ("INT", {"default": 3, "min": 1, "max": 1000})
        return {"required": {"latent": ("LATENT",), "steps": steps, "seconds": ("FLOAT", {"default": 0.0})}}

    def run(self, latent: dict[str, Any], steps: int, seconds: float) -> tuple[dict[str, Any]]:
        if steps == 13:
            raise ValueError("steps must not be 13; try 12")
        progress = comfy.utils.ProgressBar(steps)
        for i in range(steps):
            time.sleep(seconds / steps)
            progress.update_absolute(i + 1, steps, ("JPEG", Image.new("RGB", (32, 32)), 32))
        return (latent,)


NODE_CLASS_MAPPINGS = {"TestSteps": Steps}
