"""Checkpoints of every form, where they lie, what is said when a part is missing, and files that change on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import flat_patch, matrices, write
from torch import Tensor

from lcv_core import open_checkpoint
from lcv_core.pipelines import Components, continue_video, text_to_video
from lcv_core.weights.init import lora_state
from lcv_core.weights.keymaps import WAN_VAE, original_name
from lcv_core.weights.tensors import TensorSource

from . import graphs, reference, wan
from .api import ERROR, SUCCESS, Client, Json, Result
from .graphs import COND_FRAMES, FRAMES, HEIGHT, NEGATIVE, PROMPT, SEED, STEPS, TINY, WIDTH, Link, LongCat, Node
from .reference import assert_differs, assert_near, normalised, seeded
from .server import EXTRA

State = dict[str, Tensor]
SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
SOURCE = "Comfy-Org/Wan_2.1_ComfyUI_repackaged on the Hub"  # where the messages send people to


@pytest.fixture(scope="module", autouse=True)
def c(comfy: Client) -> Components:
    return reference.components(graphs.tiny_checkpoint(comfy))


@pytest.fixture(scope="module")
def transformer(comfy: Client) -> State:
    """The tiny transformer under its official names."""
    source = TensorSource.open(graphs.tiny_checkpoint(comfy) / "dit")
    return {name: source.read(name) for name in source}


@pytest.fixture(autouse=True)
def no_other_parts(comfy: Client) -> Iterator[None]:
    """Nothing in models/vae, models/text_encoders and models/loras but what the test puts there."""
    folders = [comfy.server.run / "models" / name for name in ("vae", "text_encoders", "loras")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        folder.rename(folder.with_name(f"{folder.name} of others"))
        folder.mkdir()
    yield
    for folder in folders:
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name} of others").rename(folder)


def put(comfy: Client, name: str, state: State) -> str:
    """A transformer file in models/diffusion_models."""
    save_file(state, graphs.model_file(comfy, "diffusion_models", name))
    return name


def put_own_vae(comfy: Client, name: str = wan.VAE) -> Path:
    """The tiny checkpoint's VAE as one file under Wan's own names."""
    state = load_file(graphs.tiny_checkpoint(comfy) / "vae" / "diffusion_pytorch_model.safetensors")
    path = graphs.model_file(comfy, "vae", name)
    save_file({original_name(key, WAN_VAE) or key: tensor for key, tensor in state.items()}, path)
    return path


def loaded(graph: LongCat, name: str, **changes: Json) -> Node:
    """A second loader, for a transformer alone unless other parts are named."""
    inputs = {"checkpoint": name, "weight_dtype": "default", "vae": "none", "text_encoder": "none"}
    return graph.add("LongCatVideoLoader", **inputs | changes)


def sampled(comfy: Client, name: str, **changes: Json) -> tuple[Tensor, Result]:
    """The latents of a transformer, its text from the tiny checkpoint."""
    graph = LongCat()
    node = graph.save(graph.sample(graph.latent(), model=loaded(graph, name, **changes)[0]))
    result = comfy.run(graph.prompt)
    return comfy.latents(result, node), result


def expected(c: Components, seed: int = SEED) -> Tensor:
    return text_to_video(
        c, text=PROMPT, negative_text=NEGATIVE, **SIZE, num_steps=STEPS, generator=seeded(seed), output="latents"
    )


def of_file(c: Components, path: Path) -> Components:
    """The tiny checkpoint with the transformer of a file, as `lcv_core` reads it."""
    return Components(dit=open_checkpoint(path).load_dit(dtype=torch.float32), vae=c.vae, text_encoder=c.text_encoder)


def refused(comfy: Client, name: str, **changes: Json) -> str:
    """What the loader says."""
    graph = LongCat()
    node = loaded(graph, name, **changes)
    graph.save(graph.sample(graph.latent(), model=node[0]))
    result = comfy.queue(graph.prompt)
    assert (result.event, result.error["node_id"]) == (ERROR, node.id), result.error_text
    assert "\n" not in result.error_text
    return result.error_text


# forms


def test_an_official_folder_whole_and_in_shards(comfy: Client, c: Components, transformer: State) -> None:
    folder = graphs.tiny_checkpoint(comfy)
    assert len(list((folder / "dit").glob("*.safetensors"))) > 1
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    for file in (whole / "dit").glob("*.safetensors*"):
        file.unlink()
    save_file(transformer, whole / "dit" / "diffusion_pytorch_model.safetensors")
    for name in (TINY, "whole/"):
        graph = LongCat(name)
        node = graph.save(graph.sample(graph.latent()))
        found = comfy.latents(comfy.run(graph.prompt), node)
        assert_near(normalised(c, found), expected(c))


NAMES = {
    "official": ("longcat.safetensors", ""),
    "ComfyUI": ("longcat comfyui.safetensors", "model.diffusion_model."),
    "diffusion_model": ("longcat plain.safetensors", "diffusion_model."),
}


@pytest.mark.parametrize("dialect", NAMES)
def test_a_single_file(comfy: Client, c: Components, transformer: State, dialect: str) -> None:
    name, prefix = NAMES[dialect]
    put(comfy, name, {f"{prefix}{key}": tensor for key, tensor in transformer.items()})
    found, _ = sampled(comfy, name)
    assert_near(normalised(c, found), expected(c))


def test_a_gguf_file(comfy: Client, c: Components, transformer: State) -> None:
    path = graphs.model_file(comfy, "diffusion_models", "longcat Q8_0.gguf")
    path.unlink(missing_ok=True)
    write(path, flat_patch(transformer), matrices("Q8_0"))
    found, _ = sampled(comfy, path.name, weight_dtype="fp32")
    assert_near(normalised(c, found), expected(of_file(c, path)), 1e-3)
    assert_differs(normalised(c, found), expected(c), 1e-2)


def scaled(transformer: State) -> State:
    """ComfyUI's scaled fp8: the big matrices in fp8 with a scale each, and a marker."""
    state: State = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in transformer.items():
        if name.endswith(".weight") and name.startswith("blocks.") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448.0
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[f"{name.removesuffix('weight')}scale_weight"] = scale.reshape(1)
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize("form", ["scaled fp8", "plain fp8", "bf16"])
def test_a_quantised_file(comfy: Client, c: Components, transformer: State, form: str) -> None:
    if form == "scaled fp8":
        state = scaled(transformer)
    else:
        dtype = torch.bfloat16 if form == "bf16" else torch.float8_e4m3fn
        state = {key: value.to(dtype) if value.ndim == 2 else value for key, value in transformer.items()}
    name = put(comfy, f"longcat {form}.safetensors", state)
    found, _ = sampled(comfy, name, weight_dtype="fp32")
    path = graphs.model_file(comfy, "diffusion_models", name)
    assert_near(normalised(c, found), expected(of_file(c, path)), 1e-3)
    assert_differs(normalised(c, found), expected(c), 1e-3)


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_a_file_kept_in_fp8(comfy: Client, c: Components, transformer: State, dtype: str) -> None:
    """The same from a single file as from the folder."""
    found, _ = sampled(comfy, put(comfy, "longcat.safetensors", transformer), weight_dtype=dtype)
    graph = LongCat(weight_dtype=dtype)
    node = graph.save(graph.sample(graph.latent()))
    assert_near(found, comfy.latents(comfy.run(graph.prompt), node), 1e-5)
    assert_differs(normalised(c, found), expected(c), 1e-2)


