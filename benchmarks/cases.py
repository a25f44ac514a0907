"""The cases: each makes its models ready and says what one run is."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from measure import Setting, Work
from torch import Tensor

from lcv_bsa import bsa_3d
from lcv_core import layers
from lcv_core.config import LONGCAT_VIDEO, WAN_VAE, BSAConfig, DiTConfig, VAEConfig
from lcv_core.dit.attention import Attend, resolve_backend
from lcv_core.dit.block import Block, Lean, Sequence3D, make_room
from lcv_core.dit.frames import share_timesteps
from lcv_core.dit.kernels import resolve_kernels
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.rope import rope_table
from lcv_core.partial import SegmentStore
from lcv_core.pipelines.base import Components
from lcv_core.pipelines.long_video import long_video_segments
from lcv_core.pipelines.text_to_video import text_to_video
from lcv_core.shapes import SPACE_FACTOR, latent_shape, num_latents, num_pixel_frames, token_grid
from lcv_core.text.encoder import TextStates
from lcv_core.vae.model import WanVAE
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.init import PRESETS, dit_state, init_checkpoint, vae_state

MINI = PRESETS["mini"]
TEXT_TOKENS = 512
GRIDS = {"480p": (24, 30, 52), "720p": (48, 44, 80)}  # tokens of 93 frames at 480x832, and of their refine pass
PROMPT = "a red ball moves left on a black background"
QUICK_STEPS = 4


# -- arithmetic -------------------------------------------------------------------------------------------------------


def block_flops(config: DiTConfig, tokens: int, keys: float, text: int = TEXT_TOKENS) -> float:
    """2 N C (6C + 3F) + 4 L C^2 + 4 N C (K + L): linears of N tokens (qkv 3C, proj C, cross q and proj 2C, SwiGLU 3F),
    keys and values of L text rows, and q k^T with p v over K keys and over the text. adaLN, norms, rope and the choice
    of blocks, together below 1%, are left out."""
    C, F = config.hidden_size, config.ffn_dim
    return 2 * tokens * C * (6 * C + 3 * F) + 4 * text * C * C + 4 * tokens * C * (keys + text)


def dit_flops(config: DiTConfig, tokens: int) -> float:
    """`block_flops` per layer, patch embedding and final linear 2 N C (P in + P out), caption 2 L (C_text C + C^2)."""
    C, P = config.hidden_size, prod(config.patch_size)
    ends = 2 * tokens * C * P * (config.in_channels + config.out_channels)
    return (
        config.depth * block_flops(config, tokens, tokens) + ends + 2 * TEXT_TOKENS * C * (config.caption_channels + C)
    )


def kept_keys(config: DiTConfig, grid: tuple[int, int, int]) -> float:
    """Keys a query attends to under the model's sparsity: floor((1 - s) N_k) blocks, at least one, of average size."""
    blocks = prod(-(-n // b) for n, b in zip(grid, config.bsa.block_k, strict=True))
    kept = max(1, int((1 - (config.bsa.sparsity or 0.0)) * blocks + 1e-6))
    return kept * prod(grid) / blocks


def meta_flops(config: VAEConfig, run: Callable[[WanVAE], object]) -> float:
    """Two per multiply-accumulate of every convolution and attention product, counted on tensors without data."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(WanVAE(config, device="meta"))
    return counter.get_total_flops()


# -- transformer ------------------------------------------------------------------------------------------------------


def _randn(setting: Setting, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=setting.device, dtype=dtype or setting.dtype)


def _mini_dit(setting: Setting) -> LongCatDiT:
    dit = LongCatDiT(MINI.dit)
    dit.load_state_dict(dit_state(MINI.dit))
    dit = dit.to(setting.device, setting.dtype).eval().requires_grad_(False)
    dit.set_attention(setting.attention)
    return dit


def dit_forward_mini(setting: Setting) -> Work:
    native = MINI.native
    dit, shape = _mini_dit(setting), latent_shape(native.num_frames, native.height, native.width)
    latents = _randn(setting, 1, *shape, dtype=torch.float32)
    text = _randn(setting, 1, TEXT_TOKENS, MINI.dit.caption_channels)
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.int64, device=setting.device)
    timestep = torch.full((1,), 500.0, device=setting.device)
    grid = token_grid((shape[1], shape[2], shape[3]), MINI.dit.patch_size)
    return Work(
        lambda: dit(latents, timestep, text, mask), _tokens(grid), setting.attention, dit_flops(MINI.dit, prod(grid))
    )


def block(setting: Setting, size: str, *, sparse: bool) -> Work:
    """One block of the released model on a share of the frames, condition-free."""
    config, (frames, h, w) = LONGCAT_VIDEO, GRIDS[size]
    kept_frames = max(2, round(frames * setting.scale))
    grid = (kept_frames, h, w)
    where = {"device": setting.device, "dtype": setting.dtype}
    layer = Block(config, layers, **where).requires_grad_(False)
    attend = resolve_backend(setting.attention, head_dim=config.head_dim, **where)
    seq = lean_sequence(config, grid, setting.device, setting.dtype, attend, config.bsa if sparse else None)
    x = _randn(setting, 1, prod(grid), config.hidden_size)
    tau = _randn(setting, 1, 1, config.adaln_tembed_dim, dtype=torch.float32)
    text = _randn(setting, 1, TEXT_TOKENS, config.hidden_size)
    work = Work(lambda: layer(x, tau, text, seq), _tokens(grid), setting.attention)
    keys = kept_keys(config, grid) if sparse else prod(grid)
    work.flops = block_flops(config, prod(grid), keys)
    work.note = "" if kept_frames == frames else f"{kept_frames} of {frames} latent frames"
    if sparse:
        work.backend = f"bsa {_bsa_backend(setting, config, grid)}"
    return work


def lean_sequence(
    config: DiTConfig,
    grid: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    attend: Attend,
    bsa: BSAConfig | None,
) -> Sequence3D:
    """A clip without condition frames whose frames share their timestep, for blocks that keep no gradients."""
    _, frames = share_timesteps(torch.full((1, grid[0]), 500.0, device=device), grid[1] * grid[2])
    like = torch.empty(1, 1, config.hidden_size, dtype=dtype, device=device)
    room = make_room(like, prod(grid), config.num_heads) if device.type == "cpu" else None
    lean = Lean(resolve_kernels("auto", device), frames, room)
    rope = rope_table(grid, config.head_dim, device)
    return Sequence3D(grid, 0, False, rope, attend, bsa, lean=lean)


def _bsa_backend(setting: Setting, config: DiTConfig, grid: tuple[int, int, int]) -> str:
    """The backend that "auto" takes for sparse self-attention here: it logs its choice."""
    heard: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        if "chose" in record.msg and isinstance(record.args, tuple):
            heard.append(str(record.args[0]))
        return False

    logger = logging.getLogger("lcv_bsa")
    logger.addFilter(hear)
    logger.setLevel(logging.DEBUG)
    q = _randn(setting, 1, 1, prod(grid), config.head_dim)
    bsa_3d(q, q, q, grid, block_q=config.bsa.block_q, block_k=config.bsa.block_k)
    logger.setLevel(logging.NOTSET)
    logger.removeFilter(hear)
    return heard[0] if heard else "auto"


def _tokens(grid: tuple[int, int, int]) -> str:
    return f"{grid[0]}x{grid[1]}x{grid[2]} = {prod(grid)} tokens"


# -- VAE and text -----------------------------------------------------------------------------------------------------


def _vae(config: VAEConfig, setting: Setting) -> WanVAE:
    vae = WanVAE(config)
    vae.load_state_dict(vae_state(config))
    return vae.to(setting.device, setting.dtype).eval().requires_grad_(False)


def vae_job(setting: Setting, width: str, direction: str) -> Work:
    """Whole clips through the VAE, encoded or decoded."""
    native, note = MINI.native, ""
    config, frames, height, size = MINI.vae, native.num_frames, native.height, native.width
    if width == "full":
        config, frames, height, size = WAN_VAE, 93, 480, 832
        if setting.scale < 1:
            latents = max(2, round(num_latents(frames) * setting.scale))
            frames, height, size = num_pixel_frames(latents), height // 2, size // 2
            note = "a crop of 93 frames of 480x832"
    vae = _vae(config, setting)
    if direction == "encode":
        shape, method = (1, 3, frames, height, size), WanVAE.encode
    else:
        shape, method = (1, *latent_shape(frames, height, size)), WanVAE.decode
    data = _randn(setting, *shape, dtype=torch.float32).clamp(-1, 1)
    flops = meta_flops(config, lambda meta: method(meta, torch.empty(shape, device="meta")))
    return Work(lambda: method(vae, data), f"{frames}x{height}x{size} pixels", "", flops, frames, note=note)


def text_encoder_mini(setting: Setting) -> Work:
    with tempfile.TemporaryDirectory(prefix="lcv-bench-") as folder:
        checkpoint = open_checkpoint(init_checkpoint(Path(folder) / "mini", "mini"))
        encoder = checkpoint.load_text_encoder(device=setting.device, dtype=setting.dtype)
    encoder.cache_size = 0  # a prompt seen before costs nothing otherwise
    return Work(lambda: encoder.encode(PROMPT), f"1x{encoder.max_length} tokens")


def t2v_mini(setting: Setting) -> Work:
    """What `lcv t2v` does by default, from the prompt to frames; no file is written."""
    native, steps = MINI.native, QUICK_STEPS if setting.quick else 50
    where = {"device": setting.device, "dtype": setting.dtype}
    with tempfile.TemporaryDirectory(prefix="lcv-bench-") as folder:
        checkpoint = open_checkpoint(init_checkpoint(Path(folder) / "mini", "mini"))
        text_encoder = checkpoint.load_text_encoder(**where)
        c = Components(checkpoint.load_dit(**where), checkpoint.load_vae(**where), text_encoder, native=native)
    c.dit.set_attention(setting.attention)
    text_encoder.cache_size = 0

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return text_to_video(c, text=PROMPT, negative_text="", num_steps=steps, generator=generator)

    shape = f"{native.num_frames}x{native.height}x{native.width} pixels, {steps} steps"
    return Work(run, shape, setting.attention, note="seconds per clip")


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_decode(setting: Setting, frames: int) -> Work:
    """Decode a clip that is never whole: latents come one by one and pixels are dropped."""
    wide = setting.device.type == "cuda"
    height, width = (480, 832) if wide else (MINI.native.height, MINI.native.width)
    vae = _vae(WAN_VAE if wide else MINI.vae, setting)

    def latents() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(num_latents(frames)):
            yield torch.randn(1, 16, 1, height // SPACE_FACTOR, width // SPACE_FACTOR, generator=generator)

    def run() -> None:
        for _ in vae.decode_stream(latents()):
            pass

    return Work(run, f"{frames}x{height}x{width} pixels", frames=frames, once=True)


def memory_segments(setting: Setting, count: int) -> Work:
    """A long video of the miniature with few steps, its segments dropped as they come."""
    native, steps = MINI.native, 2
    c = Components(dit=_mini_dit(setting), vae=_vae(MINI.vae, setting), native=native)
    states = _randn(setting, 1, TEXT_TOKENS, MINI.dit.caption_channels)
    text = TextStates(states, torch.ones(1, TEXT_TOKENS, dtype=torch.int64, device=setting.device))

    def run() -> None:
        with tempfile.TemporaryDirectory(prefix="lcv-bench-") as folder:
            store = SegmentStore(folder, "benchmark")
            for _ in long_video_segments(
                c, text=text, negative_text=text, num_segments=count, num_steps=steps, uniform_tail=False, store=store
            ):
                pass

    frames = native.num_frames + (count - 1) * (native.num_frames - native.num_cond_frames)
    shape = f"{count} segments, {frames}x{native.height}x{native.width} pixels, {steps} steps"
    return Work(run, shape, setting.attention, frames=frames, once=True)


CASES: dict[str, Callable[[Setting], Work]] = {
    "dit_forward_mini": dit_forward_mini,
    "block_480p_dense": lambda setting: block(setting, "480p", sparse=False),
    "block_480p_sparse": lambda setting: block(setting, "480p", sparse=True),
    "block_720p_dense": lambda setting: block(setting, "720p", sparse=False),
    "block_720p_sparse": lambda setting: block(setting, "720p", sparse=True),
    "vae_encode_mini": lambda setting: vae_job(setting, "mini", "encode"),
    "vae_decode_mini": lambda setting: vae_job(setting, "mini", "decode"),
    "vae_encode_full": lambda setting: vae_job(setting, "full", "encode"),
    "vae_decode_full": lambda setting: vae_job(setting, "full", "decode"),
    "text_encoder_mini": text_encoder_mini,
    "t2v_mini": t2v_mini,
    # 929: 930 frames rounded to 4k+1. The quick lengths only show that the cases run.
    "memory_decode_short": lambda setting: memory_decode(setting, 17 if setting.quick else 93),
    "memory_decode_long": lambda setting: memory_decode(setting, 33 if setting.quick else 929),
    "memory_segments_short": lambda setting: memory_segments(setting, 2 if setting.quick else 3),
    "memory_segments_long": lambda setting: memory_segments(setting, 3 if setting.quick else 30),
}
# (short, long): their peaks should not differ, however much longer the second is.
PAIRS = {
    "memory_decode": ("memory_decode_short", "memory_decode_long"),
    "memory_segments": ("memory_segments_short", "memory_segments_long"),
}
