"""All tensors of a block in one flat buffer, and a block that is given its tensors and has them taken away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Bytes. What the allocators give; with less, a CPU's matmul may add in another order and differ in the last bit.
ALIGNMENT = 256


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a buffer: from byte `start` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Layout:
    """The tensors of a block in a buffer of `nbytes` bytes. Blocks may differ: GGUF files mix their types."""

    places: tuple[Place, ...]
    nbytes: int

    @classmethod
    def of(cls, block: nn.Module) -> Layout:
        """Of a block's parameters and buffers; those on the meta device do as well."""
        places, end = [], 0
        for name, tensor in _tensors(block):
            places.append(Place(name, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(places), end)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a buffer, uint8 of at least `nbytes`."""
        return {place.name: _view(buffer, place) for place in self.places}


def _view(buffer: Tensor, place: Place) -> Tensor:
    count = 1
    for n in place.shape:
        count *= n
    raw = buffer[place.start : place.start + count * place.dtype.itemsize]
    return raw.view(place.dtype).view(place.shape)


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)


class Sockets:
    """The places in a block's modules where its tensors go. While they are away, meta tensors stand there: shapes and
    dtypes can be asked for, and a use out of turn fails instead of reading another block's weights."""

    def __init__(self, block: nn.Module) -> None:
        self.layout = Layout.of(block)
        self._places: list[tuple[str, str, dict[str, Any], bool]] = []
        for place in self.layout.places:
            owner, _, leaf = place.name.rpartition(".")
            module = block.get_submodule(owner)
            is_parameter = leaf in module._parameters
            owners: dict[str, Any] = module._parameters if is_parameter else module._buffers
            self._places.append((place.name, leaf, owners, is_parameter))
        self._away = {p.name: torch.empty(p.shape, dtype=p.dtype, device="meta") for p in self.layout.places}

    def tensors(self) -> dict[str, Tensor]:
        """What is there now."""
        return {name: owner[leaf] for name, leaf, owner, _ in self._places}

    def give(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in place; they need no gradient."""
        for name, leaf, owner, is_parameter in self._places:
            tensor = tensors[name]
            owner[leaf] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    def take_away(self) -> None:
        self.give(self._away)
