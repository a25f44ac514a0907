"""ComfyUI's own nodes work with what the loader gives, and agree with ours where they compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcv_core.pipelines import Components
from lcv_core.pipelines.base import decode_latents
from lcv_core.video_io import read_metadata, read_video

from . import graphs, reference
from .api import Client
from .graphs import FRAMES, HEIGHT, NEGATIVE, PROMPT, SEED, STEPS, WIDTH, Link, LongCat
from .reference import assert_differs, assert_near, normalised

EXACT = 1e-5
RANK, FFN = 4, 256  # of the adapters here; the tiny model's feed-forward width


@pytest.fixture(scope="module", autouse=True)
def c(comfy: Client) -> Components:
    return reference.components(graphs.tiny_checkpoint(comfy))


@pytest.fixture(scope="module")
def picture(comfy: Client) -> str:
    return graphs.put_frames(comfy, graphs.noise_frames(1), "stock")


def pair(comfy: Client, graph: LongCat, first: Link, second: Link) -> tuple[Tensor, Tensor]:
    """The latents of two branches of one graph."""
    ids = graph.save(first), graph.save(second)
    result = comfy.run(graph.prompt)
    return comfy.latents(result, ids[0]), comfy.latents(result, ids[1])


@pytest.mark.parametrize("schedule", ["base", "distilled"])
@pytest.mark.parametrize("condition", [False, True])
def test_custom_sampling_is_the_all_in_one(comfy: Client, picture: str, schedule: str, condition: bool) -> None:
    """The distilled schedule with guidance 1, the adapter put on by hand."""
    graph = LongCat()
    start = graph.latent(image=graph.images(picture if condition else None))
    model, scale = graph.model, 4.0
    if schedule == "distilled":
        model, scale = with_lora(comfy, graph, "distill.safetensors", official(comfy)), 1.0
    guider = graph.guider(model, guidance_scale=scale)
    custom = graph.sample_custom(guider, graph.sigmas(model, schedule=schedule), start)
    found, expected = pair(comfy, graph, custom, graph.sample(start, schedule=schedule))
    assert_near(found, expected, EXACT)


def k_sampler(graph: LongCat, latent: Link, *, model: Link | None = None, **changes: object) -> Link:
    inputs = {
        "seed": SEED, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "positive": graph.positive, "negative": graph.negative,
    }  # fmt: skip
    return graph.add("KSampler", model=model or graph.model, latent_image=latent, **inputs | changes)[0]


def basic_sigmas(graph: LongCat, model: Link | None = None, steps: int = STEPS) -> Link:
    inputs = {"scheduler": "simple", "steps": steps, "denoise": 1.0}
    return graph.add("BasicScheduler", model=model or graph.model, **inputs)[0]


@pytest.mark.parametrize("condition", [False, True])
def test_k_sampler_is_the_all_in_one_without_guidance(comfy: Client, picture: str, condition: bool) -> None:
    graph = LongCat()
    start = graph.latent(image=graph.images(picture if condition else None))
    ours = graph.sample(start, sigmas=basic_sigmas(graph), guidance_scale=1.0)
    assert_near(*pair(comfy, graph, k_sampler(graph, start), ours), EXACT)


def test_stock_guiders_are_ours_without_guidance(comfy: Client, picture: str) -> None:
    graph = LongCat()
    start, sigmas = graph.latent(image=graph.images(picture)), graph.sigmas()
    texts = {"positive": graph.positive, "negative": graph.negative}
    cfg = graph.add("CFGGuider", model=graph.model, cfg=1.0, **texts)[0]
    basic = graph.add("BasicGuider", model=graph.model, conditioning=graph.positive)[0]
    guiders = cfg, basic, graph.guider(guidance_scale=1.0)
    ids = [graph.save(graph.sample_custom(guider, sigmas, start)) for guider in guiders]
    result = comfy.run(graph.prompt)
    first, second, ours = (comfy.latents(result, node) for node in ids)
    assert_near(first, ours, EXACT)
    assert_near(second, ours, EXACT)


def test_cfg_zero_is_not_stock_guidance(comfy: Client) -> None:
    """Otherwise our guider would not be needed."""
    graph = LongCat()
    start, sigmas = graph.latent(), graph.sigmas()
    texts = {"positive": graph.positive, "negative": graph.negative}
    cfg = graph.add("CFGGuider", model=graph.model, cfg=4.0, **texts)[0]
    stock = graph.sample_custom(cfg, sigmas, start)
    assert_differs(*pair(comfy, graph, stock, graph.sample_custom(graph.guider(), sigmas, start)))


@pytest.mark.parametrize("prompt", [PROMPT, "一只红色的球向左移动"])
def test_stock_text_encode_is_ours_for_plain_prompts(comfy: Client, prompt: str) -> None:
    graph = LongCat()
    start = graph.latent()
    stock = graph.add("CLIPTextEncode", clip=graph.clip, text=prompt)[0]
    ours = graph.sample(start, positive=graph.encode(prompt))
    found, expected = pair(comfy, graph, graph.sample(start, positive=stock), ours)
    assert_near(found, expected, EXACT)


def test_our_text_encode_takes_parentheses_for_words(comfy: Client, c: Components) -> None:
    """Stock encoding reads (ball:1.3) as a weight; the model was trained without."""
    graph = LongCat()
    start, prompt = graph.latent(), "a (red ball:1.3) moves ((left))"
    stock = graph.add("CLIPTextEncode", clip=graph.clip, text=prompt)[0]
    ours = graph.sample(start, positive=graph.encode(prompt))
    found, other = pair(comfy, graph, ours, graph.sample(start, positive=stock))
    assert_differs(found, other, 1e-4)


def test_vae_decode_and_encode(comfy: Client, c: Components) -> None:
    graph = LongCat()
    sampled = graph.sample(graph.latent(width=96, height=64))
    decoded = graph.add("VAEDecode", samples=sampled, vae=graph.vae)[0]
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    tiled = graph.add("VAEDecodeTiled", samples=sampled, vae=graph.vae, **tiles)[0]
    ids = graph.save(sampled), graph.save_images(decoded), graph.save_images(tiled)
    encoded = graph.save(graph.add("VAEEncode", pixels=decoded, vae=graph.vae)[0])
    result = comfy.run(graph.prompt)
    expected = decode_latents(c, normalised(c, comfy.latents(result, ids[0])))[0]
    whole = graphs.frames(comfy, result, ids[1])
    assert_near(whole, (expected * 255).to(torch.uint8), 1)
    # Tiles see no neighbours: the mean is what can be held to.
    assert (graphs.frames(comfy, result, ids[2]).float() - whole.float()).abs().mean() < 16
    mean, _ = c.need_vae().encode((expected * 2 - 1).permute(3, 0, 1, 2)[None])
    assert_near(comfy.latents(result, encoded), mean)


def test_a_shift_changes_the_schedule(comfy: Client) -> None:
    graph = LongCat()
    start = graph.latent()
    shifted = graph.add("ModelSamplingSD3", model=graph.model, shift=3.0)[0]
    guider = graph.guider()
    by_scheduler = graph.sample_custom(guider, graph.sigmas(shifted), start)
    by_model, plain = graph.sample(start, model=shifted), graph.sample(start)
    ids = [graph.save(latent) for latent in (by_scheduler, by_model, plain)]
    result = comfy.run(graph.prompt)
    by_scheduler, by_model, plain = (comfy.latents(result, node) for node in ids)
    assert_near(by_scheduler, by_model, EXACT)
    assert_differs(by_scheduler, plain)


def official(comfy: Client) -> Path:
    """The distillation adapter of the tiny checkpoint, in the official dialect."""
    return graphs.tiny_checkpoint(comfy) / "lora" / "cfg_step_lora.safetensors"


def with_lora(comfy: Client, graph: LongCat, name: str, source: Path) -> Link:
    """A model with an adapter file, put into models/loras and loaded by our loader."""
    path = graphs.model_file(comfy, "loras", name)
    if not path.exists():
        path.write_bytes(source.read_bytes())
    return graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name=name, strength=1.0)[0]


def adapter(dialect: str) -> dict[str, Tensor]:
    """One random adapter of the tiny model's second block, plain layers, in either dialect."""
    g = torch.Generator().manual_seed(11)
    tensors = {}
    for module, rows, columns in (("attn.proj", 64, 64), ("ffn.w2", 64, FFN), ("cross_attn.q_linear", 64, 64)):
        down = torch.randn(RANK, columns, generator=g) / columns**0.5
        up = torch.randn(rows, RANK, generator=g) / RANK**0.5
        if dialect == "comfyui":
            name = f"diffusion_model.blocks.1.{module}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        else:
            name = "lora___lorahyphen___" + f"blocks.1.{module}".replace(".", "___lorahyphen___")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.blocks.0.weight": up}
            tensors |= {f"{name}.alpha_scale": torch.tensor(2.0 / RANK)}
    return tensors


