"""The three parts of a checkpoint, as the loader node gives them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths

from lcv_core.errors import CheckpointError
from lcv_core.weights.checkpoint import Checkpoint

from . import native, paths, text, vae

log = logging.getLogger("lcv_core")

_HELP = {
    "vae": "put wan_2.1_vae.safetensors into models/vae (it is in Comfy-Org/Wan_2.1_ComfyUI_repackaged on the Hub), or"
    " the vae folder of meituan-longcat/LongCat-Video beside the dit folder",
    "text_encoder": "put umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors into models/text_encoders"
    " (both are in Comfy-Org/Wan_2.1_ComfyUI_repackaged on the Hub), or the text_encoder and tokenizer folders of"
    " meituan-longcat/LongCat-Video beside the dit folder",
}


def load_parts(name: str, weight_dtype: str, vae_name: str, text_name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP (None for "none") and VAE (None for "none"). What is missing is said before anything is loaded."""
    checkpoint = _with_known_adapters(paths.open_model(name, vae_name, text_name))
    wanted = {"vae": vae_name != paths.NONE, "text_encoder": text_name != paths.NONE}
    for part, help_text in _HELP.items():
        if wanted[part] and getattr(checkpoint, part) is None:
            raise CheckpointError(f"no {part.replace('_', ' ')} was found for {name}: {help_text}; or choose none")
    loaded_vae = vae.load_vae(checkpoint) if wanted["vae"] else None
    config = None if loaded_vae is None else vae.vae_config(loaded_vae)
    model = native.load_model(checkpoint, weight_dtype=weight_dtype, vae=config)
    return model, _clip(checkpoint) if wanted["text_encoder"] else None, loaded_vae


def _clip(checkpoint: Checkpoint) -> Any:
    """A folder through our reader, a single file through ComfyUI's own, which knows its quantised forms."""
    path = checkpoint.require("text_encoder")
    if path.is_dir() or checkpoint.tokenizer is not None:
        return text.load_clip(checkpoint)
    try:
        return comfy.sd.load_clip(
            [str(path)],
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=comfy.sd.CLIPType.WAN,
        )
    except Exception as error:  # whatever a file of another kind makes ComfyUI do
        raise CheckpointError(
            f"{path.name} cannot be loaded as the umT5-XXL text encoder ({error}); ComfyUI needs a file with the"
            " tokenizer inside, such as umt5_xxl_fp16.safetensors"
        ) from error


def _with_known_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """The adapters that lie in models/loras rather than beside the checkpoint."""
    found: dict[str, Path] = dict(checkpoint.adapters)
    for kind in ("distill", "refinement"):
        path = None if kind in found else paths.known_adapter(kind)
        if path is not None:
            found[kind] = path
    return dataclasses.replace(checkpoint, adapters=found)
