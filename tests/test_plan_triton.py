"""What Triton's block sparse attention allocates, run by its interpreter, against what the planner counts for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from lcv_core.config import BSAConfig
from lcv_core.planning.sparse import sparse_bytes, sparse_kernels

pytest.importorskip("triton")

# The interpreter is chosen when Triton is imported, hence a process of its own. The operators are opened, so that what
# is alive inside them is seen. q lies as the blocks of the transformer have it: tokens first.
_SCRIPT = """
import json, sys
import torch
from lcv_bsa import block_sparse_attention, ops, select_blocks
from lcv_core.live_bytes import LiveBytes
torch.ops.lcv_bsa.select = ops._select._init_fn
torch.ops.lcv_bsa.attention = ops._attention._init_fn
class OnDevice(LiveBytes):
    # tensors without data, which the operators ask for their strides, take nothing

    def _add(self, storage):
        if storage.device.type != "meta":
            super()._add(storage)


out = []
for case in json.loads(sys.argv[1]):
    grid, heads, dim = case["grid"], case["heads"], case["dim"]
    tokens = grid[0] * grid[1] * grid[2]
    dtype = getattr(torch, case["dtype"])
    q = torch.randn(1, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(1, heads, tokens, dim, dtype=dtype) for _ in range(2))
    chooser = "torch" if case["cdf"] else "triton"
    with OnDevice() as choosing:
        found = select_blocks(
            q, k, grid, grid, case["block"], keep=case["keep"], cdf_threshold=case["cdf"], backend=chooser
        )
    # Counted apart: the interpreter holds what a kernel was last given until the next one.
    with OnDevice() as attending:
        block_sparse_attention(q, k, v, found, backend="triton")
    held = sum(value.untyped_storage().nbytes() for value in vars(found).values() if isinstance(value, torch.Tensor))
    out.append(max(choosing.peak, held + attending.peak))
print(json.dumps(out))
"""
CASES: list[dict[str, Any]] = [
    {"grid": [4, 8, 8], "heads": 2, "dim": 32, "block": [2, 4, 4], "keep": 0.5, "cdf": None, "dtype": "float32"},
    {"grid": [4, 8, 8], "heads": 2, "dim": 32, "block": [2, 4, 4], "keep": 0.5, "cdf": None, "dtype": "float16"},
    {"grid": [5, 8, 12], "heads": 3, "dim": 32, "block": [4, 4, 4], "keep": 0.25, "cdf": None, "dtype": "float16"},
    {"grid": [4, 8, 8], "heads": 2, "dim": 32, "block": [2, 4, 4], "keep": None, "cdf": 0.6, "dtype": "float16"},
]
MOST = 1.1


@pytest.fixture(scope="module")
def alive() -> list[int]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SCRIPT, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_triton_allocates(number: int, alive: list[int]) -> None:
    case = CASES[number]
    sparsity = None if case["keep"] is None else 1.0 - case["keep"]
    block = tuple(case["block"])
    bsa = BSAConfig(sparsity=sparsity, block_q=block, block_k=block, cdf_threshold=case["cdf"])  # type: ignore[arg-type]
    grid = tuple(case["grid"])
    planned = sparse_bytes(
        bsa, grid, grid, heads=case["heads"], head_dim=case["dim"], itemsize=4 if case["dtype"] == "float32" else 2,
        kernels="triton",
    )  # type: ignore[arg-type]  # fmt: skip
    most = MOST if case["cdf"] is None else 1.5  # it may keep every block, and seldom does
    assert alive[number] <= planned <= most * alive[number], planned / alive[number]


def test_a_cpu_gathers() -> None:
    assert sparse_kernels("cpu") == "gather"
    assert sparse_kernels("gpu") == "triton"


def test_heads_that_are_packed_at_once_are_those_of_the_kernels() -> None:
    from lcv_bsa.backends.triton import eight_bits

    from lcv_core.planning import sparse

    assert sparse._HEADS_AT_ONCE == eight_bits._HEADS_AT_ONCE
