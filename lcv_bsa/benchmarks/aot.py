"""Ahead-of-time compilation of every kernel, for GPUs that are not there: registers, spills, shared memory, matrix
instructions, CTAs per SM. `--gate` fails where a rule does.

    python benchmarks/aot.py [--arch sm_90 ...] [--kernel NAME ...] [--csv FILE] [--gate]
    python benchmarks/aot.py --arch sm_90 --kernel forward_kernel --stages 1 2 3 --warps 4 8     # what if
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib import import_module
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from aot_compile import PROCESSORS, TRITON, Launch, Measured, launches_of, measure
from torch import Tensor

from lcv_bsa.backends.triton import tuning
from lcv_bsa.layout import BlockLayout
from lcv_bsa.selection import BlockSelection

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """What launchers take: their shapes, strides and dtypes count, their values do not."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    do: Tensor
    dlse: Tensor
    selection: BlockSelection
    scale: float = 0.1


# One line per launcher: every kernel that it launches is compiled. Modules are imported when their turn comes.
Launcher = Callable[[Inputs], object]
LAUNCHERS: dict[str, Launcher] = {
    "forward": lambda i: _module("forward").forward(i.q, i.k, i.v, i.selection, i.scale),
    "pair_tma": lambda i: _module("pairs").forward(i.q, i.k, i.v, i.selection, i.scale),
    "forward_tma": lambda i: _module("forward_tma").forward(i.q, i.k, i.v, i.selection, i.scale),
    "int8_tma": lambda i: _module("quantised").int8_forward(i.q, i.k, i.v, i.selection, i.scale),
    "fp8_tma": lambda i: _module("quantised").fp8_forward(i.q, i.k, i.v, i.selection, i.scale),
    "eight_bits_tma": lambda i: _module("eight_bits").forward(i.q, i.k, i.v, i.selection, i.scale),
    "backward": lambda i: _module("backward").backward(
        i.q, i.k, i.v, i.o, i.lse, i.do, i.dlse, i.selection, i.scale
    ),
    "backward_tma": lambda i: _module("backward_tma").backward(
        i.q, i.k, i.v, i.o, i.lse, i.do, i.dlse, i.selection, i.scale
    ),
    "fused": lambda i: _module("backward_fused").walked_backward(
        i.q, i.k, i.v, i.o, i.lse, i.do, i.dlse, i.selection, i.scale, walk="fused"
    ),
    "fused_tma": lambda i: _module("backward_fused").walked_backward(
        i.q, i.k, i.v, i.o, i.lse, i.do, i.dlse, i.selection, i.scale, walk="fused_tma"
    ),
    "select": lambda i: _module("selecting").triton_select(
        i.q, i.k, i.selection.layout_q, i.selection.layout_k, least=i.selection.indices.shape[-1]
    ),
    "inverse": lambda i: _module("inverse").inverse_selection(i.selection),
}  # fmt: skip

