"""Long video: segments are shown as they finish, kept while the job is unfinished, and gone after it."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest
import torch

from lcv_core.cli.job import Job as CliJob
from lcv_core.pipelines import Components, long_video, long_video_segments
from lcv_core.video_io import read_video

from . import graphs, reference
from .api import ERROR, INTERRUPTED, Client, Job, Result
from .graphs import COND_FRAMES, FRAMES, HEIGHT, NEGATIVE, SEED, WIDTH, LongCat, Node
from .reference import assert_near

PROMPTS = ("a red ball", "a blue ball", "a green ball")
SLOW_STEPS = 40
NEW = FRAMES - COND_FRAMES


@pytest.fixture(scope="module", autouse=True)
def c(comfy: Client) -> Components:
    return reference.components(graphs.tiny_checkpoint(comfy))


@pytest.fixture(autouse=True)
def nothing_unfinished(comfy: Client) -> None:
    shutil.rmtree(comfy.server.run / "output" / "longcat_video_segments", ignore_errors=True)


def long_graph(seed: int, **changes: object) -> tuple[LongCat, Node, str]:
    """A long job: its graph, its node, the node that saves its frames."""
    graph = LongCat()
    node = graph.long(PROMPTS, seed=seed, **{"num_steps": SLOW_STEPS, "guidance_scale": 1.0} | changes)
    return graph, node, graph.save_images(node[0])


def work(comfy: Client) -> list[Path]:
    """The files of unfinished jobs."""
    folder = comfy.server.run / "output" / "longcat_video_segments"
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def segments(comfy: Client) -> list[Path]:
    return [path for path in work(comfy) if path.stem.startswith("segment_") and "partial" not in path.name]


def until_segment(comfy: Client, job: Job, node: Node) -> None:
    """Follow a job until its first segment is shown."""
    while job.wait_for("executed")["node"] != node.id:
        pass


def interrupt_after_a_segment(comfy: Client, graph: LongCat, node: Node) -> Result:
    job = comfy.submit(graph.prompt)
    until_segment(comfy, job, node)
    comfy.interrupt()
    result = job.result(timeout=60)
    assert result.event == INTERRUPTED
    return result


def expected_frames(c: Components, seed: int, prompts: tuple[str, ...] = PROMPTS) -> torch.Tensor:
    frames = long_video(
        c, text=list(prompts), negative_text=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_cond_frames=COND_FRAMES, num_steps=SLOW_STEPS, guidance_scale=1.0, seed=seed, fit="crop",
    )[0]  # fmt: skip
    return (frames * 255).to(torch.uint8)


def test_an_interrupted_job_goes_on(comfy: Client, c: Components) -> None:
    graph, node, out = long_graph(seed=60)
    interrupt_after_a_segment(comfy, graph, node)
    kept = segments(comfy)
    assert [path.name for path in kept] == ["segment_0000.safetensors"]
    written = kept[0].stat().st_mtime_ns
    job = comfy.submit(graph.prompt)
    until_segment(comfy, job, node)
    assert kept[0].stat().st_mtime_ns == written, "the first segment was made again"
    result = job.result()
    total = SLOW_STEPS + 2 * (SLOW_STEPS + 7)
    done = [value for owner, value, _ in result.progress if owner == node.id]
    assert done[0] > SLOW_STEPS, f"the first step that was done was {done[0]} of about {total}"
    assert len(done) < 2 * (SLOW_STEPS + 10)
    assert_near(graphs.frames(comfy, result, out), expected_frames(c, 60), 1)
    assert work(comfy) == []
    assert not list((comfy.server.run / "output" / "longcat_video_segments").glob("*"))


def test_the_steps_of_a_segment_are_kept_too(comfy: Client, c: Components) -> None:
    """Interrupted inside a segment, the job goes on from the step."""
    graph, node, out = long_graph(seed=61)
    job = comfy.submit(graph.prompt)
    until_segment(comfy, job, node)
    first = len(job.result_so_far.progress)
    while len(job.result_so_far.progress) < first + 8:
        job.wait_for("progress")
    comfy.interrupt()
    stopped = job.result(timeout=60).progress[-1][1]
    result = comfy.run(graph.prompt)
    done = [value for owner, value, _ in result.progress if owner == node.id]
    assert done[0] >= stopped - 1
    assert_near(graphs.frames(comfy, result, out), expected_frames(c, 61), 1)


def test_another_job_does_not_take_the_segments(comfy: Client, c: Components) -> None:
    graph, node, _ = long_graph(seed=62)
    interrupt_after_a_segment(comfy, graph, node)
    (kept,) = segments(comfy)
    other, _, out = long_graph(seed=63)
    assert_near(graphs.frames(comfy, comfy.run(other.prompt), out), expected_frames(c, 63), 1)
    assert segments(comfy) == [kept]
    graph.change(node, prompts="a red ball\na white ball\na green ball")
    result = comfy.run(graph.prompt)
    prompts = ("a red ball", "a white ball", "a green ball")
    assert_near(graphs.frames(comfy, result, graph_out(graph)), expected_frames(c, 62, prompts), 1)
    assert segments(comfy) == [kept]
    graph.change(node, prompts="\n".join(PROMPTS))
    comfy.run(graph.prompt)
    assert work(comfy) == []


def graph_out(graph: LongCat) -> str:
    """The node of a graph that saves pictures."""
    return next(node for node, spec in graph.prompt.items() if spec["class_type"] == "SaveImage")


def test_another_picture_is_another_job(comfy: Client, c: Components) -> None:
    """The same file name, other pixels."""
    name = graphs.put_frames(comfy, graphs.noise_frames(1, seed=1), "start")
    graph, node, out = long_graph(seed=64)
    graph.change(node, image=graph.images(name))
    interrupt_after_a_segment(comfy, graph, node)
    graphs.put_frames(comfy, graphs.noise_frames(1, seed=2), "start")
    image = graphs.noise_frames(1, seed=2)
    result = comfy.run(graph.prompt)
    expected = long_video(
        c, text=list(PROMPTS), image=image[0], negative_text=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_cond_frames=COND_FRAMES, num_steps=SLOW_STEPS, guidance_scale=1.0, seed=64, fit="crop",
    )[0]  # fmt: skip
    assert_near(graphs.frames(comfy, result, out), (expected * 255).to(torch.uint8), 1)


def test_a_file_that_changed_is_another_job(comfy: Client, c: Components) -> None:
    """An adapter replaced by another of the same name: its segments do not go with the new one's."""
    path = graphs.model_file(comfy, "loras", "changing.safetensors")
    folder = graphs.tiny_checkpoint(comfy) / "lora"
    path.write_bytes((folder / "cfg_step_lora.safetensors").read_bytes())
    graph, node, _ = long_graph(seed=65)
    lora = graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name=path.name, strength=1.0)
    graph.change(node, model=lora[0])
    interrupt_after_a_segment(comfy, graph, node)
    (kept,) = segments(comfy)
    written = kept.stat().st_mtime_ns
    path.write_bytes((folder / "refinement_lora.safetensors").read_bytes())
    comfy.free()
    job = comfy.submit(graph.prompt)
    until_segment(comfy, job, node)
    folders = {path.parent for path in segments(comfy)}
    reused = folders == {kept.parent} and kept.stat().st_mtime_ns == written
    job.result()
    assert not reused, "segments of the old file went into the new video"


