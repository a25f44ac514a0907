"""Metrics of a run: a CSV file for programs, TensorBoard and a picture of the curves for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lcv_core.files import replacing, write_error

METRICS_FILE = "metrics.csv"
CURVES_FILE = "curves.png"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, without the cells that are empty; none when there is no file.

    A row that a killed run left half written is dropped.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(_parsed(csv.DictReader(file)))


def _parsed(rows: Iterator[dict[str, Any]] | csv.DictReader[str]) -> Iterator[dict[str, float]]:
    for row in rows:
        try:
            yield {key: float(value) for key, value in row.items() if value not in (None, "")}
        except (TypeError, ValueError):
            continue


class MetricLog:
    """Rows of metrics by step, from `step` on: rows of an earlier run beyond it are dropped, as it is repeated.

    folder: of the run; the CSV file and `tensorboard/` go there.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS_FILE
        self.rows = [row for row in read_metrics(self.path) if row.get("step", 0) <= step]
        self._columns: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._rewrite()
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise write_error(self.path, error) from error

    @property
    def seconds(self) -> float:
        """Training time up to the last row."""
        return self.rows[-1].get("seconds", 0.0) if self.rows else 0.0

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; it has "step". InputError when the disk is full."""
        self.rows.append(dict(row))
        try:
            if any(name not in self._columns for name in row):
                self._rewrite()
            else:
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    file.write(self._text([row]))
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))
            self._board.flush()
        except OSError as error:
            raise write_error(self.path, error) from error

    def _rewrite(self) -> None:
        """The whole file: columns come and go with the tasks of a phase."""
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if not self.rows:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as temporary:
            header = ",".join(self._columns) + "\n"
            temporary.write_text(header + self._text(self.rows), encoding="utf-8", newline="\n")

    def _text(self, rows: list[Any]) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, lineterminator="\n")
        for row in rows:
            writer.writerow({name: f"{value:.7g}" for name, value in row.items()})
        return buffer.getvalue()

    def close(self) -> None:
        self._board.close()


def draw_curves(metrics: Path, picture: Path) -> None:
    """The training curves of a metrics file as PNG: the losses, smoothed, and what else was logged."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    names = dict.fromkeys(name for row in rows for name in row)
    losses = [name for name in names if name.startswith(("loss", "mse"))]
    others = [name for name in names if name not in (*losses, "step", "seconds")]
    panels = [panel for panel in (losses, *([name] for name in others)) if panel]
    if not panels:
        return
    figure = Figure(figsize=(10, 2.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for name in panel:
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = [x for x, _ in points], [y for _, y in points]
            axis.plot(
                steps, values, alpha=0.25, color=(line := axis.plot(steps, smooth(values), label=name)[0]).get_color()
            )
            line.set_linewidth(1.5)
        axis.legend(loc="upper right", fontsize="small")
        axis.grid(alpha=0.3)
        if panel is losses and all(row[name] > 0 for row in rows for name in panel if name in row):
            axis.set_yscale("log")
    axes[-1].set_xlabel("step")
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def smooth(values: list[float], half_life: float = 10.0) -> list[float]:
    """An exponential average over so many values, without the bias of its start."""
    keep = 0.5 ** (1 / half_life)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed
