"""Carrying out a job: read its inputs, run the pipeline, write what it makes; unfinished work is kept and resumed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcv_core.cli.job import Job
from lcv_core.cli.load import Session
from lcv_core.cli.outputs import SegmentSink, Target, write_latents
from lcv_core.cli.progress import Reporter
from lcv_core.errors import InputError
from lcv_core.image_io import read_image, resize_frames
from lcv_core.partial import PartialRun, SegmentStore
from lcv_core.pipelines import (
    continue_video,
    image_to_video,
    long_refine_segments,
    long_video_segments,
    text_to_video,
)
from lcv_core.pipelines.base import Components, StreamingDecoder, native_size, refined_size
from lcv_core.pipelines.long_video import Segment
from lcv_core.refinement import frames_after, plan_windows
from lcv_core.shapes import check_cond_frames, check_frames, check_size
from lcv_core.video_io import count_frames, iter_video, probe_video, read_video


def random_seed() -> int:
    return random.SystemRandom().randrange(1 << 31)


def run_job(job: Job, target: Target, device: str, reporter: Reporter) -> list[Path]:
    """Compute a job and write it to `target`; returns the files made.

    An interrupted run leaves its latents beside the target; the same job with the same target goes on from there.
    """
    session = Session.open(job, device, reporter)
    with ExitStack() as stack:
        stack.enter_context(reporter.running())
        if job.task == "long":
            return _run_long(session, target, stack)
        if job.task == "refine":
            return _run_refine(session, target, stack)
        return _run_clip(session, target, stack)


# One clip: t2v, i2v, continue


def _run_clip(session: Session, target: Target, stack: ExitStack) -> list[Path]:
    job, native = session.job, session.native
    condition, size = _condition(session)
    check_size(*size)
    check_frames(job.num_frames or native.num_frames)
    text, negative = session.encode(job.prompts)
    c = session.components(stack)
    batch = len(job.prompts) * job.num_videos
    progress = PartialRun(target.beside(".partial.safetensors"), job.key())
    latents = _PIPELINES[job.task](
        c, text=text, negative_text=negative, height=size[0], width=size[1], num_frames=job.num_frames,
        num_steps=job.num_steps, guidance_scale=job.guidance_scale, schedule=job.schedule,
        num_videos_per_prompt=job.num_videos, generator=[_generator(job.seed + i) for i in range(batch)],
        cfg_scope=job.cfg_scope, cfg_mode=job.cfg_mode, output="latents", progress=progress,
        on_step=session.reporter.on_step, **condition,
    )  # fmt: skip
    paths = [_write_clip(session, c, target, latents, i) for i in range(batch)]
    progress.clear()
    return paths


_PIPELINES: dict[str, Callable[..., Tensor]] = {"t2v": text_to_video, "i2v": image_to_video, "continue": continue_video}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _condition(session: Session) -> tuple[dict[str, Any], tuple[int, int]]:
    """The task's own arguments, read from its files, and the size of the video."""
    job, native = session.job, session.native
    if job.task == "t2v":
        return {}, (job.height or native.height, job.width or native.width)
    if job.task == "i2v":
        assert job.image is not None
        image = read_image(job.image.resolve())
        h, w = native_size(native, *image.shape[:2])
        return {"image": image, "fit": job.fit, "posterior": job.posterior}, (job.height or h, job.width or w)
    size = _clip_size(session)
    clip = _clip_tail(session, size)
    options = {"uniform_tail": job.uniform_tail, "use_kv_cache": job.kv_cache, "posterior": job.posterior}
    return {"frames": clip, "num_cond_frames": clip.shape[0], **options}, size


def _clip_size(session: Session) -> tuple[int, int]:
    job = session.job
    assert job.clip is not None
    info = probe_video(job.clip.resolve())
    h, w = native_size(session.native, info.height, info.width)
    size = (job.height or h, job.width or w)
    check_size(*size)
    return size


def _clip_tail(session: Session, size: tuple[int, int]) -> Tensor:
    """The clip's last condition frames at the model's frame rate and size, uint8 [c, H, W, 3]."""
    job, native = session.job, session.native
    assert job.clip is not None
    count = job.num_cond_frames or native.num_cond_frames
    if job.num_cond_frames == 0:
        count = 0
    check_cond_frames(count, job.num_frames or native.num_frames, count)
    return read_video(
        job.clip.path, frame_rate=native.frame_rate, num_frames=count, which="last", size=size, fit=job.fit
    )


def _source_frames(job: Job, frame_rate: float, size: tuple[int, int]) -> Iterator[Tensor]:
    """The whole clip that is continued, a frame at a time: uint8 [1, H, W, 3]."""
    assert job.clip is not None
    for frame in iter_video(job.clip.path, frame_rate=frame_rate):
        yield resize_frames(frame.unsqueeze(0), *size, fit=job.fit)


