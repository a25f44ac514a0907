"""An adapter of the checkpoint's is read once in a run, however many segments it is put on for."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from test_plan_choice import RELEASED
from tiny_models import components, make_dit, pictures, text
from torch import Tensor

from lcv_core.errors import CheckpointError
from lcv_core.live_bytes import LiveBytes
from lcv_core.offload.lanes import lanes_of
from lcv_core.offload.turns import BlocksInTurn
from lcv_core.pipelines import Components, long_refine_segments, long_video_segments
from lcv_core.planning import Job, Refine
from lcv_core.planning.plan import plan_with
from lcv_core.weights import lora
from lcv_core.weights.init import AdapterFile, lora_state
from lcv_core.weights.lora import load_lora, read_adapter
from lcv_core.weights.tensors import TensorFile, TensorSource

SEGMENTS = 3


def state(name: AdapterFile = "cfg_step_lora", seed: int = 7) -> dict[str, Tensor]:
    return lora_state({name: tuple(p.shape) for name, p in make_dit().state_dict().items()}, name, seed=seed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_file(state(), path)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were read from files."""
    seen: list[str] = []
    read = TensorFile.read

    def watched(self: TensorFile, name: str, *args: Any) -> Tensor:
        seen.append(name)
        return read(self, name, *args)

    monkeypatch.setattr(TensorFile, "read", watched)
    return seen


def long(c: Components, on_step: Any = None) -> list[Tensor]:
    segments = long_video_segments(
        c, text=text(), num_segments=SEGMENTS, num_steps=2, schedule="distilled", seed=4, on_step=on_step
    )
    return [segment.frames for segment in segments]


def refined(c: Components) -> list[Tensor]:
    clip = pictures(13)
    segments = long_refine_segments(
        c, text=text(), read=lambda a, b: clip[a:b], total_frames=13, window=9, overlap=4, refine_steps=1,
        size=(32, 48), seed=4,
    )  # fmt: skip
    return [segment.frames for segment in segments]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def streamed(place: Literal["off", "ram", "disk"]) -> Components:
    dit = make_dit()
    if place != "off":
        whole = make_dit()

        class Source:
            def read(self, block: int, name: str, out: Tensor) -> None:
                out.copy_(whole.get_parameter(f"blocks.{block}.{name}"))

        dit.set_streaming(BlocksInTurn(list(dit.blocks), lanes_of(torch.device("cpu")), place, Source(), slots=1))
    return components(dit=dit)


@pytest.mark.parametrize("place", ["off", "ram", "disk"])
def test_once_for_all_segments_with_the_same_frames(
    file: Path, reads: list[str], place: Literal["off", "ram", "disk"]
) -> None:
    c = streamed(place)
    c.adapters = {"distill": file}
    got = long(c)
    assert sorted(reads) == sorted(state())  # each tensor once
    assert equal(got, long(components(adapters={"distill": state()})))
    assert not equal(got, long(components()))
    c.dit.stop_streaming()


def test_once_for_all_windows_of_a_refinement(tmp_path: Path, reads: list[str]) -> None:
    stored = state("refinement_lora")
    save_file(stored, tmp_path / "refinement.safetensors")
    got = refined(components(adapters={"refinement": tmp_path / "refinement.safetensors"}))
    assert len(got) > 1 and sorted(reads) == sorted(stored)
    assert equal(got, refined(components(adapters={"refinement": stored})))


def test_between_runs_the_layers_are_bare_and_what_was_made_for_the_device_is_gone(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches: list[weakref.ref[Any]] = []
    make = lora._Branch.__init__

    def watched(self: Any, *args: Any) -> None:
        make(self, *args)
        branches.append(weakref.ref(self))

    monkeypatch.setattr(lora._Branch, "__init__", watched)
    c = components(adapters={"distill": file})
    long(c)
    gc.collect()
    assert len(branches) == SEGMENTS * len(c.read_adapter("distill", file).deltas)
    assert not any(ref() is not None for ref in branches)
    assert not any(module._forward_hooks for module in c.dit.modules())


@pytest.mark.parametrize("mode", ["runtime", "merged"])
def test_what_is_on_a_model_shares_the_tensors_that_were_read(file: Path, mode: Literal["runtime", "merged"]) -> None:
    dit = make_dit()
    adapter = read_adapter(dit, TensorSource.open(file), file.name)
    with LiveBytes() as live:
        handle = load_lora(dit, adapter, mode=mode)
        kept = live.now
    stored = sum(tensor.nbytes for tensor in state().values())
    originals = sum(dit.get_submodule(name).weight.nbytes for name in adapter.deltas) if mode == "merged" else 0  # type: ignore[union-attr]
    biases = sum(p.nbytes for name, p in dit.named_parameters() if name.endswith("bias"))
    assert kept <= originals + (biases if mode == "merged" else 0) < originals + stored
    handle.remove()


def test_a_file_that_has_changed_is_read_again_and_one_that_is_gone_is_named(file: Path, reads: list[str]) -> None:
    c = components(adapters={"distill": file})
    first = long(c)
    reads.clear()
    other = state(seed=8)
    file.unlink()
    save_file(other | {"lora___lorahyphen___extra.lora_down.weight": torch.zeros(1, 1)}, file)
    assert equal(long(c), long(components(adapters={"distill": other})))
    assert set(other) <= set(reads) and not equal(long(c), first)
    file.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        long(c)


def test_the_plan_counts_it_in_system_memory() -> None:
    """2.52 GB of the released distillation adapter and 3.21 GB of the refiner's, beside the blocks that wait."""
    sizes = {"distill": 4 * 630_718_464, "refinement": 4 * 802_299_904}
    plain = Job(together=True, stream="disk")
    bare, distilled = (plan_with(RELEASED, job) for job in (plain, replace(plain, schedule="distilled")))
    for stage in ("sampling", "VAE decode"):
        assert distilled.stage(stage).ram - bare.stage(stage).ram == sizes["distill"]
    assert distilled.stage("text encode").ram == 0
    refining = Job(together=True, refine_only=True, guidance="off", refine=Refine())
    assert plan_with(RELEASED, refining).stage("refine sampling").ram == sizes["refinement"]
