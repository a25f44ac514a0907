"""The states of prompts that were encoded before: umT5 is loaded for those alone that are new, and freed at once."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from lcv_core.errors import InputError
from lcv_core.partial import save_atomic
from lcv_core.text.encoder import TextStates
from lcv_core.text.prompt import clean_prompt

log = logging.getLogger("lcv_core")

_IN_MEMORY = 64  # prompts; 4 MiB each for umT5-XXL in bf16


class Encoder(Protocol):
    def encode(self, prompts: str | Sequence[str]) -> TextStates: ...


class TextCache:
    """States by the prompt they are of: in memory, and in a folder where one is named, a file for each.

    maker: whatever else decides the numbers: encoder, tokenizer, dtype, device. Files of another maker are never found;
    damaged ones are passed over with a warning. A folder that cannot be written to costs a warning, not the work.
    """

    def __init__(self, maker: str, folder: str | Path | None = None) -> None:
        self.maker, self.folder = maker, None if folder is None else Path(folder)
        self._known: OrderedDict[str, TextStates] = OrderedDict()

    def _name(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.maker}\n{prompt}".encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def path(self, prompt: str) -> Path | None:
        """Where the states of a cleaned prompt are kept."""
        return None if self.folder is None else self.folder / f"{self._name(prompt)}.safetensors"

    def get(self, prompt: str) -> TextStates | None:
        """States [1, L, C] of a cleaned prompt on the CPU; None where they are not known."""
        name = self._name(prompt)
        if name not in self._known:
            path = self.path(prompt)
            states = None if path is None or not path.is_file() else _read(path)
            if states is None:
                return None
            self._known[name] = states
        self._known.move_to_end(name)
        return self._known[name]

    def put(self, prompt: str, states: TextStates) -> None:
        """Keep states [1, L, C] on the CPU."""
        self._known[self._name(prompt)] = states
        while len(self._known) > _IN_MEMORY:
            self._known.popitem(last=False)
        path = self.path(prompt)
        if path is None:
            return
        tensors = {"states": states.states} | ({} if states.mask is None else {"mask": states.mask})
        try:
            save_atomic(path, tensors, {"digest": _digest(tensors)})
        except InputError as error:
            log.warning("the text cache is not written: %s", error)


def _read(path: Path) -> TextStates | None:
    try:
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get("digest")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        if _digest(tensors) != digest:
            raise ValueError("its content has changed")
        return TextStates(tensors["states"], tensors.get("mask"))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        log.warning("ignoring the damaged %s in the text cache (%s); the prompt is encoded again", path.name, error)
        return None


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CachedEncoder:
    """Prompts in, states out on the CPU, as `Components.text_encoder`; the encoder proper is there while it is needed.

    load: gives the encoder. Each prompt is encoded by itself, so that its states do not depend on what it was asked
    with: they are those of `TextEncoder.encode([prompt])`.
    """

    def __init__(self, load: Callable[[], Encoder], cache: TextCache) -> None:
        self._load, self.cache = load, cache

    def knows(self, prompts: Sequence[str]) -> bool:
        """Whether none of them has to be encoded."""
        return all(self.cache.get(clean_prompt(prompt)) is not None for prompt in prompts)

    def encode(self, prompts: str | Sequence[str]) -> TextStates:
        """States [B, L, C] and mask of any number of prompts, at least one."""
        cleaned = [clean_prompt(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        if not cleaned:
            raise InputError('encode needs at least one prompt; use "" for an empty one')
        known = {text: states for text in cleaned if (states := self.cache.get(text)) is not None}
        new = [text for text in dict.fromkeys(cleaned) if text not in known]
        if new:
            encoder = self._load()
            for text in new:
                known[text] = encoder.encode([text]).to("cpu")
            del encoder
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            for text in new:
                self.cache.put(text, known[text])
        together = known[cleaned[0]]
        for text in cleaned[1:]:
            together = together.concat(known[text])
        return together
