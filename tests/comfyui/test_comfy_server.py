"""The ground the ComfyUI tests stand on: the server runs, and its client sees what happens in it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from .api import ERROR, INTERRUPTED, REJECTED, SUCCESS, Client, Prompt, wait_until
from .server import PACK, REPOSITORY, ComfyServer, Core, Options, ServerError


def steps_graph(steps: int = 3, seconds: float = 0.0, width: int = 32) -> Prompt:
    """An empty video latent through the test pack's node into a file."""
    size = {"width": width, "height": 48, "length": 9, "batch_size": 1}
    return {
        "1": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "2": {"class_type": "TestSteps", "inputs": {"latent": ["1", 0], "steps": steps, "seconds": seconds}},
        "3": {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "latents/steps"}},
    }


def test_it_is_the_checkout_that_was_asked_for(comfy: Client, comfy_core: Core) -> None:
    version = comfy.system_stats()["system"]["comfyui_version"]
    assert tuple(map(int, version.split("."))) == comfy_core.version
    assert comfy_core.version >= (0, 3, 64)


def test_the_pack_loads(comfy: Client) -> None:
    if not (REPOSITORY / "__init__.py").is_file():
        pytest.skip("the repository has no __init__.py: it is no node pack yet")
    failed = [line for line in comfy.server.log().splitlines() if "IMPORT FAILED" in line and PACK in line]
    assert not failed, comfy.server.log()
    ours = {name for name, info in comfy.object_info().items() if info["category"].startswith("LongCat-Video")}
    assert "LongCatVideoLoader" in ours


def test_a_stock_graph_runs_and_gives_its_latents(comfy: Client) -> None:
    result = comfy.run(steps_graph(steps=4))
    assert result.ran == ["1", "2", "3"]
    latents = comfy.latents(result, "3")
    assert latents.shape == (1, 16, 3, 6, 4)
    assert torch.equal(latents, torch.zeros_like(latents))
    assert result.progress == [("2", i, 4) for i in (1, 2, 3, 4)]
    assert result.previews == 4
    assert result.last_preview[:2] == b"\xff\xd8"  # JPEG
    record = comfy.history(result.prompt_id)
    assert record["status"]["status_str"] == "success"
    assert record["outputs"] == result.outputs


def test_only_what_changed_runs_again(comfy: Client) -> None:
    comfy.run(steps_graph(width=64))
    again = comfy.run(steps_graph(width=64, steps=5))
    assert (again.ran, again.cached) == (["2", "3"], ["1"])


def test_wrong_inputs_are_refused_by_node(comfy: Client) -> None:
    result = comfy.queue(steps_graph(steps=0), allow_node_errors=True)
    assert result.event == REJECTED
    assert list(result.node_errors) == ["2"]
    assert "smaller than min" in result.error_text
    with pytest.raises(AssertionError, match="smaller than min"):
        comfy.queue(steps_graph(steps=0))


def test_one_wrong_branch_of_two_is_not_overlooked(comfy: Client) -> None:
    graph = steps_graph() | {"4": {"class_type": "SaveLatent", "inputs": {"filename_prefix": "x"}}}
    assert list(comfy.queue(graph, allow_node_errors=True).node_errors) == ["4"]
    with pytest.raises(AssertionError, match="Required input is missing"):
        comfy.queue(graph)


def test_an_exception_is_one_sentence_and_the_server_lives(comfy: Client) -> None:
    result = comfy.queue(steps_graph(steps=13))
    assert (result.event, result.error_text) == (ERROR, "steps must not be 13; try 12")
    assert result.error["node_id"] == "2"
    with pytest.raises(AssertionError, match="must not be 13"):
        comfy.run(steps_graph(steps=13))
    assert comfy.run(steps_graph()).event == SUCCESS


def test_interrupt_stops_within_a_step(comfy: Client) -> None:
    job = comfy.submit(steps_graph(steps=600, seconds=60))
    job.wait_for("progress")
    comfy.interrupt()
    start = time.monotonic()
    result = job.result(timeout=10)
    assert result.event == INTERRUPTED
    assert len(result.progress) < 60  # a tenth of a second is a step; the rest is this machine's leisure
    assert time.monotonic() - start < 6
    assert "3" not in result.ran


def test_a_job_that_takes_too_long_is_given_up(comfy: Client) -> None:
    job = comfy.submit(steps_graph(steps=601, seconds=60))
    with pytest.raises(AssertionError, match="did not end in time"):
        job.result(timeout=1)
    comfy.interrupt()
    wait_until(comfy.idle, "the interrupted job")


def test_pictures_go_in_and_files_come_out(comfy: Client, tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (24, 16), (255, 0, 0)).save(picture)
    name = comfy.upload_image(picture)
    result = comfy.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "red"}},
        }
    )
    (file,) = result.outputs["2"]["images"]
    saved = comfy.server.run / "output" / file["filename"]
    assert comfy.view(file) == saved.read_bytes()
    with Image.open(saved) as image:
        assert (image.size, image.getpixel((3, 3))) == ((24, 16), (255, 0, 0))


def test_freeing_empties_the_cache(comfy: Client) -> None:
    comfy.run(steps_graph(width=96))
    comfy.free()
    # The flag is seen when the worker turns, which is soon, but says nothing when it has.
    wait_until(lambda: comfy.run(steps_graph(width=96)).cached == [], "an empty cache")
    assert comfy.rss() > 100 << 20


def test_a_server_that_dies_at_its_start_says_why(comfy_core: Core, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-flag"):
        ComfyServer(comfy_core, tmp_path, Options(arguments=("--no-such-flag",)))
