"""Speed and memory of lcv_core on this machine: correctness first, then one row per case (see README.md)."""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import dataclasses
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import gate
import torch
from cases import CASES, PAIRS
from measure import DTYPES, MIB, Measured, Setting, commit, device_name, matmul_ceiling, measure

RESULTS = Path(__file__).resolve().parent / "results.csv"
FULL_WIDTH = re.compile("block_|vae_.*_full")


# Rates and times are in the row's unit, memory is in MiB, speed in TFLOP/s.
COLUMNS: tuple[str, ...] = (
    "commit", "date", "device", "threads", "torch", "case", "shape", "dtype", "backend", "runs", "median", "min", "max",
    "unit", "tflops", "ceiling_tflops", "of_ceiling", "peak_mib", "above_baseline_mib", "note",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--scale", type=float, help="part of the latent frames in the full-width cases;"
                        " 1 is the released model's length (default: 1 on a GPU, 1/12 on a CPU)")  # fmt: skip
    parser.add_argument("--attention", default="sdpa", help="dense attention backend")
    parser.add_argument("--repeats", type=int, help="timed runs of a case (default 5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no further timed run of a case after this")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name has a match")
    parser.add_argument("--quick", action="store_true", help="show that it runs: no full-width cases, short lengths,"
                        " one timed run, no row written unless --out is given")  # fmt: skip
    parser.add_argument("--out", type=Path, help="CSV to append to (default: results.csv beside this script)")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a child process: measure this one, print JSON
    return parser.parse_args()


def setting_of(args: argparse.Namespace) -> Setting:
    name = args.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no CUDA GPU; try --device auto")
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.bfloat16 if cuda else torch.float32
    scale = args.scale or (1.0 if cuda else 1 / 12)
    if not 0 < scale <= 1:
        raise SystemExit(f"--scale must be in (0, 1], got {scale:g}")
    repeats = args.repeats or (1 if args.quick else 5)
    return Setting(device, dtype, scale, repeats, args.seconds, args.attention, args.quick)


def selected(args: argparse.Namespace) -> list[str]:
    """Case names that --only and --quick leave, in order."""
    names = [name for name in CASES if re.search(args.only, name)]
    return [name for name in names if not (args.quick and FULL_WIDTH.match(name))]


def run_case(name: str) -> Measured | str:
    """Measure in a fresh process, so that no case sees another's memory or warm caches; or why it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return last[0]
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_memory_case(name: str, processes: int) -> Measured | str:
    """The run with the median peak of several processes: what an allocator keeps differs by some percent."""
    results: list[Measured] = []
    for _ in range(processes):
        result = run_case(name)
        if isinstance(result, str):
            return result
        results.append(result)
    results.sort(key=lambda m: m.peak)
    middle = results[(processes - 1) // 2]
    peaks = ", ".join(f"{m.peak / MIB:.0f}" for m in results)
    return dataclasses.replace(middle, note="; ".join(filter(None, [middle.note, f"peaks {peaks} MiB"])))


class Report:
    """Makes rows, prints them and appends them to the CSV."""

    def __init__(self, setting: Setting, out: Path | None, *, ceiling: float, note: str) -> None:
        self.out, self.ceiling, self.note = out, ceiling, note
        self.fixed: dict[str, str] = {
            "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(setting.device),
            "threads": str(torch.get_num_threads()), "torch": torch.__version__, "dtype": setting.dtype_name,
        }  # fmt: skip

    def measured(self, name: str, m: Measured) -> None:
        if m.frames is None:
            unit, values = "s", m.seconds
        else:
            unit, values = "frames/s", [m.frames / s for s in m.seconds]
        speed = None if m.flops is None else m.flops / median(m.seconds)
        self._write(
            name, values, unit, shape=m.shape, backend=m.backend, note=m.note,
            tflops="" if speed is None else f"{speed / 1e12:.4g}",
            ceiling_tflops="" if speed is None else f"{self.ceiling / 1e12:.4g}",
            of_ceiling="" if speed is None else f"{speed / self.ceiling:.2f}",
            peak_mib=f"{m.peak / MIB:.0f}", above_baseline_mib=f"{(m.peak - m.baseline) / MIB:.0f}",
        )  # fmt: skip

    def ratio(self, name: str, short: Measured, long: Measured) -> None:
        above = (long.peak - long.baseline) / max(1, short.peak - short.baseline)
        note = f"peak of long / peak of short, above the baseline {above:.3f}"
        if long.peak > 1.05 * short.peak:
            note += "; OVER 1.05"
        self._write(
            f"{name}_ratio", [long.peak / short.peak], "ratio", shape=f"{long.shape} / {short.shape}", note=note
        )

    def _write(self, name: str, values: list[float], unit: str, *, note: str = "", **cells: str) -> None:
        numbers = {"median": median(values), "min": min(values), "max": max(values)}
        cells |= {key: f"{value:.4g}" for key, value in numbers.items()}
        cells |= {
            "case": name,
            "unit": unit,
            "runs": str(len(values)),
            "note": "; ".join(filter(None, [note, self.note])),
        }
        row = dict.fromkeys(COLUMNS, "") | self.fixed | cells
        line = f"{name:24} {row['median']:>8} {unit:8} [{row['min']} .. {row['max']}] n={row['runs']}"
        if row["tflops"]:
            line += f"  {row['tflops']} TFLOP/s = {row['of_ceiling']} of matmul"
        if row["peak_mib"]:
            line += f"  peak {row['peak_mib']} MiB, {row['above_baseline_mib']} above baseline"
        print("  ".join(filter(None, [line, row["shape"], row["backend"], row["note"]])), flush=True)
        if self.out is not None:
            self._append(self.out, row)

    @staticmethod
    def _append(path: Path, row: dict[str, str]) -> None:
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def gated(setting: Setting) -> str:
    """Stops everything when the numbers are wrong; a note for the rows where they could not be checked."""
    failures = gate.check(setting)
    if failures is None:
        print("no golden vectors in this checkout (tests/parity/golden): the numbers below are unchecked")
        return "unchecked: no golden vectors"
    if failures:
        raise SystemExit("wrong numbers, so no timings:\n  " + "\n  ".join(failures))
    print(f"correctness: DiT and VAE agree with the golden vectors on {setting.device} in {setting.dtype_name}")
    return ""


def main() -> int:
    args = parse()
    if args.list:
        print("\n".join(selected(args)))
        return 0
    setting = setting_of(args)
    if args.case:
        print(json.dumps(dataclasses.asdict(measure(CASES[args.case](setting), setting))))
        return 0
    note = gated(setting)
    ceiling = matmul_ceiling(setting)
    out = args.out or (None if args.quick else RESULTS)
    report = Report(setting, out, ceiling=ceiling, note="; ".join(filter(None, [note, "quick" if args.quick else ""])))
    print(f"{report.fixed['device']}, {torch.get_num_threads()} threads: matmul {ceiling / 1e12:.4g} TFLOP/s")
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()  # the cases run in processes of their own
    results: dict[str, Measured] = {}
    failed = False
    for name in selected(args):
        memory = any(name in pair for pair in PAIRS.values())
        result = run_memory_case(name, 1 if args.quick else 3) if memory else run_case(name)
        if isinstance(result, str):
            failed = True
            print(f"{name:24} FAILED: {result}", flush=True)
            continue
        results[name] = result
        report.measured(name, result)
        for pair, (short, long) in PAIRS.items():
            if name == long and short in results:
                report.ratio(pair, results[short], result)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