def test_weights_that_come_layer_by_layer(comfy: Client, c: Components, transformer: State) -> None:
    """Where memory is short; adapters, whose parts change rows of fused weights, are then applied on the way."""
    source = graphs.tiny_checkpoint(comfy) / "lora" / "cfg_step_lora.safetensors"
    shutil.copy(source, graphs.model_file(comfy, "loras", "a.safetensors"))
    graph = LongCat()

    def adapted(model: Link) -> Link:
        return graph.add("LongCatVideoLoraLoader", model=model, lora_name="a.safetensors", strength=1.0)[0]

    # Of files of their own: what was loaded whole would stay so.
    first, second = (loaded(graph, put(comfy, f"short {i}.safetensors", transformer))[0] for i in (1, 2))
    short = [graph.add("TestLittleMemory", model=model)[0] for model in (first, adapted(second))]
    ids = [graph.save(graph.sample(graph.latent(), model=model)) for model in (*short, adapted(graph.model))]
    before = len(comfy.server.log())
    result = comfy.run(graph.prompt)
    assert comfy.server.log()[before:].count("loaded partially") == 2
    plain, streamed, whole = (comfy.latents(result, node) for node in ids)
    assert_near(normalised(c, plain), expected(c))
    assert_near(streamed, whole)
    assert_differs(whole, plain)


# places and names