def _write_clip(session: Session, c: Components, target: Target, latents: Tensor, index: int) -> Path:
    """Video `index` of the batch, carrying the job that makes it alone."""
    job = session.job
    own = dataclasses.replace(job, prompts=[job.prompts[index // job.num_videos]], seed=job.seed + index, num_videos=1)
    place = target.numbered(index, latents.shape[0])
    place = dataclasses.replace(place, metadata=own.to_metadata())
    mine = latents[index : index + 1]
    if place.kind == "latents":
        write_latents(place, mine)
        return place.path
    size = (latents.shape[3] * 8, latents.shape[4] * 8)
    skip = (job.num_cond_frames or session.native.num_cond_frames) if job.task == "continue" else 0
    with place.writer() as writer:
        if job.task == "continue" and job.keep == "all":
            for frames in _source_frames(job, session.native.frame_rate, size):
                writer.write(frames)
        chunks = StreamingDecoder(c).stream(mine)
        for frames in session.reporter.track(chunks, latents.shape[2], f"Decoding {place.path.name}"):
            fresh = frames[0, skip:]
            skip = max(0, skip - frames.shape[1])
            if len(fresh):
                writer.write(fresh)
    return place.path


# Many segments: long, refine


def _open_sink(session: Session, target: Target) -> SegmentSink:
    store = SegmentStore(target.beside(".segments"), session.job.key())
    sink = SegmentSink(target, store)
    done = min(sink.written(), store.finished())
    if done:
        session.reporter.say(f"going on after segment {done}, finished earlier")
    return sink


def _run_segments(session: Session, sink: SegmentSink, segments: Iterator[Segment], total: int) -> list[Path]:
    """Write each segment as it finishes, then join them."""
    for segment in segments:
        piece = sink.piece(segment.index)
        if sink.target.kind == "latents":
            sink.write_latents(piece, segment.latents)
        else:
            sink.write(piece, [segment.frames])
    session.reporter.say("joining the segments ...")
    sink.join(total)
    return [sink.target.path]


def _run_long(session: Session, target: Target, stack: ExitStack) -> list[Path]:
    job, native, reporter = session.job, session.native, session.reporter
    target = dataclasses.replace(target, metadata=job.to_metadata())
    if target.kind == "latents" and job.handover != "latents":
        raise InputError("separate segments have no common latents; write video or PNG, or use --handover latents")
    start: dict[str, Any] = {}
    if job.clip is not None:
        size = _clip_size(session)
        start = {"frames": _clip_tail(session, size)}
    elif job.image is not None:
        image = read_image(job.image.resolve())
        start, size = {"image": image, "fit": job.fit}, native_size(native, *image.shape[:2])
    else:
        size = (native.height, native.width)
    size = (job.height or size[0], job.width or size[1])
    check_size(*size)
    total = job.num_segments or len(job.prompts)
    if len(job.prompts) not in (1, total):
        raise InputError(f"{len(job.prompts)} prompts for {total} segments; give one, or one per segment")
    sink = _open_sink(session, target)
    text, negative = session.encode(job.prompts)
    c = session.components(stack)
    if job.clip is not None and job.keep == "all" and not sink.source.exists():
        sink.write(sink.source, _source_frames(job, native.frame_rate, size))
    segments = long_video_segments(
        c, text=text, negative_text=negative, num_segments=total, height=size[0], width=size[1],
        num_frames=job.num_frames, num_cond_frames=job.num_cond_frames, num_steps=job.num_steps,
        guidance_scale=job.guidance_scale, schedule=job.schedule, uniform_tail=job.uniform_tail,
        use_kv_cache=job.kv_cache, handover=job.handover, seed=job.seed, posterior=job.posterior,
        cfg_scope=job.cfg_scope, cfg_mode=job.cfg_mode, store=sink.store, done=sink.written(),
        on_step=partial(reporter.on_segment_step, total=total), **start,
    )  # fmt: skip
    return _run_segments(session, sink, segments, total)


def _run_refine(session: Session, target: Target, stack: ExitStack) -> list[Path]:
    job, native, reporter = session.job, session.native, session.reporter
    target = dataclasses.replace(target, metadata=job.to_metadata())
    assert job.clip is not None
    path = job.clip.resolve()
    if target.kind == "latents":
        raise InputError("refine writes video or PNG frames, not latents")
    frame_rate = native.frame_rate
    total_frames = count_frames(path, frame_rate=frame_rate)
    info = probe_video(path)
    h, w = refined_size(native, info.height, info.width)
    size = (job.height or h, job.width or w)
    check_size(*size)
    window = job.window or native.num_frames
    overlap = min(native.num_cond_frames, window // 2)
    windows = len(plan_windows(total_frames, window, overlap))
    mapping = job.time_mapping
    if mapping == "auto":
        mapping = "stretch" if windows == 1 else "exact"
    first = _refine_condition(job)
    sink = _open_sink(session, target)
    text, _ = session.encode(job.prompts)
    c = session.components(stack)
    stage1 = native_size(native, info.height, info.width)

    def read(start: int, stop: int) -> Tensor:
        return read_video(
            path, frame_rate=frame_rate, start=start / frame_rate, num_frames=stop - start, size=stage1, fit=job.fit
        )

    segments = long_refine_segments(
        c, text=text, read=read, total_frames=total_frames, window=window, overlap=overlap,
        num_cond_frames=job.num_cond_frames, spatial_only=job.spatial_only, time_mapping=mapping, joint=job.joint,
        seed=job.seed, store=sink.store, done=sink.written(), t_thresh=job.t_thresh,
        num_steps=job.num_steps or 50, refine_steps=job.refine_steps, size=size, fit=job.fit,
        posterior=job.posterior, bsa=c.dit.config.bsa if job.refine_attention == "sparse" else None,
        on_step=partial(reporter.on_segment_step, total=windows), **first,
    )  # fmt: skip
    frames = frames_after(total_frames, spatial_only=job.spatial_only, time_mapping=mapping)
    reporter.say(f"refining {total_frames} frames to {frames} of {size[1]}x{size[0]} in {windows} window(s)")
    return _run_segments(session, sink, segments, windows)


def _refine_condition(job: Job) -> dict[str, Any]:
    """The high-resolution condition of the first window, where the job names one."""
    if job.image is not None:
        return {"image": read_image(job.image.resolve())}
    if job.cond_video is not None:
        count = job.num_cond_frames or (13 if job.spatial_only else 26)
        return {"video": read_video(job.cond_video.resolve(), num_frames=count, which="last")}
    return {}
