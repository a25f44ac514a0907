"""Making clips and measuring them: records of single cases, kept on disk, from which the suites' numbers are taken."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcv_core.names import Handover
from lcv_core.partial import fingerprint
from lcv_core.refinement import upsampled_frames
from lcv_core.training.data import clips, grammar, render
from lcv_core.training.data.clips import refined_clip
from lcv_core.training.data.render import BASE_HEIGHT
from lcv_core.training.evaluation import judge, metrics, traits
from lcv_core.training.evaluation.cases import Case, make_cases
from lcv_core.training.evaluation.judge import measure
from lcv_core.training.evaluation.maker import Maker, Sampling
from lcv_core.training.evaluation.metrics import psnr, seam_jump, ssim
from lcv_core.training.evaluation.pictures import strip, to_uint8, write_sheet, write_strip
from lcv_core.training.evaluation.records import Record, RecordFile, collect
from lcv_core.training.evaluation.settings import Settings
from lcv_core.training.evaluation.traits import clip_traits
from lcv_core.training.events import Event, OnEvent
from lcv_core.training.rewards import give_rewards, pictures

EQUAL_DB = 100.0  # stands for the PSNR of equal clips, which JSON cannot write


class Runs:
    """The records of every kind of clips, made when they are asked for.

    maker: makes the clips. out: its folder gets `records/`, `pictures/` and `sheets/`. prints: fingerprints of what the
    maker is made of, "model" and the adapters by name; they decide whether records may be used again.
    """

    def __init__(
        self, maker: Maker, settings: Settings, out: Path, *, prints: Mapping[str, str], on_event: OnEvent
    ) -> None:
        self.maker, self.settings, self.out = maker, settings, out
        self._prints, self._on_event = dict(prints), on_event
        if settings.adapter is not None:
            self._prints["adapter"] = hashlib.sha256(settings.adapter.read_bytes()).hexdigest()[:16]

    def text(self, sampling: Sampling) -> list[Record]:
        """Clips from text: what they show, and their rewards."""
        settings = self.settings

        def make(cases: list[Case], picture: _Pictures) -> list[Record]:
            records = []
            for case, clip in zip(cases, self.maker.from_text(cases, sampling), strict=True):
                record = {"shown": shown(clip), "rewards": give_rewards(settings.rewards, clip, case.prompt)}
                picture(case, [clip], record["shown"])
                records.append(record)
            return records

        name = "t2v" if sampling.schedule == "base" else f"distilled-{sampling.num_steps}"
        if sampling.adapter is not None:
            name += "-adapter"
        return self._records(name, make, settings.count, sampling, rewards=settings.rewards)

    def image(self) -> list[Record]:
        """Clips from a rendered first frame and its prompt: also how well the first frame is kept."""

        def make(cases: list[Case], picture: _Pictures) -> list[Record]:
            images = torch.stack([self._rendered(case)[0] for case in cases])
            made = self.maker.from_images(cases, images, self.settings.base)
            records = []
            for case, clip, image in zip(cases, made, images, strict=True):
                record = {"shown": shown(clip), "first_frame_psnr": _finite(psnr(clip[:1], _unit(image[None])))}
                picture(case, [clip], record["shown"])
                records.append(record)
            return records

        return self._records("i2v", make, self.settings.count, self.settings.base)

    def long(self, handover: Handover) -> list[Record]:
        """Continued videos: what each segment shows and its traits, and the jumps at the joints.

        A segment is judged in a window of a whole clip's length that ends with it, so that a motion can be told.
        """
        settings, native = self.settings, self.maker.native

        def make(cases: list[Case], picture: _Pictures) -> list[Record]:
            pieces: list[Tensor] = []
            recent = torch.empty(0)
            windows: list[list[dict[str, Any]]] = [[] for _ in cases]
            for piece in self.maker.long(cases, settings.base, segments=settings.segments, handover=handover):
                pieces.append(to_uint8(piece))
                recent = torch.cat([recent, pieces[-1]], dim=1) if len(pieces) > 1 else pieces[0]
                recent = recent[:, -native.num_frames :]
                for window, clip in zip(windows, recent, strict=True):
                    window.append({"shown": shown(clip), **clip_traits(clip)})
                self._say(f"continuation, {handover}: segments", len(pieces), settings.segments)
            joints = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0).tolist()
            videos = torch.cat(pieces, dim=1)
            records = []
            for case, video, window in zip(cases, videos, windows, strict=True):
                kept = settings.kept_segments
                records.append(
                    {
                        "segments": window,
                        "seam": seam_jump(video[: joints[kept - 1]], joints[: kept - 1]),
                        "seam_all": seam_jump(video, joints[:-1]),
                    }
                )
                picture(case, [video[[end - 1 for end in joints]]], window[-1]["shown"])
            return records

        return self._records(
            f"continuation-{handover}", make, settings.continued, settings.base, segments=settings.segments,
            kept=settings.kept_segments,
        )  # fmt: skip

    def refined(self) -> list[Record]:
        """Rendered clips, refined with dense and with sparse attention, against the renderer and the plain upsampling.

        "trilinear" is the refiner's own input, with aligned corners; "trilinear, pixel centres" aligns those instead.
        """

        def make(cases: list[Case], picture: _Pictures) -> list[Record]:
            (case,) = cases
            clip = case.clip(*self._size)
            dense, dense_s = _timed(lambda: self.maker.refined(case, clip.frames, "dense"))
            sparse, sparse_s = _timed(lambda: self.maker.refined(case, clip.frames, "sparse"))
            truth = _unit(refined_clip(clip, time_mapping=_mapping(len(clip.frames), len(sparse))).frames)
            against = {"dense": dense, "sparse": sparse} | upsampled(clip.frames, truth.shape)
            record: Record = {
                "psnr": {name: _finite(psnr(frames, truth)) for name, frames in against.items()},
                "ssim": {name: ssim(frames, truth) for name, frames in against.items()},
                "sparse_to_dense_psnr": _finite(psnr(sparse, dense)),
                "shown": shown(sparse),
                "shown_dense": shown(dense),
                "seconds_dense": dense_s,
                "seconds_sparse": sparse_s,
            }
            picture(case, [against["trilinear"], sparse, truth], record["shown"])
            return [record]

        return self._records("refine", make, self.settings.refined, adapter="refinement", batch=1)

    def refined_made(self) -> list[Record]:
        """Clips from text, then refined: what they show, there being no other truth."""

        def make(cases: list[Case], picture: _Pictures) -> list[Record]:
            records = []
            for case, clip in zip(cases, self.maker.from_text(cases, self.settings.base), strict=True):
                fine = self.maker.refined(case, clip, "sparse")
                record = {"shown": shown(fine), "shown_before": shown(clip)}
                rough = upsampled(to_uint8(clip), fine.shape)["trilinear"]
                picture(case, [rough, fine], record["shown"])
                records.append(record)
            return records

        return self._records("refine-made", make, self.settings.refined, self.settings.base, adapter="refinement")

    @property
    def _size(self) -> tuple[int, int, int, float]:
        native = self.maker.native
        return native.num_frames, native.height, native.width, native.frame_rate

    def _rendered(self, case: Case) -> Tensor:
        return case.clip(*self._size).frames

    def _records(
        self, name: str, make: Callable[[list[Case], _Pictures], list[Record]], count: int,
        sampling: Sampling | None = None, *, adapter: str | None = None, batch: int | None = None, **more: Any,
    ) -> list[Record]:  # fmt: skip
        """The records `name` of the first `count` cases, from disk or made; and their contact sheet."""
        file = RecordFile(self.out / "records" / f"{name}.jsonl", self._key(sampling, adapter, more))
        if file.replaced:
            self._on_event(Event("note", f"{name}: made with other settings or another model before; it is made again"))
        strips = _Pictures(self.out / "pictures" / name, self.settings.sheet)

        def timed(cases: list[Case]) -> list[Record]:
            began = time.perf_counter()
            records = make(cases, strips)
            seconds = (time.perf_counter() - began) / len(cases)
            return [
                {"index": case.index, "prompt": case.prompt, "named": case.named, "seconds": seconds, **record}
                for case, record in zip(cases, records, strict=True)
            ]

        records = collect(
            file, make_cases(self.settings.seed, range(count)), timed, batch=batch or self.settings.batch,
            on_done=lambda done, total: self._say(name, done, total),
        )  # fmt: skip
        strips.write_sheet(self.out / "sheets" / f"{name}.png", count)
        return records

    def _key(self, sampling: Sampling | None, adapter: str | None, more: Mapping[str, Any]) -> str:
        """Of what decides the records; how many cases there are does not."""
        data: dict[str, Any] = {"code": _code_hash(), "seed": self.settings.seed, "native": self.maker.native, **more}
        parts = ["model"]
        if sampling is not None:
            data["sampling"] = dataclasses.replace(sampling, adapter=None)
            data["negative_prompt"] = self.settings.negative_prompt
            parts += ["distill"] if sampling.schedule == "distilled" else []
            parts += ["adapter"] if sampling.adapter is not None else []
        parts += [adapter] if adapter else []
        return fingerprint({**data, "prints": [self._prints.get(part) for part in parts]})

    def _say(self, what: str, done: int, total: int) -> None:
        self._on_event(Event("progress", what, done, total))


@cache
def _code_hash() -> str:
    """Of the code that makes the scenes and that measures, comments aside: what another judge said is not used."""
    modules = (clips, grammar, render, judge, metrics, traits, pictures)
    trees = (ast.dump(ast.parse(inspect.getsource(module))) for module in modules)
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:16]


class _Pictures:
    """The first cases of a kind as strips, and all of them as a sheet."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __call__(self, case: Case, rows: Sequence[Tensor], verdicts: Mapping[str, Any]) -> None:
        if case.index >= self.count:
            return
        missed = [name for name in case.named if not right(verdicts, case.named, name)]
        wrong = {name: verdicts[name][0] or "nothing clear" for name in missed}
        image = strip([to_uint8(row) for row in rows], case.prompt, wrong)
        write_strip(self._path(case.index), image)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:04d}.png"

    def write_sheet(self, path: Path, count: int) -> None:
        found = [self._path(i) for i in range(min(self.count, count)) if self._path(i).is_file()]
        if found:
            write_sheet(path, found)


