"""The memory planner: estimates against the tensors that are really alive, and the numbers of the released model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from lcv_bsa.backends import rows
from tiny_models import DIT, VAE, make_dit, randn, seeded
from torch import Tensor

from lcv_bsa import ops
from lcv_core.config import BSAConfig, DiTConfig, TextConfig, VAEConfig
from lcv_core.denoise import Guidance, denoise
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.rope import rope_table
from lcv_core.errors import InputError
from lcv_core.live_bytes import LiveBytes
from lcv_core.planning import Job, Plan, Refine, Sampling, Stage, advice, kv_cache_bytes, make_plan, size_text, verdict
from lcv_core.planning.text import text_bytes, text_parameters
from lcv_core.planning.transformer import AdapterName, adapter_bytes, dit_parameters, forward_bytes
from lcv_core.planning.vae import decode_bytes, encode_bytes, vae_parameters
from lcv_core.shapes import token_grid
from lcv_core.text.encoder import TextStates, build_text_model
from lcv_core.vae.model import WanVAE
from lcv_core.vae.tiling import Tiling, decode_stream_tiled, encode_tiled
from lcv_core.weights.init import lora_state
from lcv_core.weights.lora import load_lora

DTYPES = (torch.float32, torch.bfloat16)
MOST = 1.25  # how far an estimate may be above what is alive
# The tiny model, whose feed-forward is its peak; one with the proportions of the released model; one whose peak is
# attention.
SHAPES = {"tiny": {}, "real": {"hidden_size": 192, "num_heads": 6}, "attention": {"hidden_size": 256, "mlp_ratio": 1.0}}
LATENTS = (9, 20, 24)
ADAPTERS: dict[AdapterName, str] = {"distill": "cfg_step_lora", "refinement": "refinement_lora"}


def assert_close_above(estimate: int, alive: int, most: float = MOST) -> None:
    assert alive <= estimate <= most * alive, f"{estimate} for {alive} bytes: {estimate / alive:.3f}"


def states(batch: int, length: int = 64) -> TextStates:
    return TextStates(randn(batch, length, DIT.caption_channels), torch.ones(batch, length, dtype=torch.int64))


def forward_peak(
    dit: LongCatDiT, latents: tuple[int, int, int], *, batch: int, num_cond_latents: int, cached: bool,
    bsa: BSAConfig | None = None,
) -> int:  # fmt: skip
    """Bytes alive at the peak of a forward, tables that are made once counted."""
    x, n_c, given = randn(batch, DIT.in_channels, *latents), num_cond_latents, states(batch)
    timestep = torch.full((batch, latents[0]), 500.0)
    timestep[:, :n_c] = 0.0
    cache = None
    if cached:
        cache = dit.build_kv_cache(x[:1, :, :n_c], bsa)
        x, timestep = x[:, :, n_c:].clone(), timestep[:, n_c:].clone()
    rope_table.cache_clear()
    rows._places.cache_clear()
    with torch.no_grad(), LiveBytes() as live:
        dit(x, timestep, given.states, given.mask, num_cond_latents=n_c, kv_cache=cache, bsa=bsa)
    return live.peak


def forward_estimate(
    config: DiTConfig, latents: tuple[int, int, int], dtype: torch.dtype, *, batch: int, num_cond_latents: int,
    cached: bool, bsa: BSAConfig | None = None, adapters: bool = False,
) -> int:  # fmt: skip
    T, h, w = token_grid(latents, config.patch_size)
    frames = T - num_cond_latents if cached else T
    return forward_bytes(
        config, (frames, h, w), batch=batch, num_cond_latents=num_cond_latents, cached=cached, text_length=64,
        itemsize=dtype.itemsize, bsa=bsa, adapters=adapters, device="cpu",
    )  # fmt: skip


CASES = [(1, 0, False), (2, 2, False), (2, 2, True), (1, 7, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_cond_latents", "cached"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: str, batch: int, num_cond_latents: int, cached: bool, dtype: torch.dtype) -> None:
    dit = make_dit(dtype, **SHAPES[shape])
    case = {"batch": batch, "num_cond_latents": num_cond_latents, "cached": cached}
    estimate = forward_estimate(dit.config, LATENTS, dtype, **case)
    assert_close_above(estimate, forward_peak(dit, LATENTS, **case), 1.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("cached", [False, True])
def test_forward_with_an_adapter_at_run_time(adapter: AdapterName, cached: bool, dtype: torch.dtype) -> None:
    dit = make_dit(dtype, **SHAPES["real"])
    shapes = {name: tuple(p.shape) for name, p in dit.state_dict().items()}
    state = {name: tensor.to(dtype) for name, tensor in lora_state(shapes, ADAPTERS[adapter], rank=128).items()}
    load_lora(dit, state)
    case = {"batch": 2, "num_cond_latents": 2, "cached": cached}
    forward_peak(dit, LATENTS, **case)  # the first forward prepares the adapter's matrices, which are weights
    estimate = forward_estimate(dit.config, LATENTS, dtype, adapters=True, **case)
    assert_close_above(estimate, forward_peak(dit, LATENTS, **case), 1.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapters_weights(adapter: AdapterName, dtype: torch.dtype) -> None:
    """What the file holds, and what the first forward makes of it."""
    dit = make_dit(dtype, **SHAPES["real"])
    shapes = {name: tuple(p.shape) for name, p in dit.state_dict().items()}
    state = lora_state(shapes, ADAPTERS[adapter], rank=128)
    state = {name: tensor.to(dtype) for name, tensor in state.items() if "alpha" not in name}
    kept = sum(tensor.nbytes for tensor in state.values())
    with torch.no_grad(), LiveBytes() as live:
        handle = load_lora(dit, state)
        del state
        given = states(1)
        dit(randn(1, 16, 1, 2, 2), torch.zeros(1), given.states, given.mask)
        made = live.now
    assert handle.active
    estimate = adapter_bytes(dit.config, adapter, dtype.itemsize)
    assert estimate >= made
    assert estimate <= MOST * (kept + made)


SPARSE = {
    "half": BSAConfig(sparsity=0.5),
    "as trained": BSAConfig(),
    "large blocks": BSAConfig(block_q=(4, 8, 8), block_k=(4, 8, 8)),
    "unlike blocks": BSAConfig(sparsity=0.75, block_q=(2, 4, 4), block_k=(4, 4, 8)),
}


@pytest.fixture
def open_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators of lcv_bsa as plain functions: what is alive inside them is seen."""
    monkeypatch.setattr(torch.ops.lcv_bsa, "select", ops._select._init_fn)
    monkeypatch.setattr(torch.ops.lcv_bsa, "attention", ops._attention._init_fn)


