"""Graphs give what `lcv_core`'s pipelines and the command line give, with the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import clip, made
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.denoise import denoise
from lcv_core.image_io import resize_frames
from lcv_core.miniature import miniature
from lcv_core.pipelines import (
    Components,
    continue_video,
    image_to_video,
    long_refine_segments,
    long_video,
    long_video_segments,
    text_to_video,
)
from lcv_core.pipelines.base import Run, decode_latents, draw_noise, put_condition
from lcv_core.pipelines.continuation import continue_from_latents
from lcv_core.pipelines.long_video import segment_generator
from lcv_core.video_io import read_video

from . import graphs, reference
from .api import Client
from .graphs import COND_FRAMES, FRAMES, HEIGHT, NEGATIVE, PROMPT, SEED, STEPS, WIDTH, LongCat
from .reference import assert_differs, assert_near, normalised, seeded

SCHEDULES = ("base", "distilled")
SIZE = {"height": HEIGHT, "width": WIDTH}
TEXTS = {"text": PROMPT, "negative_text": NEGATIVE}
PICTURE = graphs.noise_frames(1, height=40, width=72)  # of another aspect: the fit matters
VIDEO = graphs.noise_frames(12, seed=5)


@pytest.fixture(scope="module", autouse=True)
def c(comfy: Client) -> Components:
    """The tiny checkpoint, which every graph of this file loads too."""
    return reference.components(graphs.tiny_checkpoint(comfy))


@pytest.fixture(scope="module")
def picture(comfy: Client) -> str:
    return graphs.put_frames(comfy, PICTURE, "picture")


@pytest.fixture(scope="module")
def video(comfy: Client) -> str:
    return graphs.put_frames(comfy, VIDEO, "video")


def latents(comfy: Client, c: Components, graph: LongCat, latent: graphs.Link) -> Tensor:
    """The normalised latents of a graph."""
    node = graph.save(latent)
    return normalised(c, comfy.latents(comfy.run(graph.prompt), node))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_text_to_video(comfy: Client, c: Components, schedule: str) -> None:
    graph = LongCat()
    found = latents(comfy, c, graph, graph.sample(graph.latent(), schedule=schedule))
    expected = text_to_video(
        c, **TEXTS, **SIZE, num_frames=FRAMES, num_steps=STEPS, schedule=schedule, generator=seeded(SEED),
        output="latents",
    )  # fmt: skip
    assert_near(found, expected)


def test_the_schedules_and_the_seeds_differ(comfy: Client, c: Components) -> None:
    """Otherwise the comparisons in this file would say little."""
    graph = LongCat()
    empty = graph.latent()
    base = latents(comfy, c, graph, graph.sample(empty))
    assert_differs(latents(comfy, c, graph, graph.sample(empty, schedule="distilled")), base)
    assert_differs(latents(comfy, c, graph, graph.sample(empty, seed=SEED + 1)), base)
    assert_differs(latents(comfy, c, graph, graph.sample(empty, guidance_scale=1.0)), base)
    assert_differs(latents(comfy, c, graph, graph.sample(empty, positive=graph.encode("a blue cube"))), base)


def test_a_batch_is_its_videos(comfy: Client, c: Components) -> None:
    graph = LongCat()
    found = latents(comfy, c, graph, graph.sample(graph.latent(batch_size=2)))
    expected = text_to_video(
        c, **TEXTS, **SIZE, num_frames=FRAMES, num_steps=STEPS, num_videos_per_prompt=2, generator=seeded(SEED),
        output="latents",
    )  # fmt: skip
    assert_near(found, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_image_to_video(comfy: Client, c: Components, picture: str, schedule: str) -> None:
    graph = LongCat()
    start = graph.latent(image=graph.images(picture))
    found = latents(comfy, c, graph, graph.sample(start, schedule=schedule))
    expected = image_to_video(
        c, image=PICTURE[0], **TEXTS, **SIZE, num_frames=FRAMES, num_steps=STEPS, schedule=schedule, fit="crop",
        generator=seeded(SEED), output="latents",
    )  # fmt: skip
    assert_near(found, expected)


def test_the_images_frame_is_the_encoded_image(comfy: Client, c: Components, picture: str) -> None:
    graph = LongCat()
    start = graph.latent(image=graph.images(picture))
    before, after = graph.save(start), graph.save(graph.sample(start))
    result = comfy.run(graph.prompt)
    encoded, sampled = comfy.latents(result, before)[:, :, :1], comfy.latents(result, after)[:, :, :1]
    assert encoded.abs().max() > 0.1
    assert_near(sampled, encoded, 1e-5)
    pixels = resize_frames(PICTURE, HEIGHT, WIDTH, fit="crop") / 127.5 - 1
    mean, _ = c.need_vae().encode(pixels.permute(3, 0, 1, 2)[None])
    assert_near(encoded, mean, 1e-5)


def test_sizes_of_0_are_those_of_the_picture_and_the_model(comfy: Client, picture: str) -> None:
    graph = LongCat()
    wide = graph.save(graph.latent(image=graph.images(picture), width=0, height=0, num_frames=0))
    native = graph.save(graph.latent(width=0, height=0, num_frames=0))
    result = comfy.run(graph.prompt)
    assert comfy.latents(result, native).shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
    height, width = comfy.latents(result, wide).shape[3:]
    assert width / height > 1.5 and height % 2 == 0 and width % 2 == 0


def continuation(c: Components, *, use_kv_cache: bool = True, num_frames: int = FRAMES + 4, **options: str) -> Tensor:
    return continue_video(
        c, frames=VIDEO, **TEXTS, **SIZE, num_frames=num_frames, num_cond_frames=COND_FRAMES, num_steps=STEPS,
        fit="crop", generator=seeded(SEED), output="latents", use_kv_cache=use_kv_cache, **options,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_continuation(comfy: Client, c: Components, video: str, schedule: str) -> None:
    """By its own node, by the all-in-one sampler from the same frames, and by the pipeline."""
    graph = LongCat()
    frames = graph.images(video)
    sampled = graph.save(graph.sample(graph.latent(video=frames, num_frames=FRAMES + 4), schedule=schedule))
    continued = graph.save(graph.continued(video=frames, schedule=schedule)[2])
    result = comfy.run(graph.prompt)
    expected = continuation(c, schedule=schedule)
    assert_near(normalised(c, comfy.latents(result, sampled)), expected)
    assert_near(normalised(c, comfy.latents(result, continued)), expected)


def test_the_kv_cache_is_exact(comfy: Client, c: Components, video: str) -> None:
    """Graphs always cache the condition frames; the pipeline can do without."""
    graph = LongCat()
    found = latents(comfy, c, graph, graph.continued(video=graph.images(video))[2])
    assert_near(found, continuation(c, use_kv_cache=False))


def test_continuation_gives_the_video_and_what_is_new(comfy: Client, c: Components, video: str) -> None:
    graph = LongCat()
    node = graph.continued(video=graph.images(video))
    whole, new = graph.save_images(node[0]), graph.save_images(node[1])
    result = comfy.run(graph.prompt)
    all_frames, new_frames = graphs.frames(comfy, result, whole), graphs.frames(comfy, result, new)
    assert torch.equal(all_frames[: len(VIDEO)], VIDEO)
    assert torch.equal(all_frames[len(VIDEO) :], new_frames)
    expected = decode_latents(c, continuation(c))[0, COND_FRAMES:]
    assert_near(new_frames, (expected * 255).to(torch.uint8), 1)


def test_continuation_of_latents(comfy: Client, c: Components) -> None:
    """The tail goes over as it is: not decoded, not encoded."""
    graph = LongCat()
    first = graph.sample(graph.latent(num_frames=FRAMES + 4))
    saved, found = graph.save(first), graph.save(graph.continued(latent=first, seed=SEED + 1)[2])
    result = comfy.run(graph.prompt)
    tail = normalised(c, comfy.latents(result, saved))[:, :, -2:]
    run = Run.of(
        num_steps=STEPS, guidance_scale=None, schedule="base", cfg_scope="noise", cfg_mode="sequential",
        output="latents", on_step=None, progress=None,
    )  # fmt: skip
    expected = continue_from_latents(
        c, **TEXTS, run=run, size=(HEIGHT, WIDTH), num_frames=FRAMES + 4, cond=lambda: tail, num_cond_latents=2,
        generator=seeded(SEED + 1),
    )  # fmt: skip
    continued = normalised(c, comfy.latents(result, found))
    assert_near(continued, expected)
    assert_near(continued[:, :, :2], tail, 1e-5)


LONG_PROMPTS = ["a red ball", "a blue ball", "a green ball"]
LONG_FRAMES = FRAMES + 4  # each segment makes all the frames that the next one goes on from


@pytest.mark.parametrize("handover", ["frames", "official", "latents"])
@pytest.mark.parametrize("start", ["text", "image", "video"])
def test_long_video(comfy: Client, c: Components, picture: str, video: str, handover: str, start: str) -> None:
    graph = LongCat()
    given = {"image": graph.images(picture if start == "image" else None)}
    given |= {"video": graph.images(video if start == "video" else None)}
    out = graph.save_images(
        graph.long(LONG_PROMPTS, num_frames=LONG_FRAMES, handover=handover, schedule="distilled", **given)[0]
    )
    found = graphs.frames(comfy, comfy.run(graph.prompt), out)
    expected = long_video(
        c, text=LONG_PROMPTS, image=PICTURE[0] if start == "image" else None,
        frames=VIDEO if start == "video" else None, negative_text=NEGATIVE, **SIZE, num_frames=LONG_FRAMES,
        num_cond_frames=COND_FRAMES, num_steps=STEPS, schedule="distilled", handover=handover, seed=SEED, fit="crop",
    )[0]  # fmt: skip
    expected = (expected * 255).to(torch.uint8)
    first = LONG_FRAMES - (COND_FRAMES if start == "video" else 0)
    assert len(found) == first + 2 * (LONG_FRAMES - COND_FRAMES)
    if handover == "official":
        # Through 8 bits: where a last digit becomes a level, all that follows is another video. So each segment is
        # held against the pipeline's continuation of the very frames that it went on from.
        expected = torch.cat([expected[:first], *(continued_from(c, found, first, k) for k in (1, 2))])
    assert_near(found, expected, 1)


def continued_from(c: Components, frames: Tensor, first: int, index: int) -> Tensor:
    """Segment `index` of a long video as the continuation of the 8-bit frames before it."""
    before = frames[: first + (index - 1) * (LONG_FRAMES - COND_FRAMES)]
    new = continue_video(
        c, frames=before, text=LONG_PROMPTS[index], negative_text=NEGATIVE, **SIZE, num_frames=LONG_FRAMES,
        num_cond_frames=COND_FRAMES, num_steps=STEPS, schedule="distilled", fit="crop",
        generator=segment_generator(SEED, index),
    )[0, COND_FRAMES:]  # fmt: skip
    return (new * 255).to(torch.uint8)


def test_long_video_of_one_prompt_with_guidance(comfy: Client, c: Components) -> None:
    """Compared as floats, through the VAE's encoder."""
    graph = LongCat()
    frames = graph.long([PROMPT], num_segments=2)[0]
    encoded = graph.save(graph.add("VAEEncode", pixels=frames, vae=graph.vae)[0])
    found = normalised(c, comfy.latents(comfy.run(graph.prompt), encoded))
    segments = long_video_segments(
        c, text=PROMPT, num_segments=2, negative_text=NEGATIVE, **SIZE, num_frames=FRAMES, num_cond_frames=COND_FRAMES,
        num_steps=STEPS, seed=SEED, fit="crop",
    )  # fmt: skip
    expected = torch.cat([segment.frames for segment in segments])
    pixels = (expected * 2 - 1).permute(3, 0, 1, 2)[None]
    assert_near(found, c.need_vae().normalize(c.need_vae().encode(pixels)[0]))


REFINES = {
    "one window": ({}, {}),
    "sparse": ({"sparsity": 0.5}, {"bsa": BSAConfig(sparsity=0.5)}),
    "space only": ({"mode": "space only"}, {"spatial_only": True}),
    "windows": ({"window": 7, "overlap": 2}, {"window": 7, "overlap": 2, "time_mapping": "exact"}),
    "first frame": ({"image": "picture"}, {"image": PICTURE[0]}),
    "other size": ({"width": 128, "height": 64}, {"width": 128, "height": 64}),
}


@pytest.mark.parametrize("name", REFINES)
def test_refine(comfy: Client, c: Components, video: str, picture: str, name: str) -> None:
    inputs, options = REFINES[name]
    graph = LongCat()
    if "image" in inputs:
        inputs = inputs | {"image": graph.images(picture)}
    out = graph.save_images(graph.refined(graph.images(video), **{"window": 12} | inputs)[0])
    found = graphs.frames(comfy, comfy.run(graph.prompt), out)
    segments = long_refine_segments(
        c, text=PROMPT, read=lambda start, stop: VIDEO[start:stop], total_frames=len(VIDEO), seed=SEED, refine_steps=2,
        fit="crop", **{"window": 12, "time_mapping": "stretch"} | options,
    )  # fmt: skip
    expected = torch.cat([segment.frames for segment in segments])
    assert_near(found, (expected * 255).to(torch.uint8), 1)


