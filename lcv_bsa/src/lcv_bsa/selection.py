"""Which key blocks each query block attends to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcv_bsa.layout import BlockLayout, Triple, as_triple


@dataclass(frozen=True)
class InverseSelection:
    """Which query blocks attend to each key block, in CSR form.

    offsets: int32 [B, H, Nk + 1]. rows: int32 [number of kept pairs]. The query blocks that keep key block j of head
    (b, h) are rows[offsets[b, h, j] : offsets[b, h, j + 1]], ascending. What lies past the last offset is undefined.
    """

    offsets: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The key blocks that each query block keeps.

    indices: int32 [B, H, Nq, K], ascending in each row. Entries past a row's count repeat its last valid id, so that
        every entry may be loaded without a bounds check.
    counts: int32 [B, H, Nq], 1 <= counts <= K.
    grid_q, grid_k: (T, H, W) in tokens. block_q, block_k: (t, h, w) in tokens.
    uniform: True promises that every count is K; False promises nothing.

    The constructor checks shapes and dtypes and trusts values; selections from outside come in by `from_indices` or
    `from_mask`. Raises ValueError.
    """

    indices: Tensor
    counts: Tensor
    grid_q: Triple
    grid_k: Triple
    block_q: Triple
    block_k: Triple
    uniform: bool = False

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return  # K may have no value yet
        for name in ("grid_q", "grid_k", "block_q", "block_k"):
            object.__setattr__(self, name, as_triple(name, getattr(self, name)))
        shape = tuple(self.indices.shape)
        if len(shape) != 4 or shape[2] != self.layout_q.num_blocks:
            raise ValueError(f"indices must be [B, H, Nq, K] with Nq = {self.layout_q.num_blocks}, got {list(shape)}")
        if not 1 <= shape[3] <= self.layout_k.num_blocks:
            raise ValueError(f"K must be 1..{self.layout_k.num_blocks} (the key blocks), got {shape[3]}")
        if tuple(self.counts.shape) != shape[:3]:
            raise ValueError(f"counts must be [B, H, Nq] = {list(shape[:3])}, got {list(self.counts.shape)}")
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise ValueError(f"indices and counts must be int32, got {self.indices.dtype} and {self.counts.dtype}")
        if self.indices.device != self.counts.device:
            raise ValueError(f"counts must be on {self.indices.device} as indices are, got {self.counts.device}")

    @property
    def layout_q(self) -> BlockLayout:
        """Layout of the query tokens."""
        return BlockLayout(self.grid_q, self.block_q)

    @property
    def layout_k(self) -> BlockLayout:
        """Layout of the key tokens."""
        return BlockLayout(self.grid_k, self.block_k)

    @property
    def density(self) -> float:
        """Kept share of all (query block, key block) pairs, in (0, 1]."""
        return self.counts.sum(dtype=torch.int64).item() / (self.counts.numel() * self.layout_k.num_blocks)

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        counts: Tensor | None = None,
        *,
        grid_q: Sequence[int],
        grid_k: Sequence[int],
        block_q: Sequence[int] = (4, 4, 4),
        block_k: Sequence[int] | None = None,
    ) -> "BlockSelection":
        """A selection made elsewhere, checked.

        indices: integers [B, H, Nq, K]; in each row the first `counts` entries ascend strictly within 0..Nk-1, the
        others may hold anything. counts: integers [B, H, Nq] within 1..K, None for K everywhere. block_k: None for
        block_q. Raises ValueError on anything else.
        """
        if indices.ndim != 4 or indices.dtype.is_floating_point or indices.dtype == torch.bool:
            raise ValueError(f"indices must be integers [B, H, Nq, K], got {indices.dtype} {list(indices.shape)}")
        if counts is None:
            counts = torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32, device=indices.device)
        if counts.dtype.is_floating_point or counts.dtype == torch.bool:
            raise ValueError(f"counts must be integers, got {counts.dtype}")
        grids = as_triple("grid_q", grid_q), as_triple("grid_k", grid_k)
        blocks = as_triple("block_q", block_q), as_triple("block_k", block_q if block_k is None else block_k)
        # the shapes are checked on the int32 copies; the values on what was given, since int64 may not fit int32
        made = cls(indices.to(torch.int32), counts.to(torch.int32), *grids, *blocks)
        _check_values(indices, counts, made.layout_k.num_blocks)
        last = made.indices.gather(-1, made.counts[..., None].long() - 1)
        padded = torch.where(_live(made), made.indices, last)
        return replace(made, indices=padded, uniform=bool((counts == indices.shape[3]).all()))

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        grid_q: Sequence[int],
        grid_k: Sequence[int],
        block_q: Sequence[int] = (4, 4, 4),
        block_k: Sequence[int] | None = None,
    ) -> "BlockSelection":
        """From a block mask, bool [B, H, Nq, Nk], True where a pair is kept. block_k: None for block_q.

        Raises ValueError when the shape does not fit the grids, or a query block keeps nothing.
        """
        grids = as_triple("grid_q", grid_q), as_triple("grid_k", grid_k)
        blocks = as_triple("block_q", block_q), as_triple("block_k", block_q if block_k is None else block_k)
        expected = [BlockLayout(grid, block).num_blocks for grid, block in zip(grids, blocks)]
        if mask.ndim != 4 or mask.dtype != torch.bool or list(mask.shape[2:]) != expected:
            raise ValueError(
                f"mask must be bool [B, H, {expected[0]}, {expected[1]}], got {mask.dtype} {list(mask.shape)}"
            )
        counts = mask.sum(-1, dtype=torch.int32)
        if (counts == 0).any():
            raise ValueError("mask must keep at least one key block per query block, got a row with none")
        width = int(counts.max())
        return cls(mask_to_indices(mask, width), counts, *grids, *blocks, uniform=bool((counts == width).all()))

    def to_mask(self) -> Tensor:
        """Block mask, bool [B, H, Nq, Nk]: the inverse of `from_mask`."""
        mask = self.indices.new_zeros((*self.counts.shape, self.layout_k.num_blocks), dtype=torch.bool)
        # the padding repeats a valid id: writing True there twice changes nothing
        return mask.scatter_(-1, self.indices.long(), True)

    def inverse(self) -> InverseSelection:
        """The same pairs seen from the key blocks, as a backward needs them. Computed at each call."""
        B, H, Nq, _ = self.indices.shape
        Nk = self.layout_k.num_blocks
        heads = torch.arange(B * H, device=self.indices.device).view(B, H, 1, 1)
        queries = torch.arange(Nq, dtype=torch.int32, device=self.indices.device).view(1, 1, Nq, 1)
        live = _live(self)
        keys = (self.indices + heads * Nk)[live]
        # pairs are met in ascending order of query block, and a stable sort keeps them so within each key block
        rows = queries.expand_as(self.indices)[live][keys.argsort(stable=True)]
        ends = torch.bincount(keys, minlength=B * H * Nk).cumsum(0).view(B, H, Nk)
        starts = torch.cat([ends.new_zeros(1), ends[..., -1].flatten()[:-1]]).view(B, H, 1)
        return InverseSelection(torch.cat([starts, ends], -1).to(torch.int32), rows)

    def to(self, device: torch.device | str) -> "BlockSelection":
        """The same selection on another device."""
        return replace(self, indices=self.indices.to(device), counts=self.counts.to(device))


