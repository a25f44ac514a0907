"""Long video: a first segment, then continuations of it, one after the other; resumable, in memory one segment big."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcv_core.denoise import OnStep, Progress, StepInfo
from lcv_core.errors import InputError
from lcv_core.image_io import as_frames
from lcv_core.names import (
    DEFAULT_HANDOVER,
    CfgMode,
    CfgScope,
    Fit,
    Handover,
    Output,
    Posterior,
    Schedule,
    check_name,
)
from lcv_core.partial import SegmentStore
from lcv_core.pipelines.base import (
    WHOLE,
    Components,
    Interval,
    Run,
    StreamingDecoder,
    Text,
    check_decodes_pieces,
    decode_latents,
    encode_frames,
    encode_text,
    native_size,
    prepare_frames,
    to_pixels,
)
from lcv_core.pipelines.continuation import continue_from_latents
from lcv_core.pipelines.image_to_video import image_to_video
from lcv_core.pipelines.text_to_video import text_to_video
from lcv_core.shapes import check_cond_frames, check_size, num_latents
from lcv_core.text.encoder import TextStates

OnSegmentStep = Callable[[int, StepInfo], None]


@dataclass(frozen=True)
class Segment:
    """One finished segment of a long video.

    index: from 0, of `total`. frames: what it adds to the video, fp32 [F, H, W, 3] in [0, 1]. latents: all of it,
    condition latents included, normalised fp32 [1, C, T, h, w].
    """

    index: int
    total: int
    frames: Tensor
    latents: Tensor


def segment_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one segment, which need no state of the segments before it."""
    return torch.Generator().manual_seed((seed + index * 0x9E3779B97F4A7C15) % (1 << 63))


class _FrameHandover:
    """The decoded tail frames are encoded again: as floats, or through truncated uint8 as the official script does."""

    def __init__(self, c: Components, num_cond_frames: int, quantise: bool) -> None:
        self.c, self.count, self.quantise = c, num_cond_frames, quantise
        self.tail: Tensor | None = None

    def finish(self, latents: Tensor, num_cond_latents: int) -> Tensor:
        frames = decode_latents(self.c, latents)[0]
        self.tail = frames[-self.count :].clone()
        return frames[1 + 4 * (num_cond_latents - 1) :] if num_cond_latents else frames

    def skip(self, latents: Tensor, num_cond_latents: int, *, last: bool) -> None:
        if last:
            self.finish(latents, num_cond_latents)

    def condition(self, posterior: Posterior, generator: torch.Generator) -> Tensor:
        assert self.tail is not None
        tail = (self.tail * 255.0).to(torch.uint8) if self.quantise else self.tail
        return encode_frames(self.c, to_pixels(tail), posterior=posterior, generator=generator)


class _LatentHandover:
    """The tail latents themselves, with one decode that streams through the whole video: no round trip.

    Position 0 of a continuation then holds a latent of four frames where training had one of a single frame.
    """

    def __init__(self, c: Components, num_cond_frames: int) -> None:
        self.count = num_latents(num_cond_frames)
        self.decoder = StreamingDecoder(c)
        self.tail: Tensor | None = None

    def finish(self, latents: Tensor, num_cond_latents: int) -> Tensor:
        first = self.tail is None
        frames = self.decoder.push(self._next(latents, num_cond_latents))[0]
        # A clip that is continued starts the stream with its own latents; its frames are not new.
        return frames[1 + 4 * (num_cond_latents - 1) :] if first and num_cond_latents else frames

    def skip(self, latents: Tensor, num_cond_latents: int, *, last: bool) -> None:
        self.decoder.skip(self._next(latents, num_cond_latents))

    def _next(self, latents: Tensor, num_cond_latents: int) -> Tensor:
        """The latents of a segment that are next in the stream."""
        first = self.tail is None
        self.tail = latents[:, :, -self.count :].clone()
        return latents if first else latents[:, :, num_cond_latents:]

    def condition(self, posterior: Posterior, generator: torch.Generator) -> Tensor:
        assert self.tail is not None
        self.decoder.rest()  # what follows is sampling
        return self.tail


