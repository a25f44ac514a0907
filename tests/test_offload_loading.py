"""A streamed transformer gives bit for bit what it gives as a whole, in every form of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cli_helpers import made, refused
from offload_fakes import FakeLanes
from safetensors.torch import save_file
from test_gguf import flat_patch, write
from torch import Tensor

from lcv_core.config import DiTConfig
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.names import Weights
from lcv_core.offload import turns
from lcv_core.weights import streamed
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.convert import Form, convert
from lcv_core.weights.init import dit_state, lora_state
from lcv_core.weights.keymaps import WAN_DIT, sources
from lcv_core.weights.lora import load_lora

# Rows of 256 and 768: what the K types need.
CONFIG = DiTConfig(hidden_size=256, depth=3, num_heads=4, caption_channels=32, adaln_tembed_dim=32)
FORMS: tuple[Form, ...] = ("bf16", "fp8", "int8", "q8_0", "q4_k")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dit_state(CONFIG, 3)


@pytest.fixture(scope="module")
def files(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same model as a file in any form; "wan" has q, k and v apart, "mixed" types that differ inside of qkv."""
    folder = tmp_path_factory.mktemp("forms")
    plain = folder / "fp32.safetensors"
    save_file(state, plain)

    def file(form: str) -> Path:
        path = folder / f"{form}{'.gguf' if form[0] == 'q' or form == 'mixed' else '.safetensors'}"
        if path.exists():
            return path
        if form in FORMS:
            convert(plain, path, form)
            return path
        apart = {}
        for name, tensor in state.items():
            for source, slot in sources(name, WAN_DIT):
                rows = tensor.shape[0] // slot.parts
                apart[source] = tensor[slot.part * rows : (slot.part + 1) * rows].clone()
        if form == "wan":
            save_file(apart, path)
            return path
        kinds = {"self_attn.v.weight": "Q8_0", "self_attn.": "Q4_0", "cross_attn": "Q5_1", "ffn": "Q5_0"}
        return write(
            path, flat_patch(apart),
            lambda name, tensor: next((k for p, k in kinds.items() if p in name and tensor.dim() == 2), "F32"),
        )  # fmt: skip

    return file


@torch.no_grad()
def run(dit: LongCatDiT, **more: Any) -> Tensor:
    g = torch.Generator().manual_seed(5)
    latents = torch.randn(1, CONFIG.in_channels, 2, 4, 6, generator=g)
    return dit(latents, torch.tensor([500.0]), torch.randn(1, 5, CONFIG.caption_channels, generator=g), **more)