@pytest.mark.usefixtures("open_operators")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(
    ("latents", "num_cond_latents", "cached"),
    [(LATENTS, 0, False), (LATENTS, 2, False), ((8, 32, 32), 4, True), ((9, 12, 20), 2, True)],
)
def test_forward_with_block_sparse_attention(
    latents: tuple[int, int, int], num_cond_latents: int, cached: bool, name: str, dtype: torch.dtype
) -> None:
    dit = make_dit(dtype, **SHAPES["real"])
    case = {"batch": 1, "num_cond_latents": num_cond_latents, "cached": cached, "bsa": SPARSE[name]}
    assert_close_above(forward_estimate(dit.config, latents, dtype, **case), forward_peak(dit, latents, **case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_cache(dtype: torch.dtype) -> None:
    dit = make_dit(dtype, **SHAPES["real"])
    cache = dit.build_kv_cache(randn(1, 16, 4, 8, 12))
    held = sum(k.nbytes + v.nbytes for k, v in cache)
    assert kv_cache_bytes(dit.config, token_grid((9, 8, 12), dit.config.patch_size), 4, dtype.itemsize) == held
    dit.set_kv_cache(storage="fp8")
    run = Sampling((9, 8, 12), num_cond_latents=4, itemsize=dtype.itemsize, cache_storage="fp8")
    assert run.kv_cache(dit.config) == dit.build_kv_cache(randn(1, 16, 4, 8, 12)).nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["off", "sequential", "batched"])
@pytest.mark.parametrize(("num_cond_latents", "differ"), [(0, False), (2, False), (2, True), (7, False)])
def test_sampling(mode: str, num_cond_latents: int, differ: bool, dtype: torch.dtype) -> None:
    """The whole loop, guidance and the making of the KV cache included."""
    dit, batch = make_dit(dtype, **SHAPES["real"]), 2
    x, given = randn(batch, 16, *LATENTS), states(batch)
    if not differ:
        x[:] = x[:1].clone()
    guidance = Guidance() if mode == "off" else Guidance(4.0, given, mode=mode)  # type: ignore[arg-type]
    rope_table.cache_clear()
    with LiveBytes() as live:
        denoise(
            dit, x, torch.tensor([1.0, 0.5, 0.0]), text=given, guidance=guidance, num_cond_latents=num_cond_latents,
            use_kv_cache=True,
        )  # fmt: skip
    samples = 2 * batch if mode == "batched" else batch
    run = Sampling(
        LATENTS, batch=samples, num_cond_latents=num_cond_latents, conditions=samples if differ else 1, text_length=64,
        itemsize=dtype.itemsize, device="cpu",
    )  # fmt: skip
    # The loop's latents are counted generously: beside a width of 192 they are half of all, beside 4096 a twentieth.
    assert_close_above(run.activations(dit.config) + run.kv_cache(dit.config), live.peak, 1.7)


def make_vae(base_dim: int, dtype: torch.dtype) -> WanVAE:
    return WanVAE(replace(VAE, base_dim=base_dim)).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("base_dim", "batch"), [(4, 2), (16, 1)])
