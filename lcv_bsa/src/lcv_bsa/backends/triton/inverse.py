"""The selection seen from the key blocks (CSR) without sorting its pairs."""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from lcv_bsa.selection import BlockSelection, InverseSelection

_IDS_AT_ONCE = 1024
_QUERIES_AT_ONCE = 1024
_MOST_PAIRS = 2**31 - 1  # offsets are int32


@triton.jit
def mark_kernel(indices, counts, marks, num_q, num_k, words, width, BLOCK: tl.constexpr):
    """One program: sets the bit of one query block in the marks of each key block that it keeps.

    marks: int32 [B * H, Nk, words], bit q % 32 of word q // 32.
    """
    query, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = bh * num_q + query
    count = tl.load(counts + row)
    indices += row * width
    marks += bh * num_k * words + query // 32
    bit = tl.full([BLOCK], 1, tl.int32) << (query % 32)
    for first in range(0, count, BLOCK):
        places = first + tl.arange(0, BLOCK)
        key = tl.load(indices + places, mask=places < count, other=0).to(tl.int64)
        tl.atomic_or(marks + key * words, bit, mask=places < count, sem="relaxed")


@triton.jit
def marked(marks, queries, words):
    """0 or 1 for each query block."""
    word = tl.load(marks + queries // 32, mask=queries < words * 32, other=0)
    return (word >> (queries % 32)) & 1


@triton.jit
def count_kernel(marks, totals, words, BLOCK: tl.constexpr):
    """One program: how many query blocks keep one key block."""
    row = tl.program_id(0).to(tl.int64)
    marks += row * words
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, words * 32, BLOCK):
        total += marked(marks, first + tl.arange(0, BLOCK), words)
    tl.store(totals + row, tl.sum(total, 0))


@triton.jit
def fill_kernel(marks, starts, rows, words, BLOCK: tl.constexpr):
    """One program: the query blocks that keep one key block, ascending."""
    row = tl.program_id(0).to(tl.int64)
    marks += row * words
    rows += tl.load(starts + row)
    done = 0
    for first in range(0, words * 32, BLOCK):
        queries = first + tl.arange(0, BLOCK)
        bits = marked(marks, queries, words)
        tl.store(rows + done + tl.cumsum(bits, 0) - 1, queries, mask=bits > 0)
        done += tl.sum(bits, 0)


def inverse_selection(selection: BlockSelection) -> InverseSelection:
    """As `BlockSelection.inverse`, the same at every call, without waiting for the GPU.

    Where counts differ, rows has room for B * H * Nq * K pairs: what lies past the last offset is undefined. Works
    through one bit per pair of blocks, 28 MB at 32 heads of 2640 x 2640. Raises ValueError past 2**31 - 1 pairs.
    """
    B, H, Nq, K = selection.indices.shape
    Nk, device = selection.layout_k.num_blocks, selection.indices.device
    _check_pairs(selection)
    words = triton.cdiv(Nq, 32)
    marks = torch.zeros(B * H, Nk, words, dtype=torch.int32, device=device)
    ids = min(_IDS_AT_ONCE, triton.next_power_of_2(K))
    mark_kernel[(Nq, B * H)](
        selection.indices.contiguous(), selection.counts.contiguous(), marks, Nq, Nk, words, K, ids, num_warps=1
    )
    block = min(_QUERIES_AT_ONCE, triton.next_power_of_2(words * 32))
    totals = torch.empty(B * H * Nk, dtype=torch.int32, device=device)
    count_kernel[(B * H * Nk,)](marks, totals, words, block, num_warps=2)
    ends = totals.cumsum(0, dtype=torch.int32)
    starts = ends - totals
    rows = torch.empty(B * H * Nq * K, dtype=torch.int32, device=device)
    fill_kernel[(B * H * Nk,)](marks, starts, rows, words, block, num_warps=2)
    offsets = torch.cat([starts.view(B, H, Nk), ends.view(B, H, Nk)[..., -1:]], -1)
    return InverseSelection(offsets, rows)


def _check_pairs(selection: BlockSelection) -> None:
    """Reads the counts, which waits for the GPU, only where the sizes alone leave it open."""
    pairs = selection.indices.numel()
    if pairs > _MOST_PAIRS and not selection.uniform:
        pairs = int(selection.counts.sum(dtype=torch.int64))
    if pairs > _MOST_PAIRS:
        raise ValueError(f"the inverse takes up to {_MOST_PAIRS} kept pairs, got {pairs}; use fewer heads at a time")
