"""Evaluation against makers whose clips are known: the renderer's own, wrong ones, jumping ones."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cli_helpers import made, refused
from PIL import Image
from torch import Tensor

from lcv_core.config import Native
from lcv_core.errors import InputError
from lcv_core.names import Handover, RefineAttention
from lcv_core.pipelines import long_video_segments, text_to_video
from lcv_core.pipelines.base import Components
from lcv_core.training.data.clips import refined_clip
from lcv_core.training.data.grammar import is_held_back
from lcv_core.training.data.render import clip_times, render
from lcv_core.training.evaluation.cases import Case, make_cases
from lcv_core.training.evaluation.evaluate import evaluate
from lcv_core.training.evaluation.maker import CheckpointMaker, Sampling
from lcv_core.training.evaluation.records import RecordFile
from lcv_core.training.evaluation.report import COLUMNS, Report
from lcv_core.training.evaluation.runs import upsampled
from lcv_core.training.evaluation.settings import HANDOVERS, Row, Settings
from lcv_core.training.evaluation.statistics import mean, paired_p_value, proportion
from lcv_core.training.evaluation.suites import recommend
from lcv_core.training.evaluation.traits import clip_traits
from lcv_core.weights.checkpoint import open_checkpoint

NATIVE = Native(height=64, width=96, num_frames=17, num_cond_frames=5)
PRINTS = {"model": "m", "distill": "d", "refinement": "r"}
SMALL = Settings(seed=1, count=4, segments=3, kept_segments=2, sheet=2, batch=3)


def blurred(clips: Tensor) -> Tensor:
    x = clips.movedim(-1, 2)
    return torch.nn.functional.avg_pool2d(x.flatten(0, 1), 3, 1, 1).view_as(x).movedim(2, -1)


class Renderer:
    """A maker that knows the answer. blue: what is asked for in another colour comes in blue. forgets: the hand-overs
    whose continued segments start somewhere else in the scene. fine: whether refinement works, else it is the plain
    upsampling. calls: how many clips it made, by task."""

    def __init__(
        self, *, blue: bool = False, forgets: Sequence[Handover] = (), fine: bool = True, fails_after: int = 10**9
    ) -> None:
        self.native, self.blue, self.forgets, self.fine, self.fails_after = NATIVE, blue, forgets, fine, fails_after
        self.calls: dict[str, int] = {}

    def _count(self, task: str, clips: int) -> None:
        self.calls[task] = self.calls.get(task, 0) + clips
        if sum(self.calls.values()) > self.fails_after:
            raise KeyboardInterrupt

    def _show(self, case: Case, first: int, count: int, *, blue: bool | None = None) -> Tensor:
        scene = dataclasses.replace(case.scene, colour="blue") if (self.blue if blue is None else blue) else case.scene
        return render(scene, clip_times(count, 15.0, start=first / 15.0), NATIVE.height, NATIVE.width)

    def from_text(self, cases: Sequence[Case], sampling: Sampling) -> Tensor:
        self._count(sampling.schedule, len(cases))
        blue = True if sampling.num_steps == 4 else None
        clips = torch.stack([self._show(case, 0, 17, blue=blue) for case in cases]).float() / 255
        return blurred(clips) if sampling.adapter else clips

    def from_images(self, cases: Sequence[Case], images: Tensor, sampling: Sampling) -> Tensor:
        self._count("image", len(cases))
        clips = torch.stack([self._show(case, 0, 17) for case in cases]).float() / 255
        noise = 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        clips[:, 0] = images.float() / 255 + noise  # 40 dB
        return clips

    def long(self, cases: Sequence[Case], sampling: Sampling, *, segments: int, handover: Handover) -> Iterator[Tensor]:
        self._count("long", len(cases))
        first = 0
        for index in range(segments):
            count = 17 if index == 0 else 12
            shift = 25 * index if handover in self.forgets else 0
            yield torch.stack([self._show(case, first + shift, count) for case in cases]).float() / 255
            first += count

    def refined(self, case: Case, frames: Tensor, attention: RefineAttention) -> Tensor:
        self._count("refine", 1)
        if self.fine:
            truth = refined_clip(case.clip(17, 64, 96, 15.0), time_mapping="stretch").frames.float() / 255
            return truth if attention == "dense" else (truth + 0.01).clamp(0, 1)
        source = frames if frames.dtype == torch.uint8 else (frames * 255).round().to(torch.uint8)
        return upsampled(source, (34, 128, 192, 3))["trilinear"]


def run(maker: Renderer, out: Path, settings: Settings = SMALL, **options: object) -> Report:
    return evaluate(maker, settings, out, prints=PRINTS, **options)  # type: ignore[arg-type]


def pick(report: Report, suite: str, metric: str, variant: str | None = None, group: str = "all") -> Row:
    (found,) = [
        row
        for row in report.rows
        if (row.suite, row.metric, row.group) == (suite, metric, group) and variant in (None, row.variant)
    ]
    return found


@pytest.fixture(scope="module")
def perfect(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """Everything that can be evaluated, of a maker that does everything right."""
    out = tmp_path_factory.mktemp("perfect")
    return run(Renderer(forgets=("official",)), out), out


# What is asked


def test_cases_are_held_back_and_come_in_rounds() -> None:
    cases = make_cases(7, range(80))
    combinations = [(c.scene.object, c.scene.colour, c.scene.motion) for c in cases]
    assert len({*combinations[:40]}) == len({*combinations[40:]}) == 40
    assert all(is_held_back(case.scene) for case in cases)
    assert make_cases(7, [53]) == cases[53:54]
    assert [c.scene for c in make_cases(8, range(3))] != [c.scene for c in cases[:3]]
    for case in cases:
        assert case.named.items() <= case.scene.attributes.items()
    a, b = (torch.rand(2, generator=cases[i].noise("text")) for i in (0, 1))
    assert not torch.equal(a, b)
    assert not torch.equal(a, torch.rand(2, generator=cases[0].noise("image")))


# How sure it is


def test_intervals_of_proportions() -> None:
    """Against tables of Wilson's interval."""
    found = proportion(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert proportion(10, 10).low == pytest.approx(0.7225, abs=1e-4)
    assert proportion(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert proportion(10, 10).high == 1.0 and proportion(0, 10).low == 0.0
    assert math.isnan(proportion(0, 0).value)


def test_intervals_of_means() -> None:
    found = mean([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt((2.25 + 0.25) * 2 / 3 / 4)
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert math.isnan(mean([3.0]).low) and mean([3.0]).value == 3.0


def test_paired_differences() -> None:
    assert paired_p_value([1.0] * 5) == 2 / 32  # exact: all signs alike
    assert paired_p_value([1.0, -1.0]) == 1.0
    assert paired_p_value([0.0] * 30) == 1.0
    gains = (0.1 + 0.2 * torch.randn(100, generator=torch.Generator().manual_seed(1))).tolist()
    assert paired_p_value(gains) < 0.01
    noise = torch.randn(100, generator=torch.Generator().manual_seed(2)).tolist()
    assert 0.05 < paired_p_value(noise) <= 1.0


# What is found


def test_the_renderers_own_clips_are_all_right(perfect: tuple[Report, Path]) -> None:
    report, _ = perfect
    for suite in ("t2v", "i2v"):
        for metric in ("colour", "object", "motion", "all that is named"):
            row = pick(report, suite, metric)
            assert (row.value, row.count) == (100.0, 4), metric
    assert pick(report, "i2v", "first frame PSNR").value == pytest.approx(40.0, abs=0.5)
    assert pick(report, "t2v", "colour").met is True
    assert not [r for r in report.rows if r.suite == "t2v" and r.metric == "texture"]  # it cannot be seen there
    by_value = [r for r in report.rows if r.suite == "t2v" and r.group.startswith("motion: ")]
    assert sum(row.count for row in by_value) == 4


def test_continued_videos(perfect: tuple[Report, Path]) -> None:
    report, _ = perfect
    for handover in HANDOVERS:
        assert pick(report, "continuation", "colour over 2 segments", handover).value == 100.0
        assert pick(report, "continuation", "object in all of 2 segments", handover).value == 100.0
        assert pick(report, "continuation", "object colour drift", handover, "segment 3").value < 6
        sharp = pick(report, "continuation", "sharpness, of the first segment's", handover, "segment 3").value
        assert sharp == pytest.approx(1.0, abs=0.1)
    seams = {h: pick(report, "continuation", "seam jump over 2 segments", h).value for h in HANDOVERS}
    assert seams["frames"] == seams["latents"] == pytest.approx(1.0, abs=0.25)
    assert seams["official"] > 1.5
    assert report.handover == "frames"
    assert pick(report, "continuation", "seam jump over 2 segments", "frames").target is not None
    assert pick(report, "continuation", "seam jump over 2 segments", "official").target is None


def test_refined_clips(perfect: tuple[Report, Path]) -> None:
    report, _ = perfect
    assert pick(report, "refine", "PSNR", "dense").value == 100.0  # equal clips
    assert 38 < pick(report, "refine", "PSNR", "sparse").value < 44
    gains = [r for r in report.rows if r.metric.startswith("PSNR over trilinear") and r.variant == "sparse"]
    assert [row.met for row in gains] == [True] and gains[0].value > 5
    assert pick(report, "refine", "PSNR over dense", "sparse").met is False
    assert pick(report, "refine", "SSIM", "dense").value == pytest.approx(1.0)
    for variant in ("sparse", "dense", "sparse, generated clips"):
        assert pick(report, "refine", "texture, of those with a pattern", variant).met is True


def test_fewer_steps(perfect: tuple[Report, Path]) -> None:
    report, _ = perfect
    assert pick(report, "distilled", "colour", "8 steps").value == 100.0
    assert pick(report, "distilled", "colour, change", "8 steps").value == 0.0
    assert pick(report, "distilled", "colour", "4 steps").value < 50.0  # it makes them blue
    assert pick(report, "distilled", "colour, change", "4 steps").value < -50.0


def test_a_wrong_colour_is_found_and_nothing_else(tmp_path: Path) -> None:
    report = run(Renderer(blue=True), tmp_path, suites=["t2v"])
    not_blue = [case for case in make_cases(1, range(4)) if case.scene.colour != "blue"]
    assert pick(report, "t2v", "colour").value == 100.0 * (4 - len(not_blue)) / 4
    assert pick(report, "t2v", "object").value == pick(report, "t2v", "motion").value == 100.0
    assert pick(report, "t2v", "colour").met is False


def test_refinement_that_does_nothing(tmp_path: Path) -> None:
    report = run(Renderer(fine=False), tmp_path, dataclasses.replace(SMALL, count=6), suites=["refine"])
    (gain,) = [r for r in report.rows if r.metric.startswith("PSNR over trilinear") and r.variant == "dense"]
    assert gain.value <= 0.0 and gain.met is False
    textured = pick(report, "refine", "texture, of those with a pattern", "sparse")
    assert textured.count > 0 and textured.value == 0.0


def test_rewards_before_and_after(tmp_path: Path) -> None:
    adapter = tmp_path / "grpo_lora.safetensors"
    adapter.write_bytes(b"an adapter")
    settings = dataclasses.replace(SMALL, count=8, adapter=adapter, rewards=("sharpness", "colour"))
    report = run(Renderer(), tmp_path / "out", settings, suites=["rewards"])
    gain = pick(report, "rewards", "sharpness, gain")
    assert gain.value < -0.2 and gain.met is False
    assert gain.p_value == 2 / 2**8  # all eight are blurred
    assert pick(report, "rewards", "object, change").value == 0.0
    assert pick(report, "rewards", "sharpness", "before").value > 0.5


def test_the_recommended_handover() -> None:
    assert recommend({"frames": (0.99, 1.3), "official": (0.985, 1.1), "latents": (0.7, 1.0)}) == "official"


def test_traits_see_what_drifts() -> None:
    case = make_cases(1, [0])[0]
    clip = case.clip(5, 64, 96, 15.0).frames
    larger = render(dataclasses.replace(case.scene, scale=1.2), clip_times(5, 15.0), 64, 96)
    plain, pale, large = (clip_traits(frames) for frames in (clip, (clip.float() * 0.8).to(torch.uint8), larger))
    assert large["radius"] / plain["radius"] == pytest.approx(1.2, rel=0.05)
    assert [p / q for p, q in zip(pale["colour"], plain["colour"], strict=True)] == pytest.approx([0.8] * 3, abs=0.05)


# Going on, and reporting


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    stopped = Renderer(fails_after=6)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path, dataclasses.replace(SMALL, count=8), suites=["t2v"])
    (file,) = (tmp_path / "records").iterdir()
    with file.open("a") as half:
        half.write('{"index": 6, "key')  # killed while it wrote
    maker = Renderer()
    first = run(maker, tmp_path, dataclasses.replace(SMALL, count=8), suites=["t2v"])
    assert maker.calls == {"base": 2}
    again = Renderer()
    assert run(again, tmp_path, dataclasses.replace(SMALL, count=8), suites=["t2v"]).rows == first.rows
    assert again.calls == {}
    whole = run(Renderer(), tmp_path / "whole", dataclasses.replace(SMALL, count=8), suites=["t2v"])
    assert [dataclasses.replace(row, seconds=0) for row in whole.rows] == [
        dataclasses.replace(row, seconds=0) for row in first.rows
    ]


@pytest.mark.parametrize(
    ("change", "prints"), [({"seed": 2}, PRINTS), ({"num_steps": 20}, PRINTS), ({}, PRINTS | {"model": "other"})]
)
def test_other_settings_or_another_model_are_measured_anew(
    tmp_path: Path, change: dict[str, int], prints: dict[str, str]
) -> None:
    run(Renderer(), tmp_path, suites=["t2v"])
    maker, said = Renderer(), []
    evaluate(
        maker, dataclasses.replace(SMALL, **change), tmp_path, suites=["t2v"], prints=prints,
        on_event=lambda event: said.append(event.message),
    )  # fmt: skip
    assert maker.calls == {"base": 4}
    assert any("made again" in message for message in said)


def test_an_adapter_that_changes_spoils_only_what_it_made(tmp_path: Path) -> None:
    run(Renderer(), tmp_path, suites=["distilled"])
    maker = Renderer()
    evaluate(maker, SMALL, tmp_path, suites=["distilled"], prints=PRINTS | {"distill": "new"})
    assert maker.calls == {"distilled": 12}  # 16, 8 and 4 steps


def test_reports(perfect: tuple[Report, Path], tmp_path: Path) -> None:
    report, out = perfect
    data = json.loads((out / "results.json").read_text())
    assert data["recommended_handover"] == "frames" and data["settings"]["seed"] == 1
    assert set(data["skipped"]) == {"rewards"}
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(report.rows) == len(data["rows"])
    for row in rows:
        assert row["commit"] and row["seed"] == "1" and int(row["count"]) > 0 and float(row["seconds"]) >= 0
    text = (out / "results.md").read_text()
    assert "| t2v | 50 steps, guidance 4 | colour | 100.0 % | 51.0 to 100.0 | 4 |" in text
    assert "hand-over of continuation is **frames**" in text and "**missed**" in text
    for before, line in pairwise(text.splitlines()):
        if before.startswith("|") and line.startswith("|"):
            assert before.count(" | ") == line.count(" | ")
    report.write_docs(out, tmp_path / "docs")
    docs = (tmp_path / "docs" / "evaluation.md").read_text()
    for name in ("t2v", "i2v", "continuation-frames", "refine", "refine-made", "distilled-8"):
        assert f"sheets/{name}.png" in docs
        with Image.open(tmp_path / "docs" / "sheets" / f"{name}.png") as sheet:
            assert sheet.width > 250 and sheet.height > 80
    assert str(tmp_path) not in docs and str(out) not in text


def test_unreadable_lines_of_records_are_left_out(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "a.jsonl", "key")
    file.add([{"index": 0, "x": 1.5}, {"index": 1, "x": None}])
    with file.path.open("a") as lines:
        lines.write('half a line {"')
    again = RecordFile(tmp_path / "a.jsonl", "key")
    again.add([{"index": 2}])
    assert sorted(RecordFile(tmp_path / "a.jsonl", "key").records) == [0, 1, 2]
    assert RecordFile(tmp_path / "a.jsonl", "another").records == {}


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refinement_lora"):
        evaluate(Renderer(), SMALL, tmp_path, suites=["t2v", "refine"], prints={"model": "m"})
    with pytest.raises(InputError, match="name it with --lora"):
        run(Renderer(), tmp_path, suites=["rewards"])
    with pytest.raises(InputError, match="count must be at least 1"):
        Settings(count=0)
    with pytest.raises(InputError, match="segments must be at least 10"):
        Settings(segments=4)
    assert not any(tmp_path.iterdir())


# The pipelines


@pytest.fixture(scope="module")
def components(tiny_checkpoint: Path) -> Components:
    checkpoint = open_checkpoint(tiny_checkpoint)
    return Components(
        checkpoint.load_dit(), checkpoint.load_vae(), checkpoint.load_text_encoder(), checkpoint.adapters,
        checkpoint.native,
    )  # fmt: skip


def test_a_case_does_not_depend_on_those_beside_it(components: Components) -> None:
    maker, cases = CheckpointMaker(components), make_cases(0, range(3))
    sampling = Sampling(num_steps=2)
    together = maker.from_text(cases, sampling)
    torch.testing.assert_close(maker.from_text(cases[1:2], sampling)[0], together[1])
    alone = text_to_video(
        components, text=cases[1].prompt, generator=cases[1].noise("text"), num_steps=2, negative_text=""
    )
    torch.testing.assert_close(alone[0], together[1])
    images = torch.stack([case.clip(1, 32, 48, 15.0).frames[0] for case in cases])
    animated = maker.from_images(cases, images, sampling)
    torch.testing.assert_close(maker.from_images(cases[2:], images[2:], sampling)[0], animated[2])


@pytest.mark.parametrize("handover", HANDOVERS)
def test_continued_videos_are_those_of_the_pipeline(components: Components, handover: Handover) -> None:
    maker, cases = CheckpointMaker(components), make_cases(0, range(2))
    made = list(maker.long(cases, Sampling(num_steps=2), segments=3, handover=handover))
    expected = list(
        long_video_segments(
            components, text=cases[1].prompt, num_segments=3, num_steps=2, negative_text="", handover=handover,
            seed=cases[1].noise_seed("long"),
        )
    )  # fmt: skip
    for ours, segment in zip(made, expected, strict=True):
        # A last bit that differs may fall into another of 256 steps on its way through the official hand-over.
        tolerance = 2e-2 if handover == "official" else 1e-3
        torch.testing.assert_close(ours[1], segment.frames, rtol=0, atol=tolerance)


def test_refined_is_twice_the_size_and_rate(components: Components) -> None:
    case = make_cases(0, [0])[0]
    fine = CheckpointMaker(components).refined(case, case.clip(9, 32, 48, 15.0).frames, "sparse")
    assert fine.shape == (18, 64, 96, 3)


# The command


def test_the_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--count", 2, "--steps", 2, "--only", "t2v,distilled", "--out", tmp_path / "out")
    outcome = made("eval", "-m", tiny_checkpoint, *options, "--docs", tmp_path / "docs")
    assert "t2v: 2/2" in outcome.err and "missed" in outcome.err
    assert (tmp_path / "docs" / "evaluation.md").is_file()
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data["model"].startswith("tiny (") and str(tmp_path) not in json.dumps(data)
    before = (tmp_path / "out" / "results.csv").read_text()
    made("eval", "-m", tiny_checkpoint, *options)
    assert (tmp_path / "out" / "results.csv").read_text() == before  # seconds too: nothing was made


def test_what_the_command_refuses(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = ("-m", tiny_checkpoint, "--out", tmp_path / "out")
    assert "unknown suite 'tv2' in --only; there are t2v" in refused("eval", *model, "--only", "tv2")
    assert "check --lora" in refused("eval", *model, "--lora", tmp_path / "none.safetensors")
    assert "name it with --lora" in refused("eval", *model, "--only", "rewards")
    assert "unknown reward 'beauty'" in refused("eval", *model, "--only", "t2v", "--reward", "beauty")
    assert not (tmp_path / "out").exists()
