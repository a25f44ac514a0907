"""Streaming on a real GPU: the numbers of a model that is there as a whole, in the memory of two blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.names import Weights
from lcv_core.offload.lanes import CudaLanes, Pinned, host_memory
from lcv_core.offload.turns import BlocksInTurn
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.init import dit_state, lora_state
from lcv_core.weights.lora import load_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; the same logic runs on a fake one in"
                       " test_offload_turns"),
]  # fmt: skip

CONFIG = DiTConfig(hidden_size=1024, depth=8, num_heads=8, caption_channels=32, adaln_tembed_dim=32)
Place = Literal["ram", "disk"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("model") / "dit.safetensors"
    save_file(dit_state(CONFIG), path)
    return path


@torch.no_grad()
def run(dit: LongCatDiT) -> Tensor:
    g = torch.Generator().manual_seed(5)
    latents = torch.randn(1, CONFIG.in_channels, 3, 16, 16, generator=g).cuda()
    text = torch.randn(1, 7, CONFIG.caption_channels, generator=g).cuda()
    return dit(latents, torch.tensor([500.0], device="cuda"), text)


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("weights", ["plain", "int8", "q8_0"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_same_numbers_pass_after_pass(file: Path, place: Place, weights: Weights, slots: int) -> None:
    if place == "disk" and weights != "plain":
        pytest.skip("a file in another form is not streamed from disk")
    checkpoint = open_checkpoint(file)
    options = {"device": "cuda", "dtype": torch.bfloat16, "weights": weights}
    whole = checkpoint.load_dit(**options)
    expected = run(whole)
    dit = checkpoint.load_dit(**options, streaming=place, slots=slots)
    for _ in range(5):  # no wait between them: races would show
        results = [run(dit) for _ in range(4)]
        assert all(result.equal(expected) for result in results)
    shapes = {name: tuple(p.shape) for name, p in dit.named_parameters()}
    if weights == "plain":
        adapters = [load_lora(model, lora_state(shapes, "cfg_step_lora")) for model in (dit, whole)]
        assert run(dit).equal(run(whole)) and len(adapters) == 2
    dit.stop_streaming()


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_the_gpu_holds_the_slots_and_the_resident_blocks_alone(file: Path, place: Place) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    dit = open_checkpoint(file).load_dit(device="cuda", dtype=torch.bfloat16, streaming=place, resident=80_000_000)
    turns = dit._in_turn
    assert isinstance(turns, BlocksInTurn) and 0 < turns.resident < CONFIG.depth - 2
    rest = sum(p.nbytes for name, p in dit.named_parameters() if not name.startswith("blocks."))
    assert torch.cuda.memory_allocated() - before <= turns.nbytes + rest + (1 << 20)
    dit.stop_streaming()


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_resident_blocks_that_are_given_up_leave_the_gpu(file: Path, place: Place) -> None:
    checkpoint = open_checkpoint(file)
    expected = run(checkpoint.load_dit(device="cuda", dtype=torch.bfloat16))
    dit = checkpoint.load_dit(device="cuda", dtype=torch.bfloat16, streaming=place, resident=80_000_000)
    turns = dit._in_turn
    assert isinstance(turns, BlocksInTurn) and turns.resident
    assert run(dit).equal(expected)
    stayed = turns.resident * turns._sockets[0].layout.nbytes
    before = torch.cuda.memory_allocated()
    dit.free_resident_blocks()  # right behind the forward
    assert before - torch.cuda.memory_allocated() >= stayed
    for _ in range(3):
        results = [run(dit) for _ in range(4)]
        assert all(result.equal(expected) for result in results)
    dit.stop_streaming()


def test_memory_is_pinned_as_it_is_and_unlocked_when_it_goes() -> None:
    lanes = CudaLanes(torch.device("cuda"))
    buffer = host_memory(3_000_000)
    pin = lanes.pin(buffer)
    # Not is_pinned(): of memory that was registered it said no on an H200. What is locked CUDA locks no second time.
    assert isinstance(pin, Pinned) and lanes.pin(buffer) is None
    del pin
    assert isinstance(lanes.pin(buffer), Pinned)


def test_pinning_that_fails_leaves_cuda_usable(caplog: pytest.LogCaptureFixture) -> None:
    lanes = CudaLanes(torch.device("cuda"))
    buffer = host_memory(1 << 20)
    first = lanes.pin(buffer)
    assert first is not None and lanes.pin(buffer) is None  # locked already: refused
    assert "could not be pinned" in caplog.text
    assert (torch.ones(4, device="cuda") + 1).sum().item() == 8


class _Slow(nn.Module):
    """A block that keeps the GPU busy, and reads its weights before and after that."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1 << 22,), value), requires_grad=False)

    def forward(self) -> Tensor:
        before = self.weight.amax()
        torch.cuda._sleep(20_000_000)
        return torch.stack([before, self.weight.amin()])


def test_no_block_is_written_over_while_the_gpu_is_still_reading_it() -> None:
    blocks = [_Slow(float(i)) for i in range(6)]
    turns = BlocksInTurn(blocks, CudaLanes(torch.device("cuda")), "ram", slots=2)

    def values() -> Iterator[Tensor]:
        for _ in range(3):
            for block in turns:
                yield block()

    found = torch.stack(list(values())).cpu()
    expected = torch.arange(6.0).repeat(3)[:, None].expand(-1, 2)
    assert found.equal(expected)
    turns.close()
