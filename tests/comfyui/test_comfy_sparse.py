"""Block sparse attention as a model patch, on LongCat-Video and on another video model, and the node that measures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.denoise import Guidance, denoise
from lcv_core.pipelines import Components
from lcv_core.pipelines.base import Run, decode_latents, draw_noise, put_condition

from . import graphs, reference, wan
from .api import ERROR, Client, Json, Result
from .graphs import NEGATIVE, PROMPT, SEED, STEPS, Graph, Link, LongCat, Node
from .reference import assert_differs, assert_near, normalised, seeded
from .wan import Wan

EXACT = 1e-5
# 5 x 6 x 8 tokens: blocks of 4 x 4 x 4 that end at the grid's edge, and enough of them to leave some out.
WIDTH, HEIGHT, FRAMES = 128, 96, 17
TOKENS = 5 * 6 * 8
LATENT = (1, 16, 5, HEIGHT // 8, WIDTH // 8)
# Not 0, which is dense: the sparse code runs, and 1 - this is 1 in floating point, so every block is kept.
KEEP_ALL = 1e-17


@pytest.fixture(scope="module", autouse=True)
def c(comfy: Client) -> Components:
    for without in ("self_attn", "cross_attn"):
        wan.put_transformer(comfy, f"without {without}.safetensors", wan.transformer_state(without))
    wan.put_transformer(comfy)
    return reference.components(graphs.tiny_checkpoint(comfy))


def start(graph: LongCat, **changes: Json) -> Link:
    return graph.latent(width=WIDTH, height=HEIGHT, num_frames=FRAMES, **changes)


def sparse(graph: LongCat | Wan, model: Link | None = None, **changes: Json) -> Link:
    """A model made sparse by our node."""
    inputs = {"sparsity": 0.5, "block": "4 x 4 x 4", "min_tokens": 0}
    return graph.add("LongCatVideoSparseAttention", model=model or graph.model, **inputs | changes)[0]


def run(comfy: Client, graph: Graph, *latents: Link) -> list[Tensor]:
    """The latents of the branches of one graph."""
    ids = [graph.save(latent) for latent in latents]
    result = comfy.run(graph.prompt)
    return [comfy.latents(result, node) for node in ids]


def expected(c: Components, bsa: BSAConfig | None, cond: Tensor | None = None) -> Tensor:
    """What `lcv_core` alone gives, without guidance; cond: normalised condition latents."""
    assert c.text_encoder is not None
    run = Run.of(
        num_steps=STEPS, guidance_scale=4.0, schedule="base", cfg_scope="noise", cfg_mode="sequential",
        output="latents", on_step=None, progress=None,
    )  # fmt: skip
    x, n_c = draw_noise(LATENT, seeded(SEED)), 0
    if cond is not None:
        x, n_c = put_condition(x, cond), cond.shape[2]
    guidance = Guidance(4.0, c.text_encoder.encode([NEGATIVE]))
    sigmas = run.sigmas(c.flow_shift, uniform_tail=n_c > 1)
    return denoise(
        c.dit, x, sigmas, text=c.text_encoder.encode([PROMPT]), guidance=guidance, num_cond_latents=n_c, bsa=bsa
    )


@pytest.mark.parametrize(("block", "shape"), [("4 x 4 x 4", (4, 4, 4)), ("2 x 8 x 4", (2, 8, 4))])
def test_longcat_is_lcv_core(comfy: Client, c: Components, block: str, shape: tuple[int, int, int]) -> None:
    graph = LongCat()
    model = sparse(graph, sparsity=0.75, block=block)
    found, dense = run(comfy, graph, graph.sample(start(graph), model=model), graph.sample(start(graph)))
    bsa = BSAConfig(sparsity=0.75, block_q=shape, block_k=shape)
    assert_near(normalised(c, found), expected(c, bsa))
    assert_near(normalised(c, dense), expected(c, None))
    assert_differs(found, dense, 1e-2)


@pytest.mark.parametrize("count", [1, 2])
def test_longcat_with_condition_frames(comfy: Client, c: Components, count: int) -> None:
    """They come first, in a number that is no whole block: their own queries, the others' keys."""
    name = graphs.put_frames(comfy, graphs.noise_frames(5, height=HEIGHT, width=WIDTH), "condition")
    graph = LongCat()
    frames = graph.images(name)
    given = {"image": frames} if count == 1 else {"video": frames}
    begun = start(graph, **given)
    model = sparse(graph, sparsity=0.75)
    found, before, dense = run(comfy, graph, graph.sample(begun, model=model), begun, graph.sample(begun, seed=SEED))
    cond = normalised(c, before)[:, :, :count]
    bsa = BSAConfig(sparsity=0.75)
    assert_near(normalised(c, found), expected(c, bsa, cond))
    assert_near(normalised(c, found)[:, :, :count], cond, EXACT)
    assert_differs(found, dense, 1e-2)


