"""The VAE: its tensors, their layout, streaming, causality, tiling, its norm and the CPU's convolution in time taps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import components, make_vae, randn
from torch import Tensor, nn

from lcv_core import layers
from lcv_core.config import VAEConfig
from lcv_core.errors import InputError
from lcv_core.pipelines.base import StreamingDecoder, decode_latents, pick_posterior
from lcv_core.vae.layers import RMSNorm, StreamState
from lcv_core.vae.model import WanVAE, decoder_reach, frame_chunks, split_moments
from lcv_core.vae.tiling import Tile, Tiling, blend_weights, decode_stream_tiled, decode_tiled, encode_tiled
from lcv_core.weights.checkpoint import open_checkpoint

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and torch.version.hip is None else [])


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return make_vae()


def clip(frames: int, height: int = 16, width: int = 24, *, seed: int = 0) -> Tensor:
    return randn(1, 3, frames, height, width, seed=seed).clamp(-1, 1)


def latent(frames: int, height: int = 2, width: int = 3, *, seed: int = 0) -> Tensor:
    return randn(1, 16, frames, height, width, seed=seed)


def test_the_full_size_model_has_the_parameters_of_the_checkpoint() -> None:
    vae = WanVAE(device="meta")
    state = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert len(state) == 194
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert not list(vae.buffers())
    # One of each kind of shape (section 5.2 of the specification, diffusers names of section 5.4).
    assert state["encoder.conv_in.weight"] == (96, 3, 3, 3, 3)
    assert state["encoder.down_blocks.2.resample.1.weight"] == (96, 96, 3, 3)
    assert state["encoder.down_blocks.3.conv_shortcut.weight"] == (192, 96, 1, 1, 1)
    assert state["encoder.down_blocks.5.time_conv.weight"] == (192, 192, 3, 1, 1)
    assert state["encoder.down_blocks.8.time_conv.weight"] == (384, 384, 3, 1, 1)
    assert state["encoder.conv_out.weight"] == (32, 384, 3, 3, 3)
    assert state["quant_conv.weight"] == (32, 32, 1, 1, 1)
    assert state["post_quant_conv.weight"] == (16, 16, 1, 1, 1)
    assert state["decoder.conv_in.weight"] == (384, 16, 3, 3, 3)
    assert state["decoder.mid_block.attentions.0.to_qkv.weight"] == (1152, 384, 1, 1)
    assert state["decoder.mid_block.attentions.0.norm.gamma"] == (384, 1, 1)
    assert state["decoder.up_blocks.0.upsamplers.0.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert state["decoder.up_blocks.1.upsamplers.0.resample.1.weight"] == (192, 384, 3, 3)
    assert state["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"] == (384, 192, 1, 1, 1)
    assert state["decoder.up_blocks.3.resnets.2.norm1.gamma"] == (96, 1, 1, 1)
    assert state["decoder.conv_out.weight"] == (3, 96, 3, 3, 3)
    assert [n for n in state if "shortcut.weight" in n and "decoder" in n] == [
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"
    ]


def test_every_convolution_comes_from_operations() -> None:
    made: dict[str, list[nn.Module]] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., nn.Module]:
            def make(*args: Any, **options: Any) -> nn.Module:
                layer = getattr(layers, name)(*args, **options)
                made.setdefault(name, []).append(layer)
                return layer

            return make

    vae = make_vae(operations=Recorder())
    known = {id(layer) for kind in made.values() for layer in kind}
    for name, module in vae.named_modules():
        if list(module.parameters(recurse=False)):
            assert id(module) in known or isinstance(module, RMSNorm), name
    assert set(made) == {"Conv2d", "Conv3d"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_nn_does_as_operations(dtype: torch.dtype) -> None:
    ours, plain = make_vae(dtype), make_vae(dtype, operations=nn)
    assert type(plain.encoder.conv_in) is nn.Conv3d
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, expected in [
        (plain.encode(clip(5))[0], ours.encode(clip(5))[0]),
        (plain.decode(latent(2)), ours.decode(latent(2))),
    ]:
        assert got.dtype == torch.float32
        assert (got - expected).norm() / expected.norm() <= tolerance


def test_half_precision_stays_near_fp32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half, whole = make_vae(dtype), make_vae()
        got, expected = half.decode(latent(3)), whole.decode(latent(3))
        assert got.dtype == torch.float32 and (got - expected).norm() / expected.norm() <= 5e-2
        mean, logvar = half.encode(clip(5))
        assert mean.dtype == logvar.dtype == torch.float32
        assert (mean - whole.encode(clip(5))[0]).norm() / mean.norm() <= 5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_normalize(dtype: torch.dtype) -> None:
    """Also of values whose squares fp16 cannot hold, and of nothing at all."""
    norm = RMSNorm(8, 3)
    with torch.no_grad():
        norm.gamma.copy_(1 + 0.1 * randn(8, 1, 1, 1))
    x = randn(1, 8, 2, 3, 4)
    x[..., 0] *= 300
    x[..., 1] *= 1e-3
    x[..., 2] = 0
    x = x.to(dtype)
    expected = torch.nn.functional.normalize(x.double(), dim=1) * 8**0.5 * norm.gamma.double()
    error = (norm.to(dtype)(x).double() - expected).abs()
    assert (error <= {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype] * 3).all()
    assert (norm(torch.zeros_like(x)) == 0).all()


@pytest.mark.parametrize("frames", range(1, 10))
def test_decoding_in_pieces_is_decoding_whole(vae: WanVAE, frames: int) -> None:
    z = latent(frames)
    whole = vae.decode(z)
    assert whole.shape == (1, 3, 4 * frames - 3, 16, 24)
    parts = list(vae.decode_stream(z.split(1, dim=2)))
    assert [p.shape[2] for p in parts] == [1] + [4] * (frames - 1)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    state: StreamState = {}
    pieces = [pixels for piece in z.split(2, dim=2) for pixels in vae.decode_stream(piece, state)]
    assert torch.equal(torch.cat(pieces, dim=2), whole)


@pytest.mark.parametrize("latents", [1, 2, 3, 5, 9])
def test_encoding_in_chunks_is_encoding_whole(vae: WanVAE, latents: int) -> None:
    pixels = clip(4 * latents - 3)
    mean, logvar = vae.encode(pixels)
    assert mean.shape == logvar.shape == (1, 16, latents, 2, 3)
    chunks = (pixels[:, :, a:b] for a, b in frame_chunks(pixels.shape[2]))
    moments = torch.cat(list(vae.encode_stream(chunks)), dim=2)
    assert torch.equal(moments, torch.cat([mean, logvar], dim=1))  # small values: nothing is clamped here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_channels_lie_last_in_every_layer(device: str, batch: int, dtype: torch.dtype) -> None:
    """By the very strides, also of dimensions of length one: PyTorch goes by them."""
    vae, seen = make_vae(dtype).to(device), []

    def check(name: str, layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        for x in (given[0], made):
            layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
            assert x.stride() == torch.empty(x.shape, device="meta", memory_format=layout).stride(), name
        seen.append(layer)

    for name, layer in vae.named_modules():
        layer.register_forward_hook(partial(check, name))
    pixels = torch.cat([clip(9, seed=i) for i in range(batch)])
    vae.encode(pixels)
    vae.decode(torch.cat([latent(3, seed=i) for i in range(batch)]))
    assert set(seen) >= {m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | RMSNorm)}
    for x in (*vae.decode_stream(latent(2)), *vae.encode_stream([clip(1)])):
        assert x.stride(1) == 1 and x.dtype == torch.float32


def test_a_loaded_vae_has_its_channels_last(tiny_checkpoint: Path) -> None:
    vae = open_checkpoint(tiny_checkpoint).load_vae()
    for weight in vae.parameters():
        assert weight.stride(1 if weight.ndim > 3 else 0) == 1, weight.shape


def causal(conv: Any, x: Tensor) -> Tensor:
    """A causal convolution over a whole clip at once: zeros on the left in time."""
    return conv(torch.cat([torch.zeros_like(x[:, :, :2]), x], dim=2))


def residual(block: Any, x: Tensor) -> Tensor:
    h = causal(block.conv1, nn.functional.silu(block.norm1(x)))
    h = causal(block.conv2, nn.functional.silu(block.norm2(h)))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def middle(block: Any, x: Tensor) -> Tensor:
    return residual(block.resnets[1], block.attentions[0](residual(block.resnets[0], x)))


def frame_by_frame(layer: Any, x: Tensor) -> Tensor:
    return torch.stack([layer(frame) for frame in x.unbind(2)], dim=2)


def test_encoding_is_the_network_on_the_whole_clip(vae: WanVAE) -> None:
    """The layers over nine frames at once, without any state (specification 5.2 and 5.3)."""
    encoder: Any = vae.encoder
    x = clip(9)
    h = causal(encoder.conv_in, x)
    for i, block in enumerate(encoder.down_blocks):
        if i not in (2, 5, 8):
            h = residual(block, h)
            continue
        h = frame_by_frame(block.resample, h)
        if block.time_conv is not None:  # the first frame stays, later ones are merged in pairs
            h = torch.cat([h[:, :, :1], block.time_conv(h)], dim=2)
    h = middle(encoder.mid_block, h)
    h = causal(encoder.conv_out, nn.functional.silu(encoder.norm_out(h)))
    mean, logvar = split_moments(vae.quant_conv(h))
    assert (mean - vae.encode(x)[0]).abs().max() <= 1e-5
    assert (logvar - vae.encode(x)[1]).abs().max() <= 1e-5


def test_decoding_is_the_network_on_the_whole_latent(vae: WanVAE) -> None:
    decoder: Any = vae.decoder
    z = latent(4)
    h = middle(decoder.mid_block, causal(decoder.conv_in, vae.post_quant_conv(z)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            h = residual(resnet, h)
        if block.upsamplers is None:
            continue
        up = block.upsamplers[0]
        if up.time_conv is not None:  # the first frame stays and is history to none, later ones are doubled
            even, odd = causal(up.time_conv, h[:, :, 1:]).chunk(2, dim=1)
            h = torch.cat([h[:, :, :1], torch.stack((even, odd), dim=3).flatten(2, 3)], dim=2)
        h = frame_by_frame(up.resample, h)
    pixels = causal(decoder.conv_out, nn.functional.silu(decoder.norm_out(h))).clamp(-1, 1)
    assert pixels.shape[2] == 13
    assert (pixels - vae.decode(z)).abs().max() <= 1e-5


@pytest.mark.parametrize("frames", [0, 2, 3, 4, 8, 12])
def test_clips_off_the_grid_are_refused(vae: WanVAE, frames: int) -> None:
    for encode in (vae.encode, lambda p: encode_tiled(vae, p)):
        with pytest.raises(InputError, match=r"num_frames must be 4k\+1"):
            encode(torch.zeros(1, 3, frames, 16, 24))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(1, 4, 1, 16, 24), r"pixels must be \[B, 3, F, H, W\]"),
        (torch.zeros(3, 1, 16, 24), r"pixels must be \[B, 3, F, H, W\]"),
        (torch.zeros(1, 3, 1, 20, 24), "multiples of 8"),
    ],
)
def test_wrong_pixels(vae: WanVAE, pixels: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        vae.encode(pixels)


def test_wrong_latents(vae: WanVAE) -> None:
    for bad in (torch.zeros(1, 8, 1, 2, 3), torch.zeros(16, 1, 2, 3), torch.zeros(1, 16, 0, 2, 3)):
        for decode in (vae.decode, lambda z: decode_tiled(vae, z)):
            with pytest.raises(InputError, match=r"latent must be \[B, 16, T, h, w\]"):
                decode(bad)


@pytest.mark.parametrize(("lengths", "chunk"), [([4], 0), ([1, 1], 1), ([1, 4, 3], 2), ([1, 5], 1)])
def test_wrong_chunks(vae: WanVAE, lengths: list[int], chunk: int) -> None:
    with pytest.raises(InputError, match=f"chunk {chunk} must have {4 if chunk else 1} frames, got {lengths[chunk]}"):
        list(vae.encode_stream(clip(n) for n in lengths))


def test_moments_are_clamped_pixels_too(vae: WanVAE) -> None:
    _, logvar = split_moments(torch.linspace(-99, 99, 32).view(1, 32, 1, 1, 1))
    assert logvar.max() == 20.0 and logvar.min() >= -30.0
    _, low = split_moments(torch.full((1, 32, 1, 1, 1), -99.0))
    assert (low == -30.0).all()
    pixels = vae.decode(20 * latent(3))
    assert pixels.abs().max() == 1.0 and (pixels.abs() < 1).any()


def test_the_encoder_is_causal(vae: WanVAE) -> None:
    """Frame k belongs to latent ceil(k / 4) and reaches that one and later ones."""
    pixels = clip(13)
    before = vae.encode(pixels)[0]
    for k in range(13):
        changed = pixels.clone()
        changed[:, :, k] = clip(1, seed=9)[:, :, 0]
        differs = (vae.encode(changed)[0] != before).any(dim=1).flatten(2).any(-1)[0].tolist()
        first = -(-k // 4)
        assert not any(differs[:first]) and differs[first], k


def test_the_decoder_is_causal(vae: WanVAE) -> None:
    z = latent(4)
    before = vae.decode(z)
    for k in range(4):
        changed = z.clone()
        changed[:, :, k] += 1
        differs = (vae.decode(changed) != before).any(dim=1).flatten(2).any(-1)[0].tolist()
        first = 4 * k - 3 if k else 0
        assert not any(differs[:first]) and all(differs[first : first + 4]), k


def state_bytes(state: StreamState) -> int:
    """Memory that the state keeps alive, views' bases included."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in state.values())}.values())


