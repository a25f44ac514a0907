"""What a job runs on: memory that is free, and how fast it computes and moves bytes.

Speeds are for estimates of time alone. A GPU's is its peak for bf16 with sums in fp32, without sparsity, and its memory
bandwidth, both as NVIDIA states them: the white papers of GA102, Ada, and RTX Blackwell for the RTX cards (whose rate
with fp32 sums is twice that of fp32 on the shaders, half of what is printed on the box), and the data sheets of A100,
L4, L40S, RTX A6000, H100 SXM and H200. Links are PCIe at about 80 % of its signalling rate: 25 GB/s for 16 lanes of
generation 4, 50 of generation 5, 12 for the 4060 Ti's 8 lanes. A CPU's rate is measured, and that of a GPU that is not
in the table.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lcv_core.errors import InputError
from lcv_core.planning.sparse import Device

# Bytes that are not for a job: CUDA's context, its libraries' workspaces and a screen; the system and this process.
OUTSIDE_VRAM = 600_000_000
OUTSIDE_RAM = 3_000_000_000
_CGROUP = Path("/sys/fs/cgroup")
_DISK = 2e9  # bytes a second; an NVMe drive of the slower kind
_CPU_MEMORY = 20e9  # bytes a second; two channels
_CALIBRATION = 1024  # rows of the matrices that are multiplied to measure a rate


@dataclass(frozen=True)
class Speed:
    """flops: floating point operations a second of large matrix products in bf16 (on a CPU as measured). memory, link,
    disk: bytes a second of the device's memory, between system memory and device, and from disk."""

    flops: float
    memory: float
    link: float
    disk: float = _DISK


_CPU = Speed(0.3e12, _CPU_MEMORY, _CPU_MEMORY)
_GPU = Speed(60e12, 500e9, 25e9)


@dataclass(frozen=True)
class Machine:
    """free: bytes of the device that a job can have; on a CPU those of system memory, like `ram`."""

    name: str
    device: Device
    free: int
    ram: int
    speed: Speed

    def limited(self, vram: float | None, ram: float | None) -> Machine:
        """With other sizes, in GB (1e9 bytes) of the whole machine: what is not for a job is taken off."""
        machine = self
        if ram is not None:
            kept = _at_least_something(ram * 1e9 - OUTSIDE_RAM, "--ram", ram, OUTSIDE_RAM)
            machine = replace(machine, ram=kept, free=kept if machine.device == "cpu" else machine.free)
        if vram is not None:
            if machine.device == "cpu":
                raise InputError(
                    "--vram is a GPU's memory, and this plan is for the CPU; use --ram, or name a --device"
                )
            kept = _at_least_something(vram * 1e9 - OUTSIDE_VRAM, "--vram", vram, OUTSIDE_VRAM)
            machine = replace(machine, free=kept)
        return machine


def _at_least_something(size: float, option: str, given: float, outside: int) -> int:
    if size <= 0:
        raise InputError(f"{option} {given:g} leaves nothing for a job: {outside / 1e9:g} GB are not for it")
    return int(size)


# name: (GiB, TFLOPS, GB/s of memory, GB/s of the link)
_CARDS: dict[str, tuple[float, float, float, float]] = {
    "rtx3060": (12, 25.5, 360, 25), "rtx3090": (24, 71, 936, 25),
    "rtx4060ti": (16, 44.1, 288, 12), "rtx4070": (12, 58.3, 504, 25), "rtx4070tisuper": (16, 88.2, 672, 25),
    "rtx4080": (16, 97.5, 717, 25), "rtx4090": (24, 165.2, 1008, 25),
    "rtx5070": (12, 61.7, 672, 50), "rtx5070ti": (16, 87.9, 896, 50), "rtx5080": (16, 112.6, 960, 50),
    "rtx5090": (32, 209.5, 1792, 50),
    "rtxa6000": (48, 154.8, 768, 25), "l4": (24, 121, 300, 25), "l40s": (48, 362, 864, 25),
    "a100": (80, 312, 2039, 25), "h100": (80, 989.4, 3350, 50), "h200": (141, 989.4, 4800, 50),
}  # fmt: skip
CARDS = tuple(_CARDS)


def machine_named(name: str) -> Machine:
    """A machine with a card of the table, 32 GB of system memory, and nothing else on it. InputError for another."""
    card = _card_of(name)
    if card is None:
        raise InputError(f'unknown device "{name}"; use cpu, cuda, or one of: {", ".join(CARDS)}')
    size, flops, memory, link = _CARDS[card]
    speed = Speed(flops * 1e12, memory * 1e9, link * 1e9)
    return Machine(card, "gpu", int(size * 2**30) - OUTSIDE_VRAM, 32_000_000_000 - OUTSIDE_RAM, speed)


def _card_of(name: str) -> str | None:
    """ "NVIDIA GeForce RTX 4070 Ti SUPER" is "rtx4070tisuper"; the longest name of the table that is in it."""
    plain = "".join(c for c in name.lower() if c.isalnum())
    plain = plain.removeprefix("nvidia").removeprefix("geforce")
    exact = [card for card in CARDS if plain == card]
    inside = [card for card in CARDS if plain.startswith(card) and not plain[len(card) :].startswith(("ti", "super"))]
    return max(exact or inside, key=len, default=None)


def this_machine(device: torch.device, *, measured: bool = False) -> Machine:
    """The machine this runs on, with what is free on it now. measured: rates that are not in the table are measured,
    else taken for those of a desktop."""
    ram = free_ram()
    if device.type != "cuda":
        return Machine("CPU", "cpu", ram, ram, _measured(device, torch.float32) if measured else _CPU)
    name = torch.cuda.get_device_name(device)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    card = _card_of(name)
    speed = machine_named(card).speed if card else _measured(device, torch.bfloat16) if measured else _GPU
    return Machine(name, "gpu", free, ram, speed)


def free_ram() -> int:
    """Bytes of system memory that are free or can be made so, within this process's control group."""
    limits = [_available(), _cgroup_left()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else 8_000_000_000


def _available() -> int | None:
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # elsewhere: all of it, less what the system has for itself
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return max(whole - OUTSIDE_RAM, whole // 2)


def _cgroup_left() -> int | None:
    """What a container's limit leaves (cgroup v2)."""
    try:
        most = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - used)


def _measured(device: torch.device, dtype: torch.dtype) -> Speed:
    """A rate from a few matrix products, a tenth of a second of them on a CPU."""
    n = _CALIBRATION if device.type == "cpu" else 4 * _CALIBRATION
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return Speed(2.0 * n**3 / best, _CPU_MEMORY if device.type == "cpu" else 500e9, _CPU_MEMORY)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
