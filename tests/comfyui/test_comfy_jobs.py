"""Queues: what is cached and what is not, several models, interrupts, memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lcv_core.miniature import miniature
from lcv_core.pipelines import Components, text_to_video

from . import graphs, reference
from .api import ERROR, INTERRUPTED, SUCCESS, Client, Result, wait_until
from .graphs import FRAMES, HEIGHT, MINIATURE, NEGATIVE, PROMPT, STEPS, WIDTH, LongCat
from .reference import assert_differs, assert_near, normalised, seeded

MANY_STEPS = 400


@pytest.fixture(scope="module", autouse=True)
def c(comfy: Client) -> Components:
    comfy.free()  # other files have run the same graphs
    return reference.components(graphs.tiny_checkpoint(comfy))


@pytest.fixture
def seeds() -> Iterator[int]:
    """Seeds that no test has used: their jobs are not cached."""
    return iter(range(torch.seed() % 10**9, 10**10))


def types_run(graph: LongCat, result: Result) -> list[str]:
    """The class types of the nodes that ran."""
    return [graph.prompt[node]["class_type"] for node in result.ran]


def expected_latents(c: Components, seed: int, prompt: str = PROMPT) -> torch.Tensor:
    return text_to_video(
        c, text=prompt, negative_text=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_steps=STEPS,
        generator=seeded(seed), output="latents",
    )  # fmt: skip


def test_two_models_in_one_graph(comfy: Client, c: Components) -> None:
    """Sampled in turn: neither sees the other's prompts, weights or latent statistics."""
    graph, seed = LongCat(), 31
    other = graph.add(
        "LongCatVideoLoader", checkpoint=MINIATURE, weight_dtype="default", vae="auto", text_encoder="auto"
    )
    texts = [graph.add("LongCatVideoTextEncode", clip=other[1], text=text)[0] for text in (PROMPT, NEGATIVE)]
    latent = graph.latent()
    theirs = {"model": other[0], "positive": texts[0], "negative": texts[1]}
    ids = [
        graph.save(graph.sample(latent, seed=seed)),
        graph.save(graph.sample(latent, seed=seed, **theirs)),
        graph.save(graph.sample(latent, seed=seed + 1)),
        graph.save(graph.sample(latent, seed=seed + 1, **theirs)),
    ]
    result = comfy.run(graph.prompt)
    mini = reference.components(miniature())
    for node, components, own in zip(ids, (c, mini, c, mini), (seed, seed, seed + 1, seed + 1), strict=True):
        found = normalised(components, comfy.latents(result, node))
        assert_near(found, expected_latents(components, own))


def test_the_other_models_conditioning_is_refused(comfy: Client, c: Components) -> None:
    graph = LongCat()
    other = graph.add(
        "LongCatVideoLoader", checkpoint=MINIATURE, weight_dtype="default", vae="auto", text_encoder="auto"
    )
    graph.save(graph.sample(graph.latent(), model=other[0]))
    result = comfy.queue(graph.prompt)
    assert result.event == ERROR
    assert "encode the prompt with the CLIP of the same checkpoint" in result.error_text


def test_a_new_prompt_runs_the_text_and_what_follows(comfy: Client, c: Components) -> None:
    graph = LongCat()
    node = graph.save(graph.sample(graph.latent(), seed=40))
    comfy.run(graph.prompt)
    (positive, _) = graph.positive
    graph.prompt[positive]["inputs"]["text"] = "a green cube turns"
    result = comfy.run(graph.prompt)
    assert types_run(graph, result) == ["LongCatVideoTextEncode", "LongCatVideoSampler", "SaveLatent"]
    assert_near(normalised(c, comfy.latents(result, node)), expected_latents(c, 40, "a green cube turns"))
    assert comfy.run(graph.prompt).ran == []


def test_a_new_strength_runs_the_adapter_and_what_follows(comfy: Client, c: Components) -> None:
    path = graphs.model_file(comfy, "loras", "jobs.safetensors")
    path.write_bytes((graphs.tiny_checkpoint(comfy) / "lora" / "cfg_step_lora.safetensors").read_bytes())
    graph = LongCat()
    lora = graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name=path.name, strength=1.0)
    node = graph.save(graph.sample(graph.latent(), seed=41, model=lora[0]))
    full = comfy.latents(comfy.run(graph.prompt), node)
    graph.change(lora, strength=0.0)
    result = comfy.run(graph.prompt)
    assert types_run(graph, result) == ["LongCatVideoLoraLoader", "LongCatVideoSampler", "SaveLatent"]
    without = comfy.latents(result, node)
    assert_near(normalised(c, without), expected_latents(c, 41))
    assert_differs(full, without)
    graph.change(lora, strength=1.0)
    assert_near(comfy.latents(comfy.run(graph.prompt), node), full, 1e-5)


def test_a_new_seed_runs_the_sampler_alone(comfy: Client, c: Components) -> None:
    graph = LongCat()
    sampler = graph.sample(graph.latent(), seed=42)
    node = graph.save(sampler)
    comfy.run(graph.prompt)
    graph.prompt[sampler[0]]["inputs"]["seed"] = 43
    result = comfy.run(graph.prompt)
    assert types_run(graph, result) == ["LongCatVideoSampler", "SaveLatent"]
    assert_near(normalised(c, comfy.latents(result, node)), expected_latents(c, 43))


