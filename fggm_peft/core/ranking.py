"""Exact selection of the best scores, without sorting.

Everything is computed on the CPU, so that the same scores lead to the same selection on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import NonFiniteScoreError

_LOW_BITS = 16
_BINS = 1 << _LOW_BITS
_CHUNK = 1 << 20


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry of a floating-point tensor is NaN or infinite.

    The extremes are NaN if any entry is; ``isfinite`` on all entries takes twenty times as long.
    """
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def checked(scores: Tensor) -> Tensor:
    """``scores`` as float32 on the CPU; ``NonFiniteScoreError`` if a score is NaN, infinite or negative."""
    scores = scores.detach().to("cpu", torch.float32)
    if not all_finite(scores) or bool((scores < 0).any()):
        raise NonFiniteScoreError("scores must be finite and not negative")
    return scores


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest positive scores, sorted; ties go to the lower index."""
    scores = checked(scores)
    if len(scores) < _BINS:  # with many small weights, such as experts, the histograms would take most of the time
        best = scores.argsort(descending=True, stable=True)[: max(count, 0)]
        return best[scores[best] > 0].sort().values
    return take([scores], [torch.ones_like], count)[0]


def per_parameter(scores: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
    """Scores of units as scores per parameter, which compare weights of different widths."""
    return [checked(s) / cost for s, cost in zip(scores, costs, strict=True)]


def only_best(scores: Tensor, most: int | None) -> Tensor:
    """``scores`` with zeros for all but the ``most`` best; unchanged if ``most`` is None."""
    if most is None or len(scores) <= most:
        return scores
    scores = checked(scores)
    best = top_indices(scores, most)
    return torch.zeros_like(scores).index_copy(0, best, scores[best])


def best_per_parameter(scores: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[Tensor]:
    """The units with the best scores per parameter, until the next would not fit into ``budget`` parameters."""
    weigh = [lambda rank, cost=cost: torch.full_like(rank, cost, dtype=torch.float64) for cost in costs]
    return take(per_parameter(scores, costs), weigh, budget)


def take(
    ranks: Sequence[Tensor], weigh: Sequence[Callable[[Tensor], Tensor]], budget: float, overshoot: bool = False
) -> list[Tensor]:
    """Take entries from the highest rank down until their weights reach ``budget``.

    Two passes of histograms over the bit patterns find the rank of the last entry exactly; among entries of that rank
    those with lower (weight, index) come first. Memory beyond the ranks is a few MiB; for 1e8 entries it takes about 15
    times as long as a sum.

    Args:
        ranks: for each weight, ``[units]`` float32, finite, >= 0, on the CPU.
        weigh: for each weight, ranks -> the weights of their entries, float64.
        budget: the total weight to reach.
        overshoot: whether to take the entry that crosses the budget.
    """
    if budget <= 0:
        return [torch.empty(0, dtype=torch.int64) for _ in ranks]
    high, left = _cutoff(ranks, weigh, budget, lambda bits: bits >> _LOW_BITS, None)
    low, left = _cutoff(ranks, weigh, left, lambda bits: bits & (_BINS - 1), high)
    cut = (high << _LOW_BITS) | low
    chosen = []
    for rank, weight_of in zip(ranks, weigh, strict=True):
        bits = rank.view(torch.int32)
        taken = bits > cut
        ties = ((bits == cut) & (bits > 0)).nonzero().flatten()
        if len(ties) and left > 0:
            each = float(weight_of(rank[ties[:1]]).double()[0])
            fitting = left / each
            count = min(len(ties), -int(-fitting // 1) if overshoot else int(fitting + 1e-9))
            taken[ties[:count]] = True
            left -= count * each
        chosen.append((taken & (bits > 0)).nonzero().flatten())
    return chosen


def _cutoff(ranks, weigh, budget: float, bin_of, inside: int | None) -> tuple[int, float]:
    """The bin in which the running weight from the top passes ``budget``, and the budget that is left for it."""
    totals = torch.zeros(_BINS, dtype=torch.float64)
    for rank, weight_of in zip(ranks, weigh, strict=True):
        for chunk in rank.split(_CHUNK):
            bits = chunk.view(torch.int32)
            keep = bits > 0
            if inside is not None:
                keep &= (bits >> _LOW_BITS) == inside
            bits, chunk = bits[keep], chunk[keep]
            totals += torch.bincount(bin_of(bits), weight_of(chunk).double(), minlength=_BINS)
    from_top = totals.flip(0).cumsum(0)
    passed = (from_top >= budget).nonzero().flatten()
    if not len(passed):  # everything fits: cut below the smallest bin
        return 0, budget
    position = int(passed[0])
    return _BINS - 1 - position, budget - (float(from_top[position - 1]) if position else 0.0)
