"""Launching the kernels, and autograd around them."""

import os
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcv_bsa.backends.triton import kernels
from lcv_bsa.backends.triton.tuning import Tile, backward_tiles, forward_tile
from lcv_bsa.selection import BlockSelection

# Triton's launch syntax and its constexpr parameters are beyond a type checker.
KERNELS: Any = kernels

_MIN_DOT = 16  # tl.dot wants at least this many rows, columns and channels


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def refusal(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why these inputs cannot run here, None when they can."""
    if q.dtype == torch.float64:
        return "it has no fp64; convert q, k and v to fp32, or use 'reference'"
    if q.shape[-1] > 256:
        return f"it takes head dims up to 256, got {q.shape[-1]}"
    if interpreted():
        # Triton's interpreter computes bf16 wrongly without saying so.
        return "the interpreter has no bf16; use fp16 or fp32" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"it needs a GPU (or TRITON_INTERPRET=1), the inputs are on {q.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0 or more, got {torch.cuda.get_device_capability(q.device)}"
    return None


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float
) -> tuple[Tensor, Tensor]:
    """o [B, H, Sq, D] in q's dtype, lse fp32 [B, H, Sq]; differentiable once."""
    return _Attention.apply(q, k, v, selection, scale)  # type: ignore[no-any-return]


def _dense_channels(x: Tensor) -> Tensor:
    """The kernels walk any strides but need the channels of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape_arguments(selection: BlockSelection, head_dim: int, tile: Tile) -> dict[str, Any]:
    """What every kernel wants to know about grids, blocks and tiles."""
    names = [f"{axis}{side}" for side in "qk" for axis in "THW"]
    grids = dict(zip(names, selection.grid_q + selection.grid_k))
    blocks = dict(zip([n[0].lower() + n[1] for n in names], selection.block_q + selection.block_k))
    channels = max(_MIN_DOT, triton.next_power_of_2(head_dim))
    return grids | blocks | {
        "D": head_dim, "BLOCK_D": channels, "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _precision(q: Tensor) -> str:
    """fp32 stays fp32: TF32 would break the promised accuracy."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense_channels(x) for x in (q, k, v))
        o, lse = forward(q, k, v, selection, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.selection, ctx.scale = selection, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor, dlse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = backward(q, k, v, o, lse, _dense_channels(do), dlse, ctx.selection, ctx.scale)
        return dq, dk, dv, None, None


def forward(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    B, H, S, D = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    tile = forward_tile(q, selection)
    layout = selection.layout_q
    grid = (layout.num_blocks * triton.cdiv(layout.block_size, tile.m), B * H)
    KERNELS.forward_kernel[grid](
        q, k, v, o, lse, selection.indices.contiguous(), selection.counts.contiguous(), *_strides(q, k, v, o),
        H, H // k.shape[1], layout.num_blocks, selection.indices.shape[-1], scale,
        PARTIAL_K=_partial(selection.layout_k.is_full, selection.layout_k.block_size, tile.n),
        PRECISION=_precision(q), **_shape_arguments(selection, D, tile),
    )  # fmt: skip
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, selection: BlockSelection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the two kernels of the deterministic backward."""
    B, H, _, D = q.shape
    group = H // k.shape[1]
    delta = (o.float() * do.float()).sum(-1) - dlse.float()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    inverse = selection.inverse()
    layout_q, layout_k = selection.layout_q, selection.layout_k
    for_dq, for_dkv = backward_tiles(q, selection)
    KERNELS.dq_kernel[(layout_q.num_blocks * triton.cdiv(layout_q.block_size, for_dq.m), B * H)](
        q, k, v, do, dq, lse, delta, selection.indices.contiguous(), selection.counts.contiguous(),
        *_strides(q, k, v, do, dq), H, group, layout_q.num_blocks, selection.indices.shape[-1], scale,
        PARTIAL_K=_partial(layout_k.is_full, layout_k.block_size, for_dq.n),
        PRECISION=_precision(q), **_shape_arguments(selection, D, for_dq),
    )  # fmt: skip
    KERNELS.dkv_kernel[(layout_k.num_blocks * triton.cdiv(layout_k.block_size, for_dkv.n), B * k.shape[1])](
        q, k, v, do, dk, dv, lse, delta, inverse.offsets, inverse.rows, *_strides(q, k, v, do, dk, dv),
        k.shape[1], group, layout_k.num_blocks, scale,
        PARTIAL_Q=_partial(layout_q.is_full, layout_q.block_size, for_dkv.m),
        PRECISION=_precision(q), **_shape_arguments(selection, D, for_dkv),
    )  # fmt: skip
    return dq, dk, dv


def _partial(is_full: bool, block_size: int, tile: int) -> bool:
    """Whether a tile may have slots without a token."""
    return not is_full or block_size % tile != 0
