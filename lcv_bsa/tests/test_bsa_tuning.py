"""The table of tiles, and the timing of tiles with a clock of the test's own."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to look at its tiles", allow_module_level=True)

from lcv_bsa.backends.triton import autotune, tuning
from lcv_bsa.backends.triton.tuning import TABLE, Situation, Tile, tile_for
from lcv_bsa.testing import random_qkv, random_selection

KERNELS = sorted({kernel for _, kernel in TABLE})
ARCHITECTURES = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter", "not yet built"]


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "_installed", {})
    yield


def make(*, grid: tuple[int, int, int] = (2, 4, 4), block: tuple[int, int, int] = (2, 4, 4), head_dim: int = 16):
    generator = torch.Generator().manual_seed(0)
    selection = random_selection(grid, block_q=block, generator=generator, top_k=1)
    return *random_qkv(grid, generator=generator, head_dim=head_dim), selection


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_tile_everywhere(kernel: str, arch: str) -> None:
    for block in ((4, 4, 4), (1, 1, 1), (8, 8, 16)):
        for head_dim in (32, 128, 256):
            q, _, _, selection = make(grid=block, block=block, head_dim=head_dim)
            for dtype in (torch.bfloat16, torch.float32):
                with tuning.assumed_architecture(arch):
                    tile = tile_for(kernel, q.to(dtype), selection)
                assert tile.reason
                assert tile.m <= max(16, selection.layout_q.block_size)
                assert tile.n <= max(16, selection.layout_k.block_size)


def test_entries_are_taken_as_they_are_where_they_fit() -> None:
    q, _, _, selection = make(grid=(4, 4, 4), block=(4, 4, 4), head_dim=128)
    with tuning.assumed_architecture("sm_90"):
        assert tile_for("dkv", q.bfloat16(), selection) == TABLE["sm_90", "dkv"]
    with tuning.assumed_architecture("not yet built"):
        assert tile_for("dkv", q.bfloat16(), selection) == TABLE["default", "dkv"]


def test_long_rows_shrink_what_a_program_keeps() -> None:
    q, _, _, selection = make(grid=(4, 4, 4), block=(4, 4, 4), head_dim=256)
    with tuning.assumed_architecture("sm_90"):
        forward, dkv = (tile_for(kernel, q.bfloat16(), selection) for kernel in ("forward", "dkv"))
        assert (forward.m, forward.n, forward.warps, forward.stages) == (32, 64, 8, 1)
        assert (dkv.m, dkv.n, dkv.warps, dkv.stages) == (64, 32, 8, 1)
        wider = tile_for("forward", q, selection)
        assert (wider.m, wider.n) == (16, 32)
    with tuning.assumed_architecture("sm_120"):
        dkv = tile_for("dkv", q.bfloat16(), selection)
        assert (dkv.m, dkv.n) == (32, 16)


@pytest.mark.parametrize("wrong", [{"m": 48}, {"n": 8}, {"warps": 3}, {"stages": 0}, {"m": 64.0}, {"warps": True}])
def test_a_tile_refuses_what_no_kernel_takes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} of a tile must be one of"):
        Tile(**{"m": 64, "n": 64, "warps": 4, "stages": 1} | wrong)  # type: ignore[arg-type]


def a_clock(prefer: Tile, of: str) -> tuple[Callable[[Callable[[], object]], float], list[Tile]]:
    """Runs nothing: 1 ms when kernel `of` has the tile `prefer`, 2 ms otherwise; three stages do not fit."""
    seen: list[Tile] = []

    def bench(run: Callable[[], object]) -> float:
        tile = next(t for s, t in tuning._installed.items() if s.kernel == of)
        seen.append(tile)
        if tile.stages == 3:
            raise RuntimeError("out of resource: shared memory")
        return (
            1.0
            if (tile.m, tile.n, tile.warps, tile.stages) == (prefer.m, prefer.n, prefer.warps, prefer.stages)
            else 2.0
        )

    return bench, seen


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that looks up the tile of one kernel and runs nothing."""

    def passes(q, k, v, selection, kernels) -> Iterator[Callable[[], object]]:
        yield lambda: tile_for("forward", q, selection)

    monkeypatch.setattr(autotune, "_passes", passes)


