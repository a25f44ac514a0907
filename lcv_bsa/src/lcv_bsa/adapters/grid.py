"""Where the (T, H, W) grid of a model's tokens comes from. It is never guessed from the number of tokens."""

from collections.abc import Sequence
from math import prod

from lcv_bsa.layout import Triple, as_triple


def grid_from_latent(shape: Sequence[int], patch_size: Sequence[int]) -> Triple:
    """Grid of tokens of a latent [..., F, H, W] cut into patches (f, h, w), each axis rounded up to whole patches.

    Wan's patch is (1, 2, 2): a latent [1, 16, 21, 60, 104] has the grid (21, 30, 52). Raises ValueError.
    """
    if len(shape) < 3:
        raise ValueError(f"shape must end in (F, H, W), got {tuple(shape)}")
    latent = as_triple("shape", tuple(shape)[-3:])
    patch = as_triple("patch_size", tuple(patch_size))
    t, h, w = (-(-n // p) for n, p in zip(latent, patch))
    return t, h, w


def check_tokens(name: str, tokens: int, grid: Triple) -> None:
    """Raises ValueError unless the grid holds as many tokens."""
    if tokens != prod(grid):
        T, H, W = grid
        raise ValueError(
            f"{name} must have {T}*{H}*{W} = {prod(grid)} tokens, got {tokens}; "
            "the grid must be that of this call, and the sequence whole (not a context parallel shard)"
        )