def test_inputs_are_left_as_they_were(comfy: Client, c: Components) -> None:
    """The cached latent, conditioning and model are the same after every kind of job on them."""
    name = graphs.put_frames(comfy, graphs.noise_frames(9), "kept")
    graph = LongCat()
    frames = graph.images(name)
    assert frames is not None
    start = graph.latent(video=frames, num_frames=FRAMES + 4)
    before, first = graph.save(start), graph.save(graph.sample(start, seed=44))
    known = comfy.run(graph.prompt)
    busy = LongCat()
    busy.prompt = dict(graph.prompt)
    busy.save(busy.sample(start, seed=44, schedule="distilled"))
    busy.save_images(busy.refined(frames, seed=44, sparsity=0.5)[0])
    busy.save_images(busy.continued(video=frames, seed=44)[0])
    comfy.run(busy.prompt)
    # Other nodes for the same values, so that they are computed again, from what is cached.
    again = graph.save(graph.sample(start, seed=44, sigmas=graph.sigmas(schedule="base with tail")))
    latent = graph.save(graph.add("LatentBatch", samples1=start, samples2=start)[0])
    result = comfy.run(graph.prompt)
    assert start[0] in result.cached
    assert_near(comfy.latents(result, again), comfy.latents(known, first), 1e-5)
    assert_near(comfy.latents(result, latent)[:1, :, :2], comfy.latents(known, before)[:, :, :2], 1e-6)


def interrupted(comfy: Client, graph: LongCat) -> Result:
    """Queue, interrupt at the first report of progress, and wait for the end."""
    job = comfy.submit(graph.prompt)
    job.wait_for("progress")
    comfy.interrupt()
    seen = len(job.result_so_far.progress)
    result = job.result(timeout=60)
    assert result.event == INTERRUPTED
    # What was on its way when the request came counts too; a tenth of the job would not.
    assert len(result.progress) - seen <= MANY_STEPS // 10
    return result


@pytest.mark.parametrize("node", ["LongCatVideoSampler", "SamplerCustomAdvanced", "LongCatVideoContinue"])
def test_interrupt(comfy: Client, c: Components, seeds: Iterator[int], node: str) -> None:
    graph, seed = LongCat(), next(seeds)
    if node == "LongCatVideoSampler":
        graph.save(graph.sample(graph.latent(), seed=seed, num_steps=MANY_STEPS))
    elif node == "LongCatVideoContinue":
        latent = graph.sample(graph.latent(), seed=seed)
        graph.save(graph.continued(latent=latent, seed=seed, num_steps=MANY_STEPS)[2])
    else:
        graph.save(graph.sample_custom(graph.guider(), graph.sigmas(num_steps=MANY_STEPS + seed % 7), graph.latent()))
    interrupted(comfy, graph)
    good = LongCat()
    saved = good.save(good.sample(good.latent(), seed=seed))
    assert_near(normalised(c, comfy.latents(comfy.run(good.prompt), saved)), expected_latents(c, seed))


def test_interrupt_stops_within_a_step(comfy: Client, c: Components, seeds: Iterator[int]) -> None:
    """With steps long enough to tell one from the next."""
    graph = LongCat(MINIATURE)
    size = {"width": 320, "height": 192, "num_frames": 33}
    graph.save(graph.sample(graph.latent(**size), seed=next(seeds), num_steps=50))
    job = comfy.submit(graph.prompt)
    job.wait_for("progress")
    comfy.interrupt()
    seen = len(job.result_so_far.progress)
    result = job.result(timeout=60)
    assert result.event == INTERRUPTED
    assert len(result.progress) - seen <= 1


def test_ten_jobs_leak_nothing(comfy: Client, c: Components, seeds: Iterator[int]) -> None:
    frames = graphs.put_frames(comfy, graphs.noise_frames(9), "leak")
    used = []
    for seed, _ in zip(seeds, range(10), strict=False):
        graph = LongCat()
        images = graph.images(frames)
        graph.save(graph.sample(graph.latent(image=images), seed=seed, schedule="distilled"))
        graph.save(graph.continued(video=images, seed=seed)[2])
        comfy.run(graph.prompt)
        used.append(comfy.rss())
    assert used[9] - used[2] < 30 << 20, [size >> 20 for size in used]


def test_freed_models_are_loaded_again(comfy: Client, c: Components) -> None:
    graph = LongCat()
    node = graph.save(graph.sample(graph.latent(), seed=50))
    comfy.run(graph.prompt)
    assert comfy.run(graph.prompt).ran == []
    comfy.free()
    wait_until(comfy.idle, "an empty queue")
    results = []

    def all_ran() -> bool:
        results.append(comfy.run(graph.prompt))
        return "LongCatVideoLoader" in types_run(graph, results[-1])

    wait_until(all_ran, "an empty cache")
    assert_near(normalised(c, comfy.latents(results[-1], node)), expected_latents(c, 50))


def test_progress_and_previews(comfy: Client, c: Components, seeds: Iterator[int]) -> None:
    graph = LongCat()
    sampler = graph.sample(graph.latent(), seed=next(seeds), num_steps=5)
    graph.save(sampler)
    result = comfy.run(graph.prompt)
    assert result.event == SUCCESS
    steps = [(value, total) for node, value, total in result.progress if node == sampler[0]]
    assert steps == [(i, 5) for i in range(1, 6)]
    assert result.previews == 5
