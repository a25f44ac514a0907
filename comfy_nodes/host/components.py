"""MODEL, VAE and CLIP as the parts that `lcv_core`'s pipelines run on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.pipelines.base import Components
from lcv_core.vae.tiling import Tiling

from .lora import applied_loras, apply_lora
from .native import checkpoint_of, native_of, require_longcat
from .sampling import bsa_of, denoise_in_host
from .schedule import flow_shift
from .text import Conditioning, HostEncoder
from .vae import check_vae, host_vae

# Adapter name -> the official file.
_FILES = {"distill": "cfg_step_lora.safetensors", "refinement": "refinement_lora.safetensors"}


@dataclass
class HostComponents(Components):
    """Components whose sampling, adapters and memory are ComfyUI's.

    model: the MODEL with all that other nodes patched into it. host_vae: a VAE, or None. positive, negative: used by
    every run in place of its text states, with all that other nodes put into them.
    """

    model: Any = None
    host_vae: Any = None
    positive: Conditioning | None = None
    negative: Conditioning | None = None
    _active: list[Any] = field(default_factory=list)

    @property
    def active(self) -> Any:
        """The MODEL with the adapters that are on right now."""
        return self._active[-1] if self._active else self.model

    def denoise(self, latents: Tensor, sigmas: Tensor, *, use_kv_cache: bool = False, **options: Any) -> Tensor:
        """A single condition frame is cached whatever `use_kv_cache` says: that is exact and costs little. Refinement
        asks for none: its condition frames take 22 GB at full size, to save a sixth of the tokens in five steps."""
        if options.get("bsa") is None:
            options["bsa"] = bsa_of(self.active)
        options["use_kv_cache"] = use_kv_cache or options.get("num_cond_latents", 0) == 1
        return denoise_in_host(self.active, latents, sigmas, positive=self.positive, negative=self.negative, **options)

    @contextlib.contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        path = self.adapters.get(name)
        # One that the user has put on with our loader is not added a second time.
        if path is None or (isinstance(path, Path) and path.resolve() in applied_loras(self.model)):
            yield
            return
        assert isinstance(path, Path)
        model, _ = apply_lora(self.active, path, adapter=self.read_adapter(name, path))
        self._active.append(model)
        try:
            yield
        finally:
            self._active.pop()

    def need_vae(self) -> Any:
        return host_vae(self.host_vae)


def components(
    model: Any, *, vae: Any = None, clip: Any = None, positive: Conditioning | None = None,
    negative: Conditioning | None = None, adapters: dict[str, Path] | None = None, tile: int = 0,
) -> HostComponents:  # fmt: skip
    """The parts of a job. adapters: by name; None takes those beside the checkpoint. tile: pixels, 0 decodes whole."""
    inner = require_longcat(model)
    if vae is not None:
        check_vae(vae)
    checkpoint = checkpoint_of(model)
    if adapters is None:
        adapters = {} if checkpoint is None else checkpoint.adapters
    return HostComponents(
        dit=inner.diffusion_model, model=model, host_vae=vae, positive=positive, negative=negative,
        text_encoder=None if clip is None else HostEncoder(clip), tiling=Tiling(tile, tile * 3 // 4) if tile else None,
        adapters=adapters, native=native_of(model), flow_shift=flow_shift(model),
    )  # fmt: skip


def need_adapter(c: HostComponents, name: str) -> None:
    """InputError that says what to download where the adapter that a job is made with is absent."""
    if name not in c.adapters:
        raise InputError(
            f"the {name} LoRA is missing: put {_FILES[name]} of the LongCat-Video repository into the checkpoint's lora"
            ' folder or models/loras, or choose "none" if the model has it merged in'
        )
