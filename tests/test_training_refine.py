"""The refinement expert: its path against inference, its pairs against the pipeline, the stage in the trainer."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import check_gradients
from safetensors.torch import load_file
from tiny_models import components, make_dit, randn, seeded
from torch import Tensor

from lcv_core import schedule as schedules
from lcv_core.config import BSAConfig
from lcv_core.denoise import denoise
from lcv_core.errors import InputError
from lcv_core.pipelines.base import encode_frames, to_frames, to_pixels
from lcv_core.pipelines.refine import _condition, _encode_clip
from lcv_core.refinement import mix
from lcv_core.text.encoder import TextStates
from lcv_core.training.adapters import AdaptedDiT
from lcv_core.training.data.clips import refined_clip, sample_clip
from lcv_core.training.data.folder import FolderClips, FolderSection
from lcv_core.training.data.pairs import Flaws, FolderPairs, Kind, OneSide, ProceduralPairs, blur, generated_look
from lcv_core.training.data.sources import ProceduralClips
from lcv_core.training.optimizers import trained
from lcv_core.training.recipe import Recipe, load_recipe
from lcv_core.training.stage import Place
from lcv_core.training.stages import build_stage
from lcv_core.training.stages.refine import RefineStage, refine_levels, refine_pair
from lcv_core.training.stages.refine_settings import Objective
from lcv_core.training.trainer import Trainer
from lcv_core.video_io import read_video, write_video
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.lora import load_lora
from lcv_core.weights.lora_keys import official_targets

CLIPS = ProceduralClips(count=4, num_frames=5, height=32, width=48)
KINDS = (Kind(), Kind(cond_frames=1), Kind(spatial_only=True), Kind(time_mapping="exact", cond_frames=5))


# The path


class Oracle:
    """In the network's place: knows x0 and the velocity that leads there."""

    device = torch.device("cpu")

    def __init__(self, x0: Tensor, given: Tensor, noise: Tensor, t_thresh: float) -> None:
        self.x0, self.given, self.noise, self.t_thresh = x0, given, noise, t_thresh
        self.timesteps: list[float] = []

    def __call__(self, x: Tensor, timestep: Tensor, *_: Any, num_cond_latents: int = 0, **__: Any) -> Tensor:
        t = timestep[:, -1] / 1000.0
        self.timesteps.append(float(timestep[0, -1]))
        assert not timestep[:, :num_cond_latents].any()
        state, velocity = refine_pair(self.x0, self.given, self.noise, t, self.t_thresh)
        # Training shows the network the very states that sampling does.
        torch.testing.assert_close(x[:, :, num_cond_latents:], state[:, :, num_cond_latents:], rtol=1e-4, atol=1e-4)
        return velocity


@pytest.mark.parametrize("n_c", [0, 2])
@pytest.mark.parametrize("t_thresh", [0.5, 0.3, 1.0])
def test_perfect_predictions_end_in_the_wanted_latents(t_thresh: float, n_c: int) -> None:
    x0, given, noise = (randn(1, 16, 4, 4, 6, seed=i) for i in range(3))
    start = mix(given, noise, t_thresh)
    start[:, :, :n_c] = x0[:, :, :n_c]
    oracle = Oracle(x0, given, noise, t_thresh)
    sigmas = schedules.refine(50, t_thresh)
    text = TextStates(randn(1, 3, 32))
    out = denoise(oracle, start, sigmas, text=text, num_cond_latents=n_c)  # type: ignore[arg-type]
    torch.testing.assert_close(out, x0, rtol=1e-4, atol=1e-4)
    assert oracle.timesteps == pytest.approx([1000 * s for s in sigmas[:-1].tolist()], rel=1e-5)
    if t_thresh == 0.5:
        assert [round(t) for t in oracle.timesteps] == [500, 443, 343, 208, 12]  # the released five steps


def test_from_pure_noise_it_is_flow_matching() -> None:
    x0, given, noise, t = randn(2, 16, 2, 4, 6), randn(2, 16, 2, 4, 6, seed=1), randn(2, 16, 2, 4, 6, seed=2), 0.3
    x, velocity = refine_pair(x0, given, noise, torch.full((2,), t), 1.0)
    torch.testing.assert_close(x, (1 - t) * x0 + t * noise)
    torch.testing.assert_close(velocity, x0 - noise)
    _, half = refine_pair(x0, given, noise, torch.full((2,), t), 0.5)
    torch.testing.assert_close(half, (x0 - noise) + (x0 - given))


def test_levels_are_as_dense_as_the_steps() -> None:
    levels = refine_levels(torch.arange(100_000) / 100_000, 0.5, 12.0)
    assert levels[0] == 0 and float(levels[-1]) == pytest.approx(0.5, abs=1e-4) and bool((levels.diff() >= 0).all())
    # What is uniform is the value before the shift, of which the schedule has equally many steps everywhere.
    before = levels / (12 - 11 * levels)
    torch.testing.assert_close(before, torch.arange(100_000) / 100_000 * float(before[-1]), rtol=1e-3, atol=1e-5)
    steps = schedules.refine(50, 0.5)[:-1]
    torch.testing.assert_close(refine_levels(steps / (12 - 11 * steps) / (0.5 / 6.5), 0.5, 12.0), steps)
    assert torch.equal(refine_levels(torch.tensor([0.2, 0.5]), 1.0, 1.0), torch.tensor([0.2, 0.5]))


# The pairs


def sides(kind: Kind, **changes: Any) -> tuple[OneSide, OneSide]:
    pairs = ProceduralPairs(CLIPS, kind)
    how = {"flaws": Flaws(), "c": components()} | changes
    return OneSide("given", pairs, kind, **how), OneSide("wanted", pairs, kind, **how)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_pairs_are_encoded_as_the_pipeline_does(kind: Kind) -> None:
    c, plan = components(), kind.plan(5)
    given, wanted = (next(iter(side.read(0))) for side in sides(kind, flaws=Flaws(clean=1.0), c=c))
    low = sample_clip(0, 0, num_frames=5, height=32, width=48)
    high = refined_clip(low, spatial_only=kind.spatial_only, time_mapping=kind.time_mapping).frames
    assert given.frames.shape == wanted.frames.shape == (plan.frames_encoded, 64, 96, 3)
    # What is given: the low-resolution clip through the VAE, then as `refine_video` encodes its clip.
    seen = c.need_vae().decode(c.need_vae().encode(to_pixels(low.frames))[0])
    expected = _encode_clip(c, to_frames(seen)[0], (64, 96), plan, "mode", None)
    torch.testing.assert_close(encode_frames(c, to_pixels(given.frames)), expected, rtol=1e-3, atol=1e-3)
    # What is wanted: its frames untouched, and the condition that `refine_video` would encode by itself.
    kept = wanted.frames[plan.front : plan.front + plan.frames_out]
    kept = kept[: len(wanted.frames) - plan.front]
    torch.testing.assert_close(kept * 255, high[: len(kept)].float(), rtol=0, atol=1e-3)
    if plan.cond_latents:
        cond = encode_frames(c, _condition(high[: plan.cond_frames], plan, (64, 96), "stretch"))
        latents = encode_frames(c, to_pixels(wanted.frames))
        torch.testing.assert_close(latents[:, :, : plan.cond_latents], cond, rtol=1e-3, atol=1e-3)


def test_flaws_are_what_they_say() -> None:
    c, frames = components(), sample_clip(0, 1, num_frames=5, height=32, width=48).frames
    clean = generated_look(c, frames, Flaws(clean=1.0), seeded(1))
    assert torch.equal(clean, generated_look(c, frames, Flaws(clean=0, blur=0, noise=0, latent_noise=0), seeded(1)))
    assert torch.equal(
        generated_look(c, frames, Flaws(clean=0), seeded(1)), generated_look(c, frames, Flaws(clean=0), seeded(1))
    )
    for name in ("blur", "noise", "latent_noise"):
        none = {"clean": 0.0, "blur": 0.0, "noise": 0.0, "latent_noise": 0.0}
        assert not torch.equal(generated_look(c, frames, Flaws(**(none | {name: 1.0})), seeded(1)), clean), name
    picture = torch.zeros(1, 15, 15, 3)
    picture[0, 7, 7] = 1.0
    spread = blur(picture, 1.2)
    at = torch.arange(15) - 7.0
    assert float(spread.sum()) == pytest.approx(3.0, rel=1e-5)
    assert float((spread[0, :, :, 0].sum(0) * at**2).sum()) == pytest.approx(1.2**2, rel=0.03)
    assert blur(picture, 0.0) is picture


def test_identities_tell_apart_what_is_different() -> None:
    parts = [str(side.parts()[0].identity) for kind in KINDS for side in sides(kind)]
    parts += [str(sides(KINDS[0], flaws=Flaws(blur=0.1))[0].parts()[0].identity)]
    assert len(set(parts)) == len(parts)
    assert str(sides(replace(KINDS[0], share=3.0))[0].parts()[0].identity) == parts[0]
    assert str(sides(KINDS[0], flaws=Flaws(blur=0.1))[1].parts()[0].identity) == parts[1]


def test_pairs_of_a_folder_of_videos(tmp_path: Path) -> None:
    movie = torch.randint(0, 256, (13, 4, 6, 3), generator=seeded(0)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    write_video(tmp_path / "a.mp4", movie.to(torch.uint8), frame_rate=30)
    (tmp_path / "a.txt").write_text("blocks")
    clips = FolderClips(FolderSection(tmp_path, num_frames=13, frame_rate=30.0, height=64, width=96), "stop")
    video = read_video(tmp_path / "a.mp4")
    for kind, high, low in (
        (Kind(time_mapping="exact"), range(9), (0, 2, 4, 6, 8)),
        (Kind(), range(10), (0, 2, 4, 7, 9)),
        (Kind(spatial_only=True), (0, 2, 4, 6, 8), (0, 2, 4, 6, 8)),
    ):
        pair = next(iter(FolderPairs(clips, kind, 5).read(0)))
        assert torch.equal(pair.high, video[list(high)]), kind
        shrunk = video[list(low)].float().unflatten(1, (32, 2)).unflatten(3, (48, 2)).mean((2, 4))
        assert (pair.low.float() - shrunk).abs().max() <= 0.5, kind
    with pytest.raises(InputError, match="num_frames is 13, refining 9 frames takes 18"):
        FolderPairs(clips, Kind(), 9)


# The stage


def recipe(checkpoint: Path, cache: Path, **changes: Any) -> Recipe:
    clips = {"count": 6, "num_frames": 5, "height": 32, "width": 48}
    kinds = [{"share": 1}, {"share": 1, "cond_frames": 1}, {"share": 1, "spatial_only": True}]
    data: dict[str, Any] = {
        "stage": "refine", "steps": 3, "batch_size": 2, "lr": 1e-2,
        "model": {"checkpoint": checkpoint, "rank": 4},
        "data": {"procedural": clips, "kinds": kinds, "cache": cache},
    }  # fmt: skip
    return Recipe.from_dict(data | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@functools.cache
def stage_of(objective: tuple[tuple[str, Any], ...], checkpoint: Path, cache: Path) -> RefineStage:
    stage = build_stage(recipe(checkpoint, cache, objective=dict(objective)))
    assert isinstance(stage, RefineStage)
    stage.prepare(torch.device("cpu"), lambda _: None)
    return stage


def prepared(checkpoint: Path, cache: Path, **objective: Any) -> RefineStage:
    """One of its own, with a network that others train too."""
    return copy.copy(stage_of(tuple(objective.items()), checkpoint, cache))


def batches(stage: RefineStage) -> dict[str, dict[str, Any]]:
    """One of each kind."""
    found = [stage.batch(Place(step, 0, range(2))) for step in range(4)]
    return {batch["kind"]: batch for batch in found}


def test_a_run_goes_from_dense_to_sparse(tmp_path: Path, tiny_checkpoint: Path, cache: Path) -> None:
    how = recipe(
        tiny_checkpoint, cache, steps=0, sample_every=2, samples={"count": 1, "refine_steps": 2},
        phases=[{"steps": 2}, {"steps": 2, "objective": {"attention": "sparse", "sparsity": 0.5}}],
    )  # fmt: skip
    trainer = Trainer(build_stage(how), how, tmp_path / "run", device="cpu")
    assert trainer.run().finished
    file = tmp_path / "run" / "model" / "lora" / "refinement_lora.safetensors"
    dit = open_checkpoint(tiny_checkpoint).load_dit()
    with load_lora(dit, file) as handle:
        assert handle.report.unmatched == () and len(handle.report.matched) == 18
    assert all(up.any() for name, up in load_file(file).items() if "lora_up" in name)
    model = trainer.stage.model
    assert isinstance(model, AdaptedDiT)
    for name, weight in dit.named_parameters():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(model.get_parameter(f"{module}.base.{leaf}" if module in model.adapted else name), weight)
    assert len(list((tmp_path / "run" / "samples").glob("stretch-*.png"))) == 2


def test_batches_have_every_kind_and_depend_on_their_place_alone(tiny_checkpoint: Path, cache: Path) -> None:
    one, other = prepared(tiny_checkpoint, cache), prepared(tiny_checkpoint, cache, cond_noise=0.02)
    found = batches(one)
    assert {name: (batch["num_cond_latents"], batch["wanted"].shape[2]) for name, batch in found.items()} == {
        "stretch": (0, 4), "stretch_1": (4, 8), "space": (0, 4),
    }  # fmt: skip
    a, b = one.batch(Place(7, 0, range(2))), other.batch(Place(7, 0, range(2)))
    assert a.keys() == b.keys() and all(str(value) == str(b[name]) for name, value in a.items())
    assert not torch.equal(a["noise"], other.batch(Place(8, 0, range(2)))["noise"])
    assert all(0 <= float(t) <= 0.5 for batch in found.values() for t in batch["t"])


def test_both_sides_of_a_sample_are_of_one_clip(tiny_checkpoint: Path, cache: Path) -> None:
    stage = prepared(tiny_checkpoint, cache)
    batch, source = batches(stage)["stretch"], stage._cached[0].wanted.source
    assert isinstance(source, OneSide)
    for side in ("given", "wanted"):
        clips = {clip.name: clip.frames for clip in replace(source, side=side).read(0)}
        for name, latents in zip(batch["names"], batch[side], strict=True):
            expected = encode_frames(source.c, to_pixels(clips[name]))[0]
            torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


def test_training_shows_what_the_pipeline_starts_from(tiny_checkpoint: Path, cache: Path) -> None:
    """At t_thresh the network of the loss sees the latents and timesteps that `refine_video` gives it first."""
    stage = prepared(tiny_checkpoint, cache, cond_noise=0.0)
    batch = batches(stage)["stretch_1"]
    batch["t"] = torch.full((2,), 0.5)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, timestep: Tensor, *_: Any, **options: Any) -> Tensor:
        seen.append((x, timestep))
        assert options["num_cond_latents"] == 4
        return torch.zeros_like(x)

    stage.loss(network, batch)  # type: ignore[arg-type]
    start = mix(batch["given"], batch["noise"], 0.5)
    start[:, :, :4] = batch["wanted"][:, :, :4]
    torch.testing.assert_close(seen[0][0], start)
    assert seen[0][1].tolist() == [[0.0] * 4 + [500.0] * 4] * 2


def double(stage: RefineStage, batch: dict[str, Any]) -> tuple[AdaptedDiT, dict[str, Any]]:
    """The stage on a tiny model in fp64 that has learnt something, and its batch."""
    model = AdaptedDiT(
        make_dit(torch.float64), official_targets("refinement_lora", 2), rank=2, generator=seeded(1),
        dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for i, p in enumerate(trained(model).values()):
            p += 0.1 * randn(*p.shape, seed=i, dtype=torch.float64)
    stage.model = model
    batch = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    batch["text"] = randn(*batch["text"].shape[:2], 32, dtype=torch.float64)
    return model, batch


@pytest.mark.parametrize("kind", ["stretch", "stretch_1"])
def test_sparse_training_at_sparsity_0_is_dense_training(tiny_checkpoint: Path, cache: Path, kind: str) -> None:
    found = []
    for objective in ({}, {"attention": "sparse", "sparsity": 0.0}, {"attention": "sparse", "sparsity": 0.5}):
        stage = prepared(tiny_checkpoint, cache, **objective)
        model, batch = double(stage, batches(stage)[kind])
        loss, _ = stage.loss(model, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in trained(model).values()]))
    (dense, gradients), (same, same_gradients), (other, _) = found
    torch.testing.assert_close(same, dense, rtol=1e-10, atol=0.0)
    for a, b in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)
    assert abs(float(other - dense)) > 1e-6 * float(dense)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_gradients_against_differences(tiny_checkpoint: Path, cache: Path, sparsity: float | None) -> None:
    objective = {} if sparsity is None else {"attention": "sparse", "sparsity": sparsity}
    stage = prepared(tiny_checkpoint, cache, **objective)
    model, batch = double(stage, batches(stage)["stretch_1"])
    check_gradients(lambda: stage.loss(model, batch)[0], list(trained(model).values()))


