"""From a job to loaded models: device and dtype, text first and freed again, then DiT, VAE and adapters."""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from lcv_core.cli.job import Job
from lcv_core.cli.progress import Reporter
from lcv_core.config import Native
from lcv_core.dit.attention import resolve_backend
from lcv_core.errors import InputError
from lcv_core.pipelines.base import Components
from lcv_core.schedule import FLOW_SHIFT
from lcv_core.text.encoder import TextStates
from lcv_core.text.prompt import DEFAULT_NEGATIVE_PROMPT
from lcv_core.vae.tiling import Tiling
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint
from lcv_core.weights.lora import load_lora

log = logging.getLogger("lcv_core")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL_MODEL = 2_000_000_000  # parameters; up to here a CPU runs fp32


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one; InputError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'device "{name}" cannot be used here ({reason}); try --device auto') from None
    if device.type == "meta":
        raise InputError('device "meta" computes nothing; try --device auto')
    return device


def pick_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """ "auto" is bf16 on a GPU and for models too big for fp32 on a CPU, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        return torch.bfloat16
    tensors = checkpoint.dit_tensors
    parameters = sum(math.prod(tensors.shape(key)) for key in tensors.keys())  # noqa: SIM118
    return torch.float32 if parameters <= SMALL_MODEL else torch.bfloat16


@dataclass
class Session:
    """An opened checkpoint and the choices for this machine; models are loaded when asked for."""

    job: Job
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    reporter: Reporter

    @classmethod
    def open(cls, job: Job, device: str, reporter: Reporter) -> Session:
        """Checks everything that needs no weights."""
        optional = {k: getattr(job, k) for k in ("vae", "text_encoder", "tokenizer") if getattr(job, k)}
        checkpoint = open_checkpoint(job.model, **optional)
        where = pick_device(device)
        dtype = pick_dtype(job.dtype, where, checkpoint)
        for part in ("vae", "text_encoder", "tokenizer"):
            checkpoint.require(part)
        # Refused here, with the reason, rather than after the text encoder has run.
        resolve_backend(job.attention, device=where, dtype=dtype, head_dim=checkpoint.dit_config.head_dim)
        session = cls(job, checkpoint, where, dtype, reporter)
        session._check_adapters()
        return session

    @property
    def native(self) -> Native:
        return self.checkpoint.native

    def _check_adapters(self) -> None:
        needed = {"long": None, "refine": "refinement"}.get(self.job.task)
        if self.job.schedule == "distilled":
            needed = "distill"
        if needed and needed not in self.checkpoint.adapters and not self.job.loras:
            file = {"distill": "cfg_step_lora", "refinement": "refinement_lora"}[needed]
            raise InputError(
                f"{self.checkpoint.path} has no lora/{file}.safetensors, which this needs; download it there, or name"
                " your own with --lora"
            )

    def encode(self, prompts: list[str]) -> tuple[TextStates, TextStates | None]:
        """States of the prompts and of the negative prompt (None without guidance); the encoder is freed."""
        self.reporter.say(f"reading the prompt{'s' if len(prompts) > 1 else ''} ...")
        encoder = self.checkpoint.load_text_encoder(device=self.device, dtype=self.dtype)
        negative = self.job.negative_prompt
        negative = DEFAULT_NEGATIVE_PROMPT if negative is None else negative
        states = encoder.encode([*prompts, negative])
        del encoder
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        mask = states.mask
        text = TextStates(states.states[:-1], None if mask is None else mask[:-1])
        return text, states.select(len(prompts))

    def components(self, stack: ExitStack) -> Components:
        """DiT, VAE and the job's LoRAs; these are taken off again when `stack` closes."""
        self.reporter.say(f"loading the model on {self.device} in {str(self.dtype).removeprefix('torch.')} ...")
        dit = self.checkpoint.load_dit(device=self.device, dtype=self.dtype)
        if self.job.timestep_precision != dit.config.timestep_precision:
            dit.config = dataclasses.replace(dit.config, timestep_precision=self.job.timestep_precision)
        dit.set_attention(self.job.attention)
        vae = self.checkpoint.load_vae(device=self.device, dtype=self.dtype)
        for lora in self.job.loras:
            stack.enter_context(load_lora(dit, Path(lora.path), lora.strength))
        tile = self.job.tile
        return Components(
            dit=dit, vae=vae, adapters=self.checkpoint.adapters, native=self.native,
            flow_shift=self.checkpoint.flow_shift or FLOW_SHIFT,
            tiling=Tiling(tile, tile * 3 // 4) if tile else None,
        )  # fmt: skip
