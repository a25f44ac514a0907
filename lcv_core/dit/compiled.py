"""Blocks through torch.compile: one graph that all blocks share, their weights being its inputs.

What is compiled is `lean.run_tensors`, a block without its caches: those are filled before it, uncompiled. There is a
graph for each shape of the forward: in a long video one without a KV cache and one with it. Steps, branches of guidance
and segments share them; the number of text rows is a variable of the graph. `fullgraph`: what cannot be traced whole is
an error, not a slow run.

CUDA graphs are not used. They save launches, 5 us or so each: 48 blocks of about 40 kernels are 10 ms a forward. At
480x832x93 a forward computes 2.0e15 operations (2 N C (6C + 3F) + 4 L C^2 + 4 N C (N + L) in a block, N = 37,440), two
seconds at the 989e12 a second that an H100 has on paper: half a percent to be had at most. A captured graph also owns
its inputs and outputs, while a block here writes over the stream and the room that all blocks share; torch does not
capture functions that do. Hence no mode that asks for them ("reduce-overhead", "max-autotune").
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcv_core.dit import lean
from lcv_core.errors import InputError

if TYPE_CHECKING:
    from lcv_core.dit.block import Block, Lean, Sequence3D

MODES = ("default", "max-autotune-no-cudagraphs")
Backend = str | Callable[..., Any]


def check_compiler(device: torch.device, mode: str | None = None, backend: Backend = "inductor") -> None:
    """InputError where blocks cannot be compiled on this device, with what to do."""
    if mode is not None and mode not in MODES:
        raise InputError(
            f'the mode of compiling must be one of {", ".join(MODES)}, got "{mode}"; modes with CUDA graphs cannot be'
            " used with blocks that write over their input"
        )
    if backend != "inductor":
        return
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("compiling for a GPU needs Triton; install it with `pip install triton`, or do not compile")
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        raise InputError("compiling for a CPU needs a C++ compiler; install g++ or set CXX, or do not compile")


class CompiledBlocks:
    """`lean.run_tensors`, compiled when it is first called with a shape. mode: one of MODES; None: torch's default."""

    def __init__(self, mode: str | None = None, backend: Backend = "inductor") -> None:
        from torch._dynamo.exc import TorchDynamoException

        self.mode, self.backend, self._refusals = mode, backend, TorchDynamoException
        self._run = torch.compile(lean.run_tensors, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    def __call__(
        self, block: Block, x: Tensor, tau: Tensor, text: Tensor | Sequence[Tensor] | None, seq: Sequence3D, lean: Lean
    ) -> None:
        """x [B, N, C] is written over. InputError where the block cannot be compiled, with the reason."""
        for rows in [text] if isinstance(text, Tensor) else text or ():
            _let_vary(rows, 1)
        if seq.text_bias is not None:
            _let_vary(seq.text_bias, 3)
        seq = replace(seq, rope=torch.view_as_real(seq.rope))
        try:
            self._run(block, x, tau, text, seq, lean)
        except self._refusals as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"the blocks cannot be compiled here ({reason}); run them without compiling") from error


def _let_vary(x: Tensor, dim: int) -> None:
    if x.shape[dim] > 1:  # torch makes 1 a constant in any case, and refuses to be told otherwise
        torch._dynamo.mark_dynamic(x, dim)
