"""The shipped workflows: nodes, links, places, groups and notes. `build.py` draws them in the real front end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Link = tuple[str, int]  # (key of the node, number of its output)
Note = tuple[tuple[int, int], tuple[int, int], str]

NOTES = Path(__file__).with_name("notes")

# One grid for all workflows: columns of nodes, with room for links between them.
COLUMN, GAP, TOP = 400, 60, 100
BLUE, GREEN, PURPLE, GOLD = "#3f789e", "#88aa88", "#8888aa", "#b58b2a"  # of the front end's own palette


@dataclass(frozen=True)
class Node:
    """One node.

    key: its name here. at: (x, y). values: widgets by name. links: inputs by name. muted: there to be connected.
    models: files that the front end offers to download where they are missing: name, url, directory.
    """

    key: str
    type: str
    at: tuple[int, int]
    size: tuple[int, int]
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    title: str = ""
    muted: bool = False
    models: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Group:
    """A frame around nodes, given by their keys."""

    title: str
    nodes: tuple[str, ...]
    colour: str = BLUE


@dataclass(frozen=True)
class Workflow:
    """name: of the files. note: (at, size, Markdown)."""

    name: str
    nodes: tuple[Node, ...]
    groups: tuple[Group, ...]
    note: Note


def x(column: int) -> int:
    return column * (COLUMN + GAP)


BALL = "a large red ball moves left on a black background"
NEGATIVE = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall"
    " gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands,"
    " poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three"
    " legs, many people in the background, walking backwards"
)
MINIATURE = "miniature (built in)"
WAN = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"


def loader(weight_dtype: str = "default") -> Node:
    values = {"checkpoint": MINIATURE, "weight_dtype": weight_dtype, "vae": "auto", "text_encoder": "auto"}
    return Node("loader", "LongCatVideoLoader", (x(0), TOP), (COLUMN, 190), values)


def prompt(text: str = BALL, key: str = "positive", title: str = "Prompt", at: tuple[int, int] = (0, 0)) -> Node:
    place = at if at != (0, 0) else (x(1), TOP)
    return Node(key, "LongCatVideoTextEncode", place, (COLUMN, 170), {"text": text}, {"clip": ("loader", 1)}, title)


def negative(at: tuple[int, int]) -> Node:
    return prompt(NEGATIVE, "negative", "Negative prompt", at)


def latent(at: tuple[int, int], **links: Link) -> Node:
    values = {"width": 0, "height": 0, "num_frames": 0, "batch_size": 1, "fit": "crop", "num_cond_frames": 0}
    links = {"model": ("loader", 0), "vae": ("loader", 2), **links}
    return Node("latent", "LongCatVideoLatent", at, (COLUMN, 260), values, links)


def sampler(at: tuple[int, int], schedule: str, seed: int = 1, key: str = "sampler", **links: Link) -> Node:
    own = {"schedule": schedule, "num_steps": 0, "guidance_scale": 0}
    values = {"seed": seed, "control_after_generate": "fixed", **own}
    links = {"model": ("loader", 0), "positive": ("positive", 0), "latent": ("latent", 0), **links}
    return Node(key, "LongCatVideoSampler", at, (COLUMN, 270), values, links)


def decode(at: tuple[int, int], source: Link = ("sampler", 0), key: str = "decode") -> Node:
    return Node(key, "VAEDecode", at, (COLUMN, 60), {}, {"samples": source, "vae": ("loader", 2)})


def save(at: tuple[int, int], images: Link, prefix: str, fps: float | Link = 15.0) -> tuple[Node, Node]:
    """CreateVideo and SaveVideo."""
    create = Node("video", "CreateVideo", at, (COLUMN, 80), {}, {"images": images})
    if isinstance(fps, tuple):
        create.links["fps"] = fps
    else:
        create.values["fps"] = fps
    place = (at[0], at[1] + 130)
    settings = {"filename_prefix": f"longcat/{prefix}", "format": "auto", "codec": "auto"}
    return create, Node("save", "SaveVideo", place, (COLUMN, 360), settings, {"video": ("video", 0)})


MODEL = Group("1  Model", ("loader",), BLUE)


def make(*nodes: str, title: str = "3  Make") -> Group:
    return Group(title, nodes, PURPLE)


def result(*nodes: str, title: str = "4  Result") -> Group:
    return Group(title, (*nodes, "video", "save"), GOLD)


def words(*nodes: str, title: str = "2  Prompts") -> Group:
    return Group(title, nodes, GREEN)


PROMPT = words("positive", title="2  Prompt")


def note(name: str, *more: str, y: int = 410) -> Note:
    """What notes/NAME.md says, and those of `more`; below the loader."""
    texts = [(NOTES / f"{one}.md").read_text(encoding="utf-8").strip() for one in (name, *more)]
    return (x(0), y), (COLUMN, 300), "\n\n".join(texts)


def first_run() -> Workflow:
    return Workflow(
        "first_run",
        (
            loader(), prompt(), latent((x(2), TOP)), sampler((x(2), TOP + 310), "distilled"),
            decode((x(3), TOP)), *save((x(3), TOP + 110), ("decode", 0), "first_run"),
        ),
        (MODEL, PROMPT, make("latent", "sampler"), result("decode")),
        note("first_run", "full_model"),
    )  # fmt: skip


def text_to_video() -> Workflow:
    return Workflow(
        "text_to_video",
        (
            loader(), prompt(), negative((x(1), TOP + 220)), latent((x(2), TOP)),
            sampler((x(2), TOP + 310), "base", negative=("negative", 0)),
            decode((x(3), TOP)), *save((x(3), TOP + 110), ("decode", 0), "text_to_video"),
        ),
        (MODEL, words("positive", "negative"), make("latent", "sampler"), result("decode")),
        note("text_to_video", "full_model"),
    )  # fmt: skip


def image_to_video() -> Workflow:
    still = Node(
        "still", "LongCatVideoLatent", (x(2), TOP), (COLUMN, 260),
        {"width": 0, "height": 0, "num_frames": 1, "batch_size": 1, "fit": "crop", "num_cond_frames": 0},
        {"model": ("loader", 0), "vae": ("loader", 2)}, "One frame",
    )  # fmt: skip
    paint = sampler((x(2), TOP + 310), "distilled", key="paint", latent=("still", 0))
    picture = decode((x(2), TOP + 630), ("paint", 0), "picture")
    own = Node(
        "load", "LoadImage", (x(2), TOP + 780), (COLUMN, 330), {"image": "example.png"}, title="Your own picture",
        muted=True,
    )  # fmt: skip
    moves = "the large blue square moves right on a grey background"
    return Workflow(
        "image_to_video",
        (
            loader(), prompt("a large blue square on a grey background"), negative((x(1), TOP + 220)),
            prompt(moves, "motion", "What happens", (x(1), TOP + 440)), still, paint, picture, own,
            latent((x(3), TOP), image=("picture", 0)),
            sampler((x(3), TOP + 310), "base", positive=("motion", 0), negative=("negative", 0)),
            decode((x(4), TOP)), *save((x(4), TOP + 110), ("decode", 0), "image_to_video"),
        ),
        (
            MODEL, words("positive", "negative", "motion"),
            Group("3  A picture", ("still", "paint", "picture", "load"), BLUE),
            make("latent", "sampler", title="4  Move it"), result("decode", title="5  Result"),
        ),
        note("image_to_video", "full_model"),
    )  # fmt: skip


def continuation() -> Workflow:
    go_on = Node(
        "continue", "LongCatVideoContinue", (x(3), TOP), (COLUMN, 420),
        {
            "num_frames": 0, "num_cond_frames": 0, "width": 0, "height": 0, "seed": 2,
            "control_after_generate": "fixed", "schedule": "base", "num_steps": 0, "guidance_scale": 0, "fit": "crop",
            "vae_tile": 0,
        },
        {
            "model": ("loader", 0), "vae": ("loader", 2), "positive": ("next", 0), "negative": ("negative", 0),
            "video": ("decode", 0),
        },
    )  # fmt: skip
    load = Node("load", "LoadVideo", (x(2), TOP + 760), (COLUMN, 80), title="Your own video", muted=True)
    parts = Node("parts", "GetVideoComponents", (x(2), TOP + 880), (COLUMN, 80), {}, {"video": ("load", 0)}, muted=True)
    return Workflow(
        "continuation",
        (
            loader(), prompt(), negative((x(1), TOP + 440)),
            prompt("the large red ball bounces on a black background", "next", "What happens next", (x(1), TOP + 220)),
            latent((x(2), TOP)), sampler((x(2), TOP + 310), "distilled"), decode((x(2), TOP + 620)), load, parts,
            go_on, *save((x(4), TOP), ("continue", 0), "continuation"),
        ),
        (
            MODEL, words("positive", "next", "negative"),
            Group("3  A video", ("latent", "sampler", "decode", "load", "parts"), BLUE),
            make("continue", title="4  Go on"), result(title="5  Result"),
        ),
        note("continuation", "full_model"),
    )  # fmt: skip


def long_node(prompts: str, segments: int, height: int, seed: int) -> Node:
    return Node(
        "long", "LongCatVideoLong", (x(1), TOP), (COLUMN + 120, height),
        {
            "prompts": prompts, "negative_prompt": NEGATIVE, "num_segments": segments, "width": 0, "height": 0,
            "num_frames": 0, "num_cond_frames": 0, "frame_rate": 15.0, "seed": seed, "control_after_generate": "fixed",
            "schedule": "distilled", "num_steps": 0, "guidance_scale": 0, "handover": "latents", "fit": "crop",
            "vae_tile": 0,
        },
        {"model": ("loader", 0), "vae": ("loader", 2), "clip": ("loader", 1)},
    )  # fmt: skip


def _long(name: str, prompts: str, segments: int, height: int, seed: int = 1) -> Workflow:
    right = x(2) + 120
    return Workflow(
        name,
        (loader(), long_node(prompts, segments, height, seed), *save((right, TOP), ("long", 0), name, ("long", 1))),
        (MODEL, make("long", title="2  Segments"), result(title="3  Result")),
        note(name, "full_model"),
    )  # fmt: skip


def long_video() -> Workflow:
    return _long("long_video", BALL, 3, 690)


def interactive() -> Workflow:
    return _long(
        "interactive",
        "a large yellow triangle stays still on a grey background\n"
        "the large yellow triangle spins on a grey background\n"
        "the large yellow triangle moves up on a grey background",
        0, 790, seed=11,
    )  # fmt: skip


def refine_720p() -> Workflow:
    refine = Node(
        "refine", "LongCatVideoRefine", (x(3), TOP), (COLUMN, 480),
        {
            "seed": 3, "control_after_generate": "fixed", "mode": "space and time", "refine_steps": 0, "t_thresh": 0.5,
            "sparsity": -1, "refine_lora": "auto", "width": 0, "height": 0, "window": 0, "overlap": 0,
            "fit": "crop", "vae_tile": 0,
        },
        {"model": ("loader", 0), "vae": ("loader", 2), "positive": ("positive", 0), "frames": ("decode", 0)},
    )  # fmt: skip
    return Workflow(
        "refine_720p",
        (
            loader(), prompt(), latent((x(2), TOP)), sampler((x(2), TOP + 310), "distilled"),
            decode((x(2), TOP + 620)), refine, *save((x(4), TOP), ("refine", 0), "refine_720p", ("refine", 1)),
        ),
        (
            MODEL, PROMPT, make("latent", "sampler", "decode", title="3  480p, 15 fps"),
            make("refine", title="4  720p, 30 fps"), result(title="5  Result"),
        ),
        note("refine_720p", "full_model"),
    )  # fmt: skip


def distilled() -> Workflow:
    sigmas = Node(
        "sigmas", "LongCatVideoScheduler", (x(2), TOP + 310), (COLUMN, 130),
        {"schedule": "distilled", "num_steps": 16, "t_thresh": 0.5}, {"model": ("loader", 0)},
    )  # fmt: skip
    custom = sampler((x(2), TOP + 490), "distilled", sigmas=("sigmas", 0))
    return Workflow(
        "distilled",
        (
            loader(), prompt(), latent((x(2), TOP)), sigmas, custom,
            decode((x(3), TOP)), *save((x(3), TOP + 110), ("decode", 0), "distilled"),
        ),
        (MODEL, PROMPT, make("latent", "sigmas", "sampler"), result("decode")),
        note("distilled", "full_model"),
    )  # fmt: skip


def low_vram() -> Workflow:
    plan = Node(
        "plan", "LongCatVideoPlan", (x(0), TOP + 700), (COLUMN, 330),
        {"width": 0, "height": 0, "num_frames": 0, "num_cond_frames": 0, "batch_size": 1, "sparsity": 0.0},
        {"model": ("loader", 0)},
    )  # fmt: skip
    tiled = Node(
        "decode", "VAEDecodeTiled", (x(3), TOP), (COLUMN, 160),
        {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8},
        {"samples": ("sampler", 0), "vae": ("loader", 2)},
    )  # fmt: skip
    return Workflow(
        "low_vram",
        (
            loader("int8"), prompt(), latent((x(2), TOP)), sampler((x(2), TOP + 310), "distilled"), tiled,
            *save((x(3), TOP + 210), ("decode", 0), "low_vram"), plan,
        ),
        (
            MODEL, PROMPT, make("latent", "sampler"), result("decode"), Group("What it needs", ("plan",), GOLD),
        ),
        note("low_vram", "full_model"),
    )  # fmt: skip


def wan_file(directory: str, name: str) -> tuple[dict[str, str], ...]:
    return ({"name": name, "url": f"{WAN}/{directory}/{name}", "directory": directory},)


def sparse_attention_wan() -> Workflow:
    model = Node(
        "model", "UNETLoader", (x(0), TOP), (COLUMN, 90),
        {"unet_name": "wan2.1_t2v_1.3B_fp16.safetensors", "weight_dtype": "default"},
        models=wan_file("diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors"),
    )  # fmt: skip
    clip = Node(
        "clip", "CLIPLoader", (x(0), TOP + 140), (COLUMN, 110),
        {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan", "device": "default"},
        models=wan_file("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    )  # fmt: skip
    vae = Node(
        "vae", "VAELoader", (x(0), TOP + 300), (COLUMN, 60), {"vae_name": "wan_2.1_vae.safetensors"},
        models=wan_file("vae", "wan_2.1_vae.safetensors"),
    )  # fmt: skip
    shift = Node("shift", "ModelSamplingSD3", (x(0), TOP + 410), (COLUMN, 60), {"shift": 8.0}, {"model": ("model", 0)})
    encode = {"type": "CLIPTextEncode", "size": (COLUMN, 170)}
    good = Node(
        "positive", encode["type"], (x(1), TOP), encode["size"],
        {"text": "a fox runs through fresh snow, low winter sun, cinematic"}, {"clip": ("clip", 0)}, "Prompt",
    )  # fmt: skip
    bad = Node(
        "negative", encode["type"], (x(1), TOP + 220), encode["size"], {"text": "blurred, static, low quality"},
        {"clip": ("clip", 0)}, "Negative prompt",
    )  # fmt: skip
    empty = Node(
        "latent", "EmptyHunyuanLatentVideo", (x(2), TOP), (COLUMN, 130),
        {"width": 832, "height": 480, "length": 81, "batch_size": 1},
    )  # fmt: skip
    sparse = Node(
        "sparse", "LongCatVideoSparseAttention", (x(2), TOP + 180), (COLUMN, 130),
        {"sparsity": 0.75, "block": "4 x 4 x 4", "min_tokens": 4096}, {"model": ("shift", 0)},
    )  # fmt: skip
    sample = Node(
        "sampler", "KSampler", (x(2), TOP + 360), (COLUMN, 270),
        {
            "seed": 1, "control_after_generate": "fixed", "steps": 30, "cfg": 6.0, "sampler_name": "uni_pc",
            "scheduler": "simple", "denoise": 1.0,
        },
        {
            "model": ("sparse", 0), "positive": ("positive", 0), "negative": ("negative", 0),
            "latent_image": ("latent", 0),
        },
    )  # fmt: skip
    out = Node("decode", "VAEDecode", (x(3), TOP), (COLUMN, 60), {}, {"samples": ("sampler", 0), "vae": ("vae", 0)})
    return Workflow(
        "sparse_attention_wan",
        (
            model, clip, vae, shift, good, bad, empty, sparse, sample, out,
            *save((x(3), TOP + 110), ("decode", 0), "sparse_attention_wan", 16.0),
        ),
        (
            Group("1  Wan 2.1", ("model", "clip", "vae", "shift"), BLUE), words("positive", "negative"),
            make("latent", "sparse", "sampler", title="3  Make, sparsely"), result("decode"),
        ),
        note("sparse_attention_wan", y=640),
    )  # fmt: skip


WORKFLOWS = (
    first_run, text_to_video, image_to_video, continuation, long_video, interactive, refine_720p, distilled, low_vram,
    sparse_attention_wan,
)  # fmt: skip
