"""Tile shapes, warps and stages: a frozen table per architecture, and the rules for what the table does not list."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import triton
from torch import Tensor

from lcv_bsa.selection import BlockSelection


@dataclass(frozen=True)
class Tile:
    """m query slots by n key slots, on `warps` warps with `stages` pipeline stages; reason: why these.

    m and n are powers of two from 16. row: the largest row, in bytes of a token's channels, that it is for, 256 being
    128 channels of 16 bits. Raises ValueError for what no kernel can take.
    """

    m: int
    n: int
    warps: int
    stages: int
    reason: str = ""
    row: int = 256

    def __post_init__(self) -> None:
        for name, among in (("m", _SIDES), ("n", _SIDES), ("warps", _WARPS), ("stages", _STAGES)):
            value = getattr(self, name)
            if type(value) is not int or value not in among:
                raise ValueError(f"{name} of a tile must be one of {among}, got {value!r}")


@dataclass(frozen=True)
class Situation:
    """What a timed tile was timed for. device and triton: names as torch and Triton give them. block_q, block_k:
    slots per block."""

    device: str
    triton: str
    kernel: str
    dtype: str
    head_dim: int
    block_q: int
    block_k: int

    @classmethod
    def of(cls, kernel: str, q: Tensor, selection: BlockSelection) -> "Situation":
        device = torch.cuda.get_device_name(q.device) if q.device.type == "cuda" else q.device.type
        sizes = selection.layout_q.block_size, selection.layout_k.block_size
        return cls(device, triton.__version__, kernel, str(q.dtype).removeprefix("torch."), q.shape[-1], *sizes)


_SIDES = (16, 32, 64, 128, 256)  # tl.dot takes no less than 16
_WARPS = (1, 2, 4, 8, 16)
_STAGES = (1, 2, 3, 4, 5, 6, 7, 8)


def _ahead(registers: int, ctas: int) -> str:
    """The reason of an entry chosen by what benchmarks/aot.py says, with no GPU of that kind at hand."""
    return f"measured ahead of time: {registers} registers, no spills, CTAs per SM {ctas}; not timed"


def _timed(what: str) -> str:
    """The reason of an entry chosen by time, at the size of 720p."""
    return f"H200, Triton 3.6, 168,960 tokens, 8 heads of 128, a sixteenth kept: {what}"


# For blocks of 64 tokens, and for 16-bit inputs with head dims up to 128 unless `row` says otherwise; `tile_for` fits
# entries to other inputs. An architecture without an entry for a kernel takes that of "default".
TABLE: MappingProxyType[tuple[str, str], Tile] = MappingProxyType(
    {
        ("default", "forward"): Tile(64, 64, 4, 1, "one stage fits the least shared memory, 64 KB; not timed"),
        ("default", "dq"): Tile(64, 64, 4, 1, "one stage fits the least shared memory, 64 KB; not timed"),
        ("default", "dkv"): Tile(64, 64, 8, 1, "on 4 warps it spills on most GPUs; not timed"),
        ("default", "forward_tma"): Tile(64, 64, 4, 1, _ahead(128, 4)),
        ("default", "forward_tma_wide"): Tile(
            128, 64, 8, 1, "ahead of time on sm_90: 126 registers, CTAs per SM 2 (Triton 3.6); 140, 1 (3.9); not timed"
        ),
        ("default", "forward_tma_256"): Tile(64, 64, 4, 1, _ahead(196, 2), row=512),
        ("default", "forward_tma_8"): Tile(64, 64, 4, 1, _ahead(128, 4)),
        ("default", "eight_bits"): Tile(64, 64, 4, 1, "one stage fits the least shared memory; not timed"),
        ("default", "pair"): Tile(64, 64, 8, 1, _ahead(128, 2)),
        ("default", "dq_tma"): Tile(64, 64, 4, 1, "one stage fits the least shared memory, 64 KB; not timed"),
        ("default", "dkv_tma"): Tile(64, 64, 4, 1, "one stage fits the least shared memory, 64 KB; not timed"),
        ("default", "fused"): Tile(32, 64, 4, 1, "64 rows spill; not timed"),
        ("default", "fused_tma"): Tile(32, 64, 4, 1, "64 rows spill; not timed"),
        ("sm_80", "forward"): Tile(64, 64, 4, 1, _ahead(234, 2)),
        ("sm_80", "dq"): Tile(64, 64, 4, 2, _ahead(255, 2)),
        ("sm_80", "dkv"): Tile(64, 64, 8, 2, _ahead(177, 1)),
        ("sm_80", "fused"): Tile(16, 64, 8, 1, _ahead(254, 1)),
        ("sm_89", "forward"): Tile(64, 64, 4, 1, _ahead(222, 2)),
        ("sm_89", "dq"): Tile(64, 64, 8, 2, _ahead(138, 1)),
        ("sm_89", "dkv"): Tile(64, 64, 8, 2, _ahead(177, 1)),
        ("sm_89", "fused"): Tile(16, 64, 4, 1, _ahead(255, 1)),
        ("sm_90", "forward"): Tile(64, 64, 4, 2, _ahead(193, 2)),
        ("sm_90", "forward_tma"): Tile(64, 64, 4, 3, _timed("16.9 ms; one stage 19.1, two 21.8, four 20.1")),
        ("sm_90", "forward_tma_8"): Tile(64, 64, 4, 1, _timed("16.9 ms; two stages 17.4")),
        ("sm_90", "eight_bits"): Tile(
            64, 64, 4, 3, _timed("11.6 ms; one stage 14.3, two 12.4, four 11.5; 8 warps 20.7")
        ),
        ("sm_90", "dq"): Tile(64, 64, 4, 2, _ahead(180, 2)),
        ("sm_90", "dkv"): Tile(64, 64, 4, 1, _ahead(250, 2)),
        ("sm_90", "fused"): Tile(32, 64, 4, 1, _ahead(242, 2)),
        ("sm_90", "dq_tma"): Tile(64, 64, 4, 2, _ahead(154, 2)),
        ("sm_90", "dkv_tma"): Tile(64, 64, 4, 3, _ahead(243, 2)),
        ("sm_90", "fused_tma"): Tile(32, 64, 4, 3, _ahead(224, 2)),
        ("sm_100", "forward"): Tile(64, 64, 8, 2, _ahead(122, 2)),
        ("sm_100", "dq"): Tile(64, 64, 4, 1, _ahead(122, 2)),
        ("sm_100", "dkv"): Tile(64, 64, 4, 1, _ahead(160, 2)),
        ("sm_100", "dq_tma"): Tile(64, 64, 4, 2, _ahead(100, 2)),
        ("sm_100", "dkv_tma"): Tile(64, 64, 4, 1, _ahead(152, 2)),
        ("sm_100", "fused_tma"): Tile(32, 64, 4, 1, _ahead(130, 2)),
        ("sm_120", "forward"): Tile(64, 64, 4, 1, _ahead(220, 2)),
        ("sm_120", "dq"): Tile(64, 64, 8, 1, _ahead(150, 1)),
        ("sm_120", "dkv"): Tile(64, 64, 8, 1, _ahead(162, 1)),
        ("sm_120", "fused"): Tile(16, 32, 4, 1, _ahead(254, 2)),
        ("sm_120", "dq_tma"): Tile(64, 64, 8, 1, _ahead(126, 2)),
        ("sm_120", "dkv_tma"): Tile(64, 64, 8, 1, _ahead(168, 1)),
        ("sm_120", "fused_tma"): Tile(16, 64, 4, 1, _ahead(254, 1)),
        ("gfx942", "forward"): Tile(64, 32, 4, 1, _ahead(173, 2)),
        ("gfx942", "dq"): Tile(64, 32, 4, 1, _ahead(202, 2)),
        ("gfx942", "dkv"): Tile(32, 32, 4, 1, _ahead(236, 2)),
        ("gfx942", "fused"): Tile(32, 64, 4, 1, _ahead(350, 1)),
    }
)

_OWNS_KEYS = ("dkv", "fused")  # kernels whose programs keep n keys and walk over queries; the others keep m queries
_SMALL_SHARED = ("sm_89", "sm_120", "gfx942")  # up to 100 KB per SM: four tiles of 256 channels leave no room

# Set by `assumed_architecture`, `recorded_lookups`, and `install` or `on_trial`; empty otherwise.
_assumed: list[str] = []
_recorders: list[dict[Situation, Tile]] = []
_installed: dict[Situation, Tile] = {}


def architecture(device: torch.device) -> str:
    """Key of the table for a device: "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942" or "interpreter"."""
    if _assumed:
        return _assumed[-1]
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return {8: "sm_89" if minor == 9 else "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


@contextmanager
def assumed_architecture(arch: str) -> Iterator[None]:
    """Within it every device counts as `arch`: for compiling ahead of time."""
    _assumed.append(arch)
    try:
        yield
    finally:
        _assumed.pop()


@contextmanager
def recorded_lookups() -> Iterator[dict[Situation, Tile]]:
    """Receives what `tile_for` is asked within it, and answers."""
    found: dict[Situation, Tile] = {}
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders.remove(found)


def tile_for(kernel: str, q: Tensor, selection: BlockSelection) -> Tile:
    """The tile of `kernel` for these inputs: a timed one where `install` was given it, else the table's, fitted."""
    # naming the situation takes microseconds of every launch, so only where someone wants it
    situation = Situation.of(kernel, q, selection) if (_installed or _recorders) and not _assumed else None
    timed = _installed.get(situation) if situation else None
    tile = timed or _from_table(kernel, q, selection)
    if situation:
        for found in _recorders:
            found[situation] = tile
    return tile


