"""Bytes that block sparse attention takes inside itself, while blocks are chosen and while they are attended to.

Two kinds of kernels are counted: "gather" is `lcv_bsa` in plain PyTorch (choosing.py, backends/gather.py), which works
everywhere; "triton" is what GPUs run (backends/triton: selecting.py, forward.py, forward_tma.py), which needs no copy
of q, k and v and no logits. By cumulative probability blocks are chosen in plain PyTorch with either.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

from lcv_bsa.choosing import kept_blocks
from lcv_bsa.layout import BlockLayout

from lcv_core.config import BSAConfig

Device = Literal["cpu", "gpu"]
SparseKernels = Literal["gather", "triton"]
Grid = tuple[int, int, int]  # tokens: (time, height, width)

_FP32 = _INT32 = 4  # bytes
_INT64 = 8
# As in lcv_bsa: scores of block pairs that live at once; logits of a chunk of query blocks.
_SCORES_AT_ONCE = 1 << 24
_LOGITS_AT_ONCE = {"cpu": 1 << 19, "gpu": 1 << 26}
_TRITON_SCORES_AT_ONCE = 1 << 23
_HEADS_AT_ONCE = 8  # that attention in eight bits packs
# Of each query block, where rows differ in length: their counts in fp32, mantissas, exponents, ids in int64 and int32.
_ORDER_BYTES = 4 + 4 + 4 + 3 * 8 + 4


def sparse_kernels(device: Device) -> SparseKernels:
    """What block sparse attention runs on here: Triton's kernels on a GPU, where Triton is installed."""
    return "triton" if device == "gpu" and importlib.util.find_spec("triton") is not None else "gather"


def sparse_bytes(
    bsa: BSAConfig, grid_q: Grid, grid_k: Grid, *, heads: int, head_dim: int, itemsize: int, device: Device = "gpu",
    kernels: SparseKernels = "gather",
) -> int:  # fmt: skip
    """Most bytes alive at once besides q, k and v, with what the attention gives counted.

    heads: of all samples together. itemsize: bytes of the dtype of q, k and v.
    """
    queries, keys = BlockLayout(grid_q, bsa.block_q), BlockLayout(grid_k, bsa.block_k)
    kept = _most_kept(bsa, keys)
    chosen = heads * queries.num_blocks * (kept + 1) * _INT32  # indices and counts
    result = heads * queries.num_tokens * head_dim * itemsize
    by_cdf = bsa.cdf_threshold is not None
    if kernels == "triton":
        statistics = heads * queries.num_tokens * _FP32 + (heads * queries.num_blocks * _ORDER_BYTES if by_cdf else 0)
        choosing = _triton_choosing_bytes(queries, keys, heads, head_dim)
        if by_cdf:
            choosing = _choosing_bytes(queries, keys, kept, heads, head_dim, itemsize, by_cdf=True)
        packed = _packed_bytes(queries, keys, heads, head_dim) if bsa.eight_bits else 0
        return max(choosing + (0 if by_cdf else chosen), chosen + result + statistics + packed)
    attending = _gather_bytes(queries, keys, kept, heads, head_dim, itemsize, device, by_cdf=by_cdf)
    choosing = _choosing_bytes(queries, keys, kept, heads, head_dim, itemsize, by_cdf=by_cdf)
    return max(choosing, chosen + result + attending)


def _packed_bytes(queries: BlockLayout, keys: BlockLayout, heads: int, head_dim: int) -> int:
    """What attention in eight bits makes of some heads: q, k and v a byte each, and what each row of q lost."""
    some = min(heads, _HEADS_AT_ONCE)
    return some * (queries.num_tokens * (head_dim + _FP32) + 2 * _slots(keys) * head_dim)


def place_bytes(bsa: BSAConfig, grid_q: Grid, grid_k: Grid, *, heads: int) -> int:
    """For "gather": where each token of q, k, v and their statistics lies; made by the first call and kept."""
    queries, keys = BlockLayout(grid_q, bsa.block_q), BlockLayout(grid_k, bsa.block_k)
    return heads * (2 * _slots(queries) + 3 * _slots(keys)) * _INT64


