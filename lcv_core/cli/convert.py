"""`lcv convert`: a transformer in another form, and what that cost it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lcv_core.cli.options import option
from lcv_core.errors import InputError

if TYPE_CHECKING:
    from lcv_core.weights.convert import Report

FORM, TARGET, MEASURE, MACHINE = "Form", "Output", "Quality", "Machine"
_SHOWN = 10
_GB = 1_000_000_000


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder or DiT file, quantised or not.")],
    target: Annotated[Path, typer.Argument(help="FILE.safetensors, FILE.gguf, or a new folder.")],
    to: Annotated[
        Literal["bf16", "fp8", "int8", "q8_0", "q5_k", "q4_k"],
        option("--to", panel=FORM, help="Of the large weights; adaLN, embedders, final layer and norms are kept."),
    ],
    rest: Annotated[
        Literal["bf16", "source"], option("--rest", panel=FORM, help="What is kept: in bf16, or as in the source.")
    ] = "bf16",
    shard_size: Annotated[
        float, option("--shard-size", panel=TARGET, min=0.001, help="GB of a file at most, in a folder.")
    ] = 10.0,
    overwrite: Annotated[bool, option("--overwrite", panel=TARGET, help="Replace an existing target.")] = False,
    report: Annotated[
        Path | None, option("--report", panel=MEASURE, help="CSV file for the error of every weight.")
    ] = None,
    check: Annotated[
        bool, option("--check", panel=MEASURE, help="Run the model before and after; each has to fit in memory.")
    ] = False,
    device: Annotated[str, option("--device", panel=MACHINE, help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Convert a transformer to fewer bits or back, tensor by tensor: 54 GB take less than 6 GB of memory."""
    if report is not None and report.suffix.lower() != ".csv":
        raise InputError(f"--report writes a .csv file, got {report}")

    from lcv_core.cli.load import pick_device, pick_dtype
    from lcv_core.cli.progress import Reporter
    from lcv_core.files import prepare_target
    from lcv_core.weights.checkpoint import open_checkpoint
    from lcv_core.weights.compare import compare_velocities
    from lcv_core.weights.convert import convert as convert_weights

    where = pick_device(device)
    if report is not None:
        prepare_target(report)
    reporter = Reporter()
    with reporter.running():
        found = convert_weights(
            source, target, to, rest=rest, overwrite=overwrite, device=where, shard_bytes=int(shard_size * _GB),
            on_tensor=lambda done, total: reporter.advance("Converting", done, total),
        )  # fmt: skip
    if report is not None:
        found.write_csv(report)
    _print(found)
    if check:
        dtype = pick_dtype("auto", where, open_checkpoint(source))
        result = compare_velocities(source, target, device=where, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        typer.echo(
            f"velocity on random latents, in {name}: relative error {result.relative_error:.2e},"
            f" PSNR {result.psnr:.1f} dB"
        )
    reporter.say(f"wrote {target}")


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from lcv_core.cli.report import size

    table = Table("weight, worst first", "from", "to", "relative error", "note")
    for row in report.worst[:_SHOWN]:
        table.add_row(row.name, row.source, row.kind, f"{row.error:.2e}", row.note)
    console = Console()
    console.print(table)
    if len(report.rows) > _SHOWN:
        console.print(f"and {len(report.rows) - _SHOWN} more; --report FILE.csv has them all", highlight=False)
    noted = sum(bool(row.note) for row in report.rows)
    if noted:
        console.print(f"{noted} weights are not in the form asked for; the notes say why", highlight=False)
    console.print(f"{size(report.source_bytes)} became {size(report.nbytes)}", highlight=False)
