"""The commands of `lcv`: each turns its options into a Job and runs it."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from lcv_core import __version__
from lcv_core.cli.convert import convert
from lcv_core.cli.eval import evaluate
from lcv_core.cli.job import InputFile, Job, Lora, TimeMappingOrAuto, file_hash
from lcv_core.cli.options import (
    AUTO,
    CONDITION,
    PLAN,
    PROMPT,
    SAMPLING,
    ConditionOptions,
    ContinueOptions,
    MachineOptions,
    ModelOptions,
    OutputOptions,
    SamplingOptions,
    named_settings,
    option,
    takes,
)
from lcv_core.cli.train import list_recipes, train
from lcv_core.errors import InputError
from lcv_core.miniature import MINIATURE
from lcv_core.names import DEFAULT_HANDOVER, Handover, Joint, RefineAttention, Streaming, Task

app = typer.Typer(
    name="lcv",
    help="LongCat-Video: make, animate, continue and refine videos.\n\n"
    "First steps without the 83 GB of weights, on the miniature that comes with the package:"
    " `lcv t2v -p 'a red ball moves left'`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Prompts = Annotated[
    list[str] | None, option("--prompt", "-p", panel=PROMPT, help="What to show. Repeat it for several videos.")
]
Image = Annotated[Path | None, option("--image", "-i", panel=CONDITION, help="Picture file: any mode, EXIF honoured.")]
NumVideos = Annotated[int, option("--num-videos", panel=SAMPLING, min=1, help="Videos per prompt, seeds counting up.")]
Clip = Annotated[Path, typer.Argument(help="Video file: anything FFmpeg reads, at any frame rate.")]
HandoverOption = Annotated[
    Handover | None,
    option(
        "--handover", panel=SAMPLING,
        help="What a segment sees of the one before: its latents; its frames, encoded again; official: those through 8"
        f" bits. Default: {DEFAULT_HANDOVER}, or what unfinished work began with.",
    ),
]  # fmt: skip

RANDOM = -1  # the seed of a job whose seed was not named


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lcv {__version__}")
        raise typer.Exit


@app.callback()
def lcv(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Say more, and show where an error came from. Goes anywhere in the command.")
    ] = False,
) -> None:
    # --debug is taken out of the arguments before they get here (see main); it stands here to be found.
    pass


def example(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


@app.command(epilog=example("lcv t2v -m MODEL -p 'a cat on a skateboard' -o cat.mp4",
                            "lcv t2v -m MODEL -p 'a cat' -p 'a dog' --schedule distilled --seed 7"))  # fmt: skip
@takes(model=ModelOptions, sampling=SamplingOptions, output=OutputOptions, machine=MachineOptions)
def t2v(
    model: Any, sampling: Any, output: Any, machine: Any, prompt: Prompts = None, num_videos: NumVideos = 1
) -> None:
    """Make a video from text."""
    job = _job("t2v", model, machine, output, sampling, prompts=_prompts(prompt), num_videos=num_videos)
    _run(job, output, machine, sampling)


@app.command(epilog=example("lcv i2v -m MODEL -i girl.png -p 'she turns her head and smiles' -o girl.mp4"))
@takes(condition=ConditionOptions, model=ModelOptions, sampling=SamplingOptions, output=OutputOptions,
       machine=MachineOptions)  # fmt: skip
def i2v(
    condition: Any, model: Any, sampling: Any, output: Any, machine: Any,
    image: Image = None, prompt: Prompts = None, num_videos: NumVideos = 1,
) -> None:  # fmt: skip
    """Animate a picture: it becomes the first frame."""
    if image is None:
        raise InputError("i2v needs a picture; name it with --image")
    job = _job(
        "i2v", model, machine, output, sampling, condition, prompts=_prompts(prompt), num_videos=num_videos, image=image
    )
    _run(job, output, machine, sampling)


@app.command("continue", epilog=example("lcv continue clip.mp4 -m MODEL -p 'the motorcycle drives on' -o longer.mp4"))
@takes(cont=ContinueOptions, condition=ConditionOptions, model=ModelOptions, sampling=SamplingOptions,
       output=OutputOptions, machine=MachineOptions)  # fmt: skip
def continue_(
    clip: Clip, cont: Any, condition: Any, model: Any, sampling: Any, output: Any, machine: Any,
    prompt: Prompts = None, num_videos: NumVideos = 1,
) -> None:  # fmt: skip
    """Continue a clip: its last frames are seen, what follows is made."""
    job = _job(
        "continue", model, machine, output, sampling, condition, cont, prompts=_prompts(prompt),
        num_videos=num_videos, clip=clip,
    )  # fmt: skip
    _run(job, output, machine, sampling)


@app.command(epilog=example("lcv long -m MODEL -p 'a train crosses a bridge' --segments 11 -o minute.mp4",
                            "lcv long -m MODEL -p 'she enters' -p 'she sits down' -p 'she reads' -o story.mp4",
                            "lcv long -m MODEL --clip start.mp4 -p 'and on it goes' --segments 4"))  # fmt: skip
@takes(cont=ContinueOptions, condition=ConditionOptions, model=ModelOptions, sampling=SamplingOptions,
       output=OutputOptions, machine=MachineOptions)  # fmt: skip
def long(
    cont: Any, condition: Any, model: Any, sampling: Any, output: Any, machine: Any,
    prompt: Prompts = None,
    segments: Annotated[
        int | None, option("--segments", "-s", panel=SAMPLING, min=1, help="How many; default: one per prompt.")
    ] = None,
    image: Image = None,
    clip: Annotated[Path | None, option("--clip", "-c", panel=CONDITION, help="Start by continuing this clip.")] = None,
    handover: HandoverOption = None,
) -> None:  # fmt: skip
    """Make a long video by segments, with one prompt or one each. A killed run goes on where it stopped."""
    if image is not None and clip is not None:
        raise InputError("start a long video from --image or from --clip, not both")
    job = _job(
        "long", model, machine, output, sampling, condition, cont, prompts=_prompts(prompt), num_segments=segments,
        image=image, clip=clip, handover=handover or DEFAULT_HANDOVER,
    )  # fmt: skip
    _run(job, output, machine, sampling, unnamed=frozenset() if handover else frozenset({"handover"}))


@app.command(epilog=example("lcv refine clip.mp4 -m MODEL -o clip-720p.mp4",
                            "lcv refine clip.mp4 -m MODEL --spatial-only --image first-frame.png"))  # fmt: skip
@takes(condition=ConditionOptions, model=ModelOptions, output=OutputOptions, machine=MachineOptions)
def refine(
    clip: Clip, condition: Any, model: Any, output: Any, machine: Any,
    prompt: Annotated[
        list[str] | None, option("--prompt", "-p", panel=PROMPT, help="Default: the clip's own, if lcv made it.")
    ] = None,
    image: Image = None,
    video: Annotated[
        Path | None, option("--video", panel=CONDITION, help="High-resolution video that the clip goes on from.")
    ] = None,
    cond_frames: Annotated[
        int | None, option("--cond-frames", panel=CONDITION, help="Frames of --video that overlap the clip's start.")
    ] = None,
    spatial_only: Annotated[bool, option("--spatial-only", panel=SAMPLING, help="Keep the frame rate.")] = False,
    t_thresh: Annotated[
        float, option("--t-thresh", panel=SAMPLING, help="Noise level to refine from, in (0, 1].")
    ] = 0.5,
    steps: Annotated[
        int | None, option("--steps", panel=SAMPLING, min=1, help="Refine steps; 5 as released.")
    ] = None,
    time_mapping: Annotated[
        TimeMappingOrAuto, option("--time-mapping", panel=SAMPLING, help="auto: stretch for one window, else exact.")
    ] = "auto",
    joint: Annotated[Joint, option("--joint", panel=SAMPLING, help="How windows meet.")] = "blend",
    window: Annotated[
        int | None, option("--window", panel=SAMPLING, min=5, help="Frames refined at a time; 93.")
    ] = None,
    attention_pattern: Annotated[
        RefineAttention, option("--refine-attention", panel=SAMPLING, help="sparse: the model's block sparse settings.")
    ] = "sparse",
    height: Annotated[int | None, option("--height", panel=SAMPLING, help="Pixels; by aspect bucket.")] = None,
    width: Annotated[int | None, option("--width", panel=SAMPLING, help="Pixels; by aspect bucket.")] = None,
    seed: Annotated[int | None, option("--seed", panel=SAMPLING, min=0, help="Default: a random one.")] = None,
) -> None:  # fmt: skip
    """Refine a clip of any length to twice the size and, unless only space is refined, twice the frame rate."""
    if image is not None and video is not None:
        raise InputError("give --image or --video as the condition, not both")
    job = _job(
        "refine", model, machine, output, None, condition, prompts=prompt or [_prompt_of(clip)], clip=clip,
        image=image, cond_video=video, num_cond_frames=cond_frames, spatial_only=spatial_only, t_thresh=t_thresh,
        refine_steps=steps, time_mapping=time_mapping, joint=joint, window=window,
        refine_attention=attention_pattern, height=height, width=width, seed=seed,
    )  # fmt: skip
    _run(job, output, machine, window=window)


@app.command(epilog=example("lcv rerun cat.mp4", "lcv rerun cat.mp4 -m MODEL -o again.mp4"))
@takes(output=OutputOptions)
def rerun(
    file: Annotated[Path, typer.Argument(help="Any output of lcv: video, PNG, folder of PNGs, latents.")],
    output: Any,
    model: Annotated[Path | None, option("--model", "-m", panel="Model", help="Default: where it was.")] = None,
    device: Annotated[str, option("--device", panel="Machine", help="auto, cpu, cuda, ...")] = "auto",
    stream: Annotated[
        Streaming | None, option("--stream", panel="Machine", help="Where blocks wait; default: as then.")
    ] = None,
    text_cache: Annotated[
        Path | None, option("--text-cache", panel="Machine", help="Folder that keeps encoded prompts.")
    ] = None,
) -> None:
    """Repeat the job that made a file, from the settings it carries."""
    from lcv_core.cli.outputs import changed_line, read_settings

    settings = read_settings(file)
    job = Job.from_metadata(settings, file)
    if line := changed_line(settings, file):
        typer.echo(line, err=True)
    changes = {k: v for k in ("frame_rate", "crf") if (v := getattr(output, k)) is not None}
    job = dataclasses.replace(job, model=str(model or job.model), stream=stream or job.stream, **changes)
    from lcv_core.cli.run import Request

    free = frozenset({"kv_cache_place", "resident"} | ({"stream"} if stream is None and job.stream == "off" else set()))
    _start(Request(job, output.output, output.overwrite, device, made_by=file, text_cache=text_cache, free=free))


@app.command(epilog=example("lcv inspect models/LongCat-Video", "lcv inspect some-lora.safetensors --json"))
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint folder or any weights file.")],
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a checkpoint is, holds, lacks, can do and needs, without reading its weights."""
    from lcv_core.cli.report import print_report, to_json
    from lcv_core.weights.inspect import inspect_checkpoint

    inspection = inspect_checkpoint(path)
    if json:
        sys.stdout.write(to_json(inspection) + "\n")
    else:
        print_report(inspection, Console())


