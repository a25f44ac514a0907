"""Blocks that stay on the device because there is room: they fit, cost no time, are explained and given up first."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cli_helpers import lcv, made
from safetensors.torch import load_file
from test_plan_choice import CLIP, REFINED, RELEASED, card, planner
from test_plan_memory import GPU, Calls, memory, sample
from tiny_models import components, make_dit
from torch import Tensor

from lcv_core.cli import run
from lcv_core.cli.outputs import read_settings
from lcv_core.offload.lanes import lanes_of
from lcv_core.offload.layout import Layout
from lcv_core.offload.turns import BlocksInTurn
from lcv_core.pipelines import Components
from lcv_core.planning import choose
from lcv_core.planning.choose import RESERVE, Choice, Planner
from lcv_core.planning.fallback import moves
from lcv_core.planning.machine import Machine, Speed
from lcv_core.planning.plan import STREAM_SLOTS
from lcv_core.planning.reasons import reasons
from lcv_core.planning.seconds import Work
from lcv_core.planning.settings import Settings
from lcv_core.weights.checkpoint import Checkpoint

DEPTH = RELEASED.dit.depth
JOBS = {
    "clip": CLIP,
    "short": replace(CLIP, height=256, width=256, num_frames=17),
    "continue": replace(CLIP, num_cond_frames=13),
    "distilled": replace(CLIP, schedule="distilled", guidance="off"),
    "refine": REFINED,
    "a LoRA": replace(CLIP, extra_weights=1_500_000_000),
}


def without(made: Planner, choice: Choice) -> Choice:
    return made.choice(replace(choice.settings, resident=0))


def usable(made: Planner) -> float:
    return made.machine.free / (1 + RESERVE)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(("speed", "ram"), [("rtx4060ti", 32), ("rtx4090", 64), ("rtx3060", 16)])
def test_they_fit_and_no_choice_is_slower_for_them(name: str, speed: str, ram: int) -> None:
    filled = 0
    for vram in (8, 10, 12, 14, 16, 20, 24, 28, 32):
        made = planner(JOBS[name], card(speed, vram, ram))
        for choice in made.steps():
            settings, block = choice.settings, made.block(choice.settings)
            count = settings.resident // block
            assert settings.resident == count * block and count <= DEPTH - STREAM_SLOTS
            if settings.stream == "off":
                assert not count
            if count:
                filled += 1
                bare = without(made, choice)
                on_device = [need for need in choice.stages if need.name != "text encode"]
                assert max(need.vram for need in on_device) <= usable(made)
                more = {need.vram - bare.stage(need.name).vram for need in on_device}
                assert max(more) <= count * block
                assert more == {count * block} or count == DEPTH - STREAM_SLOTS  # no more than all weights there are
                assert choice.seconds <= bare.seconds and choice.ram <= made.machine.ram
            elif settings.stream == "ram":  # there is no room for one
                assert max(need.vram for need in choice.stages if need.name != "text encode") + block > usable(made)
    assert filled


def test_there_are_as_many_as_there_is_room_for() -> None:
    made = planner(machine=card(vram=12, ram=32))
    best, block = made.best(), made.block(made.best().settings)
    assert best.settings.resident == 8 * block
    assert best.stage("VAE decode").vram <= usable(made) < best.stage("VAE decode").vram + block


def test_where_the_link_is_the_bottleneck_they_save_their_share_of_the_time() -> None:
    machine = card(vram=12, ram=32)
    slow = replace(machine, speed=replace(machine.speed, link=1e8, disk=1e7))
    made = planner(machine=slow, fixed={"stream": "ram", "weights": "plain"})
    best, bare = made.best(), without(made, made.best())
    count, block = best.settings.resident // made.block(best.settings), made.block(best.settings)
    saved = bare.stage("sampling").seconds - best.stage("sampling").seconds
    assert count and saved == pytest.approx(2 * made.work.steps * count * block / 1e8)


def test_from_disk_they_stay_where_reading_them_first_is_won_back() -> None:
    machine = card("rtx4090", 24, 8)
    fixed: dict[str, Any] = {"stream": "disk", "weights": "plain"}
    long = planner(machine=machine, fixed=fixed).best()  # a forward takes longer than the disk
    short = planner(JOBS["short"], machine, fixed=fixed, work=Work(steps=16)).best()
    assert not long.settings.resident and short.settings.resident
    made = planner(JOBS["short"], machine, fixed=fixed, work=Work(steps=16))
    read = short.settings.resident / machine.speed.disk
    assert without(made, short).seconds - short.seconds > 10 * read


def test_what_the_user_names_wins() -> None:
    for named in (0, 2_000_000_000):
        made = planner(machine=card(vram=12, ram=32), fixed={"resident": named})
        assert {step.settings.resident for step in made.steps()} == {named}
        for stage in ("sampling", "VAE decode"):
            assert all("resident" not in move.changes for move in moves(made, made.best().settings, stage))


def test_a_cpu_keeps_none_in_memory_that_everything_shares() -> None:
    machine = Machine("CPU", "cpu", 100_000_000_000, 100_000_000_000, Speed(1e11, 1e10, 1e10))
    made = planner(replace(CLIP, device="cpu"), machine, fixed={"stream": "disk"})
    assert made.best().settings.resident == 0


def test_the_explanation_says_how_many_and_what_is_moved() -> None:
    made = planner(machine=card(vram=12, ram=32))
    line = next(line for line in reasons(made, made.best()) if "kept on the device" in line)
    assert line == (
        "4.5 GB of blocks kept on the device: there is room for 8 of 48, so that a forward moves 22.6 GB instead of"
        " 27.1 GB, though computing takes longer than either"
    )
    short = planner(JOBS["short"], card(vram=12, ram=32))
    assert any("which saves" in line for line in reasons(short, short.best()))


def test_other_settings_are_not_explained_by_them() -> None:
    """They would make room for a KV cache that does not fit beside them."""
    made = planner(JOBS["continue"], card(vram=8, ram=48))
    assert made.best().settings.resident
    line = next(line for line in reasons(made, made.best()) if line.startswith("the KV cache in system memory"))
    bare = made.choice(replace(made.best().settings, cache_place="device", resident=0)).stage("sampling")
    assert not made.fits(bare) and f"needs {bare.vram / 1e9:.1f} GB" in line


@pytest.mark.parametrize("stage", ["VAE encode", "sampling", "VAE decode"])
def test_they_are_given_up_first(stage: str) -> None:
    made = planner(JOBS["continue"], card(vram=12, ram=64))
    settings = made.best().settings
    assert settings.resident
    first = next(moves(made, settings, stage))
    assert first.changes == {"resident": 0} and first.words == "no blocks kept on the device"
    need, then = (made.choice(s).stage(stage).vram for s in (settings, first.settings))
    assert need - then == settings.resident
    assert all(move.changes != {"resident": 0} for move in moves(made, first.settings, stage))


def test_without_room_for_them_in_system_memory_all_blocks_go_to_disk() -> None:
    made = planner(JOBS["distilled"], card(vram=12, ram=32))
    best = made.best()
    assert best.settings.resident and best.settings.stream == "ram"
    assert without(made, best).ram > made.machine.ram
    first = next(moves(made, best.settings, "sampling"))
    assert first.changes == {"resident": 0, "stream": "disk"}
    assert first.words == "no blocks kept on the device and the blocks streamed from disk"
    assert made.choice(first.settings).ram <= made.machine.ram
    assert not list(moves(made, best.settings, "sampling", disk=False))


def test_where_system_memory_ran_out_they_stay() -> None:
    made = planner(machine=card(vram=12, ram=32))
    found = [move.changes for move in moves(made, made.best().settings, "sampling", host=True)]
    assert found == [{"stream": "disk"}]


def streamed(place: Literal["ram", "disk"], resident: int, **options: Any) -> tuple[Components, BlocksInTurn]:
    whole, dit = make_dit(), make_dit()

    class Source:
        def read(self, block: int, name: str, out: Tensor) -> None:
            out.copy_(whole.get_parameter(f"blocks.{block}.{name}"))

    turns = BlocksInTurn(list(dit.blocks), lanes_of(torch.device("cpu")), place, Source(), resident=resident, slots=1)
    dit.set_streaming(turns)
    return components(dit=dit, **options), turns


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_a_step_that_runs_out_of_memory_is_repeated_without_them(
    place: Literal["ram", "disk"], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample(components())
    made = memory(Settings(stream=place, resident=1_000_000_000))
    c, turns = streamed(place, 1, memory=made)
    calls = Calls(monkeypatch, c.dit, "forward", {6: GPU})
    assert torch.equal(sample(c), expected)
    assert calls.count == 8 + 2  # the step that failed, and nothing before it
    assert turns.resident == 0 and made.settings == Settings(stream=place)
    assert made.__dict__["lines"] == ["out of memory in sampling at step 3; going on with no blocks kept on the device"]
    c.dit.stop_streaming()


def test_what_the_user_named_stays_where_streaming_begins_in_mid_run(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(components())
    size = Layout.of(make_dit().blocks[0]).nbytes
    made = memory(Settings(resident=size), resident=size)
    c = components(memory=made)
    Calls(monkeypatch, c.dit, "forward", {3: GPU})
    assert torch.equal(sample(c), expected)
    assert isinstance(c.dit._in_turn, BlocksInTurn) and c.dit._in_turn.resident == 1
    c.dit.stop_streaming()


# the command line


def test_lcv_plan_shows_them() -> None:
    outcome = lcv("plan", "--device", "rtx4070", "--vram", 12, "--ram", 32)
    text = " ".join(outcome.out.split())
    for part in (
        "chosen: the blocks streamed from system memory, 4.5 GB of blocks kept on the device",
        "there is room for 8 of 48", "should memory run out in sampling: no blocks kept on the device",
        "10% by blocks that are there for speed alone",
    ):  # fmt: skip
        assert part in text, text
    named = lcv("plan", "--device", "rtx4070", "--vram", 12, "--ram", 32, "--resident", 1.5, "--json")
    assert {step["settings"]["resident"] for step in json.loads(named.out)["steps"]} == {1_500_000_000}


def test_a_job_is_loaded_with_them_and_repeated(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card with a slow disk, while the model is on the CPU."""
    loaded: list[Any] = []
    load = Checkpoint.load_dit

    def watched(self: Checkpoint, **options: Any) -> Any:
        loaded.append(options["resident"])
        return load(self, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint, "load_dit", watched)
    command = ("t2v", "-m", tiny_checkpoint, "-p", "a ball", "--steps", 3, "--seed", 1, "--stream", "disk")
    made(*command, "--memory", "given", "-o", "a.safetensors")
    card = Machine("a card", "gpu", 10**12, 10**12, Speed(1e14, 1e12, 1e10, disk=1e3))
    monkeypatch.setattr(run, "this_machine", lambda device: card)
    monkeypatch.setattr(choose, "STREAM_SLOTS", 1)  # two blocks are all that the tiny model has
    outcome = made(*command, "-o", "b.safetensors")
    said = " ".join(outcome.err.split())
    assert re.search(r"\bfor speed: [\d.]+ .B of blocks kept on the device \(--memory given", said)
    assert "to fit into memory" not in outcome.err
    made(*command, "--resident", 0, "-o", "c.safetensors")
    made("rerun", "b.safetensors", "-o", "d.safetensors")
    assert loaded[0] == loaded[2] == 0 < loaded[1] == loaded[3]
    assert read_settings(Path("b.safetensors"))["job"]["resident"] * 1e9 == pytest.approx(loaded[1], abs=1e-3)
    first = load_file("a.safetensors")["latents"]
    assert all(load_file(f"{name}.safetensors")["latents"].equal(first) for name in "bcd")
