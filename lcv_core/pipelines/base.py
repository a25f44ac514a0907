"""What every pipeline shares: the parts of the model, preparing conditions, decoding, the options of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lcv_core import schedule as schedules
from lcv_core.config import Native
from lcv_core.denoise import Guidance, OnStep, Progress, check_interval, denoise
from lcv_core.dit.model import LongCatDiT
from lcv_core.dit.step_cache import check_budget
from lcv_core.errors import InputError
from lcv_core.image_io import as_frames, resize_frames
from lcv_core.names import CfgMode, CfgScope, Fit, Output, Posterior, Schedule, check_name
from lcv_core.pipelines.memory import Memory
from lcv_core.shapes import REFINE_MULTIPLE, TIME_FACTOR, bucket, check_size, latent_shape, size_for_area
from lcv_core.text.encoder import TextStates
from lcv_core.vae.layers import StreamState
from lcv_core.vae.model import WanVAE, decoder_reach
from lcv_core.vae.tiling import Tile, Tiling, decode_stream_tiled, encode_tiled
from lcv_core.weights.lora import Adapter, load_lora, read_adapter
from lcv_core.weights.tensors import TensorSource

Generators = torch.Generator | Sequence[torch.Generator] | None
Text = TextStates | str | Sequence[str]
T = TypeVar("T")
Interval = tuple[float, float]  # of sigmas, the lower first

WHOLE: Interval = (0.0, 1.0)
# (num_steps, guidance_scale) that go with a schedule when the caller names neither.
SCHEDULE_DEFAULTS: dict[Schedule, tuple[int, float]] = {"base": (50, 4.0), "distilled": (16, 1.0)}
REFINE_DEFAULT_STEPS = 50


class Encoder(Protocol):
    """Prompts in, text states out: `TextEncoder`, or anything that acts like it."""

    def encode(self, prompts: str | Sequence[str]) -> TextStates: ...


@dataclass
class Components:
    """The parts of a model.

    text_encoder: needed only where prompts are given as strings.
    adapters: "distill" and "refinement" LoRAs by name (paths or state dicts); each is active only inside the runs that
        need it: the distilled schedule and refinement. A file is read by the first of them and kept in system memory.
    native: sizes and counts a run takes when it is not told otherwise.
    tiling: decode and encode frames by spatial tiles; None does it whole.
    memory: what to go on with where memory runs out, and the settings so far; None: the error goes through.
    """

    dit: LongCatDiT
    vae: WanVAE | None = None
    text_encoder: Encoder | None = None
    adapters: Mapping[str, Path | Mapping[str, Tensor]] = field(default_factory=dict)
    native: Native = field(default_factory=Native)
    flow_shift: float = schedules.FLOW_SHIFT
    tiling: Tiling | None = None
    memory: Memory | None = None
    _read: dict[str, tuple[object, Adapter]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.dit.device

    def denoise(self, latents: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        """`lcv_core.denoise.denoise` with this transformer. Every pipeline samples through here, so that a host with a
        sampling system of its own can put it in place."""
        if self.memory is not None:
            return self.memory.sample(self, latents, sigmas, **options)
        return denoise(self.dit, latents, sigmas, **options)

    @contextlib.contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """The named adapter active inside the block; nothing happens when these components have none of that name."""
        if name not in self.adapters:
            yield
            return
        source = self.adapters[name]
        handle = load_lora(self.dit, source if isinstance(source, Mapping) else self.read_adapter(name, source))
        try:
            yield
        finally:
            handle.remove()  # with its copies on the device; what was read stays

    def read_adapter(self, name: str, path: Path) -> Adapter:
        """The named adapter's file, from memory where it is still as it was read."""
        store = TensorSource.open(path)
        state = self.dit.config, store.stamps
        if name not in self._read or self._read[name][0] != state:
            self._read.pop(name, None)  # before another is read: never two in memory
            self._read[name] = state, read_adapter(self.dit, store, Path(path).name)
        return self._read[name][1]

    def need_vae(self) -> WanVAE:
        if self.vae is None:
            raise InputError("this needs a VAE; give Components(vae=...)")
        return self.vae


def native_size(native: Native, height: int, width: int) -> tuple[int, int]:
    """(height, width) at the native scale whose aspect is nearest to a picture's: the official 480p bucket, or the
    16-pixel grid for a checkpoint of another scale."""
    if (native.height, native.width) == (480, 832):
        return bucket("480p", height, width)
    return size_for_area(native.height * native.width, height, width)


