"""Bytes of the VAE: weights, and what is alive at the peak of decoding or encoding a clip frame group by frame group.

The peak is in a residual block, mostly at full resolution: what the causal convolutions keep of earlier frames (the
state), the block's input, its own tensors, the padded input of its second convolution and three outputs of it. Three,
because on a CPU a convolution is summed up over its taps in time; a GPU needs one, and with Triton's kernels wider
inputs (`vae.convolve.wide_channels`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from lcv_core.config import VAEConfig
from lcv_core.shapes import SPACE_FACTOR, TIME_FACTOR
from lcv_core.vae.convolve import padded_channels
from lcv_core.vae.tiling import Tiling

FP32 = 4  # bytes
Convolutions = Literal["taps", "torch", "triton"]
_OUTPUTS = {"taps": 3, "torch": 2, "triton": 1}  # of a convolution
_HISTORY = 2  # frames that a causal convolution keeps


@dataclass(frozen=True)
class _Stage:
    """One resolution: residual blocks of the given (input, output) channels over `frames` frames of `cells` pixels.

    single: the blocks are lone convolutions. held: channels of the stage's input, which stays alive while the later
    blocks run (0: it does not). state, resampled: elements that changing the resolution keeps between frame groups,
    and the most that are alive meanwhile.
    """

    blocks: tuple[tuple[int, int], ...]
    frames: int
    cells: float
    single: bool = False
    held: int = 0
    state: float = 0.0
    resampled: float = 0.0

    def moments(self, batch: int, steady: bool, how: Convolutions, wide: bool) -> Iterator[tuple[float, float, int]]:
        """(elements of state that are new, elements alive beside the state, elements of kernels) at each convolution;
        the first two for one sample of `batch`. wide: channels of inputs are padded."""
        for i, (a, d) in enumerate(self.blocks):
            held = (self.held if i else 0) * self.frames
            yield self._conv(a, d, held + (0 if self.single else a * self.frames), batch, steady, how, wide)
            if not self.single:
                yield self._conv(d, d, held + (a + d) * self.frames, batch, steady, how, wide)
        yield self.state, self.resampled, 0

    def _conv(
        self, a: int, d: int, held: int, batch: int, steady: bool, how: Convolutions, wide: bool
    ) -> tuple[float, float, int]:
        """Padded input, outputs, and the history that the new one replaces. Summed over taps, the samples of a batch
        are copied to lie side by side, and so is each tap's kernel."""
        taps = how == "taps"
        padded = (padded_channels(a) if wide else a) * (self.frames + _HISTORY) + (
            a * self.frames if taps and batch > 1 else 0
        )
        alive = held + padded + _OUTPUTS[how] * d * self.frames + (_HISTORY * a if steady else 0)
        return _HISTORY * a * self.cells, alive * self.cells, 2 * 9 * a * d


def _alive(
    stages: Iterable[_Stage], area: tuple[int, int], batch: int, itemsize: int, *, steady: bool, how: Convolutions
) -> int:
    """Most elements alive at once. area: latent cells whose state is kept, and those computed at once.

    Not steady: a first and only frame, for which the later convolutions have no state yet at an earlier one's peak.
    """
    wide = how == "triton" and itemsize < FP32
    kept = peak = growing = 0.0  # growing: the peak with the state that there is by then
    for stage in stages:
        for new, alive, kernels in stage.moments(batch, steady, how, wide):
            kept += new * batch
            now = alive * area[1] * batch + kernels
            peak, growing = max(peak, now), max(growing, now + kept * area[1])
    return math.ceil(kept * area[0] + peak if steady else kept * (area[0] - area[1]) + growing)


def _widths(first: int, width: int, count: int) -> tuple[tuple[int, int], ...]:
    return tuple(pairwise([first] + [width] * count))


