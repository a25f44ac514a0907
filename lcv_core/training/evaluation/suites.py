"""The questions an evaluation asks, and what each has to show: records in, rows out."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from lcv_core.names import Handover
from lcv_core.training.data.grammar import ATTRIBUTES
from lcv_core.training.evaluation.records import Record
from lcv_core.training.evaluation.runs import Runs
from lcv_core.training.evaluation.settings import HANDOVERS, JUDGED, Row, Settings, Suite, Target, Unit, row
from lcv_core.training.evaluation.statistics import Estimate, mean, paired_p_value, proportion
from lcv_core.training.evaluation.traits import colour_distance

SUITES: tuple[Suite, ...] = get_args(Suite)

_SHOWN = {"colour": 95.0, "object": 95.0, "background": 95.0, "motion": 90.0}  # percent, of clips from text
_IMAGE = {"motion": 85.0}
_KEPT = 95.0
_FIRST_FRAME = 30.0  # dB
_SEAM = 1.2
_GAIN = 3.0  # dB over trilinear
_SPARSE = -0.5  # dB against dense
_TEXTURE = 90.0
_FEWER_STEPS, _FEW = -2.0, 8  # points against the base schedule, at so many steps
_CHANCE = 0.05  # of a gain that is none


@dataclass(frozen=True)
class Continuations:
    """The rows of the continuation suite, and the hand-over they speak for."""

    rows: list[Row]
    best: Handover


def lacking(suite: Suite, settings: Settings, adapters: Sequence[str]) -> str | None:
    """What a suite needs and does not have, as a sentence; None where it can run."""
    if suite == "refine" and "refinement" not in adapters:
        return "refine needs lora/refinement_lora.safetensors, which the checkpoint does not have"
    if suite == "distilled" and "distill" not in adapters:
        return "distilled needs lora/cfg_step_lora.safetensors, which the checkpoint does not have"
    if suite == "rewards" and settings.adapter is None:
        return "rewards compares the model with an adapter of GRPO; name it with --lora"
    return None


def t2v(runs: Runs) -> list[Row]:
    records = runs.text(runs.settings.base)
    return accuracies("t2v", _base_name(runs.settings), records, targets=_SHOWN, by_value=True)


def i2v(runs: Runs) -> list[Row]:
    records = runs.image()
    name = _base_name(runs.settings)
    psnr = [record["first_frame_psnr"] for record in records]
    first = row(
        "i2v", name, "first frame PSNR", "dB", mean(psnr), seconds=_seconds(records), target=Target(_FIRST_FRAME)
    )
    worst = Estimate(min(psnr), math.nan, math.nan, len(psnr))
    return [
        first,
        row("i2v", name, "first frame PSNR, worst", "dB", worst, seconds=_seconds(records)),
        *accuracies("i2v", name, records, targets=_IMAGE, by_value=True),
    ]


def continuation(runs: Runs) -> Continuations:
    records = {handover: runs.long(handover) for handover in HANDOVERS}
    kept = {handover: _kept(records[handover], runs.settings.kept_segments) for handover in HANDOVERS}
    best = recommend(
        {
            handover: (
                plain.fmean(kept[handover][name].value for name in ("colour", "object", "motion")),
                plain.fmean(record["seam"] for record in records[handover]),
            )
            for handover in HANDOVERS
        }
    )
    rows = []
    for handover in HANDOVERS:
        rows += _continued(handover, records[handover], kept[handover], runs.settings, chosen=handover == best)
    return Continuations(rows, best)


def recommend(scores: dict[Handover, tuple[float, float]]) -> Handover:
    """The best hand-over by (share kept, seam jump): among those that keep within a point of the most, the one whose
    joints show least."""
    most = max(kept for kept, _ in scores.values())
    near: list[Handover] = [handover for handover, (kept, _) in scores.items() if kept >= most - 0.01]
    return min(near, key=lambda handover: scores[handover][1])


def _kept(records: Sequence[Record], segments: int) -> dict[str, Estimate]:
    """The share of segments that show what was asked for. Segments of one video are no independent observations, so the
    interval is that of the videos' shares."""
    return {
        name: mean(
            [
                plain.fmean(_is(segment, record, name) for segment in record["segments"][:segments])
                for record in records
                if name in record["named"]
            ]
        )
        for name in ("colour", "object", "motion", "background")
    }


def _is(shown: Record, record: Record, attribute: str) -> bool:
    return shown["shown"][attribute][0] == record["named"][attribute]


