"""Time, memory and the machine's description: what every row is made of."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Limits:
    """repeats: timed runs at most, 1 at least. seconds: no new run starts once the timed ones took this long."""

    repeats: int = 20
    seconds: float = 10.0


@dataclass(frozen=True)
class Timing:
    """ms: of each timed run. peak_bytes: memory one run needed at its worst moment beyond what was there before it."""

    ms: list[float]
    peak_bytes: int

    @property
    def median(self) -> float:
        return median(self.ms)


def measure(run: Callable[[int], object], device: torch.device, limits: Limits) -> Timing:
    """Warm up, take the peak memory of one run, then time. `run` gets the number of the run, to rotate its inputs."""
    first = _ms(run, 0, device)
    peak = _peak(lambda: run(1), device)
    if first < 1e3 * limits.seconds / 8:
        run(2)
    count = limits.repeats
    times = [_ms(run, 0, device)]
    if device.type == "cuda":
        # queued without a wait in between: a launch is then hidden behind the run before it
        count = max(1, min(limits.repeats, int(1e3 * limits.seconds / max(times[0], 1e-3))))
        return Timing(_queued(run, count), peak)
    while len(times) < count and sum(times) < 1e3 * limits.seconds:
        times.append(_ms(run, len(times), device))
    return Timing(times, peak)


def _ms(run: Callable[[int], object], number: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _queued(lambda _: run(number), 1)[0]
    start = time.perf_counter()
    run(number)
    return 1e3 * (time.perf_counter() - start)


def _queued(run: Callable[[int], object], count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for number, (begin, end) in enumerate(events):
        begin.record()
        run(number)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes above the level before: allocated on a GPU, resident on a CPU (0 where the system does not tell)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # what earlier runs freed is handed back first, or the next run would use it again without a trace
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    with suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return 0


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache level: what rotated inputs have to exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    with suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    return 32 << 20


def matmul_ceiling(dtype: torch.dtype, device: torch.device, *, side: int | None = None) -> float:
    """FLOP/s of a large square matmul, the best of several: what nothing here can exceed by much."""
    n = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = min(measure(lambda _: a @ b, device, Limits(10, 3.0)).ms)
    return 2 * n**3 / best * 1e3


def copy_ceiling(device: torch.device, *, size: int = 1 << 30) -> float:
    """Bytes/s of a device copy, read and written ones counted."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / min(measure(lambda _: b.copy_(a), device, Limits(10, 3.0)).ms) * 1e3


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, "+dirty" with changes other than new results; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        dirty = _git("status", "--porcelain", "--", "../src", ".", ":!*.csv", ":!*.png")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if dirty else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()


def triton_version() -> str:
    """Of the installed Triton, "" where there is none; it is not imported."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