@app.command(epilog=example("lcv plan --vram 12 --ram 32", "lcv plan refine --device rtx4080 --json",
                            "lcv plan continue -m models/LongCat-Video --schedule distilled"))  # fmt: skip
@takes(model=ModelOptions, sampling=SamplingOptions, cont=ContinueOptions, machine=MachineOptions)
def plan(
    model: Any, sampling: Any, cont: Any, machine: Any,
    task: Annotated[Task, typer.Argument(help="What is to be done.")] = "t2v",
    vram: Annotated[
        float | None, option("--vram", panel=PLAN, min=0, help="GB of the GPU; default: what is free on this one.")
    ] = None,
    ram: Annotated[
        float | None, option("--ram", panel=PLAN, min=0, help="GB of system memory; default: what is free here.")
    ] = None,
    json: Annotated[bool, option("--json", panel=PLAN, help="For programs.")] = False,
    num_videos: NumVideos = 1,
    segments: Annotated[int, option("--segments", "-s", panel=SAMPLING, min=1, help="Of a long video.")] = 1,
    handover: Annotated[Handover, option("--handover", panel=SAMPLING, help="Of a long video.")] = DEFAULT_HANDOVER,
    window: Annotated[int | None, option("--window", panel=SAMPLING, min=5, help="Frames refined at a time.")] = None,
    refine_steps: Annotated[
        int | None, option("--refine-steps", panel=SAMPLING, min=1, help="Refine steps; 5 as released.")
    ] = None,
    spatial_only: Annotated[bool, option("--spatial-only", panel=SAMPLING, help="Refine without more frames.")] = False,
    attention_pattern: Annotated[
        RefineAttention, option("--refine-attention", panel=SAMPLING, help="sparse: the model's block sparse settings.")
    ] = "sparse",
) -> None:  # fmt: skip
    """Say what a job needs, what would be chosen for it and what it would go on with; computes nothing.

    --device also takes a card: rtx3060, rtx4070, rtx4090, a100, ... Without --model it is LongCat-Video as released,
    of which nothing has to be there.
    """
    job = _job(
        task, model, machine, OutputOptions(), sampling, None, cont, prompts=[""], num_videos=num_videos,
        num_segments=segments, handover=handover, window=window, refine_steps=refine_steps, spatial_only=spatial_only,
        refine_attention=attention_pattern, seed=0,
    )  # fmt: skip
    job.check()

    from lcv_core.cli.plan import Asked, planner_for, print_plan, to_json

    named = named_settings(machine, sampling) | {"window": window}
    free = frozenset() if machine.memory == "given" else frozenset(k for k, v in named.items() if v is None)
    planner = planner_for(Asked(job, model.model is not None, free, machine.device, vram, ram))
    if json:
        sys.stdout.write(to_json(planner) + "\n")
    else:
        print_plan(planner, Console())


