"""diffusers' Wan, Wan VACE, LTX-Video and HunyuanVideo transformers, made sparse in one call.

handle = make_sparse(pipe.transformer, keep=0.0625)
video = pipe(...).frames
handle.remove()
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lcv_bsa.adapters.options import SparseOptions
from lcv_bsa.adapters.processors import (
    ModelCall,
    Processor,
    SparseAttnProcessor,
    SparseHunyuanVideoAttnProcessor,
    SparseLTXAttnProcessor,
    SparseWanAttnProcessor,
)
from lcv_bsa.layout import Triple, as_triple

__all__ = [
    "SparseHandle",
    "SparseHunyuanVideoAttnProcessor",
    "SparseLTXAttnProcessor",
    "SparseOptions",
    "SparseWanAttnProcessor",
    "make_sparse",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class SparseHandle:
    """Undoes `make_sparse`, by `remove()` or at the end of a `with`. layers: how many attentions were made sparse."""

    def __init__(self, hook: RemovableHandle, replaced: Sequence[tuple[Any, Processor]]) -> None:
        self._hook = hook
        self._replaced = list(replaced)
        self.layers = len(self._replaced)

    def remove(self) -> None:
        """Puts the very processors back that were there before. A second call does nothing."""
        self._hook.remove()
        for attention, processor in self._replaced:
            attention.set_processor(processor)
        self._replaced.clear()

    def __enter__(self) -> "SparseHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def make_sparse(
    transformer: nn.Module,
    *,
    keep: float | None = 0.0625,
    top_k: int | None = None,
    cdf_threshold: float | None = None,
    block: Sequence[int] = (4, 4, 4),
    backend: str = "auto",
    min_tokens: int = 0,
    dense_blocks: Sequence[int] = (),
    dense_above: float | None = None,
) -> SparseHandle:
    """Replaces the self attention of a diffusers video transformer by block sparse attention, until `remove()`.

    transformer: WanTransformer3DModel, WanVACETransformer3DModel, LTXVideoTransformer3DModel or
        HunyuanVideoTransformer3DModel with its own processors, before `torch.compile`. Cross attention stays as it is;
        HunyuanVideo's text tokens stay dense as queries and as keys.
    keep, top_k, cdf_threshold, block, backend: see `lcv_bsa.bsa_3d`. min_tokens: videos of fewer tokens stay dense.
    dense_blocks: transformer blocks that stay dense, counted in the order of their lists (blocks, then vace_blocks;
        transformer_blocks, then single_transformer_blocks).
    dense_above: calls with a timestep above this one stay dense; reading it waits for the device once per call.

    The grid of each call is read from its input: [B, C, F, H, W] and the patch size, or LTX's num_frames, height and
    width. Under gradient checkpointing run the backward of one grid before the forward of another. Raises ValueError
    for any other transformer or processor, and at the call for a grid that is not known or does not fit the tokens.
    """
    model = _model(transformer)
    options = SparseOptions(block, keep, top_k, cdf_threshold, backend, min_tokens)
    blocks = [block for name in model.blocks for block in getattr(transformer, name)]
    dense = _checked_blocks(dense_blocks, len(blocks))
    attentions = [getattr(block, model.attention) for i, block in enumerate(blocks) if i not in dense]
    _check_processors(attentions, model.own_processor)

    call = ModelCall()
    hook = transformer.register_forward_pre_hook(_TellCall(call, model, dense_above), with_kwargs=True)
    replaced = [(attention, attention.processor) for attention in attentions]
    for attention, processor in replaced:
        attention.set_processor(model.processor(call, options=options, dense=processor))
    return SparseHandle(hook, replaced)


@dataclass(frozen=True)
class _Model:
    """blocks: names of the lists of blocks. attention: a block's self attention. timestep: its place as an argument."""

    blocks: tuple[str, ...]
    attention: str
    own_processor: str
    processor: type[SparseAttnProcessor]
    grid: Callable[[nn.Module, Arguments], Triple]
    timestep: int


