"""The oracle: block sparse attention in plain dense PyTorch. Memory is B*H*Sq*Skv; for tests and small inputs."""

import torch
from torch import Tensor

from lcv_bsa.layout import token_blocks
from lcv_bsa.precision import statistics_dtype
from lcv_bsa.selection import BlockSelection


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention. q [B, H, Sq, D]; k, v [B, Hkv, Skv, D] -> o [B, H, Sq, D] as q, lse [B, H, Sq].

    scale: None for D ** -0.5. All arithmetic is fp32, fp64 for fp64; lse is the natural log. Inputs are not checked.
    """
    dtype = statistics_dtype(q.dtype)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).to(dtype) for x in (k, v))
    logits = q.to(dtype) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~token_mask(selection), -torch.inf)
    lse = logits.logsumexp(-1)
    o = (logits - lse[..., None]).exp() @ v
    return o.to(q.dtype), lse


def token_mask(selection: BlockSelection) -> Tensor:
    """Which key tokens each query token may see, bool [B, H, Sq, Skv], both in raster order."""
    device = selection.indices.device
    rows = selection.to_mask().index_select(2, token_blocks(selection.layout_q, device))
    return rows.index_select(3, token_blocks(selection.layout_k, device))