def refined_size(native: Native, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a refine pass over a clip of this size: the official 720p bucket in whole sparse blocks, or
    twice the native side for a checkpoint of another scale."""
    if (native.height, native.width) == (480, 832):
        return bucket("720p", height, width, multiple=REFINE_MULTIPLE)
    return size_for_area(4 * native.height * native.width, height, width, multiple=REFINE_MULTIPLE)


@dataclass(frozen=True)
class Run:
    """The options that every task takes; the pipelines' keyword arguments by the same names."""

    num_steps: int
    guidance_scale: float
    schedule: Schedule
    cfg_scope: CfgScope
    cfg_mode: CfgMode
    output: Output
    on_step: OnStep | None
    progress: Progress | None
    cfg_interval: Interval = WHOLE
    step_cache: float = 0.0

    @classmethod
    def of(
        cls, *, num_steps: int | None, guidance_scale: float | None, schedule: Schedule, cfg_scope: CfgScope,
        cfg_mode: CfgMode, output: Output, on_step: OnStep | None, progress: Progress | None,
        cfg_interval: Interval = WHOLE, step_cache: float = 0.0,
    ) -> Run:  # fmt: skip
        check_name("schedule", schedule, Schedule)
        check_name("output", output, Output)
        steps, scale = SCHEDULE_DEFAULTS[schedule]
        steps = steps if num_steps is None else num_steps
        scale = scale if guidance_scale is None else guidance_scale
        check_interval(cfg_interval)
        check_budget(step_cache)
        return cls(steps, scale, schedule, cfg_scope, cfg_mode, output, on_step, progress, cfg_interval, step_cache)

    def denoise(self, c: Components, latents: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        """`Components.denoise` with the run's own options; a host's need not know those that are off."""
        if self.step_cache:
            options["step_cache"] = self.step_cache
        return c.denoise(latents, sigmas, on_step=self.on_step, progress=self.progress, **options)

    def sigmas(self, flow_shift: float, *, uniform_tail: bool = False) -> Tensor:
        """The schedule's sigmas; the uniform tail belongs to the base schedule alone."""
        if self.schedule == "distilled":
            return schedules.distilled(self.num_steps, flow_shift=flow_shift)
        sigmas = schedules.base(self.num_steps, flow_shift=flow_shift)
        return schedules.with_tail(sigmas) if uniform_tail else sigmas

    def adapter(self, c: Components) -> contextlib.AbstractContextManager[None]:
        """The distillation adapter where the schedule is the distilled one."""
        return c.adapter("distill") if self.schedule == "distilled" else contextlib.nullcontext()


def encode_text(c: Components, text: Text | None, *, what: str = "text") -> TextStates:
    """TextStates as they are; prompts through the components' text encoder."""
    if isinstance(text, TextStates):
        states = text
    elif text is None:
        raise InputError(f"{what} is missing; pass a prompt or TextStates")
    elif c.text_encoder is None:
        raise InputError(f"{what} is a prompt but there is no text encoder; give Components(text_encoder=...)")
    else:
        states = c.text_encoder.encode(text)
    channels = c.dit.config.caption_channels
    if states.states.shape[2] != channels:
        raise InputError(
            f"{what} states have {states.states.shape[2]} channels, the DiT takes {channels};"
            " text encoder and DiT must be of one checkpoint"
        )
    return states


def guidance(c: Components, run: Run, negative: Text | None, batch: int, prompts: int | None = None) -> Guidance:
    """The run's guidance, the negative text encoded ("" when none is given) and repeated for the batch of videos.

    prompts: how many prompts make that batch; None: as many as videos.
    """
    if not run.guidance_scale > 1.0:
        return Guidance(scope=run.cfg_scope, mode=run.cfg_mode, interval=run.cfg_interval)
    if negative is None and c.text_encoder is None:
        raise InputError(
            f"guidance_scale {run.guidance_scale:g} needs a negative_text; pass TextStates or set guidance_scale=1"
        )
    states = encode_text(c, "" if negative is None else negative, what="negative_text")
    prompts = batch if prompts is None else prompts
    negatives = _negatives(states, prompts, batch)
    return Guidance(run.guidance_scale, negatives, run.cfg_scope, run.cfg_mode, run.cfg_interval)


def _negatives(states: TextStates, prompts: int, batch: int) -> TextStates:
    """One entry for all, one per prompt, or one per video, made one per video."""
    if states.batch not in (1, prompts, batch):
        raise InputError(f"negative_text has {states.batch} entries for {prompts} prompts; give one, or one per prompt")
    return states.repeat(batch // states.batch)


def draw_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Standard normal fp32 [B, ...], sample by sample, on the generator's device (CPU by default).

    A seed therefore means the same on every device, and a sample does not depend on the size of its batch. With a list
    of generators each sample has its own.
    """
    B, rest = shape[0], tuple(shape[1:])
    generators = generator if isinstance(generator, Sequence) else [generator] * B
    if len(generators) != B:
        raise InputError(f"{len(generators)} generators for {B} videos; give one, or one per video")
    draws = [
        torch.randn(rest, generator=g, device="cpu" if g is None else g.device, dtype=torch.float32).cpu()
        for g in generators
    ]
    return torch.stack(draws)


def start_noise(
    c: Components, batch: int, num_frames: int, height: int, width: int, noise: Tensor | None, generator: Generators
) -> Tensor:
    """The given noise, checked, or fresh noise: fp32 [B, C, T, h, w]."""
    check_size(height, width)
    shape = (batch, *latent_shape(num_frames, height, width, channels=c.dit.config.in_channels))
    if noise is None:
        return draw_noise(shape, generator)
    if tuple(noise.shape) != shape:
        raise InputError(f"noise must be {list(shape)}, got {list(noise.shape)}")
    return noise.float()


def prepare_frames(frames: Any, height: int, width: int, fit: Fit) -> Tensor:
    """What a caller passes as frames -> pixels fp32 [1, 3, F, H, W] in [-1, 1] at the given size."""
    return to_pixels(resize_frames(as_frames(frames), height, width, fit=fit))


def to_pixels(frames: Tensor) -> Tensor:
    """[F, H, W, 3] uint8 or float in [0, 1] -> fp32 [1, 3, F, H, W] in [-1, 1]."""
    x = frames.float() / 255.0 if frames.dtype == torch.uint8 else frames.float()
    return (x * 2.0 - 1.0).permute(3, 0, 1, 2).unsqueeze(0)


def to_frames(pixels: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] -> fp32 [B, F, H, W, 3] in [0, 1]."""
    return (pixels.float() / 2.0 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 4, 1)


def encode_frames(
    c: Components, pixels: Tensor, *, posterior: Posterior = "mode", generator: Generators = None
) -> Tensor:
    """Pixels [B, 3, 4k+1, H, W] in [-1, 1] -> normalised latents fp32 [B, C, T, h, w] on the CPU.

    posterior: "mode" takes the mean; "sample" draws from the posterior as the official pipelines do.
    """
    vae = c.need_vae()

    def encode() -> tuple[Tensor, Tensor]:
        return encode_tiled(vae, pixels, c.tiling) if c.tiling else vae.encode(pixels)

    mean, logvar = with_less(c, "VAE encode", encode)
    return vae.normalize(pick_posterior(mean, logvar, posterior, generator)).cpu()


def with_less(c: Components, stage: str, work: Callable[[], T], where: Callable[[], str] = str) -> T:
    """work(), and where memory runs out again with what the components' `memory` finds to change."""
    memory = c.memory
    if memory is None:
        return work()
    return memory.run(stage, work, lambda move: memory.apply(c, move), where)


def for_conditions(generator: Generators, conditions: int) -> Generators:
    """The generators that draw the posteriors of `conditions` condition clips: with one generator per video, that of
    the first video of each condition."""
    if not isinstance(generator, Sequence):
        return generator
    return list(generator)[:: max(1, len(generator) // conditions)][:conditions]


def pick_posterior(mean: Tensor, logvar: Tensor, posterior: Posterior, generator: Generators) -> Tensor:
    check_name("posterior", posterior, Posterior)
    if posterior == "mode":
        return mean
    return mean + torch.exp(0.5 * logvar) * draw_noise(mean.shape, generator).to(mean)


class StreamingDecoder:
    """Decodes one video in any number of pieces; the result is that of decoding it whole.

    Where memory runs out it goes on with other tiles. The state of those is made of the last latents, which are
    decoded by them once more; the frames that were handed out stay as they are.
    """

    def __init__(self, c: Components) -> None:
        self.c = c
        self._state: StreamState = {}
        self._tiles: list[Tile] = []
        self._tiling = c.tiling
        self._stale = False  # the state is to be made anew
        self._count = 0  # latent frames so far
        self._seen: list[Tensor] = []  # the last of them, as many as a state depends on

    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """The next normalised latents [B, C, n, h, w] -> fp32 frames [B, 1 then 4, H, W, 3] in [0, 1] for each; all
        at once from a VAE that `decodes_whole`."""
        vae = self.c.need_vae()
        whole = getattr(vae, "decodes_whole", False)
        for latent in (latents,) if whole else latents.split(1, dim=2):
            yield with_less(self.c, "VAE decode", partial(self._next, latent), self._where)
            self._remember(latent, decoder_reach(vae.config))

    def skip(self, latents: Tensor) -> None:
        """Go on behind these latents [B, C, n, h, w], whose frames nobody wants. That decodes the last of them alone,
        and not before a next latent comes."""
        self._remember(latents, decoder_reach(self.c.need_vae().config))
        self._stale = True

    def rest(self) -> None:
        """Put the state into system memory until the next latent comes: it takes 2 GB at 480x832 in half precision."""
        self._move(torch.device("cpu"))

    def _remember(self, latents: Tensor, reach: int) -> None:
        self._count += latents.shape[2]
        self._seen += [latent.to("cpu", copy=True) for latent in latents[:, :, -reach:].split(1, dim=2)]
        del self._seen[:-reach]

    def _move(self, device: torch.device) -> None:
        for state in (self._state, *(tile.state for tile in self._tiles)):
            for layer in state:
                state[layer] = state[layer].to(device)  # one by one: never all of it twice

    def _where(self) -> str:
        return f"at latent frame {self._count + 1}"

    def _next(self, latent: Tensor) -> Tensor:
        """The frames of the next latent. While it is decoded the state is neither the old one nor the new one."""
        if self._stale or self._tiling != self.c.tiling:
            self._start_again()
        self._stale = True
        frames = self._decode(latent)
        self._stale = False
        return frames

    def _start_again(self) -> None:
        """The state after the latents so far, with the tiles of now: earlier ones than those kept are not in it."""
        self._state, self._tiles, self._tiling = {}, [], self.c.tiling
        for latent in self._seen:
            self._decode(latent)

    def _decode(self, latent: Tensor) -> Tensor:
        vae = self.c.need_vae()
        self._move(vae.device)
        frame = vae.denormalize(latent.float())
        if self._tiling:
            pieces = decode_stream_tiled(vae, frame, self._tiling, self._tiles)
        else:
            pieces = vae.decode_stream(frame, self._state)
        return to_frames(torch.cat(list(pieces), dim=2)).cpu()

    def push(self, latents: Tensor) -> Tensor:
        """The frames [B, F, H, W, 3] of the next latents, all at once."""
        first = TIME_FACTOR if self._count else 1
        total = first + TIME_FACTOR * (latents.shape[2] - 1)
        out: Tensor | None = None
        done = 0
        for frames in self.stream(latents):
            if out is None:
                out = frames.new_empty(frames.shape[0], total, *frames.shape[2:])
            out[:, done : done + frames.shape[1]] = frames
            done += frames.shape[1]
        assert out is not None
        return out


def check_decodes_pieces(c: Components) -> None:
    """InputError where the VAE `decodes_whole`: several segments that hand over latents are one video in pieces."""
    if getattr(c.need_vae(), "decodes_whole", False):
        raise InputError(
            'this VAE cannot decode a video in several pieces, which the hand-over "latents" needs; use the'
            " checkpoint's own VAE (in ComfyUI the LongCat-Video Loader's), or the hand-over \"frames\""
        )


def decode_latents(c: Components, latents: Tensor) -> Tensor:
    """Normalised latents [B, C, T, h, w] -> fp32 frames [B, F, H, W, 3] in [0, 1] on the CPU."""
    return StreamingDecoder(c).push(latents)


def finish(c: Components, latents: Tensor, output: Output) -> Tensor:
    """What a pipeline returns: normalised latents, or decoded frames."""
    return latents.cpu() if output == "latents" else decode_latents(c, latents)


def put_condition(noise: Tensor, cond: Tensor) -> Tensor:
    """Noise [B, C, T, h, w] with the condition latents [1 or B, C, n_c, h, w] written over its first frames."""
    out = noise.clone()
    out[:, :, : cond.shape[2]] = cond.to(out)
    return out