def test_the_streams_state_does_not_grow(vae: WanVAE) -> None:
    state: StreamState = {}
    sizes = [state_bytes(state) for _ in vae.decode_stream(latent(9), state)]
    assert sizes[2] > 0 and set(sizes[2:]) == {sizes[2]}
    assert all(history.shape[2] == 2 for history in state.values())
    assert state_bytes(state) == sum(history.nbytes for history in state.values())  # no view of a whole chunk


@pytest.mark.parametrize("num_res_blocks", [1, 2])
def test_how_far_back_the_decoder_reaches(num_res_blocks: int) -> None:
    """From so many latent frames it has the state of the whole stream, bit for bit; from one less it has not."""
    vae = make_vae(torch.float64, config=VAEConfig(base_dim=4, num_res_blocks=num_res_blocks))
    reach = decoder_reach(vae.config)
    frames = list(latent(reach + 5, 1, 1).double().split(1, dim=2))

    def after(start: int) -> tuple[StreamState, Tensor]:
        state: StreamState = {}
        for frame in frames[start:-1]:
            vae.decode_step(frame, state)
        before = dict(state)
        return before, vae.decode_step(frames[-1], state)

    state, pixels = after(0)
    start = len(frames) - 1 - reach
    same_state, same_pixels = after(start)
    assert torch.equal(pixels, same_pixels)
    assert state.keys() == same_state.keys()
    assert all(torch.equal(state[layer], same_state[layer]) for layer in state)
    other, _ = after(start + 1)
    assert not all(torch.equal(state[layer], other[layer]) for layer in state)


