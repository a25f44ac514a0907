"""The pack as people install it: copied, under any name, with and without pip, on machines that lack packages."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_gguf import flat_patch, matrices, write

from lcv_core import __version__
from lcv_core.pipelines import text_to_video
from lcv_core.weights.tensors import TensorSource

from . import graphs, reference
from .api import ERROR, Client
from .fixtures import PACKS
from .graphs import FRAMES, HEIGHT, NEGATIVE, PROMPT, SEED, STEPS, WIDTH, Graph, Link, LongCat
from .reference import assert_near, normalised, seeded
from .server import REPOSITORY, ComfyServer, Core, Options

# PyAV is not among them: ComfyUI itself does not start without.
OPTIONAL = ("triton", "ftfy", "gguf")
Start = Callable[[Options], Client]


@pytest.fixture(scope="module")
def start(comfy_core: Core, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A ComfyUI of its own, in a folder whose name has a space and no ASCII."""
    servers = []

    def client(options: Options) -> Client:
        server = ComfyServer(comfy_core, tmp_path_factory.mktemp("Комфи UI"), options)
        servers.append(server)
        return Client(server)

    yield client
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def bare(start: Start) -> Client:
    """Cloned, under a name that is no identifier, beside other packs, without what is optional."""
    name = "LongCat Video-nodes.v0.1 (copy)"
    return start(Options(packs=PACKS, name=name, link=False, without=OPTIONAL))


@pytest.fixture(scope="module")
def installed(start: Start) -> Client:
    """Copied, and installed by pip too; nothing has run yet when a test is the first to use it."""
    folders = (REPOSITORY, REPOSITORY / "lcv_bsa" / "src")
    return start(Options(packs=PACKS, name="longcat-video.nodes-0.1", link=False, installed=folders))


def ours(comfy: Client) -> set[str]:
    return {name for name, info in comfy.object_info().items() if info["category"].startswith("LongCat-Video")}


def modules(comfy: Client) -> dict[str, str]:
    return comfy.get("/tests/modules")


def makes_a_video(comfy: Client) -> None:
    """What lcv_core makes, decoded and saved by stock nodes."""
    c = reference.components(graphs.tiny_checkpoint(comfy))
    graph = LongCat()
    sampled = graph.sample(graph.latent())
    node = graph.save(sampled)
    images = graph.add("VAEDecode", samples=sampled, vae=graph.vae)[0]
    video = graph.add("CreateVideo", images=images, fps=15.0)[0]
    saved = graph.add("SaveVideo", video=video, filename_prefix="x", format="auto", codec="auto")
    result = comfy.run(graph.prompt)
    expected = text_to_video(
        c, text=PROMPT, negative_text=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_steps=STEPS,
        generator=seeded(SEED), output="latents",
    )  # fmt: skip
    assert_near(normalised(c, comfy.latents(result, node)), expected)
    assert result.outputs[saved.id]["images"]


def test_loading_the_pack_loads_nothing_heavy(installed: Client) -> None:
    """Before the first job. What ComfyUI loads itself is its own affair, so a plain interpreter loads ours too."""
    assert "LongCatVideoLoader" in ours(installed)
    loaded = [name for name in modules(installed) if name.partition(".")[0] in ("lcv_core", "lcv_bsa")]
    assert "lcv_core.dit.model" in loaded
    assert not {"lcv_bsa.backends.triton", "lcv_core.cli", "lcv_core.training"} & set(loaded)
    heavy = ("triton", "torch._inductor", "torch._dynamo", "transformers", "gguf", "ftfy")
    program = f"import sys, {', '.join(loaded)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_installed_package_is_the_one_that_is_used(installed: Client) -> None:
    loaded = modules(installed)
    assert Path(loaded["lcv_core"]) == REPOSITORY / "lcv_core" / "__init__.py"
    assert Path(loaded["lcv_bsa"]) == REPOSITORY / "lcv_bsa" / "src" / "lcv_bsa" / "__init__.py"
    nodes = [Path(file) for file in loaded.values() if file and Path(file).name == "sampler.py"]
    assert installed.server.pack / "comfy_nodes" / "sampler.py" in nodes
    makes_a_video(installed)