# top-k and the inverse hold a row of all blocks at once, so these are compiled at the size of 720p.
_WHOLE_ROWS = ("select", "inverse")
# Launchers whose name ends in "_tma" are for these alone.
_TMA_ARCHITECTURES = ("sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Rule:
    """What must hold for a kernel: most spills, fewest asynchronous and any matrix instructions, fewest CTAs per SM."""

    spills: int = 0
    wgmma: int = 0
    mma: int = 0
    ctas: int = 1

    def broken_by(self, row: Measured) -> Iterator[str]:
        """The reasons, none where the rule holds."""
        where = f"{row.kernel} on {row.arch}"
        if row.spills > self.spills:
            yield f"{where}: spills must be <= {self.spills}, got {row.spills}"
        if row.serialized:
            yield f"{where}: ptxas serializes wgmma (C7512)"
        for name in ("wgmma", "mma", "ctas"):
            if getattr(row, name) < getattr(self, name):
                yield f"{where}: {name} must be >= {getattr(self, name)}, got {getattr(row, name)}"


# A kernel without a rule for an architecture must not spill, not be serialized, and fit an SM.
RULES = {
    ("forward_kernel", "sm_90"): Rule(wgmma=2, ctas=2),
    ("tma_forward_kernel", "sm_90"): Rule(wgmma=8, ctas=2),
    ("eight_bit_kernel", "sm_90"): Rule(wgmma=6, ctas=3),
    ("pair_forward_kernel", "sm_90"): Rule(wgmma=12, ctas=2),
    ("dq_kernel", "sm_90"): Rule(wgmma=3, ctas=2),
    ("dkv_kernel", "sm_90"): Rule(wgmma=24, ctas=2),
    ("tma_dq_kernel", "sm_90"): Rule(wgmma=20, ctas=2),
    ("tma_dkv_kernel", "sm_90"): Rule(wgmma=24, ctas=2),
    ("tma_fused_kernel", "sm_90"): Rule(wgmma=28, ctas=2),
}


def _module(name: str) -> Any:
    return import_module(f"lcv_bsa.backends.triton.{name}")


def make_inputs(
    *, grid: tuple[int, int, int], head_dim: int, dtype: torch.dtype, block: tuple[int, int, int] = (4, 4, 4),
    heads: int = 32, kept: int = 3,
) -> Inputs:  # fmt: skip
    """Strides as a model has them; nothing runs, so values do not matter."""
    tokens, layout = prod(grid), BlockLayout(grid, block)
    q, k, v, o, do = (torch.zeros(1, heads, tokens, head_dim, dtype=dtype) for _ in range(5))
    lse, dlse = (torch.zeros(1, heads, tokens) for _ in range(2))
    indices = torch.arange(min(kept, layout.num_blocks)).expand(1, heads, layout.num_blocks, -1)
    selection = BlockSelection.from_indices(indices, grid_q=grid, grid_k=grid, block_q=block)
    return Inputs(q, k, v, o, lse, do, dlse, selection)


def rows(args: argparse.Namespace) -> Iterator[Measured | str]:
    """One row per architecture, kernel and asked-for option, or why there is none."""
    shape: dict[str, Any] = {"head_dim": args.head_dim, "dtype": DTYPES[args.dtype]}
    small = make_inputs(grid=tuple(args.grid), **shape)
    large = make_inputs(grid=(48, 44, 80), heads=2, kept=165, **shape)
    for arch in args.arch:
        seen: set[tuple[str, object]] = set()
        for name, launcher in sorted(LAUNCHERS.items(), key=lambda item: item[0] not in _WHOLE_ROWS):
            if name.endswith("_tma") and arch not in _TMA_ARCHITECTURES:
                continue
            with tuning.assumed_architecture(arch):
                launches = launches_of(partial(launcher, large if name in _WHOLE_ROWS else small))
            for launch in launches:
                # several launchers begin with the inverse and the statistics; a quantised q is another kernel
                key = launch.name, getattr(launch.args[0], "dtype", None)
                new = key not in seen
                seen.add(key)
                if new and (not args.kernel or launch.name in args.kernel):
                    yield from _variants(launch, arch, args)


def _variants(launch: Launch, arch: str, args: argparse.Namespace) -> Iterator[Measured | str]:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg")
    asked = (args.m, args.n, args.warps, args.stages, args.maxnreg)
    for values in product(*([None] if given is None else given for given in asked)):
        options = {name: value for name, value in zip(names, values) if value is not None}
        try:
            yield measure(launch, arch, **options)
        except Exception as error:  # Triton has no common base for what does not compile
            yield f"{launch.name} on {arch} {options or ''}: does not compile: {type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(PROCESSORS), default=list(PROCESSORS))
    parser.add_argument("--kernel", nargs="+", help="names of kernel functions; default all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--grid", type=int, nargs=3, default=[4, 12, 16], help="5 6 7 has partial blocks")
    for name in ("--m", "--n", "--warps", "--stages", "--maxnreg"):
        parser.add_argument(name, type=int, nargs="+", help="instead of what the table says")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--gate", action="store_true")
    args = parser.parse_args()
    names = [field.name for field in fields(Measured)]
    print(" ".join(f"{name:>10}" for name in names))
    found: list[Measured] = []
    failures: list[str] = []
    for row in rows(args):
        if isinstance(row, str):
            failures.append(row)
            print(row, flush=True)
        else:
            found.append(row)
            print(" ".join(f"{value!s:>10}" for value in asdict(row).values()), flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            what = {"triton": TRITON, "dtype": args.dtype, "head_dim": args.head_dim}
            writer = csv.DictWriter(file, [*names, *what])
            writer.writeheader()
            writer.writerows(asdict(row) | what for row in found)
    return _gate(found, failures) if args.gate else 0


def _gate(found: list[Measured], failures: list[str]) -> int:
    broken = [reason for row in found for reason in RULES.get((row.kernel, row.arch), Rule()).broken_by(row)]
    if not found:
        broken.append("no kernel was compiled")
    print("\n".join(["gate: red", *broken, *failures] if broken or failures else ["gate: green"]))
    return 1 if broken or failures else 0


if __name__ == "__main__":
    sys.exit(main())
