"""From a job to loaded models: device and dtype, text first and freed again, then DiT, VAE and adapters."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lcv_core.cli.fit import as_fields, bsa_of, is_guided, settings_of
from lcv_core.cli.job import Job
from lcv_core.cli.outputs import CHANGED, Changes
from lcv_core.cli.progress import Reporter
from lcv_core.config import Native
from lcv_core.dit.attention import check_eight_bits, resolve_backend
from lcv_core.dit.compiled import check_compiler
from lcv_core.dit.kernels import resolve_kernels
from lcv_core.dit.model import LongCatDiT
from lcv_core.errors import InputError
from lcv_core.files import prepare_target
from lcv_core.miniature import MINIATURE, find_model
from lcv_core.partial import fingerprint
from lcv_core.pipelines.base import Components
from lcv_core.pipelines.memory import Change, Memory, tiling_of
from lcv_core.planning.settings import Settings
from lcv_core.schedule import FLOW_SHIFT
from lcv_core.text.encoder import TextStates
from lcv_core.text.prompt import DEFAULT_NEGATIVE_PROMPT
from lcv_core.weights.assemble import Assembly
from lcv_core.weights.checkpoint import Checkpoint, open_checkpoint, open_text_encoder, open_vae
from lcv_core.weights.lora import load_lora
from lcv_core.weights.lora_read import read_lora
from lcv_core.weights.quantised import check_as_stored, check_weights
from lcv_core.weights.streamed import BlockFiles, check_streaming
from lcv_core.weights.tensors import TensorSource

log = logging.getLogger("lcv_core")

T = TypeVar("T")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL_MODEL = 2_000_000_000  # parameters; up to here a CPU runs fp32
_ADAPTER_FILES = {"distill": "cfg_step_lora", "refinement": "refinement_lora"}


def open_for(job: Job) -> Checkpoint:
    """The job's checkpoint, complete; CheckpointError that names what is missing or wrong in it. Reads no weights."""
    if not find_model(job.model).exists():
        raise InputError(f"there is no model at {job.model}; check --model, or make a small one: lcv init {job.model}")
    parts = {k: getattr(job, k) for k in ("vae", "text_encoder", "tokenizer") if getattr(job, k)}
    checkpoint = open_checkpoint(job.model, **parts)
    for part in ("dit", "vae", "text_encoder", "tokenizer"):
        checkpoint.require(part)
    open_vae(checkpoint.require("vae"))
    open_text_encoder(checkpoint.require("text_encoder"))
    return checkpoint


def with_hashes(job: Job, checkpoint: Checkpoint) -> Job:
    """The job with the fingerprints of what it runs on."""
    name = adapter_of(job)
    return dataclasses.replace(
        job, model_hash=checkpoint.fingerprint(), part_hashes=checkpoint.part_fingerprints([name] if name else [])
    )


def check_hashes(job: Job, checkpoint: Checkpoint, file: Path) -> None:
    """InputError unless a job read from `file` would run on the weights it was made with."""
    now = with_hashes(job, checkpoint)
    if now.model_hash != job.model_hash:
        raise InputError(
            f"{job.model} is not the model of {file} (hash {now.model_hash}, made with {job.model_hash});"
            " name that one with --model"
        )
    for part, value in job.part_hashes.items():
        if now.part_hashes.get(part) != value:
            raise InputError(f"the {part} of {job.model} is not the one that {file} was made with")


def adapter_of(job: Job) -> str | None:
    """The adapter of the checkpoint that a job runs with."""
    if job.schedule == "distilled":
        return "distill"
    return "refinement" if job.task == "refine" else None


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one; InputError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'unknown device "{name}"; use cpu, cuda, cuda:1, ... or auto') from None
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each kind of device fails in its own way
        reason = re.split(r"\n|\. | \(", str(error))[0][:100]
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