@pytest.mark.parametrize("latents", [(1, 8, 8), (3, 8, 12)])
@pytest.mark.parametrize("tiling", [None, Tiling(64, 32)])
def test_vae(
    tiling: Tiling | None, latents: tuple[int, int, int], batch: int, base_dim: int, dtype: torch.dtype
) -> None:
    vae = make_vae(base_dim, dtype)
    options = {"batch": batch, "itemsize": dtype.itemsize, "tiling": tiling}
    z = torch.randn(batch, 16, *latents, generator=seeded())
    with torch.no_grad(), LiveBytes() as decoding:
        for _ in vae.decode_stream(z) if tiling is None else decode_stream_tiled(vae, z, tiling):
            pass
    assert_close_above(decode_bytes(vae.config, latents, **options), decoding.peak)
    pixels = torch.randn(batch, 3, 4 * latents[0] - 3, 8 * latents[1], 8 * latents[2], generator=seeded())
    with LiveBytes() as encoding:
        vae.encode(pixels) if tiling is None else encode_tiled(vae, pixels, tiling)
    assert_close_above(encode_bytes(vae.config, latents, **options), encoding.peak)


def test_the_vae_stages_of_a_plan_count_whole_clips() -> None:
    """As a host has them that hands over clips, not frames."""
    job = Job(height=96, width=160, num_frames=13, vae_dtype="fp32")
    stage = make_plan(job, DIT, replace(VAE, base_dim=16)).stage("VAE decode")
    vae, z = make_vae(16, torch.float32), torch.randn(1, 16, 4, 12, 20, generator=seeded())
    with LiveBytes() as live:
        vae.decode(z)
    assert stage.weights == sum(p.nbytes for p in vae.parameters())
    assert_close_above(stage.activations, live.peak)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("batch", "length"), [(1, 512), (2, 512), (2, 128)])
