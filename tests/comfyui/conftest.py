"""A real ComfyUI for the tests of this folder."""

from .fixtures import comfy, comfy_core

__all__ = ["comfy", "comfy_core"]
