"""Who takes part: this library's backends, dense attention, and other people's block sparse kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import QUANTISED
from shapes import Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcv_bsa import BlockSelection, available_backends, block_sparse_attention, select_blocks
from lcv_bsa.layout import from_blocks, to_blocks, token_counts


class Absent(Exception):
    """Someone who can't take part; the text is the reason."""


@dataclass(frozen=True)
class Problem:
    """keep: share of the key blocks that each query block keeps, in (0, 1]."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    keep: float

    def select(self, q: Tensor, k: Tensor) -> BlockSelection:
        return select_blocks(q, k, self.shape.grid, self.shape.grid, self.shape.block, keep=self.keep)


@dataclass(frozen=True)
class Contender:
    """One implementation, cut where its parts can be timed apart.

    pack: a tensor [B, H, S, D] into its own memory order, unpack: back; None where it reads tokens as they lie.
    select: from packed q and k, what it keeps, in its own form; None for dense attention.
    attend: packed q, k, v and what it keeps -> packed o, and lse [B, H, S] where it tells.
    convert: a BlockSelection into its own form. own: a backend of this library.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor | None]]
    select: Callable[[Tensor, Tensor], Any] | None = None
    convert: Callable[[BlockSelection], Any] = lambda selection: selection
    pack: Callable[[Tensor], Tensor] | None = None
    unpack: Callable[[Tensor], Tensor] | None = None
    own: bool = False

    def packed(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors) if self.pack is None else [self.pack(x) for x in tensors]

    def unpacked(self, o: Tensor) -> Tensor:
        return o if self.unpack is None else self.unpack(o)


def contender(name: str, problem: Problem, paths: Mapping[str, str]) -> Contender:
    """`name` made ready for `problem`. paths: where the user says a peer is. Raises Absent."""
    if name in paths:
        _add_path(paths[name])
    return PEERS[name](problem) if name in PEERS else _backend(name, problem)


def refusal(name: str, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Why a backend of this library does not take these inputs; None for one that does, and for peers."""
    if name in PEERS or name in available_backends(q, k, v, selection):
        return None
    try:
        block_sparse_attention(q, k, v, selection, backend=name)
    except ValueError as error:
        return str(error).removeprefix(f"backend {name!r} is not available here: ").split("; available")[0]
    return None


def trains(name: str, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> bool:
    """Whether it takes inputs that need gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return name not in QUANTISED and refusal(name, q, k, v, selection) is None


def _add_path(path: str) -> None:
    if not Path(path).exists():
        raise Absent(f"no such path: {path}")
    if path not in sys.path:
        sys.path.append(path)


def _import(module: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a compiled peer may fail in any way when its libraries do not fit
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Absent(f"{hint} ({reason})") from error


def _backend(name: str, problem: Problem) -> Contender:
    tells_lse = name != "flex" or problem.device.type != "cpu"

    def attend(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> tuple[Tensor, Tensor | None]:
        if not tells_lse:
            return block_sparse_attention(q, k, v, selection, backend=name), None
        return block_sparse_attention(q, k, v, selection, backend=name, return_lse=True)

    return Contender(name, attend, problem.select, own=True)


def _dense(name: str, backend: SDPBackend | None) -> Callable[[Problem], Contender]:
    def build(problem: Problem) -> Contender:
        if backend == SDPBackend.CUDNN_ATTENTION and problem.device.type != "cuda":
            raise Absent("cuDNN needs an NVIDIA GPU")

        def attend(q: Tensor, k: Tensor, v: Tensor, _: None) -> tuple[Tensor, None]:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v), None
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v), None

        return Contender(name, attend)

    return build


def _fa3(problem: Problem) -> Contender:
    """FlashAttention-3 (Shah et al., arXiv 2407.08608). It reads [B, S, H, D], so transposed views suffice."""
    _needs_gpu(problem)
    module = _import("flash_attn_interface", "needs flash_attn_interface; --peer fa3=FOLDER")

    def attend(q: Tensor, k: Tensor, v: Tensor, _: None) -> tuple[Tensor, None]:
        o = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2), None

    return Contender("fa3", attend)


