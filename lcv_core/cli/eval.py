"""`lcv eval`: options in, an evaluation out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from lcv_core.cli.errors import Stopped
from lcv_core.cli.options import MACHINE, MODEL, SAMPLING, VIDEO, option
from lcv_core.errors import InputError
from lcv_core.miniature import MINIATURE
from lcv_core.names import Precision, Weights

if TYPE_CHECKING:
    from lcv_core.cli.progress import Reporter
    from lcv_core.training.evaluation.report import Report
    from lcv_core.training.events import Event


def evaluate(
    model: Annotated[Path, option("--model", "-m", envvar="LCV_MODEL", panel=MODEL, help="Checkpoint folder.")] = Path(
        MINIATURE
    ),
    out: Annotated[
        Path, option("--out", "-o", panel=VIDEO, help="Folder for results, records and contact sheets.")
    ] = Path("outputs/eval"),
    only: Annotated[
        str | None,
        option("--only", panel=SAMPLING, help="Of t2v, i2v, continuation, refine, distilled, rewards; default: all."),
    ] = None,
    count: Annotated[
        int | None, option("--count", panel=SAMPLING, min=1, help="Cases; 200. Continuation: a tenth, refine: half.")
    ] = None,
    segments: Annotated[
        int | None, option("--segments", panel=SAMPLING, min=2, help="Of a continued video; 20.")
    ] = None,
    seed: Annotated[int, option("--seed", panel=SAMPLING, min=0, help="Chooses scenes, captions and noise.")] = 0,
    quick: Annotated[
        bool, option("--quick", panel=SAMPLING, help="A few cases: shows that it works, its numbers mean little.")
    ] = False,
    lora: Annotated[
        Path | None, option("--lora", panel=MODEL, help="Adapter of GRPO, for the rewards with and without it.")
    ] = None,
    reward: Annotated[
        list[str] | None, option("--reward", panel=SAMPLING, help="Built-in name or module:function. Repeatable.")
    ] = None,
    steps: Annotated[int, option("--steps", panel=SAMPLING, min=1, help="Of the base schedule.")] = 50,
    guidance: Annotated[float, option("--guidance", "-g", panel=SAMPLING, min=0, help="Of the base schedule.")] = 4.0,
    negative_prompt: Annotated[str, option("--negative-prompt", "-n", panel=SAMPLING, help="Of guidance.")] = "",
    docs: Annotated[
        Path | None, option("--docs", panel=VIDEO, help="Put the table and the sheets here too: docs/miniature.")
    ] = None,
    batch: Annotated[int, option("--batch", panel=MACHINE, min=1, help="Clips made at a time.")] = 8,
    device: Annotated[str, option("--device", panel=MACHINE, help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        Precision, option("--dtype", panel=MACHINE, help="auto: bf16 on a GPU and for big models, else fp32.")
    ] = "auto",
    weights: Annotated[
        Weights, option("--weights", panel=MACHINE, help="The large weights in memory, as in the sampling commands.")
    ] = "plain",
) -> None:
    """Measure a model that was trained on the procedural clips, on combinations it never saw.

    A stopped evaluation goes on where it was; what was measured with the same settings is not measured again.
    """
    if lora is not None and not lora.is_file():
        raise InputError(f"there is no adapter {lora}; check --lora")

    from lcv_core.cli.progress import Reporter
    from lcv_core.training.evaluation.settings import QUICK, Settings, Suite

    suites = None if only is None else [_suite(name.strip(), get_args(Suite)) for name in only.split(",")]
    values: dict[str, Any] = {**(QUICK if quick else {}), **({} if count is None else {"count": count})}
    if segments is not None:
        values |= {"segments": segments, "kept_segments": min(segments, 10)}
    settings = Settings(
        seed=seed, batch=batch, num_steps=steps, guidance_scale=guidance, negative_prompt=negative_prompt,
        adapter=lora, rewards=tuple(reward or ["prompt"]), **values,
    )  # fmt: skip
    reporter = Reporter()
    try:
        with reporter.running():
            report = _run(model, out, suites, settings, device, dtype, weights, reporter)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; what was measured is kept in {out}, the same command goes on from it") from None
    if docs is not None:
        report.write_docs(out, docs)
        reporter.say(f"wrote {docs}")
    _summarise(report, reporter)
    reporter.say(f"wrote {out / 'results.md'}, results.csv and results.json")


def _suite(name: str, known: tuple[Any, ...]) -> Any:
    if name not in known:
        raise InputError(f"unknown suite {name!r} in --only; there are {', '.join(known)}")
    return name


def _run(
    model: Path, out: Path, suites: Any, settings: Any, device: str, dtype: str, weights: Weights, reporter: Reporter
) -> Report:  # fmt: skip
    from lcv_core.cli.load import pick_device, pick_dtype
    from lcv_core.pipelines.base import Components
    from lcv_core.training.evaluation.evaluate import check, evaluate
    from lcv_core.training.evaluation.maker import CheckpointMaker
    from lcv_core.weights.checkpoint import PARTS, open_checkpoint
    from lcv_core.weights.quantised import check_weights

    checkpoint = open_checkpoint(model)
    for part in PARTS:
        checkpoint.require(part)
    where = pick_device(device)
    kind = pick_dtype(dtype, where, checkpoint)
    check_weights(weights, checkpoint.dit_tensors, str(model))
    how = "" if weights == "plain" else f" {weights}"
    parts = checkpoint.part_fingerprints(["distill", "refinement"])
    adapters = {name: parts.pop(name) for name in ("distill", "refinement") if name in parts}
    check(settings, suites, [*adapters])  # before any weights are read
    shared = " ".join(parts[name] for name in sorted(parts))
    prints = {"model": f"{checkpoint.fingerprint()} {shared} {where.type} {kind}{how}", **adapters}
    reporter.say(f"loading the model on {where} in {str(kind).removeprefix('torch.')}{how} ...")
    components = Components(
        dit=checkpoint.load_dit(device=where, dtype=kind, weights=weights),
        vae=checkpoint.load_vae(device=where, dtype=kind),
        text_encoder=checkpoint.load_text_encoder(device=where, dtype=kind), adapters=checkpoint.adapters,
        native=checkpoint.native, flow_shift=checkpoint.flow_shift,
    )  # fmt: skip

    def on_event(event: Event) -> None:
        if event.kind == "progress":
            reporter.advance(event.message, event.done, event.total)
        else:
            reporter.say(event.message)

    return evaluate(
        CheckpointMaker(components, negative_prompt=settings.negative_prompt), settings, out, suites=suites,
        prints=prints, commit=_commit(), model=f"{model.resolve().name} ({checkpoint.fingerprint()})",
        device=f"{where.type}, {str(kind).removeprefix('torch.')}{how}", on_event=on_event,
    )  # fmt: skip


def _commit() -> str:
    """Short hash of the checkout this runs from, "+dirty" with changes; "unknown" outside one."""
    import subprocess

    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
        ).stdout.strip()  # fmt: skip

    if not (root / ".git").exists():
        return "unknown"
    try:
        head, dirty = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if dirty else head


def _summarise(report: Report, reporter: Reporter) -> None:
    """What has a target, a line each."""
    for row in report.rows:
        if row.target is not None and row.met is not None:
            value = f"{row.value:.2f}{' ' + row.unit if row.unit in ('%', 'dB', 'points') else ''}"
            state = "met" if row.met else "missed"
            reporter.say(f"{row.suite}, {row.variant}, {row.metric}: {value} ({row.target}): {state}")
    if report.handover is not None:
        reporter.say(f"recommended hand-over: {report.handover}")
