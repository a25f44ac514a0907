"""What a recipe says about training the VAE: the sections `model`, `data` and `samples`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcv_core.shapes import SPACE_FACTOR, check_frames, check_size
from lcv_core.training.data.grammar import MOTIONS, TEXTURES
from lcv_core.training.strict import need

Source = Literal["base", "refined", "upsampled"]


@dataclass(frozen=True)
class Material:
    """Clips of one kind. share: of the steps, relative to the other kinds'; a step's samples are all of one kind.

    source: "base": as the transformer makes them. "refined": twice the size and frame rate, with textures. "upsampled":
        base clips enlarged to that, the refiner's input.
    num_frames: 4k+1. height, width: of a crop around the object; 0 takes the whole frame.
    textures, motions: those that samples show in turn, where some are to be seen more often; none: as chance has it.
    """

    source: Source
    num_frames: int
    height: int = 0
    width: int = 0
    share: float = 1.0
    textures: tuple[str, ...] = ()
    motions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, chosen, known in (("textures", self.textures, TEXTURES), ("motions", self.motions, MOTIONS)):
            for name in chosen:
                need(name in known, f"data.material: {what} has {name!r}; there are {', '.join(known)}")
        check_frames(self.num_frames)
        need(
            (self.height == 0) == (self.width == 0),
            f"data.material: give height and width, or neither for whole frames; got {self.height}x{self.width}",
        )
        need(
            self.height % SPACE_FACTOR == self.width % SPACE_FACTOR == 0,
            f"data.material: height and width must be multiples of {SPACE_FACTOR}, got {self.height}x{self.width}",
        )
        need(self.share > 0, f"data.material: share must be above 0, got {self.share:g}")

    def fixed(self, number: int) -> dict[str, str]:
        """What is given of the scene of a step's sample `number`."""
        chosen = {"texture": self.textures, "motion": self.motions}
        return {name: values[number % len(values)] for name, values in chosen.items() if values}


@dataclass(frozen=True)
class DataSection:
    """height, width, frame_rate: of the base clips. late: the share of clips from later in their scenes, where motions
    wrap. astray: the share of crops that are anywhere in the frame. material: what a step is drawn from. statistics:
    clips of each kind (base, refined) over which latents are measured in the end."""

    material: tuple[Material, ...]
    height: int = 64
    width: int = 96
    frame_rate: float = 15.0
    late: float = 0.5
    astray: float = 0.12
    statistics: int = 64

    def __post_init__(self) -> None:
        need(bool(self.material), "data.material names no material; one is {source: base, num_frames: 17}")
        check_size(self.height, self.width)
        need(self.statistics >= 1, f"data.statistics must be at least 1, got {self.statistics}")
        for kind in self.material:
            height, width = self.size(kind)
            need(
                kind.height <= height and kind.width <= width,
                f"data.material: a crop of {kind.height}x{kind.width} does not fit into {height}x{width}",
            )

    def size(self, kind: Material) -> tuple[int, int]:
        """Height and width of the frames that a kind is cropped from."""
        scale = 1 if kind.source == "base" else 2
        return scale * self.height, scale * self.width


@dataclass(frozen=True)
class ModelSection:
    """base_dim: width at full resolution; the file's size goes with its square (16: 3.6 million parameters); None: 16.

    checkpoint: a VAE to go on with instead, a folder of one or a model's; its width and the statistics of its latents
        stay, for models that know it.
    """

    base_dim: int | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        need(
            self.base_dim is None or self.checkpoint is None,
            "model: base_dim is that of the checkpoint where there is one; leave it out",
        )
        if self.base_dim is None:
            return
        need(
            self.base_dim >= 8 and self.base_dim % 2 == 0,
            f"model.base_dim must be even and at least 8, got {self.base_dim}",
        )


@dataclass(frozen=True)
class SamplesSection:
    """count: held-back clips of each kind (base, refined) that are shown, each above its reconstruction."""

    count: int = 4
