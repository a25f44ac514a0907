"""What a plan counts against the bytes that are alive, at the widths of the released model: never under, 10 % over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import seeded

from lcv_core.config import DiTConfig, TextConfig, VAEConfig
from lcv_core.denoise import Guidance, denoise
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.rope import rope_table
from lcv_core.live_bytes import LiveBytes
from lcv_core.offload.feeds import FromMemory
from lcv_core.offload.lanes import lanes_of
from lcv_core.offload.layout import Layout
from lcv_core.offload.turns import BlocksInTurn
from lcv_core.pipelines import Components
from lcv_core.pipelines.base import StreamingDecoder
from lcv_core.planning import Job
from lcv_core.planning.choose import Planner
from lcv_core.planning.machine import Machine, Speed
from lcv_core.planning.plan import Models
from lcv_core.planning.settings import Settings
from lcv_core.text.encoder import TextStates
from lcv_core.vae.model import WanVAE
from lcv_core.vae.tiling import Tiling

CPU = Machine("CPU", "cpu", 10**12, 10**12, Speed(1e12, 1e10, 1e10))
CARD = Machine("card", "gpu", 10**12, 10**12, Speed(1e14, 1e12, 1e10))
HALF = Job(together=True, device="cpu", compute_dtype="bf16", text_dtype="bf16", vae_dtype="bf16", guidance="off")


def assert_within_a_tenth(planned: int, alive: int) -> None:
    assert alive <= planned <= 1.1 * alive, f"{planned} for {alive} bytes: {planned / alive:.3f}"


def planner(job: Job, depth: int = 1, machine: Machine = CPU) -> Planner:
    return Planner(job, Models(DiTConfig(depth=depth), VAEConfig(), TextConfig()), machine)


@pytest.fixture(scope="module")
def dit() -> LongCatDiT:
    """One block of the released width; all zeros, for bytes are counted."""
    model = LongCatDiT(DiTConfig(depth=1), device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    for tensor in model.parameters():
        tensor.data.zero_()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("num_cond_frames", [0, 5])
def test_sampling(dit: LongCatDiT, num_cond_frames: int) -> None:
    """Both branches of guidance, their text states counted."""
    job = replace(HALF, guidance="sequential", height=128, width=96, num_frames=17, num_cond_frames=num_cond_frames)
    n_c = 2 if num_cond_frames else 0
    x = torch.zeros(1, 16, 5, 16, 12)
    rope_table.cache_clear()
    with LiveBytes() as live:
        text, negative = (
            TextStates(torch.zeros(1, 512, 4096), torch.ones(1, 512, dtype=torch.int64)) for _ in range(2)
        )
        denoise(
            dit, x, torch.tensor([1.0, 0.0]), text=text, guidance=Guidance(4.0, negative), num_cond_latents=n_c,
            use_kv_cache=True,
        )  # fmt: skip
    made = planner(job)
    stage = made.plan(Settings()).stage("sampling")
    assert_within_a_tenth(stage.besides_weights, live.peak)
    parts = sum(p.nbytes for p in dit.parameters()) + made.models.vae_weights(job)
    assert_within_a_tenth(made.choice(Settings()).stage("sampling").vram, live.peak + parts)


@pytest.mark.parametrize("tile", [0, 64])
def test_decoding(dit: LongCatDiT, tile: int) -> None:
    vae = WanVAE(device="meta", dtype=torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    for tensor in vae.parameters():
        tensor.data.zero_()
    latents = torch.randn(1, 16, 3, 12, 12, generator=seeded())
    c = Components(dit=dit, vae=vae, tiling=Tiling(tile, tile * 3 // 4) if tile else None)
    with LiveBytes() as live:
        for _ in StreamingDecoder(c).stream(latents):
            pass
    stage = planner(replace(HALF, height=96, width=96, num_frames=9, vae_tile=tile)).plan(Settings(tile=tile))
    assert_within_a_tenth(stage.stage("VAE decode").besides_weights, live.peak)


@pytest.mark.parametrize("depth", [1, 3])
def test_blocks_that_are_streamed(depth: int) -> None:
    """Of a narrow model that lanes without a device move: two slots, and what waits in system memory."""
    config = DiTConfig(depth=depth, hidden_size=512, num_heads=4, caption_channels=64, adaln_tembed_dim=64)
    model = LongCatDiT(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    blocks = sum(p.nbytes for p in model.blocks.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - blocks
    in_turn = BlocksInTurn(list(model.blocks), lanes_of(torch.device("cpu")), "ram")
    feed = in_turn._feed
    assert isinstance(feed, FromMemory)
    waiting = sum(buffer.nbytes for buffer in feed._buffers.values())
    models = Models(config, VAEConfig(), TextConfig())
    job = replace(HALF, device="gpu", stream="ram")
    assert_within_a_tenth(models.transformer_on_device(job), outside + in_turn.nbytes)
    assert waiting <= models.transformer_in_ram(job) <= 1.1 * waiting + models.block(job)  # one while it is copied
    in_turn.close()


def test_a_block_of_the_released_model_in_a_slot() -> None:
    block = LongCatDiT(DiTConfig(depth=1), device="meta", dtype=torch.bfloat16).blocks[0]
    size = Layout.of(block).nbytes
    planned = Models(DiTConfig(), VAEConfig(), TextConfig()).block(HALF)
    assert size <= planned <= 1.001 * size


def test_a_kv_cache_in_system_memory_is_counted_there() -> None:
    job = replace(HALF, device="gpu", num_cond_frames=13)
    made = planner(job, depth=48, machine=CARD)
    here, there = (made.plan(Settings(cache_place=place)).stage("sampling") for place in ("device", "cpu"))
    assert there.ram - here.ram == here.kv_cache == 4_907_335_680
    assert there.kv_cache == 3 * here.kv_cache // 48
    half = made.plan(Settings(cache_place="cpu", cache_storage="fp8")).stage("sampling")
    assert half.ram == pytest.approx(there.ram / 2, rel=1e-3)