def _triton_choosing_bytes(queries: BlockLayout, keys: BlockLayout, heads: int, head_dim: int) -> int:
    """Block means of q and k, and one slice of the scores: whole heads, or rows of one."""
    means = heads * (queries.num_blocks + keys.num_blocks) * head_dim * _FP32
    rows, Nk = queries.num_blocks, keys.num_blocks
    many = max(1, min(heads, _TRITON_SCORES_AT_ONCE // (rows * Nk)))
    step = rows if many > 1 else max(1, min(rows, _TRITON_SCORES_AT_ONCE // Nk))
    return means + many * step * Nk * _FP32


def _slots(layout: BlockLayout) -> int:
    """Tokens, the empty places of partial blocks counted."""
    return layout.num_blocks * layout.block_size


def _most_kept(bsa: BSAConfig, keys: BlockLayout) -> int:
    """Key blocks that a query block may keep; by cumulative probability it may be all."""
    if bsa.cdf_threshold is not None or bsa.sparsity is None:
        return keys.num_blocks
    return max(1, kept_blocks(1.0 - bsa.sparsity, keys.num_blocks))


def _choosing_bytes(
    queries: BlockLayout, keys: BlockLayout, kept: int, heads: int, head_dim: int, itemsize: int, *, by_cdf: bool
) -> int:
    """Block means of q and of k (k's twice), the scores of a slice of the pairs and what ranks them, the lists."""
    means = heads * (queries.num_blocks + 2 * keys.num_blocks) * head_dim * _FP32

    def summing(layout: BlockLayout) -> int:
        """Sums over the blocks' frames, then over their rows; tokens padded to whole blocks before that."""
        slots, (t, h, _) = _slots(layout) * heads * head_dim, layout.block
        padded = 0 if layout.is_full else slots * itemsize
        return slots * _FP32 // t + max(padded, slots * _FP32 // (t * h))

    row = heads * keys.num_blocks  # one query block of each head
    at_once = min(queries.num_blocks, max(1, _SCORES_AT_ONCE // row)) * row
    # Score, smallest kept, masks, running counts; or the places of what is kept, in four int64 each.
    per_score = 29.0 if by_cdf else max(12.0, 5 + 36 * kept / keys.num_blocks)
    per_score += 5 if at_once < row * queries.num_blocks else 0  # score and mask of the slice before
    lists = heads * queries.num_blocks * kept * _INT32
    ranking = max(math.ceil(at_once * per_score) + lists, 3 * lists)
    return means + max(summing(queries), summing(keys), ranking)


def _gather_bytes(
    queries: BlockLayout, keys: BlockLayout, kept: int, heads: int, head_dim: int, itemsize: int, device: Device, *,
    by_cdf: bool,
) -> int:  # fmt: skip
    """k and v in fp32, statistics of each query, and one chunk of query blocks; where chunks grow, the one before."""
    half = itemsize < _FP32
    row = heads * head_dim
    fp32 = 2 * keys.num_tokens * row * _FP32 if half else 0
    statistics = heads * (4 * _slots(queries) + 2 * _slots(keys)) * _FP32
    seen = kept * keys.block_size  # keys of a query block
    chunk = min(heads * queries.num_blocks, max(1, _LOGITS_AT_ONCE[device] // (queries.block_size * seen)))
    in_fp32 = queries.block_size * (seen + 2 * head_dim) + seen * head_dim  # logits, queries, result; keys or values
    copies = (2 if half else 0) + (0 if queries.is_full else 1)  # queries and result in their own dtype, real tokens
    own = copies * queries.block_size * head_dim * itemsize
    ids = (2 * kept + seen + 2 * queries.block_size) * _INT64 + 12 * seen  # and which keys are hidden
    return fp32 + statistics + chunk * (in_fp32 * _FP32 + own + ids) * (2 if by_cdf else 1)