def test_longcat_at_0_is_dense(comfy: Client) -> None:
    graph = LongCat()
    latent = start(graph)
    again = sparse(graph, sparse(graph, sparsity=0.75), sparsity=0.0)
    models = sparse(graph, sparsity=0.0), again, sparse(graph, sparsity=KEEP_ALL), graph.model
    zero, again, everything, dense = run(comfy, graph, *(graph.sample(latent, model=model) for model in models))
    assert torch.equal(zero, dense)
    assert torch.equal(again, dense)
    assert_near(everything, dense)


def test_wan_at_0_is_dense(comfy: Client) -> None:
    graph = Wan()
    latent = graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
    again = sparse(graph, sparse(graph, sparsity=0.75), sparsity=0.0)
    models = sparse(graph, sparsity=0.0), again, sparse(graph, sparsity=KEEP_ALL), graph.model
    zero, again, everything, dense = run(comfy, graph, *(graph.sample(latent, model=model) for model in models))
    assert torch.equal(zero, dense)
    assert torch.equal(again, dense)
    assert_near(everything, dense)


def test_wan_is_sparse_in_video_attention_alone(comfy: Client) -> None:
    """In a model whose self-attention adds nothing, nothing changes: text is attended to as before."""
    changes = {}
    for name in (wan.TRANSFORMER, "without cross_attn.safetensors", "without self_attn.safetensors"):
        graph = Wan(name)
        latent = graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
        first, second = graph.sample(latent, model=sparse(graph)), graph.sample(latent)
        other = graph.add("CLIPTextEncode", clip=graph.clip, text="a blue square stands still")[0]
        found, dense, elsewhere = run(comfy, graph, first, second, graph.sample(latent, positive=other))
        changes[name] = (found - dense).abs().max().item(), (elsewhere - dense).abs().max().item()
    assert changes[wan.TRANSFORMER][0] > 1e-2 and changes[wan.TRANSFORMER][1] > 1e-2
    assert changes["without cross_attn.safetensors"][0] > 1e-2
    assert changes["without cross_attn.safetensors"][1] == 0
    assert changes["without self_attn.safetensors"][0] == 0
    assert changes["without self_attn.safetensors"][1] > 1e-2


def test_wan_is_sparser_and_less_like_itself(comfy: Client) -> None:
    graph = Wan()
    latent = graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
    sparsities = 0.25, 0.5, 0.875
    models = graph.model, *(sparse(graph, sparsity=sparsity) for sparsity in sparsities)
    dense, *found = run(comfy, graph, *(graph.sample(latent, model=model) for model in models))
    errors = [(latents - dense).square().mean().item() for latents in found]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(("min_tokens", "is_sparse"), [(TOKENS, True), (TOKENS + 1, False), (4096, False)])
def test_short_sequences_of_wan_stay_dense(comfy: Client, min_tokens: int, is_sparse: bool) -> None:
    graph = Wan()
    latent = graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
    model = sparse(graph, min_tokens=min_tokens)
    found, dense = run(comfy, graph, graph.sample(latent, model=model), graph.sample(latent))
    assert torch.equal(found, dense) != is_sparse