def test_the_reach_of_the_released_decoder() -> None:
    """22 and 2 frames at the rate of the latents, 12 and 2 at twice it, 26 at four times."""
    assert decoder_reach(VAEConfig()) == 38 == math.ceil(24 + 14 / 2 + 26 / 4)


def test_the_encoders_state_does_not_grow(vae: WanVAE) -> None:
    state: StreamState = {}
    sizes = []
    for a, b in frame_chunks(25):
        vae.encoder(clip(25)[:, :, a:b], state)
        sizes.append(state_bytes(state))
    assert sizes[2] > 0 and set(sizes[2:]) == {sizes[2]}
    assert state_bytes(state) == sum(history.nbytes for history in state.values())


def test_streams_are_lazy(vae: WanVAE) -> None:
    """A frame is asked for when its pixels are, so memory holds one latent frame at a time."""
    asked: list[int] = []

    def frames() -> Iterator[Tensor]:
        for i, frame in enumerate(latent(4).split(1, dim=2)):
            asked.append(i)
            yield frame

    for tiled in (False, True):
        asked.clear()
        stream = decode_stream_tiled(vae, frames(), Tiling(16, 8)) if tiled else vae.decode_stream(frames())
        for i, _ in enumerate(stream):
            assert asked == list(range(i + 1))


