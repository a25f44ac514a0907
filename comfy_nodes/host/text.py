"""The umT5 encoder as a native CLIP, and prompts encoded exactly as the model was trained to see them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.text_encoders.t5
import torch
from comfy import sd1_clip
from torch import Tensor

from lcv_core.config import TextConfig
from lcv_core.errors import CheckpointError, InputError
from lcv_core.text.encoder import MAX_LENGTH, TextStates, fit_text, load_tokenizer
from lcv_core.text.prompt import Tokenizer, clean_prompt
from lcv_core.weights.assemble import some
from lcv_core.weights.checkpoint import Checkpoint, open_text_encoder

log = logging.getLogger("lcv_core")

Conditioning = list[list[Any]]  # ComfyUI's [[states, options], ...]

_NAME = "umt5xxl"  # of the tokens: as in ComfyUI's own Wan text encoder
_BIG = 2_000_000_000  # parameters; above, fp32 files are kept in bf16, as the official pipeline loads them


def load_clip(checkpoint: Checkpoint) -> Any:
    """The checkpoint's text encoder and tokenizer as a CLIP that ComfyUI moves, patches and frees like its own."""
    config, tensors = open_text_encoder(checkpoint.require("text_encoder"))
    _check_supported(config)
    tokenizer = load_tokenizer(checkpoint.require("tokenizer"))
    parameters = sum(math.prod(tensors.shape(name)) for name in tensors.keys())  # noqa: SIM118
    dtype = tensors.dtype("shared.weight")
    if dtype == torch.float32 and parameters > _BIG:
        dtype = torch.bfloat16
    target = SimpleNamespace(params={"config": config}, clip=_Model, tokenizer=lambda **_: _Tokenizer(tokenizer))
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options={"dtype": dtype})
    state = {name: tensors.read(name, "cpu", dtype) for name in tensors.keys()}  # noqa: SIM118
    missing, unexpected = clip.load_sd(state)
    missing = [name for name in missing if "embed_tokens" not in name and "logit_scale" not in name]
    if missing or unexpected:
        raise CheckpointError(
            f"{checkpoint.text_encoder} does not fit the umT5 encoder: missing {some(missing) or 'nothing'},"
            f" unexpected {some(unexpected) or 'nothing'}"
        )
    return clip


def _check_supported(config: TextConfig) -> None:
    """ComfyUI's T5 has these fixed."""
    if config.num_heads * config.d_kv != config.d_model or config.relative_attention_num_buckets != 32:
        raise CheckpointError(
            "this umT5 encoder has a shape that ComfyUI's T5 does not: it needs num_heads * d_kv = d_model and 32"
            f" relative position buckets, got {config.num_heads} * {config.d_kv}, d_model {config.d_model} and"
            f" {config.relative_attention_num_buckets} buckets"
        )


