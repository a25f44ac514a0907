"""The speeds to reach on one H100, and whether rows of one run reach them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rows import BACKENDS, QUANTISED

Rows = Sequence[Mapping[str, str]]
_OWN = [name for name in BACKENDS if name not in QUANTISED and name != "flex"]
_DENSE = ["dense", "dense_cudnn", "dense_flash", "fa3"]


def targets(rows: Rows, shape_720p: str, shape_480p: str) -> list[str]:
    """One line for each target: met, not met, or why it can't be told."""
    return [
        _speed(rows, shape_720p, "forward", 550),
        _speed(rows, shape_720p, "backward", 410),
        *(_ratio(rows, shape_720p, part, ["official"], 2) for part in ("total", "total+backward")),
        *(_ratio(rows, shape_720p, part, ["vsa"], 1.25) for part in ("total", "total+backward")),
        _ratio(rows, shape_720p, "total", _DENSE, 13),
        _ratio(rows, shape_480p, "total", _DENSE, 8),
    ]


def _best(
    rows: Rows, shape: str, part: str, names: Sequence[str], column: str, pick: Callable[..., float]
) -> tuple[float, str] | None:
    found = {
        row["backend"]: float(row[column])
        for row in rows
        if row["shape"] == shape and row["part"] == part and row["backend"] in names and row[column]
    }
    if not found:
        return None
    best = pick(found.values())
    return best, next(name for name, value in found.items() if value == best)


def _speed(rows: Rows, shape: str, part: str, target: float) -> str:
    text = f"{part} at {shape} >= {target:g} useful TFLOP/s"
    best = _best(rows, shape, part, _OWN, "tflops", max)
    if best is None:
        return f"unknown  {text}: no backend was timed"
    return f"{_verdict(best[0] >= target)} {text}: {best[1]} {best[0]:.4g}"


def _ratio(rows: Rows, shape: str, part: str, others: Sequence[str], target: float) -> str:
    whom = "dense" if others is _DENSE else others[0]
    text = f"{part} at {shape} >= {target:g}x {whom}"
    own, other = (_best(rows, shape, part, names, "ms", min) for names in (_OWN, others))
    if own is None or other is None:
        reasons = {row["status"] for row in rows if row["backend"] in others and not row["status"].startswith("ok")}
        missing = f"{whom} has no time ({'; '.join(sorted(reasons)) or 'not run'})" if own else "no backend was timed"
        return f"unknown  {text}: {missing}"
    return f"{_verdict(own[0] * target <= other[0])} {text}: {other[0] / own[0]:.2f}x, {own[1]} against {other[1]}"


def _verdict(met: bool) -> str:
    return "met     " if met else "NOT MET "
