"""What the planner says a job needs against what is really alive: real width, few tokens on a CPU, all on a GPU.

    python benchmarks/memory.py                    # CPU: bytes of every storage, counted exactly; memory.csv
    python benchmarks/memory.py --device cuda      # full sizes, by the allocator
    python benchmarks/memory.py --tiny --out DIR   # the tiny model: shows that it runs

A row "counted" compares the two at one size, for one block (blocks run one after the other, so that more of them add
weights alone). A row "planned" is the planner's number at the full size of the job, computed and not measured.
"""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import dataclasses
import datetime
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import TEXT_TOKENS
from clocks import peak_bytes
from goals import Goal, print_goals
from lcv_bsa.backends import rows as bsa_rows
from measure import DTYPES, MIB, commit, device_name
from parts import Grid, build

from lcv_bsa import ops
from lcv_core.config import LONGCAT_VIDEO, WAN_VAE, BSAConfig, DiTConfig, TextConfig, VAEConfig
from lcv_core.dit.rope import rope_table
from lcv_core.planning import Job, Refine, make_plan
from lcv_core.planning.sparse import Device, sparse_kernels
from lcv_core.planning.text import text_bytes
from lcv_core.planning.transformer import forward_bytes
from lcv_core.planning.vae import Convolutions, decode_bytes, encode_bytes
from lcv_core.shapes import SPACE_FACTOR, TIME_FACTOR
from lcv_core.text.encoder import build_text_model
from lcv_core.vae.layers import channels_last_
from lcv_core.vae.model import WanVAE
from lcv_core.weights.init import PRESETS

HERE = Path(__file__).resolve().parent
OVER = 1.10  # how far the planner may be above what is alive; never below it
GROUPS = ("transformer", "vae", "text", "planned")
COLUMNS: tuple[str, ...] = (
    "commit", "date", "device", "torch", "row", "job", "stage", "shape", "dtype", "planned_mib", "counted_mib", "ratio",
    "weights_mib", "kv_cache_mib", "note",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """planned: the planner's bytes besides weights. run: what is counted."""

    job: str
    stage: str
    shape: str
    planned: int
    run: Callable[[], object]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run: tokens of the jobs, pixels and latent frames for the VAE."""

    t2v: Grid
    refine: Grid
    cond: int
    pixels: dict[str, tuple[int, int]]
    latents: int


FULL = Sizes((24, 30, 52), (48, 44, 80), 4, {"t2v 480p93": (480, 832), "refine 720p189": (704, 1280)}, 3)
# Few frames, but whole ones: what a frame needs is what pieces, norms and blocks are cut by.
FEW = Sizes((4, 30, 52), (4, 44, 80), 1, {"t2v 480p93": (240, 416), "refine 720p189": (352, 640)}, 3)
TINY = Sizes((8, 8, 12), (8, 8, 12), 2, {"t2v 480p93": (32, 48), "refine 720p189": (64, 64)}, 3)


class Machine:
    """Counts a run's memory: on a CPU the bytes of all storages, on a GPU what its allocator has handed out."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        if device.type == "cpu":
            # Operators as plain functions: what is alive inside them is seen.
            namespace: Any = torch.ops.lcv_bsa
            namespace.select, namespace.attention = ops._select._init_fn, ops._attention._init_fn

    def peak(self, run: Callable[[], object]) -> int:
        gc.collect()
        rope_table.cache_clear()  # tables that are made once are part of what a job needs
        bsa_rows._places.cache_clear()
        with torch.no_grad():
            if self.device.type == "cuda":
                run()  # kernels are compiled, workspaces taken
                rope_table.cache_clear()
                torch.cuda.empty_cache()
            return peak_bytes(run, self.device)


def transformer_cases(config: DiTConfig, sizes: Sizes, m: Machine) -> Iterator[Case]:
    """One forward of one block and both ends."""
    model = build(dataclasses.replace(config, depth=1), m.device, m.dtype)
    jobs: list[tuple[str, Grid, int, BSAConfig | None]] = [
        ("t2v 480p93", sizes.t2v, 0, None),
        ("t2v 480p93 sparse", sizes.t2v, 0, config.bsa),
        ("continue 480p93 cached", sizes.t2v, sizes.cond, None),
        ("refine 720p189", sizes.refine, 0, config.bsa),
    ]
    device: Device = "cpu" if m.device.type == "cpu" else "gpu"
    if device == "gpu":
        jobs.append(("refine 720p189 8 bits", sizes.refine, 0, dataclasses.replace(config.bsa, eight_bits=True)))
    for name, (T, h, w), n_c, bsa in jobs:
        planned = forward_bytes(
            model.config, (T - n_c, h, w), num_cond_latents=n_c, cached=bool(n_c), text_length=TEXT_TOKENS,
            itemsize=m.dtype.itemsize, bsa=bsa, device=device, sparse=sparse_kernels(device),
        )  # fmt: skip
        run = _forward(model, (T, h, w), n_c, bsa, m)
        note = f"{n_c} latent frames from a cache" if n_c else ""
        yield Case(name, "forward", f"{T}x{h}x{w}", planned, run, note)


def _forward(model: Any, grid: Grid, n_c: int, bsa: BSAConfig | None, m: Machine) -> Callable[[], object]:
    config = model.config
    _, ph, pw = config.patch_size
    where: dict[str, Any] = {"device": m.device}
    latents = torch.randn(1, config.in_channels, grid[0], grid[1] * ph, grid[2] * pw, **where)
    text = torch.randn(1, TEXT_TOKENS, config.caption_channels, **where).to(m.dtype)
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.int64, **where)
    cache = model.build_kv_cache(latents[:, :, :n_c], bsa) if n_c else None
    noise, timestep = latents[:, :, n_c:].contiguous(), torch.full((1, grid[0] - n_c), 500.0, **where)
    return lambda: model(noise, timestep, text, mask, num_cond_latents=n_c, kv_cache=cache, bsa=bsa)


