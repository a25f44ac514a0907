"""Every shipped workflow, queued as shipped through the HTTP API: it runs, and the video that it saves is looked at."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
from torch import Tensor

from lcv_core import open_checkpoint
from lcv_core.config import Native
from lcv_core.miniature import miniature
from lcv_core.pipelines.base import refined_size
from lcv_core.refinement import frames_after
from lcv_core.shapes import num_pixel_frames
from lcv_core.training.evaluation.judge import measure
from lcv_core.training.evaluation.metrics import seam_jump
from lcv_core.video_io import probe_video, read_video

from . import graphs, wan
from .api import Client, Prompt, Result, wait_until
from .graphs import MINIATURE, TINY
from .reference import assert_differs, assert_near
from .server import REPOSITORY

SHIPPED = REPOSITORY / "workflows"
WAN = "sparse_attention_wan"
NAMES = sorted(path.stem for path in (SHIPPED / "api").glob("*.json"))
OURS = [name for name in NAMES if name != WAN]
REFINED = "refine_720p"
BALL = {"object": "ball", "colour": "red", "background": "black"}
SQUARE = {"object": "square", "colour": "blue", "background": "grey", "motion": "moves right"}
TRIANGLE = {"object": "triangle", "colour": "yellow", "background": "grey"}
LEFT = {"motion": "moves left"}
# What each workflow's prompts ask for, by the frames that have to show it; all of them unless it is said.
SHOWN: dict[str, list[tuple[slice, dict[str, str]]]] = {
    **{name: [(slice(None), BALL | LEFT)] for name in OURS},
    "image_to_video": [(slice(None), SQUARE)],
    "continuation": [(slice(0, 17), BALL | LEFT), (slice(-17, None), BALL)],
    "interactive": [
        (slice(0, 17), TRIANGLE | {"motion": "stays still"}), (slice(8, 25), TRIANGLE), (slice(-17, None), TRIANGLE)
    ],
}  # fmt: skip
MOST_SEAM = 2.0  # of one video's few joints; their mean over many is held to 1.2 by `lcv eval`


@dataclass(frozen=True)
class Video:
    """What a saved video must be."""

    height: int
    width: int
    frames: int
    rate: float


def read(name: str) -> Prompt:
    """A shipped workflow as it would be queued."""
    return json.loads((SHIPPED / "api" / f"{name}.json").read_text(encoding="utf-8"))


def nodes(prompt: Prompt, kind: str) -> list[dict[str, object]]:
    """The inputs of all nodes of a type."""
    return [spec["inputs"] for spec in prompt.values() if spec["class_type"] == kind]


def native(comfy: Client, checkpoint: str) -> Native:
    """The sizes and counts that the zeros in the workflows stand for."""
    path = miniature() if checkpoint == MINIATURE else comfy.server.run / "models" / "longcat_video" / checkpoint
    return open_checkpoint(path).native


def expected(name: str, own: Native) -> Video:
    """By the checkpoint's own sizes and counts."""
    height, width, frames, new = own.height, own.width, own.num_frames, own.num_frames - own.num_cond_frames
    rate = own.frame_rate
    if name == "continuation":
        frames += new
    elif name in ("long_video", "interactive"):
        frames += 2 * new
    elif name == REFINED:
        height, width = refined_size(own, height, width)
        frames, rate = frames_after(frames, spatial_only=False, time_mapping="stretch"), 2 * rate
    return Video(height, width, frames, rate)


def saved(comfy: Client, prompt: Prompt, result: Result) -> bytes:
    """The file that the graph's SaveVideo wrote, through ComfyUI's own address for it."""
    (node,) = (node for node, spec in prompt.items() if spec["class_type"] == "SaveVideo")
    (file,) = result.outputs[node]["images"]
    return comfy.view(file)


def judged(path: Path, content: bytes, video: Video) -> Tensor:
    """The frames of a saved file: of that size, number and rate, none of one colour, none twice."""
    path.write_bytes(content)
    info = probe_video(path)
    assert info.frame_rate is not None and math.isclose(info.frame_rate, video.rate, rel_tol=1e-3)
    frames = read_video(path)
    assert frames.shape == (video.frames, video.height, video.width, 3)
    levels = frames.float()
    assert levels.std(dim=(1, 2, 3)).min() > 1, "a frame of one colour: what is not finite is drawn black"
    assert (levels[1:] - levels[:-1]).abs().mean(dim=(1, 2, 3)).min() > 0.01, "a frame stands still"
    return frames


def test_every_workflow_is_here_in_both_forms() -> None:
    assert sorted(path.stem for path in SHIPPED.glob("*.json")) == NAMES
    assert set(NAMES) > {"first_run", WAN}