@pytest.mark.parametrize(
    "name", ["with spaces.safetensors", "a/b c/longcat.safetensors", "長猫 – Катя.safetensors", "dots.v1.0.safetensors"]
)
def test_file_names(comfy: Client, c: Components, transformer: State, name: str) -> None:
    """As transformer and as adapter."""
    put(comfy, name, transformer)
    offered = comfy.object_info("LongCatVideoLoader")["LongCatVideoLoader"]["input"]["required"]["checkpoint"]
    assert name.replace("/", os.sep) in str(offered).replace("\\\\", "\\")
    shutil.copy(
        graphs.tiny_checkpoint(comfy) / "lora" / "cfg_step_lora.safetensors", graphs.model_file(comfy, "loras", name)
    )
    graph = LongCat()
    model = loaded(graph, name.replace("/", os.sep))[0]
    lora = graph.add("LongCatVideoLoraLoader", model=model, lora_name=name.replace("/", os.sep), strength=1.0)[0]
    ids = [graph.save(graph.sample(graph.latent(), model=m)) for m in (model, lora)]
    result = comfy.run(graph.prompt)
    plain, adapted = (comfy.latents(result, node) for node in ids)
    assert_near(normalised(c, plain), expected(c))
    assert_differs(adapted, plain)


def test_further_model_folders(comfy: Client, c: Components, transformer: State) -> None:
    """Those of extra_model_paths.yaml: a folder, a file, an adapter."""
    root = comfy.server.run / EXTRA
    folder = root / "checkpoints" / "far away"
    shutil.copytree(graphs.tiny_checkpoint(comfy), folder, dirs_exist_ok=True)
    (root / "transformers").mkdir(exist_ok=True)
    (root / "adapters").mkdir(exist_ok=True)
    save_file(transformer, root / "transformers" / "far.safetensors")
    shutil.copy(folder / "lora" / "cfg_step_lora.safetensors", root / "adapters" / "far.safetensors")
    required = comfy.object_info("LongCatVideoLoader")["LongCatVideoLoader"]["input"]["required"]
    assert all(f"'{name}'" in str(required["checkpoint"]) for name in ("far away/", "far.safetensors", TINY))
    graph = LongCat("far away/")
    single = loaded(graph, "far.safetensors")
    adapted = graph.add("LongCatVideoLoraLoader", model=single[0], lora_name="far.safetensors", strength=1.0)[0]
    models = graph.model, single[0], adapted
    ids = [graph.save(graph.sample(graph.latent(), model=model)) for model in models]
    result = comfy.run(graph.prompt)
    first, second, third = (comfy.latents(result, node) for node in ids)
    assert_near(normalised(c, first), expected(c))
    assert_near(second, first, 1e-5)
    assert_differs(third, first)


# parts


def test_a_vae_file_is_found_by_itself(comfy: Client, c: Components, transformer: State) -> None:
    name = put(comfy, "longcat.safetensors", transformer)
    put_own_vae(comfy)
    graph = LongCat()
    auto, named = loaded(graph, name, vae="auto"), loaded(graph, name, vae=wan.VAE)
    latent = graph.sample(graph.latent())
    ids = [
        graph.save_images(graph.add("VAEDecode", samples=latent, vae=vae)[0]) for vae in (auto[2], named[2], graph.vae)
    ]
    result = comfy.run(graph.prompt)
    first, second, own = (graphs.frames(comfy, result, node) for node in ids)
    assert own.float().std() > 1
    assert torch.equal(first, own) and torch.equal(second, own)


def test_comfyuis_own_vae_object_works_in_our_nodes(comfy: Client, c: Components) -> None:
    """A VAELoader's, as in a graph that has one for other models: as condition, continuation, long video and refine."""
    if comfy.server.core.version <= (0, 3, 64):
        pytest.skip("this ComfyUI loads Wan VAEs of full width alone")
    put_own_vae(comfy)
    video = graphs.noise_frames(12, seed=5)
    name = graphs.put_frames(comfy, video, "own vae")
    pictures = {}
    for own in (True, False):
        graph = LongCat()
        if not own:
            graph.vae = graph.add("VAELoader", vae_name=wan.VAE)[0]
        frames = graph.images(name)
        assert frames is not None
        start = graph.save(graph.latent(video=frames, num_frames=FRAMES + 4))
        continued = graph.continued(video=frames)
        outputs = [
            continued[1],
            graph.long(["a red ball", "a blue ball"], num_frames=FRAMES + 4, schedule="distilled", handover="frames")[
                0
            ],
            graph.refined(frames)[0],
        ]
        ids = [graph.save_images(output) for output in outputs]
        result = comfy.run(graph.prompt)
        pictures[own] = [comfy.latents(result, start), *(graphs.frames(comfy, result, node) for node in ids)]
    latents, *rest = zip(pictures[False], pictures[True], strict=True)
    assert_near(*latents)
    for found, known in rest:
        assert_near(found, known, 2)
    made = continue_video(
        c, frames=video, text=PROMPT, negative_text=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES + 4,
        num_cond_frames=COND_FRAMES, num_steps=STEPS, fit="crop", generator=seeded(SEED),
    )[0, COND_FRAMES:]  # fmt: skip
    assert_near(pictures[False][1], (made * 255).to(torch.uint8), 2)


