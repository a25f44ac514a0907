"""The memory planner node, and what the model answers when ComfyUI asks how much memory sampling takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lcv_core.planning import Sampling, kv_cache_bytes
from lcv_core.shapes import num_latents
from lcv_core.weights.checkpoint import open_checkpoint

from . import graphs
from .api import Client, Json
from .graphs import COND_FRAMES, FRAMES, HEIGHT, MINIATURE, WIDTH, LongCat, Node
from .server import ComfyServer, Core, Options

WATCHING = Path(__file__).with_name("packs") / "memory"
MINI = open_checkpoint("mini").dit_config
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
MOST = 1.4  # what is asked for over what is alive: a tenth for the allocator, and the loop beside a model this small
STAGES = ("text encode", "VAE encode", "sampling", "VAE decode", "refine VAE encode", "refine sampling")


@pytest.fixture(scope="module", autouse=True)
def _checkpoint(comfy: Client) -> None:
    graphs.tiny_checkpoint(comfy)


def planned(graph: LongCat, **changes: Json) -> Node:
    inputs = {"width": 0, "height": 0, "num_frames": 0, "num_cond_frames": 0, "batch_size": 1, "sparsity": 0.0}
    return graph.add("LongCatVideoPlan", **{"model": graph.model} | inputs | changes)


def report(comfy: Client, checkpoint: str = graphs.TINY, **changes: Json) -> str:
    graph = LongCat(checkpoint)
    node = planned(graph, **changes)
    (text,) = comfy.run(graph.prompt).outputs[node.id]["text"]
    return text


def needs(text: str) -> dict[str, float]:
    """Bytes by the beginning of the line."""
    found = re.findall(r"^([^:\n]+): ([\d.]+) (kB|MB|GB) \(", text, re.MULTILINE)
    return {name: float(number) * UNITS[unit] for name, number, unit in found}


def sampling(text: str) -> float:
    return next(need for name, need in needs(text).items() if name.startswith("sampling"))


def test_a_report_has_the_job_the_memory_every_stage_and_the_settings(comfy: Client) -> None:
    text = report(comfy)
    heading, stages, settings = text.split("\n\n")
    assert heading == f"{WIDTH} x {HEIGHT}, {FRAMES} frames: 3 latent frames, 3 x 2 x 3 tokens"
    assert re.match(r"system memory: [\d.]+ GB, [\d.]+ GB of it free for this job\n", stages)
    for name in STAGES:
        assert re.search(rf"^{name}.*: [\d.]+ [kMG]B \(weights .*, activations .*\), fits$", stages, re.MULTILINE), name
    assert settings.startswith("Settings:\nweight_dtype ")
    assert "weight_dtype fp8_e4m3fn: sampling" in settings


def test_given_frames_have_a_cache(comfy: Client) -> None:
    text = report(comfy)
    assert f"sampling from {COND_FRAMES} given frames" in text
    assert "sampling from text alone" in text
    size = kv_cache_bytes(MINI, (5, 4, 6), 4, 4) / 1e6
    assert f"KV cache {size:.1f} MB" in report(comfy, MINIATURE, num_cond_frames=13)
    assert "sampling from text alone" not in report(comfy, MINIATURE, num_cond_frames=13)


BIGGER: dict[str, dict[str, Json]] = {
    "frames": {"num_frames": FRAMES + 16},
    "size": {"width": 2 * WIDTH, "height": 2 * HEIGHT},
    "batch": {"batch_size": 4},
}


@pytest.mark.parametrize("name", BIGGER)
def test_a_bigger_job_needs_more(comfy: Client, name: str) -> None:
    assert sampling(report(comfy, **BIGGER[name])) > sampling(report(comfy))


def test_the_weights_are_those_of_the_model(comfy: Client) -> None:
    """fp8 matrices take a quarter of fp32's, and the report says what the model has now."""
    found = {}
    for dtype in ("fp32", "fp8_e4m3fn"):
        graph = LongCat(MINIATURE, weight_dtype=dtype)
        node = planned(graph)
        (text,) = comfy.run(graph.prompt).outputs[node.id]["text"]
        weights = re.search(r"^sampling.*\(weights ([\d.]+) MB", text, re.MULTILINE)
        assert weights and f"weight_dtype {dtype}: sampling" in text
        found[dtype] = float(weights[1])
    assert found["fp8_e4m3fn"] < 0.6 * found["fp32"]