def vae_cases(config: VAEConfig, sizes: Sizes, m: Machine) -> Iterator[Case]:
    """Streamed, so that a clip's length does not matter."""
    vae = WanVAE(config, device=m.device, dtype=m.dtype).eval().requires_grad_(False)
    channels_last_(vae)
    how: Convolutions = "taps" if m.device.type == "cpu" else "triton" if sparse_kernels("gpu") == "triton" else "torch"
    for job, (height, width) in sizes.pixels.items():
        shape = (sizes.latents, height // SPACE_FACTOR, width // SPACE_FACTOR)
        itemsize = m.dtype.itemsize
        latents = torch.randn(1, config.z_dim, *shape, device=m.device)
        frames = TIME_FACTOR * (sizes.latents - 1) + 1
        pixels = torch.randn(1, 3, frames, height, width, device=m.device)

        def decode(latents: torch.Tensor = latents) -> None:
            for _ in vae.decode_stream(latents):
                pass

        text = f"{frames}x{height}x{width}"
        yield Case(job, "VAE decode", text, decode_bytes(config, shape, itemsize=itemsize, how=how), decode)
        planned = encode_bytes(config, shape, itemsize=itemsize, how=how)
        yield Case(job, "VAE encode", text, planned, lambda pixels=pixels: vae.encode(pixels))


def text_cases(config: TextConfig, m: Machine) -> Iterator[Case]:
    """In fp32 and with the attention that takes most, which is what the planner counts."""
    few = dataclasses.replace(config, num_layers=2, vocab_size=1024)
    model = build_text_model(few, dtype=torch.float32).to_empty(device=m.device)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64, device=m.device)
    planned = text_bytes(few, itemsize=4, device="cpu" if m.device.type == "cpu" else "gpu")
    run = lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids))  # noqa: E731  (typed, and short)
    yield Case("prompt", "text encode", f"1x{TEXT_TOKENS}", planned, run, "fp32, eager attention")


def planned_rows() -> Iterator[dict[str, str]]:
    """The planner's numbers of the released model at full size, by stage."""
    jobs = {
        "t2v 480p93": Job(guidance="off"),
        "t2v 480p93 fp8": Job(guidance="off", weight_dtype="fp8"),
        "continue 480p93": Job(num_cond_frames=13),
        "refine 720p189": Job(refine=Refine()),
    }
    for name, job in jobs.items():
        for stage in make_plan(job).stages:
            if name.startswith("refine") != stage.name.startswith("refine"):
                continue
            yield {
                "row": "planned", "job": name, "stage": stage.name, "dtype": job.weight_dtype,
                "planned_mib": f"{stage.total / MIB:.0f}", "weights_mib": f"{stage.weights / MIB:.0f}",
                "kv_cache_mib": f"{stage.kv_cache / MIB:.0f}", "note": "computed by the planner, full size, GPU",
            }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of memory.csv (default: beside this script)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some of the rows (default: all)")
    parser.add_argument("--append", action="store_true", help="add rows to the CSV that is there")
    parser.add_argument("--tiny", action="store_true", help="the tiny model on the CPU; its ratios say nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA GPU; leave it out to count on the CPU")
    return args


def cases_of(args: argparse.Namespace, m: Machine) -> Iterator[Case]:
    tiny = PRESETS["tiny"]
    sizes = TINY if args.tiny else FEW if m.device.type == "cpu" else FULL
    if "transformer" in args.only:
        yield from transformer_cases(tiny.dit if args.tiny else LONGCAT_VIDEO, sizes, m)
    if "vae" in args.only:
        yield from vae_cases(tiny.vae if args.tiny else WAN_VAE, sizes, m)
    if "text" in args.only:
        yield from text_cases(tiny.text if args.tiny else TextConfig(), m)


def main() -> int:
    args = parse()
    m = Machine(torch.device("cpu" if args.tiny else args.device), DTYPES[args.dtype])
    fixed = {
        "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(m.device),
        "torch": torch.__version__,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    goals: list[Goal] = []
    path = args.out / "memory.csv"
    new = not (args.append and path.exists())
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        for case in cases_of(args, m):
            counted = m.peak(case.run)
            ratio = case.planned / counted
            goals.append(Goal(f"{case.job}, {case.stage}: planned over counted", ratio, least=1.0, most=OVER))
            row = {
                "row": "counted", "job": case.job, "stage": case.stage, "shape": case.shape,
                "dtype": "fp32" if case.stage == "text encode" else args.dtype,
                "planned_mib": f"{case.planned / MIB:.1f}", "counted_mib": f"{counted / MIB:.1f}",
                "ratio": f"{ratio:.3f}", "note": "; ".join(filter(None, ["tiny" if args.tiny else "", case.note])),
            }  # fmt: skip
            writer.writerow(fixed | row)
            file.flush()
            print("  ".join(row.values()), flush=True)
        for row in planned_rows() if "planned" in args.only else ():
            writer.writerow(fixed | row)
            print("  ".join(row.values()), flush=True)
    print_goals(goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
