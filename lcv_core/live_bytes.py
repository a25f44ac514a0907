"""How many bytes of tensors are alive at once while something runs, counted storage by storage."""

from __future__ import annotations

import weakref
from typing import Any, Self

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes() as live`, `live.peak` is the most bytes that were alive at once of the storages that
    operators made in there. What was there before is not counted; what an operator needs inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in before and id(storage) not in self._known:
                self._add(storage)
        return out

    def _add(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> list[UntypedStorage]:
    """Of tensors, and those that are given themselves, as `Tensor.set_` is."""
    leaves = tree_leaves(tree)
    own = [leaf for leaf in leaves if isinstance(leaf, UntypedStorage)]
    return own + [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