def test_two_clips_at_once_do_not_mix(vae: WanVAE) -> None:
    a, b = latent(3), latent(3, seed=1)
    pairs = list(zip(vae.decode_stream(a), vae.decode_stream(b)))
    assert torch.equal(torch.cat([p for p, _ in pairs], dim=2), vae.decode(a))
    assert torch.equal(torch.cat([p for _, p in pairs], dim=2), vae.decode(b))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8]))
def test_tile_weights_sum_to_one(length: int, tile: int, stride: int, scale: int) -> None:
    tiling = Tiling(8 * max(tile, stride), 8 * min(tile, stride))
    spans = tiling.spans(length)
    total = torch.zeros(length * scale)
    for (start, stop), weight in zip(spans, blend_weights(spans, scale), strict=True):
        assert 0 <= start < stop <= length and stop - start == min(length, tiling.tile // 8)
        assert (weight > 0).all() and (weight <= 1 + 1e-6).all()
        total[start * scale : stop * scale] += weight
    assert (total - 1).abs().max() <= 1e-5


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 4), st.integers(1, 4), st.integers(1, 2))
def test_tiled_decoding(h: int, w: int, tile: int, stride: int, frames: int) -> None:
    vae = make_vae()
    z = 20 * latent(frames, h, w)  # many pixels at the limits
    tiling = Tiling(8 * tile, 8 * min(tile, stride))
    got = decode_tiled(vae, z, tiling)
    assert got.shape == (1, 3, 4 * frames - 3, 8 * h, 8 * w)
    assert got.abs().max() <= 1.0 and torch.isfinite(got).all()
    mean, logvar = encode_tiled(vae, got, tiling)
    assert mean.shape == logvar.shape == z.shape
    if h <= tile and w <= tile:
        assert torch.equal(got, vae.decode(z))
        assert torch.equal(mean, vae.encode(got)[0])