def test_stock_lora_loader_is_ours(comfy: Client) -> None:
    for dialect in ("comfyui", "official"):
        save_file(adapter(dialect), graphs.model_file(comfy, "loras", f"{dialect}.safetensors"))
    graph = LongCat()
    start = graph.latent()
    inputs = {"model": graph.model, "strength_model": 0.7}
    stock = graph.add("LoraLoaderModelOnly", lora_name="comfyui.safetensors", **inputs)[0]
    ours = [
        graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name=f"{dialect}.safetensors", strength=0.7)[0]
        for dialect in ("comfyui", "official")
    ]
    ids = [graph.save(graph.sample(start, model=model)) for model in (stock, *ours, graph.model)]
    result = comfy.run(graph.prompt)
    first, second, third, without = (comfy.latents(result, node) for node in ids)
    assert_near(second, first, EXACT)
    assert_near(third, first, EXACT)
    assert_differs(first, without, 1e-2)


def test_two_adapters_add_up(comfy: Client) -> None:
    """Each at half strength is one at full."""
    save_file(adapter("official"), graphs.model_file(comfy, "loras", "official.safetensors"))
    save_file(adapter("comfyui"), graphs.model_file(comfy, "loras", "comfyui.safetensors"))
    graph = LongCat()
    half = graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name="official.safetensors", strength=0.5)[0]
    both = graph.add("LongCatVideoLoraLoader", model=half, lora_name="comfyui.safetensors", strength=0.5)[0]
    one = graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name="official.safetensors", strength=1.0)[0]
    start = graph.latent()
    found, expected = pair(comfy, graph, graph.sample(start, model=both), graph.sample(start, model=one))
    assert_near(found, expected)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral", "lcm"])
