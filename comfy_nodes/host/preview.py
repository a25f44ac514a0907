"""What a node shows while it runs."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.video_io import write_video

from . import paths

log = logging.getLogger("lcv_core")

_SUBFOLDER = "longcat_video"


def show_segment(node_id: str | None, index: int, frames: Tensor, frame_rate: float) -> None:
    """Show a finished segment [F, H, W, 3] in [0, 1] on its node, while the next one is made.

    A preview that cannot be written or sent is told in the log; the work goes on.
    """
    if node_id is None:
        return
    name = f"{node_id.replace(':', '_').replace('/', '_')}_{index:04d}.mp4"
    folder = Path(folder_paths.get_temp_directory()) / _SUBFOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, (frames.clamp(0, 1) * 255).to(torch.uint8), frame_rate=frame_rate)
    except (InputError, OSError) as error:
        log.warning("no preview of segment %d: %s", index + 1, error)
        return
    _send(node_id, {"images": [{"filename": name, "subfolder": _SUBFOLDER, "type": "temp"}], "animated": (True,)})


def _send(node_id: str, output: dict[str, object]) -> None:
    from server import PromptServer  # ComfyUI's; absent where its nodes run without a server

    server = getattr(PromptServer, "instance", None)
    if server is None or server.client_id is None:
        return
    message = {
        "node": node_id,
        "display_node": node_id,
        "output": output,
        "prompt_id": getattr(server, "last_prompt_id", None),
    }
    server.send_sync("executed", message, server.client_id)


def graph_key(prompt: dict[str, dict[str, object]] | None, node_id: str | None, *tensors: Tensor | None) -> str:
    """Identifies a node's job by all that feeds it: the same graph, files and pictures give the same key."""
    from hashlib import sha256

    from lcv_core.partial import fingerprint

    pictures = [None if t is None else sha256(t.contiguous().cpu().numpy().tobytes()).hexdigest() for t in tensors]
    return fingerprint({"graph": _upstream(prompt or {}, node_id or ""), "pictures": pictures})


def _upstream(prompt: dict[str, dict[str, object]], node_id: str) -> object:
    """A node's type and inputs, links replaced by what they lead to."""
    node = prompt.get(node_id)
    if node is None:
        return node_id
    inputs = node.get("inputs", {})
    assert isinstance(inputs, dict)
    resolved = {
        name: [_upstream(prompt, str(value[0])), value[1]] if _is_link(value, prompt) else [value, paths.stamp(value)]
        for name, value in inputs.items()
    }
    # What fingerprint_inputs of the node gave, ours and every other's: the files that it chose by itself count too.
    return {"type": node.get("class_type"), "inputs": resolved, "files": node.get("is_changed")}


def _is_link(value: object, prompt: dict[str, dict[str, object]]) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt
