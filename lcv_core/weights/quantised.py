"""A transformer whose large weights stay quantised, or are quantised while they are read, tensor by tensor.

Large are the matrices of attention and feed-forward, 95 % of the model. Everything else is sensitive or small, and
stays plain whatever the file has: adaLN, the embedders, the final layer, norms and biases.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import CheckpointError, InputError
from lcv_core.names import Weights, check_name
from lcv_core.quant import layers
from lcv_core.quant.formats import Quantised, kind_for, quantise
from lcv_core.quant.matmul import fp8_refusal, shape_refusal
from lcv_core.weights.assemble import Assembly, check_fit, some

log = logging.getLogger("lcv_core")

Device = torch.device | str
KINDS = {"fp8": "fp8", "int8": "int8", "q8_0": "Q8_0", "q5_k": "Q5_K", "q4_k": "Q4_K"}
_MATMUL = "-matmul"
_LARGE = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|ffn\.w[123])\.weight")


def is_large(name: str) -> bool:
    """Whether a tensor (official name) is one of the matrices that are quantised."""
    return _LARGE.fullmatch(name) is not None


def check_weights(weights: str, tensors: Assembly, what: str) -> None:
    """InputError for an unknown name, and where weights are to stay as stored but are not quantised."""
    check_name("weights", weights, Weights)
    if weights == "stored" and not any(_kinds(tensors)):
        choices = ", ".join(name for name in get_args(Weights) if name in KINDS)
        raise InputError(f"weights=stored keeps what is quantised, but {what} is not; use {choices} to quantise it")


def _kinds(tensors: Assembly) -> Iterable[str | None]:
    return (kind for name in tensors.keys() if is_large(name) for kind in tensors.kinds(name))  # noqa: SIM118


def kinds_wanted(tensors: Assembly, name: str, form: str) -> tuple[str | None, ...]:
    """The kind each piece of a weight has to get for a form of KINDS, or for "stored"; None: plain numbers."""
    if not is_large(name):
        return (None,)
    if form == "stored":
        return tensors.kinds(name)
    return tuple(kind_for(KINDS[form], tensors.shape(name)[1]) for _ in tensors.pieces[name])


def in_kind(tensors: Assembly, name: str, part: int, kind: str, device: Device | None = None) -> Quantised:
    """A piece of a weight: as its file has it where that is `kind` already, else quantised from it."""
    if tensors.kinds(name)[part] == kind:
        return tensors.quantised(name, part, device)
    try:
        return quantise(kind, tensors.read_part(name, part, device))
    except InputError as error:
        raise CheckpointError(f"{name}: {error}") from None


def check_as_stored(weights: str, tensors: Assembly, what: str) -> None:
    """InputError where a form of the large weights would have to be made: that is not done anew for every pass."""
    form = weights.removesuffix(_MATMUL)
    if form == "plain":
        return
    for name in tensors.keys():  # noqa: SIM118
        wanted = kinds_wanted(tensors, name, form)
        if all(wanted) and wanted != tensors.kinds(name):
            raise InputError(
                f"weights={weights} cannot be streamed from disk, because {what} has them in another form; convert it"
                f" once (lcv convert ... --to {form}) and use weights=stored, or stream from ram"
            )


@dataclass
class _Kept:
    """What could not be had as asked for, to be said once."""

    wanted: str
    other: Counter[str] = field(default_factory=Counter)
    plain: list[str] = field(default_factory=list)
    unmultiplied: list[tuple[str, str]] = field(default_factory=list)

    def say(self, matmul: str) -> None:
        for kind, count in self.other.items():
            log.warning("weights=%s: %d of the weights are in %s, as their rows need it", self.wanted, count, kind)
        if self.plain:
            log.warning("weights=%s: %d of the weights stay plain: %s", self.wanted, len(self.plain), some(self.plain))
        if self.unmultiplied:
            name, why = self.unmultiplied[0]
            log.warning(
                "weights=%s: %d weights are not multiplied in %s but in the dtype of the activations; %s: %s",
                self.wanted, len(self.unmultiplied), matmul, name, why,
            )  # fmt: skip


def load_quantised(
    config: DiTConfig, tensors: Assembly, weights: Weights, *, what: str, device: Device = "cpu",
    dtype: torch.dtype | None = None, hold_on: Device | None = None,
) -> LongCatDiT:  # fmt: skip
    """The transformer in eval mode with its large weights quantised; at no time is more than one of them plain.

    weights: "stored" keeps those that are quantised in the file (int8, fp8, GGUF) as they are there. "fp8", "int8",
        "q8_0", "q5_k" and "q4_k" quantise what the file has in another form; rows that a K type's blocks do not divide
        get Q8_0. "int8-matmul" and "fp8-matmul" also multiply in eight bits, with activations quantised token by
        token; fp8 needs a GPU of compute capability 8.9, and where it cannot be had the multiplication is weight-only.
        What differs from what was asked for is said in the log.
    dtype: of everything else, and of the activations; None: as stored, bf16 for quantised files.
    hold_on: where the tensors are in the end, if not on `device`, where they are quantised and will be multiplied;
        "meta" reads none of them, and needs a file that has them in the form that is asked for.
    Raises CheckpointError on any mismatch, InputError as `check_weights`.
    """
    check_weights(weights, tensors, what)
    model = LongCatDiT(config, operations=layers, device="meta", dtype=dtype)
    check_fit(model, tensors, what=what)
    form, matmul = weights.removesuffix(_MATMUL), _matmul(weights, torch.device(device))
    hold_on = device if hold_on is None else hold_on
    made_on = hold_on if torch.device(hold_on).type == "meta" else device
    kept = _Kept(weights)
    names = list(model.state_dict())
    rest: dict[str, Tensor] = {}
    for name in names:
        kinds = kinds_wanted(tensors, name, form)
        if not all(kinds):
            rest[name] = tensors.read(name, hold_on, dtype)
            if is_large(name):
                kept.plain.append(name)
            continue
        parts = [_on(in_kind(tensors, name, i, kind, made_on), hold_on) for i, kind in enumerate(kinds) if kind]
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, layers.Linear)
        _hold(layer, parts, matmul, name, kept)
        kept.other.update({q.kind for q in parts} - {KINDS.get(form, q.kind) for q in parts})
    model.load_state_dict(rest | _held_state(model), strict=True, assign=True)
    kept.say(form)
    return model.eval()


def _on(q: Quantised, device: Device) -> Quantised:
    return replace(q, data=q.data.to(device), scale=None if q.scale is None else q.scale.to(device))


def _held_state(model: LongCatDiT) -> dict[str, Tensor]:
    """What the layers hold already, under its names in the state dict."""
    return {name: value for name, value in model.state_dict().items() if ".pieces." in name}


def _matmul(weights: Weights, device: torch.device) -> layers.Matmul:
    if weights == "int8-matmul":
        return "int8"
    if weights != "fp8-matmul":
        return "weight-only"
    refusal = fp8_refusal(device)
    if refusal is None:
        return "fp8"
    log.warning("fp8 weights are not multiplied in fp8 but in the dtype of the activations: %s", refusal)
    return "weight-only"


def _hold(layer: layers.Linear, parts: list[Quantised], matmul: layers.Matmul, name: str, kept: _Kept) -> None:
    if matmul != "weight-only":
        why = next((why for q in parts if (why := shape_refusal(q, matmul))), None)
        if why is not None:
            kept.unmultiplied.append((name, why))
            matmul = "weight-only"
    layer.hold(parts, matmul)
