"""`lcv inspect` for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcv_core.weights.inspect import Inspection


def size(count: float) -> str:
    """Bytes for people: 54.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def to_json(inspection: Inspection) -> str:
    data = dataclasses.asdict(inspection) | {"parameters": inspection.parameters}
    return json.dumps(data, indent=1, default=_plain)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else repr(value)


def print_report(inspection: Inspection, console: Console) -> None:
    console.print(f"[bold]{inspection.path}[/bold]: {inspection.summary}", highlight=False)
    if inspection.parts:
        table = Table("part", "parameters", "stored as", "on disk", "in bf16")
        for part in inspection.parts:
            dtypes = ", ".join(f"{name} {size(count)}" for name, count in part.dtypes.items())
            table.add_row(part.name, f"{part.parameters:,}", dtypes, size(part.file_bytes), size(part.bf16_bytes))
        console.print(table)
    if inspection.adapters:
        table = Table("adapter", "dialect", "layers", "rank", "on disk")
        for a in inspection.adapters:
            ranks = ", ".join(map(str, a.ranks))
            table.add_row(a.name, a.dialect, str(len(a.targets)), ranks, size(a.file_bytes))
        console.print(table)
    config = inspection.config
    if config is not None:
        console.print(
            f"DiT: {config.depth} blocks of {config.hidden_size}, {config.num_heads} heads of {config.head_dim},"
            f" text {config.caption_channels}; flow shift {inspection.flow_shift}",
            highlight=False,
        )
        n = inspection.native
        console.print(f"made for {n.width}x{n.height}, {n.num_frames} frames at {n.frame_rate:g} fps", highlight=False)
    if inspection.memory is not None:
        m = inspection.memory
        console.print(
            f"besides the weights, at that size: text-to-video {size(m.text_to_video)}, refine {size(m.refine)},"
            f" KV cache of a continuation {size(m.kv_cache)} (bf16, upper bounds)",
            highlight=False,
        )
    console.print("can do: " + (", ".join(inspection.tasks) or "nothing as it is"), highlight=False)
    for name, purpose in inspection.missing.items():
        console.print(f"[yellow]missing {name}[/yellow]: needed for {purpose}", highlight=False)
