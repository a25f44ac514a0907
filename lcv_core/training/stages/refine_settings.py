"""What a recipe says about refinement: the sections `data`, `objective` and `samples`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lcv_core.config import BSAConfig
from lcv_core.training.data.cache import LatentOptions, Precision
from lcv_core.training.data.folder import FolderClips, FolderSection
from lcv_core.training.data.pairs import Flaws, FolderPairs, Kind, PairSource, ProceduralPairs
from lcv_core.training.data.sources import ProceduralClips
from lcv_core.training.strict import need


@dataclass(frozen=True)
class DataSection:
    """procedural: the low-resolution clips, rendered; `count` is shared out among the kinds. folder: or your own videos
    in high resolution; its num_frames and frame_rate are those after refining, frames_in those of a clip before.

    kinds: of refine passes; a micro-batch has one. scale: of the sides. flaws: of the low-resolution clips.
    cache, latents, texts: as for flow matching.
    """

    procedural: ProceduralClips | None = None
    folder: FolderSection | None = None
    frames_in: int = 93
    kinds: tuple[Kind, ...] = (Kind(),)
    scale: int = 2
    flaws: Flaws = field(default_factory=Flaws)
    cache: Path = Path("outputs/cache")
    latents: LatentOptions = field(default_factory=LatentOptions)
    texts: Precision = "fp32"

    def __post_init__(self) -> None:
        need(
            (self.procedural is None) != (self.folder is None),
            "data must have either procedural (clips rendered here) or folder (your own videos)",
        )
        need(self.scale >= 1, f"data.scale must be at least 1, got {self.scale}")
        names = [kind.name for kind in self.kinds]
        need(len(names) > 0 and len({*names}) == len(names), f"data.kinds must be different kinds, got {names}")

    def shares(self) -> list[float]:
        """Of the kinds, together 1."""
        total = sum(kind.share for kind in self.kinds)
        return [kind.share / total for kind in self.kinds]

    def pairs(self, on_bad_data: Literal["stop", "skip"]) -> list[PairSource]:
        """The pairs of each kind: its share of the procedural clips, others for each kind, or all videos."""
        if self.folder is not None:
            clips = FolderClips(self.folder, on_bad_data)
            return [*(FolderPairs(clips, kind, self.frames_in, self.scale) for kind in self.kinds)]
        found: list[PairSource] = []
        for number, (kind, share) in enumerate(zip(self.kinds, self.shares(), strict=True)):
            assert self.procedural is not None
            count, seed = max(1, round(self.procedural.count * share)), self.procedural.seed + number
            found.append(
                ProceduralPairs(dataclasses.replace(self.procedural, count=count, seed=seed), kind, self.scale)
            )
        return found

    def pixels(self) -> tuple[int, int]:
        """(height, width) of a high-resolution clip, of a typical one where they differ."""
        if self.folder is not None:
            return self.folder.height or self.folder.area_of[0], self.folder.width or self.folder.area_of[1]
        assert self.procedural is not None
        return self.scale * self.procedural.height, self.scale * self.procedural.width


@dataclass(frozen=True)
class Objective:
    """t_thresh: the noise level that refinement starts from. flow_shift: None is the checkpoint's.

    attention: "dense", or "sparse" with the checkpoint's block sparse attention; sparsity: instead of its own.
    text_dropout: share of samples whose prompt is empty, as it is for long videos.
    cond_noise: condition frames get independent noise of levels uniform in [0, cond_noise].
    """

    t_thresh: float = 0.5
    flow_shift: float | None = None
    attention: Literal["dense", "sparse"] = "dense"
    sparsity: float | None = None
    text_dropout: float = 0.1
    cond_noise: float = 0.02

    def __post_init__(self) -> None:
        need(0 < self.t_thresh <= 1, f"objective.t_thresh must be in (0, 1], got {self.t_thresh:g}")
        need(
            self.sparsity is None or self.attention == "sparse",
            "objective.sparsity goes with attention: sparse",
        )
        for name in ("text_dropout", "cond_noise"):
            need(0 <= getattr(self, name) <= 1, f"objective.{name} must be in [0, 1], got {getattr(self, name):g}")

    def bsa(self, config: BSAConfig) -> BSAConfig | None:
        """What the network is called with; None is dense."""
        if self.attention == "dense":
            return None
        return config if self.sparsity is None else dataclasses.replace(config, sparsity=self.sparsity)


@dataclass(frozen=True)
class SamplesSection:
    """count: clips of the first kind that are shown: as they are given, refined in `refine_steps` steps, as wanted."""

    count: int = 3
    refine_steps: int = 5
    seed: int = 0
