"""A transformer whose blocks do not stay on its device: loaded so that they never have to fit there, nor in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.names import Streaming, Weights, check_name
from lcv_core.offload.lanes import check_device, lanes_of
from lcv_core.offload.turns import BlocksInTurn, blocks_within
from lcv_core.weights.assemble import Assembly
from lcv_core.weights.quantised import check_as_stored

log = logging.getLogger("lcv_core")

Device = torch.device | str
_BLOCKS = "blocks."


@dataclass(frozen=True)
class Streamed:
    """How blocks come to the device.

    place: "ram" keeps all of them in system memory (pinned, for a GPU); with a model on the CPU that is where they are
        anyway, and nothing changes. "disk" reads each from the checkpoint's files when its turn nears. slots: blocks
        on the device at a time. resident: bytes of the device for leading blocks that stay there.
    """

    place: Streaming
    slots: int = 2
    resident: int = 0

    def __post_init__(self) -> None:
        check_name("streaming", self.place, Streaming)
        if self.slots < 1:
            raise InputError(
                f"streaming needs at least 1 slot, got {self.slots}; 2 let copies run beside the computing"
            )
        if self.resident < 0:
            raise InputError(f"resident must be 0 bytes or more, got {self.resident}")


Load = Callable[..., LongCatDiT]


def check_streaming(place: Streaming, weights: Weights, tensors: Assembly, device: Device, what: str) -> None:
    """InputError where a model cannot be streamed like this; reads no weights."""
    check_name("streaming", place, Streaming)
    if place == "off":
        return
    check_device(torch.device(device))
    if place == "disk":
        check_as_stored(weights, tensors, what)


def load_streamed(
    load: Load, tensors: Assembly, how: Streamed, weights: Weights, what: str, device: Device,
    dtype: torch.dtype | None, operations: Any = None,
) -> LongCatDiT:  # fmt: skip
    """The transformer in eval mode, its blocks in turn on `device`, everything else there for good.

    load(device, dtype, operations, weights, hold_on) loads all of it to `hold_on`. Numbers are those of a model that is
    there as a whole. Adapters stay on the device and are not streamed; they cannot be merged.
    """
    where = torch.device(device)
    check_streaming(how.place, weights, tensors, where, what)
    lanes = lanes_of(where)
    if how.place == "off" or (how.place == "ram" and lanes.is_host):
        log.info("streaming=%s changes nothing on %s", how.place, where)
        return load(where, dtype, operations, weights)
    source = None
    if how.place == "disk":
        model = load(where, dtype, operations, weights, "meta")
        names = [name for name in model.state_dict() if not name.startswith(_BLOCKS)]
        rest = {name: tensors.read(name, where, dtype) for name in names}
        model.load_state_dict(rest, strict=False, assign=True)
        source = BlockFiles(tensors)
    else:
        model = load(where, dtype, operations, weights, "cpu")
        for name, part in model.named_children():
            if name != "blocks":
                part.to(where)
    model.requires_grad_(False)
    resident = blocks_within(list(model.blocks), how.resident)
    place: Literal["ram", "disk"] = "disk" if how.place == "disk" else "ram"
    model.set_streaming(BlocksInTurn(list(model.blocks), lanes, place, source, slots=how.slots, resident=resident))
    return model


class BlockFiles:
    """Reads what a block holds from the checkpoint's files: an `offload.Source`."""

    def __init__(self, tensors: Assembly) -> None:
        self.tensors = tensors

    def read(self, block: int, name: str, out: Tensor) -> None:
        layer, _, piece = f"{_BLOCKS}{block}.{name}".partition(".pieces.")
        if not piece:
            self.tensors.read_into(layer, out)
            return
        number, _, which = piece.partition(".")
        name, row = f"{layer}.weight", 0
        for part in _merged(self.tensors.kinds(name))[int(number)]:
            rows = self.tensors.store.shape(self.tensors.pieces[name][part].source)[0]
            self.tensors.quantised_into(name, part, "data" if which == "data" else "scale", out[row : row + rows])
            row += rows


def _merged(kinds: tuple[str | None, ...]) -> list[list[int]]:
    """Which parts of a weight make up each piece, as `quant.formats.merge` puts them together."""
    merged: list[list[int]] = []
    for part, kind in enumerate(kinds):
        if merged and kinds[merged[-1][0]] == kind:
            merged[-1].append(part)
        else:
            merged.append([part])
    return merged