def test_a_copy_brings_its_own_packages(bare: Client, comfy: Client) -> None:
    assert ours(bare) == ours(comfy)
    assert "IMPORT FAILED: " + str(bare.server.pack) not in bare.server.log()
    loaded = modules(bare)
    assert Path(loaded["lcv_core"]) == bare.server.pack / "lcv_core" / "__init__.py"
    assert Path(loaded["lcv_bsa"]) == bare.server.pack / "lcv_bsa" / "src" / "lcv_bsa" / "__init__.py"
    makes_a_video(bare)
    assert set(OPTIONAL).isdisjoint(modules(bare))


def test_packs_live_side_by_side(bare: Client) -> None:
    assert {"TestSteps", "TestValue", "LongCatVideoLoader"} <= set(bare.object_info())
    graph = Graph()
    latent: Link = graph.add("EmptyHunyuanLatentVideo", width=48, height=32, length=9, batch_size=1)[0]
    graph.save(graph.add("TestSteps", latent=latent, steps=2, seconds=0.0)[0])
    bare.run(graph.prompt)


def test_the_front_end_gets_its_files(installed: Client) -> None:
    """Scripts, help, translations and workflows. (ComfyUI serves no files of a pack whose folder's name has spaces.)"""
    folder = installed.server.pack.name
    scripts = [path for path in installed.get("/extensions") if path.startswith(f"/extensions/{folder}/")]
    assert len(scripts) == len(list((REPOSITORY / "comfy_nodes" / "web").rglob("*.js"))) > 0
    for path in (*scripts, f"/extensions/{folder}/docs/LongCatVideoLoader.md"):
        with urllib.request.urlopen(installed.server.url + path, timeout=10) as answer:
            assert len(answer.read()) > 20
    assert installed.get("/i18n")["de"]["nodeDefs"]["LongCatVideoLoader"]
    assert "first_run" in installed.get("/workflow_templates")[folder]


def test_block_sparse_attention_without_triton(bare: Client) -> None:
    graph = LongCat()
    model = graph.add("LongCatVideoSparseAttention", model=graph.model, sparsity=0.75, block="4 x 4 x 4", min_tokens=0)[
        0
    ]
    latent = graph.latent(width=128, height=96, num_frames=17)
    ids = [graph.save(graph.sample(latent, model=m)) for m in (model, graph.model)]
    result = bare.run(graph.prompt)
    sparse, dense = (bare.latents(result, node) for node in ids)
    assert torch.isfinite(sparse).all() and (sparse - dense).abs().max() > 1e-2


def test_a_gguf_file_without_its_package(bare: Client) -> None:
    source = TensorSource.open(graphs.tiny_checkpoint(bare) / "dit")
    path = graphs.model_file(bare, "diffusion_models", "longcat.gguf")
    write(path, flat_patch({name: source.read(name) for name in source}), matrices("Q8_0"))
    graph = LongCat()
    inputs = {"checkpoint": path.name, "weight_dtype": "default", "vae": "none", "text_encoder": "none"}
    node = graph.add("LongCatVideoLoader", **inputs)
    graph.save(graph.sample(graph.latent(), model=node[0]))
    result = bare.queue(graph.prompt)
    assert (result.event, result.error["node_id"]) == (ERROR, node.id)
    assert "pip install" in result.error_text and "gguf" in result.error_text
    assert "\n" not in result.error_text


def test_a_prompt_that_ftfy_would_clean(bare: Client) -> None:
    graph = LongCat(prompt="a café, “quoted”")
    graph.save(graph.sample(graph.latent()))
    bare.run(graph.prompt)
    assert "pip install ftfy" in bare.server.log()


def test_another_lcv_core_is_told_not_used(start: Start, tmp_path: Path) -> None:
    """One process can have one of them. ComfyUI says why the nodes are not there, and goes on with all others."""
    init = tmp_path / "site" / "lcv_core" / "__init__.py"
    init.parent.mkdir(parents=True)
    init.write_text('__version__ = "0.0.1"\n', encoding="utf-8")
    comfy = start(Options(packs=PACKS, link=False, installed=(tmp_path / "site",)))
    assert ours(comfy) == set()
    assert "TestSteps" in comfy.object_info()
    said = f"{init} is not the lcv_core {__version__} of this node pack: remove it, or update both"
    assert said in comfy.server.log()
