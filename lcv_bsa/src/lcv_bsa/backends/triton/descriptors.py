"""TMA descriptors of un-permuted tensors: the copy engine of sm_90 and up fetches a block of a 3-D grid by itself.

A tensor [B, H, S, D] is described as [B * H, T, H, W, D], five dimensions, the most there are. A box (1, t, h, w, D) of
it then is one block of tokens, wherever they lie in memory: nothing is permuted or padded. What lies outside the grid
reads as zeros and is not written, so partial blocks need only the mask of their logits. Channels past D do so too.

Any memory order will do as long as its strides are multiples of 16 bytes: [B, H, S, D], [B, S, H, D] and slices of a
packed [B, S, 3, H, D] need no copy. One descriptor holds the whole batch where B and H merge into one dimension, as in
[B, H, S, D]; `batches` cuts the others into samples.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lcv_bsa.backends.triton.common import capability, interpreted, refusal
from lcv_bsa.layout import Triple
from lcv_bsa.selection import BlockSelection

_ALIGNMENT = 16  # bytes, of the base address and of every stride (cuTensorMapEncodeTiled)
_LONGEST_STRIDE = 1 << 40  # bytes
_MIN_TILE = 16  # tl.dot wants at least this many rows


def tma_refusal(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why no descriptors can be made for these inputs here, None when they can.

    Strides that descriptors cannot have are no reason: `describable` copies such a tensor.
    """
    reason = refusal(q, k, v, selection)
    if reason:
        return reason
    if not interpreted():
        if q.dtype == torch.float32:
            return "it takes fp16 and bf16 (fp32 tiles do not fit its registers); use 'triton_pointer'"
        if torch.version.hip is not None:
            return "it needs TMA descriptors, which AMD GPUs have not; use 'triton_pointer'"
        found = capability(q.device)
        if found < (9, 0):
            return f"it needs TMA descriptors (compute capability 9.0 or more), got {found}; use 'triton_pointer'"
    if q.shape[-1] * q.element_size() % _ALIGNMENT:
        return f"a head must be a multiple of {_ALIGNMENT} bytes, got D = {q.shape[-1]} of {q.dtype}"
    for name, block in (("block_q", selection.block_q), ("block_k", selection.block_k)):
        if any(n & (n - 1) for n in block) or prod(block) < _MIN_TILE:
            return f"{name} must be powers of two with {_MIN_TILE} tokens or more, got {block}"
    return None


def is_describable(x: Tensor) -> bool:
    """Whether descriptors can read x [B, H, S, D] where it lies, sample by sample if need be."""
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3]) if size > 1]
    widths = [stride * x.element_size() for stride in strides]
    longest = x.stride(2) * x.element_size() * x.shape[2]
    return (
        x.stride(3) == 1
        and x.data_ptr() % _ALIGNMENT == 0
        and longest < _LONGEST_STRIDE
        # a stride of 0 is that of an expanded tensor
        and all(0 < n < _LONGEST_STRIDE and n % _ALIGNMENT == 0 for n in widths)
    )


def describable(x: Tensor) -> Tensor:
    """x itself where descriptors can read it as it lies, else a contiguous copy."""
    return x if is_describable(x) else x.clone(memory_format=torch.contiguous_format)


def batches(*tensors: Tensor) -> list[slice]:
    """Slices of the batch that one descriptor per tensor can hold: all of it, or each sample by itself."""
    if all(_merged_stride(x) is not None for x in tensors):
        return [slice(None)]
    return [slice(b, b + 1) for b in range(tensors[0].shape[0])]


def describe(x: Tensor, grid: Triple, box: Triple) -> TensorDescriptor:
    """Descriptor of x [B, H, S, D] as [B * H, T, H, W, D], with boxes of (1, t, h, w, next power of two of D).

    x: describable, and cut into `batches`. grid: (T, H, W) in tokens. box: (t, h, w) in tokens, see `box_of`.
    Raises ValueError where B and H do not merge.
    """
    B, heads, S, D = x.shape
    outer = _merged_stride(x)
    if outer is None:
        raise ValueError(f"x must be cut into batches(x): B and H do not merge with strides {x.stride()}")
    # the stride of a dimension of one may be anything in PyTorch, here it must be aligned
    aligned = triton.next_power_of_2(D)
    token = x.stride(2) if S > 1 else aligned
    outer = outer if B * heads > 1 else aligned
    strides = [outer, grid[1] * grid[2] * token, grid[2] * token, token, 1]
    channels = max(_MIN_TILE, triton.next_power_of_2(D))
    return TensorDescriptor(x, [B * heads, *grid, D], strides, [1, *box, channels])


def box_of(block: Triple, tokens: int) -> Triple:
    """The largest box of at most `tokens` tokens whose copies tile the block in the order of its slots.

    block: powers of two. Cuts t first, then h, then w: tile i of the block then holds slots i * n ... i * n + n - 1.
    """
    box = list(block)
    for axis in range(3):
        while prod(box) > tokens and box[axis] > 1:
            box[axis] //= 2
    return box[0], box[1], box[2]


def _merged_stride(x: Tensor) -> int | None:
    """Stride of B and H as one dimension, None where they do not make one."""
    B, heads = x.shape[:2]
    if B == 1:
        return x.stride(1)
    if heads == 1 or x.stride(0) == heads * x.stride(1):
        return x.stride(0) // heads
    return None


@triton.jit
def box_origin(
    block, tile, H, W, t: tl.constexpr, h: tl.constexpr, w: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Raster coordinates (a, b, c) of the first slot of tile `tile` (of TILE slots) of a block."""
    blocks_h = tl.cdiv(H, h)
    blocks_w = tl.cdiv(W, w)
    slot = tile * TILE
    a = block // (blocks_h * blocks_w) * t + slot // (h * w)
    b = block // blocks_w % blocks_h * h + slot // w % h
    c = block % blocks_w * w + slot % w
    return a, b, c


@triton.jit
def box_inside(a, b, c, T, H, W, h: tl.constexpr, w: tl.constexpr, TILE: tl.constexpr):
    """Which of the TILE slots from (a, b, c) on hold a token. h, w: of the block."""
    slots = tl.arange(0, TILE)
    return (a + slots // (h * w) < T) & (b + slots // w % h < H) & (c + slots % w < W)
