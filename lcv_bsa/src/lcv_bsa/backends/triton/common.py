"""What all kernels share: slots to addresses inside a kernel; shapes, strides and refusals outside.

Tokens stay in raster order in memory: a block's slots are turned into addresses on the fly, so there is no permutation
and no padding, and partial blocks mask the slots that hold no token.
"""

# pyright: reportGeneralTypeIssues=false

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcv_bsa.backends.triton.tuning import Tile
from lcv_bsa.selection import BlockSelection

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_MOST_BLOCKS = 1 << 20  # `block_origin`
_MIN_DOT = 16  # tl.dot wants at least this many rows, columns and channels


@triton.jit
def block_tokens(block, slots, T, H, W, t: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """Raster token ids (int64) of a block's slots, and which of the slots hold a token."""
    blocks_h = tl.cdiv(H, h)
    blocks_w = tl.cdiv(W, w)
    a = block // (blocks_h * blocks_w) * t + slots // (h * w)
    b = block // blocks_w % blocks_h * h + slots // w % h
    c = block % blocks_w * w + slots % w
    inside = (a < T) & (b < H) & (c < W) & (slots < t * h * w)
    return ((a * H + b) * W + c).to(tl.int64), inside


@triton.jit
def block_origin(block, blocks_hw, blocks_w, t: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """Raster coordinates of a block's first slot, for loops. blocks_hw, blocks_w: blocks in a layer, in a line of it.

    Products with a reciprocal in place of integer divisions, which were a third of a loop turn's instructions. Exact
    below 2 ** 20 blocks: block + 0.5 lies half a block off any edge, and the rounding of the product is less.
    """
    layer = ((block.to(tl.float32) + 0.5) * (1.0 / blocks_hw)).to(tl.int32)
    rest = block - layer * blocks_hw
    line = ((rest.to(tl.float32) + 0.5) * (1.0 / blocks_w)).to(tl.int32)
    return layer * t, line * h, (rest - line * blocks_w) * w


@triton.jit
def slot_tokens(a, b, c, slots, T, H, W, t: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """`block_tokens` of the block whose first slot is (a, b, c)."""
    a += slots // (h * w)
    b += slots // w % h
    c += slots % w
    inside = (a < T) & (b < H) & (c < W) & (slots < t * h * w)
    return ((a * H + b) * W + c).to(tl.int64), inside


@triton.jit
def load_rows(base, tokens, inside, stride, channels, D: tl.constexpr):
    """[rows, BLOCK_D] of a [S, D] matrix; zeros where there is no token or channel."""
    return tl.load(
        base + tokens[:, None] * stride + channels[None, :],
        mask=inside[:, None] & (channels[None, :] < D),
        other=0.0,
    )


@triton.jit
def store_rows(base, tokens, inside, stride, channels, value, D: tl.constexpr):
    tl.store(
        base + tokens[:, None] * stride + channels[None, :],
        value.to(base.dtype.element_ty),
        mask=inside[:, None] & (channels[None, :] < D),
    )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA GPU. torch.compile can trace this way to it, and not get_device_capability."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def refusal(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why these inputs cannot run here, None when they can."""
    if q.dtype == torch.float64:
        return "it has no fp64; convert q, k and v to fp32, or use 'reference'"
    if q.shape[-1] > 256:
        return f"it takes head dims up to 256, got {q.shape[-1]}"
    if max(selection.layout_q.num_blocks, selection.layout_k.num_blocks) > _MOST_BLOCKS:
        blocks = selection.layout_q.num_blocks, selection.layout_k.num_blocks
        return f"it takes up to {_MOST_BLOCKS} query and key blocks, got {blocks}; use larger blocks"
    if interpreted():
        # Triton's interpreter computes bf16 wrongly without saying so.
        return "the interpreter has no bf16; use fp16 or fp32" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"it needs a GPU (or TRITON_INTERPRET=1), the inputs are on {q.device}"
    if torch.version.hip is None and capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0 or more, got {capability(q.device)}"
    return None


def dense_channels(x: Tensor) -> Tensor:
    """The kernels walk any strides but need the channels of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def shape_arguments(selection: BlockSelection, head_dim: int, tile: Tile) -> dict[str, Any]:
    """What every kernel wants to know about grids, blocks and tiles."""
    names = [f"{axis}{side}" for side in "qk" for axis in "THW"]
    grids = dict(zip(names, selection.grid_q + selection.grid_k))
    blocks = dict(zip([n[0].lower() + n[1] for n in names], selection.block_q + selection.block_k))
    channels = max(_MIN_DOT, triton.next_power_of_2(head_dim))
    return grids | blocks | {
        "D": head_dim, "BLOCK_D": channels, "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def precision(q: Tensor) -> str:
    """fp32 stays fp32: TF32 would break the promised accuracy."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def has_empty_slots(is_full: bool, block_size: int, tile: int) -> bool:
    """Whether a tile may have slots without a token."""
    return not is_full or block_size % tile != 0
