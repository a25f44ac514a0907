"""Layers whose weight stays quantised, in ComfyUI's own system: it moves and streams them by their few bytes.

The weight of such a layer is a uint8 parameter [rows, bytes of a row]: the row's numbers in eight bits and its scale
behind them, or the row's GGUF blocks. LoRAs are not merged into it: a small change of a number that lies on the grid
of its kind would be rounded away. They are applied to what the weight is dequantised to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core.quant.formats import BY_ROW, Quantised, dequantise, kind_for, quantise, stack
from lcv_core.quant.matmul import weight_only_matmul
from lcv_core.weights.assemble import Assembly, check_fit
from lcv_core.weights.quantised import in_kind, is_large, kinds_wanted
from lcv_core.weights.tensors import TensorStore

log = logging.getLogger("lcv_core")

# weight_dtype of the loader: the name that `lcv_core.weights.quantised` has for it.
FORMS = {"fp8_scaled": "fp8", "int8": "int8", "q8_0": "q8_0", "q5_k": "q5_k", "q4_k": "q4_k"}
STORED = "stored"  # as the file has them
_ANY_ROW = "Q8_0"  # for a weight of parts in several kinds
_SCALE = 4  # bytes


def pack(q: Quantised) -> Tensor:
    """uint8 [rows, bytes of a row], scales included."""
    data = q.data.view(torch.uint8)
    if q.scale is None:
        return data.clone()  # not a view of the file
    return torch.cat([data, q.scale.float().view(-1, 1).view(torch.uint8)], dim=1)


def unpack(packed: Tensor, kind: str, columns: int) -> Quantised:
    """What `pack` was given."""
    if kind not in BY_ROW:
        return Quantised(kind, columns, packed)
    scale = packed[:, columns : columns + _SCALE].contiguous().view(torch.float32)
    return Quantised(kind, columns, packed[:, :columns].view(BY_ROW[kind]), scale[:, 0])


class Linear(comfy.ops.manual_cast.Linear):
    """ComfyUI's layer that casts, until `hold` is called.

    kind: of the quantised weight; None for a plain one. weight_patches: ComfyUI's patches of it, in the order in
    which they apply, by who put them there.
    """

    kind: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_patches: dict[str, tuple[str, list[Any]]] = {}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Linear._load_from_state_dict(self, *args, **kwargs)  # ComfyUI's own knows plain weights

    def hold(self, q: Quantised) -> None:
        self.kind, self.weight = q.kind, nn.Parameter(pack(q), requires_grad=False)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """What ComfyUI asks for where it merges models: the weight in numbers."""
        if self.kind is None:
            return weight
        return dequantise(unpack(weight.to(torch.uint8), self.kind, self.in_features))

    def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
        if self.kind is None:
            return super().forward_comfy_cast_weights(input)
        functions, self.weight_function = self.weight_function, []  # they are for numbers
        try:
            packed, bias, held = _bring(self, input)
        finally:
            self.weight_function = functions
        try:
            q = unpack(packed, self.kind, self.in_features)
            patched = self._patched(q, functions)
            return _multiply(input, q, bias) if patched is None else F.linear(input, patched.to(input.dtype), bias)
        finally:
            _put_back(self, packed, bias, held)

    def _patched(self, q: Quantised, functions: list[Any]) -> Tensor | None:
        """The weight in fp32 with ComfyUI's patches; None where there are none.

        ComfyUI may have handed in the same patches twice, as merged and for a layer that comes when it is needed.
        """
        wanted = dict(self.weight_patches)
        for function in functions:
            if isinstance(function, comfy.model_patcher.LowVramPatch):
                wanted[_MERGED] = (function.key, function.patches[function.key])
        others = [f for f in functions if not isinstance(f, comfy.model_patcher.LowVramPatch)]
        if not wanted and not others:
            return None
        weight = dequantise(q)
        for key, patches in wanted.values():
            weight = comfy.lora.calculate_weight(patches, weight, key)
        for function in others:
            weight = function(weight)
        return weight


class Operations(comfy.ops.manual_cast):
    """ComfyUI's layers that cast, with a Linear that may hold a quantised weight."""

    Linear = Linear


_MERGED, _HOOKED = "merged", "hooked"