def on_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on "the CPU" has two lanes, as a GPU has."""
    monkeypatch.setattr(streamed, "lanes_of", lambda device: FakeLanes("late"))


CASES = [
    ("fp32", "plain", None), ("fp32", "plain", torch.bfloat16), ("bf16", "plain", torch.float32),
    ("wan", "plain", torch.bfloat16), ("wan", "plain", None),
    ("fp8", "stored", None), ("fp8", "plain", None), ("int8", "stored", torch.float32), ("int8", "int8-matmul", None),
    ("int8", "plain", None), ("q8_0", "stored", None), ("q4_k", "stored", torch.float32), ("q4_k", "plain", None),
    ("q4_k", "q4_k", None), ("mixed", "stored", None), ("mixed", "plain", torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("lanes", ["cpu", "two lanes"])
@pytest.mark.parametrize(("form", "weights", "dtype"), CASES)
def test_from_disk(
    files: Callable[[str], Path], form: str, weights: Weights, dtype: torch.dtype | None, lanes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checkpoint = open_checkpoint(files(form))
    expected = run(checkpoint.load_dit(weights=weights, dtype=dtype))
    if lanes != "cpu":
        on_fake_device(monkeypatch)
    dit = checkpoint.load_dit(weights=weights, dtype=dtype, streaming="disk")
    assert [p.is_meta for p in dit.parameters()] == [n.startswith("blocks.") for n, _ in dit.named_parameters()]
    assert run(dit).equal(expected) and run(dit).equal(expected)
    dit.stop_streaming()


@pytest.mark.parametrize(
    ("form", "weights"),
    [("fp32", "plain"), ("fp32", "fp8"), ("fp32", "int8-matmul"), ("fp32", "q4_k"), ("mixed", "stored")],
)
def test_from_system_memory(
    files: Callable[[str], Path], form: str, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(files(form))
    expected = run(checkpoint.load_dit(weights=weights))
    on_fake_device(monkeypatch)
    dit = checkpoint.load_dit(weights=weights, streaming="ram")
    assert all(tensor.is_meta for tensor in dit.blocks.state_dict().values())
    assert run(dit).equal(expected) and run(dit).equal(expected)


def test_system_memory_is_where_a_model_on_the_cpu_is(files: Callable[[str], Path]) -> None:
    dit = open_checkpoint(files("fp32")).load_dit(streaming="ram")
    assert dit._in_turn is None and not any(p.is_meta for p in dit.parameters())


def test_leading_blocks_stay_where_there_is_room(files: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(files("fp32"))
    one = sum(p.nbytes for p in checkpoint.load_dit().blocks[0].parameters())
    dit = checkpoint.load_dit(streaming="disk", resident=2 * one + 100_000)
    assert isinstance(dit._in_turn, turns.BlocksInTurn) and dit._in_turn.resident == 2
    assert [next(block.parameters()).is_meta for block in dit.blocks] == [False, False, True]
    assert run(dit).equal(run(checkpoint.load_dit()))
    dit.stop_streaming()


@pytest.fixture(params=["cpu", "two lanes"])
def disk(
    request: pytest.FixtureRequest, files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LongCatDiT]:
    if request.param != "cpu":
        on_fake_device(monkeypatch)
    dit = open_checkpoint(files("fp32")).load_dit(streaming="disk")
    yield dit
    dit.stop_streaming()


@pytest.fixture
def whole(files: Callable[[str], Path]) -> LongCatDiT:
    return open_checkpoint(files("fp32")).load_dit()


def test_adapters(disk: LongCatDiT, whole: LongCatDiT, state: dict[str, Tensor]) -> None:
    bare = run(whole)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    adapters = [lora_state(shapes, name, seed=7) for name in ("cfg_step_lora", "refinement_lora")]
    handles = [[load_lora(dit, adapter, 0.7) for adapter in adapters] for dit in (disk, whole)]
    assert run(disk).equal(run(whole)) and not run(whole).equal(bare)
    for first, _ in handles:
        first.set_strength(0.2)
    assert run(disk).equal(run(whole))
    for both in handles:
        for handle in both:
            handle.remove()
    assert run(disk).equal(bare)
    with pytest.raises(InputError, match='use mode="runtime"'):
        load_lora(disk, adapters[0], mode="merged")


@pytest.mark.parametrize("storage", ["model", "fp8"])
def test_with_a_kv_cache(disk: LongCatDiT, whole: LongCatDiT, storage: Literal["model", "fp8"]) -> None:
    cond = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(2))
    results = []
    for dit in (disk, whole):
        dit.set_kv_cache(storage=storage)
        cache = dit.build_kv_cache(cond)
        results.append(run(dit, num_cond_latents=1, kv_cache=cache))
    assert results[0].equal(results[1])


def test_with_another_attention(disk: LongCatDiT, whole: LongCatDiT) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, 2 * v)

    for dit in (disk, whole):
        dit.set_attention(attend)
    assert run(disk).equal(run(whole))


def test_what_cannot_be_streamed_is_refused_before_weights_are_read(
    files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(files("fp32"))
    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoint.dit_tensors), "read", None)
        with pytest.raises(InputError, match=r"another form; convert it once \(lcv convert \.\.\. --to int8\)"):
            checkpoint.load_dit(streaming="disk", weights="int8-matmul")
        with pytest.raises(InputError, match='streaming must be "off", "ram" or "disk"'):
            checkpoint.load_dit(streaming="tape")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="needs a CUDA device or the CPU"):
            checkpoint.load_dit(streaming="ram", device="meta")
        with pytest.raises(InputError, match="at least 1 slot"):
            checkpoint.load_dit(streaming="disk", slots=0)
        with pytest.raises(InputError, match="resident must be 0"):
            checkpoint.load_dit(streaming="disk", resident=-1)


# the command line


@pytest.mark.parametrize("command", [
    ["t2v", "--schedule", "distilled"], ["t2v", "--guidance", 3], ["long", "--segments", 2],
])  # fmt: skip
def test_the_command_line_makes_the_same(tiny_checkpoint: Path, tmp_path: Path, command: list[Any]) -> None:
    made_with: dict[str, bytes] = {}
    for stream in ("off", "disk"):
        path = tmp_path / f"{stream}.safetensors"
        made(
            *command,
            "-m",
            tiny_checkpoint,
            "-p",
            "a red ball",
            "--steps",
            2,
            "--seed",
            3,
            "--stream",
            stream,
            "-o",
            path,
        )
        made_with[stream] = latents(path)
    assert made_with["off"] == made_with["disk"]


def latents(path: Path) -> bytes:
    from safetensors.torch import load_file

    return load_file(path)["latents"].numpy().tobytes()


def test_streaming_travels_with_the_job_and_another_may_be_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from lcv_core.cli.outputs import read_settings

    first, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    made("t2v", "-m", tiny_checkpoint, "-p", "x", "--steps", 1, "--stream", "disk", "--resident", 0.5, "-o", first)
    job = read_settings(first)["job"]
    assert (job["stream"], job["resident"]) == ("disk", 0.5)
    made("rerun", first, "--stream", "off", "-o", again)
    assert read_settings(again)["job"]["stream"] == "off" and latents(first) == latents(again)


def test_options_that_do_not_go_together(tiny_checkpoint: Path) -> None:
    common = ["t2v", "-m", tiny_checkpoint, "-p", "x", "--steps", 1]
    assert "--weights int8 cannot be streamed from disk" in refused(*common, "--stream", "disk", "--weights", "int8")
    assert "--resident must be 0 or more" in refused(*common, "--stream", "disk", "--resident", "inf")