def test_comfyuis_own_vae_object_decodes_no_pieces(comfy: Client) -> None:
    """That is said before the first of the segments is sampled; what to choose, too."""
    if comfy.server.core.version <= (0, 3, 64):
        pytest.skip("this ComfyUI loads Wan VAEs of full width alone")
    put_own_vae(comfy)
    graph = LongCat()
    graph.vae = graph.add("VAELoader", vae_name=wan.VAE)[0]
    node = graph.long(["a", "b"], num_frames=FRAMES + 4, num_steps=1, guidance_scale=1.0)
    graph.save_images(node[0])
    kept = {*(comfy.server.run / "output").glob("longcat_video_segments/*")}  # other tests' jobs
    result = comfy.queue(graph.prompt)
    assert (result.event, result.error["node_id"]) == (ERROR, node.id)
    assert 'own VAE (in ComfyUI the LongCat-Video Loader\'s), or the hand-over "frames"' in result.error_text
    assert not [report for report in result.progress if report[0] == node.id]
    assert {*(comfy.server.run / "output").glob("longcat_video_segments/*")} == kept


def test_what_is_missing_is_named_with_its_place_and_its_source(comfy: Client, transformer: State) -> None:
    name = put(comfy, "longcat.safetensors", transformer)
    said = refused(comfy, name, vae="auto")
    assert said.startswith(f"no VAE was found for {name}: put wan_2.1_vae.safetensors into models/vae")
    assert SOURCE in said and said.endswith("or choose none")
    said = refused(comfy, name, text_encoder="auto")
    assert said.startswith(f"no text encoder was found for {name}: put umt5_xxl_fp16.safetensors or")
    assert "into models/text_encoders" in said and SOURCE in said
    folder = graphs.tiny_checkpoint(comfy).with_name("half")
    shutil.copytree(graphs.tiny_checkpoint(comfy), folder, dirs_exist_ok=True)
    for part in ("vae", "tokenizer"):
        shutil.rmtree(folder / part, ignore_errors=True)
    assert refused(comfy, "half/", vae="auto").startswith("no VAE was found for half/")
    assert "has no tokenizer; download the tokenizer folder of the checkpoint" in refused(
        comfy, "half/", text_encoder="auto"
    )
    put_own_vae(comfy)
    sampled(comfy, "half/", vae="auto")


TEXT_FILES: dict[str, tuple[State, str]] = {
    "of another size": (
        {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4), "shared.weight": torch.ones(32, 4)},
        "is not umT5-XXL: its embedding is [32, 4], not [256384, 4096]; choose umt5_xxl_fp16.safetensors",
    ),
    "of another model": (
        {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4, 4)}, "it looks like a CLIP text encoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_a_text_encoder_file(comfy: Client, transformer: State, kind: str) -> None:
    """Refused by its header. A real one has 11 GB: what ComfyUI makes of it is not tested here."""
    state, words = TEXT_FILES[kind]
    name = put(comfy, "longcat.safetensors", transformer)
    save_file(state, graphs.model_file(comfy, "text_encoders", "umt5 xxl.safetensors"))
    assert words in refused(comfy, name, text_encoder="auto")
    assert words in refused(comfy, name, text_encoder="umt5 xxl.safetensors")


def test_another_vae_file(comfy: Client, transformer: State) -> None:
    name = put(comfy, "longcat.safetensors", transformer)
    save_file(
        {"encoder.down.0.x": torch.ones(1), "decoder.up.0.x": torch.ones(1)},
        graphs.model_file(comfy, "vae", "i.safetensors"),
    )
    assert "is not a Wan 2.1 VAE: it looks like an image VAE" in refused(comfy, name, vae="i.safetensors")


