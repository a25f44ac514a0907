"""Two processes, whole and sharded, against one: the same run to rounding, interrupted or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_toys import state_of, toy_trainer
from training_worker import NUM_PROCESSES, main

from lcv_core.training import trainer as trainer_module
from lcv_core.training.logs import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(main, args=(str(folder),), nprocs=NUM_PROCESSES, start_method="spawn")
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "draw_curves", lambda *_: None)
        trainer = toy_trainer(tmp_path_factory.mktemp("alone"))
        trainer.run()
    return state_of(trainer)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind: str, runs: Any, alone: dict[str, torch.Tensor]) -> None:
    for result in runs[1]:
        assert result[kind]["step"] == 12 and result[kind]["sharded"] == (kind == "fsdp")
        assert result[kind]["state"].keys() == alone.keys()
        for name, value in result[kind]["state"].items():
            assert torch.allclose(value, alone[name], atol=1e-6), name
    first, second = (result[kind]["state"] for result in runs[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_only_one_process_writes_and_the_model_comes_out_whole(
    kind: str, runs: Any, alone: dict[str, torch.Tensor]
) -> None:
    out = runs[0] / kind
    assert [row["step"] for row in read_metrics(out / "metrics.csv")] == [4, 5, 8, 12]
    exported = torch.load(out / "model/toy.pt", weights_only=True)
    for name, value in exported.items():
        assert torch.allclose(value, alone[f"average of {name}"], atol=1e-6), name


def test_one_process_goes_on_where_two_sharded_ones_stopped(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: None)
    trainer = toy_trainer(runs[0] / "fsdp", steps=14)
    assert trainer.step == 12
    saved = runs[1][0]["fsdp"]["state"]
    assert all(torch.equal(value, saved[name]) for name, value in state_of(trainer).items())
    trainer.run()
