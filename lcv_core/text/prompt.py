"""From what a person typed to the token ids and mask that umT5 reads."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html.entities import html5
from pathlib import Path
from typing import Any, Protocol

import torch

from lcv_core.errors import CheckpointError, InputError

logger = logging.getLogger("lcv_core")

# The string the official demos pass; wording and repetitions are theirs, and guidance results depend on it.
DEFAULT_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, "
    "messy background, three legs, many people in the background, walking backwards"
)

_CUT_TOKENS_SHOWN = 16  # enough to hold the first few words of what a long prompt loses
_CUT_WORDS_SHOWN = 5

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_TERMINAL_ESCAPE = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
_CONTROL_CHARACTERS = dict.fromkeys(i for i in (*range(0x20), 0x7F) if chr(i) not in "\t\n\f\r")


class Tokenizer(Protocol):
    """What `tokenize` needs: any fast transformers tokenizer has it, `SentencePieceTokenizer` too."""

    @property
    def pad_token_id(self) -> Any: ...

    @property
    def eos_token_id(self) -> Any: ...

    def __call__(self, text: Any, **kwargs: Any) -> Mapping[str, Any]: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


def clean_prompt(text: str) -> str:
    """The prompt as the model was trained to see it: repaired unicode, no HTML entities, single spaces.

    ftfy, HTML unescape twice (prompts that went through a web form are often escaped twice), whitespace collapsed.
    Without ftfy the result is the same for text that is ASCII and names no other character by an entity; the first
    other text is warned about. The same text gives the same string, which makes it the key of the embedding cache.
    InputError if not a string.
    """
    if not isinstance(text, str):
        raise InputError(f"a prompt must be text, got {type(text).__name__}")
    try:
        from ftfy import fix_text
    except ImportError:
        fix_text = _fix_ascii
    text = html.unescape(html.unescape(fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def _fix_ascii(text: str) -> str:
    """What ftfy does to ASCII text: entities of a text without markup, terminal escapes, control characters."""
    lines, plain = [], True
    for line in text.split("\n"):
        plain = plain and "<" not in line  # from the first "<" on the text is markup, its entities are left alone
        lines.append(_fix_line(line, plain))
    text = "\n".join(lines)
    if not "".join(text.split()).isascii():
        _warn_no_ftfy()
        # Half of a surrogate pair would stop the tokenizer.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _fix_line(line: str, plain: bool) -> str:
    while True:
        before = line
        if plain:
            line = _ENTITY.sub(_unescape_entity, line)
        line = line.replace("\r", "\n")
        line = _TERMINAL_ESCAPE.sub("", line).translate(_CONTROL_CHARACTERS)
        if line == before:
            return line


def _unescape_entity(match: re.Match[str]) -> str:
    """An entity that ends in a semicolon, also one that was written in capitals: &EXCL; is &excl;."""
    entity = match.group()
    if entity.startswith("&#"):
        character = html.unescape(entity)
        return entity if ";" in character else character
    name = entity[1:]
    if name in html5:
        return html5[name]
    shouted = name == name.upper() and html.unescape(entity) == entity
    return html5[name.lower()].upper() if shouted and name.lower() in html5 else entity


@cache
def _warn_no_ftfy() -> None:
    logger.warning(
        "a prompt has characters other than ASCII, which ftfy would repair where they are damaged and simplify (quotes,"
        " ligatures, full width) as the model expects; it is not installed: `pip install ftfy`"
    )


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], max_length: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both int64 [B, max_length], padded on the right; every row ends its text with eos.

    A longer prompt keeps its first max_length - 1 tokens and eos, and one log record tells what was lost.
    Prompts are taken as they are: clean them first. InputError for an empty list or max_length < 1.
    """
    if isinstance(prompts, str) or not prompts:
        raise InputError("tokenize needs a list with at least one prompt")
    if max_length < 1:
        raise InputError(f"max_length must be at least 1 (room for the end token), got {max_length}")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None or pad is None:
        raise CheckpointError("this tokenizer defines no pad or no eos token; expected the umT5 one (<pad> 0, </s> 1)")
    # Cut here rather than in the tokenizer, which drops the surplus without saying so. verbose=False silences its own
    # notice about model_max_length.
    rows = tokenizer(list(prompts), add_special_tokens=True, padding=False, truncation=False, verbose=False)[
        "input_ids"
    ]
    ids = torch.full((len(rows), max_length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        row = list(row)
        if not row or row[-1] != eos:
            row.append(eos)
        if len(row) > max_length:
            _warn_cut(tokenizer, row, max_length)
            row = [*row[: max_length - 1], eos]
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids, mask


def _warn_cut(tokenizer: Tokenizer, row: list[int], max_length: int) -> None:
    cut = str(tokenizer.decode(row[max_length - 1 : -1][:_CUT_TOKENS_SHOWN], skip_special_tokens=True)).split()
    logger.warning(
        'the prompt has %d tokens, only %d are kept; cut from "%s ..." on. Shorten it to use all of it',
        len(row),
        max_length,
        " ".join(cut[:_CUT_WORDS_SHOWN]),
    )


class SentencePieceTokenizer:
    """A tokenizer straight from a SentencePiece file, for checkpoints that ship spiece.model alone."""

    def __init__(self, path: str | Path) -> None:
        """CheckpointError when the file is not a SentencePiece model."""
        import sentencepiece

        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a SentencePiece model ({error}); download it again") from None

    @property
    def pad_token_id(self) -> int:
        return self._pieces.pad_id()

    @property
    def eos_token_id(self) -> int:
        return self._pieces.eos_id()

    def __call__(self, text: Sequence[str], **kwargs: Any) -> dict[str, list[list[int]]]:
        """Unpadded, untruncated ids with eos, as a transformers tokenizer returns them; options are ignored."""
        return {"input_ids": [[*self._pieces.EncodeAsIds(prompt), self.eos_token_id] for prompt in text]}

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        return self._pieces.DecodeIds(list(token_ids))
