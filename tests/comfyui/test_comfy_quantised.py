"""Weights that stay quantised inside ComfyUI: values, memory, LoRAs, and layers that come when they are needed."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from test_gguf import flat_patch, matrices, write
from torch import Tensor

from lcv_core import open_checkpoint
from lcv_core.pipelines import Components, text_to_video
from lcv_core.weights.lora import load_lora
from lcv_core.weights.quantised import is_large
from lcv_core.weights.tensors import TensorSource

from . import graphs, reference
from .api import Client
from .graphs import FRAMES, HEIGHT, NEGATIVE, PROMPT, SEED, STEPS, WIDTH, Link, LongCat
from .reference import assert_differs, assert_near, normalised, seeded

NAMES = {"fp8_scaled": "fp8", "int8": "int8", "q8_0": "q8_0", "q5_k": "q5_k", "q4_k": "q4_k"}


@pytest.fixture(scope="module", autouse=True)
def c(comfy: Client) -> Components:
    return reference.components(graphs.tiny_checkpoint(comfy))


def with_dit(c: Components, dit: object) -> Components:
    return Components(dit=dit, vae=c.vae, text_encoder=c.text_encoder, flow_shift=c.flow_shift)  # type: ignore[arg-type]


def expected(c: Components, seed: int = SEED) -> Tensor:
    return text_to_video(
        c, text=PROMPT, negative_text=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_steps=STEPS,
        generator=seeded(seed), output="latents",
    )  # fmt: skip


def quantised(comfy: Client, c: Components, weights: str) -> Components:
    """The tiny checkpoint as `lcv_core` quantises it."""
    checkpoint = open_checkpoint(graphs.tiny_checkpoint(comfy))
    return with_dit(c, checkpoint.load_dit(dtype=torch.float32, weights=weights))  # type: ignore[arg-type]


def adapter(comfy: Client) -> str:
    source = graphs.tiny_checkpoint(comfy) / "lora" / "cfg_step_lora.safetensors"
    shutil.copy(source, graphs.model_file(comfy, "loras", "quantised.safetensors"))
    return "quantised.safetensors"


def adapted(graph: LongCat, model: Link, name: str, strength: float = 1.0) -> Link:
    return graph.add("LongCatVideoLoraLoader", model=model, lora_name=name, strength=strength)[0]


@pytest.mark.parametrize("weight_dtype", NAMES)
def test_each_form_is_what_the_library_makes(comfy: Client, c: Components, weight_dtype: str) -> None:
    graph = LongCat(weight_dtype=weight_dtype)
    node = graph.save(graph.sample(graph.latent()))
    found = normalised(c, comfy.latents(comfy.run(graph.prompt), node))
    assert_near(found, expected(quantised(comfy, c, NAMES[weight_dtype])), 1e-3)
    assert_differs(found, expected(c), 1e-3)


def test_a_quantised_file_stays_as_it_is_unless_told_otherwise(comfy: Client, c: Components) -> None:
    source = TensorSource.open(graphs.tiny_checkpoint(comfy) / "dit")
    path = graphs.model_file(comfy, "diffusion_models", "kept Q8_0.gguf")
    path.unlink(missing_ok=True)
    write(path, flat_patch({name: source.read(name) for name in source}), matrices("Q8_0"))
    weights, latents = {}, {}
    for weight_dtype in ("default", "fp32"):
        graph = LongCat(weight_dtype=weight_dtype)
        inputs = {"checkpoint": path.name, "weight_dtype": weight_dtype, "vae": "none", "text_encoder": "none"}
        model = graph.add("LongCatVideoLoader", **inputs)[0]
        sizes = {"width": 0, "height": 0, "num_frames": 0, "num_cond_frames": 0, "batch_size": 1, "sparsity": 0.0}
        plan = graph.add("LongCatVideoPlan", model=model, **sizes)
        node = graph.save(graph.sample(graph.latent(), model=model))
        result = comfy.run(graph.prompt)
        size = re.search(r"^sampling.*\(weights ([\d.]+) (kB|MB)", result.outputs[plan.id]["text"][0], re.MULTILINE)
        assert size
        weights[weight_dtype] = float(size[1]) * (1e3 if size[2] == "kB" else 1e6)
        latents[weight_dtype] = normalised(c, comfy.latents(result, node))
    large = sum(source.read(name).numel() for name in source if is_large(name))
    saved = weights["fp32"] - weights["default"]
    assert saved == pytest.approx(large * (4 - 34 / 32), abs=1e5)  # the report has one decimal
    file = with_dit(c, open_checkpoint(path).load_dit(dtype=torch.float32))
    assert_near(latents["default"], expected(file), 1e-3)
    assert_near(latents["fp32"], expected(file), 1e-3)


@pytest.mark.parametrize("weight_dtype", ["int8", "q4_k"])
def test_a_lora_is_not_rounded_with_the_weights(comfy: Client, c: Components, weight_dtype: str) -> None:
    """Whole, and layer by layer; the same MODEL without it is as before."""
    name = adapter(comfy)
    graph = LongCat(weight_dtype=weight_dtype)
    plain = graph.save(graph.sample(graph.latent()))
    weak = graph.save(graph.sample(graph.latent(), model=adapted(graph, graph.model, name, 0.1)))
    result = comfy.run(graph.prompt)
    own = quantised(comfy, c, NAMES[weight_dtype])
    assert_near(normalised(c, comfy.latents(result, plain)), expected(own), 1e-3)
    load_lora(own.dit, graphs.model_file(comfy, "loras", name), strength=0.1)
    wanted = expected(own)
    assert_near(normalised(c, comfy.latents(result, weak)), wanted, 1e-3)
    assert_differs(comfy.latents(result, weak), comfy.latents(result, plain), 5e-3)
    after = LongCat(weight_dtype=weight_dtype)
    node = after.save(after.sample(after.latent(), seed=SEED + 1))
    fresh = expected(quantised(comfy, c, NAMES[weight_dtype]), SEED + 1)
    assert_near(normalised(c, comfy.latents(comfy.run(after.prompt), node)), fresh, 1e-3)


def test_quantised_layers_that_come_one_by_one(comfy: Client, c: Components) -> None:
    name = adapter(comfy)
    graph = LongCat(weight_dtype="q8_0")
    short = graph.add("TestLittleMemory", model=adapted(graph, graph.model, name))[0]
    before = len(comfy.server.log())
    node = graph.save(graph.sample(graph.latent(), model=short))
    found = comfy.latents(comfy.run(graph.prompt), node)
    assert comfy.server.log()[before:].count("loaded partially") == 1
    own = quantised(comfy, c, "q8_0")
    load_lora(own.dit, graphs.model_file(comfy, "loras", name))
    assert_near(normalised(c, found), expected(own), 1e-3)
