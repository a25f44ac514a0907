"""Block sparse attention over 3-D grids of tokens: select key blocks, attend to them alone."""

from lcv_bsa.api import block_sparse_attention, bsa_3d, select_blocks
from lcv_bsa.backends import available_backends
from lcv_bsa.layout import BlockLayout
from lcv_bsa.reference import reference_attention
from lcv_bsa.selection import BlockSelection, InverseSelection

__all__ = [
    "BlockLayout",
    "BlockSelection",
    "InverseSelection",
    "available_backends",
    "block_sparse_attention",
    "bsa_3d",
    "reference_attention",
    "select_blocks",
]