def test_a_model_of_unknown_grid_is_refused(comfy: Client) -> None:
    wan.put_transformer(comfy, "image.safetensors", wan.image_transformer_state())
    graph = Wan("image.safetensors")
    node = sparse(graph)
    graph.save(graph.sample(graph.latent(width=64, height=64, length=1), model=node))
    result = comfy.queue(graph.prompt)
    assert (result.event, result.error["node_id"]) == (ERROR, node[0])
    assert result.error_text == (
        "the token grid of SD3 is not known; block sparse attention works with LongCat-Video, Wan and other video"
        " models whose transformer has a patch_size of three"
    )


@pytest.mark.parametrize("make", [LongCat, Wan])
def test_eight_bits_are_refused_on_a_cpu(comfy: Client, make: Callable[[], LongCat | Wan]) -> None:
    """At the node, before anything is sampled; the message says what to do."""
    graph = make()
    node = sparse(graph, eight_bits=True)
    latent = graph.latent(width=WIDTH, height=HEIGHT, **{"num_frames" if make is LongCat else "length": FRAMES})
    graph.save(graph.sample(latent, model=node))
    result = comfy.queue(graph.prompt)
    assert (result.event, result.error["node_id"]) == (ERROR, node[0])
    assert result.error_text.startswith("block sparse attention in eight bits is not usable on cpu")
    assert result.error_text.endswith("leave it in 16 bits")


@pytest.mark.parametrize("make", [LongCat, Wan])
def test_branches_do_not_see_each_other(comfy: Client, make: Callable[[], LongCat | Wan]) -> None:
    """Sampled in turn in one graph, each is what it is alone, in a graph of its own."""
    sparsities = 0.0, 0.5, 0.875

    def branch(graph: LongCat | Wan, sparsity: float, seed: int) -> Link:
        model = sparse(graph, sparsity=sparsity)
        if isinstance(graph, Wan):
            latent = graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
            return graph.sample(latent, model=model, seed=seed)
        return graph.sample(start(graph), model=model, seed=seed, guidance_scale=1.0)

    graph = make()
    jobs = [(sparsity, SEED + i // 3) for i, sparsity in enumerate((*sparsities, *reversed(sparsities)))]
    together = run(comfy, graph, *(branch(graph, *job) for job in jobs))
    for job, found in zip(jobs, together, strict=True):
        alone = make()
        assert_near(found, run(comfy, alone, branch(alone, *job))[0], EXACT)
    assert_differs(together[0], together[1])
    assert_differs(together[1], together[2])


@pytest.mark.parametrize("make", [LongCat, Wan])
def test_with_a_lora(comfy: Client, make: Callable[[], LongCat | Wan]) -> None:
    """In either order: the same, and neither without the other."""
    graph = make()
    ours = isinstance(graph, LongCat)
    module, width = ("attn.proj", 64) if ours else ("self_attn.o", wan.DIM)
    g = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, width, generator=g) / width**0.5, torch.randn(width, 4, generator=g)
    key = f"diffusion_model.blocks.1.{module}"
    path = graphs.model_file(comfy, "loras", f"for {make.__name__}.safetensors")
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)

    def lora(model: Link) -> Link:
        kind, strength = ("LongCatVideoLoraLoader", "strength") if ours else ("LoraLoaderModelOnly", "strength_model")
        return graph.add(kind, model=model, lora_name=path.name, **{strength: 1.0})[0]

    latent = start(graph) if ours else graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
    models = lora(sparse(graph)), sparse(graph, lora(graph.model)), sparse(graph), lora(graph.model)
    first, second, without, dense = run(comfy, graph, *(graph.sample(latent, model=model) for model in models))
    assert_near(first, second, EXACT)
    assert_differs(first, without, 1e-2)
    assert_differs(first, dense)


def report(graph: LongCat | Wan, latent: Link, **changes: Json) -> Node:
    inputs = {
        "model": graph.model, "positive": graph.positive, "sparsity": 0.75, "block": "4 x 4 x 4", "min_tokens": 0,
        "num_steps": STEPS, "guidance_scale": 1.0, "seed": SEED,
    }  # fmt: skip
    return graph.add("LongCatVideoSparseReport", latent=latent, **inputs | changes)


TIMES = re.compile(r"dense (\d+\.\d\d) s, sparse (\d+\.\d\d) s: (\d+\.\d\d)x (faster|slower)")


