"""Times of single parts with cold caches, their peak memory, and what the device can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from lcv_core.live_bytes import LiveBytes

Run = Callable[[], object]
_FLUSH = 4  # times the L2 cache are overwritten before each run


def peak_bytes(run: Run, device: torch.device) -> int:
    """Bytes that a run needs at its worst moment beyond what was there: alive on a CPU, allocated on a GPU."""
    if device.type == "cpu":
        with LiveBytes() as live:
            run()
        return live.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Timed:
    """ms: of each timed run. peak: bytes that one run needed beyond what was there before it."""

    ms: list[float]
    peak: int

    @property
    def median(self) -> float:
        return median(self.ms)


@dataclass
class Clocks:
    """repeats: timed runs of a part at most, one at least. seconds: no further run is begun after that many."""

    device: torch.device
    dtype: torch.dtype
    repeats: int = 10
    seconds: float = 2.0
    side: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0

    def __post_init__(self) -> None:
        self._flush: Tensor | None = None
        if self.cuda:
            size = _FLUSH * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=self.device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def time(self, run: Run, *, peak: bool = True) -> Timed:
        """Two warm-up runs, of which the second is the one whose memory is counted; then the timed ones."""
        with torch.inference_mode():
            first = self._ms(run)
            most = peak_bytes(run, self.device) if peak else 0
            ms = [self._ms(run)]
            while len(ms) < self.repeats and sum(ms) + first / 10 < 1e3 * self.seconds:
                ms.append(self._ms(run))
        return Timed(ms, most)

    def _ms(self, run: Run) -> float:
        if self._flush is None:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # also keeps the GPU busy while the run's first kernels are being launched
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    # -- ceilings -----------------------------------------------------------------------------------------------------

    def measure_ceilings(self, forms: tuple[str, ...]) -> None:
        """FLOP/s of a large square matmul in the activations' dtype and in each eight-bit form that the device has;
        bytes/s of a copy, read and written ones counted."""
        n = self.side or (8192 if self.cuda else 1024)
        for form in ("plain", *forms):
            run = self._square(form, n)
            if run is not None:
                self.rates[form] = 2e3 * n**3 / min(self.time(run, peak=False).ms)
        size = (1 << 30) if self.cuda else n * n * 64
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2e3 * size / min(self.time(lambda: target.copy_(source), peak=False).ms)

    def _square(self, form: str, n: int) -> Run | None:
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        if form == "plain":
            return lambda: a @ b
        if form == "int8-matmul":
            c, d = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (a, b))
            return lambda: torch.ops.aten._int_mm(c, d.t())
        if not form.startswith("fp8") or not self.cuda:
            return None
        e, f = (x.to(torch.float8_e4m3fn) for x in (a, b))
        scale_a, scale_b = torch.ones(n, 1, device=self.device), torch.ones(1, n, device=self.device)
        return lambda: torch.ops.aten._scaled_mm(
            e, f.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def limit_ms(self, form: str, matmul: float, attention: float, moved: float) -> float | None:
        """The least a part can take: its arithmetic at the measured rates, or its bytes at the measured bandwidth."""
        if form not in self.rates or not self.bandwidth:
            return None
        attends = "fp8-all" if form == "fp8-all" else "plain"
        return 1e3 * max(matmul / self.rates[form] + attention / self.rates[attends], moved / self.bandwidth)