def test_sparsity_is_the_nodes_or_the_models(comfy: Client) -> None:
    size = {"width": 4 * WIDTH, "height": 4 * HEIGHT, "num_frames": FRAMES + 16}
    graph = LongCat(MINIATURE)
    patch = {"sparsity": 0.5, "block": "4 x 4 x 4", "min_tokens": 0}
    sparse = graph.add("LongCatVideoSparseAttention", model=graph.model, **patch)
    nodes = planned(graph, **size), planned(graph, **size, sparsity=0.5), planned(graph, model=sparse[0], **size)
    outputs = comfy.run(graph.prompt).outputs
    dense, asked, patched = (sampling(outputs[node.id]["text"][0]) for node in nodes)
    assert dense < asked == patched


def test_a_size_that_is_none_is_refused(comfy: Client) -> None:
    graph = LongCat()
    planned(graph, num_frames=FRAMES, num_cond_frames=FRAMES)
    result = comfy.queue(graph.prompt, allow_node_errors=True)
    assert f"ask for at least {FRAMES + 4} frames" in result.error_text


@pytest.fixture(scope="module")
def watching(comfy_core: Core, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server of its own: with the attention of cards, which keeps no scores, and a node that watches memory."""
    options = Options(packs=(WATCHING,), arguments=("--use-pytorch-cross-attention",))
    server = ComfyServer(comfy_core, tmp_path_factory.mktemp("watching"), options)
    yield Client(server)
    server.stop()


@dataclass(frozen=True)
class Watched:
    """asked: (batch, bytes) of each time that ComfyUI asked the model. alive: bytes at the peak."""

    asked: list[tuple[int, float]]
    alive: int


def watched(client: Client, *, video: str | None = None, cached: bool = True, **changes: Json) -> Watched:
    graph = LongCat(MINIATURE)
    texts = {"positive": graph.positive, "negative": graph.negative}
    inputs = {"width": 160, "height": 96, "num_frames": 33, "num_cond_frames": 13, "video": graph.images(video)}
    latent = graph.latent(**inputs | changes)
    node = graph.add("TestWatched", model=graph.model, **texts, latent=latent, cached=cached)
    shown = client.run(graph.prompt).outputs[node.id]
    return Watched([(batch, need) for batch, need in shown["asked"]], shown["alive"][0])


def expected(num_frames: int, num_cond_frames: int, *, cached: bool = True) -> float:
    """Both branches in one forward, three copies of a weight, a tenth for the allocator, and the cache."""
    n_c = num_latents(num_cond_frames) if num_cond_frames else 0
    latents = (num_latents(num_frames), 12, 20)
    run = Sampling(
        latents, batch=2, num_cond_latents=n_c, cached=cached, itemsize=4, weight_copies=3, device="cpu"
    )  # fmt: skip
    return 1.1 * run.activations(MINI) + run.kv_cache(MINI)


def test_comfyui_is_told_what_sampling_takes(watching: Client) -> None:
    """First asked for both branches of guidance at once, which it then runs: never less than is alive."""
    found = watched(watching)
    batch, need = found.asked[0]
    assert batch == 2
    assert need == pytest.approx(expected(33, 0))
    assert found.alive <= need <= MOST * found.alive


def test_comfyui_is_told_of_the_kv_cache(watching: Client) -> None:
    """Before the run, when no forward has seen the condition frames; and no longer in the run after it."""
    video = graphs.put_frames(watching, graphs.noise_frames(13, height=96, width=160), "given")
    found = watched(watching, video=video)
    need = found.asked[0][1]
    assert need == pytest.approx(expected(33, 13))
    assert need > expected(17, 0) + kv_cache_bytes(MINI, (9, 6, 10), 4, 4)
    assert found.alive <= need <= MOST * found.alive
    assert watched(watching, num_frames=17).asked[0][1] == pytest.approx(expected(17, 0))


def test_without_a_cache_none_is_counted_or_kept(watching: Client) -> None:
    """As refinement samples."""
    video = graphs.put_frames(watching, graphs.noise_frames(13, height=96, width=160), "given")
    found = watched(watching, video=video, cached=False)
    need = found.asked[0][1]
    assert need == pytest.approx(expected(33, 13, cached=False))
    assert found.alive <= need <= MOST * found.alive
