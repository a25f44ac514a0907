"""`sparse_override` and `make_sparse` under ComfyUI's contract (read from 0.3.75 and 0.33), by stand-ins."""

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lcv_bsa import reference_attention, select_blocks
from lcv_bsa.adapters.comfyui import make_sparse, sparse_override, tell_grid

GRID, HEADS, HEAD_DIM = (5, 6, 7), 2, 8
TOKENS = 5 * 6 * 7
BLOCK = (2, 2, 3)
FLAGS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def dense_attention(
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
    assert kwargs.pop("_inside_attn_wrapper") is True
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return o if skip_output_reshape else o.transpose(1, 2).flatten(2)


def host(*args: Any, func: Callable[..., Tensor] = dense_attention, **kwargs: Any) -> Tensor:
    """What ComfyUI does around each of its attention functions."""
    override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
    kwargs["_inside_attn_wrapper"] = True
    return func(*args, **kwargs) if override is None else override(func, *args, **kwargs)


def inputs(generator: torch.Generator, *, skip_reshape: bool = False, tokens: int = TOKENS) -> list[Tensor]:
    shape = (2, HEADS, tokens, HEAD_DIM) if skip_reshape else (2, tokens, HEADS * HEAD_DIM)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


class Recorder:
    """An attention function, or a previous override, that notes what it was called with."""

    def __init__(self, func: Callable[..., Any] = lambda *args, **kwargs: "dense") -> None:
        self.func = func
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.func(*args, **kwargs)


@pytest.mark.parametrize(("skip_reshape", "skip_output_reshape"), FLAGS)
def test_all_kept_equals_dense(skip_reshape: bool, skip_output_reshape: bool, generator: torch.Generator) -> None:
    qkv = inputs(generator, skip_reshape=skip_reshape)
    flags: dict[str, Any] = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    for scale in ({}, {"scale": 0.1}):
        expected = host(*qkv, HEADS, **flags, **scale)
        override = sparse_override(keep=1.0, grid=GRID, min_tokens=0)
        func = Recorder()
        options = {"optimized_attention_override": override}
        got = host(*qkv, HEADS, func=func, transformer_options=options, **flags, **scale)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not func.calls


@pytest.mark.parametrize(("skip_reshape", "skip_output_reshape"), FLAGS)
def test_sparse_equals_the_reference(skip_reshape: bool, skip_output_reshape: bool, generator: torch.Generator) -> None:
    qkv = [x.requires_grad_() for x in inputs(generator, skip_reshape=skip_reshape)]
    override = sparse_override(keep=0.25, block=BLOCK, min_tokens=TOKENS)
    options = {"optimized_attention_override": override, "grid_sizes": torch.Size(GRID)}
    flags: dict[str, Any] = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    got = host(*qkv, HEADS, transformer_options=options, **flags)

    q, k, v = qkv if skip_reshape else (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in qkv)
    selection = select_blocks(q, k, GRID, GRID, BLOCK, keep=0.25)
    expected = reference_attention(q.double(), k.double(), v.double(), selection)[0].float()
    expected = expected if skip_output_reshape else expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    do = torch.randn(got.shape, generator=generator)
    grads, expected_grads = (torch.autograd.grad(o, qkv, do) for o in (got, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype, generator: torch.Generator) -> None:
    qkv = [x.to(dtype) for x in inputs(generator)]
    options = {"optimized_attention_override": sparse_override(grid=GRID, min_tokens=0)}
    with torch.inference_mode():
        o = host(*qkv, HEADS, transformer_options=options)
    assert o.dtype == dtype and o.shape == qkv[0].shape


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("why", ["cross", "mask", "short", "grouped", "dense block", "not the grid"])
def test_the_rest_goes_on_untouched(why: str, previous: bool, generator: torch.Generator) -> None:
    q, k, v = inputs(generator, skip_reshape=True)
    options: dict[str, Any] = {"grid_sizes": GRID, "block_index": 0}
    mask = None
    own: dict[str, Any] = {"min_tokens": 100}
    if why == "cross":
        k, v = k[:, :, :120], v[:, :, :120]
    if why == "mask":
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    if why == "short":
        own["min_tokens"] = TOKENS + 1
    if why == "grouped":
        k, v = k[:, :1], v[:, :1]
    if why == "dense block":
        own["dense_blocks"] = (2, 0)
    if why == "not the grid":
        options["grid_sizes"] = (5, 6, 6)
    func, earlier = Recorder(), Recorder()
    options["optimized_attention_override"] = sparse_override(**own, previous=earlier if previous else None)
    kwargs = {"mask": mask, "attn_precision": torch.float32, "skip_reshape": True, "skip_output_reshape": True}
    rest = {"transformer_options": options, "low_precision_attention": False}
    assert host(q, k, v, HEADS, func=func, **kwargs, **rest) == "dense"
    calls, others = (earlier, func) if previous else (func, earlier)
    args, got = calls.calls[0]
    if previous:
        assert args[0] is func
    assert all(a is b for a, b in zip(args[-4:], (q, k, v, HEADS), strict=True))
    assert got == {**kwargs, **rest, "_inside_attn_wrapper": True}
    assert not others.calls


def test_a_sequence_that_is_not_the_grid_is_told_once(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"optimized_attention_override": sparse_override(min_tokens=0), "grid_sizes": (5, 6, 6)}
    with caplog.at_level(logging.WARNING, "lcv_bsa"):
        for _ in range(2):
            host(*inputs(generator), HEADS, transformer_options=options)
    assert caplog.messages == ["210 tokens are not the 180 of grid (5, 6, 6): they stay dense"]


def test_refused(generator: torch.Generator) -> None:
    def run(options: dict[str, Any], **kwargs: Any) -> None:
        options = {**options, "optimized_attention_override": sparse_override(min_tokens=0, **kwargs)}
        host(*inputs(generator), HEADS, transformer_options=options)

    with pytest.raises(ValueError, match=r"the grid of 210 tokens is not known: .*grid_from_latent"):
        run({})
    with pytest.raises(ValueError, match=r"the sequence must have 5\*6\*6 = 180 tokens, got 210"):
        run({"grid_sizes": GRID}, grid=(5, 6, 6))
    with pytest.raises(ValueError, match=r"transformer_options\['grid_sizes'\] must be three positive ints"):
        run({"grid_sizes": (30, 7)})
    with pytest.raises(ValueError, match="backend 'nothing'"):
        run({"grid_sizes": GRID}, backend="nothing")
    with pytest.raises(ValueError, match="dense_blocks needs"):
        run({"grid_sizes": GRID}, dense_blocks=(0,))
    with pytest.raises(ValueError, match="grid must be three positive ints"):
        sparse_override(grid=(30, 7))
    with pytest.raises(ValueError, match="keep must be in"):
        sparse_override(keep=2.0)


class Model:
    """As ComfyUI's ModelPatcher: options that a clone copies, and wrappers by type and key."""

    def __init__(self, model_options: dict[str, Any]) -> None:
        self.model_options = model_options
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> "Model":
        return Model(copy.deepcopy(self.model_options))

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)


def test_make_sparse_patches_a_clone(generator: torch.Generator) -> None:
    earlier = Recorder()
    model = Model({"transformer_options": {"optimized_attention_override": earlier}})
    patched = make_sparse(model, keep=0.25, block=BLOCK, min_tokens=100)
    assert model.model_options == {"transformer_options": {"optimized_attention_override": earlier}}
    assert not model.wrappers
    options = patched.model_options["transformer_options"]
    assert type(options["optimized_attention_override"].previous) is Recorder

    qkv = inputs(generator)

    def forward(x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Tensor:
        return host(*qkv, HEADS, transformer_options=options)

    executor = SimpleNamespace(class_obj=SimpleNamespace(patch_size=(1, 2, 2)))
    [wrapper] = patched.wrappers["diffusion_model"]["lcv_bsa"]
    latent = torch.zeros(2, 16, 5, 12, 13)  # width 13 is padded to 14
    got = run_wrapper(wrapper, executor, forward, latent, torch.zeros(2), options)
    override = sparse_override(keep=0.25, block=BLOCK, grid=GRID, min_tokens=100)
    assert torch.equal(got, host(*qkv, HEADS, transformer_options={"optimized_attention_override": override}))


def run_wrapper(wrapper: Callable[..., Any], executor: Any, forward: Callable[..., Any], *args: Any) -> Any:
    """ComfyUI's executor is called for the next in line, and knows the model as class_obj."""

    class Executor:
        class_obj = executor.class_obj

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

    return wrapper(Executor(), *args)


@pytest.mark.parametrize("patch", [2, None, (2, 2)])
def test_tell_grid_leaves_what_it_cannot_know(patch: Any) -> None:
    options = {"optimized_attention_override": sparse_override()}
    executor = SimpleNamespace(class_obj=SimpleNamespace(patch_size=patch))
    run_wrapper(tell_grid, executor, lambda *args: None, torch.zeros(1, 16, 5, 12, 14), options)
    assert "grid_sizes" not in options
    executor.class_obj.patch_size = (1, 2, 2)
    run_wrapper(tell_grid, executor, lambda *args: None, torch.zeros(1, 16, 12, 14), options)
    assert "grid_sizes" not in options
