"""Who computes the attention. A backend is chosen by name; a named one never falls back to another."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lcv_bsa.selection import BlockSelection

logger = logging.getLogger("lcv_bsa")


class Attend(Protocol):
    """o [B, H, Sq, D] in q's dtype and lse [B, H, Sq] in fp32 (fp64 for fp64), from checked inputs."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float
    ) -> tuple[Tensor, Tensor]: ...


Refusal = Callable[[Tensor, Tensor, Tensor, BlockSelection], str | None]


def _takes_all(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation, and why it refuses an input (None where it takes it)."""

    attend: Attend
    refusal: Refusal = _takes_all


def _load_cpu() -> Backend:
    from lcv_bsa.backends.gather import gather_attention

    return Backend(gather_attention)


def _load_reference() -> Backend:
    from lcv_bsa.reference import reference_attention

    return Backend(reference_attention)


def _load_triton() -> Backend:
    try:
        from lcv_bsa.backends.triton import refusal, triton_attention
    except ImportError as error:
        raise ImportError(f"it needs Triton ({error}); pip install triton") from error
    return Backend(triton_attention, refusal)


# Loaded when first named: an entry may raise ImportError, whose text then is the reason it is unavailable.
_LOADERS: dict[str, Callable[[], Backend]] = {
    "cpu": _load_cpu,
    "triton": _load_triton,
    "reference": _load_reference,
}

# What "auto" tries, best first. "reference" is left out: its memory is that of dense attention. "triton" is left out
# until it was measured on a GPU.
_AUTO: tuple[str, ...] = ("cpu",)


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
    for name in _AUTO:
        found = _try(name, q, k, v, selection)
        if isinstance(found, Backend):
            logger.debug("backend auto: chose %s for q %s %s on %s", name, list(q.shape), q.dtype, q.device)
            return found
        logger.debug("backend auto: passed over %s: %s", name, found)
    raise ValueError(f"backend 'auto' found none that takes q {list(q.shape)} {q.dtype} on {q.device}")


def _try(name: str, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Backend | str:
    """The backend, or why it cannot be had."""
    try:
        backend = _LOADERS[name]()
    except ImportError as error:
        return str(error)
    return backend.refusal(q, k, v, selection) or backend