def _decoder(config: VAEConfig, steady: bool) -> Iterator[_Stage]:
    """Stages from the latents up, for one latent cell; `steady`: a group of four frames, else the first frame alone."""
    dims = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    yield _Stage(((config.z_dim, dims[0]),), 1, 1.0, single=True)
    yield _Stage(((dims[0], dims[0]), (dims[0], dims[0])), 1, 1.0)
    frames, cells = 1, 1.0
    temporal = [*reversed(config.temperal_downsample), None]
    for i, doubles_time in enumerate(temporal):
        dim_in, dim = dims[i] // (2 if i else 1), dims[i + 1]
        blocks = _widths(dim_in, dim, config.num_res_blocks + 1)
        state = resampled = 0.0
        inside = frames
        if doubles_time is not None:
            state = _HISTORY * dim * cells if doubles_time else 0.0
            frames = frames * 2 if doubles_time and steady else frames
            # input, a copy frame by frame, four times the pixels, half the channels of those
            resampled = (dim_in * inside + (1 + 1 + 4 + 2) * dim * frames) * cells
        yield _Stage(blocks, inside, cells, False, dim_in, state, resampled)
        cells *= 1.0 if doubles_time is None else 4.0
    yield _Stage(((dims[-1], 3),), frames, cells, single=True)