def _from_table(kernel: str, q: Tensor, selection: BlockSelection) -> Tile:
    arch = architecture(q.device)
    tile = TABLE.get((arch, kernel)) or TABLE["default", kernel]
    row = triton.next_power_of_2(q.shape[-1]) * q.element_size()
    if row > tile.row:
        tile = _shrunk(tile, row // tile.row, keys=kernel.startswith(_OWNS_KEYS), arch=arch)
    return replace(tile, m=_side(selection.layout_q.block_size, tile.m), n=_side(selection.layout_k.block_size, tile.n))


def _shrunk(tile: Tile, ratio: int, *, keys: bool, arch: str) -> Tile:
    """For rows of `ratio` times the bytes. What a program accumulates shrinks and gets more warps; what it walks over
    stays whole as far as shared memory holds it, since a block cut in two is unrolled, and spills."""
    own, walked = (tile.n, tile.m) if keys else (tile.m, tile.n)
    if keys and arch in _SMALL_SHARED:
        own, walked = own // (2 * ratio), walked // ratio
    else:
        own, walked = own // ratio, walked // (ratio // 2)
    own, walked = max(_SIDES[0], own), max(_SIDES[0], walked)
    m, n = (walked, own) if keys else (own, walked)
    return replace(tile, m=m, n=n, warps=max(8, tile.warps), stages=1)


def install(tiles: dict[Situation, Tile]) -> None:
    """Use these from now on in this process."""
    _installed.update(tiles)


@contextmanager
def on_trial(situation: Situation, tile: Tile) -> Iterator[None]:
    """Within it `tile` is used, afterwards what was before."""
    before = _installed.get(situation)
    _installed[situation] = tile
    try:
        yield
    finally:
        del _installed[situation]
        if before is not None:
            _installed[situation] = before


def _side(block_size: int, largest: int) -> int:
    """A power of two for tl.dot: the block whole where it fits."""
    return max(_SIDES[0], min(largest, triton.next_power_of_2(block_size)))


def forward_tile(q: Tensor, selection: BlockSelection) -> Tile:
    return tile_for("forward", q, selection)
