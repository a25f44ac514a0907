"""`lcv plan`, and what `--memory auto` does to the sampling commands."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import lcv, made, refused, usage_error
from safetensors.torch import load_file

from lcv_core.cli import run
from lcv_core.dit.model import LongCatDiT
from lcv_core.planning import plan
from lcv_core.planning.machine import Machine, Speed
from lcv_core.text.encoder import TextEncoder

CSV = Path(__file__).parents[1] / "benchmarks" / "plan.csv"


def planned(*arguments: object) -> dict[str, Any]:
    outcome = lcv("plan", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_a_plan_of_the_released_model_needs_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = lcv("plan", "--vram", 12, "--ram", 32)
    assert outcome.code == 0 and outcome.err == ""
    text = " ".join(outcome.out.split())
    parts = (
        "93 frames of 832x480, 50 steps", "text encode", "sampling", "VAE decode", "chosen: the blocks streamed",
        "should memory run out in VAE decode: no blocks kept on the device, then VAE tiles of 512 pixels", "or: ",
        "times are estimates",
    )  # fmt: skip
    assert all(part in text for part in parts), text
    assert not list(tmp_path.iterdir())


def test_the_same_for_programs() -> None:
    data = planned("--vram", 12, "--ram", 32, "--device", "rtx4070")
    assert data["machine"]["name"] == "rtx4070" and data["fits"]
    best = data["steps"][0]
    assert best["settings"]["stream"] == "ram"
    assert best["vram"] == max(stage["vram"] for stage in best["stages"]) < 12e9
    assert best["seconds"] == pytest.approx(sum(stage["seconds"] for stage in best["stages"]), abs=0.1)
    assert data["then"]["VAE decode"][:2] == ["no blocks kept on the device", "VAE tiles of 512 pixels"]


def test_options_that_are_named_win() -> None:
    named = ["--weights", "int8", "--stream", "off", "--tile", 128, "--cfg-mode", "batched"]
    data = planned("--vram", 24, "--ram", 64, *named)
    for step in data["steps"]:
        assert {name: step["settings"][name] for name in ("weights", "stream", "tile", "cfg_mode")} == {
            "weights": "int8", "stream": "off", "tile": 128, "cfg_mode": "batched",
        }  # fmt: skip
    nothing = planned("--memory", "given", "--vram", 12, "--ram", 32)
    assert not nothing["fits"] and "misses" in nothing["why"][0]


def test_a_plan_of_a_checkpoint(tiny_checkpoint: Path) -> None:
    data = planned("-m", tiny_checkpoint, "--device", "cpu", "--ram", 8)
    assert data["machine"]["device"] == "cpu"
    assert data["steps"][0]["settings"]["weights"] == "plain"
    assert data["why"] == ["everything fits as it is: plain weights, nothing tiled or streamed"]


def test_what_cannot_be_planned() -> None:
    assert 'unknown device "potato"; use cpu, cuda, or one of: rtx3060' in refused("plan", "--device", "potato")
    assert "this plan is for the CPU" in refused("plan", "--device", "cpu", "--vram", 8)
    assert "leaves nothing for a job" in refused("plan", "--device", "rtx3060", "--vram", 0.5)
    assert "does not fit on rtx3060" in refused("plan", "--device", "rtx3060", "--vram", 2)
    assert "--memory" in usage_error("plan", "--memory", "less")
    assert "--frames must be 4k+1" in refused("plan", "--frames", 92)


def test_the_committed_table_reaches_its_goals() -> None:
    with CSV.open(encoding="utf-8") as file:
        goals = [row for row in csv.DictReader(file) if row["goal"]]
    assert {row["case"] for row in goals} == {"t2v 480p 93 frames, 50 steps", "refine to 720p 189 frames, 5 steps"}
    for row in goals:
        found = re.fullmatch(r"<= (\d+) GB", row["goal"])
        assert found is not None
        assert float(row["peak_vram_gb"]) <= float(found[1])
        assert float(row["peak_ram_gb"]) <= float(row["ram_gb"])


T2V = ("t2v", "-p", "a ball", "--steps", 3, "--seed", 1, "-o", "a.safetensors")


def latents() -> torch.Tensor:
    return load_file("a.safetensors")["latents"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
def test_a_small_model_on_a_cpu_runs_as_without_a_plan(tiny_checkpoint: Path) -> None:
    made(*T2V, "-m", tiny_checkpoint, "--memory", "given")
    expected = latents()
    outcome = made(*T2V, "-m", tiny_checkpoint, "--overwrite")
    assert torch.equal(latents(), expected)
    assert "to fit into memory" not in outcome.err


def small_machine(free: int) -> Machine:
    return Machine("a small one", "cpu", free, free, Speed(1e11, 1e10, 1e10))


@pytest.mark.usefixtures("here")
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "this_machine", lambda device: small_machine(1000))
    message = refused(*T2V, "-m", tiny_checkpoint)
    assert "does not fit on a small one" in message and "--memory given" in message


@pytest.mark.usefixtures("here")
def test_out_of_memory_in_a_command_goes_on_and_says_so(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Machine("a card", "gpu", 10**12, 10**12, Speed(1e14, 1e12, 1e10))
    made(*T2V, "-m", tiny_checkpoint, "--memory", "given")
    expected = latents()
    monkeypatch.setattr(run, "this_machine", lambda device: card)
    monkeypatch.setattr(plan, "STREAM_SLOTS", 1)  # two blocks are all that the tiny model has
    calls = {"forward": 0, "encode": 0}
    forward, encode = LongCatDiT.forward, TextEncoder.encode

    def failing(self: LongCatDiT, *args: Any, **named: Any) -> torch.Tensor:
        calls["forward"] += 1
        if calls["forward"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **named)

    def encoding(self: TextEncoder, *args: Any) -> Any:
        calls["encode"] += 1
        if calls["encode"] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, *args)

    monkeypatch.setattr(LongCatDiT, "forward", failing)
    monkeypatch.setattr(TextEncoder, "encode", encoding)
    outcome = made(*T2V, "-m", tiny_checkpoint, "--overwrite")
    assert "out of memory in text encode; going on with the text encoded on the CPU" in outcome.err
    assert "out of memory in sampling at step 2; going on with the blocks streamed from system memory" in outcome.err
    assert torch.equal(latents(), expected)
    assert calls["forward"] == 6 + 1


@pytest.mark.usefixtures("here")
def test_the_kv_cache_and_kernels_are_options(tiny_checkpoint: Path) -> None:
    assert 'unknown kernels "none"' in refused(*T2V, "-m", tiny_checkpoint, "--kernels", "none")
    made(*T2V, "-m", tiny_checkpoint, "--kernels", "torch", "--kv-cache-storage", "fp8", "--kv-cache-place", "cpu")
