"""Choosing settings for a machine: the order, what is fixed, and the goals that the released model is planned for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import DIT, VAE

from lcv_core.cli.fit import Known, make_planner
from lcv_core.cli.job import InputFile
from lcv_core.cli.job import Job as CliJob
from lcv_core.config import BSAConfig, DiTConfig, TextConfig, VAEConfig
from lcv_core.errors import InputError
from lcv_core.planning import Job, Refine
from lcv_core.planning.choose import ALIKE, MARGIN, PATIENCE, QUALITY, TILES, Planner
from lcv_core.planning.fallback import moves, remaining
from lcv_core.planning.machine import CARDS, Machine, Speed, machine_named
from lcv_core.planning.plan import Models
from lcv_core.planning.reasons import reasons
from lcv_core.planning.seconds import Work
from lcv_core.planning.settings import Settings
from lcv_core.planning.sparse import sparse_bytes

RELEASED = Models(DiTConfig(), VAEConfig(), TextConfig())
CLIP = Job(together=True, sparse="triton")
# As the command line refines: windows of 93 frames, of which a clip of 93 is one.
REFINED = replace(CLIP, refine=Refine(window=93), refine_only=True, keeps_frames=True, guidance="off")


def card(name: str = "rtx4070", vram: float | None = None, ram: float | None = None) -> Machine:
    return machine_named(name).limited(vram, ram)


def planner(job: Job = CLIP, machine: Machine | None = None, **options: object) -> Planner:
    return Planner(job, RELEASED, card() if machine is None else machine, **options)  # type: ignore[arg-type]


def test_a_clip_at_480p_within_12_gb_of_vram_and_32_of_ram() -> None:
    best = planner(machine=card(vram=12, ram=32)).best()
    assert best.vram < 12e9
    assert best.ram < 32e9
    assert best.settings == Settings(stream="ram", text_device="cpu", resident=best.settings.resident)


def test_a_refinement_to_720p_and_189_frames_within_16_gb_of_vram() -> None:
    made = planner(REFINED, card("rtx4080", 16, 32))
    refine = made.job.refine
    assert refine is not None
    assert [window.frames_encoded for window in refine.windows(93)] == [189]
    best = made.best()
    assert best.vram < 16e9
    assert best.settings.window is None
    assert best.settings.weights == "plain"


def test_where_all_fits_nothing_is_changed() -> None:
    made = planner(machine=card("h100", ram=128))
    assert made.best().settings == Settings()
    assert reasons(made, made.best()) == ["everything fits as it is: plain weights, nothing tiled or streamed"]


@pytest.mark.parametrize("job", [CLIP, replace(CLIP, num_cond_frames=13), REFINED], ids=["clip", "continue", "refine"])
@pytest.mark.parametrize("vram", [8, 12, 16, 24, 32])
def test_every_step_fits_with_its_margin_and_the_best_comes_first(job: Job, vram: int) -> None:
    made = planner(job, card(vram=vram, ram=48))
    steps = made.steps()
    if not steps:
        with pytest.raises(InputError, match="does not fit on rtx4070"):
            made.best()
        return
    for step in steps:
        assert step.vram * (1 + MARGIN) <= made.machine.free
        assert step.ram <= made.machine.ram
    large = min(step.seconds for step in steps if step.settings.weights not in ("q5_k", "q4_k"))
    ranks = [(step.seconds > PATIENCE * large, QUALITY.index(step.settings.weights)) for step in steps]
    assert ranks == sorted(ranks)
    assert steps[0] == made.best()


def test_plain_weights_that_are_streamed_come_before_eight_bits_that_stay() -> None:
    steps = planner(machine=card("rtx4090", ram=64)).steps()
    first = steps[0].settings
    assert (first.weights, first.stream) == ("plain", "ram")
    assert any(step.settings.weights == "int8" and step.settings.stream == "off" for step in steps)


def test_a_short_clip_does_not_wait_for_its_blocks() -> None:
    """Seventeen small frames take less time than their blocks take to come from disk."""
    short = replace(CLIP, num_frames=17, height=256, width=256)
    best = planner(short, card("rtx4090", ram=16), work=Work(steps=16)).best()
    assert (best.settings.weights, best.settings.stream) == ("q8_0", "off")


def test_of_equal_numbers_disk_comes_after_memory_unless_it_is_much_faster() -> None:
    steps = [step for step in planner(machine=card(ram=32)).steps() if step.settings.weights == "plain"]
    assert [step.settings.stream for step in steps] == ["ram", "disk"]
    assert steps[0].seconds <= ALIKE * steps[1].seconds


def test_a_kv_cache_moves_to_system_memory_before_it_loses_bits() -> None:
    job = replace(CLIP, num_cond_frames=13)
    best = planner(job, card(vram=8, ram=48)).best()
    assert (best.settings.cache_place, best.settings.cache_storage) == ("cpu", "model")
    on_device = planner(job, card(vram=8, ram=48), fixed={"cache_place": "device"}).best()
    assert on_device.settings.cache_storage == "fp8"


FIXED = {"weights": "int8", "stream": "disk", "tile": 128, "cfg_mode": "batched", "window": 45, "cache_place": "cpu"}


@pytest.mark.parametrize("name", FIXED)
def test_what_is_named_is_never_changed(name: str) -> None:
    job = REFINED if name == "window" else replace(CLIP, num_cond_frames=13)
    fixed = {name: FIXED[name]}
    if name == "weights":
        fixed["stream"] = "ram"
    made = planner(job, card("rtx4090", ram=64), fixed=fixed)
    steps = made.steps()
    assert steps
    assert {getattr(step.settings, name) for step in steps} == {FIXED[name]}
    for stage in ("sampling", "VAE decode"):
        assert all(name not in move.changes for move in moves(made, steps[0].settings, stage))


def test_a_job_that_does_not_fit_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"refine VAE decode misses [\d.]+ GB of its memory .* ask for fewer --frames"):
        planner(REFINED, card(vram=4, ram=32)).best()


def test_reasons_name_the_stage_that_would_not_fit() -> None:
    made = planner(replace(CLIP, num_cond_frames=13), card(vram=8, ram=32))
    lines = reasons(made, made.best())
    assert any(line.startswith("the text encoded on the CPU: with the text encoded on the device text encode needs")
               for line in lines)  # fmt: skip
    assert any(line.startswith("the blocks streamed from") and "GB are free" in line for line in lines)


def test_a_stage_that_misses_its_margin_alone_says_so() -> None:
    """11.8 GB of text encoder do not fit 12.3 GB that are free, for the margin does not."""
    made = planner(machine=card(vram=12.88, ram=32))
    text = next(line for line in reasons(made, made.best()) if "text encoded on the CPU" in line)
    assert "needs 11.8 GB and 5% to spare, of which 12.3 GB are free" in text


def test_attention_in_eight_bits_needs_room_for_some_heads() -> None:
    """A byte for each number of q, k and v of eight of the 32 heads at 720p, and 4 for each of their queries."""
    grid = (48, 44, 80)
    eight, sixteen = (
        sparse_bytes(BSAConfig(eight_bits=bits), grid, grid, heads=32, head_dim=128, itemsize=2, kernels="triton")
        for bits in (True, False)
    )
    assert eight - sixteen == 8 * math.prod(grid) * (3 * 128 + 4)


def test_shorter_windows_only_where_whole_ones_do_not_fit() -> None:
    windows = [planner(REFINED, card(vram=vram, ram=64)).best().settings.window for vram in (16, 13, 10)]
    assert windows[0] is None
    assert windows[1] is not None and windows[2] is not None
    assert windows[2] <= windows[1] < 93


def test_a_small_model_on_a_cpu_is_left_as_it_is() -> None:
    machine = Machine("CPU", "cpu", 8_000_000_000, 8_000_000_000, Speed(1e11, 1e10, 1e10))
    text = TextConfig(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    small = Models(DIT, replace(VAE, base_dim=16), text)
    job = replace(CLIP, height=96, width=160, compute_dtype="fp32", text_dtype="fp32", vae_dtype="fp32", device="cpu")
    best = Planner(replace(job, weight_dtype="fp32"), small, machine).best()
    assert best.settings == Settings()
    assert best.ram == best.vram


def test_every_chain_of_moves_ends_and_each_needs_less_than_before() -> None:
    made = planner(replace(CLIP, num_cond_frames=13), card("h100", ram=128))
    chains = remaining(made, made.best())
    assert chains["text encode"] == ["the text encoded on the CPU"]
    assert chains["sampling"] == [
        "the KV cache in system memory", "the blocks streamed from system memory", "the KV cache in fp8",
    ]  # fmt: skip
    assert chains["VAE decode"][0] == f"VAE tiles of {TILES[1]} pixels"
    settings, needs = made.best().settings, []
    while (move := next(moves(made, settings, "sampling"), None)) is not None:
        settings = move.settings
        needs.append(made.choice(settings).stage("sampling").vram)
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == len(needs) == 3


def test_where_system_memory_ran_out_blocks_go_to_disk() -> None:
    made = planner(machine=card(ram=32))
    found = [move.changes for move in moves(made, Settings(stream="ram"), "sampling", host=True)]
    assert found == [{"stream": "disk"}]
    assert not list(moves(made, Settings(stream="ram"), "sampling", host=True, disk=False))


def test_triton_needs_less_than_gathering() -> None:
    stages = {
        kernels: planner(replace(REFINED, sparse=kernels)).plan(Settings(stream="ram")).stage("refine sampling")
        for kernels in ("triton", "gather")
    }
    dense = replace(REFINED, refine=Refine(window=93, bsa=None))
    assert stages["triton"].activations < stages["gather"].activations
    least = planner(dense).plan(Settings(stream="ram")).stage("refine sampling").activations
    assert least <= stages["triton"].activations < 1.1 * least


def test_names_of_cards() -> None:
    names = {
        "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx4070tisuper", "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "rtx5090": "rtx5090",
    }  # fmt: skip
    for name, known in names.items():
        assert machine_named(name).name == known
    for unknown in ("NVIDIA GeForce RTX 4090 Super", "GTX 1080", "potato"):
        with pytest.raises(InputError, match="use cpu, cuda, or one of"):
            machine_named(unknown)
    assert len(set(CARDS)) == len(CARDS)


@pytest.mark.parametrize(("vram", "ram"), [(0.5, None), (None, 2.0)])
def test_a_machine_with_nothing_left_is_refused(vram: float | None, ram: float | None) -> None:
    with pytest.raises(InputError, match="leaves nothing for a job"):
        card(vram=vram, ram=ram)


def test_the_command_lines_jobs() -> None:
    def shape(**fields: object) -> Job:
        job = CliJob(task=fields.pop("task", "t2v"), model="", prompts=[""], seed=0, **fields)  # type: ignore[arg-type]
        return make_planner(job, Known(), card(), dtype=torch.bfloat16).job

    assert (shape().height, shape().width, shape().num_frames, shape().guidance) == (480, 832, 93, "sequential")
    assert shape(schedule="distilled").guidance == "off"
    assert shape(task="i2v").num_cond_frames == 1
    assert shape(task="continue").num_cond_frames == 13
    assert shape(attention="bsa").bsa == BSAConfig()
    long = shape(task="long", num_segments=2)
    assert (long.num_cond_frames, long.encoded_frames, long.decoder_waits) == (13, 0, True)
    assert shape(task="long", num_segments=2, image=InputFile("i", "")).encoded_frames == 1
    clip = shape(task="long", num_segments=1, clip=InputFile("c", ""))
    assert (clip.num_cond_frames, clip.encoded_frames, clip.decoder_waits) == (13, 13, False)
    frames = shape(task="long", num_segments=2, handover="frames")
    assert (frames.num_cond_frames, frames.encoded_frames, frames.decoder_waits) == (13, None, False)
    refined = shape(task="refine")
    assert refined.refine_only and refined.keeps_frames
    assert refined.refine is not None
    assert (refined.refine.height, refined.refine.width, refined.refine.window) == (704, 1280, 93)
    assert len(refined.refine.windows(refined.num_frames)) == 1
    assert shape(task="refine", window=61).refine.window == 61  # type: ignore[union-attr]
