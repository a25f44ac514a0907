"""The VAE's Triton kernel, run by Triton's interpreter or on a GPU: against PyTorch's norm, SiLU and joining."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_vae, randn
from torch import Tensor

from lcv_core import layers
from lcv_core.vae import choice, convolve
from lcv_core.vae import norm as norm_module
from lcv_core.vae.choice import check_kernels
from lcv_core.vae.layers import StreamState, causal_conv, channels_last, join_frames, norm_silu_conv
from lcv_core.vae.norm import RMSNorm, norm_silu_behind

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to run its kernels", allow_module_level=True)

from lcv_core.vae import kernels

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter computes bf16 wrongly without saying so; fp16 takes the same way through the kernel.
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if GPU else ()))
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel is chosen whatever the device; the channels of each time it is."""
    channels: list[int] = []

    def counted(x: Tensor, *args: Any) -> Tensor:
        channels.append(x.shape[1])
        return kernels.norm_silu_behind(x, *args)

    use(monkeypatch, SimpleNamespace(**vars(kernels) | {"norm_silu_behind": counted}))
    return channels


def use(monkeypatch: pytest.MonkeyPatch, chosen: Any) -> None:
    for where in (norm_module, convolve):
        monkeypatch.setattr(where, "vae_kernels", lambda device: chosen)


def make(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return channels_last(randn(*shape, seed=seed).to(DEVICE, dtype))


def make_norm(channels: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(channels, 3).requires_grad_(False)
    norm.gamma.copy_(1 + randn(channels, 1, 1, 1, seed=9) / 8)
    return norm.to(DEVICE, dtype)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96, 1, 3, 5), (2, 24, 4, 5, 7), (1, 100, 4, 3, 3), (2, 384, 1, 1, 1)])
@pytest.mark.parametrize("continued", [True, False])
def test_it_is_norm_silu_and_joining(
    used: list[int], shape: tuple[int, ...], continued: bool, dtype: torch.dtype
) -> None:
    """Also of values whose squares fp16 cannot hold, of tiny ones, and of nothing at all."""
    norm, x = make_norm(shape[1], dtype), make(*shape, seed=0, dtype=dtype)
    x[..., -1, -1] *= 300
    x[..., 0, 1:2] *= 1e-3
    x[..., 1:, 0] = 0
    history = make(*shape[:2], 2, *shape[3:], seed=1, dtype=dtype) if continued else None
    got = norm_silu_behind(norm, x, history)
    assert got is not None and used == [shape[1]] and got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    before = torch.zeros_like(x[:, :, :1]).repeat(1, 1, 2, 1, 1) if history is None else history
    expected = join_frames(before, F.silu(norm(x)))
    assert got.shape == expected.shape and got[:, :, :2].equal(before)
    exact = F.silu(norm.double()(x.double()))
    error = relative(got[:, :, 2:], exact)
    assert error <= TOLERANCE[dtype] and error <= 1.1 * relative(expected[:, :, 2:], exact) + 1e-7


