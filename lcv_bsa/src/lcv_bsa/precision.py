"""Which precision the statistics have, whatever the inputs or the caller's autocast say."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of block means, scores, logits and lse: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turns autocast off: under it an fp32 product would silently become a bf16 one."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def true_fp32(device: torch.device) -> Iterator[None]:
    """TF32 off for products: with its 10 bits of mantissa scores would tie as bf16's do."""
    matmul = torch.backends.cuda.matmul
    name, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    if device.type != "cuda" or before in ("ieee", "none", False):
        yield
        return
    setattr(matmul, name, off)
    try:
        yield
    finally:
        setattr(matmul, name, before)
