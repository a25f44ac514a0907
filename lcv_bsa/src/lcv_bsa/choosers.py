"""Who chooses the key blocks. As with the attention, a named one is used or refused, "auto" logs what it took."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lcv_bsa.choosing import choose_blocks
from lcv_bsa.layout import BlockLayout

logger = logging.getLogger("lcv_bsa")

NAMES = ("auto", "torch", "triton")


def choose(
    q: Tensor, k: Tensor, layout_q: BlockLayout, layout_k: BlockLayout, *, least: int, cdf_threshold: float | None,
    scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """indices and counts of a selection, see `choosing.choose_blocks`; backend: one of NAMES. Raises ValueError."""
    # Triton is not even imported for tensors that auto would not give it
    reason = "not asked for"
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = _triton_refusal(q, cdf_threshold)
        if reason is None:
            logger.debug("selection: triton for q %s %s on %s", list(q.shape), q.dtype, q.device)
            return _triton()(q, k, layout_q, layout_k, least=least)
        if backend == "triton":
            raise ValueError(f"backend 'triton' cannot select here: {reason}; available: auto, torch")
    logger.debug("selection: torch for q %s %s on %s, triton: %s", list(q.shape), q.dtype, q.device, reason)
    return choose_blocks(q, k, layout_q, layout_k, least=least, cdf_threshold=cdf_threshold, scale=scale)


def _triton_refusal(q: Tensor, cdf_threshold: float | None) -> str | None:
    if cdf_threshold is not None:
        return "it has no cdf_threshold"
    try:
        from lcv_bsa.backends.triton.selecting import refusal
    except ImportError as error:
        return f"it needs Triton ({error}); pip install triton"
    return refusal(q)


def _triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from lcv_bsa.backends.triton.selecting import triton_select

    def run(q: Tensor, k: Tensor, layout_q: BlockLayout, layout_k: BlockLayout, *, least: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            selection = triton_select(q, k, layout_q, layout_k, least=least)
        return selection.indices, selection.counts

    return run
