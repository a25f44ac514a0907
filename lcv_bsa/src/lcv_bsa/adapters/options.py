"""What a model's sparse attention keeps, in one value that every adapter takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lcv_bsa.api import bsa_3d, select_blocks
from lcv_bsa.layout import Triple, as_triple


@dataclass(frozen=True)
class SparseOptions:
    """block: (t, h, w) tokens. keep, top_k, cdf_threshold, backend: see `lcv_bsa.bsa_3d`; of several the larger count
    wins, so give keep=None to let another decide. min_tokens: calls with fewer tokens stay dense.

    Raises ValueError for a value out of its range.
    """

    block: Sequence[int] = (4, 4, 4)
    keep: float | None = 0.0625
    top_k: int | None = None
    cdf_threshold: float | None = None
    backend: str = "auto"
    min_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", as_triple("block", self.block))
        if type(self.min_tokens) is not int or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be an int >= 0, got {self.min_tokens!r}")
        # a selection among one token's one block: a wrong value is told here, not in the middle of a sampling run
        token = torch.zeros(1, 1, 1, 1)
        top_k = 1 if type(self.top_k) is int and self.top_k > 1 else self.top_k
        select_blocks(token, token, (1, 1, 1), (1, 1, 1), top_k=top_k, keep=self.keep, cdf_threshold=self.cdf_threshold)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Triple,
        *,
        layout: Literal["bhsd", "bshd"],
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Self attention of a video's tokens: o in the layout of q, lse [B, H, S]. scale: None for D ** -0.5."""
        o, lse = bsa_3d(
            q,
            k,
            v,
            grid,
            block_q=self.block,
            keep=self.keep,
            top_k=self.top_k,
            cdf_threshold=self.cdf_threshold,
            scale=scale,
            backend=self.backend,
            layout=layout,
            return_lse=True,
        )
        return o, lse
