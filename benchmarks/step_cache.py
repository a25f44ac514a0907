"""Step caching on the miniature: steps saved, error of the reused steps, and what becomes of the frames.

    python benchmarks/step_cache.py                  # ten prompts, 50 steps, a row per budget to step_cache.csv
    python benchmarks/step_cache.py --schedule distilled --steps 16 --guidance 1
    python benchmarks/step_cache.py --prompts 2 --steps 12 --quick

Error: of each reused step the velocity that the network gives at that step's own latents is computed as well; the
relative L2 distance of what was integrated, guidance included. Frames: PSNR and SSIM against the run without a cache,
and what the judges of `lcv eval` give for what the prompt names, from 0 to 1. The prompts are of combinations that the
miniature's training never saw.
"""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import commit
from torch import Tensor

from lcv_core import schedule
from lcv_core.denoise import Guidance, StepInfo, _Predictor, denoise
from lcv_core.pipelines.base import Components, decode_latents, draw_noise
from lcv_core.shapes import latent_shape
from lcv_core.text.encoder import TextStates
from lcv_core.training.evaluation.cases import Case, make_cases  # noqa: TID251
from lcv_core.training.evaluation.judge import reward  # noqa: TID251
from lcv_core.training.evaluation.metrics import psnr, ssim  # noqa: TID251
from lcv_core.weights.checkpoint import open_checkpoint

RESULTS = Path(__file__).resolve().parent / "step_cache.csv"
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)
COLUMNS: tuple[str, ...] = (
    "commit", "model", "schedule", "steps", "guidance", "prompts", "budget", "reused", "blocks_run", "error_mean",
    "error_p95", "error_max", "over_budget", "latents_error", "psnr", "psnr_min", "ssim", "judged",
)  # fmt: skip


@dataclass
class Measured:
    """One clip: true errors of its reused steps, its steps, its frames and latents."""

    errors: list[float]
    reused: int
    frames: Tensor
    latents: Tensor


class Watch:
    """The error of each reused step against the velocity that the whole network gives there."""

    def __init__(self, predict: _Predictor, start: Tensor) -> None:
        self.predict, self.before = predict, start
        self.errors: list[float] = []

    def __call__(self, info: StepInfo) -> None:
        if info.reused:
            true, _ = self.predict(self.before, info.sigma, 0)
            used = (info.denoised - self.before) / info.sigma
            self.errors.append(((used - true).norm() / true.norm()).item())
        self.before = info.latents


def clip(c: Components, states: TextStates, negative: TextStates, seed: int, budget: float, args: Any) -> Measured:
    native = c.native
    shape = (1, *latent_shape(native.num_frames, native.height, native.width))
    start = draw_noise(shape, torch.Generator().manual_seed(seed))
    guidance = Guidance(args.guidance, negative if args.guidance > 1 else None)
    watch = Watch(_Predictor(c.dit, states, guidance, 0, None, None), start)
    sigmas = getattr(schedule, args.schedule)(args.steps, flow_shift=c.flow_shift)
    latents = denoise(c.dit, start, sigmas, text=states, guidance=guidance, step_cache=budget, on_step=watch)
    return Measured(watch.errors, len(watch.errors), decode_latents(c, latents)[0], latents)


def row(
    budget: float, made: list[Measured], plain: list[Measured], cases: list[Case], depth: int, args: Any
) -> dict[str, str]:
    errors = sorted(error for m in made for error in m.errors)
    reused = mean(m.reused / args.steps for m in made)
    decibels = [psnr(m.frames, p.frames) for m, p in zip(made, plain, strict=True)]
    drift = [((m.latents - p.latents).norm() / p.latents.norm()).item() for m, p in zip(made, plain, strict=True)]
    return {
        "commit": commit(), "model": "mini", "schedule": args.schedule, "steps": str(args.steps),
        "guidance": f"{args.guidance:g}", "prompts": str(len(made)), "budget": f"{budget:g}", "reused": f"{reused:.3f}",
        "blocks_run": f"{1 - reused * (depth - 1) / depth:.3f}",
        "error_mean": f"{mean(errors or [0.0]):.4f}", "error_p95": f"{(errors or [0.0])[int(0.95 * len(errors))]:.4f}"
        if errors else "0", "error_max": f"{max(errors or [0.0]):.4f}",
        "over_budget": f"{mean([error > budget for error in errors] or [0]):.3f}",
        "latents_error": f"{mean(drift):.4f}", "psnr": f"{mean(decibels):.1f}", "psnr_min": f"{min(decibels):.1f}",
        "ssim": f"{mean(ssim(m.frames, p.frames) for m, p in zip(made, plain, strict=True)):.4f}",
        "judged": f"{mean(reward(m.frames, case.prompt) for m, case in zip(made, cases, strict=True)):.3f}",
    }  # fmt: skip


def write(values: dict[str, str], out: Path | None) -> None:
    print("  ".join(f"{key} {values[key]}" for key in COLUMNS[6:]), flush=True)
    if out is None:
        return
    new = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--schedule", choices=["base", "distilled"], default="base")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--quick", action="store_true", help="writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    checkpoint = open_checkpoint("mini")
    dit, vae = checkpoint.load_dit(dtype=torch.float32), checkpoint.load_vae(dtype=torch.float32)
    c = Components(dit, vae, adapters=checkpoint.adapters, native=checkpoint.native)
    c.flow_shift = checkpoint.flow_shift or c.flow_shift
    encoder = checkpoint.load_text_encoder(dtype=torch.float32)
    cases = make_cases(1, range(args.prompts))
    texts = [encoder.encode([case.prompt]) for case in cases]
    negative = encoder.encode([""])
    with c.adapter("distill") if args.schedule == "distilled" else nullcontext(), torch.no_grad():
        plain: list[Measured] = []
        for budget in (0.0, *args.budgets):
            made = [clip(c, states, negative, seed, budget, args) for seed, states in enumerate(texts)]
            plain = plain or made
            write(row(budget, made, plain, cases, dit.config.depth, args), None if args.quick else args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
