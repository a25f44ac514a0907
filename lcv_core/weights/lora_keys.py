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

from lcv_core.errors import InputError
from lcv_core.weights.keymaps import FASTVIDEO_DIT, WAN_DIT, Slot, sources

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
