"""The command line's options, each written once, in groups that commands take whole."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lcv_core.cli.job import Keep
from lcv_core.names import (
    CachePlace,
    CacheStorage,
    CfgMode,
    CfgScope,
    Compile,
    Fit,
    MemoryChoice,
    Posterior,
    Precision,
    Schedule,
    Streaming,
    TimestepPrecision,
    Weights,
)


def option(*names: str, help: str, panel: str, **rest: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **rest)


MODEL, PROMPT, SAMPLING, VIDEO, CONDITION, MACHINE = "Model", "Prompt", "Sampling", "Output", "Condition", "Machine"
PLAN = "The machine that is planned for"


@dataclass(frozen=True)
class ModelOptions:
    model: Annotated[
        Path | None,
        option(
            "--model",
            "-m",
            envvar="LCV_MODEL",
            panel=MODEL,
            help="Checkpoint folder, or DiT file. Default: the miniature.",
        ),
    ] = None
    vae: Annotated[Path | None, option("--vae", panel=MODEL, help="VAE file or folder, if not in the model's.")] = None
    text_encoder: Annotated[
        Path | None, option("--text-encoder", panel=MODEL, help="umT5 file or folder, if not in the model's.")
    ] = None
    tokenizer: Annotated[
        Path | None, option("--tokenizer", panel=MODEL, help="Tokenizer folder, if not in the model's.")
    ] = None
    lora: Annotated[
        list[str] | None,
        option("--lora", panel=MODEL, help="LoRA file, any dialect; FILE:0.8 sets its strength. Repeatable."),
    ] = None


@dataclass(frozen=True)
class MachineOptions:
    device: Annotated[str, option("--device", panel=MACHINE, help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    dtype: Annotated[
        Precision, option("--dtype", panel=MACHINE, help="auto: bf16 on a GPU and for big models, else fp32.")
    ] = "auto"
    memory: Annotated[
        MemoryChoice,
        option(
            "--memory",
            panel=MACHINE,
            help="auto: what of --weights, --stream, --resident, --tile, --kv-cache-..., --cfg-mode and --window is not"
            " named is chosen so that it fits, and changed where memory runs out; given: plain, whole, on the device.",
        ),
    ] = "auto"
    weights: Annotated[
        Weights | None,
        option(
            "--weights",
            panel=MACHINE,
            help="The large weights in memory. plain: in --dtype; stored: quantised as in the file; fp8 to q4_k:"
            " quantised while loading; -matmul: multiplied in 8 bits too.",
        ),
    ] = None
    stream: Annotated[
        Streaming | None,
        option(
            "--stream", panel=MACHINE,
            help="For a model that does not fit: its blocks wait in system memory (ram) or in their files (disk) and"
            " come one by one. Same numbers.",
        ),
    ] = None  # fmt: skip
    resident: Annotated[
        float | None,
        option("--resident", panel=MACHINE, min=0, help="With --stream: GB of blocks that stay on the device."),
    ] = None
    text_cache: Annotated[
        Path | None,
        option("--text-cache", panel=MACHINE, help="Folder that keeps encoded prompts: umT5 is loaded for new ones."),
    ] = None
    attention: Annotated[
        str, option("--attention", panel=MACHINE, help="auto, sdpa, flash2, flash3, sage, xformers or bsa.")
    ] = "auto"
    sparsity: Annotated[
        float | None,
        option(
            "--sparsity", panel=MACHINE, min=0, max=1,
            help="Share of the attention blocks left out by bsa; the model's own, trained for refining, is 0.9375.",
        ),
    ] = None  # fmt: skip
    sparse_8bit: Annotated[
        bool,
        option(
            "--sparse-8bit", panel=MACHINE,
            help="Block sparse attention multiplies in eight bits: a third faster on Hopper GPUs and newer.",
        ),
    ] = False  # fmt: skip
    compile: Annotated[
        Compile,
        option("--compile", panel=MACHINE, help="blocks: through torch.compile; a minute once, then faster steps."),
    ] = "off"
    timestep_precision: Annotated[
        TimestepPrecision, option(panel=MACHINE, help="model: rounded to its dtype, as released; fp32: exact.")
    ] = "model"
    tile: Annotated[
        int | None,
        option("--tile", panel=MACHINE, min=0, help="VAE tile side in pixels, a multiple of 32; 0 is untiled."),
    ] = None
    kv_cache_storage: Annotated[
        CacheStorage | None,
        option("--kv-cache-storage", panel=MACHINE, help="fp8: half the memory, values off by 2.6 %."),
    ] = None
    kv_cache_place: Annotated[
        CachePlace | None, option("--kv-cache-place", panel=MACHINE, help="cpu: in system memory; the same numbers.")
    ] = None
    kernels: Annotated[
        str, option("--kernels", panel=MACHINE, help="Of norms, rope and gates: auto, torch or triton.")
    ] = "auto"


@dataclass(frozen=True)
class OutputOptions:
    output: Annotated[
        Path | None,
        option(
            "--output", "-o", panel=VIDEO,
            help="FILE.mp4 (.mov, .mkv), a folder for PNG frames, or FILE.safetensors for latents."
            " Default: the next free outputs/TASK-0001.mp4.",
        ),
    ] = None  # fmt: skip
    overwrite: Annotated[bool, option("--overwrite", panel=VIDEO, help="Replace an existing output.")] = False
    frame_rate: Annotated[
        float | None, option("--frame-rate", panel=VIDEO, min=0.1, help="Played frames per second; the model's own.")
    ] = None
    crf: Annotated[
        float | None, option("--crf", panel=VIDEO, min=0, max=51, help="H.264 quality, lower is better; 18, refine 10.")
    ] = None


@dataclass(frozen=True)
class SamplingOptions:
    negative_prompt: Annotated[
        str | None, option("--negative-prompt", "-n", panel=PROMPT, help="Default: the released demos' text.")
    ] = None
    seed: Annotated[int | None, option("--seed", panel=SAMPLING, min=0, help="Default: a random one, printed.")] = None
    steps: Annotated[
        int | None, option("--steps", panel=SAMPLING, min=1, help="Denoising steps; base 50, distilled 16.")
    ] = None
    guidance: Annotated[
        float | None, option("--guidance", "-g", panel=SAMPLING, min=0, help="Guidance scale; base 4, distilled 1.")
    ] = None
    schedule: Annotated[
        Schedule, option("--schedule", panel=SAMPLING, help="distilled: 16 steps with the model's distill LoRA.")
    ] = "base"
    height: Annotated[
        int | None, option("--height", panel=SAMPLING, help="Pixels, a multiple of 16; by aspect bucket otherwise.")
    ] = None
    width: Annotated[int | None, option("--width", panel=SAMPLING, help="Pixels, a multiple of 16.")] = None
    frames: Annotated[
        int | None, option("--frames", "-f", panel=SAMPLING, help="Frames of a clip or segment: 4k+1; 93.")
    ] = None
    cfg_scope: Annotated[
        CfgScope, option("--cfg-scope", panel=SAMPLING, help="Frames the guidance scale is taken over; all: official.")
    ] = "noise"
    cfg_mode: Annotated[
        CfgMode | None,
        option("--cfg-mode", panel=SAMPLING, help="sequential: two passes, less memory; batched: both in one."),
    ] = None
    cfg_interval: Annotated[
        tuple[float, float] | None,
        option(
            "--cfg-interval", panel=SAMPLING, metavar="LOW HIGH",
            help="Sigmas of the steps that are guided; the others take half the time. All: 0 1.",
        ),
    ] = None  # fmt: skip
    step_cache: Annotated[
        float,
        option(
            "--step-cache", panel=SAMPLING, min=0,
            help="Relative error of a step for which it may reuse an earlier one, such as 0.05; 0 is off.",
        ),
    ] = 0.0  # fmt: skip


@dataclass(frozen=True)
class ConditionOptions:
    fit: Annotated[
        Fit, option("--fit", panel=CONDITION, help="How pictures meet the video's size; stretch: official.")
    ] = "crop"
    posterior: Annotated[
        Posterior, option("--posterior", panel=CONDITION, help="VAE mean, or a sample of it as officially.")
    ] = "mode"


@dataclass(frozen=True)
class ContinueOptions:
    cond_frames: Annotated[
        int | None, option("--cond-frames", panel=CONDITION, help="Frames of the clip that the model sees: 4k+1; 13.")
    ] = None
    keep: Annotated[Keep, option("--keep", panel=VIDEO, help="all: the clip and what is new; new: only that.")] = "all"
    uniform_tail: Annotated[
        bool, option("--uniform-tail/--no-uniform-tail", panel=SAMPLING, help="End in ten equal steps, as released.")
    ] = True
    kv_cache: Annotated[
        bool, option("--kv-cache/--no-kv-cache", panel=MACHINE, help="Run condition frames once; exact.")
    ] = True


# What the plan may choose, by the names of the Job's fields.
AUTO = ("weights", "stream", "resident", "tile", "kv_cache_storage", "kv_cache_place", "cfg_mode", "window")


def named_settings(machine: Any, sampling: Any) -> dict[str, Any]:
    """What of these the options name, None where they do not."""
    groups = (machine, sampling)
    return {name: next((getattr(g, name) for g in groups if hasattr(g, name)), None) for name in AUTO}


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these dataclasses; it receives one filled dataclass per name."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        hints = get_type_hints(command, include_extras=True)
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        for group in groups.values():
            types = get_type_hints(group, include_extras=True)
            parameters += [
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
                for f in dataclasses.fields(group)
            ]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            filled = {
                name: group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
                for name, group in groups.items()
            }
            command(**values, **filled)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate
