"""The VAE stage: streams, the loss and its gradients, the materials, what comes out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import check_gradients
from tiny_models import randn, seeded
from torch import Tensor, nn

from lcv_core.config import VAEConfig
from lcv_core.errors import InputError
from lcv_core.miniature import miniature
from lcv_core.training import trainer as trainer_module
from lcv_core.training.autoencoder import (
    Autoencoder,
    Objective,
    autoencoding_loss,
    initialise,
    kl_divergence,
    latent_statistics,
    to_frames,
    to_pixels,
)
from lcv_core.training.data.clips import sample_clip
from lcv_core.training.logs import METRICS_FILE, read_metrics
from lcv_core.training.recipe import Recipe, load_recipe, merge
from lcv_core.training.stage import Place
from lcv_core.training.stages import build_stage
from lcv_core.training.stages.vae import VAEStage
from lcv_core.training.stages.vae_settings import Material
from lcv_core.training.trainer import Trainer
from lcv_core.weights.checkpoint import open_checkpoint


def random_autoencoder(dtype: torch.dtype = torch.float32) -> Autoencoder:
    """Weights of a size that leaves no path of the network unheard."""
    model = Autoencoder(VAEConfig(base_dim=4))
    g = seeded(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=g))
            else:
                p.normal_(std=0.1 if p.ndim == 1 else 0.8 / p[0].numel() ** 0.5, generator=g)
    return model.to(dtype)


def make_recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "stage": "vae", "steps": 8, "batch_size": 2, "lr": 2e-3, "optimizer": "muon", "model": {"base_dim": 8},
        "data": {
            "height": 32, "width": 48, "statistics": 2,
            "material": [{"source": "base", "num_frames": 5, "height": 16, "width": 16}],
        },
        "samples": {"count": 1},
    }  # fmt: skip
    return Recipe.from_dict(merge(base, changes))


def make_stage(**changes: Any) -> VAEStage:
    stage = build_stage(make_recipe(**changes))
    assert isinstance(stage, VAEStage)
    return stage


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_training_streams_as_inference_does(num_frames: int) -> None:
    model = random_autoencoder()
    pixels = randn(2, 3, num_frames, 16, 24).clamp(-1, 1)
    mean, logvar = model.encode(pixels)
    expected = model.vae.encode(pixels)
    torch.testing.assert_close(mean, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logvar, expected[1], atol=1e-5, rtol=1e-4)
    decoded = model.decode(mean)
    torch.testing.assert_close(decoded.clamp(-1, 1), model.vae.decode(mean), atol=1e-5, rtol=1e-4)


def test_training_layers_equal_the_defaults() -> None:
    model = random_autoencoder()
    from lcv_core.vae.model import WanVAE

    usual = WanVAE(model.vae.config)
    usual.load_state_dict(model.vae.state_dict())
    pixels = randn(1, 3, 9, 16, 24).clamp(-1, 1)
    torch.testing.assert_close(model.vae.encode(pixels)[0], usual.encode(pixels)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_frames", [1, 9])
def test_every_parameter_has_a_gradient(num_frames: int) -> None:
    """Those of the layers that join frames too where there is one frame: several processes wait for them."""
    model = random_autoencoder()
    noise = randn(1, 16, 1 + num_frames // 4, 2, 2)
    decoded, mean, logvar = model(randn(1, 3, num_frames, 16, 16), noise)
    (decoded.sum() + mean.sum() + logvar.sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_gradients_of_the_streamed_loss() -> None:
    model = random_autoencoder(torch.float64)
    pixels = randn(1, 3, 9, 16, 16, dtype=torch.float64).clamp(-1, 1)
    noise = randn(1, 16, 3, 2, 2, seed=1, dtype=torch.float64)
    objective = Objective(l1=0.5, l2=2.0, edges=0.3, kl=0.1)

    def loss() -> Tensor:
        decoded, mean, logvar = model(pixels, noise)
        return autoencoding_loss(decoded, pixels, mean, logvar, objective)[0]

    # One of each kind of layer, in both halves: each looks back in time in its own way.
    encoder = (
        "conv_in.weight", "down_blocks.0.norm1.gamma", "down_blocks.5.time_conv.weight", "conv_out.weight",
        "down_blocks.8.resample.1.weight", "mid_block.attentions.0.proj.weight",
    )  # fmt: skip
    decoder = (
        "conv_in.weight", "up_blocks.0.upsamplers.0.time_conv.weight", "up_blocks.1.resnets.0.conv_shortcut.weight",
        "up_blocks.3.resnets.2.conv2.weight", "conv_out.weight",
    )  # fmt: skip
    parameters = [model.vae.encoder.get_parameter(name) for name in encoder]
    parameters += [model.vae.decoder.get_parameter(name) for name in decoder]
    parameters += [conv.get_parameter("weight") for conv in (model.vae.quant_conv, model.vae.post_quant_conv)]
    check_gradients(loss, parameters, step=1e-7)  # short: an absolute value must not change its sign on the way


def test_kl_divergence_is_that_of_normals() -> None:
    mean, logvar = randn(2, 4, 3), randn(2, 4, 3, seed=1)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    assert kl_divergence(torch.zeros(3), torch.zeros(3)) == 0


def test_the_terms_of_the_loss() -> None:
    pixels = torch.zeros(1, 3, 1, 2, 2)
    decoded = pixels.clone()
    decoded[0, 0, 0, 0, 0] = 0.6  # one of twelve values, with one neighbour across and one below of six each
    mean, logvar = torch.full((1, 16, 1, 1, 1), 2.0), torch.zeros(1, 16, 1, 1, 1)
    loss, terms = autoencoding_loss(decoded, pixels, mean, logvar, Objective(l1=1, l2=10, edges=100, kl=1000))
    expected = {"l1": 0.6 / 12, "l2": 0.36 / 12, "edges": 2 * 0.6 / 6, "kl": 2.0}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    assert loss.item() == pytest.approx(0.05 + 0.3 + 20.0 + 2000.0)


def test_an_untrained_network_shows_the_clip() -> None:
    """Blurred, but nearer by far than a grey picture, and the first frame no worse than the others."""
    model = Autoencoder(VAEConfig(base_dim=8))
    initialise(model.vae, seeded(0))
    pixels = to_pixels(sample_clip(1, 0, num_frames=5).frames.unsqueeze(0))
    mean, logvar = model.vae.encode(pixels)
    errors = (model.vae.decode(mean) - pixels).square().mean(dim=(0, 1, 3, 4))
    grey = (pixels - pixels.mean()).square().mean()
    assert (errors < 0.5 * grey).all() and errors.max() < 1.5 * errors.min()
    assert logvar.exp().mean() < 1e-2 and 0.2 < mean.std() < 5


def test_an_untrained_network_is_the_same_every_time() -> None:
    first, second = make_stage(), make_stage()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    other = make_stage(seed=9)
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))


def test_pixels_and_frames() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 1, 16, 16, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (1, 3, 1, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(to_frames(pixels), frames)


MATERIALS = [
    ({"source": "base", "num_frames": 5}, (5, 32, 48)),
    ({"source": "refined", "num_frames": 1}, (1, 64, 96)),
    ({"source": "upsampled", "num_frames": 9, "height": 40, "width": 24}, (9, 40, 24)),
    ({"source": "refined", "num_frames": 5, "height": 16, "width": 16}, (5, 16, 16)),
]


@pytest.mark.parametrize(("material", "shape"), MATERIALS)
def test_batches_of_a_material(material: dict[str, Any], shape: tuple[int, int, int]) -> None:
    stage = make_stage(data={"material": [material]})
    batch = stage.batch(Place(0, 0, range(3)))
    F, h, w = shape
    assert batch["frames"].shape == (3, F, h, w, 3) and batch["frames"].dtype == torch.uint8
    assert batch["noise"].shape == (3, 16, 1 + F // 4, h // 8, w // 8)
    assert len(batch["names"]) == 3
    again = stage.batch(Place(0, 1, [1]))
    assert torch.equal(again["frames"][0], batch["frames"][1]) and torch.equal(again["noise"][0], batch["noise"][1])
    assert not torch.equal(stage.batch(Place(1, 0, [1]))["noise"][0], batch["noise"][1])


def test_crops_are_around_the_object() -> None:
    material = {"source": "base", "num_frames": 1, "height": 16, "width": 16}
    stage = make_stage(data={"height": 64, "width": 96, "astray": 0.0, "material": [material]})
    frames = stage.batch(Place(0, 0, range(64)))["frames"].float()
    shows_something = frames.flatten(1, 3).std(dim=1).amax(dim=1) > 5
    assert shows_something.float().mean() > 0.8


def test_a_step_has_one_material_and_shares_decide_which() -> None:
    materials = [
        {"source": "base", "num_frames": 1, "height": 16, "width": 16, "share": 3},
        {"source": "base", "num_frames": 1, "height": 24, "width": 24, "share": 1},
    ]
    stage = make_stage(data={"material": materials})
    heights = []
    for step in range(60):
        first, second = (stage.batch(Place(step, micro, [micro]))["frames"] for micro in (0, 1))
        assert first.shape == second.shape
        heights.append(first.shape[2])
    assert 35 <= heights.count(16) <= 55


def test_phases_change_material_and_objective() -> None:
    phases = [
        {"steps": 2},
        {"steps": 2, "objective": {"kl": 0.5}, "data": {"material": [{"source": "base", "num_frames": 1}]}},
    ]
    stage = make_stage(steps=0, phases=phases)
    first, second = (stage.batch(Place(step, 0, [0])) for step in (1, 2))
    assert first["frames"].shape[1:4] == (5, 16, 16) and second["frames"].shape[1:4] == (1, 32, 48)
    assert first["objective"].kl == Objective().kl and second["objective"].kl == 0.5


def test_statistics_make_latents_unit_scale() -> None:
    vae = random_autoencoder().vae
    clips = [sample_clip(2, i, num_frames=n, height=32, width=48).frames for i, n in enumerate((5, 5, 9))]
    mean, std = latent_statistics(vae, clips)
    latents = [((vae.encode(to_pixels(c.unsqueeze(0)))[0][0].flatten(1) - mean[:, None]) / std[:, None]) for c in clips]
    every = torch.cat(latents, dim=1)
    torch.testing.assert_close(every.mean(dim=1), torch.zeros(16, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(every.std(dim=1, correction=0), torch.ones(16, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_channel_that_holds_nothing_has_a_deviation() -> None:
    vae = random_autoencoder().vae
    nn.init.zeros_(vae.quant_conv.get_parameter("weight"))
    _, std = latent_statistics(vae, [sample_clip(2, 0, num_frames=1, height=32, width=48).frames])
    assert (std > 0).all() and std.isfinite().all()


def test_it_learns_and_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)
    recipe = make_recipe(steps=40, log_every=10, sample_every=40, precision="bf16", export_precision="bf16")
    stage = build_stage(recipe)
    assert Trainer(stage, recipe, tmp_path, device="cpu").run().finished
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and rows[-1]["psnr"] > rows[0]["psnr"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["base-00000040.png", "refined-00000040.png"]

    vae = open_checkpoint(tmp_path / "model").load_vae()
    assert vae.dtype == torch.bfloat16 and vae.config.base_dim == 8
    vae = vae.float()
    # The statistics are of other clips: near unit scale, not at it.
    clips = [sample_clip(5, i, num_frames=17, height=32, width=48).frames for i in range(6)]
    latents = torch.cat([vae.normalize(vae.encode(to_pixels(c.unsqueeze(0)))[0])[0].flatten(1) for c in clips], dim=1)
    assert 0.4 < latents.std(dim=1).median() < 2.5 and latents.mean(dim=1).abs().median() < 1.5
    assert math.isfinite(float(vae.decode(vae.denormalize(torch.zeros(1, 16, 2, 2, 2))).sum()))


def trained(folder: Path) -> Path:
    """A checkpoint of an untrained VAE, whose latents have statistics that no clip gives."""
    stage = make_stage()
    stage.export(stage.model, folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    config |= {"latents_mean": [0.25] * 16, "latents_std": [2.0] * 16}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    return folder


def going_on(folder: Path, **changes: Any) -> VAEStage:
    recipe = make_recipe(**changes)
    stage = build_stage(dataclasses.replace(recipe, model={"checkpoint": str(folder)}))
    assert isinstance(stage, VAEStage)
    return stage


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """With its weights and width, and the statistics that models of its latents know."""
    folder = trained(tmp_path / "first")
    stage = going_on(folder)
    before = open_checkpoint(folder).load_vae()
    assert stage.model.vae.config == before.config and before.config.base_dim == 8
    for name, p in stage.model.vae.state_dict().items():
        assert p.equal(before.state_dict()[name])
    with torch.no_grad():
        stage.model.vae.quant_conv.weight.mul_(1.5)
    stage.export(stage.model, tmp_path / "second")
    after = open_checkpoint(tmp_path / "second").load_vae()
    assert after.config == before.config
    assert not after.quant_conv.weight.equal(before.quant_conv.weight)


def test_an_anchor_holds_latents_but_those_of_textures(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    kinds = {s: [{"source": s, "num_frames": 5, "height": 16, "width": 16}] for s in ("base", "upsampled", "refined")}
    free, held = ({"objective": {"anchor": weight}} for weight in (0.0, 2.0))
    for source, material in kinds.items():
        stages = [going_on(folder, data={"material": material}, **objective) for objective in (free, held)]
        batch = stages[0].batch(Place(0, 0, [0, 1]))
        for stage in stages:
            with torch.no_grad():
                stage.model.vae.quant_conv.get_parameter("bias")[:16] += 1.0  # half a standard deviation
        losses = [s.loss(s.model, batch | {"objective": s.objectives[0]})[0].item() for s in stages]
        assert losses[1] - losses[0] == pytest.approx(0.0 if source == "refined" else 2.0 * 0.5**2, abs=1e-4)


def test_textures_and_motions_come_in_turn() -> None:
    kind = Material("refined", 1, textures=("checks", "dots", "checks"), motions=("spins",))
    assert [kind.fixed(n)["texture"] for n in range(5)] == ["checks", "dots", "checks", "checks", "dots"]
    assert kind.fixed(7)["motion"] == "spins" and Material("base", 1).fixed(3) == {}
    material = [{"source": "refined", "num_frames": 1, "height": 32, "width": 32, "textures": ["stripes"]}]
    plain = [{**material[0], "textures": ["none"]}]
    size = {"height": 64, "width": 96}  # shown at 128x192, which is fine enough
    striped, bare = (make_stage(data={"material": m, **size}).batch(Place(0, 0, [0, 1])) for m in (material, plain))
    assert striped["names"] == bare["names"] and not striped["frames"].equal(bare["frames"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"base_dim": 4}}, "model.base_dim must be even and at least 8, got 4"),
        ({"data": {"material": []}}, "data.material names no material"),
        ({"data": {"material": [{"source": "base", "num_frames": 4}]}}, "num_frames must be 4k\\+1, got 4"),
        ({"data": {"material": [{"source": "base", "num_frames": 1, "height": 64, "width": 64}]}}, "does not fit into"),
        ({"data": {"material": [{"source": "base", "num_frames": 1, "height": 20, "width": 16}]}}, "multiples of 8"),
        ({"data": {"material": [{"source": "base", "num_frames": 1, "height": 16}]}}, "or neither for whole frames"),
        ({"data": {"material": [{"source": "fine", "num_frames": 1}]}}, "source must be 'base', 'refined' or"),
        ({"objective": {"l1": 0, "l2": 0}}, "l1 or l2 must be above 0"),
        ({"objective": {"kl": -1}}, "objective.kl must not be negative"),
        ({"objective": {"anchor": 0.5}}, "objective.anchor needs model.checkpoint"),
        ({"model": {"checkpoint": "somewhere"}}, "leave it out"),
        ({"data": {"material": [{"source": "base", "num_frames": 1, "textures": ["wool"]}]}}, "textures has 'wool'"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_stage(**changes)


def test_the_shipped_recipe() -> None:
    stage = build_stage(load_recipe("mini/vae"))
    assert isinstance(stage, VAEStage)
    sizes = {(kind.source, kind.num_frames == 1) for data in stage.data for kind in data.material}
    assert {("base", False), ("refined", False), ("upsampled", False)} <= sizes
    fine = load_recipe("mini/vae_fine")
    assert fine.model == {"checkpoint": "outputs/mini/vae/model"}
    more = build_stage(dataclasses.replace(fine, model={"checkpoint": str(miniature())}))
    assert isinstance(more, VAEStage) and all(objective.anchor for objective in more.objectives)


def test_material_knows_its_share() -> None:
    with pytest.raises(InputError, match="share must be above 0"):
        Material("base", 1, share=0.0)
