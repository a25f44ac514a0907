"""Trainable LoRA (Hu et al. 2021) on a frozen transformer, laid out as in the official adapter files.

A target of n parts (q, k and v of a fused weight) has n low-rank pairs of its own: with z = x down^T in n consecutive
chunks, y = base(x) + scale * concat_k(z_k up_k^T), the numbers that `lcv_core.weights.lora` computes from the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.files import replacing
from lcv_core.training.checkpoints import like, whole
from lcv_core.weights.assemble import some
from lcv_core.weights.lora_keys import OFFICIAL_RANK, OFFICIAL_SCALE, official_names
from lcv_core.weights.lora_read import Delta, read_lora
from lcv_core.weights.tensors import StateDict, TensorSource

# Of a model: what learns, its running average, a copy that stays as it was.
BranchName = Literal["trained", "average", "fixed"]


class LowRank(nn.Module):
    """The n low-rank pairs of one layer: down [n * rank, in], up [out, rank] whose rows are those of the parts.

    trained: fp32 parameters with gradients; average: buffers, which a checkpoint of the run keeps; fixed: parameters
    without gradients, which it does not keep.
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, parts: int, scale: float, name: BranchName) -> None:
        super().__init__()
        self.parts, self.scale = parts, scale
        for key, value in (("down", down), ("up", up)):
            if name == "average":
                self.register_buffer(key, value)
            else:
                self.register_parameter(key, nn.Parameter(value, requires_grad=name == "trained"))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output, in the dtype of its input."""
        z = F.linear(x, self.down.to(x.dtype))
        up = (self.up * self.scale).to(x.dtype)
        pieces = [F.linear(*pair) for pair in zip(z.chunk(self.parts, dim=-1), up.chunk(self.parts), strict=True)]
        return pieces[0] if self.parts == 1 else torch.cat(pieces, dim=-1)


class Switch:
    """Which branch the layers of one model add; None: none."""

    branch: BranchName | None = "trained"


class AdaptedLinear(nn.Module):
    """A layer of the frozen model, of any kind that computes in the dtype of its input, with its branches."""

    def __init__(self, base: Any, branch: LowRank, switch: Switch) -> None:
        super().__init__()
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)
        self.base = base
        self.branches = nn.ModuleDict({"trained": branch})
        self._switch = switch

    @property
    def trained(self) -> LowRank:
        branch = self.branches["trained"]
        assert isinstance(branch, LowRank)
        return branch

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        branch = self._switch.branch
        return out if branch is None else out + self.branches[branch](x).to(out.dtype)


class AdaptedDiT(LongCatDiT):
    """A transformer whose target layers have low-rank branches; these alone learn.

    dit: taken over as it is, in any dtype: its layers are this model's, frozen. targets: parts by module name
        (`official_targets`). rank: of each part. scale: alpha / rank. dtype: of the branches; fp32 but for tests.
    generator: draws down; up starts at 0, so that nothing changes yet.
    The state dict holds what learns and its average, not the frozen model.
    """

    def __init__(
        self,
        dit: LongCatDiT,
        targets: Mapping[str, int],
        *,
        generator: torch.Generator,
        rank: int = OFFICIAL_RANK,
        scale: float = OFFICIAL_SCALE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dit.config, device="meta")
        for name, child in dit.named_children():
            setattr(self, name, child)
        self._attention, self.compute_dtype = dit._attention, dit.compute_dtype
        self.requires_grad_(False)
        self._switch = Switch()
        self.adapted: dict[str, int] = dict(targets)
        for target, parts in targets.items():
            base: Any = self.get_submodule(target)
            if base.out_features % parts:
                raise InputError(f"{target} has {base.out_features} rows, which do not make {parts} equal parts")
            bound = math.sqrt(3 / base.in_features)  # unit variance comes out of a unit variance input
            down = (torch.rand(parts * rank, base.in_features, generator=generator, dtype=dtype) * 2 - 1) * bound
            up = torch.zeros(base.out_features, rank, dtype=dtype)
            branch = LowRank(down.to(dit.device), up.to(dit.device), parts, scale, "trained")
            self.set_submodule(target, AdaptedLinear(base, branch, self._switch))
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    @property
    def rank(self) -> int:
        return next(self._layers())[1].trained.up.shape[1]

    def _layers(self) -> Iterator[tuple[str, AdaptedLinear]]:
        for target in self.adapted:
            layer = self.get_submodule(target)
            assert isinstance(layer, AdaptedLinear)
            yield target, layer

    @property
    def kept(self) -> frozenset[str]:
        """The branches that there are beside the trained one."""
        return frozenset(next(self._layers())[1].branches) - {"trained"}

    @contextmanager
    def using(self, branch: BranchName | None) -> Iterator[None]:
        """Inside the block the model computes with another branch, or with none."""
        before, self._switch.branch = self._switch.branch, branch
        try:
            yield
        finally:
            self._switch.branch = before

    @torch.no_grad()
    def keep(self, branch: Literal["average", "fixed"], dtype: torch.dtype | None = None) -> None:
        """Add a copy of what is trained as it is now: as its running average, or to stay."""
        for _, layer in self._layers():
            now = layer.trained
            down, up = (value.detach().to(dtype or value.dtype, copy=True) for value in (now.down, now.up))
            layer.branches[branch] = LowRank(down, up, now.parts, now.scale, branch)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * trained. Collective where the parameters are sharded."""
        for _, layer in self._layers():
            average = layer.branches["average"]
            assert isinstance(average, LowRank)
            for old, new in ((average.down, layer.trained.down), (average.up, layer.trained.up)):
                full = getattr(new, "full_tensor", None)  # DTensor
                old.lerp_((full() if full is not None else new).to(old), 1 - decay)

    @torch.no_grad()
    def load(self, adapter: str | Path | Mapping[str, Tensor]) -> None:
        """Start from an adapter, in any dialect whose pairs are those of the official files.

        Its scale is taken over. InputError when its rank or its targets are not this model's.
        """
        if isinstance(adapter, Mapping):
            name, store = "the adapter", StateDict(dict(adapter))
        else:
            name, store = Path(adapter).name, TensorSource.open(adapter)
        deltas, report = read_lora(self, store, name)
        strange = [*report.unmatched, *(target for target in deltas if target not in self.adapted)]
        missing = [target for target in self.adapted if target not in deltas]
        if strange or missing:
            what = f"lacks {some(missing)}" if missing else f"also changes {some(strange)}"
            raise InputError(f"{name} {what}; training starts from an adapter of the same targets, or from none")
        for target, layer in self._layers():
            down, up, scale = _stack(deltas[target], layer, target, name)
            if up.shape != layer.trained.up.shape:
                raise InputError(f"{name} has rank {up.shape[1]}, the recipe {self.rank}; set rank to {up.shape[1]}")
            layer.trained.scale = scale
            for old, new in ((layer.trained.down, down), (layer.trained.up, up)):
                old.copy_(like(new.to(old.dtype), old))

    def adapter_state(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What is trained as the tensors of an official file, on the CPU; dtype: None as it is. Collective."""
        state: dict[str, Tensor] = {}
        for target, layer in self._layers():
            branch = layer.trained
            down_name, up_names, scale_name = official_names(target, branch.parts)
            down, up = (whole(value).to(dtype or value.dtype) for value in (branch.down, branch.up))
            state[down_name] = down
            state |= {name: part.clone() for name, part in zip(up_names, up.chunk(branch.parts), strict=True)}
            state[scale_name] = torch.tensor(branch.scale, dtype=down.dtype)
        return state

    def export(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write `adapter_state` as a safetensors file, whole or not at all; returns its path."""
        from safetensors.torch import save

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save(self.adapter_state(dtype), metadata={"format": "pt"})
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        return path


def _stack(deltas: list[Delta], layer: AdaptedLinear, target: str, name: str) -> tuple[Tensor, Tensor, float]:
    """The deltas of a layer's parts as (down, up, scale)."""
    parts = layer.trained.parts
    rows = layer.out_features // parts
    deltas = sorted(deltas, key=lambda delta: delta.row)
    downs = [delta.down for delta in deltas if delta.down is not None]
    ups = [delta.up for delta in deltas if delta.up is not None]
    if (
        [(delta.row, delta.rows) for delta in deltas] != [(k * rows, rows) for k in range(parts)]
        or not len(downs) == len(ups) == parts
        or len({up.shape for up in ups}) > 1
        or len({delta.scale for delta in deltas}) > 1
        or any(delta.bias is not None for delta in deltas)
    ):
        raise InputError(f"{name} does not have {target} as {parts} pairs of one rank and scale; start from none")
    return torch.cat(downs), torch.cat(ups), deltas[0].scale


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(module):
        state.pop(f"{prefix}{name}", None)


def _expect_no_frozen(module: nn.Module, keys: Any) -> None:
    frozen = _frozen(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]
