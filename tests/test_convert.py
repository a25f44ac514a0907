"""`lcv convert`: every form against the formats and the `gguf` package, whole or not at all, in little memory."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from cli_helpers import lcv, left_in, made, refused
from safetensors.torch import load_file, save_file
from test_quant_loading import CONFIG, fp8_file, int8_file
from torch import Tensor

from lcv_core.errors import CheckpointError, InputError
from lcv_core.quant.formats import dequantise, quantise
from lcv_core.weights import stream
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.compare import compare_velocities
from lcv_core.weights.convert import Form, convert
from lcv_core.weights.init import dit_state
from lcv_core.weights.quantised import KINDS, is_large

FORMS = ("bf16", "fp8", "int8", "q8_0", "q5_k", "q4_k")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dit_state(CONFIG, 3)


@pytest.fixture(scope="module")
def source(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "dit.safetensors"
    save_file(state, path)
    return path


def numbers_of(path: Path) -> dict[str, Tensor]:
    """All weights by our own loader, in fp32."""
    tensors = open_checkpoint(path).dit_tensors
    return {name: tensors.read(name, dtype=torch.float32) for name in tensors.keys()}  # noqa: SIM118


def expected(name: str, weight: Tensor, form: str, *, in_gguf: bool) -> Tensor:
    if form in KINDS and is_large(name):
        return dequantise(quantise(KINDS[form], weight))
    return weight if in_gguf and weight.dim() < 2 else weight.bfloat16().float()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("form, suffix", [("bf16", ".safetensors"), ("fp8", ".safetensors"), ("int8", ".safetensors"),
                                          ("bf16", ".gguf"), ("q8_0", ".gguf"), ("q5_k", ".gguf"), ("q4_k", ".gguf"),
                                          ])  # fmt: skip
def test_every_form_reads_back_and_its_errors_are_true(
    source: Path, state: dict[str, Tensor], tmp_path: Path, form: Form, suffix: str
) -> None:
    target = tmp_path / f"new{suffix}"
    report = convert(source, target, form)
    got = numbers_of(target)
    assert got.keys() == state.keys()
    errors = {row.name: row.error for row in report.rows}
    for name, weight in state.items():
        assert got[name].equal(expected(name, weight, form, in_gguf=suffix == ".gguf")), name
        if weight.norm() > 0:
            assert math.isclose(errors[name], relative(got[name], weight), rel_tol=1e-6, abs_tol=1e-12), name
    assert [row.error for row in report.worst] == sorted(errors.values(), reverse=True)
    assert 0 < target.stat().st_size - report.nbytes < 20_000  # the header
    assert open_checkpoint(target).dit_config == CONFIG
    assert left_in(tmp_path) == {target.name}
    if suffix == ".gguf":
        _check_with_the_package(target, got)
    else:
        assert load_file(target)["final_layer.linear.weight"].dtype == torch.bfloat16


def _check_with_the_package(path: Path, got: dict[str, Tensor]) -> None:
    reader = gguf.GGUFReader(path)
    assert {tensor.name for tensor in reader.tensors} == got.keys()
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data.copy(), tensor.tensor_type)).flatten()
        assert values.equal(got[tensor.name].flatten()), tensor.name
    patch = "x_embedder.proj.weight"
    assert reader.fields[f"comfy.gguf.orig_shape.{patch}"].contents() == list(got[patch].shape)
    assert reader.fields["general.architecture"].contents() == "longcat_video"


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_with_all_parts_becomes_one(tiny_checkpoint: Path, tmp_path: Path, form: Form) -> None:
    target = tmp_path / "new"
    convert(tiny_checkpoint, target, form, shard_bytes=100_000)
    assert not open_checkpoint(target).missing
    assert open_checkpoint(target).dit_config == open_checkpoint(tiny_checkpoint).dit_config
    assert open_checkpoint(target).native == open_checkpoint(tiny_checkpoint).native
    assert set(open_checkpoint(target).adapters) == {"distill", "refinement"}
    got, before = numbers_of(target), numbers_of(tiny_checkpoint)
    assert max(relative(got[name], value) for name, value in before.items() if value.norm() > 0) < 0.08
    if form in ("bf16", "fp8", "int8"):
        index = json.loads((target / "dit" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        shards = {name: load_file(target / "dit" / name) for name in set(index["weight_map"].values())}
        assert len(shards) > 1
        for name, shard in index["weight_map"].items():
            assert name in shards[shard]
        sizes = [sum(t.nbytes for t in shard.values()) for shard in shards.values()]
        assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= 100_000
    assert left_in(tmp_path) == {"new"}


def test_other_sources(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Separate scales, fused on the way; what has the kind already is copied bit for bit; back to bf16."""
    eight, kijai = int8_file(state, tmp_path / "a.safetensors"), fp8_file(state, tmp_path / "b.safetensors")
    convert(eight, tmp_path / "same.safetensors", "int8", rest="source")
    same = load_file(tmp_path / "same.safetensors")
    for name, tensor in load_file(eight).items():
        if name.removesuffix("_int8").removesuffix("_scale") not in state or is_large(name.split("_int8")[0]):
            assert same[name].equal(tensor), name
    convert(kijai, tmp_path / "fused.safetensors", "fp8")
    before, after = numbers_of(kijai), numbers_of(tmp_path / "fused.safetensors")
    assert all(after[name].equal(before[name]) for name in before if is_large(name))
    convert(tmp_path / "fused.safetensors", tmp_path / "c.gguf", "q8_0")
    convert(tmp_path / "c.gguf", tmp_path / "again.gguf", "q8_0")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    report = convert(tmp_path / "c.gguf", tmp_path / "plain.safetensors", "bf16")
    assert max(row.error for row in report.rows) < 2.0**-8
    assert {row.source for row in report.rows if is_large(row.name)} == {"Q8_0"}


