"""What an evaluation found, for programs (JSON, CSV) and for people (Markdown, contact sheets)."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcv_core.files import replacing, write_error
from lcv_core.names import Handover
from lcv_core.training.evaluation.settings import Row, Settings

RESULTS_JSON, RESULTS_CSV, RESULTS_MD = "results.json", "results.csv", "results.md"
DOCS_MD = "evaluation.md"

COLUMNS = (
    "commit", "model", "device", "seed", "suite", "variant", "metric", "group", "unit", "value", "low", "high", "count",
    "target", "met", "p_value", "seconds",
)  # fmt: skip

_TITLES = {
    "t2v": "Text to video",
    "i2v": "Image to video",
    "continuation": "Continuation",
    "refine": "Refinement",
    "distilled": "Fewer steps",
    "rewards": "Rewards before and after GRPO",
}


@dataclass(frozen=True)
class Report:
    """commit: of this repository. model: the checkpoint's name and the hash of its transformer. device: what it ran on.
    handover: the one that continuation recommends, where it was evaluated. skipped: suites that could not run, and why.
    """

    commit: str
    model: str
    device: str
    settings: Settings
    rows: Sequence[Row]
    handover: Handover | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """results.json, results.csv and results.md into a folder."""
        _write(out / RESULTS_JSON, json.dumps(self.data(), indent=1, ensure_ascii=False) + "\n")
        _write(out / RESULTS_CSV, self.csv())
        _write(out / RESULTS_MD, self.markdown("sheets", sorted(p.name for p in (out / "sheets").glob("*.png"))))

    def write_docs(self, out: Path, docs: Path) -> None:
        """The table, its numbers and the contact sheets of an evaluation in `out` into a documentation folder."""
        sheets = sorted((out / "sheets").glob("*.png"))
        try:
            (docs / "sheets").mkdir(parents=True, exist_ok=True)
            for sheet in sheets:
                shutil.copyfile(sheet, docs / "sheets" / sheet.name)
        except OSError as error:
            raise write_error(docs / "sheets", error) from error
        _write(docs / RESULTS_CSV, self.csv())
        _write(docs / DOCS_MD, self.markdown("sheets", [sheet.name for sheet in sheets]))

    def data(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.settings)
        settings["adapter"] = None if self.settings.adapter is None else self.settings.adapter.name
        return {
            "commit": self.commit,
            "model": self.model,
            "device": self.device,
            "settings": settings,
            "recommended_handover": self.handover,
            "skipped": dict(self.skipped),
            "rows": [self._cells(row) for row in self.rows],
        }

    def csv(self) -> str:
        buffer = io.StringIO()
        writer: csv.DictWriter[str] = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: "" if cell is None else cell for name, cell in self._cells(row).items()})
        return buffer.getvalue()

    def _cells(self, row: Row) -> dict[str, Any]:
        numbers = {name: _rounded(getattr(row, name)) for name in ("value", "low", "high", "p_value", "seconds")}
        cells = {
            "commit": self.commit, "model": self.model, "device": self.device, "seed": self.settings.seed,
            "suite": row.suite, "variant": row.variant, "metric": row.metric, "group": row.group, "unit": row.unit,
            "count": row.count, "target": None if row.target is None else str(row.target), "met": row.met,
        } | numbers  # fmt: skip
        return {name: cells[name] for name in COLUMNS}

    def markdown(self, folder: str, sheets: Sequence[str]) -> str:
        """The whole report. folder, sheets: where the contact sheets are, from the report's own place."""
        s = self.settings
        parts = [
            "# Evaluation",
            f"{self.model}, commit {self.commit}, on {self.device}. Seed {s.seed}; combinations of object, colour and"
            " motion that training never saw; judged by image processing against the renderer's own words. Intervals"
            " are 95%.",
        ]
        goals = [row for row in self.rows if row.target is not None]
        if goals:
            parts += ["## What it has to show", _table(goals, with_suite=True)]
        if self.handover is not None:
            parts.append(
                f"The recommended hand-over of continuation is **{self.handover}**: of those that keep colour, object"
                " and motion best (within a point), its joints show least."
            )
        parts += [f"Not evaluated: {reason}." for reason in self.skipped.values()]
        for suite in dict.fromkeys(row.suite for row in self.rows):
            rows = [row for row in self.rows if row.suite == suite]
            parts += [f"## {_TITLES[suite]}", _table([row for row in rows if row.group == "all"])]
            parts += _values(rows) + _segments(rows)
            parts += [f"![{name.removesuffix('.png')}]({folder}/{name})" for name in sheets if _belongs(name, suite)]
        return "\n\n".join(parts) + "\n"


def _belongs(sheet: str, suite: str) -> bool:
    if suite == "rewards":
        return sheet.endswith("-adapter.png")
    return sheet.startswith(suite) and not sheet.endswith("-adapter.png")


def _table(rows: Sequence[Row], *, with_suite: bool = False) -> str:
    """Markdown with a row per row; columns that would be empty are left out."""
    columns: dict[str, Any] = {"suite": lambda r: r.suite} if with_suite else {}
    columns |= {
        "variant": lambda r: r.variant,
        "what": lambda r: r.metric,
        "value": lambda r: _number(r.value, r.unit),
        "interval": _interval,
        "of": lambda r: str(r.count),
        "p": lambda r: "" if r.p_value is None else f"{r.p_value:.2g}",
        "target": lambda r: "" if r.target is None else str(r.target),
        "": lambda r: "" if r.met is None else ("met" if r.met else "**missed**"),
    }
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    return _lines([[*cells], *([column[i] for column in cells.values()] for i in range(len(rows)))])


def _values(rows: Sequence[Row]) -> list[str]:
    """Accuracy by attribute value: a table with a column per variant."""
    of = [row for row in rows if ": " in row.group]
    return [_pivot(of, "by value")] if of else []


def _segments(rows: Sequence[Row]) -> list[str]:
    """What drifts, at the first segments, half way and at the end: a table for each metric."""
    of = [row for row in rows if row.group.startswith("segment ")]
    last = max((int(row.group.split()[1]) for row in of), default=0)
    shown = {f"segment {n}" for n in (2, (last + 1) // 2, last)}
    tables = []
    for metric in dict.fromkeys(row.metric for row in of):
        chosen = [row for row in of if row.metric == metric and row.group in shown]
        tables.append(_pivot(chosen, metric))
    return tables


def _pivot(rows: Sequence[Row], title: str) -> str:
    variants = [*dict.fromkeys(row.variant for row in rows)]
    groups = [*dict.fromkeys(row.group for row in rows)]
    found = {(row.group, row.variant): row for row in rows}
    lines = [[title, *variants]]
    for group in groups:
        cells = [found.get((group, variant)) for variant in variants]
        lines.append([group, *("" if r is None else f"{_number(r.value, r.unit)} (of {r.count})" for r in cells)])
    return _lines(lines)


def _lines(table: Iterable[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def _number(value: float, unit: str) -> str:
    if math.isnan(value):
        return "–"
    digits = {"%": 1, "points": 1, "dB": 2, "steps of 255": 1}.get(unit, 3)
    return f"{round(value, digits) + 0.0:.{digits}f} {_symbol(unit)}".strip()  # + 0.0: no minus before 0


def _symbol(unit: str) -> str:
    return "" if unit in ("ratio", "score") else unit


def _interval(row: Row) -> str:
    if math.isnan(row.low):
        return ""
    return f"{_number(row.low, row.unit).split()[0]} to {_number(row.high, row.unit).split()[0]}"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