def read(result: Result, node: Node, what: str) -> float:
    """The PSNR that the node shows, in decibels, under two times that go with their ratio."""
    (shown,) = result.outputs[node.id]["text"]
    times, quality = shown.splitlines()
    match = TIMES.fullmatch(times)
    assert match, times
    dense, sparse, ratio = (float(match[i]) for i in (1, 2, 3))
    assert 0 < dense < 60 and 0 < sparse < 60 and ratio >= 1
    if dense != sparse:
        assert (match[4] == "faster") == (dense > sparse)
    told = quality.removeprefix(f"PSNR of the {what} against dense, same seed: ")
    assert told != quality, quality
    return math.inf if told == "identical" else float(told.removesuffix(" dB"))


def psnr(dense: Tensor, sparse: Tensor) -> float:
    span = (dense.max() - dense.min()).item()
    return 10 * math.log10(span**2 / (dense - sparse).double().square().mean().item())


def test_the_report_on_longcat(comfy: Client) -> None:
    graph = LongCat()
    latent = start(graph)
    node = report(graph, latent, guidance_scale=4.0, negative=graph.negative)
    ids = [graph.save(node[i]) for i in (1, 2)]
    plain = graph.save(graph.sample(latent))
    patched = graph.save(graph.sample(latent, model=sparse(graph, sparsity=0.75)))
    result = comfy.run(graph.prompt)
    dense, sparsely = (comfy.latents(result, i) for i in ids)
    assert_near(dense, comfy.latents(result, plain), EXACT)
    assert_near(sparsely, comfy.latents(result, patched), EXACT)
    assert abs(read(result, node, "latents") - psnr(dense, sparsely)) < 0.06
    progress = [(value, total) for owner, value, total in result.progress if owner == node.id]
    assert progress[-1] == (2 * STEPS + 2, 2 * STEPS + 2)
    assert sorted(progress) == progress


def test_the_report_on_wan(comfy: Client) -> None:
    graph = Wan()
    latent = graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
    node = report(graph, latent)
    ids = [graph.save(node[i]) for i in (1, 2)]
    plain = graph.save(graph.sample(latent))
    patched = graph.save(graph.sample(latent, model=sparse(graph, sparsity=0.75)))
    result = comfy.run(graph.prompt)
    dense, sparsely = (comfy.latents(result, i) for i in ids)
    assert_near(dense, comfy.latents(result, plain), EXACT)
    assert_near(sparsely, comfy.latents(result, patched), EXACT)
    assert abs(read(result, node, "latents") - psnr(dense, sparsely)) < 0.06


def test_the_report_with_frames_and_condition(comfy: Client, c: Components) -> None:
    """With a VAE the frames are compared; condition frames are the same in both."""
    name = graphs.put_frames(comfy, graphs.noise_frames(5, height=HEIGHT, width=WIDTH), "condition")
    graph = LongCat()
    latent = start(graph, video=graph.images(name))
    node = report(graph, latent, vae=graph.vae)
    ids = [graph.save(link) for link in (latent, node[1], node[2])]
    result = comfy.run(graph.prompt)
    before, dense, sparsely = (comfy.latents(result, i) for i in ids)
    assert_near(dense[:, :, :2], before[:, :, :2], EXACT)
    assert_near(sparsely[:, :, :2], before[:, :, :2], EXACT)
    frames = [decode_latents(c, normalised(c, latents)).double() for latents in (dense, sparsely)]
    error = (frames[0] - frames[1]).square().mean().item()
    assert error > 0
    assert abs(read(result, node, "frames") + 10 * math.log10(error)) < 0.06


@pytest.mark.parametrize("make", [LongCat, Wan])
def test_the_report_of_nothing_left_out(comfy: Client, make: Callable[[], LongCat | Wan]) -> None:
    graph = make()
    latent = start(graph) if isinstance(graph, LongCat) else graph.latent(width=WIDTH, height=HEIGHT, length=FRAMES)
    node = report(graph, latent, sparsity=0.0)
    ids = [graph.save(node[i]) for i in (1, 2)]
    result = comfy.run(graph.prompt)
    assert read(result, node, "latents") == math.inf
    assert torch.equal(*(comfy.latents(result, i) for i in ids))
