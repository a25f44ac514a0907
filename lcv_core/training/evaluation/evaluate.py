"""An evaluation from beginning to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcv_core.errors import InputError
from lcv_core.files import prepare_target
from lcv_core.names import Handover
from lcv_core.training.evaluation.maker import Maker
from lcv_core.training.evaluation.report import RESULTS_JSON, Report
from lcv_core.training.evaluation.runs import Runs
from lcv_core.training.evaluation.settings import Row, Settings, Suite
from lcv_core.training.evaluation.suites import RUN, SUITES, continuation, lacking
from lcv_core.training.events import Event, OnEvent, ignore
from lcv_core.training.rewards import load_reward


def check(settings: Settings, suites: Sequence[Suite] | None, adapters: Sequence[str]) -> dict[str, str]:
    """The suites that cannot run and why; InputError where they were asked for, and for an unknown reward."""
    reasons: dict[str, str | None] = {suite: lacking(suite, settings, adapters) for suite in suites or SUITES}
    skipped = {suite: reason for suite, reason in reasons.items() if reason is not None}
    if suites is not None and skipped:
        raise InputError("; ".join(skipped.values()))
    for name in settings.rewards:
        load_reward(name)
    return skipped


def evaluate(
    maker: Maker,
    settings: Settings,
    out: Path,
    *,
    suites: Sequence[Suite] | None = None,
    prints: Mapping[str, str],
    commit: str = "unknown",
    model: str = "",
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> Report:
    """Run suites and write what they found to `out`, after each of them.

    suites: None runs those that can, and says which cannot. prints: fingerprints of the "model" and of its adapters,
    "distill" and "refinement", as far as it has them; records that were made with the same and with the same settings
    are not made again. InputError for a suite that is asked for and cannot run, before anything is made.
    """
    skipped = check(settings, suites, [*prints])
    prepare_target(out / RESULTS_JSON)
    for reason in skipped.values():
        on_event(Event("note", f"left out: {reason}"))
    runs = Runs(maker, settings, out, prints=prints, on_event=on_event)
    rows: list[Row] = []
    handover: Handover | None = None
    for suite in suites or SUITES:
        if suite in skipped:
            continue
        if suite == "continuation":
            found = continuation(runs)
            rows, handover = rows + found.rows, found.best
        else:
            rows = rows + RUN[suite](runs)
        report = Report(commit, model, device, settings, rows, handover, skipped)
        report.write(out)
        on_event(Event("note", f"{suite}: done, {out / RESULTS_JSON}"))
    return Report(commit, model, device, settings, rows, handover, skipped)