@app.command(epilog=example("lcv init models/mini", "lcv init --preset tiny models/tiny"))
def init(
    folder: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    preset: Annotated[
        Literal["mini", "tiny"], typer.Option("--preset", help="mini: a minute makes a clip. tiny: seconds, for tests.")
    ] = "mini",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Write a small random checkpoint in the official layout, to try everything on any machine."""
    from lcv_core.weights.init import init_checkpoint

    init_checkpoint(folder, preset, seed=seed, overwrite=overwrite)
    typer.echo(f"wrote {folder}; its weights are random: it shows that things run, not pictures", err=True)


app.command(
    epilog=example(
        "lcv convert models/LongCat-Video models/LongCat-Video-int8 --to int8",
        "lcv convert models/LongCat-Video longcat-q4_k.gguf --to q4_k --report errors.csv --device cuda",
    )
)(convert)


app.command(
    "eval",
    epilog=example(
        "lcv eval -m models/mini --out outputs/eval --seed 1",
        "lcv eval -m models/mini --only rewards --lora grpo_lora.safetensors",
    ),
)(evaluate)


app.command(
    epilog=example(
        "lcv train mini/flow --out outputs/mini/flow",
        "lcv train my-recipe.yaml --steps 2000 --set lr=5e-4 --set data.folder.path=clips",
    )
    + "\n\n"
    + list_recipes()
)(train)


def _prompts(prompt: list[str] | None) -> list[str]:
    if not prompt:
        raise InputError("there is no prompt; give one with --prompt (-p), it may be empty")
    return prompt


def _prompt_of(clip: Path) -> str:
    """The prompt that a clip of lcv's was made with; nothing for any other."""
    from lcv_core.video_io import read_metadata

    try:
        prompts = Job.from_metadata(read_metadata(clip) or {}, clip).prompts
    except InputError:  # not ours; whether it is a video is found out where it is read
        return ""
    return prompts[0] if prompts else ""


def _job(
    task: Any, model: Any, machine: Any, output: Any, sampling: Any = None, condition: Any = None,
    cont: Any = None, **own: Any,
) -> Job:  # fmt: skip
    """The options of a command as a Job; hashes the files it names. A seed that is not named is -1."""
    values: dict[str, Any] = {
        "model": str(model.model or MINIATURE), "loras": [_lora(text) for text in model.lora or []],
        "attention": machine.attention, "dtype": machine.dtype, "kernels": machine.kernels, "compile": machine.compile,
        "sparsity": machine.sparsity, "sparse_8bit": machine.sparse_8bit,
        "timestep_precision": machine.timestep_precision, "frame_rate": output.frame_rate, "crf": output.crf,
    }  # fmt: skip
    values |= {k: str(v) for k in ("vae", "text_encoder", "tokenizer") if (v := getattr(model, k)) is not None}
    if sampling is not None:
        values |= {
            "negative_prompt": sampling.negative_prompt, "seed": sampling.seed, "num_steps": sampling.steps,
            "guidance_scale": sampling.guidance, "schedule": sampling.schedule, "height": sampling.height,
            "width": sampling.width, "num_frames": sampling.frames, "cfg_scope": sampling.cfg_scope,
            "step_cache": sampling.step_cache,
            "cfg_interval": None if sampling.cfg_interval is None else list(sampling.cfg_interval),
        }  # fmt: skip
    if condition is not None:
        values |= {"fit": condition.fit, "posterior": condition.posterior}
    if cont is not None:
        values |= {
            "num_cond_frames": cont.cond_frames, "keep": cont.keep, "uniform_tail": cont.uniform_tail,
            "kv_cache": cont.kv_cache,
        }  # fmt: skip
    values |= {name: value for name, value in named_settings(machine, sampling).items() if value is not None}
    values |= own
    values |= {name: InputFile.of(values.get(name)) for name in ("image", "clip", "cond_video")}
    if values.get("seed") is None:
        values["seed"] = RANDOM
    return Job(task=task, **values)


def _lora(text: str) -> Lora:
    """FILE or FILE:STRENGTH."""
    path, separator, strength = text.rpartition(":")
    if not separator or Path(text).is_file():
        return Lora(text, 1.0, file_hash(Path(text)))
    try:
        value = float(strength)
    except ValueError:
        if not Path(path).is_file():  # then the colon belongs to a path, which file_hash says is not there
            return Lora(text, 1.0, file_hash(Path(text)))
        raise InputError(f"the strength of --lora {path} must be a number, got {strength!r}; try {path}:1.0") from None
    return Lora(path, value, file_hash(Path(path)))


def _run(
    job: Job, output: Any, machine: Any, sampling: Any = None, *, unnamed: frozenset[str] = frozenset(), **own: Any
) -> None:  # fmt: skip
    """Carry out a job with the options it was asked for with; `own` are settings that a command names itself, unnamed
    those that unfinished work may have otherwise."""
    from lcv_core.cli.outputs import check_place

    any_seed = job.seed == RANDOM
    if any_seed:
        job = dataclasses.replace(job, seed=random.SystemRandom().randrange(1 << 31))
    job.check()  # as far as that goes before torch is imported
    if output.output is not None:
        check_place(output.output, job)

    from lcv_core.cli.run import Request

    named = named_settings(machine, sampling) | own
    free = None if machine.memory == "given" else frozenset(AUTO) - {k for k, v in named.items() if v is not None}
    place = output.output, output.overwrite, machine.device
    _start(Request(job, *place, any_seed=any_seed, text_cache=machine.text_cache, free=free, unnamed=unnamed))


def _start(request: Any) -> None:
    from lcv_core.cli.outputs import check_place
    from lcv_core.cli.progress import Reporter
    from lcv_core.cli.run import carry_out

    request.job.check()
    if request.output is not None:
        check_place(request.output, request.job)
    carry_out(request, Reporter())
