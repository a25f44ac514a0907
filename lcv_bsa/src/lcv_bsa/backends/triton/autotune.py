"""Timing tiles on the GPU at hand, and keeping the winners in a JSON file. Nothing here runs unless it is called."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor

from lcv_bsa import ops
from lcv_bsa.backends.triton import tuning
from lcv_bsa.backends.triton.tuning import Situation, Tile, install
from lcv_bsa.selection import BlockSelection

logger = logging.getLogger("lcv_bsa")

Bench = Callable[[Callable[[], object]], float]


def tune(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, cache: Path | None = None,
    kernels: str = "triton", bench: Bench | None = None,
) -> dict[Situation, Tile]:  # fmt: skip
    """Time the tiles of every kernel behind a backend, forward and backward, and use the fastest in this process.

    q [B, H, Sq, D], k, v [B, Hkv, Skv, D], as the model will have them: the winners hold for their dtype, head dim and
    block sizes, on this device, with this Triton. cache: a file that `load_tuning` reads; kernels it lists for these
    inputs are not timed again, the others are added. kernels: the backend's name. bench: milliseconds of a function,
    None for triton.testing.do_bench, which needs a GPU. Takes a minute or two a kernel, most of it compiling.
    Raises ValueError for a cache that cannot be read.
    """
    known = load_tuning(cache) if cache is not None and cache.exists() else {}
    winners: dict[Situation, Tile] = {}
    for run in _passes(q, k, v, selection, kernels):
        for situation, tile in _asked_for(run).items():
            winner = known.get(situation) or _fastest(run, situation, tile, bench or _milliseconds)
            install({situation: winner})
            winners[situation] = winner
    if cache is not None:
        _write(cache, known | winners)
    return winners


def load_tuning(path: Path) -> dict[Situation, Tile]:
    """Use the tiles of a file that `tune` wrote; those of other devices or Triton versions lie idle.

    Raises ValueError where the file is not one of those.
    """
    try:
        entries = json.loads(Path(path).read_text())["tiles"]
        tiles = dict(_read(entry) for entry in entries)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a file written by lcv_bsa's tune, got {error!s}; delete it") from error
    install(tiles)
    return tiles


def _milliseconds(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, return_mode="median"))  # type: ignore[arg-type]


def _passes(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, kernels: str
) -> Iterator[Callable[[], object]]:  # fmt: skip
    """The forward, then the backward of the same inputs."""
    options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "kernels": kernels}
    yield lambda: ops.forward(q, k, v, selection, **options)
    o, lse = ops.forward(q, k, v, selection, **options)
    do, dlse = torch.ones_like(o), torch.zeros_like(lse)
    yield lambda: ops.backward(q, k, v, o, lse, do, dlse, selection, **options)


def _asked_for(run: Callable[[], object]) -> dict[Situation, Tile]:
    """The tiles that the kernels of one run look up, in order."""
    with tuning.recorded_lookups() as found:
        run()
    return found


def _fastest(run: Callable[[], object], situation: Situation, start: Tile, bench: Bench) -> Tile:
    times: dict[Tile, float] = {}
    for tile in _candidates(start):
        try:
            with tuning.on_trial(situation, tile):
                times[tile] = bench(run)
        except Exception as error:  # Triton has no common base for what does not compile or does not fit
            logger.debug("%s: passed over %s: %s", situation.kernel, tile, error)
            if tile == start:
                raise
    best = min(times, key=lambda tile: times[tile])
    return replace(best, reason=f"timed: {times[best]:.4g} ms, {times[start]:.4g} ms as the table has it")


def _candidates(start: Tile) -> Iterator[Tile]:
    """The table's tile first, then its neighbours."""
    sides = ([side, side // 2] if side > 16 else [side] for side in (start.m, start.n))
    yield start
    for m, n, warps, stages in product(*sides, (4, 8), (1, 2, 3)):
        tile = Tile(m, n, warps, stages, start.reason)
        if tile != start:
            yield tile


def _read(entry: dict[str, Any]) -> tuple[Situation, Tile]:
    names = {field.name: field.type for kind in (Situation, Tile) for field in fields(kind)}
    if set(entry) != set(names):
        raise ValueError(f"an entry with {sorted(entry)} in place of {sorted(names)}")
    for name, kind in names.items():
        if type(entry[name]) is not kind:
            raise ValueError(f"{name} = {entry[name]!r}")
    keys = [field.name for field in fields(Situation)]
    return Situation(**{n: entry[n] for n in keys}), Tile(**{n: entry[n] for n in names if n not in keys})


def _write(path: Path, tiles: dict[Situation, Tile]) -> None:
    """Whole or not at all: another process may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [asdict(situation) | asdict(tile) for situation, tile in tiles.items()]
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps({"tiles": entries}, indent=1) + "\n")
    unfinished.replace(path)