def test_what_is_no_number_stays_none(used: list[int]) -> None:
    x = make(1, 16, 1, 2, 2, seed=0, dtype=torch.float32)
    x[0, 3, 0, 1, 1] = torch.nan
    got = norm_silu_behind(make_norm(16, x.dtype), x, None)
    assert got is not None and got[0, :, 2, 1, 1].isnan().all() and got.isnan().sum() == 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stream_goes_on_as_without_it(used: list[int], dtype: torch.dtype) -> None:
    norm = make_norm(24, dtype)
    conv = layers.Conv3d(24, 8, 3, padding=(0, 1, 1)).to(DEVICE, dtype).requires_grad_(False)
    ours: StreamState = {}
    theirs: StreamState = {}
    for i, frames in enumerate((1, 4, 4, 1)):
        x = make(1, 24, frames, 5, 6, seed=i, dtype=dtype)
        got, expected = norm_silu_conv(norm, conv, x, ours), causal_conv(conv, F.silu(norm(x)), theirs)
        assert got.shape == expected.shape and relative(got, expected) <= 2 * TOLERANCE[dtype] + 1e-3 * GPU
        assert relative(ours[conv], theirs[conv]) <= TOLERANCE[dtype] and ours[conv].shape == theirs[conv].shape
        assert ours[conv].untyped_storage().nbytes() == ours[conv].nbytes  # no view of a whole chunk
    assert used == [24] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_vae(used: list[int], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    vae, pixels, latent = make_vae(dtype).to(DEVICE), randn(1, 3, 5, 16, 24).clamp(-1, 1), randn(1, 16, 2, 2, 3)
    got = vae.encode(pixels)[0], vae.decode(latent)
    convolutions = sum(isinstance(module, RMSNorm) and module.gamma.ndim == 4 for module in vae.modules())
    assert len(used) == 2 * convolutions
    use(monkeypatch, None)
    for one, other in zip(got, (vae.encode(pixels)[0], vae.decode(latent)), strict=True):
        tolerance = {torch.float32: 2e-3 if GPU else 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        assert relative(one, other) <= tolerance
    assert len(used) == 2 * convolutions


def test_what_it_does_not_take_is_left_to_pytorch(used: list[int]) -> None:
    """Gradients, hooks, fp64, other layouts, more channels than it holds at once."""
    norm, x = make_norm(16, torch.float32), make(1, 16, 2, 3, 3, seed=0, dtype=torch.float32)
    assert norm_silu_behind(norm, x.clone().requires_grad_(), None) is None
    assert norm_silu_behind(RMSNorm(16, 3).to(DEVICE), x, None) is None
    assert norm_silu_behind(norm, x.contiguous(), None) is None
    assert norm_silu_behind(norm.double(), x.double(), None) is None
    wide = kernels.MOST_CHANNELS + 8
    assert norm_silu_behind(make_norm(wide, x.dtype), make(1, wide, 1, 2, 2, seed=1, dtype=x.dtype), None) is None
    called: list[int] = []
    hooked = make_norm(16, torch.float32)
    hooked.register_forward_hook(lambda *_: called.append(1))
    conv = layers.Conv3d(16, 8, 3, padding=(0, 1, 1)).to(DEVICE).requires_grad_(False)
    norm_silu_conv(hooked, conv, x, {})
    assert called and not used
    with torch.no_grad():
        assert norm_silu_behind(RMSNorm(16, 3).to(DEVICE), x, None) is not None


def test_gradients_are_those_of_pytorch(used: list[int]) -> None:
    norm, conv = RMSNorm(16, 3).to(DEVICE), layers.Conv3d(16, 8, 3, padding=(0, 1, 1)).to(DEVICE)
    x = make(1, 16, 2, 3, 3, seed=0, dtype=torch.float32).requires_grad_()
    norm_silu_conv(norm, conv, x, {}).sum().backward()
    assert x.grad is not None and norm.gamma.grad is not None and not used


def test_it_is_proven_before_it_is_used() -> None:
    assert check_kernels(kernels, DEVICE) is None  # type: ignore[arg-type]

    def without_silu(x: Tensor, gamma: Tensor, scale: float, floor: float, history: int) -> Tensor:
        return F.pad(F.normalize(x.float(), dim=1).to(x.dtype) * scale * gamma, (0, 0, 0, 0, history, 0))

    wrong: Any = SimpleNamespace(**vars(kernels) | {"norm_silu_behind": without_silu})
    assert check_kernels(wrong, DEVICE) == f"they are wrong on {DEVICE}: norm + SiLU"


def test_a_cpu_and_a_compiler_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_proven_kernels", lambda device: kernels)
    assert choice.vae_kernels(torch.device("cpu")) is None
    assert choice.vae_kernels(torch.device("cuda")) is kernels
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choice.vae_kernels(torch.device("cuda")) is None


def test_without_a_kernel_that_works_a_warning_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(choice, "check_kernels", fails)
    choice._proven_kernels.cache_clear()
    assert choice._proven_kernels(DEVICE) is None
    assert "the VAE's norms are computed by PyTorch" in caplog.text
    assert f"they fail on {DEVICE} (RuntimeError: no compiler)" in caplog.text
    choice._proven_kernels.cache_clear()


def test_below_the_floor_is_taken_for_the_floor(used: list[int]) -> None:
    x = channels_last(torch.full((1, 4, 1, 2, 2), 1e-13, device=DEVICE))
    got = norm_silu_behind(make_norm(4, x.dtype), x, None)
    assert got is not None and used
    expected = F.silu(F.normalize(x, dim=1, eps=1e-12) * 2 * make_norm(4, x.dtype).gamma)
    assert torch.allclose(got[:, :, 2:], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("residual", [True, False])
def test_a_convolution_with_its_bias_and_a_residual(
    used: list[int], channels: int, residual: bool, dtype: torch.dtype
) -> None:
    """Of few channels too, which are padded."""
    conv = layers.Conv3d(channels, 40, 3, padding=(0, 1, 1)).to(DEVICE, dtype).requires_grad_(False)
    x, r = make(1, channels, 4, 5, 6, seed=0, dtype=dtype), make(1, 40, 2, 5, 6, seed=1, dtype=dtype)
    got = convolve.convolve(conv, x, r if residual else None)
    expected = conv.double()(x.double()) + (r.double() if residual else 0)
    tolerance = 1e-3 if dtype == torch.float32 and GPU else TOLERANCE[dtype]
    assert got.dtype == dtype and relative(got, expected) <= tolerance
    flat = layers.Conv2d(channels, 8, 3, stride=2, bias=False).to(DEVICE, dtype).requires_grad_(False)
    frames = x[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)
    assert relative(convolve.convolve(flat, frames), flat.double()(frames.double())) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_are_doubled(used: list[int], dtype: torch.dtype) -> None:
    upsample = torch.nn.Upsample(scale_factor=2.0, mode="nearest-exact")
    x = make(3, 100, 5, 7, seed=0, dtype=dtype)
    got = convolve.doubled(upsample, x)
    assert got.equal(upsample(x)) and got.is_contiguous(memory_format=torch.channels_last)


def test_a_convolution_that_is_not_plain_is_called(used: list[int]) -> None:
    """With a hook, a gradient, or a class that is not ours."""
    x, called = make(1, 24, 4, 5, 6, seed=0, dtype=torch.float32), []
    hooked = layers.Conv3d(24, 8, 3).to(DEVICE).requires_grad_(False)
    hooked.register_forward_hook(lambda *_: called.append(1))
    convolve.convolve(hooked, x)
    assert called
    learning = layers.Conv3d(24, 8, 3).to(DEVICE)
    convolve.convolve(learning, x).sum().backward()
    assert learning.bias is not None and learning.bias.grad is not None

    class Host(layers.Conv3d):
        def forward(self, input: Tensor) -> Tensor:
            return torch.full_like(input, 7.0)

    assert (convolve.convolve(Host(24, 8, 3).to(DEVICE).requires_grad_(False), x) == 7).all()


@pytest.mark.parametrize("continued", [True, False])
def test_channels_that_tensor_cores_do_not_take_are_padded(used: list[int], continued: bool) -> None:
    """The same sums; the state has the real channels alone."""
    dtype = torch.float16
    norm, conv = (
        make_norm(96, dtype),
        layers.Conv3d(96, 8, 3, padding=(0, 1, 1)).to(DEVICE, dtype).requires_grad_(False),
    )
    x, state = make(1, 96, 2, 5, 6, seed=0, dtype=dtype), StreamState()
    if continued:
        state[conv] = make(1, 96, 2, 5, 6, seed=1, dtype=dtype)
    theirs = dict(state)
    assert convolve.wide_channels(conv, x) == 128 and convolve.wide_channels(conv, x.float()) == 96
    expected = causal_conv(conv, F.silu(norm(x)), theirs)
    got = norm_silu_conv(norm, conv, x, state)
    assert relative(got, expected) <= 2 * TOLERANCE[dtype]
    assert state[conv].shape == (1, 96, 2, 5, 6) and relative(state[conv], theirs[conv]) <= TOLERANCE[dtype]


def test_a_residual_that_lies_otherwise_is_added_to_padded_channels(used: list[int]) -> None:
    dtype = torch.float16
    norm, conv = (
        make_norm(96, dtype),
        layers.Conv3d(96, 8, 3, padding=(0, 1, 1)).to(DEVICE, dtype).requires_grad_(False),
    )
    x, residual = make(1, 96, 2, 5, 6, seed=0, dtype=dtype), randn(1, 8, 2, 5, 6, seed=1).to(DEVICE, dtype)
    got = norm_silu_conv(norm, conv, x, {}, residual)
    assert used and relative(got, causal_conv(conv, F.silu(norm(x)), {}) + residual) <= 2 * TOLERANCE[dtype]