@pytest.mark.parametrize("name", OURS)
def test_as_shipped(comfy: Client, tmp_path: Path, name: str) -> None:
    prompt = read(name)
    assert {inputs["checkpoint"] for inputs in nodes(prompt, "LongCatVideoLoader")} == {MINIATURE}
    own = native(comfy, MINIATURE)
    result = comfy.run(prompt, timeout=900)
    assert result.node_errors == {}
    frames = judged(tmp_path / "saved.mp4", saved(comfy, prompt, result), expected(name, own))
    for part, asked in SHOWN[name]:
        found = measure(frames[part])
        assert {attribute: found[attribute].value for attribute in asked} == asked
    joints = range(own.num_frames, len(frames), own.num_frames - own.num_cond_frames)
    if name != REFINED and len(joints):
        assert seam_jump(frames, joints) < MOST_SEAM
    for node, spec in prompt.items():
        if spec["class_type"] == "LongCatVideoPlan":
            (shown,) = result.outputs[node]["text"]
            assert shown.strip()


@pytest.mark.parametrize("name", OURS)
def test_with_another_checkpoint_and_two_seeds(comfy: Client, tmp_path: Path, name: str) -> None:
    """The zeros are that checkpoint's sizes then; its few steps tell one seed from another."""
    graphs.tiny_checkpoint(comfy)
    prompt = read(name)
    for spec in prompt.values():
        inputs = spec["inputs"]
        if "num_steps" in inputs:
            inputs["num_steps"] = 2
        if spec["class_type"] == "LongCatVideoLoader":
            inputs["checkpoint"] = TINY
    found = []
    for more in (0, 1):
        other = copy.deepcopy(prompt)
        for spec in other.values():
            if "seed" in spec["inputs"]:
                spec["inputs"]["seed"] += more
        content = saved(comfy, other, comfy.run(other))
        found.append(judged(tmp_path / f"{more}.mp4", content, expected(name, native(comfy, TINY))))
    assert_differs(*found, 8)


def test_sparse_attention_on_wan(comfy: Client, tmp_path: Path) -> None:
    """With tiny random files under the names of the real ones, which have 14 GB; a few steps of a small, short video,
    as two cores need an hour for the real size, and so sparse from its few tokens on."""
    wan.put_transformer(comfy)
    wan.put_vae(comfy)
    prompt = read(WAN)
    (loader,) = (node for node, spec in prompt.items() if spec["class_type"] == "CLIPLoader")
    assert prompt[loader]["inputs"]["type"] == "wan"
    # ComfyUI's loader knows umT5-XXL alone, whatever is in the file.
    prompt[loader] = {"class_type": "TestTextEncoder", "inputs": {"kind": "umt5xxl", "channels": wan.TEXT}}
    (latent,), (sampler,), (patch,) = (
        nodes(prompt, kind) for kind in ("EmptyHunyuanLatentVideo", "KSampler", "LongCatVideoSparseAttention")
    )
    latent |= {"width": 96, "height": 64, "length": num_pixel_frames(5)}
    sampler["steps"] = 4
    patch["min_tokens"] = 0
    found = []
    for sparsity, seed in ((patch["sparsity"], 1), (patch["sparsity"], 2), (0.0, 1)):
        patch["sparsity"], sampler["seed"] = sparsity, seed
        result = comfy.run(prompt)
        assert result.node_errors == {}
        video = Video(64, 96, num_pixel_frames(5), 16.0)
        found.append(judged(tmp_path / f"{seed} {sparsity}.mp4", saved(comfy, prompt, result), video))
    assert_differs(found[0], found[1], 8)
    assert_differs(found[0], found[2], 4)


def test_a_saved_video_makes_itself_again(comfy: Client, tmp_path: Path) -> None:
    """The workflow in its file, queued once more when nothing is known of the first run. Its pictures are compared:
    encoders of several threads need not write the same file twice."""
    graphs.tiny_checkpoint(comfy)
    prompt = read("image_to_video")
    workflow = json.loads((SHIPPED / "image_to_video.json").read_text(encoding="utf-8"))
    for spec in prompt.values():
        if "num_steps" in spec["inputs"]:
            spec["inputs"]["num_steps"] = 2
    (loader,) = nodes(prompt, "LongCatVideoLoader")
    loader["checkpoint"] = TINY
    (video,) = nodes(prompt, "CreateVideo")
    prompt["pictures"] = {"class_type": "SaveImage", "inputs": {"images": video["images"], "filename_prefix": "again"}}
    result = comfy.run(prompt, workflow=workflow)
    first = graphs.frames(comfy, result, "pictures")
    judged(tmp_path / "first.mp4", saved(comfy, prompt, result), expected("image_to_video", native(comfy, TINY)))
    with av.open(str(tmp_path / "first.mp4")) as container:
        embedded = {name: json.loads(container.metadata[name]) for name in ("prompt", "workflow")}
    assert embedded["workflow"] == workflow
    again = embedded["prompt"]
    for spec in again.values():
        spec.pop("is_changed", None)  # what ComfyUI noted there of the first run
    assert {node: spec["inputs"] for node, spec in again.items()} == {node: s["inputs"] for node, s in prompt.items()}
    comfy.free()
    results: list[Result] = []

    def all_ran() -> bool:
        results.append(comfy.run(again))
        return len(results[-1].ran) == len(again)

    wait_until(all_ran, "an empty cache")
    assert_near(graphs.frames(comfy, results[-1], "pictures"), first, 1)
