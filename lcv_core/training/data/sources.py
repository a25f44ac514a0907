"""Where clips come from: the procedural ones, or a folder (`folder.py`); what the cache asks of either."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

from torch import Tensor

from lcv_core.shapes import check_frames, check_size
from lcv_core.training.data import clips, grammar, render
from lcv_core.training.data.clips import clip_generator, describe_clip, sample_clip
from lcv_core.training.data.grammar import MOTIONS, HeldBack, caption
from lcv_core.training.strict import need


@dataclass(frozen=True)
class SourceClip:
    """name: what the clip is called in errors. frames: uint8 [F, H, W, 3], F = 4k+1, sides multiples of 16."""

    name: str
    frames: Tensor


@dataclass(frozen=True)
class Part:
    """A piece of a source that is cached as one file: its clips have one size.

    identity: JSON-able; changes when the clips do. name: for errors and progress.
    """

    name: str
    identity: Mapping[str, Any]


class ClipSource(Protocol):
    """Clips with captions, in parts."""

    def parts(self) -> Sequence[Part]:
        """In a fixed order. InputError naming what is wrong, where the source says to stop at bad data."""
        ...

    def read(self, index: int) -> Iterator[SourceClip]:
        """The clips of part `index`; InputError naming the file that cannot be used."""
        ...

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        """The captions of clip `position` of part `index`, one or more."""
        ...

    @property
    def frame_rate(self) -> float: ...


@cache
def _code_hash() -> str:
    """Of the code that makes the clips, comments and layout aside: clips of another renderer are others."""
    trees = (ast.dump(ast.parse(inspect.getsource(module))) for module in (clips, grammar, render))
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ProceduralClips:
    """Clips rendered by this repository (`clips.py`).

    count: numbers 0 to count - 1 of a seed; a larger count keeps the first ones. captions: wordings of each clip, of
    which training draws one. late, held_back: as in `describe_clip`. motions: those that clips show in turn, where some
    are to be seen more often; none: all, as chance has it. part: clips that are computed and kept together.
    """

    count: int = 20000
    seed: int = 0
    num_frames: int = 17
    height: int = 64
    width: int = 96
    frame_rate: float = 15.0
    late: float = 0.0
    captions_per_clip: int = 4
    held_back: HeldBack = "exclude"
    motions: tuple[str, ...] = ()
    part: int = 64

    def __post_init__(self) -> None:
        for motion in self.motions:
            need(motion in MOTIONS, f"data.procedural.motions has {motion!r}; the motions are {', '.join(MOTIONS)}")
        need(self.part >= 1, f"data.procedural.part must be at least 1, got {self.part}")
        need(self.count >= 1, f"data.procedural.count must be at least 1, got {self.count}")
        need(self.captions_per_clip >= 1, "data.procedural.captions_per_clip must be at least 1")
        need(self.frame_rate > 0, f"data.procedural.frame_rate must be above 0, got {self.frame_rate:g}")
        need(0 <= self.late <= 1, f"data.procedural.late is a share, in [0, 1], got {self.late:g}")
        check_frames(self.num_frames)
        check_size(self.height, self.width)

    def parts(self) -> list[Part]:
        settings = {
            k: v for k, v in dataclasses.asdict(self).items() if k not in ("count", "captions_per_clip", "part")
        }
        if not self.motions:
            del settings["motions"]  # clips of before there was a choice are these
        settings["renderer"] = _code_hash()
        spans = [(a, min(a + self.part, self.count)) for a in range(0, self.count, self.part)]
        return [Part(f"clips {a} to {b - 1}", {"procedural": settings, "from": a, "to": b}) for a, b in spans]

    def read(self, index: int) -> Iterator[SourceClip]:
        for number in range(index * self.part, min((index + 1) * self.part, self.count)):
            clip = sample_clip(
                self.seed, number, num_frames=self.num_frames, height=self.height, width=self.width,
                frame_rate=self.frame_rate, held_back=self.held_back, late=self.late, **self._fixed(number),
            )  # fmt: skip
            yield SourceClip(f"clip {number}", clip.frames)

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        number = index * self.part + position
        scene, first, _ = describe_clip(
            self.seed, number, held_back=self.held_back, late=self.late, **self._fixed(number)
        )
        words = clip_generator(self.seed + 1, number)
        others = [caption(scene, words) for _ in range(self.captions_per_clip - 1)]
        return tuple(dict.fromkeys([first, *others]))

    def _fixed(self, number: int) -> dict[str, str]:
        return {"motion": self.motions[number % len(self.motions)]} if self.motions else {}


@dataclass(frozen=True)
class Joined:
    """Several sources as one; their clips may be of different sizes."""

    sources: tuple[ClipSource, ...]

    @property
    def frame_rate(self) -> float:
        return self.sources[0].frame_rate

    def parts(self) -> list[Part]:
        return [part for source in self.sources for part in source.parts()]

    def read(self, index: int) -> Iterator[SourceClip]:
        source, inner = self._find(index)
        return source.read(inner)

    def captions(self, index: int, position: int) -> tuple[str, ...]:
        source, inner = self._find(index)
        return source.captions(inner, position)

    def _find(self, index: int) -> tuple[ClipSource, int]:
        """The source that part `index` is of, and its number there."""
        for source, count in zip(self.sources, self._counts, strict=True):
            if index < count:
                return source, index
            index -= count
        raise IndexError(index)

    @cached_property
    def _counts(self) -> list[int]:
        return [len(source.parts()) for source in self.sources]
