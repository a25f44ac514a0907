"""The choices that are made by name, each written once: pipelines check them, the command line offers them."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lcv_core.errors import InputError

Task = Literal["t2v", "i2v", "continue", "long", "refine"]
Schedule = Literal["base", "distilled"]
CfgScope = Literal["noise", "all"]
CfgMode = Literal["sequential", "batched"]
Output = Literal["frames", "latents"]
Fit = Literal["stretch", "crop", "pad"]
Posterior = Literal["mode", "sample"]
Handover = Literal["frames", "official", "latents"]
# It keeps objects and motion best and shows the seams least: docs/miniature/evaluation.md.
DEFAULT_HANDOVER: Handover = "latents"
TimeMapping = Literal["stretch", "exact"]
Joint = Literal["blend", "cut"]
TimestepPrecision = Literal["model", "fp32"]
RefineAttention = Literal["sparse", "dense"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
# How the large weights are in memory: in the dtype of the rest, as the file has them, or in a format of quant.formats;
# with -matmul they are multiplied in eight bits too.
Weights = Literal["plain", "stored", "fp8", "int8", "q8_0", "q5_k", "q4_k", "fp8-matmul", "int8-matmul"]
# Where the transformer's blocks wait for their turn: all on the device, in system memory, or in the checkpoint's files.
Streaming = Literal["off", "ram", "disk"]
Compile = Literal["off", "blocks"]
CacheStorage = Literal["model", "fp8"]
CachePlace = Literal["device", "cpu"]
# Whether what memory decides is chosen by the plan where it is not named, and changed where memory runs out.
MemoryChoice = Literal["auto", "given"]


def check_name(what: str, value: str, choices: Any) -> None:
    """InputError unless `value` is one of the names of a Literal type above."""
    names = get_args(choices)
    if value not in names:
        known = ", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"'
        raise InputError(f"{what} must be {known}, got {value!r}")