def test_rest_as_in_the_source(source: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    convert(source, tmp_path / "a.safetensors", "int8", rest="source")
    got = numbers_of(tmp_path / "a.safetensors")
    assert all(got[name].equal(weight) for name, weight in state.items() if not is_large(name))


def test_velocities_are_compared(source: Path, tmp_path: Path) -> None:
    same = compare_velocities(source, source, dtype=torch.float32)
    assert same.relative_error == 0 and same.psnr == math.inf
    convert(source, tmp_path / "a.safetensors", "int8")
    found = compare_velocities(source, tmp_path / "a.safetensors", dtype=torch.float32)
    assert 1e-3 < found.relative_error < 0.02 and 45 < found.psnr < 75


# what can go wrong


def test_targets_that_are_refused(source: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    cases: list[tuple[Path, Path, Form, bool, str]] = [
        (source, tmp_path / "there.safetensors", "int8", False, "exists; .* ask for overwrite"),
        (source, tmp_path / "photos", "int8", True, "is not a checkpoint, so it is not overwritten"),
        (source, tmp_path / "a.gguf", "fp8", False, "GGUF has no fp8; .* q8_0"),
        (source, tmp_path / "a.safetensors", "q4_k", False, "written as GGUF; name a .gguf file"),
        (source, tmp_path / "a.pth", "bf16", False, "use .safetensors, .gguf or a folder"),
        (source, source, "int8", True, "is where the source is"),
        (tiny_checkpoint, tiny_checkpoint, "int8", True, "is where the source is"),
        (tiny_checkpoint, tiny_checkpoint / "dit", "int8", True, "is where the source is"),
        (tiny_checkpoint, tmp_path / "a.safetensors", "q3_k", False, "must be"),  # type: ignore[list-item]
    ]
    for given, target, form, overwrite, message in cases:
        with pytest.raises(InputError, match=message):
            convert(given, target, form, overwrite=overwrite)
    assert left_in(tmp_path) == {"there.safetensors", "photos"}
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    convert(source, tmp_path / "there.safetensors", "int8", overwrite=True)
    assert open_checkpoint(tmp_path / "there.safetensors").dit_config == CONFIG


def test_a_folder_is_replaced_whole(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    convert(tiny_checkpoint, target, "int8")
    with pytest.raises(InputError, match="exists"):
        convert(tiny_checkpoint, target, "q8_0")
    convert(tiny_checkpoint, target, "q8_0", overwrite=True)
    assert left_in(target / "dit") == {"config.json", "diffusion_pytorch_model.gguf"}


def test_a_disk_without_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stream._write

    def full(file: Any, slot: Any, tensor: Tensor) -> None:
        if "blocks.1" in slot.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, slot, tensor)

    monkeypatch.setattr(stream, "_write", full)
    for target in (tmp_path / "a.safetensors", tmp_path / "folder"):
        with pytest.raises(InputError, match=r"no room left on the disk .* nothing was kept, free some space"):
            convert(source, target, "int8")
    assert left_in(tmp_path) == set()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"takes 0\.0 GB, its disk has 0\.0 GB free; free some space"):
        convert(source, tmp_path / "a.gguf", "q8_0")
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("name", ["new.gguf", "folder"])
def test_a_source_that_changes_and_one_that_is_cut(state: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "dit.safetensors", tmp_path / name

    def touch(done: int, total: int) -> None:
        if done == 5:
            os.utime(source, ns=(1, 1))

    def cut(done: int, total: int) -> None:
        if done == 5:
            os.truncate(source, 100_000)

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    for happens, error, message in (
        (touch, CheckpointError, "changed while it was read"),
        (cut, CheckpointError, "changed while it was read"),
        (interrupt, KeyboardInterrupt, None),
    ):
        save_file(state, source)
        with pytest.raises(error, match=message):
            convert(source, target, "q8_0", on_tensor=happens)
        assert left_in(tmp_path) == {source.name}
    os.truncate(source, 100_000)
    with pytest.raises(CheckpointError, match=r"cut short: .* bytes are missing"):
        convert(source, target, "q8_0")


_MEASURE = """
import resource, sys, torch
from pathlib import Path
from lcv_core.weights.convert import convert
torch.set_num_threads(1)
small, big, target = map(Path, sys.argv[1:])
convert(small, target.with_suffix(".warm.safetensors"), "int8")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(big, target, "int8")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(source: Path, tmp_path: Path) -> None:
    """On top of what a small model took: a few times the largest weight of 13 MB, less than a quarter of 200 MB."""
    from lcv_core.config import DiTConfig
    from lcv_core.dit.model import LongCatDiT

    config = DiTConfig(hidden_size=1024, depth=3, num_heads=8, caption_channels=32, adaln_tembed_dim=32)
    shapes = {k: tuple(v.shape) for k, v in LongCatDiT(config, device="meta").state_dict().items()}
    slots = [stream.Slot(name, "F32", shape) for name, shape in shapes.items()]
    noise = torch.rand(1 << 22)
    values = (noise[: math.prod(slot.shape)].view(slot.shape) for slot in slots)
    big = tmp_path / "big.safetensors"
    stream.write_safetensors(big, slots, values, {})
    assert big.stat().st_size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(source), str(big), str(tmp_path / "new.safetensors")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) * 1024 < 0.25 * big.stat().st_size
    assert open_checkpoint(tmp_path / "new.safetensors").dit_config == config


# the command line


def test_the_command_prints_a_report_and_what_it_wrote_makes_videos(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target, errors = tmp_path / "new", tmp_path / "errors.csv"
    outcome = lcv("convert", tiny_checkpoint, target, "--to", "q4_k", "--report", errors, "--check")
    assert outcome.code == 0 and f"wrote {target}" in outcome.err
    text = " ".join(outcome.out.replace("│", " ").split())
    assert "14 weights are not in the form asked for" in text and "became" in text
    assert "velocity on random latents, in float32: relative error" in text and "PSNR" in text
    rows = list(csv.DictReader(errors.open(encoding="utf-8")))
    assert len(rows) == len(numbers_of(tiny_checkpoint))
    values = [float(row["relative_error"]) for row in rows]
    assert values == sorted(values, reverse=True) and rows[0]["kind"] == "Q4_K"
    assert {row["kind"] for row in rows} == {"Q4_K", "Q8_0", "BF16", "F32"}
    assert any(row["note"] == "rows of 64 do not fill Q4_K blocks" for row in rows)
    made("t2v", "-m", target, "-p", "a red ball", "--steps", 1, "--seed", 1, "--weights", "stored",
         "-o", tmp_path / "a.safetensors")  # fmt: skip


def test_mistakes_are_one_sentence(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    assert "does not exist" in refused("convert", tmp_path / "nothing", target, "--to", "int8")
    assert "--report writes a .csv file" in refused(
        "convert", tiny_checkpoint, target, "--to", "int8", "--report", "a.txt"
    )
    assert "written as GGUF" in refused("convert", tiny_checkpoint, target, "--to", "q4_k")