def test_another_models_file(comfy: Client, transformer: State) -> None:
    wan.put_transformer(comfy)
    assert "is not a LongCat-Video transformer: it looks like a Wan video model" in refused(comfy, wan.TRANSFORMER)
    avatar = transformer | {"blocks.0.audio_cross_attn.q.weight": torch.ones(4, 4)}
    said = refused(comfy, put(comfy, "avatar.safetensors", avatar))
    assert "LongCat-Video-Avatar; only the base LongCat-Video is supported" in said
    vae = put(comfy, "a vae.safetensors", wan.vae_file_state(comfy.server.core))
    assert "it looks like the Wan 2.1 VAE, not the transformer" in refused(comfy, vae)
    adapter = lora_state({name: tuple(t.shape) for name, t in transformer.items()}, "cfg_step_lora")
    assert "a LoRA adapter, not a model" in refused(comfy, put(comfy, "a lora.safetensors", adapter))


def test_a_damaged_checkpoint(comfy: Client, transformer: State) -> None:
    name = put(comfy, "cut.safetensors", transformer)
    path = graphs.model_file(comfy, "diffusion_models", name)
    path.write_bytes(path.read_bytes()[:-4096])
    assert "is cut short: 4096 bytes are missing; download it again" in refused(comfy, name)
    less = {key: value for key, value in transformer.items() if "blocks.1.attn.qkv" not in key}
    assert "missing: blocks.1.attn.qkv.weight" in refused(comfy, put(comfy, "less.safetensors", less))
    folder = graphs.tiny_checkpoint(comfy).with_name("no shard")
    shutil.copytree(graphs.tiny_checkpoint(comfy), folder, dirs_exist_ok=True)
    next((folder / "dit").glob("*-00002-of-*.safetensors")).unlink()
    assert "lacks 1 of 2 shards" in refused(comfy, "no shard/")
    shutil.rmtree(folder)
    graph = LongCat("no shard/")
    graph.save(graph.latent())
    said = comfy.queue(graph.prompt, allow_node_errors=True).error_text
    # Newer cores compare with the list themselves.
    assert "is not there; choose one of the list" in said or "Value not in list: checkpoint" in said


# files that change


def changed(comfy: Client, path: Path, state: State) -> None:
    """Another file under the same name, as a download or a training run leaves it."""
    other = path.with_name(f"{path.name}.new")
    save_file(state, other)
    other.replace(path)


def ran(graph: LongCat, result: Result) -> set[str]:
    return {graph.prompt[node]["class_type"] for node in result.ran}


def test_a_changed_transformer_is_loaded_anew(comfy: Client, c: Components, transformer: State) -> None:
    name = put(comfy, "changing.safetensors", transformer)
    path = graphs.model_file(comfy, "diffusion_models", name)
    graph = LongCat()
    node = graph.save(graph.sample(graph.latent(), model=loaded(graph, name)[0]))
    assert_near(normalised(c, comfy.latents(comfy.run(graph.prompt), node)), expected(c))
    assert comfy.run(graph.prompt).ran == []
    changed(comfy, path, {key: value * 0.9 for key, value in transformer.items()})
    result = comfy.run(graph.prompt)
    assert ran(graph, result) == {"LongCatVideoLoader", "LongCatVideoSampler", "SaveLatent"}
    found = normalised(c, comfy.latents(result, node))
    assert_near(found, expected(of_file(c, path)))
    assert_differs(found, expected(c))
    assert comfy.run(graph.prompt).ran == []


def test_a_changed_folder_is_loaded_anew(comfy: Client, c: Components, transformer: State) -> None:
    folder = graphs.tiny_checkpoint(comfy).with_name("changing")
    shutil.copytree(graphs.tiny_checkpoint(comfy), folder, dirs_exist_ok=True)
    graph = LongCat("changing/")
    node = graph.save(graph.sample(graph.latent()))
    comfy.run(graph.prompt)
    assert comfy.run(graph.prompt).ran == []
    shard = next((folder / "dit").glob("*-00001-of-*.safetensors"))
    changed(comfy, shard, {key: value * 0.9 for key, value in load_file(shard).items()})
    result = comfy.run(graph.prompt)
    assert "LongCatVideoLoader" in ran(graph, result)
    other = Components(
        dit=open_checkpoint(folder).load_dit(dtype=torch.float32), vae=c.vae, text_encoder=c.text_encoder
    )
    assert_near(normalised(c, comfy.latents(result, node)), expected(other))