def _encoder(config: VAEConfig, steady: bool) -> Iterator[_Stage]:
    """Stages from the pixels down, for one latent cell."""
    dims = [config.base_dim * m for m in (1, *config.dim_mult)]
    frames, cells = TIME_FACTOR if steady else 1, float(SPACE_FACTOR**2)
    yield _Stage(((3, dims[0]),), frames, cells, single=True)
    halves = [*config.temperal_downsample, None]
    for (dim_in, dim), halves_time in zip(pairwise(dims), halves, strict=True):
        state = dim * cells / 4 if halves_time else 0.0
        yield _Stage(_widths(dim_in, dim, config.num_res_blocks), frames, cells, state=state)
        cells /= 1.0 if halves_time is None else 4.0
        frames = max(1, frames // 2) if halves_time else frames
    yield _Stage(((dims[-1], dims[-1]), (dims[-1], dims[-1])), 1, 1.0)
    yield _Stage(((dims[-1], 2 * config.z_dim),), 1, 1.0, single=True)


def decode_bytes(
    config: VAEConfig, latents: tuple[int, int, int], *, batch: int = 1, itemsize: int = 2,
    tiling: Tiling | None = None, how: Convolutions = "taps",
) -> int:  # fmt: skip
    """Most bytes alive while a latent clip (T, h, w) is decoded as a stream, its finished frames not counted.

    By tiles, every tile keeps its state, overlaps included: the state does not shrink, the rest does.
    """
    T, h, w = latents
    stages = _decoder(config, steady=T > 1)
    pixels = h * w * SPACE_FACTOR**2
    frames = TIME_FACTOR if T > 2 else 1  # of the group before, which are still held
    output = 3 * frames * pixels * FP32
    frame = batch * config.z_dim * itemsize  # what the decoder is given, for each latent cell
    if tiling is None:
        return (
            _alive(stages, (h * w, h * w), batch, itemsize, steady=T > 1, how=how) * itemsize
            + frame * h * w
            + batch * output
        )
    area = _area((h, w), tiling)
    tile = math.prod(max(b - a for a, b in tiling.spans(side)) for side in (h, w))
    weights = area * SPACE_FACTOR**2 * FP32
    group = 3 * (TIME_FACTOR if T > 1 else 1) * FP32
    written = group * (pixels + 2 * tile * SPACE_FACTOR**2)
    streamed = _alive(stages, (area, tile), batch, itemsize, steady=T > 1, how=how) * itemsize + frame * tile
    return streamed + weights + batch * (written + output)


def decoder_state_bytes(
    config: VAEConfig, size: tuple[int, int], *, itemsize: int = 2, tiling: Tiling | None = None
) -> int:  # fmt: skip
    """What the decoder of a video of (h, w) latent cells keeps between two latent frames, beyond the first."""
    kept = sum(new for stage in _decoder(config, steady=True) for new, _, _ in stage.moments(1, True, "taps", False))
    return math.ceil(kept * _area(size, tiling)) * itemsize


def _area(size: tuple[int, int], tiling: Tiling | None) -> int:
    """Latent cells of all tiles, overlaps counted."""
    if tiling is None:
        return math.prod(size)
    return math.prod(sum(b - a for a, b in tiling.spans(side)) for side in size)


def encode_bytes(
    config: VAEConfig, latents: tuple[int, int, int], *, batch: int = 1, itemsize: int = 2,
    tiling: Tiling | None = None, how: Convolutions = "taps",
) -> int:  # fmt: skip
    """Most bytes alive while a clip of (T, h, w) latents is encoded as a stream. Tiles follow one another."""
    T, h, w = latents
    if tiling is not None:
        h, w = (max(b - a for a, b in tiling.spans(side)) for side in (h, w))
    group = batch * 3 * (TIME_FACTOR if T > 1 else 1) * SPACE_FACTOR**2 * h * w
    moments = batch * 3 * 2 * config.z_dim * math.prod(latents) * FP32  # all, this tile's and the last one's
    alive = _alive(_encoder(config, steady=T > 1), (h * w, h * w), batch, itemsize, steady=T > 1, how=how)
    return (alive + group) * itemsize + moments


def vae_parameters(config: VAEConfig) -> int:
    """Weights of encoder, decoder and the two 1x1x1 convolutions between."""
    z = config.z_dim
    down = [config.base_dim * m for m in (1, *config.dim_mult)]
    up = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    total = _taps(27, 3, down[0]) + _middle(down[-1]) + down[-1] + _taps(27, down[-1], 2 * z)
    for (a, d), temporal in zip(pairwise(down), (*config.temperal_downsample, None), strict=True):
        total += sum(_residual(*pair) for pair in _widths(a, d, config.num_res_blocks))
        if temporal is not None:
            total += _taps(9, d, d) + (_taps(3, d, d) if temporal else 0)
    total += _taps(27, z, up[0]) + _middle(up[0]) + up[-1] + _taps(27, up[-1], 3)
    for i, temporal in enumerate((*reversed(config.temperal_downsample), None)):
        a, d = up[i] // (2 if i else 1), up[i + 1]
        total += sum(_residual(*pair) for pair in _widths(a, d, config.num_res_blocks + 1))
        if temporal is not None:
            total += _taps(9, d, d // 2) + (_taps(3, d, 2 * d) if temporal else 0)
    return total + _taps(1, 2 * z, 2 * z) + _taps(1, z, z)


def _taps(kernel: int, a: int, d: int) -> int:
    return (kernel * a + 1) * d


def _residual(a: int, d: int) -> int:
    return a + d + _taps(27, a, d) + _taps(27, d, d) + (_taps(1, a, d) if a != d else 0)


def _middle(d: int) -> int:
    return 2 * _residual(d, d) + d + _taps(1, d, 3 * d) + _taps(1, d, d)


def decode_flops(config: VAEConfig, latents: tuple[int, int, int], tiling: Tiling | None = None) -> float:
    """Operations of the convolutions while a clip is decoded, the overlaps of tiles counted."""
    return _flops(_decoder(config, steady=True), latents, tiling)


def encode_flops(config: VAEConfig, latents: tuple[int, int, int], tiling: Tiling | None = None) -> float:
    """The same while it is encoded."""
    return _flops(_encoder(config, steady=True), latents, tiling)


def _flops(stages: Iterable[_Stage], latents: tuple[int, int, int], tiling: Tiling | None) -> float:
    T, h, w = latents
    cell = 0.0
    for stage in stages:
        products = sum(a * d + (0 if stage.single else d * d) for a, d in stage.blocks)
        cell += 2 * 27 * products * stage.frames * stage.cells
    return cell * _area((h, w), tiling) * T
