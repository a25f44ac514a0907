"""The benchmark scripts run to the end, write what they say, and judge their own numbers rightly; no time is tested."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
BLOCK = ("adaLN", "norm + modulate", "qkv", "norm + rope", "attention", "proj", "gate", "cross", "ffn", "block")
JOBS = ("t2v 480p93 dense", "t2v 480p93 sparse", "refine 720p189 sparse")
Row = dict[str, str]


def run(script: str, *arguments: object, out: Path) -> tuple[list[Row], str]:
    """The rows that a script wrote to `out`, and what it printed."""
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *map(str, arguments), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment)
    assert done.returncode == 0, done.stderr
    with (out / f"{script}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), done.stdout


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row], str]:
    out = tmp_path_factory.mktemp("pipeline")
    return out, *run("pipeline", "--tiny", "--official", out / "nowhere", out=out)


@pytest.mark.slow
def test_the_pipeline_times_every_stage(pipeline: tuple[Path, list[Row], str]) -> None:
    _, rows, _ = pipeline
    assert not [row for row in rows if row["status"].startswith("failed")]
    found = {(row["job"], row["side"], row["form"], row["part"]) for row in rows if row["status"] == "ok"}
    for job in JOBS:
        assert {(job, "ours", "plain", part) for part in (*BLOCK, "embed", "final", "step")} <= found
        assert {(job, "ours", "int8-matmul", part) for part in ("qkv", "ffn", "block", "step")} <= found
    assert {("continue 480p93 cached", "ours", "plain", part) for part in ("cache", "step")} <= found
    clips = [(clip, part) for clip in ("480p93", "720p189") for part in ("encode", "decode")]
    assert {(clip, "ours", "plain", part) for clip, part in clips} <= found
    assert ("prompt", "ours", "plain", "encode") in found
    timed = [row for row in rows if row["runs"]]
    assert all(0 < float(row["min"]) <= float(row["ms"]) <= float(row["max"]) for row in timed)
    assert all(float(row["limit_ms"]) > 0 for row in timed if row["part"] in BLOCK)


@pytest.mark.slow
def test_the_pipeline_counts_the_rest_from_what_it_timed(pipeline: tuple[Path, list[Row], str]) -> None:
    _, rows, _ = pipeline
    for clip, latents in (("480p93", 24), ("720p189", 48)):
        few, more, whole = (
            next(float(row["ms"]) for row in rows if row["job"] == clip and row["part"] == part)
            for part in ("decode of 1 latents", "decode of 3 latents", "decode")
        )
        assert whole == pytest.approx(few + (latents - 1) * (more - few) / 2, rel=1e-3, abs=1e-3)
    counted = [row for row in rows if row["part"] in ("step", "cache", "encode", "decode") and row["stage"] != "parity"]
    assert counted and all(row["extrapolated"] for row in counted)


@pytest.mark.slow
def test_the_pipeline_says_what_is_missing_and_judges_nothing_unreal(pipeline: tuple[Path, list[Row], str]) -> None:
    out, rows, said = pipeline
    official = [row["status"] for row in rows if row["side"] == "official"]
    assert len(official) == 6  # four jobs, the VAE and the comparison of outputs
    assert all(status.startswith("absent: ") and "is no checkout" in status for status in official)
    goals = json.loads((out / "pipeline.json").read_text())["goals"]
    unreal = [goal for goal in goals if goal["unit"] in ("x", "s")]
    assert len(unreal) == 9 and all(goal["verdict"] == "unknown" and goal["why"] for goal in unreal)
    exact = next(goal for goal in goals if goal["text"] == "PSNR of int8")
    assert 20 < exact["value"] < 200  # dB: not the same numbers, and not other ones
    again, _ = run("pipeline", "--goals", "--tiny", out=out)
    assert again == rows
    assert "goals:" in said and "assumed:" in said


def test_a_projected_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 steps at 480p, 5 at 720p, and everything else once."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import projection  # pyright: ignore[reportMissingImports]

    def row(stage: str, job: str, part: str, ms: float, side: str = "ours", form: str = "plain") -> Row:
        keys = {"stage": stage, "job": job, "part": part, "side": side, "form": form}
        return keys | {"ms": str(ms), "status": "ok", "note": ""}

    rows = [
        row("text", "prompt", "encode", 50), row("transformer", projection.SPARSE, "step", 1000),
        row("VAE", "480p93", "decode", 2000), row("VAE", "720p189", "encode", 3000),
        row("transformer", projection.REFINE, "step", 4000), row("VAE", "720p189", "decode", 5000),
    ]  # fmt: skip
    assert projection.clip_seconds(rows, "ours", "plain", projection.SPARSE) == pytest.approx(46.05)
    assert projection.clip_seconds(rows, "ours", "plain", projection.DENSE) is None
    rows += [row("transformer", projection.DENSE, "step", 1650, side="official")]
    rows += [row("transformer", projection.REFINE, "step", 6400, side="official")]
    verdicts = {goal.text: goal.verdict for goal in projection.goals_of(rows, full=True)}
    assert verdicts["DiT step at 480p, official dense over ours sparse"] == "NOT MET"  # 1.65
    assert verdicts["DiT step of refine at 720p, both sparse, plain"] == "met"  # 1.6
    assert verdicts["DiT step of refine at 720p, both sparse, ours fp8"] == "unknown"
    assert verdicts["480p93 -> 720p189 clip, plain, 480p sparse"] == "met"
    assert {goal.verdict for goal in projection.goals_of(rows, full=False)} == {"unknown"}


@pytest.mark.slow
def test_a_long_video_does_the_same_work_in_every_segment(tmp_path: Path) -> None:
    rows, said = run("long_video", "--tiny", "--segments", 5, "--windows", 2, out=tmp_path)
    jobs = {row["job"]: [r for r in rows if r["job"] == row["job"]] for row in rows}
    assert [row["part"] for row in jobs["long 5"]] == ["start", *["segment"] * 5, "end"]
    assert [row["part"] for row in jobs["refine 2"]] == ["start", "window", "window", "end"]
    assert all(float(row["rss_mib"]) > 0 for row in rows)
    calls = [int(row["calls"]) for row in jobs["long counted 5"][3:6]]  # the first two differ: no condition, no cache
    assert calls[0] > 1000 and max(calls) - min(calls) <= calls[0] // 1000
    assert "calls of the last 3 over the first 3" in said


@pytest.mark.slow
def test_memory_is_counted_at_every_stage(tmp_path: Path) -> None:
    rows, _ = run("memory", "--tiny", out=tmp_path)
    counted = [row for row in rows if row["row"] == "counted"]
    assert {row["stage"] for row in counted} == {"forward", "VAE decode", "VAE encode", "text encode"}
    assert all(1 <= float(row["ratio"]) < 1.25 for row in counted)
    planned = {(row["job"], row["stage"]) for row in rows if row["row"] == "planned"}
    assert {("t2v 480p93", "sampling"), ("refine 720p189", "refine sampling")} <= planned
