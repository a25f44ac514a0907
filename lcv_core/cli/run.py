"""Carrying out a job: read its inputs, run the pipeline, write what it makes; unfinished work is kept and resumed.

What can be wrong is found before weights are loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcv_core.cli.errors import Stopped
from lcv_core.cli.fit import Known, chosen_line, make_planner, settings_of, with_settings
from lcv_core.cli.job import Job
from lcv_core.cli.load import Session, check_hashes, open_for, pick_device, pick_dtype, with_hashes
from lcv_core.cli.outputs import (
    Target,
    check_free,
    check_place,
    kind_of,
    next_free,
    unfinished_changes,
    unfinished_job,
    unfinished_seed,
)
from lcv_core.cli.progress import Reporter
from lcv_core.cli.segments import SegmentSink
from lcv_core.denoise import StepInfo
from lcv_core.errors import InputError, NumericalError
from lcv_core.image_io import read_image, resize_frames
from lcv_core.partial import PartialRun, SegmentStore
from lcv_core.pipelines import (
    continue_video,
    image_to_video,
    long_refine_segments,
    long_video_segments,
    text_to_video,
)
from lcv_core.pipelines.base import (
    REFINE_DEFAULT_STEPS,
    Components,
    Run,
    StreamingDecoder,
    native_size,
    refined_size,
)
from lcv_core.pipelines.long_video import Segment, num_new_latents
from lcv_core.pipelines.memory import Memory
from lcv_core.pipelines.refine import condition_count
from lcv_core.planning.machine import this_machine
from lcv_core.refinement import frames_after, plan_refine, plan_windows
from lcv_core.schedule import refine, refine_exact
from lcv_core.shapes import check_cond_frames, check_frames, check_size
from lcv_core.text.encoder import TextStates
from lcv_core.video_io import count_frames, iter_video, probe_video, read_video
from lcv_core.weights.checkpoint import Checkpoint
from lcv_core.weights.quantised import check_weights
from lcv_core.weights.streamed import check_streaming

ALL = "All segments"
# Of what the plan may choose, what the numbers depend on; the rest is the same wherever it is done.
NUMBERS = frozenset({"weights", "tile", "kv_cache_storage", "cfg_mode", "window"})


@dataclass(frozen=True)
class Request:
    """A job and how it is to be carried out here.

    output: None takes the next free name. any_seed: the user named no seed, so unfinished work of any may be finished.
    made_by: the file the job was read from, whose weights it needs. text_cache: a folder for the states of prompts.
    free: fields of the job that the plan may choose, and change where memory runs out; None: it chooses nothing, and
    running out of memory is an error. unnamed: fields that the user left at their default; unfinished work goes on with
    what it began with, though the default has changed since.
    """

    job: Job
    output: Path | None
    overwrite: bool
    device: str
    any_seed: bool = False
    made_by: Path | None = None
    text_cache: Path | None = None
    free: frozenset[str] | None = None
    unnamed: frozenset[str] = frozenset()


def carry_out(request: Request, reporter: Reporter) -> None:
    """Compute a job and write it.

    An interrupted run leaves its latents beside the output; the same request goes on from there. Raises Stopped when
    the user interrupts it.
    """
    job = request.job
    checkpoint = open_for(job)
    if request.made_by is None:
        job = with_hashes(job, checkpoint)
    else:
        check_hashes(job, checkpoint, request.made_by)
    free = (request.free or frozenset()) | request.unnamed
    path = request.output or next_free(job, any_seed=request.any_seed, free=free)
    path = check_place(path, job)
    if request.any_seed and (seed := unfinished_seed(job, path, free)) is not None:
        job = dataclasses.replace(job, seed=seed)
    job = _as_begun(job, path, free, request.unnamed, reporter)
    job, memory = _fitted(job, checkpoint, request, path, reporter)
    todo = check_free(job, path, overwrite=request.overwrite)
    doubled = job.task == "refine" and not job.spatial_only
    rate = job.frame_rate or checkpoint.native.frame_rate * (2 if doubled else 1)
    crf = job.crf if job.crf is not None else (10 if job.task == "refine" else 18)
    target = Target(path, kind_of(path), rate, crf)
    session = Session.open(job, checkpoint, request.device, reporter, request.text_cache, memory)
    run = {"long": _run_long, "refine": _run_refine}.get(job.task)
    try:
        with ExitStack() as stack:
            stack.enter_context(reporter.running())
            if run is not None:
                run(session, target.of(job, 0), request.overwrite, stack)
            else:
                _run_clips(session, target, sorted(todo), stack)
    except KeyboardInterrupt:
        raise Stopped(_kept(job, target)) from None


def _as_begun(
    job: Job, path: Path, free: frozenset[str], unnamed: frozenset[str], reporter: Reporter
) -> Job:  # fmt: skip
    """The job with what unfinished work of it at its path has in the fields that the user did not name."""
    begun = unfinished_job(job, path, free) if unnamed else None
    if begun is None:
        return job
    for name in sorted(unnamed):
        value = getattr(begun, name)
        if value != getattr(job, name):
            reporter.say(f"going on with --{name} {value}, as it was begun")
            job = dataclasses.replace(job, **{name: value})
    return job


def _fitted(
    job: Job, checkpoint: Checkpoint, request: Request, path: Path, reporter: Reporter
) -> tuple[Job, Memory | None]:
    """The job with what the plan chooses, and what to go on with where memory runs out. Unfinished work goes on with
    what it began with."""
    if request.free is None:
        return job, None
    begun = unfinished_job(job, path, request.free)
    free = request.free
    if begun is not None:
        job = dataclasses.replace(job, **{name: getattr(begun, name) for name in free & NUMBERS})
        free = free - NUMBERS
    device = pick_device(request.device)
    dtype = pick_dtype(job.dtype, device, checkpoint)
    # What cannot be had at all is said as such, not as a lack of memory.
    check_weights(job.weights, checkpoint.dit_tensors, str(checkpoint.dit))
    check_streaming(job.stream, job.weights, checkpoint.dit_tensors, device, str(checkpoint.dit))
    source, frames = _source_shape(job, checkpoint.native.frame_rate)
    planner = make_planner(
        job, Known.of(checkpoint), this_machine(device), dtype=dtype, source=source, source_frames=frames, free=free
    )
    if request.made_by is not None and not planner.steps():
        return job, Memory(planner, settings_of(job), reporter.say)  # a repetition is tried all the same
    choice = planner.best()
    line = chosen_line(choice, planner.fixed)
    if line:
        reporter.say(line)
    return with_settings(job, choice.settings), Memory(planner, choice.settings, reporter.say)


def _source_shape(job: Job, frame_rate: float) -> tuple[tuple[int, int] | None, int | None]:
    """(height, width) of the picture or clip that a job starts from, and how many frames a clip has."""
    if job.clip is not None:
        info = probe_video(job.clip.resolve())
        frames = None if info.duration is None else max(1, math.ceil(info.duration * frame_rate))
        return (info.height, info.width), frames
    if job.image is not None and job.task != "refine":
        height, width = read_image(job.image.resolve()).shape[:2]
        return (height, width), None
    return None, None


def _kept(job: Job, target: Target) -> str:
    """What an interrupted run leaves, as a sentence."""
    places = [target.of(job, i) for i in range(job.total)]
    work = [file for place in places for file in (place.partial, place.segments) if file.exists()]
    if not work:
        return "stopped; nothing was finished that could be kept"
    return f"stopped; what is done is kept in {', '.join(map(str, work))}, the same command goes on from it"


# One clip after the other: t2v, i2v, continue


@dataclass(frozen=True)
class _ClipPlan:
    """What a clip is made from besides text: the pipeline's own arguments, its size, and its number of steps."""

    condition: dict[str, Any]
    size: tuple[int, int]
    steps: int


