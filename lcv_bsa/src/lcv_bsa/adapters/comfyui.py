"""ComfyUI's hook for attention, `transformer_options["optimized_attention_override"]` (0.3.64 and up).

    from lcv_bsa.adapters.comfyui import make_sparse
    model = make_sparse(model, keep=0.0625)  # a MODEL in, a patched MODEL out

or, with a hand on the options:

    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = sparse_override(keep=0.0625, grid=(21, 30, 52))
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from lcv_bsa.adapters.grid import check_tokens, grid_from_latent
from lcv_bsa.adapters.options import SparseOptions
from lcv_bsa.layout import Triple, as_triple

__all__ = ["SparseOverride", "grid_from_latent", "make_sparse", "sparse_override"]

logger = logging.getLogger("lcv_bsa")

Attention = Callable[..., Tensor]

_OVERRIDE = "optimized_attention_override"
# ComfyUI's Wan models write this key themselves since late 2025, with the same meaning
_GRID = "grid_sizes"


def sparse_override(
    *,
    keep: float | None = 0.0625,
    top_k: int | None = None,
    cdf_threshold: float | None = None,
    block: Sequence[int] = (4, 4, 4),
    backend: str = "auto",
    grid: Sequence[int] | None = None,
    min_tokens: int = 4096,
    dense_blocks: Sequence[int] = (),
    previous: Attention | None = None,
) -> "SparseOverride":
    """The callable to store under "optimized_attention_override".

    keep, top_k, cdf_threshold, block, backend: see `lcv_bsa.bsa_3d`.
    grid: (T, H, W) of the video's tokens, None to read transformer_options["grid_sizes"] at each call.
    min_tokens: shorter sequences stay dense; the default lies above any text.
    dense_blocks: values of transformer_options["block_index"] that stay dense.
    previous: an override that was there before, which gets what stays dense. Raises ValueError.
    """
    options = SparseOptions(block, keep, top_k, cdf_threshold, backend, min_tokens)
    return SparseOverride(options, grid=grid, dense_blocks=dense_blocks, previous=previous)


class SparseOverride:
    """See `sparse_override`."""

    def __init__(
        self,
        options: SparseOptions,
        *,
        grid: Sequence[int] | None = None,
        dense_blocks: Sequence[int] = (),
        previous: Attention | None = None,
    ) -> None:
        self.options = options
        self.grid = None if grid is None else as_triple("grid", grid)
        self.dense_blocks = frozenset(dense_blocks)
        self.previous = previous
        self._told: set[int] = set()

    def __call__(
        self,
        func: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """q, k, v [B, S, heads * D], or [B, heads, S, D] with skip_reshape -> the same, by skip_output_reshape.

        Unmasked self attention over the video's grid is sparse. Cross attention, masks, grouped heads, sequences below
        min_tokens, the dense blocks, and sequences to which the model itself added tokens (text, reference frames;
        told once by a warning) go to `previous` or `func` as they came. Raises ValueError where the grid is not known,
        or the grid that was given does not fit.
        """
        tokens = q.shape[2 if skip_reshape else 1]
        grid = None
        if mask is None and q.shape == k.shape == v.shape and tokens >= self.options.min_tokens:
            grid = self._grid(tokens, kwargs.get("transformer_options") or {})
        if grid is None:
            dense = func if self.previous is None else partial(self.previous, func)
            flags = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            return dense(q, k, v, heads, mask=mask, attn_precision=attn_precision, **flags, **kwargs)
        if not skip_reshape:
            q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
        layout = "bhsd" if skip_reshape else "bshd"
        o, _ = self.options.attend(q, k, v, grid, layout=layout, scale=kwargs.get("scale"))
        if skip_reshape != skip_output_reshape:
            o = o.transpose(1, 2)
        return o if skip_output_reshape else o.flatten(2)

    def _grid(self, tokens: int, options: dict[str, Any]) -> Triple | None:
        """The grid of these tokens, None where they stay dense."""
        if self.dense_blocks:
            if "block_index" not in options:
                raise ValueError("dense_blocks needs transformer_options['block_index'], which this model does not set")
            if options["block_index"] in self.dense_blocks:
                return None
        if self.grid is not None:
            check_tokens("the sequence", tokens, self.grid)
            return self.grid
        if _GRID not in options:
            raise ValueError(
                f"the grid of {tokens} tokens is not known: this model does not set transformer_options['{_GRID}']; "
                "try make_sparse(model), or grid=grid_from_latent(latent.shape, patch_size)"
            )
        grid = as_triple(f"transformer_options['{_GRID}']", [int(n) for n in options[_GRID]])
        if prod(grid) == tokens:
            return grid
        if tokens not in self._told:
            self._told.add(tokens)
            logger.warning("%d tokens are not the %d of grid %s: they stay dense", tokens, prod(grid), grid)
        return None


def make_sparse(model: Any, **options: Any) -> Any:
    """A clone of a ComfyUI MODEL (ModelPatcher) that runs sparse, with the grid read from each call's latent.

    options: those of `sparse_override`, but for previous: an override that the model has is kept for what stays dense.
    The grid is known for models that have a patch_size of three and take a latent [B, C, F, H, W], such as Wan.
    """
    patched = model.clone()
    transformer_options = patched.model_options.setdefault("transformer_options", {})
    transformer_options[_OVERRIDE] = sparse_override(previous=transformer_options.get(_OVERRIDE), **options)
    patched.add_wrapper_with_key("diffusion_model", "lcv_bsa", tell_grid)
    return patched


def tell_grid(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of ComfyUI's type "diffusion_model": sets transformer_options["grid_sizes"] where it can be known."""
    patch = getattr(executor.class_obj, "patch_size", None)
    if isinstance(patch, (tuple, list)) and len(patch) == 3 and x.ndim == 5:
        for options in (*args, *kwargs.values()):
            if isinstance(options, dict) and _OVERRIDE in options:
                options[_GRID] = grid_from_latent(x.shape, patch)
    return executor(x, *args, **kwargs)