def test_text_encoder(batch: int, length: int, attention: str, dtype: torch.dtype) -> None:
    """The estimate is of the attention that takes most, fp32 softmax included, which is not this one in bf16."""
    config = TextConfig(vocab_size=400, d_model=512, d_kv=64, d_ff=1280, num_layers=2, num_heads=8)
    model = build_text_model(config, device="cpu", dtype=dtype)
    model.set_attn_implementation(attention)
    ids, mask = torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.int64)
    with torch.no_grad(), LiveBytes() as live:
        model(input_ids=ids, attention_mask=mask)
    exact = attention == "eager" and dtype == torch.float32
    estimate = text_bytes(config, batch=batch, length=length, itemsize=dtype.itemsize)
    assert_close_above(estimate, live.peak, MOST if exact else 3.0)


def fp8_names(model: LongCatDiT) -> list[str]:
    return [
        name for name, p in model.named_parameters() if re.search(r"\.(attn|cross_attn|ffn)\.", name) and p.ndim > 1
    ]


@pytest.mark.parametrize("config", [DiTConfig(), DIT, DiTConfig(hidden_size=192, depth=3, num_heads=6)])
def test_parameters_of_the_transformer(config: DiTConfig) -> None:
    model = LongCatDiT(config, device="meta")
    parameters = dict(model.named_parameters())
    matrices = sum(parameters[name].numel() for name in fp8_names(model))
    total = sum(p.numel() for p in parameters.values())
    assert dit_parameters(config) == (matrices, total - matrices)


@pytest.mark.parametrize("config", [VAEConfig(), VAE])
def test_parameters_of_the_vae(config: VAEConfig) -> None:
    assert vae_parameters(config) == sum(p.numel() for p in WanVAE(config, device="meta").parameters())


@pytest.mark.parametrize("config", [TextConfig(), TextConfig(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)])
def test_parameters_of_the_text_encoder(config: TextConfig) -> None:
    assert text_parameters(config) == sum(p.numel() for p in build_text_model(config).parameters())


def test_the_released_model() -> None:
    assert sum(dit_parameters(DiTConfig())) == 13_581_071_424
    assert text_parameters(TextConfig()) == 5_680_910_336
    assert vae_parameters(VAEConfig()) == 126_892_531
    assert kv_cache_bytes(DiTConfig(), (24, 30, 52), 4) == 4_907_335_680


def test_a_plan_of_the_released_model() -> None:
    """93 frames of 480x832 that go on from 13, in bf16: from configurations alone."""
    plan = make_plan(Job(num_cond_frames=13))
    assert [stage.name for stage in plan.stages] == ["text encode", "VAE encode", "sampling", "VAE decode"]
    sampling = plan.stage("sampling")
    assert sampling.weights == 2 * 13_581_071_424
    assert sampling.kv_cache == 4_907_335_680
    assert sampling.total == plan.peak
    # In bf16: block input, q and what attention gives, of 31,200 noise tokens; k and v, of 37,440 tokens.
    assert_close_above(sampling.activations, (3 * 31_200 + 2 * 37_440) * 4096 * 2)
    assert plan.stage("text encode").weights == 2 * 5_680_910_336
    assert plan.weights == 2 * (13_581_071_424 + 5_680_910_336 + 126_892_531)


def test_weight_dtypes() -> None:
    weights = {name: make_plan(Job(weight_dtype=name)).stage("sampling").weights for name in ("fp32", "bf16", "fp16")}
    assert weights["fp32"] == 2 * weights["bf16"] == 2 * weights["fp16"] == 4 * 13_581_071_424
    matrices, rest = dit_parameters(DiTConfig())
    fp8 = make_plan(Job(weight_dtype="fp8_e4m3fn")).stage("sampling")
    assert fp8.weights == matrices + 2 * rest
    # A layer's weight is there in bf16 too while it runs.
    assert fp8.activations > make_plan(Job()).stage("sampling").activations
    assert make_plan(Job(), dit_weights=123).stage("sampling").weights == 123


