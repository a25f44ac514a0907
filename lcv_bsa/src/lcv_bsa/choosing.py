"""How key blocks are chosen: by the product of block means (LongCat-Video, arXiv 2510.22200), in plain PyTorch."""

from fractions import Fraction

import torch
from torch import Tensor

from lcv_bsa.layout import BlockLayout, block_means
from lcv_bsa.precision import no_autocast, true_fp32
from lcv_bsa.selection import mask_to_indices

# Scores live a slice of rows at a time: all of them at once would be 0.9 GB at 720p, and their sort twice that.
_SCORES_AT_ONCE = 1 << 24

# A share is read as the nearest fraction with a denominator up to this: 1 - 0.9 is meant as 1/10, not as the
# 0.09999999999999998 that floats make of it, of which 10 blocks would keep none.
_LARGEST_DENOMINATOR = 10**6


def kept_blocks(keep: float, num_blocks: int) -> int:
    """floor(keep * num_blocks), not one less when the product is whole but for float rounding. May be 0."""
    numerator, denominator = _as_ratio(keep)
    return numerator * num_blocks // denominator


def _as_ratio(share: float) -> tuple[int, int]:
    ratio = Fraction(share).limit_denominator(_LARGEST_DENOMINATOR)
    return ratio.numerator, ratio.denominator


def choose_blocks(
    q: Tensor,
    k: Tensor,
    layout_q: BlockLayout,
    layout_k: BlockLayout,
    *,
    least: int,
    cdf_threshold: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """indices and counts of a `BlockSelection`: `least` blocks per row, or more where the cdf asks for more.

    q [B, H, Sq, D], k [B, Hkv, Skv, D]. Scores are the products of block means, in the precision of the statistics.
    """
    with torch.no_grad(), no_autocast(q.device), true_fp32(q.device):
        mean_q = block_means(q, layout_q)  # [B, H, Nq, D]
        mean_k = block_means(k, layout_k).repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, H, Nk, D]
        rows = max(1, _SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * layout_k.num_blocks))
        parts: list[tuple[Tensor, Tensor]] = []
        for mean in mean_q.split(rows, 2):
            scores = _finite(mean @ mean_k.mT)
            if cdf_threshold is None:
                mask, width = _top_k_mask(scores, least), least
            else:
                mask = _cdf_mask(scores * scale, least, cdf_threshold)
                width = int(mask.sum(-1).max())
            parts.append(_listed(mask, width, uniform=cdf_threshold is None))
    width = max(indices.shape[-1] for indices, _ in parts)
    # the last entry of a row is its last valid id: repeating it widens the row
    widened = [torch.cat([i, i[..., -1:].expand(*i.shape[:3], width - i.shape[3])], -1) for i, _ in parts]
    return torch.cat(widened, 2), torch.cat([counts for _, counts in parts], 2)


def _listed(mask: Tensor, width: int, *, uniform: bool) -> tuple[Tensor, Tensor]:
    """indices [..., width] and counts of a mask. uniform: every row keeps `width`."""
    if uniform and not mask.is_cuda:
        # on a GPU nonzero would have to be waited for
        indices = mask.nonzero()[:, -1].to(torch.int32).view(*mask.shape[:-1], width)
        return indices, torch.full_like(indices[..., 0], width)
    return mask_to_indices(mask, width), mask.sum(-1, dtype=torch.int32)


def _finite(scores: Tensor) -> Tensor:
    """NaN ranks last, with -inf; an order and a softmax exist for every row."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(limits.min, limits.max, limits.min)


def _top_k_mask(scores: Tensor, count: int) -> Tensor:
    """The `count` largest scores [..., Nk] of each row, ties to the lower id.

    torch.topk leaves ties open, so it gives only the smallest kept score; what equals it is taken from the left.
    """
    smallest = scores.topk(count, -1).values[..., -1:]
    above, ties = scores > smallest, scores == smallest
    wanted = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= wanted))


def _cdf_mask(scaled: Tensor, least: int, threshold: float) -> Tensor:
    """As many of the largest as have a cumulative probability <= threshold, and no fewer than `least`."""
    ordered, order = _finite(scaled).sort(dim=-1, descending=True, stable=True)
    # a sum of probabilities passes 1 by rounding alone
    sums = ordered.softmax(-1).cumsum(-1).clamp(max=1)
    counts = (sums <= threshold).sum(-1, keepdim=True).clamp(min=least)
    ranks = torch.arange(scaled.shape[-1], device=scaled.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, ranks < counts)
