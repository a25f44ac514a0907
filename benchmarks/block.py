"""One block of the transformer: its time over that of its own matmuls and attention alone, its peak of activations over
the official block's, and sparse against dense attention at the 480p grid.

    python benchmarks/block.py                              # full width; a row per measure to block.csv
    python benchmarks/block.py --dtype bf16 --only time memory
    python benchmarks/block.py --quick                      # an eighth of the width, short clips, writes nothing

Time and memory are of 5x18x26 = 2,340 tokens. What is compared runs in turn, pair after pair, so that what else the
machine does is in both; the median of the pairs' ratios counts.
"""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from cases import GRIDS, TEXT_TOKENS, kept_keys, lean_sequence
from measure import DTYPES, commit, device_name
from torch import Tensor

from lcv_core import layers
from lcv_core.config import LONGCAT_VIDEO, DiTConfig
from lcv_core.dit.attention import resolve_backend
from lcv_core.dit.block import Block, Sequence3D
from lcv_core.live_bytes import LiveBytes

RESULTS = Path(__file__).resolve().parent / "block.csv"
GRID = (5, 18, 26)
QUICK = dataclasses.replace(LONGCAT_VIDEO, hidden_size=512, num_heads=4)
# Of the block over its matmuls and attention; of its memory over the official block's; of dense over sparse.
GOALS = {("time", "fp32"): "<= 1.03", ("time", "bf16"): "<= 1.06", ("memory", ""): "<= 0.6", ("sparse", ""): ">= 1.7"}
COLUMNS: tuple[str, ...] = (
    "commit", "date", "device", "threads", "torch", "measure", "shape", "width", "dtype", "runs", "ratio", "min", "max",
    "ours", "other", "unit", "goal", "note",
)  # fmt: skip
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A block with random weights and what it is given; the block writes over `x`."""

    config: DiTConfig
    block: Block
    seq: Sequence3D
    x: Tensor
    tau: Tensor
    text: Tensor

    @property
    def run(self) -> Run:
        return lambda: self.block(self.x, self.tau, self.text, self.seq)


def make_case(config: DiTConfig, grid: tuple[int, int, int], dtype: torch.dtype, *, sparse: bool = False) -> Case:
    device, g = torch.device("cpu"), torch.Generator().manual_seed(0)
    block = Block(config, layers, dtype=dtype).requires_grad_(False)
    attend = resolve_backend("sdpa", device=device, dtype=dtype, head_dim=config.head_dim)
    seq = lean_sequence(config, grid, device, dtype, attend, config.bsa if sparse else None)
    x = torch.randn(1, prod(grid), config.hidden_size, generator=g).to(dtype)
    tau = torch.randn(1, 1, config.adaln_tembed_dim, generator=g)
    text = torch.randn(1, TEXT_TOKENS, config.hidden_size, generator=g).to(dtype)
    return Case(config, block, seq, x, tau, text)


def parts_alone(case: Case) -> Run:
    """The block's matmuls and attentions with inputs that lie ready, nothing between them: what it cannot go below."""
    block, config, N = case.block, case.config, case.x.shape[1]
    heads, hidden = (1, config.num_heads), case.x.new_ones(1, N, config.ffn_dim)
    q, k, v = (case.x.new_ones(*heads, N, config.head_dim) for _ in range(3))
    text_k, text_v = (case.x.new_ones(*heads, TEXT_TOKENS, config.head_dim) for _ in range(2))
    adaln: Any = block.adaLN_modulation[1]
    adaln_weight, adaln_bias = adaln.weight.float(), adaln.bias.float()

    def run() -> None:
        F.linear(case.tau, adaln_weight, adaln_bias)
        block.attn.qkv(case.x)
        F.scaled_dot_product_attention(q, k, v)
        block.attn.proj(case.x)
        block.cross_attn.q_linear(case.x)
        block.cross_attn.kv_linear(case.text)
        F.scaled_dot_product_attention(q, text_k, text_v)
        block.cross_attn.proj(case.x)
        block.ffn.w1(case.x)
        block.ffn.w3(case.x)
        block.ffn.w2(hidden)

    return run


def pairs(ours: Run, other: Run, count: int, clock: Callable[[], float]) -> list[tuple[float, float]]:
    """Seconds of both, in turn, after a warm-up of each."""

    def seconds(run: Run) -> float:
        start = clock()
        run()
        return clock() - start

    with torch.inference_mode():
        ours()
        other()
        return [(seconds(ours), seconds(other)) for _ in range(count)]