def test_each_tile_is_a_clip_of_its_own(vae: WanVAE) -> None:
    """Without overlap a tiled decode is the tiles decoded by themselves, side by side."""
    z = latent(3, 4, 6)
    got = decode_tiled(vae, z, Tiling(16, 16))
    for r in (0, 2):
        for c in (0, 2, 4):
            alone = vae.decode(z[..., r : r + 2, c : c + 2])
            assert torch.allclose(got[..., 8 * r : 8 * r + 16, 8 * c : 8 * c + 16], alone, atol=1e-6)


def test_tiles_fade_linearly() -> None:
    left, right = blend_weights([(0, 4), (2, 6)], 2)
    fade = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.allclose(right, torch.cat([fade, torch.ones(4)]))
    assert torch.allclose(left, torch.cat([torch.ones(4), 1 - fade]))


@pytest.mark.parametrize(("tile", "stride"), [(100, 64), (64, 60), (64, 0), (64, 72), (0, 0)])
def test_wrong_tiling(tile: int, stride: int) -> None:
    with pytest.raises(InputError, match="tiling needs multiples of 8"):
        Tiling(tile, stride)


def test_normalize_and_denormalize_are_inverse(vae: WanVAE) -> None:
    z = latent(2)
    assert torch.allclose(vae.denormalize(vae.normalize(z)), z, atol=1e-5)
    assert torch.allclose(vae.normalize(vae.denormalize(z)), z, atol=1e-5)
    zero = vae.normalize(torch.zeros(1, 16, 1, 1, 1)).flatten()
    assert zero[0] == pytest.approx(0.7571 / 2.8184) and zero[15] == pytest.approx(0.2921 / 1.9160)