_PIPELINES: dict[str, Callable[..., Tensor]] = {"t2v": text_to_video, "i2v": image_to_video, "continue": continue_video}


def _run_clips(session: Session, target: Target, todo: list[int], stack: ExitStack) -> None:
    """Each output by itself: it is written before the next is begun, and a rerun of it alone gives the same bytes."""
    job = session.job
    plan = _plan_clip(session)
    texts, negative = session.encode([job.prompts[i // job.num_videos] for i in todo])
    c = session.components(stack)
    for index, text in zip(todo, texts, strict=True):
        place = target.of(job, index)
        session.doing(place.path.name if job.total > 1 else "")
        latents = _make_clip(session, c, plan, text, negative, place, job.video(index))
        _write_clip(session, c, plan, place, latents)
        place.partial.unlink(missing_ok=True)
        place.tidy()
        session.reporter.say(f"wrote {place.path}")


def _make_clip(
    session: Session, c: Components, plan: _ClipPlan, text: TextStates, negative: TextStates | None, place: Target,
    job: Job,
) -> Tensor:  # fmt: skip
    reporter = session.reporter
    label = "Denoising" if session.job.total == 1 else f"Denoising {place.path.name}"

    def resume(step: int, file: Path) -> None:
        session.go_on_from(unfinished_changes(file, job))
        reporter.say(f"going on after step {step} of {plan.steps}, kept in {file}")
        reporter.start(label, plan.steps, done=step)

    session.go_on_from([])
    progress = PartialRun(place.partial, session.key(job), note=lambda: session.note(job), on_resume=resume)
    reporter.start(label, plan.steps)
    try:
        return _PIPELINES[job.task](
            c, text=text, negative_text=negative, height=plan.size[0], width=plan.size[1], num_frames=job.num_frames,
            num_steps=job.num_steps, guidance_scale=job.guidance_scale, schedule=job.schedule,
            generator=torch.Generator().manual_seed(job.seed), cfg_scope=job.cfg_scope, cfg_mode=job.cfg_mode,
            cfg_interval=job.interval, step_cache=job.step_cache, output="latents", progress=progress,
            on_step=lambda info: reporter.on_step(info, label), **plan.condition,
        )  # fmt: skip
    except NumericalError:
        progress.clear()  # going on would end in the same step
        raise


def _plan_clip(session: Session) -> _ClipPlan:
    """Reads the job's files and checks everything that the pipeline would object to."""
    job, native = session.job, session.native
    check_frames(native.num_frames if job.num_frames is None else job.num_frames)
    if job.task == "continue":
        tail, size = _clip_tail(session)
        steps = _steps(session, uniform_tail=job.uniform_tail)
        condition = {
            "frames": tail, "num_cond_frames": tail.shape[0], "uniform_tail": job.uniform_tail,
            "use_kv_cache": job.kv_cache, "posterior": job.posterior,
        }  # fmt: skip
        return _ClipPlan(condition, size, steps)
    steps = _steps(session)
    if job.task == "t2v":
        return _ClipPlan({}, _size(job, (native.height, native.width)), steps)
    image, size = _start_image(session)
    return _ClipPlan({"image": image, "fit": job.fit, "posterior": job.posterior}, size, steps)


def _run_options(session: Session) -> Run:
    job = session.job
    return Run.of(
        num_steps=job.num_steps, guidance_scale=job.guidance_scale, schedule=job.schedule, cfg_scope=job.cfg_scope,
        cfg_mode=job.cfg_mode, output="latents", on_step=None, progress=None, cfg_interval=job.interval,
        step_cache=job.step_cache,
    )  # fmt: skip


def _steps(session: Session, *, uniform_tail: bool = False) -> int:
    return len(_run_options(session).sigmas(session.flow_shift, uniform_tail=uniform_tail)) - 1


def _size(job: Job, native: tuple[int, int]) -> tuple[int, int]:
    """(height, width): each as asked for, else the native one."""
    height, width = native
    height, width = height if job.height is None else job.height, width if job.width is None else job.width
    check_size(height, width)
    return height, width


def _start_image(session: Session) -> tuple[Tensor, tuple[int, int]]:
    assert session.job.image is not None
    image = read_image(session.job.image.resolve())
    return image, _size(session.job, native_size(session.native, *image.shape[:2]))


def _clip_tail(session: Session) -> tuple[Tensor, tuple[int, int]]:
    """The clip's last frames at the model's frame rate and the video's size, uint8 [c, H, W, 3]; and that size."""
    job, native = session.job, session.native
    assert job.clip is not None
    path = job.clip.resolve()
    count = native.num_cond_frames if job.num_cond_frames is None else job.num_cond_frames
    check_cond_frames(count, native.num_frames if job.num_frames is None else job.num_frames, count)
    info = probe_video(path)
    size = _size(job, native_size(native, info.height, info.width))
    session.reporter.say(f"reading {path} ...")
    tail = read_video(path, frame_rate=native.frame_rate, num_frames=count, which="last", size=size, fit=job.fit)
    return tail, size


def _source_frames(session: Session, size: tuple[int, int]) -> Iterator[Tensor]:
    """The whole clip that is continued, a frame at a time: uint8 [1, H, W, 3]."""
    job = session.job
    assert job.clip is not None
    session.reporter.say(f"copying {job.clip.path} ...")
    for frame in iter_video(job.clip.path, frame_rate=session.native.frame_rate):
        yield resize_frames(frame.unsqueeze(0), *size, fit=job.fit)


def _write_clip(session: Session, c: Components, plan: _ClipPlan, place: Target, latents: Tensor) -> None:
    """The latents decoded into the output; of a continuation what is new, after the clip itself if that is kept."""
    job = session.job
    place.note(session.changes)
    if place.kind == "latents":
        place.write_latents(latents)
        return
    skip = plan.condition["num_cond_frames"] if job.task == "continue" else 0
    with place.writer() as writer:
        if job.task == "continue" and job.keep == "all":
            for frames in _source_frames(session, plan.size):
                writer.write(frames)
        chunks = StreamingDecoder(c).stream(latents)
        for frames in session.reporter.track(chunks, latents.shape[2], f"Decoding {place.path.name}"):
            fresh = frames[0, skip:]
            skip = max(0, skip - frames.shape[1])
            if len(fresh):
                writer.write(fresh)
    if place.note(session.changes):  # while it was decoded
        place.note_again()


# Many segments: long, refine


class _Segments:
    """A long job's unfinished work, and what the user sees of it.

    steps: denoising steps of each segment. what: the name of one, "Segment" or "Window".
    """

    def __init__(self, session: Session, target: Target, overwrite: bool, steps: list[int], what: str) -> None:
        self.reporter, self.target, self.steps, self.what = session.reporter, target, steps, what
        self.session, self._noted = session, 0
        self.store = SegmentStore(
            target.segments, session.key(session.job), note=self._note, overwrite=overwrite, on_resume=self._resumed,
        )  # fmt: skip
        self.sink = SegmentSink(target, self.store)
        self.current = 0
        self.done = min(self.sink.written(), self.store.finished(), len(steps))
        if self.done:
            self.reporter.say(f"going on after {what.lower()} {self.done} of {len(steps)}, kept in {self.store.folder}")

    def _note(self) -> str:
        """With what was changed in an earlier run, which is in the note that this one replaces."""
        self.session.go_on_from(unfinished_changes(self.target.segments, self.session.job))
        self._noted = len(self.session.changes)
        return self.session.note(self.session.job)

    def _note_changes(self) -> None:
        if len(self.session.changes) > self._noted:
            self._noted = len(self.session.changes)
            self.store.write_note(self.session.note(self.session.job))

    def label(self, index: int) -> str:
        return f"{self.what} {index + 1} of {len(self.steps)}"

    def _start(self, index: int, step: int = 0) -> None:
        """Begin to count the steps of a segment of which `step` were done earlier."""
        self.current = index
        self.session.doing(self.label(index).lower() if len(self.steps) > 1 else "")
        if index < len(self.steps):
            self.reporter.start(self.label(index), self.steps[index], done=step)
        if len(self.steps) > 1 and (step or index == self.done):
            self.reporter.start(ALL, sum(self.steps), done=sum(self.steps[:index]) + step)

    def _resumed(self, step: int, file: Path) -> None:
        self.reporter.say(f"going on after step {step} of {self.steps[self.current]}, kept in {file}")
        self._start(self.current, step)

    def on_step(self, index: int, info: StepInfo) -> None:
        self._note_changes()
        self.reporter.on_step(info, self.label(index))
        if len(self.steps) > 1:
            done = sum(self.steps[:index]) + info.step
            self.reporter.advance(ALL, done, sum(self.steps), quiet=True)

    def write(self, segments: Iterator[Segment], *, with_source: bool = False) -> None:
        """Write each segment as it finishes, then join them."""
        total, reporter = len(self.steps), self.reporter
        self._start(self.done)
        for segment in self._numbers_checked(segments):
            index = segment.index
            self._note_changes()
            self._write(segment)
            del segment  # its frames are not held while the next one is made
            reporter.drop(self.label(index))
            if total > 1:
                reporter.advance(ALL, sum(self.steps[: index + 1]), sum(self.steps), quiet=True)  # decoding counts too
                reporter.say(f"{self.what.lower()} {index + 1} of {total} is finished{reporter.left(ALL)}")
            self._start(index + 1)
        reporter.say(f"writing {self.target.path} ...")
        self.target.note(self.session.changes)
        self.sink.join(total, with_source=with_source)
        self.target.tidy()
        reporter.say(f"wrote {self.target.path}")

    def _numbers_checked(self, segments: Iterator[Segment]) -> Iterator[Segment]:
        try:
            yield from segments
        except NumericalError:
            self.store.progress(self.store.finished()).clear()  # going on would end in the same step
            raise

    def _write(self, segment: Segment) -> None:
        piece = self.sink.piece(segment.index)
        if self.target.kind == "latents":
            # Only the first starts with latents of its own: those of a clip that is continued.
            new = num_new_latents(segment) if segment.index else segment.latents.shape[2]
            self.sink.write_latents(piece, segment.latents[:, :, -new:])
        else:
            self.sink.write(piece, [segment.frames])


def _run_long(session: Session, target: Target, overwrite: bool, stack: ExitStack) -> None:
    job, native = session.job, session.native
    num_frames = native.num_frames if job.num_frames is None else job.num_frames
    cond_frames = native.num_cond_frames if job.num_cond_frames is None else job.num_cond_frames
    check_cond_frames(cond_frames, num_frames, cond_frames)
    start: dict[str, Any] = {}
    if job.clip is not None:
        tail, size = _clip_tail(session)
        start = {"frames": tail}
    elif job.image is not None:
        image, size = _start_image(session)
        start = {"image": image, "fit": job.fit}
    else:
        size = _size(job, (native.height, native.width))
    first, later = _steps(session), _steps(session, uniform_tail=job.uniform_tail)
    steps = [later if job.clip else first] + [later] * (job.segments - 1)
    work = _Segments(session, target, overwrite, steps, "Segment")
    stack.callback(work.store.remove_if_empty)
    with_source = job.clip is not None and job.keep == "all" and target.kind != "latents"
    if with_source and not work.sink.source.exists():
        work.sink.write(work.sink.source, _source_frames(session, size))
    texts, negative = session.encode(job.prompts)
    segments = long_video_segments(
        session.components(stack), text=_together(texts), negative_text=negative, num_segments=job.segments,
        height=size[0], width=size[1], num_frames=num_frames, num_cond_frames=cond_frames, num_steps=job.num_steps,
        guidance_scale=job.guidance_scale, schedule=job.schedule, uniform_tail=job.uniform_tail,
        use_kv_cache=job.kv_cache, handover=job.handover, seed=job.seed, posterior=job.posterior,
        cfg_scope=job.cfg_scope, cfg_mode=job.cfg_mode, cfg_interval=job.interval, step_cache=job.step_cache,
        store=work.store, done=work.done, on_step=work.on_step, **start,
    )  # fmt: skip
    work.write(segments, with_source=with_source)


def _together(texts: list[TextStates]) -> TextStates:
    together = texts[0]
    for text in texts[1:]:
        together = together.concat(text)
    return together


def _run_refine(session: Session, target: Target, overwrite: bool, stack: ExitStack) -> None:
    job, native, reporter = session.job, session.native, session.reporter
    assert job.clip is not None
    path = job.clip.resolve()
    info = probe_video(path)
    size = _size(job, refined_size(native, info.height, info.width))
    reporter.say(f"reading {path} ...")
    total_frames = count_frames(path, frame_rate=native.frame_rate)
    window = native.num_frames if job.window is None else job.window
    overlap = min(native.num_cond_frames, window // 2)
    windows = plan_windows(total_frames, window, overlap)
    if len(job.prompts) not in (1, len(windows)):
        raise InputError(f"{len(job.prompts)} prompts for {len(windows)} windows; give one, or one per window")
    mapping = job.time_mapping
    if mapping == "auto":
        mapping = "stretch" if len(windows) == 1 else "exact"
    first = _refine_condition(job, native.frame_rate)
    count = condition_count(first.get("image"), first.get("video"), job.num_cond_frames, spatial_only=job.spatial_only)
    plan_refine(windows[0].stop, count, spatial_only=job.spatial_only, time_mapping=mapping)
    base_steps = REFINE_DEFAULT_STEPS if job.num_steps is None else job.num_steps
    if job.refine_steps is None:
        sigmas = refine(base_steps, job.t_thresh, flow_shift=session.flow_shift)
    else:
        sigmas = refine_exact(job.refine_steps, job.t_thresh, flow_shift=session.flow_shift)
    work = _Segments(session, target, overwrite, [len(sigmas) - 1] * len(windows), "Window")
    stack.callback(work.store.remove_if_empty)
    frames = frames_after(total_frames, spatial_only=job.spatial_only, time_mapping=mapping)
    where = f" in {len(windows)} windows" if len(windows) > 1 else ""
    reporter.say(f"refining {total_frames} frames to {frames} of {size[1]}x{size[0]}{where}")
    texts, _ = session.encode(job.prompts)
    c = session.components(stack)
    stage1 = native_size(native, info.height, info.width)

    def read(start: int, stop: int) -> Tensor:
        return read_video(
            path, frame_rate=native.frame_rate, start=start / native.frame_rate, num_frames=stop - start, size=stage1,
            fit=job.fit,
        )  # fmt: skip

    segments = long_refine_segments(
        c, text=_together(texts), read=read, total_frames=total_frames, window=window, overlap=overlap,
        num_cond_frames=job.num_cond_frames, spatial_only=job.spatial_only, time_mapping=mapping, joint=job.joint,
        seed=job.seed, store=work.store, done=work.done, t_thresh=job.t_thresh, num_steps=base_steps,
        refine_steps=job.refine_steps, size=size, fit=job.fit, posterior=job.posterior,
        bsa=c.dit.config.bsa if job.refine_attention == "sparse" else None, on_step=work.on_step, **first,
    )  # fmt: skip
    work.write(segments)


def _refine_condition(job: Job, frame_rate: float) -> dict[str, Any]:
    """The high-resolution condition of the first window, where the job names one."""
    if job.image is not None:
        return {"image": read_image(job.image.resolve())}
    if job.cond_video is not None:
        count = job.num_cond_frames or (13 if job.spatial_only else 26)
        rate = frame_rate if job.spatial_only else 2 * frame_rate
        return {"video": read_video(job.cond_video.resolve(), frame_rate=rate, num_frames=count, which="last")}
    return {}