def official_peak(config: DiTConfig, tokens: int, itemsize: int) -> int:
    """Bytes of activations alive at the official block's peak, one sample, derived from the specification.

    In widths of all tokens, N C: the stream x and the modulated input (held by the call) are alive in both moments.
    Rope: qkv (3; v is a view that keeps all of it), q and k after their norms (2), then in fp32 q and k (copies where
    they were half precision), the rotated q, k cos, and of k's rotation the halves swapped and their product with sin:
    fp32 copies of q and k are made and cos and sin applied to whole tensors (section 2.4 and 9.3, entry 42).
    Feed-forward: four hidden activations (entry 42): W1 m, its SiLU, W3 m, their product.
    What is smaller is left out: modulation, text, tables. So ours over this is an upper bound of the ratio.
    """
    width = tokens * config.hidden_size
    copies = 0 if itemsize == 4 else 1  # k in fp32; that of q is gone when q has been rotated
    rope = width * ((2 + 3 + 2) * itemsize + (copies + 1 + 3) * 4)
    feed_forward = (2 * width + 4 * tokens * config.ffn_dim) * itemsize
    return max(rope, feed_forward)


class Report:
    def __init__(self, out: Path | None, note: str) -> None:
        self.out, self.note = out, note
        self.fixed = {
            "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(torch.device("cpu")),
            "threads": str(torch.get_num_threads()), "torch": torch.__version__,
        }  # fmt: skip

    def add(
        self, measure: str, case: Case, dtype: str, values: list[tuple[float, float]], unit: str, note: str
    ) -> None:
        """values: (ours, other) of each run; the ratio is ours over other."""
        ratios = [ours / other for ours, other in values]
        row = self.fixed | {
            "measure": measure, "shape": "x".join(map(str, case.seq.grid)), "width": str(case.config.hidden_size),
            "dtype": dtype, "runs": str(len(values)), "ratio": f"{median(ratios):.3f}", "min": f"{min(ratios):.3f}",
            "max": f"{max(ratios):.3f}", "ours": f"{median(o for o, _ in values):.4g}",
            "other": f"{median(o for _, o in values):.4g}", "unit": unit,
            "goal": GOALS.get((measure, dtype), GOALS.get((measure, ""), "")),
            "note": "; ".join(filter(None, [note, self.note])),
        }  # fmt: skip
        keys = ("measure", "shape", "width", "dtype", "ratio", "min", "max", "goal", "ours", "other", "unit", "note")
        print(
            "  ".join(f"{key} {row[key]}" if key in ("width", "ratio", "goal") else row[key] for key in keys),
            flush=True,
        )
        if self.out is None:
            return
        new = not self.out.exists()
        with self.out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def measure_time(report: Report, config: DiTConfig, dtype: str, args: argparse.Namespace) -> None:
    case = make_case(config, GRID, DTYPES[dtype])
    note = "block over its matmuls and SDPA"
    report.add("time", case, dtype, pairs(case.run, parts_alone(case), args.repeats, args.clock), "s", note)
    if args.before:
        # Without `lean` a block computes as for training, whole tensors at a time.
        before = dataclasses.replace(case, seq=dataclasses.replace(case.seq, lean=None))
        before = dataclasses.replace(before, tau=case.tau.expand(1, GRID[0], -1))
        values = pairs(before.run, parts_alone(case), args.repeats, args.clock)
        report.add("time", before, dtype, values, "s", "the block that training uses, " + note)


def measure_memory(report: Report, config: DiTConfig, dtype: str, args: argparse.Namespace) -> None:
    case = make_case(config, GRID, DTYPES[dtype])
    with torch.inference_mode(), LiveBytes() as live:
        case.run()
    lean = case.seq.lean
    room = sum(y.nbytes for y in lean.room) if lean and lean.room else 0
    ours = live.peak + case.x.nbytes + room  # the stream, and what k and v of all blocks go through, were there before
    official = official_peak(config, prod(GRID), DTYPES[dtype].itemsize)
    report.add("memory", case, dtype, [(float(ours), float(official))], "bytes", "peak over the official block's")


def measure_sparse(report: Report, config: DiTConfig, dtype: str, args: argparse.Namespace) -> None:
    grid = (args.frames, *GRIDS["480p"][1:]) if not args.quick else (4, 12, 16)
    dense, sparse = (make_case(config, grid, DTYPES[dtype], sparse=kind) for kind in (False, True))
    sparse = dataclasses.replace(sparse, block=dense.block)
    note = f"dense over sparse, {kept_keys(config, grid):.0f} of {prod(grid)} keys"
    report.add("sparse", dense, dtype, pairs(dense.run, sparse.run, args.repeats, args.clock), "s", note)


MEASURES = {"time": measure_time, "memory": measure_memory, "sparse": measure_sparse}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--frames", type=int, default=24, help="latent frames of the sparse measure, of 30x52 tokens")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time: for one thread on a busy machine"
    )
    parser.add_argument("--before", action="store_true", help="also time the block that training uses")
    parser.add_argument("--quick", action="store_true", help="an eighth of the width; shows that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    config = QUICK if args.quick else LONGCAT_VIDEO
    notes = ["quick" if args.quick else "", "processor time" if args.cpu_time else ""]
    report = Report(None if args.quick else args.out, "; ".join(filter(None, notes)))
    for dtype in args.dtype:
        for name in args.only:
            MEASURES[name](report, config, dtype, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