def test_tune_installs_and_keeps_the_fastest(one_kernel: None, tmp_path: Path) -> None:
    inputs, cache = make(), tmp_path / "deep" / "tiles.json"
    prefer = Tile(16, 32, 8, 2)
    bench, seen = a_clock(prefer, of="forward")
    (situation, winner), = autotune.tune(*inputs, cache=cache, bench=bench).items()  # fmt: skip
    assert (winner.m, winner.n, winner.warps, winner.stages) == (16, 32, 8, 2)
    assert winner.reason == "timed: 1 ms, 2 ms as the table has it"
    assert situation == Situation.of("forward", inputs[0], inputs[3])
    assert (situation.device, situation.dtype, situation.head_dim) == ("cpu", "float32", 16)
    assert (situation.block_q, situation.block_k) == (32, 32)
    assert len(seen) == len(set(seen)) > 10
    assert tile_for("forward", inputs[0], inputs[3]) == winner

    entry, = json.loads(cache.read_text())["tiles"]  # fmt: skip
    assert (entry["kernel"], entry["m"], entry["triton"]) == ("forward", 16, situation.triton)
    tuning._installed.clear()
    assert tile_for("forward", inputs[0], inputs[3]) != winner
    assert autotune.load_tuning(cache) == {situation: winner}
    assert tile_for("forward", inputs[0], inputs[3]) == winner
    other = make(head_dim=32)
    assert tile_for("forward", other[0], other[3]) != winner


def test_tune_does_not_time_again_what_the_cache_has(one_kernel: None, tmp_path: Path) -> None:
    cache = tmp_path / "tiles.json"
    first = autotune.tune(*make(), cache=cache, bench=a_clock(Tile(16, 16, 4, 1), of="forward")[0])

    def fails(run: Callable[[], object]) -> float:
        raise AssertionError("timed again")

    assert autotune.tune(*make(), cache=cache, bench=fails) == first
    added = autotune.tune(*make(head_dim=32), cache=cache, bench=lambda run: 1.0)
    assert autotune.load_tuning(cache) == first | added


def test_tune_raises_where_even_the_table_does_not_run(one_kernel: None) -> None:
    def fails(run: Callable[[], object]) -> float:
        raise RuntimeError("no GPU")

    with pytest.raises(RuntimeError, match="no GPU"):
        autotune.tune(*make(), bench=fails)
    assert not tuning._installed


def test_passes_ask_for_the_kernels_of_both_directions() -> None:
    """The kernels themselves, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: this is the interpreter's test")
    asked = [autotune._asked_for(run) for run in autotune._passes(*make(), "triton")]
    assert [any(s.kernel.startswith("forward") for s in found) for found in asked] == [True, False]
    assert len(asked[1]) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"tiles": [{"m": 64}]}',
        '{"tiles": 3}',
        json.dumps({"tiles": [{"device": "cpu", "triton": "3", "kernel": "dq", "dtype": "float32", "head_dim": 64,
                               "block_q": 64, "block_k": 64, "m": 48, "n": 64, "warps": 4, "stages": 1, "reason": "",
                               "row": 256}]}),
        json.dumps({"tiles": [{"device": "cpu", "triton": "3", "kernel": "dq", "dtype": "float32", "head_dim": "64",
                               "block_q": 64, "block_k": 64, "m": 64, "n": 64, "warps": 4, "stages": 1, "reason": "",
                               "row": 256}]}),
    ],
)  # fmt: skip
def test_load_refuses_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json must be a file written by lcv_bsa's tune, got .*; delete it"):
        autotune.load_tuning(path)
    assert not tuning._installed