@pytest.mark.parametrize("tiling", [None, Tiling(16, 8)])
@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3]])
def test_pushing_pieces_is_decoding_whole(tiling: Tiling | None, cuts: list[int]) -> None:
    c, z = components(tiling=tiling), latent(4, 3, 3)
    whole = decode_latents(c, z)
    assert whole.shape == (1, 13, 24, 24, 3) and whole.min() >= 0 and whole.max() <= 1
    decoder = StreamingDecoder(c)
    pieces = [decoder.push(part) for part in z.tensor_split(cuts, dim=2)]
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(torch.cat(list(StreamingDecoder(c).stream(z)), dim=1), whole)


@pytest.mark.parametrize("tiling", [None, Tiling(16, 8)])
@pytest.mark.parametrize("cuts", [(3, 7), (30, 3)], ids=["few", "many"])
def test_behind_latents_that_are_skipped_frames_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, tiling: Tiling | None, cuts: tuple[int, int]
) -> None:
    """And of those that are skipped only as many are decoded as the decoder reaches back to."""
    c = components(vae=make_vae(config=VAEConfig(base_dim=4, num_res_blocks=1)), tiling=tiling)
    vae = c.need_vae()
    begun, skipped = cuts
    latents = latent(begun + skipped + 2, 3, 2)
    whole = decode_latents(c, latents)
    decoder = StreamingDecoder(c)
    first = decoder.push(latents[:, :, :begun])
    steps: list[None] = []
    step = vae.decode_step
    monkeypatch.setattr(vae, "decode_step", lambda *given: (steps.append(None), step(*given))[1])
    decoder.skip(latents[:, :, begun : begun + skipped])
    assert not steps
    rest = decoder.push(latents[:, :, begun + skipped :])
    assert torch.equal(first, whole[:, : first.shape[1]])
    assert torch.equal(rest, whole[:, -rest.shape[1] :])
    assert rest.shape[1] == 8
    decoded = min(begun + skipped, decoder_reach(vae.config)) + 2
    assert len(steps) == decoded * (2 if tiling else 1)


def test_tiles_of_the_callers_go_on(vae: WanVAE) -> None:
    z, tiles = latent(3, 3, 3), list[Tile]()
    parts = [*decode_stream_tiled(vae, z[:, :, :1], Tiling(16, 8), tiles)]
    parts += decode_stream_tiled(vae, z[:, :, 1:], Tiling(16, 8), tiles)
    assert torch.equal(torch.cat(parts, dim=2), decode_tiled(vae, z, Tiling(16, 8)))