def _continued(
    handover: Handover, records: Sequence[Record], kept: dict[str, Estimate], settings: Settings, *, chosen: bool
) -> list[Row]:
    count, seconds = settings.kept_segments, _seconds(records)

    def make(metric: str, unit: Unit, estimate: Estimate, target: Target | None = None, group: str = "all") -> Row:
        return row(
            "continuation", handover, metric, unit, estimate, seconds=seconds, group=group,
            target=target if chosen else None,
        )  # fmt: skip

    rows = [
        make(f"{name} over {count} segments", "%", estimate, Target(_KEPT) if name in ("colour", "object") else None)
        for name, estimate in kept.items()
    ]
    for name in ("colour", "object"):
        whole = [all(_is(segment, record, name) for segment in record["segments"][:count]) for record in records]
        rows.append(make(f"{name} in all of {count} segments", "%", proportion(sum(whole), len(whole))))
    rows += [
        make(f"seam jump over {count} segments", "ratio", mean([r["seam"] for r in records]), Target(_SEAM, False)),
        make(f"seam jump over {settings.segments} segments", "ratio", mean([r["seam_all"] for r in records])),
    ]
    for index in range(settings.segments):
        group = f"segment {index + 1}"
        rows += [make(metric, unit, mean(values), group=group) for metric, unit, values in _drift(records, index)]
        motion = [_is(record["segments"][index], record, "motion") for record in records]
        rows.append(make("motion", "%", proportion(sum(motion), len(motion)), group=group))
    return rows


def _drift(records: Sequence[Record], index: int) -> list[tuple[str, Unit, list[float]]]:
    """How far segment `index` is from the first one, over the videos in which that can be measured."""
    pairs = [(record, record["segments"][0], record["segments"][index]) for record in records]
    colours = [colour_distance(first["colour"], now["colour"]) for _, first, now in pairs]
    backs = [colour_distance(first["background"], now["background"]) for _, first, now in pairs]
    sharpness = [now["sharpness"] / first["sharpness"] for _, first, now in pairs if first["sharpness"] > 0]
    sizes = [
        now["radius"] / first["radius"]
        for record, first, now in pairs
        if first["radius"] and now["radius"] and record["named"]["motion"] not in ("grows", "shrinks")
    ]
    return [
        ("object colour drift", "steps of 255", [d for d in colours if d is not None]),
        ("background drift", "steps of 255", [d for d in backs if d is not None]),
        ("sharpness, of the first segment's", "ratio", sharpness),
        ("size, of the first segment's", "ratio", sizes),
    ]


def refine(runs: Runs) -> list[Row]:
    records = runs.refined()
    seconds = {
        "dense": math.fsum(record["seconds_dense"] for record in records),
        "sparse": math.fsum(record["seconds_sparse"] for record in records),
    }
    names = ("trilinear", "trilinear, pixel centres", "dense", "sparse")

    def column(metric: str, name: str) -> list[float]:
        return [record[metric][name] for record in records]

    rows = []
    for name in names:
        took = seconds.get(name, 0.0)
        rows += [
            row("refine", name, "PSNR", "dB", mean(column("psnr", name)), seconds=took),
            row("refine", name, "SSIM", "score", mean(column("ssim", name)), seconds=took),
        ]
    # Against the better of the two plain upsamplings, which is the harder one to beat.
    baseline = max(names[:2], key=lambda name: plain.fmean(column("psnr", name)))
    for name in names[2:]:
        gain = [fine - plain_ for fine, plain_ in zip(column("psnr", name), column("psnr", baseline), strict=True)]
        rows.append(
            row("refine", name, f"PSNR over {baseline}", "dB", mean(gain), seconds=seconds[name], target=Target(_GAIN))
        )
    cost = [sparse - dense for sparse, dense in zip(column("psnr", "sparse"), column("psnr", "dense"), strict=True)]
    total = _seconds(records)
    rows += [
        row("refine", "sparse", "PSNR over dense", "dB", mean(cost), seconds=total, target=Target(_SPARSE)),
        row(
            "refine", "sparse", "PSNR against dense", "dB", mean([r["sparse_to_dense_psnr"] for r in records]),
            seconds=total,
        ),
    ]  # fmt: skip
    made = runs.refined_made()
    dense = [record | {"shown": record["shown_dense"]} for record in records]
    for variant, part in (("sparse", records), ("dense", dense), ("sparse, generated clips", made)):
        rows.append(_patterns(variant, part))
        rows += accuracies("refine", variant, part, targets={}, by_value=True)
    before = [record | {"shown": record["shown_before"]} for record in made]
    return rows + accuracies("refine", "generated clips, before", before, targets={})