def test_a_changed_vae_that_auto_found_is_loaded_anew(comfy: Client, transformer: State) -> None:
    name = put(comfy, "longcat.safetensors", transformer)
    path = put_own_vae(comfy)
    graph = LongCat()
    vae = loaded(graph, name, vae="auto")[2]
    node = graph.save_images(graph.add("VAEDecode", samples=graph.sample(graph.latent()), vae=vae)[0])
    first = graphs.frames(comfy, comfy.run(graph.prompt), node)
    assert comfy.run(graph.prompt).ran == []
    state = load_file(path)
    changed(comfy, path, state | {"decoder.head.2.weight": state["decoder.head.2.weight"] * 0.5})
    result = comfy.run(graph.prompt)
    assert "LongCatVideoLoader" in ran(graph, result)
    assert_differs(graphs.frames(comfy, result, node), first, 5)


def adapter(comfy: Client, kind: str = "cfg_step_lora") -> State:
    return load_file(graphs.tiny_checkpoint(comfy) / "lora" / f"{kind}.safetensors")


def test_a_changed_lora_is_applied_anew(comfy: Client) -> None:
    path = graphs.model_file(comfy, "loras", "changing.safetensors")
    save_file(adapter(comfy), path)
    graph = LongCat()
    lora = graph.add("LongCatVideoLoraLoader", model=graph.model, lora_name=path.name, strength=1.0)
    node = graph.save(graph.sample(graph.latent(), model=lora[0]))
    first = comfy.latents(comfy.run(graph.prompt), node)
    assert comfy.run(graph.prompt).ran == []
    changed(comfy, path, adapter(comfy, "refinement_lora"))
    result = comfy.run(graph.prompt)
    assert ran(graph, result) == {"LongCatVideoLoraLoader", "LongCatVideoSampler", "SaveLatent"}
    second = comfy.latents(result, node)
    assert_differs(second, first)
    changed(comfy, path, adapter(comfy))
    assert_near(comfy.latents(comfy.run(graph.prompt), node), first, 1e-5)


def test_a_changed_refinement_lora_is_applied_anew(comfy: Client) -> None:
    path = graphs.model_file(comfy, "loras", "expert.safetensors")
    save_file(adapter(comfy, "refinement_lora"), path)
    name = graphs.put_frames(comfy, graphs.noise_frames(5), "expert")
    graph = LongCat()
    frames = graph.images(name)
    assert frames is not None
    node = graph.refined(frames, refine_lora=path.name)
    saved = graph.save_images(node[0])
    first = graphs.frames(comfy, comfy.run(graph.prompt), saved)
    assert comfy.run(graph.prompt).ran == []
    changed(
        comfy,
        path,
        {key: value * 4 if "lora_up" in key else value for key, value in adapter(comfy, "refinement_lora").items()},
    )
    result = comfy.run(graph.prompt)
    assert ran(graph, result) == {"LongCatVideoRefine", "SaveImage"}
    assert_differs(graphs.frames(comfy, result, saved), first, 1)


def test_an_adapter_that_was_put_there_later_is_found(comfy: Client, c: Components, transformer: State) -> None:
    """The message that names what is missing is followed, and the same graph runs; a newer file counts too."""
    name = put(comfy, "longcat.safetensors", transformer)
    graph = LongCat()
    sampler = Node(graph.sample(graph.latent(), model=loaded(graph, name)[0], schedule="distilled")[0])
    node = graph.save(sampler[0])
    result = comfy.queue(graph.prompt)
    assert (result.event, result.error["node_id"]) == (ERROR, sampler.id)
    assert "the distill LoRA is missing: put cfg_step_lora.safetensors" in result.error_text
    assert "models/loras" in result.error_text
    path = graphs.model_file(comfy, "loras", "longcat_distill_lora_rank128.safetensors")
    save_file(adapter(comfy), path)
    result = comfy.run(graph.prompt)
    assert result.event == SUCCESS
    official = LongCat()
    known = official.save(official.sample(official.latent(), schedule="distilled"))
    first = comfy.latents(result, node)
    assert_near(first, comfy.latents(comfy.run(official.prompt), known), 1e-5)
    comfy.run(graph.prompt)
    changed(comfy, path, adapter(comfy, "refinement_lora"))
    assert_differs(comfy.latents(comfy.run(graph.prompt), node), first)


def test_a_file_that_is_touched_only_is_read_again_and_gives_the_same(comfy: Client, transformer: State) -> None:
    name = put(comfy, "touched.safetensors", transformer)
    first, _ = sampled(comfy, name)
    os.utime(graphs.model_file(comfy, "diffusion_models", name))
    again, result = sampled(comfy, name)
    assert result.ran
    assert torch.equal(first, again)
