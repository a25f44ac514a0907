"""From the rows to the goals: ratios of steps, the time of a whole clip, and how exact the outputs are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from goals import Goal
from parts import ALL_EIGHT, PLAIN

from lcv_core.config import LONGCAT_VIDEO
from lcv_core.refinement import plan_refine
from lcv_core.schedule import FLOW_SHIFT, distilled, refine

Row = dict[str, str]
DENSE, SPARSE, REFINE = "t2v 480p93 dense", "t2v 480p93 sparse", "refine 720p189 sparse"
FP8, ALL = "fp8-matmul", ALL_EIGHT
STEPS_480P = len(distilled(16, flow_shift=FLOW_SHIFT)) - 1
STEPS_720P = len(refine(50, 0.5, flow_shift=FLOW_SHIFT)) - 1
CLIP_SECONDS = 60.0
NOISE = 1.25  # our distance from the exact output over the official one's: rounding differs, its size does not
PSNR = 35.0  # dB, of the velocity; our choice: below it, fp8 would be seen


def assumptions(blocks: int, depth: int) -> list[str]:
    plan = plan_refine(93)
    keep = 1 - (LONGCAT_VIDEO.bsa.sparsity or 0.0)
    return [
        f"{blocks} of {depth} blocks are timed; the others take as long as one block does alone",
        f"a clip: one prompt, {STEPS_480P} distilled steps at 480p without guidance (one forward each), VAE decode,"
        f" VAE encode at 704x1280, {STEPS_720P} refine steps of {plan.latents} latent frames ({plan.frames_out} frames"
        " of 93), VAE decode",
        "adapters are merged into the weights on both sides; nothing is loaded, moved or written; resizing, noise and"
        " the Euler step (milliseconds) are left out",
        f"our 480p steps of the clip are block sparse, {keep:.4g} of the key blocks kept; the release refines sparsely"
        " but samples 480p densely, and both are given",
        "weights are random: timing does not depend on them, PSNR and distances do",
        "VAE clips are counted from one and three latent frames, the text encoder from its first layers",
    ]


def goals_of(rows: Sequence[Row], full: bool) -> list[Goal]:
    """full: real shapes; goals of time are unknown otherwise."""
    why = "" if full else "not the real shapes"

    def step(job: str, form: str, side: str) -> float | None:
        return _ms(rows, "transformer", job, form, side, "step") if full else None

    def ratio(text: str, slow: float | None, fast: float | None, least: float) -> Goal:
        value = slow / fast if slow and fast else None
        return Goal(text, value, least=least, unit="x", why=why if value else why or _missing(rows, "transformer"))

    fast, fp8 = step(REFINE, PLAIN, "ours"), step(REFINE, FP8, "ours")
    theirs = step(REFINE, PLAIN, "official")
    goals = [
        ratio("DiT step at 480p, official dense over ours sparse", step(DENSE, PLAIN, "official"),
              step(SPARSE, PLAIN, "ours"), 1.7),
        ratio("DiT step of refine at 720p, both sparse, plain", theirs, fast, 1.5),
        ratio("DiT step of refine at 720p, both sparse, ours fp8", theirs, fp8, 2.2),
        ratio("the same, and ours attends in eight bits", theirs, step(REFINE, ALL, "ours"), 2.2),
    ]  # fmt: skip
    for form in (PLAIN, FP8, ALL):
        for job, kind in ((SPARSE, "sparse"), (DENSE, "dense")):
            if form == ALL and job == DENSE:
                continue  # attention in eight bits is block sparse
            seconds = clip_seconds(rows, "ours", form, job) if full else None
            goals.append(
                Goal(f"480p93 -> 720p189 clip, {form}, 480p {kind}", seconds, most=CLIP_SECONDS, unit="s", why=why)
            )
    return goals + _exactness(rows)


def clip_seconds(rows: Sequence[Row], side: str, form: str, job: str) -> float | None:
    """Projected seconds of a whole clip; None where a part was not measured."""
    parts = [
        (1, _ms(rows, "text", "prompt", PLAIN, "ours", "encode")),
        (STEPS_480P, _ms(rows, "transformer", job, form, side, "step")),
        (1, _ms(rows, "VAE", "480p93", PLAIN, side, "decode")),
        (1, _ms(rows, "VAE", "720p189", PLAIN, side, "encode")),
        (STEPS_720P, _ms(rows, "transformer", REFINE, form, side, "step")),
        (1, _ms(rows, "VAE", "720p189", PLAIN, side, "decode")),
    ]
    total = 0.0
    for count, ms in parts:
        if ms is None:
            return None
        total += count * ms / 1e3
    return total


def _ms(rows: Sequence[Row], stage: str, job: str, form: str, side: str, part: str) -> float | None:
    wanted = {"stage": stage, "job": job, "form": form, "side": side, "part": part, "status": "ok"}
    found = [row for row in rows if wanted.items() <= row.items()]
    return float(found[-1]["ms"]) if found else None


def _missing(rows: Sequence[Row], stage: str) -> str:
    """Why something was not measured: the first reason that was noted."""
    reasons = [row["status"] for row in rows if row["stage"] == stage and row["status"] != "ok"]
    return reasons[0] if reasons else "not run"


def _exactness(rows: Sequence[Row]) -> list[Goal]:
    notes = {row["side"]: row["note"] for row in rows if row["stage"] == "parity" and row["status"] == "ok"}
    reasons = {row["side"]: row["status"] for row in rows if row["stage"] == "parity" and row["status"] != "ok"}
    ours, theirs = (_number(notes.get(side, ""), "relative error") for side in (PLAIN, "official"))
    value = ours / theirs if ours and theirs else None
    text = "our distance from the exact output over the official one's"
    return [
        Goal(text, value, most=NOISE, why=reasons.get("official", "")),
        Goal("PSNR of fp8", _number(notes.get(FP8, ""), "PSNR"), least=PSNR, unit="dB", why=reasons.get(FP8, "")),
        Goal("PSNR of fp8, attention in eight bits", _number(notes.get(ALL, ""), "PSNR"), least=PSNR, unit="dB"),
        Goal("PSNR of int8", _number(notes.get("int8-matmul", ""), "PSNR"), least=PSNR, unit="dB"),
    ]


def _number(note: str, name: str) -> float | None:
    found = re.search(rf"{name} ([-+.\deinf]+)", note)
    return float(found[1]) if found else None