def test_the_adapters_are_off_after_the_job(comfy: Client, c: Components, video: str) -> None:
    graph = LongCat()
    before = graph.sample(graph.latent(), seed=100)
    kept = latents(comfy, c, graph, before)
    busy = LongCat()
    busy.save_images(busy.refined(busy.images(video), sparsity=0.5, seed=101)[0])
    busy.save(busy.sample(busy.latent(), schedule="distilled", seed=102))
    comfy.run(busy.prompt)
    again = LongCat()
    expected = text_to_video(
        c, **TEXTS, **SIZE, num_frames=FRAMES, num_steps=STEPS, generator=seeded(103), output="latents"
    )
    assert_near(latents(comfy, c, again, again.sample(again.latent(), seed=103)), expected)
    assert_differs(kept, expected)


def test_the_miniature_needs_no_download(comfy: Client) -> None:
    """Without an adapter: its weights are bf16, and ComfyUI rounds what it merges into them to that."""
    graph = LongCat(graphs.MINIATURE)
    sampled = graph.sample(graph.latent(width=0, height=0, num_frames=0), num_steps=8)
    out = graph.save_images(graph.add("VAEDecode", samples=sampled, vae=graph.vae)[0])
    found = graphs.frames(comfy, comfy.run(graph.prompt), out)
    c = reference.components(miniature())
    expected = text_to_video(c, **TEXTS, num_steps=8, generator=seeded(SEED))[0]
    assert_near(found, (expected * 255).to(torch.uint8), 1)


