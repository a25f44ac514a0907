"""The sets of kernels that the operators of `lcv_bsa.ops` call by name. `lcv_bsa.backends` fills the register."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lcv_bsa.selection import BlockSelection


@dataclass(frozen=True)
class Kernels:
    """One implementation of both operators.

    forward(q, k, v, selection, scale) -> o [B, H, Sq, D], lse [B, H, Sq].
    backward(q, k, v, o, lse, do, dlse, selection, scale) -> dq, dk, dv.
    refusal(q, k, v, selection) -> why they cannot take these inputs, None where they can.

    o and the gradients should lie in memory as `torch.empty_like` of q, k and v does, or are copied to lie so. A row
    that keeps no key block, which only `lcv_bsa.distributed` makes, gives o = 0 and lse = -inf.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    refusal: Callable[[Tensor, Tensor, Tensor, BlockSelection], str | None]


_loaders: dict[str, Callable[[], Kernels]] = {}


def register_kernels(name: str, loader: Callable[[], Kernels]) -> None:
    """loader: run at each call, so that what it imports is imported when first wanted; may raise ImportError."""
    _loaders[name] = loader


def load_kernels(name: str) -> Kernels:
    """The set of this name. Raises ImportError with the reason where it cannot be had, KeyError for unknown names."""
    return _loaders[name]()
