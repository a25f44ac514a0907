"""lcv_core's Triton kernels compiled for GPUs that are not there: registers, spills, shared memory, CTAs per SM.

    python benchmarks/aot.py [--arch sm_90 ...] [--out FILE] [--gate]      # --gate fails where a kernel spills

At the released models' widths in bf16. Compiles as `lcv_bsa/benchmarks/aot.py` does, with the same code.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from measure import ROOT

sys.path.append(str(ROOT / "lcv_bsa" / "benchmarks"))
from aot_compile import PROCESSORS, TRITON, Measured, launches_of, measure

from lcv_core import layers
from lcv_core.config import LONGCAT_VIDEO
from lcv_core.dit.frames import share_timesteps
from lcv_core.dit.kernels import fused
from lcv_core.dit.rope import rope_table
from lcv_core.quant import row_kernels
from lcv_core.vae.kernels import add_bias_, doubled, norm_silu_behind
from lcv_core.vae.layers import channels_last
from lcv_core.vae.norm import FLOOR

RESULTS = Path(__file__).resolve().parent / "aot.csv"
DTYPE = torch.bfloat16
VAE_WIDTHS = {f"VAE norm + SiLU, {width}": width for width in (96, 192, 384)}  # not the transformer's
_VAE_REST = {"VAE bias + residual": 96, "VAE doubling": 192}
NO_FP8 = ("sm_80", "gfx942")  # has no e4m3 of this kind


def launchers() -> dict[str, Callable[[], object]]:
    """What launches each kernel in each of its forms, on tensors whose values do not matter."""
    config = LONGCAT_VIDEO
    C, H, D = config.hidden_size, config.num_heads, config.head_dim
    grid = (2, 4, 4)
    _, frames = share_timesteps(torch.tensor([[0.0, 500.0]]), 16)
    x, update = torch.zeros(2, 1, 32, C, dtype=DTYPE)
    shift, scale, gate = torch.zeros(3, 2, C)
    bare = layers.LayerNorm(C, eps=1e-6, elementwise_affine=False)
    affine = layers.LayerNorm(C, eps=1e-6, dtype=DTYPE)
    norm, rope = layers.RMSNorm(D, eps=1e-6, dtype=DTYPE), rope_table(grid, D, torch.device("cpu"))
    q = torch.zeros(1, 32, 3, H, D, dtype=DTYPE)[:, :, 0]
    wide = torch.zeros(2, config.ffn_dim, dtype=DTYPE)
    sums, out = torch.zeros(2, C, dtype=torch.int32), torch.zeros(2, C, dtype=DTYPE)
    pixels = {name: channels_last(torch.zeros(1, width, 1, 16, 16, dtype=DTYPE)) for name, width in VAE_WIDTHS.items()}
    small, larger = pixels["VAE norm + SiLU, 96"], pixels["VAE norm + SiLU, 192"][:, :, 0]
    return {
        "norm + modulate": lambda: fused.modulate(x, bare, shift, scale, frames),
        "norm": lambda: fused.layer_norm(x, affine),
        "gated add": lambda: fused.gated_add_(x, gate, update, frames),
        "norm + rope": lambda: fused.norm_rope(q, norm, rope, q),
        "SwiGLU": lambda: fused.swiglu_(x, update),
        "q norm": lambda: fused.norm_rope(q, norm, None, q),
        "to int8": lambda: row_kernels.quantise_rows(x[0], "int8"),
        "to fp8": lambda: row_kernels.quantise_rows(x[0], "fp8"),
        "to fp8, feed-forward": lambda: row_kernels.quantise_rows(wide, "fp8"),
        "int8 sums": lambda: row_kernels.scale_sums(sums, gate[:, :1], gate[0], gate[0], out),
        "VAE bias + residual": lambda: add_bias_(small, small[0, :, 0, 0, 0], small),
        "VAE doubling": lambda: doubled(larger),
        **{name: lambda x=x: norm_silu_behind(x, x[0, :, 0, 0, 0], 1.0, FLOOR, 2) for name, x in pixels.items()},
    }


def rows(architectures: list[str]) -> list[tuple[str, Measured]]:
    with torch.no_grad():
        launches = {name: launches_of(launcher) for name, launcher in launchers().items()}
    return [
        (name, measure(one, arch))
        for arch in architectures
        for name, each in launches.items()
        if not ("fp8" in name and arch in NO_FP8)
        for one in each
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(PROCESSORS), default=list(PROCESSORS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--gate", action="store_true")
    args = parser.parse_args()
    found = rows(args.arch)
    table = [
        {"what": name}
        | asdict(row)
        | {"width": (VAE_WIDTHS | _VAE_REST).get(name, LONGCAT_VIDEO.hidden_size), "dtype": "bf16", "triton": TRITON}
        for name, row in found
    ]
    for row in table:
        print(" ".join(f"{value!s:>20}" for value in row.values()), flush=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    spilling = [f"{name} on {row.arch}: {row.spills} bytes spilled" for name, row in found if row.spills]
    if args.gate:
        print("\n".join(["gate: red", *spilling]) if spilling else "gate: green")
    return int(args.gate and bool(spilling))


if __name__ == "__main__":
    sys.exit(main())