def test_other_samplers_run(comfy: Client, picture: str, sampler: str) -> None:
    graph = LongCat()
    start = graph.latent(image=graph.images(picture))
    custom = graph.sample_custom(graph.guider(), graph.sigmas(), start, sampler=sampler)
    found, before = pair(comfy, graph, custom, start)
    assert torch.isfinite(found).all() and found[:, :, 1:].std() > 0.1
    assert_near(found[:, :, :1], before[:, :, :1], EXACT)


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("condition", [False, True])
def test_stock_step_caches(comfy: Client, picture: str, node: str, condition: bool) -> None:
    """They leave out steps of ours too, with guidance and beside what is kept of condition frames."""
    graph = LongCat()
    start = graph.latent(image=graph.images(picture if condition else None))
    sigmas, ids = graph.sigmas(num_steps=16), []
    for threshold in (0.0, 3.0):
        inputs = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
        cached = graph.add(node, model=graph.model, **inputs)[0]
        ids.append(graph.save(graph.sample_custom(graph.guider(cached), sigmas, start)))
    whole = graph.save(graph.sample_custom(graph.guider(), sigmas, start))
    result = comfy.run(graph.prompt)
    expected = comfy.latents(result, whole)
    never, often = (comfy.latents(result, node) for node in ids)
    assert_near(never, expected, EXACT)
    error = ((often - expected).norm() / expected.norm()).item()
    # Of random weights, which say another thing in every step; without any step the noise would be left, at above 1.
    assert 1e-3 < error < 0.8, f"relative error {error:.3g}"
    if condition:
        assert_near(often[:, :, :1], expected[:, :, :1], EXACT)