def test_masked_condition_frames_are_what_denoise_gives(comfy: Client, c: Components) -> None:
    """A stock mask on a stock latent is a condition too: the first frame of another run."""
    graph = LongCat()
    source = graph.sample(graph.latent(), seed=SEED + 2)
    mask = graph.add("SolidMask", value=1.0, width=WIDTH, height=HEIGHT)[0]
    black = graph.add("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)[0]
    frames = [graph.add("MaskToImage", mask=m)[0] for m in (black, mask, mask)]
    batch = graph.add("ImageBatch", image1=frames[0], image2=frames[1])[0]
    batch = graph.add("ImageBatch", image1=batch, image2=frames[2])[0]
    masks = graph.add("ImageToMask", image=batch, channel="red")[0]
    masked = graph.add("SetLatentNoiseMask", samples=source, mask=masks)[0]
    saved, found = graph.save(source), graph.save(graph.sample(masked, guidance_scale=1.0))
    result = comfy.run(graph.prompt)
    first = normalised(c, comfy.latents(result, saved))[:, :, :1]
    x = put_condition(draw_noise((1, 16, 3, HEIGHT // 8, WIDTH // 8), seeded(SEED)), first)
    assert c.text_encoder is not None
    run = Run.of(
        num_steps=STEPS, guidance_scale=1.0, schedule="base", cfg_scope="noise", cfg_mode="sequential",
        output="latents", on_step=None, progress=None,
    )  # fmt: skip
    expected = denoise(c.dit, x, run.sigmas(c.flow_shift), text=c.text_encoder.encode([PROMPT]), num_cond_latents=1)
    assert_near(normalised(c, comfy.latents(result, found)), expected)


def job(comfy: Client, out: Path, *options: object) -> tuple[object, ...]:
    texts = ("-p", PROMPT, "-n", NEGATIVE, "--seed", SEED, "--steps", STEPS)
    return ("-m", graphs.tiny_checkpoint(comfy), *texts, "--height", HEIGHT, "--width", WIDTH, "-o", out, *options)


def test_lcv_t2v(comfy: Client, c: Components, tmp_path: Path) -> None:
    graph = LongCat()
    found = latents(comfy, c, graph, graph.sample(graph.latent()))
    made("t2v", *job(comfy, tmp_path / "x.safetensors", "--frames", FRAMES))
    assert_near(found, load_file(tmp_path / "x.safetensors")["latents"])


@pytest.mark.parametrize("scale", [1, 2])
def test_lcv_i2v(comfy: Client, c: Components, tmp_path: Path, scale: int) -> None:
    name = graphs.put_frames(comfy, graphs.noise_frames(1, height=HEIGHT * scale, width=WIDTH * scale), f"still{scale}")
    graph = LongCat()
    found = latents(comfy, c, graph, graph.sample(graph.latent(image=graph.images(name)), schedule="distilled"))
    options = ("--frames", FRAMES, "--schedule", "distilled", "--image", comfy.server.run / "input" / name)
    made("i2v", *job(comfy, tmp_path / "x.safetensors", *options))
    assert_near(found, load_file(tmp_path / "x.safetensors")["latents"])


def test_lcv_continue(comfy: Client, c: Components, tmp_path: Path) -> None:
    file = clip(tmp_path / "clip.mp4", 9)
    name = graphs.put_frames(comfy, read_video(file), "clip")
    graph = LongCat()
    found = latents(comfy, c, graph, graph.continued(video=graph.images(name))[2])
    options = ("--frames", FRAMES + 4, "--cond-frames", COND_FRAMES)
    made("continue", file, *job(comfy, tmp_path / "x.safetensors", *options))
    assert_near(found, load_file(tmp_path / "x.safetensors")["latents"])


def test_lcv_refine(comfy: Client, tmp_path: Path) -> None:
    file = clip(tmp_path / "clip.mp4", 9)
    name = graphs.put_frames(comfy, read_video(file), "clip")
    graph = LongCat()
    out = graph.save_images(graph.refined(graph.images(name), refine_steps=0, sparsity=0.9375)[0])
    found = graphs.frames(comfy, comfy.run(graph.prompt), out)
    options = ("-m", graphs.tiny_checkpoint(comfy), "-p", PROMPT, "--seed", SEED)
    made("refine", file, *options, "-o", tmp_path / "frames")
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").glob("*.png"))]
    assert_near(found, torch.from_numpy(np.stack(pictures)), 1)
