"""A whole job of a model of the released size, prompt to frames, on a GPU of which few GB are left.

    python benchmarks/small_card.py --vram 12 --ram 32 --steps 2 --out small_card.csv

Other memory of the GPU is taken by a process beside it, so what does not fit fails as it would on a small card; `--ram`
is what the job is told that the system has. The transformer's and the text encoder's files have official names,
headers, dtype (fp32) and lengths and no data, which reads as zeros: memory and transfers do not depend on values. The
VAE's weights are random. What is compared is the plan (`lcv plan`) with the allocator's peak, and with what the process
holds of system memory, files' pages not counted.
"""

from __future__ import annotations

import argparse  # noqa: TID251  (the law is about lcv_core; this is a script)
import csv
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from loading import write_sparse, write_sparse_file
from measure import commit, device_name

from lcv_core.cli.main import run
from lcv_core.config import LONGCAT_VIDEO, WAN_VAE, Native, TextConfig
from lcv_core.planning import machine
from lcv_core.text.encoder import build_text_model
from lcv_core.text.vocabulary import write_tokenizer
from lcv_core.weights.init import SCHEDULER_CONFIG, vae_state
from lcv_core.weights.write import write_json, write_tensors

GB = 1e9
COLUMNS: tuple[str, ...] = (
    "commit", "date", "device", "torch", "job", "vram_gb", "ram_gb", "chosen", "seconds", "planned_vram_gb",
    "peak_vram_gb", "reserved_vram_gb", "planned_ram_gb", "peak_ram_gb", "note",
)  # fmt: skip
_HOLD = """
import sys, torch
torch.zeros(1, device="cuda")
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(0, free - int(float(sys.argv[1]) * 2**30)), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def write_model(folder: Path) -> None:
    """A checkpoint in the official layout: 54 GB and 23 GB of holes, and a VAE."""
    for part in ("dit", "vae", "text_encoder"):
        (folder / part).mkdir(parents=True)
    native = Native(height=480, width=832, num_frames=93, num_cond_frames=13, frame_rate=15.0)
    write_json(folder / "model_index.json", {"model_name": "LongCat-Video", "native": dataclasses.asdict(native)})
    write_sparse(folder / "dit", LONGCAT_VIDEO)
    text = TextConfig()
    shapes = {n: tuple(t.shape) for n, t in build_text_model(text, dtype=torch.float32).state_dict().items()}
    write_sparse_file(folder / "text_encoder" / "model.safetensors", shapes)
    write_json(folder / "text_encoder" / "config.json", text.to_dict())
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "vae" / "config.json", WAN_VAE.to_dict())
    write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae_state(WAN_VAE))
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)


@contextmanager
def others_hold(vram: float) -> Iterator[None]:
    """Another process takes all of the GPU but so many GiB."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(vram)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        if other.stdout.readline().strip() != "held":
            raise SystemExit("the process that takes the GPU's other memory could not")
        try:
            yield
        finally:
            other.kill()


class Resident(threading.Thread):
    """The most that this process holds of system memory, without pages of files, a few times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.going = 0, True

    def run(self) -> None:
        while self.going:
            self.peak = max(self.peak, held())
            time.sleep(0.1)


def held() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def told(ram: float) -> None:
    """Whoever asks how much system memory is free hears that of a machine of `ram` GB."""
    machine.free_ram = lambda: int(ram * GB - machine.OUTSIDE_RAM)


def planned(arguments: list[str], vram: float, ram: float) -> dict[str, Any]:
    out = StringIO()
    with redirect_stdout(out):
        code = run(["plan", *arguments, "--json", "--vram", str(vram * 2**30 / GB), "--ram", str(ram)])
    if code != 0:
        raise SystemExit(f"there is no plan: {out.getvalue()}")
    return json.loads(out.getvalue())


def measure(args: argparse.Namespace, model: Path, out: Path) -> dict[str, str]:
    common = ["-m", str(model), "-g", "1", *args.option]
    plan = planned(["t2v", *common], args.vram, args.ram)
    told(args.ram)
    resident = Resident()
    resident.start()
    start = time.perf_counter()
    code = run(["t2v", "-p", "a red cube", "--steps", str(args.steps), "--seed", "1", "-o", str(out), *common])
    seconds = time.perf_counter() - start
    resident.going = False
    frames = len(list(out.glob("*.png")))
    return summary(plan) | {
        "job": f"t2v 480p93, {args.steps} steps", "vram_gb": str(args.vram), "ram_gb": str(args.ram),
        "seconds": f"{seconds:.1f}", "peak_vram_gb": f"{torch.cuda.max_memory_allocated() / GB:.2f}",
        "reserved_vram_gb": f"{torch.cuda.max_memory_reserved() / GB:.2f}", "peak_ram_gb": f"{resident.peak / GB:.2f}",
        "note": f"exit {code}, {frames} frames; {' '.join(args.option)}".strip("; "),
    }  # fmt: skip


def summary(plan: dict[str, Any]) -> dict[str, str]:
    """The peaks of what is chosen, and what that is."""
    first = plan["steps"][0]
    return {
        "planned_vram_gb": f"{first['vram'] / GB:.2f}", "planned_ram_gb": f"{first['ram'] / GB:.2f}",
        "chosen": "; ".join(why.split(":")[0] for why in plan["why"]),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram", type=float, default=12.0, help="GiB of the card (default 12)")
    parser.add_argument("--ram", type=float, default=32.0, help="GB of system memory that the job hears of")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--option", nargs="*", default=[], help="more options of lcv t2v")
    parser.add_argument("--out", type=Path, default=Path("small_card.csv"), help="a row is appended")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch sees no CUDA GPU")
    return args


def main() -> int:
    args = parse()
    fixed = {
        "commit": commit(), "date": datetime.date.today().isoformat(), "device": device_name(torch.device("cuda")),
        "torch": torch.__version__,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, others_hold(args.vram):
        model = Path(folder) / "model"
        write_model(model)
        row = fixed | measure(args, model, Path(folder) / "frames")
    print("  ".join(row.values()))
    new = not args.out.exists()
    with args.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
