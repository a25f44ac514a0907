"""Results carry their workflow: dropped on the graph it is there again, and queued again it makes the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui.api import Client, wait_until
from PIL import Image
from playwright.sync_api import Page
from torch import Tensor

from lcv_core.video_io import read_video

from .browser import (
    REPOSITORY,
    alerts,
    console_errors,
    forget,
    graph_to_prompt,
    load_file,
    load_workflow,
    missing_nodes,
    red_nodes,
    saved_workflow,
)

Json = Any
# Fewer steps than the shipped one, so that it takes a second.
SMALL = {"LongCatVideoSampler": {"num_steps": 4}}
CHANGE = """(changes) => {
  for (const node of app.canvas.graph._nodes) {
    for (const [name, value] of Object.entries(changes[node.type] ?? {})) {
      node.widgets.find((one) => one.name === name).value = value;
    }
  }
}"""
ADD_PNG = """() => {
  const { graph } = app.canvas;
  const node = LiteGraph.createNode("SaveImage");
  node.pos = [1400, 900];
  graph.add(node);
  graph._nodes.find((one) => one.type === "VAEDecode").connect(0, node, 0);
}"""


@pytest.fixture
def small_first_run(page: Page) -> Page:
    load_workflow(page, json.loads((REPOSITORY / "workflows" / "first_run.json").read_text(encoding="utf-8")))
    page.evaluate(CHANGE, SMALL)
    page.evaluate(ADD_PNG)
    return page


def queue(page: Page, comfy: Client) -> dict[str, Json]:
    """Press Run; what each node put out, after nothing was kept from the run before."""
    comfy.free()
    before = set(comfy.get("/history"))
    page.evaluate("() => app.queuePrompt(0, 1)")
    wait_until(lambda: bool(set(comfy.get("/history")) - before), "the job", timeout=120)
    (new,) = set(comfy.get("/history")) - before
    record = comfy.history(new)
    assert record["status"]["status_str"] == "success"
    cached = [data["nodes"] for name, data in record["status"]["messages"] if name == "execution_cached"]
    assert cached == [[]]
    return {node["class_type"]: record["outputs"].get(key, {}) for key, node in record["prompt"][2].items()}


def video(comfy: Client, outputs: dict[str, Json], folder: Path) -> tuple[bytes, Tensor]:
    """The saved video: the file, and its frames."""
    (file,) = outputs["SaveVideo"]["images"]
    content = comfy.view(file)
    path = folder / file["filename"]
    path.write_bytes(content)
    return content, read_video(path)


def pictures(comfy: Client, outputs: dict[str, Json]) -> tuple[bytes, Tensor]:
    """The saved pictures: the first file, and all as frames."""
    files = [comfy.view(file) for file in outputs["SaveImage"]["images"]]
    return files[0], torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]))


def test_a_result_brings_its_workflow_back(small_first_run: Page, comfy: Client, tmp_path: Path) -> None:
    page = small_first_run
    workflow, prompt = saved_workflow(page), graph_to_prompt(page)
    first = queue(page, comfy)
    mp4, frames = video(comfy, first, tmp_path)
    png, images = pictures(comfy, first)
    assert frames.shape[1:] == (64, 96, 3) and len(frames) == len(images) == 17
    assert images.float().std() > 1
    for name, content in (("result.mp4", mp4), ("result.png", png)):
        forget(page)
        load_file(page, name, content)
        assert (missing_nodes(page), red_nodes(page), alerts(page), console_errors(page)) == ([], [], [], [])
        assert graph_to_prompt(page) == prompt
        assert essence(saved_workflow(page)) == essence(workflow)
    again = queue(page, comfy)
    assert torch.equal(pictures(comfy, again)[1], images)
    # SaveVideo leaves x264's macroblock tree on, whose result is not always the same (lcv_core/video_io/write.py).
    other = video(comfy, again, tmp_path)[1]
    assert other.shape == frames.shape and (other.float() - frames.float()).abs().mean() < 1


def essence(workflow: Json) -> Json:
    """What a user sees of it: nodes with their values and places, links, groups."""
    kept = ("id", "type", "pos", "size", "mode", "title", "widgets_values")
    nodes = {str(node["id"]): {name: node.get(name) for name in kept} for node in workflow["nodes"]}
    return nodes, sorted(workflow["links"]), [group["title"] for group in workflow["groups"]]
