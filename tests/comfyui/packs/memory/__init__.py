"""A node pack of the old kind for the tests: sampling by ComfyUI's own guider, with its memory watched."""

from __future__ import annotations

from typing import Any

import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch


class Watched:
    """Two steps with guidance. Shows what ComfyUI asked the model for ([batch, bytes] each time) and the bytes of
    tensors that were alive at the peak."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"}
        required = {name: (kind,) for name, kind in kinds.items()}
        return {"required": required, "optional": {"cached": ("BOOLEAN", {"default": True})}}

    def run(
        self, model: Any, positive: Any, negative: Any, latent: dict[str, Any], cached: bool = True
    ) -> dict[str, Any]:
        from lcv_core.live_bytes import LiveBytes  # our pack has made it importable by now

        model = model.clone()
        model.model_options.setdefault("transformer_options", {})["lcv_cache"] = cached
        inner, asked = model.model, []
        estimate = inner.memory_required

        def watched(shape: Any, *args: Any, **kwargs: Any) -> float:
            asked.append((shape[0], estimate(shape, *args, **kwargs)))
            return asked[-1][1]

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(4.0)
        samples, sampler = latent["samples"], comfy.samplers.ksampler("euler")
        inner.memory_required = watched
        try:
            with LiveBytes() as live:
                guider.sample(
                    torch.randn_like(samples), samples, sampler, torch.tensor([1.0, 0.5, 0.0]),
                    denoise_mask=latent.get("noise_mask"), disable_pbar=True, seed=0,
                )  # fmt: skip
        finally:
            del inner.memory_required
        return {"ui": {"asked": asked, "alive": [live.peak]}}


NODE_CLASS_MAPPINGS = {"TestWatched": Watched}