class _Encoder(sd1_clip.SDClipModel):
    """umT5 of any size on ComfyUI's T5, padding zeroed as its Wan encoder does, with the mask given out."""

    def __init__(self, config: TextConfig, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        settings = config.to_dict() | {
            "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5",
        }  # fmt: skip
        super().__init__(
            device=device, dtype=dtype, textmodel_json_config=settings, special_tokens={"end": 1, "pad": 0},
            model_class=comfy.text_encoders.t5.T5, enable_attention_masks=True, zero_out_masked=True,
            return_attention_masks=True, model_options=model_options or {},
        )  # fmt: skip


class _Model(sd1_clip.SD1ClipModel):
    def __init__(self, config: TextConfig, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        def make(device: Any = "cpu", dtype: Any = None, model_options: Any = None, **_: Any) -> _Encoder:
            return _Encoder(config, device, dtype, model_options)

        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, name=_NAME, clip_model=make)


class _Pieces:
    """A tokenizer of ours behind the few calls that ComfyUI's makes of a transformers one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: Tokenizer, **_: Any) -> _Pieces:
        return cls(path)

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = list(self._tokenizer([text], add_special_tokens=True, padding=False, verbose=False)["input_ids"][0])
        eos = self._tokenizer.eos_token_id
        return {"input_ids": ids if ids and ids[-1] == eos else [*ids, eos]}

    def get_vocab(self) -> dict[str, int]:
        return {}  # ComfyUI inverts it to print tokens


class _Tokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, tokenizer: Tokenizer) -> None:
        def make(embedding_directory: Any = None, tokenizer_data: Any = None) -> sd1_clip.SDTokenizer:
            return sd1_clip.SDTokenizer(
                tokenizer, pad_with_end=False, embedding_directory=None, embedding_key=_NAME, tokenizer_class=_Pieces,
                has_start_token=False, pad_to_max_length=False, max_length=99999999, min_length=MAX_LENGTH,
                pad_token=0, tokenizer_data=tokenizer_data or {},
            )  # fmt: skip

        super().__init__(clip_name=_NAME, tokenizer=make)

    def state_dict(self) -> dict[str, Any]:
        return {}


def encode_prompt(clip: Any, prompt: str) -> Conditioning:
    """A prompt through any umT5 CLIP: cleaned, cut to 512 tokens with a warning, without prompt weighting, with the
    exact mask. InputError when the CLIP is not umT5."""
    if clip is None:
        raise InputError("there is no CLIP; connect the LongCat-Video Loader's CLIP, or a CLIPLoader of type wan")
    text = clean_prompt(prompt)
    # Parentheses are words to this model; escaped, ComfyUI leaves them alone.
    tokens = clip.tokenize(text.replace("(", "\\(").replace(")", "\\)"))
    if list(tokens) != [_NAME]:
        raise InputError(
            f"this CLIP is not umT5 (its tokens are {', '.join(tokens)}); connect the LongCat-Video Loader's CLIP, or a"
            " CLIPLoader of type wan with umt5_xxl"
        )
    rows = [_cut(row) for row in tokens[_NAME]]
    conditioning = clip.encode_from_tokens_scheduled({_NAME: rows})
    for entry in conditioning:
        states, mask = fit_text(entry[0], entry[1].get("attention_mask"))
        entry[0], entry[1]["attention_mask"] = states, mask
    return conditioning


def _cut(row: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """At most 512 tokens, the end token last; ComfyUI's Wan tokenizer cuts nothing."""
    if len(row) <= MAX_LENGTH:
        return row
    log.warning("the prompt has %d tokens, only %d are kept; shorten it to use all of it", len(row), MAX_LENGTH)
    return [*row[: MAX_LENGTH - 1], row[-1]]


class HostEncoder:
    """A CLIP as the pipelines' text encoder. The states of a prompt are computed once while this object lives."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        self._known: dict[str, Conditioning] = {}

    def encode(self, prompts: str | Iterable[str]) -> TextStates:
        """States [B, 512, C] of prompts. A scheduled or regional conditioning cannot come of a plain prompt."""
        found = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            if prompt not in self._known:
                self._known[prompt] = encode_prompt(self._clip, prompt)
            found.append(text_states(self._known[prompt]))
        return TextStates(torch.cat([s.states for s in found]), torch.cat([_mask(s) for s in found]))


def _mask(states: TextStates) -> Tensor:
    assert states.mask is not None
    return states.mask


def text_states(conditioning: Conditioning) -> TextStates:
    """The first entry of a CONDITIONING as TextStates; InputError where it is empty."""
    if not conditioning:
        raise InputError("the conditioning is empty; connect a text encode node")
    states, mask = fit_text(conditioning[0][0], conditioning[0][1].get("attention_mask"))
    return TextStates(states, mask)


def conditioning_of(states: TextStates) -> Conditioning:
    """The inverse of `text_states`."""
    return [[states.states, {"pooled_output": None, "attention_mask": states.mask}]]
