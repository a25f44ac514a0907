"""One switch for dense attention: named backends, each proven on this machine before it is used.

A backend is asked for by name. One that is not installed, does not fit the device or dtype, or gets
q_len != kv_len wrong (known of some quantised kernels; condition frames and KV caches need it) is refused with the
reason. "auto" picks the fastest exact one and logs its choice. "bsa" is block sparse attention in every self-attention
with the configuration's own BSA settings; cross-attention then runs on sdpa.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_bsa import block_sparse_attention, select_blocks
from lcv_core.errors import InputError

log = logging.getLogger("lcv_core")

# q [B, H, Sq, D], k and v [B, H, Skv, D] -> [B, H, Sq, D]. One with an attribute `takes_bias` that is true has a fourth
# argument: a bias of the scores, [1, 1, 1, Skv] in q's dtype.
Attend = Callable[..., Tensor]

HALF = (torch.float16, torch.bfloat16)
_SHORT = 512  # keys up to which a CPU's backward pass is 2 to 4 times faster in fp32 than in bf16


class BackendUnavailable(InputError):
    """The named attention backend cannot run here; the message says why."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    if q.device.type == "cpu" and q.dtype in HALF and q.requires_grad and k.shape[2] <= _SHORT:
        bias = None if bias is None else bias.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias)


sdpa.__dict__["takes_bias"] = True


def takes_bias(attend: Attend) -> bool:
    """Whether an attention function can be given a bias of the scores; a host's function is not asked to."""
    return getattr(attend, "takes_bias", False)


def _import(module: str, install: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(f"{module} cannot be imported ({error}); install it with `{install}`") from None
    except Exception as error:  # a binary built for another torch fails in many ways at import
        raise BackendUnavailable(f"{module} is installed but broken ({type(error).__name__}: {error})") from None


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases return (out, lse), newer ones out alone."""
    return result[0] if isinstance(result, tuple) else result


def _with_sequence_first(kernel: Callable[..., Tensor | tuple[Tensor, ...]]) -> Attend:
    """Wrap a kernel whose layout is [B, S, H, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _first(kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))).transpose(1, 2)

    return attend


def _flash2() -> Attend:
    module = _import("flash_attn", "pip install flash-attn")
    return _with_sequence_first(module.flash_attn_func)  # type: ignore[attr-defined]


def _flash3() -> Attend:
    module = _import("flash_attn_interface", "python setup.py install in flash-attention/hopper")
    return _with_sequence_first(module.flash_attn_func)  # type: ignore[attr-defined]


def _sage() -> Attend:
    module = _import("sageattention", "pip install sageattention")
    kernel = module.sageattn  # type: ignore[attr-defined]
    return lambda q, k, v: kernel(q, k, v, tensor_layout="HND", is_causal=False)


def _xformers() -> Attend:
    module = _import("xformers.ops", "pip install xformers")
    return _with_sequence_first(module.memory_efficient_attention)  # type: ignore[attr-defined]


# name -> (loader, allowed relative error of the q_len != kv_len probe against fp32 sdpa)
_LOADERS: dict[str, tuple[Callable[[], Attend], float]] = {
    "flash3": (_flash3, 2e-2),
    "flash2": (_flash2, 2e-2),
    "xformers": (_xformers, 2e-2),
    "sage": (_sage, 1e-1),  # 8-bit q and k
}
EIGHT_BITS = "triton_int8_fp8"  # of lcv_bsa
_EIGHT_BITS_ERROR = 1e-1  # relative, allowed of it; on random numbers it has 4e-2
BACKENDS = ("auto", "sdpa", *_LOADERS, "bsa")
# sage is lossy and xformers no faster than sdpa: neither is chosen unless asked for.
_AUTO_ORDER = ("flash3", "flash2")


def check_attention(
    attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, tolerance: float = 2e-2
) -> None:
    """BackendUnavailable unless `attend` agrees with fp32 sdpa at q_len 48, kv_len 80 within a relative error."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, head_dim, generator=generator) for n in (48, 80, 80))
    expected = sdpa(q, k, v)
    try:
        got = attend(*(x.to(device, dtype) for x in (q, k, v))).float().cpu()
    except Exception as error:
        raise BackendUnavailable(f"it fails on {device} in {dtype} with head_dim {head_dim}: {error}") from None
    if got.shape != expected.shape or not torch.isfinite(got).all():
        raise BackendUnavailable("it returns a wrong shape or non-finite values when q_len != kv_len")
    error = ((got - expected).norm() / expected.norm()).item()
    if error > tolerance:
        raise BackendUnavailable(
            f"it is wrong when q_len != kv_len (relative error {error:.2g} > {tolerance:g}), as with condition frames"
        )


@lru_cache(maxsize=16)
def check_eight_bits(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """BackendUnavailable unless block sparse attention in eight bits runs and is right here; says what to do."""
    grid, block = (4, 4, 8), (4, 4, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, math.prod(grid), head_dim, generator=generator) for _ in range(3))
    reason = None
    try:
        with torch.no_grad():
            q8, k8, v8 = (x.to(device, dtype) for x in (q, k, v))
            selection = select_blocks(q8, k8, grid, grid, block, keep=1.0)
            got = block_sparse_attention(q8, k8, v8, selection, backend=EIGHT_BITS).float().cpu()
        error = ((got - sdpa(q, k, v)).norm() / sdpa(q, k, v).norm()).item()
        if not error <= _EIGHT_BITS_ERROR:
            reason = f"it is wrong on {device} (relative error {error:.2g})"
    except Exception as problem:  # kernels fail in many ways where a driver or a Triton does not fit
        reason = str(problem)
    if reason is not None:
        raise BackendUnavailable(
            f"block sparse attention in eight bits is not usable on {device} in {dtype}: {reason}; leave it in 16 bits"
        )


@lru_cache(maxsize=64)
def _resolve(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    if name in ("sdpa", "bsa"):
        return sdpa
    if name == "auto":
        return _auto(device, dtype, head_dim)
    loader, tolerance = _LOADERS[name]
    try:
        attend = loader()
        if device.type != "cuda":
            raise BackendUnavailable(f"it needs a CUDA GPU, the model is on {device}")
        if dtype not in HALF:
            raise BackendUnavailable(f"it needs fp16 or bf16, the model is in {dtype}")
        check_attention(attend, device, dtype, head_dim, tolerance)
    except BackendUnavailable as error:
        raise BackendUnavailable(f'attention backend "{name}" is not usable: {error}; "sdpa" always is') from None
    return attend


def _auto(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    refusals = []
    for name in _AUTO_ORDER:
        try:
            attend = _resolve(name, device, dtype, head_dim)
        except BackendUnavailable as error:
            refusals.append(str(error))
        else:
            log.info('attention "auto" chose %s on %s in %s', name, device, dtype)
            return attend
    log.info('attention "auto" chose sdpa on %s in %s (%s)', device, dtype, "; ".join(refusals))
    return sdpa


def resolve_backend(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    """The attention function called `name`, checked once per device, dtype and head dim.

    Raises BackendUnavailable (an InputError) with the reason; an unknown name lists the known ones.
    """
    if name not in BACKENDS:
        raise InputError(f'unknown attention backend "{name}"; there are: {", ".join(BACKENDS)}')
    return _resolve(name, device, dtype, head_dim)


def available_backends(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Every backend name with "ok" or the reason why it is not usable here."""
    report = {}
    for name in BACKENDS:
        try:
            resolve_backend(name, device=device, dtype=dtype, head_dim=head_dim)
        except BackendUnavailable as error:
            report[name] = str(error)
        else:
            report[name] = "ok"
    return report
