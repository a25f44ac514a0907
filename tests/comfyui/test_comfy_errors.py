"""Bad input is a red node with one plain sentence that says what to do, and the next job runs."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcv_core.pipelines import text_to_video

from . import graphs, reference, wan
from .api import ERROR, REJECTED, Client, Json, Result
from .graphs import FRAMES, HEIGHT, NEGATIVE, PROMPT, SEED, STEPS, WIDTH, Link, LongCat, Node
from .reference import assert_near, normalised, seeded

INF, NAN = float("inf"), float("nan")
SEEDS = count(1_000_000)  # seeds that no other test has used: their jobs are not cached


@pytest.fixture(scope="module", autouse=True)
def files(comfy: Client) -> None:
    """What the graphs of this file name: another model, pictures, latents, adapters."""
    graphs.tiny_checkpoint(comfy)
    wan.put_transformer(comfy)
    graphs.put_frames(comfy, graphs.noise_frames(1), "one")
    graphs.put_frames(comfy, graphs.noise_frames(3), "three")
    graphs.put_frames(comfy, graphs.noise_frames(12), "twelve")
    for name, value in (("nan", NAN), ("inf", INF)):
        samples = torch.zeros(1, 16, 3, 4, 6)
        samples[0, 3, 2, 1, 0] = value
        put_latent(comfy, name, samples)
    put_lora(comfy, "any", pair())
    for kind in ("loras", "diffusion_models", "longcat_video", "vae", "text_encoders"):
        graphs.model_file(comfy, kind, "x/anything")  # a folder to go in by and out again
    put_latent(comfy, "audio", torch.zeros(1, 64, 100))
    put_latent(comfy, "wide", torch.zeros(1, 48, 3, 4, 6))


def put_latent(comfy: Client, name: str, samples: torch.Tensor) -> None:
    """A file that a stock LoadLatent reads."""
    tensors = {"latent_tensor": samples, "latent_format_version_0": torch.tensor([])}
    save_file(tensors, comfy.server.run / "input" / f"{name}.latent")


@pytest.fixture(autouse=True)
def the_next_job_runs(comfy: Client, files: None) -> Iterator[None]:
    yield
    graph = LongCat()
    sampler = graph.sample(graph.latent(), seed=next(SEEDS), num_steps=1, guidance_scale=1.0)
    node = graph.save(sampler)
    result = comfy.run(graph.prompt)
    assert sampler[0] in result.ran
    assert torch.isfinite(comfy.latents(result, node)).all()


def sentence(result: Result, node: Node) -> str:
    """What is said of `node`, and of no other: when it ran, or before, by the validation of its inputs."""
    if result.event == ERROR:
        assert result.error["node_id"] == node.id, result.error_text
        text = result.error_text
    else:
        assert result.event == REJECTED, result.event
        assert set(result.node_errors) == {node.id}
        # ComfyUI says it once for every input that the node validates.
        said = {error["details"].partition(" - ")[2] for error in result.node_errors[node.id]["errors"]}
        assert len(said) == 1, said
        text = said.pop()
    assert "\n" not in text and "\0" not in text
    assert not any(mark in text for mark in ("Traceback", 'File "', "torch.", "0x", "<class", "object at"))
    assert 20 < len(text) < 500, text
    return text


def refused(comfy: Client, graph: LongCat, node: Node, words: str) -> None:
    """The graph fails at that node, with those words."""
    if not any(spec["class_type"].startswith("Save") for spec in graph.prompt.values()):
        show(graph, node)
    said = sentence(comfy.queue(graph.prompt, allow_node_errors=True), node)
    assert words in said, said


def show(graph: LongCat, node: Node) -> None:
    """An output node behind `node`, without which ComfyUI would not run it."""
    kinds = {"LongCatVideoContinue": "IMAGE", "LongCatVideoLong": "IMAGE", "LongCatVideoRefine": "IMAGE"}
    kind = graph.prompt[node.id]["class_type"]
    if kind in kinds:
        graph.save_images(node[0])
    elif kind in ("LongCatVideoLatent", "LongCatVideoSampler", "SamplerCustomAdvanced"):
        graph.save(node[0])
    else:
        graph.add("PreviewAny", source=node[0])


def node_of(link: Link) -> Node:
    return Node(link[0])


def linked(graph: LongCat, value: Json) -> Link:
    """A value over a link, as from the value nodes of other packs: nothing is validated before the run."""
    return graph.add("TestValue", value=value)[0]


def report(graph: LongCat, **changes: Json) -> Node:
    inputs = {
        "model": graph.model, "positive": graph.positive, "sparsity": 0.5, "block": "4 x 4 x 4", "min_tokens": 0,
        "num_steps": 2, "guidance_scale": 1.0, "seed": 1,
    }  # fmt: skip
    if "latent" not in changes:
        inputs["latent"] = graph.latent()
    return graph.add("LongCatVideoSparseReport", **inputs | changes)


def sparse(graph: LongCat, **changes: Json) -> Node:
    inputs = {"model": graph.model, "sparsity": 0.5, "block": "4 x 4 x 4", "min_tokens": 0}
    return graph.add("LongCatVideoSparseAttention", **inputs | changes)


def plan(graph: LongCat, **changes: Json) -> Node:
    inputs = {"width": 0, "height": 0, "num_frames": 0, "num_cond_frames": 0, "batch_size": 1, "sparsity": 0.0}
    return graph.add("LongCatVideoPlan", model=graph.model, **inputs | changes)


def latent(graph: LongCat, **changes: Json) -> Node:
    return node_of(graph.latent(**changes))


def sampler(graph: LongCat, start: Link | None = None, **changes: Json) -> Node:
    return node_of(graph.sample(start or graph.latent(), **changes))


def long_of(graph: LongCat, prompts: Link) -> Node:
    node = graph.long([])
    graph.change(node, prompts=prompts)
    return node


def lora(graph: LongCat, name: Json, strength: float = 1.0) -> Node:
    return graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name=name, strength=strength)


def load_latent(graph: LongCat, name: str) -> Link:
    return graph.add("LoadLatent", latent=f"{name}.latent")[0]


def twelve(graph: LongCat) -> Link:
    """Frames of a clip."""
    return graph.add("LoadImage", image="twelve.png")[0]


def three(graph: LongCat) -> Link:
    return graph.add("LoadImage", image="three.png")[0]


def one(graph: LongCat) -> Link:
    return graph.add("LoadImage", image="one.png")[0]


Build = Callable[[LongCat], Node]

# Every node with a MODEL input that is for LongCat-Video alone.
FOR_LONGCAT: dict[str, Build] = {
    "LongCatVideoLoraLoader": lambda g: lora(g, "bad any.safetensors"),
    "LongCatVideoLatent": latent,
    "LongCatVideoScheduler": lambda g: node_of(g.sigmas()),
    "LongCatVideoGuider": lambda g: node_of(g.guider()),
    "LongCatVideoSampler": lambda g: sampler(
        g, g.add("EmptyHunyuanLatentVideo", width=48, height=32, length=9, batch_size=1)[0]
    ),
    "LongCatVideoContinue": lambda g: g.continued(video=twelve(g)),
    "LongCatVideoLong": lambda g: g.long(["a red ball"]),
    "LongCatVideoRefine": lambda g: g.refined(twelve(g)),
    "LongCatVideoPlan": plan,
}
FOR_ANY = {"LongCatVideoSparseAttention", "LongCatVideoSparseReport"}  # in test_comfy_sparse.py


def test_every_node_with_a_model_is_here(comfy: Client) -> None:
    ours = {name: info for name, info in comfy.object_info().items() if info["category"].startswith("LongCat-Video")}
    specs = {name: info["input"].get("required", {}).values() for name, info in ours.items()}
    assert {name for name, inputs in specs.items() if any(spec[0] == "MODEL" for spec in inputs)} == {
        *FOR_LONGCAT, *FOR_ANY
    }  # fmt: skip


@pytest.mark.parametrize("name", FOR_LONGCAT)
def test_another_model(comfy: Client, name: str) -> None:
    graph = LongCat()
    graph.model = graph.add("UNETLoader", unet_name=wan.TRANSFORMER, weight_dtype="default")[0]
    refused(comfy, graph, FOR_LONGCAT[name](graph), "this node needs a LongCat-Video model, got WAN21; connect the Lo")


def pixel_vae(graph: LongCat) -> None:
    graph.vae = graph.add("VAELoader", vae_name="pixel_space")[0]  # an image VAE that every ComfyUI has


def other_clip(graph: LongCat, kind: str, channels: int) -> None:
    graph.clip = graph.add("TestTextEncoder", kind=kind, channels=channels)[0]


def with_vae(build: Build) -> Build:
    def made(graph: LongCat) -> Node:
        pixel_vae(graph)
        return build(graph)

    return made


def with_clip(kind: str, channels: int, build: Build) -> Build:
    def made(graph: LongCat) -> Node:
        other_clip(graph, kind, channels)
        if kind == "umt5xxl":
            graph.positive = graph.encode(PROMPT)
        return build(graph)

    return made


def text(graph: LongCat) -> Node:
    return node_of(graph.encode(PROMPT))


PARTS: dict[str, tuple[Build, str]] = {
    "image VAE: latent": (with_vae(latent), "not the Wan 2.1 video VAE"),
    "image VAE: continue": (with_vae(FOR_LONGCAT["LongCatVideoContinue"]), "not the Wan 2.1 video VAE"),
    "image VAE: long": (with_vae(FOR_LONGCAT["LongCatVideoLong"]), "not the Wan 2.1 video VAE"),
    "image VAE: refine": (with_vae(FOR_LONGCAT["LongCatVideoRefine"]), "not the Wan 2.1 video VAE"),
    "image VAE: report": (
        lambda g: report(g, vae=g.add("VAELoader", vae_name="pixel_space")[0]), "this VAE is for 3 channels",
    ),
    "CLIP-L": (with_clip("l", 32, text), "connect the LongCat-Video Loader's CLIP, or a CLIPLoader of type wan"),
    "CLIP-L: long": (with_clip("l", 32, FOR_LONGCAT["LongCatVideoLong"]), "this CLIP is not umT5"),
    "umT5 of another size: sampler": (with_clip("umt5xxl", 64, sampler), "encode the prompt with the CLIP of the same"),
    "umT5 of another size: continue": (
        with_clip("umt5xxl", 64, FOR_LONGCAT["LongCatVideoContinue"]), "must be of one checkpoint",
    ),
    "umT5 of another size: long": (
        with_clip("umt5xxl", 64, FOR_LONGCAT["LongCatVideoLong"]), "must be of one checkpoint",
    ),
    "umT5 of another size: refine": (
        with_clip("umt5xxl", 64, FOR_LONGCAT["LongCatVideoRefine"]), "must be of one checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_another_vae_or_clip(comfy: Client, name: str) -> None:
    build, words = PARTS[name]
    graph = LongCat()
    refused(comfy, graph, build(graph), words)


@pytest.mark.parametrize(
    ("part", "build", "words"),
    [("vae", latent, "there is no VAE; connect the Lon"), ("text_encoder", text, "there is no CLIP; connect the Long")],
)
def test_a_part_that_was_not_loaded(comfy: Client, part: str, build: Build, words: str) -> None:
    graph = LongCat()
    graph.change(graph.loader, **{part: "none"})
    refused(comfy, graph, build(graph), words)


ON_GRID = "num_frames must be 4k+1, got 92; try 89 or 93"
NUMBERS: dict[str, tuple[Build, str]] = {
    "latent: 92 frames": (lambda g: latent(g, num_frames=92), ON_GRID),
    "latent: 92 frames over a link": (lambda g: latent(g, num_frames=linked(g, 92)), ON_GRID),
    "continue: 92 frames": (lambda g: g.continued(video=twelve(g), num_frames=92), ON_GRID),
    "continue: 92 frames over a link": (lambda g: g.continued(video=twelve(g), num_frames=linked(g, 92)), ON_GRID),
    "long: 92 frames": (lambda g: g.long(["a"], num_frames=92), ON_GRID),
    "long: 92 frames over a link": (lambda g: g.long(["a"], num_frames=linked(g, 92)), ON_GRID),
    "plan: 92 frames": (lambda g: plan(g, num_frames=92), ON_GRID),
    "latent: too many frames": (lambda g: latent(g, num_frames=40001), "num_frames must be from 0 to 4001, got 40001"),
    "latent: -3 frames": (lambda g: latent(g, num_frames=-3), "num_frames must be from 0 to 4001, got -3"),
    "latent: width 100": (lambda g: latent(g, width=100), "width must be a multiple of 16, got 100; try 96 or 112"),
    "latent: height 40 over a link": (lambda g: latent(g, height=linked(g, 40)), "got 40; try 32 or 48"),
    "latent: width 131072": (lambda g: latent(g, width=131072), "width must be from 0 to 4096, got 131072"),
    "continue: height 40": (lambda g: g.continued(video=twelve(g), height=40), "got 40; try 32 or 48"),
    "long: width 100 over a link": (lambda g: g.long(["a"], width=linked(g, 100)), "got 100; try 96 or 112"),
    "refine: width 100": (lambda g: g.refined(twelve(g), width=100), "got 100; try 96 or 112"),
    "latent: no videos": (lambda g: latent(g, batch_size=linked(g, 0)), "batch_size must be at least 1, got 0"),
    "long: no prompt": (lambda g: g.long([""]), "there is no prompt; write one per line"),
    "long: blank lines": (lambda g: g.long([" ", "\t"]), "there is no prompt; write one per line"),
    "long: no prompt over a link": (lambda g: long_of(g, linked(g, " \n")), "there is no prompt; write"),
    "long: segments": (lambda g: g.long(["a", "b"], num_segments=3), "num_segments is 3 but there are 2 prompts"),
    "long: segments over a link": (
        lambda g: g.long(["a", "b"], num_segments=linked(g, 3)), "2 prompts for 3 segments; give one, or one per",
    ),
    "long: -1 segments": (lambda g: g.long(["a"], num_segments=-1), "num_segments must be from 0 to 1000, got -1"),
    "long: condition frames": (
        lambda g: g.long(["a", "b"], num_cond_frames=FRAMES), f"ask for at least {FRAMES + 4} frames or use fewer",
    ),
    "long: native condition frames": (
        lambda g: g.long(["a", "b"], num_frames=5, num_cond_frames=0), "ask for at least 9 frames or use fewer",
    ),
    "long: condition frames off the grid": (
        lambda g: g.long(["a", "b"], num_cond_frames=4), "num_cond_frames must be 4k+1, got 4; try 1 or 5",
    ),
    "continue: condition frames": (
        lambda g: g.continued(video=twelve(g), num_frames=9, num_cond_frames=13), "ask for at least 17 frames or use",
    ),
    "continue: condition latents over a link": (
        lambda g: g.continued(latent=g.latent(), num_frames=9, num_cond_frames=linked(g, 9)), "ask for at least 13",
    ),
    "latent: condition frames": (
        lambda g: latent(g, video=twelve(g), num_cond_frames=9), "ask for at least 13 frames or use fewer",
    ),
    "latent: image for one frame": (
        lambda g: latent(g, image=one(g), num_frames=1), "num_frames counts the image too, so it must be at least 5",
    ),
    "latent: short clip": (lambda g: latent(g, video=three(g)), "the clip has 3 frames but num_cond_frames is 5; use"),
    "continue: short clip": (lambda g: g.continued(video=three(g)), "the clip has 3 frames but num_cond_frames is 5"),
    "long: short clip": (lambda g: g.long(["a"], video=three(g)), "use num_cond_frames=1 or a longer clip"),
    "continue: nothing": (lambda g: g.continued(), "connect a video, or the latent of one"),
    "latent: image and video": (lambda g: latent(g, image=one(g), video=twelve(g)), "connect an image or a video, not"),
    "long: image and video": (lambda g: g.long(["a"], image=one(g), video=twelve(g)), "from an image or from a clip"),
    "refine: image and video": (lambda g: g.refined(twelve(g), image=one(g), video=twelve(g)), "not both"),
    "refine: window of one": (lambda g: g.refined(twelve(g), window=1), "window must be at least 2 frames, or 0 for"),
    "refine: t_thresh": (lambda g: g.refined(twelve(g), t_thresh=linked(g, 5.0)), "t_thresh must be in (0, 1], got 5"),
    "sampler: no negative": (lambda g: sampler(g, negative=None), "needs a negative conditioning; connect one or set"),
    "guider: no negative": (
        lambda g: g.add("LongCatVideoGuider", model=g.model, positive=g.positive, guidance_scale=4.0),
        "guidance_scale 4 needs a negative conditioning; connect one or set it to 1",
    ),
    "continue: no negative": (lambda g: g.continued(video=twelve(g), negative=None), "needs a negative conditioning"),
    "report: no negative": (lambda g: report(g, guidance_scale=3.0), "guidance_scale 3 needs a negative conditioning"),
    "sampler: distilled steps": (lambda g: sampler(g, schedule="distilled", num_steps=60), "at most 50 steps, got 60"),
    "sampler: -1 steps": (lambda g: sampler(g, num_steps=linked(g, -1)), "num_steps must be at least 1, got -1"),
    "sampler: schedule": (lambda g: sampler(g, schedule=linked(g, "fast")), 'schedule must be "base" or "distilled"'),
    "scheduler: schedule": (
        lambda g: node_of(g.sigmas(schedule=linked(g, "fast"))), 'unknown schedule "fast"; there are: base, base with',
    ),
    "latent: fit": (lambda g: latent(g, image=one(g), fit=linked(g, "squeeze")), 'fit must be "stretch", "crop" or'),
    "long: handover": (lambda g: g.long(["a", "b"], handover=linked(g, "tape")), 'handover must be "frames", "offici'),
    "refine: mode": (lambda g: g.refined(twelve(g), mode=linked(g, "time only")), "there are: space and time, space"),
    "sparse: block": (lambda g: sparse(g, block=linked(g, "9 x 9 x 9")), "there are: 4 x 4 x 4, 2 x 8 x 4"),
    "sparse: sparsity": (lambda g: sparse(g, sparsity=linked(g, 1.5)), "sparsity must be in [0, 1), got 1.5"),
    "sparse: sparsity of another model": (
        lambda g: sparse(
            g, sparsity=linked(g, 1.5), model=g.add("UNETLoader", unet_name=wan.TRANSFORMER, weight_dtype="default")[0]
        ),
        "sparsity must be in [0, 1), got 1.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_and_choices(comfy: Client, name: str) -> None:
    build, words = NUMBERS[name]
    graph = LongCat()
    refused(comfy, graph, build(graph), words)


def test_condition_frames_that_nobody_uses_are_not_checked(comfy: Client) -> None:
    graph = LongCat()
    graph.save(graph.latent(num_frames=1, num_cond_frames=13))
    comfy.run(graph.prompt)


def masked(graph: LongCat) -> Link:
    """A latent whose noise mask keeps every frame."""
    black = graph.add("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)[0]
    return graph.add("SetLatentNoiseMask", samples=graph.latent(), mask=black)[0]


def image_latent(graph: LongCat) -> Link:
    return graph.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=1)[0]


LATENTS: dict[str, tuple[Build, str]] = {
    "image: sampler": (lambda g: sampler(g, image_latent(g)), "the latent is 4-dimensional, a video's has 5; use Long"),
    "image: continue": (lambda g: g.continued(latent=image_latent(g)), "the latent is 4-dimensional, a video's has 5"),
    "audio: sampler": (lambda g: sampler(g, load_latent(g, "audio")), "the latent is 3-dimensional, a video's has 5"),
    "audio: continue": (lambda g: g.continued(latent=load_latent(g, "audio")), "the latent is 3-dimensional, a video"),
    "48 channels: sampler": (lambda g: sampler(g, load_latent(g, "wide")), "48 channels, LongCat-Video's have 16; use"),
    "48 channels: continue": (lambda g: g.continued(latent=load_latent(g, "wide")), "48 channels, LongCat-Video's"),
    "NaN: sampler": (lambda g: sampler(g, load_latent(g, "nan")), "the latent has NaN or infinite values"),
    "inf: continue": (lambda g: g.continued(latent=load_latent(g, "inf")), "the latent has NaN or infinite values"),
    "NaN: report": (lambda g: report(g, latent=load_latent(g, "nan")), "sampling produced NaN or infinite values"),
    "two videos: continue": (lambda g: g.continued(latent=g.latent(batch_size=2)), "holds 2 videos; choose one with"),
    "short: continue": (
        lambda g: g.continued(latent=g.latent(num_frames=1)), "the latent has 1 frames, 5 condition frames need 2",
    ),
    "kept: sampler": (lambda g: sampler(g, masked(g)), "the noise mask keeps every latent frame, so there is nothing"),
    "kept: custom sampler": (
        lambda g: node_of(g.sample_custom(g.guider(), g.sigmas(), masked(g))), "the noise mask keeps every latent",
    ),
    "kept: report": (lambda g: report(g, latent=masked(g)), "the noise mask keeps every latent frame"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENTS)
def test_latents(comfy: Client, name: str) -> None:
    build, words = LATENTS[name]
    graph = LongCat()
    refused(comfy, graph, build(graph), words)


def pair(module: str = "blocks.1.attn.proj", width: int = 64, value: float = 1.0) -> dict[str, torch.Tensor]:
    """An adapter of one layer."""
    name = f"diffusion_model.{module}"
    return {f"{name}.lora_A.weight": torch.full((4, width), value), f"{name}.lora_B.weight": torch.ones(width, 4)}


def good_file(comfy: Client) -> bytes:
    return (graphs.tiny_checkpoint(comfy) / "lora" / "cfg_step_lora.safetensors").read_bytes()


def header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


LORAS: dict[str, tuple[dict[str, torch.Tensor] | Callable[[Client], bytes], str]] = {
    "Flux": (
        {"lora_unet_double_blocks_0_img_attn.lora_down.weight": torch.ones(4, 64),
         "lora_unet_double_blocks_0_img_attn.lora_up.weight": torch.ones(64, 4)},
        "not for this model: it has no layer of double_blocks_0_img_attn; it looks like a Flux",
    ),
    "Avatar": (pair("blocks.1.audio_cross_attn.proj"), "an adapter of LongCat-Video-Avatar"),
    "full size": (pair(width=4096), "made for a model of another size"),
    "half a pair": (dict(list(pair().items())[:1]), "only one half of the pair for blocks.1.attn.proj; download"),
    "no adapter": ({"decoder.weight": torch.ones(4)}, "is not a LoRA adapter"),
    "nothing in it": ({}, "is not a LoRA adapter"),
    "text": (lambda _: b"this is a note, not a model", "is not a safetensors file"),
    "web page": (lambda _: b"<!doctype html><html></html>", "is a web page, not the weights"),
    "empty": (lambda _: b"", "is empty (0 bytes); download it again"),
    "pickle": (lambda _: b"\x80\x04\x95" + bytes(range(1, 99)), "unpickling can run code, so only safetensors is read"),
    "cut short": (lambda c: good_file(c)[:-1000], "is cut short: 1000 bytes are missing; download it again"),
    "cut in its header": (lambda c: good_file(c)[:50], "not even its header is whole; download it again"),
    "damaged header": (lambda _: header(b'{"a": {"dtype": "F32", "shape": [4'), "has a damaged header"),
    "wrong offsets": (
        lambda _: header(json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()) + bytes(8),
        "has a damaged header",
    ),
}  # fmt: skip


def put_lora(comfy: Client, name: str, content: dict[str, torch.Tensor] | bytes) -> str:
    path = graphs.model_file(comfy, "loras", f"bad {name}.safetensors")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    return path.name


@pytest.mark.parametrize("node", ["LongCatVideoLoraLoader", "LongCatVideoRefine"])
@pytest.mark.parametrize("kind", LORAS)
def test_loras(comfy: Client, kind: str, node: str) -> None:
    content, words = LORAS[kind]
    name = put_lora(comfy, kind, content(comfy) if callable(content) else content)
    graph = LongCat()
    refined = node == "LongCatVideoRefine"
    refused(comfy, graph, graph.refined(twelve(graph), refine_lora=name) if refined else lora(graph, name), words)


@pytest.mark.parametrize("value", [INF, NAN])
def test_loras_with_infinite_weights(comfy: Client, value: float) -> None:
    name = put_lora(comfy, str(value), pair(value=value))
    graph = LongCat()
    node = sampler(graph, model=lora(graph, name)[0])
    refused(comfy, graph, node, "sampling produced NaN or infinite values; try a weight dtype of bf16 or fp32, another")
    graph = LongCat()
    refused(comfy, graph, graph.refined(twelve(graph), refine_lora=name), "check LoRAs and their strengths")


# Of files that exist outside, and of names that no file can have.
TRICKS = {
    "above": "../../server.log", "above, from inside": "x/../../../server.log", "absolute": "/etc/hostname",
    "NUL": "a\0b.safetensors", "newline": "a\nb.safetensors", "empty": "", "dot": ".", "dots": "..", "long": "a" * 400,
    "Windows": "C:\\Windows\\win.ini", "number": 3,
}  # fmt: skip


@pytest.mark.parametrize("way", ["typed", "linked"])
@pytest.mark.parametrize("trick", TRICKS)
def test_file_names_that_lead_elsewhere(comfy: Client, trick: str, way: str) -> None:
    """As adapter, as checkpoint, as VAE and as text encoder: the file is not there, whatever lies at that place."""
    assert (comfy.server.run / "server.log").is_file()
    name = TRICKS[trick]
    for build in (named_lora, named_refine_lora, *(named_part(part) for part in ("checkpoint", "vae", "text_encoder"))):
        graph = LongCat()
        node = build(graph, linked(graph, name) if way == "linked" else name)
        result = comfy.queue(graph.prompt, allow_node_errors=True)
        if result.event == REJECTED:  # newer cores compare with the list themselves
            assert set(result.node_errors) == {node.id}
            continue
        said = sentence(result, node) if len(str(name)) < 300 else result.error_text
        assert "is not there; choose one of the list" in said, said
        assert "server.log" not in said.replace(str(name), "")


def named_lora(graph: LongCat, name: Json) -> Node:
    node = lora(graph, name)
    show(graph, node)
    return node


def named_refine_lora(graph: LongCat, name: Json) -> Node:
    node = graph.refined(twelve(graph), refine_lora=name)
    show(graph, node)
    return node


def named_part(part: str) -> Callable[[LongCat, Json], Node]:
    def build(graph: LongCat, name: Json) -> Node:
        graph.change(graph.loader, **{part: name})
        show(graph, sampler(graph))
        return graph.loader

    return build


@pytest.mark.parametrize("prompt", ["../../server.log", "/etc/", "a\0b", "b" * 400 + "/", "models/", "a \ud83d b", "."])
def test_prompts_are_no_file_names(comfy: Client, prompt: str) -> None:
    """A job is known by its graph, and by the files that the graph's texts name: a prompt may look like one."""
    graph = LongCat()
    graph.save_images(graph.long([prompt], num_steps=1, guidance_scale=1.0, seed=next(SEEDS))[0])
    comfy.run(graph.prompt)


def test_a_long_prompt_is_cut_and_told(comfy: Client) -> None:
    c = reference.components(graphs.tiny_checkpoint(comfy))
    prompt = "a red ball moves left and a blue square spins, " * 500
    graph = LongCat(prompt=prompt)
    node = graph.save(graph.sample(graph.latent()))
    before = len(comfy.server.log())
    found = comfy.latents(comfy.run(graph.prompt), node)
    assert "tokens, only 512 are kept; shorten it" in comfy.server.log()[before:]
    expected = text_to_video(
        c, text=prompt, negative_text=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_steps=STEPS,
        generator=seeded(SEED), output="latents",
    )  # fmt: skip
    assert_near(normalised(c, found), expected)


def test_a_missing_picture_is_comfyuis_own_error(comfy: Client, tmp_path: Path) -> None:
    graph = LongCat()
    picture = graph.add("LoadImage", image="no such picture.png")
    graph.save(graph.latent(image=picture[0]))
    result = comfy.queue(graph.prompt, allow_node_errors=True)
    assert result.event == REJECTED and set(result.node_errors) == {picture.id}
    assert "Invalid image file" in result.error_text