@dataclass(frozen=True)
class _TellCall:
    """The hook before each call. A class, because a deep copy of the model must tell its own processors."""

    call: ModelCall
    model: _Model
    dense_above: float | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call.grid = self.model.grid(module, (args, kwargs))
        self.call.mask = None
        above = self.dense_above
        self.call.dense = above is not None and _timestep((args, kwargs), self.model.timestep) > above


def _latent_grid(module: nn.Module, arguments: Arguments) -> Triple:
    """Of models that cut a latent [B, C, F, H, W] into patches themselves."""
    config: Any = module.config
    size = config.patch_size
    patch = (config.patch_size_t, size, size) if isinstance(size, int) else tuple(size)
    latent: Tensor = _argument(arguments, "hidden_states", 0)
    if latent is None or latent.ndim != 5:
        raise ValueError(f"hidden_states must be [B, C, F, H, W], got {None if latent is None else list(latent.shape)}")
    # the convolution that cuts the patches drops what is less than one
    return as_triple("grid", [n // p for n, p in zip(latent.shape[2:], patch)])


def _told_grid(module: nn.Module, arguments: Arguments) -> Triple:
    """Of LTX, which is told the grid of its tokens for their positions."""
    names = ("num_frames", "height", "width")
    grid = [_argument(arguments, name, 4 + i) for i, name in enumerate(names)]
    if None in grid:
        raise ValueError(f"the grid is known from num_frames, height and width alone, got {dict(zip(names, grid))}")
    return as_triple("grid (num_frames, height, width)", grid)


_MODELS = {
    "WanTransformer3DModel": _Model(
        ("blocks",), "attn1", "WanAttnProcessor", SparseWanAttnProcessor, _latent_grid, timestep=1
    ),
    "WanVACETransformer3DModel": _Model(
        ("blocks", "vace_blocks"), "attn1", "WanAttnProcessor", SparseWanAttnProcessor, _latent_grid, timestep=1
    ),
    "LTXVideoTransformer3DModel": _Model(
        ("transformer_blocks",), "attn1", "LTXVideoAttnProcessor", SparseLTXAttnProcessor, _told_grid, timestep=2
    ),
    "HunyuanVideoTransformer3DModel": _Model(
        ("transformer_blocks", "single_transformer_blocks"),
        "attn",
        "HunyuanVideoAttnProcessor2_0",
        SparseHunyuanVideoAttnProcessor,
        _latent_grid,
        timestep=1,
    ),
}


def _model(transformer: nn.Module) -> _Model:
    name = type(transformer).__name__
    if name not in _MODELS:
        raise ValueError(f"transformer must be one of {', '.join(_MODELS)}, got {name}: its grid can't be known")
    return _MODELS[name]


def _check_processors(attentions: Sequence[Any], expected: str) -> None:
    for attention in attentions:
        processor = attention.processor
        if type(processor).__name__ != expected:
            got = type(processor).__name__
            raise ValueError(f"each self attention must have a {expected} (diffusers >= 0.35), got {got}")
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError("context parallelism is not supported, got a model with it on")


def _checked_blocks(dense_blocks: Sequence[int], num_blocks: int) -> set[int]:
    for i in dense_blocks:
        if type(i) is not int or not 0 <= i < num_blocks:
            raise ValueError(f"dense_blocks must be 0..{num_blocks - 1} (the transformer's blocks), got {i!r}")
    return set(dense_blocks)


def _timestep(arguments: Arguments, place: int) -> float:
    timestep = _argument(arguments, "timestep", place)
    if timestep is None:
        raise ValueError("timestep must be given where dense_above is, got none")
    return float(timestep.max())


def _argument(arguments: Arguments, name: str, place: int) -> Any:
    args, kwargs = arguments
    return args[place] if place < len(args) else kwargs.get(name)