def test_posterior() -> None:
    mean, logvar = latent(40), torch.full((1, 16, 40, 2, 3), 2.0)
    assert pick_posterior(mean, logvar, "mode", None) is mean
    draws = [pick_posterior(mean, logvar, "sample", torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (draws[0] - mean).std() == pytest.approx(torch.e, rel=0.05)
    with pytest.raises(InputError, match='posterior must be "mode" or "sample"'):
        pick_posterior(mean, logvar, "mean", None)  # type: ignore[arg-type]


# kernel, stride, padding, memory format of the input
CONVOLUTIONS = [
    ((3, 3, 3), (1, 1, 1), (0, 1, 1)), ((1, 1, 1), (1, 1, 1), (0, 0, 0)), ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((3, 1, 1), (1, 1, 1), (0, 0, 0)), ((1, 2, 2), (1, 2, 2), (0, 0, 0)), ((2, 3, 5), (3, 2, 1), (0, 2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_time_taps_are_torchs_convolution(
    shape: tuple[tuple[int, ...], ...], dtype: torch.dtype, channels_last: bool, bias: bool
) -> None:
    kernel, stride, padding = shape
    ours = layers.Conv3d(4, 6, kernel, stride, padding, bias=bias, dtype=dtype)  # type: ignore[arg-type]
    plain = nn.Conv3d(4, 6, kernel, stride, padding, bias=bias, dtype=dtype)  # type: ignore[arg-type]
    plain.load_state_dict(ours.state_dict())
    for frames in (3, 4, 5, 8):
        x = randn(2, 4, frames, 6, 7, dtype=dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        got, expected = ours(x), plain(x)
        assert got.shape == expected.shape and got.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def test_the_fast_convolution_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the tests above would compare torch with torch."""
    calls: list[int] = []
    original = layers.Conv3d._by_time_taps
    monkeypatch.setattr(layers.Conv3d, "_by_time_taps", lambda *args: calls.append(1) or original(*args))
    vae = make_vae()
    vae.decode(latent(2))
    count = sum(isinstance(m, nn.Conv3d) for m in vae.decoder.modules())
    # Every convolution once per latent frame (and post_quant_conv), the two time convolutions not for the first one.
    assert len(calls) == 2 * (count + 1) - 2


def test_unusual_convolutions_are_torchs_own() -> None:
    for options in ({"padding": (1, 1, 1)}, {"dilation": (2, 1, 1)}, {"groups": 2}, {"padding": "same"},
                    {"padding": (0, 1, 1), "padding_mode": "replicate"}):  # fmt: skip
        ours, plain = layers.Conv3d(4, 4, 3, **options), nn.Conv3d(4, 4, 3, **options)  # type: ignore[arg-type]
        plain.load_state_dict(ours.state_dict())
        x = randn(1, 4, 6, 5, 5)
        assert torch.equal(ours(x), plain(x))


def test_gradients_through_the_encoder_and_decoder_are_torchs() -> None:
    """In fp64, of inputs and of every parameter: the tap convolution, the norm and the streaming state."""
    ours, plain = (make_vae(operations=ops).double().requires_grad_(True) for ops in (None, nn))

    def gradients(vae: WanVAE) -> tuple[list[Tensor | None], Tensor]:
        pixels = clip(5).double().requires_grad_(True)
        state: StreamState = {}
        moments = [vae.quant_conv(vae.encoder(pixels[:, :, a:b], state)) for a, b in frame_chunks(5)]
        mean = torch.cat(moments, dim=2)[:, :16]
        state = {}
        out = torch.cat([vae.decoder(vae.post_quant_conv(z), state) for z in mean.split(1, dim=2)], dim=2)
        (out * randn(*out.shape, dtype=torch.float64)).sum().backward()
        assert pixels.grad is not None
        return [p.grad for p in vae.parameters()], pixels.grad

    (a, x), (b, y) = gradients(ours), gradients(plain)
    assert (x - y).abs().max() <= 1e-9 * y.abs().max()
    for (name, _), got, expected in zip(ours.named_parameters(), a, b, strict=True):
        assert got is not None and expected is not None, name
        assert (got - expected).abs().max() <= 1e-9 * (1 + expected.abs().max()), name
