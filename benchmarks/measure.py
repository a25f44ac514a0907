"""Timing, peak memory and the machine's description: what every benchmark row is made of."""

from __future__ import annotations

import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.extend([str(ROOT), str(ROOT / "lcv_bsa" / "src")])  # last: an installed lcv_core goes first
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """How the cases of one invocation run.

    scale: part of the released model's latent frames in the full-width cases, in (0, 1].
    repeats: timed runs of a case, at most; no new one starts once they have taken `seconds` in all.
    """

    device: torch.device
    dtype: torch.dtype
    scale: float
    repeats: int
    seconds: float
    attention: str
    quick: bool

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


@dataclass
class Work:
    """One case made ready: the models are loaded, nothing has run.

    run: does it once. flops: multiplications and additions of one run. frames: video frames of one run; the row then
    speaks of frames/s. once: a memory case, run a single time and without a warm-up.
    """

    run: Callable[[], object]
    shape: str
    backend: str = ""
    flops: float | None = None
    frames: int | None = None
    once: bool = False
    note: str = ""


@dataclass
class Measured:
    """seconds: of each timed run. peak, baseline: bytes at the worst moment and before the first run, models loaded:
    resident memory of the process on a CPU, memory allocated on the GPU otherwise."""

    shape: str
    backend: str
    flops: float | None
    frames: int | None
    note: str
    seconds: list[float]
    peak: int
    baseline: int


def measure(work: Work, setting: Setting) -> Measured:
    """Warm up (twice; once where the first run takes long), then time. Call it in a process of the case's own."""
    cuda = setting.device.type == "cuda"
    exact = reset_peak_rss()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated() if cuda else rss()
    with torch.no_grad():
        if not work.once and seconds_of(work.run, cuda) < setting.seconds / 10:
            work.run()
        seconds = [seconds_of(work.run, cuda)]
        while not work.once and len(seconds) < setting.repeats and sum(seconds) < setting.seconds:
            seconds.append(seconds_of(work.run, cuda))
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss()
    notes = [work.note]
    if cuda:
        notes.append(f"host peak {peak_rss() // MIB} MiB")
    elif not exact:
        notes.append("peak includes loading")
    note = "; ".join(filter(None, notes))
    return Measured(work.shape, work.backend, work.flops, work.frames, note, seconds, peak, baseline)


def seconds_of(run: Callable[[], object], cuda: bool) -> float:
    """Wall time of one run: CUDA events around it, or the processor's clock."""
    if not cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _status(field: str) -> int | None:
    """A memory field of this process in bytes, where there is a /proc."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def rss() -> int:
    """Resident memory now, bytes; 0 where the system does not tell."""
    return _status("VmRSS") or 0


def peak_rss() -> int:
    """Most resident memory so far, bytes. VmHWM rather than getrusage: ru_maxrss survives exec, so a child would
    report its parent's peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> bool:
    """Let `peak_rss` start again from now; False where the system does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def matmul_ceiling(setting: Setting) -> float:
    """FLOP/s of a large square matmul in the same dtype, the best of several: what nothing here can exceed by much."""
    n = 8192 if setting.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=setting.device, dtype=setting.dtype) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, setting.device.type == "cuda") for _ in range(8)]
    return 2 * n**3 / min(seconds)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, "+dirty" with changes other than new results; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()  # fmt: skip

    try:
        head = git("rev-parse", "--short", "HEAD")
        dirty = git("status", "--porcelain", "--", ".", ":!benchmarks/results.csv")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if dirty else head
