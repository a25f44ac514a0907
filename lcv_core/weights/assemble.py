"""From the names and number formats of a file to the tensors a model of ours loads, still one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcv_core.errors import CheckpointError
from lcv_core.quant.blocks import SIZES
from lcv_core.quant.formats import BY_ROW, Quantised
from lcv_core.weights.keymaps import Rule, Slot, rename
from lcv_core.weights.tensors import TensorSource, TensorStore

# Last parts of names of tensors that come with the weights and are not weights: ComfyUI's fp8 marker and activation
# scales, its embedded tokenizer. (We multiply in the dtype of the activations, so activation scales have no use.)
MARKERS = ("scaled_fp8", "spiece_model", "scale_input")
SCALES = ("weight_scale", "scale_weight")
# Plain numbers, by the names that safetensors and GGUF have for them.
_FLOATS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
SHOWN = 8  # names listed of each kind of mismatch


@dataclass(frozen=True)
class Piece:
    """Rows slot.part/slot.parts of a weight: a tensor of the file, times `scale` (a tensor of the file) if given."""

    slot: Slot
    source: str
    scale: str | None = None


class Assembly:
    """A TensorStore under the model's names: renamed, fused along dim 0 and dequantised as it is read.

    Quantised forms, dequantised in fp32 and then cast: `X.weight_int8` (int8) with `X.weight_scale` (fp32 per row),
    the official int8 files; `X.weight` (fp8) with `X.scale_weight` (one number or one per row), ComfyUI's scaled fp8,
    also where the scale is called `X.weight_scale`. Plain fp8 is cast. All of them read as bf16 unless a dtype is asked
    for.
    """

    def __init__(self, store: TensorStore, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self.store = store
        self.pieces = {name: sorted(parts, key=lambda piece: piece.slot.part) for name, parts in pieces.items()}

    def keys(self) -> Iterable[str]:
        return self.pieces.keys()

    def __contains__(self, name: object) -> bool:
        return name in self.pieces

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self.store.shape(piece.source) for piece in self.pieces[name]]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _stored(self, name: str) -> torch.dtype:
        return self.store.dtype(self.pieces[name][0].source)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives when none is asked for."""
        stored = self._stored(name)
        return stored if stored.itemsize >= 2 else torch.bfloat16

    def read(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype(name)
        parts = [self._read(piece, device, dtype) for piece in self.pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_into(self, name: str, out: Tensor) -> None:
        """`read` into a contiguous tensor on the CPU, in its dtype; plain numbers are read where they belong."""
        row = 0
        for piece in self.pieces[name]:
            shape = self.store.shape(piece.source)
            part = out if len(self.pieces[name]) == 1 else out[row : row + shape[0]]
            row += shape[0] if shape else 0
            if piece.scale is None and isinstance(self.store, TensorSource):
                self.store.read_into(piece.source, part)
            else:
                part.copy_(self._read(piece, None, out.dtype))

    def quantised_into(self, name: str, part: int, which: Literal["data", "scale"], out: Tensor) -> None:
        """`data` or `scale` of what `quantised` gives, into a contiguous tensor on the CPU."""
        piece = self.pieces[name][part]
        assert isinstance(self.store, TensorSource)
        if which == "data":
            self.store.read_bytes(piece.source, out.view(-1).view(torch.uint8))
        elif piece.scale is None:
            out.fill_(1)
        else:
            out.copy_(self.store.read(piece.scale, None, torch.float32).reshape(-1).expand(len(out)))

    def _read(self, piece: Piece, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        if piece.scale is None:
            return self.store.read(piece.source, device, dtype)
        weight = self.store.read(piece.source, device, torch.float32)
        scale = self.store.read(piece.scale, device, torch.float32)
        return (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype)

    def kinds(self, name: str) -> tuple[str | None, ...]:
        """How the pieces of a weight are stored: kinds of `lcv_core.quant.formats`, None for plain numbers and for what
        only the `gguf` package can read."""
        return tuple(self._kind(piece) for piece in self.pieces[name])

    def _kind(self, piece: Piece) -> str | None:
        if len(self.store.shape(piece.source)) != 2:
            return None
        if isinstance(self.store, TensorSource) and (kind := self.store.storage(piece.source)[0]) in SIZES:
            return kind
        stored = self.store.dtype(piece.source)
        return next((kind for kind, dtype in BY_ROW.items() if dtype == stored), None)

    def quantised(self, name: str, part: int, device: torch.device | str | None = None) -> Quantised:
        """Piece `part` of a weight as it is stored; only for a piece that has a kind."""
        piece = self.pieces[name][part]
        kind, (rows, columns) = self._kind(piece), self.store.shape(piece.source)
        assert kind is not None and isinstance(self.store, TensorSource)
        blocks = self.store.blocks(piece.source, device)
        if blocks is not None:
            return Quantised(kind, columns, blocks)
        data = self.store.read(piece.source, device)
        if piece.scale is None:  # plain fp8
            return Quantised(kind, columns, data, torch.ones(rows, device=device))
        scale = self.store.read(piece.scale, device, torch.float32).reshape(-1)
        return Quantised(kind, columns, data, scale.expand(rows).contiguous())

    def read_part(self, name: str, part: int, device: torch.device | str | None = None) -> Tensor:
        """Piece `part` of a weight as plain numbers: in the file's dtype, or in fp32 where they are quantised there."""
        piece = self.pieces[name][part]
        plain = piece.scale is None and self._kind(piece) is None and self.store.dtype(piece.source).itemsize > 1
        stored = self.store.storage(piece.source)[0] if isinstance(self.store, TensorSource) else ""
        exact = _FLOATS.get(stored) if plain else None
        return self._read(piece, device, exact or torch.float32)


def assemble(store: TensorStore, rules: Sequence[Rule] | None, *, prefix: str = "", what: str) -> Assembly:
    """Put the tensors of `store` under the names that `rules` lead to; None keeps the names, less `prefix`.

    Raises CheckpointError listing the names no rule knows, and fused weights of which a part is absent.
    """
    pieces: dict[str, list[Piece]] = {}
    unknown = []
    for name, source, scale in _weights(store):
        bare = name.removeprefix(prefix)
        slot = Slot(bare) if rules is None else rename(bare, rules)
        if slot is None:
            unknown.append(bare)
        else:
            pieces.setdefault(slot.name, []).append(Piece(slot, source, scale))
    if unknown:
        raise CheckpointError(
            f"{what} has {len(unknown)} tensors whose place in the model is not known: {some(unknown)}"
        )
    for name, parts in pieces.items():
        _check_parts(store, name, parts, what)
    return Assembly(store, pieces)


def _weights(store: TensorStore) -> Iterable[tuple[str, str, str | None]]:
    """(name of the weight, tensor that holds it, tensor of its scale or None) of everything that is a weight."""
    names = set(store.keys())
    for source in store.keys():  # noqa: SIM118  (a store is not a mapping)
        module, _, leaf = source.rpartition(".")
        if leaf in MARKERS:
            continue
        if leaf in SCALES and not names.isdisjoint((f"{module}.weight_int8", f"{module}.weight")):
            continue
        if leaf not in ("weight", "weight_int8"):
            yield source, source, None
            continue
        scale = next((f"{module}.{leaf}" for leaf in SCALES if f"{module}.{leaf}" in names), None)
        if leaf == "weight_int8" and scale is None:
            raise CheckpointError(f"{source} is int8 but its {module}.weight_scale is missing; download the file again")
        yield f"{module}.weight", source, scale


def _check_parts(store: TensorStore, name: str, parts: list[Piece], what: str) -> None:
    expected = parts[0].slot.parts
    found = sorted(piece.slot.part for piece in parts)
    shapes = {store.shape(piece.source) for piece in parts}
    if found != list(range(expected)) or len(shapes) > 1:
        have = ", ".join(f"{piece.source} {list(store.shape(piece.source))}" for piece in parts)
        raise CheckpointError(f"{what}: {name} is made of {expected} equal parts, but the file has {have}")


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def load_strictly(
    model: nn.Module,
    tensors: TensorStore,
    *,
    what: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give a model built on the meta device its weights, tensor by tensor: never more than one of them twice in memory.

    Raises CheckpointError listing names that are missing, unexpected or of another shape.
    """
    check_fit(model, tensors, what=what)
    state: dict[str, Any] = {name: tensors.read(name, device, dtype) for name in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)


def check_fit(model: nn.Module, tensors: TensorStore, *, what: str) -> None:
    """CheckpointError listing the names of `tensors` that are missing, unexpected or of another shape in a model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tensors.shape(name) for name in tensors.keys()}  # noqa: SIM118
    problems = [
        _problem("missing", [name for name in expected if name not in given]),
        _problem("unexpected", [name for name in given if name not in expected]),
        _problem(
            "of another shape",
            [
                f"{name} (expected {list(shape)}, got {list(given[name])})"
                for name, shape in expected.items()
                if name in given and given[name] != shape
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(f"{what} does not fit the model: " + "; ".join(filter(None, problems)))


def _problem(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}: {some(names)}" if names else ""
