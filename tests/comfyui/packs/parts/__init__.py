"""A node pack of the old kind, beside ours in the tests: stand-ins for what is too large, and a look inside."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch
from aiohttp import web
from server import PromptServer  # pyright: ignore[reportMissingImports]

LENGTH = 512  # of umT5's states, with their padding


class Clip:
    """A CLIP of fixed random states, one row a word: umT5-XXL is 11 GB, and ComfyUI's loader takes no smaller one."""

    def __init__(self, kind: str, channels: int) -> None:
        self.kind, self.channels = kind, channels

    def tokenize(self, text: str, **_: Any) -> dict[str, list[list[tuple[int, float]]]]:
        words = [(2 + zlib.crc32(word.encode()) % 10_000, 1.0) for word in text.split()]
        return {self.kind: [[*words, (1, 1.0)]]}

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any], **_: Any) -> list[list[Any]]:
        states = torch.zeros(1, LENGTH, self.channels)
        for i, (token, _weight) in enumerate(tokens[self.kind][0][:LENGTH]):
            states[0, i] = torch.randn(self.channels, generator=torch.Generator().manual_seed(token))
        return [[states, {"pooled_output": None}]]


class TextEncoder:
    """A CLIP whose tokens are called `kind` ("umt5xxl" for Wan's)."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": ("STRING", {"default": "umt5xxl"}), "channels": ("INT", {"default": 4096})}}

    def run(self, kind: str, channels: int) -> tuple[Clip]:
        return (Clip(kind, channels),)


class AnyType(str):
    """Connects to every input, as the value nodes of many packs do: what comes over a link is not validated."""

    def __ne__(self, other: object) -> bool:
        return False


class Value:
    """`value`, whatever it is."""

    CATEGORY = "tests"
    RETURN_TYPES = (AnyType("*"),)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (AnyType("*"),)}}

    def run(self, value: Any) -> tuple[Any]:
        return (value,)


class LittleMemory:
    """A MODEL for which no memory is free: its weights stay where they are and come layer by layer. That is what
    --lowvram does on a card, and ComfyUI refuses that option beside --cpu."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def run(self, model: Any) -> tuple[Any]:
        clone = model.clone()
        load = clone.partially_load
        clone.partially_load = lambda device, extra_memory=0, force_patch_weights=False: load(
            device, 1, force_patch_weights
        )
        return (clone,)


@PromptServer.instance.routes.get("/tests/modules")
async def modules(_: web.Request) -> web.Response:
    """Names and files of all modules that are loaded."""
    return web.json_response({name: getattr(module, "__file__", None) for name, module in sys.modules.items()})


NODE_CLASS_MAPPINGS = {"TestTextEncoder": TextEncoder, "TestValue": Value, "TestLittleMemory": LittleMemory}
