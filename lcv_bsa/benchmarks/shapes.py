"""The shapes of real models, and small ones for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcv_bsa import BlockLayout, BlockSelection
from lcv_bsa.layout import Triple, token_counts

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Self-attention of one layer: a (T, H, W) grid of tokens, batch 1."""

    name: str
    grid: Triple
    heads: int
    head_dim: int
    what: str
    block: Triple = (4, 4, 4)

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.grid, self.block)


_ALL: tuple[Shape, ...] = (
    Shape("480p", (24, 30, 52), 32, 128, "LongCat-Video, 93 frames of 480x832; blocks are partial"),
    Shape("720p_spatial", (24, 44, 80), 32, 128, "LongCat-Video, spatial refinement"),
    Shape("720p", (48, 44, 80), 32, 128, "LongCat-Video, refinement to 720p"),
    Shape("cp", (48, 48, 80), 32, 128, "LongCat-Video, refinement on two GPUs or more"),
    Shape("wan_480p", (21, 30, 52), 40, 128, "Wan 14B, 81 frames of 480x832; blocks are partial"),
    Shape("wan_720p", (21, 45, 80), 40, 128, "Wan 14B, 81 frames of 720x1280; blocks are partial"),
    Shape("hunyuan_720p", (33, 45, 80), 24, 128, "HunyuanVideo, 129 frames of 720x1280; blocks are partial"),
    Shape("ltx", (16, 22, 38), 32, 64, "LTX-Video, 121 frames of 704x1216; blocks are partial"),
    Shape("cpu_1k", (4, 16, 16), 4, 64, "for a CPU"),
    Shape("cpu_2k", (8, 16, 16), 4, 64, "for a CPU"),
    Shape("cpu_4k", (4, 32, 32), 4, 64, "for a CPU"),
    Shape("cpu_8k", (8, 32, 32), 4, 64, "for a CPU"),
    Shape("cpu_16k", (16, 32, 32), 4, 64, "for a CPU"),
    Shape("cpu_32k", (32, 32, 32), 4, 64, "for a CPU"),
    Shape("tiny", (8, 8, 8), 1, 32, "shows that it runs, under Triton's interpreter too"),
    Shape("tiny_partial", (6, 7, 9), 1, 32, "the same with partial blocks"),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}


def dense_pairs(shape: Shape) -> int:
    """(query token, key token) pairs of dense attention, all heads."""
    return shape.heads * shape.layout.num_tokens**2


def kept_pairs(selection: BlockSelection) -> int:
    """(query token, key token) pairs that the selection keeps, all heads; empty slots of partial blocks are none."""
    device = selection.indices.device
    keys = token_counts(selection.layout_k, device).long()[selection.indices.long()]  # [B, H, Nq, K]
    live = torch.arange(keys.shape[-1], device=device) < selection.counts[..., None]
    queries: Tensor = token_counts(selection.layout_q, device).long()
    return int(((keys * live).sum(-1) * queries).sum())


def flops(pairs: int, head_dim: int, part: str) -> float | None:
    """Useful multiplications and additions of a part: 4 D per pair forward (q k^T, p v), 10 D backward (five products).

    None for the parts that are not attention. Selection, layout and softmax count as nothing.
    """
    per_pair = {"forward": 4, "backward": 10, "forward+backward": 14, "total": 4, "total+backward": 14}
    return pairs * head_dim * per_pair[part] if part in per_pair else None
