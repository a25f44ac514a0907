"""Which precision the statistics have, whatever the inputs or the caller's autocast say."""

from contextlib import AbstractContextManager, nullcontext

import torch


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of block means, scores, logits and lse: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turns autocast off: under it an fp32 product would silently become a bf16 one."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