class Patcher(comfy.model_patcher.ModelPatcher):
    """Puts patches of quantised weights beside them where ComfyUI would change the weights.

    Not the patcher that streams weights as one block of numbers ("dynamic VRAM"), which would patch the bytes.
    """

    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        layer = _quantised(self.model, key)
        if layer is None or key not in self.patches:
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        layer.weight_patches[_MERGED] = (key, self.patches[key])
        return None

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict[str, Any], key: str, *args: Any, **kwargs: Any
    ) -> None:
        layer = _quantised(self.model, key)
        if layer is None or key not in combined_patches:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)
        else:
            layer.weight_patches[_HOOKED] = (key, combined_patches[key])

    def unpatch_hooks(self, *args: Any, **kwargs: Any) -> None:
        _forget(self.model, _HOOKED)
        super().unpatch_hooks(*args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            _forget(self.model, _MERGED)
        super().unpatch_model(device_to, unpatch_weights)


def layers_of(model: nn.Module) -> Iterator[Linear]:
    """The layers that hold a quantised weight."""
    return (m for m in model.modules() if isinstance(m, Linear) and m.kind is not None)


def form_for(weight_dtype: str, tensors: Assembly) -> str | None:
    """The form that a transformer's large weights are kept in for a weight_dtype of the loader; None: plain numbers.

    "default" leaves them as they are where the file has them with scales or in blocks. Plain fp8 is ComfyUI's own.
    """
    if weight_dtype != "default":
        return FORMS.get(weight_dtype)
    stored = (kind for name in tensors.keys() if is_large(name) for kind in tensors.kinds(name))  # noqa: SIM118
    scaled = any(piece.scale for name in tensors.keys() for piece in tensors.pieces[name])  # noqa: SIM118
    return STORED if any(kind is not None and (scaled or kind not in BY_ROW) for kind in stored) else None


def load(network: nn.Module, tensors: Assembly, plain: TensorStore, form: str, *, what: str) -> None:
    """Give a transformer of `Operations` its weights, the large ones in a form of `FORMS`, or as they are stored.

    plain: how the others are read. Raises CheckpointError as `load_strictly`.
    """
    check_fit(network, tensors, what=what)
    state: dict[str, Tensor] = {}
    for name in network.state_dict():
        q = read_quantised(tensors, name, form)
        if q is None:
            state[name] = plain.read(name, "cpu")
            continue
        layer = network.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear)
        layer.hold(q)
        state[name] = layer.weight.data
    network.load_state_dict(state, strict=True, assign=True)


def read_quantised(tensors: Assembly, name: str, form: str) -> Quantised | None:
    """A weight (official name) in one kind; None where it stays plain: a small one, or one that the file has plain."""
    kinds = kinds_wanted(tensors, name, form)
    if None in kinds:
        return None
    parts = [in_kind(tensors, name, i, kind) for i, kind in enumerate(kinds) if kind]
    if len(set(kinds)) == 1:
        return stack(parts)
    kind = kind_for(_ANY_ROW, parts[0].columns) or "int8"
    log.warning("%s is stored in several forms (%s) and kept in %s", name, ", ".join(map(str, kinds)), kind)
    return quantise(kind, torch.cat([dequantise(part) for part in parts]))


def _quantised(model: nn.Module, key: str) -> Linear | None:
    """The layer whose quantised weight a key names."""
    name, _, leaf = key.rpartition(".")
    layer = model.get_submodule(name) if leaf == "weight" else None
    return layer if isinstance(layer, Linear) and layer.kind is not None else None


def _forget(model: nn.Module, who: str) -> None:
    for layer in layers_of(model):
        layer.weight_patches.pop(who, None)


def _bring(layer: Linear, input: Tensor) -> tuple[Tensor, Tensor | None, Any]:
    """The packed weight and the bias where the input is, and what to give back after use."""
    options: dict[str, Any] = {"dtype": torch.uint8, "device": input.device, "bias_dtype": input.dtype}
    if not hasattr(comfy.ops, "uncast_bias_weight"):  # 0.3.64
        return *comfy.ops.cast_bias_weight(layer, **options), None
    return comfy.ops.cast_bias_weight(layer, **options, offloadable=True)


def _put_back(layer: Linear, packed: Tensor, bias: Tensor | None, held: Any) -> None:
    if hasattr(comfy.ops, "uncast_bias_weight"):
        comfy.ops.uncast_bias_weight(layer, packed, bias, held)


def _multiply(x: Tensor, q: Quantised, bias: Tensor | None) -> Tensor:
    """x W^T + b in the dtype of x; never the whole of W is there in it."""
    out = weight_only_matmul(x.reshape(-1, q.columns), [q])
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], q.rows)
