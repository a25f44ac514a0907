"""Which settings fit a card, as sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lcv_core.planning.job import ITEMSIZE, Job, WeightDtype
from lcv_core.planning.plan import Plan, Stage, plan_with
from lcv_core.planning.sparse import Device
from lcv_core.shapes import TIME_FACTOR

_SMALLER: tuple[WeightDtype, ...] = ("bf16", "fp8_e4m3fn")
_TILE = 256  # pixels


def size_text(size: int) -> str:
    """Bytes in units of a thousand, as people read them: 4907335680 is "4.9 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit / 10:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def verdict(stage: Stage, free: int, device: Device = "gpu") -> str:
    """Whether a stage fits into `free` bytes. The weights of a GPU's stage may stay in system memory, nothing else."""
    if stage.total <= free:
        return "fits"
    if device == "cpu":
        return f"does not fit, {size_text(stage.total - free)} are missing"
    if stage.besides_weights <= free:
        return f"fits with {size_text(stage.total - free)} of the weights in system memory"
    return f"does not fit, {size_text(stage.besides_weights - free)} are missing even without its weights"


def advice(plan: Plan, free: int, ram: int | None = None) -> list[str]:
    """The settings to choose from, best quality first: what each needs and whether it fits.

    free: bytes of the device for this job. ram: bytes of system memory; None says nothing about it.
    A host that cannot keep weights in system memory has to take a line that ends with "fits".
    """
    lines = [*_weight_dtypes(plan, free), *_frames(plan, free), *_tiles(plan, free)]
    if ram is not None and plan.weights > ram:
        lines.append(
            f"system memory: the weights of all parts take {size_text(plan.weights)}, there are {size_text(ram)}"
        )
    return lines


def _line(setting: str, stage: Stage, free: int, plan: Plan) -> str:
    return f"{setting}: {stage.name} {size_text(stage.total)}, {verdict(stage, free, plan.job.device)}"


def _sampling(plan: Plan) -> list[Stage]:
    return [stage for stage in plan.stages if stage.name.endswith("sampling")]


def _dtypes(plan: Plan) -> list[WeightDtype]:
    """The present weight dtype, then every smaller one."""
    now = plan.job.weight_dtype
    smaller: list[WeightDtype] = [name for name in _SMALLER if ITEMSIZE[name] < ITEMSIZE[now]]
    return [now, *smaller]


def _replan(plan: Plan, job: Job) -> Plan:
    """The plan of a changed job. What its weights really take is known for the present weight dtype alone."""
    same = job.weight_dtype == plan.job.weight_dtype
    return plan_with(plan.models if same else replace(plan.models, dit_weights=None), job)


def _weight_dtypes(plan: Plan, free: int) -> Iterator[str]:
    for name in _dtypes(plan):
        for stage in _sampling(_replan(plan, replace(plan.job, weight_dtype=name))):
            yield _line(f"weight_dtype {name}", stage, free, plan)


def _frames(plan: Plan, free: int) -> Iterator[str]:
    """For each sampling stage that does not fit the most frames that do: with all weights on the card, or without."""
    for stage in _sampling(plan):
        for name in _dtypes(plan):
            found = _most_frames(plan, stage.name, name, lambda need: need.total <= free)
            if found:
                yield _line(f"{found[0]}, weight_dtype {name}", found[1], free, plan)
        found = _most_frames(plan, stage.name, plan.job.weight_dtype, lambda need: need.besides_weights <= free)
        if found and plan.job.device != "cpu":
            yield _line(found[0], found[1], free, plan)


def _most_frames(
    plan: Plan, stage: str, weight_dtype: WeightDtype, fits: Callable[[Stage], bool]
) -> tuple[str, Stage] | None:
    """The longest job whose stage fits, by its setting; None where that is the whole job, or none."""
    job = replace(plan.job, weight_dtype=weight_dtype)
    if fits(_replan(plan, job).stage(stage)):
        return None
    needs = ((setting, _replan(plan, shorter).stage(stage)) for setting, shorter in _shorter(job, stage))
    return next(((setting, need) for setting, need in needs if fits(need)), None)


def _shorter(job: Job, stage: str) -> Iterator[tuple[str, Job]]:
    """The job with ever fewer frames at once in a stage, and what they are called."""
    if stage == "sampling":
        for frames in range(job.num_frames - TIME_FACTOR, job.num_cond_frames, -TIME_FACTOR):
            yield f"num_frames {frames}", replace(job, num_frames=frames)
    elif job.refine is not None:
        whole = min(job.refine.window or job.num_frames, job.num_frames)
        for window in range(whole - TIME_FACTOR, 2 * job.refine.overlap, -TIME_FACTOR):
            yield f"window {window}", replace(job, refine=replace(job.refine, window=window))


def _tiles(plan: Plan, free: int) -> Iterator[str]:
    """Tiles for the VAE stages that need more than there is."""
    if plan.job.vae_tile:
        return
    tiled = _replan(plan, replace(plan.job, vae_tile=_TILE))
    for stage in plan.stages:
        if "VAE" in stage.name and stage.total > free:
            yield _line(f"vae_tile {_TILE}", tiled.stage(stage.name), free, plan)
