"""Unfinished work on disk: latents between steps, segments of a long job."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.partial import PartialRun, SegmentStore, fingerprint, read_note, save_atomic


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))


def test_fingerprint_is_of_the_content_not_of_the_order() -> None:
    assert fingerprint({"a": 1, "b": [2, "ü"]}) == fingerprint({"b": [2, "ü"], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    fingerprint({"prompt": "\ud83d"})  # half a surrogate pair, as some terminals send it


def test_files_follow_the_umask(tmp_path: Path, latents: Tensor) -> None:
    before = os.umask(0o027)
    try:
        save_atomic(tmp_path / "a.safetensors", {"x": latents}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    save_atomic(file, {"x": latents}, {"step": "1"})

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as out:
            out.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(InputError, match="no room left on the disk"):
        save_atomic(file, {"x": latents + 1}, {"step": "2"})
    assert torch.equal(load_file(file)["x"], latents)
    assert list(tmp_path.iterdir()) == [file]


def test_a_save_below_a_file_is_one_sentence(tmp_path: Path, latents: Tensor) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="part of its path is a file"):
        save_atomic(tmp_path / "file" / "deep" / "a.safetensors", {"x": latents}, {})


def test_a_run_goes_on_from_its_own_latents(tmp_path: Path, latents: Tensor) -> None:
    resumed: list[tuple[int, Path]] = []
    file = tmp_path / "a.partial.safetensors"
    run = PartialRun(file, "key", note="who", on_resume=lambda step, path: resumed.append((step, path)))
    assert run.load(latents) == (0, latents) and resumed == []
    run.save(3, latents * 2)
    step, found = run.load(torch.zeros_like(latents))
    assert step == 3 and torch.equal(found, latents * 2)
    assert resumed == [(3, file)]
    assert read_note(file) == "who"
    run.clear()
    assert list(tmp_path.iterdir()) == []
    run.clear()


def test_latents_are_kept_exactly_and_given_back_in_the_dtype_asked_for(tmp_path: Path, latents: Tensor) -> None:
    run = PartialRun(tmp_path / "a", "key")
    run.save(1, latents)
    assert run.load(torch.zeros(latents.shape, dtype=torch.float64))[1].dtype == torch.float64
    assert torch.equal(run.load(latents * 0)[1], latents)
    transposed = latents.transpose(3, 4)
    run.save(2, transposed)
    assert torch.equal(run.load(torch.zeros_like(transposed))[1], transposed)


def test_latents_of_another_run_are_not_taken(
    tmp_path: Path, latents: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    PartialRun(tmp_path / "a", "key").save(3, latents)
    with caplog.at_level(logging.WARNING):
        assert PartialRun(tmp_path / "a", "other").load(latents)[0] == 0
        assert PartialRun(tmp_path / "a", "key").load(latents[:, :, :1])[0] == 0
    assert caplog.text.count("belongs to a run with other settings") == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "no step"])
def test_damaged_latents_are_ignored(
    tmp_path: Path, latents: Tensor, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a"
    PartialRun(file, "key").save(3, latents)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        save_atomic(file, {"latents" if damage == "no step" else "x": latents}, {"key": "key"})
    assert PartialRun(file, "key").load(latents)[0] == 0
    assert "ignoring the unreadable partial run" in caplog.text


def test_ticks_save_when_the_last_save_is_old_enough(tmp_path: Path, latents: Tensor) -> None:
    rarely, always = PartialRun(tmp_path / "a", "key"), PartialRun(tmp_path / "b", "key", every=0.0)
    rarely.tick(1, latents)
    always.tick(1, latents)
    assert not rarely.path.exists() and always.path.exists()


# Segments


def test_segments_are_counted_without_a_gap(tmp_path: Path, latents: Tensor) -> None:
    store = SegmentStore(tmp_path / "s", "key", note="who")
    assert store.finished() == 0 and store.load(0) is None
    for index in (0, 1, 3):
        store.save(index, latents + index)
    assert store.finished() == 2
    again = SegmentStore(tmp_path / "s", "key")
    found = again.load(1)
    assert again.finished() == 2 and found is not None and torch.equal(found, latents + 1)


def test_a_segment_that_a_power_cut_left_empty_is_made_again(tmp_path: Path, latents: Tensor) -> None:
    store = SegmentStore(tmp_path / "s", "key")
    store.save(0, latents)
    store.save(1, latents)
    store.path(0).write_bytes(b"")
    assert store.finished() == 0 and store.load(0) is None


def test_a_finished_segment_needs_no_partial_run(tmp_path: Path, latents: Tensor) -> None:
    steps: list[int] = []
    store = SegmentStore(tmp_path / "s", "key", on_resume=lambda step, path: steps.append(step))
    store.progress(1).save(4, latents)
    assert store.progress(1).load(latents)[0] == 4 and steps == [4]
    assert store.progress(0).load(latents)[0] == 0
    store.save(1, latents)
    assert {path.name for path in store.folder.iterdir()} == {"job.json", "segment_0001.safetensors"}


def test_another_jobs_segments_are_refused_and_kept(tmp_path: Path, latents: Tensor) -> None:
    store = SegmentStore(tmp_path / "s", "key", note="first")
    store.save(0, latents)
    before = {path: path.read_bytes() for path in store.folder.iterdir()}
    with pytest.raises(InputError, match="holds the segments of a job with other settings"):
        SegmentStore(tmp_path / "s", "other", note="second")
    assert {path: path.read_bytes() for path in store.folder.iterdir()} == before
    SegmentStore(tmp_path / "s", "other", note="second", overwrite=True)
    assert read_note(tmp_path / "s") == "second"
    assert {path.name for path in store.folder.iterdir()} == {"job.json"}


def test_a_folder_without_work_is_free_for_another_job(tmp_path: Path) -> None:
    SegmentStore(tmp_path / "s", "key", note="first")
    store = SegmentStore(tmp_path / "s", "other", note="second")
    assert read_note(tmp_path / "s") == "second"
    store.remove_if_empty()
    assert list(tmp_path.iterdir()) == []
    store.remove_if_empty()


@pytest.mark.parametrize("job", [None, "{", "[]"])
def test_a_folder_that_is_not_a_jobs_is_never_touched(tmp_path: Path, job: str | None) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("mine")
    if job is not None:
        (folder / "job.json").write_text(job)
    with pytest.raises(InputError, match="holds the segments of a job with other settings"):
        SegmentStore(folder, "key")
    if job is None:
        with pytest.raises(InputError):
            SegmentStore(folder, "key", overwrite=True)
    assert (folder / "holiday.jpg").read_text() == "mine"


def test_a_store_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "s"):
        with pytest.raises(InputError, match="cannot be written"):
            SegmentStore(folder, "key")


def test_notes_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("gone", "x", "folder"):
        assert read_note(tmp_path / name) is None


def test_the_key_is_in_the_file(tmp_path: Path, latents: Tensor) -> None:
    PartialRun(tmp_path / "a", "key").save(2, latents)
    with safe_open(tmp_path / "a", "np") as file:
        assert file.metadata() == {"key": "key", "step": "2", "note": ""}
