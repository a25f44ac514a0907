"""The names in adapter files: which dialect they speak, and which module each tensor belongs to.

Dialects: official (`lora___lorahyphen___blocks___lorahyphen___0...`, with block-diagonal parts `lora_up.blocks.k`),
comfyui (`diffusion_model.X.lora_A/lora_B` or `lora_down/lora_up`), diffusers (`transformer.X.lora_A`), peft
(`base_model.model.X.lora_A[.default]`), kohya (`lora_unet_X_with_underscores`), plain (`X.lora_A`), and any of the
last five with Kijai's Wan-style or FastVideo's module names, whose separate q, k, v land on rows of the fused weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from lcv_core.errors import InputError
from lcv_core.weights.keymaps import FASTVIDEO_DIT, WAN_DIT, Slot, sources

AdapterFile = Literal["cfg_step_lora", "refinement_lora"]

OFFICIAL_RANK = 128
OFFICIAL_SCALE = 0.5  # alpha_scale of the two official files: 64 / 128
# What they change, and the number of parts of each fused weight; both leave cross_attn.proj alone.
_BLOCK_TARGETS = {
    "attn.qkv": 3, "attn.proj": 1, "cross_attn.q_linear": 1, "cross_attn.kv_linear": 2,
    "ffn.w1": 1, "ffn.w2": 1, "ffn.w3": 1,
}  # fmt: skip
_REFINEMENT_TARGETS = {"adaLN_modulation.1": 6}
_REFINEMENT_FINAL = {"final_layer.adaLN_modulation.1": 2, "final_layer.linear": 1}

_HYPHEN = "___lorahyphen___"
_OFFICIAL = f"lora{_HYPHEN}"
# Container prefix -> dialect; the first that fits counts, then the rest is stripped too.
_PREFIXES = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
}
_ENTRY = re.compile(
    r"(?P<module>.+?)\.(?P<role>lora_down|lora_A|lora\.down|lora_up(?:\.blocks\.(?P<part>\d+))?|lora_B|lora\.up"
    r"|alpha_scale|lora_alpha|alpha|diff_b|diff)(?:\.(?!weight$)\w+)?(?:\.weight)?"
)
_DOWN = ("lora_down", "lora_A", "lora.down")
_UNSUPPORTED = {".dora_scale": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr", ".lora_mid": "a Tucker LoRA"}


@dataclass
class Entry:
    """The tensors (names in the file) of one target module (its name in the file, without container prefix).

    ups by part: one for a plain adapter, n for the n block-diagonal parts of the official format. alpha is the
    conventional one (scale = alpha / rank); alpha_scale is the scale itself. diff and diff_b are full deltas.
    """

    module: str
    down: str | None = None
    ups: dict[int, str] = field(default_factory=dict)
    alpha: str | None = None
    alpha_scale: str | None = None
    diff: str | None = None
    diff_b: str | None = None


@dataclass(frozen=True)
class Grouped:
    """An adapter file by target module. stray: names that are no part of an adapter."""

    dialect: str
    entries: dict[str, Entry]
    stray: tuple[str, ...]


def official_targets(file: AdapterFile, depth: int) -> dict[str, int]:
    """The modules that an official file changes in a transformer of `depth` blocks, and how many parts each has.

    A fused weight of n parts has a stacked lora_down [n * rank, i] and n separate lora_up.blocks.k [o / n, rank].
    """
    block = _BLOCK_TARGETS | (_REFINEMENT_TARGETS if file == "refinement_lora" else {})
    targets = {f"blocks.{i}.{target}": parts for i in range(depth) for target, parts in block.items()}
    return targets | (_REFINEMENT_FINAL if file == "refinement_lora" else {})


def official_names(module: str, parts: int) -> tuple[str, list[str], str]:
    """The names in an official file of a module's down matrix, of its up matrix or matrices, and of its scale."""
    prefix = _HYPHEN.join(["lora", *module.split(".")])
    leaves = ["lora_up"] if parts == 1 else [f"lora_up.blocks.{k}" for k in range(parts)]
    return f"{prefix}.lora_down.weight", [f"{prefix}.{leaf}.weight" for leaf in leaves], f"{prefix}.alpha_scale"


def group(names: Iterable[str]) -> Grouped:
    """Sort the tensor names of an adapter file by target; InputError for formats other than LoRA and full deltas."""
    entries: dict[str, Entry] = {}
    stray: list[str] = []
    dialect = "plain"
    for name in names:
        for mark, form in _UNSUPPORTED.items():
            if mark in name:
                raise InputError(f"the adapter is {form} ({name}), which is not supported; export it as a plain LoRA")
        found, bare = _strip(name)
        match = _ENTRY.fullmatch(bare)
        if match is None:
            stray.append(name)
            continue
        dialect = found or dialect
        entry = entries.setdefault(match["module"], Entry(match["module"]))
        _place(entry, match["role"], match["part"], name)
    return Grouped(dialect, entries, tuple(stray))


def _strip(name: str) -> tuple[str | None, str]:
    """(dialect that the container prefix tells, name without it)."""
    if name.startswith(_OFFICIAL):
        return "official", name.removeprefix(_OFFICIAL).replace(_HYPHEN, ".")
    dialect = None
    for prefix, candidate in _PREFIXES.items():
        if name.startswith(prefix):
            dialect, name = dialect or candidate, name.removeprefix(prefix)
    return dialect, name


def _place(entry: Entry, role: str, part: str | None, name: str) -> None:
    if role in _DOWN:
        entry.down = name
    elif role.startswith("lora_up") or role in ("lora_B", "lora.up"):
        entry.ups[int(part or 0)] = name
    elif role in ("alpha", "lora_alpha"):
        entry.alpha = name
    else:
        setattr(entry, role, name)


def aliases(modules: Iterable[str]) -> dict[str, tuple[Slot, str]]:
    """Every name an adapter may use for the modules of the model -> (where its rows go, naming).

    Underscore spellings (kohya) are included: which underscores were dots is known from the model's own names.
    """
    table: dict[str, tuple[Slot, str]] = {}
    for module in modules:
        spellings = [(module, Slot(module), "official")]
        for naming, rules in (("wan", WAN_DIT), ("fastvideo", FASTVIDEO_DIT)):
            for source, slot in sources(f"{module}.weight", rules):
                spellings.append((source.removesuffix(".weight"), slot._replace(name=module), naming))
        for spelling, slot, naming in spellings:
            for key in (spelling, spelling.replace(".", "_")):
                table.setdefault(key, (slot, naming))
    return table
