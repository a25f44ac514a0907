"""Attention backends: refused with a reason, chosen with a word in the log, proven before use."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli_helpers import made, refused
from safetensors.torch import load_file
from tiny_models import components, make_dit, pictures, randn, seeded, text
from torch import Tensor

from lcv_core.config import BSAConfig
from lcv_core.dit import attention
from lcv_core.dit.attention import BACKENDS, BackendUnavailable, available_backends, check_eight_bits, resolve_backend
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.pipelines import continue_video, image_to_video

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PACKAGES = {
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers.ops",
}
BSA = BSAConfig(sparsity=0.5, block_q=(1, 2, 2), block_k=(1, 2, 2))


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """What one test found usable is not usable in the next."""
    attention._resolve.cache_clear()
    yield
    attention._resolve.cache_clear()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends believe in a CUDA GPU; the probe really runs on the CPU."""
    probe = attention.check_attention

    def on_cpu(attend: attention.Attend, _device: torch.device, *rest: Any) -> None:
        probe(attend, CPU, *rest)

    monkeypatch.setattr(attention, "check_attention", on_cpu)


def install(monkeypatch: pytest.MonkeyPatch, name: str, kernel: Callable[..., Any]) -> None:
    """A package that offers `kernel` under the name that the real one has."""
    functions = {"sage": "sageattn", "xformers": "memory_efficient_attention"}
    module = types.ModuleType(PACKAGES[name])
    setattr(module, functions.get(name, "flash_attn_func"), kernel)
    monkeypatch.setitem(sys.modules, PACKAGES[name], module)


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A correct kernel in the layout [B, S, H, D]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def truncating(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Looks at the first q_len keys only."""
    return sequence_first(q, k[:, : q.shape[1]], v[:, : q.shape[1]])


def heads_first(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
    assert tensor_layout == "HND" and not is_causal
    return F.scaled_dot_product_attention(q, k, v)


def resolve(name: str, device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16) -> attention.Attend:
    return resolve_backend(name, device=device, dtype=dtype, head_dim=16)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)  # as if it were not installed
    with pytest.raises(BackendUnavailable) as error:
        resolve(name)
    message = str(error.value)
    assert f'attention backend "{name}" is not usable' in message
    assert f"{PACKAGES[name]} cannot be imported" in message and "install it with" in message
    assert '"sdpa" always is' in message
    with pytest.raises(InputError):
        make_dit().set_attention(name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    for call in (lambda: resolve("flash"), lambda: make_dit().set_attention("flash")):
        with pytest.raises(InputError, match=f'unknown attention backend "flash"; there are: {", ".join(BACKENDS)}'):
            call()
    with pytest.raises(InputError, match="unknown attention backend"):
        LongCatDiT(make_dit().config, device="meta").set_attention("flash")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_correct_kernel_is_taken(monkeypatch: pytest.MonkeyPatch, on_a_gpu: None, name: str) -> None:
    install(monkeypatch, name, heads_first if name == "sage" else sequence_first)
    attend = resolve(name)
    q, k, v = randn(1, 2, 3, 16), randn(1, 2, 5, 16, seed=1), randn(1, 2, 5, 16, seed=2)
    assert torch.allclose(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize("name", ["flash2", "flash3", "xformers"])
def test_a_kernel_that_ignores_the_longer_keys_is_caught(
    monkeypatch: pytest.MonkeyPatch, on_a_gpu: None, name: str
) -> None:
    install(monkeypatch, name, truncating)
    with pytest.raises(BackendUnavailable, match=r"is not usable: it is wrong when q_len != kv_len"):
        resolve(name)


def test_sage_is_caught_too(monkeypatch: pytest.MonkeyPatch, on_a_gpu: None) -> None:
    """Its tolerance is wider, for it rounds q and k to 8 bits, and still narrower than this."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        n = q.shape[2]
        return F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n])

    install(monkeypatch, "sage", kernel)
    with pytest.raises(BackendUnavailable, match="wrong when q_len != kv_len"):
        resolve("sage")


def wrong_shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sequence_first(q, k, v)[:, 1:]


def not_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sequence_first(q, k, v) * float("nan")


