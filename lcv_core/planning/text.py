"""Bytes of the umT5 encoder: weights, and the activations of one pass over a batch of prompts.

Hosts and versions of transformers attend in different ways; counted is the one that takes most, scores written out and
their softmax in fp32. Beside the weights it is little.
"""

from __future__ import annotations

from lcv_core.config import TextConfig
from lcv_core.planning.sparse import Device

_FP32 = 4  # bytes
_INT64 = 8
_BUCKETS = 7  # [L, L] of int64 while the distance of every two tokens is sorted into buckets
_GELU = 5  # [B, L, d_ff] of the gated feed-forward: its GELU is written out


def text_parameters(config: TextConfig) -> int:
    """Weights of the encoder, the embedding counted once."""
    d, inner = config.d_model, config.num_heads * config.d_kv
    layer = 4 * d * inner + 3 * d * config.d_ff + 2 * d + config.relative_attention_num_buckets * config.num_heads
    return config.vocab_size * d + config.num_layers * layer + d


def largest_text_weight(config: TextConfig) -> int:
    """Elements of the largest weight of a layer."""
    return config.d_model * max(config.d_ff, config.num_heads * config.d_kv)


def text_bytes(
    config: TextConfig, *, batch: int = 1, length: int = 512, itemsize: int = 2, device: Device = "cpu"
) -> int:
    """Most bytes alive at once while `batch` prompts of `length` tokens are encoded, besides weights.

    A GPU's library copies q, k, v and what attention gives, to have each head's rows side by side.
    """
    rows = batch * length
    x = rows * config.d_model * itemsize
    in_fp32 = rows * config.d_model * _FP32
    qkv = 3 * rows * config.num_heads * config.d_kv * itemsize
    pairs = length * length
    bias = config.num_heads * pairs * itemsize
    half = itemsize < _FP32
    weights = batch * config.num_heads * pairs * itemsize  # of the attention; some hosts hold them for a layer
    scores = 2 * weights * _FP32 // itemsize + (weights if half else 0)
    mask = batch * pairs * itemsize
    copies = 0 if device == "cpu" else 4 * rows * config.num_heads * config.d_kv * itemsize
    moments = (
        2 * x + qkv + mask + _BUCKETS * pairs * _INT64,  # relative positions
        2 * x + qkv + mask + bias + scores + copies,
        2 * x + mask + weights + _GELU * rows * config.d_ff * itemsize,
        2 * x + mask + 2 * in_fp32,  # norm
    )
    return max(moments)