class _Shapes:
    """An adapter's header as a TensorStore: enough to check it against a model without reading it."""

    def __init__(self, path: Path) -> None:
        self._source = TensorSource.open(path)

    def keys(self) -> Iterable[str]:
        return self._source.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(()).expand(self.shape(name))


@dataclass
class Session:
    """An opened checkpoint and the choices for this machine; models are loaded when asked for.

    earlier: what unfinished work that is gone on with was changed to while it ran.
    """

    job: Job
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    reporter: Reporter
    text_cache: Path | None = None
    memory: Memory | None = None
    earlier: Changes = field(default_factory=list)

    @classmethod
    def open(
        cls, job: Job, checkpoint: Checkpoint, device: str, reporter: Reporter, text_cache: Path | None = None,
        memory: Memory | None = None,
    ) -> Session:  # fmt: skip
        """Checks everything that needs no weights. text_cache: a folder for the states of prompts."""
        if text_cache is not None:
            prepare_target(text_cache / "states")
        where = pick_device(device)
        dtype = pick_dtype(job.dtype, where, checkpoint)
        # Refused here, with the reason, rather than after the text encoder has run.
        resolve_backend(job.attention, device=where, dtype=dtype, head_dim=checkpoint.dit_config.head_dim)
        if job.sparse_8bit:
            check_eight_bits(where, dtype, checkpoint.dit_config.head_dim)
        if job.compile == "blocks":
            check_compiler(where)
        check_weights(job.weights, checkpoint.dit_tensors, str(checkpoint.dit))
        check_streaming(job.stream, job.weights, checkpoint.dit_tensors, where, str(checkpoint.dit))
        resolve_kernels(job.kernels, where)
        session = cls(job, checkpoint, where, dtype, reporter, text_cache, memory)
        if memory is not None and can_be_read_again(job.weights, checkpoint.dit_tensors):
            memory.block_files = lambda: BlockFiles(checkpoint.dit_tensors)
        session._check_adapters()
        return session

    @property
    def native(self) -> Native:
        return self.checkpoint.native

    @property
    def flow_shift(self) -> float:
        return self.checkpoint.flow_shift or FLOW_SHIFT

    @cached_property
    def _machine(self) -> str:
        return f"{self.device.type}-{self.dtype}"

    def key(self, job: Job) -> str:
        """Identifies unfinished work: numbers are continued only on the kind of device and in the dtype they began."""
        return fingerprint({"job": job.key(), "machine": self._machine})

    def doing(self, what: str) -> None:
        """What is made from now on, where a run makes several: to say where something was changed."""
        if self.memory is not None:
            self.memory.doing = what

    @property
    def changes(self) -> Changes:
        """What ran otherwise than the job says, in order, by the names of its fields."""
        return [*self.earlier, *map(_as_data, [] if self.memory is None else self.memory.history)]

    def go_on_from(self, changes: Changes) -> None:
        """Unfinished work was changed like this; what is gone on with has the settings of the job again."""
        last = {name: value for change in changes for name, value in change["to"].items()}
        now = {name: getattr(self.job, name, value) for name, value in last.items()}
        now = {name: value for name, value in now.items() if value != last[name]}
        back = {"stage": "all", "where": "gone on with later", "from": {name: last[name] for name in now}, "to": now}
        self.earlier = [*changes, back] if now else changes

    def note(self, job: Job) -> str:
        """What is stored with unfinished work of a job."""
        return json.dumps(job.to_metadata() | ({CHANGED: self.changes} if self.changes else {}))

    def _check_adapters(self) -> None:
        needed, adapters = adapter_of(self.job), self.checkpoint.adapters
        files = [lora.resolve() for lora in self.job.loras]
        if needed and needed in adapters:
            files.append(adapters[needed])
        elif needed:
            file = f"lora/{_ADAPTER_FILES[needed]}.safetensors"
            if not files:
                raise InputError(
                    f"{self.checkpoint.path} has no {file}, which this needs; download it there, or name your own with"
                    " --lora"
                )
            log.warning("%s has no %s; the --lora given has to do its work", self.checkpoint.path, file)
        if files:
            model = LongCatDiT(self.checkpoint.dit_config, device="meta")
            for path in files:
                read_lora(model, _Shapes(path), path.name)

    def encode(self, prompts: list[str]) -> tuple[list[TextStates], TextStates | None]:
        """States of each prompt, and of the negative prompt where guidance reads it; the encoder is freed.

        One by one, so that a prompt's states do not depend on what else was asked for and a repeated job is exact.
        """
        self.reporter.say(f"seed {self.job.seed}")
        self.reporter.say(f"reading the prompt{'s' if len(prompts) > 1 else ''} ...")
        negative = self.job.negative_prompt
        negative = DEFAULT_NEGATIVE_PROMPT if negative is None else negative
        wanted = [*prompts, negative] if is_guided(self.job) else prompts
        states = self._guarded("text encode", lambda: self._encode(wanted))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return states[: len(prompts)], states[-1] if is_guided(self.job) else None

    def _encode(self, prompts: list[str]) -> list[TextStates]:
        on_cpu = self.memory is not None and self.memory.settings.text_device == "cpu"
        device = torch.device("cpu") if on_cpu else self.device
        encoder = self.checkpoint.cached_text_encoder(device=device, dtype=self.dtype, cache=self.text_cache)
        together = encoder.encode(prompts).to("cpu")
        return [together.select(i) for i in range(together.batch)]

    def _guarded(self, stage: str, work: Callable[[], T]) -> T:
        """work(), and with other settings where memory runs out; it reads them from `memory`."""
        if self.memory is None:
            return work()
        return self.memory.run(stage, work, lambda move: None, str)

    def components(self, stack: ExitStack) -> Components:
        """DiT, VAE and the job's LoRAs; these are taken off again when `stack` closes."""
        name = "the miniature (name another model with --model)" if self.job.model == MINIATURE else "the model"
        self.reporter.say(f"loading {name} on {self.device} in {str(self.dtype).removeprefix('torch.')} ...")
        dit = self._guarded("sampling", self._load_dit)
        settings = self._settings()
        dit.set_kv_cache(storage=settings.cache_storage, place=settings.cache_place)
        dit.set_kernels(self.job.kernels)
        stack.callback(dit.stop_streaming)
        if self.job.timestep_precision != dit.config.timestep_precision:
            dit.config = dataclasses.replace(dit.config, timestep_precision=self.job.timestep_precision)
        dit.config = dataclasses.replace(dit.config, bsa=bsa_of(self.job, dit.config))
        dit.set_attention(self.job.attention)
        dit.set_compile(self.job.compile)
        vae = self.checkpoint.load_vae(device=self.device, dtype=self.dtype)
        for lora in self.job.loras:
            stack.enter_context(load_lora(dit, lora.resolve(), lora.strength))
        return Components(
            dit=dit, vae=vae, adapters=self.checkpoint.adapters, native=self.native, flow_shift=self.flow_shift,
            tiling=tiling_of(settings.tile), memory=self.memory,
        )  # fmt: skip

    def _settings(self) -> Settings:
        """What memory decides: as the plan has it by now, or as the job says."""
        if self.memory is not None:
            return self.memory.settings
        return settings_of(self.job)

    def _load_dit(self) -> LongCatDiT:
        settings = self._settings()
        return self.checkpoint.load_dit(
            device=self.device, dtype=self.dtype, weights=self.job.weights, streaming=settings.stream,
            resident=settings.resident,
        )  # fmt: skip


def _as_data(change: Change) -> dict[str, Any]:
    where = ", ".join(part for part in (change.doing, change.where) if part)
    return {"stage": change.stage, "where": where, "from": as_fields(change.before), "to": as_fields(change.after)}


def can_be_read_again(weights: str, tensors: Assembly) -> bool:
    """Whether blocks can be read from the checkpoint's files as they are needed."""
    try:
        check_as_stored(weights, tensors, "")
    except InputError:
        return False
    return True