def _vsa(problem: Problem) -> Contender:
    """Video Sparse Attention (arXiv 2505.13389), `fastvideo_kernel`: 64 token blocks, ThunderKittens on sm_90."""
    _needs_gpu(problem)
    layout = problem.shape.layout
    if layout.block_size != 64:
        raise Absent(f"its blocks have 64 tokens, not {layout.block_size}")
    module = _import("fastvideo_kernel", "needs fastvideo_kernel; --peer vsa=FOLDER")
    by_index = getattr(module, "block_sparse_attn_from_indices", None)
    sizes = token_counts(layout, problem.device)
    kept = max(1, int(problem.keep * layout.num_blocks + 1e-6))

    def select(q: Tensor, k: Tensor) -> Tensor:
        means = ((x.unflatten(2, (-1, 64)).float().sum(3) / sizes[:, None]).to(x.dtype) for x in (q, k))
        scores = torch.matmul(next(means), next(means).mT)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(kept, -1).indices, True)

    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Any) -> tuple[Tensor, None]:
        if by_index is None or isinstance(kept, Tensor):
            return module.block_sparse_attn(q, k, v, kept, sizes)[0], None
        return by_index(q, k, v, *kept, sizes)[0], None

    return Contender(
        "vsa", attend, select,
        convert=(lambda s: s.to_mask()) if by_index is None else lambda s: (s.indices, s.counts),
        pack=lambda x: to_blocks(x, layout).flatten(2, 3), unpack=lambda o: _from_flat(o, problem.shape),
    )  # fmt: skip


def _official(problem: Problem) -> Contender:
    """The kernels of the LongCat-Video repository: `longcat_video/block_sparse_attention` of a checkout."""
    _needs_gpu(problem)
    layout, n = problem.shape.layout, problem.shape.layout.block_size
    if not layout.is_full:
        raise Absent(f"its grids must divide by the block, {layout.grid} does not by {layout.block}")
    bsa = _import("longcat_video.block_sparse_attention.bsa_interface", "needs a checkout; --peer official=FOLDER")
    scale, sparsity = problem.shape.head_dim**-0.5, 1 - problem.keep

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
            o, lse = bsa.attn_fwd_bsa_varlen_triton(q, k, v, scale, indices, counts, n, n, sparsity)
            ctx.save_for_backward(q, k, v, o, lse, indices, counts)
            return o

        @staticmethod
        def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            q, k, v, o, lse, indices, counts = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in (q, k, v)]
            bsa.attn_bwd_bsa_varlen_triton(do, q, k, v, o, *grads, scale, lse, indices, counts, n, n, sparsity)
            return *grads, None, None

    def select(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        means = [bsa.mean_pooling_compression(x, n) for x in (q, k)]
        return bsa.get_select_indices(*means, sparsity, None)

    return Contender(
        "official", lambda q, k, v, kept: (Attention.apply(q, k, v, *kept), None), select,
        convert=lambda s: (s.indices.long(), s.counts),
        pack=lambda x: to_blocks(x, layout).flatten(2, 3), unpack=lambda o: _from_flat(o, problem.shape),
    )  # fmt: skip


def _needs_gpu(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Absent("needs a GPU")


def _from_flat(o: Tensor, shape: Shape) -> Tensor:
    return from_blocks(o.unflatten(2, (shape.layout.num_blocks, shape.layout.block_size)), shape.layout)


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "dense": _dense("dense", None),
    "dense_cudnn": _dense("dense_cudnn", SDPBackend.CUDNN_ATTENTION),
    "dense_flash": _dense("dense_flash", SDPBackend.FLASH_ATTENTION),
    "fa3": _fa3,
    "official": _official,
    "vsa": _vsa,
}