def long_video_segments(
    c: Components,
    *,
    text: Text,
    num_segments: int | None = None,
    image: Any = None,
    frames: Any = None,
    negative_text: Text | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_cond_frames: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    schedule: Schedule = "base",
    uniform_tail: bool = True,
    use_kv_cache: bool = True,
    handover: Handover = DEFAULT_HANDOVER,
    seed: int = 0,
    fit: Fit = "stretch",
    posterior: Posterior = "mode",
    cfg_scope: CfgScope = "noise",
    cfg_mode: CfgMode = "sequential",
    cfg_interval: Interval = WHOLE,
    step_cache: float = 0.0,
    store: SegmentStore | None = None,
    done: int = 0,
    on_step: OnSegmentStep | None = None,
) -> Iterator[Segment]:
    """The segments of a long video as they finish. Everything is validated before the first one starts.

    text: one prompt for all segments, or one per segment (interactive video); num_segments defaults to their number.
    image, frames: start from an image or continue a clip [F, H, W, 3] instead of text alone; a continued clip's own
        frames are not part of the result.
    num_frames, num_cond_frames: of one segment, as in `continue_video`; each segment after the first adds
        num_frames - num_cond_frames frames.
    handover: what the next segment sees of this one: "latents", its last latents as they are; "frames", its decoded
        frames, encoded again; "official", the same through 8 bits. With several segments "latents" needs a VAE that
        decodes a video in pieces, as a checkpoint's own does.
    store: keeps finished segments; those in it are not computed again. done: segments whose frames the caller has
        already; they are not yielded again.
    on_step: called with the segment's index and the StepInfo.
    cfg_interval, step_cache: as in `text_to_video`; the step cache starts afresh in each segment.
    """
    job = _LongJob(
        c, text=text, num_segments=num_segments, image=image, frames=frames, negative_text=negative_text,
        height=height, width=width, num_frames=num_frames, num_cond_frames=num_cond_frames,
        run=lambda step, progress: Run.of(
            num_steps=num_steps, guidance_scale=guidance_scale, schedule=schedule, cfg_scope=cfg_scope,
            cfg_mode=cfg_mode, output="latents", on_step=step, progress=progress, cfg_interval=cfg_interval,
            step_cache=step_cache,
        ),
        uniform_tail=uniform_tail, use_kv_cache=use_kv_cache, handover=handover, seed=seed, fit=fit,
        posterior=posterior, on_step=on_step,
    )  # fmt: skip
    return job.segments(store, done)


def long_video(c: Components, *, text: Text, output: Output = "frames", **options: Any) -> Tensor:
    """`long_video_segments` in one tensor: frames fp32 [1, F, H, W, 3] in [0, 1], or the new latents [1, C, T, h, w].

    The result grows with the length; iterate over the segments to keep memory at one of them.
    """
    check_name("output", output, Output)
    segments = list(long_video_segments(c, text=text, **options))
    if output == "frames":
        return torch.cat([s.frames for s in segments]).unsqueeze(0)
    new = [s.latents[:, :, -num_new_latents(s) :] for s in segments]
    return torch.cat(new, dim=2)