BIGGER = {
    "height": Job(height=720),
    "frames": Job(num_frames=97),
    "batch": Job(batch_size=2),
    "batched guidance": Job(guidance="batched"),
    "condition": Job(num_cond_frames=13),
    "adapter": Job(schedule="distilled"),
    "compute dtype": Job(compute_dtype="fp32"),
    "weight copies": Job(weight_copies=2),
    "sparse": Job(bsa=BSAConfig()),
}


@pytest.mark.parametrize("name", BIGGER)
def test_what_adds_to_sampling(name: str) -> None:
    assert make_plan(BIGGER[name]).stage("sampling").total > make_plan(Job()).stage("sampling").total


def test_conditions_that_differ_have_a_cache_each() -> None:
    one = make_plan(Job(num_cond_frames=13, batch_size=3)).stage("sampling").kv_cache
    assert make_plan(Job(num_cond_frames=13, batch_size=3, conditions=3)).stage("sampling").kv_cache == 3 * one


def test_merged_adapters_take_nothing() -> None:
    merged = make_plan(Job(schedule="distilled", adapters="merged")).stage("sampling")
    assert merged == make_plan(Job()).stage("sampling")
    at_run_time = make_plan(Job(schedule="distilled")).stage("sampling")
    assert at_run_time.weights - merged.weights == adapter_bytes(DiTConfig(), "distill", 2)


def test_tiles_and_half_precision_save_memory_in_the_vae() -> None:
    job = Job(num_cond_frames=13)
    for changed in (replace(job, vae_tile=256), replace(job, vae_dtype="fp32")):
        whole, other = make_plan(job), make_plan(changed)
        for name in ("VAE encode", "VAE decode"):
            less, more = (other, whole) if changed.vae_tile else (whole, other)
            assert less.stage(name).total < more.stage(name).total


def refine_stage(refine: Refine, num_frames: int = 93) -> Stage:
    return make_plan(Job(num_frames=num_frames, refine=refine)).stage("refine sampling")


def test_refinement() -> None:
    plan = make_plan(Job(refine=Refine()))
    assert [stage.name for stage in plan.stages[-3:]] == ["refine VAE encode", "refine sampling", "refine VAE decode"]
    for name in ("sampling", "VAE decode"):
        assert plan.stage(f"refine {name}").activations > 2 * plan.stage(name).activations
    whole = refine_stage(Refine())
    assert whole.kv_cache == 0
    assert refine_stage(Refine(window=45, overlap=13)).total < whole.total
    assert refine_stage(Refine(spatial_only=True)).total < whole.total
    # A longer clip goes window by window: 13 shared frames are 26 refined ones, hence 8 latents.
    cached = refine_stage(Refine(window=93, overlap=13, kv_cache=True), num_frames=173)
    assert cached.kv_cache == kv_cache_bytes(DiTConfig(), (48, 44, 80), 8) == 22_145_925_120
    assert refine_stage(Refine(window=93, overlap=13), num_frames=173).activations >= whole.activations
    assert refine_stage(Refine(window=93, overlap=13, kv_cache=True)).kv_cache == 0  # one window


WRONG = {
    "height must be a multiple of 16": {"height": 470},
    "num_frames must be 4k+1": {"num_frames": 92},
    "ask for at least 17 frames": {"num_frames": 13, "num_cond_frames": 13},
    "conditions must be 1..2": {"batch_size": 2, "conditions": 3},
    "weight_dtype must be": {"weight_dtype": "int3"},
    "vae_dtype must be": {"vae_dtype": "fp8_e4m3fn"},
    "guidance must be": {"guidance": "both"},
    "tiling needs multiples of 8": {"vae_tile": 100},
}


