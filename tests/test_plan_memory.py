"""Going on where memory runs out: what is finished is not computed again, and the rest is as with the new settings."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_plan_choice import CLIP, RELEASED, card
from tiny_models import components, pictures, seeded, text
from torch import Tensor

from lcv_core.denoise import StepInfo
from lcv_core.errors import InputError, OutOfMemory, is_out_of_host_memory, is_out_of_memory
from lcv_core.pipelines import Components, continue_video, long_video_segments, refine_video, text_to_video
from lcv_core.pipelines import memory as memory_module
from lcv_core.pipelines.base import StreamingDecoder, encode_frames, to_pixels
from lcv_core.pipelines.memory import Memory
from lcv_core.planning import Job
from lcv_core.planning.choose import Planner
from lcv_core.planning.machine import Machine, Speed
from lcv_core.planning.settings import Settings
from lcv_core.vae.tiling import Tiling

GPU, HOST = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError("no memory")
SPEED = Speed(1e11, 1e10, 1e10)
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 123 bytes")


def memory(settings: Settings | None = None, *, num_cond_frames: int = 0, **fixed: Any) -> Memory:
    """Planned for the released model on a card, while the models of the test are tiny and on the CPU."""
    job = replace(CLIP, num_cond_frames=num_cond_frames)
    planner = Planner(job, RELEASED, card("h100", ram=128), fixed=fixed)
    lines: list[str] = []
    made = Memory(planner, settings or Settings(), say=lines.append)
    made.__dict__["lines"] = lines
    return made


class Calls:
    """Counts the calls of a method and raises an error at some of them, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: dict[int, BaseException]) -> None:
        self.count, self.failed, original = 0, 0, getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            self.count += 1
            if self.count in at:
                self.failed += 1
                raise at[self.count]
            return original(*args, **named)

        monkeypatch.setattr(owner, name, wrapped)


def sample(c: Components, *, mode: str = "sequential", noise: Tensor | None = None, **options: Any) -> Tensor:
    return text_to_video(
        c, text=text(), negative_text=text(seed=5), num_steps=4, cfg_mode=mode, output="latents",  # type: ignore[arg-type]
        generator=seeded(), noise=noise, **options,
    )  # fmt: skip


def steps_of(**options: Any) -> list[Tensor]:
    """The latents after each step of a run in which nothing fails."""
    seen: list[Tensor] = []
    sample(components(), on_step=lambda info: seen.append(info.latents.clone()), **options)
    return seen


@contextmanager
def going_on_from(step: int, latents: Tensor) -> Iterator[Any]:
    class From:
        def load(self, _: Tensor) -> tuple[int, Tensor]:
            return step, latents.clone()

        def save(self, step: int, latents: Tensor) -> None: ...

        def tick(self, step: int, latents: Tensor) -> None: ...

    yield From()


def test_batched_guidance_that_does_not_fit_goes_on_in_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = steps_of(mode="batched")
    with going_on_from(2, before[1]) as progress:
        expected = sample(components(), mode="sequential", progress=progress)
    c = components(memory=memory(Settings(cfg_mode="batched")))
    calls = Calls(monkeypatch, c.dit, "forward", {3: GPU})
    seen: list[int] = []
    got = sample(c, mode="batched", on_step=lambda info: seen.append(info.step))
    assert torch.equal(got, expected)
    assert seen == [1, 2, 3, 4]  # no step is done twice
    assert calls.count == 2 + 1 + 2 * 2
    assert c.memory is not None
    assert c.memory.__dict__["lines"] == [
        "out of memory in sampling at step 3; going on with the branches of guidance one by one"
    ]


def test_blocks_that_no_longer_fit_are_streamed_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(components())
    c = components(memory=memory())
    c.dit.requires_grad_(False)
    calls = Calls(monkeypatch, c.dit, "forward", {6: GPU})  # the second branch of the third step
    assert torch.equal(sample(c), expected)
    assert calls.count == 8 + 2  # the step that failed, and nothing before it
    assert c.memory is not None and c.memory.settings.stream == "ram"
    assert c.memory.__dict__["lines"] == [
        "out of memory in sampling at step 3; going on with the blocks streamed from system memory"
    ]


def test_the_kv_cache_goes_to_system_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(c: Components, **options: Any) -> Tensor:
        return continue_video(
            c, text=text(), negative_text=text(seed=5), frames=pictures(5), num_steps=3, output="latents",
            generator=seeded(), uniform_tail=False, **options,
        )  # fmt: skip

    expected = run(components())
    c = components(memory=memory(num_cond_frames=13))
    placed: list[str] = []
    original = c.dit.set_kv_cache
    monkeypatch.setattr(c.dit, "set_kv_cache", lambda **how: (placed.append(how["place"]), original(**how)))
    calls = Calls(monkeypatch, c.dit, "forward", {4: GPU})
    assert torch.equal(run(c), expected)
    assert calls.count == 6 + 2
    assert placed == ["cpu"]


def test_what_is_fixed_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed: dict[str, Any] = {"cfg_mode": "batched", "stream": "off"}
    c = components(memory=memory(Settings(cfg_mode="batched"), **fixed))
    calls = Calls(monkeypatch, c.dit, "forward", {2: GPU})
    message = r"in sampling at step 2, and nothing is left to go on with\. The plan: sampling [\d.]+ GB, on h100"
    with pytest.raises(OutOfMemory, match=message):
        sample(c, mode="batched")
    assert calls.count == 2


@pytest.mark.parametrize("error", [GPU, HOST, CPU])
def test_it_ends_where_every_call_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    c = components(memory=memory(Settings(cfg_mode="batched"), num_cond_frames=13))
    calls = Calls(monkeypatch, c.dit, "forward", dict.fromkeys(range(1, 50), error))
    with pytest.raises(OutOfMemory, match="nothing is left to go on with"):
        sample(c, mode="batched")
    assert c.memory is not None
    assert calls.count == 1 + len(c.memory.tried) <= 5


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("other"), RuntimeError("CUDA error: device lost")])
def test_other_errors_go_through(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    c = components(memory=memory(Settings(cfg_mode="batched")))
    calls = Calls(monkeypatch, c.dit, "forward", {2: error})
    with pytest.raises(type(error)):
        sample(c)
    assert calls.count == 2
    assert c.memory is not None and not c.memory.tried


def test_without_a_memory_the_error_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    c = components()
    Calls(monkeypatch, c.dit, "forward", {2: GPU})
    with pytest.raises(torch.OutOfMemoryError):
        sample(c)


def test_the_errors_that_mean_it() -> None:
    assert all(is_out_of_memory(error) for error in (GPU, HOST, CPU, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")))
    assert not is_out_of_host_memory(GPU)
    assert is_out_of_host_memory(HOST) and is_out_of_host_memory(CPU)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(KeyError("memory"))


LATENTS = torch.randn(1, 16, 4, 80, 10, generator=seeded(9))  # 640 x 80 pixels: two tiles of 512


def decoded(c: Components, *, tiling: Tiling | None = None) -> list[Tensor]:
    if tiling is not None:
        c.tiling = tiling
    return list(StreamingDecoder(c).stream(LATENTS))


@pytest.mark.parametrize("failing", [1, 3])
def test_decoding_goes_on_by_tiles_from_the_frames_that_are_out(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    whole, tiled = decoded(components()), decoded(components(), tiling=Tiling(512, 384))
    assert not torch.equal(whole[3], tiled[3])
    c = components(memory=memory())
    assert c.vae is not None
    calls = Calls(monkeypatch, c.vae, "decode_step", {failing: GPU})
    got = decoded(c)
    for index, frames in enumerate(got):
        assert torch.equal(frames, (whole if index < failing - 1 else tiled)[index])
    # Whole frames until it fails; then two tiles of each latent frame, of those before for their state alone.
    assert calls.count == failing + 2 * LATENTS.shape[2]
    assert c.memory is not None
    assert c.memory.__dict__["lines"] == [
        f"out of memory in VAE decode at latent frame {failing}; going on with VAE tiles of 512 pixels"
    ]


def test_decoding_that_fails_by_tiles_too_takes_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = decoded(components(), tiling=Tiling(128, 96))
    c = components(memory=memory(Settings(stream="ram")))
    assert c.vae is not None
    Calls(monkeypatch, c.vae, "decode_step", {1: GPU, 2: GPU})
    got = decoded(c)
    assert c.memory is not None
    assert c.tiling == Tiling(c.memory.settings.tile, c.memory.settings.tile * 3 // 4)
    assert c.memory.settings.tile < 512
    assert torch.equal(got[3], smaller[3])


def test_encoding_is_repeated_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = to_pixels(pictures(5, 640, 80))
    expected = encode_frames(components(tiling=Tiling(512, 384)), pixels)
    c = components(memory=memory())
    assert c.vae is not None
    Calls(monkeypatch, c.vae.encoder, "forward", {2: GPU})
    assert torch.equal(encode_frames(c, pixels), expected)


def test_a_refinements_clip_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(c: Components) -> Tensor:
        return refine_video(
            c, text=text(), frames=pictures(5), refine_steps=1, size=(640, 64), generator=seeded(), output="latents"
        )

    expected = run(components(tiling=Tiling(512, 384)))
    c = components(memory=memory())
    assert c.vae is not None
    Calls(monkeypatch, c.vae.encoder, "forward", {2: GPU})
    assert torch.equal(run(c), expected)


def test_finished_segments_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three segments runs out of memory in its last step."""

    def run(c: Components, on_step: Callable[[int, StepInfo], None] | None = None) -> list[Tensor]:
        segments = long_video_segments(
            c, text=text(), num_segments=3, num_steps=2, guidance_scale=1.0, uniform_tail=False, seed=1, on_step=on_step
        )
        return [segment.frames for segment in segments]

    expected = run(components())
    c = components(memory=memory())
    steps: list[tuple[int, int]] = []
    calls = Calls(monkeypatch, c.dit, "forward", {4: GPU})
    got = run(c, lambda index, info: steps.append((index, info.step)))
    assert steps == [(index, step) for index in range(3) for step in (1, 2)]
    assert calls.count == 6 + 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_a_failed_stage_held_is_free_before_it_is_repeated() -> None:
    held: list[weakref.ref[Tensor]] = []
    free: list[bool] = []
    made = memory()

    def work() -> int:
        free.extend(ref() is None for ref in held)
        if not held:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 7

    assert made.run("sampling", work, lambda move: None, str) == 7
    assert free == [True]


def test_components_that_are_loaded_get_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(components())
    c = components()
    made = Memory.planned(c, Job(height=32, width=48, num_frames=9))
    assert c.memory is made and made.settings == Settings()
    assert torch.equal(sample(c), expected)
    with pytest.raises(InputError, match="does not fit on"):
        monkeypatch.setattr(memory_module, "this_machine", lambda device: Machine("none", "cpu", 1, 1, SPEED))
        Memory.planned(c, Job(height=32, width=48, num_frames=9))


def test_an_error_while_a_change_is_carried_out_leads_to_the_next_one() -> None:
    made, changes = memory(Settings(cfg_mode="batched")), []

    def change(move: Any) -> None:
        changes.append(dict(move.changes))
        if len(changes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def work() -> int:
        if len(changes) < 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 7

    assert made.run("sampling", work, change, str) == 7
    assert changes == [{"cfg_mode": "sequential"}, {"stream": "ram"}]