def num_new_latents(segment: Segment) -> int:
    """Latent frames that a segment adds (its first latent frame of all is one pixel frame, the others four)."""
    return -(-segment.frames.shape[0] // 4)


class _LongJob:
    """A validated long job."""

    def __init__(
        self, c: Components, *, text: Text, num_segments: int | None, image: Any, frames: Any,
        negative_text: Text | None, height: int | None, width: int | None, num_frames: int | None,
        num_cond_frames: int | None, run: Callable[[OnStep | None, Progress | None], Run], uniform_tail: bool,
        use_kv_cache: bool, handover: Handover, seed: int, fit: Fit, posterior: Posterior,
        on_step: OnSegmentStep | None,
    ) -> None:  # fmt: skip
        if image is not None and frames is not None:
            raise InputError("start a long video from an image or from a clip, not both")
        check_name("fit", fit, Fit)
        check_name("posterior", posterior, Posterior)
        c.need_vae()
        run(None, None).sigmas(c.flow_shift)  # validates
        self.c, self.run, self.seed = c, run, seed
        self.fit: Fit = fit
        self.posterior: Posterior = posterior
        self.uniform_tail, self.use_kv_cache, self.on_step = uniform_tail, use_kv_cache, on_step
        self.num_frames = c.native.num_frames if num_frames is None else num_frames
        self.num_cond_frames = c.native.num_cond_frames if num_cond_frames is None else num_cond_frames
        self.image = None if image is None else as_frames(image)
        if self.image is not None and self.image.shape[0] != 1:
            raise InputError(f"a long video starts from one image, got {self.image.shape[0]}")
        self.clip = None if frames is None else as_frames(frames)
        available = self.num_frames if self.clip is None else self.clip.shape[0]
        check_cond_frames(self.num_cond_frames, self.num_frames, available)
        self.size = self._size(height, width)
        self.total = _num_prompts(text) if num_segments is None else num_segments
        if self.total < 1:
            raise InputError(f"num_segments must be at least 1, got {self.total}")
        self.handover = self._make_handover(handover)
        self.text = encode_text(c, text)
        _check_per_segment(self.text, self.total, "prompts")
        self.negative = self._negative(negative_text)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        native = self.c.native
        start = self.image if self.clip is None else self.clip
        h, w = (native.height, native.width) if start is None else native_size(native, *start.shape[1:3])
        size = (height or h, width or w)
        check_size(*size)
        return size

    def _negative(self, negative_text: Text | None) -> TextStates | None:
        if not self.run(None, None).guidance_scale > 1.0:
            return None
        if negative_text is None and self.c.text_encoder is None:
            raise InputError("guidance needs a negative_text; pass TextStates or set guidance_scale=1")
        states = encode_text(self.c, "" if negative_text is None else negative_text, what="negative_text")
        _check_per_segment(states, self.total, "negative prompts")
        return states

    def _make_handover(self, name: Handover) -> _FrameHandover | _LatentHandover:
        check_name("handover", name, Handover)
        if name == "latents":
            if self.total > 1:
                check_decodes_pieces(self.c)
            return _LatentHandover(self.c, self.num_cond_frames)
        return _FrameHandover(self.c, self.num_cond_frames, quantise=name == "official")

    def segments(self, store: SegmentStore | None, done: int) -> Iterator[Segment]:
        done = min(done, store.finished()) if store else 0
        for index in range(min(done, self.total)):
            latents = store.load(index) if store else None
            if latents is None:
                raise InputError(f"segment {index + 1} is missing from the segments folder; delete the folder")
            self.handover.skip(latents, self._cond_latents(index), last=index == done - 1)
        for index in range(done, self.total):
            latents = store.load(index) if store else None
            if latents is None:
                latents = self._make(index, store.progress(index) if store else None)
                if store:
                    store.save(index, latents)
            # No name for the frames here: they would stay in memory while the next segment is made.
            yield Segment(index, self.total, self.handover.finish(latents, self._cond_latents(index)), latents)

    def _cond_latents(self, index: int) -> int:
        """Condition latents of a segment whose frames are not new (an image's frame is)."""
        return num_latents(self.num_cond_frames) if index or self.clip is not None else 0

    def _make(self, index: int, progress: Progress | None) -> Tensor:
        generator = segment_generator(self.seed, index)
        run = self.run(None if self.on_step is None else partial(self.on_step, index), progress)
        text = text_of(self.text, index)
        negative = None if self.negative is None else text_of(self.negative, index)
        if index == 0 and self.clip is None:
            return self._first(text, negative, run, generator)
        return continue_from_latents(
            self.c, text=text, negative_text=negative, run=run, size=self.size, num_frames=self.num_frames,
            cond=lambda: self._condition(index, generator), num_cond_latents=num_latents(self.num_cond_frames),
            uniform_tail=self.uniform_tail, use_kv_cache=self.use_kv_cache, generator=generator,
        )  # fmt: skip

    def _first(self, text: TextStates, negative: TextStates | None, run: Run, generator: torch.Generator) -> Tensor:
        options: dict[str, Any] = {
            "text": text, "negative_text": negative, "height": self.size[0], "width": self.size[1],
            "num_frames": self.num_frames, "num_steps": run.num_steps, "guidance_scale": run.guidance_scale,
            "schedule": run.schedule, "generator": generator, "cfg_scope": run.cfg_scope, "cfg_mode": run.cfg_mode,
            "output": "latents", "on_step": run.on_step, "progress": run.progress,
            "cfg_interval": run.cfg_interval, "step_cache": run.step_cache,
        }  # fmt: skip
        if self.image is None:
            return text_to_video(self.c, **options)
        return image_to_video(self.c, image=self.image, fit=self.fit, posterior=self.posterior, **options)

    def _condition(self, index: int, generator: torch.Generator) -> Tensor:
        if index == 0:
            assert self.clip is not None
            pixels = prepare_frames(self.clip[-self.num_cond_frames :], *self.size, self.fit)
            return encode_frames(self.c, pixels, posterior=self.posterior, generator=generator)
        return self.handover.condition(self.posterior, generator)


def _num_prompts(text: Text) -> int:
    """Told before a text encoder is loaded."""
    if isinstance(text, TextStates):
        return text.batch
    return 1 if isinstance(text, str) else len(text)


def _check_per_segment(states: TextStates, total: int, what: str) -> None:
    if states.batch not in (1, total):
        raise InputError(f"{states.batch} {what} for {total} segments; give one, or one per segment")


def text_of(states: TextStates, index: int) -> TextStates:
    """The segment's own prompt, or the one prompt of all: kept once, however many segments there are."""
    return states.select(index if states.batch > 1 else 0)
