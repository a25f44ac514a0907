"""The checks on what comes in, made before anything is sent."""

from torch import Tensor

from lcv_bsa.backends import available_backends, resolve
from lcv_bsa.checks import check_pair
from lcv_bsa.distributed.shard import Shard
from lcv_bsa.layout import BlockLayout
from lcv_bsa.selection import BlockSelection


def check_slabs(q: Tensor, k: Tensor, v: Tensor, local_q: BlockLayout, local_k: BlockLayout) -> None:
    """Raises ValueError unless q, k, v are one rank's slabs, of shapes, dtypes and devices that fit each other."""
    check_pair(q, k, local_q, local_k)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v must be as k, {list(k.shape)} {k.dtype} {k.device}, got {list(v.shape)} {v.dtype} {v.device}"
        )


def check_selection(selection: BlockSelection, q: Tensor, layout_q: BlockLayout, shard_k: Shard) -> None:
    """Raises ValueError unless the selection is for q, for the queries of `layout_q`, and for the whole key grid."""
    for name, found, layout in (("q", selection.layout_q, layout_q), ("k", selection.layout_k, shard_k.layout)):
        if found != layout:
            raise ValueError(
                f"selection must have grid_{name} {layout.grid} in blocks of {layout.block}, "
                f"got {found.grid} in blocks of {found.block}"
            )
    if selection.indices.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"selection must be for B, H = {list(q.shape[:2])} as q, got {list(selection.indices.shape[:2])}"
        )
    if selection.indices.device != q.device:
        raise ValueError(f"selection must be on {q.device} as q, got {selection.indices.device}")


def kernels_for(backend: str, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str:
    """The set of kernels behind a backend, which a ring calls once per step. Raises ValueError where it has none."""
    kernels = resolve(backend, q, k, v, selection).kernels
    if kernels is None:
        names = available_backends(q, k, v, selection)
        usable = [name for name in names if resolve(name, q, k, v, selection).kernels]
        raise ValueError(f"backend of a ring must be one of auto, {', '.join(usable)}, got {backend!r}")
    return kernels