def test_it_learns_a_fixed_batch(tiny_checkpoint: Path, cache: Path) -> None:
    stage = prepared(tiny_checkpoint, cache)
    batch = batches(stage)["stretch"]
    optimizer = torch.optim.AdamW(trained(stage.model).values(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss, _ = stage.loss(stage.model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_sparse_attention_is_the_checkpoints_unless_said_otherwise() -> None:
    own = BSAConfig(sparsity=0.9, block_q=(2, 4, 4))
    assert Objective().bsa(own) is None and Objective(attention="sparse").bsa(own) == own
    assert Objective(attention="sparse", sparsity=0.25).bsa(own) == replace(own, sparsity=0.25)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": {"t_thresh": 0.0}}, "objective.t_thresh must be in"),
        ({"objective": {"sparsity": 0.5}}, "goes with attention: sparse"),
        ({"data": {"kinds": []}}, "either procedural"),
        ({"data": {"procedural": {"num_frames": 5}, "kinds": [{}, {"share": 2}]}}, "must be different kinds"),
        ({"data": {"procedural": {"num_frames": 5}, "kinds": [{"cond_frames": 10}]}}, r"num_cond_frames must be in"),
    ],
)
def test_wrong_recipes(tiny_checkpoint: Path, cache: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_stage(recipe(tiny_checkpoint, cache, **changes))


@pytest.mark.parametrize("name", ["dense", "sparse", "more", "short", "whole"])
def test_shipped_recipes(tiny_checkpoint: Path, name: str) -> None:
    changes = [f"model.checkpoint={tiny_checkpoint}", "model.vae=null", "model.adapter=null"]
    stage = build_stage(load_recipe(f"mini/refine_{name}", changes))
    assert isinstance(stage, RefineStage)
    assert [plan.latents for plan in stage._plans] == ([4, 8, 8, 4] if name == "short" else [12, 16, 12, 8])
