"""How fast, and in how much memory, a checkpoint of the released size is opened, streamed from disk and converted.

The files have the official names, headers, dtype (fp32), six shards and 54 GB, and take no room on the disk: their data
is a hole, which reads as zeros. So what is measured is this repository's own part; a disk's speed comes on top, as
bytes over its rate. Every case runs in a process of its own; memory is VmHWM, all of the process.
"""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import dataclasses
import datetime
import json
import multiprocessing
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measure import MIB, commit, device_name, peak_rss

from lcv_core.config import LONGCAT_VIDEO, DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.weights.write import write_json

OUT = Path(__file__).with_name("loading.csv")
SHARD = 10_000_000_000  # bytes, the official limit
STEM = "diffusion_pytorch_model"
FIELDS = (
    "commit",
    "date",
    "device",
    "threads",
    "torch",
    "case",
    "blocks",
    "seconds",
    "cpu_seconds",
    "peak_mib",
    "of_shard",
    "note",
)
Result = tuple[tuple[float, float], int, str]  # seconds passed and of the processor, peak bytes, note


def write_sparse(folder: Path, config: DiTConfig) -> int:
    """A transformer in the official layout without data; the bytes of its largest shard."""
    shapes = {n: tuple(t.shape) for n, t in LongCatDiT(config, device="meta", dtype=torch.float32).state_dict().items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    sizes = [0]
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        if sizes[-1] + size > SHARD:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = shape
        sizes[-1] += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"{STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_sparse_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    write_json(
        folder / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    )
    write_json(folder / "config.json", config.to_dict())
    return max(sizes)


def write_sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """fp32 tensors without data."""
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as out:
        out.truncate(8 + len(text) + start)


class Clock:
    """Seconds that passed, and that all threads of this process computed: what a busy machine does not change much."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def open_headers(model: Path, target: Path) -> Result:
    from lcv_core.weights.checkpoint import open_checkpoint

    clock = Clock()
    checkpoint = open_checkpoint(model)
    seconds = clock.read()
    files = checkpoint.dit_tensors.store.files  # type: ignore[attr-defined]
    total = sum(file.size for file in files)
    return seconds, peak_rss(), f"{len(files)} shards, {total / 1e9:.1f} GB; headers checked, no weights read"


def first_block(model: Path, target: Path) -> Result:
    from lcv_core.weights.checkpoint import open_checkpoint

    clock = Clock()
    dit = open_checkpoint(model).load_dit(dtype=torch.bfloat16, streaming="disk")
    assert dit._in_turn is not None
    next(iter(dit._in_turn))
    seconds = clock.read()
    peak = peak_rss()
    dit.stop_streaming()
    return seconds, peak, "from opening to the first block in bf16"


def a_pass(model: Path, target: Path) -> Result:
    from lcv_core.weights.checkpoint import open_checkpoint

    dit = open_checkpoint(model).load_dit(dtype=torch.bfloat16, streaming="disk")
    assert dit._in_turn is not None
    clock, count = Clock(), 8
    for _ in islice(dit._in_turn, count):
        pass
    seconds, peak = clock.read(), peak_rss()
    dit.stop_streaming()
    return (
        seconds,
        peak,
        f"the first {count} blocks in turn in bf16, nothing computed: {seconds[0] / count:.2f} s a block",
    )


def converted(form: Any) -> Callable[[Path, Path], Result]:
    def run(model: Path, target: Path) -> Result:
        from lcv_core.weights.convert import convert

        clock = Clock()
        report = convert(model, target, form)
        note = f"{report.source_bytes / 1e9:.1f} to {report.nbytes / 1e9:.1f} GB"
        return clock.read(), peak_rss(), note

    return run


CASES: dict[str, Callable[[Path, Path], Result]] = {
    "open": open_headers, "first_block": first_block, "pass": a_pass,
    "convert_fp8": converted("fp8"), "convert_q8_0": converted("q8_0"),
}  # fmt: skip


def _work(case: str, model: Path, target: Path, out: Any) -> None:
    out.send(CASES[case](model, target))


def measure(case: str, model: Path, target: Path) -> Result:
    """In a fresh process, so that what one case touched does not count for another."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(case, model, target, send))
    process.start()
    send.close()
    result: Result = receive.recv()
    process.join()
    return result


def row(case: str, blocks: int, result: Result, shard: int) -> dict[str, Any]:
    (seconds, cpu_seconds), peak, note = result
    return {
        "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "case": case, "blocks": blocks,
        "seconds": f"{seconds:.4g}", "cpu_seconds": f"{cpu_seconds:.4g}", "peak_mib": round(peak / MIB),
        "of_shard": f"{peak / shard:.3f}", "note": note,
    }  # fmt: skip


def extrapolated(seconds: float, blocks: int, depth: int) -> str:
    return f"; {blocks} of {depth} blocks, all take about {seconds * depth / blocks:.0f} s and the same memory"


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, list(FIELDS), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that are converted (4); the note says so")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV that rows are appended to")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        if args.only and args.only not in case:
            continue
        depth = LONGCAT_VIDEO.depth
        blocks = min(args.blocks, depth) if case.startswith("convert") else depth
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "dit"
            model.mkdir()
            shard = write_sparse(model, dataclasses.replace(LONGCAT_VIDEO, depth=blocks))
            result = measure(case, model, Path(folder) / "converted")
        if blocks != depth:
            shard = SHARD
            result = (*result[:2], result[2] + extrapolated(result[0][0], blocks, depth))
        rows.append(row(case, blocks, result, shard))
        print(", ".join(f"{key} {value}" for key, value in list(rows[-1].items())[5:]), flush=True)
    append(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