def test_k_sampler_with_uni_pc(comfy: Client) -> None:
    """Not through a SIGMAS node: uni_pc writes 0.001 over the last of the sigmas that it is given, cached or not."""
    graph = LongCat()
    start = graph.latent()
    uni_pc = k_sampler(graph, start, sampler_name="uni_pc", steps=6, cfg=2.0)
    found, _ = pair(comfy, graph, uni_pc, start)
    assert torch.isfinite(found).all() and found.std() > 0.1


def test_create_and_save_video(comfy: Client) -> None:
    graph = LongCat()
    decoded = graph.add("VAEDecode", samples=graph.sample(graph.latent()), vae=graph.vae)[0]
    video = graph.add("CreateVideo", images=decoded, fps=15.0)[0]
    saved = graph.add("SaveVideo", video=video, filename_prefix="video/test", format="mp4", codec="h264")
    result = comfy.run(graph.prompt, workflow={"nodes": [], "links": [], "version": 0.4})
    (file,) = result.outputs[saved.id]["images"]
    path = comfy.server.run / "output" / file["subfolder"] / file["filename"]
    frames = read_video(path)
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert frames.float().std() > 1
    assert read_metadata(path) is None  # of ours; ComfyUI's own workflow is in there


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("fp32", EXACT), ("bf16", 0.3), ("fp16", 0.1), ("fp8_e4m3fn", 1.0), ("fp8_e5m2", 1.5)]
)
def test_weight_dtypes(comfy: Client, dtype: str, tolerance: float) -> None:
    """Rounded weights change the result by about their rounding: a mean error, relative to its spread."""
    graph, exact = LongCat(weight_dtype=dtype), LongCat(weight_dtype="default")
    ids = graph.save(graph.sample(graph.latent())), exact.save(exact.sample(exact.latent()))
    found = comfy.latents(comfy.run(graph.prompt), ids[0])
    expected = comfy.latents(comfy.run(exact.prompt), ids[1])
    assert torch.isfinite(found).all()
    error = ((found - expected).abs().mean() / expected.std()).item()
    assert error <= tolerance, f"off by {error:.3g}"
    assert dtype == "fp32" or error > 0, "the weights were not rounded"


def test_weights_in_fp8_with_a_lora(comfy: Client) -> None:
    save_file(adapter("official"), graphs.model_file(comfy, "loras", "official.safetensors"))
    graph = LongCat(weight_dtype="fp8_e4m3fn")
    model = graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name="official.safetensors", strength=1.0)[0]
    start = graph.latent()
    found, without = pair(comfy, graph, graph.sample(start, model=model), graph.sample(start))
    assert torch.isfinite(found).all()
    assert_differs(found, without, 1e-2)


def test_the_negative_prompt_counts_with_guidance_alone(comfy: Client) -> None:
    graph = LongCat()
    start, other = graph.latent(), graph.encode("")
    assert NEGATIVE
    assert_differs(*pair(comfy, graph, graph.sample(start), graph.sample(start, negative=other)), 1e-4)
    found, expected = pair(
        comfy, graph, graph.sample(start, guidance_scale=1.0), graph.sample(start, guidance_scale=1.0, negative=other)
    )
    assert_near(found, expected, 1e-7)


def test_latents_saved_by_stock_nodes_are_ours_again(comfy: Client) -> None:
    """What SaveLatent wrote and LoadLatent read is continued like the latent itself."""
    graph = LongCat()
    first = graph.sample(graph.latent(num_frames=FRAMES + 4))
    saved = graph.save(first)
    direct = graph.save(graph.continued(latent=first)[2])
    result = comfy.run(graph.prompt)
    (file,) = result.outputs[saved]["latents"]
    name = "loaded.latent"
    (comfy.server.run / "input" / name).write_bytes(comfy.view(file))
    assert load_file(comfy.server.run / "input" / name)
    again = LongCat()
    loaded = again.add("LoadLatent", latent=name)[0]
    found = again.save(again.continued(latent=loaded)[2])
    assert_near(comfy.latents(comfy.run(again.prompt), found), comfy.latents(result, direct), EXACT)
