"""Refining a video of any length by windows, each conditioned on the refined frames it shares with the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.names import Joint, TimeMapping, check_name
from lcv_core.partial import SegmentStore
from lcv_core.pipelines.base import Components, Text, encode_text
from lcv_core.pipelines.long_video import OnSegmentStep, Segment, segment_generator, text_of
from lcv_core.pipelines.refine import condition_count, decode_refined, refine_video
from lcv_core.refinement import Window, crossfade, frames_after, plan_refine, plan_windows

ReadFrames = Callable[[int, int], Tensor]


def long_refine_segments(
    c: Components,
    *,
    text: Text,
    read: ReadFrames,
    total_frames: int,
    window: int | None = None,
    overlap: int | None = None,
    image: Any = None,
    video: Any = None,
    num_cond_frames: int | None = None,
    spatial_only: bool = False,
    time_mapping: TimeMapping = "exact",
    joint: Joint = "blend",
    seed: int = 0,
    store: SegmentStore | None = None,
    done: int = 0,
    on_step: OnSegmentStep | None = None,
    **options: Any,
) -> Iterator[Segment]:
    """The refined windows of a long clip as they finish; their frames, one after the other, are the refined video.

    read: (start, stop) -> those stage-1 frames [F, h, w, 3] uint8 or float; asked for one window at a time.
    text: one prompt, or one per window. window, overlap: stage-1 frames of a window and shared by two of them;
        default the native num_frames and num_cond_frames (93 and 13, as in the released script).
    image, video, num_cond_frames: high-resolution condition of the first window, as in `refine_video`.
    time_mapping: "exact" keeps windows aligned; the official "stretch" puts them about 0.4 stage-1 frames apart.
    joint: "blend" fades over the shared frames from one window to the next; "cut" keeps the earlier window's.
    options: the rest goes to `refine_video` (t_thresh, num_steps, refine_steps, size, bsa, fit, posterior).
    """
    window = c.native.num_frames if window is None else window
    overlap = min(c.native.num_cond_frames, window // 2) if overlap is None else overlap
    check_name("joint", joint, Joint)
    if total_frames < 1:
        raise InputError("the clip to refine has no frames")
    if total_frames > window and not 0 < 2 * overlap <= window:
        raise InputError(f"window overlap must be in [1, {window // 2}] for windows of {window} frames, got {overlap}")
    windows = plan_windows(total_frames, window, overlap)
    states = encode_text(c, text)
    if states.batch not in (1, len(windows)):
        raise InputError(f"{states.batch} prompts for {len(windows)} windows; give one, or one per window")
    first = condition_count(image, video, num_cond_frames, spatial_only=spatial_only)
    plan_refine(windows[0].stop, first, spatial_only=spatial_only, time_mapping=time_mapping)  # validates
    shared = frames_after(overlap, spatial_only=spatial_only, time_mapping=time_mapping) if overlap else 0
    mapping: dict[str, Any] = {"spatial_only": spatial_only, "time_mapping": time_mapping}

    def make(index: int, span: Window, tail: Tensor | None) -> Tensor:
        condition = {"image": image, "video": video, "num_cond_frames": num_cond_frames}
        if tail is not None:
            condition = {"image": None, "video": tail, "num_cond_frames": shared}
        return refine_video(
            c, text=text_of(states, index), frames=read(span.start, span.stop), output="latents",
            generator=segment_generator(seed, index), progress=store.progress(index) if store else None,
            on_step=None if on_step is None else partial(on_step, index),
            **condition, **mapping, **options,
        )  # fmt: skip

    def decode(index: int, latents: Tensor) -> Tensor:
        span = windows[index]
        return decode_refined(c, latents, plan_refine(span.stop - span.start, shared if index else first, **mapping))[0]

    return _segments(windows, make, decode, shared, joint, store, done)


def _segments(
    windows: list[Window],
    make: Callable[[int, Window, Tensor | None], Tensor],
    decode: Callable[[int, Tensor], Tensor],
    shared: int,
    joint: Joint,
    store: SegmentStore | None,
    done: int,
) -> Iterator[Segment]:
    """A window's last `shared` frames are held back until the next window has its own version of them."""
    done = min(done, store.finished()) if store else 0
    tail: Tensor | None = None
    for index, span in enumerate(windows):
        if index < done - 1:
            continue
        latents = store.load(index) if store else None
        if latents is None:
            latents = make(index, span, tail)
            if store:
                store.save(index, latents)
        frames = decode(index, latents)
        last = index == len(windows) - 1
        next_tail = None if last else frames[frames.shape[0] - shared :].clone()
        if index >= done:
            if tail is not None:
                frames[:shared] = crossfade(tail, frames[:shared]) if joint == "blend" else tail
            yield Segment(index, len(windows), frames if last else frames[: frames.shape[0] - shared], latents)
        del frames  # not to be held while the next window is refined
        tail = next_tail