def failing(_q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
    raise RuntimeError("head dim 16 is not compiled in")


@pytest.mark.parametrize(
    ("kernel", "words"),
    [(wrong_shape, "wrong shape"), (not_finite, "non-finite"), (failing, "head dim 16 is not compiled in")],
)
def test_other_failures_of_the_probe(
    monkeypatch: pytest.MonkeyPatch, on_a_gpu: None, kernel: Callable[..., Tensor], words: str
) -> None:
    install(monkeypatch, "flash2", kernel)
    with pytest.raises(BackendUnavailable, match=words):
        resolve("flash2")


@pytest.mark.parametrize("name", ["flash2", "flash3", "xformers"])
def test_kernels_may_return_a_tuple(monkeypatch: pytest.MonkeyPatch, on_a_gpu: None, name: str) -> None:
    """FlashAttention-3 returns (out, lse) in some releases and out alone in others."""
    install(monkeypatch, name, lambda q, k, v: (sequence_first(q, k, v), torch.zeros(1)))
    q, k = randn(2, 2, 3, 16), randn(2, 2, 5, 16, seed=1)
    got = resolve(name)(q, k, k)
    assert got.shape == q.shape
    assert torch.allclose(got, F.scaled_dot_product_attention(q, k, k), atol=1e-6)


def test_a_broken_binary_is_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise OSError(f"undefined symbol in {name}")

    monkeypatch.setattr(attention.importlib, "import_module", broken)
    with pytest.raises(BackendUnavailable, match="flash_attn is installed but broken"):
        resolve("flash2")


def test_device_and_dtype_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash2", sequence_first)
    with pytest.raises(BackendUnavailable, match="needs a CUDA GPU, the model is on cpu"):
        resolve("flash2", CPU)
    with pytest.raises(BackendUnavailable, match=r"needs fp16 or bf16, the model is in torch\.float32"):
        resolve("flash2", CUDA, torch.float32)


def test_auto_logs_that_it_fell_to_sdpa_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("flash3", "flash2"):
        monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with caplog.at_level(logging.INFO, "lcv_core"):
        make_dit().set_attention("auto")
    assert 'attention "auto" chose sdpa' in caplog.text
    assert "flash_attn_interface cannot be imported" in caplog.text and "flash_attn cannot be imported" in caplog.text


def test_auto_logs_the_fast_one(
    monkeypatch: pytest.MonkeyPatch, on_a_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    """flash3 is wrong here, so flash2 it is; sage and xformers, though usable, are only taken when asked for."""
    install(monkeypatch, "flash3", truncating)
    install(monkeypatch, "flash2", sequence_first)
    with caplog.at_level(logging.INFO, "lcv_core"):
        attend = resolve("auto")
    assert 'attention "auto" chose flash2' in caplog.text
    assert attend is resolve("flash2")
    attention._resolve.cache_clear()
    monkeypatch.setitem(sys.modules, PACKAGES["flash2"], None)
    install(monkeypatch, "sage", heads_first)
    install(monkeypatch, "xformers", sequence_first)
    assert resolve("auto") is attention.sdpa


def test_the_report_has_every_backend() -> None:
    report = available_backends(device=CPU, dtype=torch.float32, head_dim=16)
    assert tuple(report) == BACKENDS
    assert report["sdpa"] == report["auto"] == report["bsa"] == "ok"
    assert all("is not usable" in report[name] for name in PACKAGES)


def forward(dit: LongCatDiT, **options: Any) -> Tensor:
    states = text()
    return dit(randn(1, 16, 4, 4, 6), torch.tensor([500.0]), states.states, states.mask, **options)


def test_bsa_by_name_is_the_configs_own_settings() -> None:
    dit = make_dit(bsa=BSA)
    dense = forward(dit)
    sparse = forward(dit, bsa=dit.config.bsa)
    dit.set_attention("bsa")
    assert torch.equal(forward(dit), sparse)
    assert (sparse - dense).abs().max() > 1e-3
    whole = BSAConfig(sparsity=0.0)
    assert torch.allclose(forward(dit, bsa=whole), dense, atol=1e-4)  # a request's own settings win
    dit.set_attention("sdpa")
    assert torch.equal(forward(dit), dense)


def test_bsa_by_name_with_a_cache() -> None:
    dit = make_dit(bsa=BSA)
    dit.set_attention("bsa")
    x, states = randn(1, 16, 4, 4, 6), text().states
    timestep = torch.tensor([[0.0, 0.0, 500.0, 500.0]])
    whole = dit(x, timestep, states, num_cond_latents=2)[:, :, 2:]
    cache = dit.build_kv_cache(x[:, :, :2])
    cached = dit(x[:, :, 2:], timestep[:, 2:], states, num_cond_latents=2, kv_cache=cache)
    assert (cached - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("task", ["continue", "i2v"])
def test_bsa_by_name_in_a_base_pass(task: str) -> None:
    """With condition frames, cached or not, and blocks that the grid does not fill: 5 frames of 2x3 tokens."""
    dit = make_dit(bsa=BSAConfig(sparsity=0.6, block_q=(2, 2, 2), block_k=(2, 2, 2)))
    results = {}
    for name in ("bsa", "sdpa"):
        dit.set_attention(name)
        for cached in (True, False):
            options: dict[str, Any] = {"text": text(), "negative_text": text(seed=9), "num_steps": 2}
            options |= {"num_frames": 17, "generator": seeded(), "output": "latents"}
            if task == "continue":
                options |= {"frames": pictures(5), "num_cond_frames": 5, "use_kv_cache": cached, "uniform_tail": False}
                results[name, cached] = continue_video(components(dit=dit), **options)
            else:
                options |= {"image": pictures(1)[0], "height": 32, "width": 48}
                results[name, cached] = image_to_video(components(dit=dit), **options)
    assert (results["bsa", True] - results["bsa", False]).abs().max() <= 1e-4
    assert (results["bsa", True] - results["sdpa", True]).abs().max() > 1e-2


def test_sparsity_on_the_command_line(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a grid of 3x4x8 tokens, of which the model's blocks of 4x4x4 make two."""
    monkeypatch.chdir(tmp_path)
    call = ["t2v", "-m", tiny_checkpoint, "-p", "x", "--steps", 1, "--seed", 1, "--frames", 9, "-g", 1]
    call += ["--height", 64, "--width", 128]
    sparse = ["--attention", "bsa", "--sparsity"]
    for name, more in {"dense": [], "whole": [*sparse, 0], "half": [*sparse, 0.5]}.items():
        made(*call, *more, "-o", f"{name}.safetensors")
    dense, whole, half = (load_file(f"{name}.safetensors")["latents"] for name in ("dense", "whole", "half"))
    assert torch.allclose(whole, dense, atol=1e-4)
    assert (half - dense).abs().max() > 1e-3
    assert "ask for that with --attention bsa" in refused(*call, "--sparsity", 0.5)
    assert "try 0.875" in refused(*call, "--attention", "bsa", "--sparsity", 1.0)


def test_a_function_is_taken_as_it_is() -> None:
    lengths: list[tuple[int, int]] = []

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths.append((q.shape[2], k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v)

    dit = make_dit()
    expected = forward(dit, num_cond_latents=1)
    dit.set_attention(mine)
    assert torch.equal(forward(dit, num_cond_latents=1), expected)
    assert lengths == [(6, 6), (18, 24), (18, 6)] * dit.config.depth  # condition, noise, text


def test_eight_bits_are_refused_where_they_cannot_run(tmp_path: Path) -> None:
    """Before a forward, with what to do."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        check_eight_bits(torch.device("cuda"), torch.bfloat16, 128)
        return
    with pytest.raises(BackendUnavailable, match=r"not usable on cpu.*leave it in 16 bits"):
        check_eight_bits(torch.device("cpu"), torch.bfloat16, 128)
    assert "eight_bits" not in BSAConfig(eight_bits=True).to_params()
    job = ["t2v", "-p", "a cube", "--output", str(tmp_path / "x.mp4"), "--sparse-8bit"]
    assert "ask for that with --attention bsa" in refused(*job)
    assert "leave it in 16 bits" in refused(*job, "--attention", "bsa")
