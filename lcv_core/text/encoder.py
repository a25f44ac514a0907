"""The umT5 text encoder: prompts in, states for the DiT's cross-attention out."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lcv_core.config import TextConfig, read_json
from lcv_core.errors import CheckpointError, InputError
from lcv_core.text.prompt import SentencePieceTokenizer, Tokenizer, clean_prompt, tokenize

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

logger = logging.getLogger("lcv_core")


MAX_LENGTH = 512  # tokens that the released model reads


@dataclass(frozen=True, eq=False)
class TextStates:
    """What the DiT reads of a batch of prompts.

    states: [B, L, C] floating; [B, 1, L, C], the official layout, is accepted and squeezed. Pad rows are not zeroed:
        the DiT zeroes them after its caption projection.
    mask: [B, L] integer or bool, non-zero at real tokens; None when every row counts.
    """

    states: torch.Tensor
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        states, mask = self.states, self.mask
        if states.ndim == 4 and states.shape[1] == 1:
            states = states.squeeze(1)
            object.__setattr__(self, "states", states)
        if states.ndim != 3 or states.shape[0] < 1 or not states.is_floating_point():
            raise InputError(
                "text states must be a floating tensor [B, L, C] or [B, 1, L, C],"
                f" got {states.dtype} {list(states.shape)}"
            )
        if mask is None:
            return
        if mask.is_floating_point() or mask.is_complex():
            raise InputError(f"a text mask must be integer or bool, got {mask.dtype}")
        if mask.shape != states.shape[:2]:
            raise InputError(
                f"a text mask for states {list(states.shape)} must be {list(states.shape[:2])}, got {list(mask.shape)}"
            )

    @property
    def batch(self) -> int:
        return self.states.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextStates:
        """A copy on `device`, states in `dtype`; the mask keeps its dtype. None leaves a property as it is."""
        mask = None if self.mask is None else self.mask.to(device=device)
        return TextStates(self.states.to(device=device, dtype=dtype), mask)

    def repeat(self, n: int) -> TextStates:
        """Each prompt n times in a row (a, a, b, b): one entry per video of a prompt."""
        if n < 1:
            raise InputError(f"cannot repeat a prompt {n} times; it must be at least 1")
        mask = None if self.mask is None else self.mask.repeat_interleave(n, dim=0)
        return TextStates(self.states.repeat_interleave(n, dim=0), mask)

    def select(self, i: int) -> TextStates:
        """Entry i alone, batch 1."""
        if not -self.batch <= i < self.batch:
            raise InputError(f"there are {self.batch} prompts, no entry {i}")
        i %= self.batch
        return TextStates(self.states[i : i + 1], None if self.mask is None else self.mask[i : i + 1])

    def concat(self, other: TextStates) -> TextStates:
        """The entries of both, one batch; InputError unless lengths and channels agree."""
        if self.states.shape[1:] != other.states.shape[1:] or (self.mask is None) != (other.mask is None):
            raise InputError(
                f"text states {list(self.states.shape)} and {list(other.states.shape)} cannot share a batch:"
                ' lengths, channels and masks must agree; use cfg_mode="sequential"'
            )
        mask = None if self.mask is None or other.mask is None else torch.cat([self.mask, other.mask])
        return TextStates(torch.cat([self.states, other.states]), mask)


def fit_text(
    states: torch.Tensor, mask: torch.Tensor | None = None, length: int = MAX_LENGTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, L, C] of any encoder host as the DiT was trained to see them: [B, length, C], mask int64 [B, length].

    Hosts that zero padding and give no mask: rows that are not zero count. Longer text is cut (one warning), shorter
    text is padded: padding is part of what the model reads.
    """
    if mask is None:
        mask = (states != 0).any(dim=-1)
    if mask.shape != states.shape[:2]:
        raise InputError(
            f"a text mask for states {list(states.shape)} must be {list(states.shape[:2])}, got {list(mask.shape)}"
        )
    mask = (mask != 0).to(torch.int64)
    if states.shape[1] > length:
        lost = int(mask[:, length:].sum(dim=1).max())
        if lost:
            logger.warning("the prompt has %d tokens too many; only the first %d are read", lost, length)
        return states[:, :length], mask[:, :length]
    missing = length - states.shape[1]
    pad = torch.nn.functional.pad
    return (pad(states, (0, 0, 0, missing)), pad(mask, (0, missing))) if missing else (states, mask)