def mask_to_indices(mask: Tensor, width: int) -> Tensor:
    """Ascending ids of the True entries, int32 [..., width], padded with the last of them."""
    num_blocks = mask.shape[-1]
    # distinct keys that fall as ids rise: their topk is an ascending list without a host sync or a tie
    keys = torch.arange(num_blocks, 0, -1, dtype=torch.int32, device=mask.device)
    ids = num_blocks - torch.where(mask, keys, 0).topk(width, -1).values
    last = torch.where(ids < num_blocks, ids, -1).amax(-1, keepdim=True)
    return torch.where(ids < num_blocks, ids, last)


def _live(selection: BlockSelection) -> Tensor:
    """True at entries within the count, bool [B, H, Nq, K]."""
    places = torch.arange(selection.indices.shape[-1], device=selection.indices.device)
    return places < selection.counts[..., None]


def _check_values(indices: Tensor, counts: Tensor, num_blocks: int) -> None:
    K = indices.shape[-1]
    low, high = (int(n) for n in counts.aminmax())
    if low < 1 or high > K:
        raise ValueError(f"counts must be 1..{K} (K), got {low}..{high}")
    live = torch.arange(K, device=indices.device) < counts[..., None]
    low, high = (int(n) for n in indices[live].aminmax())
    if low < 0 or high >= num_blocks:
        raise ValueError(f"indices must be 0..{num_blocks - 1} (the key blocks), got {low}..{high}")
    if ((indices.diff(dim=-1) <= 0) & live[..., 1:]).any():
        raise ValueError("indices must ascend strictly in each row, got an unsorted or repeated id within counts")