def shown(frames: Tensor) -> dict[str, tuple[str | None, float]]:
    """What a clip [F, H, W, 3] shows, by attribute: value (None: nothing known) and confidence. No texture where the
    resolution cannot show one."""
    verdicts = measure(frames)
    if frames.shape[1] < 1.5 * BASE_HEIGHT:
        verdicts.pop("texture", None)
    return {name: (verdict.value, round(verdict.confidence, 4)) for name, verdict in verdicts.items()}


def right(verdicts: Mapping[str, Any], named: Mapping[str, str], attribute: str) -> bool:
    """Whether a clip shows what its prompt names; what was not measured is not wrong."""
    return attribute not in verdicts or verdicts[attribute][0] == named[attribute]


def upsampled(frames: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """Two trilinear upsamplings of frames uint8 [F, H, W, 3] to [F', H', W', 3] float in [0, 1], by name: of aligned
    corners, which is what the refiner gets, and of aligned pixel centres."""
    count, height, width, _ = shape
    refiner = torch.stack([*upsampled_frames(frames, (height, width), count)])  # [F', 3, H', W'] in [-1, 1]
    fine = torch.nn.functional.interpolate(
        _unit(frames).permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False
    )
    # In time as the refiner: the ends stay.
    at = torch.linspace(0, len(frames) - 1, count)
    low = at.long().clamp(max=len(frames) - 1)
    high = (low + 1).clamp(max=len(frames) - 1)
    centres = torch.lerp(fine[low], fine[high], (at - low).view(-1, 1, 1, 1))
    return {
        "trilinear": (refiner * 0.5 + 0.5).permute(0, 2, 3, 1),
        "trilinear, pixel centres": centres.permute(0, 2, 3, 1),
    }


def _mapping(frames: int, refined: int) -> Any:
    return "stretch" if refined == 2 * frames else "exact"


def _unit(frames: Tensor) -> Tensor:
    return frames.float() / 255.0


def _finite(decibels: float) -> float:
    return min(decibels, EQUAL_DB) if not math.isnan(decibels) else 0.0


def _timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    return make(), time.perf_counter() - began