class TextEncoder:
    """umT5 and its tokenizer, with the states of recent prompts kept in CPU memory.

    model: what `build_text_model` returns, with its weights loaded; it is used where it is and in the dtype it has.
    cache_size: prompts kept, the least recently used dropped first. umT5-XXL states take 4 MiB a prompt in bf16.
    """

    def __init__(
        self, model: UMT5EncoderModel, tokenizer: Tokenizer, max_length: int = MAX_LENGTH, *, cache_size: int = 64
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cache_size = cache_size
        self._cache: OrderedDict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.shared.weight.dtype

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> TextStates:
        """Clean, tokenise and encode: states [B, max_length, C] in the model's dtype, mask int64, on its device.

        Prompts seen before (same text after cleaning) are not encoded again. InputError for no prompt at all.
        """
        cleaned = [clean_prompt(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        if not cleaned:
            raise InputError('encode needs at least one prompt; use "" for an empty one')
        dtype = self.dtype
        # A batch may be larger than the cache, so what this call needs is held apart from it.
        known = {text: self._cache[text, dtype] for text in cleaned if (text, dtype) in self._cache}
        new = [text for text in dict.fromkeys(cleaned) if text not in known]
        if new:
            # One pass for all of them: with weights streamed in from elsewhere, passes are what costs.
            ids, mask = tokenize(self.tokenizer, new, self.max_length)
            output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            states = output.last_hidden_state.to(dtype).cpu()  # [new, L, C]
            known |= {text: (states[i].clone(), mask[i]) for i, text in enumerate(new)}
        self._remember(known, dtype)
        return TextStates(
            torch.stack([known[text][0] for text in cleaned]).to(self.device),
            torch.stack([known[text][1] for text in cleaned]).to(self.device),
        )

    def _remember(self, entries: dict[str, tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
        for text, entry in entries.items():
            self._cache[text, dtype] = entry
            self._cache.move_to_end((text, dtype))
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)


def build_text_model(
    config: TextConfig, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16
) -> UMT5EncoderModel:
    """The transformers umT5 encoder in eval mode without gradients; on "meta" it takes no memory until loaded.

    Its state dict is that of the official files: the input embedding is there once, as `shared.weight`. Load with
    `load_state_dict(state, strict=True, assign=True)`; a file that has the tied copy too, or only that, loads as well.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    fields = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "model_type")}
    with torch.device(device):
        model = UMT5EncoderModel(UMT5Config(**fields))
    # transformers registers the embedding twice and ties the two parameters; assign=True would untie them and leave the
    # copy on meta. The stack gets the same module as a plain attribute instead, so there is nothing to tie.
    del model.encoder.embed_tokens
    object.__setattr__(model.encoder, "embed_tokens", model.shared)
    model.register_load_state_dict_pre_hook(_drop_tied_embedding)
    torch.nn.Module.to(model, dtype)
    return model.eval().requires_grad_(False)


def _drop_tied_embedding(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    copy = state_dict.pop(f"{prefix}encoder.embed_tokens.weight", None)
    if copy is not None:
        state_dict.setdefault(f"{prefix}shared.weight", copy)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The umT5 tokenizer in a local folder: tokenizer.json, else spiece.model. Nothing is ever downloaded.

    CheckpointError naming the expected files when neither is there, or when the one found cannot be read.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "spiece.model").is_file():
            return SentencePieceTokenizer(folder / "spiece.model")
        raise CheckpointError(
            f"no tokenizer in {folder}: expected tokenizer.json (with tokenizer_config.json) or spiece.model,"
            " as in the tokenizer folder of a LongCat-Video checkpoint"
        )
    config = folder / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name in tokens:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        tokens[name] = value or tokens[name]

    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: by the class named in tokenizer_config.json it may rebuild a T5 tokenizer from the vocabulary
    # (other unknown id, other pieces) instead of running the file as it is.
    try:
        return cast(Tokenizer, PreTrainedTokenizerFast(tokenizer_file=str(file), **tokens))
    except Exception as error:  # the Rust parser raises bare Exception
        raise CheckpointError(f"{file} is not a readable tokenizer ({error}); download it again") from None