@pytest.mark.parametrize("message", WRONG)
def test_jobs_that_nothing_can_make(message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Job(**WRONG[message])  # type: ignore[arg-type]


def test_a_stage_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no stage 'VAE encode'; it has: text encode, sampling, VAE decode"):
        make_plan(Job()).stage("VAE encode")


def test_verdicts() -> None:
    stage = Stage("sampling", weights=10_000_000_000, activations=4_000_000_000, kv_cache=1_000_000_000)
    assert verdict(stage, 15_000_000_000) == "fits"
    assert verdict(stage, 14_000_000_000) == "fits with 1.0 GB of the weights in system memory"
    assert verdict(stage, 5_000_000_000) == "fits with 10.0 GB of the weights in system memory"
    assert verdict(stage, 4_500_000_000) == "does not fit, 0.5 GB are missing even without its weights"
    assert verdict(stage, 14_000_000_000, "cpu") == "does not fit, 1.0 GB are missing"


def test_sizes_are_written_as_people_read_them() -> None:
    assert [size_text(n) for n in (0, 1_500, 123_456, 99_000_000, 100_000_000, 4_907_335_680)] == [
        "0 kB", "2 kB", "0.1 MB", "99.0 MB", "0.1 GB", "4.9 GB",
    ]  # fmt: skip


def advised(plan: Plan, free: float, ram: float | None = None) -> list[str]:
    return advice(plan, int(free * 1e9), None if ram is None else int(ram * 1e9))


def test_advice_lists_the_weight_dtypes() -> None:
    lines = advised(make_plan(Job()), 80)
    assert len(lines) == 2
    assert re.fullmatch(r"weight_dtype bf16: sampling 28\.\d GB, fits", lines[0])
    assert re.fullmatch(r"weight_dtype fp8_e4m3fn: sampling 16\.\d GB, fits", lines[1])
    bf16, fp8 = advised(make_plan(Job()), 24)
    assert re.fullmatch(r"weight_dtype bf16: .* fits with 4\.\d GB of the weights in system memory", bf16)
    assert fp8.endswith("GB, fits")


def test_advice_finds_the_most_frames_that_fit() -> None:
    job, free = Job(num_cond_frames=13), 20.0
    (line,) = [line for line in advised(make_plan(job), free) if line.startswith("num_frames")]
    found = re.fullmatch(r"num_frames (\d+), weight_dtype fp8_e4m3fn: sampling .* GB, fits", line)
    assert found
    frames = int(found[1])
    needs = {n: make_plan(replace(job, weight_dtype="fp8_e4m3fn", num_frames=n)).peak for n in (frames, frames + 4)}
    assert needs[frames] <= free * 1e9 < needs[frames + 4]


def test_advice_where_even_the_activations_are_too_much() -> None:
    plan = make_plan(Job(num_cond_frames=13, refine=Refine()))
    lines = advised(plan, 6)
    assert lines[1].startswith("weight_dtype bf16: refine sampling")
    assert lines[1].endswith("are missing even without its weights")
    (frames,) = [line for line in lines if line.startswith("num_frames")]
    (window,) = [line for line in lines if line.startswith("window")]
    for line in (frames, window):
        assert "of the weights in system memory" in line
    tiles = [line for line in lines if line.startswith("vae_tile 256: refine VAE")]
    assert len(tiles) == 2
    assert tiles[0].endswith("fits")


def test_advice_on_a_machine_without_a_card() -> None:
    plan = make_plan(Job(weight_dtype="fp32", compute_dtype="fp32", device="cpu"))
    lines = advised(plan, 40, 64)
    assert lines[0].endswith("GB are missing")
    assert lines[1].startswith("weight_dtype bf16") and lines[1].endswith("fits")
    assert lines[-1] == "system memory: the weights of all parts take 65.9 GB, there are 64.0 GB"
    assert not [line for line in lines if "of the weights in system memory" in line]


def test_live_bytes_counts_what_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b: Tensor | None = a + 1  # two at once
        view = b[:10]
        b = None
        c = torch.ones(500)  # the view keeps the second one
    assert live.peak == live.now == 4 * 2500
    assert len(view) and len(c)
    del view
    assert live.now == 4 * 1500
