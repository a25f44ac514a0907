"""Block sparse attention over several processes: ring attention and Ulysses on a `torch.distributed` DeviceMesh.

Every rank holds one slab of the token grid, whole blocks along one axis (`Shard`). Results and gradients are those of
one process. Every rank of the mesh must make the same calls in the same order, with gradients required of the same
tensors: a rank that raises an error leaves the others waiting for it until the process group's timeout.
"""

from lcv_bsa.distributed.ring import ring_attention
from lcv_bsa.distributed.selecting import select_blocks_sharded
from lcv_bsa.distributed.shard import Shard, gather, scatter
from lcv_bsa.distributed.ulysses import ulysses_attention

__all__ = ["Shard", "gather", "ring_attention", "scatter", "select_blocks_sharded", "ulysses_attention"]
