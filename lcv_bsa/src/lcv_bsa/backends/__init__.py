"""Who computes the attention. A backend is chosen by name; a named one never falls back to another."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lcv_bsa.kernels import Kernels, load_kernels, register_kernels
from lcv_bsa.ops import attention
from lcv_bsa.selection import BlockSelection

logger = logging.getLogger("lcv_bsa")


class Attend(Protocol):
    """o [B, H, Sq, D] in q's dtype and lse [B, H, Sq] in fp32 (fp64 for fp64), from checked inputs; differentiable.

    lse may be None where it was not asked for.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]: ...


def takes_all(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """The refusal of a backend that refuses nothing."""
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation, and why it refuses an input (None where it takes it).

    kernels: what the operators of `lcv_bsa.ops` know it by, None where it does not go through them.
    """

    attend: Attend
    refusal: Callable[[Tensor, Tensor, Tensor, BlockSelection], str | None] = takes_all
    kernels: str | None = None


# "triton" takes the best of the others for the device and the layout; the README has a line on each.
_TRITON = (
    "triton", "triton_tma", "triton_pointer", "triton_fused", "triton_pair", "triton_int8", "triton_fp8",
    "triton_int8_fp8",
)  # fmt: skip


def _load_cpu() -> Kernels:
    from lcv_bsa.backends import gather

    return Kernels(gather.forward, gather.backward, takes_all)


def _load_triton(name: str) -> Kernels:
    try:
        from lcv_bsa.backends import triton
    except ImportError as error:
        raise ImportError(f"it needs Triton ({error}); pip install triton") from error
    return triton.KERNELS[name]


register_kernels("cpu", _load_cpu)
for _name in _TRITON:
    register_kernels(_name, partial(_load_triton, _name))


def _through_operator(name: str) -> Backend:
    refusal = load_kernels(name).refusal

    def attend(
        q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, selection, scale=scale, kernels=name)

    return Backend(attend, refusal, kernels=name)


def _load_reference() -> Backend:
    from lcv_bsa.reference import reference_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        return reference_attention(q, k, v, selection, scale=scale)

    return Backend(attend)


def _load_flex() -> Backend:
    from lcv_bsa.backends.flex import flex_block_attention, refusal

    return Backend(flex_block_attention, refusal)


# Loaded when first named: an entry may raise ImportError, whose text then is the reason it is unavailable.
_LOADERS: dict[str, Callable[[], Backend]] = {
    **{name: partial(_through_operator, name) for name in ("cpu", *_TRITON)},
    "flex": _load_flex,
    "reference": _load_reference,
}

# What "auto" tries on a type of device, best first. "reference" is left out: its memory is that of dense attention.
_AUTO: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cpu")}
_AUTO_ELSEWHERE: tuple[str, ...] = ("cpu",)


def available_backends(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> list[str]:
    """Names of the backends that take these inputs."""
    return [name for name in _LOADERS if isinstance(_try(name, q, k, v, selection), Backend)]


def resolve(name: str, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Backend:
    """The backend called `name`, or for "auto" the best that takes these inputs.

    Raises ValueError, with the reason and the available names, for a backend that is unknown or refuses.
    """
    if name == "auto":
        return _resolve_auto(q, k, v, selection)
    found = _try(name, q, k, v, selection) if name in _LOADERS else "no backend has this name"
    if isinstance(found, Backend):
        return found
    names = ", ".join(["auto", *available_backends(q, k, v, selection)])
    raise ValueError(f"backend {name!r} is not available here: {found}; available: {names}")


def _resolve_auto(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Backend:
    for name in _AUTO.get(q.device.type, _AUTO_ELSEWHERE):
        found = _try(name, q, k, v, selection)
        if isinstance(found, Backend):
            _log("backend auto: chose %s for q %s %s on %s", name, list(q.shape), q.dtype, q.device)
            return found
        _log("backend auto: passed over %s: %s", name, found)
    raise ValueError(f"backend 'auto' found none that takes q {list(q.shape)} {q.dtype} on {q.device}")


def _log(message: str, *values: object) -> None:
    # a log call would break a compiled graph in two
    if not torch.compiler.is_compiling():
        logger.debug(message, *values)


def _try(name: str, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Backend | str:
    """The backend, or why it cannot be had."""
    try:
        backend = _LOADERS[name]()
    except ImportError as error:
        return str(error)
    return backend.refusal(q, k, v, selection) or backend
