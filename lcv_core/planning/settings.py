"""The settings that memory decides, and a job that is done with them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lcv_core.names import CachePlace, CacheStorage, CfgMode, Streaming, Weights
from lcv_core.planning.advice import size_text
from lcv_core.planning.job import Job, WeightDtype


@dataclass(frozen=True)
class Settings:
    """What a plan decides.

    weights: "plain" or a form of fewer bits. stream: where the transformer's blocks wait. resident: bytes of them that
    stay on the device all the same. cache_storage, cache_place: of the KV cache. cfg_mode: how both branches of
    guidance run. tile: pixels of the VAE's tiles, 0 for none. window: frames refined at once, None for the model's own
    count. text_device: where the text is encoded.
    """

    weights: Weights = "plain"
    stream: Streaming = "off"
    resident: int = 0
    cache_storage: CacheStorage = "model"
    cache_place: CachePlace = "device"
    cfg_mode: CfgMode = "sequential"
    tile: int = 0
    window: int | None = None
    text_device: Literal["same", "cpu"] = "same"

    def changed_from(self, other: Settings) -> dict[str, Any]:
        """What differs, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)}

    def applied(self, job: Job) -> Job:
        """The job done with these settings."""
        refine = job.refine
        if refine is not None and self.window is not None:
            overlap = min(refine.overlap, self.window // 2)
            refine = replace(refine, window=self.window, overlap=overlap)
        return replace(
            job, weight_dtype=weight_dtype(self.weights, job), stream=self.stream, resident=self.resident,
            cache_storage=self.cache_storage, cache_place=self.cache_place, vae_tile=self.tile, refine=refine,
            guidance=job.guidance if job.guidance == "off" else self.cfg_mode, text_device=self.text_device,
        )  # fmt: skip


def weight_dtype(weights: Weights, job: Job) -> WeightDtype:
    """What the planner calls a form of the weights; "stored" is what the job has already."""
    if weights == "plain":
        return job.compute_dtype
    forms: dict[str, WeightDtype] = {"fp8": "fp8", "int8": "int8", "q8_0": "q8_0", "q5_k": "q5_k", "q4_k": "q4_k"}
    return forms.get(weights.removesuffix("-matmul"), job.weight_dtype)


_WORDS: dict[str, dict[Any, str]] = {
    "stream": {
        "off": "all blocks on the device",
        "ram": "the blocks streamed from system memory",
        "disk": "the blocks streamed from disk",
    },
    "cache_place": {"device": "the KV cache on the device", "cpu": "the KV cache in system memory"},
    "cache_storage": {"model": "the KV cache as it is computed", "fp8": "the KV cache in fp8"},
    "cfg_mode": {"sequential": "the branches of guidance one by one", "batched": "both branches of guidance at once"},
    "text_device": {"same": "the text encoded on the device", "cpu": "the text encoded on the CPU"},
}


def words(name: str, value: Any) -> str:
    """A setting as part of a sentence: "the KV cache in system memory"."""
    if name == "weights":
        return "plain weights" if value == "plain" else f"{value} weights"
    if name == "tile":
        return f"VAE tiles of {value} pixels" if value else "whole frames in the VAE"
    if name == "resident":
        return f"{size_text(value)} of blocks kept on the device" if value else "no blocks kept on the device"
    if name == "window":
        return f"windows of {value} frames" if value else "windows as released"
    return _WORDS[name][value]


def sentence(changes: dict[str, Any]) -> str:
    """Several settings: "VAE tiles of 512 pixels and the blocks streamed from disk"."""
    parts = [words(name, value) for name, value in changes.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