def _patterns(variant: str, records: Sequence[Record]) -> Row:
    """How many clips show the pattern that their prompts name; to leave the plain ones plain is no merit."""
    found = [
        _is(record, record, "texture")
        for record in records
        if record["named"].get("texture", "none") != "none" and "texture" in record["shown"]
    ]
    return row(
        "refine", variant, "texture, of those with a pattern", "%", proportion(sum(found), len(found)),
        seconds=_seconds(records), target=Target(_TEXTURE),
    )  # fmt: skip


def distilled(runs: Runs) -> list[Row]:
    settings = runs.settings
    base = runs.text(settings.base)
    rows = accuracies("distilled", _base_name(settings), base, targets={})
    for steps in settings.distilled_steps:
        records = runs.text(settings.distilled(steps))
        name = f"{steps} steps"
        rows += accuracies("distilled", name, records, targets={})
        target = Target(_FEWER_STEPS) if steps == _FEW else None
        rows += _differences("distilled", name, base, records, target)
    return rows


def rewards(runs: Runs) -> list[Row]:
    settings = runs.settings
    before, after = runs.text(settings.base), runs.text(settings.adapted)
    rows = []
    for name in settings.rewards:
        values = [[record["rewards"][name] for record in records] for records in (before, after)]
        for variant, column, records in zip(("before", "after"), values, (before, after), strict=True):
            rows.append(row("rewards", variant, name, "score", mean(column), seconds=_seconds(records)))
        gains = [new - old for old, new in zip(*values, strict=True)]
        p = paired_p_value(gains, seed=settings.seed)
        rows.append(
            row(
                "rewards", "after", f"{name}, gain", "score", mean(gains), seconds=_seconds(after), p_value=p,
                target=Target(0.0, p_value=_CHANCE),
            )
        )  # fmt: skip
    for variant, records in (("before", before), ("after", after)):
        rows += accuracies("rewards", variant, records, targets={})
    return rows + _differences("rewards", "after", before, after, Target(_FEWER_STEPS))


def accuracies(
    suite: Suite, variant: str, records: Sequence[Record], *, targets: dict[str, float], by_value: bool = False
) -> list[Row]:
    """How many clips show what their prompts name, by attribute and on request by its value; and all of it at once."""
    seconds = _seconds(records)

    def make(metric: str, hits: list[bool], group: str = "all", target: Target | None = None) -> Row:
        estimate = proportion(sum(hits), len(hits))
        return row(suite, variant, metric, "%", estimate, seconds=seconds, group=group, target=target)

    rows, values = [], []
    for name in JUDGED:
        judged = [record for record in records if name in record["named"] and name in record["shown"]]
        if not judged:
            continue
        limit = targets.get(name)
        rows.append(make(name, [_is(r, r, name) for r in judged], target=None if limit is None else Target(limit)))
        for value in ATTRIBUTES[name] if by_value else ():
            of_value = [_is(r, r, name) for r in judged if r["named"][name] == value]
            if of_value:
                values.append(make(name, of_value, f"{name}: {value}"))
    whole = [all(_is(r, r, n) for n in r["named"] if n in r["shown"]) for r in records]
    return [*rows, make("all that is named", whole), *values]


def _differences(
    suite: Suite, variant: str, before: Sequence[Record], after: Sequence[Record], target: Target | None
) -> list[Row]:
    """Accuracies of the same cases, after minus before, in points."""
    rows = []
    for name in _SHOWN:
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if name in a["named"]]
        change = [float(_is(b, b, name)) - float(_is(a, a, name)) for a, b in pairs]
        rows.append(
            row(
                suite, variant, f"{name}, change", "points", mean(change), seconds=_seconds(after), target=target,
                p_value=paired_p_value(change),
            )
        )  # fmt: skip
    return rows


def _base_name(settings: Settings) -> str:
    return f"{settings.num_steps} steps, guidance {settings.guidance_scale:g}"


def _seconds(records: Sequence[Record]) -> float:
    return math.fsum(record["seconds"] for record in records)


RUN: dict[Suite, Callable[[Runs], list[Row]]] = {
    "t2v": t2v, "i2v": i2v, "refine": refine, "distilled": distilled, "rewards": rewards,
}  # fmt: skip