def test_each_segment_is_shown_before_the_end(comfy: Client, c: Components) -> None:
    graph, node, _ = long_graph(seed=66, num_steps=3)
    job = comfy.submit(graph.prompt)
    shown, left = [], 3
    while left:
        data = job.wait_for("executed")
        if data["node"] == node.id:
            assert "SaveImage" not in [graph.prompt[ran]["class_type"] for ran in job.result_so_far.ran]
            shown.append(data["output"]["images"][0])
            left -= 1
    job.result()
    assert len({file["filename"] for file in shown}) == 3
    counts = [len(read_video(comfy.server.run / "temp" / file["subfolder"] / file["filename"])) for file in shown]
    assert counts == [FRAMES, NEW, NEW]


@pytest.mark.parametrize("where", ["pipeline", "command line", "node"])
def test_latents_are_the_default(comfy: Client, where: str) -> None:
    if where == "node":
        _, options = comfy.object_info("LongCatVideoLong")["LongCatVideoLong"]["input"]["required"]["handover"]
        assert options["default"] == "latents"
    else:
        made = long_video_segments if where == "pipeline" else CliJob
        assert inspect.signature(made).parameters["handover"].default == "latents"


def test_progress_counts_all_segments(comfy: Client, c: Components) -> None:
    graph, node, _ = long_graph(seed=67, num_steps=3)
    result = comfy.run(graph.prompt)
    reports = [(value, total) for owner, value, total in result.progress if owner == node.id]
    values, totals = [value for value, _ in reports], {total for _, total in reports}
    assert len(totals) == 1
    assert values == list(range(1, int(totals.pop()) + 1))


def test_a_failed_job_leaves_no_empty_folder(comfy: Client, c: Components) -> None:
    graph, node, _ = long_graph(seed=68)
    one, two = (graphs.put_frames(comfy, graphs.noise_frames(n), f"few{n}") for n in (1, 2))
    graph.change(node, image=graph.images(one), video=graph.images(two))
    result = comfy.queue(graph.prompt)
    assert result.event == ERROR
    assert result.error_text == "start a long video from an image or from a clip, not both"
    assert work(comfy) == []


def test_refine_goes_on_too(comfy: Client, c: Components) -> None:
    name = graphs.put_frames(comfy, graphs.noise_frames(12), "windows")
    graph = LongCat()
    node = graph.refined(graph.images(name) or [], seed=SEED, window=7, overlap=2, refine_steps=8)
    out = graph.save_images(node[0])
    whole = graphs.frames(comfy, comfy.run(graph.prompt), out)
    graph.change(node, seed=SEED + 1)
    interrupt_after_a_segment(comfy, graph, node)
    (kept,) = segments(comfy)
    result = comfy.run(graph.prompt)
    assert work(comfy) == []
    assert kept.name == "segment_0000.safetensors"
    graph.change(node, seed=SEED + 2)
    comfy.run(graph.prompt)
    graph.change(node, seed=SEED + 1)
    comfy.free()
    assert_near(graphs.frames(comfy, result, out), graphs.frames(comfy, comfy.run(graph.prompt), out), 1)
    assert whole.shape[1:3] == (2 * HEIGHT, 2 * WIDTH) or whole.shape[1] > HEIGHT
