"""Going on where memory has run out: the stage is freed and done again with less, from what is finished.

Kept are the latents of the last step, finished segments, and frames that were handed out. A stage changes settings in
one direction only and each once, so it ends: done, or with an error that says what was tried.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lcv_core.config import TextConfig, VAEConfig
from lcv_core.denoise import Progress, denoise
from lcv_core.errors import OutOfMemory, is_out_of_host_memory, is_out_of_memory
from lcv_core.planning import Job
from lcv_core.planning.choose import Planner
from lcv_core.planning.fallback import Move, describe, moves, stage_need
from lcv_core.planning.machine import this_machine
from lcv_core.planning.plan import Models
from lcv_core.planning.settings import Settings
from lcv_core.vae.tiling import Tiling

if TYPE_CHECKING:
    from lcv_core.offload.feeds import Source
    from lcv_core.pipelines.base import Components

log = logging.getLogger("lcv_core")

T = TypeVar("T")
_NO_TEXT = TextConfig(vocab_size=1, d_model=1, d_kv=1, d_ff=1, num_layers=1, num_heads=1)  # it is encoded elsewhere


@dataclass(frozen=True)
class Change:
    """What a stage went on with: settings by name, before and after. where: "at step 3". doing: of what, where a run
    makes several: "segment 2 of 5"."""

    stage: str
    where: str
    doing: str
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass
class Memory:
    """The settings that a run has now, and its way to others.

    say: gets a line for each change. block_files: makes what blocks are read from on disk; None: they cannot be.
    doing: what is made now, where a run makes several. tried, changed: the changes so far, in words and by name.
    history: the same with all that is known of them.
    """

    planner: Planner
    settings: Settings = field(default_factory=Settings)
    say: Callable[[str], None] = log.warning
    block_files: Callable[[], Source] | None = None
    doing: str = ""
    tried: list[str] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)
    history: list[Change] = field(default_factory=list)

    @classmethod
    def planned(cls, c: Components, job: Job, **fixed: Any) -> Memory:
        """For loaded components on the machine they are on: the settings that fit are chosen and carried out.

        job: what is to be made; its dtypes are set from the components. fixed: settings that stay, by name. The form of
        the weights does, and where the text is encoded: both are there already. Raises InputError where nothing fits.
        """
        c.memory = None
        name: Any = {torch.float32: "fp32", torch.float16: "fp16"}.get(c.dit.dtype, "bf16")
        device = "gpu" if c.device.type == "cuda" else "cpu"
        job = replace(
            job, together=True, device=device, compute_dtype=name, weight_dtype=name, vae_dtype=name, text_dtype=name
        )
        weights = sum(p.nbytes for p in c.dit.parameters()) + sum(b.nbytes for b in c.dit.buffers())
        vae = VAEConfig() if c.vae is None else c.vae.config
        models = Models(c.dit.config, vae, _NO_TEXT, dit_weights=weights)
        given = {"weights": "plain", "window": None, "text_device": "same"} | fixed
        planner = Planner(job, models, this_machine(c.device), fixed=given)
        made = cls(planner, planner.best().settings)
        made.apply(c, Move(made.settings, made.settings.changed_from(Settings())))
        c.memory = made
        return made

    def run(self, stage: str, work: Callable[[], T], change: Callable[[Move], None], where: Callable[[], str]) -> T:
        """work(), again after each change while memory runs out. stage: a key of `fallback.MOVES`.

        change(move): carries a move out. where(): "at step 3", for the line that is said. Raises OutOfMemory when
        nothing is left to change; every other error, Ctrl-C too, goes through.
        """
        move: Move | None = None
        while True:
            try:
                if move is not None:
                    change(move)
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                host, first = is_out_of_host_memory(error), str(error).splitlines()[:1]
            # The error is gone by now, and with it the frames that held the stage's tensors.
            self._free()
            move = self._next(stage, host, where(), "".join(first))

    def _next(self, stage: str, host: bool, where: str, error: str) -> Move:
        found = next(moves(self.planner, self.settings, stage, host=host, disk=self.block_files is not None), None)
        place = f"out of {'system ' if host else ''}memory in {stage}{where and ' ' + where}"
        if found is None:
            need = stage_need(self.planner.choice(self.settings), stage)
            plan = f" The plan: {describe(need)}, on {self.planner.machine.name}." if need else ""
            tried = f"; went on before with {', then '.join(self.tried)}" if self.tried else ""
            raise OutOfMemory(
                f"{place}, and nothing is left to go on with{tried}.{plan}"
                f" Ask for fewer frames or a smaller height and width; what is finished is kept ({error})"
            )
        self.say(f"{place}; going on with {found.words}")
        before = {name: getattr(self.settings, name) for name in found.changes}
        self.history.append(Change(stage, where, self.doing, before, found.changes))
        self.tried.append(found.words)
        self.changed |= found.changes
        self.settings = found.settings
        return found

    @staticmethod
    def _free() -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def apply(self, c: Components, move: Move) -> None:
        """Carry a change out on loaded models."""
        s = self.settings
        c.tiling = tiling_of(s.tile)
        c.dit.set_kv_cache(storage=s.cache_storage, place=s.cache_place)
        if "stream" in move.changes:
            self._stream(c, move.changes["stream"])
        elif "resident" in move.changes:
            c.dit.free_resident_blocks()
            self._free()

    def _stream(self, c: Components, place: Any) -> None:
        from lcv_core.offload.lanes import lanes_of
        from lcv_core.offload.turns import BlocksInTurn, blocks_within

        source = None
        if place == "disk":
            assert self.block_files is not None
            source = self.block_files()
            c.dit.stop_streaming()  # before the new slots are made
        c.dit.requires_grad_(False)
        blocks = list(c.dit.blocks)
        resident = blocks_within(blocks, self.settings.resident)
        c.dit.set_streaming(BlocksInTurn(blocks, lanes_of(c.device), place, source, resident=resident))
        self._free()

    def sample(self, c: Components, latents: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        """`denoise` with the transformer of these components, going on from the last step."""
        kept = _Kept(options.pop("progress", None))
        guidance = options.pop("guidance", None)

        def work() -> Tensor:
            guide = guidance
            if guide is not None and "cfg_mode" in self.changed:
                guide = replace(guide, mode=self.changed["cfg_mode"])
            return denoise(c.dit, latents, sigmas, progress=kept, guidance=guide, **options)

        return self.run("sampling", work, lambda move: self.apply(c, move), lambda: f"at step {kept.step + 1}")


class _Kept:
    """A run's `Progress` that also keeps the latents in memory, so that a repetition needs no file."""

    def __init__(self, inner: Progress | None) -> None:
        self.inner, self.step = inner, 0
        self.latents: Tensor | None = None
        self.state: dict[str, Any] = {}

    def load(self, latents: Tensor) -> tuple[int, Tensor]:
        if self.latents is None and self.inner is not None:
            self.step, found = self.inner.load(latents)
            self.state = getattr(self.inner, "state", self.state)
            return self.step, found
        return self.step, latents if self.latents is None else self.latents.to(latents)

    def tick(self, step: int, latents: Tensor) -> None:
        self._keep(step, latents)
        if self.inner is not None:
            self.inner.tick(step, latents)

    def save(self, step: int, latents: Tensor) -> None:
        self._keep(step, latents)
        if self.inner is not None:
            self.inner.save(step, latents)

    def _keep(self, step: int, latents: Tensor) -> None:
        self.step, self.latents = step, latents.cpu()
        if self.inner is not None and hasattr(self.inner, "state"):
            self.inner.state = self.state  # type: ignore[attr-defined]


def tiling_of(tile: int) -> Tiling | None:
    """The tiles of a side in pixels, a quarter of each shared with the next; None for 0."""
    return Tiling(tile, tile * 3 // 4) if tile else None
