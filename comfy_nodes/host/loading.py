"""The three parts of a checkpoint, as the loader node gives them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths

from lcv_core.errors import CheckpointError
from lcv_core.weights.checkpoint import Checkpoint
from lcv_core.weights.recognise import kind_of, title
from lcv_core.weights.tensors import TensorSource

from . import native, paths, text, vae

log = logging.getLogger("lcv_core")

_XXL = (256384, 4096)  # tokens and channels of umT5-XXL
_HELP = {
    "vae": "put wan_2.1_vae.safetensors into models/vae (it is in Comfy-Org/Wan_2.1_ComfyUI_repackaged on the Hub), or"
    " the vae folder of meituan-longcat/LongCat-Video beside the dit folder",
    "text_encoder": "put umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors into models/text_encoders"
    " (both are in Comfy-Org/Wan_2.1_ComfyUI_repackaged on the Hub), or the text_encoder and tokenizer folders of"
    " meituan-longcat/LongCat-Video beside the dit folder",
}


def load_parts(name: str, weight_dtype: str, vae_name: str, text_name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP (None for "none") and VAE (None for "none"). What is missing is said before anything is loaded."""
    checkpoint = paths.open_model(name, vae_name, text_name)
    wanted = {"vae": vae_name != paths.NONE, "text_encoder": text_name != paths.NONE}
    for part, help_text in _HELP.items():
        if wanted[part] and getattr(checkpoint, part) is None:
            raise CheckpointError(f"no {paths.TITLES[part]} was found for {name}: {help_text}; or choose none")
    loaded_vae = vae.load_vae(checkpoint) if wanted["vae"] else None
    config = None if loaded_vae is None else vae.vae_config(loaded_vae)
    model = native.load_model(checkpoint, weight_dtype=weight_dtype, vae=config)
    return model, _clip(checkpoint) if wanted["text_encoder"] else None, loaded_vae


def _clip(checkpoint: Checkpoint) -> Any:
    """A folder through our reader, a single file through ComfyUI's own, which knows its quantised forms."""
    path = checkpoint.require("text_encoder")
    if path.is_dir() or checkpoint.tokenizer is not None:
        return text.load_clip(checkpoint)
    _check_xxl(path)
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


def _check_xxl(path: Path) -> None:
    """CheckpointError unless a file's header is umT5-XXL's: ComfyUI would find out after gigabytes, or never."""
    source = TensorSource.open(path)
    embedding = source.shape("shared.weight") if "shared.weight" in source else ()
    if kind_of(source) != "text_encoder":
        raise CheckpointError(f"{path.name} is not the umT5 text encoder: it looks like {title(source)}")
    if embedding != _XXL:
        raise CheckpointError(
            f"{path.name} is not umT5-XXL: its embedding is {list(embedding) or 'absent'}, not {list(_XXL)}; choose"
            " umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors"
        )
